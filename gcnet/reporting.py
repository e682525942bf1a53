"""Figures and tables as files (SVG and PNG; CSV, Markdown and LaTeX), each with what it was made from; the claims."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from torch import Tensor, nn

from gcnet import paths
from gcnet.cells import cell_result, cells, connectivity_images, normalized_batches, shift_rows, splits
from gcnet.connectivity import connectivity
from gcnet.evaluation import bootstrap, each_shift_once, mean_corruption_error
from gcnet.graph import LayerGraph
from gcnet.store import atomic_write, provenance, used_code, write_json
from gcnet.study import Study

_STARTED = time.perf_counter()

# --- files with their provenance ------------------------------------------------------------------------------------


def _made_from(study: Study, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "study": study.model_dump(mode="json"),
        "seeds": list(study.seeds),
        "data_sha256": splits(study).train.sha256,
        "results_computed_by": used_code(),
        "wall_s": round(time.perf_counter() - _STARTED, 1),
        **provenance(),
        **(extra or {}),
    }


def subject(study: Study, name: str, seeds: Sequence[int] | None = None) -> str:
    """The line below a figure: network, images, seeds, study. Notebook 07 trains a network of its own.

    seeds: those that are drawn, None for all of the study's.
    """
    network, width = study.network, study.width
    if name.startswith("fig07"):
        network, width = study.cka_network, study.cka_width
    drawn = study.seeds if seeds is None else seeds
    count = f"{len(drawn)} seeds" if len(drawn) > 1 else f"seed {drawn[0]}" if len(study.seeds) > 1 else "1 seed"
    return f"{network} at {width:g} of its width, {study.dataset}, {count} (study {study.study})"


def save_figure(
    figure: Figure,
    study: Study,
    name: str,
    alt: str = "",
    *,
    seeds: Sequence[int] | None = None,
    about: str | None = None,
) -> Path:
    """Write results/<study>/figures/<name>.svg, .png and .json (provenance; `alt` describes the picture in words).

    An alt without numbers is followed by what is drawn (`drawn_in_words`). seeds: those that the figure shows, None for
    all. about: what the line below the figure says instead, where it shows neither the study's network nor its images.
    """
    folder = paths.results(study.study) / "figures"
    line = f"{about} (study {study.study})" if about else subject(study, name, seeds)
    if not re.search(r"\d", alt):
        alt = f"{alt.rstrip('.')}. {drawn_in_words(figure)}".strip()
    figure.text(0.01, -0.01, line, ha="left", va="top", fontsize=7, color="#595959")
    for suffix in ("svg", "png"):
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        with atomic_write(folder / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata)
    write_json(folder / f"{name}.json", _made_from(study, {"alt": alt}))
    return folder / f"{name}.svg"


def save_table(frame: pd.DataFrame, study: Study, name: str, rendered: pd.DataFrame | None = None) -> Path:
    """Write results/<study>/tables/<name>.csv (one row a fact), .md and .tex (`rendered`, default the same), .json."""
    folder = paths.results(study.study) / "tables"
    shown = frame if rendered is None else rendered
    with atomic_write(folder / f"{name}.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.10g", lineterminator="\n")
    with atomic_write(folder / f"{name}.md") as temporary:
        temporary.write_text(to_markdown(shown), encoding="utf-8")
    with atomic_write(folder / f"{name}.tex") as temporary:
        temporary.write_text(to_latex(shown), encoding="utf-8")
    write_json(folder / f"{name}.json", _made_from(study, None))
    return folder / f"{name}.csv"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Index levels as columns, column levels joined: what a text table can show."""
    flat = frame.reset_index() if frame.index.names != [None] else frame
    if isinstance(flat.columns, pd.MultiIndex):
        flat.columns = [" ".join(_text(part) for part in column if part != "").strip() for column in flat.columns]
    return flat


