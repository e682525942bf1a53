"""All systems of a study side by side: accuracy by family of shifts, at what sparsity, operations and time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gcnet import cells, cka_cells, cost, ftwt_cells, snacs_cells, structured_cells
from gcnet.figures import method as method_name
from gcnet.reporting import mean_and_spread
from gcnet.shifts import FAMILIES
from gcnet.store import Store, read_json
from gcnet.study import Study

COLUMNS = ("method", "sparsity", "macs", "seed", "shift_family", "accuracy", "seconds", "ece", "system", "network")
PRUNER_NAMES = {"l1": "L1", "l1_layer": "L1 by layer", "lamp": "LAMP", "os_synflow": "OS-SynFlow", "synflow": "SynFlow",
                "random": "random"}  # fmt: skip
SNACS_NAMES = {"snacs": "SNACS", "mint": "MINT", "l1_block": "L1 blocks", "l1_filter": "L1 filters",
               "gcnet": "GC-Net B25"}  # fmt: skip
FTWT_NAMES = {"decoupled": "FTWT decoupled", "joint": "FTWT joint", "l1_filter": "L1 filters, FTWT's MACs"}
# The plain setting of each system and its peers: what fits on one page.
PLAIN = ("dense", "L1 direct", "L1 B25", "OS-SynFlow direct", "OS-SynFlow B25", "SNACS", "MINT", "L1 blocks",
         "FTWT decoupled", "L1 filters, FTWT", "RST", "filters: direct", "filters: B25",
         "filters: torch-pruning magnitude")  # fmt: skip
# Shares of the dense network's multiply-accumulates that count as one budget (choice).
BUDGETS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.01))


def _families(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float, float | None]]:
    """(clean | corrupted | natural, mean accuracy, mean calibration error or None) of a network's shift rows."""
    frame = pd.DataFrame(rows)
    kind = np.where(frame.severity == 0, "clean", np.where(frame["shift"].isin(set(FAMILIES)), "corrupted", "natural"))
    for family, part in frame.groupby(kind, sort=False):
        yield family, float(part.accuracy.mean()), float(part.ece.mean()) if "ece" in part else None


def _seconds(folder: Path) -> float:
    return float(read_json(folder / "entry.json")["wall_s"])


def _measuring(kind: str, inputs: dict[str, Any]) -> float:
    """Seconds of what a method measures on the dense network before it prunes; 0 where that was measured with it."""
    found = Store().find(kind, inputs, ["layers.json"])
    return _seconds(found) if found else 0.0


