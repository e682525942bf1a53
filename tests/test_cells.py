"""A small study end to end: everything computed once, from what it was computed, and the same again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gcnet import cells as stages
from gcnet.cells import (
    Cell,
    cell_folder,
    cell_masks,
    cell_result,
    cells,
    connectivity_images,
    connectivity_matrices,
    corrupted_images,
    dense,
    dense_folder,
    drift_rows,
    example_input,
    flops_rows,
    graph,
    network,
    normalized_batches,
    pruned_network,
    recipe,
    shift_images,
    shift_rows,
    splits,
    unshifted_rows,
)
from gcnet.connectivity import connectivity
from gcnet.cost import macs
from gcnet.evaluation import score
from gcnet.hybrid import hybrid_masks
from gcnet.pruning import Masks
from gcnet.shifts import corrupt
from gcnet.store import read_json
from gcnet.study import Study
from gcnet.training import train

STUDY = Study.create(
    study="small", dataset="digits", channels=1, network="resnet20", width=0.125, seeds=[0], epochs=1, batch_size=40,
    train_images=120, crop_padding=2, flip=False, pruners=["l1"], sparsities=[0.8], guidance={"pearson": ["B25"]},
    finetune_epochs=1, flops_similarities=["pearson"], shifts=["contrast"], severities=[1, 5], shift_images=50,
    device="cpu", precision="float32",
)  # fmt: skip
DENSE, DIRECT, GUIDED = cells(STUDY)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the small study was run once."""
    root = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root))
        for cell in cells(STUDY):
            cell_result(STUDY, cell)
            shift_rows(STUDY, cell)
        flops_rows(STUDY, 0, "pearson")
        drift_rows(STUDY, 0)
    return root


@pytest.fixture
def store(computed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GCNET_RUNS", str(computed))
    return computed


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this was computed before")

    for name in ("train", "connectivity", "hybrid_masks", "corrupt", "score"):
        monkeypatch.setattr(stages, name, fail)


def test_cells_are_the_whole_grid_each_once() -> None:
    study = Study.create(
        seeds=[3, 4], pruners=["l1", "lamp"], sparsities=[0.5, 0.9],
        guidance={"pearson": ["Full", "B25"], "partial": ["BH"]}, direct_pruners=["random"],
    )  # fmt: skip
    found = cells(study)
    assert len(found) == len(set(found)) == 2 * (1 + 2 * (2 * (1 + 3) + 1))
    assert {cell.hybrid for cell in found if cell.pruner == "random"} == {"direct"}
    assert [c for c in found if c.is_dense] == [Cell("none", "none", "none", 0.0, seed) for seed in (3, 4)]
    assert Cell("lamp", "direct", "none", 0.9, 4) in found and Cell("l1", "BH", "partial", 0.5, 3) in found
    assert Cell("l1", "Full", "partial", 0.5, 3) not in found
    assert DENSE.is_dense and Cell("l1", "direct", "none", 0.8, 0) == DIRECT
    assert GUIDED.row() == {"pruner": "l1", "hybrid": "B25", "similarity": "pearson", "sparsity": 0.8, "seed": 0}


@pytest.mark.usefixtures("store")
def test_the_dense_network_is_the_one_that_the_trainer_makes() -> None:
    by_hand = network(STUDY, 0)
    history = train(by_hand, splits(STUDY).train, recipe(STUDY), seed=0, precision="float32")
    kept = dense(STUDY, 0)
    assert not kept.training
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), by_hand.parameters(), strict=True))
    assert read_json(dense_folder(STUDY, 0) / "history.json")[0]["loss"] == history[0]["loss"]
    assert sorted(p.name for p in dense_folder(STUDY, 0).iterdir()) == [
        "entry.json", "history.json", "model.safetensors"
    ]  # fmt: skip


