"""Scores against loops and autograd, masks exact to the weight, nothing but the mask changed."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet.pruning import (
    PRUNERS,
    Context,
    Masks,
    apply_masks,
    collapsed_layers,
    global_masks,
    keep_top,
    lamp_score,
    layer_masks,
    prunable_layers,
    prune,
    pruned_count,
    sparsity,
    summary,
)
from gcnet.synaptic_flow import flow, linearized

every_pruner = pytest.mark.parametrize("pruner", PRUNERS)


def small(seed: int = 0) -> nn.Sequential:
    """72 + 144 + 40 = 256 weights; BatchNorm with statistics, slopes and shifts of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(-2, 2)
        model[1].bias.uniform_(-1, 1)
    return model


EXAMPLE = torch.zeros(1, 2, 2, 2)
TOTAL = 256


def masks_of(pruner: str, share: float = 0.5, model: nn.Module | None = None, **more: object) -> Masks:
    return prune(model or small(), pruner=pruner, sparsity=share, example_input=EXAMPLE, **more)


def removed(masks: Masks) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- exact counts ---------------------------------------------------------------------------------------------------

# Few distinct values: ties everywhere.
scores = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=40)


@given(scores, st.integers(-2, 45))
def test_exactly_k_are_kept_however_many_are_equal(values: list[float], kept: int) -> None:
    flat = torch.tensor(values)
    mask = keep_top(flat, kept)
    assert int(mask.sum()) == min(max(kept, 0), len(values))
    if 0 < kept < len(values):
        threshold = flat[mask].min()
        assert threshold >= flat[~mask].max()
        equal = mask[flat == threshold]  # of equal ones the first stay
        assert equal.tolist() == sorted(equal.tolist(), reverse=True)


@given(st.lists(scores, min_size=1, max_size=5), st.data())
def test_global_masks_remove_the_lowest_of_all_layers(layers: list[list[float]], data: st.DataObject) -> None:
    tensors = {str(k): torch.tensor(values) for k, values in enumerate(layers)}
    total = sum(map(len, layers))
    pruned = data.draw(st.integers(0, total))
    masks = global_masks(tensors, pruned)
    assert removed(masks) == pruned
    kept = [tensors[n][masks[n]] for n in tensors]
    gone = [tensors[n][~masks[n]] for n in tensors]
    if 0 < pruned < total:
        assert torch.cat(kept).min() >= torch.cat(gone).max()


@given(st.lists(scores, min_size=1, max_size=5), st.data())
def test_layer_masks_remove_the_same_share_of_every_layer(layers: list[list[float]], data: st.DataObject) -> None:
    tensors = {str(k): torch.tensor(values) for k, values in enumerate(layers)}
    total = sum(map(len, layers))
    pruned = data.draw(st.integers(0, total))
    masks = layer_masks(tensors, pruned)
    assert removed(masks) == pruned
    for name, score in tensors.items():
        assert abs(int((~masks[name]).sum()) - len(score) * pruned / total) < 1
        if masks[name].any() and not masks[name].all():
            assert score[masks[name]].min() >= score[~masks[name]].max()


def test_the_odd_weights_go_to_the_largest_remainders() -> None:
    tensors = {"a": torch.arange(10.0), "b": torch.arange(7.0), "c": torch.arange(3.0)}
    # 9 of 20: 4.5, 3.15, 1.35 -> 4, 3, 1 and one more for the largest remainder
    assert [int((~m).sum()) for m in layer_masks(tensors, 9).values()] == [5, 3, 1]


@every_pruner
@settings(max_examples=12)
@given(share=st.floats(0, 0.999), seed=st.integers(0, 3))
def test_every_pruner_meets_the_sparsity_to_the_weight(pruner: str, share: float, seed: int) -> None:
    if pruner == "synflow":
        share = int(10 * share) / 10  # a hundred passes each: ten different shares are enough
    masks = masks_of(pruner, share, small(seed), seed=seed)
    assert removed(masks) == pruned_count(TOTAL, share) == round(share * TOTAL)
    assert sparsity(masks) == pytest.approx(round(share * TOTAL) / TOTAL)
    assert {n: m.shape for n, m in masks.items()} == {
        f"{n}.weight": small().get_submodule(n).weight.shape for n in ("0", "3", "7")
    }
    assert all(mask.dtype == torch.bool for mask in masks.values())


