"""ERK densities against hand numbers, exact sparsity at every step, moving masks, lottery tickets, exact resume."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet import networks, sparse_training
from gcnet.cka import CKASparsityRegularizer
from gcnet.data import Dataset
from gcnet.pruning import Masks, pruned_count, sparsity
from gcnet.sparse_training import (
    Rewiring,
    erk_densities,
    grasp_masks,
    initial_masks,
    magnitude_rewinding,
    random_masks,
    round_sparsities,
    snip_masks,
    sparse_train,
)
from gcnet.training import Normalize, Recipe, train

COUNT, CLASSES = 48, 3
RECIPE = Recipe(epochs=3, batch_size=8, lr=0.05, crop_padding=1)


def data() -> Dataset:
    images = torch.randint(0, 256, (COUNT, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Dataset("noise", images, torch.arange(COUNT) % CLASSES, tuple("abc"))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        Normalize([0.5], [0.25]), nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, CLASSES),
    )  # fmt: skip


TOTAL = 4 * 9 + 6 * 4 * 9 + 384 * 3


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- ERK and the static masks ---------------------------------------------------------------------------------------


def test_erk_densities_are_those_worked_out_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(640, 10))
    # raw densities: (32 + 16 + 3 + 3) / 4608, (64 + 32 + 3 + 3) / 18432, (640 + 10) / 6400; a tenth of 29440 is kept,
    # and raw density times size adds up to 54 + 102 + 650 = 806
    scale = 2944 / 806
    assert erk_densities(model, 0.9) == pytest.approx(
        {"0": scale * 54 / 4608, "1": scale * 102 / 18432, "3": scale * 650 / 6400}
    )


def test_erk_keeps_a_layer_whole_that_would_keep_more_than_all() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 10))
    # kept: half of 432 + 2304 + 640 = 3376, 1688; sums 25, 38, 74 of 137 give the first layer 308 of 432, the third
    # 912 of 640. Whole, it leaves 1048 for the other two, which share as 25 : 38, 416 : 632.
    densities = erk_densities(model, 0.5)
    assert densities == pytest.approx({"0": 1048 * 25 / 63 / 432, "1": 1048 * 38 / 63 / 2304, "3": 1.0})


def test_grouped_layers_count_the_channels_of_a_group() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1))
    densities = erk_densities(model, 0.9)
    assert densities["0"] / densities["1"] == pytest.approx((64 + 1 + 6) / 576 / ((128 + 2) / 4096))


@given(st.floats(0, 0.999), st.integers(0, 5))
@settings(max_examples=12)
def test_random_masks_remove_exactly_the_sparsity(level: float, seed: int) -> None:
    model = networks.build("resnet20", 10, width=0.25)
    masks, densities = random_masks(model, level, seed=seed), erk_densities(model, level)
    total = sum(mask.numel() for mask in masks.values())
    assert total - sum(int(mask.sum()) for mask in masks.values()) == pruned_count(total, level)
    for layer, density in densities.items():
        mask = masks[f"{layer}.weight"]
        assert abs(int(mask.sum()) - density * mask.numel()) < 1.001


def test_random_masks_follow_the_seed() -> None:
    first, again, other = (random_masks(net(), 0.7, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("level", [-0.1, 1.0, 1.5])
def test_a_sparsity_out_of_range_is_refused(level: float) -> None:
    for make in (erk_densities, random_masks):
        with pytest.raises(ValueError, match=rf"sparsity {level} is outside \[0, 1\)"):
            make(net(), level)
    with pytest.raises(ValueError, match="outside"):
        snip_masks(net(), data().images, data().labels, level)


# --- SNIP and GraSP -------------------------------------------------------------------------------------------------


def test_snip_keeps_the_largest_products_of_weight_and_gradient() -> None:
    model, twin = net(), net()
    masks = snip_masks(model, data().images, data().labels, 0.8)
    F.cross_entropy(twin(data().images), data().labels).backward()
    scores = {name: (twin.get_parameter(name) * twin.get_parameter(name).grad).abs() for name in masks}
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert len(gone) == pruned_count(TOTAL, 0.8) and kept.min() >= gone.max()
    assert same(model, net()) and all(p.grad is None for p in model.parameters())


def test_grasp_keeps_what_lowers_the_gradient_norm_least() -> None:
    """Its score is w (H g): the change of |g|^2 / 2 per share by which a weight shrinks, seen by finite differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images, labels = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3

    def half_squared_gradient(twin: nn.Module) -> float:
        loss = F.cross_entropy(twin(images) / 200, labels)
        return sum(g.square().sum().item() for g in torch.autograd.grad(loss, [twin[0].weight, twin[2].weight])) / 2

    scores = {}
    for name in ("0.weight", "2.weight"):
        scores[name] = torch.zeros_like(model.get_parameter(name))
        for index in range(scores[name].numel()):
            values = []
            for factor in (1 + 1e-4, 1 - 1e-4):
                twin = copy.deepcopy(model)
                twin.get_parameter(name).data.view(-1)[index] *= factor
                values.append(half_squared_gradient(twin))
            scores[name].view(-1)[index] = values[0] - values[1]
    # `.float()` of the logits costs digits, so only the order of clearly different scores is compared
    masks = grasp_masks(model, images, labels, 0.5)
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    spread = torch.cat([kept, gone]).abs().max()
    assert len(gone) == pruned_count(45, 0.5) and kept.min() > gone.max() - 1e-3 * spread


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_masks_from_data_are_exact_and_need_data(method: str) -> None:
    masks = initial_masks(net(), method, 0.9, data=data())
    assert sum(int((~mask).sum()) for mask in masks.values()) == pruned_count(TOTAL, 0.9)
    with pytest.raises(ValueError, match=f"{method} ranks weights by their gradients: it needs training images"):
        initial_masks(net(), method, 0.9)