@pytest.mark.usefixtures("store")
def test_connectivity_is_that_of_the_training_images_as_the_network_sees_them() -> None:
    net, images = dense(STUDY, 0), splits(STUDY).train
    by_hand = connectivity(net[1], [(net[0](images.images), images.labels)])
    kept = connectivity_matrices(STUDY, 0, "pearson")
    assert kept.keys() == by_hand.keys()
    assert all(torch.allclose(kept[layer], by_hand[layer], atol=1e-5) for layer in kept)


@pytest.mark.usefixtures("store")
def test_connectivity_on_fewer_images() -> None:
    few = connectivity_images(STUDY.model_copy(update={"connectivity_images": 30}))
    assert len(few) == 30 and few.labels.bincount().tolist() == [3] * 10
    assert len(connectivity_images(STUDY)) == 120
    values = [x for x, _ in normalized_batches(network(STUDY, 0), few)]
    assert values[0].dtype == torch.float32 and abs(values[0].mean()) < 0.2


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("cell", [DIRECT, GUIDED], ids=["direct", "guided"])
def test_a_cell_is_pruned_fine_tuned_and_measured(cell: Cell) -> None:
    result, folder = cell_result(STUDY, cell), cell_folder(STUDY, cell)
    masks, net = Masks.load(folder / "masks.safetensors"), pruned_network(STUDY, cell)
    total = sum(mask.numel() for mask in masks.values())
    assert result["kept_weights"] == total - round(0.8 * total) == sum(int(m.sum()) for m in masks.values())
    for name, mask in masks.items():  # fine-tuned, and still exactly pruned
        value = net[1].get_parameter(name)
        assert bool((value[~mask] == 0).all())
        assert not torch.equal(value[mask], dense(STUDY, 0)[1].get_parameter(name)[mask]) or not mask.any()
    again = score(net, splits(STUDY).test, precision="float32")
    assert (result["accuracy"], result["ece"]) == (again["accuracy"], pytest.approx(again["ece"]))
    assert result["macs"] == macs(net[1], example_input(STUDY), masks) < macs(net[1], example_input(STUDY))
    assert {k: result[k] for k in cell.row()} == cell.row()
    assert sorted(p.name for p in folder.iterdir()) == [
        "cell.json", "entry.json", "masks.safetensors", "model.safetensors"
    ]  # fmt: skip


@pytest.mark.usefixtures("store")
def test_masks_of_a_cell_are_those_of_the_method() -> None:
    net = dense(STUDY, 0)
    for cell, matrices in ((DIRECT, {}), (GUIDED, connectivity_matrices(STUDY, 0, "pearson"))):
        by_hand, _ = hybrid_masks(
            net[1], graph(STUDY, net[1]), matrices, pruner="l1", sparsity=0.8, hybrid=cell.hybrid,
            example_input=example_input(STUDY),
        )  # fmt: skip
        for masks in (cell_masks(STUDY, cell), Masks.load(cell_folder(STUDY, cell) / "masks.safetensors")):
            assert all(torch.equal(masks[name], mask) for name, mask in by_hand.items())


