"""Which layers the ghost guides, that it really does, and the whole method in one call on anybody's network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gcnet.connectivity import SIMILARITIES, connectivity
from gcnet.ghost import build_ghost, build_mixture
from gcnet.graph import LayerGraph, layer_graph
from gcnet.hybrid import HYBRIDS, ghost_prune, hybrid_masks, passes_signal, split
from gcnet.networks import NETWORKS, build
from gcnet.pruning import PRUNERS, Masks, apply_masks, global_masks, prune, pruned_count, sparsity
from gcnet.training import Normalize

# --- plans ----------------------------------------------------------------------------------------------------------


@cache
def vgg() -> LayerGraph:
    return layer_graph(build("vgg16_bn", 10, channels=1, width=0.125, seed=0), torch.zeros(1, 1, 32, 32))


def guided(hybrid: str | list[str], graph: LayerGraph | None = None) -> list[int]:
    """Numbers of the guided layers, counted from 1 as in the paper."""
    plan = split(graph or vgg(), hybrid)
    assert tuple(plan) == (graph or vgg()).layers and set(plan.values()) <= {"direct", "guided"}
    return [k for k, role in enumerate(plan.values(), 1) if role == "guided"]


@pytest.mark.parametrize(
    ("hybrid", "layers"),
    [
        ("direct", range(0)),
        ("Full", range(2, 15)),
        ("FH", range(2, 8)),  # the first half, of which the first layer has no parent
        ("BH", range(8, 15)),
        ("B25", range(11, 15)),  # 3.5 layers, rounded
        ("F30", range(2, 5)),  # 4.2
        ("B10", range(14, 15)),  # 1.4
        ("B100", range(2, 15)),
        ("F1", range(0)),
    ],
)
def test_the_plans_of_a_vgg_of_14_layers(hybrid: str, layers: range) -> None:
    assert guided(hybrid) == list(layers)


def test_any_list_of_layers() -> None:
    names = vgg().layers
    assert guided([names[3], names[13]]) == [4, 14]
    assert guided([names[0]]) == [] and guided([]) == []


@given(st.sampled_from(["F", "B"]), st.integers(0, 100))
def test_percentages_count_layers_and_the_first_is_always_direct(side: str, percent: int) -> None:
    layers = guided(f"{side}{percent}")
    share = percent * 14 / 100
    for count in (math.floor(share), math.ceil(share)):  # rounded: whichever is nearer
        expected = range(1, count + 1) if side == "F" else range(15 - count, 15)
        if abs(count - share) < 0.5:
            assert layers == [k for k in expected if k > 1]
    assert 1 not in layers


@pytest.mark.parametrize(("word", "nearest"), [("ful", "Full"), ("Bh", "BH"), ("B250", "B25"), ("Direct", "direct")])
def test_unknown_hybrids_are_refused_with_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown hybrid '{word}'; did you mean '{nearest}'\?"):
        split(vgg(), word)


def test_unknown_layers_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown layer 'clasifier'; did you mean 'classifier'\?"):
        split(vgg(), ["clasifier"])


def test_every_layer_without_a_parent_is_direct() -> None:
    class TwoStems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.join = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.join(torch.cat([self.left(x), self.right(x)], 1))

    plan = split(layer_graph(TwoStems(), torch.zeros(1, 1, 2, 2)), "Full")
    assert plan == {"left": "direct", "right": "direct", "join": "guided"}


# --- masks ----------------------------------------------------------------------------------------------------------


class Three(nn.Module):
    """2 -> 3 -> 3 -> 2 by 1 x 1 convolutions: 6, 9 and 6 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


X = torch.zeros(1, 2, 2, 2)
NAMES = ("a", "b", "c")
# The ghost likes what the original does not.
MATRICES = {
    "b": torch.tensor([[0.9, -0.8, 0.1], [0.2, 0.3, -0.7], [0.05, 0.6, 0.4]]),
    "c": torch.tensor([[-0.5, 0.01, 0.02], [0.03, 0.95, -0.85]]),
}


def three(pruner: str, hybrid: str | list[str], share: float) -> tuple[Masks, nn.Module]:
    model = Three()
    with torch.no_grad():
        for layer, matrix in MATRICES.items():
            model.get_submodule(layer).weight.copy_((1 - matrix.abs())[:, :, None, None])
    masks, _ = hybrid_masks(
        model, layer_graph(model, X), MATRICES, pruner=pruner, sparsity=share, hybrid=hybrid, example_input=X
    )
    return masks, model


