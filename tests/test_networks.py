"""Every network of the registry at every size it promises, and the zoo of torchvision by name."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gcnet.networks import NETWORKS, build


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("width", [0.125, 0.25])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_at_every_width_channels_and_size(name: str, width: float, channels: int, size: int) -> None:
    model = build(name, 7, channels=channels, width=width, seed=0).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7) and bool(logits.isfinite().all())
    assert not torch.equal(logits[0], logits[1])  # the images reach the output


@pytest.mark.parametrize("name", NETWORKS)
def test_odd_sizes_are_taken(name: str) -> None:
    with torch.device("meta"):
        assert build(name, 5, width=0.25)(torch.zeros(2, 3, 33, 47)).shape == (2, 5)


# As published for CIFAR-10, convolutions in front of BatchNorm without bias, projection shortcuts.
FULL_SIZES = {
    "vgg16_bn": 14_724_042,
    "resnet18": 11_173_962,
    "resnet20": 272_474,
    "resnet56": 855_770,
    "mobilenet_v2": 2_236_682,
}


@pytest.mark.parametrize("name", FULL_SIZES)
def test_parameters_at_full_width(name: str) -> None:
    with torch.device("meta"):
        assert count(build(name, 10)) == FULL_SIZES[name]


def test_alexnet_has_five_convolutions_and_three_linear_layers() -> None:
    layers = [type(m) for m in build("alexnet", 10, width=0.25).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert layers == [nn.Conv2d] * 5 + [nn.Linear] * 3


def test_residual_networks_of_torchvision_and_ours_differ_by_the_stem_alone() -> None:
    with torch.device("meta"):
        ours, theirs = build("resnet18", 10), torchvision.models.resnet18(num_classes=10)
        assert count(theirs) - count(ours) == 3 * 64 * (7 * 7 - 3 * 3)
        assert count(build("mobilenet_v2", 10)) == count(torchvision.models.mobilenet_v2(num_classes=10))


@pytest.mark.parametrize("name", NETWORKS)
def test_width_scales_the_channels(name: str) -> None:
    def channels(width: float) -> list[int]:
        with torch.device("meta"):
            return [m.out_channels for m in build(name, 10, width=width).modules() if isinstance(m, nn.Conv2d)]

    assert channels(0.5) == [c // 2 for c in channels(1.0)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_width_without_channels_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"width 0\.001 leaves no channel of \d+"):
        build(name, 10, width=0.001)


@pytest.mark.parametrize("width", [-1.0, float("nan"), float("inf")])
def test_a_width_that_is_no_size_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match=f"width {width}"):
        build("vgg16_bn", 10, width=width)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_follow_from_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = build(name, 10, width=0.125, seed=3)
    torch.manual_seed(2)
    assert torch.equal(weights(first), weights(build(name, 10, width=0.125, seed=3)))
    assert not torch.equal(weights(first), weights(build(name, 10, width=0.125, seed=4)))


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    build("resnet20", 10, width=0.25, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_signals_neither_die_nor_explode_at_the_start() -> None:
    model = build("resnet56", 10, width=0.25, seed=0).train()
    with torch.no_grad():
        spread = model(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))).std().item()
    assert 0.01 < spread < 100


def test_torchvision_by_name() -> None:
    model = build("torchvision:resnet18", 7, seed=0).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert isinstance(model, torchvision.models.ResNet)
    assert torch.equal(model.fc.weight, build("torchvision:resnet18", 7, seed=0).fc.weight)


def test_bad_names_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"unknown network 'resnet_20'; did you mean 'resnet20'\?"):
        build("resnet_20", 10)
    with pytest.raises(ValueError, match=r"unknown torchvision network 'resnet81'; did you mean 'resnet\d+'\?"):
        build("torchvision:resnet81", 10)
    with pytest.raises(ValueError, match=r"torchvision:resnet18 takes 3 channels at width 1, got 1 channels"):
        build("torchvision:resnet18", 10, channels=1)
    with pytest.raises(ValueError, match=r"at least 2 classes, got 1"):
        build("resnet20", 1)