def in_words(frame: pd.DataFrame) -> str:
    """A rendered table as text for those who do not see its figure: 'l1 0.8: direct 72.4 ± 0.4, BH 65.8 ± 0.2; ...'."""
    lines = []
    for key, row in frame.iterrows():
        name = " ".join(_text(part) for part in key) if isinstance(key, tuple) else _text(key)
        values = (f"{column} {_text(value).replace('**', '')}" for column, value in row.items() if _text(value))
        lines.append(f"{name}: {', '.join(values)}")
    return "; ".join(lines)


def drawn_in_words(figure: Figure, most: int = 900) -> str:
    """The panels of a figure as text: titles, axes, and from where to where each labelled series runs."""
    panels = []
    for axis in (a for a in figure.axes if a.get_visible() and a.get_label() != "<colorbar>"):
        head = axis.get_title(loc="left") or axis.get_title() or axis.get_ylabel()
        axes = " against ".join(label for label in (axis.get_ylabel(), axis.get_xlabel()) if label)
        series = map(_range_in_words, [*axis.lines, *axis.containers, *axis.images, *axis.collections])
        values = ", ".join(dict.fromkeys(filter(None, series)))
        text = ": ".join(" ".join(part.split()) for part in (head, axes, values) if part)
        if text and text not in panels:
            panels.append(text)
    words = "; ".join(panels)
    return words if len(words) <= most else words[:most].rsplit(" ", 1)[0] + " ..."


def _range_in_words(artist: Any) -> str:
    """'SNACS 54.2 to 81' of a labelled line, bars or points, 'values 0 to 1' of a map; '' of anything else."""
    label = str(artist.get_label())
    if isinstance(artist, (AxesImage, QuadMesh)):
        values, label = np.asarray(artist.get_array()), "values"
    elif isinstance(artist, BarContainer):
        values = np.array([patch.get_height() for patch in artist.patches])
    elif isinstance(artist, ErrorbarContainer):
        values = np.asarray(artist.lines[0].get_ydata(), dtype=float)
    elif isinstance(artist, PathCollection):
        values = np.asarray(artist.get_offsets(), dtype=float).reshape(-1, 2)[:, 1]
    elif isinstance(artist, Line2D) and len(artist.get_xdata()) > 1:
        values = np.asarray(artist.get_ydata(), dtype=float)
    else:
        return ""
    values = values[np.isfinite(values)]
    if label.startswith("_") or not values.size:
        return ""
    low, high = _text(float(values.min())), _text(float(values.max()))
    return f"{label} {low}" if low == high else f"{label} {low} to {high}"


def claims_in_words(judged: pd.DataFrame) -> str:
    """Rows of claims.csv as text: 'gcnet-1, accuracy under shift, difference: B25 - direct, 80%: -0.035, supported'."""
    return "; ".join(
        f"{row.claim}, {row.measure}{f', {row.pruner}' if row.pruner else ''}"
        f"{f', {row.sparsity:.0%}' if row.sparsity else ''}: {row.estimate:+.3f}, "
        f"{row.verdict.split(' ')[0]}"
        for row in judged.itertuples()
    )


def to_markdown(frame: pd.DataFrame) -> str:
    """A GitHub table; numbers to four digits."""
    flat = _flat(frame)
    rows = [[_text(value).replace("|", "\\|") for value in row] for row in flat.itertuples(index=False)]
    head = [str(column).replace("|", "\\|") for column in flat.columns]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$"}


