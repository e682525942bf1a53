"""Real skipping: a gated network that computes only the filters each image needs, from only the channels that are on.

How the weights are kept and gathered was chosen by measurement; `benchmarks/bench_dynamic.py` has the alternatives.
"""

from __future__ import annotations

import copy
import operator
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gcnet.cost import evaluation_mode
from gcnet.dynamic import Gated, GatedConv
from gcnet.graph import layer_graph, trace
from gcnet.interop import check_forward

# Up to so many output positions a matrix product is faster than a convolution, which reorders its weights first; from
# so many on, a convolution is faster with the channels last. Measured on a CPU with AVX-512.
FEW_POSITIONS, MANY_POSITIONS = 64, 256

# What treats every channel for itself and maps a channel of zeros to zeros runs on the channels that are on.
_CHANNELWISE = (nn.ReLU, nn.ReLU6, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
                nn.AdaptiveMaxPool2d)  # fmt: skip
_CHANNELWISE_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu6, F.max_pool2d, F.avg_pool2d, F.dropout)
_SUMS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Some:
    """Some channels of one image: values (1, a, H, W) of the channels `on` (a,) of `total`; the others are 0."""

    values: Tensor
    on: Tensor
    total: int

    def full(self) -> Tensor:
        """(1, total, H, W)."""
        shape = (1, self.total, *self.values.shape[2:])
        return self.values.new_zeros(shape).index_copy_(1, self.on, self.values)

    def __add__(self, other: Some) -> Some:
        """The sum, on the channels that either has on."""
        either = torch.zeros(self.total, dtype=torch.bool, device=self.on.device)
        either[self.on] = True
        either[other.on] = True
        on = either.nonzero().squeeze(1)
        return Some(self.full().index_add_(1, other.on, other.values).index_select(1, on), on, self.total)


class SkippingConv:
    """A gated convolution as it is run: BatchNorm folded into weights that can be gathered by pairs of channels."""

    def __init__(self, block: GatedConv, layer: str) -> None:
        conv = block.conv
        check_forward(conv, layer)
        self.block, self.conv, self.pool = block, conv, block.head.pool
        self.head_weight = (block.head.weight.detach() * block.head.scale).contiguous()
        self.head_bias = block.head.bias.detach().clone()
        weight, bias = _folded(conv, block.norm)
        self.weight, self.bias = weight.to(conv.weight.dtype).contiguous(), bias.to(conv.weight.dtype)
        self.pairs = self.weight.flatten(2).flatten(0, 1)  # one row a pair of channels: its kernel
        self.depthwise = conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels
        # Computed in full, then selected: grouped in other ways, or padded with something else than zeros.
        self.in_full = (conv.groups > 1 and not self.depthwise) or conv.padding_mode != "zeros"

    def __call__(self, x: Tensor | Some) -> Some:
        values, columns = (x.values, x.on) if isinstance(x, Some) else (x, None)
        on = self._on(values, columns)
        if self.depthwise or self.in_full:
            out = self._by_group(x.full() if isinstance(x, Some) else x, on)
        else:
            out = self._dense(values, self._gathered(on, columns), self.bias.index_select(0, on))
        return Some(out, on, self.conv.out_channels)

    def _on(self, values: Tensor, columns: Tensor | None) -> Tensor:
        """Numbers of the filters that the head wants; the one of the largest logit where it wants none."""
        if self.block.force is not None:
            if len(self.block.force) != 1:
                raise ValueError("skipping takes forced masks of one row, the same for every image")
            return self.block.force[0].nonzero().squeeze(1)
        pooled = (values.amax((2, 3)) if self.pool == "max" else values.mean((2, 3)))[0]
        if columns is not None:
            pooled = pooled.new_zeros(self.conv.in_channels).index_copy_(0, columns, pooled)
        logits = torch.addmv(self.head_bias, self.head_weight, pooled.softmax(0))
        on = (logits > 0).nonzero().squeeze(1)
        return on if len(on) else logits.argmax()[None]

    def _by_group(self, x: Tensor, on: Tensor) -> Tensor:
        conv = self.conv
        if self.in_full:
            return conv._conv_forward(x, self.weight, self.bias).index_select(1, on)
        x, weight, bias = x.index_select(1, on), self.weight.index_select(0, on), self.bias.index_select(0, on)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, len(on))

    def _gathered(self, on: Tensor, columns: Tensor | None) -> Tensor:
        """The weights of these filters and input channels (None: all), contiguous."""
        outputs, inputs = self.weight.shape[:2]
        if columns is None or len(columns) == inputs:
            return self.weight if len(on) == outputs else self.weight.index_select(0, on)
        if self.pairs.shape[1] == 1:  # 1 x 1: a row would be one number
            return self.weight.index_select(0, on).index_select(1, columns)
        chosen = (on.int()[:, None] * inputs + columns.int()).view(-1)
        return self.pairs.index_select(0, chosen).view(len(on), len(columns), *self.weight.shape[2:])

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        conv = self.conv
        height, width = self._size(x)
        if height * width <= FEW_POSITIONS and not isinstance(conv.padding, str):
            columns = F.unfold(x.contiguous(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)[0]
            return torch.addmm(bias[:, None], weight.flatten(1), columns).view(1, -1, height, width)
        last = torch.channels_last if height * width > MANY_POSITIONS else torch.contiguous_format
        return F.conv2d(x.contiguous(memory_format=last), weight, bias, conv.stride, conv.padding, conv.dilation)

    def _size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output."""
        conv = self.conv
        if isinstance(conv.padding, str):
            return x.shape[2], x.shape[3]
        sides = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sides)
        return height, width


def _folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the BatchNorm behind it (in eval mode), float64."""
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
    if not isinstance(norm, nn.BatchNorm2d):
        return weight, bias
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    bias = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    return weight * scale[:, None, None, None], bias


class DynamicInference:
    """Inference with a gated network that skips what its masks turn off; outputs are those of the gated network.

    Made from a trained `Gated`; weights are copied with BatchNorm folded in, so later training is not seen. Each image
    is computed on its own: masks differ from image to image, so nothing is shared within a batch.
    Grouped convolutions other than depthwise, and padding other than zeros, are computed in full and then selected.
    Raises ValueError for a batch without images, TraceError where `gate` would.
    """

    def __init__(self, gated: Gated) -> None:
        with evaluation_mode(gated):
            traced = trace(gated.network, leaf_modules=(GatedConv,))
        blocks = {layer: SkippingConv(block, layer) for layer, block in gated.blocks.items()}
        self.steps = [(node, _action(node, traced, blocks)) for node in traced.graph.nodes]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) as the gated network takes them -> its output (N, ...)."""
        if not len(images):
            raise ValueError(f"a batch of shape {tuple(images.shape)} holds no image")
        return torch.cat([self._one(image) for image in images.split(1)])

    def _one(self, image: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        for node, action in self.steps:
            if node.op == "placeholder":
                values[node] = node.args[0] if values and node.args else image
            elif node.op == "output":
                return map_aggregate(map_arg(node.args[0], values.__getitem__), _whole)
            elif len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs:  # most, and the fastest
                values[node] = action(values[node.args[0]])
            else:
                args = map_arg(node.args, values.__getitem__)
                values[node] = action(*args, **map_arg(node.kwargs, values.__getitem__))
                if node.target is operator.iadd:  # other names of what was added to see the sum too
                    values[node.args[0]] = values[node]
        raise AssertionError("a traced graph ends with its output")


def _whole(value: Any) -> Any:
    return value.full() if isinstance(value, Some) else value


def _action(node: fx.Node, traced: fx.GraphModule, blocks: dict[str, SkippingConv]) -> Callable[..., Any]:
    """What a node does to values that may be `Some` channels only."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(traced)
        return lambda: value
    if node.op == "call_module" and node.target in blocks:
        return blocks[str(node.target)]
    run: Callable[..., Any] = node.target
    if node.op == "call_module":
        run = copy.deepcopy(traced.get_submodule(str(node.target))).eval()
        if isinstance(run, nn.Identity):
            return lambda x: x
    elif node.op == "call_method":
        name = str(node.target)
        run = lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)  # noqa: E731
    channelwise = isinstance(run, _CHANNELWISE) or (node.op == "call_function" and run in _CHANNELWISE_FUNCTIONS)
    sums = node.op == "call_function" and run in _SUMS and not node.kwargs

    def act(*args: Any, **kwargs: Any) -> Any:
        if channelwise and isinstance(args[0], Some):
            return Some(run(args[0].values, *args[1:], **kwargs), args[0].on, args[0].total)
        if sums and all(isinstance(arg, Some) for arg in args) and args[0].values.shape[2:] == args[1].values.shape[2:]:
            return args[0] + args[1]
        return run(*map_aggregate(args, _whole), **map_aggregate(kwargs, _whole))

    return act


