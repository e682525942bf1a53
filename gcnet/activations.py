"""One streaming pass over images: a scalar per filter and image, and what is accumulated from it.

Memory does not grow with the number of images: moments are merged batch by batch, samples are a fixed-size reservoir.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from gcnet.cost import evaluation_mode
from gcnet.graph import LayerGraph

_CHUNK = 2**18  # elements converted at once

# Where a scalar is read: the layer's own output, its output after BatchNorm and activation, or what it receives.
Where = Literal["conv", "relu", "input"]
Tap = tuple[str, Where]


def _spatial_mean(value: Tensor, channel_dim: int) -> Tensor:
    """(N, ..., C, ...) -> (N, C) in float32: the mean over every dimension but batch and channel."""
    if value.ndim == 2:  # a copy: an in-place activation may follow
        return value.to(torch.float32, copy=True)
    value = value.movedim(channel_dim, 1).flatten(2)
    if value.device.type != "cpu" or value.dtype == torch.float32:
        return value.mean(2, dtype=torch.float32)
    # bfloat16 on a CPU: converted a few images at a time, so that the float32 copy stays in the cache.
    means = value.new_empty(value.shape[:2], dtype=torch.float32)
    images = max(1, _CHUNK // max(1, value.shape[1:].numel()))
    for start in range(0, len(value), images):
        means[start : start + images] = value[start : start + images].float().mean(2)
    return means


class _Recorder(nn.Module):
    """Keeps the reduced value of each tap; reducing at once is what makes in-place activations harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[Tap, Tensor] = {}

    def forward(self, value: Tensor, layer: str, where: Where, channel_dim: int) -> None:
        self.values[layer, where] = _spatial_mean(value, channel_dim)


def tapped_module(graph: LayerGraph, taps: Iterable[Tap]) -> tuple[fx.GraphModule, dict[Tap, Tensor]]:
    """The traced network with a recorder behind every tap (its modules are shared, not copied), and what it records."""
    copied = fx.Graph()
    new_of: dict[fx.Node, fx.Node] = {}
    output = copied.graph_copy(graph.module.graph, new_of)
    copied.output(output)
    by_name = {node.name: node for node in graph.module.graph.nodes}
    targets: dict[str, object] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_module":
            targets[str(node.target)] = graph.module.get_submodule(str(node.target))
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            targets[str(node.target)] = getattr(graph.module.get_submodule(owner), name)
    recorder = _Recorder()
    targets["_recorder"] = recorder
    for layer, where in sorted(set(taps)):
        module = graph.module.get_submodule(layer)
        call = by_name[graph.nodes[layer]]
        source = {"conv": call, "relu": by_name[graph.activation_nodes[layer]], "input": call.args[0]}[where]
        channel_dim = 1 if isinstance(module, nn.Conv2d) else -1
        # An input is recorded right before the layer runs: an in-place activation after its producer counts.
        place = copied.inserting_before(new_of[call]) if where == "input" else copied.inserting_after(new_of[source])
        with place:
            copied.call_module("_recorder", (new_of[source], layer, where, channel_dim))
    return fx.GraphModule(targets, copied), recorder.values


class _Hooked(nn.Module):
    """A network that could not be traced, with hooks on the tapped layers while it runs: conv and input only."""

    def __init__(self, model: nn.Module, taps: Iterable[Tap]) -> None:
        super().__init__()
        self.model, self.taps, self.record = model, sorted(set(taps)), _Recorder()
        for layer, where in self.taps:
            if where == "relu":
                raise ValueError(
                    f"tap 'relu' of layer '{layer}' needs a traced network, and the parents of this one were given: "
                    "use tap='conv'"
                )

    def forward(self, images: Tensor) -> Tensor:
        self.record.values.clear()
        handles = [self._hook(layer, where) for layer, where in self.taps]
        try:
            return self.model(images)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: str, where: Where) -> RemovableHandle:
        module = self.model.get_submodule(layer)
        channel_dim = 1 if isinstance(module, nn.Conv2d) else -1

        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if (layer, where) not in self.record.values:  # the first call counts, as in a traced network
                self.record(args[0] if where == "input" else out, layer, where, channel_dim)

        return module.register_forward_hook(keep)


def _tapped(model: nn.Module, graph: LayerGraph, taps: Iterable[Tap]) -> tuple[nn.Module, dict[Tap, Tensor]]:
    if isinstance(graph.module, fx.GraphModule):
        return tapped_module(graph, taps)
    hooked = _Hooked(model, taps)
    return hooked, hooked.record.values


@torch.no_grad()
def stream(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], graph: LayerGraph, taps: Iterable[Tap]
) -> Iterator[tuple[dict[Tap, Tensor], Tensor]]:
    """Yield, batch by batch, ({tap: (N, C) float32}, labels (N,)) from the network in eval mode.

    batches: (images, labels) on any device; images as the model takes them. The model's mode and buffers are left as
    they were. Raises FloatingPointError naming the first layer whose activations are not finite.
    """
    module, values = _tapped(model, graph, taps)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # eval only while a batch runs: a generator that is not run to its end must not leave the model in eval mode.
    for images, labels in batches:
        with evaluation_mode(model), evaluation_mode(module):
            module(images.to(device, non_blocking=True))
        # One check for all taps: a device is waited for once a batch, not once a layer.
        if not bool(torch.isfinite(torch.stack([value.sum() for value in values.values()])).all()):
            _name_the_first(model, images.to(device), graph)
        yield dict(values), labels.to(device)


