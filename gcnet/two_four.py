"""2:4 sparsity: of every four weights in a row two go, which GPUs from NVIDIA's Ampere on multiply faster."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gcnet.errors import unknown
from gcnet.pruning import Masks, weight_name, weights


def why_not(device: torch.device | str) -> str:
    """Why a device has no 2:4 kernels; "" if it has."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"2:4 kernels need an NVIDIA GPU, not '{device.type}'"
    if not torch.cuda.is_available():
        return "2:4 kernels need an NVIDIA GPU, and none is here"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"2:4 kernels need compute capability 8.0, this GPU has {major}.{minor}"


def two_four_masks(model: nn.Module, scores: Mapping[str, Tensor]) -> Masks:
    """Masks that keep the two strongest of every four neighbouring weights of a row.

    scores: {layer: (C_out, C_in) or of the weight's shape}, such as |connectivity|; equal scores are told apart by
    |weight|. Raises ValueError for a layer that is not there or not Linear, widths that do not divide by four, scores
    of another shape. Source: the pattern is the hardware's; ranking by connectivity is a choice.
    """
    masks = Masks()
    for name, weight in weights(model, scores).items():
        layer = name.removesuffix(".weight")
        if weight.ndim != 2 or weight.shape[1] % 4:
            raise ValueError(
                f"layer '{layer}' has a weight of shape {tuple(weight.shape)}; 2:4 takes Linear layers whose inputs "
                "divide by four"
            )
        score = scores[layer].to(weight.device).double().abs()
        if score.shape != weight.shape:
            raise ValueError(f"scores {tuple(score.shape)} of '{layer}' do not fit its weight {tuple(weight.shape)}")
        # By |weight| first, then stably by score: ties of the score keep the order of |weight|.
        fours = score.reshape(-1, 4)
        order = weight.abs().reshape(-1, 4).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, fours.gather(1, order).argsort(dim=1, descending=True, stable=True))
        mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, order[:, :2], True)
        masks[weight_name(layer)] = mask.view(weight.shape)
    return masks


@torch.no_grad()
def to_two_four(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A half-precision copy whose masked Linear layers run on the GPU's 2:4 kernels.

    Raises RuntimeError with the reason where the device has none, ValueError for masks that are not 2:4.
    """
    reason = why_not(next(model.parameters()).device)
    if reason:
        raise RuntimeError(reason)
    fast = copy.deepcopy(model).half().eval()
    known = dict(fast.named_parameters())
    for name, mask in masks.items():
        if name not in known:
            raise unknown("parameter", name, known)
        if mask.shape != known[name].shape or bool((mask.reshape(-1, 4).sum(1) > 2).any()):
            raise ValueError(f"mask '{name}' is not 2:4 on a weight of shape {tuple(known[name].shape)}")
        layer = fast.get_submodule(name.removesuffix(".weight"))
        sparse = torch.sparse.to_sparse_semi_structured(layer.weight * mask.to(layer.weight.device))
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return fast
