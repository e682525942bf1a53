"""Gated networks: targets against a loop, gradients and where they stop, counts by hand, skipping changes nothing."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gcnet.data import Dataset
from gcnet.dynamic import (
    Gated,
    GatedConv,
    Head,
    count_macs,
    dynamic_macs,
    estimate_flops,
    gate,
    hard_mask,
    l1_filter_masks,
    mask_targets,
    measure,
    start_heads,
    train_gated,
)
from gcnet.graph import TraceError, layer_graph
from gcnet.interop import to_parametrize, to_torch_prune
from gcnet.networks import NETWORKS, BasicBlock, build
from gcnet.skipping import DynamicInference, Some, dense_layouts, fold_batchnorm
from gcnet.training import Normalize, Recipe

EXAMPLE = torch.tensor([[5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]])


def lived_in(model: nn.Module) -> nn.Module:
    """BatchNorm as after training: statistics, slopes and shifts that are not 0 and 1."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(0.1 * torch.randn(size, generator=generator))
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(size, generator=generator) + 0.5)
            module.bias.data.copy_(0.3 * torch.randn(size, generator=generator))
    return model.eval()


def noise(count: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(count))


def spread_out(gated: Gated) -> Gated:
    """Heads whose masks differ from image to image."""
    generator = torch.Generator().manual_seed(7)
    for block in gated.blocks.values():
        block.head.weight.data.normal_(0, 0.5, generator=generator)
        block.head.bias.data.normal_(0, 0.2, generator=generator)
    return gated


def two_layers() -> nn.Sequential:
    """3 -> 4 filters 3 x 3, then 4 -> 6 filters 3 x 3 of stride 2, on 8 x 8 images."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    return lived_in(nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)))


class Residual(nn.Module):
    """Stem of 4 filters, one block with an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.block = BasicBlock(4, 4, 1)
        self.last = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU())
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.last(self.block(self.stem(x))).mean((2, 3)))


# --- targets --------------------------------------------------------------------------------------------------------


def slow_target(maxima: list[float], r: float) -> list[bool]:
    order = sorted(range(len(maxima)), key=lambda f: -maxima[f])
    total, running, k = sum(maxima), 0.0, len(maxima)
    for place, f in enumerate(order):
        running += maxima[f]
        if running > r * total:
            k = place
            break
    k = max(1, min(k, sum(value > 0 for value in maxima)))
    return [f in order[:k] for f in range(len(maxima))]


def test_the_papers_example() -> None:
    target = mask_targets(EXAMPLE, 0.95)
    assert target.dtype == torch.bool and int(target.sum()) == 4
    assert target.tolist() == [[True, True, False, True, False, True, False]]


# Sums of quarters are exact, so that the loop and the library cannot differ by rounding.
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([0.125, 0.5, 0.75, 0.9375, 1.0]),
)
@settings(max_examples=40)
def test_targets_against_a_loop(rows: list[list[int]], r: float) -> None:
    maxima = [[value / 4 for value in row] for row in rows]
    assert mask_targets(torch.tensor(maxima), r).tolist() == [slow_target(row, r) for row in maxima]


def test_targets_of_maps_are_those_of_their_spatial_maxima() -> None:
    maps = torch.rand(6, 9, 4, 4)
    assert torch.equal(mask_targets(maps, 0.7), mask_targets(maps.amax((2, 3)), 0.7))


def test_at_least_one_filter_is_wanted() -> None:
    assert mask_targets(EXAMPLE, 1e-6).sum() == 1  # k would be 0
    silent = mask_targets(torch.zeros(2, 5), 0.9)
    assert silent.sum(1).tolist() == [1, 1]


def test_r_of_one_wants_every_filter_that_fires_and_no_other() -> None:
    assert mask_targets(torch.tensor([[0.1, 0.0, 0.7, 1e-6]]), 1.0).tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("r", [0, -0.1, 1.01, float("nan")])
def test_r_out_of_range(r: float) -> None:
    with pytest.raises(ValueError, match=r"r = .* is outside \(0, 1\]"):
        mask_targets(EXAMPLE, r)
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        gate(two_layers(), noise(1, size=8), r=r)


def test_bad_activations() -> None:
    with pytest.raises(ValueError, match="no image"):
        mask_targets(torch.rand(0, 3), 0.5)
    with pytest.raises(ValueError, match="expected"):
        mask_targets(torch.rand(3), 0.5)
    with pytest.raises(ValueError, match="negative"):
        mask_targets(-torch.rand(2, 3), 0.5)