def test_the_masks_of_guided_layers_come_from_the_ghost() -> None:
    masks, model = three("l1", ["c"], 1 / 3)
    # c alone: 2 of 6 by connectivity; a and b together: 5 of 15 by their own weights
    assert masks["c.weight"].flatten(1).tolist() == [[True, False, False], [True, True, True]]
    by_weight = global_masks({n: model.get_parameter(n).detach().abs() for n in ("a.weight", "b.weight")}, 5)
    assert all(torch.equal(masks[name], mask) for name, mask in by_weight.items())
    assert list(masks) == ["a.weight", "b.weight", "c.weight"]


def test_guided_layers_have_one_ranking_together() -> None:
    masks, _ = three("l1", "Full", 7 / 21)
    # b and c: 5 of 15 go, the lowest |connectivity| of both together: .01 .02 .03 .05 .1
    assert masks["b.weight"].flatten(1).tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert masks["c.weight"].flatten(1).tolist() == [[True, False, False], [False, True, True]]
    assert int((~masks["a.weight"]).sum()) == 2


def test_direct_is_the_base_pruner_itself() -> None:
    for pruner in PRUNERS:
        masks, model = three(pruner, "direct", 0.5)
        own = prune(model, pruner=pruner, sparsity=0.5, example_input=X)
        assert masks.keys() == own.keys() and all(torch.equal(masks[n], own[n]) for n in own)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_each_part_is_what_the_base_pruner_makes_of_it(pruner: str) -> None:
    masks, model = three(pruner, "BH", 0.4)  # 1.5 layers are 2: b and c
    ghost = build_ghost(model, MATRICES)
    guided_part = prune(ghost, pruner=pruner, sparsity=0.4, layers=["b", "c"], example_input=X)
    direct_part = prune(model, pruner=pruner, sparsity=0.4, layers=["a"], example_input=X)
    assert all(torch.equal(masks[n], m) for n, m in (guided_part | direct_part).items())


@cache
def prepared() -> tuple[nn.Module, LayerGraph, dict[str, Tensor]]:
    model = build("resnet20", 10, channels=1, width=0.125, seed=0)
    graph = layer_graph(model, torch.zeros(1, 1, 32, 32))
    generator = torch.Generator().manual_seed(0)
    matrices = {
        layer: 2 * torch.rand(model.get_submodule(layer).weight.shape[:2], generator=generator) - 1
        for layer in graph.layers
        if graph.parents[layer]
    }
    return model, graph, matrices


@given(st.floats(0, 0.999), st.sampled_from([*HYBRIDS, "F30", "B7"]), st.sampled_from(["l1", "l1_layer", "random"]))
@settings(max_examples=40)
def test_hybrids_lose_as_many_weights_as_direct_pruning(share: float, hybrid: str, pruner: str) -> None:
    model, graph, matrices = prepared()
    masks, _ = hybrid_masks(
        model, graph, matrices, pruner=pruner, sparsity=share, hybrid=hybrid, example_input=torch.zeros(1, 1, 32, 32)
    )
    total = sum(model.get_submodule(layer).weight.numel() for layer in graph.layers)
    assert sum(int((~m).sum()) for m in masks.values()) == pruned_count(total, share)
    assert list(masks) == [f"{layer}.weight" for layer in graph.layers]
    plan = split(graph, hybrid)
    for role in ("direct", "guided"):
        part = {f"{n}.weight": masks[f"{n}.weight"] for n in plan if plan[n] == role}
        weights = sum(m.numel() for m in part.values())
        if part:  # each part to the same sparsity, but for one weight of rounding
            assert abs(sparsity(part) * weights - share * weights) <= 1 + 1e-6


# --- the whole method -----------------------------------------------------------------------------------------------


def images(count: int = 12, channels: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, 1, 1, generator=generator) + torch.randn(
        count, channels, size, size, generator=generator
    )
    return list(zip(x.split(5), (torch.arange(count) % 3).split(5), strict=True))


def test_one_call_does_every_step() -> None:
    model, batches = Three(), images()
    found = ghost_prune(model, iter(batches), pruner="l1", sparsity=0.5, hybrid="BH")
    graph = layer_graph(model, batches[0][0])
    matrices = connectivity(model, batches)
    masks, plan = hybrid_masks(
        model, graph, matrices, pruner="l1", sparsity=0.5, hybrid="BH", example_input=batches[0][0]
    )
    assert found.plan == plan == {"a": "direct", "b": "guided", "c": "guided"}
    assert all(torch.equal(found.connectivity[n], matrices[n]) for n in matrices)
    assert all(torch.equal(found.masks[n], masks[n]) for n in masks)