def comparison_table(study: Study) -> pd.DataFrame:
    """comparison.csv: method, sparsity, macs, seed, shift_family, accuracy, seconds, ece, system, network.

    One row a network and family of shifts: clean (whole test set), corrupted (mean over corruptions and severities),
    natural. macs: share of the dense network's that is left, theoretical for masks, counted on the smaller network
    where filters are gone, mean over the images of that family for dynamic pruning. seconds: connectivity or scores,
    pruning and fine-tuning (for sparse training: all of the training) as measured where it was computed. Only what the
    study runs is in it; CKA-SR trains networks of its own, named in `network`, and compares with others only where that
    is the same.
    """
    network, whole = f"{study.network} x {study.width:g}", _dense_macs(study)
    rows: list[dict[str, Any]] = []

    def add(facts: dict[str, Any], shifts: list[dict[str, Any]], *, macs: dict[str, float] | float) -> None:
        for family, accuracy, ece in _families(shifts):
            left = macs if isinstance(macs, float) else macs[family]
            rows.append({**facts, "macs": left, "shift_family": family, "accuracy": accuracy, "ece": ece})

    def correlating(seed: int, similarity: str = "pearson") -> float:
        return _measuring("connectivity", cells.connectivity_inputs(study, seed, similarity))

    for seed in study.seeds:
        dense = cells.Cell("none", "none", "none", 0.0, seed)
        facts = {"system": "dense", "method": "dense", "network": network, "sparsity": 0.0, "seed": seed}
        trained = _seconds(cells.dense_folder(study, seed))
        add(facts | {"seconds": trained}, cells.shift_rows(study, dense), macs=1.0)
    if study.runs("05"):
        for cell in (c for c in cells.cells(study) if not c.is_dense):
            result = cells.cell_result(study, cell)
            name = f"{PRUNER_NAMES[cell.pruner]} {method_name(cell.hybrid, cell.similarity)}"
            direct = cell.hybrid == "direct"
            before = 0.0 if direct else correlating(cell.seed, cell.similarity)
            facts = {"system": "direct" if direct else "GC-Net", "method": name, "network": network,
                     "sparsity": cell.sparsity, "seed": cell.seed,
                     "seconds": before + _seconds(cells.cell_folder(study, cell, ["cell.json"]))}  # fmt: skip
            add(facts, cells.shift_rows(study, cell), macs=result["macs"] / whole)
    if study.runs("06"):
        for cell in (c for c in snacs_cells.snacs_cells(study) if c.method != "none"):
            result = snacs_cells.cell_result(study, cell)
            before = {
                "snacs": lambda seed: _measuring("snacs_scores", snacs_cells.scores_inputs(study, seed)),
                "mint": lambda seed: _measuring("snacs_mint", snacs_cells.mint_inputs(study, seed)),
                "gcnet": correlating,
            }.get(cell.method, lambda _: 0.0)(cell.seed)
            facts = {"system": "SNACS" if cell.method == "snacs" else "peer of SNACS", "network": network,
                     "method": f"{SNACS_NAMES[cell.method]} (δ {cell.delta:g})", "sparsity": result["sparsity"],
                     "seed": cell.seed,
                     "seconds": before + _seconds(snacs_cells.cell_folder(study, cell, ["cell.json"]))}  # fmt: skip
            add(facts, snacs_cells.shift_rows(study, cell), macs=result["macs"] / whole)
    if study.runs("07"):
        mine = cka_cells.own(study)
        whole_of_mine = _dense_macs(mine)
        for run in (r for r in cka_cells.runs(study) if r.method in study.cka_shift_methods):
            net, masks = cka_cells.run_network(study, run)
            left = cost.macs(net[1], cells.example_input(study), masks) / whole_of_mine
            facts = {"system": "CKA-SR" if run.beta else "sparse training", "seed": run.seed, "sparsity": run.sparsity,
                     "method": f"{run.method.upper()}{' + CKA-SR' if run.beta else ''}",
                     "network": f"{mine.network} x {mine.width:g}",
                     "seconds": _seconds(cka_cells.run_folder(study, run, ["run.json"]))}  # fmt: skip
            add(facts, cka_cells.shifted(study, run), macs=left)
    if study.runs("08"):
        for cell in ftwt_cells.gated_cells(study):
            shifts = ftwt_cells.gated_shift_rows(study, cell)
            saved = pd.DataFrame(shifts).assign(accuracy=lambda frame: frame.macs_reduction).to_dict("records")
            left = {family: 1 - mean for family, mean, _ in _families(saved)}
            facts = {"system": "peer of FTWT" if cell.mode == "l1_filter" else "FTWT", "network": network,
                     "method": f"{FTWT_NAMES[cell.mode]} (r {cell.r:g})", "sparsity": 0.0, "seed": cell.seed,
                     "seconds": _seconds(ftwt_cells.gated_folder(study, cell, ["cell.json"]))}  # fmt: skip
            add(facts, shifts, macs=left)
    if study.runs("10"):
        for cell in (c for c in structured_cells.structured_cells(study) if not c.is_dense):
            result = structured_cells.cell_result(study, cell)
            name = {"tp_magnitude": "torch-pruning magnitude", "tp_taylor": "torch-pruning Taylor", "snacs": "SNACS"}
            before = 0.0
            if cell.method == "snacs":
                before = _measuring("snacs_scores", snacs_cells.scores_inputs(study, cell.seed))
            elif structured_cells.by_ghost(cell.method):
                before = correlating(cell.seed, study.structured_similarity)
            facts = {"system": "structured", "method": f"filters: {name.get(cell.method, cell.method)} ({cell.macs:g})",
                     "network": network, "sparsity": 1 - result["parameters"] / result["parameters_dense"],
                     "seed": cell.seed,
                     "seconds": before + _seconds(structured_cells.structured_folder(study, cell, ["cell.json"]))
                     }  # fmt: skip
            left = result["macs_left"] / result["macs_dense"]
            add(facts, structured_cells.structured_shift_rows(study, cell), macs=float(left))
    return pd.DataFrame(rows, columns=COLUMNS)