# --- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_gated_at_every_convolution_and_open_gates_change_nothing(name: str) -> None:
    model = lived_in(build(name, 10, width=0.125, seed=0))
    before = copy.deepcopy(model.state_dict())
    x = noise(3)
    gated = gate(model, x[:1])
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(gated.layers) == len(convolutions) and gated.notes == ()
    with torch.no_grad(), gated.forced():
        torch.testing.assert_close(gated(x), model(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, GatedConv) for m in model.modules())


def test_filters_that_are_off_arrive_as_zeros_and_the_mask_is_the_heads() -> None:
    gated = spread_out(gate(two_layers(), noise(1, size=8))).eval()
    seen = {}
    gated.blocks["3"].register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0].clone()))
    x = noise(5, size=8)
    gated.record(True)
    with torch.no_grad():
        gated(x)
        logits = gated.blocks["0"].head(x)
    mask = gated.signals()["0"].mask
    assert torch.equal(mask, hard_mask(logits)) and 0 < int(mask.sum()) < mask.numel()
    assert bool((seen["x"][~mask] == 0).all())


def test_the_head_is_pool_softmax_and_one_convolution() -> None:
    x = noise(4, channels=6, size=5)
    for pool, values in (("max", x.amax((2, 3))), ("mean", x.mean((2, 3)))):
        head = Head(6, 3, pool, scaled=False)
        expected = values.softmax(1) @ head.weight.T + head.bias
        torch.testing.assert_close(head(x), expected)


def test_a_head_that_wants_nothing_keeps_its_best_filter() -> None:
    assert hard_mask(torch.tensor([[-3.0, -1.0, -2.0], [1.0, -1.0, 2.0]])).tolist() == [
        [False, True, False],
        [True, False, True],
    ]


def test_nothing_to_gate_and_unknown_names() -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match="nothing to gate"):
        gate(mlp, torch.zeros(1, 3, 2, 2))
    single = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"nothing to gate.*one filter"):
        gate(single, torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="did you mean 'decoupled'"):
        gate(two_layers(), noise(1, size=8), mode="decouple")
    with pytest.raises(ValueError, match="unknown convolution"):
        gate(two_layers(), noise(1, size=8), layers=["8"])
    with pytest.raises(ValueError, match="head_pool"):
        gate(two_layers(), noise(1, size=8), head_pool="median")


class Branching(nn.Module):
    """A module that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > -1e9 else x


def test_a_graph_made_before() -> None:
    model, x = two_layers(), noise(2, size=8)
    model.insert(3, Branching())
    with pytest.raises(TraceError, match="Hand the graph on as graph="):
        gate(model, x[:1])
    gated = gate(model, x[:1], graph=layer_graph(model, x, leaf_modules=(Branching,)))
    assert gated.layers == ("0", "4") and any("3.conv is not gated" in note for note in gated.notes)
    with gated.forced():
        torch.testing.assert_close(gated(x), model(x))
    rows = estimate_flops(model, [(x, None)], [0.5], graph=layer_graph(model, x, leaf_modules=(Branching,)))
    assert 0 < rows.reduction.iloc[0] < 1
    with pytest.raises(ValueError, match=r"gates need a traced network.*leaf_modules"):
        gate(model, x[:1], graph=layer_graph(model, x, parents={"4": ["0"], "9": ["4"]}))


@pytest.mark.parametrize("hold", [to_torch_prune, to_parametrize])
def test_weights_held_elsewhere_are_refused(hold) -> None:
    model = two_layers()
    hold(model, {"3.weight": torch.ones(6, 4, 3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"weights of '3' are held by torch\.nn\.utils"):
        gate(model, noise(1, size=8))


def test_only_the_layers_asked_for() -> None:
    gated = gate(two_layers(), noise(1, size=8), layers=["3"])
    assert gated.layers == ("3",) and bool(gated.inputs["3"].always.all())


def test_an_empty_batch() -> None:
    gated = gate(two_layers(), noise(1, size=8))
    with pytest.raises(ValueError, match="holds no image"):
        gated(noise(1, size=8)[:0])
    with pytest.raises(ValueError, match="holds no image"):
        DynamicInference(gated)(noise(1, size=8)[:0])
    for function in (measure, dynamic_macs, start_heads):
        with pytest.raises(ValueError, match="no batch"):
            function(gated, [])
    with pytest.raises(ValueError, match="no batch"):
        estimate_flops(two_layers(), [], [0.5])
    with pytest.raises(ValueError, match="r_grid is empty"):
        estimate_flops(two_layers(), [], [])


# --- gradients and training -----------------------------------------------------------------------------------------


def gradients(mode: str, loss: str) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(backbone's, heads') gradients of the task or the mask loss."""
    gated = spread_out(gate(two_layers(), noise(1, size=8), mode=mode)).train()
    gated.record(True)
    out = gated(noise(6, size=8))
    value = nn.functional.cross_entropy(out, torch.arange(6) % 5) if loss == "task" else gated.mask_loss()
    value.backward()
    heads = {id(p) for p in gated.head_parameters()}
    backbone = [p.grad for p in gated.parameters() if id(p) not in heads]
    return backbone, [p.grad for p in gated.head_parameters()]


