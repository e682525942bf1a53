"""The figures of notebook 08: data in, a matplotlib figure out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from gcnet.figures import panels, short_names, whole_numbers
from gcnet.shifts import FAMILIES

# One look a way of choosing filters; joint and static also differ from decoupled in marker.
LOOKS = {
    "decoupled": {"color": "#0072B2", "marker": "o", "label": "FTWT, decoupled"},
    "joint": {"color": "#D55E00", "marker": "s", "label": "FTWT, joint"},
    "l1_filter": {"color": "#7F7F7F", "marker": "v", "label": "static, L1 filter"},
}
# Masks that others made of the same dense networks.
MASKED = {"direct": ("#009E73", "+"), "GC-Net": ("#CC79A7", "x"), "SNACS": ("#E69F00", "D")}


def target_example(maxima: np.ndarray, r: float, k: int) -> Figure:
    """How a target is made: the filters of one image and layer, sorted, their cumulative share, and where it stops."""
    order = np.argsort(-maxima, kind="stable")
    share = np.cumsum(maxima[order]) / maxima.sum()
    figure, axis = plt.subplots(figsize=(4.6, 2.8))
    place = np.arange(len(maxima))
    colors = [LOOKS["decoupled"]["color"] if position < k else "0.8" for position in place]
    axis.bar(place, maxima[order], 0.7, color=colors)
    axis.set(xlabel="filters, by how strongly they fire", ylabel="spatial maximum")
    axis.set_xticks(place, [f"filter {number + 1}" for number in order], rotation=35, ha="right", fontsize=8)
    right = axis.twinx()
    right.plot(place, share, color="black", marker=".", lw=1)
    right.axhline(r, color="black", ls=":", lw=0.9)
    right.annotate(f"r = {r:g}", (len(maxima) / 2 - 1, r), va="bottom", ha="center", fontsize=8)
    right.set(ylim=(0, 1.08), ylabel="cumulative share")
    sns.despine(ax=right, right=False)
    axis.set_title(f"k = {k}: the blue filters are wanted")
    return figure


def filters_used(layers: pd.DataFrame, classes: pd.DataFrame, r: float) -> Figure:
    """Share of each layer's filters that images use: mean, middle 90 % of images, targets; and by class."""
    rows = layers[(layers["mode"] == "decoupled") & (layers.r == r)]
    rows = rows.assign(number=rows.layer.map({name: n for n, name in enumerate(dict.fromkeys(rows.layer), 1)}))
    part = rows.groupby("number")
    size = part.filters.first()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), gridspec_kw={"width_ratios": [1, 1.25]})
    color = LOOKS["decoupled"]["color"]
    axes[0].fill_between(size.index, 100 * part.k_low.mean() / size, 100 * part.k_high.mean() / size, color=color,
                         alpha=0.18, lw=0, label="middle 90 % of images")  # fmt: skip
    axes[0].plot(size.index, 100 * part.k.mean() / size, color=color, marker="o", ms=4, label="used, mean")
    axes[0].plot(size.index, 100 * part.k_wanted.mean() / size, color="black", ls="--", lw=1, label="wanted (target)")
    axes[0].set(xlabel="gated layer, in execution order", ylabel="filters, %", ylim=(0, 102))
    axes[0].set_title(f"Filters an image uses, r = {r:g}")
    axes[0].legend(fontsize=8)
    whole_numbers(axes[0])
    relative = 100 * (classes - classes.mean())
    limit = max(1.0, float(np.nanquantile(np.abs(relative.to_numpy()), 0.98)))
    sns.heatmap(relative, ax=axes[1], cmap="vlag", center=0, vmin=-limit, vmax=limit,
                cbar_kws={"label": "points from the layer's mean"})  # fmt: skip
    axes[1].set_xticks(np.arange(classes.shape[1]) + 0.5, short_names(list(classes)), rotation=0, fontsize=8)
    axes[1].set_yticks(np.arange(len(classes)) + 0.5, [str(name) for name in classes.index], rotation=0, fontsize=8)
    axes[1].set(xlabel="gated layer, in execution order", ylabel="")
    axes[1].set_title("By class")
    return figure


