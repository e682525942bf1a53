"""The estimators against closed-form truth, what they must not depend on, and what they say of bad input."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from itertools import pairwise

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from gcnet.information import BUCKETS, _excess, _Hash, acmi, mint_gmi
from gcnet.snacs_cells import gaussian_layer

pytestmark = pytest.mark.filterwarnings("error", "ignore:.*(images are fewer|parent filters)")
READINGS = [{}, {"linear": "hashed"}, {"conditioning": "projection"}]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def true_connections(parents: int, samples: int = 2000, children: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated parents, children that add three in ten of them with weights of +-(0.5 to 1.5), a little noise."""
    generator = torch.Generator().manual_seed(parents)
    parts = normal(samples, parents, seed=1)
    x = 0.7 * parts + 0.7 * parts @ normal(parents, parents, seed=2) / parents**0.5
    on = torch.rand(children, parents, generator=generator) < 0.3
    size = 0.5 + torch.rand(children, parents, generator=generator, dtype=torch.float64)
    sign = 2.0 * torch.randint(0, 2, (children, parents), generator=generator) - 1
    y = x @ (on * size * sign).T
    return x, y + 0.1 * y.std(0).clamp_min(0.5) * normal(samples, children, seed=3), on


@pytest.mark.parametrize("parents", [4, 16])
@pytest.mark.parametrize(("samples", "tolerance"), [(250, 0.03), (1000, 0.015), (4000, 0.01)])
def test_gaussian_truth(parents: int, samples: int, tolerance: float) -> None:
    x, y, truth = gaussian_layer(samples, parents, seed=parents)
    assert (acmi(x, y, (8, parents)) - truth).square().mean().sqrt() < tolerance


@pytest.mark.parametrize("r", [0.3, 0.7, 0.95])
def test_gaussian_truth_of_one_pair(r: float) -> None:
    x = normal(4000, 1)
    y = r * x + (1 - r**2) ** 0.5 * normal(4000, 1, seed=1)
    truth = -math.log(1 - r**2) / 2
    assert acmi(x, y, 1).item() == pytest.approx(truth, abs=0.03)
    hashed = acmi(x, y, 1, linear="hashed").item()  # buckets lose some of what there is, never find more
    assert 0.55 * truth < hashed < truth + 0.01


def test_gaussian_truth_of_wide_blocks() -> None:
    x, noise = normal(3000, 8), normal(3000, 4, seed=1)
    y = x @ normal(8, 4, seed=2) / 2 + noise
    found = acmi(x, y, (1, 2))
    covariance = (normal(8, 4, seed=2) / 2).T.reshape(4, 2, 4)
    for g in range(2):  # parents are independent: the variance of y given the other block, against the noise's
        explained = covariance[:, g] @ covariance[:, g].T
        assert found[0, g].item() == pytest.approx(torch.logdet(torch.eye(4) + explained).item() / 2, abs=0.06)


@pytest.mark.parametrize("parents", [16, 64])
def test_true_connections_are_found(parents: int) -> None:
    x, y, on = true_connections(parents)
    plain = torch.corrcoef(torch.cat([y, x], 1).T)[: len(on), len(on) :].abs()
    truth = on.flatten().numpy()
    found = roc_auc_score(truth, acmi(x, y, (len(on), parents)).flatten().numpy())
    assert found >= 0.95
    assert found > roc_auc_score(truth, plain.flatten().numpy()) + 0.1


@pytest.mark.parametrize("options", READINGS)
def test_independence_gives_about_nothing(options: dict) -> None:
    found = acmi(normal(2000, 8), normal(2000, 8, seed=1), 8, **options)
    assert found.mean().abs() < 0.003 and found.abs().max() < 0.025


def test_independent_wide_blocks_give_about_nothing() -> None:
    found = acmi(normal(2000, 32), normal(2000, 32, seed=1), 8)
    assert found.mean().abs() < 0.002 and found.abs().max() < 0.02


@pytest.mark.parametrize("options", READINGS)
def test_more_dependence_is_more_information(options: dict) -> None:
    x, noise = normal(2000, 4), normal(2000, 1, seed=1)
    found = [acmi(x, r * x[:, :1] + (1 - r**2) ** 0.5 * noise, (1, 4), **options)[0, 0] for r in (0, 0.3, 0.6, 0.9)]
    assert all(low < high for low, high in pairwise(found))