def some(grads: list[Tensor | None]) -> bool:
    return any(g is not None and bool((g != 0).any()) for g in grads)


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_the_task_loss_never_reaches_the_heads(mode: str) -> None:
    backbone, heads = gradients(mode, "task")
    assert some(backbone) and not some(heads)


def test_the_mask_loss_stops_at_the_heads_unless_trained_jointly() -> None:
    backbone, heads = gradients("decoupled", "mask")
    assert some(heads) and not some(backbone)
    backbone, heads = gradients("joint", "mask")
    assert some(heads) and some(backbone)


def test_masking_before_the_relu_has_the_gradient_of_masking_behind_it() -> None:
    gated = spread_out(gate(two_layers(), noise(1, size=8))).eval()
    x = noise(3, size=8)
    gated(x).sum().backward()
    first, second = gated.blocks.values()
    plain = copy.deepcopy(gated)
    plain.zero_grad()

    def layer(block: GatedConv, x: Tensor) -> Tensor:
        mask = hard_mask(block.head(x))[:, :, None, None]
        return torch.relu(block.norm(block.conv(x))) * mask

    a, b = plain.blocks.values()
    plain.network[8](layer(b, layer(a, x)).mean((2, 3))).sum().backward()
    for ours, slow in ((first, a), (second, b)):
        torch.testing.assert_close(ours.conv.weight.grad, slow.conv.weight.grad)
        torch.testing.assert_close(ours.norm.bias.grad, slow.norm.bias.grad)


def test_the_mask_loss_by_hand() -> None:
    gated = gate(two_layers(), noise(1, size=8), r=0.8).eval()
    x = noise(4, size=8)
    gated.record(True)
    gated(x)
    loss = gated.mask_loss()
    with torch.no_grad():
        total, value = 0.0, x
        for block in gated.blocks.values():
            logits = block.head(value)
            out = torch.relu(block.norm(block.conv(value)))
            target = mask_targets(out, 0.8).float()
            p = logits.sigmoid()
            total += -(target * p.log() + (1 - target) * (1 - p).log()).sum() / 4
            value = out * hard_mask(logits)[:, :, None, None]
    torch.testing.assert_close(loss.detach(), total / 2)


def tiny_data(count: int = 48) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Dataset("noise", images, torch.arange(count) % 5, tuple("abcde"))


RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05, crop_padding=1)


def trained(**options: object) -> tuple[nn.Sequential, list[dict[str, Tensor]]]:
    """A trained net and the heads and backbone's first weight after every epoch."""
    net = nn.Sequential(Normalize([0.5] * 3, [0.25] * 3), gate(two_layers(), noise(1, size=8)))
    kept: list[dict[str, Tensor]] = []

    def keep(_: dict[str, float]) -> None:
        heads = torch.cat([p.detach().flatten() for p in net[1].head_parameters()]).clone()
        kept.append({"heads": heads, "backbone": net[1].blocks["0"].conv.weight.detach().clone()})

    options = {"seed": 0, "precision": "float32", "on_epoch": keep, **options}
    train_gated(net, tiny_data(), RECIPE, **options)
    return net, kept


def test_cooldown_freezes_the_heads_and_not_the_backbone() -> None:
    _, kept = trained(head_cooldown=0.5)
    moved = [not torch.equal(a["heads"], b["heads"]) for a, b in pairwise(kept)]
    assert moved == [True, False, False]  # between the ends of epochs 1-2, 2-3, 3-4
    assert all(not torch.equal(a["backbone"], b["backbone"]) for a, b in pairwise(kept))
    with pytest.raises(ValueError, match="head_cooldown"):
        trained(head_cooldown=1.5)