# --- masks that move ------------------------------------------------------------------------------------------------


def test_the_share_falls_with_a_cosine_and_ends() -> None:
    rewiring = Rewiring("gradient", every=10, fraction=0.4, until=0.5)
    shares = {step: rewiring.share(step, 200) for step in range(200)}
    assert {step for step, share in shares.items() if share} == {10, 20, 30, 40, 50, 60, 70, 80, 90}
    assert shares[50] == pytest.approx(0.2) and 0.39 < shares[10] < 0.4 and shares[90] < 0.02


def one_exchange(grow: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights before, mask before, mask after, the layer) around one exchange of half of 8 kept of 20."""
    weight = nn.Parameter(torch.arange(20.0) - 10.5)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[2:10] = True
    weight.data *= mask
    weight.grad = torch.arange(20.0).roll(5)
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.ones(20)
    before, old = weight.detach().clone(), mask.clone()
    Rewiring(grow, every=1, fraction=0.5, until=1.0, seed=seed)([(weight, mask)], optimizer, 1, 10**6)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], (old & mask).float())
    return before, old, mask, weight.detach()


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest() -> None:
    before, old, mask, weight = one_exchange("gradient")
    survivors = [2, 3, 4, 5]  # the largest four of |w|; gradients 0..19 rolled by 5: largest at 4, 3, 2, 1, 0, 19, ...
    grown = [1, 0, 19, 18]
    assert mask.nonzero().flatten().tolist() == sorted(survivors + grown)
    assert torch.equal(weight, before * (old & mask))  # new ones start at 0


def test_set_drops_the_smallest_and_grows_at_random_from_its_seed() -> None:
    masks = [one_exchange("random", seed)[2] for seed in (0, 0, 1)]
    assert all(bool(mask[2:6].all()) and int(mask.sum()) == 8 for mask in masks)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("method", ["rst", "set", "rigl"])
def test_sparsity_is_exact_through_100_steps_of_momentum_and_weight_decay(method: str) -> None:
    model, counts, states = net(), [], []
    recipe = Recipe(epochs=17, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.05, schedule="step", crop_padding=1)
    start = initial_masks(model, method, 0.8, seed=0)
    per_layer = {name: int(mask.sum()) for name, mask in start.items()}

    def look(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        counts.append({name: int(model.get_parameter(name).count_nonzero()) for name in start})
        states.append({name: model.get_parameter(name) != 0 for name in start})
        return torch.zeros(())

    masks, history = sparse_train(
        model, data(), recipe, method=method, sparsity=0.8, seed=0, every=7, penalty=look, precision="float32"
    )
    assert len(counts) == 102 and len(history) == 17
    # a kept weight that has just come is 0 until its first step, so no layer ever shows more than its number
    assert all(step[name] <= per_layer[name] for step in counts for name in start)
    assert sum(int(mask.sum()) for mask in masks.values()) == TOTAL - pruned_count(TOTAL, 0.8)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == per_layer
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    moved = any(not torch.equal(start[name], masks[name]) for name in start)
    assert moved == (method != "rst")
    seen = sum(int((states[0][name] ^ states[-1][name]).sum()) for name in start)
    assert (seen > 0) == (method != "rst")


def test_new_weights_are_trained_after_they_came() -> None:
    model = net()
    start = initial_masks(model, "rigl", 0.8, seed=0)
    masks, _ = sparse_train(model, data(), RECIPE, method="rigl", sparsity=0.8, seed=0, every=3, precision="float32")
    new = [model.get_parameter(name)[mask & ~start[name]] for name, mask in masks.items()]
    assert sum(len(w) for w in new) > 5 and all(bool((w != 0).all()) for w in new)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grow": "gradients"}, "unknown way to grow 'gradients'; did you mean 'gradient'"),
        ({"grow": "random", "every": 0}, "every 0"),
        ({"grow": "random", "fraction": 1.5}, r"fraction 1\.5"),
        ({"grow": "random", "until": 0.0}, r"until 0\.0"),
    ],
)
def test_rewiring_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewiring(**options)


# --- exact resume ---------------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    """An interruption."""


def stop_after(epoch: int):
    def on_epoch(row: dict[str, float]) -> None:
        if row["epoch"] == epoch:
            raise Stop

    return on_epoch


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_run_has_the_same_masks_and_bits(tmp_path: Path, method: str, epoch: int) -> None:
    def fit(model: nn.Module, **more: object) -> Masks:
        penalty = CKASparsityRegularizer(model, stages=[["3", "5"]], beta=0.05, every=5)
        options = {"method": method, "sparsity": 0.7, "seed": 1, "every": 4, "precision": "float32"}
        return sparse_train(model, data(), RECIPE, penalty=penalty, **options, **more)[0]

    whole, stopped, resumed = net(), net(), net(seed=0)
    masks = fit(whole)
    with pytest.raises(Stop):
        # the interruption comes before the checkpoint of its epoch, so the last one is that of the epoch before
        fit(stopped, checkpoint=tmp_path / "c.pt", on_epoch=stop_after(epoch + 1))
    assert (tmp_path / "c.pt").exists()
    again = fit(resumed, checkpoint=tmp_path / "c.pt")
    assert same(whole, resumed) and all(torch.equal(masks[name], again[name]) for name in masks)


def test_the_step_of_the_penalty_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    def values(**more: object) -> list[float]:
        model, seen = net(), []
        penalty = CKASparsityRegularizer(model, stages=[["3", "5"]], beta=0.05, every=5)

        class Look:
            def __call__(self, *step: object) -> Tensor:
                seen.append(float((value := penalty()).detach()))
                return value

            state_dict, load_state_dict = penalty.state_dict, penalty.load_state_dict

        with contextlib.suppress(Stop):
            train(model, data(), RECIPE, seed=0, penalty=Look(), precision="float32", **more)
        return seen

    whole = values()
    values(checkpoint=tmp_path / "c.pt", on_epoch=stop_after(2))
    assert values(checkpoint=tmp_path / "c.pt") == whole[6:] and [k for k, v in enumerate(whole) if v] == [0, 5, 10, 15]


# --- lottery tickets ------------------------------------------------------------------------------------------------


def trained(epochs: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A trained network and its weights after so many epochs."""
    model, early = net(), copy.deepcopy(net().state_dict())

    def keep(row: dict[str, float]) -> None:
        if row["epoch"] == epochs:
            early.update(copy.deepcopy(model.state_dict()))

    train(model, data(), RECIPE, seed=0, precision="float32", on_epoch=keep)
    return model, early


