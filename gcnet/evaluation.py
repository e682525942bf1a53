"""Accuracy, calibration and corruption error of a network under shift; statistics over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from gcnet.activations import eval_mode
from gcnet.data import Dataset
from gcnet.shifts import CORRUPTIONS, corrupt
from gcnet.training import autocast


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 250, precision: str = "auto") -> Tensor:
    """Logits (N, classes) float32 on the CPU; images (N, C, H, W) as the model takes them, on any device.

    The model's mode is restored.
    """
    device = next(model.parameters()).device
    with eval_mode(model), autocast(device, precision):
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

    rows, reference: as `evaluate` returns them, the same shifts and severities. Source: Hendrycks and Dietterich,
    arXiv 1903.12261, with the dense network as reference (choice). Raises ValueError when the shifts differ.
    """
    own = (1 - rows[rows.severity > 0].set_index(["shift", "severity"]).accuracy).sort_index()
    base = (1 - reference[reference.severity > 0].set_index(["shift", "severity"]).accuracy).sort_index()
    if not own.index.equals(base.index):
        raise ValueError("corruption errors need the same shifts and severities of both networks")
    own, base = own.groupby("shift").sum(), base.groupby("shift").sum()
    return float((own / base.clip(lower=1e-12)).mean())
