"""FTWT: every convolution gets a head that predicts, from its input alone, which of its filters an image needs.

Source of the method: "Fire Together Wire Together" (CVPR 2022, arXiv 2110.08232). A gated block is
O = norm(conv(I)) * M with M binary, per image and filter, from head(I); since the activations that follow map 0 to 0,
masking before or after them is the same. The heads learn from the network itself: the target is which filters fire.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gcnet.cost import evaluation_mode, layer_macs
from gcnet.data import Dataset
from gcnet.errors import unknown
from gcnet.graph import LayerGraph, layer_graph
from gcnet.interop import check_plain
from gcnet.store import atomic_write
from gcnet.training import Recipe, train

Mode = Literal["decoupled", "joint"]
Pool = Literal["max", "mean"]
MODES, POOLS = ("decoupled", "joint"), ("max", "mean")

# A head's logit of "always" and "never" when heads start from how often a filter is wanted (choice).
START_LIMIT = 4.0


# --- targets --------------------------------------------------------------------------------------------------------


def check_r(r: float) -> float:
    """Raise ValueError unless 0 < r <= 1."""
    if not 0 < r <= 1:
        raise ValueError(f"r = {r} is outside (0, 1]: it is the share of a layer's activation that its filters keep")
    return float(r)


def mask_targets(activations: Tensor, r: float) -> Tensor:
    """Which filters of a layer an image needs: bool (N, C).

    activations: (N, C, H, W) outputs of the layer after its activation, or their spatial maxima (N, C), not negative.
    Per image: shares of the sum of maxima, sorted, descending; k is the zero-based place of the first cumulative share
    above r; the k filters that fire most are wanted (of equal ones the first). r in (0, 1]; r = 1 wants every filter
    that fires at all. At least one filter is always wanted, also where none fires (choice).
    Raises ValueError for r out of range, another shape, an empty batch or negative values. Source: paper.
    """
    check_r(r)
    if activations.ndim not in (2, 4):
        raise ValueError(f"activations have shape {tuple(activations.shape)}; expected (N, C, H, W) or (N, C)")
    if 0 in activations.shape:
        raise ValueError(f"activations have shape {tuple(activations.shape)}: there is no image or no filter")
    maxima = activations.amax((2, 3)) if activations.ndim == 4 else activations
    if bool((maxima < 0).any()):
        raise ValueError("activations are negative: targets are made of outputs after ReLU, or of their magnitude")
    return _targets(maxima, r)


def _targets(maxima: Tensor, r: float) -> Tensor:
    ordered, order = maxima.sort(dim=1, descending=True, stable=True)
    cumulative = ordered.cumsum(1, dtype=torch.float64)
    # Filters up to the place of the first share above r; none that does not fire.
    k = ((cumulative <= r * cumulative[:, -1:]) & (ordered > 0)).sum(1, keepdim=True).clamp_min(1)
    wanted = torch.arange(maxima.shape[1], device=maxima.device) < k
    return torch.zeros_like(wanted).scatter_(1, order, wanted)


# --- gated blocks ---------------------------------------------------------------------------------------------------


def spatial_max(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C). As pooling: on a CPU with few channels last, amax takes five times as long."""
    return F.adaptive_max_pool2d(x, 1).flatten(1)


@dataclass(frozen=True)
class Signal:
    """What a gated block saw and decided for a batch: the head's logits, the mask used and the target, (N, C_out)."""

    logits: Tensor
    mask: Tensor
    maxima: Tensor


class Head(nn.Linear):
    """(N, C_in, H, W) -> logits (N, C_out): global pooling, softmax over channels, one 1 x 1 convolution.

    Cost: C_in * C_out multiply-accumulates. pool: max (paper) or mean (the authors' code). scaled: the softmax times
    C_in, so that the convolution sees numbers around 1: a head can express the same, but learns in few epochs what
    else takes hundreds (choice); the gradient that leaves it is divided by C_in, so that in joint training the backbone
    feels the mask loss no more than with the paper's heads, instead of being overrun by it (choice). Not in bf16.
    """

    def __init__(self, inputs: int, outputs: int, pool: Pool = "max", scaled: bool = True) -> None:
        super().__init__(inputs, outputs)
        self.pool, self.scale = pool, inputs if scaled else 1

    def forward(self, x: Tensor) -> Tensor:
        pooled = spatial_max(x) if self.pool == "max" else x.mean((2, 3))
        return self.of_pooled(pooled)

    def of_pooled(self, pooled: Tensor) -> Tensor:
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(self.weight.dtype)
            if pooled.requires_grad:  # joint training
                pooled = _GradientDivided.apply(pooled, self.scale)
            return F.linear(pooled.softmax(1) * self.scale, self.weight, self.bias)


