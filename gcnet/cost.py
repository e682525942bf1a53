"""Parameters and multiply-accumulates (MACs) of a network, dense and under a mask; measured latency.

One MAC is one multiplication and one addition, that is two FLOPs. Convolutions, Linear layers and the projections of
nn.MultiheadAttention are counted, for one image; normalisation, activations, pooling and attention products are not
(choice, the usual one).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gcnet.errors import unknown


def layer_macs(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Dense multiply-accumulates of every convolution and Linear layer for one image, in order of first execution.

    example_input: (N, C, H, W), or (N, ..., features) for a network without convolutions; the count does not depend
    on N. A layer called twice counts twice; a layer that is never called is left out. What nn.MultiheadAttention
    projects stands under the names of its parameters. The model's mode, buffers and hooks are as before on return.
    Raises ValueError if example_input has no batch dimension or a layer cannot take what reaches it.
    Source: output positions x kernel size x input channels / groups x output channels.
    """
    macs: dict[str, int] = {}
    for name, weight, positions in _layer_calls(model, example_input):
        macs[name] = macs.get(name, 0) + positions * weight.numel()
    return macs


def macs(model: nn.Module, example_input: Tensor, masks: Mapping[str, Tensor] | None = None) -> int:
    """Multiply-accumulates of all convolutions and Linear layers for one image.

    example_input: (N, C, H, W); the batch dimension is divided out. masks: {parameter name: bool tensor}, True = kept,
    for example {"features.0.weight": ...}. A masked layer counts output positions x kept weights. This is the usual,
    *theoretical* accounting of unstructured sparsity: dense hardware does not run faster because of it.
    Masks of biases and normalisation change nothing.
    Raises ValueError for a mask that names no parameter or has another shape, and as `layer_macs` does.
    """
    # By identity and not by name, so that two layers that share one parameter share its mask.
    kept = {id(model.get_parameter(name)): mask for name, mask in _checked(model, masks).items()}
    total = 0
    for _, weight, positions in _layer_calls(model, example_input):
        mask = kept.get(id(weight))
        total += positions * (weight.numel() if mask is None else int(torch.count_nonzero(mask)))
    return total


def parameters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> int:
    """Number of parameters (weights, biases, normalisation; shared ones once), less those that masks remove.

    masks: {parameter name: bool tensor}, True = kept. Raises ValueError as `macs` does.
    """
    masks = _checked(model, masks)
    total = 0
    for name, parameter in model.named_parameters():
        total += int(torch.count_nonzero(masks[name])) if name in masks else parameter.numel()
    return total


# How a network is run when its latency is measured.
VARIANTS = ("float32", "channels_last", "bfloat16", "bfloat16_channels_last")