def to_latex(frame: pd.DataFrame) -> str:
    """A booktabs tabular; `**x**` becomes bold."""

    def cell(value: Any) -> str:
        text = _text(value)
        for plain, escaped in _LATEX.items():
            text = text.replace(plain, escaped)
        if text.startswith("**") and text.endswith("**") and len(text) > 4:
            text = rf"\textbf{{{text[2:-2]}}}"
        return text

    flat = _flat(frame)
    columns = "".join("r" if pd.api.types.is_numeric_dtype(flat[c]) else "l" for c in flat.columns)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(cell(c) for c in flat.columns) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(v) for v in row) + r" \\" for row in flat.itertuples(index=False)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def mean_and_spread(
    frame: pd.DataFrame, rows: Sequence[str], columns: str, value: str, *, bold: bool = True, interval: bool = False
) -> pd.DataFrame:
    """Percent, mean ± standard deviation over seeds, `rows` down and `columns` across.

    frame: averaged over everything that is neither a row, a column nor `seed`. interval: mean and 95 % interval over
    seeds instead ("85.6 [85.1, 86.0]", within 0 and 100). The best of a row is bold (unless bold=False) only where 0
    lies outside the 95 % interval of its paired difference to the second best.
    """
    order = list(dict.fromkeys(frame[columns]))
    if isinstance(frame[columns].dtype, pd.CategoricalDtype):
        order = [c for c in frame[columns].cat.categories if c in set(frame[columns])]
    seeds = frame.groupby([*rows, columns, "seed"], sort=False, observed=True)[value].mean().unstack("seed")
    lines = {}
    for key, part in seeds.groupby(list(rows), sort=False, observed=True):
        part = part.droplevel(list(range(len(rows)))).reindex(order)
        text = {c: _mean(part.loc[c].dropna().to_numpy(), interval) for c in order}
        ranked = part.mean(axis=1).sort_values(ascending=False).index
        if bold and len(ranked) > 1 and part.shape[1] > 1:
            gap = (part.loc[ranked[0]] - part.loc[ranked[1]]).dropna().to_numpy()
            if len(gap) > 1 and bootstrap(gap).low > 0:
                text[ranked[0]] = f"**{text[ranked[0]]}**"
        lines[key] = text
    table = pd.DataFrame.from_dict(lines, orient="index", columns=order)
    table.index = pd.MultiIndex.from_tuples([k if isinstance(k, tuple) else (k,) for k in lines], names=list(rows))
    return table.fillna("")


def _mean(values: np.ndarray, interval: bool) -> str:
    if not len(values):
        return ""
    mean = f"{100 * values.mean():.1f}"
    if len(values) < 2:
        return mean
    if not interval:
        return f"{mean} ± {100 * values.std(ddof=1):.1f}"
    found = bootstrap(values)
    return f"{mean} [{100 * max(found.low, 0):.1f}, {100 * min(found.high, 1):.1f}]"


# --- the study's tables ---------------------------------------------------------------------------------------------

CELL = ["pruner", "hybrid", "similarity", "sparsity", "seed"]


def accuracy_table(study: Study) -> pd.DataFrame:
    """accuracy.csv: one row a cell, the dense network included."""
    rows = []
    for cell in cells(study):
        result = cell_result(study, cell)
        rows.append(
            {
                **{name: result[name] for name in CELL},
                **{
                    n: result[n] for n in ("kept_weights", "macs", "accuracy_before", "accuracy", "ece", "accuracy_val")
                },
                "collapsed_layers": len(result["collapsed_layers"]),
                "passes_signal": result["passes_signal"],
            }
        )
    return pd.DataFrame(rows)


def layer_table(study: Study) -> pd.DataFrame:
    """Sparsity per layer and cell: pruner, hybrid, similarity, sparsity, seed, layer, weights, kept."""
    rows = []
    for cell in cells(study):
        for layer in cell_result(study, cell)["layers"]:
            rows.append({**cell.row(), **{k: layer[k] for k in ("layer", "weights", "kept")}})
    return pd.DataFrame(rows)


def shift_table(study: Study) -> pd.DataFrame:
    """shift_accuracy.csv: one row a cell, shift and severity (0 = the clean test set)."""
    rows = [
        {
            **cell.row(),
            "shift": row["shift"],
            "severity": row["severity"],
            "accuracy": row["accuracy"],
            "ece": row["ece"],
        }
        for cell in cells(study)
        for row in shift_rows(study, cell)
    ]
    return pd.DataFrame(rows)