class _GradientDivided(torch.autograd.Function):
    """The identity, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: int) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.by, None


def hard_mask(logits: Tensor) -> Tensor:
    """logits > 0, bool; where a head wants no filter at all, the one of the largest logit stays (choice)."""
    best = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    mask = logits > 0
    return torch.where(mask.any(1, keepdim=True), mask, best)


class GatedConv(nn.Module):
    """Convolution, its BatchNorm if it has one, and the head whose mask sets unwanted filters to exactly 0.

    activation: what follows, for the targets: "relu", "relu6" or "abs" (no activation: magnitudes count).
    force: None, or the mask (N or 1, C_out) used in place of the head's; recording: keep a `Signal` of the next batch.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, activation: str, head: Head, detach: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv, norm, head
        self.activation, self.detach = activation, detach
        self.recording, self.signal, self.force = False, None, None

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        logits = self.head(x.detach() if self.detach else x)
        mask = hard_mask(logits.detach()) if self.force is None else self.force.expand(len(x), -1)
        if self.recording:
            self.signal = Signal(logits, mask, self.maxima(out.detach()))
        factor = mask.to(out.dtype)[:, :, None, None]
        if self.activation == "abs" or not isinstance(self.norm, nn.BatchNorm2d):
            return out * factor
        with torch.no_grad():  # no gradient passes a ReLU where its input is 0, so none need be masked here
            return out.mul_(factor)

    def maxima(self, out: Tensor) -> Tensor:
        """(N, C_out) float32: how strongly each filter fires, before masking."""
        if self.activation == "abs":
            return spatial_max(out.abs()).float()
        highest = spatial_max(out).float().clamp_min_(0)
        return highest.clamp_max_(6) if self.activation == "relu6" else highest


@dataclass(frozen=True)
class Inputs:
    """Which input channels of a gated layer can be inactive: `always` (C_in) bool marks those that never are; the
    others are active when a parent's filter is: (parent, index (C_in)), -1 where it does not reach; deepest last."""

    always: Tensor
    sources: tuple[tuple[str, Tensor], ...]

    def active(self, masks: Mapping[str, Tensor], images: int, *, union: bool = True) -> Tensor:
        """(N, C_in) bool. union: of all that is added up; else what the deepest parent alone leaves active."""
        first = next(iter(masks.values()))
        found = self.always.to(first.device).expand(images, -1).clone()
        for parent, index in self.sources:
            reached = (index >= 0) & ~self.always
            columns, filters = reached.nonzero().squeeze(1).to(first.device), index[reached].to(first.device)
            found[:, columns] = masks[parent][:, filters] | (found[:, columns] if union else False)
        return found


