"""A network as SynFlow sees it: positive weights, nothing that saturates, and what flows through it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def linearized(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode with |parameters| and without biases, for `flow`.

    Source: SynFlow, arXiv 2006.05467, section 5 (the data-free objective).
    """
    twin = copy.deepcopy(model).double().eval()
    for module in twin.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.data.zero_()
    for parameter in twin.parameters():
        parameter.data.abs_()
        parameter.requires_grad_(True)
    return twin


def flow(twin: nn.Module, example_input: Tensor) -> Tensor:
    """What arrives at the outputs of a `linearized` network for an all-ones input of that shape (one image), float64.

    Norms act as a positive factor a channel (BatchNorm: |weight| over the running deviation; the others, which would
    centre the signal, |weight|), activations as the identity, wherever they stand: as modules, functions or methods.
    What makes shares of its input (softmax, and a sigmoid that another map is multiplied by) counts as 1, and passes
    on to its input what flows through it: as the identity it would square the signal. Choices: all signals are
    positive, so a shift could only switch paths off and an activation only bend them.
    """
    with _Positive():
        out = twin(torch.ones_like(example_input[:1], dtype=torch.float64))
    if isinstance(out, Mapping):
        out = list(out.values())
    return out if isinstance(out, Tensor) else out[0]


def _identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _one(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """1 everywhere; the gradient that reaches x is such that x carries as much flow as the 1 does."""
    fires = x > 0
    return torch.where(fires, x / torch.where(fires, x, 1).detach(), 1)


def _factor(x: Tensor, weight: Tensor | None, axis: int) -> Tensor:
    if weight is None:
        return x
    return x * (weight.view(-1, *[1] * (x.ndim - 2)) if axis == 1 else weight)


def _batch_norm(
    x: Tensor, mean: Tensor | None = None, var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    slope = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if var is None else (var + eps).rsqrt()
    return _factor(x, slope if weight is None else slope * weight, 1)


def _instance_norm(
    x: Tensor, mean: Tensor | None = None, var: Tensor | None = None, weight: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return _factor(x, weight, 1)


def _group_norm(x: Tensor, groups: int, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _factor(x, weight, 1)


def _layer_norm(x: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _factor(x, weight, -1)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _one(query @ key.transpose(-1, -2)) @ value / key.shape[-2]


_SAME = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "hardswish", "leaky_relu", "leaky_relu_", "elu", "elu_",
         "selu", "selu_", "celu", "celu_", "silu", "gelu", "mish", "softplus", "softsign", "tanh", "tanh_", "clamp",
         "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "dropout", "dropout1d", "dropout2d",
         "dropout3d", "alpha_dropout", "feature_alpha_dropout")  # fmt: skip
_CASTS = ("float", "double", "half", "bfloat16", "to", "type")  # all stays float64, where it is
_GATES = ("sigmoid", "sigmoid_", "hardsigmoid")
_PRODUCTS = ("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__")
_OTHERS: dict[str, Callable[..., Tensor]] = {
    "softmax": _one, "log_softmax": _one, "softmin": _one, "batch_norm": _batch_norm, "instance_norm": _instance_norm,
    "group_norm": _group_norm, "layer_norm": _layer_norm, "rms_norm": _layer_norm, "local_response_norm": _identity,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip


class _Positive(TorchFunctionMode):
    """While it is on, torch's functions and tensors' methods are those that `flow` describes."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[int, Tensor] = {}  # by id; kept alive, or an id could come again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func in (torch.batch_norm, torch.instance_norm):  # which take them in another order
            x, weight, bias, mean, var, training, momentum, eps, *_ = args
            args = (x, mean, var, weight, bias, training, momentum, eps)
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if name in _CASTS:
            return args[0]
        if name in _OTHERS:
            return _OTHERS[name](*args, **_renamed(kwargs))
        if name in _SAME:
            return args[0]
        if name in _GATES:
            gate = args[0] * 1.0
            self.gates[id(gate)] = gate
            return gate
        if name in _PRODUCTS:
            args = tuple(_one(x) if id(x) in self.gates else x for x in args)
        return func(*args, **kwargs)


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {"input": "x", "running_mean": "mean", "running_var": "var", "num_groups": "groups",
             "normalized_shape": "shape"}  # fmt: skip
    return {names.get(name, name): value for name, value in kwargs.items()}
