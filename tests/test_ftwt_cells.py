"""Notebook 08's computations on a small study: once, what they hold, the tables and the claims made of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from gcnet import ftwt_cells as ftwt
from gcnet import ftwt_figures
from gcnet.cells import cells, dense, normalized_batches, splits
from gcnet.dynamic import measure
from gcnet.ftwt_cells import (
    GatedCell,
    claims_table,
    gated_cells,
    gated_folder,
    gated_network,
    gated_result,
    gated_shift_rows,
    stages,
)
from gcnet.store import Store, write_json
from gcnet.study import Study

STUDY = Study.create(
    study="small", dataset="digits", channels=1, network="alexnet", width=0.25, seeds=[0], epochs=1, batch_size=40,
    train_images=120, crop_padding=0, flip=False, pruners=["l1"], sparsities=[0.8], guidance={"pearson": ["B25"]},
    ftwt_r=[0.8], ftwt_joint_r=[0.8], ftwt_epochs=1, ftwt_latency_sizes=[32], ftwt_latency_batches=[1],
    shifts=["contrast"], severities=[5], shift_images=40, device="cpu", precision="float32",
)  # fmt: skip
DECOUPLED, JOINT, STATIC = gated_cells(STUDY)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which every stage was run once."""
    root = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root))
        for _, tasks in stages(STUDY):
            for function, study, argument in tasks:
                assert isinstance(function(study, argument), str)
    return root


@pytest.fixture(autouse=True)
def store(computed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", str(computed))


def test_everything_is_there_after_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this was computed before")

    for name in ("train", "train_gated", "estimate_flops", "measure", "time_ms"):
        monkeypatch.setattr(ftwt, name, fail)
    monkeypatch.setattr(ftwt, "shift_rows", lambda *_: [{"severity": 0, "accuracy": 0.5, "ece": 0.1}])
    accuracies = ftwt.accuracy_table(STUDY)
    assert accuracies["mode"].tolist() == ["none", "decoupled", "joint", "l1_filter"]
    assert list(accuracies)[:8] == [
        "network", "r", "mode", "seed", "accuracy", "macs_reduction", "macs_reduction_authors", "mask_accuracy",
    ]  # fmt: skip
    estimates, shifts = ftwt.estimate_table(STUDY, accuracies), ftwt.shift_table(STUDY)
    assert list(estimates)[:4] == ["network", "r", "estimated", "measured"] and len(estimates) == 2
    assert len(shifts) == 3 * 2 and ftwt.unstructured_table(STUDY).empty
    assert list(ftwt.latency_table(STUDY))[:7] == [
        "network", "r", "batch", "threads", "dense_ms", "dynamic_ms", "ratio",
    ]  # fmt: skip
    layers = ftwt.layer_table(STUDY)
    assert ((layers.k_low <= layers.k_high) & (layers.k >= 1) & (layers.k <= layers.filters)).all()
    shares = ftwt.class_shares(STUDY, DECOUPLED)
    assert shares.shape == (10, 5) and shares.to_numpy().min() > 0 and shares.to_numpy().max() <= 1
    claims = claims_table(STUDY, accuracies, estimates, shifts)
    assert claims.claim.tolist()[:4] == ["ftwt-1", "ftwt-2", "ftwt-2", "ftwt-3"] and (claims.n == 1).all()


def test_a_stored_network_is_the_one_that_was_measured() -> None:
    for cell in (DECOUPLED, STATIC):
        net, result, test = gated_network(STUDY, cell), gated_result(STUDY, cell), splits(STUDY).test
        firing = measure(net[1], normalized_batches(net, test))
        right = (firing.logits.argmax(1) == test.labels).float().mean().item()
        assert result["accuracy"] == pytest.approx(right)
        assert result["filters_used"] == pytest.approx(
            firing.k.double().sum(1).mean().item() / sum(firing.filters)
        )  # fmt: skip
        assert gated_shift_rows(STUDY, cell)[0]["accuracy"] == result["accuracy"]


def test_the_static_peer_costs_at_most_as_much_and_pays_for_no_heads() -> None:
    dynamic, static = gated_result(STUDY, DECOUPLED), gated_result(STUDY, STATIC)
    assert static["macs"] <= dynamic["macs"]
    assert static["macs"] > 0.9 * dynamic["macs"]
    net = gated_network(STUDY, STATIC)
    held = load_file(gated_folder(STUDY, STATIC) / "masks.safetensors")
    with net[1].forced({layer: mask[None] for layer, mask in held.items()}):
        firing = measure(net[1], normalized_batches(net, splits(STUDY).test))
    assert static["macs"] == pytest.approx(firing.macs.mean().item() - net[1].macs_heads)
    assert static["mask_accuracy"] is None
    assert all(layer["k_low"] == layer["k_high"] for layer in static["layers"])


def test_training_starts_from_the_dense_network_and_leaves_it() -> None:
    before, after = dense(STUDY, 0)[1].state_dict(), gated_network(STUDY, DECOUPLED)[1].network.state_dict()
    assert before["features.0.weight"].shape == after["features.0.conv.weight"].shape
    assert not torch.equal(before["features.0.weight"], after["features.0.conv.weight"])


def test_a_claim_needs_the_difference_to_lie_above_its_margin() -> None:
    of = [
        ("decoupled", 0.9, 0.9, 0.5),
        ("decoupled", 1.0, 1.0, 0.1),
        ("joint", 0.9, 0.8, 0.3),
        ("l1_filter", 0.9, 0.95, 0.5),
    ]
    columns = ["mode", "r", "accuracy", "macs_reduction", "seed"]
    accuracies = pd.DataFrame([(*row, seed) for seed in range(3) for row in of], columns=columns)
    estimates = pd.DataFrame(
        [{"mode": "decoupled", "r": 0.9, "seed": s, "estimated": 0.5, "measured": 0.4} for s in range(3)]
    )
    shifts = accuracies.assign(shift="fog", severity=1)
    claims = claims_table(STUDY, accuracies, estimates, shifts)
    assert claims.verdict.tolist() == ["contradicted", "contradicted", "contradicted", "supported", "supported"]
    # The last: decoupled would have 0.95 at the MACs that joint training reached, between its two r.
    assert claims.estimate.round(6).tolist() == [-0.1, -0.05, -0.05, 0.1, 0.15]
    far = accuracies.assign(macs_reduction=accuracies.macs_reduction.mask(accuracies["mode"] == "joint", 0.9))
    assert len(claims_table(STUDY, far, estimates, shifts)) == 4  # decoupled networks never save that much


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ftwt_r": [0.0]}, r"r 0.0 is outside \(0, 1\]"),
        ({"ftwt_r": [1.2]}, r"r 1.2 is outside"),
        ({"ftwt_r": []}, "ftwt_r"),
        ({"ftwt_joint_r": [0.5]}, "0.5 is not in ftwt_r"),
        ({"ftwt_head_cooldown": 2}, "ftwt_head_cooldown"),
        ({"ftwt_head_pool": "median"}, "ftwt_head_pool"),
    ],
)
def test_parameters_out_of_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Study.create(**values)


