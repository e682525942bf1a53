"""All systems of a study side by side: accuracy by family of shifts, at what sparsity, operations and time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gcnet import cells, cka_cells, cost, ftwt_cells, snacs_cells, structured_cells
from gcnet.figures import REMOVED
from gcnet.figures import method as method_name
from gcnet.reporting import mean_and_spread
from gcnet.shifts import FAMILIES
from gcnet.store import Store, read_json
from gcnet.study import Study

COLUMNS = ("method", "sparsity", "macs", "seed", "shift_family", "accuracy", "seconds", "ece", "system", "network")
PRUNER_NAMES = {"l1": "L1", "l1_layer": "L1 by layer", "lamp": "LAMP", "os_synflow": "OS-SynFlow", "synflow": "SynFlow",
                "random": "random"}  # fmt: skip
SNACS_NAMES = {"snacs": "SNACS", "mint": "MINT", "l1_block": "L1 blocks", "l1_filter": "L1 filters",
               "gcnet": "OS-SynFlow B25"}  # fmt: skip
FTWT_NAMES = {"decoupled": "FTWT decoupled", "joint": "FTWT joint", "l1_filter": "L1 filters, FTWT's MACs"}
# The plain setting of each system and its peers: what fits on one page.
PLAIN = ("dense", "L1 direct", "L1 B25", "L1 by layer direct", "L1 by layer B25", "OS-SynFlow direct",
         "OS-SynFlow B25", "SNACS", "MINT", "L1 blocks", "FTWT decoupled", "L1 filters, FTWT", "RST",
         "filters: direct", "filters: B25", "filters: torch-pruning magnitude")  # fmt: skip
# Shares of the dense network's multiply-accumulates, in whole percent, that count as one budget: above the first, up to
# the second (choice).
BUDGETS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))


def _families(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float, float | None]]:
    """(clean | corrupted | natural, mean accuracy, mean calibration error or None) of a network's shift rows."""
    frame = pd.DataFrame(rows)
    kind = np.where(frame.severity == 0, "clean", np.where(frame["shift"].isin(set(FAMILIES)), "corrupted", "natural"))
    for family, part in frame.groupby(kind, sort=False):
        yield family, float(part.accuracy.mean()), float(part.ece.mean()) if "ece" in part else None


def _seconds(folder: Path, *measured: tuple[str, dict[str, Any]]) -> float:
    """Seconds that an entry took, and what was measured on the dense network before (0 where that is in the entry)."""
    before = (Store().find(kind, inputs, ["layers.json"]) for kind, inputs in measured)
    return sum(float(read_json(path / "entry.json")["wall_s"]) for path in (folder, *filter(None, before)))


@dataclass(frozen=True)
class _Network:
    """One network of the comparison. macs: the share left, or that share by family where it depends on the images."""

    system: str
    method: str
    seed: int
    sparsity: float
    seconds: float
    macs: float | dict[str, float]
    shifts: list[dict[str, Any]]
    network: str | None = None  # where it is not the study's own


def _dense(study: Study) -> Iterator[_Network]:
    for seed in study.seeds:
        shifts = cells.shift_rows(study, cells.dense_cell(seed))
        yield _Network("dense", "dense", seed, 0.0, _seconds(cells.dense_folder(study, seed)), 1.0, shifts)


def _correlating(study: Study, seed: int, similarity: str = "pearson") -> tuple[str, dict[str, Any]]:
    return "connectivity", cells.connectivity_inputs(study, seed, similarity)


def _masks(study: Study) -> Iterator[_Network]:
    whole = _dense_macs(study)
    for cell in (c for c in cells.cells(study) if not c.is_dense):
        direct = cell.hybrid == "direct"
        measured = [] if direct else [_correlating(study, cell.seed, cell.similarity)]
        yield _Network(
            "direct" if direct else "GC-Net",
            f"{PRUNER_NAMES[cell.pruner]} {method_name(cell.hybrid, cell.similarity)}",
            cell.seed,
            cell.sparsity,
            _seconds(cells.cell_folder(study, cell, ["cell.json"]), *measured),
            cells.cell_result(study, cell)["macs"] / whole,
            cells.shift_rows(study, cell),
        )