@every_pruner
def test_ties_are_broken_alike_every_time(pruner: str) -> None:
    model = small()
    with torch.no_grad():
        for layer in ("0", "3", "7"):
            model.get_submodule(layer).weight.fill_(0.1)
    masks = masks_of(pruner, 0.37, model)
    assert removed(masks) == round(0.37 * TOTAL) and same(masks, masks_of(pruner, 0.37, model))


@every_pruner
def test_masks_follow_from_the_seed(pruner: str) -> None:
    first = masks_of(pruner, seed=1)
    torch.rand(3)
    assert same(first, masks_of(pruner, seed=1))
    assert same(first, masks_of(pruner, seed=2)) == (pruner != "random")


@every_pruner
def test_a_higher_sparsity_removes_more_of_the_same(pruner: str) -> None:
    low, high = masks_of(pruner, 0.4), masks_of(pruner, 0.8)
    if pruner != "synflow":  # whose later scores depend on what went before
        assert all(bool((low[name] | ~high[name]).all()) for name in low)
    assert removed(high) > removed(low)


@every_pruner
def test_the_model_is_as_before(pruner: str) -> None:
    model = small().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    masks_of(pruner, 0.9, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random) and isinstance(model[2], nn.ReLU)


@every_pruner
def test_only_the_named_layers_are_pruned(pruner: str) -> None:
    masks = masks_of(pruner, 0.25, layers=["7", "0"])
    assert set(masks) == {"0.weight", "7.weight"} and removed(masks) == 28


@every_pruner
def test_works_under_no_grad_and_leaves_it_on(pruner: str) -> None:
    with torch.no_grad():
        masks = masks_of(pruner)
        assert not torch.is_grad_enabled()
    assert same(masks, masks_of(pruner))


# --- scores ---------------------------------------------------------------------------------------------------------


def test_l1_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, -0.9, 0.5], [-0.2, 0.3, 0.05]]))
        model[1].weight.copy_(torch.tensor([[2.0, -3.0], [0.4, -0.01]]))
    masks = prune(model, pruner="l1", sparsity=0.5)
    assert masks["0.weight"].tolist() == [[False, True, True], [False, False, False]]
    assert masks["1.weight"].tolist() == [[True, True], [True, False]]
    masks = prune(model, pruner="l1_layer", sparsity=0.5)
    assert masks["0.weight"].tolist() == [[False, True, True], [False, True, False]]
    assert masks["1.weight"].tolist() == [[True, True], [False, False]]


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12))
def test_lamp_against_a_loop(values: list[int]) -> None:
    model = nn.Sequential(nn.Linear(len(values), 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([values], dtype=torch.float32))
    squares = [float(v) ** 2 for v in values]
    order = sorted(range(len(values)), key=lambda i: squares[i])  # of equal ones the first is the smaller
    expected = [0.0] * len(values)
    for place, index in enumerate(order):
        rest = sum(squares[other] for other in order[place:])
        expected[index] = squares[index] / rest if rest else 0.0
    assert np.allclose(lamp_score(model, ["0"], Context())["0.weight"].numpy(), [expected])


def test_lamp_never_takes_the_largest_weight_of_a_layer_first() -> None:
    model = small()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)  # L1 would take the whole layer
    assert collapsed_layers(masks_of("l1", 0.9, model)) == ("3",)
    assert collapsed_layers(masks_of("lamp", 0.98, model)) == ()


def flow_by_hand(model: nn.Sequential) -> dict[str, Tensor]:
    """SynFlow of `small`, written out: |weights| in float64, BatchNorm as its slope, no shift, no rectifier."""
    conv1, conv2, linear = (model[k].weight.detach().double().abs().requires_grad_() for k in (0, 3, 7))
    norm = model[1]
    slope = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    x = F.conv2d(torch.ones(1, 2, 2, 2, dtype=torch.float64), conv1, padding=1) * slope.view(1, -1, 1, 1)
    x = F.max_pool2d(F.conv2d(x, conv2, padding=1), 2).flatten(1)
    out = (x @ linear.T).sum()
    out.backward()
    return {f"{k}.weight": (w.grad * w).abs().detach() for k, w in ((0, conv1), (3, conv2), (7, linear))}


def test_one_shot_synflow_against_autograd_in_float64() -> None:
    model = small()
    by_hand = flow_by_hand(model)
    for share in (0.1, 0.5, 0.77, 0.9):
        assert same(masks_of("os_synflow", share, model), global_masks(by_hand, round(share * TOTAL)))


