"""What comes out again, what lies inside the interval, what does not, and what is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from gcnet import paths
from gcnet.verify import compare, elsewhere, holds


def accuracy(*values: float, hybrid: str = "B25") -> pd.DataFrame:
    return pd.DataFrame({"hybrid": hybrid, "seed": range(len(values)), "accuracy": values})


@pytest.fixture
def tables(tmp_path: Path):
    def write(old: dict[str, pd.DataFrame], new: dict[str, pd.DataFrame]) -> pd.DataFrame:
        for folder, frames in (("old", old), ("new", new)):
            (tmp_path / folder).mkdir()
            for name, frame in frames.items():
                frame.to_csv(tmp_path / folder / f"{name}.csv", index=False, float_format="%.10g")
        return compare(tmp_path / "old", tmp_path / "new")

    return write


@pytest.mark.parametrize(
    ("new", "verdict", "counts"),
    [
        ((0.7, 0.72, 0.74), "same", (3, 0, 0)),
        ((0.7, 0.73, 0.735), "within the interval", (1, 2, 0)),
        ((0.3, 0.32, 0.34), "differs", (0, 0, 3)),
    ],
)
def test_accuracies_by_their_interval_over_seeds(tables, new, verdict, counts) -> None:
    (row,) = tables({"accuracy": accuracy(0.7, 0.72, 0.74)}, {"accuracy": accuracy(*new)}).itertuples()
    assert (row.table, row.column, row.rows, row.verdict) == ("accuracy", "accuracy", 3, verdict)
    assert (row.same, row.within, row.missed) == counts


def test_groups_are_judged_apart(tables) -> None:
    def both(*values: float) -> pd.DataFrame:
        return pd.concat([accuracy(0.9, 0.92, 0.91), accuracy(*values, hybrid="Full")])

    (row,) = tables({"a": both(0.5, 0.52, 0.51)}, {"a": both(0.1, 0.12, 0.11)}).itertuples()
    assert (row.same, row.missed, row.verdict) == (3, 3, "differs")


def test_one_seed_has_no_interval(tables) -> None:
    found = tables({"a": accuracy(0.7)}, {"a": accuracy(0.71)})
    assert found.verdict.tolist() == ["differs"] and not holds(found)


def claims(estimate: float, verdict: str = "supported", n: int = 3, low: float = 0.01) -> pd.DataFrame:
    return pd.DataFrame({"claim": ["a"], "estimate": estimate, "ci_low": low, "ci_high": 0.05, "n": n,
                         "verdict": verdict, "p": 0.01})  # fmt: skip


def test_claims_are_judged_by_their_own_interval(tables) -> None:
    found = tables({"claims": claims(0.03)}, {"claims": claims(0.045)}).set_index("column").verdict
    assert found.to_dict() == {
        "estimate": "within the interval", "ci_low": "same", "ci_high": "same", "n": "same", "verdict": "same",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "word", "held"),
    [
        ("supported", "supported (x)", "same", True),
        ("supported", "inconclusive (n too small)", "changed", True),
        ("supported", "contradicted", "differs", False),
    ],
)
def test_a_verdict_that_turns_does_not_hold(tables, old: str, new: str, word: str, held: bool) -> None:
    found = tables({"claims": claims(0.03, old)}, {"claims": claims(0.045, new)})
    assert found.set_index("column").verdict["verdict"] == word and holds(found) == held


def test_a_claim_of_one_measurement_is_left_out(tables) -> None:
    assert tables({"claims": claims(20.0, n=1)}, {"claims": claims(1.0, "contradicted", n=1)}).rows.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("new", "word"),
    [([0.1, 0.2, 0.3], "same"), ([0.11, 0.19, 0.31], "near"), ([0.4, 0.7, 1.0], "differs"), ([0.0] * 3, "differs")],
)
def test_numbers_without_seeds_have_to_stay_near(tables, new: list[float], word: str) -> None:
    layers = ["a", "b", "c"]
    found = tables(
        {"connectivity": pd.DataFrame({"layer": layers, "strength": [0.1, 0.2, 0.3]})},
        {"connectivity": pd.DataFrame({"layer": layers, "strength": new})},
    )
    assert found.verdict.tolist() == [word] and holds(found) == (word != "differs")


def test_what_follows_from_the_same_measurements_has_to_be_the_same(tables) -> None:
    same = accuracy(0.7, 0.72, 0.74)
    found = tables(
        {"accuracy": same, "claims": claims(0.03)}, {"accuracy": same, "claims": claims(0.03, low=0.0101)}
    ).set_index("column")
    assert found.verdict["ci_low"] == "near" and not holds(found)


def test_an_interval_of_another_width_is_seen(tables) -> None:
    old, new = accuracy(0.7, 0.72, 0.74), accuracy(0.7, 0.73, 0.735)
    found = tables({"accuracy": old, "claims": claims(0.03)}, {"accuracy": new, "claims": claims(0.03, low=-0.8)})
    assert found.set_index("column").verdict["ci_low"] == "differs" and not holds(found)


def test_what_is_gone_is_missing(tables) -> None:
    old = {"gone": accuracy(0.5, 0.6), "fewer": accuracy(0.5, 0.6), "column": accuracy(0.5, 0.6)}
    new = {"fewer": accuracy(0.5), "column": accuracy(0.5, 0.6).drop(columns="accuracy")}
    found = tables(old, new)
    assert found.verdict.tolist() == ["missing"] * 3 and not holds(found)


def test_numbers_in_words_are_no_keys_and_rows_of_the_same_keys_stay_in_order(tables) -> None:
    def table(first: float, words: str) -> pd.DataFrame:
        return pd.DataFrame({"budget": ["80% removed"] * 2, "method": "B25", "clean": words, "ece": [first, 0.5],
                             "threads": [int(10 * first), 1]})  # fmt: skip

    found = tables({"a": table(0.1, "85.9 [85.7, 86.1]")}, {"a": table(0.2, "86.0 [85.1, 86.9]")}).set_index("column")
    assert found.verdict.to_dict() == {"ece": "near"}  # the second row is the same
    assert found.rows.tolist() == [2] and found.same.tolist() == [1]


def test_elsewhere_changes_both_folders_and_puts_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", "mine")
    monkeypatch.delenv("GCNET_RESULTS", raising=False)
    with elsewhere(tmp_path):
        assert paths.runs() == tmp_path / "runs" and paths.results("a") == tmp_path / "results" / "a"
    assert os.environ["GCNET_RUNS"] == "mine" and "GCNET_RESULTS" not in os.environ
