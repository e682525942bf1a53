"""What is read behind a layer, and how it is accumulated: as if all images had been there at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gcnet.activations import Moments, Reservoir, activations, stream
from gcnet.cost import evaluation_mode
from gcnet.graph import layer_graph

A, B = ("a", "conv"), ("b", "conv")


def small(inplace: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm with statistics of its own, ReLU, then a Linear layer on the flattened map."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=inplace), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12, 4), nn.ReLU(inplace=inplace),
    )  # fmt: skip
    model[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    model[1].running_var.copy_(torch.tensor([0.5, 1.5, 1.0]))
    return model


def images(count: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def batches(x: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    labels = torch.arange(len(x)) % 3
    for start in range(0, len(x), size):
        yield x[start : start + size], labels[start : start + size]


def read(model: nn.Module, taps: list, x: Tensor, size: int = 4) -> dict:
    graph = layer_graph(model, x[:1])
    parts = [values for values, _ in stream(model, batches(x, size), graph, taps)]
    return {tap: torch.cat([part[tap] for part in parts]) for tap in taps}


@pytest.mark.parametrize("inplace", [False, True])
def test_taps_read_what_they_say_even_where_the_activation_works_in_place(inplace: bool) -> None:
    taps = [("0", "conv"), ("0", "relu"), ("0", "input"), ("5", "input"), ("5", "conv"), ("5", "relu")]
    x = images()
    found = read(small(inplace), taps, x)
    model = small(inplace=False).eval()
    with torch.no_grad():
        conv = model[0](x)
        relu = model[2](model[1](conv))
        flat = model[4](model[3](relu))
        logits = model[5](flat)
    expected = [conv.mean((2, 3)), relu.mean((2, 3)), x.mean((2, 3)), flat, logits, logits.relu()]
    for tap, value in zip(taps, expected, strict=True):
        assert torch.allclose(found[tap], value, atol=1e-6), tap
    assert not torch.allclose(found["0", "conv"], found["0", "relu"])


def test_a_linear_layer_on_tokens_is_averaged_over_the_tokens() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(6, 7, 5)
    found = read(model, [("0", "conv"), ("2", "input")], x)
    assert torch.allclose(found["0", "conv"], model[0](x).mean(1), atol=1e-6)
    assert torch.allclose(found["2", "input"], model[0](x).relu().mean(1), atol=1e-6)


def test_scalars_are_float32_whatever_the_network_computes_in() -> None:
    model = small().to(torch.bfloat16)
    found = read(model, [("0", "conv")], images().to(torch.bfloat16))
    assert found["0", "conv"].dtype == torch.float32


def test_labels_come_along() -> None:
    x = images(7)
    graph = layer_graph(small(), x)
    labels = [y for _, y in stream(small(), batches(x, 3), graph, [("0", "conv")])]
    assert torch.cat(labels).tolist() == [0, 1, 2, 0, 1, 2, 0]


def state(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


@pytest.mark.parametrize("end", ["to the end", "left midway", "loader fails", "NaN"])
def test_mode_and_buffers_are_as_before(end: str) -> None:
    model = small().train()
    model[2].eval()  # modes are restored module by module
    before, modes = state(model), [module.training for module in model.modules()]
    graph = layer_graph(model, images(1))

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(images(), 4)
        if end == "loader fails":
            raise OSError("the disk went away")
        if end == "NaN":
            yield torch.full((1, 2, 4, 4), float("nan")), torch.zeros(1)

    reading = stream(model, source(), graph, [("0", "conv")])
    if end == "left midway":
        next(reading)
    elif end == "to the end":
        list(reading)
    else:
        with pytest.raises(OSError if end == "loader fails" else FloatingPointError):
            list(reading)
    assert [module.training for module in model.modules()] == modes and unchanged(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_eval_mode_is_restored_after_an_error() -> None:
    model = small().train()
    model[1].eval()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_layer_that_is_not_finite_is_named(value: float) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        model[1].weight[0, 0] = value
    taps = [(name, "conv") for name in "210"]
    with pytest.raises(FloatingPointError, match="activations of layer '1' are not finite"):
        read(model, taps, images())


def test_no_gradient_is_kept() -> None:
    found = read(small(), [("0", "conv")], images())
    assert not found["0", "conv"].requires_grad


# --- moments --------------------------------------------------------------------------------------------------------


def moments_of(a: np.ndarray, b: np.ndarray, cuts: list[int], merged: int) -> Moments:
    moments = Moments([(A, B), (A, A), (A, B)])
    moments._MERGED = merged
    edges = [0, *sorted(cuts), len(a)]
    for start, stop in pairwise(edges):
        moments.update({A: torch.from_numpy(a[start:stop]), B: torch.from_numpy(b[start:stop])})
    return moments


@given(
    st.integers(2, 40),
    st.lists(st.integers(0, 40), max_size=6),
    st.sampled_from([0.0, 1.0, 1e4, -1e8]),
    st.integers(0, 9),
    st.sampled_from([1, 7, 1000]),
)
def test_moments_do_not_depend_on_the_batches_and_keep_their_digits(
    count: int, cuts: list[int], mean: float, seed: int, merged: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(count, 3)), rng.normal(size=(count, 2))
    moments = moments_of(a + mean, b - mean, [min(cut, count) for cut in cuts], merged)
    x, y = a - a.mean(0), b - b.mean(0)
    loss = 1e-10 + abs(mean) * 1e-14  # what adding the mean to float64 numbers costs
    assert moments.count == count
    assert np.allclose(moments.cross[A, B], x.T @ y, rtol=1e-9, atol=count * 10 * loss)
    assert np.allclose(moments.cross[A, A], x.T @ x, rtol=1e-9, atol=count * 10 * loss)
    assert np.allclose(moments.square[B], (y**2).sum(0), rtol=1e-9, atol=count * 10 * loss)
    assert np.allclose(moments.mean[A], a.mean(0) + mean, rtol=1e-12, atol=1e-12)


def test_moments_leave_what_they_are_given_alone() -> None:
    moments = Moments([(A, B)])
    value = torch.randn(4, 2, dtype=torch.float64)
    before = value.clone()
    for _ in range(3):
        moments.update({A: value, B: value})
    assert torch.equal(value, before)


# --- the reservoir --------------------------------------------------------------------------------------------------


def sampled(count: int, size: int, seed: int, cuts: tuple[int, ...] = ()) -> tuple[list[float], list[int]]:
    """Rows numbered from 0, their labels 100 more; the second tap is the negative of the first."""
    reservoir = Reservoir([A, B], size, seed)
    edges = [0, *cuts, count]
    for start, stop in pairwise(edges):
        rows = torch.arange(start, stop, dtype=torch.float32)[:, None]
        reservoir.update({A: rows, B: -rows}, torch.arange(start, stop) + 100)
    assert torch.equal(reservoir.values[A], -reservoir.values[B])
    return reservoir.values[A][:, 0].tolist(), reservoir.labels.tolist()


@given(st.integers(1, 60), st.integers(1, 30), st.lists(st.integers(0, 60), max_size=5), st.integers(0, 20))
def test_the_sample_does_not_depend_on_the_batches(count: int, size: int, cuts: list[int], seed: int) -> None:
    rows, labels = sampled(count, size, seed)
    assert len(rows) == min(count, size) and len(set(rows)) == len(rows)
    assert labels == [row + 100 for row in rows]
    assert sampled(count, size, seed, tuple(sorted(min(cut, count) for cut in cuts))) == (rows, labels)
    if count <= size:
        assert rows == list(range(count))


def test_every_image_is_as_likely_as_any_other() -> None:
    taken = np.zeros(20)
    for seed in range(2000):
        taken[[int(row) for row in sampled(20, 5, seed, (7, 11))[0]]] += 1
    # 500 expected of each, standard deviation 19
    assert abs(taken - 500).max() < 80


def test_another_seed_draws_others() -> None:
    assert sampled(50, 10, 0) != sampled(50, 10, 1)


def test_activation_matrices_of_every_layer() -> None:
    model, x = small(), images(30)
    graph = layer_graph(model, x)
    found, labels = activations(model, batches(x, 7), graph, samples=100)
    with torch.no_grad():
        model.eval()
        assert torch.allclose(found["0"], model[0](x).mean((2, 3)), atol=1e-6)
        assert torch.allclose(found["5"], model[:6](x), atol=1e-6)
    assert labels.tolist() == [k % 3 for k in range(30)]
    few, few_labels = activations(model, batches(x, 7), graph, samples=8, seed=3, tap="relu")
    assert few["0"].shape == (8, 3) and few["5"].shape == (8, 4) and len(few_labels) == 8
    every, _ = activations(model, batches(x, 7), graph, samples=100, tap="relu")
    assert all(bool((every["5"] == row).all(1).any()) for row in few["5"])