class Gated(nn.Module):
    """A network whose convolutions are gated: made by `gate`, an ordinary module that can be saved, copied, moved.

    network: the copy with its gated blocks; blocks: {layer: GatedConv} in execution order. r, mode: see `gate`.
    macs_dense: multiply-accumulates of the network as it was. notes: layers that were left out and why.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        inputs: dict[str, Inputs],
        positions: dict[str, int],
        dense: dict[str, int],
        r: float,
        mode: Mode,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.network, self.layers, self.inputs, self.positions = network, tuple(layers), inputs, positions
        self.dense, self.r, self.mode, self.notes = dense, r, mode, notes

    @property
    def blocks(self) -> dict[str, GatedConv]:
        return {layer: self.network.get_submodule(layer) for layer in self.layers}

    @property
    def macs_dense(self) -> int:
        return sum(self.dense.values())

    @property
    def macs_heads(self) -> int:
        """What the heads cost an image."""
        return sum(block.head.weight.numel() for block in self.blocks.values())

    def forward(self, images: Tensor) -> Tensor:
        if not len(images):
            raise ValueError(f"a batch of shape {tuple(images.shape)} holds no image")
        return self.network(images)

    def record(self, on: bool) -> None:
        """Whether the blocks keep a `Signal` of every batch (training needs it, and `measure`)."""
        for block in self.blocks.values():
            block.recording, block.signal = on, None

    def signals(self) -> dict[str, Signal]:
        """What the blocks recorded of the last batch; it is handed out once."""
        found = {}
        for layer, block in self.blocks.items():
            if block.signal is None:
                raise RuntimeError(f"gated layer '{layer}' recorded nothing: call record(True), then the network")
            found[layer], block.signal = block.signal, None
        return found

    @contextmanager
    def forced(self, masks: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """For a while these masks {layer: bool (1 or N, C_out)} instead of the heads'; None: every filter is on."""
        blocks = self.blocks
        for layer, block in blocks.items():
            ones = torch.ones(1, block.conv.out_channels, dtype=torch.bool, device=block.conv.weight.device)
            block.force = ones if masks is None else masks[layer]
        try:
            yield
        finally:
            for block in blocks.values():
                block.force = None

    def head_parameters(self) -> list[nn.Parameter]:
        return [p for block in self.blocks.values() for p in block.head.parameters()]

    def mask_loss(self) -> Tensor:
        """Binary cross-entropy of the heads' logits to the targets of the last batch, a scalar.

        Summed over filters (paper), averaged over images and layers (the authors' code).
        """
        total = 0.0
        for signal in self.signals().values():
            target = _targets(signal.maxima, self.r).float()
            total = total + F.binary_cross_entropy_with_logits(signal.logits, target, reduction="sum") / len(target)
        return total / len(self.layers)

    # Heads alone as a file: what they were trained with is written beside them.

    def backbone_digest(self) -> str:
        """sha256 over the names and values of everything but the heads."""
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            if ".head." not in name:
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_heads(self, path: str | Path) -> None:
        """Write the heads as safetensors, atomically."""
        tensors = {
            f"{layer}.{name}": value.detach().cpu().contiguous()
            for layer, block in self.blocks.items()
            for name, value in block.head.state_dict().items()
        }
        meta = {"format": "gcnet-heads-1", "backbone": self.backbone_digest(), "layers": json.dumps(self.layers)}
        with atomic_write(Path(path)) as temporary:
            save_file(tensors, temporary, metadata=meta)

    def load_heads(self, path: str | Path) -> None:
        """Read what `save_heads` wrote, for the network whose heads they are.

        Raises ValueError where the file is damaged or its heads belong to another network: other layers, other
        shapes, or other weights (heads predict the filters of exactly the weights that they were trained with).
        """
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"heads file '{path}' is truncated or damaged: {error}") from error
        if meta.get("format") != "gcnet-heads-1":
            raise ValueError(f"'{path}' is a safetensors file but holds no heads")
        theirs = tuple(json.loads(meta["layers"]))
        if theirs != self.layers:
            odd = sorted(set(theirs) ^ set(self.layers))
            raise ValueError(
                f"heads in '{path}' belong to another network: it has {len(theirs)} gated layers, this one "
                f"{len(self.layers)}; not in both: {', '.join(odd[:5]) or 'the order differs'}"
            )
        for layer, block in self.blocks.items():
            there, here = tuple(tensors[f"{layer}.weight"].shape), tuple(block.head.weight.shape)
            if there != here:
                raise ValueError(
                    f"heads in '{path}' belong to another network: that of '{layer}' is {there} (filters, input "
                    f"channels), this network's {here}"
                )
        if meta["backbone"] != self.backbone_digest():
            raise ValueError(f"heads in '{path}' belong to another network: its layers are the same, its weights not")
        for layer, block in self.blocks.items():
            block.head.load_state_dict({n: tensors[f"{layer}.{n}"] for n in ("weight", "bias")})