def test_heads_learn_at_their_own_constant_rate() -> None:
    fast, slow = trained(head_cooldown=0.0)[1], trained(head_cooldown=0.0, head_lr=1e-9)[1]
    start = torch.cat([p.detach().flatten() for p in gate(two_layers(), noise(1, size=8)).head_parameters()])
    assert (slow[-1]["heads"] - start).abs().max() < 1e-6 < (fast[-1]["heads"] - start).abs().max()


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, _ = trained()

    class Stop(Exception):  # noqa: N818
        pass

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == 3:
            raise Stop

    with pytest.raises(Stop):
        trained(checkpoint=tmp_path / "c.pt", on_epoch=stop)
    resumed, _ = trained(checkpoint=tmp_path / "c.pt")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_heads_start_from_how_often_a_filter_is_wanted() -> None:
    model, x = two_layers(), noise(40, size=8)
    gated = gate(model, x[:1], r=0.8)
    start_heads(gated, [(x[:25], None), (x[25:], None)])
    with torch.no_grad():
        wanted = mask_targets(model[:3](x), 0.8).float().mean(0).clamp(1e-6, 1 - 1e-6)
    expected = torch.logit(wanted).clamp(-4, 4)
    torch.testing.assert_close(gated.blocks["0"].head.bias.detach(), expected, atol=1e-4, rtol=1e-4)


# --- counts ---------------------------------------------------------------------------------------------------------


def mask(*on: int, of: int) -> Tensor:
    found = torch.zeros(1, of, dtype=torch.bool)
    found[0, list(on)] = True
    return found


def test_counts_of_two_layers_by_hand() -> None:
    gated = gate(two_layers(), noise(1, size=8))
    assert gated.macs_dense == 64 * 9 * 3 * 4 + 16 * 9 * 4 * 6 + 6 * 5
    assert gated.macs_heads == 3 * 4 + 4 * 6
    honest, authors = count_macs(gated, {"0": mask(0, 2, of=4), "3": mask(1, 2, 5, of=6)})
    # 2 filters of 3 channels at 64 places, 3 filters of 2 channels at 16 places, the classifier in full
    by_hand = 64 * 9 * 2 * 3 + 16 * 9 * 3 * 2 + 30
    assert authors.item() == by_hand and honest.item() == by_hand + 12 + 24


def test_counts_of_a_residual_network_by_hand() -> None:
    gated = gate(lived_in(Residual()), noise(1, size=8))
    names = ("stem.0", "block.conv1", "block.conv2", "last.0")
    assert gated.layers == names
    masks = dict(zip(names, (mask(0, 1, of=4), mask(2, of=4), mask(1, 3, of=4), mask(0, 1, 2, of=8)), strict=True))
    honest, authors = count_macs(gated, masks)
    first, inner = 64 * 9 * 2 * 3, 64 * 9 * 1 * 2 + 64 * 9 * 2 * 1
    heads = 3 * 4 + 4 * 4 + 4 * 4 + 4 * 8
    # behind the sum channels 0 and 1 (identity) and 1 and 3 (branch) are on: three; the authors count the branch's two
    assert honest.item() == first + inner + 64 * 3 * 3 + 40 + heads
    assert authors.item() == first + inner + 64 * 3 * 2 + 40


def test_a_depthwise_filter_counts_where_it_and_its_channel_are_on() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    gated = gate(net, noise(1, size=4))
    _, authors = count_macs(gated, {"0": mask(0, 1, 2, of=4), "2": mask(1, 2, 3, of=4)})
    assert authors.item() == 16 * 3 * 3 + 16 * 9 * 2


def test_input_channels_count_in_full_where_a_norm_lies_between() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    gated = gate(lived_in(net), noise(1, size=4))
    assert bool(gated.inputs["3"].always.all())
    x = noise(3, size=4)
    with torch.no_grad():
        torch.testing.assert_close(DynamicInference(spread_out(gated))(x), gated(x), atol=1e-5, rtol=0)


