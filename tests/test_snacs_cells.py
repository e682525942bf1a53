"""The study's side of SNACS: everything computed once, peers at SNACS's sparsity, tables and claims from the store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from gcnet import snacs_cells as stages
from gcnet.cells import dense, graph, splits
from gcnet.claims import COLUMNS
from gcnet.pruning import Masks, sparsity
from gcnet.snacs_cells import (
    SnacsCell,
    analysis,
    cell_folder,
    cell_result,
    gaussian_layer,
    images,
    matched,
    shift_rows,
    snacs_cells,
    time_estimators,
    weight_masks,
)
from gcnet.snacs_figures import (
    PUBLISHED_SPEED,
    STRUCTURE,
    accuracy_table,
    claims_table,
    layer_table,
    never_within,
    published_table,
    reached,
    shift_table,
    speed_table,
    structure_table,
    truth_table,
)
from gcnet.store import Store, read_json, sha256_file, write_json
from gcnet.study import Study

pytestmark = pytest.mark.filterwarnings("ignore:.*(images are fewer|parent filters)")

STUDY = Study.create(
    study="small", dataset="digits", channels=1, network="resnet20", width=0.25, seeds=[0], epochs=1, batch_size=40,
    train_images=200, crop_padding=0, flip=False, finetune_epochs=1, shifts=["contrast"], severities=[5],
    shift_images=50, device="cpu", precision="float32", snacs_deltas=[0.6], snacs_images=10, snacs_mint_groups=2,
    snacs_mint_images=5, snacs_truth_samples=[100], snacs_truth_repeats=2, snacs_speed_groups=[4],
    snacs_speed_filters=16, snacs_speed_samples=60,
)  # fmt: skip
PRUNED = [cell for cell in snacs_cells(STUDY) if cell.method != "none"]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root))
        for _, tasks in stages.stages(STUDY):
            for run, *arguments in tasks:
                assert isinstance(run(*arguments), str)
        stages.structure_latency_rows(STUDY)
    return root


@pytest.fixture
def store(computed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GCNET_RUNS", str(computed))

    def fail(*_: object) -> None:
        raise AssertionError("this was computed before")

    once = Store.once
    monkeypatch.setattr(Store, "once", lambda self, kind, inputs, _, needs=None: once(self, kind, inputs, fail, needs))
    yield computed


def test_cells_are_each_method_at_each_delta() -> None:
    study = Study.create(seeds=[1, 2], snacs_deltas=[0.5, 0.9], snacs_methods=["snacs", "l1_block"])
    found = snacs_cells(study)
    assert len(found) == len(set(found)) == 2 * (1 + 2 * 2)
    assert SnacsCell("l1_block", 0.9, 2) in found and SnacsCell("none", 0.0, 1) in found
    for change, message in (({"snacs_deltas": [1.5]}, "delta 1.5"), ({"snacs_methods": ["l1_blok"]}, "'l1_block'")):
        with pytest.raises(ValueError, match=message):
            Study.create(**change)


@pytest.mark.usefixtures("store")
def test_images_are_balanced_and_fixed() -> None:
    found = images(STUDY, 7)
    assert found.labels.bincount().tolist() == [7] * 10
    assert torch.equal(found.images, images(STUDY, 7).images)
    assert len(images(STUDY, 10**6)) == len(splits(STUDY).train)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("cell", PRUNED, ids=lambda cell: cell.method)
def test_a_cell_is_pruned_to_snacs_sparsity_and_stays_so(cell: SnacsCell) -> None:
    result, own = cell_result(STUDY, cell), cell_result(STUDY, PRUNED[0])
    masks = Masks.load(cell_folder(STUDY, cell) / "masks.safetensors")
    assert result["sparsity"] == pytest.approx(sparsity(weight_masks(masks)))
    # Whole filters and blocks of a small network are coarse.
    assert result["sparsity"] == pytest.approx(own["sparsity"], abs={"gcnet": 1e-3}.get(cell.method, 0.08))
    net = stages.cells.loaded(STUDY, 0, cell_folder(STUDY, cell))
    for name, mask in masks.items():
        assert bool((net[1].get_parameter(name)[~mask] == 0).all()), name
    assert result["macs"] < cell_result(STUDY, SnacsCell("none", 0.0, 0))["macs"]
    if "difference" in result["structure"]:
        assert result["structure"]["difference"] < 1e-5
        assert result["structure"]["parameters"] <= result["structure"]["parameters_dense"]


@pytest.mark.usefixtures("store")
def test_shifts_are_of_the_fine_tuned_network() -> None:
    rows = shift_rows(STUDY, PRUNED[0])
    assert [(row["shift"], row["severity"]) for row in rows] == [("clean", 0), ("contrast", 5)]
    assert rows[0]["accuracy"] == cell_result(STUDY, PRUNED[0])["accuracy"]


def test_stored_results_are_what_is_there(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(stages.stored_results(STUDY)) == [cell_result(STUDY, PRUNED[0])]
    assert [result["method"] for result in stages.stored_results(STUDY, "mint")] == ["mint"]
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path))
    assert not list(stages.stored_results(STUDY))


@pytest.mark.usefixtures("store")
def test_tables() -> None:
    layers, accuracy, structure = layer_table(STUDY), accuracy_table(STUDY), structure_table(STUDY)
    assert list(layers.columns[:5]) == ["layer", "groups", "gamma", "protected", "pruned"]
    assert list(accuracy.columns[:6]) == ["method", "delta", "sparsity", "seed", "accuracy_before", "accuracy"]
    assert list(speed_table(STUDY).columns[:4]) == ["groups", "estimator", "seconds", "ratio"]
    net = dense(STUDY, 0)
    assert set(layers.layer) == set(analysis(STUDY, 0).scores) <= set(graph(STUDY, net[1]).layers)
    assert set(accuracy.method) == {"none", *STUDY.snacs_methods} and set(structure.method) == {
        "snacs", "mint", "l1_block", "l1_filter"
    }  # fmt: skip
    assert set(truth_table(STUDY).estimator) == {"residual", "residual, all hashed", "projection"}
    published = published_table(STUDY, accuracy)
    assert {"released plot data of arXiv 2006.12463", "this study, 1 seeds"} <= set(published.source)


@pytest.mark.usefixtures("store")
def test_latency_is_of_the_first_seed_without_dead_filters() -> None:
    table, rows = structure_table(STUDY), stages.structure_latency_rows(STUDY)
    assert list(table.columns) == STRUCTURE and table.groupby(["method", "delta", "seed"]).size().eq(2).all()
    left = table[table.cut.isna()]
    assert len(left) and (left.threads == torch.get_num_threads()).all()
    assert [row["network"] for row in rows[: len(rows) // 2]] == ["dense", *(f"{m} 0.6" for m in left.method.unique())]
    for batch, part in left.groupby("batch"):
        timed = {row["method"]: 1000 * row["median_s"] for row in rows if row["batch_size"] == batch}
        assert list(part.ms) == [timed[method] for method in part.method] and set(part.ms_dense) == {timed["none"]}
    more = STUDY.model_copy(update={"seeds": (7, 0)})
    assert not stages.latency_cells(more)  # the first seed has no networks


@pytest.mark.parametrize("gone", ["model.safetensors", "masks.safetensors"])
def test_latency_is_left_out_where_the_networks_are(
    gone: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store, tmp_path / "unpacked")
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "unpacked"))
    before = structure_table(STUDY)
    for folder in (tmp_path / "unpacked").glob("snacs_cell-*"):
        entry = read_json(folder / "entry.json")
        facts = read_json(folder / "cell.json")
        facts["structure"] |= {"ms": 3.0, "ms_dense": 4.0}  # as cells had them that were timed when they were computed
        write_json(folder / "cell.json", facts)
        entry["files"]["cell.json"] = sha256_file(folder / "cell.json")
        write_json(folder / "entry.json", entry | {"without": [gone]})
        (folder / gone).unlink()
    table, times = structure_table(STUDY), ["threads", "ms", "ms_dense"]
    assert table[times].isna().all(axis=None)
    pd.testing.assert_frame_equal(table.drop(columns=times), before.drop(columns=times))


@pytest.mark.usefixtures("store")
def test_claims_follow_from_the_tables() -> None:
    accuracy, shifts, speed = accuracy_table(STUDY), shift_table(STUDY), speed_table(STUDY)
    claims = claims_table(STUDY, accuracy, shifts, speed)
    assert tuple(claims.columns) == COLUMNS
    by = claims.set_index("measure")
    assert by.loc["share of layers whose limit follows from the rule alone", "verdict"] == "supported"
    difference = cell_result(STUDY, PRUNED[0])["accuracy"] - cell_result(STUDY, SnacsCell("gcnet", 0.6, 0))["accuracy"]
    assert by.loc["clean accuracy, difference: snacs - gcnet", "estimate"] == pytest.approx(difference)
    assert "snacs-1" not in set(claims.claim)  # 4 groups are none of the published ones
    every = pd.concat([speed.assign(groups=groups, samples=2000, ratio=17.1) for groups in PUBLISHED_SPEED])
    for timed, verdicts in (
        (every, {"supported"}),
        (every.assign(ratio=16.9), {"contradicted"}),
        (every[every.groups != 64], set()),
        (every.assign(samples=1000), set()),
    ):
        fast = claims_table(STUDY, accuracy, shifts, timed)
        fast = fast[fast.claim == "snacs-1"]
        assert set(fast.verdict) == verdicts and len(fast) == (2 * len(PUBLISHED_SPEED) if verdicts else 0)


@pytest.mark.usefixtures("store")
def test_methods_that_never_stay_within_a_point_are_not_compared() -> None:
    accuracy, shifts, speed = accuracy_table(STUDY), shift_table(STUDY), speed_table(STUDY)
    for fine in (set(), {"mint"}, {"snacs"}):
        kept = accuracy.assign(accuracy=accuracy.method.isin({"none", *fine}).astype(float), val_accuracy=None)
        peers = [method for method in STUDY.snacs_methods if method != "snacs"]
        assert never_within(kept) == [method for method in STUDY.snacs_methods if method not in fine]
        claims = claims_table(STUDY, kept, shifts, speed)
        compared = {measure.split()[-1] for measure in claims[claims.claim == "snacs-3"].measure}
        assert compared == (set(peers) if "snacs" in fine else fine)
        assert (claims.claim == "snacs-4").sum() == 2 * len(peers)


def test_sparsity_reached_at_less_than_one_point() -> None:
    frame = pd.DataFrame(
        [("none", 0, 0.0, 0.9), ("snacs", 0, 0.5, 0.895), ("snacs", 0, 0.8, 0.89), ("snacs", 0, 0.7, 0.8901),
         ("none", 1, 0.0, 0.9), ("snacs", 1, 0.5, 0.7)],
        columns=["method", "seed", "sparsity", "val_accuracy"],
    ).assign(accuracy=0.0)  # fmt: skip
    assert reached(frame, "snacs").to_dict() == {0: 0.7, 1: 0.0}
    assert not never_within(frame) and never_within(frame.query("seed == 1")) == ["snacs"]


def test_peers_are_matched_by_bisection() -> None:
    def make(share: float) -> Masks:
        return Masks({"a.weight": torch.arange(1000).view(10, 100) >= round(1000 * share**2)})

    assert sparsity(matched(make, 0.37)) == pytest.approx(0.37, abs=0.001)


def test_timing_counts_pairs() -> None:
    rows = time_estimators(16, 60, 4)
    assert [row["estimator"] for row in rows] == [
        "hash (ours)", "spanning tree, vectorised", "spanning tree, pair by pair"
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows)
    with pytest.raises(ValueError, match="5 groups do not divide the 16 filters"):
        time_estimators(16, 60, 5)


def test_truth_of_the_check_is_the_partial_correlation() -> None:
    x, y, truth = gaussian_layer(200000, 4, seed=3)
    assert not torch.equal(gaussian_layer(10, 4, 3, draw=1)[0], gaussian_layer(10, 4, 3)[0])
    assert torch.equal(gaussian_layer(10, 4, 3, draw=1)[2], truth)
    both = torch.cat([y[:, :1], x], 1)
    inverse = torch.linalg.inv(torch.cov(both.T))
    r = -inverse[0, 1:] / (inverse[0, 0] * inverse.diagonal()[1:]).sqrt()
    assert torch.allclose(-torch.log1p(-r.square()) / 2, truth[0], atol=0.01)


@pytest.mark.parametrize(
    "change",
    [{"snacs_phi": "square"}, {"snacs_weights": "signed_global"}, {"snacs_rule": "last"}, {"snacs_tolerance": 0.5},
     {"snacs_protected": 0.5}, {"snacs_images": 7}, {"finetune_epochs": 9}, {"finetune_lr": 0.5}, {"seeds": (0,)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_changes_a_pruned_network_is_in_its_key(change: dict) -> None:
    cell = stages.SnacsCell("snacs", 0.5, 0)
    before, after = (Store.key("snacs_cell", stages._cell_inputs(study, cell)) for study in
                     (STUDY, STUDY.model_copy(update=change)))  # fmt: skip
    assert (before == after) == ("seeds" in change)
