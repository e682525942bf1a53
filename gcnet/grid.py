"""The tables across studies: one a data set, network and base pruner, as the paper has them, and the verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from gcnet import paths
from gcnet.claims import overall
from gcnet.figures import with_methods
from gcnet.reporting import mean_and_spread, to_latex, to_markdown
from gcnet.shifts import FAMILIES
from gcnet.store import atomic_write, provenance, write_json


def grid_tables(studies: Iterable[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """(<study>_<pruner>, table) for every study that has results: rows sparsity and method, columns clean, each family
    of shifts, mean (over all corruptions and severities, natural shifts apart).

    Percent, mean ± standard deviation over seeds; per sparsity and column the best is bold only where 0 lies outside
    the 95 % interval of its paired difference to the second best.
    """
    for study in studies:
        source = paths.results(study) / "tables" / "shift_accuracy.csv"
        if not source.exists():
            continue
        rows = pd.read_csv(source)
        rows["family"] = rows["shift"].map(FAMILIES).fillna("natural").where(rows.severity > 0, "clean")
        rows = with_methods(rows[rows.pruner != "none"])
        for pruner, part in rows.groupby("pruner", sort=False):
            corrupted = part[part.family.isin(set(FAMILIES.values()))].assign(family="mean")
            columns = {}
            for family, of_family in pd.concat([part, corrupted]).groupby("family", sort=False):
                columns[family] = mean_and_spread(of_family, ["sparsity"], "method", "accuracy").stack()
            order = ["clean", *dict.fromkeys(FAMILIES.values()), "natural", "mean"]
            table = pd.DataFrame({name: columns[name] for name in order if name in columns})
            table.index.names = ["sparsity", "method"]
            yield f"{study}_{pruner}", table.loc[(table != "").any(axis=1)]


def verdict_table(studies: Iterable[str]) -> pd.DataFrame:
    """claim, statement, study, supported, contradicted, inconclusive, verdict: each study's word on each claim."""
    rows = []
    for study in studies:
        source = paths.results(study) / "tables" / "claims.csv"
        if source.exists():
            rows.append(overall(pd.read_csv(source)).assign(study=study))
    columns = ["claim", "statement", "study", "supported", "contradicted", "inconclusive", "verdict"]
    return pd.concat(rows)[columns].sort_values("claim", kind="stable") if rows else pd.DataFrame(columns=columns)


def write_grid(studies: Iterable[str], name: str) -> tuple[Path, list[str], list[str]]:
    """Write results/<name>/tables/; (the folder, the tables' names, the studies that have no results yet)."""
    studies = list(studies)
    folder = paths.results(name) / "tables"
    tables = dict(grid_tables(studies))
    tables["verdicts"] = verdict_table(studies)
    made_by = {}
    for study in studies:
        source = paths.results(study) / "tables" / "shift_accuracy.json"
        if source.exists():
            made_by[study] = json.loads(source.read_text(encoding="utf-8")).get("results_computed_by")
    for table, frame in tables.items():
        plain = frame if table == "verdicts" else frame.reset_index()
        with atomic_write(folder / f"{table}.csv") as temporary:
            plain.to_csv(temporary, index=False, lineterminator="\n")
        for suffix, render in (("md", to_markdown), ("tex", to_latex)):
            with atomic_write(folder / f"{table}.{suffix}") as temporary:
                temporary.write_text(render(frame), encoding="utf-8")
        write_json(folder / f"{table}.json", provenance() | {"results_computed_by": made_by})
    missing = [study for study in studies if not (paths.results(study) / "tables" / "shift_accuracy.csv").exists()]
    return folder, list(tables), missing
