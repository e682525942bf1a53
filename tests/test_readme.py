"""README.md says what the results say, links to what is there, and names commands that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import gcnet
from gcnet import data, networks, paths, pruning, readme, shifts
from gcnet.claims import COLUMNS as COLUMNS_OF_CLAIMS
from gcnet.claims import load_claims
from gcnet.comparison import COLUMNS
from gcnet.connectivity import SIMILARITIES
from gcnet.reporting import to_markdown

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_blocks_are_what_the_results_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = subprocess.run(["git", "status", "--porcelain", "results"], cwd=ROOT, capture_output=True, text=True)
    if changed.stdout:
        pytest.skip("results/ is not as committed: a study was drawn again here")
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("GCNET_RESULTS", raising=False)
    assert readme.fill(TEXT) == TEXT, "run `make readme`"
    assert (ROOT / readme.SPEED).read_text(encoding="utf-8") == to_markdown(readme.targets()), "run `make readme`"
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


def test_a_benchmark_reaches_its_target_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GCNET_RESULTS", raising=False)
    folder = paths.results("benchmarks")
    folder.mkdir(parents=True)
    assert "No benchmark" in readme.speed()
    cases = {
        "slow": (9.0, 1.2, "at most 1.15"),
        "quick": (9.0, 3.0, "at least 2.5"),
        "all": (361.0, "", "at most 360 s"),
        "lean": (100.0, "", "at most 4096 MiB"),
        "untold": (1.0, 1.0, ""),
    }
    rows = [{"case": name, "ours_s": s, "peer": "p", "ratio": r, "target": t} for name, (s, r, t) in cases.items()]
    pd.DataFrame(rows).to_csv(folder / "x.csv", index=False)
    table = readme.targets()
    assert list(table.case) == ["slow", "quick", "all", "lean"]
    assert list(table.reached) == ["**no**", "yes", "**no**", "yes"]
    assert list(table.measured)[2:] == ["361 s", "100 MiB"]
    text = readme.speed()
    assert text.startswith("2 of 4 targets were reached") and "| x | slow |" in text and "quick" not in text
    pd.DataFrame([{**rows[0], "target": "fast"}]).to_csv(folder / "x.csv", index=False)
    with pytest.raises(ValueError, match="target 'fast'"):
        readme.targets()


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


def test_networks_that_do_not_work_stand_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RESULTS", str(tmp_path))
    assert "has not been run" in readme.zoo()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "zoo.csv").write_text(
        "library,network,masks,snacs,structured\n"
        "torchvision,resnet18,yes,yes,yes\n"
        "torchvision,shuffle_a,yes,no: no layer has a parent,no: it mixes channels (chunk); masks still work\n"
        "torchvision,shuffle_b,yes,yes,no: it mixes channels (view); masks still work\n"
        "torchvision,vast,not tried: 700 million parameters,,\n"
        "timm,odd,no: cannot be traced,,\n"
    )
    text = readme.zoo()
    told = (
        "- torchvision: of 3 networks tried, the ghost's masks work on 3, SNACS's on 2, smaller networks came from 1."
    )
    assert told in text and "| shuffle_a | SNACS | no layer has a parent |" in text
    assert "- timm: of 1 networks tried, the ghost's masks work on 0" in text and "vast" not in text
    assert "| shuffle_a, shuffle_b | smaller network | it mixes channels |" in text
    assert "| odd | masks | cannot be traced |" in text


def test_the_answer_tells_differences_with_their_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RESULTS", str(tmp_path))
    assert readme.answer() == "No study has been run yet.\n"
    what, study, claim, _ = readme.TOLD[0]
    other, without, second, _ = readme.TOLD[-1]
    rows = [
        (claim, "accuracy under shift, difference: B25 pearson - direct", -0.0164, -0.0312, -0.0006, "l1", ""),
        (claim, "accuracy under shift, difference: B25 pearson - direct", 0.3, 0.2, 0.4, "os_synflow", "direct 3 of 3"),
        (claim, "accuracy under shift, difference: BH pearson - direct", 0.01, -0.02, 0.04, "l1", ""),
        (
            claim,
            "accuracy under shift, difference: BH pearson - direct",
            0.0,
            0.0,
            0.0,
            "os_synflow",
            "BH pearson 3 of 3, direct 3 of 3",
        ),
        (claim, "share of dense MACs saved, difference: B25 pearson - direct", 0.1, 0.1, 0.1, "l1", ""),
        (second, "clean accuracy: rigl, beta 0.1", 0.001, -0.002, 0.003, "", ""),
    ]
    columns = ["claim", "measure", "estimate", "ci_low", "ci_high", "pruner", "collapsed"]
    table = pd.DataFrame(rows, columns=columns).assign(sparsity=0.8, n=3)
    for name, part in ((study, table[:5]), (without, table[5:])):
        (tmp_path / name / "tables").mkdir(parents=True)
        part.to_csv(tmp_path / name / "tables" / "claims.csv", index=False)
    text = readme.answer()
    assert "| question | compared | L1 | OS-SynFlow |" in text
    assert f"| {what} | B25 against direct, 80% removed | **-1.6 [-3.1, -0.1]** | **+30.0 [+20.0, +40.0]** ‡ |" in text
    assert "|  | BH against direct, 80% removed | +1.0 [-2.0, +4.0] | +0.0 [+0.0, +0.0] ‡ |" in text
    assert f"| {other} | RigL, 80% removed | +0.1 [-0.2, +0.3] |" in text
    assert "less accurate under shift than direct pruning in 1 of 4 settings" in text  # operations are none
    assert "in 2 the interval holds 0, 1 of them where networks of both sides let none through." in text
    assert "more accurate in 1, 1 of them where direct" in text


def test_the_systems_stand_with_their_plain_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RESULTS", str(tmp_path))
    assert "not been compared" in readme.systems()
    folder = tmp_path / readme.COMPARISON / "tables"
    folder.mkdir(parents=True)
    methods = {"dense": ("dense", 1.0, 0.9), "L1 direct": ("direct", 0.5, 0.8), "L1 Full": ("GC-Net", 0.5, 0.1),
               "SNACS (δ 0.7)": ("SNACS", 0.3, 0.7)}  # fmt: skip
    facts = [
        (method, 0.8, macs, seed, family, accuracy - (family == "corrupted") / 10, 60.0, 0.1, system, "vgg16_bn x 0.25")
        for method, (system, macs, accuracy) in methods.items()
        for seed in range(3)
        for family in ("clean", "corrupted")
    ]
    pd.DataFrame(facts, columns=COLUMNS).to_csv(folder / "comparison.csv", index=False)
    text = readme.systems()
    row = "L1 direct (80%) | **80.0 [80.0, 80.0]** | **70.0 [70.0, 70.0]** | 10.0 | 10.0 | 50 % in theory | 60 |"
    assert row in text
    assert "SNACS (δ 0.7)" in text and "L1 Full" not in text
    assert "The dense networks: 90.0 % clean, 80.0 % corrupted. Epochs of fine-tuning: masks and blocks 1" in text


def test_every_claim_has_a_row_and_digits_only_where_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCNET_RESULTS", str(tmp_path))
    tested = {"digits": ["gcnet-1", "ftwt-1"], "real": ["gcnet-1"], "smoke": ["gcnet-2"]}
    for study, names in tested.items():
        (tmp_path / study / "tables").mkdir(parents=True)
        facts = [dict.fromkeys(COLUMNS_OF_CLAIMS) | {"claim": c, "statement": c, "verdict": "supported"} for c in names]
        pd.DataFrame(facts).to_csv(tmp_path / study / "tables" / "claims.csv", index=False)
    text = readme.verdicts()
    assert "| gcnet-1 | `real` | **supported** | 1/0/0 |" in text and "| ftwt-1 | `digits` |" in text
    assert text.count("`digits`") == 1 and "smoke" not in text
    assert text.count("not tested yet") == len(load_claims()) - 2


def test_the_recipes_for_extending_work() -> None:
    registries = (data.DATASETS, networks.NETWORKS, SIMILARITIES, pruning.PRUNERS, shifts.CORRUPTIONS,
                  shifts.FAMILIES, shifts.SEVERITY_TABLES["cifar-c"])  # fmt: skip
    known = [set(registry) for registry in registries]
    section = TEXT[TEXT.index("## Extend it") : TEXT.index("## Errata")]
    try:
        exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
        train = data.load("circles", channels=1, image_size=8, val_share=0.2).train
        images = train.images.float() / 255 + torch.rand(len(train), 1, 8, 8)
        found = gcnet.ghost_prune(
            networks.build("plain", 2, channels=1, width=0.25), [(images, train.labels)], pruner="squared",
            sparsity=0.5, hybrid="Full", similarity="sign",
        )  # fmt: skip
        assert gcnet.sparsity(found.masks) == pytest.approx(0.5, abs=0.01)
        bright = torch.full((2, 1, 8, 8), 200, dtype=torch.uint8)
        assert shifts.corrupt(bright, "darker", 5).unique().item() == 100
    finally:
        for names, registry in zip(known, registries, strict=True):
            for name in set(registry) - names:
                del registry[name]
    claim = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])[0]
    assert set(claim) <= {key for other in load_claims() for key in other}
