"""README.md says what the results say, links to what is there, and names commands that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from gcnet import paths, readme

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_blocks_are_what_the_results_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = subprocess.run(["git", "status", "--porcelain", "results"], cwd=ROOT, capture_output=True, text=True)
    if changed.stdout:
        pytest.skip("results/ is not as committed: a study was drawn again here")
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("GCNET_RESULTS", raising=False)
    assert readme.fill(TEXT) == TEXT, "run `make readme`"
    assert set(re.findall(r"<!-- (\w+) -->", TEXT)) == set(readme.BLOCKS)


def test_a_block_is_replaced_and_the_rest_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GCNET_RESULTS", raising=False)
    folder = paths.results("one") / "tables"
    folder.mkdir(parents=True)
    facts = {"stage": ["dense", "cells"], "kind": "x", "device": "cpu", "threads": [1, 1], "entries": [2, 3]}
    pd.DataFrame({**facts, "seconds": [60.0, 240.0]}).to_csv(folder / "times.csv")
    filled = readme.fill("before\n<!-- times -->\nold\n<!-- /times -->\nafter\n")
    assert filled.startswith("before\n<!-- times -->\n| study |")
    assert "| `one` | cpu | 1 | 5 | 5 |" in filled
    assert filled.endswith("<!-- /times -->\nafter\n") and "old" not in filled
    with pytest.raises(ValueError, match="README block 'tmes' is unknown"):
        readme.fill("<!-- tmes -->\n<!-- /tmes -->")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    heads = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= heads


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert named and named <= targets


def test_every_study_named_exists() -> None:
    studies = {p.stem for p in (ROOT / "params").glob("*.yaml")}
    assert set(re.findall(r"STUDY=(\w+)", TEXT)) <= studies
