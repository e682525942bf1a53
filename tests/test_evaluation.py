"""Accuracy, calibration and corruption error by hand; a network is left in the mode it came in."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gcnet.data import Dataset
from gcnet.evaluation import (
    Interval,
    accuracy,
    bootstrap,
    bootstrap_ranks,
    by_shift,
    calibration_error,
    evaluate,
    holm,
    mean_corruption_error,
    p_value,
    paired_differences,
    predict,
    score,
    seeds_needed,
    verdict,
)
from gcnet.shifts import corrupt


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 5.0], [4.0, 0.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 1, 0, 0])) == 0.75


def test_calibration_error_by_hand() -> None:
    """Two bins: sure of 0.9, 0.8, 0.7 and right twice; sure of 0.4 (of three classes) and wrong."""
    logits = logits_of([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.4, 0.3, 0.3]])
    labels = torch.tensor([0, 1, 1, 2])
    expected = 3 / 4 * abs(2 / 3 - 0.8) + 1 / 4 * abs(0 - 0.4)
    assert calibration_error(logits, labels, bins=2) == pytest.approx(expected)
    expected = 1 / 4 * (abs(1 - 0.9) + abs(1 - 0.8) + abs(0 - 0.7) + abs(0 - 0.4))  # every image has its own bin
    assert calibration_error(logits, labels, bins=100) == pytest.approx(expected)


def test_errors_of_a_bin_cancel_but_not_those_of_two() -> None:
    logits, labels = logits_of([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1])
    assert calibration_error(logits, labels) == pytest.approx(0, abs=1e-12)
    assert calibration_error(logits_of([[0.75, 0.25]] * 3 + [[0.99, 0.01]]), labels) == pytest.approx(
        3 / 4 * 0.25 + 1 / 4 * 0.99
    )


def test_certain_and_right_is_calibrated() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert calibration_error(logits, torch.tensor([0, 1])) == pytest.approx(0)
    assert calibration_error(logits, torch.tensor([1, 0])) == pytest.approx(1)


@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 20), st.integers(0, 999))
def test_calibration_error_against_a_loop(count: int, classes: int, bins: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (count,), generator=generator)
    sure, guess = (v.numpy() for v in logits.softmax(1).max(1))
    expected = 0.0
    for b in range(bins):
        inside = (sure >= b / bins) & (sure < (b + 1) / bins)
        if inside.any():
            expected += inside.mean() * abs((guess == labels.numpy())[inside].mean() - sure[inside].mean())
    assert calibration_error(logits, labels, bins) == pytest.approx(expected, abs=1e-9)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    return nn.Sequential(Brightness(), *model, nn.Linear(144, 3))


class Brightness(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 255


def data(count: int = 20) -> Dataset:
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Dataset("noise", images, torch.arange(count) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("fails", [False, True])
def test_the_mode_is_restored(fails: bool) -> None:
    model = net().train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            predict(model, torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    else:
        predict(model, data().images)
    assert [m.training for m in model] == [True, True, False, True, True, True, True] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_predictions_are_those_of_the_network_in_eval_mode() -> None:
    model, images = net().train(), data().images
    found = predict(model, images, batch_size=7, precision="float32")
    assert found.dtype == torch.float32 and found.shape == (20, 3) and not found.requires_grad
    with torch.no_grad():
        assert torch.allclose(found, model.eval()(images), atol=1e-6)
    assert torch.allclose(found, predict(model, images, batch_size=1, precision="float32"), atol=1e-6)


def test_scores() -> None:
    model, noise = net(), data()
    logits = predict(model, noise.images, precision="float32")
    assert score(model, noise, precision="float32") == {
        "accuracy": accuracy(logits, noise.labels), "ece": calibration_error(logits, noise.labels), "images": 20
    }  # fmt: skip


def test_a_network_is_evaluated_clean_and_under_each_shift() -> None:
    model, noise = net(), data()
    table = evaluate(model, noise, ("fog", "contrast"), (1, 5), seed=3, precision="float32")
    assert list(table.columns[:4]) == ["shift", "severity", "accuracy", "ece"]
    assert list(zip(table["shift"], table["severity"], strict=True)) == [
        ("clean", 0), ("fog", 1), ("fog", 5), ("contrast", 1), ("contrast", 5)
    ]  # fmt: skip
    for row in table.itertuples():
        images = noise.images if row.shift == "clean" else corrupt(noise.images, row.shift, row.severity, 3)
        logits = predict(model, images, precision="float32")
        assert row.accuracy == accuracy(logits, noise.labels)
        assert row.ece == pytest.approx(calibration_error(logits, noise.labels))
    assert table.equals(evaluate(model, noise, ("fog", "contrast"), (1, 5), seed=3, precision="float32"))


def test_an_unknown_shift_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown corruption 'fogg'; did you mean 'fog'\?"):
        evaluate(net(), data(), ("fogg",), (1,))


def rows(values: dict[tuple[str, int], float]) -> pd.DataFrame:
    return pd.DataFrame([{"shift": s, "severity": k, "accuracy": a} for (s, k), a in values.items()])


DENSE = {("clean", 0): 0.95, ("fog", 1): 0.9, ("fog", 5): 0.5, ("snow", 1): 0.8, ("snow", 5): 0.6}


def test_mean_corruption_error_by_hand() -> None:
    pruned = {("clean", 0): 0.1, ("snow", 5): 0.4, ("snow", 1): 0.5, ("fog", 1): 0.9, ("fog", 5): 0.2}
    expected = ((0.1 + 0.8) / (0.1 + 0.5) + (0.5 + 0.6) / (0.2 + 0.4)) / 2
    assert mean_corruption_error(rows(pruned), rows(DENSE)) == pytest.approx(expected)
    assert mean_corruption_error(rows(DENSE), rows(DENSE)) == pytest.approx(1)


def test_corruption_errors_of_other_shifts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="the same shifts and severities"):
        mean_corruption_error(rows({k: v for k, v in DENSE.items() if k != ("fog", 5)}), rows(DENSE))
    assert not math.isnan(mean_corruption_error(rows(DENSE), rows(dict.fromkeys(DENSE, 1.0))))


# --- statistics over seeds ------------------------------------------------------------------------------------------


def test_the_estimate_is_the_mean_and_the_spread_that_of_the_seeds() -> None:
    values = np.array([[0.1, 0.3], [0.2, 0.2], [0.5, 0.7]])
    found = bootstrap(values)
    assert found.estimate == pytest.approx(2 / 6) and found.n == 3
    assert found.spread == pytest.approx(np.std([0.2, 0.2, 0.6], ddof=1))
    assert found.low < found.estimate < found.high
    assert bootstrap(values) == found


def test_of_one_seed_nothing_is_known() -> None:
    found = bootstrap(np.array([[0.1, 0.2, 0.3]]))
    assert (found.estimate, found.low, found.high, found.n) == (pytest.approx(0.2), -math.inf, math.inf, 1)


def test_equal_seeds_leave_no_doubt() -> None:
    found = bootstrap(np.full(4, 0.25))
    assert (found.low, found.high, found.spread) == (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0))


@pytest.mark.parametrize("n", [5, 20])
def test_the_interval_is_about_that_of_student(n: int) -> None:
    ratios = []
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=n)
        found = bootstrap(values, draws=2000)
        low, high = scipy.stats.t.interval(0.95, n - 1, values.mean(), values.std(ddof=1) / math.sqrt(n))
        ratios.append((found.high - found.low) / (high - low))
    assert np.mean(ratios) == pytest.approx(1, abs=0.12)


def test_the_interval_of_a_few_seeds_covers_the_truth() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = 0.3 + rng.normal(size=(4, 1)) + 0.5 * rng.normal(size=(4, 6))
        found = bootstrap(values, draws=400)
        hits += found.low <= 0.3 <= found.high
    assert 0.88 <= hits / 200 <= 1.0


def test_the_interval_covers_other_shifts_that_all_seeds_would_meet() -> None:
    """A shift that is hard for one seed is hard for all: drawing shifts apart for each seed would hide that."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = 0.3 + 0.2 * rng.normal(size=(5, 1)) + rng.normal(size=(1, 15)) + 0.2 * rng.normal(size=(5, 15))
        found = bootstrap(values, draws=400)
        hits += found.low <= 0.3 <= found.high
    assert hits / 200 >= 0.93


