"""Accuracy, calibration and corruption error of a network under shift; statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.special import nctdtr, ndtri, stdtr, stdtrit
from scipy.stats import rankdata
from torch import Tensor, nn

from gcnet.cost import evaluation_mode
from gcnet.data import Dataset
from gcnet.shifts import CORRUPTIONS, corrupt
from gcnet.training import autocast


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 250, precision: str = "auto") -> Tensor:
    """Logits (N, classes) float32 on the CPU; images (N, C, H, W) as the model takes them, on any device.

    The model's mode is restored.
    """
    device = next(model.parameters()).device
    with evaluation_mode(model), autocast(device, precision):
        return torch.cat([model(part.to(device)).float().cpu() for part in images.split(batch_size)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's, in [0, 1]."""
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error, in [0, 1]: |accuracy - confidence| averaged over equal-width confidence bins.

    Source: Guo et al., arXiv 1706.04599 (15 bins).
    """
    confidence, guess = logits.double().softmax(1).max(1)
    hit = (guess == labels.to(logits.device)).double()
    number = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, number, hit - confidence)
    return (gap.abs().sum() / len(labels)).item()


def score(model: nn.Module, data: Dataset, *, precision: str = "auto") -> dict[str, float]:
    """{"accuracy", "ece", "images"} of a model that takes the data's uint8 images."""
    logits = predict(model, data.images, precision=precision)
    return {
        "accuracy": accuracy(logits, data.labels),
        "ece": calibration_error(logits, data.labels),
        "images": len(data),
    }


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    shifts: Iterable[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    seed: int = 0,
    table: str = "cifar-c",
    precision: str = "auto",
) -> pd.DataFrame:
    """Clean and corrupted accuracy, one row per shift and severity: shift, severity, accuracy, ece, images.

    model takes uint8 (N, C, H, W) (put `gcnet.training.Normalize` before one that does not). Severity 0 is the clean
    set. Corruptions are the same for every model: they depend on the image's position, the name, severity and seed.
    """
    rows = [{"shift": "clean", "severity": 0, **score(model, dataset, precision=precision)}]
    for name in shifts:
        for severity in severities:
            images = corrupt(dataset.images, name, severity, seed, table=table)
            shifted = Dataset(dataset.name, images, dataset.labels, dataset.classes)
            rows.append({"shift": name, "severity": severity, **score(model, shifted, precision=precision)})
    return pd.DataFrame(rows)


def mean_corruption_error(rows: pd.DataFrame, reference: pd.DataFrame) -> float:
    """Mean over corruptions of (summed error / the reference network's summed error); 1 is as bad as the reference.

    rows, reference: as `evaluate` returns them, the same shifts and severities; natural shifts do not count.
    Raises ValueError when the shifts differ. Source: Hendrycks and Dietterich, arXiv 1903.12261, with the dense
    network as reference (choice).
    """
    rows, reference = (f[f["shift"].isin(CORRUPTIONS)] for f in (rows, reference))
    own = (1 - rows[rows.severity > 0].set_index(["shift", "severity"]).accuracy).sort_index()
    base = (1 - reference[reference.severity > 0].set_index(["shift", "severity"]).accuracy).sort_index()
    if not own.index.equals(base.index):
        raise ValueError("corruption errors need the same shifts and severities of both networks")
    own, base = own.groupby("shift").sum(), base.groupby("shift").sum()
    return float((own / base.clip(lower=1e-12)).mean())


# --- statistics over seeds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; n seeds; spread = standard deviation of the seeds' means."""

    estimate: float
    low: float
    high: float
    n: int
    spread: float


