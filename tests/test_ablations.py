"""Every choice flipped alone, and the table of what that changes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from gcnet import ablations
from gcnet.ablations import CHOICES, DEFAULT, ablation_rows, ablation_table, run_variant, variant, variants
from gcnet.cells import cell_inputs
from gcnet.store import Store
from gcnet.study import Study
from tests.test_sweep import STUDY


def test_every_variant_is_another_cell() -> None:
    keys = {Store.key("cell", cell_inputs(*variant(STUDY, *which, 0))) for which in variants()}
    assert len(keys) == len(variants()) == 1 + sum(map(len, CHOICES.values()))


def test_variants_flip_one_choice_of_the_documented_defaults() -> None:
    odd = STUDY.model_copy(update={"tap": "relu", "absolute": True})
    default, cell = variant(odd, *DEFAULT, 3)
    assert (default.tap, default.absolute, cell.similarity, cell.seed) == (None, False, "pearson", 3)
    changed, _ = variant(STUDY, "images", "100", 0)
    assert [n for n in Study.model_fields if getattr(changed, n) != getattr(STUDY, n)] == ["connectivity_images"]
    assert variant(STUDY, "similarity", "hsic", 0)[1].similarity == "hsic"
    with pytest.raises(KeyError):
        variant(STUDY, "similarity", "taste", 0)


def test_the_table_is_paired_and_counts_its_comparisons() -> None:
    rows = [
        {"choice": choice, "setting": setting, "seed": seed, "shift": shift, "severity": severity, "macs": 1,
         "accuracy": 0.5 + 0.1 * seed + gain * (1 + 0.01 * seed) * (1 + severity)}
        for (choice, setting), gain in {DEFAULT: 0.0, ("tap", "a"): 0.02, ("sign", "b"): -0.03}.items()
        for seed in range(4) for shift, severity in (("clean", 0), ("fog", 1), ("snow", 1))
    ]  # fmt: skip
    found = ablation_table(pd.DataFrame(rows)).set_index(["choice", "measure"])
    assert found.estimate.to_dict() == pytest.approx(
        {
            ("tap", "clean"): 0.0203,
            ("tap", "shifted"): 0.0406,
            ("sign", "clean"): -0.03045,
            ("sign", "shifted"): -0.0609,
        }
    )
    assert (found.ci_low < found.estimate).all() and (found.n == 4).all() and (found.p_holm < 0.05).all()


def test_a_choice_that_cannot_matter_is_no_comparison() -> None:
    rows = [
        {"choice": choice, "setting": setting, "seed": seed, "shift": shift, "severity": severity, "macs": 1,
         "accuracy": 0.5 + 0.1 * seed + gain * (1 + 0.01 * seed)}
        for (choice, setting), gain in {DEFAULT: 0.0, ("tap", "a"): 0.02, ("residual", "b"): 0.0}.items()
        for seed in range(4) for shift, severity in (("clean", 0), ("fog", 1))
    ]  # fmt: skip
    found = ablation_table(pd.DataFrame(rows)).set_index(["choice", "measure"]).p_holm
    assert found["residual"].isna().all()
    alone = ablation_table(pd.DataFrame([row for row in rows if row["choice"] != "residual"])).p_holm
    assert found["tap"].tolist() == alone.tolist()


def test_on_a_real_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path))
    monkeypatch.setattr(ablations, "CHOICES", {"sign": CHOICES["sign"], "images": {"100": CHOICES["images"]["100"]}})
    ((stage, tasks),) = ablations.stages(STUDY)
    assert stage == "ablations" and len(tasks) == 3
    for function, study, which in tasks:
        assert function is run_variant and which[1] in function(study, which)
    rows = ablation_rows(STUDY)
    assert set(rows.choice) == {"default", "sign", "images"} and rows.accuracy.between(0, 1).all()
    table = ablation_table(rows)
    assert table.n.tolist() == [1] * 4
    assert (table.p_holm[table.estimate != 0] == 1).all() and table.p_holm[table.estimate == 0].isna().all()
