"""The figures of the CKA-SR notebook: data in, a matplotlib figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gcnet.cka_cells import WEIGHT_BINS
from gcnet.evaluation import bootstrap
from gcnet.figures import COLORS, categories, panels
from gcnet.sparse_training import METHODS

WITHOUT, WITH = COLORS["direct"], COLORS["B25"]
_MARKERS = {"dense": "*", "rst": "o", "set": "^", "rigl": "s", "rewind": "D", "snip": "v", "grasp": "P"}


def _beta_name(beta: float) -> str:
    return f"β = {beta:g}" if beta else "without"


def _beta_colors(betas: list[float]) -> dict[float, tuple[float, ...]]:
    """Grey without, then darker blue with larger beta."""
    shades = plt.get_cmap("viridis_r")(np.linspace(0.2, 0.9, max(1, len(betas) - 1)))
    positive = iter(shades)
    return {beta: WITHOUT if not beta else tuple(next(positive)) for beta in betas}


def _points(axis: Axes, x: float, values: np.ndarray, **look: object) -> None:
    """Mean and 95 % interval over seeds (each seed as a faint dot)."""
    interval = bootstrap(values)
    axis.plot([x] * len(values), values, ".", color=look["color"], ms=3, alpha=0.45)
    if interval.n > 1:
        axis.plot([x, x], [interval.low, interval.high], color=look["color"], lw=1.2, alpha=0.6)
    axis.plot(x, interval.estimate, ls="", ms=6, **look)


def choice(table: pd.DataFrame) -> Figure:
    """Accuracy on validation images by beta, a line a seed; without the penalty on the left."""
    figure, axis = plt.subplots(figsize=(4.6, 3))
    betas = sorted(set(table.beta))
    seeds = 100 * table.pivot_table(index="beta", columns="seed", values="val_accuracy")
    for seed in seeds:
        axis.plot(range(len(betas)), seeds[seed], ".-", color=WITHOUT, lw=0.8, alpha=0.6)
    axis.plot(range(len(betas)), seeds.mean(axis=1), "o-", color=WITH, label=f"mean of {seeds.shape[1]}")
    axis.set_xticks(range(len(betas)), [_beta_name(beta) for beta in betas], rotation=20)
    axis.set_ylabel("validation accuracy, %")
    row = table.iloc[0]
    axis.set_title(f"Choice of β: {METHODS[row.method]}, {100 * row.sparsity:g} % removed")
    axis.legend()
    return figure


def heat_maps(similarity: pd.DataFrame, method: str, sparsity: float) -> Figure:
    """CKA of every two block outputs, mean over seeds, a panel a beta, with the mean inside stages (diagonal apart)."""
    rows = similarity[(similarity.method == method) & (similarity.sparsity == sparsity)]
    betas = sorted(set(rows.beta))
    order = list(dict.fromkeys(rows.layer_i))
    figure, axes = panels(len(betas), 4, (2.7, 2.8))
    for axis, beta in zip(axes, betas, strict=True):
        part = rows[rows.beta == beta]
        matrix = part.pivot_table(index="layer_i", columns="layer_j", values="cka").loc[order, order]
        image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        for edge in _stage_edges(part, order):
            axis.axhline(edge, color="white", lw=0.8)
            axis.axvline(edge, color="white", lw=0.8)
        axis.set_title(f"{_beta_name(beta)}: {part[part.same_stage].cka.mean():.3f} inside stages", fontsize=9)
        ticks = range(0, len(order), max(1, len(order) // 6))
        axis.set_xticks(ticks, [k + 1 for k in ticks], fontsize=7)
        axis.set_yticks(ticks, [k + 1 for k in ticks], fontsize=7)
    figure.supxlabel("block, in execution order", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label="CKA")
    what = METHODS[method] if not sparsity else f"{METHODS[method]}, {100 * sparsity:g} % removed"
    figure.suptitle(f"Similarity of block outputs: {what}", x=0.01, ha="left", fontsize=11)
    return figure


def _stage_edges(part: pd.DataFrame, order: list[str]) -> list[float]:
    """Where one stage ends and the next begins."""
    same = {(row.layer_i, row.layer_j) for row in part[part.same_stage].itertuples()}
    return [k + 0.5 for k, pair in enumerate(pairwise(order)) if pair not in same]


def weight_histograms(shares: Mapping[float, Sequence[float]], epsilon: pd.DataFrame, title: str) -> Figure:
    """Kept weights by size on a logarithmic axis, and the share below each epsilon (line: mean, band: seeds).

    shares: beta -> percent of the kept weights in each of WEIGHT_BINS. epsilon: rows of cka_sr_epsilon.csv of one
    method and sparsity.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3))
    colors = _beta_colors(sorted(shares))
    for beta in sorted(shares):
        left.hist(WEIGHT_BINS[:-1], bins=WEIGHT_BINS, weights=shares[beta], histtype="step", lw=1.3, color=colors[beta],
                  label=_beta_name(beta))  # fmt: skip
    left.set(xscale="log", xlabel="|weight| (the smallest and largest bin hold what lies beyond)", ylabel="% of kept")
    left.legend(fontsize=8)
    left.set_title(title)
    for beta, part in epsilon.groupby("beta"):
        seeds = 100 * part.pivot_table(index="epsilon", columns="seed", values="share")
        color = colors.get(beta, WITH)
        right.plot(seeds.index, seeds.mean(axis=1), "o-", ms=4, color=color, label=_beta_name(beta))
        right.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=color, alpha=0.15, lw=0)
    right.set(xscale="log", xlabel="ε", ylabel="kept weights with |w| < ε, %")
    right.set_title("ε-sparsity (band: range over seeds)")
    return figure