def test_the_report_counts_what_the_masks_hold() -> None:
    found = ghost_prune(Three(), images(), pruner="l1", sparsity=0.7, hybrid="Full")
    assert found.report["kept_weights"] == 21 - round(0.7 * 21) == sum(int(m.sum()) for m in found.masks.values())
    assert found.report["sparsity"] == sparsity(found.masks)
    assert [(row["layer"], row["role"]) for row in found.report["layers"]] == list(found.plan.items())
    assert [row["kept"] for row in found.report["layers"]] == [int(m.sum()) for m in found.masks.values()]
    assert found.report["collapsed_layers"] == tuple(n for n in NAMES if not found.masks[f"{n}.weight"].any())


def test_measured_connectivity_can_be_given() -> None:
    matrices = connectivity(Three(), images(), similarity="cosine")
    found = ghost_prune(Three(), images(1), hybrid="Full", connectivity=matrices, sparsity=0.5)
    again = ghost_prune(Three(), images(), hybrid="Full", similarity="cosine", sparsity=0.5)
    assert all(torch.equal(found.masks[n], again.masks[n]) for n in again.masks)


def test_given_connectivity_that_lacks_a_guided_layer_is_refused() -> None:
    matrices = connectivity(Three(), images())
    del matrices["b"]
    with pytest.raises(ValueError, match=r"layer 'b'|connectivity.*'b'"):
        ghost_prune(Three(), images(), hybrid="Full", connectivity=matrices)
    ghost_prune(Three(), images(), hybrid=["c"], connectivity=matrices)  # b is not guided here


def test_direct_pruning_needs_one_image_for_its_shape() -> None:
    found = ghost_prune(Three(), images(1), hybrid="direct", sparsity=0.5)
    assert found.connectivity == {} and set(found.plan.values()) == {"direct"}


@pytest.mark.parametrize("level", [0.9, 0.98, 0.995])
@pytest.mark.parametrize("hybrid", ["Full", "BH", "FH"])
def test_a_small_part_keeps_a_weight_and_the_total_is_exact(hybrid: str, level: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(640, 4)
    )
    batch = (torch.randn(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64))
    found = ghost_prune(model, [batch], pruner="l1", sparsity=level, hybrid=hybrid)
    total = sum(mask.numel() for mask in found.masks.values())
    assert total - found.report["kept_weights"] == pruned_count(total, level)
    assert all(mask.any() for name, mask in found.masks.items() if hybrid == "Full" and name == "0.weight")


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_similarity_with_every_pruner(similarity: str, pruner: str) -> None:
    found = ghost_prune(Three(), images(), similarity=similarity, pruner=pruner, sparsity=0.6, hybrid="Full")
    again = ghost_prune(Three(), images(), similarity=similarity, pruner=pruner, sparsity=0.6, hybrid="Full")
    assert sum(int(m.sum()) for m in found.masks.values()) == 21 - round(0.6 * 21)
    assert all(torch.equal(found.masks[n], again.masks[n]) for n in again.masks)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_of_the_registry(name: str, channels: int) -> None:
    model = build(name, 5, channels=channels, width=0.125, seed=0)
    found = ghost_prune(model, images(8, channels, 32), sparsity=0.8, hybrid="B25")
    assert found.report["sparsity"] == pytest.approx(0.8, abs=1e-3) and found.report["notes"] == ()
    count = len(found.plan)
    assert [*found.plan.values()].count("guided") == pytest.approx(count / 4, abs=0.5)
    for layer, matrix in found.connectivity.items():
        assert matrix.shape == model.get_submodule(layer).weight.shape[:2] and bool(matrix.isfinite().all())
    apply_masks(model, found.masks)
    assert bool(model.eval()(torch.zeros(1, channels, 32, 32)).isfinite().all())


def test_a_network_of_torchvision() -> None:
    model = build("torchvision:resnet18", 10, seed=0)
    found = ghost_prune(model, images(6, 3, 32), pruner="l1", sparsity=0.9, hybrid="BH")
    assert found.report["sparsity"] == pytest.approx(0.9, abs=1e-6) and len(found.plan) == 21