@pytest.mark.usefixtures("store")
def test_the_dense_network_is_a_cell_of_the_table_too() -> None:
    result = cell_result(STUDY, DENSE)
    clean = score(dense(STUDY, 0), splits(STUDY).test, precision="float32")
    assert result["accuracy"] == result["accuracy_before"] == clean["accuracy"]
    layers = [m for m in dense(STUDY, 0).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert result["kept_weights"] == sum(m.weight.numel() for m in layers)
    assert result.keys() == cell_result(STUDY, DIRECT).keys()


@pytest.mark.usefixtures("store")
def test_shifts_are_those_of_the_fixed_test_images() -> None:
    rows = shift_rows(STUDY, GUIDED)
    assert [(row["shift"], row["severity"]) for row in rows] == [("clean", 0), ("contrast", 1), ("contrast", 5)]
    assert rows[0]["images"] == len(splits(STUDY).test) and rows[1]["images"] == 50
    assert rows[0]["accuracy"] == cell_result(STUDY, GUIDED)["accuracy"]
    few = shift_images(STUDY)
    assert few.labels.bincount().tolist() == [5] * 10
    shifted = corrupted_images(STUDY, "contrast", 5)
    assert torch.equal(shifted, corrupt(few.images, "contrast", 5, 0))
    hits = pruned_network(STUDY, GUIDED)(shifted).argmax(1) == few.labels
    assert rows[2]["accuracy"] == pytest.approx(hits.double().mean().item())


@pytest.mark.usefixtures("store")
def test_multiply_accumulates_by_similarity() -> None:
    rows = flops_rows(STUDY, 0, "pearson")
    assert [row["hybrid"] for row in rows] == ["Full", "FH", "BH", "B25"]
    whole = macs(network(STUDY, 0)[1], example_input(STUDY))
    assert all(row["macs_dense"] == whole and 0 < row["macs"] < whole for row in rows)
    b25 = cell_masks(STUDY, Cell(STUDY.flops_pruner, "B25", "pearson", 0.8, 0))
    assert rows[3]["macs"] == macs(network(STUDY, 0)[1], example_input(STUDY), b25)


@pytest.mark.usefixtures("store")
def test_drift_is_the_relative_distance_of_connectivity() -> None:
    rows = drift_rows(STUDY, 0)
    net, few = dense(STUDY, 0), shift_images(STUDY)
    clean = connectivity(net[1], [(net[0](few.images), few.labels)])
    moved = connectivity(net[1], [(net[0](corrupted_images(STUDY, "contrast", rows[0]["severity"])), few.labels)])
    assert [row["layer"] for row in rows] == list(clean) and {row["shift"] for row in rows} == {"contrast"}
    for row in rows:
        by_hand = np.linalg.norm(moved[row["layer"]] - clean[row["layer"]]) / np.linalg.norm(clean[row["layer"]])
        assert row["distance"] == pytest.approx(by_hand, rel=1e-3) and -1 <= row["rank_correlation"] <= 1


@pytest.mark.usefixtures("store")
def test_other_clean_images_tell_what_chance_moves() -> None:
    rows, moved = unshifted_rows(STUDY, 0), drift_rows(STUDY, 0)
    assert [row["layer"] for row in rows] == list(dict.fromkeys(row["layer"] for row in moved))
    assert {(row["shift"], row["severity"]) for row in rows} == {("other clean images", 0)}
    assert all(row["distance"] > 0 and row["rank_correlation"] < 1 for row in rows)
    everything = STUDY.model_copy(update={"shift_images": 0})
    assert unshifted_rows(everything, 0) == []  # there are no others


@pytest.mark.usefixtures("store", "nothing_is_computed")
def test_nothing_is_computed_twice() -> None:
    for cell in cells(STUDY):
        cell_result(STUDY, cell)
        shift_rows(STUDY, cell)
    flops_rows(STUDY, 0, "pearson")
    drift_rows(STUDY, 0)


@pytest.mark.usefixtures("store", "nothing_is_computed")
@pytest.mark.parametrize(
    "change",
    [
        {"study": "another_name"},
        {"seeds": (0, 1)},
        {"pruners": ("random", "l1")},
        {"sparsities": (0.5, 0.8)},
        {"guidance": {"pearson": ("Full", "B25"), "partial": ("BH",)}},
        {"flops_similarities": ("cosine",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_larger_grid_finds_what_the_smaller_one_left(change: dict) -> None:
    study = STUDY.model_copy(update=change)
    for cell in (DENSE, DIRECT, GUIDED):
        cell_result(study, cell)
        shift_rows(study, cell)


@pytest.mark.usefixtures("store", "nothing_is_computed")
@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 2}, {"lr": 0.05}, {"width": 0.25}, {"batch_size": 60}, {"label_smoothing": 0.0}, {"split_seed": 1},
        {"train_images": 100}, {"image_size": 40}, {"weight_decay": 0.0}, {"momentum": 0.5}, {"schedule": "step"},
        {"crop_padding": 0}, {"flip": True}, {"val_share": 0.2}, {"network": "resnet56"}, {"precision": "bfloat16"},
        {"finetune_epochs": 2}, {"finetune_lr": 0.1}, {"tap": "relu"}, {"classwise": True}, {"absolute": True},
        {"residual": "nearest"}, {"connectivity_images": 60}, {"ghost_batchnorm": "original"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_changes_a_result_computes_it_anew(change: dict) -> None:
    with pytest.raises(AssertionError, match="computed before"):
        cell_folder(STUDY.model_copy(update=change), GUIDED)


@pytest.mark.usefixtures("store", "nothing_is_computed")
@pytest.mark.parametrize(
    "change",
    [{"shifts": ("contrast", "fog")}, {"severities": (1, 3)}, {"shift_images": 60}, {"severity_table": "imagenet-c"}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_a_shift_evaluates_anew_but_trains_nothing(change: dict) -> None:
    study = STUDY.model_copy(update=change)
    cell_result(study, GUIDED)
    with pytest.raises(AssertionError, match="computed before"):
        shift_rows(study, GUIDED)


DOWNSTREAM = {
    "dense": lambda study: dense_folder(study, 0),
    "connectivity": lambda study: connectivity_matrices(study, 0, "pearson"),
    "cell": lambda study: cell_folder(study, GUIDED),
    "shift": lambda study: shift_rows(study, GUIDED),
    "drift": lambda study: drift_rows(study, 0),
}


@pytest.mark.usefixtures("store", "nothing_is_computed")
@pytest.mark.parametrize(
    ("version", "stage"),
    [
        ("dense", "dense"), ("dense", "connectivity"), ("dense", "cell"), ("dense", "shift"), ("dense", "drift"),
        ("connectivity", "cell"), ("connectivity", "drift"), ("cell", "shift"), ("corrupted", "shift"),
        ("corrupted", "drift"),
    ],
)  # fmt: skip
def test_a_computation_that_changes_is_new_for_all_that_stands_on_it(
    version: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    DOWNSTREAM[stage](STUDY)  # it is there
    monkeypatch.setitem(stages.VERSIONS, version, 99)
    with pytest.raises(AssertionError, match="computed before"):
        DOWNSTREAM[stage](STUDY)


def test_an_interrupted_training_goes_on_where_it_stopped() -> None:
    study = STUDY.model_copy(update={"epochs": 3})

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dense_folder(study, 0, on_epoch=stop)
    done: list[float] = []
    folder = dense_folder(study, 0, on_epoch=lambda row: done.append(row["epoch"]))
    assert done in ([3], [])  # the first two are not trained again
    by_hand = network(study, 0)
    train(by_hand, splits(study).train, recipe(study), seed=0, precision="float32")
    resumed = dense(study, 0)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), by_hand.parameters(), strict=True))
    assert [row["epoch"] for row in read_json(folder / "history.json")] == [1, 2, 3]


@pytest.fixture
def natural(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """USPS in its folder: ten images of random grey."""
    from gcnet import paths

    folder = paths.images() / "usps"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        images = rng.integers(0, 256, (10, 16, 16), dtype=np.uint8)
        np.savez(folder / f"{part}.npz", images=images, labels=np.arange(10))
    yield


@pytest.mark.usefixtures("store", "natural")
def test_natural_shifts_stand_at_severity_1() -> None:
    study = STUDY.model_copy(update={"natural_shifts": ("usps",), "shifts": ()})
    rows = shift_rows(study, DIRECT)
    assert [(row["shift"], row["severity"], row["images"]) for row in rows] == [("clean", 0, 450), ("usps", 1, 10)]