def estimate_against_outcome(estimates: pd.DataFrame) -> Figure:
    """MACs saved: estimated before training (across) and after it (up), a point a network; the line is agreement."""
    figure, axis = plt.subplots(figsize=(4.2, 3.8))
    for mode, look in LOOKS.items():
        part = estimates[estimates["mode"] == mode]
        if len(part):
            axis.plot(100 * part.estimated, 100 * part.measured, ls="", ms=6, alpha=0.8, **look)
    values = 100 * estimates[["estimated", "measured"]].to_numpy()
    low, high = values.min() - 4, values.max() + 4
    axis.plot([low, high], [low, high], color="black", lw=0.8, ls="--")
    for r, part in estimates.groupby("r"):
        top = 100 * part.measured.max()
        axis.annotate(f"r = {r:g}", (100 * part.estimated.mean(), top), xytext=(0, 7), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axis.set(xlabel="MACs saved, estimated before training, %", ylabel="after training, %")
    axis.set_title("Estimate against outcome")
    axis.legend(fontsize=8, loc="upper left")
    return figure


def accuracy_against_macs(accuracies: pd.DataFrame, unstructured: pd.DataFrame) -> Figure:
    """Test accuracy against MACs left: mean over seeds with its range, decoupled r joined by a line."""
    figure, axis = plt.subplots(figsize=(6.2, 3.8))
    for mode, look in LOOKS.items():
        part = accuracies[accuracies["mode"] == mode]
        by = part.groupby("r")
        if not len(part):
            continue
        x, y = 100 * (1 - by.macs_reduction.mean()), 100 * by.accuracy.mean()
        # Rounding can put the mean of equal values outside them.
        spread = [(y - 100 * by.accuracy.min()).clip(lower=0), (100 * by.accuracy.max() - y).clip(lower=0)]
        line = {"ls": "-", "lw": 1} if mode != "joint" else {"ls": ""}
        axis.errorbar(x, y, yerr=spread, ms=6, elinewidth=1, **line, **look)
        if mode == "decoupled":
            for r in x.index:
                axis.annotate(f"r = {r:g}", (x[r], y[r]), xytext=(0, -14), textcoords="offset points", fontsize=8,
                              ha="center")  # fmt: skip
    if len(unstructured):
        by = unstructured.groupby(["system", "setting"], sort=False)[["macs_reduction", "accuracy"]].mean()
        for system, (color, marker) in MASKED.items():
            if system in by.index:
                points = by.loc[system]
                axis.plot(100 * (1 - points.macs_reduction), 100 * points.accuracy, ls="", marker=marker, color=color,
                          ms=6, label=f"{system} (masks, theoretical MACs)")  # fmt: skip
    dense = 100 * accuracies[accuracies["mode"] == "none"].accuracy.mean()
    axis.axhline(dense, color="black", lw=0.8, ls="--")
    axis.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axis.margins(x=0.08)
    axis.set(xlabel="MACs left, % of dense (heads counted)", ylabel="test accuracy, %")
    axis.set_title("Accuracy against MACs")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="mean, bar: range over seeds",
                title_fontsize=8, alignment="left")  # fmt: skip
    return figure


def firing_under_shift(shifts: pd.DataFrame, r: float) -> Figure:
    """What the masks do when images are corrupted, by family and severity: filters used, wanted, mask accuracy."""
    rows = shifts[(shifts["mode"] == "decoupled") & (shifts.r == r)]
    rows = rows.assign(family=rows["shift"].map(FAMILIES))
    clean = rows[rows.severity == 0]
    rows = rows[rows.family.notna()]
    columns = {
        "filters_used": "filters used, %",
        "filters_wanted": "filters wanted, %",
        "mask_accuracy": "mask accuracy, %",
    }
    figure, axes = panels(len(columns), 3, (3.3, 2.9), sharex=True)
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for number, (family, part) in enumerate(rows.groupby("family", sort=False)):
            by = 100 * pd.concat([clean, part]).groupby(["severity", "seed"])[column].mean().unstack("seed")
            mean, color = by.mean(axis=1), sns.color_palette("colorblind")[number % 10]
            bars = [(mean - by.min(axis=1)).clip(lower=0), (by.max(axis=1) - mean).clip(lower=0)]
            axis.errorbar(by.index, mean, yerr=bars, marker="os^Dv"[number % 5], ms=4, lw=1.2, elinewidth=0.8,
                          color=color, label=family)  # fmt: skip
        axis.set(xlabel="severity (0: clean)", title=label.removesuffix(", %").capitalize(), ylabel=label)
        axis.set_xticks([0, *sorted(set(rows.severity))])
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="mean,\nbar: range\nover seeds",
                    title_fontsize=8, alignment="left")  # fmt: skip
    figure.suptitle(f"Masks under shift, decoupled, r = {r:g}", x=0.01, ha="left", fontsize=11)
    return figure


def latency(table: pd.DataFrame) -> Figure:
    """Speed-up of computing only the selected filters over the dense network in its fastest layout; 1 is no gain."""
    figure, axis = plt.subplots(figsize=(4.8, 3.4))
    groups = list(table.groupby(["image_size", "batch"]))
    for number, ((size, batch), part) in enumerate(groups):
        part = part.sort_values("macs_reduction")
        color = sns.color_palette("colorblind")[number % 10]
        axis.plot(100 * part.macs_reduction, part.ratio, marker="os^D"[number % 4], ms=5, lw=1.2, color=color,
                  label=f"{size} px, batch {batch}")  # fmt: skip
    axis.axhline(1, color="black", lw=0.8, ls="--")
    axis.set(xlabel="MACs saved, %", ylabel="dense time / dynamic time", ylim=(0, max(1.3, 1.15 * table.ratio.max())))
    axis.set_title(f"Real skipping, {table.network.iloc[0]}, one thread")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
