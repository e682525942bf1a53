"""Similarities against numpy, scipy and direct formulas; connectivity of small networks worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gcnet.activations import Reservoir, sampled_rows
from gcnet.connectivity import (
    SIMILARITIES,
    connectivity,
    cosine,
    distance_correlation,
    hsic,
    mutual_information,
    partial,
    pearson,
    spearman,
)
from gcnet.graph import layer_graph
from gcnet.hybrid import split

# --- paired samples -------------------------------------------------------------------------------------------------


def paired(count: int = 60, parents: int = 4, children: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Children that depend on the parents, more or less."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, parents, generator=generator, dtype=torch.float64)
    mix = torch.randn(parents, children, generator=generator, dtype=torch.float64)
    return x, torch.tanh(x @ mix) + 0.3 * torch.randn(count, children, generator=generator, dtype=torch.float64)


def pairwise(parent: Tensor, child: Tensor, measure: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    x, y = parent.double().numpy(), child.double().numpy()
    return np.array([[measure(x[:, i], y[:, j]) for i in range(x.shape[1])] for j in range(y.shape[1])])


def centred(kernel: np.ndarray) -> np.ndarray:
    return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()


def distance_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    a, b = (centred(np.abs(v[:, None] - v[None, :])) for v in (x, y))
    covariance, x_variance, y_variance = ((p * q).mean() for p, q in ((a, b), (a, a), (b, b)))
    return np.sqrt(covariance / np.sqrt(x_variance * y_variance))


def hsic_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    kernels = []
    for v in (x, y):
        distance = np.abs(v[:, None] - v[None, :])
        width = np.sort(distance.ravel())[(distance.size - 1) // 2]
        kernels.append(centred(np.exp(-(distance**2) / (2 * width**2))))
    k, l = kernels  # noqa: E741
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


REFERENCES = {
    pearson: lambda x, y: np.corrcoef(x, y)[0, 1],
    spearman: lambda x, y: scipy.stats.spearmanr(x, y).statistic,
    cosine: lambda x, y: x @ y / (np.linalg.norm(x) * np.linalg.norm(y)),
    distance_correlation: distance_by_hand,
    hsic: hsic_by_hand,
}


@pytest.mark.parametrize("similarity", REFERENCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("count", [2, 3, 60])
def test_against_the_definition(similarity: Callable, count: int) -> None:
    if count == 2 and similarity is hsic:
        count = 4  # the median distance of two images is 0
    x, y = paired(count)
    expected = pairwise(x, y, REFERENCES[similarity])
    assert np.allclose(similarity(x, y), expected, atol=2e-5)


def test_ties_share_their_mean_rank() -> None:
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.integers(0, 4, (50, 3))), torch.from_numpy(rng.integers(0, 3, (50, 2)))
    assert np.allclose(spearman(x, y), pairwise(x, y, REFERENCES[spearman]))


def test_spearman_sees_order_only() -> None:
    x, y = paired()
    assert torch.allclose(spearman(x.exp(), y), spearman(x, y))


def test_distance_correlation_sees_what_pearson_does_not() -> None:
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    assert pearson(x, x.square()).abs() < 1e-9 and distance_correlation(x, x.square()) > 0.4
    assert hsic(x, x.square()) > 0.3 and mutual_information(x, x.square()) > 0.7


@pytest.mark.parametrize("mean", [1e4, -1e6])
@pytest.mark.parametrize("similarity", [n for n in SIMILARITIES if n != "cosine"])
def test_large_means_lose_no_digits(similarity: str, mean: float) -> None:
    x, y = paired()
    measure = SIMILARITIES[similarity].sampled
    assert torch.allclose(measure(x + mean, y - mean), measure(x, y), atol=1e-6)


# --- mutual information ---------------------------------------------------------------------------------------------


def gaussian(rho: float, count: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    return x, rho * x + (1 - rho**2) ** 0.5 * noise


def test_mutual_information_of_independent_filters_is_about_0() -> None:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    y = torch.randn(2000, 8, generator=torch.Generator().manual_seed(2))
    assert mutual_information(x, y).mean() < 0.07


def test_mutual_information_grows_with_dependence_on_the_scale_of_a_correlation() -> None:
    values = [mutual_information(*gaussian(rho)).item() for rho in (0.0, 0.3, 0.5, 0.7, 0.9, 0.99)]
    assert values == sorted(values) and values[0] < 0.1
    assert values[2:5] == pytest.approx([0.5, 0.7, 0.9], abs=0.12)


# --- partial correlation --------------------------------------------------------------------------------------------


def test_partial_correlation_against_the_inverse_covariance() -> None:
    x, y = paired(5000)
    expected = np.empty((3, 4))
    for j in range(3):
        precision = np.linalg.inv(np.cov(np.column_stack([x, y[:, j]]).T))
        expected[j] = -precision[4, :4] / np.sqrt(precision[4, 4] * np.diag(precision)[:4])
    assert np.allclose(partial(x, y, ridge=1e-9), expected, atol=1e-6)
    assert np.allclose(partial(x, y), expected, atol=0.01)  # a small ridge changes little


def test_partial_correlation_against_the_formula_with_its_ridge() -> None:
    """rho = B / sqrt(B^2 + s^2 (S^-1)_ii), S the parents' correlations with lambda on the diagonal."""
    x, y = paired(40, seed=3)
    ridge = 0.05
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    s_inverse = np.linalg.inv(np.cov(z.T) + ridge * np.eye(4))
    for j in range(3):
        t = ((y[:, j] - y[:, j].mean()) / y[:, j].std()).numpy()
        b = s_inverse @ (z.T @ t / 39)
        rest = ((t - z @ b) ** 2).sum() / 39
        assert np.allclose(partial(x, y, ridge=ridge)[j], b / np.sqrt(b**2 + rest * np.diag(s_inverse)), atol=1e-9)


