"""The figures of notebook 10: what is left of each layer, accuracy against cost, measured latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gcnet.evaluation import bootstrap
from gcnet.figures import COLORS, DIRECT_COLOR, GUIDED_COLOR, MARKERS
from gcnet.structured_cells import PEERS

_LOOK = {"snacs": ("#8C510A", "v"), "tp_magnitude": ("#009E73", "P"), "tp_taylor": ("#CC79A7", "X"),
         "tp_random": ("#999999", "d")}  # fmt: skip
_NAMES = {"none": "dense", "direct": "direct, |weight|", "snacs": "SNACS blocks", **PEERS}


def method_name(method: str) -> str:
    """How a method is called in a legend."""
    return _NAMES.get(method, f"ghost {method}")


def _look(method: str) -> dict[str, Any]:
    color, marker = _LOOK.get(method, (COLORS.get(method, "#F0E442"), MARKERS.get(method, "D")))
    return {"color": color, "marker": marker}


def widths(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Filters of every layer before (grey) and after (coloured by who scored them)."""
    figure, axis = plt.subplots(figsize=(max(5.0, 0.32 * len(rows) + 1.5), 3.0))
    place = np.arange(len(rows))
    axis.bar(place, [row["filters"] for row in rows], color="#DDDDDD", label="dense")
    for role, color in (("direct", DIRECT_COLOR), ("guided", GUIDED_COLOR)):
        kept = [row["kept"] if row["role"] == role else 0 for row in rows]
        if any(kept):
            axis.bar(
                place,
                kept,
                color=color,
                width=0.55,
                label=f"kept, scored {'by the ghost' if role == 'guided' else 'directly'}",
            )
    axis.set(xlabel="layer, in order of execution", ylabel="filters", title=title)
    axis.set_xticks(place[:: max(1, len(rows) // 20)], [str(k + 1) for k in place[:: max(1, len(rows) // 20)]])
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def accuracy_by_macs(table: pd.DataFrame) -> Figure:
    """Clean accuracy and accuracy under shift by the share of MACs left; one dot a seed, mean and 95 % interval."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4))
    methods = [m for m in dict.fromkeys(table.method) if m != "none"]
    shares = sorted(table[table.method != "none"].macs_share.unique())
    gap = 0.8 / len(methods)
    for axis, value, title in ((axes[0], "accuracy", "clean"), (axes[1], "shifted", "under shift")):
        axis.axhline(100 * table[table.method == "none"][value].mean(), color="black", lw=1, ls=":", label="dense")
        for number, method in enumerate(methods):
            look = _look(method)
            for place, share in enumerate(shares):
                values = 100 * table[(table.method == method) & (table.macs_share == share)][value].to_numpy()
                if not len(values):
                    continue
                x = place + (number - (len(methods) - 1) / 2) * gap
                found = bootstrap(values)
                if found.n > 1:
                    axis.plot([x, x], [max(found.low, 0), min(found.high, 100)], color=look["color"], lw=1.2, alpha=0.6)
                axis.plot(x, found.estimate, ls="", ms=7, label="" if place else method_name(method), **look)
                axis.scatter([x] * len(values), values, s=8, color=look["color"], alpha=0.6)
        axis.set(title=title, xlabel="MACs left, % of the dense network", xlim=(-0.5, len(shares) - 0.5))
        axis.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
        for edge in range(1, len(shares)):
            axis.axvline(edge - 0.5, color="0.85", lw=0.8)
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="mean, 95 % interval,\ndots: seeds",
                   title_fontsize=8, alignment="left")  # fmt: skip
    figure.suptitle("Accuracy of smaller networks, filters removed", x=0.01, ha="left", fontsize=11)
    return figure


def latency_ratios(rows: pd.DataFrame) -> Figure:
    """Measured latency over the dense network's against the MAC ratio: on the diagonal, MACs saved are time saved."""
    sizes = list(dict.fromkeys(rows.batch_size))
    figure, axes = plt.subplots(1, len(sizes), figsize=(3.4 * len(sizes) + 1.5, 3.3), squeeze=False, sharey=True)
    smaller = rows[rows.network != "dense"]
    low = 0.9 * min(smaller.macs_ratio.min(), smaller.ratio.min())
    high = 1.05 * max(1.0, smaller.ratio.max())
    for axis, size in zip(axes[0], sizes, strict=True):
        axis.plot([low, 1], [low, 1], color="black", lw=0.8, ls=":")
        axis.axhline(1, color="#BBBBBB", lw=0.8)
        for variant, marker, color in zip(
            dict.fromkeys(smaller.variant), "osD^", ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=False
        ):
            part = smaller[(smaller.batch_size == size) & (smaller.variant == variant)]
            axis.plot(part.macs_ratio, part.ratio, marker, color=color, ms=6, label=variant.replace("_", " "))
        axis.set(title=f"batch of {size}", xlabel="MACs, share of dense", xlim=(low, 1.05), ylim=(low, high))
    axes[0][0].set_ylabel("latency, share of dense")
    figure.suptitle("Measured latency of smaller networks against their MACs", x=0.01, ha="left", fontsize=11)
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
