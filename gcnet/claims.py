"""The claims of `params/claims.yaml`, judged on a study's tables: paired differences, intervals, verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from gcnet import paths
from gcnet.cells import drift_rows
from gcnet.evaluation import (
    Interval,
    bootstrap,
    bootstrap_ranks,
    by_shift,
    holm,
    holm_factors,
    p_value,
    paired_differences,
    verdict,
)
from gcnet.study import Study

COLUMNS = (
    "claim", "source", "statement", "measure", "estimate", "ci_low", "ci_high", "n", "verdict", "sparsity",
    "pruner", "threshold", "collapsed", "p", "p_holm",
)  # fmt: skip
_MEASURES = {
    "shifted": "accuracy under shift, difference",
    "clean": "clean accuracy, difference",
    "macs": "share of dense MACs saved, difference",
    "drift_rank": "rank correlation of connectivity clean and shifted",
    "drift_accuracy": "rank correlation over shifts",
}


# The verdict where no image tells two networks apart: both have collapsed, so nothing is said of either.
ALIKE = "inconclusive (no image tells the two sides apart)"


def load_claims(path: Path | None = None) -> list[dict[str, Any]]:
    """params/claims.yaml: each testable sentence as data. A claim may name the `studies` it is tested on."""
    return yaml.safe_load((path or paths.params() / "claims.yaml").read_text(encoding="utf-8"))


def claims_table(study: Study, shifts: pd.DataFrame, accuracy: pd.DataFrame) -> pd.DataFrame:
    """claims.csv: the columns of COLUMNS, one row a comparison, sparsity and pruner.

    Differences are paired: the same pruner (unless the comparison names one on each side), sparsity, seed, shift and
    severity, averaged over severities. Pruners stand apart: guidance may help one and harm another. `collapsed` counts
    the seeds in which a side lets no signal through once it is pruned. A comparison whose cells the study does not have
    is left out; so are the claims that other notebooks test.
    """
    compared: list[Comparison] = []
    for claim in load_claims():
        if study.study not in claim.get("studies", [study.study]):
            continue
        for test in claim.get("comparisons", ()):
            for sparsity in (0.0,) if test["measure"].startswith("drift") else study.sparsities:
                for pruner, interval, alike in _measured(study, test, sparsity, shifts, accuracy):
                    if pruner in claim.get("without", ()):
                        continue
                    compared.append(
                        Comparison(
                            claim["id"],
                            _in_words(test),
                            interval,
                            sparsity,
                            margin=test.get("margin", 0.0) - test.get("above", 0.0),
                            word=ALIKE if alike else "",
                            pruner=pruner,
                            collapsed=_collapsed(test, sparsity, pruner, accuracy),
                        )
                    )
    return judged(compared)


@dataclass(frozen=True)
class Comparison:
    """One measurement that a claim is judged by.

    margin: the loss that "at least as good" tolerates. smallest: a difference that would matter, for the number of
    seeds that an inconclusive verdict names. word: the verdict, where something other than the interval decides.
    pruner: the base pruner, where it is of one. collapsed: which side's networks are at chance, in how many seeds.
    """

    claim: str
    measure: str
    interval: Interval
    sparsity: float = 0.0
    margin: float = 0.0
    smallest: float = 0.002
    word: str = ""
    pruner: str = ""
    collapsed: str = ""


def judged(compared: Sequence[Comparison]) -> pd.DataFrame:
    """A table of claims, with the columns of claims.csv: one row a comparison.

    Sources and statements are those of params/claims.yaml. p_holm is adjusted for all comparisons of one claim, and the
    verdict goes by it (choice). Raises KeyError for a claim that is not there.
    """
    known = {claim["id"]: claim for claim in load_claims()}
    adjusted: dict[int, tuple[float, float, float]] = {}
    for claim in dict.fromkeys(one.claim for one in compared):
        of_claim = [n for n, one in enumerate(compared) if one.claim == claim and not one.word]
        p = [p_value(compared[n].interval, compared[n].margin) for n in of_claim]
        adjusted |= dict(zip(of_claim, zip(p, holm(p), holm_factors(p), strict=True), strict=True))
    rows = []
    for number, one in enumerate(compared):
        alone, with_others, family = adjusted.get(number, (np.nan, np.nan, 1))
        found = one.interval
        # Shares, their differences and rank correlations lie within 1; what has one measurement has no interval.
        low, high = (max(found.low, -1.0), min(found.high, 1.0)) if found.n > 1 else (found.low, found.high)
        word = one.word or verdict(found, margin=one.margin, smallest=one.smallest, p=with_others, comparisons=family)
        rows.append(
            {
                "claim": one.claim,
                "source": known[one.claim]["source"],
                "statement": known[one.claim]["statement"],
                "measure": one.measure,
                "estimate": found.estimate,
                "ci_low": low,
                "ci_high": high,
                "n": found.n,
                "verdict": word,
                "sparsity": one.sparsity,
                "pruner": one.pruner,
                "threshold": 0.0 - one.margin,
                "collapsed": one.collapsed,
                "p": alone,
                "p_holm": with_others,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def overall(claims: pd.DataFrame) -> pd.DataFrame:
    """One row a claim: claim, statement, supported, contradicted, inconclusive (comparisons), verdict, n (most seeds).

    A claim speaks of all its comparisons: it is supported when each is, contradicted when any is, else inconclusive.
    """
    rows = []
    for claim, part in claims.groupby("claim", sort=False):
        words = part.verdict.str.split(" ").str[0]
        count = {word: int((words == word).sum()) for word in ("supported", "contradicted", "inconclusive")}
        word = "contradicted" if count["contradicted"] else "inconclusive" if count["inconclusive"] else "supported"
        rows.append({"claim": claim, "statement": part.statement.iloc[0], **count, "verdict": word,
                     "n": part.n.max()})  # fmt: skip
    columns = ["claim", "statement", "supported", "contradicted", "inconclusive", "verdict", "n"]
    return pd.DataFrame(rows, columns=columns)


def told(claims: pd.DataFrame) -> str:
    """A table of claims as a Markdown list: each claim with its verdict and how its comparisons went."""
    return "\n".join(
        f"- **{row.claim}, {row.verdict}**: {row.statement} ({row.supported} comparisons supported, "
        f"{row.contradicted} contradicted, {row.inconclusive} inconclusive.)"
        for row in overall(claims).itertuples()
    )


def every_verdict(folder: Path, left_out: Collection[str] = (), *, untested: bool = False) -> pd.DataFrame:
    """`overall` of every table of claims below results/<study>/, GC-Net's first; left_out: such as "tables/claims".

    untested: the claims of claims.yaml that this study does not test stand at the end, with the verdicts of the studies
    beside it that do ("smoke", which tests nothing in earnest, not among them).
    """
    files = sorted(folder.glob("tables/*claims.csv"), key=lambda path: (path.stem != "claims", path.stem))
    tables = [pd.read_csv(path) for path in files if f"tables/{path.stem}" not in left_out]
    found = [overall(table) for table in tables if len(table)]
    verdicts = pd.concat(found, ignore_index=True) if found else overall(pd.DataFrame(columns=COLUMNS))
    if not untested:
        return verdicts
    beside = [other for other in sorted(folder.parent.glob("*/")) if other.name not in (folder.name, "smoke")]
    elsewhere = {other.name: every_verdict(other).set_index("claim").verdict for other in beside}
    rows = []
    for claim in load_claims():
        if claim["id"] not in set(verdicts.claim):
            others = [f"{study}: {known[claim['id']]}" for study, known in elsewhere.items() if claim["id"] in known]
            words = "; ".join(["not tested here", *others])
            rows.append({"claim": claim["id"], "statement": claim["statement"], "supported": 0, "contradicted": 0,
                         "inconclusive": 0, "verdict": words, "n": 0})  # fmt: skip
    return pd.concat([verdicts, pd.DataFrame(rows, columns=verdicts.columns)], ignore_index=True)


# --- one comparison -------------------------------------------------------------------------------------------------


def _measured(
    study: Study, test: Mapping[str, Any], sparsity: float, shifts: pd.DataFrame, accuracy: pd.DataFrame
) -> Iterator[tuple[str, Interval, bool]]:
    """(pruner, interval over seeds and shifts, whether no image tells the sides apart) of a comparison.

    Nothing where the study has no such cells.
    """
    if test["measure"].startswith("drift"):
        interval = _drift(study, test, shifts)
        if interval is not None:
            yield "", interval, False
        return
    if test["measure"] == "macs":
        dense = accuracy[accuracy.pruner == "none"].macs.iloc[0]
        source = accuracy.assign(shift="clean", severity=0, value=-accuracy.macs / dense)
    else:
        wanted = shifts.severity > 0 if test["measure"] == "shifted" else shifts.severity == 0
        source = shifts[wanted].assign(value=lambda rows: rows.accuracy)
    difference = paired_differences(source[source.sparsity == sparsity], test["of"], test["against"], "value")
    for pruner, part in difference.groupby(level="pruner", sort=False):
        values = by_shift(part.droplevel(["pruner", "sparsity"]))
        yield pruner, bootstrap(values), test["measure"] != "macs" and not values.any()


def _collapsed(test: Mapping[str, Any], sparsity: float, pruner: str, accuracy: pd.DataFrame) -> str:
    """Such as "direct 3 of 3": the seeds in which a side's network passes no signal before fine-tuning; "" for none."""
    found = []
    for side in ("of", "against"):
        rows = accuracy[(accuracy.sparsity == sparsity)] if "passes_signal" in accuracy else accuracy.iloc[:0]
        for column, wanted in {"pruner": pruner, **test.get(side, {})}.items():
            rows = rows[rows[column].isin(wanted if isinstance(wanted, list) else [wanted])]
        silent = int((~rows.passes_signal.astype(bool)).sum()) if len(rows) else 0
        if silent:
            found.append(f"{_side(test[side])} {silent} of {len(rows)}")
    return ", ".join(found)