class Own(nn.Module):
    """Somebody's own network: residual, with BatchNorm and dropout, of another channel count at every layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.branch, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.drop((x + self.branch(x)).mean((2, 3))))


def failing(how: str) -> Iterator[tuple[Tensor, Tensor]]:
    yield from images()
    if how == "loader fails":
        raise OSError("the disk went away")
    if how == "NaN":
        yield torch.full((2, 2, 4, 4), float("nan")), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("how", ["", "loader fails", "NaN"])
@pytest.mark.parametrize("pruner", ["l1", "synflow"])
def test_the_model_is_as_before(how: str, pruner: str) -> None:
    model = Own().train()
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    if how:
        with pytest.raises((OSError, FloatingPointError)):
            ghost_prune(model, failing(how), pruner=pruner, hybrid="Full")
    else:
        ghost_prune(model, failing(how), pruner=pruner, hybrid="Full")
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sparsity": 1.0}, r"sparsity 1\.0 is outside \[0, 1\)"),
        ({"pruner": "l2"}, r"unknown pruner 'l2'; did you mean 'l1'\?"),
        ({"hybrid": "B26%"}, r"unknown hybrid 'B26%'; did you mean 'B25'\?"),
        ({"similarity": "pearsons"}, r"unknown similarity 'pearsons'; did you mean 'pearson'\?"),
        ({"residual": "near"}, r"unknown residual 'near'"),
        ({"batchnorm": "non"}, r"batchnorm must be identity or original, got 'non'"),
        ({"tap": "bn"}, r"unknown tap 'bn'"),
    ],
)
def test_bad_words_are_refused_before_any_image_is_read(values: dict, told: str) -> None:
    def source() -> Iterator[tuple[Tensor, Tensor]]:
        yield images()[0]
        pytest.fail("the whole pass was made before the word was looked at")

    with pytest.raises(ValueError, match=told):
        ghost_prune(Own(), source(), **{"hybrid": "Full", **values})


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="got no batch at all"):
        ghost_prune(Own(), [])
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        ghost_prune(Own(), images(1), hybrid="Full")


# --- does anything pass? --------------------------------------------------------------------------------------------


def ones(model: nn.Module) -> Masks:
    return Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if n.endswith("weight")})


def test_a_cut_layer_stops_the_signal_of_a_chain_but_a_shortcut_carries_it() -> None:
    chain, masks = Three(), ones(Three())
    assert passes_signal(chain, masks, X)
    masks["b.weight"][:] = False
    assert not passes_signal(chain, masks, X)
    own = Own()
    masks = Masks({n: m for n, m in ones(own).items() if n != "norm.weight"})
    masks["branch.weight"][:] = False
    assert passes_signal(own, masks, X)
    masks["stem.weight"][:] = False
    assert not passes_signal(own, masks, X)  # the biases that are left are no signal


def test_layers_that_do_not_meet_pass_nothing() -> None:
    """Every layer keeps weights, but no path leads through."""
    model, masks = Three(), ones(Three())
    masks["a.weight"][1:] = False  # only channel 0 is made
    masks["b.weight"][:, 0] = False  # and not read
    assert not passes_signal(model, masks, X)


# --- magnitude and connectivity in one ranking ---


def test_a_mix_ranks_all_layers_together_at_the_exact_sparsity() -> None:
    model, example = Three(), images()[0][0]
    graph = layer_graph(model, example)
    matrices = {n: torch.rand(model.get_submodule(n).weight.shape[:2]) for n in graph.layers if graph.parents[n]}
    options = {"pruner": "l1", "sparsity": 0.5, "example_input": example}
    masks, plan = hybrid_masks(model, graph, matrices, hybrid="Mix50", **options)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(total / 2)
    assert set(plan.values()) == {"direct", "mixed"} and plan[graph.layers[0]] == "direct"
    assert plan == split(graph, "Mix50")
    whole = ghost_prune(model, images(), pruner="l1", sparsity=0.5, hybrid="Mix50")
    assert whole.plan == plan and set(whole.connectivity) == set(matrices)
    nothing, _ = hybrid_masks(model, graph, matrices, hybrid="Mix0", **options)
    direct, _ = hybrid_masks(model, graph, {}, hybrid="direct", **options)
    assert all(torch.equal(nothing[name], direct[name]) for name in direct)
    mixed = build_mixture(model, matrices, 0.5)
    kept = torch.cat([m.get_submodule(n[:-7]).weight.abs()[k] for m in [mixed] for n, k in masks.items()]).min()
    lost = torch.cat([mixed.get_submodule(n[:-7]).weight.abs()[~k] for n, k in masks.items()]).max()
    assert kept >= lost


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weights_that_are_computed_before_every_pass_are_refused(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match="weights of '1' are no parameters but computed"):
        ghost_prune(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))], sparsity=0.5)


def test_a_network_behind_its_normalisation_is_traced() -> None:
    model = nn.Sequential(
        Normalize([0.5] * 3, [0.2] * 3), nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    )
    images = torch.randint(0, 256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = ghost_prune(model, [(images, torch.zeros(8, dtype=torch.int64))], sparsity=0.5, hybrid="Full")
    assert found.report["sparsity"] == pytest.approx(0.5, abs=0.01) and found.report["notes"] == ()
    assert found.plan == {"1.0": "direct", "1.2": "guided"}
