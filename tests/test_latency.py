"""Measured latency: what is reported, that it tells fast from slow, that nothing is changed; 2:4 masks."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from gcnet.cost import VARIANTS, latency
from gcnet.two_four import to_two_four, two_four_masks, why_not


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))


class Sleeping(nn.Module):
    """Takes a known time an image."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.calls = seconds, []

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x))
        return x


X = torch.zeros(2, 3, 8, 8)


def test_known_times() -> None:
    rows = latency({"slow": Sleeping(0.004), "fast": Sleeping(0.001)}, X, batch_sizes=(1, 3), repeats=3, warm_up=1)
    assert [(row["network"], row["batch_size"]) for row in rows] == [("slow", 1), ("fast", 1), ("slow", 3), ("fast", 3)]
    for row in rows:
        known = (0.004 if row["network"] == "slow" else 0.001) * row["batch_size"]
        assert known <= row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["median_s"] < known + 0.02
    assert rows[0]["ratio"] == 1 and 0.2 < rows[3]["ratio"] < 0.6


def test_every_variant_and_what_is_stated() -> None:
    rows = latency(small(), X, batch_sizes=(2,), variants=VARIANTS, repeats=2, threads=1)
    assert [row["variant"] for row in rows] == list(VARIANTS)
    for row in rows:
        assert row["threads"] == 1 and row["repeats"] == 2 and row["device"] == "cpu" and row["network"] == "network"


def test_networks_take_turns() -> None:
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            order.append(self.name)
            return x

    latency({"a": Noted("a"), "b": Noted("b")}, X, batch_sizes=(1,), repeats=3, warm_up=1)
    assert "".join(order) == "ab" + "ab" * 3


def test_networks_and_threads_are_left_as_they_were() -> None:
    model, threads = small().train(), torch.get_num_threads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    latency(model, X, variants=("bfloat16_channels_last",), repeats=1, threads=2)
    assert model.training and torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"cannot take images of shape \(1, 5, 8, 8\) as float32"):
        latency(model, torch.zeros(1, 5, 8, 8), threads=2)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"variants": ("float23",)}, "unknown variant 'float23'; did you mean 'float32'"),
        ({"batch_sizes": (0,)}, "must be at least 1"),
        ({"repeats": 0}, "must be at least 1"),
        ({"threads": 0}, "must be at least 1"),
    ],
)
def test_bad_arguments(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        latency(small(), X, **options)
    with pytest.raises(ValueError, match="at least one network"):
        latency({}, X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_events_on_a_gpu() -> None:
    rows = latency({"a": small().cuda(), "b": small().cuda()}, X, variants=("float32", "bfloat16_channels_last"))
    assert all(0 < row["median_s"] < 1 and row["device"] != "cuda" for row in rows)


# --- 2:4 ------------------------------------------------------------------------------------------------------------


def test_two_of_four_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -9, 3, 2, 0, 0, 0, 0], [4.0, 3, 2, 1, 1, 2, 3, 4]]))
    scores = torch.tensor([[0.9, 0.1, -0.8, 0.2, 1, 1, 1, 1], [0.0, 0, 0, 0, 5, 5, 0, 0]])
    mask = two_four_masks(model, {"0": scores})["0.weight"].int().tolist()
    # By |score|; equal scores by |weight|; equal weights by position.
    assert mask == [[1, 0, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]]


def test_two_four_bad_input() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"'0' has a weight of shape \(4, 4, 1, 1\); 2:4 takes Linear"):
        two_four_masks(model, {"0": torch.ones(4, 4)})
    with pytest.raises(ValueError, match="divide by four"):
        two_four_masks(model, {"1": torch.ones(4, 6)})
    with pytest.raises(ValueError, match=r"scores \(2, 2\) of '0' do not fit"):
        two_four_masks(nn.Sequential(nn.Linear(4, 4)), {"0": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="unknown layer '7'"):
        two_four_masks(model, {"7": torch.ones(1)})


def test_the_reason_is_given_where_there_are_no_kernels() -> None:
    assert "need an NVIDIA GPU" in why_not("cpu")
    with pytest.raises(RuntimeError, match="2:4 kernels need an NVIDIA GPU, not 'cpu'"):
        to_two_four(nn.Sequential(nn.Linear(4, 4)), {})


REASON = why_not("cuda")


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_two_four_on_a_gpu_gives_what_the_masked_layer_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).cuda()
    masks = two_four_masks(model, {"0": torch.randn(256, 128), "2": torch.randn(128, 256)})
    fast = to_two_four(model, masks)
    x = torch.randn(64, 128, device="cuda").half()
    masked = model.half()
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask.cuda())
        assert torch.allclose(fast(x), masked(x), atol=5e-2, rtol=1e-2)
