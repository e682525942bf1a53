"""Masks to and from PyTorch's own ways of holding them: torch.nn.utils.prune and torch.nn.utils.parametrize."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from gcnet.pruning import Masks
from gcnet.training import hold


class Masked(nn.Module):
    """A parametrization that multiplies a parameter by its mask: what is removed is 0 and gets no gradient."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def held_elsewhere(model: nn.Module) -> dict[str, str]:
    """{layer: "torch.nn.utils.prune" or "torch.nn.utils.parametrize"} of the layers whose weights are computed."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            found[name] = "torch.nn.utils.parametrize"
        elif any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            found[name] = "torch.nn.utils.prune"
    return found


@torch.no_grad()
def check_forward(module: nn.Module, layer: str) -> None:
    """Raises ValueError for a Conv2d or Linear of a class that computes something else than torch's own with its weight
    (weight standardisation, say): what is computed here from the weight would be another layer's output."""
    conv = isinstance(module, nn.Conv2d)
    if type(module).forward is (nn.Conv2d if conv else nn.Linear).forward and (
        not conv or type(module)._conv_forward is nn.Conv2d._conv_forward
    ):
        return
    if conv:
        spread = [d * (k - 1) + 3 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        shape = (1, module.in_channels, *spread)
    else:
        shape = (2, module.in_features)
    x = torch.arange(math.prod(shape), dtype=module.weight.dtype, device=module.weight.device).view(shape).cos()
    if conv:
        expected = nn.Conv2d._conv_forward(module, x, module.weight, module.bias)
    else:
        expected = nn.functional.linear(x, module.weight, module.bias)
    found = module.forward(x)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"layer '{layer}' is a {type(module).__name__} with a forward of its own: not supported here")


def check_plain(model: nn.Module) -> None:
    """Raise ValueError, naming the layers, if weights are held by torch's prune or parametrize: copies would break; or
    computed before every pass, as the older weight_norm and spectral_norm do."""
    found = held_elsewhere(model)
    computed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        and name not in found
        and not isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    if computed:
        raise ValueError(
            f"the weights of {', '.join(map(repr, computed))} are no parameters but computed before every pass: make "
            "them plain first, with torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
        )
    if found:
        how = sorted(set(found.values()))
        ways = {"torch.nn.utils.prune": "from_torch_prune", "torch.nn.utils.parametrize": "from_parametrize"}
        calls = " and ".join(f"gcnet.{ways[way]}(model, remove=True)" for way in how)
        raise ValueError(
            f"the weights of {', '.join(map(repr, found))} are held by {' and '.join(how)}; make them plain parameters "
            f"first: {calls} also gives the masks"
        )


def to_torch_prune(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Hand masks over to torch.nn.utils.prune, in place: `weight` becomes `weight_orig` times `weight_mask`.

    Raises ValueError for masks of another network and for weights that are held already.
    """
    check_plain(model)
    hold(model, masks)
    for name, mask in masks.items():
        module, attribute = _owner(model, name)
        prune.custom_from_mask(module, attribute, mask.to(getattr(module, attribute).device))
    return model


def from_torch_prune(model: nn.Module, *, remove: bool = False) -> Masks:
    """The masks that torch.nn.utils.prune holds; remove: also make the pruned weights plain parameters again.

    Raises ValueError when there are none.
    """
    masks = Masks()
    for path, module in model.named_modules():
        hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
        for attribute in [hook._tensor_name for hook in hooks]:
            mask = getattr(module, f"{attribute}_mask")
            masks[f"{path}.{attribute}" if path else attribute] = mask.detach().bool().clone()
            if remove:
                prune.remove(module, attribute)
    if not masks:
        raise ValueError(f"torch.nn.utils.prune holds no weight of this {type(model).__name__}")
    return masks


def to_parametrize(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Hold masks by torch.nn.utils.parametrize, in place: any optimizer then leaves removed weights at exactly 0.

    Raises ValueError for masks of another network and for weights that are held already.
    """
    check_plain(model)
    hold(model, masks)
    for name, mask in masks.items():
        module, attribute = _owner(model, name)
        device = getattr(module, attribute).device
        parametrize.register_parametrization(module, attribute, Masked(mask.to(device, torch.bool)))
    return model


def from_parametrize(model: nn.Module, *, remove: bool = False) -> Masks:
    """The masks that `to_parametrize` registered; remove: also make the weights plain parameters again, masked.

    Raises ValueError when there are none.
    """
    masks = Masks()
    for path, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in list(module.parametrizations.items()):
            found = [part.mask for part in chain if isinstance(part, Masked)]
            if found:
                masks[f"{path}.{attribute}" if path else attribute] = torch.stack(found).all(0)
                if remove:
                    parametrize.remove_parametrizations(module, attribute)
    if not masks:
        raise ValueError(f"no weight of this {type(model).__name__} is masked by torch.nn.utils.parametrize")
    return masks