def test_all_filters_on_cost_what_the_dense_network_costs_and_the_heads() -> None:
    for name in ("resnet20", "mobilenet_v2"):
        gated = gate(build(name, 10, width=0.125, seed=0), noise(1))
        ones = {
            layer: torch.ones(2, block.conv.out_channels, dtype=torch.bool) for layer, block in gated.blocks.items()
        }
        honest, authors = count_macs(gated, ones)
        assert authors.tolist() == [gated.macs_dense] * 2 and honest[0].item() == gated.macs_dense + gated.macs_heads


def test_what_is_measured_agrees_with_the_masks() -> None:
    gated = spread_out(gate(two_layers(), noise(1, size=8), r=0.7)).train()
    x = noise(7, size=8)
    firing = measure(gated, [(x[:4], None), (x[4:], None)])
    assert gated.training and all(block.signal is None for block in gated.blocks.values())
    gated.eval().record(True)
    with torch.no_grad():
        logits = gated(x)
    signals = gated.signals()
    torch.testing.assert_close(firing.logits, logits)
    for column, signal in enumerate(signals.values()):
        target = mask_targets(signal.maxima, 0.7)
        assert torch.equal(firing.k[:, column], signal.mask.sum(1))
        assert torch.equal(firing.k_target[:, column], target.sum(1))
    right = sum((s.mask == mask_targets(s.maxima, 0.7)).sum().item() for s in signals.values())
    assert firing.mask_accuracy == pytest.approx(right / (7 * 10))
    counted = count_macs(gated, {layer: s.mask for layer, s in signals.items()})[0]
    assert firing.reduction == pytest.approx(1 - counted.mean().item() / gated.macs_dense)
    assert dynamic_macs(gated, [(x, None)])["reduction"] == pytest.approx(firing.reduction)


def test_the_estimate_is_the_count_of_the_dense_networks_targets() -> None:
    model, x = two_layers(), noise(6, size=8)
    rows = estimate_flops(model, [(x[:4], None), (x[4:], None)], [0.5, 0.9, 1.0])
    with torch.no_grad():
        first = model[:3](x)
        second = model[3:6](first)
    gated = gate(model, x[:1])
    for row in rows.itertuples():
        masks = {"0": mask_targets(first, row.r), "3": mask_targets(second, row.r)}
        honest, authors = count_macs(gated, masks)
        assert row.macs == pytest.approx(honest.mean().item()) and row.macs_authors == pytest.approx(
            authors.mean().item()
        )
    assert list(rows.reduction) == sorted(rows.reduction, reverse=True)


def test_static_masks_keep_the_largest_filters_within_the_budget() -> None:
    gated = gate(two_layers(), noise(1, size=8))
    budget = 0.5 * gated.macs_dense
    masks = l1_filter_masks(gated, budget)
    assert count_macs(gated, masks)[1].item() <= budget
    for layer, block in gated.blocks.items():
        norms = block.conv.weight.detach().abs().sum((1, 2, 3))
        kept = masks[layer][0]
        assert norms[kept].min() > norms[~kept].max()
    assert all(int(found.sum()) == 1 for found in l1_filter_masks(gated, 0).values())


# --- saving ---------------------------------------------------------------------------------------------------------