def fewest_operations(flops: pd.DataFrame) -> pd.DataFrame:
    """sparsity, hybrid, similarity, share, less, beyond_chance: the metric that leaves the fewest operations.

    flops: rows of `cells.flops_rows`. share: of the dense network's; less: how much less than by the second metric, a
    share too, paired by seed; beyond_chance: 0 lies outside its 95 % interval. Metrics that leave the
    same, to a hundredth of a point, are one.
    """
    rows = flops[flops.similarity != "none"].assign(share=flops.macs / flops.macs_dense)
    found = []
    for (sparsity, hybrid), part in rows.groupby(["sparsity", "hybrid"], sort=False):
        seeds = part.pivot(index="similarity", columns="seed", values="share")
        ranked = seeds.loc[seeds.mean(axis=1).sort_values(kind="stable").index]
        best, *others = ranked.index
        same = [name for name in others if np.allclose(ranked.loc[name], ranked.loc[best], rtol=0, atol=1e-4)]
        others = [name for name in others if name not in same]
        less = (ranked.loc[others[0]] - ranked.loc[best]).to_numpy() if others else np.zeros(1)
        found.append(
            {
                "sparsity": sparsity,
                "hybrid": hybrid,
                "similarity": ", ".join([best, *same]),
                "share": ranked.loc[best].mean(),
                "less": less.mean(),
                "beyond_chance": len(less) > 1 and bool(bootstrap(less).low > 0),
            }
        )
    return pd.DataFrame(found)


def shift_summary(shifts: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: clean and mean shifted accuracy (each shift once), corruption error relative to the dense network
    of its seed, calibration error clean and shifted."""
    dense = dict(iter(shifts[shifts.pruner == "none"].groupby("seed")))
    rows = []
    for key, part in shifts.groupby(CELL, sort=False):
        clean, shifted = part[part.severity == 0], each_shift_once(part)
        rows.append(
            {
                **dict(zip(CELL, key, strict=True)),
                "clean": clean.accuracy.mean(),
                "shifted": shifted.accuracy.mean(),
                "mce": mean_corruption_error(part, dense[key[-1]]),
                "ece_clean": clean.ece.mean(),
                "ece_shifted": shifted.ece.mean(),
            }
        )
    return pd.DataFrame(rows)


def connectivity_row(layer: str, graph: LayerGraph, similarity: str, tap: str, matrix: Tensor) -> dict[str, Any]:
    """A row of connectivity.csv: how strong a layer's connectivity is, over the entries of its matrix."""
    low, high = torch.quantile(_thinned(matrix), torch.tensor([0.05, 0.95], device=matrix.device)).tolist()
    return {
        "layer": layer,
        "parent": " + ".join(graph.parents[layer]),
        "similarity": similarity,
        "tap": tap,
        "mean_abs": matrix.abs().mean().item(),
        "std": matrix.std().item(),
        "p05": low,
        "p95": high,
    }


def _thinned(matrix: Tensor, most: int = 2**20) -> Tensor:
    """Evenly spaced entries: torch.quantile takes at most 16 million."""
    flat = matrix.flatten()
    return flat[:: -(-len(flat) // most)]


def parent_matrices(study: Study, net: nn.Sequential, graph: LayerGraph, child: str) -> dict[str, Tensor]:
    """The Pearson matrix of each parent of a layer: the terms of the sum that its ghost loads (GC-Net, Fig. 2)."""
    parts = {}
    for parent in graph.parents[child]:
        sources = tuple(s for s in graph.sources[child] if s.parent == parent)
        alone = replace(graph, layers=(child,), parents={child: (parent,)}, sources={child: sources})
        batches = normalized_batches(net, connectivity_images(study))
        how = study.only("tap", "classwise", "absolute")
        parts[parent] = connectivity(net[1], batches, graph=alone, **how)[child]
    return parts