def _blocks(study: Study) -> Iterator[_Network]:
    whole = _dense_macs(study)
    for cell in (c for c in snacs_cells.snacs_cells(study) if c.method != "none"):
        result = snacs_cells.cell_result(study, cell)
        measured = {
            "snacs": [("snacs_scores", snacs_cells.scores_inputs(study, cell.seed))],
            "mint": [("snacs_mint", snacs_cells.mint_inputs(study, cell.seed))],
            "gcnet": [_correlating(study, cell.seed)],
        }
        yield _Network(
            {"snacs": "SNACS", "gcnet": "GC-Net"}.get(cell.method, "peer of SNACS"),
            f"{SNACS_NAMES[cell.method]} (δ {cell.delta:g})",
            cell.seed,
            result["sparsity"],
            _seconds(snacs_cells.cell_folder(study, cell, ["cell.json"]), *measured.get(cell.method, [])),
            result["macs"] / whole,
            snacs_cells.shift_rows(study, cell),
        )


def _sparse_training(study: Study) -> Iterator[_Network]:
    mine = cka_cells.own(study)
    whole = _dense_macs(mine)
    for run in (r for r in cka_cells.runs(study) if r.method in study.cka_shift_methods):
        left = cka_cells.run_result(study, run)["macs"]
        yield _Network(
            "CKA-SR" if run.beta else "sparse training",
            f"{run.method.upper()}{' + CKA-SR' if run.beta else ''}",
            run.seed,
            run.sparsity,
            _seconds(cka_cells.run_folder(study, run, ["run.json"])),
            left / whole,
            cka_cells.shifted(study, run),
            _name(mine),
        )


def _gated(study: Study) -> Iterator[_Network]:
    for cell in ftwt_cells.gated_cells(study):
        shifts = ftwt_cells.gated_shift_rows(study, cell)
        saved = pd.DataFrame(shifts).assign(accuracy=lambda frame: frame.macs_reduction).to_dict("records")
        yield _Network(
            "peer of FTWT" if cell.mode == "l1_filter" else "FTWT",
            f"{FTWT_NAMES[cell.mode]} (r {cell.r:g})",
            cell.seed,
            0.0,
            _seconds(ftwt_cells.gated_folder(study, cell, ["cell.json"])),
            {family: 1 - mean for family, mean, _ in _families(saved)},
            shifts,
        )


def _filters(study: Study) -> Iterator[_Network]:
    names = {"tp_magnitude": "torch-pruning magnitude", "tp_taylor": "torch-pruning Taylor", "snacs": "SNACS"}
    for cell in (c for c in structured_cells.structured_cells(study) if not c.is_dense):
        result = structured_cells.cell_result(study, cell)
        measured = []
        if cell.method == "snacs":
            measured = [("snacs_scores", snacs_cells.scores_inputs(study, cell.seed))]
        elif structured_cells.by_ghost(cell.method):
            measured = [_correlating(study, cell.seed, study.structured_similarity)]
        yield _Network(
            "structured",
            f"filters: {names.get(cell.method, cell.method)} ({cell.macs:g})",
            cell.seed,
            1 - result["parameters"] / result["parameters_dense"],
            _seconds(structured_cells.structured_folder(study, cell, ["cell.json"]), *measured),
            float(result["macs_left"] / result["macs_dense"]),
            structured_cells.structured_shift_rows(study, cell),
        )


SYSTEMS = {"05": _masks, "06": _blocks, "07": _sparse_training, "08": _gated, "10": _filters}  # by the notebook


def comparison_table(study: Study) -> pd.DataFrame:
    """comparison.csv: method, sparsity, macs, seed, shift_family, accuracy, seconds, ece, system, network.

    One row a network and family of shifts: clean (whole test set), corrupted (mean over corruptions and severities),
    natural. macs: share of the dense network's that is left, theoretical for masks, counted on the smaller network
    where filters are gone, mean over the images of that family for dynamic pruning. seconds: connectivity or scores,
    pruning and fine-tuning (for sparse training: all of the training) as measured where it was computed. Only what the
    study runs is in it; CKA-SR trains networks of its own, named in `network`, and compares with others only where that
    is the same.
    """
    rows = []
    for networks in (_dense, *(make for notebook, make in SYSTEMS.items() if study.runs(notebook))):
        for one in networks(study):
            facts = {name: getattr(one, name) for name in ("system", "method", "seed", "sparsity", "seconds")}
            facts["network"] = one.network or _name(study)
            for family, accuracy, ece in _families(one.shifts):
                macs = one.macs[family] if isinstance(one.macs, dict) else one.macs
                rows.append({**facts, "macs": macs, "shift_family": family, "accuracy": accuracy, "ece": ece})
    return pd.DataFrame(rows, columns=COLUMNS)


def _name(study: Study) -> str:
    return f"{study.network} x {study.width:g}"


def _dense_macs(study: Study) -> float:
    return float(cost.macs(cells.network(study, 0)[1], cells.example_input(study).cpu()))