def _drift(study: Study, test: Mapping[str, Any], shifts: pd.DataFrame) -> Interval | None:
    """How connectivity measured on shifted images relates to that on clean ones, over seeds and shifts."""
    if not study.runs("02"):
        return None
    moved = pd.DataFrame([row for seed in study.seeds for row in drift_rows(study, seed)])
    by_seed = moved.groupby(["seed", "shift"], sort=False)[["distance", "rank_correlation"]].mean().unstack("shift")
    if test["measure"] == "drift_rank":
        return bootstrap(by_seed.rank_correlation.to_numpy())
    dense = shifts[shifts.pruner == "none"]
    clean = dense[dense.severity == 0].set_index("seed").accuracy
    shifted = dense[dense.severity == moved.severity.iloc[0]].pivot(index="seed", columns="shift", values="accuracy")
    lost = -shifted.sub(clean, axis=0)
    both = [shift for shift in by_seed.distance if shift in lost]
    return bootstrap_ranks(by_seed.distance[both], lost.loc[by_seed.index, both]) if len(both) > 2 else None


def _side(where: Mapping[str, Any]) -> str:
    return " ".join("/".join(v) if isinstance(v, list) else str(v) for v in where.values())


def _in_words(test: Mapping[str, Any]) -> str:
    measure = _MEASURES[test["measure"]]
    if test["measure"] == "drift_rank":
        return f"{measure}: above {test['above']}"
    if test["measure"] == "drift_accuracy":
        return f"{measure}: distance of connectivity with accuracy lost"
    return f"{measure}: {_side(test['of'])} - {_side(test['against'])}"