@pytest.mark.parametrize("rounds", [1, 3])
def test_tickets_are_the_largest_weights_put_back(rounds: int) -> None:
    model, early = trained(1)
    dense = copy.deepcopy(model)
    options = {"seed": 0, "precision": "float32", "rounds": rounds}
    masks, history = magnitude_rewinding(model, early, data(), RECIPE, sparsity=0.75, **options)
    assert sum(int((~mask).sum()) for mask in masks.values()) == pruned_count(TOTAL, 0.75)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    assert [row["epoch"] for row in history] == [2, 3]
    if rounds == 1:
        kept = torch.cat([dense.get_parameter(n)[m].abs() for n, m in masks.items()])
        gone = torch.cat([dense.get_parameter(n)[~m].abs() for n, m in masks.items()])
        assert kept.min() >= gone.max()
        by_hand = net()
        by_hand.load_state_dict(early)
        train(by_hand, data(), RECIPE, seed=0, masks=masks, precision="float32", first_epoch=1)
        assert same(model, by_hand)


def test_nothing_removed_and_nothing_rewound_is_the_training_itself() -> None:
    model, early = trained(0)
    twin = copy.deepcopy(model)
    magnitude_rewinding(model, early, data(), RECIPE, sparsity=0, seed=0, rewind_epochs=0, precision="float32")
    assert same(model, twin)