def settings(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `setting`, the method with its sparsity (in steps of five points) where its name does not say it;
    `macs` and `sparsity` are averaged over the seeds and families of a setting: one point each."""
    named = rows.method.str.contains(r"\(") | (rows.system == "dense")
    at = [f" ({share:.0%})" for share in (20 * rows.sparsity).round() / 20]
    rows = rows.assign(setting=rows.method + np.where(named, "", at))
    point = rows.groupby(["network", "setting"], sort=False)
    return rows.assign(macs=point.macs.transform("mean"), sparsity=point.sparsity.transform("mean"))


def in_budgets(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """`settings` of the pruned networks with `budget` (words) and `order` (the same as a number), sorted.

    by: "sparsity" (masks and sparse training, in steps of five points) or "macs" (everything, in the BUDGETS).
    """
    rows = settings(rows[rows.system != "dense"])
    if by == "sparsity":
        rows = rows[~rows.system.isin(("structured", "FTWT", "peer of FTWT"))]
        level = (20 * rows.sparsity).round() / 20  # of the mean over seeds: a setting stands in one budget
        rows = rows.assign(budget=[f"{value:.0%} removed" for value in level], order=level)
    else:
        tops = [high for _, high in BUDGETS[:-1]]
        edges = [BUDGETS[int(np.searchsorted(tops, round(value, 2)))] for value in rows.macs]
        names = [f"{low:.0%} to {high:.0%} of the MACs" for low, high in edges]
        rows = rows.assign(budget=names, order=[low for low, _ in edges])
    return rows.sort_values("order", kind="stable", ascending=by == "sparsity")


def best_of_budgets(rows: pd.DataFrame, by: str = "macs") -> pd.DataFrame:
    """One row a budget: budget, setting, accuracy, settings (how many there are); the highest mean under corruption
    among those on the study's own network."""
    rows = in_budgets(rows[(rows.shift_family == "corrupted") & (rows.network == rows.network.iloc[0])], by)
    found = []
    for budget, part in rows.groupby("budget", sort=False):
        means = part.groupby("setting").accuracy.mean()
        found.append({"budget": budget, "setting": means.idxmax(), "accuracy": means.max(), "settings": len(means)})
    return pd.DataFrame(found)


def budget_table(rows: pd.DataFrame, by: str, only_plain: bool = False) -> pd.DataFrame:
    """Mean and 95 % interval over seeds: budget and setting down; clean, corrupted, natural, calibration error clean
    and corrupted, MACs, seconds across. by: see `in_budgets`.

    Within a budget and family the best is bold only where the interval of its difference to the second best, of all
    settings, leaves 0 out. MACs of masks are said to be "in theory". only_plain: the rows of PLAIN without partial
    correlation, and of each budget's best.
    """
    best = best_of_budgets(rows, by)
    rows = in_budgets(rows, by)
    shown = rows.method.str.startswith(PLAIN) & ~rows.method.str.endswith("partial")
    winners = set(zip(best.budget, best.setting, strict=True))
    shown |= np.array([pair in winners for pair in zip(rows.budget, rows.setting, strict=True)], dtype=bool)
    other = np.where(rows.network == rows.network.iloc[0], "", " †")
    name = "method" if by == "sparsity" else "setting"
    rows = rows.assign(method=rows[name] + other)
    keys = ["budget", "method"]
    blocks = {}
    for family, part in rows.groupby("shift_family", sort=False):
        blocks[family] = mean_and_spread(part, ["budget"], "method", "accuracy", interval=True).stack()
    means = rows[rows.shift_family == "clean"].groupby(keys, sort=False)[["macs", "seconds"]].mean()
    table = pd.DataFrame({name: blocks[name] for name in ("clean", "corrupted", "natural") if name in blocks})
    table.index.names = keys
    table = table.loc[(table.fillna("") != "").any(axis=1)].fillna("")
    errors = rows.groupby(["shift_family", *keys], sort=False).ece.mean()
    for family in ("clean", "corrupted"):
        found = [100 * errors.get((family, *key), np.nan) for key in table.index]
        table[f"ECE {family}"] = ["" if np.isnan(value) else f"{value:.1f}" for value in found]
    real = set(zip(*(rows[rows.system.isin(REMOVED)][key] for key in keys), strict=True))
    left = {key: f"{100 * means.macs.get(key, np.nan):.0f} %" for key in table.index}
    table["MACs left"] = [text if key in real else f"{text} in theory" for key, text in left.items()]
    table["seconds"] = [f"{means.seconds.get(key, np.nan):.0f}" for key in table.index]
    if only_plain:
        kept = set(zip(rows[shown].budget, rows[shown].method, strict=True))
        table = table[[key in kept for key in table.index]]
    return table