def test_masks_of_other_systems_are_shown_where_the_store_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"seed": 0, "sparsity": 0.8, "accuracy": 0.5, "macs": 0}
    direct, guided = (cell for cell in cells(STUDY) if not cell.is_dense)
    for cell in (direct, guided):
        Store().once("cell", ftwt.cell_inputs(STUDY, cell), lambda folder: write_json(folder / "cell.json", facts))
    monkeypatch.setattr(ftwt.snacs_cells, "stored_results", lambda _: iter([{**facts, "delta": 0.7}]))
    table = ftwt.unstructured_table(STUDY)
    assert table.system.tolist() == ["direct", "GC-Net", "SNACS"] and (table.macs_reduction == 1).all()
    assert table.setting.tolist() == ["l1 direct none 0.8", "l1 B25 pearson 0.8", "delta 0.7"]
    figure = ftwt_figures.accuracy_against_macs(ftwt.accuracy_table(STUDY), table)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sum("theoretical MACs" in label for label in labels) == 3
    plt.close(figure)


def test_cells_name_every_mode_once_a_seed() -> None:
    study = Study.create(ftwt_r=[0.8, 0.92, 1.0])
    found = gated_cells(study)
    assert len(set(found)) == len(found) == len(study.seeds) * (2 * 3 - 1 + 1)
    assert GatedCell("joint", study.ftwt_joint_r[0], study.seeds[0]) in found


def test_seeds_that_agree_to_the_last_bit_are_drawn() -> None:
    # The mean of equal values can come out a rounding below the smallest: error bars would be negative.
    rows = pd.DataFrame(
        [{"mode": mode, "r": 0.9, "seed": seed, "accuracy": accuracy, "macs_reduction": 0.5}
         for accuracy in (0.1, 0.7, 0.8755555556, 0.9955555556) for mode in ("none", "decoupled", "joint")
         for seed in range(3)]
    )  # fmt: skip
    for _, part in rows.groupby("accuracy"):
        plt.close(ftwt_figures.accuracy_against_macs(part, pd.DataFrame()))


@pytest.mark.parametrize(
    "change",
    [{"ftwt_epochs": 2}, {"ftwt_lr": 0.5}, {"ftwt_head_lr": 0.5}, {"ftwt_head_cooldown": 0.25},
     {"ftwt_head_pool": "mean"}, {"ftwt_head_scaled": False}, {"ftwt_head_start": "random"},
     {"ftwt_estimate_images": 50}, {"seeds": (0,)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_changes_a_gated_network_is_in_its_key(change: dict) -> None:
    before, after = (Store.key("ftwt_cell", ftwt._cell_inputs(study, DECOUPLED)) for study in
                     (STUDY, STUDY.model_copy(update=change)))  # fmt: skip
    assert (before == after) == ("seeds" in change)