def latency(
    networks: nn.Module | Mapping[str, nn.Module],
    example_input: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    variants: Sequence[str] = ("float32",),
    repeats: int = 15,
    warm_up: int = 3,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Measured seconds of a forward pass: one row a network, batch size and variant.

    networks: one, or {name: network}; they take turns in every repeat, so that a busy machine slows all alike, and
    `ratio` is the median over the repeats of a network's time over the first one's of the same repeat.
    example_input: (N, C, H, W) of one image or more; the first is repeated to each batch size. variants: "float32",
    "channels_last", "bfloat16", "bfloat16_channels_last" (weights and images in that precision and memory format).
    repeats, warm_up: passes timed, and passes run before that and not timed. threads: CPU threads, None = as it is.
    Columns: network, batch_size, variant, median_s, low_s, high_s (quartiles), ratio, repeats, threads, device. On a
    GPU, CUDA events are read. The networks are copied in eval mode, not changed.
    Raises ValueError for an unknown variant, batch sizes or repeats below 1, an input that a network cannot take.
    """
    named = {"network": networks} if isinstance(networks, nn.Module) else dict(networks)
    if not named:
        raise ValueError("latency needs at least one network")
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
    if min(batch_sizes, default=1) < 1 or repeats < 1 or warm_up < 0 or (threads is not None and threads < 1):
        raise ValueError(
            f"batch sizes {tuple(batch_sizes)}, repeats {repeats} and threads {threads} must be at least 1"
        )
    for network in named.values():
        check_example(network, example_input)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return [
            row for variant in variants for row in _timed(named, example_input, variant, batch_sizes, repeats, warm_up)
        ]
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _timed(
    named: Mapping[str, nn.Module], example: Tensor, variant: str, sizes: Sequence[int], repeats: int, warm_up: int
) -> list[dict[str, Any]]:
    kind = torch.bfloat16 if variant.startswith("bfloat16") else torch.float32
    layout = torch.channels_last if variant.endswith("channels_last") else torch.contiguous_format
    ready = {name: copy.deepcopy(network).eval().to(kind) for name, network in named.items()}
    if layout is torch.channels_last:
        ready = {name: network.to(memory_format=layout) for name, network in ready.items()}
    device = next((p.device for network in ready.values() for p in network.parameters()), torch.device("cpu"))
    rows = []
    for size in sizes:
        images = example[:1].to(device, kind).expand(size, *example.shape[1:]).contiguous()
        if images.ndim == 4:
            images = images.contiguous(memory_format=layout)
        for network in ready.values():
            for _ in range(max(1, warm_up)):
                try:
                    network(images)
                except (RuntimeError, AssertionError, IndexError) as error:
                    shape = tuple(images.shape)
                    raise ValueError(
                        f"the network cannot take images of shape {shape} as {variant}: {error}"
                    ) from error
        spent: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(repeats):
            for name, network in ready.items():
                spent[name].append(_seconds(lambda network=network, images=images: network(images), device))
        base = spent[next(iter(ready))]
        for name, times in spent.items():
            low, _, high = statistics.quantiles(times, n=4) if repeats > 1 else (times[0],) * 3
            rows.append(
                {
                    "network": name,
                    "batch_size": size,
                    "variant": variant,
                    "median_s": statistics.median(times),
                    "low_s": low,
                    "high_s": high,
                    "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
                    "repeats": repeats,
                    "threads": torch.get_num_threads(),
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                }
            )
    return rows


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes: between two events on a GPU's own clock, else by the machine's."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode for a while and give every submodule its own mode back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def check_example(model: nn.Module, example_input: Tensor) -> None:
    """Raise ValueError unless example_input is a tensor with a batch dimension and at least one image."""
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input is a {type(example_input).__name__}; expected a tensor (N, C, H, W)")
    shape = tuple(example_input.shape)
    images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    dims, layout = (4, "(N, C, H, W)") if images else (2, "(N, ..., features)")
    if len(shape) == dims - 1:
        raise ValueError(
            f"example_input has shape {shape}, without a batch dimension; expected {layout}: "
            "pass example_input.unsqueeze(0)"
        )
    if len(shape) < dims or (images and len(shape) > dims):
        raise ValueError(f"example_input has shape {shape}; expected {layout}")
    if 0 in shape:
        raise ValueError(f"example_input has shape {shape}, which is empty; expected at least one {layout}")


def check_channels(name: str, layer: nn.Module, x: Tensor, example_shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming layer and shapes, unless x has the channels that a convolution or Linear takes."""
    conv = isinstance(layer, _ConvNd)
    wanted, axis = (layer.in_channels, len(layer.kernel_size) + 1) if conv else (layer.in_features, 1)
    channels = x.shape[-axis] if x.ndim >= axis else None
    if channels != wanted:
        raise ValueError(
            f"layer '{name}' takes {wanted} input {'channels' if conv else 'features'} but gets {channels} "
            f"(a tensor {tuple(x.shape)}) from example_input of shape {example_shape}"
        )


def _layer_calls(model: nn.Module, example_input: Tensor) -> list[tuple[str, Tensor, int]]:
    """(name, weight, output positions of one image) for each call of a convolution or Linear, in execution order."""
    check_example(model, example_input)
    calls: list[tuple[str, Tensor, int]] = []
    shape = tuple(example_input.shape)

    def count(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, _ConvTransposeNd):
            positions = x.numel() // layer.in_channels  # each input position spreads the whole kernel
        else:
            positions = y.numel() // (layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features)
        calls.append((name, layer.weight, positions))

    def count_projections(name: str, layer: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = [
            x.numel() // x.shape[-1]
            for x in (args[k] if k < len(args) else kwargs[word] for k, word in enumerate(("query", "key", "value")))
        ]
        if layer.in_proj_weight is not None and len(set(tokens)) == 1:
            calls.append((f"{name}.in_proj_weight", layer.in_proj_weight, tokens[0]))
        elif layer.in_proj_weight is not None:  # cross-attention: a third of the rows each
            thirds = layer.in_proj_weight.chunk(3)
            calls.extend((f"{name}.in_proj_weight", w, n) for w, n in zip(thirds, tokens, strict=True))
        else:
            for which, n in zip("qkv", tokens, strict=True):
                calls.append((f"{name}.{which}_proj_weight", getattr(layer, f"{which}_proj_weight"), n))
        calls.append((f"{name}.out_proj", layer.out_proj.weight, tokens[0]))

    handles = []
    try:
        for name, layer in model.named_modules():
            if isinstance(layer, (_ConvNd, nn.Linear)):
                handles.append(
                    layer.register_forward_pre_hook(
                        lambda module, args, name=name: check_channels(name, module, args[0], shape)
                    )
                )
                handles.append(
                    layer.register_forward_hook(lambda module, args, out, name=name: count(name, module, args[0], out))
                )
            elif isinstance(layer, nn.MultiheadAttention):  # its own Linear is never called
                handles.append(
                    layer.register_forward_pre_hook(
                        lambda module, args, kwargs, name=name: count_projections(name, module, args, kwargs),
                        with_kwargs=True,
                    )
                )
        with evaluation_mode(model), torch.no_grad():
            # One image: positions are then exactly per image, also where a network folds the batch into windows.
            try:
                model(example_input[:1])
            except (RuntimeError, AssertionError, IndexError) as error:
                raise ValueError(f"the network cannot take example_input of shape {shape}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _checked(model: nn.Module, masks: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The masks, once each is known to name a parameter of the model and to have its shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, mask in (masks or {}).items():
        if name not in shapes:
            raise unknown("parameter in masks", name, shapes)
        if tuple(mask.shape) != shapes[name]:
            raise ValueError(f"mask '{name}' has shape {tuple(mask.shape)}; its parameter has {shapes[name]}")
    return masks or {}