def gate(
    model: nn.Module,
    example_input: Tensor,
    *,
    r: float = 0.9,
    mode: Mode = "decoupled",
    head_pool: Pool = "max",
    head_scaled: bool = True,
    layers: Iterable[str] | None = None,
    graph: LayerGraph | None = None,
    seed: int = 0,
) -> Gated:
    """A copy of a trained network with a gate at every convolution; the model itself is left as it is.

    example_input: (1, C, H, W) as the model takes it. r: share of each layer's activation that the wanted filters
    hold, in (0, 1]. mode: "decoupled" = the mask loss stops at the heads' inputs; "joint" = it reaches the backbone.
    In both the predicted hard mask is used and the task loss never reaches the heads. head_pool, head_scaled: those
    of `Head`. layers: Conv2d names to gate, default all that can be, projection shortcuts included (choice); the
    classifier is not gated. A convolution that runs more than once, has one filter or lies in a module that was traced
    whole is left out (`notes`). graph: a layer graph of the model made before, with `leaf_modules` or a `tracer` where
    it cannot be traced; one with given `parents` does not tell what follows a convolution, and is refused.
    Raises ValueError for r out of range, unknown names, a network with nothing to gate, weights that torch's own
    pruning holds; TraceError if it cannot be traced. Source: paper; which layers: the authors' code.
    """
    check_r(r)
    check_plain(model)
    for kind, name, known in (("mode", mode, MODES), ("head_pool", head_pool, POOLS)):
        if name not in known:
            raise unknown(kind, name, known)
    graph = graph or layer_graph(model, example_input)
    if not isinstance(graph.module, fx.GraphModule):
        raise ValueError(
            "gates need a traced network, and the parents of this one were given: make the graph with leaf_modules=... "
            "or tracer=..."
        )
    names, notes = _gateable(model, graph, layers)
    network = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            conv, norm, activation = network.get_submodule(name), *_what_follows(graph, name)
            head = Head(conv.in_channels, conv.out_channels, head_pool, head_scaled).to(conv.weight.device)
            norm_module = network.get_submodule(norm) if norm else nn.Identity()
            network.set_submodule(name, GatedConv(conv, norm_module, activation, head, mode == "decoupled"))
            if norm:
                network.set_submodule(norm, nn.Identity())
    depth: dict[str, int] = {}
    for layer in graph.layers:
        depth[layer] = 1 + max((depth.get(parent, 0) for parent in graph.parents[layer]), default=0)
    inputs = {name: _inputs(graph, name, names, depth) for name in names}
    positions = {name: graph.positions[name] for name in names}
    gated = Gated(network, names, inputs, positions, layer_macs(model, example_input), float(r), mode, notes)
    gated.train(model.training)
    return _without_false_zeros(gated, example_input)