def test_state_is_saved_and_loaded_like_any_modules(tmp_path: Path) -> None:
    gated, x = spread_out(gate(two_layers(), noise(1, size=8))).eval(), noise(4, size=8)
    torch.save(gated.state_dict(), tmp_path / "g.pt")
    again = gate(two_layers(), noise(1, size=8), seed=3).eval()
    again.load_state_dict(torch.load(tmp_path / "g.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(x), gated(x)) and torch.equal(copy.deepcopy(gated)(x), gated(x))


def test_heads_of_another_network_are_refused(tmp_path: Path) -> None:
    gated, path = spread_out(gate(two_layers(), noise(1, size=8))), tmp_path / "heads.safetensors"
    gated.save_heads(path)
    twin = gate(two_layers(), noise(1, size=8), seed=1)
    twin.load_heads(path)
    assert all(torch.equal(a, b) for a, b in zip(twin.head_parameters(), gated.head_parameters(), strict=True))
    with pytest.raises(ValueError, match="another network: it has 2 gated layers, this one 4"):
        gate(Residual(), noise(1, size=8)).load_heads(path)
    wider = two_layers()
    wider[3], wider[4], wider[8] = nn.Conv2d(4, 7, 3, stride=2, padding=1), nn.BatchNorm2d(7), nn.Linear(7, 5)
    with pytest.raises(ValueError, match=r"that of '3' is \(6, 4\).*this network's \(7, 4\)"):
        gate(wider, noise(1, size=8)).load_heads(path)
    other = two_layers()
    other[0].weight.data += 1
    with pytest.raises(ValueError, match="its weights not"):
        gate(other, noise(1, size=8)).load_heads(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        twin.load_heads(path)


# --- skipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_dynamic_inference_gives_the_masked_networks_outputs(name: str) -> None:
    gated = spread_out(gate(lived_in(build(name, 10, width=0.125, seed=0)), noise(1))).eval()
    dynamic = DynamicInference(gated)
    for count in (1, 17):
        x = noise(count)
        firing = measure(gated, [(x, None)])
        assert 0.3 < firing.k.double().sum(1).mean() / sum(firing.filters) < 0.9
        assert count == 1 or len({tuple(row) for row in firing.k.tolist()}) > 1  # images differ in what they use
        torch.testing.assert_close(dynamic(x), firing.logits, atol=1e-5, rtol=0)


def test_what_is_computed_is_only_what_was_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = spread_out(gate(two_layers(), noise(1, size=8))).eval()
    x = noise(1, size=8)
    firing = measure(gated, [(x, None)])
    from gcnet.skipping import SkippingConv

    shapes, real = [], SkippingConv._dense

    def spy(self: SkippingConv, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shapes.append(tuple(weight.shape[:2]))
        return real(self, x, weight, bias)

    monkeypatch.setattr(SkippingConv, "_dense", spy)
    DynamicInference(gated)(x)
    first, second = firing.k[0].tolist()
    assert shapes == [(first, 3), (second, first)] and first < 4 and second < 6


def test_the_sum_of_some_channels_and_others() -> None:
    a, b = Some(torch.rand(1, 2, 3, 3), torch.tensor([0, 3]), 5), Some(torch.rand(1, 2, 3, 3), torch.tensor([1, 3]), 5)
    total = a + b
    assert total.on.tolist() == [0, 1, 3]
    torch.testing.assert_close(total.full(), a.full() + b.full())


def test_the_dense_peer_is_the_dense_network() -> None:
    for name in ("vgg16_bn", "resnet20"):
        model, x = lived_in(build(name, 10, width=0.125, seed=0)), noise(2)
        with torch.no_grad():
            expected = model(x)
            folded = fold_batchnorm(model, x)
            assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
            for function in dense_layouts(model, x).values():
                torch.testing.assert_close(function(x), expected, atol=1e-5, rtol=1e-4)


def test_a_scaled_head_pulls_at_the_backbone_as_the_papers_does() -> None:
    pooled, pull = noise(8, size=4).flatten(1)[:, :16], noise(8, size=1).flatten(1)[:, :1].expand(-1, 4)
    logits, pulls = [], []
    for scaled in (False, True):
        head, x = Head(16, 4, scaled=scaled), pooled.clone().requires_grad_()
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        logits.append(head.of_pooled(x))
        logits[-1].backward(pull)
        pulls.append(x.grad)
    assert torch.allclose(logits[1], 16 * logits[0]) and torch.allclose(pulls[1], pulls[0]) and some(pulls)


def test_a_norm_without_running_statistics_is_left_behind_the_gate() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    gated = spread_out(gate(model.eval(), noise(1, size=8)[:, :3]))
    x = noise(1, size=8)[:, :3]
    assert torch.allclose(DynamicInference(gated)(x), gated(x), atol=1e-5)


def test_skipping_follows_forced_masks_and_refuses_those_by_image() -> None:
    gated, x = spread_out(gate(two_layers().eval(), noise(1, size=8))), noise(1, size=8)
    skipping = DynamicInference(gated)
    generator = torch.Generator().manual_seed(1)
    sizes = {layer: block.conv.out_channels for layer, block in gated.blocks.items()}
    masks = {layer: torch.rand(1, size, generator=generator) < 0.6 for layer, size in sizes.items()}
    with gated.forced(masks):
        torch.testing.assert_close(skipping(x), gated(x), atol=1e-5, rtol=0)
    by_image = {layer: mask.expand(2, -1) for layer, mask in masks.items()}
    with gated.forced(by_image), pytest.raises(ValueError, match="masks of one row"):
        skipping(x)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_skipping_refuses_a_convolution_that_computes_something_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)).eval()
    gated = gate(model, noise(1, size=8))
    with pytest.raises(ValueError, match="layer '2' is a Standardised with a forward of its own"):
        DynamicInference(gated)
