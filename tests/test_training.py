"""The trainer: exact to the last bit, masks held, augmentation against a slow loop, errors that say what is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet.data import Dataset
from gcnet.training import Normalize, Recipe, augment, autocast, hold, learning_rate, pick_device, train

COUNT, CLASSES = 48, 3


def data(seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (COUNT, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Dataset("noise", images, torch.arange(COUNT) % CLASSES, tuple("abc"))


def net(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """Everything whose state a resumed run must carry on: BatchNorm, dropout, momentum."""
    torch.manual_seed(seed)
    return nn.Sequential(
        Normalize([0.5], [0.25]), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Dropout(dropout), nn.Flatten(), nn.Linear(256, CLASSES),
    )  # fmt: skip


RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, label_smoothing=0.1, crop_padding=1)
PLAIN = Recipe(
    epochs=1, batch_size=COUNT, lr=0.1, schedule="step", momentum=0, weight_decay=0, crop_padding=0, flip=False
)  # one step of plain gradient descent on all images


def fit(model: nn.Module, recipe: Recipe = RECIPE, seed: int = 0, **more: object) -> list[dict[str, float]]:
    return train(model, data(), recipe, seed=seed, precision="float32", **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- seeds and resuming ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_to_the_bit() -> None:
    first, again, other = net(), net(), net()
    history = fit(first)
    torch.rand(7)  # what happened to the global random state in between does not matter
    again_history = fit(again)
    fit(other, seed=1)
    assert same(first, again) and not same(first, other)
    assert [row["loss"] for row in history] == [row["loss"] for row in again_history]


class Stop(Exception):  # noqa: N818
    """An interruption."""


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    whole, stopped = net(), net()
    history = fit(whole)

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == stop_after:
            raise Stop

    with pytest.raises(Stop):
        fit(stopped, checkpoint=tmp_path / "c.pt", on_epoch=stop)
    resumed = net(seed=9)  # whatever it held is replaced
    epochs: list[float] = []
    if stop_after == 1 and not (tmp_path / "c.pt").exists():
        resumed = net()  # nothing was finished yet
    rows = fit(resumed, checkpoint=tmp_path / "c.pt", on_epoch=lambda row: epochs.append(row["epoch"]))
    assert same(whole, resumed)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [(row["loss"], row["accuracy"]) for row in rows] == [(row["loss"], row["accuracy"]) for row in history]
    assert len(epochs) < 3 or stop_after == 1  # what was done is not done again


def test_a_resumed_run_holds_its_masks(tmp_path: Path) -> None:
    masks = {"1.weight": torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5}

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Stop

    whole, resumed = net(), net()
    fit(whole, masks=masks)
    with pytest.raises(Stop):
        fit(net(), masks=masks, checkpoint=tmp_path / "c.pt", on_epoch=stop)
    fit(resumed, masks=masks, checkpoint=tmp_path / "c.pt")
    assert same(whole, resumed) and bool((resumed[1].weight[~masks["1.weight"]] == 0).all())


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    model, again = net(), net(seed=5)
    history = fit(model, checkpoint=tmp_path / "c.pt")
    assert fit(again, checkpoint=tmp_path / "c.pt", on_epoch=lambda row: pytest.fail("trained again")) == history
    assert same(model, again)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "c.pt"
    fit(net(), checkpoint=path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"checkpoint '{path}' is truncated"):
        fit(net(), checkpoint=path)


def test_a_checkpoint_of_another_network_or_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    fit(net(), checkpoint=path)
    other = nn.Sequential(Normalize([0.5], [0.25]), nn.Flatten(), nn.Linear(64, CLASSES))
    with pytest.raises(ValueError, match=rf"checkpoint '{path}' is .*of another network"):
        fit(other, checkpoint=path)
    with pytest.raises(ValueError, match=r"written with another recipe: .*'epochs': 3"):
        fit(net(), Recipe(**{**RECIPE.__dict__, "epochs": 4}), checkpoint=path)
    with pytest.raises(ValueError, match=r"seed"):
        fit(net(), seed=1, checkpoint=path)


def test_a_refused_checkpoint_leaves_the_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    fit(net(), checkpoint=path)
    model, before = net(seed=4), net(seed=4)
    with pytest.raises(ValueError):
        fit(model, Recipe(**{**RECIPE.__dict__, "lr": 0.01}), checkpoint=path)
    assert same(model, before)


# --- masks ----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=8)
def test_removed_weights_are_exactly_0_after_momentum_and_weight_decay(kept: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(shape, generator=generator) < kept
        for name, shape in (("1.weight", (4, 1, 3, 3)), ("6.weight", (CLASSES, 256)), ("6.bias", (CLASSES,)))
    }
    model, before = net(), net()
    recipe = Recipe(epochs=1, batch_size=8, lr=0.5, momentum=0.9, weight_decay=0.1, schedule="step", crop_padding=1)
    fit(model, recipe, masks=masks)
    start = dict(before.named_parameters())
    for name, mask in masks.items():
        value = model.get_parameter(name)
        assert bool((value[~mask] == 0).all())
        assert bool((value[mask] != start[name][mask]).all())  # the others were trained


def test_masks_are_held_from_the_first_step_on() -> None:
    masks = {"1.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool)}
    seen: list[float] = []

    def look(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        seen.append(model[1].weight.abs().max().item())
        return torch.zeros(())

    fit(net(), masks=masks, penalty=look)
    assert len(seen) == 9 and max(seen) == 0


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("1.weigth", (4, 1, 3, 3), r"'1\.weigth'"),
        ("1.weight", (4, 1, 3), r"mask '1\.weight' \(4, 1, 3\) does not fit this network: \(4, 1, 3, 3\)"),
    ],
)
def test_masks_of_another_network_are_refused(name: str, shape: tuple[int, ...], told: str) -> None:
    model, before = net(), net()
    with pytest.raises(ValueError, match=told):
        fit(model, masks={"6.weight": torch.zeros(CLASSES, 256, dtype=torch.bool), name: torch.ones(shape) > 0})
    assert same(model, before)  # refused before anything was set to 0
    assert hold(model, None) == []


# --- one step by hand -----------------------------------------------------------------------------------------------


def test_one_step_is_gradient_descent_on_the_smoothed_cross_entropy() -> None:
    model, by_hand = net(dropout=0), net(dropout=0)
    history = fit(model, Recipe(**{**PLAIN.__dict__, "label_smoothing": 0.1}))
    logits = by_hand.train()(data().images)
    target = F.one_hot(data().labels, CLASSES) * 0.9 + 0.1 / CLASSES
    loss = -(target * logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-6)
    assert history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert history[0]["accuracy"] == pytest.approx((logits.argmax(1) == data().labels).double().mean().item())


def test_the_schedule_goes_on_from_epoch_to_epoch() -> None:
    model, by_hand = net(dropout=0), net(dropout=0)
    fit(model, Recipe(**{**PLAIN.__dict__, "epochs": 4}))
    for rate in (0.1, 0.1, 0.01, 0.001):
        by_hand.zero_grad()
        F.cross_entropy(by_hand(data().images), data().labels).backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= rate * parameter.grad
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_a_penalty_adds_its_gradient() -> None:
    plain, pushed = net(dropout=0), net(dropout=0)
    fit(plain, PLAIN)
    history = fit(pushed, PLAIN, penalty=lambda model, images, labels: 3.0 * model[6].weight.sum())
    assert torch.allclose(pushed[6].weight, plain[6].weight - 0.1 * 3.0, atol=1e-6)
    assert torch.allclose(pushed[1].weight, plain[1].weight, atol=1e-6)
    assert len(history) == 1


def test_a_penalty_sees_the_images_and_labels_of_its_step() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    recipe = Recipe(epochs=1, batch_size=16, crop_padding=0, flip=False)

    def look(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        seen.append((images.clone(), labels.clone()))
        return torch.zeros(())

    fit(net(), recipe, penalty=look)
    shown = torch.cat([images for images, _ in seen]).flatten(1)
    place = (shown[:, None, :] == data().images.flatten(1)[None]).all(2).nonzero()[:, 1]
    assert sorted(place.tolist()) == list(range(COUNT)) and place.tolist() != list(range(COUNT))
    assert torch.equal(torch.cat([labels for _, labels in seen]), data().labels[place])


def test_weights_decay_but_biases_and_batchnorm_do_not() -> None:
    class Idle(nn.Module):
        """Parameters that the loss does not depend on, though their gradient is there (and 0)."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(64), nn.Linear(64, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return 0 * self.linear(self.norm(images.float().flatten(1)))

    torch.manual_seed(0)
    model = Idle()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    fit(model, Recipe(**{**PLAIN.__dict__, "weight_decay": 0.5}))
    assert torch.allclose(model.linear.weight, start["linear.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(model.get_parameter(n), start[n]) for n in ("linear.bias", "norm.weight", "norm.bias"))


def test_a_last_small_batch_is_left_out_unless_it_is_the_only_one() -> None:
    sizes: list[int] = []

    def look(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(images))
        return torch.zeros(())

    fit(net(), Recipe(epochs=1, batch_size=20), penalty=look)
    fit(net(), Recipe(epochs=1, batch_size=500), penalty=look)
    assert sizes == [20, 20, COUNT]


def test_frozen_parameters_stay() -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    before = model[1].weight.clone()
    fit(model)
    assert torch.equal(model[1].weight, before)


def test_no_images_is_said() -> None:
    empty = data().take(torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"no (training )?images|0 images|empty"):
        train(net(), empty, RECIPE, seed=0)


@pytest.mark.parametrize("how", ["penalty", "lr"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, how: str) -> None:
    recipe = Recipe(**{**RECIPE.__dict__, "lr": 1e30 if how == "lr" else 0.1, "schedule": "step"})
    penalty = (lambda *_: torch.tensor(math.nan)) if how == "penalty" else None
    with pytest.raises(FloatingPointError, match=r"loss became (nan|inf) in epoch [12].*lr"):
        fit(net(), recipe, penalty=penalty, checkpoint=tmp_path / "c.pt")
    if how == "penalty":
        assert not (tmp_path / "c.pt").exists()


# --- the learning rate ----------------------------------------------------------------------------------------------


def test_one_cycle_rises_for_a_fifth_and_falls_to_0() -> None:
    recipe = Recipe(epochs=10, lr=0.4)
    rates = [learning_rate(recipe, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0, abs=1e-6) and rates[20] == pytest.approx(0.4) == max(rates)
    assert rates[10] == pytest.approx(0.2) and rates[60] == pytest.approx(0.2)
    assert rates[100] == pytest.approx(0, abs=1e-6) and rates[99] > 0
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_the_step_schedule_drops_at_a_half_and_three_quarters() -> None:
    recipe = Recipe(epochs=10, lr=0.4, schedule="step")
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert rates == pytest.approx([0.4] * 50 + [0.04] * 25 + [0.004] * 25)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule must be one_cycle or step, got 'cosine'"):
        fit(net(), Recipe(epochs=1, schedule="cosine"))


# --- augmentation ---------------------------------------------------------------------------------------------------


def slow_augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """One image after the other: pad, crop at the drawn corner, mirror."""
    draws = torch.randint(0, 1 << 30, (3, len(images)), generator=generator)
    height, width = images.shape[2:]
    out = []
    for k, image in enumerate(images):
        top, left = (int(draws[i, k]) % (2 * padding + 1) for i in (0, 1))
        crop = F.pad(image, (padding,) * 4)[:, top : top + height, left : left + width]
        out.append(crop.flip(2) if flip and draws[2, k] % 2 else crop)
    return torch.stack(out)


@given(
    st.integers(1, 9), st.sampled_from([1, 3]), st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.booleans()
)
def test_augmentation_is_that_of_a_slow_loop(
    count: int, channels: int, height: int, width: int, padding: int, flip: bool
) -> None:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)
    before = images.clone()
    slow = slow_augment(images, padding, flip, torch.Generator().manual_seed(7))
    assert torch.equal(augment(images, padding, flip, torch.Generator().manual_seed(7)), slow)
    assert torch.equal(images, before)


def test_every_crop_and_both_sides_are_drawn() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(2000, -1, -1, -1)
    seen = {row.numpy().tobytes() for row in augment(image, 1, True, torch.Generator().manual_seed(0))}
    assert len(seen) == 3 * 3 * 2


def test_images_in_channels_last_are_augmented_alike() -> None:
    images = torch.randint(0, 256, (5, 8, 6, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for padding in (0, 2):
        ours = augment(images, padding, True, torch.Generator().manual_seed(1))
        assert torch.equal(ours, augment(images.contiguous(), padding, True, torch.Generator().manual_seed(1)))


def test_no_augmentation_is_no_change() -> None:
    images = data().images
    assert torch.equal(augment(images, 0, False, torch.Generator()), images)


# --- normalisation, devices, precision ------------------------------------------------------------------------------


def test_normalisation() -> None:
    images = torch.tensor([[[[0, 255], [51, 102]]] * 2], dtype=torch.uint8).view(1, 2, 2, 2)
    out = Normalize([0.5, 0.2], [0.25, 0.1])(images)
    assert torch.allclose(out[0, 0], torch.tensor([[-2.0, 2.0], [-1.2, -0.4]]), atol=1e-5)
    assert torch.allclose(out[0, 1], torch.tensor([[-2.0, 8.0], [0.0, 2.0]]), atol=1e-5)
    assert images.flatten().tolist() == [0, 255, 51, 102] * 2
    assert torch.equal(Normalize([0.5], [0.2])(out), out)  # floats are taken as they are
    assert not Normalize([0.5], [0.2]).state_dict()


def test_precision_words() -> None:
    with pytest.raises(ValueError, match="precision must be auto, float32 or bfloat16, got 'half'"):
        autocast(torch.device("cpu"), "half")
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    with autocast(torch.device("cpu"), "bfloat16"):
        assert (a @ b).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "float32"):
        assert (a @ b).dtype == torch.float32
    assert pick_device("cpu") == torch.device("cpu") and pick_device().type in ("cpu", "cuda", "mps")


def test_bfloat16_trains_with_float32_weights() -> None:
    model = net()
    history = train(model, data(), RECIPE, seed=0, precision="bfloat16")
    assert all(p.dtype == torch.float32 for p in model.parameters()) and math.isfinite(history[-1]["loss"])


def test_it_learns() -> None:
    """Bright images against dark ones: nothing is easier."""
    labels = torch.arange(60) % 2
    images = (60 + 120 * labels.view(-1, 1, 1, 1) + torch.randint(-40, 40, (60, 1, 8, 8))).to(torch.uint8)
    history = train(net(), Dataset("x", images, labels, ("dark", "bright", "none")), RECIPE, seed=0)
    assert history[-1]["accuracy"] > 0.95 and history[-1]["loss"] < history[0]["loss"]