def test_synflow_is_a_hundred_rounds_of_it_on_an_exponential_schedule() -> None:
    model, by_hand = small(), small()
    for k in range(1, 101):
        flow = flow_by_hand(by_hand)
        gone = {n: by_hand.get_parameter(n).detach() == 0 for n in flow}
        flow = {n: torch.where(gone[n], -1.0, score) for n, score in flow.items()}
        masks = global_masks(flow, TOTAL - round(TOTAL * 0.1 ** (k / 100)))
        apply_masks(by_hand, masks)
    # 0.9 of 256 is 230.4: both round to 230
    assert same(masks_of("synflow", 0.9, model), masks)


def test_synflow_score_is_weight_times_the_paths_through_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[-10.0, 1.0]]))
        model[0].bias.fill_(-100.0)
    # first layer: |w| x |v|: 10 20 / 3 4; second: |v| x row sum: 30, 7
    expected = [[10.0, 20.0], [3.0, 4.0]], [[30.0, 7.0]]
    order = sorted(v for rows in expected for row in rows for v in row)
    for count in range(1, 6):
        masks = prune(model, pruner="os_synflow", sparsity=count / 6, example_input=torch.zeros(1, 2))
        kept = [[v > order[count - 1] for v in row] for rows in expected for row in rows]
        assert masks["0.weight"].tolist() + masks["2.weight"].tolist() == kept


def test_every_layer_of_a_chain_carries_the_same_flow() -> None:
    by_hand = flow_by_hand(small())
    total = [score.sum().item() for score in by_hand.values()]
    assert total == pytest.approx([total[0]] * 3)


@pytest.mark.parametrize("bend", [nn.ReLU6(), nn.Hardtanh(), nn.Sigmoid(), nn.GELU(), nn.Dropout(0.9)])
def test_activations_that_saturate_do_not_stop_the_flow(bend: nn.Module) -> None:
    def masks(middle: nn.Module) -> Masks:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), middle, nn.Linear(8, 3))
        with torch.no_grad():
            model[0].weight.mul_(100)
        return prune(model, pruner="os_synflow", sparsity=0.7, example_input=torch.zeros(1, 6))

    assert same(masks(bend), masks(nn.ReLU()))


def test_sixty_layers_do_not_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(60)])
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(10)
        arrives = linearized(model).float()(torch.ones(1, 16, 4, 4))
    assert not bool(arrives.isfinite().all())  # float32 would
    masks = prune(model, pruner="os_synflow", sparsity=0.5, example_input=torch.zeros(1, 16, 4, 4))
    assert removed(masks) == 60 * 16 * 16 * 9 // 2


def wide_in_the_middle() -> nn.Sequential:
    """The middle layer has a hundred times the weights of the others, so each carries a hundredth of the flow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 60), nn.ReLU(), nn.Linear(60, 600), nn.ReLU(), nn.Linear(600, 2))
    with torch.no_grad():
        for layer in (0, 2, 4):
            model[layer].weight.abs_().clamp_min_(0.01)
    return model


def test_synflow_keeps_a_path_where_one_shot_cuts_a_layer() -> None:
    model, x = wide_in_the_middle(), torch.zeros(1, 4)
    total = 240 + 36_000 + 1200
    share = 1 - 200 / total
    one_shot = prune(model, pruner="os_synflow", sparsity=share, example_input=x)
    assert "2" in collapsed_layers(one_shot) and removed(one_shot) == total - 200
    iterative = prune(model, pruner="synflow", sparsity=share, example_input=x)
    assert collapsed_layers(iterative) == () and removed(iterative) == total - 200
    twin = linearized(model)
    apply_masks(twin, iterative)
    with torch.no_grad():
        assert bool((flow(twin, x) > 0).any())


def test_what_synflow_removed_does_not_come_back() -> None:
    """First the weakest weight goes, then its unit's output; the unit's other input now scores 0 like those two."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.01, 0.02], [1.0, 1.0], [1.0, 1.0]]))
        model[2].weight.fill_(1.0)
    masks = prune(model, pruner="synflow", sparsity=2 / 9, example_input=torch.zeros(1, 2))
    assert masks["0.weight"].tolist() == [[False, True], [True, True], [True, True]]
    assert masks["2.weight"].tolist() == [[False, True, True]]


def test_networks_without_running_statistics_are_taken() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Conv2d(3, 2, 1)
    )
    assert removed(prune(model, pruner="os_synflow", sparsity=0.5, example_input=EXAMPLE)) == 6


