"""The stored computations of notebook 07: what a run depends on, the choice of beta, tables, claims, figures, sweep."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from gcnet import cka_cells, cka_figures, sweep
from gcnet.cka_cells import Run
from gcnet.pruning import pruned_count
from gcnet.store import Store
from gcnet.study import Study

plt.switch_backend("agg")

SMALL = {
    "network": "resnet20", "width": 0.125, "cka_width": 0.125, "train_images": 64, "batch_size": 16, "seeds": [0, 1],
    "cka_epochs": 2, "cka_rewind_epochs": 1, "cka_methods": ["rst", "rigl", "rewind"], "cka_sparsities": [0.5, 0.9],
    "cka_betas": [0.05, 0.5], "cka_choice_seeds": [7], "cka_images": 32, "shifts": ["contrast"], "severities": [5],
    "shift_images": 40, "image_size": 8, "finetune_epochs": 1, "cka_rewire_every": 2, "cka_every": 2,
}  # fmt: skip


def small(**more: object) -> Study:
    return Study.create(**{**SMALL, **more})


ONE = {"seeds": [0], "cka_methods": ["rst"], "cka_sparsities": [0.9], "cka_betas": [0.5], "cka_guided_sparsity": 0}


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rst", "set", "rigl", "rewind", "snip", "grasp"])
def test_a_run_is_sparse_to_the_weight_and_scored(method: str) -> None:
    study = small(**ONE | {"cka_methods": [method], "cka_shift_methods": []})
    run = Run(method, 0.9, 0.5, 0)
    result = cka_cells.run_result(study, run)
    net, masks = cka_cells.run_network(study, run)
    assert result["weights"] - result["kept_weights"] == pruned_count(result["weights"], 0.9)
    assert all(bool((net[1].get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    assert 0 <= result["accuracy"] <= 1 and 0 <= result["val_accuracy"] <= 1
    kept = torch.cat([net[1].get_parameter(name)[mask] for name, mask in masks.items()]).abs()
    shares = cka_cells.weight_shares(study, run)
    assert len(kept) == result["kept_weights"] and sum(shares) == pytest.approx(100)
    middle = (kept >= cka_cells.WEIGHT_BINS[35]) & (kept < cka_cells.WEIGHT_BINS[60])
    assert sum(shares[35:60]) == pytest.approx(100 * middle.double().mean().item(), abs=0.1)
    left = {path.name for path in cka_cells.run_folder(study, run).iterdir()}
    assert left == {"entry.json", "history.json", "masks.safetensors", "model.safetensors", "run.json"}


def test_the_runs_that_are_drawn_are_of_one_seed_and_the_sparsity_of_the_choice() -> None:
    study = small(seeds=[0, 1], cka_methods=["rst", "rewind"], cka_sparsities=[0.9, 0.95], cka_choice_sparsity=0.9,
                  cka_betas=[0.5])  # fmt: skip
    assert cka_cells.drawn_runs(study) == [Run("rst", 0.9, 0.0, 0), Run("rst", 0.9, 0.5, 0)]
    other = study.model_copy(update={"cka_choice_sparsity": 0.5})
    assert cka_cells.drawn_runs(other) == [Run("rst", 0.95, 0.0, 0), Run("rst", 0.95, 0.5, 0)]
    assert cka_cells.drawn_runs(study.model_copy(update={"cka_methods": ("rewind",)})) == []


def test_the_penalty_changes_a_run_and_nothing_else_does() -> None:
    study = small(**ONE)
    states = [cka_cells.run_network(study, Run("rst", 0.9, beta, 0))[0][1].state_dict() for beta in (0.0, 0.5)]
    assert any(not torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    masks = [cka_cells.run_network(study, Run("rst", 0.9, beta, 0))[1] for beta in (0.0, 0.5)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_run_is_known_by_what_it_depends_on() -> None:
    study = small()

    def key(run: Run, **changed: object) -> str:
        return Store.key("cka_run", cka_cells._inputs(small(**changed), run))

    rst, rigl, plain = Run("rst", 0.9, 0.5, 0), Run("rigl", 0.9, 0.5, 0), Run("rst", 0.9, 0.0, 0)
    assert key(rst) == Store.key("cka_run", cka_cells._inputs(study, rst))
    for changed in ({"cka_width": 0.25}, {"cka_epochs": 3}, {"lr": 0.2}, {"cka_samples": 16}, {"cka_every": 5}):
        assert key(rst, **changed) != key(rst)
    assert key(plain, cka_samples=16) == key(plain)  # without the penalty, its settings do not matter
    assert key(rst, cka_rewire_every=9) == key(rst) and key(rigl, cka_rewire_every=9) != key(rigl)
    for changed in ({"width": 0.25}, {"epochs": 9}, {"pruners": ["l1"]}, {"cka_betas": [0.5]}, {"cka_images": 64}):
        assert key(rst, **changed) == key(rst)


def test_rewinding_starts_from_the_stored_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(**ONE | {"cka_methods": ["rewind"], "cka_shift_methods": []})
    dense = cka_cells.run_folder(study, Run("dense", 0.0, 0.0, 0))
    assert (dense / "early.safetensors").exists()
    monkeypatch.setattr(cka_cells, "sparse_train", lambda *a, **k: pytest.fail("trained the dense network again"))
    masks = cka_cells.run_network(study, Run("rewind", 0.9, 0.0, 0))[1]
    model = cka_cells.loaded(cka_cells.own(study), 0, dense)[1]
    kept = torch.cat([model.get_parameter(name)[mask].abs() for name, mask in masks.items()])
    gone = torch.cat([model.get_parameter(name)[~mask].abs() for name, mask in masks.items()])
    assert kept.min() >= gone.max()


# --- beta -----------------------------------------------------------------------------------------------------------


def test_beta_is_chosen_on_validation_images_and_never_0(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {0.0: 0.9, 0.05: 0.5, 0.5: 0.7}

    def result(study: Study, run: Run) -> dict:
        assert run.seed in study.cka_choice_seeds and run.method == "rst"
        return {**run.row(), "val_accuracy": scores[run.beta], "accuracy": math.nan}

    monkeypatch.setattr(cka_cells, "run_result", result)
    assert cka_cells.chosen_beta(small()) == 0.5
    scores[0.05] = 0.7
    assert cka_cells.chosen_beta(small()) == 0.05  # of equal ones the smaller
    assert cka_cells.chosen_beta(small(cka_betas=[0.3])) == 0.3 and cka_cells.choice_runs(small(cka_betas=[0.3])) == []


def test_headline_sparsities_have_every_seed() -> None:
    study = small(seeds=[0, 1, 2, 3, 4], cka_headline_sparsities=[0.9])
    counts = pd.Series([sparsity for _, sparsity, _, _ in cka_cells.planned(study)]).value_counts()
    assert counts[0.9] == 5 * 3 * 2 and counts[0.5] == 3 * 3 * 2


# --- the whole of notebook 07 ---------------------------------------------------------------------------------------


@pytest.fixture
def tables() -> tuple[Study, dict[str, pd.DataFrame]]:
    """A study computed by the sweep, and every table of it."""
    study = small(**ONE | {"seeds": [0, 1], "cka_betas": [0.05, 0.5], "cka_guided_sparsity": 0.5, "notebooks": ["07"]})

    class Here:
        """An executor that computes at once."""

        def submit(self, function, *arguments):
            from concurrent.futures import Future

            future: Future = Future()
            future.set_result(function(*arguments))
            return future

    assert sweep.sweep(study, Here()) == []
    found = {
        "choice": cka_cells.choice_table(study), "accuracy": cka_cells.accuracy_table(study),
        "similarity": cka_cells.similarity_table(study), "epsilon": cka_cells.epsilon_table(study),
        "shifts": cka_cells.shift_table(study), "combined": cka_cells.guided_table(study),
    }  # fmt: skip
    return study, found


def test_the_sweep_computes_all_that_the_notebook_shows(tables, monkeypatch: pytest.MonkeyPatch) -> None:
    study, found = tables
    assert list(found["accuracy"].columns[:5]) == ["method", "sparsity", "beta", "seed", "accuracy"]
    assert list(found["similarity"].columns[:5]) == ["layer_i", "layer_j", "beta", "seed", "cka"]
    assert list(found["epsilon"].columns[:4]) == ["epsilon", "beta", "seed", "share"]
    assert len(found["choice"]) == 3 and len(found["accuracy"]) == 8 and len(found["combined"]) == 8
    assert len(found["shifts"]) == 4 * 2 and len(found["epsilon"]) == 3 * (8 + 3)
    diagonal = found["similarity"][found["similarity"].layer_i == found["similarity"].layer_j]
    assert diagonal.cka.to_numpy() == pytest.approx(1.0)
    assert not diagonal.same_stage.any() and found["similarity"].same_stage.sum() == 18 * 11
    claims = cka_cells.claims_table(
        study, *[found[n] for n in ("accuracy", "similarity", "epsilon", "shifts", "combined")]
    )
    assert set(claims.claim) == {"cka-sr-1", "cka-sr-2", "cka-sr-3", "cka-sr-5", "cka-sr-6"}
    assert set(claims.verdict.str.split(" ").str[0]) <= {"supported", "contradicted", "inconclusive"}
    by = found["accuracy"][found["accuracy"].method == "rst"].pivot(index="seed", columns="beta", values="accuracy")
    row = claims[(claims.claim == "cka-sr-3")].iloc[0]
    assert row.estimate == pytest.approx((by[cka_cells.chosen_beta(study)] - by[0.0]).mean()) and row.n == 2
    published = cka_cells.published_table(study, found["accuracy"])
    assert published.source.iloc[0] == "ours" and len(published) == 1 + 7
    line = published[(published.dataset == "CIFAR-10") & (published.source != "ours")].iloc[0]
    assert line.gain == pytest.approx(0.0087)
    figures = [
        cka_figures.choice(found["choice"]),
        cka_figures.heat_maps(found["similarity"], "rst", 0.95),
        cka_figures.weight_histograms({beta: [100 / 70] * 70 for beta in (0.0, 0.5)}, found["epsilon"], "t"),
        cka_figures.accuracy_by_sparsity(found["accuracy"], 0.5),
        cka_figures.gains(found["accuracy"], published[1:]),
        cka_figures.shift_gains(found["shifts"]),
    ]
    for figure in figures:
        figure.canvas.draw()
        plt.close(figure)


def test_what_it_costs_is_measured_at_three_settings() -> None:
    cost = pd.DataFrame(cka_cells.cost_rows(small(**ONE), repeats=4))
    assert list(zip(cost.samples, cost.every, strict=True)) == [(8, 2), (8, 5), (16, 1)]
    assert (cost.gram_bytes == 4 * 9 * cost.samples**2).all() and (cost.step_s > 0).all()


def test_a_study_of_07_alone_trains_no_other_network() -> None:
    names = [name for name, _ in sweep.stages(small(notebooks=["07"]))]
    assert "dense" not in names and names[-1] == "CKA-SR, GC-Net" and "CKA-SR, choice of beta" in names
    assert "dense" in [name for name, _ in sweep.stages(small(notebooks=["01", "07"]))]


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cka_methods": ["rigle"]}, "unknown sparse training method 'rigle'; did you mean 'rigl'"),
        ({"cka_network": "resnet2"}, "unknown network 'resnet2'"),
        ({"cka_sparsities": [1.0]}, r"sparsity 1.0 is outside \[0, 1\)"),
        ({"cka_betas": [-0.1]}, "cka_betas: -0.1 is not above 0"),
        ({"cka_samples": 3}, "cka_samples: .*greater than or equal to 4"),
        ({"cka_epochs": 2, "cka_rewind_epochs": 2}, "cka_rewind_epochs 2 must be below cka_epochs 2"),
        ({"val_share": 0.0}, "choosing one of several needs validation images"),
        ({"cka_shift_methods": ["set"]}, "unknown method of cka_methods 'set'"),
        ({"cka_headline_sparsities": [0.7]}, "unknown sparsity of cka_sparsities '0.7'"),
    ],
)
def test_parameters_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_seeds_that_lack_a_sparsity_and_collapsed_networks_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(seeds=[0, 1, 2], cka_methods=["rst"], cka_sparsities=[0.9, 0.98], cka_headline_sparsities=[0.98])
    monkeypatch.setattr(cka_cells, "chosen_beta", lambda _: 0.5)
    rows = [
        ("rst", level, beta, seed, 0.5 + (0.1 * level + 0.01 * seed) * (beta > 0))
        for level, seed in ((0.9, 0), (0.9, 1), (0.98, 0), (0.98, 1), (0.98, 2))
        for beta in (0.0, 0.5)
    ]
    accuracy = pd.DataFrame(rows, columns=["method", "sparsity", "beta", "seed", "accuracy"])
    empty = accuracy.iloc[:0].assign(same_stage=False, cka=0.0, epsilon=0.0, share=0.0, severity=0)
    dead = accuracy.assign(hybrid="B25", accuracy=0.1)
    claims = cka_cells.claims_table(study, accuracy, empty, empty, empty, dead)
    last = claims[claims.claim == "cka-sr-4"].iloc[0]
    assert last.n == 2 and last.estimate == pytest.approx(0.1 * (0.98 - 0.9))
    assert claims[claims.claim == "cka-sr-6"].verdict.tolist() == ["inconclusive (no image tells the two sides apart)"]