def _gateable(
    model: nn.Module, graph: LayerGraph, wanted: Iterable[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    convolutions = [name for name in graph.layers if isinstance(model.get_submodule(name), nn.Conv2d)]
    wanted = None if wanted is None else tuple(wanted)
    for name in wanted or ():
        if name not in convolutions:
            raise unknown("convolution", name, convolutions)
    names, notes = [], []
    for name in convolutions:
        if wanted is not None and name not in wanted:
            continue
        if name in graph.shared or not name:
            notes.append(f"{name or 'the network'} is not gated: it runs more than once or is the whole network")
        elif name not in graph.nodes:
            notes.append(f"{name} is not gated: it lies in a module that was traced whole")
        elif model.get_submodule(name).out_channels < 2:
            notes.append(f"{name} is not gated: it has one filter")
        else:
            names.append(name)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has nothing to gate: {'; '.join(notes) or 'no Conv2d runs in its forward'}"
        )
    return tuple(names), tuple(notes)


def _what_follows(graph: LayerGraph, name: str) -> tuple[str | None, str]:
    """(name of the BatchNorm that takes this convolution's output alone, kind of activation behind it)."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    node = nodes[graph.nodes[name]]
    norm = None

    def follower(node: fx.Node) -> tuple[fx.Node | None, nn.Module | None]:
        if len(node.users) != 1:
            return None, None
        user = next(iter(node.users))
        return user, graph.module.get_submodule(str(user.target)) if user.op == "call_module" else None

    user, module = follower(node)
    if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
        calls = sum(n.op == "call_module" and graph.module.get_submodule(str(n.target)) is module
                    for n in nodes.values())  # fmt: skip
        if calls == 1:
            norm, node = str(user.target), user
            user, module = follower(node)
    if isinstance(module, nn.ReLU6):
        return norm, "relu6"
    function = user is not None and user.op != "call_module" and getattr(user.target, "__name__", user.target)
    if isinstance(module, nn.ReLU) or function in ("relu", "relu_"):
        return norm, "relu"
    return norm, "abs"


def _inputs(graph: LayerGraph, name: str, gated: Sequence[str], depth: Mapping[str, int]) -> Inputs:
    always = torch.zeros(graph.in_channels[name], dtype=torch.bool)
    reached = torch.zeros_like(always)
    sources = []
    for source in sorted(graph.sources[name], key=lambda s: depth[s.parent]):
        index = source.index.cpu()
        reached |= index >= 0
        if source.parent in gated:
            sources.append((source.parent, index))
        else:
            always |= index >= 0
    return Inputs(always | ~reached, tuple(sources))


@torch.no_grad()
def _without_false_zeros(gated: Gated, example_input: Tensor) -> Gated:
    """Take every input channel as active where a filter that is off does not arrive as 0 (a norm in between, say).

    Tried out: random masks and positive random numbers for all parameters and buffers, so that nothing is 0 by chance.
    """
    twin = copy.deepcopy(gated).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in chain(twin.parameters(), twin.buffers()):
        if tensor.is_floating_point():
            scale = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_((torch.rand(tensor.shape, generator=generator) + 0.5) / scale)
    masks = {
        layer: torch.rand(1, block.conv.out_channels, generator=generator) < 0.5 for layer, block in twin.blocks.items()
    }
    broken: set[str] = set()

    def check(layer: str, x: Tensor) -> None:
        off = ~twin.inputs[layer].active(masks, 1)[0]
        if bool((x[:, off] != 0).any()):
            broken.add(layer)

    handles = [
        block.register_forward_pre_hook(lambda _, args, layer=layer: check(layer, args[0]))
        for layer, block in twin.blocks.items()
    ]
    image = torch.rand(1, *example_input.shape[1:], generator=generator) + 0.5
    with twin.forced(masks):
        twin(image)
    for handle in handles:
        handle.remove()
    for layer in broken:
        gated.inputs[layer] = replace(gated.inputs[layer], always=torch.ones_like(gated.inputs[layer].always))
    return gated


# --- counting -------------------------------------------------------------------------------------------------------


def count_macs(gated: Gated, masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Multiply-accumulates of each image under its masks {layer: bool (N, C_out)}: (honest, authors'), (N,) float64.

    Honest (choice): active filters x active input channels x kernel x positions (within groups, so a depthwise filter
    counts where it and its channel are active); channels that are added up are active where any of them is; heads
    included; layers without a gate count in full. Authors': without heads, and the input of a residual block counts
    the channels of the deepest branch alone.
    """
    images = len(next(iter(masks.values())))
    device = next(iter(masks.values())).device
    ungated = sum(count for layer, count in gated.dense.items() if layer not in gated.layers)
    honest = torch.full((images,), float(ungated + gated.macs_heads), dtype=torch.float64, device=device)
    authors = torch.full((images,), float(ungated), dtype=torch.float64, device=device)
    for layer, block in gated.blocks.items():
        conv = block.conv
        per_pair = gated.positions[layer] * conv.kernel_size[0] * conv.kernel_size[1]
        filters = masks[layer].view(images, conv.groups, -1).sum(2)
        for total, union in ((honest, True), (authors, False)):
            active = gated.inputs[layer].active(masks, images, union=union).view(images, conv.groups, -1).sum(2)
            total += per_pair * (filters * active).sum(1)
    return honest, authors


@dataclass(frozen=True)
class Firing:
    """What a gated network did with a set of images: one row an image, columns in the order of `layers`.

    logits (N, classes); k (N, L) filters used; k_target (N, L) filters wanted; agreement (N, L) share of filters whose
    mask is the target, in [0, 1]; macs and macs_authors (N,); macs_dense of the network without gates.
    """

    layers: tuple[str, ...]
    filters: tuple[int, ...]
    logits: Tensor
    k: Tensor
    k_target: Tensor
    agreement: Tensor
    macs: Tensor
    macs_authors: Tensor
    macs_dense: int

    @property
    def reduction(self) -> float:
        """Share of the dense multiply-accumulates saved, heads counted; below 0 where heads cost more than is saved."""
        return 1 - self.macs.mean().item() / self.macs_dense

    @property
    def reduction_authors(self) -> float:
        """The same in the authors' accounting, which published numbers use."""
        return 1 - self.macs_authors.mean().item() / self.macs_dense

    @property
    def mask_accuracy(self) -> float:
        """Share of filters, over images and layers, whose predicted mask is the target."""
        weights = torch.tensor(self.filters, dtype=torch.float64)
        return (self.agreement.double().mean(0) * weights).sum().item() / float(weights.sum())


@torch.no_grad()
def measure(gated: Gated, batches: Iterable[tuple[Tensor, Tensor]]) -> Firing:
    """Run images through a gated network in eval mode and keep what it did. batches: (images, labels).

    Raises ValueError when there is no image.
    """
    parts: list[tuple[Tensor, ...]] = []
    device = next(gated.parameters()).device
    gated.record(True)
    try:
        with evaluation_mode(gated):
            for images, _ in batches:
                logits = gated(images.to(device))
                signals = gated.signals()
                masks = {layer: signal.mask for layer, signal in signals.items()}
                targets = {layer: _targets(signal.maxima, gated.r) for layer, signal in signals.items()}
                honest, authors = count_macs(gated, masks)
                k = torch.stack([mask.sum(1) for mask in masks.values()], 1)
                wanted = torch.stack([target.sum(1) for target in targets.values()], 1)
                agreement = torch.stack([(masks[n] == targets[n]).float().mean(1) for n in masks], 1)
                part = (logits.float(), k, wanted, agreement, honest, authors)
                parts.append(tuple(value.cpu() for value in part))
    finally:
        gated.record(False)
    if not parts:
        raise ValueError("a gated network cannot be measured on no image: got no batch at all")
    filters = tuple(block.conv.out_channels for block in gated.blocks.values())
    joined = (torch.cat(values) for values in zip(*parts, strict=True))
    return Firing(gated.layers, filters, *joined, gated.macs_dense)


def dynamic_macs(gated: Gated, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean multiply-accumulates an image and what that saves, by both accountings of `count_macs`.

    Returns macs_dense, macs, macs_authors, macs_heads, reduction, reduction_authors (shares of the dense count).
    """
    firing = measure(gated, batches)
    return {
        "macs_dense": firing.macs_dense,
        "macs": firing.macs.mean().item(),
        "macs_authors": firing.macs_authors.mean().item(),
        "macs_heads": gated.macs_heads,
        "reduction": firing.reduction,
        "reduction_authors": firing.reduction_authors,
    }


@torch.no_grad()
def estimate_flops(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    r_grid: Sequence[float],
    *,
    layers: Iterable[str] | None = None,
    graph: LayerGraph | None = None,
) -> pd.DataFrame:
    """What each r would save, from the dense network before any training: one pass over the images, one row an r.

    The targets of every image on the dense network are put into `count_macs` as if a head had predicted them. Columns:
    r, macs, macs_authors, reduction, reduction_authors. model, layers, graph: as `gate` takes them; not changed.
    Raises ValueError for an r out of range, no r, no image, a network with nothing to gate. Source: the paper says
    that training is not needed for an estimate; the procedure is ours.
    """
    r_grid = [check_r(r) for r in r_grid]
    if not r_grid:
        raise ValueError("estimate_flops needs at least one r: r_grid is empty")
    gated, images, device = None, 0, next(model.parameters()).device
    totals = torch.zeros(len(r_grid), 2, dtype=torch.float64)
    for x, _ in batches:
        x = x.to(device)
        if gated is None:
            gated = gate(model, x[:1], layers=layers, graph=graph).eval()
            gated.record(True)
        with gated.forced():
            gated(x)
        maxima = {layer: signal.maxima for layer, signal in gated.signals().items()}
        for row, r in enumerate(r_grid):
            counts = count_macs(gated, {layer: _targets(values, r) for layer, values in maxima.items()})
            totals[row] += torch.stack([count.sum() for count in counts]).cpu()
        images += len(x)
    if gated is None:
        raise ValueError("estimate_flops needs images: got no batch at all")
    rows = []
    for r, (honest, authors) in zip(r_grid, (totals / images).tolist(), strict=True):
        saved = {"reduction": 1 - honest / gated.macs_dense, "reduction_authors": 1 - authors / gated.macs_dense}
        rows.append({"r": r, "macs": honest, "macs_authors": authors, **saved})
    return pd.DataFrame(rows)


# --- the static peer ------------------------------------------------------------------------------------------------


def l1_filter_masks(gated: Gated, macs: float) -> dict[str, Tensor]:
    """Static masks {layer: bool (1, C_out)}: the filters of the largest L1 norm, the same share of every layer.

    The share is the largest that costs at most `macs` multiply-accumulates (honest, without heads), or one filter a
    layer where nothing fits. Source: Li et al., arXiv 1608.08710; the same share everywhere is a choice.
    """
    norms = {layer: block.conv.weight.detach().abs().sum((1, 2, 3)) for layer, block in gated.blocks.items()}
    ranks = {layer: norm.argsort(descending=True, stable=True).argsort() for layer, norm in norms.items()}

    def masks(share: float) -> dict[str, Tensor]:
        return {layer: (rank < max(1, round(share * len(rank))))[None] for layer, rank in ranks.items()}

    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        fits = count_macs(gated, masks(share))[0].item() - gated.macs_heads <= macs
        low, high = (share, high) if fits else (low, share)
    return masks(low)


# --- training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_heads(gated: Gated, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set every head's bias to the log-odds that its filter is wanted by the network as it is, in place (choice).

    So training starts from masks near the targets instead of from random ones. Raises ValueError for no image.
    """
    wanted: dict[str, Tensor] = {}
    images, device = 0, next(gated.parameters()).device
    gated.record(True)
    try:
        with evaluation_mode(gated), gated.forced():
            for x, _ in batches:
                gated(x.to(device))
                for layer, signal in gated.signals().items():
                    wanted[layer] = wanted.get(layer, 0) + _targets(signal.maxima, gated.r).sum(0)
                images += len(x)
    finally:
        gated.record(False)
    if not images:
        raise ValueError("heads cannot start from no image: got no batch at all")
    for layer, block in gated.blocks.items():
        odds = torch.logit(wanted[layer].double() / images, eps=1e-6).clamp_(-START_LIMIT, START_LIMIT)
        block.head.bias.copy_(odds)


def train_gated(
    net: nn.Sequential,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    head_lr: float = 0.1,
    head_cooldown: float = 0.5,
    **options: object,
) -> list[dict[str, float]]:
    """Train a gated network in place, backbone and heads, each with its own optimizer settings; one row an epoch.

    net: normalisation and a `Gated`, so that it takes uint8 images. recipe: the backbone's. head_lr: constant, with
    momentum 0.9 and without weight decay (the authors' code). head_cooldown: share of the epochs at the end in which
    the mask loss is off, so that the heads stay as they are and the backbone adapts to them (code: 0.5); in [0, 1].
    options: those of `gcnet.training.train`. Raises ValueError for a cooldown outside [0, 1] and as `train` does.
    """
    if not 0 <= head_cooldown <= 1:
        raise ValueError(f"head_cooldown {head_cooldown} is outside [0, 1]: it is a share of the epochs")
    gated = net[-1]
    learning = recipe.epochs - round(head_cooldown * recipe.epochs)
    heads = {id(p) for p in gated.head_parameters()}

    def optimizer(model: nn.Module) -> torch.optim.SGD:
        backbone = [p for p in model.parameters() if p.requires_grad and id(p) not in heads]
        groups = [
            {"params": [p for p in backbone if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in backbone if p.ndim <= 1], "weight_decay": 0.0},
            {"params": gated.head_parameters(), "lr": head_lr, "momentum": 0.9, "nesterov": False, "constant": True},
        ]
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, weight_decay=0.0)

    def penalty(*_: object) -> Tensor | float:
        return gated.mask_loss() if next(iter(gated.blocks.values())).recording else 0.0

    try:
        return train(
            net, data, recipe, seed=seed, penalty=penalty, optimizer=optimizer,
            before_epoch=lambda epoch: gated.record(epoch < learning), **options,
        )  # fmt: skip
    finally:
        gated.record(False)