def _name_the_first(model: nn.Module, images: Tensor, graph: LayerGraph) -> None:
    """Run the batch again with every layer tapped, and say where the first value that is not finite comes up."""
    if not bool(torch.isfinite(images.float()).all()):
        raise FloatingPointError("the images hold values that are not finite (NaN or infinity)")
    readable: tuple[Where, ...] = ("conv", "relu") if isinstance(graph.module, fx.GraphModule) else ("conv",)
    module, values = _tapped(model, graph, [(layer, where) for layer in graph.nodes for where in readable])
    with evaluation_mode(model), evaluation_mode(module):
        module(images)
    for layer in graph.nodes:
        if not all(bool(torch.isfinite(values[layer, where]).all()) for where in readable):
            raise FloatingPointError(f"activations of layer '{layer}' are not finite (NaN or infinity)")
    raise FloatingPointError("activations are not finite (NaN or infinity) between the layers")


class Moments:
    """Means, variances and cross-products of pairs of taps, merged batch by batch in float64.

    pairs: (a, b) accumulates the co-moments of tap a (rows) with tap b (columns). Each batch is centred on its own
    mean and merged by the parallel update (Chan, Golub, LeVeque 1983), so large means cost no digits. The products
    inside one batch, already centred, are taken in the precision of the values. Small batches wait for each other: a
    merge costs the same for few rows as for many.
    """

    _MERGED = 1000  # rows

    def __init__(self, pairs: Iterable[tuple[Tap, Tap]]) -> None:
        self.pairs = tuple(dict.fromkeys(pairs))
        self.taps = tuple(dict.fromkeys(tap for pair in self.pairs for tap in pair))
        self.count = 0
        self._waiting: list[dict[Tap, Tensor]] = []
        self._mean: dict[Tap, Tensor] = {}
        self._square: dict[Tap, Tensor] = {}
        self._cross: dict[tuple[Tap, Tap], Tensor] = {}

    @property
    def mean(self) -> dict[Tap, Tensor]:
        """{tap: (C,) float64}"""
        self._merge()
        return self._mean

    @property
    def square(self) -> dict[Tap, Tensor]:
        """{tap: (C,) float64 sums of squared deviations}"""
        self._merge()
        return self._square

    @property
    def cross(self) -> dict[tuple[Tap, Tap], Tensor]:
        """{(a, b): (C of a, C of b) float64 sums of products of deviations}"""
        self._merge()
        return self._cross

    def update(self, values: dict[Tap, Tensor]) -> None:
        """Take in one batch: {tap: (N, C)}."""
        rows = len(values[self.taps[0]])
        if rows:
            self._waiting.append({tap: values[tap] for tap in self.taps})
            self.count += rows
        if sum(len(v[self.taps[0]]) for v in self._waiting) >= self._MERGED:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        values = {tap: torch.cat([v[tap] for v in self._waiting]) for tap in self.taps}
        self._waiting.clear()
        rows, total = len(values[self.taps[0]]), self.count
        before = total - rows
        weight = before * rows / total
        centred, shift = {}, {}
        for tap in self.taps:
            x = values[tap].double()
            mean = x.mean(0)
            deviation = x - mean
            centred[tap] = deviation.to(values[tap].dtype)
            square = deviation.square().sum(0)
            if before:
                shift[tap] = mean - self._mean[tap]
                self._mean[tap] += shift[tap] * (rows / total)
                self._square[tap] += square + shift[tap].square() * weight
            else:
                self._mean[tap], self._square[tap] = mean, square
        with torch.autocast(x.device.type, enabled=False):  # or float32 products become bfloat16 ones
            for a, b in self.pairs:
                product = centred[a].T @ centred[b]
                if before:
                    self._cross[a, b].add_(product).addr_(shift[a], shift[b], alpha=weight)
                else:
                    self._cross[a, b] = product.double()


def sampled_rows(images: int, size: int, seed: int = 0) -> Tensor:
    """Numbers of the images that a `Reservoir` of this size keeps of so many, ascending: to run only those."""
    drawn = torch.rand(images, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.argsort(stable=True)[:size].sort().values


class Reservoir:
    """A uniform random sample of at most `size` rows of every tap, the same images for all, from the seed."""

    def __init__(self, taps: Iterable[Tap], size: int, seed: int = 0) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0)
        self.labels = torch.empty(0, dtype=torch.int64)
        self.values: dict[Tap, Tensor] = {}

    def update(self, values: dict[Tap, Tensor], labels: Tensor) -> None:
        # Every image draws a number; those with the smallest stay. Independent of the batch size.
        drawn = torch.rand(len(labels), generator=self.generator, dtype=torch.float64)
        order = torch.cat([self.order, drawn])
        kept = order.argsort(stable=True)[: self.size].sort().values
        self.order = order[kept]
        old = len(self.labels)
        self.labels = torch.cat([self.labels, labels.cpu()])[kept]
        if old == self.size and int(kept[-1]) < old:
            return
        for tap in self.taps:
            rows = torch.cat([self.values[tap], values[tap]]) if old else values[tap]
            self.values[tap] = rows[kept.to(rows.device)]


def activations(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    graph: LayerGraph,
    *,
    tap: Where = "conv",
    samples: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """({layer: (n, C) activation matrix}, labels (n,)) of at most `samples` images drawn uniformly from the batches.

    Source: GC-Net, Fig. 1 step 1; the spatial mean as a filter's scalar is a choice.
    """
    taps: list[Tap] = [(layer, tap) for layer in graph.nodes]
    reservoir = Reservoir(taps, samples, seed)
    for values, labels in stream(model, batches, graph, taps):
        reservoir.update(values, labels)
    return {layer: reservoir.values[layer, tap] for layer, tap in taps}, reservoir.labels