def test_the_interval_of_a_rank_correlation_is_that_of_few_shifts_however_many_seeds() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1, 15)) + 0.1 * rng.normal(size=(2, 30, 15))
    found = bootstrap_ranks(x, y)
    assert found.estimate == pytest.approx(
        np.mean([scipy.stats.spearmanr(*pair).statistic for pair in zip(x, y, strict=True)])
    )
    assert found.n == 30 and 0.7 < found.high - found.low < 1.4  # Fisher: 1.0 for 15 shifts
    assert bootstrap_ranks(x, x).estimate == pytest.approx(1) and bootstrap_ranks(x, np.ones((30, 15))).estimate == 0
    assert bootstrap_ranks(x[:1], y[:1]).low == -math.inf
    with pytest.raises(ValueError, match="at least 3 of them, got 2"):
        bootstrap_ranks(x[:, :2], y[:, :2])


def shift_table(values: dict[tuple[str, int, str, int], float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"pruner": "l1", "sparsity": 0.8, "hybrid": h, "seed": s, "shift": name, "severity": k, "accuracy": a}
            for (h, s, name, k), a in values.items()
        ]
    )


def test_differences_are_paired() -> None:
    table = shift_table(
        {
            ("B25", 0, "fog", 1): 0.9, ("B25", 0, "fog", 5): 0.5, ("B25", 1, "fog", 1): 0.8, ("B25", 1, "fog", 5): 0.4,
            ("direct", 1, "fog", 5): 0.1, ("direct", 1, "fog", 1): 0.7, ("direct", 0, "fog", 1): 0.6,
            ("direct", 0, "fog", 5): 0.3, ("BH", 0, "fog", 1): 0.0,
        }
    )  # fmt: skip
    found = paired_differences(table, {"hybrid": "B25"}, {"hybrid": "direct"})
    assert found.shape == (2, 2)
    assert found.loc[("l1", 0.8, 0)].tolist() == pytest.approx([0.3, 0.2])
    assert found.loc[("l1", 0.8, 1)].tolist() == pytest.approx([0.1, 0.3])


