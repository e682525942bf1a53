"""The figures of the notebooks: data in, a matplotlib figure out. Each can stand alone in a talk."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats
from torch import Tensor

from gcnet.evaluation import bootstrap
from gcnet.shifts import FAMILIES

# Okabe and Ito's colours, told apart by colour-blind readers; hybrids also differ in marker.
COLORS = {"none": "#000000", "direct": "#595959", "Full": "#D55E00", "FH": "#E69F00", "BH": "#56B4E9", "B25": "#0072B2"}
MARKERS = {"none": "*", "direct": "s", "Full": "v", "FH": "<", "BH": ">", "B25": "o"}
DIRECT_COLOR, GUIDED_COLOR = "#E8C547", "#3B6FB6"
ROLE_COLORS = {"direct": DIRECT_COLOR, "guided": GUIDED_COLOR, "mixed": "#009E73"}
PRUNERS = {
    "none": "dense",
    "random": "random",
    "l1": "L1, global",
    "l1_layer": "L1, layer-wise",
    "lamp": "LAMP",
    "os_synflow": "OS-SynFlow",
    "synflow": "SynFlow-100",
}
SIMILARITIES = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "cosine": "cosine",
    "distance": "distance corr.",
    "hsic": "HSIC (RBF)",
    "mutual_information": "mutual inf.",
    "partial": "partial corr.",
    "none": "direct",
}


ALL_CORRUPTIONS = "all corruptions"  # a choice beside their names


def style() -> None:
    """The one style of all figures: call it once in a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.85)
    if get_ipython() is not None:
        set_matplotlib_formats("retina")  # crisp where a screen has two pixels for one
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 200,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "svg.hashsalt": "gcnet",  # the same bytes on a re-run
            "svg.fonttype": "path",
        }
    )


def method(hybrid: str, similarity: str) -> str:
    """How a hybrid is called in a legend: 'B25', 'B25 partial', 'direct', 'dense'."""
    if hybrid == "none":
        return "dense"
    return hybrid if similarity in ("none", "pearson") else f"{hybrid} {similarity}"


