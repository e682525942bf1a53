"""Claims: every comparison that a study has the cells for, judged for its direction, corrected for their number."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from gcnet import claims, paths
from gcnet.claims import Comparison, claims_table, judged, load_claims, overall
from gcnet.evaluation import Interval, bootstrap
from gcnet.pruning import PRUNERS
from gcnet.study import Study

STUDY = Study.create(study="small", seeds=[0, 1, 2, 3], sparsities=[0.8], notebooks=["05"])
GAIN = {"direct": 0.0, "B25": 0.04, "Full": -0.2}


def shifts() -> pd.DataFrame:
    """Accuracies that differ by GAIN and a little by seed and shift."""
    rows = []
    for seed, (hybrid, gain), (k, shift) in itertools.product(
        STUDY.seeds, GAIN.items(), enumerate(("clean", "fog", "snow"))
    ):
        similarity = "none" if hybrid == "direct" else "pearson"
        rows.append(
            {"pruner": "l1", "hybrid": hybrid, "similarity": similarity, "sparsity": 0.8, "seed": seed, "shift": shift,
             "severity": min(k, 1), "accuracy": 0.7 + gain * (1 + 0.1 * seed) - 0.05 * k}
        )  # fmt: skip
    return pd.DataFrame(rows)


def accuracy() -> pd.DataFrame:
    rows = [{"pruner": "none", "hybrid": "none", "similarity": "none", "sparsity": 0.0, "seed": s, "macs": 100} for s in
            STUDY.seeds]  # fmt: skip
    for seed, (hybrid, left) in itertools.product(STUDY.seeds, {"direct": 50, "B25": 40, "Full": 60}.items()):
        similarity = "none" if hybrid == "direct" else "pearson"
        rows.append({"pruner": "l1", "hybrid": hybrid, "similarity": similarity, "sparsity": 0.8, "seed": seed,
                     "macs": left})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def table(*comparisons: dict, **more: object) -> pd.DataFrame:
        claim = {"id": "a", "source": "s", "statement": "t", "comparisons": list(comparisons), **more}
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump([claim]))
        monkeypatch.setattr(paths, "params", lambda: tmp_path)
        return claims_table(STUDY, shifts(), accuracy())

    return table


def against_direct(hybrid: str, measure: str = "shifted", **more: float) -> dict:
    return {"measure": measure, "of": {"hybrid": hybrid}, "against": {"hybrid": "direct"}, **more}


def test_a_gain_is_supported_and_a_loss_contradicted(judge) -> None:
    found = judge(against_direct("B25"), against_direct("Full"))
    assert found.verdict.tolist() == ["supported", "contradicted"] and found.n.tolist() == [4, 4]
    assert found.estimate.tolist() == pytest.approx([0.04 * 1.15, -0.2 * 1.15])
    assert (found.ci_low < found.estimate).all() and (found.estimate < found.ci_high).all()


def test_the_clean_images_and_the_operations_are_measures_too(judge) -> None:
    found = judge(against_direct("B25", "clean"), against_direct("B25", "macs"), against_direct("Full", "macs"))
    assert found.estimate.tolist() == pytest.approx([0.04 * 1.15, 0.1, -0.1])
    assert found.verdict.tolist() == ["supported", "supported", "contradicted"]


def test_p_is_adjusted_for_the_comparisons_of_a_claim(judge) -> None:
    alone, both = judge(against_direct("B25")), judge(against_direct("B25"), against_direct("Full"))
    assert alone.p_holm[0] == alone.p[0] and both.p_holm.max() == pytest.approx(2 * both.p.min())


def test_pruners_stand_apart_and_severities_make_no_interval(judge, monkeypatch: pytest.MonkeyPatch) -> None:
    one = shifts()
    harder = one[one.severity > 0].assign(severity=2, accuracy=lambda rows: rows.accuracy - 0.1)
    other = pd.concat([one, harder]).assign(pruner="lamp")
    other.loc[other.hybrid == "B25", "accuracy"] -= 0.3
    monkeypatch.setattr(sys.modules[__name__], "shifts", lambda: pd.concat([one, harder, other]))
    alone, found = bootstrap(np.tile([[0.04], [0.044], [0.048], [0.052]], 2)), judge(against_direct("B25"))
    assert found.pruner.tolist() == ["l1", "lamp"] and found.verdict.tolist() == ["supported", "contradicted"]
    assert found.estimate.tolist() == pytest.approx([alone.estimate, alone.estimate - 0.3])
    assert (found.ci_high - found.ci_low).tolist() == pytest.approx([alone.high - alone.low] * 2)


def test_a_side_that_lets_no_signal_through_is_named(judge, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(against_direct("B25")).collapsed.tolist() == [""]
    silent = accuracy().assign(passes_signal=lambda rows: (rows.hybrid != "direct") | (rows.seed > 2))
    monkeypatch.setattr(sys.modules[__name__], "accuracy", lambda: silent)
    assert judge(against_direct("B25"), against_direct("B25", "macs")).collapsed.tolist() == ["direct 3 of 4"] * 2


def test_an_interval_stays_where_a_difference_can_be() -> None:
    wide = judged([Comparison("gcnet-1", "m", Interval(-0.5, -1.4, 0.7, 3, 0.4), margin=0.005)]).iloc[0]
    assert (wide.ci_low, wide.ci_high, wide.threshold) == (-1.0, 0.7, -0.005)
    one = judged([Comparison("gcnet-1", "m", bootstrap(np.array([0.3])))]).iloc[0]
    assert one.ci_low == -np.inf and one.verdict == "inconclusive (one seed)"


def test_networks_that_are_never_apart_decide_nothing(judge) -> None:
    found = judge({"measure": "shifted", "of": {"hybrid": "B25"}, "against": {"hybrid": "B25"}, "margin": 0.01})
    assert found.verdict[0] == "inconclusive (no image tells the two sides apart)"
    same = {"measure": "macs", "of": {"hybrid": "B25"}, "against": {"hybrid": "B25"}, "margin": 0.01}
    assert judge(same).verdict[0] == "supported"  # operations are kept


def test_a_margin_moves_the_line(judge) -> None:
    assert judge(against_direct("Full", margin=0.5)).verdict[0] == "supported"


def test_cells_that_are_not_there_and_other_studies_are_left_out(judge) -> None:
    assert judge(against_direct("FH")).empty and list(judge(against_direct("FH")).columns) == list(claims.COLUMNS)
    assert judge(against_direct("B25"), studies=["another"]).empty
    assert len(judge(against_direct("B25"), studies=["small"])) == 1


def test_a_claim_is_as_strong_as_its_weakest_comparison() -> None:
    rows = [("a", "supported"), ("a", "supported"), ("b", "supported"), ("b", "inconclusive (n ...)"),
            ("c", "inconclusive (n ...)"), ("c", "contradicted")]  # fmt: skip
    found = overall(pd.DataFrame([{"claim": c, "statement": c, "verdict": v, "n": 3} for c, v in rows]))
    assert found.verdict.tolist() == ["supported", "inconclusive", "contradicted"]
    assert found[["supported", "contradicted", "inconclusive"]].sum(axis=1).tolist() == [2, 2, 2]
    assert overall(pd.DataFrame(columns=list(claims.COLUMNS))).empty


MOVED = {shift: 0.1 * k for k, shift in enumerate(("fog", "snow", "frost", "contrast", "pixelate", "glass_blur"), 1)}


def drifting(study: Study, seed: int) -> list[dict]:
    """Fog moves connectivity least, glass blur most."""
    return [
        {"seed": seed, "shift": shift, "severity": 1, "layer": layer, "distance": d, "rank_correlation": 1 - d / 10}
        for (shift, d), layer in itertools.product(MOVED.items(), ("a", "b"))
    ]


def test_drift_of_connectivity_and_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "drift_rows", drifting)
    study = STUDY.model_copy(update={"notebooks": ("02", "05")})

    def dense(names: list[str]) -> pd.DataFrame:
        """What is lost grows with what moves."""
        lost = {"clean": 0.0, **{name: MOVED[name] ** 2 for name in names}}
        return pd.DataFrame(
            [{"pruner": "none", "seed": seed, "shift": shift, "severity": int(shift != "clean"), "accuracy": 0.9 - loss}
             for seed, (shift, loss) in itertools.product(STUDY.seeds, lost.items())]
        )  # fmt: skip

    tests = [{"measure": "drift_rank", "above": 0.9}, {"measure": "drift_rank", "above": 0.995}]
    tests.append({"measure": "drift_accuracy"})
    claim = {"id": "a", "source": "s", "statement": "t", "comparisons": tests}
    monkeypatch.setattr(claims, "load_claims", lambda: [claim])
    found = claims_table(study, dense(list(MOVED)), accuracy())
    assert found.estimate.tolist() == pytest.approx([1 - 0.035, 1 - 0.035, 1.0])
    assert found.verdict[0] == found.verdict[2] == "supported" and found.verdict[1] == "contradicted"
    few = claims_table(study, dense(["fog", "snow", "frost"]), accuracy())
    assert few.estimate[2] == pytest.approx(1.0) and few.verdict[2].startswith(
        "inconclusive"
    )  # three shifts say little
    assert len(claims_table(study, dense(["fog", "snow"]), accuracy())) == 2
    assert claims_table(STUDY, dense(list(MOVED)), accuracy()).empty  # which does not run the notebook of drift


def test_pruners_that_decide_nothing_are_left_out(judge, monkeypatch: pytest.MonkeyPatch) -> None:
    both = pd.concat([shifts(), shifts().assign(pruner="random")])
    monkeypatch.setattr(sys.modules[__name__], "shifts", lambda: both)
    assert judge(against_direct("B25")).pruner.tolist() == ["l1", "random"]
    assert judge(against_direct("B25"), without=["random"]).pruner.tolist() == ["l1"]


def test_the_projects_claims_are_well_formed() -> None:
    found = load_claims()
    assert len({claim["id"] for claim in found}) == len(found) >= 6
    for claim in found:
        assert set(claim) <= {"id", "source", "statement", "comparisons", "studies", "notebook", "without"}
        assert ("comparisons" in claim) != ("notebook" in claim)
        for test in claim.get("comparisons", ()):
            assert test["measure"] in claims._MEASURES
            assert set(claim.get("without", ())) <= set(PRUNERS)
            assert test["measure"].startswith("drift") or {"of", "against"} <= set(test)


def test_every_system_is_judged_alike() -> None:
    clear, noisy = Interval(0.05, 0.04, 0.06, 5, 0.01), Interval(0.05, -0.04, 0.14, 5, 0.1)
    barely = Interval(0.05, 0.001, 0.099, 5, 0.04)
    found = judged(
        [
            Comparison("snacs-4", "clear", clear, margin=0.005),
            Comparison("snacs-4", "barely", barely, sparsity=0.8),
            Comparison("snacs-4", "noisy", noisy, smallest=0.05),
            Comparison("ftwt-2", "alone", barely),
            Comparison("snacs-2", "a fact", Interval(1.0, 1.0, 1.0, 1, 0.0), word="supported"),
        ]
    ).set_index("measure")
    words = found.verdict.str.split(" ").str[0]
    assert list(words) == ["supported", "inconclusive", "inconclusive", "supported", "supported"]
    assert found.p_holm["barely"] == pytest.approx(2 * found.p["barely"])  # the second of three comparisons
    assert found.p_holm["alone"] == found.p["alone"]  # another claim, not adjusted for this one
    assert found.statement["alone"].startswith("Dynamic masks") and found.sparsity["barely"] == 0.8
    with pytest.raises(KeyError, match="snacs-9"):
        judged([Comparison("snacs-9", "", clear)])


def test_claims_that_a_study_does_not_test_name_those_that_do(tmp_path: Path) -> None:
    rows = {"one": [("gcnet-1", "supported")], "two": [("gcnet-1", "contradicted"), ("ftwt-1", "supported")]}
    for study, verdicts in rows.items():
        (tmp_path / study / "tables").mkdir(parents=True)
        facts = [dict.fromkeys(claims.COLUMNS) | {"claim": c, "statement": c, "verdict": v} for c, v in verdicts]
        pd.DataFrame(facts).to_csv(tmp_path / study / "tables" / "claims.csv", index=False)
    assert claims.every_verdict(tmp_path / "one").verdict.tolist() == ["supported"]
    found = claims.every_verdict(tmp_path / "one", untested=True).set_index("claim").verdict
    assert list(found.index) == [claim["id"] for claim in claims.load_claims()]
    assert found["gcnet-1"] == "supported" and found["ftwt-1"] == "not tested here; two: supported"
    assert found["snacs-1"] == "not tested here"