def test_what_has_no_partner_is_left_out() -> None:
    table = shift_table({("B25", 0, "fog", 1): 0.9, ("direct", 0, "fog", 1): 0.6, ("B25", 1, "fog", 1): 0.1})
    found = paired_differences(table, {"hybrid": ["B25"]}, {"hybrid": "direct"})
    assert found.to_numpy().tolist() == [[pytest.approx(0.3)]]


@pytest.mark.parametrize(
    ("low", "high", "margin", "word"),
    [
        (0.01, 0.03, 0.0, "supported"), (-0.01, 0.03, 0.0, "inconclusive"), (-0.03, -0.01, 0.0, "contradicted"),
        (-0.01, 0.03, 0.02, "supported"), (-0.03, 0.03, 0.02, "inconclusive"), (-0.05, -0.03, 0.02, "contradicted"),
        (-math.inf, math.inf, 0.0, "inconclusive"),
    ],
)  # fmt: skip
def test_verdicts(low: float, high: float, margin: float, word: str) -> None:
    n, spread = (1, math.nan) if math.isinf(low) else (3, 0.01)
    estimate = 0.0 if math.isinf(low) else (low + high) / 2
    assert verdict(Interval(estimate, low, high, n, spread), margin=margin).startswith(word)


@pytest.mark.parametrize(("difference", "comparisons", "needed"), [(1.0, 1, 10), (1.0, 12, 18), (2.0, 1, 5)])
def test_seeds_that_would_be_needed_have_that_power(difference: float, comparisons: int, needed: int) -> None:
    assert seeds_needed(Interval(difference, -9, 9, 2, 1.0), 0.002, comparisons=comparisons) == needed
    rng = np.random.default_rng(0)
    p = scipy.stats.ttest_1samp(rng.normal(difference, 1, (4000, needed)), 0, axis=1).pvalue
    assert 0.78 < (p < 0.05 / comparisons).mean() < 0.93
    fewer = scipy.stats.ttest_1samp(rng.normal(difference, 1, (4000, needed - 1)), 0, axis=1).pvalue
    assert (fewer < 0.05 / comparisons).mean() < 0.82


def test_seeds_that_would_be_needed_are_more_than_there_are() -> None:
    assert seeds_needed(Interval(1.0, -1, 1, 6, 0.01), 0.01) == 7
    assert seeds_needed(Interval(0.0, -1, 1, 6, 0.0), 0.01) == 7
    assert seeds_needed(Interval(0.0, -1, 1, 3, 0.01), 0.01) == seeds_needed(Interval(0.01, -1, 1, 3, 0.01), 0.001)
    assert verdict(Interval(0.0, -1, 1, 3, 0.01)) == "inconclusive (n too small: would need over 100 seeds)"
    assert verdict(bootstrap(np.array([0.1]))) == "inconclusive (one seed)"


