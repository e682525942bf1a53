"""Tables, claims and figures of notebook 06: the study's stored results in, frames and matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from gcnet.claims import Comparison, judged
from gcnet.evaluation import Interval, bootstrap, by_shift, each_shift_once
from gcnet.figures import layer_maps, panels, whole_numbers
from gcnet.published import published
from gcnet.snacs import GRID
from gcnet.snacs_cells import (
    LATENCY_BATCHES,
    TRUTH_PARENTS,
    analysis,
    cell_result,
    removal_cells,
    shift_rows,
    snacs_cells,
    speed_rows,
    structure_latency_rows,
    truth_rows,
)
from gcnet.study import Study

# Okabe and Ito's colours, each with its own marker.
LOOK: dict[str, tuple[str, str, str]] = {
    "none": ("dense", "#000000", "*"),
    "snacs": ("SNACS", "#0072B2", "o"),
    "mint": ("MINT", "#009E73", "D"),
    "l1_block": ("L1 block", "#E69F00", "s"),
    "l1_filter": ("L1 filter", "#D55E00", "v"),
    "gcnet": ("GC-Net B25 (unstructured)", "#56B4E9", ">"),
}
ESTIMATORS = {
    "residual": ("#0072B2", "o"),
    "residual, all hashed": ("#E69F00", "s"),
    "projection": ("#D55E00", "v"),
    "hash (ours)": ("#0072B2", "o"),
    "spanning tree, vectorised": ("#009E73", "D"),
    "spanning tree, pair by pair": ("#595959", "s"),
}

PUBLISHED_SPEED = {16: 24, 32: 32, 64: 17, 128: 18, 256: 27}  # times faster than the spanning tree, by groups
PUBLISHED_SAMPLES = 2000  # N of the published timing

STRUCTURE = ["method", "delta", "seed", "filters", "dead_filters", "parameters", "parameters_dense", "macs",
             "macs_dense", "difference", "cut", "batch", "threads", "ms", "ms_dense"]  # fmt: skip

# --- tables ---------------------------------------------------------------------------------------------------------


def layer_table(study: Study) -> pd.DataFrame:
    """snacs_layers.csv: layer, groups, gamma, protected, pruned (share of weights), dead_filters; delta and seed."""
    rows = []
    for cell in snacs_cells(study):
        if cell.method != "snacs":
            continue
        known, kept = analysis(study, cell.seed), {row["layer"]: row for row in cell_result(study, cell)["layers"]}
        rows += [
            {
                "layer": layer,
                "groups": "x".join(map(str, rho.shape)),
                "gamma": known.limits[layer],
                "protected": int(known.protected[layer].sum()),
                "pruned": kept[layer]["sparsity"],
                "weights": kept[layer]["weights"],
                "kept": kept[layer]["kept"],
                "delta": cell.delta,
                "seed": cell.seed,
            }
            for layer, rho in known.scores.items()
        ]
    return pd.DataFrame(rows)


def accuracy_table(study: Study) -> pd.DataFrame:
    """snacs_accuracy.csv: method, delta, sparsity, seed, accuracy_before, accuracy, val_accuracy, weights and MACs."""
    columns = ["method", "delta", "sparsity", "seed", "accuracy_before", "accuracy", "val_accuracy", "kept_weights",
               "macs"]  # fmt: skip
    return pd.DataFrame([cell_result(study, cell) for cell in snacs_cells(study)])[columns]


def structure_table(study: Study) -> pd.DataFrame:
    """snacs_structure.csv: what physical removal leaves of each structured method's network, and its latency.

    One row a cell and batch size; threads, ms and ms_dense (medians, in turn) are those of the first seed, empty for
    the others and where the store has no network to time. cut: why nothing is left to run.
    """
    timed = {
        (row["method"], row["delta"], row["seed"], row["batch_size"]): row for row in structure_latency_rows(study)
    }
    rows = []
    for cell in removal_cells(study):
        facts = {**asdict(cell), **cell_result(study, cell)["structure"]}
        for batch in LATENCY_BATCHES:
            found = timed.get((cell.method, cell.delta, cell.seed, batch))
            times = dict.fromkeys(("threads", "ms", "ms_dense"))
            if found:
                dense = timed["none", 0.0, cell.seed, batch]
                times = {"threads": found["threads"], "ms": 1000 * found["median_s"],
                         "ms_dense": 1000 * dense["median_s"]}  # fmt: skip
            rows.append({**facts, "batch": batch, **times})
    return pd.DataFrame(rows, columns=STRUCTURE).astype(dict.fromkeys(("threads", "ms", "ms_dense"), float))


def shift_table(study: Study) -> pd.DataFrame:
    """snacs_shift_accuracy.csv: one row a cell, shift and severity (0 = the clean test set)."""
    return pd.DataFrame(
        [
            {
                "method": cell.method,
                "delta": cell.delta,
                "seed": cell.seed,
                **{name: row[name] for name in ("shift", "severity", "accuracy", "ece")},
            }
            for cell in snacs_cells(study)
            for row in shift_rows(study, cell)
        ]
    )


def truth_table(study: Study) -> pd.DataFrame:
    """snacs_truth.csv: estimator, parents, samples, bias, spread, error against Gaussian truth, in nats."""
    return pd.DataFrame([row for parents in TRUTH_PARENTS for row in truth_rows(study, parents)])


def speed_table(study: Study) -> pd.DataFrame:
    """snacs_speed.csv: groups, estimator, seconds, ratio (to ours), and how many pairs were really timed."""
    rows = pd.DataFrame([row for groups in study.snacs_speed_groups for row in speed_rows(study, groups)])
    return rows[["groups", "estimator", "seconds", "ratio", "samples", "filters", "pairs_timed"]]


def published_table(study: Study, accuracy: pd.DataFrame) -> pd.DataFrame:
    """snacs_published.csv: the published numbers and ours, with what differs between them."""
    rows = [
        {
            "case": f"{line.network}, {line.dataset}",
            "method": line.method,
            "source": line.source,
            "dense": line.dense_accuracy,
            "sparsity": line.sparsity,
            "accuracy": line.accuracy,
            "note": "full width",
        }
        for line in published("SNACS").itertuples()
    ]
    dense = accuracy[accuracy.method == "none"].accuracy.mean()
    ours = accuracy[accuracy.method.isin(["snacs", "mint"])]
    for (method, delta), part in ours.groupby(["method", "delta"], sort=False):
        rows.append(
            {
                "case": f"{study.network}, {study.dataset}",
                "method": f"{LOOK[method][0]}, delta {delta:g}",
                "source": f"this study, {len(part)} seeds",
                "dense": dense,
                "sparsity": part.sparsity.mean(),
                "accuracy": part.accuracy.mean(),
                "note": f"width {study.width:g}, {study.epochs} epochs, fine-tuned for {study.finetune_epochs}",
            }
        )
    return pd.DataFrame(rows)


# --- claims ---------------------------------------------------------------------------------------------------------


def claims_table(study: Study, accuracy: pd.DataFrame, shifts: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """snacs_claims.csv, with the columns of claims.csv.

    Differences are SNACS less the peer, paired by seed and delta (and shift and severity). Left out: the claim on speed
    unless every published group count was timed, and the sparsity at less than one point lost where neither of the two
    methods has such a network.
    """
    rows, never = [*_speed_claims(speed), _automatic_claim(study)], never_within(accuracy)
    for peer in (m for m in study.snacs_methods if m != "snacs" and "snacs" in study.snacs_methods):
        if not {"snacs", peer} <= set(never):
            rows.append(_reached_claim(accuracy, peer))
        for measure, part in (("clean", shifts[shifts.severity == 0]), ("shifted", shifts[shifts.severity > 0])):
            rows.append(_accuracy_claim(part, measure, peer))
    return judged(rows)


def _fact(value: float) -> Interval:
    return Interval(value, value, value, 1, 0.0)


def _speed_claims(speed: pd.DataFrame) -> list[Comparison]:
    """The claim speaks of every group count: none where one of the published ones was not timed."""
    timed = speed[(speed.samples == PUBLISHED_SAMPLES) & (speed.estimator != "hash (ours)")]
    if not set(PUBLISHED_SPEED) <= set(timed.groups):
        return []
    rows = []
    for line in timed.itertuples():
        measure = f"times as long as ours: {line.estimator}, {line.groups} groups, N = {line.samples}"
        how = "supported" if line.ratio > 17 else "contradicted"
        rows.append(Comparison("snacs-1", measure, _fact(line.ratio), word=how))
    return rows


def _automatic_claim(study: Study) -> Comparison:
    """Every limit comes from one rule, every protection from one fraction: how many layers have their own number."""
    found = [analysis(study, seed) for seed in study.seeds]
    limits = [layer for known in found for layer in known.limits]
    by_hand = sum(isinstance(value, dict) for name, value in study if name.startswith("snacs_"))
    share = sum(known.limits[layer] == _limit(study, known.curves[layer]) for known in found for layer in known.limits)
    how = "supported" if share == len(limits) and not by_hand else "contradicted"
    measure = "share of layers whose limit follows from the rule alone"
    return Comparison("snacs-2", measure, _fact(share / max(1, len(limits))), word=how)


def _limit(study: Study, curve: Sequence[float]) -> float:
    """The limit that the rule gives for a layer's accuracies on the grid, worked out again."""
    floor = max(curve) - study.snacs_tolerance * (max(curve) - min(curve)) - 1e-12
    fine = [accuracy >= floor for accuracy in curve]
    if study.snacs_rule == "last":
        return max((share for share, holds in zip(GRID, fine, strict=True) if holds), default=0.0)
    count = fine.index(False) if False in fine else len(fine)
    return GRID[count - 1] if count else 0.0


