"""Synaptic flow: conserved through every kind of network, however its activations and norms are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet.ghost import build_ghost
from gcnet.pruning import collapsed_layers, prunable_layers, prune, sparsity
from gcnet.synaptic_flow import flow, linearized

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Chain(nn.Module):
    """Three convolutions and a classifier; what stands behind each convolution is given."""

    def __init__(
        self, bend: Callable[[Tensor], Tensor], norm: Callable[[int], nn.Module] = lambda _: nn.Identity()
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.norms = nn.ModuleList(norm(8) for _ in range(3))
        self.bend, self.last = bend, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.bend(norm(conv(x)))
        return self.last(x.mean((2, 3)))


def flows(model: nn.Module, example: Tensor = EXAMPLE) -> dict[str, float]:
    """The flow through each layer: the sum of weight times gradient."""
    twin = linearized(model)
    layers = prunable_layers(twin)
    values = [twin.get_submodule(layer).weight for layer in layers]
    grads = torch.autograd.grad(flow(twin, example).sum(), values)
    return {layer: float((w.detach() * g).sum()) for layer, w, g in zip(layers, values, grads, strict=True)}


@pytest.mark.parametrize(
    "bend",
    [F.relu, F.relu_, torch.relu, Tensor.relu, F.relu6, F.hardtanh, torch.tanh, torch.sigmoid, F.sigmoid, F.hardswish,
     F.silu, F.gelu, F.leaky_relu, F.elu, nn.Hardsigmoid(), nn.ReLU6(), nn.Tanh(), lambda x: x.clamp(0, 6),
     lambda x: F.dropout(x, 0.9, training=True)],
)  # fmt: skip
def test_an_activation_is_the_identity_however_it_is_written(bend: Callable[[Tensor], Tensor]) -> None:
    plain = Chain(nn.Identity())
    assert flows(Chain(bend)) == pytest.approx(flows(plain))
    masks = prune(Chain(bend), pruner="os_synflow", sparsity=0.8, example_input=EXAMPLE)
    wanted = prune(plain, pruner="os_synflow", sparsity=0.8, example_input=EXAMPLE)
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(4, c), lambda c: nn.GroupNorm(1, c),
                                  lambda c: nn.InstanceNorm2d(c, affine=True), nn.InstanceNorm2d,
                                  lambda c: nn.BatchNorm2d(c, track_running_stats=False)])  # fmt: skip
def test_flow_is_conserved_through_norms(norm: Callable[[int], nn.Module]) -> None:
    found = list(flows(Chain(F.relu, norm)).values())
    assert found[0] > 0 and found == pytest.approx([found[0]] * 4)


def test_layer_norm_over_the_last_axis_and_functional_norms() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    found = list(flows(model, torch.zeros(1, 6)).values())
    assert found == pytest.approx([found[0]] * 3)
    mean, var = torch.zeros(8, dtype=torch.float64), torch.full((8,), 4.0, dtype=torch.float64)
    as_function = Chain(lambda x: torch.batch_norm(x, None, None, mean, var, False, 0.1, 0.0, False))
    halved = Chain(lambda x: F.batch_norm(x, mean, var, eps=0.0))
    assert flows(as_function) == pytest.approx(flows(halved)) != flows(Chain(F.relu))


@pytest.mark.parametrize("head", [lambda x: F.softmax(x, 1), lambda x: F.log_softmax(x, dim=1), nn.Softmax(1),
                                  lambda x: x.softmax(-1)])  # fmt: skip
def test_a_softmax_at_the_end_does_not_stop_the_flow(head: Callable[[Tensor], Tensor]) -> None:
    class Ending(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return head(super().forward(x))

    found = list(flows(Ending(F.relu)).values())
    assert found[0] > 0 and found == pytest.approx([found[0]] * 4)
    masks = prune(Ending(F.relu), pruner="os_synflow", sparsity=0.8, example_input=EXAMPLE)
    assert collapsed_layers(masks) == ()


def test_a_gate_does_not_square_the_signal() -> None:
    class Gated(nn.Module):
        def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.squeeze, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 3)
            self.gate = gate

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True))))

    for gate in (torch.sigmoid, F.hardsigmoid, nn.Sigmoid()):
        twin = linearized(Gated(gate))
        ungated = twin.last(twin.first(torch.ones(1, 3, 8, 8, dtype=torch.float64)))
        assert torch.allclose(flow(twin, EXAMPLE), ungated)
        found = flows(Gated(gate))
        assert found["squeeze"] == pytest.approx(found["last"]) and found["first"] == pytest.approx(2 * found["last"])


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny"])
def test_networks_with_gates_are_pruned(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    masks = prune(model, pruner="os_synflow", sparsity=0.5, example_input=torch.zeros(1, 3, 32, 32))
    assert sparsity(masks) == pytest.approx(0.5, abs=1e-4)


def test_queries_and_keys_carry_flow() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.queries, self.keys, self.values = (nn.Linear(6, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.queries(x), self.keys(x), self.values(x))

    found = flows(Attention(), torch.zeros(1, 5, 6))
    assert list(found.values()) == pytest.approx([found["values"]] * 3)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
def test_the_ghosts_norms_are_the_identity(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm).eval()
    x = torch.randn(2, 8, 4, 4)
    assert torch.allclose(build_ghost(model, {})[1](x), x, atol=1e-5)


class Cast(nn.Module):
    """What users write: casts, arguments by keyword, outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = torch.clamp(input=self.conv(images.float()), min=0).to(torch.float32)
        return {"logits": self.head(x.mean((2, 3)).type(torch.float32))}


def test_casts_keywords_and_named_outputs_are_no_obstacle() -> None:
    masks = prune(Cast(), pruner="os_synflow", sparsity=0.5, example_input=torch.rand(1, 3, 8, 8))
    assert sparsity(masks) == pytest.approx(0.5, abs=0.01)