@pytest.mark.parametrize(("stopped_in", "epoch"), [(1, 3), (2, 2), (2, 3)])
def test_interrupted_rounds_go_on(tmp_path: Path, stopped_in: int, epoch: int) -> None:
    model, early = trained(1)
    twin, calls = copy.deepcopy(model), []

    def stop(row: dict[str, float]) -> None:
        calls.append(row["epoch"])
        if calls.count(2) == stopped_in and row["epoch"] == epoch:
            raise Stop

    options = {"sparsity": 0.6, "seed": 0, "rounds": 2, "precision": "float32"}
    masks, _ = magnitude_rewinding(model, early, data(), RECIPE, **options)
    with pytest.raises(Stop):
        magnitude_rewinding(copy.deepcopy(twin), early, data(), RECIPE, folder=tmp_path, on_epoch=stop, **options)
    again, _ = magnitude_rewinding(twin, early, data(), RECIPE, folder=tmp_path, **options)
    assert same(model, twin) and all(torch.equal(masks[name], again[name]) for name in masks)


def test_rounds_remove_the_same_share_of_what_is_left() -> None:
    assert round_sparsities(0.75, 2) == pytest.approx([0.5, 0.75])
    assert round_sparsities(0.9, 1) == [0.9]
    with pytest.raises(ValueError, match="rounds 0 must be at least 1"):
        round_sparsities(0.9, 0)


@pytest.mark.parametrize("epochs", [-1, 3])
def test_rewinding_to_an_epoch_that_is_not_there_is_refused(epochs: int) -> None:
    with pytest.raises(ValueError, match=rf"rewind_epochs {epochs} must lie in 0..2"):
        magnitude_rewinding(net(), {}, data(), RECIPE, sparsity=0.5, seed=0, rewind_epochs=epochs)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown sparse training method 'rigle'; did you mean 'rigl'"):
        sparse_train(net(), data(), RECIPE, method="rigle", sparsity=0.5, seed=0)
    with pytest.raises(ValueError, match="unknown sparse training method 'rewind'"):
        sparse_train(net(), data(), RECIPE, method="rewind", sparsity=0.5, seed=0)


def test_dense_training_is_training_without_masks() -> None:
    model, plain = net(), net()
    masks, _ = sparse_train(model, data(), RECIPE, method="dense", sparsity=0.9, seed=0, precision="float32")
    train(plain, data(), RECIPE, seed=0, precision="float32")
    assert same(model, plain) and masks == {} and sparsity(masks) == 0


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_masks_from_data_follow_the_seed_through_dropout(method: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 4))
    images, labels = torch.rand(16, 3, 2, 2), torch.arange(16) % 4
    masks = []
    for number in (1, 2):
        torch.manual_seed(number)  # what was drawn before does not count
        masks.append(getattr(sparse_training, f"{method}_masks")(model, images, labels, 0.5))
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(number))  # and nothing was drawn
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_resumed_run_goes_on_under_the_masks_that_it_began_with(tmp_path: Path) -> None:
    weight = "1.weight"
    ones = torch.ones_like(net().get_parameter(weight), dtype=torch.bool)
    first, second = ones.clone(), ones.clone()
    first[0], second[1] = False, False
    resumed, given, kept = net(), {weight: second}, {"seed": 0, "checkpoint": tmp_path / "c.pt"}
    with pytest.raises(Stop):
        train(net(), data(), RECIPE, masks={weight: first}, on_epoch=stop_after(2), **kept)
    train(resumed, data(), RECIPE, masks=given, **kept)
    assert torch.equal(given[weight], first) and not resumed.get_parameter(weight)[0].any()
