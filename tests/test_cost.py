"""Parameters and multiply-accumulates by hand and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gcnet.cost import layer_macs, macs, parameters


def small() -> nn.Sequential:
    """Two layers: 4 filters of 3 x 3 on 2 channels, 6 x 6 -> 3 x 3 positions; then 36 -> 5."""
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))


X = torch.zeros(7, 2, 6, 6)


def test_two_layers_by_hand() -> None:
    assert layer_macs(small(), X) == {"0": 9 * 4 * 2 * 9, "3": 36 * 5}
    assert macs(small(), X) == 648 + 180
    assert parameters(small()) == (72 + 4) + (4 + 4) + (180 + 5)


def test_masks_count_positions_times_kept_weights() -> None:
    conv = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    conv[0, 0], conv[3, 1, 1, 1] = True, True  # 10 of 72 kept
    linear = torch.ones(5, 36, dtype=torch.bool)
    linear[2] = False  # 144 of 180 kept
    assert macs(small(), X, {"0.weight": conv}) == 9 * 10 + 180
    assert macs(small(), X, {"0.weight": conv, "3.weight": linear}) == 90 + 144
    assert parameters(small(), {"0.weight": conv, "3.weight": linear}) == (10 + 4) + 8 + (144 + 5)
    assert macs(small(), X, {}) == macs(small(), X)


def test_masks_of_biases_save_parameters_but_no_macs() -> None:
    masks = {"0.bias": torch.tensor([True, False, False, True])}
    assert macs(small(), X, masks) == 828
    assert parameters(small(), masks) == parameters(small()) - 2


@pytest.mark.parametrize(
    ("layer", "shape", "count"),
    [
        (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5), 25 * 4 * 3 * 9),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5), 9 * 6 * 9),
        (nn.Conv2d(2, 3, 3, dilation=2), (2, 2, 7, 7), 9 * 3 * 2 * 9),
        (nn.Conv2d(2, 3, (1, 5), stride=(2, 1), padding=(0, 2)), (2, 2, 7, 7), 28 * 3 * 2 * 5),
        (nn.Conv1d(2, 3, 4), (2, 2, 10), 7 * 3 * 2 * 4),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 2, 4, 4), 16 * 2 * 3 * 4),
        (nn.Linear(4, 3), (2, 10, 4), 10 * 12),
    ],
)
def test_single_layers_by_hand_and_by_torch(layer: nn.Module, shape: tuple[int, ...], count: int) -> None:
    model, x = nn.Sequential(layer), torch.zeros(shape)
    assert macs(model, x) == count
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == 2 * count * shape[0]


class Shared(nn.Module):
    """One layer called on 4 x 4 and on 2 x 2, another never called, a third with the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.tied = nn.Conv2d(1, 1, 1), nn.Linear(2, 2), nn.Conv2d(1, 1, 1)
        self.tied.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.twice(nn.functional.max_pool2d(self.twice(x), 2)))


def test_a_layer_called_twice_counts_twice_and_an_idle_one_not() -> None:
    assert layer_macs(Shared(), torch.zeros(3, 1, 4, 4)) == {"twice": 16 + 4, "tied": 4}


def test_tied_weights_share_their_mask_and_count_once() -> None:
    masks = {"twice.weight": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}
    assert macs(Shared(), torch.zeros(3, 1, 4, 4), masks) == 0
    assert parameters(Shared()) == 1 + 2 + 6  # one kernel, two biases, the idle layer


NETWORKS = [
    "vgg16_bn",
    "resnet18",
    "mobilenet_v2",
    "densenet121",
    "alexnet",
    "shufflenet_v2_x0_5",
    "resnext50_32x4d",
    "efficientnet_b0",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_against_torch(name: str) -> None:
    with torch.device("meta"):  # shapes are all that counts
        model, x = torchvision.models.get_model(name, weights=None).eval(), torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert macs(model, x) == counter.get_total_flops() / 2
    assert sum(layer_macs(model, x).values()) == macs(model, x)
    assert parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_model_is_left_as_it_was() -> None:
    model = small().train()
    model[1].eval()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    macs(model, X)
    assert model.training and not model[1].training and calls == [1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model[0]._forward_hooks) == 1 and not model[0]._forward_pre_hooks and not model[3]._forward_hooks


def test_model_is_left_as_it_was_after_an_error() -> None:
    model = small().train()
    with pytest.raises(ValueError):
        macs(model, torch.zeros(1, 2, 8, 8))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((2, 6, 6), r"\(2, 6, 6\), without a batch dimension; expected \(N, C, H, W\)"),
        ((1, 3, 6, 6), r"layer '0' takes 2 input channels but gets 3 .*shape \(1, 3, 6, 6\)"),
        ((1, 2, 8, 8), r"layer '3' takes 36 input features but gets 64 .*shape \(1, 2, 8, 8\)"),
        ((0, 2, 6, 6), r"\(0, 2, 6, 6\), which is empty"),
        ((6, 6), r"\(6, 6\); expected \(N, C, H, W\)"),
    ],
)
def test_bad_example_input(shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        macs(small(), torch.zeros(shape))


def test_an_image_too_small_for_the_network() -> None:
    with pytest.raises(ValueError, match=r"cannot take example_input of shape \(1, 3, 16, 16\)"):
        macs(torchvision.models.alexnet(weights=None), torch.zeros(1, 3, 16, 16))


def test_linear_networks_take_any_batch_of_features() -> None:
    assert macs(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4)) == 12
    with pytest.raises(ValueError, match=r"\(4,\), without a batch dimension"):
        macs(nn.Sequential(nn.Linear(4, 3)), torch.zeros(4))


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match=r"unknown parameter in masks '0\.weigth'; did you mean '0\.weight'"):
        macs(small(), X, {"0.weigth": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask '0\.weight' has shape \(4, 2\); its parameter has \(4, 2, 3, 3\)"):
        parameters(small(), {"0.weight": torch.ones(4, 2, dtype=torch.bool)})


def test_the_projections_of_attention_are_counted() -> None:
    class Attention(nn.Module):
        def __init__(self, **how: object) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(8, 2, **how), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(x, x, value=x)[0])

    model, x = Attention(batch_first=True), torch.randn(1, 5, 8)
    assert layer_macs(model, x) == {
        "attention.in_proj_weight": 5 * 3 * 64, "attention.out_proj": 5 * 64, "last": 5 * 24,
    }  # fmt: skip
    half = torch.arange(64).view(8, 8) % 2 == 0
    assert macs(model, x, {"attention.out_proj.weight": half}) == 5 * (3 * 64 + 32 + 24)
    apart = Attention(batch_first=True, kdim=8, vdim=8)
    apart.attention._qkv_same_embed_dim = False
    assert sum(layer_macs(Attention(batch_first=True), x).values()) == 5 * (4 * 64 + 24)


def test_cross_attention_counts_the_tokens_of_each_side() -> None:
    class Cross(nn.Module):
        def __init__(self, **how: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **how)

        def forward(self, x: Tensor) -> Tensor:
            few = x[:, :2]
            memory = x[..., :6] if self.attention.in_proj_weight is None else x
            return self.attention(few, memory, memory)[0]

    x = torch.randn(1, 5, 8)
    assert macs(Cross(), x) == 64 * (2 + 5 + 5 + 2)
    assert macs(Cross(kdim=6, vdim=6), x) == 64 * 2 + 48 * 5 * 2 + 64 * 2