def _dense_macs(study: Study) -> float:
    return float(cost.macs(cells.network(study, 0)[1], cells.example_input(study).cpu()))


def settings(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `level`, the sparsity in steps of five points (0 where the method's name says the setting), and
    `macs` and `sparsity` averaged over the seeds and families of a method and level: one point of a comparison."""
    named = rows.system.isin(("SNACS", "peer of SNACS", "FTWT", "peer of FTWT", "structured"))
    rows = rows.assign(level=((20 * rows.sparsity).round() / 20).where(~named, 0.0))
    point = rows.groupby(["method", "level"], sort=False)
    return rows.assign(macs=point.macs.transform("mean"), sparsity=point.sparsity.transform("mean"))


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each system's plain setting (PLAIN, without partial correlation)."""
    return rows[rows.method.str.startswith(PLAIN) & ~rows.method.str.endswith("partial")]


def budget_table(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Mean and 95 % interval over seeds: budget and method down; clean, corrupted, natural, calibration error clean and
    corrupted, MACs, seconds across.

    by: "sparsity" (unstructured methods and sparse training, in steps of five points) or "macs" (everything, in the
    BUDGETS). Within a budget and family the best is bold only where the interval of its difference to the second best
    leaves 0 out.
    """
    rows = settings(rows[rows.system != "dense"])
    if by == "sparsity":
        rows = rows[~rows.system.isin(("structured", "FTWT", "peer of FTWT"))]
        level = (20 * rows.sparsity).round() / 20
        rows = rows.assign(budget=[f"{value:.0%} removed" for value in level], order=level)
    else:
        edges = [next((low, high) for low, high in BUDGETS if low <= value < high) for value in rows.macs]
        names = [f"{low:.0%} to {min(high, 1):.0%} of the MACs" for low, high in edges]
        rows = rows.assign(budget=names, order=[low for low, _ in edges])
    rows = rows.sort_values("order", kind="stable", ascending=by == "sparsity")
    rows = rows.assign(method=rows.method + np.where(rows.network == rows.network.iloc[0], "", " †"))
    blocks = {}
    for family, part in rows.groupby("shift_family", sort=False):
        blocks[family] = mean_and_spread(part, ["budget"], "method", "accuracy", interval=True).stack()
    means = rows[rows.shift_family == "clean"].groupby(["budget", "method"], sort=False)[["macs", "seconds"]].mean()
    table = pd.DataFrame({name: blocks[name] for name in ("clean", "corrupted", "natural") if name in blocks})
    table.index.names = ["budget", "method"]
    table = table.loc[(table.fillna("") != "").any(axis=1)].fillna("")
    errors = rows.groupby(["shift_family", "budget", "method"], sort=False).ece.mean()
    for family in ("clean", "corrupted"):
        found = [100 * errors.get((family, *key), np.nan) for key in table.index]
        table[f"ECE {family}"] = ["" if np.isnan(value) else f"{value:.1f}" for value in found]
    table["MACs left"] = [f"{100 * means.macs.get(key, np.nan):.0f} %" for key in table.index]
    table["seconds"] = [f"{means.seconds.get(key, np.nan):.0f}" for key in table.index]
    return table