def test_shift_values_are_numbers_that_numpy_agrees_with() -> None:
    logits, labels = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
    assert accuracy(logits, labels) == np.mean(logits.numpy().argmax(1) == labels.numpy())


# --- p values and many comparisons ---


@pytest.mark.parametrize(("low", "high", "margin"), [(0.01, 0.05, 0.0), (-0.004, 0.02, 0.005), (-0.05, -0.01, 0.0)])
def test_p_is_below_five_percent_where_the_interval_leaves_the_margin_out(
    low: float, high: float, margin: float
) -> None:
    assert p_value(Interval((low + high) / 2, low, high, 4, 0.01), margin) < 0.05


@pytest.mark.parametrize(("low", "high", "margin"), [(-0.01, 0.05, 0.0), (-0.006, 0.02, 0.005), (-0.05, 0.0001, 0.0)])
def test_p_is_above_five_percent_where_it_does_not(low: float, high: float, margin: float) -> None:
    assert p_value(Interval((low + high) / 2, low, high, 4, 0.01), margin) > 0.05


def test_p_of_a_t_interval_is_that_of_the_t_test() -> None:
    values = np.array([0.01, 0.03, 0.02, 0.05])
    theirs = scipy.stats.ttest_1samp(values, 0)
    low, high = theirs.confidence_interval()
    assert p_value(Interval(values.mean(), low, high, 4, 0.0)) == pytest.approx(theirs.pvalue)


def test_p_with_one_seed_or_no_spread() -> None:
    assert p_value(bootstrap(np.array([0.3]))) == 1.0
    assert p_value(Interval(0.2, 0.2, 0.2, 3, 0.0)) == 0.0
    assert p_value(Interval(0.2, 0.2, 0.2, 2, 0.0)) == 1.0  # two seeds that agree say little of a third
    assert p_value(Interval(-0.1, -0.2, 0.0, 3, 0.1), margin=0.1) == 1.0


def test_holm_by_hand() -> None:
    # sorted: .005 x 4, .01 x 3, .03 x 2, .04 x 1 -> never falling
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


def test_only_seeds_and_shifts_are_a_sample() -> None:
    columns = pd.MultiIndex.from_product(
        [["l1", "lamp"], ["fog", "snow"], [1, 5]], names=["pruner", "shift", "severity"]
    )
    values = pd.DataFrame([range(8), range(8, 16)], columns=columns)
    assert by_shift(values).tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert by_shift(values.droplevel("shift", axis=1)).tolist() == [[3.5], [11.5]]


def test_a_verdict_goes_by_the_adjusted_p() -> None:
    clear = Interval(0.03, 0.01, 0.05, 4, 0.01)
    assert verdict(clear, p=0.04) == "supported"
    few, many = (verdict(clear, p=0.06, comparisons=count) for count in (1, 1e6))
    assert few == "inconclusive (n too small for so many comparisons: would need about 5 seeds)"
    assert many.startswith("inconclusive (n too small for so many comparisons: would need about 1")


def test_seeds_needed_count_the_distance_to_the_margin() -> None:
    interval = Interval(-0.004, -0.02, 0.012, 3, 0.01)
    assert seeds_needed(interval, 0.0001, margin=0.005) > seeds_needed(interval, 0.0001)


def test_differences_between_two_pruners() -> None:
    def row(pruner: str, hybrid: str, seed: int, accuracy: float) -> dict[str, object]:
        return {"pruner": pruner, "hybrid": hybrid, "similarity": "none", "sparsity": 0.5, "seed": seed,
                "shift": "fog", "severity": 1, "accuracy": accuracy}  # fmt: skip

    rows = pd.DataFrame(
        [row("l1", "Mix50", 0, 0.7), row("l1", "Mix50", 1, 0.8), row("lamp", "direct", 0, 0.6),
         row("lamp", "direct", 1, 0.9), row("l1", "direct", 0, 0.1)]
    )  # fmt: skip
    found = paired_differences(rows, {"pruner": "l1", "hybrid": "Mix50"}, {"pruner": "lamp", "hybrid": "direct"})
    assert found["fog", 1].tolist() == pytest.approx([0.1, -0.1])
    assert found.index.names == ["pruner", "sparsity", "seed"]
    assert paired_differences(rows, {"pruner": "random"}, {"pruner": "lamp"}).empty
