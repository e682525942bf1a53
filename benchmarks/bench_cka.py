"""The CKA-SR penalty: its share of a training step, against recomputing Grams pair by pair, and what it keeps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet import networks
from gcnet.cka import CKASparsityRegularizer
from gcnet.training import autocast

BATCH = 128
Step = Callable[[], None]


def network(device: torch.device) -> nn.Module:
    return networks.build("resnet20", 10, seed=0).to(device, memory_format=torch.channels_last).train()


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images: speed and memory do not depend on what they show."""
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return images.to(device, memory_format=torch.channels_last), (torch.arange(BATCH) % 10).to(device)


def seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turn(steps: list[Step], repeats: int) -> list[float]:
    """Median seconds of each, run in turn so that a slow spell of the machine hits them all."""
    spent = [[seconds(step) for step in steps] for _ in range(repeats + 2)][2:]
    return [statistics.median(column) for column in zip(*spent, strict=True)]


def training_steps(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A step without the penalty, with 8 samples, with the whole batch, and with a forward pass of its own."""
    model, (images, labels) = network(device), batch(device)
    few = CKASparsityRegularizer(model, images[:1], samples=8, every=1)
    whole = CKASparsityRegularizer(model, images[:1], samples=None, every=1)
    few.beta = whole.beta = 0.0  # one model, so what is not timed is switched off

    def step(penalty: CKASparsityRegularizer | None = None, separately: bool = False) -> None:
        model.zero_grad(set_to_none=True)
        with autocast(device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        if penalty is not None:
            if separately:
                penalty.beta = 1e-4
                model(images[:8])
            loss = loss + penalty()
        loss.backward()

    def acting(penalty: CKASparsityRegularizer, separately: bool = False) -> Step:
        def run() -> None:
            penalty.beta = 0.0 if separately else 1e-4
            step(penalty, separately)
            penalty.beta = 0.0

        return run

    plain, at_8, at_all, apart = in_turn([step, acting(few), acting(whole), acting(few, True)], repeats)
    name = f"ResNet-20, batch {BATCH}, {torch.get_num_threads()} threads, {device}"
    every_5th = plain + (at_8 - plain) / 5
    separate = plain + (apart - plain) / 5
    return [
        _row(f"{name}: 8 samples, every 5th batch", every_5th, "step without", plain, every_5th / plain,
             "at most 1.05"),
        _row(f"{name}: whole batch, every batch", at_all, "step without", plain, at_all / plain, "at most 1.3"),
        _row(f"{name}: 8 samples, every 5th batch", every_5th, "a forward pass of the samples in float32", separate,
             separate / every_5th, ""),
    ]  # fmt: skip


def block_outputs(model: nn.Module, names: tuple[str, ...], images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, i, out, n=n: found.update({n: out.detach()}))
        for n in names
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def pair_by_pair(features: dict[str, Tensor], stages: tuple[tuple[str, ...], ...]) -> Tensor:
    """What a plain implementation does: both Gram matrices of every ordered pair, in float64, HSIC_1 as written."""

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = len(k)
        off = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
        k, m = k * off, m * off
        inner = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(1))
        return inner / (n * (n - 3))

    total = torch.zeros((), dtype=torch.float64)
    for stage in stages:
        for first in stage:
            for second in stage:
                if first != second:
                    x, y = (features[name].double().flatten(1) for name in (first, second))
                    k, m = x @ x.T, y @ y.T
                    total = total.to(k.device) + hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    return total


def against_pairs(device: torch.device, repeats: int) -> dict[str, Any]:
    """The penalty alone, forward and backward, on the block outputs of a batch."""
    model, (images, _) = network(device), batch(device)
    penalty = CKASparsityRegularizer(model, images[:1], beta=1.0, samples=None, every=1)
    penalty.remove()
    fixed = block_outputs(model, penalty.names, images)
    collectors = {name: penalty._collector(name) for name in penalty.names}
    values: dict[str, float] = {}

    def leaves() -> dict[str, Tensor]:
        return {name: value.clone().requires_grad_() for name, value in fixed.items()}

    ours_in, theirs_in = leaves(), leaves()

    def ours() -> None:
        for name, collect in collectors.items():
            collect(model.get_submodule(name), (), ours_in[name])
        value = penalty()
        value.backward()
        values["ours"] = value.item()

    def theirs() -> None:
        value = pair_by_pair(theirs_in, penalty.stages)
        value.backward()
        values["theirs"] = value.item()

    fast, slow = in_turn([ours, theirs], repeats)
    if abs(values["ours"] - values["theirs"]) > 1e-3 * abs(values["theirs"]):
        raise AssertionError(f"the two do not compute the same: {values}")
    return _row(f"penalty of ResNet-20, {BATCH} samples", fast, "both Grams of each pair, float64", slow, slow / fast,
                "at least 5")  # fmt: skip


def kept_bytes(model: nn.Module, images: Tensor, labels: Tensor, penalty: CKASparsityRegularizer | None) -> int:
    """Bytes that autograd keeps of a forward pass, every storage counted once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), labels)
        if penalty is not None:
            loss = loss + penalty()
    return sum(storages.values())


def memory(device: torch.device) -> dict[str, Any]:
    model, (images, labels) = network(device), batch(device)
    plain = kept_bytes(model, images, labels, None)
    penalty = CKASparsityRegularizer(model, images[:1], samples=None, every=1)
    extra = kept_bytes(model, images, labels, penalty) - plain
    grams = 4 * len(penalty.names) * BATCH**2
    return _row(f"MiB kept for the gradient, {BATCH} samples", extra / 2**20, "one Gram matrix a block", grams / 2**20,
                extra / grams, "at most 6")  # fmt: skip


def _row(case: str, ours: float, peer: str, peer_s: float, ratio: float, target: str) -> dict[str, Any]:
    return {"case": case, "ours_s": ours, "peer": peer, "peer_s": peer_s, "ratio": ratio, "target": target}


def run(quick: bool = False) -> list[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = training_steps(device, 5 if quick else 15)
    return [*rows, against_pairs(device, 1 if quick else 5), memory(device)]