def test_partial_correlation_gives_a_bystander_no_credit() -> None:
    generator = torch.Generator().manual_seed(0)
    cause, noise, other = torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    bystander = cause + 0.5 * noise  # moves together with the cause and does nothing
    child = (cause + 0.5 * other)[:, None]
    parents = torch.stack([cause, bystander], 1)
    assert pearson(parents, child)[0, 1] > 0.75
    assert partial(parents, child)[0, 1].abs() < 0.05 and partial(parents, child)[0, 0] > 0.5


def test_partial_correlation_with_fewer_images_than_parents_is_finite() -> None:
    x, y = paired(10, parents=30)
    rho = partial(x, y)
    assert bool(rho.isfinite().all()) and rho.abs().max() <= 1


# --- what every similarity keeps to ---------------------------------------------------------------------------------


every = pytest.mark.parametrize("name", SIMILARITIES)
# The cosine is not centred: to it a constant is a direction like any other.
every_dead = pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in SIMILARITIES for level in (0.0, 0.1, 1e4, -1 / 3) if name != "cosine" or not level],
)


@every
@given(seed=st.integers(0, 1000), count=st.integers(2, 30), parents=st.integers(1, 4), children=st.integers(1, 4))
@settings(max_examples=15)
def test_shape_and_range(name: str, seed: int, count: int, parents: int, children: int) -> None:
    x, y = paired(count, parents, children, seed)
    value = SIMILARITIES[name].sampled(x, y)
    assert value.shape == (children, parents) and bool(value.isfinite().all()) and value.abs().max() <= 1
    assert torch.equal(SIMILARITIES[name].sampled(x, y), value)