# --- the dense peer, and timing -------------------------------------------------------------------------------------


def fold_batchnorm(model: nn.Module, image: Tensor) -> nn.Module:
    """A copy in eval mode, BatchNorm folded into the convolution before it wherever it alone takes its output."""
    network = copy.deepcopy(layer_graph(model, image).module).eval()
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        norm = modules[str(node.target)] if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = modules[str(before.target)] if before.op == "call_module" and len(before.users) == 1 else None
        if isinstance(conv, nn.Conv2d):
            network.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            network.set_submodule(str(node.target), nn.Identity())
    return network


def dense_layouts(model: nn.Module, image: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """A dense network for inference in the memory layouts that may be its fastest, BatchNorm folded in all of them.

    They take contiguous images; bringing these into the layout is part of the call.
    """
    contiguous = fold_batchnorm(model, image)
    last = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still the fastest where it is there
        frozen = torch.jit.freeze(torch.jit.trace(last, image.contiguous(memory_format=torch.channels_last)))
    return {
        "contiguous": contiguous,
        "channels last": lambda x: last(x.contiguous(memory_format=torch.channels_last)),
        "channels last, frozen": lambda x: frozen(x.contiguous(memory_format=torch.channels_last)),
    }


def time_ms(functions: dict[str, Callable[[Tensor], Any]], inputs: list[Tensor]) -> dict[str, float]:
    """Median processor time (ms) of each function over the inputs, taken in turn, after a round to warm up.

    The processor's time and not the clock's: what else runs on the machine disturbs it less.
    """
    spent: dict[str, list[float]] = {name: [] for name in functions}
    with torch.inference_mode():
        for number, x in enumerate([inputs[0], inputs[0], *inputs]):
            for name, function in functions.items():
                started = time.process_time()
                function(x)
                if number > 1:
                    spent[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in spent.items()}
