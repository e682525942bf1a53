"""FTWT: a training step with gates against the plain step; real skipping against the dense network, and its parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet import networks
from gcnet.data import Dataset
from gcnet.dynamic import Gated, gate, measure, train_gated
from gcnet.skipping import DynamicInference, dense_layouts, time_ms
from gcnet.training import Normalize, Recipe, train

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

SAVING = 0.6  # share of the MACs that is skipped, for which there is a target
MORE = 0.75
# Shares of filters per layer that CIFAR-10 images want of VGG16-BN (quarter width) at r = 0.8; scaled to the saving.
PROFILE = (0.5, 0.68, 0.69, 0.69, 0.66, 0.65, 0.61, 0.52, 0.53, 0.58, 0.53, 0.53, 0.27)
EVEN = (0.63,) * 13  # the same share everywhere: more weights to move in the wide layers


def training_step(quick: bool) -> dict[str, Any]:
    """Seconds an epoch of a few steps, heads learning all the while, taken in turn with plain training."""
    count = 640 if quick else 1920
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = Dataset("random", pixels, torch.arange(count) % 10, tuple(map(str, range(10))))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = networks.build("vgg16_bn", 10, width=0.25, seed=0).to(device)
    gated = gate(model, torch.zeros(1, 3, 32, 32, device=device), r=0.9)
    plain_net, gated_net = (nn.Sequential(Normalize(MEAN, STD).to(device), net) for net in (model, gated))
    spent: dict[str, list[float]] = {"plain": [], "gated": []}
    for repeat in range(3 if quick else 5):
        for name in ("plain", "gated"):
            started = time.perf_counter() if device == "cuda" else time.process_time()
            if name == "plain":
                train(plain_net, data, Recipe(epochs=1, lr=0.01), seed=repeat)
            else:
                train_gated(gated_net, data, Recipe(epochs=1, lr=0.01), seed=repeat, head_cooldown=0.0)
            ended = time.perf_counter() if device == "cuda" else time.process_time()
            if repeat:
                spent[name].append((ended - started) / (count // 128))
    ours, plain = statistics.median(spent["gated"]), statistics.median(spent["plain"])
    return {
        "case": f"training step, vgg16_bn quarter width, batch 128, {torch.get_num_threads()} threads, {device}",
        "ours_s": ours,
        "peer": "the same step without gates",
        "peer_s": plain,
        "ratio": ours / plain,
        "target": "at most 1.35",
    }


def with_shares(gated: Gated, shares: tuple[float, ...], spread: float = 0.05) -> Gated:
    """Heads that want this share of each layer's filters, another choice for every image (a fitted bias, in place)."""
    generator = torch.Generator().manual_seed(0)
    for block, share in zip(gated.blocks.values(), shares, strict=True):
        filters = block.conv.out_channels
        on = torch.randperm(filters, generator=generator) < round(share * filters)
        block.head.weight.data.normal_(0, spread, generator=generator)
        block.head.bias.data.copy_(torch.where(on, 0.2, -0.2))
    return gated


def with_saving(gated: Gated, shares: tuple[float, ...], images: Tensor, saving: float) -> float:
    """Scale the shares until so much of the MACs is skipped; returns the saving, within a point of it."""
    low, high, saved = 0.3, 2.0, 0.0
    for _ in range(12):
        factor = (low + high) / 2
        with_shares(gated, tuple(min(1.0, factor * share) for share in shares))
        saved = measure(gated, [(images, torch.empty(0))]).reduction
        low, high = (factor, high) if saved > saving else (low, factor)
    if abs(saved - saving) > 0.01:
        raise AssertionError(f"{saved:.1%} of the MACs are saved instead of {saving:.0%}")
    return saved