@every_dead
@pytest.mark.parametrize("count", [7, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_filter_is_0_and_leaves_the_others_alone(
    name: str, level: float, count: int, dtype: torch.dtype
) -> None:
    x, y = paired(count)
    measure = SIMILARITIES[name].sampled
    dead_x, dead_y = x.clone(), y.clone()
    dead_x[:, 1], dead_y[:, 2] = level, level
    value = measure(dead_x.to(dtype), dead_y.to(dtype))
    assert bool((value[:, 1] == 0).all()) and bool((value[2] == 0).all())
    alive = measure(x[:, [0, 2, 3]].float(), y[:, :2].float())
    assert torch.allclose(value[:2][:, [0, 2, 3]], alive, atol=1e-5)


@every
def test_fewer_than_two_images_are_refused(name: str) -> None:
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 images, got {count}"):
            SIMILARITIES[name].sampled(torch.zeros(count, 3), torch.zeros(count, 2))
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(4, 2\).*one N"):
        SIMILARITIES[name].sampled(torch.zeros(5, 3), torch.zeros(4, 2))


@every
def test_inputs_are_not_changed(name: str) -> None:
    x, y = paired()
    before = x.clone(), y.clone()
    SIMILARITIES[name].sampled(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("name", [n for n in SIMILARITIES if n != "cosine"])
def test_units_do_not_matter(name: str) -> None:
    x, y = paired()
    scale = torch.tensor([1e-3, 1.0, 40.0, 1e3], dtype=torch.float64)
    measure = SIMILARITIES[name].sampled
    assert torch.allclose(measure(x * scale + 2, 5 * y - 1), measure(x, y), atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SIMILARITIES if n != "mutual_information"])
def test_the_order_of_the_images_does_not_matter(name: str) -> None:
    x, y = paired()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    measure = SIMILARITIES[name].sampled
    assert torch.allclose(measure(x[order], y[order]), measure(x, y), atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SIMILARITIES if n not in ("mutual_information", "partial")])
def test_a_filter_is_like_itself(name: str) -> None:
    x, _ = paired()
    value = SIMILARITIES[name].sampled(x, x)
    assert torch.allclose(value.diagonal(), torch.ones(4, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(value, value.T, atol=1e-5)


@pytest.mark.parametrize("name", ["pearson", "spearman", "cosine", "partial"])
def test_signs_turn_with_the_filter(name: str) -> None:
    x, y = paired()
    measure = SIMILARITIES[name].sampled
    assert torch.allclose(measure(x, -y), -measure(x, y), atol=1e-9)


# --- networks -------------------------------------------------------------------------------------------------------

Batches = list[tuple[Tensor, Tensor]]


def cut(x: Tensor, size: int, labels: Tensor | None = None) -> Batches:
    labels = torch.arange(len(x)) % 3 if labels is None else labels
    return list(zip(x.split(size), labels.split(size), strict=True))


def outputs(model: nn.Module, x: Tensor, *names: str) -> dict[str, Tensor]:
    """(N, C) means of what the named modules give in eval mode, through hooks of our own."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: found.__setitem__(
                    name, (out.flatten(2).mean(2) if out.ndim == 4 else out).detach().clone()
                )
            )
        )
    training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(training)
    for handle in handles:
        handle.remove()
    return found


class Chain(nn.Module):
    """conv 2 -> 4, BatchNorm, ReLU, conv 4 -> 3, ReLU, pool to 2 x 2, flatten, linear 12 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.relu2 = nn.Conv2d(4, 3, 3, padding=1), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(12, 5)
        self.bn1.running_mean.uniform_(-0.3, 0.3)
        self.bn1.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.head(torch.flatten(self.pool(self.relu2(self.conv2(x))), 1))


class Blocks(nn.Module):
    """stem, then twice x + conv(x), then a head: sums whose operands are sums."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x).relu()
        x = x + self.second(x).relu()
        return self.head(x)


class Side(nn.Module):
    """Two branches of 2 and 3 channels and the image itself, side by side; then a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.left, self.right, self.join = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.left(x), x, self.right(x)], 1))


class Grouped(nn.Module):
    """conv 2 -> 4, depthwise 4 -> 8 (two filters a channel), two groups 8 -> 6."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.depthwise = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.depthwise(self.conv(x).relu()).relu())


def images(count: int = 40, seed: int = 5) -> Tensor:
    """Images whose channels' means differ from image to image, so that filters do too."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(count, 2, 1, 1, generator=generator)
    return level + torch.randn(count, 2, 4, 4, generator=generator)


