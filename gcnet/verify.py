"""Does a study come out again? Its tables, computed anew in a folder of their own, against the committed ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gcnet.evaluation import bootstrap

_EXACT = 1e-6  # relative: what is written has ten digits, float32 results in between have seven
COLUMNS = ("table", "column", "rows", "same", "within", "missed", "verdict")


@contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Inside, nothing that was computed before is found and results are written below `folder`."""
    before = {name: os.environ.get(name) for name in ("GCNET_RUNS", "GCNET_RESULTS")}
    os.environ |= {"GCNET_RUNS": str(folder / "runs"), "GCNET_RESULTS": str(folder / "results")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def compare(committed: Path, anew: Path) -> pd.DataFrame:
    """One row a table and column: table, column, rows, same, within, missed, verdict.

    committed, anew: folders of CSV files. same: rows equal to six digits. within: rows that differ, but whose mean over
    seeds lies in the committed 95 % interval (over seeds where the table has them, else its own ci_low and ci_high).
    missed: neither. verdict: "same", "within the interval", "differs" (some row missed, or a claim went from supported
    to contradicted or back), "near" (nothing to judge it by, but on average within a quarter of the rows' standard
    deviation or a tenth of their mean), "changed" (a claim's verdict to or from inconclusive), "missing" (no such table
    or column any more, or other rows). Columns of measured time, and claims that rest on one measurement of it, are
    left out: they come out anew on every machine.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(committed.glob("*.csv")):
        if path.stem == "times":
            continue
        old = pd.read_csv(path)
        if not (anew / path.name).exists():
            found.append({"table": path.stem, "column": "", "rows": len(old), "missed": len(old), "verdict": "missing"})
            continue
        found += _columns(path.stem, old, pd.read_csv(anew / path.name))
    table = pd.DataFrame(found, columns=[*COLUMNS, "measured"]).fillna({"same": 0, "within": 0, "missed": 0})
    return table.assign(measured=table.measured.eq(True))


def _columns(table: str, old: pd.DataFrame, new: pd.DataFrame) -> Iterator[dict[str, Any]]:
    keys = [name for name in old.columns if name in _KEYS or not pd.api.types.is_numeric_dtype(old[name])]
    keys = [name for name in keys if name not in _NO_KEYS and not _in_words(name, old[name])]
    compared = [n for n in old.columns if n not in keys and pd.api.types.is_numeric_dtype(old[n])]
    compared = [n for n in compared if n not in _LEFT_OUT and not _TIME.search(n)]
    compared += [name for name in ("verdict",) if name in old]
    if "n" in old and "estimate" in old:  # one measurement, such as a ratio of times
        old = old[old.n > 1]
    for column in compared:
        row: dict[str, Any] = {"table": table, "column": column, "rows": len(old), "measured": "seed" in keys}
        if column not in new or not set(keys) <= set(new.columns):
            yield row | {"missed": len(old), "verdict": "missing"}
            continue
        places = [frame.assign(**{_PLACE: _place(frame, keys)}) for frame in (old, new)]
        both = places[0].merge(places[1], on=[*keys, _PLACE], how="left", suffixes=("", " anew"), indicator=True)
        judge = _judged_words if column == "verdict" else _judged_numbers
        there = both["_merge"] == "both"
        row |= judge(both[there], column, [key for key in keys if key != "seed"], seeds="seed" in keys)
        missing = int((~there).sum())
        yield row | ({"missed": row["missed"] + missing, "verdict": "missing"} if missing else {})


def _judged_words(both: pd.DataFrame, column: str, keys: list[str], *, seeds: bool) -> dict[str, Any]:
    old, new = (both[name].str.split(" ").str[0] for name in (column, f"{column} anew"))
    turned = (old != new) & (old != "inconclusive") & (new != "inconclusive")
    word = "differs" if turned.any() else "changed" if (old != new).any() else "same"
    return {"same": int((old == new).sum()), "within": 0, "missed": int((old != new).sum()), "verdict": word}


def _judged_numbers(both: pd.DataFrame, column: str, keys: list[str], *, seeds: bool) -> dict[str, Any]:
    a, b = both[column].to_numpy(float), both[f"{column} anew"].to_numpy(float)
    same = np.isclose(a, b, rtol=_EXACT, atol=1e-9, equal_nan=True)
    own_interval = column == "estimate" and {"ci_low", "ci_high"} <= set(both)
    within = ~same & _within(both, column, keys) if seeds or own_interval else np.zeros(len(both), dtype=bool)
    missed = int((~same & ~within).sum())
    word = "same" if same.all() else "within the interval"
    if missed:
        word = "near" if not (seeds or own_interval) and _near(a, b) else "differs"
    return {"same": int(same.sum()), "within": int(within.sum()), "missed": missed, "verdict": word}


def _near(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether numbers that nothing tells the spread of came out about the same (choice)."""
    known = np.isfinite(old)
    if not np.array_equal(known, np.isfinite(new)):
        return False
    old, new = old[known], new[known]
    return bool(np.abs(old - new).mean() <= max(old.std() / 4, abs(old.mean()) / 10))


# Intervals and p values follow from the numbers; how many threads measure a time, and which layout of the dense network
# is the fastest, from the machine.
_LEFT_OUT = ("p", "p_holm", "threads")
_NO_KEYS = ("verdict", "passes_signal", "dense_layout")
_KEYS = ("sparsity", "seed", "severity", "epsilon", "beta", "r", "delta", "groups", "macs_share", "batch", "batch_size",
         "image_size", "samples", "parents", "every", "budget")  # fmt: skip
_PLACE = "place among rows of the same keys"
_TIME = re.compile(r"(^|_)(s|ms|seconds)(_|$)|^ratio$|^overhead$")


def _in_words(name: str, values: pd.Series) -> bool:
    """Whether a column of text says numbers, such as "85.9 [85.7, 86.1]": those of another table, and no keys."""
    text = values.dropna().astype(str)
    numeric = pd.api.types.is_numeric_dtype(values) or name in _KEYS or text.empty
    return not numeric and text.str.match(r"\**[-+]?\d").all()


def _place(frame: pd.DataFrame, keys: list[str]) -> pd.Series:
    """The how-manieth of the rows that have the same keys each is."""
    return frame.groupby(keys, dropna=False).cumcount() if keys else pd.Series(range(len(frame)), index=frame.index)


def _within(both: pd.DataFrame, column: str, keys: list[str]) -> np.ndarray:
    """Whether each row's group (all its seeds) has its new mean inside the committed interval."""
    if "seed" not in both:
        return both[f"{column} anew"].between(both.ci_low, both.ci_high).to_numpy()
    inside = pd.Series(False, index=both.index)
    for _, part in both.groupby(keys, dropna=False) if keys else [((), both)]:
        interval = bootstrap(part[column].to_numpy(float))
        # One seed tells nothing of the spread, so nothing is inside its interval.
        inside[part.index] = len(part) > 1 and interval.low <= part[f"{column} anew"].mean() <= interval.high
    return inside.to_numpy()


def holds(found: pd.DataFrame) -> bool:
    """Whether a study came out again: nothing is missing and nothing differs beyond what its intervals allow.

    Where every measurement of every seed is the same, so must be all that follows from them: to six digits, and every
    verdict.
    """
    exact = found.measured.any() and (found[found.measured].verdict == "same").all()
    return bool((found.verdict == "same").all() if exact else not found.verdict.isin(("differs", "missing")).any())
