"""The ghost: connectivity as weights of the same architecture, and nothing of the original touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gcnet.ghost import build_ghost, build_mixture, expand
from gcnet.graph import layer_graph


def small() -> nn.Sequential:
    """conv 2 -> 4 with BatchNorm, grouped conv 4 -> 6, flatten of 2 x 2, linear 24 -> 3; nothing at its default."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1), groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.uniform_(-1, 1)
    return model


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"3": torch.rand(6, 2, generator=generator) - 0.5, "6": torch.rand(3, 24, generator=generator) - 0.5}


def test_one_value_at_every_kernel_position() -> None:
    matrix = torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    weight = expand(matrix, torch.empty(2, 2, 3, 1))
    assert weight.shape == (2, 2, 3, 1)
    assert all(torch.equal(weight[:, :, k, 0], matrix) for k in range(3))
    assert torch.equal(expand(matrix, torch.empty(2, 2)), matrix)


def test_the_type_is_that_of_the_weight() -> None:
    assert expand(torch.ones(2, 2), torch.empty(2, 2, dtype=torch.float64)).dtype == torch.float64


def test_a_matrix_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"connectivity \(2, 3\) does not fit a weight of shape \(3, 2, 5, 5\)"):
        expand(torch.ones(2, 3), torch.empty(3, 2, 5, 5))


def test_the_weights_of_the_ghost_are_its_connectivity() -> None:
    model, found = small(), matrices()
    ghost = build_ghost(model, found)
    for row in range(6):
        for column in range(2):
            assert bool((ghost[3].weight[row, column] == found["3"][row, column]).all())
    assert torch.equal(ghost[6].weight, found["6"])
    assert bool((ghost[3].bias == 0).all()) and bool((ghost[6].bias == 0).all())


def test_a_layer_without_a_parent_keeps_its_weights_but_not_its_bias() -> None:
    model = small()
    ghost = build_ghost(model, matrices())
    assert torch.equal(ghost[0].weight, model[0].weight) and bool((ghost[0].bias == 0).all())


def test_batchnorm_is_the_identity() -> None:
    ghost = build_ghost(small(), matrices())
    x = torch.randn(3, 4, 5, 5)
    assert not ghost.training and torch.allclose(ghost[1](x), x, rtol=2e-7, atol=0)


def test_batchnorm_of_the_original_on_request() -> None:
    model = small()
    ghost = build_ghost(model, matrices(), batchnorm="original")
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(ghost[1](x), model.eval()[1](x))
    with pytest.raises(ValueError, match="batchnorm must be identity or original, got 'none'"):
        build_ghost(model, matrices(), batchnorm="none")


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)]
)
def test_every_kind_of_normalisation_is_taken(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Conv2d(4, 2, 1))
    ghost = build_ghost(model, {"2": torch.ones(2, 4)})
    assert bool(ghost(torch.rand(2, 2, 3, 3)).isfinite().all())


def test_the_ghost_computes_by_hand() -> None:
    """All-ones input: |connectivity| along the only path, times the weights of the first layer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
    ghost = build_ghost(model, {"3": torch.tensor([[0.5, -0.25]])})
    assert ghost(torch.ones(1, 1, 1, 1)).item() == pytest.approx(2 * 0.5 - 3 * 0.25, abs=1e-5)


@pytest.mark.parametrize("batchnorm", ["identity", "original"])
def test_the_original_is_as_before_and_shares_nothing(batchnorm: str) -> None:
    model, found = small().train(), matrices()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ghost = build_ghost(model, found, batchnorm=batchnorm)
    with torch.no_grad():
        for value in ghost.state_dict().values():
            value.zero_()
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(found[name], value) for name, value in matrices().items())


def test_a_matrix_of_another_network_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layer '6': connectivity \(3, 6\) does not fit a weight of shape \(3, 24\)"):
        build_ghost(small(), {"6": torch.ones(3, 6)})
    with pytest.raises(ValueError, match=r"layer '9'"):
        build_ghost(small(), {"9": torch.ones(3, 6)})


# --- magnitude and connectivity together ---


def test_a_mixture_multiplies_and_keeps_each_layers_balance() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False))
    for layer in model:
        nn.init.constant_(layer.weight, 2.0)
    matrix = torch.tensor([[0.5, -0.1], [0.2, 0.0]])  # mean of the magnitudes 0.2
    mixture = build_mixture(model, {"1": matrix}, 1.0)
    assert mixture[1].weight.flatten().tolist() == pytest.approx([5.0, 1.0, 2.0, 0.0])
    assert torch.equal(mixture[0].weight, model[0].weight) and torch.all(model[1].weight == 2)
    assert torch.equal(build_mixture(model, {"1": matrix.abs() + 1}, 0.0)[1].weight, model[1].weight)
    with pytest.raises(ValueError, match="must not be negative"):
        build_mixture(model, {"1": matrix}, -1.0)
    with pytest.raises(ValueError, match="layer '1'"):
        build_mixture(model, {"1": matrix[:1]}, 1.0)


def test_a_graph_tells_which_layers_need_connectivity() -> None:
    model, found = small(), matrices()
    graph = layer_graph(model, torch.zeros(1, 2, 2, 2))
    assert torch.equal(build_ghost(model, found, graph)[6].weight, found["6"])
    with pytest.raises(ValueError, match=r"no connectivity is given for the layers \['3'\]"):
        build_ghost(model, {"6": found["6"]}, graph)