def corr(child: Tensor, parent: Tensor) -> np.ndarray:
    both = np.corrcoef(np.column_stack([child.double(), parent.double()]).T)
    return both[: child.shape[1], child.shape[1] :]


def close(a: Tensor, b: np.ndarray, atol: float = 1e-5) -> bool:
    return tuple(a.shape) == b.shape and np.allclose(a.numpy(), b, atol=atol)


def test_a_chain_and_its_flattened_map() -> None:
    model, x = Chain(), images()
    a = outputs(model, x, "conv1", "conv2", "head")
    found = connectivity(model, cut(x, 16))
    assert list(found) == ["conv2", "head"] and found["conv2"].dtype == torch.float32
    assert close(found["conv2"], corr(a["conv2"], a["conv1"]))
    assert close(found["head"], np.repeat(corr(a["head"], a["conv2"]), 4, axis=1))


def test_the_other_tap_reads_behind_batchnorm_and_activation() -> None:
    model, x = Chain(), images()
    a = outputs(model, x, "relu1", "relu2", "head")
    found = connectivity(model, cut(x, 16), tap="relu")
    assert close(found["conv2"], corr(a["relu2"], a["relu1"]))
    assert close(found["head"], np.repeat(corr(a["head"], a["relu2"]), 4, axis=1))


def test_parents_that_meet_in_a_sum_are_added() -> None:
    model, x = Blocks(), images()
    a = outputs(model, x, "stem", "first", "second", "head")
    found = connectivity(model, cut(x, 16))
    assert close(found["first"], corr(a["first"], a["stem"]))
    assert close(found["second"], corr(a["second"], a["stem"]) + corr(a["second"], a["first"]))
    assert close(found["head"], sum(corr(a["head"], a[p]) for p in ("stem", "first", "second")))


def test_only_the_nearest_layers_of_a_sum() -> None:
    model, x = Blocks(), images()
    a = outputs(model, x, "stem", "first", "second", "head")
    found = connectivity(model, cut(x, 16), residual="nearest")
    assert close(found["second"], corr(a["second"], a["stem"]) + corr(a["second"], a["first"]))
    assert close(found["head"], corr(a["head"], a["first"]) + corr(a["head"], a["second"]))


def test_parents_side_by_side() -> None:
    model, x = Side(), images()
    a = outputs(model, x, "left", "right", "join")
    expected = np.concatenate([corr(a["join"], a["left"]), np.zeros((4, 2)), corr(a["join"], a["right"])], 1)
    assert close(connectivity(model, cut(x, 16))["join"], expected)


