"""Parameters and multiply-accumulates (MACs) of a network, dense and under a mask.

One MAC is one multiplication and one addition, that is two FLOPs. Convolutions and Linear layers are counted, for
one image; normalisation, activations, pooling and attention products are not (choice, the usual one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gcnet.errors import unknown


def layer_macs(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Dense multiply-accumulates of every convolution and Linear layer for one image, in order of first execution.

    example_input: (N, C, H, W), or (N, ..., features) for a network without convolutions; the count does not depend
    on N. A layer called twice counts twice; a layer that is never called is left out. The model's mode, buffers and
    hooks are as before on return.
    Raises ValueError if example_input has no batch dimension or a layer cannot take what reaches it.
    Source: output positions x kernel size x input channels / groups x output channels.
    """
    macs: dict[str, int] = {}
    for name, layer, positions in _layer_calls(model, example_input):
        macs[name] = macs.get(name, 0) + positions * layer.weight.numel()
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
    for _, layer, positions in _layer_calls(model, example_input):
        mask = kept.get(id(layer.weight))
        total += positions * (layer.weight.numel() if mask is None else int(torch.count_nonzero(mask)))
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


def _layer_calls(model: nn.Module, example_input: Tensor) -> list[tuple[str, nn.Module, int]]:
    """(name, layer, output positions of one image) for each call of a convolution or Linear, in execution order."""
    check_example(model, example_input)
    calls: list[tuple[str, nn.Module, int]] = []
    shape = tuple(example_input.shape)

    def count(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, _ConvTransposeNd):
            positions = x.numel() // layer.in_channels  # each input position spreads the whole kernel
        else:
            positions = y.numel() // (layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features)
        calls.append((name, layer, positions))

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
