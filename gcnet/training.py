"""One trainer: data on the device, augmentation in batch, bf16 autocast, masks held, exact resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet.data import Dataset
from gcnet.store import atomic_write

log = logging.getLogger("gcnet")

Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]
Rewire = Callable[[list[tuple[Tensor, Tensor]], torch.optim.Optimizer, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How to train: epochs, SGD with Nesterov momentum, schedule, smoothing, augmentation. lr is the peak."""

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "one_cycle"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop_padding: int = 4
    flip: bool = True


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is the first CUDA device, else Apple's GPU, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probe = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")
        try:
            flags = Path("/proc/cpuinfo").read_text()
        except OSError:
            flags = ""
        return "AVX512" in probe() and ("avx512_bf16" in flags or "amx_bf16" in flags)
    return False


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[Any]:
    """bf16 autocast when asked for, or ('auto') where the hardware has it. Raises ValueError for another word."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision must be auto, float32 or bfloat16, got '{precision}'")
    if precision == "bfloat16" or (precision == "auto" and fast_bfloat16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


class Normalize(nn.Module):
    """uint8 images (N, C, H, W) -> (x / 255 - mean) / std in channels_last; floats are taken as already normalised."""

    def __init__(self, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        mean, std = torch.tensor(tuple(mean)), torch.tensor(tuple(std))
        self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        values = images.to(self.scale.dtype, memory_format=torch.channels_last)
        return values.mul_(self.scale).add_(self.shift)


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop after zero-padding and random horizontal flip, for the whole batch at once, one draw an image.

    images: uint8 (N, C, H, W) on any device; draws come from a CPU generator, so every device sees the same ones.
    """
    n, channels, height, width = images.shape
    if not padding and not flip:
        return images
    draws = torch.randint(0, 1 << 30, (3, n), generator=generator).to(images.device)
    rows = torch.arange(height, device=images.device) + (draws[0] % (2 * padding + 1))[:, None]
    columns = torch.arange(width, device=images.device).expand(n, -1)
    if flip:
        columns = torch.where((draws[2] % 2 == 1)[:, None], width - 1 - columns, columns)
    columns = columns + (draws[1] % (2 * padding + 1))[:, None]
    padded = F.pad(images, (padding,) * 4)
    stride = width + 2 * padding
    index = (rows[:, :, None] * stride + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
    return padded.view(n, channels, -1).gather(2, index).view(n, channels, height, width)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate at a step of `steps`: one-cycle (linear up over 20 %, then down to 0) or step (x0.1 at 1/2 and 3/4).

    Fine-tuning's single epochs use the same shapes. Choice.
    """
    progress = step / max(1, steps)
    if recipe.schedule == "step":
        return recipe.lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if recipe.schedule != "one_cycle":
        raise ValueError(f"schedule must be one_cycle or step, got '{recipe.schedule}'")
    warm = 0.2
    return recipe.lr * (progress / warm if progress < warm else (1 - progress) / (1 - warm)) + 1e-8


def hold(model: nn.Module, masks: Mapping[str, Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    """(parameter, mask) pairs on the model's device. Raises ValueError for masks of another network."""
    parameters = dict(model.named_parameters())
    pairs = []
    for name, mask in (masks or {}).items():
        if name not in parameters or parameters[name].shape != mask.shape:
            have = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(f"mask '{name}' {tuple(mask.shape)} does not fit this network: {have}")
        pairs.append((parameters[name], mask.to(parameters[name].device, torch.bool)))
    return pairs


@torch.no_grad()
def apply_held(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, mask in pairs:
        parameter.mul_(mask)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with Nesterov momentum; no weight decay on biases and BatchNorm (choice)."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
    penalty: Penalty | None = None,
    rewire: Rewire | None = None,
    first_epoch: int = 0,
    device: torch.device | None = None,
    precision: str = "auto",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    before_epoch: Callable[[int], None] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.SGD] | None = None,
) -> list[dict[str, float]]:
    """Train in place; one row an epoch (epoch, loss, accuracy on the augmented training images, seconds).

    model: takes uint8 batches (see `Normalize`) on `device`. masks: {parameter name: bool}, True = kept, held after
    every step. penalty(model, images, labels) is added to the loss. rewire(pairs of weight and mask, optimizer, step,
    steps) is called after every optimizer step and may change the masks in place; `masks`, then a dict, holds the last
    ones on return. first_epoch: how many epochs the weights have behind them; schedule and order go on from there.
    checkpoint: written after every epoch and, if it is there, continued from: the same weights to the last bit as
    without the interruption, on the same machine, moved masks and the state of the penalty included.
    before_epoch: called with the number (from 0) of each epoch that is run. optimizer: makes another one than plain
    SGD; a parameter group with "constant" keeps its learning rate.
    The order and augmentation of every epoch follow from (seed, epoch) alone. Raises FloatingPointError when the
    loss is not finite, ValueError for masks or a checkpoint of another network.
    """
    if not len(data):
        raise ValueError(f"there are no training images in '{data.name}'")
    device = device or next(model.parameters()).device
    pairs = hold(model, masks)
    if rewire is not None:
        pairs = [(parameter, mask.clone()) for parameter, mask in pairs]
    apply_held(pairs)
    sgd = optimizer(model) if optimizer else _optimizer(model, recipe)
    history: list[dict[str, float]] = []
    if checkpoint and checkpoint.exists():
        history = _resume(checkpoint, model, sgd, recipe, seed, pairs, penalty)
    if rewire is not None:  # which reads the gradients after the step: torch's fused loops overwrite them
        for group in sgd.param_groups:
            group["foreach"] = False
    images, labels = data.images.to(device), data.labels.to(device)
    # The last, smaller batch of an epoch is left out (each epoch shuffles anew), unless it is the only one.
    batch_size = min(recipe.batch_size, len(data))
    per_epoch = len(data) // batch_size
    steps = per_epoch * recipe.epochs
    model.train()
    for epoch in range(first_epoch + len(history), recipe.epochs):
        started = time.perf_counter()
        if before_epoch:
            before_epoch(epoch)
        torch.manual_seed((seed << 20) + epoch)  # dropout
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        order = torch.randperm(len(data), generator=generator).to(device)
        total_loss = torch.zeros((), device=device)
        correct = torch.zeros((), device=device, dtype=torch.int64)
        for k in range(per_epoch):
            for group in sgd.param_groups:
                if not group.get("constant"):
                    group["lr"] = learning_rate(recipe, epoch * per_epoch + k, steps)
            chosen = order[k * batch_size : (k + 1) * batch_size]
            x = augment(images[chosen], recipe.crop_padding, recipe.flip, generator)
            y = labels[chosen]
            sgd.zero_grad(set_to_none=True)
            with autocast(device, precision):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
            if penalty is not None:
                loss = loss + penalty(model, x, y)
            loss.backward()
            sgd.step()
            if rewire is not None:
                rewire(pairs, sgd, epoch * per_epoch + k, steps)
            apply_held(pairs)
            total_loss += loss.detach()
            correct += (logits.detach().argmax(1) == y).sum()
        row = {
            "epoch": epoch + 1,
            "loss": total_loss.item() / per_epoch,
            "accuracy": correct.item() / (per_epoch * batch_size),
            "seconds": round(time.perf_counter() - started, 3),
        }
        if not torch.isfinite(total_loss):
            raise FloatingPointError(
                f"the training loss became {row['loss']} in epoch {epoch + 1}; lower lr ({recipe.lr})"
            )
        history.append(row)
        if on_epoch:
            on_epoch(row)
        if checkpoint:
            _save(checkpoint, model, sgd, recipe, seed, history, pairs, penalty)
    if masks:
        for name, (_, mask) in zip(masks, pairs, strict=True):
            masks[name] = mask.to(masks[name].device)
    return history


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, recipe: Recipe, seed: int, history: list,
    held: list[tuple[Tensor, Tensor]], penalty: Penalty | None,
) -> None:  # fmt: skip
    """held: the (weight, mask) pairs; a penalty with a `state_dict` keeps its state too."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "recipe": asdict(recipe),
        "seed": seed,
        "history": history,
        "masks": [mask for _, mask in held],
        "penalty": penalty.state_dict() if hasattr(penalty, "state_dict") else None,
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, recipe: Recipe, seed: int,
    held: list[tuple[Tensor, Tensor]], penalty: Penalty | None,
) -> list[dict[str, float]]:  # fmt: skip
    damaged = f"checkpoint '{path}' is truncated or of another network"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        written_with = {"recipe": state["recipe"], "seed": state["seed"]}
    except Exception as error:
        raise ValueError(f"{damaged}: {error}") from error
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"checkpoint '{path}' was written with another recipe: {written_with}")
    if state["seed"] != seed:
        raise ValueError(f"checkpoint '{path}' was written with seed {state['seed']}, not {seed}")
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for (_, mask), saved in zip(held, state.get("masks", []), strict=True):
            mask.copy_(saved)
        if state.get("penalty") is not None:
            penalty.load_state_dict(state["penalty"])
    except Exception as error:
        raise ValueError(f"{damaged}: {error}") from error
    return state["history"]
