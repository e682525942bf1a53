"""Tables across studies: what stands where, what is bold, which studies are missing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest

from gcnet.grid import grid_tables, verdict_table, write_grid

SHIFTS = {"clean": 0, "fog": 3, "gaussian_noise": 3, "stl10_32": 1}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GCNET_RESULTS", raising=False)
    tables = tmp_path / "results" / "a" / "tables"
    tables.mkdir(parents=True)
    rows = []
    for seed, (hybrid, gain), (shift, severity), pruner in itertools.product(
        range(3), {"direct": 0.0, "B25": 0.1}.items(), SHIFTS.items(), ("l1", "lamp")
    ):
        accuracy = 0.8 + gain + 0.01 * seed - 0.1 * severity
        similarity = "none" if hybrid == "direct" else "pearson"
        rows.append((pruner, hybrid, similarity, 0.8, seed, shift, severity, accuracy))
    columns = ["pruner", "hybrid", "similarity", "sparsity", "seed", "shift", "severity", "accuracy"]
    pd.DataFrame(rows, columns=columns).to_csv(tables / "shift_accuracy.csv", index=False)
    verdicts = ["supported", "contradicted"]
    claims = pd.DataFrame({"claim": ["x", "x"], "statement": ["s", "s"], "verdict": verdicts, "n": 3})
    claims.to_csv(tables / "claims.csv", index=False)
    return tmp_path


@pytest.mark.usefixtures("project")
def test_one_table_a_pruner_with_families_across() -> None:
    tables = dict(grid_tables(["a", "not run"]))
    assert list(tables) == ["a_l1", "a_lamp"]
    table = tables["a_l1"]
    assert list(table.columns) == ["clean", "noise", "weather", "natural", "mean"]
    assert table.loc[(0.8, "direct"), "clean"] == "81.0 ± 1.0"
    assert table.loc[(0.8, "B25"), "noise"] == "**61.0 ± 1.0**" and len(table) == 2
    assert table.loc[(0.8, "direct"), "mean"] == "51.0 ± 1.0", "natural shifts are not part of the mean"


def test_files_and_what_is_missing(project: Path) -> None:
    folder, tables, missing = write_grid(["a", "b"], "paper")
    assert folder == project / "results" / "paper" / "tables" and missing == ["b"]
    for name, suffix in itertools.product(tables, ("csv", "md", "tex", "json")):
        assert (folder / f"{name}.{suffix}").stat().st_size > 10
    assert verdict_table(["a", "b"]).verdict.tolist() == ["contradicted"]
    assert verdict_table(["b"]).empty