def _within(accuracy: pd.DataFrame, loss: float) -> pd.DataFrame:
    """The rows of pruned networks that lose less than `loss` of the dense one's validation accuracy (without validation
    images: of the test accuracy)."""
    value = "val_accuracy" if accuracy.val_accuracy.notna().all() else "accuracy"
    dense = accuracy[accuracy.method == "none"].set_index("seed")[value]
    return accuracy[(accuracy.method != "none") & (accuracy[value] > accuracy.seed.map(dense) - loss)]


def reached(accuracy: pd.DataFrame, method: str, loss: float = 0.01) -> pd.Series:
    """By seed, the highest sparsity of a method's networks that lose less than `loss` (0 where none does)."""
    fine = _within(accuracy, loss)
    best = fine[fine.method == method].groupby("seed").sparsity.max()
    return best.reindex(accuracy[accuracy.method == "none"].seed, fill_value=0.0)


def never_within(accuracy: pd.DataFrame, loss: float = 0.01) -> list[str]:
    """The methods of which no network, at any delta and seed, loses less than `loss`."""
    fine = set(_within(accuracy, loss).method)
    return [method for method in dict.fromkeys(accuracy.method) if method != "none" and method not in fine]


def _reached_claim(accuracy: pd.DataFrame, peer: str) -> Comparison:
    interval = bootstrap((reached(accuracy, "snacs") - reached(accuracy, peer)).to_numpy())
    measure = f"sparsity at less than one point lost (validation), difference: snacs - {peer}"
    return Comparison("snacs-3", measure, interval)