def bootstrap(values: np.ndarray, *, level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """Hierarchical bootstrap of a mean: seeds are drawn outside, shifts inside.

    values: (seeds, shifts), paired differences or plain measures. Every seed meets the same shifts, so one draw of them
    goes for all seeds of a draw: the interval speaks of other seeds and of other shifts like these. Percentiles are
    taken further out so that few seeds give an interval of honest width (Hesterberg 2015, "expanded percentile"): the
    plain bootstrap of n seeds is too narrow by sqrt((n - 1) / n) and ignores that the spread is estimated. With one
    seed the interval is (-inf, inf): nothing is known of other seeds. Choice.
    """
    values = np.asarray(values, dtype=float)
    values = values[:, None] if values.ndim == 1 else values
    n, shifts = values.shape
    if n < 2:
        return Interval(float(values.mean()), -math.inf, math.inf, n, math.nan)
    rows, columns = _drawn(n, shifts, draws, seed)
    means = values[rows, 0].mean(1) if shifts == 1 else values[rows[:, :, None], columns[:, None]].mean((1, 2))
    return _expanded(values.mean(1), means, level)


def bootstrap_ranks(x: np.ndarray, y: np.ndarray, *, level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """Spearman's correlation of x and y over shifts, averaged over seeds, with an interval as of `bootstrap`.

    x, y: (seeds, shifts). Seeds and shifts are both drawn, so few shifts make a wide interval however many seeds there
    are. A seed or draw whose values are all equal counts as 0. Raises ValueError for fewer than 3 shifts.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n, shifts = x.shape
    if shifts < 3:
        raise ValueError(f"a rank correlation over shifts needs at least 3 of them, got {shifts}")

    def ranked(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (rankdata(v, axis=-1) for v in (a, b))
        a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
        return (a * b).sum(-1) / np.maximum(np.sqrt((a * a).sum(-1) * (b * b).sum(-1)), 1e-12)

    of_seed = ranked(x, y)
    if n < 2:
        return Interval(float(of_seed.mean()), -math.inf, math.inf, n, math.nan)
    rows, columns = _drawn(n, shifts, draws, seed)
    chosen = rows[:, :, None], columns[:, None]
    return _expanded(of_seed, ranked(x[chosen], y[chosen]).mean(1), level)


def _drawn(n: int, shifts: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of seeds (draws, n) and of shifts (draws, shifts)."""
    rng = np.random.default_rng(seed)
    return rng.integers(n, size=(draws, n)), rng.integers(shifts, size=(draws, shifts))


def _expanded(of_seed: np.ndarray, drawn: np.ndarray, level: float) -> Interval:
    """The interval of what was drawn around the mean over seeds, wider for few seeds."""
    n, estimate, tail = len(of_seed), float(of_seed.mean()), (1 - level) / 2
    # How much wider a t interval is than a normal one with the plug-in spread that the bootstrap uses.
    widen = stdtrit(n - 1, 1 - tail) / ndtri(1 - tail) * math.sqrt(n / (n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    spread = float(of_seed.std(ddof=1))
    return Interval(estimate, estimate - widen * (estimate - low), estimate + widen * (high - estimate), n, spread)


def by_shift(values: pd.DataFrame) -> np.ndarray:
    """(seeds, shifts), what `bootstrap` takes, of a frame of seeds down and settings and shifts across.

    Pruners, hybrids, r and severities are the study's own settings, not a sample of anything: they are averaged first,
    so that only seeds and shifts make the interval, and each shift counts once. Without a column level `shift` one
    column is left. Choice.
    """
    if "shift" in values.columns.names:
        return values.T.groupby(level="shift", sort=False).mean().T.to_numpy()
    return values.mean(axis=1).to_numpy()[:, None]


def each_shift_once(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table of shifts without the clean ones, accuracy and ece averaged over severities.

    So that each shift counts once, natural ones as much as corruptions, as in the claims.
    """
    keys = [name for name in rows if name not in ("severity", "accuracy", "ece", "images")]
    measures = [name for name in ("accuracy", "ece") if name in rows]
    shifted = rows[rows.severity > 0]
    return shifted.groupby(keys, sort=False, observed=True, dropna=False)[measures].mean().reset_index()


def paired_differences(
    rows: pd.DataFrame, chosen: dict[str, object], against: dict[str, object], value: str = "accuracy"
) -> pd.DataFrame:
    """Differences `chosen` - `against` at the same pruner, sparsity, seed, shift and severity.

    rows: as in shift_accuracy.csv. chosen, against: column -> value or list of values, e.g. {"hybrid": "B25"}. Returns
    a frame of one row per (pruner, sparsity, seed) and one column per (shift, severity). Where `against` names a
    pruner, the two sides need not have the same one and the index says the chosen one's.
    """

    def part(where: dict[str, object]) -> pd.DataFrame:
        found = rows
        for column, wanted in where.items():
            found = found[found[column].isin(wanted if isinstance(wanted, (list, tuple)) else [wanted])]
        index = ["pruner", "sparsity", "seed"]
        return found.pivot_table(index=index, columns=["shift", "severity"], values=value, aggfunc="mean")

    left, right = part(chosen), part(against)
    if "pruner" in against:
        if left.empty or right.empty:
            return left.iloc[:0]
        alone = right.droplevel("pruner")
        right = pd.concat(dict.fromkeys(left.index.unique("pruner"), alone), names=["pruner"])
    return (left - right).dropna(how="all").dropna(axis=1, how="any")


def p_value(interval: Interval, margin: float = 0.0) -> float:
    """Two-sided p of "the difference is -margin": below 0.05 exactly where the 95 % interval leaves -margin out.

    The interval's arm towards -margin is read as that of a t interval over the seeds. 1 with a single seed, and where
    two seeds agree to the last image, which says little.
    """
    distance = interval.estimate + margin
    arm = interval.estimate - interval.low if distance > 0 else interval.high - interval.estimate
    if interval.n < 2 or distance == 0 or (arm == 0 and interval.n < 3):
        return 1.0
    if arm == 0:
        return 0.0
    freedom = interval.n - 1
    return float(2 * stdtr(freedom, -abs(distance) / arm * stdtrit(freedom, 0.975)))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values adjusted for how many there are, step down (Holm 1979): each <= 0.05 holds at 5 % for the family."""
    p = np.asarray(p_values, dtype=float)
    order, factor = np.argsort(p, kind="stable"), holm_factors(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate((p * factor)[order]), 1)
    return adjusted


def holm_factors(p_values: Sequence[float]) -> np.ndarray:
    """What Holm multiplies each p with: how many comparisons are left when its turn comes, the smallest p first."""
    p = np.asarray(p_values, dtype=float)
    factor = np.empty(len(p))
    factor[np.argsort(p, kind="stable")] = np.arange(len(p), 0, -1)
    return factor


MOST_SEEDS = 100  # beyond it the number of seeds that would tell is not named


def seeds_needed(
    interval: Interval, smallest: float, margin: float = 0.0, *, power: float = 0.8, comparisons: float = 1
) -> int:
    """How many seeds a t test needs to tell such a difference from -margin, were it the true one, with its spread.

    smallest: a smaller difference is planned for as if it were this one. power: how often so many seeds would tell it.
    comparisons: the test is at 5 % divided by it, see `holm_factors`. More than there are, `MOST_SEEDS` + 1 where that
    many do not do. Takes the spread over at least two seeds. Choice.
    """
    size = max(abs(interval.estimate + margin), smallest)
    if interval.spread == 0:
        return interval.n + 1
    n = np.arange(interval.n + 1, MOST_SEEDS + 1)
    found = 1 - nctdtr(n - 1, size * np.sqrt(n) / interval.spread, stdtrit(n - 1, 1 - 0.025 / comparisons))
    enough = n[~(found < power)]  # a power that is not a number is that of a difference too large to compute one
    return int(enough[0]) if len(enough) else max(MOST_SEEDS, interval.n) + 1


def verdict(
    interval: Interval, *, margin: float = 0.0, smallest: float = 0.002, p: float = 0.0, comparisons: float = 1
) -> str:
    """'supported', 'contradicted' or 'inconclusive (...)' for the statement "the difference is above -margin".

    margin: 0 for "better than"; a tolerated loss for "at least as good as". smallest: a difference that would matter,
    for the number of seeds that an inconclusive verdict names. All in the unit of the interval. p: the p value adjusted
    for the other comparisons of the table; above 0.05 the verdict is inconclusive wherever the interval lies.
    comparisons: see `seeds_needed`.
    """
    if interval.low > -margin and p <= 0.05:
        return "supported"
    if interval.high < -margin and p <= 0.05:
        return "contradicted"
    if interval.n < 2:
        return "inconclusive (one seed)"
    needed = seeds_needed(interval, smallest, margin, comparisons=comparisons)
    count = f"about {needed}" if needed <= MOST_SEEDS else f"over {MOST_SEEDS}"
    why = "n too small" if interval.low <= -margin <= interval.high else "n too small for so many comparisons"
    return f"inconclusive ({why}: would need {count} seeds)"
