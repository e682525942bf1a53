"""The ghost: a network of the same architecture whose weights are the connectivity of the original."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gcnet.errors import unknown
from gcnet.graph import LayerGraph

# Norms that centre every image's own signal: no statistics of theirs make them the identity.
_CENTRING = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def expand(connectivity: Tensor, weight: Tensor) -> Tensor:
    """A matrix (C_out, C_in per group) as a weight of the layer's shape: one value at every kernel position.

    Source: GC-Net, Fig. 1 step 3. Raises ValueError when the matrix does not fit the weight.
    """
    if connectivity.shape != weight.shape[:2]:
        raise ValueError(
            f"connectivity {tuple(connectivity.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        )
    shape = connectivity.shape + (1,) * (weight.ndim - 2)
    return connectivity.to(weight).view(shape).expand(weight.shape).clone(memory_format=torch.contiguous_format)


def check_batchnorm(batchnorm: str) -> None:
    if batchnorm not in ("identity", "original"):
        raise ValueError(f"batchnorm must be identity or original, got '{batchnorm}'")


@torch.no_grad()
def build_ghost(
    model: nn.Module,
    connectivity: Mapping[str, Tensor],
    graph: LayerGraph | None = None,
    *,
    batchnorm: str = "identity",
) -> nn.Module:
    """The companion network: same modules, weights = connectivity expanded over the kernels.

    connectivity: {layer: (C_out, C_in per group)}. Biases are 0 and normalisation layers the identity (choice;
    batchnorm="original" keeps the original's). A layer without connectivity (the first one: it has no parent) keeps
    the original's weights (choice: only the flow of SynFlow through the ghost sees them, they are pruned directly).
    graph: where it is given, every layer that has a parent must have its connectivity. The model is not changed. Raises
    ValueError when a matrix does not fit its layer, is of no layer, or is missing by the graph.
    """
    check_batchnorm(batchnorm)
    if graph is not None and (missing := [n for n in graph.layers if graph.others(n) and n not in connectivity]):
        raise ValueError(f"no connectivity is given for the layers {missing}")
    ghost = copy.deepcopy(model).eval()
    known = [name for name, module in ghost.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for name in connectivity:
        if name not in known:
            raise unknown("layer", name, known)
    for name, module in list(ghost.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if name in connectivity:
                try:
                    module.weight.data = expand(connectivity[name], module.weight)
                except ValueError as error:
                    raise ValueError(f"layer '{name}': {error}") from None
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and batchnorm == "identity":
            if module.running_mean is not None:
                module.running_mean.zero_()
                module.running_var.fill_(1 - module.eps)
            if module.weight is not None:
                module.weight.fill_(1)
                module.bias.zero_()
        elif isinstance(module, _CENTRING) and batchnorm == "identity" and name:
            ghost.set_submodule(name, nn.Identity())
    return ghost


@torch.no_grad()
def build_mixture(model: nn.Module, connectivity: Mapping[str, Tensor], exponent: float) -> nn.Module:
    """The network with every weight multiplied by |connectivity| ** exponent, scaled to mean 1 within its layer.

    So a base pruner ranks by magnitude and connectivity together; layers without connectivity, and the balance between
    layers, stay as they are. exponent: 0 leaves the network as it is, 1 is the product. Source: this project (choice).
    The model is not changed. Raises ValueError when a matrix does not fit its layer or the exponent is negative.
    """
    if exponent < 0:
        raise ValueError(f"the exponent of connectivity must not be negative, got {exponent}")
    mixture = copy.deepcopy(model).eval()
    for name, matrix in connectivity.items():
        weight = mixture.get_submodule(name).weight
        factor = matrix.abs().double() ** exponent
        try:
            weight.mul_(expand(factor / factor.mean().clamp_min(1e-12), weight))
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from None
    return mixture