def _accuracy_claim(rows: pd.DataFrame, measure: str, peer: str) -> Comparison:
    index = {"index": "seed", "columns": ["delta", "shift", "severity"], "values": "accuracy"}
    of = {name: rows[rows.method == name].pivot_table(**index) for name in ("snacs", peer)}
    interval = bootstrap(by_shift(of["snacs"] - of[peer]))
    label = {"clean": "clean accuracy", "shifted": "accuracy under shift"}[measure]
    return Comparison("snacs-4", f"{label}, difference: snacs - {peer}", interval, margin=0.005)


# --- figures --------------------------------------------------------------------------------------------------------


def _look(method: str) -> dict[str, Any]:
    label, color, marker = LOOK[method]
    return {"label": label, "color": color, "marker": marker}


def truth(table: pd.DataFrame) -> Figure:
    """Bias and spread of each estimator against Gaussian truth by the number of images; a row a number of parents."""
    sizes = sorted(set(table.parents))
    figure, axes = plt.subplots(len(sizes), 2, figsize=(8.4, 2.5 * len(sizes)), squeeze=False, sharex=True)
    for row, parents in zip(axes, sizes, strict=True):
        for axis, column in zip(row, ("bias", "spread"), strict=True):
            for name in dict.fromkeys(table.estimator):
                part = table[(table.parents == parents) & (table.estimator == name)]
                color, marker = ESTIMATORS[name]
                axis.plot(part.samples, part[column], color=color, marker=marker, ms=5, label=name)
            axis.set_xscale("log")
            axis.set_xticks(sorted(set(table.samples)), [f"{n:,}" for n in sorted(set(table.samples))])
            axis.minorticks_off()
            scale = table[table.parents == parents].scale.iloc[0]
            axis.set_title(f"{column}, {parents} parents (mean truth {scale:.2f} nats)", fontsize=9)
        row[0].axhline(0, color="black", lw=0.6)
        row[1].set_ylim(0, None)
        row[0].set_ylabel("nats")
    for axis in axes[-1]:
        axis.set_xlabel("images")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("Estimates of conditional information against the closed form", x=0.01, ha="left", fontsize=11)
    return figure