def test_grouped_layers_take_the_diagonal_blocks() -> None:
    model, x = Grouped(), images()
    a = outputs(model, x, "conv", "depthwise", "grouped")
    found = connectivity(model, cut(x, 16))
    full = corr(a["depthwise"], a["conv"])
    assert close(found["depthwise"], np.array([[full[o, o // 2]] for o in range(8)]))
    full = corr(a["grouped"], a["depthwise"])
    assert close(found["grouped"], np.concatenate([full[:3, :4], full[3:, 4:]]))


def test_every_matrix_has_the_shape_of_its_weight() -> None:
    for model in (Chain(), Blocks(), Side(), Grouped()):
        for name, matrix in connectivity(model, cut(images(), 16)).items():
            assert matrix.shape == model.get_submodule(name).weight.shape[:2]


@every
def test_a_network_gets_what_the_paired_samples_give(name: str) -> None:
    model, x = Chain(), images()
    tap = SIMILARITIES[name].tap
    names = ("conv1", "conv2") if tap == "conv" else ("relu1", "relu2")
    a = outputs(model, x, *names)
    found = connectivity(model, cut(x, 7), similarity=name)
    assert torch.allclose(found["conv2"], SIMILARITIES[name].sampled(a[names[0]], a[names[1]]).float(), atol=1e-5)


def test_partial_correlation_sees_what_the_layer_receives() -> None:
    model, x = Blocks(), images()
    with torch.no_grad():
        stem = model.stem(x)
        first = stem + model.first(stem).relu()
        second = first + model.second(first).relu()
        head = model.head(second)
    found = connectivity(model, cut(x, 16), similarity="partial")
    received, given_back = (v.mean((2, 3)) for v in (second, head))
    assert torch.allclose(found["head"], partial(received, given_back).float(), atol=1e-4)
    chain = Chain()
    found = connectivity(chain, cut(x, 16), similarity="partial")["head"]
    with torch.no_grad():
        pooled = chain.eval().pool(chain.relu2(chain.conv2(chain.relu1(chain.bn1(chain.conv1(x))))))
    by_channel = partial(pooled.mean((2, 3)), chain.head(pooled.flatten(1)).detach())
    assert torch.allclose(found, by_channel.repeat_interleave(4, 1).float(), atol=1e-4)


@every
@pytest.mark.parametrize("classwise", [False, True])
def test_the_batch_size_does_not_matter(name: str, classwise: bool) -> None:
    model, x = Chain(), images()
    whole = connectivity(model, cut(x, 40), similarity=name, classwise=classwise)
    for size in (1, 13):
        parts = connectivity(model, cut(x, size), similarity=name, classwise=classwise)
        assert all(torch.allclose(parts[layer], whole[layer], atol=1e-5) for layer in whole)


@pytest.mark.parametrize("name", [name for name in SIMILARITIES if name != "cosine"])
def test_large_means_in_the_network(name: str) -> None:
    model, x = Chain(), images()
    before = connectivity(model, cut(x, 13), similarity=name, tap="conv")
    with torch.no_grad():
        model.conv2.bias += 1e4
        model.relu2 = nn.Identity()  # so that the layer's output is its output
        shifted = connectivity(model, cut(x, 13), similarity=name, tap="conv")
    # float32 activations of 1e4 have a resolution of 1e-3, which a regression and buckets amplify
    coarse = name in ("mutual_information", "partial")
    assert torch.allclose(shifted["conv2"], before["conv2"], atol=2e-2 if coarse else 5e-3)


def test_classwise_is_the_mean_over_the_classes() -> None:
    model, x = Chain(), torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 15 + [2] * 20 + [7] * 5)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    a = outputs(model, x, "conv1", "conv2")
    per_class = [corr(a["conv2"][labels == k], a["conv1"][labels == k]) for k in (0, 2, 7)]
    found = connectivity(model, cut(x, 9, labels), classwise=True)
    assert close(found["conv2"], np.mean(per_class, 0))
    found = connectivity(model, cut(x, 9, labels), classwise=True, absolute=True)
    assert close(found["conv2"], np.mean(np.abs(per_class), 0))
    assert not np.allclose(np.mean(np.abs(per_class), 0), np.abs(np.mean(per_class, 0)), atol=1e-3)


def test_absolute_is_the_magnitude_of_each_parent() -> None:
    model, x = Blocks(), images()
    a = outputs(model, x, "stem", "first", "second")
    found = connectivity(model, cut(x, 16), absolute=True)
    expected = np.abs(corr(a["second"], a["stem"])) + np.abs(corr(a["second"], a["first"]))
    assert close(found["second"], expected)


def test_a_class_of_one_image_does_not_count() -> None:
    model, x = Chain(), images()
    labels = torch.tensor([0] * 20 + [1] * 19 + [2])
    a = outputs(model, x, "conv1", "conv2")
    expected = np.mean([corr(a["conv2"][labels == k], a["conv1"][labels == k]) for k in (0, 1)], 0)
    for similarity in ("pearson", "spearman"):
        found = connectivity(model, cut(x, 9, labels), classwise=True, similarity=similarity)
        assert similarity == "spearman" or close(found["conv2"], expected)
        assert bool(found["conv2"].isfinite().all())
    with pytest.raises(ValueError, match="a class with at least 2 images"):
        connectivity(model, cut(x[:3], 2, torch.arange(3)), classwise=True)


@every_dead
def test_a_dead_filter_in_the_network(name: str, level: float) -> None:
    model, x = Chain(), images()
    with torch.no_grad():
        model.conv2.weight[1], model.conv2.bias[1] = 0, level
    found = connectivity(model, cut(x, 9), similarity=name)
    assert bool((found["conv2"][1] == 0).all()) and bool((found["head"][:, 4:8] == 0).all())
    assert bool((found["conv2"][[0, 2]] != 0).any()) and bool(found["head"].isfinite().all())


@every
def test_activations_that_are_not_finite_name_the_layer(name: str) -> None:
    model = Chain()
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 'conv1'"):
        connectivity(model, cut(images(), 9), similarity=name)


@every
def test_fewer_than_two_images_in_all(name: str) -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        connectivity(Chain(), cut(images(1), 1), similarity=name)
    with pytest.raises(ValueError, match="at least 2 images, got no batch"):
        connectivity(Chain(), [], similarity=name)


def test_unknown_words() -> None:
    with pytest.raises(ValueError, match=r"unknown similarity 'pearsn'; did you mean 'pearson'\?"):
        connectivity(Chain(), cut(images(), 9), similarity="pearsn")
    with pytest.raises(ValueError, match=r"unknown tap 'relus'; did you mean 'relu'\?"):
        connectivity(Chain(), cut(images(), 9), tap="relus")
    with pytest.raises(ValueError, match=r"unknown residual 'al'; did you mean 'all'\?"):
        connectivity(Chain(), cut(images(), 9), residual="al")


def failing(end: str) -> Iterator[tuple[Tensor, Tensor]]:
    yield from cut(images(), 9)
    if end == "loader fails":
        raise OSError("the disk went away")
    if end == "NaN":
        yield torch.full((2, 2, 4, 4), float("nan")), torch.zeros(2, dtype=torch.int64)
    if end == "another size":
        yield torch.zeros(2, 5, 4, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("similarity", ["pearson", "hsic", "partial"])
@pytest.mark.parametrize("end", ["", "loader fails", "NaN", "another size"])
def test_the_model_is_as_before(similarity: str, end: str) -> None:
    model = Chain().train()
    model.relu2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    if end:
        with pytest.raises((OSError, FloatingPointError, RuntimeError, ValueError)):
            connectivity(model, failing(end), similarity=similarity)
    else:
        connectivity(model, failing(end), similarity=similarity)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_batches_are_not_changed_and_read_once() -> None:
    x = images()
    before = x.clone()

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        yield from cut(x, 9)

    found = connectivity(Chain(), source())
    assert torch.equal(x, before)
    again = connectivity(Chain(), cut(x, 9), graph=layer_graph(Chain(), x))
    assert all(torch.equal(found[layer], again[layer]) for layer in found)


def test_samples_are_drawn_from_the_seed() -> None:
    model, x = Chain(), images(200)

    def drawn(seed: int) -> Tensor:
        return connectivity(model, cut(x, 50), similarity="spearman", samples=30, seed=seed)["conv2"]

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    whole = connectivity(model, cut(x, 50), similarity="spearman", samples=1000)["conv2"]
    assert (drawn(0) - whole).abs().max() < 0.7


def test_a_network_of_one_layer_has_no_connectivity() -> None:
    assert connectivity(nn.Sequential(nn.Conv2d(2, 3, 1)), cut(images(), 9)) == {}


# --- rows that are not images, layers that feed themselves ----------------------------------------------------------


class Frames(nn.Module):
    """Convolutions on every frame of a clip, a classifier on the clip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(20, 3)

    def forward(self, clips: Tensor) -> Tensor:
        x = clips.reshape(-1, 3, 6, 6)
        x = self.second(self.first(x).relu()).mean((2, 3))
        return self.last(x.reshape(-1, 20))


@pytest.mark.parametrize("name", ["pearson", "spearman", "hsic", "partial"])
def test_frames_of_an_image_are_averaged(name: str) -> None:
    model, clips = Frames().eval(), torch.randn(40, 12, 6, 6, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    graph = layer_graph(model, clips[:1])
    labels = torch.zeros(40, dtype=torch.int64)
    one = connectivity(model, [(clips, labels)], similarity=name, graph=graph)
    other = connectivity(model, [(clips[order], labels)], similarity=name, graph=graph)
    assert set(one) >= {"second"} and one["second"].shape == (5, 6)
    for layer in one:
        assert torch.allclose(one[layer], other[layer], atol=0.02 if name == "hsic" else 1e-5)


def test_rows_that_belong_to_no_image_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.cat([self.first(x), self.first(x[:1])]))[:-1]

    with pytest.raises(ValueError, match=r"layer 'second' gives 8 rows for 7 images"):
        connectivity(Odd(), [(torch.randn(7, 4), torch.zeros(7, dtype=torch.int64))])


def test_a_layer_that_runs_again_is_no_parent_of_itself() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.again, self.alone = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.alone(self.alone(x)))
            for _ in range(3):
                x = self.again(x).relu()
            return x

    model, x = Again().eval(), torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = layer_graph(model, x[:1])
    assert set(graph.parents["again"]) == {"first", "again"} and graph.others("again") == ("first",)
    found = connectivity(model, [(x, torch.zeros(60, dtype=torch.int64))], graph=graph)
    with torch.no_grad():
        before = model.first(model.alone(model.alone(x)))
        a, b = before.mean((2, 3)), model.again(before).mean((2, 3))
    truth = torch.corrcoef(torch.cat([b.T, a.T]))[:8, 8:]
    assert torch.allclose(found["again"], truth, atol=1e-4) and "alone" not in found
    assert split(graph, "Full") == {"alone": "direct", "first": "guided", "again": "guided"}


def test_the_width_of_hsic_is_that_of_all_images_however_they_are_sorted() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(300, 2, generator=generator), 9 + 3 * torch.randn(300, 2, generator=generator)])
    y = x @ torch.randn(2, 2, generator=generator) + torch.randn(600, 2, generator=generator)
    order = torch.randperm(600, generator=generator)
    assert torch.allclose(hsic(x, y), hsic(x[order], y[order]), atol=0.02)


class Beside(nn.Module):
    """A layer that sees a layer's filters and the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.c(torch.cat([torch.relu(self.a(x)), x], 1))).mean((2, 3))


def test_the_channels_of_the_image_are_given_and_no_parents() -> None:
    torch.manual_seed(0)
    model, images = Beside().eval(), torch.randn(400, 3, 1, 1)
    graph = layer_graph(model, images[:1])
    assert graph.input_groups("c").unique().numel() == 7
    found = connectivity(model, [(images, torch.arange(400) % 4)], similarity="partial", graph=graph)["c"]
    assert not found[:, 4:].any()  # 0 where no layer is the parent
    seen = torch.cat([torch.relu(model.a(images)), images], 1).flatten(1).detach()
    joint = torch.cat([model(images).detach()[:, :1], seen], 1)
    precision = torch.linalg.inv(torch.cov(joint.T.double()))
    expected = -precision[0, 1:5] / (precision[0, 0] * precision.diagonal()[1:5]).sqrt()
    torch.testing.assert_close(found[0, :4].double(), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("images", "size", "step"), [(1000, 37, 64), (50, 80, 7), (300, 300, 300)])
def test_the_rows_that_a_reservoir_keeps_are_known_beforehand(images: int, size: int, step: int) -> None:
    reservoir = Reservoir([("a", "conv")], size, seed=3)
    for rows in torch.arange(images).split(step):
        reservoir.update({("a", "conv"): rows[:, None].float()}, rows)
    assert torch.equal(sampled_rows(images, size, seed=3), reservoir.labels)