def test_dependence_that_is_not_linear_is_found() -> None:
    x = normal(2000, 3)
    y = x[:, :1].square() + 0.3 * normal(2000, 1, seed=1)
    found = acmi(x, y, (1, 3))[0]
    assert found[0] > 0.3 and found[1:].abs().max() < 0.02


def test_what_another_parent_explains_does_not_count() -> None:
    cause = normal(2000, 1)
    x = torch.cat([cause, cause + 0.5 * normal(2000, 1, seed=1)], 1)
    found = acmi(x, cause + 0.5 * normal(2000, 1, seed=2), (1, 2))[0]
    assert found[0] > 0.2 and found[1].abs() < 0.01


@pytest.mark.parametrize("options", READINGS[:2])
def test_order_of_samples_does_not_matter(options: dict) -> None:
    x, y, _ = gaussian_layer(400, 6, seed=1)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(acmi(x, y, (8, 6), **options), acmi(x[order], y[order], (8, 6), **options), atol=0.005)
    x, y, _ = gaussian_layer(2000, 6, seed=1)  # here the buckets' width comes from 500 of the images
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(acmi(x, y, (8, 6), **options), acmi(x[order], y[order], (8, 6), **options), atol=0.04)


@pytest.mark.parametrize("width", [1, 2])
def test_order_of_groups_does_not_matter(width: int) -> None:
    x, y, _ = gaussian_layer(600, 6, seed=1)
    groups = (8 // width, 6 // width)
    order = torch.randperm(groups[1], generator=torch.Generator().manual_seed(1))
    moved = x.view(600, groups[1], width)[:, order].flatten(1)
    assert torch.allclose(acmi(moved, y, groups), acmi(x, y, groups)[:, order], atol=1e-5)


@pytest.mark.parametrize("width", [1, 2])
def test_chunks_change_nothing(width: int) -> None:
    x, y, _ = gaussian_layer(300, 6, seed=1)
    groups = (8 // width, 6 // width)
    assert torch.allclose(acmi(x, y, groups), acmi(x, y, groups, chunk=1), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("options", READINGS[:2])
def test_a_gpu_gives_the_same(options: dict) -> None:
    x, y, _ = gaussian_layer(600, 6, seed=1)
    assert torch.allclose(acmi(x, y, (8, 6), **options), acmi(x.cuda(), y.cuda(), (8, 6), **options).cpu(), atol=1e-3)


def test_what_chance_gives_is_the_mean_over_permutations() -> None:
    hashing = _Hash((2.0,), 100, math.inf)
    x, y = normal(1, 1, 400), normal(1, 1, 400, seed=1).exp()
    i, j = next(hashing.buckets(x)), next(hashing.buckets(y))
    found = []
    for repeat in range(200):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(repeat))
        counts = torch.bincount((i * BUCKETS + j[..., order]).flatten(), minlength=BUCKETS**2)
        information, expected = hashing._information(counts.view(1, BUCKETS, BUCKETS).double(), 400)
        found.append(information)
    assert torch.stack(found).mean().item() == pytest.approx(expected.item(), rel=0.08)
    assert _excess(torch.tensor([1e3, 0.0], dtype=torch.float64)).tolist() == pytest.approx([0.5, 0.0], abs=1e-3)


def test_terms_are_clipped() -> None:
    x = normal(1000, 1)
    assert acmi(x, x + 0.1 * normal(1000, 1, seed=1), 1, linear="hashed", upper=1.0) < acmi(
        x, x + 0.1 * normal(1000, 1, seed=1), 1, linear="hashed"
    )


@pytest.mark.parametrize("options", READINGS)
def test_a_constant_filter_has_no_information(options: dict) -> None:
    x, y, _ = gaussian_layer(600, 6, seed=1)
    x[:, 2], y[:, 3] = 5.0, -1.0
    found = acmi(x, y, (8, 6), **options)
    assert bool(torch.isfinite(found).all())
    assert bool((found[:, 2] == 0).all()) and bool((found[3] == 0).all())


def test_weights_rank_connections_without_information() -> None:
    phi = torch.tensor([[0.2, 0.8]])
    x = normal(2000, 2)
    assert torch.allclose(acmi(x, torch.ones(2000, 1), (1, 2), phi), 1e-6 * phi.double())
    y = x.sum(1, keepdim=True) + normal(2000, 1, seed=1)
    assert torch.allclose(acmi(x, y, (1, 2), phi), phi * acmi(x, y, (1, 2)))


def test_bad_input() -> None:
    x = normal(50, 6)
    with pytest.raises(ValueError, match=r"4 groups do not divide the 6 filters of the parent.*\[1, 2, 3, 6\]"):
        acmi(x, x, (6, 4))
    with pytest.raises(ValueError, match="of one N"):
        acmi(x, x[:40], 6)
    with pytest.raises(ValueError, match="at least 8 images, got 5"):
        acmi(x[:5], x[:5], 6)
    with pytest.raises(ValueError, match="child are not finite"):
        acmi(x, x / torch.zeros(6), 6)
    with pytest.raises(ValueError, match=r"phi is \(2, 2\)"):
        acmi(x, x, 6, torch.ones(2, 2))
    with pytest.raises(ValueError, match="did you mean 'residual'"):
        acmi(x, x, 6, conditioning="residuals")
    with pytest.raises(ValueError, match="must be positive"):
        acmi(x, x, 6, scales=(0.0,))


def test_too_few_images_are_said() -> None:
    with pytest.warns(UserWarning, match=r"30 images are fewer than the buckets.*0\.\d\d images a bucket"):
        acmi(normal(30, 2), normal(30, 2, seed=1), 2, scales=(1.0,))
    with pytest.warns(UserWarning, match="40 images for 30 parent filters"):
        acmi(normal(40, 30), normal(40, 2, seed=1), (2, 30))
    with pytest.warns(UserWarning, match=r"conditioning parents hold \d\.\d images on average"):
        acmi(normal(8, 9), normal(8, 2, seed=1), (2, 9), conditioning="projection")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acmi(normal(500, 9), normal(500, 2, seed=1), (2, 9), conditioning="projection")


def test_spanning_trees_tell_dependence_too() -> None:
    x, noise = normal(600, 3), normal(600, 2, seed=1)
    y = torch.stack([x[:, 0], noise[:, 0]], 1) + 0.2 * noise[:, 1:]
    found = mint_gmi(x, y, (2, 3))
    assert found.shape == (2, 3)
    assert found[0, 0] > 0.3 and found[0, 0] > found[0, 1:].max() + 0.2 and found[1].abs().max() < 0.25
    assert torch.equal(mint_gmi(x, y, (2, 3), only=1), found[:, :1])
    assert mint_gmi(x[:, :1], y[:, :1], 1).item() > 0.3


def test_shared_distances_are_those_of_each_pair_alone() -> None:
    x, y = normal(120, 4), normal(120, 2, seed=1)
    found = mint_gmi(x, y, (2, 2))
    alone = [[mint_gmi(x.view(120, 2, 2).roll(-g, 1).flatten(1), y[:, [c]], (1, 2), only=1).item() for g in range(2)]
             for c in range(2)]  # fmt: skip
    assert torch.allclose(found, torch.tensor(alone, dtype=torch.float64))


def test_memory_of_spanning_trees_is_bounded() -> None:
    x, y = normal(300, 6), normal(300, 48, seed=1)
    matrix = 200 * 200 * 8

    def run(children: int, memory: int) -> tuple[Tensor, int]:
        tracemalloc.start()
        try:
            found = mint_gmi(x, y[:, : 2 * children], (children, 2), memory=memory)
            return found, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    at_once, most = run(24, 100 * matrix)
    assert most > 24 * matrix
    for memory in (14 * matrix, 17 * matrix, 0):  # chunks that do and do not divide the blocks; one by one
        found, used = run(24, memory)
        assert torch.equal(found, at_once)
        assert used < max(memory, 10 * matrix)
        assert used < run(8, memory)[1] + matrix / 2  # of three times as many blocks


def test_memory_of_counted_triples_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(400, 6), normal(400, 12, seed=1)
    sizes = []
    bincount = torch.bincount
    monkeypatch.setattr(
        torch, "bincount", lambda keys, minlength: sizes.append(minlength) or bincount(keys, minlength=minlength)
    )
    at_once = acmi(x, y, (12, 6), conditioning="projection")
    most, limit = max(sizes), max(sizes) // 5
    sizes.clear()
    assert torch.equal(acmi(x, y, (12, 6), conditioning="projection", chunk=limit), at_once)
    assert max(sizes) <= limit < most