def score_maps(scores: Mapping[str, Tensor], numbers: Mapping[str, int], columns: int = 5) -> Figure:
    """Every layer's scores as ranks within the layer (0 goes first), child groups down, parent groups across."""
    ranks = {
        name: rho.flatten().argsort().argsort().view(rho.shape).double() / max(1, rho.numel() - 1)
        for name, rho in scores.items()
    }
    figure = layer_maps(
        ranks, numbers, across="parent group", down="child group", label="rank within the layer", columns=columns,
        cmap="viridis", vmin=0, vmax=1,
    )  # fmt: skip
    figure.suptitle("SNACS scores of every block, ranked within its layer", x=0.01, ha="left", fontsize=11)
    return figure


def limit_curves(
    curves: Mapping[str, Sequence[float]], limits: Mapping[str, float], numbers: Mapping[str, int], columns: int = 5
) -> Figure:
    """How well the classes can be told from a layer's activations as its blocks go, and the limit that follows."""
    figure, axes = panels(len(curves), columns, (2.1, 1.7), sharex=True, sharey=True)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        axis.plot(100 * np.array(GRID), 100 * np.array(curve), color="#0072B2", lw=1.4)
        axis.axvline(100 * limits[name], color="#D55E00", lw=1.2)
        axis.set_title(f"layer {numbers[name]}: {100 * limits[name]:.0f} %", fontsize=9)
    figure.suptitle(
        "How far each layer may go: classes told from its activations as blocks are zeroed",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.supxlabel("blocks of the layer zeroed, % (line: limit)", fontsize=10)
    figure.supylabel("accuracy, %", fontsize=10)
    return figure


def protection(
    sensitivities: Mapping[str, Sequence[float]], protected: Mapping[str, Tensor], numbers: Mapping[str, int]
) -> Figure:
    """How strongly each filter contributes to the next layers, relative to an equal share; protected ones marked."""
    figure, axis = plt.subplots(figsize=(max(5, 0.45 * len(protected)), 3))
    rng = np.random.default_rng(0)
    for name, groups in protected.items():
        share = np.array(sensitivities[name]) * len(sensitivities[name])
        if np.ptp(share) <= 1e-9:
            continue
        x = numbers[name] + rng.uniform(-0.25, 0.25, len(share))
        safe = groups.repeat_interleave(len(share) // len(groups)).numpy()
        axis.plot(x[~safe], share[~safe], ".", color="#7F7F7F", alpha=0.4, ms=4)
        axis.plot(x[safe], share[safe], "^", color="#D55E00", ms=5)
    axis.plot([], [], "^", color="#D55E00", ms=5, label="protected")
    axis.axhline(1, color="black", lw=0.6)
    axis.set(xlabel="layer, in execution order", ylabel="share / equal share")
    axis.set_title("What a filter contributes to the layers it feeds")
    whole_numbers(axis)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def pruned_by_layer(layers: pd.DataFrame, numbers: Mapping[str, int]) -> Figure:
    """Share of each layer's weights that went (bar: mean over seeds) and its limit (tick), one panel a delta."""
    deltas = sorted(set(layers.delta))
    figure, axes = panels(len(deltas), 2, (max(4.2, 0.34 * len(numbers)), 2.6), sharey=True)
    for axis, delta in zip(axes, deltas, strict=True):
        by = layers[layers.delta == delta].groupby("layer", sort=False)
        x = np.array([numbers[name] for name in by.pruned.mean().index])
        axis.bar(x, 100 * by.pruned.mean(), 0.7, color="#56B4E9", label="weights pruned")
        axis.plot(x, 100 * by.gamma.mean(), "_", color="#D55E00", ms=11, mew=2, label="limit on blocks")
        axis.set_xticks(x, [str(k) for k in x], fontsize=7)
        axis.set(title=f"delta {delta:g}", xlabel="layer, in execution order", ylim=(0, 104))
    axes[0].set_ylabel("%, mean over seeds")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("What SNACS prunes of each layer, and the limit it found", x=0.01, ha="left", fontsize=11)
    return figure


def accuracy_by_sparsity(accuracy: pd.DataFrame, shifts: pd.DataFrame) -> Figure:
    """Accuracy after one fine-tuning, clean and under shift, of each method by sparsity: points seeds, line mean."""
    shifted = each_shift_once(shifts).groupby(["method", "delta", "seed"]).accuracy.mean().rename("shifted")
    rows = accuracy.join(shifted, on=["method", "delta", "seed"])
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2))
    methods = [name for name in LOOK if name in set(rows.method) and name != "none"]
    for axis, column, title in zip(axes, ("accuracy", "shifted"), ("clean", "under shift"), strict=True):
        for number, name in enumerate(methods):
            part = rows[rows.method == name]
            label, color, marker = LOOK[name]
            mean = part.groupby("delta")[["sparsity", column]].mean().sort_values("sparsity")
            nudge = 0.25 * (number - (len(methods) - 1) / 2)
            axis.plot(
                100 * part.sparsity + nudge, 100 * part[column], ls="", marker=marker, color=color, ms=4, alpha=0.4
            )
            axis.plot(100 * mean.sparsity + nudge, 100 * mean[column], marker=marker, color=color, ms=6, lw=1.2,
                      label=label)  # fmt: skip
        dense = 100 * rows[rows.method == "none"][column].mean()
        axis.axhline(dense, color="black", ls="--", lw=1, label="dense")
        axis.set(title=title, xlabel="weights removed, %")
    axes[0].set_ylabel("accuracy, %")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="line: mean, points: seeds",
                    title_fontsize=8, alignment="left")  # fmt: skip
    figure.suptitle(
        "Accuracy after one fine-tuning, SNACS and its peers at the same sparsity", x=0.01, ha="left", fontsize=11
    )
    return figure


def speed(table: pd.DataFrame) -> Figure:
    """Seconds for all pairs by the number of groups, both axes logarithmic; ours and the spanning tree's ways."""
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    for name in dict.fromkeys(table.estimator):
        part = table[table.estimator == name]
        color, marker = ESTIMATORS[name]
        axis.plot(part.groups, part.seconds, color=color, marker=marker, ms=5, label=name)
    axis.set(xscale="log", yscale="log", xlabel="groups a layer", ylabel="seconds for all pairs")
    axis.set_xticks(sorted(set(table.groups)), _short_numbers(table))
    axis.minorticks_off()
    axis.set_title(f"Estimating all pairs: {table.filters.iloc[0]} filters, {table.samples.iloc[0]:,} images")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _short_numbers(table: pd.DataFrame) -> list[str]:
    return [str(count) for count in sorted(set(table.groups))]