@every_pruner
def test_a_single_layer_is_a_model_too(pruner: str) -> None:
    masks = prune(nn.Linear(4, 5), pruner=pruner, sparsity=0.5, example_input=torch.zeros(1, 4))
    assert list(masks) == ["weight"] and removed(masks) == 10


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, -0.01, 1.5, float("nan")])
def test_sparsity_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"sparsity {value} is outside \[0, 1\)"):
        masks_of("l1", value)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown pruner 'synflo'; did you mean 'synflow'\? known: l1, l1_layer"):
        masks_of("synflo")
    with pytest.raises(ValueError, match=r"unknown layer '33'.*known: 0, 3, 7"):
        masks_of("l1", layers=["0", "33"])
    with pytest.raises(ValueError, match="no Conv2d or Linear layer"):
        prune(nn.Sequential(nn.ReLU()), pruner="l1", sparsity=0.5)
    with pytest.raises(ValueError, match="pass example_input"):
        prune(small(), pruner="os_synflow", sparsity=0.5)


@every_pruner
def test_weights_that_are_not_finite_name_the_layer(pruner: str) -> None:
    model = small()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    if pruner == "random":
        assert removed(masks_of(pruner, 0.5, model)) == 128
        return
    with pytest.raises(FloatingPointError, match="not finite"):
        masks_of(pruner, 0.5, model)


# --- applying, saving, counting -------------------------------------------------------------------------------------


def test_applied_masks_are_exactly_0_and_the_rest_as_before() -> None:
    model, before, masks = small(), small(), masks_of("l1")
    assert apply_masks(model, masks) is model
    for name, mask in masks.items():
        value = model.get_parameter(name)
        assert bool((value[~mask] == 0).all()) and torch.equal(value[mask], before.get_parameter(name)[mask])


def test_masks_of_another_network_are_refused_before_anything_changes() -> None:
    other = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Identity(), nn.Conv2d(4, 5, 3))
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"mask '3\.weight' \(4, 4, 3, 3\) does not fit this network: \(5, 4, 3, 3\)"):
        apply_masks(other, masks_of("l1"))
    assert torch.equal(other[0].weight, before)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=20)
def test_masks_are_read_as_they_were_saved(tmp_path_factory, shapes: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = Masks({f"layer.{k}": torch.rand(shape, generator=generator) > 0.5 for k, shape in enumerate(shapes)})
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    masks.save(path)
    loaded = Masks.load(path)
    assert isinstance(loaded, Masks) and list(loaded) == list(masks) and same(loaded, masks)


def test_a_mask_file_is_one_bit_a_weight(tmp_path: Path) -> None:
    masks = Masks({"w": torch.rand(400, 400) > 0.5})
    masks.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 160_000 / 8 + 500


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_mask_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.safetensors"
    masks_of("l1").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"'{path}' is truncated or damaged"):
        Masks.load(path)


def test_other_files_are_no_masks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors' .*holds no masks"):
        Masks.load(tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("these are no masks " * 20)
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        Masks.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="none"):
        Masks.load(tmp_path / "none.safetensors")


def test_a_full_disk_leaves_the_old_mask_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    old = masks_of("l1")
    old.save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file may grow beyond: a write really fails
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|i/o|io"):
            Masks({"w": torch.rand(400, 400) > 0.5}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(Masks.load(path), old) and list(tmp_path.iterdir()) == [path]


def test_what_masks_add_up_to() -> None:
    masks = Masks({"a.weight": torch.tensor([True, False, False, False]), "b.weight": torch.zeros(2, 2) > 0})
    assert sparsity(masks) == 7 / 8 and collapsed_layers(masks) == ("b",)
    assert summary(masks) == [
        {"layer": "a", "weights": 4, "kept": 1, "sparsity": 0.75},
        {"layer": "b", "weights": 4, "kept": 0, "sparsity": 1.0},
    ]
    assert sparsity({}) == 0.0
    assert prunable_layers(small()) == ("0", "3", "7")


def test_layers_that_share_a_weight_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="layers '0' and '2' share one weight"):
        prune(model, pruner="l1", sparsity=0.5)
    assert removed(prune(model, pruner="l1", sparsity=0.5, layers=["0", "3"])) == 12


@pytest.mark.parametrize("count", [-1, 220, 10**6])
def test_a_number_of_weights_out_of_range_is_refused(count: int) -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 1))
    with pytest.raises(ValueError, match="less than the 220 weights"):
        prune(model, pruner="l1", sparsity=0.5, pruned=count)
    assert sparsity(prune(model, pruner="l1", sparsity=0.5, pruned=11)) == pytest.approx(0.05)