def with_methods(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column `method`, in the order dense, direct, Full, FH, BH, B25, then other similarities."""
    names = [method(h, s) for h, s in zip(rows.hybrid, rows.similarity, strict=True)]
    order = ["dense", "direct", *[h for h in COLORS if h not in ("none", "direct")]]
    rank = {name: number for number, name in enumerate(order)}
    order += sorted({n for n in names if n not in order}, key=lambda n: (rank.get(n.split(" ")[0], len(rank)), n))
    kinds = [n for n in order if n in set(names)]
    return rows.assign(method=pd.Categorical(names, kinds, ordered=True))


def _look(name: str) -> dict[str, Any]:
    base = "none" if name == "dense" else name.split(" ")[0]
    hollow = {"markerfacecolor": "white"} if " " in name else {}
    other = ("P" if base == "Mix100" else "X") if base.startswith("Mix") else "D"
    return {"color": COLORS.get(base, "#009E73"), "marker": MARKERS.get(base, other), **hollow}


def panels(count: int, columns: int, cell: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, `columns` a row, each of `cell` = (width, height) inches; options: plt.subplots'."""
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    size = (cell[0] * columns, cell[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat[:count]


def whole_numbers(axis: Axes) -> None:
    """At most seven ticks along x, at whole numbers: layers and epochs."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def categories(axis: Axes, names: Sequence[str]) -> None:
    """Places 0, 1, ... along x as categories: named in their middle, every other one shaded, no ticks of a scale."""
    axis.set_xticks(range(len(names)), names)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.5, len(names) - 0.5)
    for place in range(0, len(names), 2):
        axis.axvspan(place - 0.5, place + 0.5, color="0.96", zorder=0)


def short_names(layers: Sequence[str]) -> list[str]:
    """Layers as their numbers in execution order."""
    return [str(number) for number in range(1, len(layers) + 1)]


# --- 01 activations -------------------------------------------------------------------------------------------------


def training_curves(histories: Mapping[int, list[dict[str, float]]], test_accuracy: Mapping[int, float]) -> Figure:
    """Accuracy on the (augmented) training images by epoch, one line a seed, and the test accuracy at the end."""
    figure, axis = plt.subplots(figsize=(5, 3))
    for number, (seed, history) in enumerate(histories.items()):
        color = sns.color_palette("colorblind")[number % 10]
        axis.plot(
            [r["epoch"] for r in history], [100 * r["accuracy"] for r in history], color=color, label=f"seed {seed}"
        )
        axis.plot(history[-1]["epoch"], 100 * test_accuracy[seed], "*", color=color, ms=11, clip_on=False)
    axis.set(xlabel="epoch", ylabel="accuracy, %", title="Training (line) and final test accuracy (star)")
    whole_numbers(axis)
    axis.legend()
    return figure


def activation_spread(activations: Mapping[str, Tensor]) -> Figure:
    """Per layer, how much its filters vary over images: every filter a point, dead filters (no variation) counted."""
    figure, axis = plt.subplots(figsize=(max(5, 0.42 * len(activations)), 3))
    rng = np.random.default_rng(0)
    dead = []
    for number, values in enumerate(activations.values(), 1):
        spread = values.std(0).cpu().numpy()
        alive = spread[spread > 1e-7]
        dead.append(len(spread) - len(alive))
        axis.plot(number + rng.uniform(-0.25, 0.25, len(alive)), alive, ".", color=COLORS["B25"], alpha=0.35, ms=4)
        axis.plot([number - 0.3, number + 0.3], [np.median(alive)] * 2 if len(alive) else [np.nan] * 2, color="black")
    axis.set_yscale("log")
    for number, count in enumerate(dead, 1):
        if count:
            axis.annotate(f"{count} dead", (number, 0), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    axis.set_xticks(range(1, len(dead) + 1), short_names(list(activations)))
    axis.set(xlabel="layer, in execution order", ylabel="standard deviation over images")
    axis.set_title(f"How much filters vary over images ({len(next(iter(activations.values())))} images; bar: median)")
    return figure


def activation_histograms(activations: Mapping[str, Tensor], columns: int = 5) -> Figure:
    """Histogram per layer of the standardised filter scalars, over all filters and images."""
    figure, axes = panels(len(activations), columns, (2.1, 1.5), sharex=True)
    for number, (axis, values) in enumerate(zip(axes, activations.values(), strict=True), 1):
        scaled = ((values - values.mean(0)) / values.std(0).clamp_min(1e-7)).flatten().cpu().numpy()
        axis.hist(scaled, bins=np.linspace(-4, 4, 49), density=True, color=COLORS["B25"], alpha=0.8)
        axis.set_title(f"layer {number}", fontsize=9)
        axis.set_yticks([])
    figure.supxlabel("filter activation, standardised per filter", fontsize=10)
    return figure


def class_heat_maps(
    activations: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str], layers: int = 4
) -> Figure:
    """Mean standardised activation of each filter for each class, for layers spread over the depth."""
    names = list(activations)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, layers).round().astype(int))]
    figure, axes = panels(len(chosen), 2, (4.6, 2.1 if len(classes) <= 12 else 3))
    for axis, name in zip(axes, chosen, strict=True):
        values = activations[name]
        scaled = (values - values.mean(0)) / values.std(0).clamp_min(1e-7)
        means = np.stack([scaled[labels == k].mean(0).cpu().numpy() for k in labels.unique().tolist()])
        means = means[:, np.argsort(means.argmax(0) - 0.01 * means.max(0))]
        few = [classes[k] for k in labels.unique().tolist()] if len(classes) <= 12 else False
        sns.heatmap(means, ax=axis, cmap="vlag", center=0, vmin=-2, vmax=2, yticklabels=few, xticklabels=False,
                    cbar_kws={"label": "z-score"})  # fmt: skip
        axis.set_title(f"layer {names.index(name) + 1}: {values.shape[1]} filters", fontsize=9)
        axis.tick_params(axis="y", labelsize=7)
    return figure


# --- 02 connectivity ------------------------------------------------------------------------------------------------


def layer_maps(
    maps: Mapping[str, Tensor], numbers: Mapping[str, int], *, across: str, down: str, label: str, columns: int = 5,
    **look: Any,
) -> Figure:  # fmt: skip
    """One matrix a layer as a picture, a colour bar for all; look: cmap, vmin, vmax of `imshow`."""
    figure, axes = panels(len(maps), columns, (2.1, 1.9))
    for axis, (name, matrix) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(matrix.cpu(), aspect="auto", interpolation="nearest", **look)
        axis.set_title(f"layer {numbers[name]}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel(across, fontsize=10)
    figure.supylabel(down, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.5, label=label)
    return figure


def matrices(connectivity: Mapping[str, Tensor], numbers: Mapping[str, int], columns: int = 5) -> Figure:
    """Every layer's connectivity matrix: child filters down, input channels across."""
    return layer_maps(
        connectivity, numbers, across="input channel (filter of the parent)", down="filter", label="connectivity",
        columns=columns, cmap="vlag", vmin=-1, vmax=1,
    )  # fmt: skip


def strength_by_layer(table: pd.DataFrame, numbers: Mapping[str, int]) -> Figure:
    """Mean |connectivity| per layer with the 5-95 % range of the entries, one panel a similarity metric."""
    names = [s for s in SIMILARITIES if s in set(table.similarity)]
    figure, axes = panels(len(names), 4, (2.7, 2.0), sharex=True)
    for axis, name in zip(axes, names, strict=True):
        part = table[table.similarity == name].groupby("layer", sort=False)[["mean_abs", "p05", "p95"]].mean()
        x = [numbers[layer] for layer in part.index]
        axis.fill_between(x, part.p05, part.p95, color=COLORS["BH"], alpha=0.35, lw=0, label="5-95 % of entries")
        axis.plot(x, part.mean_abs, "o-", color=COLORS["B25"], ms=4, label="mean |value|")
        axis.axhline(0, color="black", lw=0.6)
        axis.set_title(SIMILARITIES[name], fontsize=9)
        whole_numbers(axis)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel("layer, in execution order", fontsize=10)
    figure.supylabel("connectivity", fontsize=10)
    return figure


def residual_join(parts: Mapping[str, Tensor], total: Tensor, child: str) -> Figure:
    """The matrices of the parents that meet in one layer, and their sum: what the ghost loads as its weights."""
    figure, axes = panels(len(parts) + 1, 5, (2.3, 2.3))
    limit = max(1.0, float(total.abs().max()))
    for axis, (name, matrix) in zip(axes, [*parts.items(), ("sum", total)], strict=True):
        image = axis.imshow(matrix.cpu(), cmap="vlag", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
        axis.set_title(f"= sum, loaded into\n{child}" if name == "sum" else f"from {name}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel("input channel", fontsize=10)
    figure.supylabel(f"filter of {child}", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.7, label="connectivity")
    return figure


def drift(table: pd.DataFrame, numbers: Mapping[str, int], others: pd.DataFrame | None = None) -> Figure:
    """How far connectivity moves under each family of shifts: relative distance and rank correlation by layer.

    others: the same of other clean images, a dotted line.
    """
    rows = table.assign(family=table["shift"].map(FAMILIES), number=table.layer.map(numbers))
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3), sharex=True)
    for axis, (column, label) in zip(
        axes, (("distance", "relative Frobenius distance"), ("rank_correlation", "rank correlation")), strict=True
    ):
        sns.lineplot(rows, x="number", y=column, hue="family", style="family", markers=True, errorbar=("pi", 100),
                     err_kws={"alpha": 0.12}, ax=axis, legend=axis is axes[0])  # fmt: skip
        axis.set(xlabel="layer, in execution order", ylabel=label)
        whole_numbers(axis)
        if others is not None and len(others):
            chance = others.groupby(others.layer.map(numbers))[column].mean()
            axis.plot(chance.index, chance, ":", color="0.3", label="other clean images")
    axes[0].legend(title=None, fontsize=8)
    axes[0].set_title(f"Connectivity on shifted against clean images (severity {rows.severity.iloc[0]}; band: range)")
    return figure


# --- 03 ghost pruning -----------------------------------------------------------------------------------------------


def overview(parent: Tensor, child: Tensor, matrix: Tensor, ghost_mask: Tensor, weight: Tensor, title: str) -> Figure:
    """The pipeline on one real layer: activations, connectivity, ghost, its mask, the mask on the original."""
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.7), gridspec_kw={"width_ratios": [1.2, 1, 1, 1, 1]})
    both = [(a - a.mean(0)) / a.std(0).clamp_min(1e-7) for a in (parent[:40], child[:40])]
    gap = np.full((len(both[0]), 3), np.nan)
    stacked = np.hstack([both[0].cpu(), gap, both[1].cpu()])
    axes[0].imshow(stacked, cmap="vlag", vmin=-2.5, vmax=2.5, aspect="auto", interpolation="nearest")
    axes[0].set_title("1 activations\nparent | child", fontsize=9)
    axes[0].set(xlabel="filters", ylabel="images")
    limit = float(matrix.abs().max())
    axes[1].imshow(matrix.cpu(), cmap="vlag", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes[1].set_title("2 connectivity\n(correlation)", fontsize=9)
    axes[2].imshow(matrix.abs().cpu(), cmap="Blues", aspect="auto", interpolation="nearest")
    axes[2].set_title("3 ghost weights\n|value|, per kernel", fontsize=9)
    kept = ghost_mask.float().flatten(2).mean(2).cpu() if ghost_mask.ndim > 2 else ghost_mask.float().cpu()
    axes[3].imshow(kept, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes[3].set_title("4 pruned ghost\nshare of kernel kept", fontsize=9)
    left = (weight * ghost_mask).abs()
    left = (left.flatten(2).mean(2) if left.ndim > 2 else left).cpu()
    axes[4].imshow(left, cmap="Oranges", aspect="auto", interpolation="nearest")
    axes[4].set_title("5 mapped back\n|original weight| left", fontsize=9)
    for axis in axes[1:]:
        axis.set(xlabel="input channel")
    axes[1].set_ylabel("filter")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    return figure


def layer_sparsity(layers: pd.DataFrame, sparsity: float, similarity: str) -> Figure:
    """Where each base pruner cuts, on the original and on the ghost: share kept per layer, band over seeds."""
    rows = layers[(layers.sparsity == sparsity) & layers.hybrid.isin(["direct", "Full"])]
    rows = rows[rows.similarity.isin(["none", similarity])].assign(share=100 * rows.kept / rows.weights)
    rows = rows.assign(number=rows.layer.map({name: k for k, name in enumerate(dict.fromkeys(rows.layer), 1)}))
    pruners = list(dict.fromkeys(rows.pruner))
    figure, axes = panels(len(pruners), 3, (3.3, 2.6), sharey=True)
    for axis, pruner in zip(axes, pruners, strict=True):
        for hybrid, name in (("direct", "on the original"), ("Full", "on the ghost")):
            part = rows[(rows.pruner == pruner) & (rows.hybrid == hybrid)].groupby("number").share
            axis.plot(part.mean().index, part.mean(), label=name, ms=4, **_look(hybrid))
            axis.fill_between(part.mean().index, part.min(), part.max(), color=COLORS[hybrid], alpha=0.2, lw=0)
        axis.axhline(100 * (1 - sparsity), color="black", lw=0.6, ls=":")
        axis.set_title(PRUNERS[pruner])
        axis.set_xlabel("layer, in execution order")
        whole_numbers(axis)
    axes[0].set_ylabel("weights kept, %")
    figure.suptitle(
        f"{100 * sparsity:g} % of weights removed in all (dotted: kept on average)", x=0.01, ha="left", fontsize=10
    )
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# --- 04 hybrids -----------------------------------------------------------------------------------------------------


def hybrid_maps(plans: Mapping[str, Mapping[str, str]], kept: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Which layers each hybrid guides (colour) and how much of each layer it keeps (filled height)."""
    layers = list(next(iter(plans.values())))
    figure, axis = plt.subplots(figsize=(max(6, 0.5 * len(layers) + 1.5), 0.62 * len(plans) + 1.2))
    for row, (hybrid, plan) in enumerate(plans.items()):
        for column, layer in enumerate(layers):
            color = ROLE_COLORS[plan[layer]]
            axis.add_patch(Rectangle((column, -row), 0.86, 0.8, facecolor=color, alpha=0.28, lw=0))
            axis.add_patch(Rectangle((column, -row), 0.86, 0.8 * kept[hybrid][layer], facecolor=color, lw=0))
    axis.set(xlim=(-0.1, len(layers)), ylim=(-len(plans) + 0.9, 0.95))
    axis.set_yticks([0.4 - row for row in range(len(plans))], list(plans))
    axis.set_xticks([column + 0.43 for column in range(len(layers))], short_names(layers))
    axis.tick_params(length=0)
    sns.despine(ax=axis, left=True, bottom=True)
    axis.set_xlabel("weighted layer, in execution order")
    axis.set_title(title)
    said = {"direct": "pruned directly", "guided": "guided by the ghost", "mixed": "magnitude times connectivity"}
    roles = {role for plan in plans.values() for role in plan.values()}
    meaning = {said[role]: color for role, color in ROLE_COLORS.items() if role in roles}
    meaning["filled height: share kept"] = "0.8"
    handles = [Patch(color=color, label=label) for label, color in meaning.items()]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.22 - 0.1 / len(plans)), ncols=3, fontsize=8)
    return figure


def accuracy_points(rows: pd.DataFrame, value: str, label: str, dense: float | None = None) -> Figure:
    """Accuracy of every method at every sparsity: mean and 95 % interval over seeds, one panel a pruner."""
    rows = with_methods(rows[rows.pruner != "none"])
    names = [n for n in rows.method.cat.categories if n != "dense"]
    pruners, sparsities = list(dict.fromkeys(rows.pruner)), sorted(set(rows.sparsity))
    figure, axes = panels(len(pruners), 3, (3.5, 3.1), sharey=True)
    for axis, pruner in zip(axes, pruners, strict=True):
        for number, name in enumerate(names):
            for column, sparsity in enumerate(sparsities):
                chosen = (rows.pruner == pruner) & (rows.method == name) & (rows.sparsity == sparsity)
                seeds = rows[chosen].groupby("seed")[value].mean().to_numpy()
                if len(seeds):
                    _point(axis, column + 0.09 * (number - (len(names) - 1) / 2), 100 * seeds, name, column == 0)
        if dense is not None:
            axis.axhline(100 * dense, color="black", lw=0.8, ls="--")
            axis.annotate(
                "dense", (1, 100 * dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        categories(axis, [f"{100 * s:g} %" for s in sparsities])
        axis.set(title=PRUNERS[pruner], xlabel="sparsity")
    axes[0].set_ylabel(f"{label}, %")
    _legend(axes[-1], _what(rows, "mean, 95 % interval\nover seeds"))
    return figure


def _what(rows: pd.DataFrame, many: str) -> str:
    """What markers and bars are, for the head of a legend."""
    return many if rows.seed.nunique() > 1 else "one seed"


def _legend(axis: Axes, note: str) -> None:
    """The legend of all panels to the right of the last one, headed by what points and bars are."""
    known: dict[str, Any] = {}
    for panel in axis.figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    axis.legend(
        known.values(),
        known.keys(),
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        title=note,
        title_fontsize=8,
        alignment="left",
    )


def _point(axis: Axes, x: float, values: np.ndarray, name: str, labelled: bool) -> None:
    interval = bootstrap(values)
    look = _look(name)
    low, high = max(interval.low, 0), min(interval.high, 100)
    if np.isfinite(low) and interval.n > 1:
        axis.plot([x, x], [low, high], color=look["color"], lw=1.2, alpha=0.6)
    axis.plot(x, interval.estimate, ls="", ms=6, label=name if labelled else None, **look)


def flops_bars(rows: pd.DataFrame, network: str) -> Figure:
    """Share of the dense multiply-accumulates left, by similarity metric and hybrid, direct pruning as the line."""
    rows = rows.assign(share=100 * rows.macs / rows.macs_dense)
    sparsities = sorted(set(rows.sparsity))
    names = [s for s in SIMILARITIES if s in set(rows.similarity) and s != "none"]
    hybrids = [h for h in COLORS if h in set(rows.hybrid) and h not in ("none", "direct")]
    figure, axes = panels(len(sparsities), 2, (max(4.2, 0.75 * len(names)), 3))
    for axis, sparsity in zip(axes, sparsities, strict=True):
        part = rows[rows.sparsity == sparsity]
        for number, hybrid in enumerate(hybrids):
            by = part[part.hybrid == hybrid].groupby("similarity").share
            x = np.arange(len(names)) + 0.2 * (number - (len(hybrids) - 1) / 2)
            low, high = by.mean() - by.min(), by.max() - by.mean()  # rounding can leave them just below 0
            error = [[max(0, low[s]) for s in names], [max(0, high[s]) for s in names]]
            axis.bar(x, [by.mean()[s] for s in names], 0.18, color=COLORS[hybrid], label=hybrid, yerr=error,
                     error_kw={"lw": 0.8}, hatch=("", "///", "...", "xxx")[number % 4], ec="white", lw=0.3)  # fmt: skip
        axis.axhline(part[part.hybrid == "direct"].share.mean(), color="black", ls="--", lw=1, label="direct")
        axis.set_xticks(range(len(names)), [SIMILARITIES[s] for s in names], rotation=30, ha="right")
        axis.set_title(
            f"{network}, {PRUNERS[part.pruner.iloc[0]]}, {100 * sparsity:g} % of weights removed", fontsize=9
        )
    axes[0].set_ylabel("MACs left, % of dense (theoretical)")
    _legend(axes[-1], _what(rows, "mean, range over seeds"))
    return figure


# --- 05 shifts ------------------------------------------------------------------------------------------------------


def shift_heat_map(shifts: pd.DataFrame, sparsity: float) -> Figure:
    """Difference to direct pruning in points by method and shift, a panel a pruner: mean over severities and seeds."""
    rows = with_methods(shifts[(shifts.sparsity == sparsity)])
    pruners = list(dict.fromkeys(rows[rows.method != "direct"].pruner))  # those that were run under guidance
    seen = list(dict.fromkeys(rows["shift"]))
    order = ["clean", *[s for s in FAMILIES if s in seen], *[s for s in seen if s not in FAMILIES and s != "clean"]]
    keys = ["pruner", "method"]
    means = 100 * rows.pivot_table(index=keys, columns="shift", values="accuracy", aggfunc="mean", observed=True)[order]
    gains = {pruner: (means.loc[pruner] - means.loc[(pruner, "direct")]).drop("direct") for pruner in pruners}
    limit = max(1.0, float(np.nanquantile(np.abs(pd.concat(gains.values())), 0.9)))
    height = sum(0.42 * len(gain) + 0.5 for gain in gains.values()) + 1.4
    figure, axes = plt.subplots(
        len(pruners), 1, figsize=(0.62 * len(order) + 1.8, height), sharex=True, squeeze=False,
        height_ratios=[len(gain) for gain in gains.values()], gridspec_kw={"hspace": 0.12},
    )  # fmt: skip
    for axis, (pruner, gain) in zip(axes.flat, gains.items(), strict=True):
        sns.heatmap(gain, ax=axis, cmap="vlag_r", center=0, vmin=-limit, vmax=limit, annot=True, fmt="+.1f",
                    annot_kws={"fontsize": 8}, cbar_kws={"label": "points"}, linewidths=0.4)  # fmt: skip
        axis.set(xlabel="", ylabel="")
        axis.tick_params(axis="y", rotation=0)
        direct = means.loc[(pruner, "direct"), "clean"]
        axis.set_title(
            f"{PRUNERS.get(pruner, pruner)}, {100 * sparsity:g} % removed: accuracy against direct pruning's, which is "
            f"{direct:.1f} % clean"
        )
    axes.flat[-1].set_xticklabels([s.replace("_", " ") for s in order], rotation=40, ha="right")
    return figure


def severity_curves(shifts: pd.DataFrame, sparsity: float, pruner: str) -> Figure:
    """Accuracy by severity, one panel a family of shifts; band: range over seeds."""
    rows = shifts[((shifts.sparsity == sparsity) & (shifts.pruner == pruner)) | (shifts.pruner == "none")]
    rows = with_methods(rows)
    families = [f for f in dict.fromkeys(FAMILIES.values()) if f in set(rows["shift"].map(FAMILIES))]
    figure, axes = panels(len(families), 4, (2.6, 2.6), sharey=True)
    for axis, family in zip(axes, families, strict=True):
        part = rows[(rows["shift"].map(FAMILIES) == family) | (rows.severity == 0)]
        for name in part.method.cat.categories:
            _by_severity(axis, name, part[part.method == name])
        axis.set(title=family, xlabel="severity (0: clean)")
        axis.set_xticks(sorted(set(part.severity)))
    axes[0].set_ylabel("accuracy, %")
    _legend(axes[-1], _what(rows, "mean, range over seeds"))
    figure.suptitle(f"{PRUNERS[pruner]}, {100 * sparsity:g} % of weights removed", x=0.01, ha="left", fontsize=11)
    return figure


def _by_severity(axis: Axes, name: str, rows: pd.DataFrame) -> None:
    """A line of the mean over seeds and shifts, a band of the range over seeds."""
    seeds = rows.groupby(["severity", "seed"]).accuracy.mean().unstack("seed")
    line = "--" if name == "dense" else ":" if " " in name else "-"
    look = _look(name)
    axis.plot(seeds.index, 100 * seeds.mean(axis=1), label=name, ms=4, lw=1.2, ls=line, **look)
    axis.fill_between(
        seeds.index, 100 * seeds.min(axis=1), 100 * seeds.max(axis=1), color=look["color"], alpha=0.12, lw=0
    )


def severity_line(shifts: pd.DataFrame, pruner: str, method: str, sparsity: float, shift: str) -> Figure:
    """Accuracy by severity of one method, of direct pruning and of the dense network; band: range over seeds.

    shift: of a corruption or natural shift, or ALL_CORRUPTIONS (their mean). A natural shift has severity 1 alone.
    """
    rows = with_methods(shifts)
    rows = rows[((rows.pruner == pruner) & (rows.sparsity == sparsity)) | (rows.pruner == "none")]
    asked = rows["shift"].isin(list(FAMILIES)) if shift == ALL_CORRUPTIONS else rows["shift"] == shift
    rows = rows[asked | (rows.severity == 0)]
    figure, axis = plt.subplots(figsize=(5.6, 3.2))
    for name in dict.fromkeys(["dense", "direct", method]):
        part = rows[rows.method == name]
        if len(part):
            _by_severity(axis, name, part)
    axis.set(xlabel="severity (0: clean)", ylabel="accuracy, %", ylim=(0, 100))
    axis.set_xticks(sorted(set(rows.severity)))
    axis.set_title(f"{PRUNERS[pruner]}, {100 * sparsity:g} % removed: {shift.replace('_', ' ')}", loc="left")
    axis.legend(fontsize=8, loc="lower left")
    return figure


def calibration(shifts: pd.DataFrame) -> Figure:
    """Expected calibration error, clean against shifted, mean over shifts, a point a method and seed.

    A panel a sparsity and pruner: a network at chance is sure of nothing, so its error is small and says little.
    """
    rows = with_methods(shifts)
    rows = rows.assign(where=np.where(rows.severity == 0, "clean", "shifted"))
    sparsities = [s for s in sorted(set(rows.sparsity)) if s > 0]
    pruners = [pruner for pruner in dict.fromkeys(rows.pruner) if pruner != "none"]
    cases = [(sparsity, pruner) for sparsity in sparsities for pruner in pruners]
    columns = len(sparsities) if len(pruners) == 1 else len(pruners)
    figure, axes = panels(len(cases), columns, (3.2, 2.8), sharex="row", sharey="row")
    for axis, (sparsity, pruner) in zip(axes, cases, strict=True):
        part = rows[(rows.sparsity == sparsity) & (rows.pruner == pruner) | (rows.pruner == "none")]
        by = part.groupby(["method", "seed", "where"], observed=True).ece.mean().unstack("where").reset_index()
        for name in by.method.cat.categories:
            mine = by[by.method == name]
            axis.plot(100 * mine.clean, 100 * mine.shifted, ls="", ms=6, label=name, **_look(name))
        title = f"{PRUNERS.get(pruner, pruner)}, {100 * sparsity:g} % removed"
        axis.set(title=title, xlabel="calibration error, clean, %")
        axis.set_ylabel("shifted, %")
    _legend(axes[columns - 1], "a point a seed")
    return figure


REMOVED = ("dense", "FTWT", "peer of FTWT", "structured")  # systems that do run fewer operations, or all
NEAR = 15  # points of accuracy below dense that still interest most


def pareto(rows: pd.DataFrame, title: str) -> Figure:
    """Accuracy under corruption against the multiply-accumulates left: one marker a setting, bars are 95 % intervals.

    rows: of comparison.csv, through `comparison.settings`. Left all settings, right those near the dense network.
    Hollow markers: masks, whose operations are saved in theory only.
    """
    rows = rows[rows.shift_family == "corrupted"]
    systems = list(dict.fromkeys(rows.system))
    colors = dict(zip(systems, sns.color_palette("colorblind", len(systems)), strict=True))
    markers = dict(zip(systems, itertools.cycle("*osD^vPX<>ph"), strict=False))
    fill = {system: colors[system] if system in REMOVED else "white" for system in systems}
    points = [
        (system, part.macs.mean(), bootstrap(part.groupby("seed").accuracy.mean().to_numpy()))
        for (system, _), part in rows.groupby(["system", "setting"], sort=False)
    ]
    best = pd.DataFrame([(100 * macs, 100 * found.estimate) for _, macs, found in points], columns=["macs", "accuracy"])
    best = best.sort_values("macs")
    front = best[best.accuracy >= best.accuracy.cummax()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis in axes:
        for system, macs, found in points:
            y, low, high = found.estimate, found.low, found.high
            low, high = (max(low, 0), min(high, 1)) if found.n > 1 else (y, y)
            axis.errorbar(
                100 * macs, 100 * y, yerr=[[100 * (y - low)], [100 * (high - y)]],
                fmt=markers[system], color=colors[system], mfc=fill[system], ms=10 if system == "dense" else 5.5, lw=1,
                zorder=4 if system == "direct" else 3,
            )  # fmt: skip
        axis.step(front.macs, front.accuracy, where="post", color="0.6", lw=1, zorder=0)
        axis.set_xlabel("MACs left, % of the dense network")
    top, dense = best.accuracy.max(), 100 * rows[rows.system == "dense"].accuracy.mean()
    axes[1].set_ylim(dense - NEAR, top + 2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes[0].set(title="every setting", ylabel="accuracy under corruption, %")
    axes[1].set_title(f"within {NEAR} points of dense")
    look = {s: {"color": colors[s], "marker": markers[s], "mfc": fill[s], "label": s} for s in systems}
    handles = [plt.Line2D([], [], lw=0, **look[s]) for s in systems]
    handles.append(plt.Line2D([], [], color="0.6", lw=1, label="best at these MACs or fewer"))
    axes[1].legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title_fontsize=8,
                   alignment="left", title=f"mean, 95 % interval over\n{rows.seed.nunique()} seeds; hollow: masks,\n"
                   "MACs saved in theory only")  # fmt: skip
    return figure


def ablations(table: pd.DataFrame) -> Figure:
    """What flipping each choice does to accuracy, clean and under shift, in points with intervals."""
    look = {"clean": ("#0072B2", "o", 0.15), "shifted": ("#D55E00", "s", -0.15)}
    names = list(dict.fromkeys(zip(table.choice, table.setting, strict=True)))[::-1]
    figure, axis = plt.subplots(figsize=(7, 0.36 * len(names) + 1.4))
    limit = 100 * float(table.estimate.abs().max()) * 1.6 + 1
    for measure, part in table.groupby("measure", sort=False):
        color, marker, offset = look[measure]
        height = [names.index(pair) + offset for pair in zip(part.choice, part.setting, strict=True)]
        axis.hlines(height, (100 * part.ci_low).clip(-limit), (100 * part.ci_high).clip(upper=limit), color=color, lw=2)
        axis.plot(100 * part.estimate, height, marker, color=color, ms=6, label=measure)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlim(max(-limit, 100 * table.ci_low.min() - 2), min(limit, 100 * table.ci_high.max() + 2))
    axis.set_yticks(range(len(names)), [f"{choice}: {setting}" for choice, setting in names], fontsize=8)
    axis.set_xlabel(
        f"accuracy against the default, points (95 % interval over {table.n.max()} seeds, cut at the frame)"
    )
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title("What each choice of the reconstruction changes")
    return figure


VERDICTS = {"supported": "#009E73", "contradicted": "#D55E00", "inconclusive": "#7F7F7F"}
PRUNER_MARKERS = ("o", "s", "^", "D", "v", "P")
# What a comparison is measured in: the beginning of its measure, a factor, the axis; else points of accuracy.
UNITS = (
    ("rank correlation", 1, "rank correlation"),
    ("share of dense MACs", 100, "points of the dense network's multiply-accumulates"),
    ("MACs saved", 100, "points of multiply-accumulates"),
    ("sparsity at", 100, "points of sparsity"),
    ("", 100, "points of accuracy"),
)


def forest(claims: pd.DataFrame) -> Figure:
    """Every comparison as an interval, a panel a unit: colour by verdict, marker by pruner, hollow where inconclusive.

    The grey tick of a row is what the claim needs the difference to exceed.
    """
    unit = [next(n for n, (begins, _, _) in enumerate(UNITS) if m.startswith(begins)) for m in claims.measure]
    claims = claims.assign(unit=unit, pruner=claims.pruner.fillna(""))
    pruners = [pruner for pruner in dict.fromkeys(claims.pruner) if pruner]
    markers = {"": "o", **dict(zip(pruners, PRUNER_MARKERS, strict=False))}
    parts = []
    for number in sorted(set(unit), reverse=True):
        rows = claims[claims.unit == number]
        keys = list(dict.fromkeys(zip(rows.claim, rows.measure, rows.sparsity, strict=True)))[::-1]
        parts.append((rows, keys, *UNITS[number][1:]))
    heights = [len(keys) * (1 if rows.pruner.nunique() < 2 else 1.6) + 1 for rows, keys, _, _ in parts]
    size = (7.5, 0.27 * sum(heights) + 0.7 * len(parts) + 0.4)
    figure, axes = plt.subplots(len(parts), 1, figsize=size, squeeze=False, height_ratios=heights)
    for axis, (rows, keys, scale, label) in zip(axes.flat, parts, strict=True):
        limit = scale * float(rows.estimate.abs().max()) * 1.4 + scale / 100
        here = list(dict.fromkeys(rows.pruner))
        for row in rows.itertuples():
            offset = 0.25 * ((len(here) - 1) / 2 - here.index(row.pruner))
            height = keys.index((row.claim, row.measure, row.sparsity)) + offset
            word = row.verdict.split(" ")[0]
            color = VERDICTS[word]
            if row.n > 1:
                low, high = np.clip([scale * row.ci_low, scale * row.ci_high], -limit, limit)
                axis.plot([low, high], [height, height], color=color, lw=1.6)
            if row.threshold:
                axis.plot([scale * row.threshold] * 2, [height - 0.12, height + 0.12], color="0.35", lw=1)
            face = "white" if word == "inconclusive" else color
            axis.plot(scale * row.estimate, height, markers[row.pruner], color=color, mfc=face, ms=5.5)
        axis.axvline(0, color="black", lw=0.8)
        seeds = sorted(set(rows.n))
        over = f"95 % interval over {' or '.join(map(str, seeds))} seeds" if seeds[-1] > 1 else "one seed: no interval"
        axis.set(xlim=(-limit, limit), ylim=(-0.7, len(keys) - 0.3), xlabel=f"{label} ({over})")
        short = [(claim, measure.split(": ")[-1], sparsity) for claim, measure, sparsity in keys]
        unique = len(set(short)) == len(short)
        texts = [
            f"{claim}: {name if unique else measure.replace(', difference', '')}"
            + (f"  ({sparsity:.0%})" if sparsity else "")
            for (claim, measure, sparsity), (_, name, _) in zip(keys, short, strict=True)
        ]
        axis.set_yticks(range(len(keys)), texts, fontsize=8)
    found = set(claims.verdict.str.split(" ").str[0])
    handles = [
        Line2D([], [], color=color, marker="o", mfc="white" if word == "inconclusive" else color, lw=1.6, label=word)
        for word, color in VERDICTS.items()
        if word in found
    ]
    handles += [Line2D([], [], color="0.35", lw=0, marker=markers[p], label=PRUNERS.get(p, p)) for p in pruners]
    if claims.threshold.any():
        handles.append(Line2D([], [], color="0.35", lw=0, marker="|", ms=8, label="what the claim needs"))
    axes[0, 0].legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[0, 0].set_title("The claims, comparison by comparison\n(colour: verdict, corrected for their number)")
    return figure