def accuracy_by_sparsity(accuracy: pd.DataFrame, dense: float | None = None) -> Figure:
    """Accuracy against sparsity without and with the penalty, a panel a method; mean, 95 % interval, seeds."""
    rows = accuracy[accuracy.method != "dense"]
    methods = list(dict.fromkeys(rows.method))
    levels = sorted(set(rows.sparsity))
    figure, axes = panels(len(methods), 3, (3.3, 3.0), sharey=True)
    for axis, method in zip(axes, methods, strict=True):
        part = rows[rows.method == method]
        for number, beta in enumerate(sorted(set(part.beta))):
            look = {"color": WITH if beta else WITHOUT, "marker": "o" if beta else "s"}
            for column, sparsity in enumerate(levels):
                values = 100 * part[(part.beta == beta) & (part.sparsity == sparsity)].accuracy.to_numpy()
                label = _beta_name(beta) if not column else None
                _points(axis, column + 0.16 * (number - 0.5), values, label=label, **look)
        if dense is not None:
            axis.axhline(100 * dense, color="black", lw=0.8, ls="--")
            axis.annotate("dense", (1, 100 * dense), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=8)  # fmt: skip
        categories(axis, [f"{100 * level:g} %" for level in levels])
        axis.set(title=METHODS[method], xlabel="sparsity")
    axes[0].set_ylabel("accuracy, %")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def gains(accuracy: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """What the penalty adds in points, by sparsity and method: mean, 95 % interval, seeds; published ones hollow."""
    rows = accuracy[accuracy.method != "dense"]
    methods, levels = list(dict.fromkeys(rows.method)), sorted({*rows.sparsity, *published.sparsity})
    middle = (len(methods) + published.dataset.nunique() - 1) / 2
    figure, axis = plt.subplots(figsize=(max(4.5, 1.1 * len(levels) + 1.5), 3.2))
    palette = dict(zip(METHODS, sns.color_palette("colorblind"), strict=False))
    for number, method in enumerate(methods):
        by = rows[rows.method == method].groupby(["sparsity", "seed", "beta"]).accuracy.mean().unstack("beta")
        difference = 100 * (by[by.columns.max()] - by[0.0]).dropna()
        look = {"color": palette[method], "marker": _MARKERS[method]}
        for level in dict.fromkeys(difference.index.get_level_values(0)):
            x = levels.index(level) + 0.16 * (number - middle)
            label = METHODS[method] if level == difference.index[0][0] else None
            _points(axis, x, difference.loc[level].to_numpy(), label=label, **look)
    for number, (name, part) in enumerate(published.groupby("dataset")):
        x = [levels.index(level) + 0.16 * (len(methods) + number - middle) for level in part.sparsity]
        marker = "oD"[number % 2]
        axis.plot(x, 100 * (part["with"] - part["without"]), marker, mfc="white", color="black", ms=5,
                  label=f"published, {name}")  # fmt: skip
    axis.axhline(0, color="black", lw=0.8)
    categories(axis, [f"{100 * level:g} %" for level in levels])
    axis.set(xlabel="sparsity", ylabel="gain, points", title="Accuracy gained by the penalty")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="mean, 95 % interval,\ndots: seeds",
                title_fontsize=8, alignment="left")  # fmt: skip
    return figure


def shift_gains(shifts: pd.DataFrame) -> Figure:
    """With less without the penalty under every shift, in points: mean over severities, methods and sparsities."""
    by = shifts.groupby(["shift", "seed", "beta"], sort=False).accuracy.mean().unstack("beta")
    difference = 100 * (by[by.columns.max()] - by[0.0]).unstack("seed")
    order = [name for name in dict.fromkeys(shifts["shift"]) if name in difference.index]
    figure, axis = plt.subplots(figsize=(0.42 * len(order) + 2, 3))
    for x, name in enumerate(order):
        _points(axis, x, difference.loc[name].dropna().to_numpy(), color=WITH, marker="o")
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(order)), [name.replace("_", " ") for name in order], rotation=40, ha="right")
    axis.set(ylabel="gain, points", title="Accuracy gained by the penalty, by shift")
    axis.yaxis.set_major_locator(MaxNLocator(6))
    return figure