def skipping(size: int, shares: tuple[float, ...], name: str, quick: bool, saving: float = SAVING) -> dict[str, Any]:
    model = networks.build("vgg16_bn", 10, width=0.25 if quick else 1.0, seed=0).eval()
    images = torch.randn(3 if quick else 25, 3, size, size, generator=torch.Generator().manual_seed(1))
    gated = gate(model, images[:1]).eval()
    saved = with_saving(gated, shares, images, saving)
    dynamic = DynamicInference(gated)
    with torch.no_grad():
        error = (dynamic(images[:3]) - gated(images[:3])).abs().max().item()
    if error > 1e-5:
        raise AssertionError(f"dynamic and masked outputs differ by {error}")
    spent = time_ms({**dense_layouts(model, images[:1]), "dynamic": dynamic}, list(images.split(1)))
    ours = spent.pop("dynamic")
    layout = min(spent, key=lambda key: spent[key])
    return {
        "case": f"vgg16_bn full width, {size} px, batch 1, one thread, {name}, {100 * saved:.0f} % of MACs saved",
        "ours_s": ours / 1000,
        "peer": f"dense, {layout}, BatchNorm folded",
        "peer_s": spent[layout] / 1000,
        "ratio": spent[layout] / ours,
        "target": "at least 1.3" if saving == SAVING else "",
    }


def gathering(inputs: int, outputs: int, size: int, share: float, quick: bool) -> list[dict[str, Any]]:
    """Ways of storing and gathering the weights of one 3 x 3 layer; six layers in turn, so that caches are cold."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, 3, 3, generator=generator) for _ in range(1 if quick else 6)]
    on = torch.randperm(outputs, generator=generator)[: round(share * outputs)].sort().values
    columns = torch.randperm(inputs, generator=generator)[: round(share * inputs)].sort().values
    x = torch.randn(1, inputs, size, size, generator=generator)
    some = x[:, columns].contiguous()
    last = some.contiguous(memory_format=torch.channels_last)
    pairs = [w.view(-1, 9) for w in weights]
    by_input = [w.permute(1, 2, 3, 0).reshape(inputs, -1).contiguous() for w in weights]
    turn = iter(range(10**9))

    def one(stored: list[Tensor]) -> Tensor:
        return stored[next(turn) % len(stored)]

    def twice(x: Tensor) -> Tensor:
        return F.conv2d(x, one(weights).index_select(0, on).index_select(1, columns), padding=1)

    def chunks(_: Tensor) -> Tensor:
        chosen = (on.int()[:, None] * inputs + columns.int()).view(-1)
        return one(pairs).index_select(0, chosen).view(len(on), len(columns), 3, 3)

    def rows_only(_: Tensor) -> Tensor:
        return F.conv2d(x, one(weights).index_select(0, on), padding=1)

    def unfolded(x: Tensor) -> Tensor:
        return F.unfold(x, 3, padding=1)[0]

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": lambda _: F.conv2d(x, one(weights), padding=1),
        "gather rows, then columns; convolution": lambda _: twice(some),
        "gather rows, then columns; convolution, channels last": lambda _: twice(last),
        "gather pairs; convolution (used for many positions)": lambda _: F.conv2d(some, chunks(some), padding=1),
        "gather pairs; matrix product (used for few positions)": lambda _: chunks(some).flatten(1) @ unfolded(some),
        "gather rows only; convolution of all channels": rows_only,
        "gather inputs of transposed weights; matrix product": lambda _: unfolded(some).t()
        @ one(by_input).index_select(0, columns).view(-1, outputs),
    }  # fmt: skip
    spent = time_ms(ways, [some] * (3 if quick else 40))
    dense = spent.pop("dense")
    case = f"one layer {inputs} to {outputs}, {size} x {size}, {100 * share:.0f} % of both"
    return [
        {"case": f"{case}: {way}", "ours_s": ms / 1000, "peer": "dense convolution", "peer_s": dense / 1000,
         "ratio": dense / ms, "target": ""}
        for way, ms in spent.items()
    ]  # fmt: skip


def run(quick: bool = False) -> list[dict[str, Any]]:
    rows = [training_step(quick)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in (32, 64):
            rows.append(skipping(size, PROFILE, "shares of a trained network", quick))
            rows.append(skipping(size, EVEN, "the same share in every layer", quick))
            rows.append(skipping(size, PROFILE, "shares of a trained network", quick, MORE))
        for inputs, outputs, size in ((64, 64, 32), (256, 256, 8), (512, 512, 2)):
            rows += gathering(inputs, outputs, size, 0.6, quick)
    finally:
        torch.set_num_threads(threads)
    return rows
