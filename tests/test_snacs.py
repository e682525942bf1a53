"""Pairs of layers, scores, limits, protection, masks: on a network made by hand and on the registry."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from gcnet import apply_masks, layer_graph, networks, remove_filters, silenced, snacs_prune, sparsity
from gcnet.cost import macs, parameters
from gcnet.graph import TraceError
from gcnet.interop import to_parametrize, to_torch_prune
from gcnet.pruning import Masks, weight_name
from gcnet.snacs import (
    GRID,
    block_masks,
    connection_scores,
    connection_weights,
    filter_masks,
    group_count,
    kept_blocks,
    layer_pairs,
    lowest,
    operating_limits,
    protected_groups,
    ranked_blocks,
    scaled_weights,
    sensitivity,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*(images are fewer|parent filters)")
SMALL = 0.125


def images(count: int = 40, channels: int = 3, size: int = 32, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))
    return [
        (x[: count // 2], torch.arange(count // 2) % classes),
        (x[count // 2 :], torch.arange(count // 2) % classes),
    ]


def network(name: str = "vgg16_bn", width: float = SMALL) -> nn.Module:
    """With BatchNorm statistics and shifts that are not 0 and 1, so that a silenced filter makes a difference."""
    model = networks.build(name, 10, width=width, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.bias.data):
                value.copy_(torch.randn(len(value), generator=generator))
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


class Chain(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else torch.relu(x))
        return x


def separable() -> tuple[Chain, list[tuple[Tensor, Tensor]]]:
    """Four classes. The second layer passes on what tells them apart; the third carries it in each of its filters many
    times over."""
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = torch.zeros(400, 4).scatter_(1, y[:, None], 3.0) + 0.3 * torch.randn(400, 4)
    model = Chain(4, 4, 4, 8, 4)
    with torch.no_grad():
        for layer in model.layers:
            layer.bias.zero_()
        model.layers[0].weight.copy_(torch.eye(4))
        model.layers[1].weight.copy_(torch.eye(4) + 0.01 * torch.rand(4, 4))
        model.layers[2].weight.copy_(torch.rand(8, 4))
        model.layers[3].weight.copy_(torch.rand(4, 8))
    return model, [(x, y)]


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet20", "alexnet", "mobilenet_v2"])
def test_activations_of_a_layer_follow_from_its_patches(name: str) -> None:
    model = network(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pairs, labels = layer_pairs(model, images())
    graph = layer_graph(model, images()[0][0][:1])
    assert len(labels) == 40
    assert [pair.layer for pair in pairs] == [
        layer
        for layer in graph.layers
        if graph.parents[layer] and getattr(model.get_submodule(layer), "groups", 1) == 1
    ]
    for pair in pairs:
        kept = torch.rand(pair.groups, generator=torch.Generator().manual_seed(0)) < 0.5
        assert torch.allclose(pair.activations(torch.ones_like(kept)), pair.child, atol=1e-4)
        module = copy.deepcopy(model.get_submodule(pair.layer))
        module.weight.data *= pair.spread(kept)
        seen = []
        hook = model.get_submodule(pair.layer).register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0].clone())
        )
        with torch.no_grad():
            model(images()[0][0])
            out = module(seen[0])
        hook.remove()
        assert torch.allclose(pair.activations(kept)[:20], out.flatten(2).mean(2) if out.ndim > 2 else out, atol=1e-4)
        assert int(pair.block_sizes().sum()) == pair.weight.numel()
        assert pair.block_sizes()[0, 0] == int(
            pair.spread(lowest(torch.arange(kept.numel()).view(kept.shape), 1)).sum()
        )
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_parents_are_what_feeds_a_layer() -> None:
    model = network("resnet20")
    pairs = {pair.layer: pair for pair in layer_pairs(model, images())[0]}
    inner, joined = pairs["features.3.conv2"], pairs["features.4.conv1"]
    assert inner.parents == ("features.3.conv1",) and len(joined.parents) > 1
    assert torch.equal(inner.parent, pairs["features.3.conv1"].child)
    with torch.no_grad():  # a sum: what the layer receives
        received = model.features[:4](images()[0][0]).mean((2, 3))
    assert torch.allclose(joined.parent[:20], received, atol=1e-5)


class Biased(nn.Module):
    """A part that sees a table and no image."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(5.0)[:, None])
        self.a, self.b, self.first, self.last = (nn.Linear(*s) for s in ((1, 8), (8, 4), (4, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))) + self.b(torch.relu(self.a(self.table))).sum(0)


def test_layers_that_see_no_image_are_left_out() -> None:
    _, batches = separable()
    torch.manual_seed(0)
    found = snacs_prune(Biased(), batches, delta=0.5)
    assert list(found.scores) == ["last"] and set(found.report["not_scored"]) == {"a", "b", "first"}


def test_a_flattened_map_is_one_parent_a_filter() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 4)).eval()
    (pair,), _ = layer_pairs(model, images(16, 1, 8, 4))
    assert pair.parent.shape == (16, 3) and pair.unit.tolist() == [k for k in range(3) for _ in range(36)]
    assert pair.block_sizes().tolist() == [[36] * 3] * 4


def test_groups() -> None:
    assert group_count(512, None, "a") == 64 and group_count(96, None, "a") == 48 and group_count(10, None, "a") == 10
    assert group_count(16, 64, "a") == 16 and group_count(96, 32, "a") == 32 and group_count(96, {"b": 5}, "a") == 48
    with pytest.raises(ValueError, match=r"64 groups do not divide the 96 filters of layer 'stem'.*48, 96"):
        group_count(96, 64, "stem")
    pairs, _ = layer_pairs(network(), images(), groups={"features.0": 2, "features.3": 4})
    assert pairs[0].groups == (4, 2) and pairs[1].groups == (16, 4)


# --- weights and scores ---------------------------------------------------------------------------------------------


def test_scaled_weights() -> None:
    model, batches = separable()
    model.layers[3].weight.data[0, 0] = -2.0
    absolute = scaled_weights(model, "layers.3")
    assert absolute.min() == 0 and absolute.max() == 1 and absolute[0, 0] == 1
    signed = scaled_weights(model, "layers.3", "signed_global")
    assert signed[0, 0] == 0 and signed.max() < 1.0001
    pair = layer_pairs(model, batches)[0][2]
    m = absolute.double()
    for phi, wanted in (("mean", m), ("square", m**2), ("exp", torch.exp(-(m**2) / 2)), ("none", torch.ones_like(m))):
        assert torch.allclose(connection_weights(model, pair, phi), wanted)
    with pytest.raises(ValueError, match="did you mean 'square'"):
        connection_weights(model, pair, "squared")
    with pytest.raises(ValueError, match="unknown weight scaling"):
        scaled_weights(model, "layers.3", "none")


def test_blocks_are_means_over_kernel_and_filters() -> None:
    model = network()
    pair = layer_pairs(model, images(), groups=4)[0][1]
    weight = pair.weight.abs()
    by_hand = weight.view(4, weight.shape[0] // 4, 4, weight.shape[1] // 4, -1).mean((1, 3, 4))
    assert torch.allclose(pair.means(weight), by_hand, atol=1e-7)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_limits_tell_the_layer_that_matters() -> None:
    model, batches = separable()
    pairs, labels = layer_pairs(model, batches)
    # Of the first pair only the diagonal carries anything; in the last one every connection is used.
    scores = {pair.layer: pair.weight.abs().double() for pair in pairs}
    limits, curves = operating_limits(pairs, scores, labels)
    assert curves["layers.1"][GRID.index(0.71)] > 0.95 and limits["layers.1"] > 0.7
    assert limits["layers.3"] < 0.5
    # With the scores the wrong way round the first pair may lose little.
    assert operating_limits(pairs[:1], {"layers.1": -scores["layers.1"]}, labels)[0]["layers.1"] < 0.3
    strict = operating_limits(pairs, scores, labels, tolerance=0.0)[0]
    assert all(strict[layer] <= limits[layer] for layer in limits)


def test_first_and_last_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = separable()
    pairs, labels = layer_pairs(model, batches)
    curve = [1.0, 0.9, 0.2, 0.9] + [0.1] * (len(GRID) - 4)
    monkeypatch.setattr("gcnet.snacs._separability", lambda *_: curve)
    scores = {pair.layer: pair.weight.abs() for pair in pairs}
    first = operating_limits(pairs[:1], scores, labels)[0]["layers.1"]
    last = operating_limits(pairs[:1], scores, labels, rule="last")[0]["layers.1"]
    assert (first, last) == (GRID[1], GRID[3])
    monkeypatch.setattr("gcnet.snacs._separability", lambda *_: curve[::-1])
    assert operating_limits(pairs[:1], scores, labels)[0]["layers.1"] == 0.0
    with pytest.raises(ValueError, match=r"tolerance 1\.5"):
        operating_limits(pairs, scores, labels, tolerance=1.5)
    with pytest.raises(ValueError, match="did you mean 'first'"):
        operating_limits(pairs, scores, labels, rule="firs")


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_classifier_is_scikit_learns(classes: int) -> None:
    from sklearn.svm import SVC

    generator = torch.Generator().manual_seed(classes)
    y = torch.arange(120) % classes
    x = torch.randn(120, 5, generator=generator) + 2 * torch.randn(classes, 5, generator=generator)[y]
    model = Chain(5, 8, 6, classes)
    pairs, labels = layer_pairs(model, [(x, y)])
    rho = pairs[0].weight.abs()
    _, curves = operating_limits(pairs[:1], {pairs[0].layer: rho}, labels, grid=(0.1, 0.5, 0.8))
    classifier = SVC().fit(pairs[0].child.clamp_min(0).double().numpy(), labels.numpy())
    for share, found in zip((0.1, 0.5, 0.8), curves[pairs[0].layer], strict=True):
        left = pairs[0].activations(~lowest(rho, int(share * rho.numel()))).clamp_min(0).double().numpy()
        assert found == pytest.approx(classifier.score(left, labels.numpy()), abs=0.01)


# --- sensitivity and pruning ----------------------------------------------------------------------------------------


def test_sensitivity_is_the_share_of_the_next_layer() -> None:
    model, batches = separable()
    found = sensitivity(model, layer_graph(model, batches[0][0][:1]))
    scaled = scaled_weights(model, "layers.3").double()
    assert torch.allclose(found["layers.2"], (scaled / scaled.sum(1, keepdim=True)).mean(0))
    assert found["layers.2"].sum() == pytest.approx(1.0)
    assert bool((found["layers.3"] == 1).all())
    model.layers[3].weight.data[:, 5] = 3.0
    pairs, _ = layer_pairs(model, batches)
    safe = protected_groups(pairs, sensitivity(model, layer_graph(model, batches[0][0][:1])), 0.1)
    assert safe["layers.2"].nonzero().flatten().tolist() == [5]
    assert not bool(safe["layers.3"].any())  # the last layer has none
    assert not bool(protected_groups(pairs, found, 0.0)["layers.2"].any())
    with pytest.raises(ValueError, match="fraction 2"):
        protected_groups(pairs, found, 2)


def test_the_lowest_go_up_to_the_limits_and_protected_keep_all() -> None:
    scores = {"a": torch.arange(12.0).view(3, 4), "b": 100 + torch.arange(8.0).view(2, 4)}
    kept = kept_blocks(scores, 0.4)
    assert kept["a"].sum() == 4 and kept["b"].all()
    kept = kept_blocks(scores, 0.4, {"a": 0.25, "b": 1.0})
    assert (~kept["a"]).flatten().nonzero().flatten().tolist() == [0, 1, 2]
    safe = {"a": torch.tensor([True, False, False]), "b": torch.tensor([False, True])}
    kept = kept_blocks(scores, 1.0, {"a": 1.0, "b": 1.0}, safe)
    assert kept["a"].tolist() == [[True] * 4, [False] * 4, [False] * 4] and kept["b"][1].all()
    ties = kept_blocks({"a": torch.zeros(3, 4)}, 0.5)
    assert ties["a"].sum() == 6
    assert kept_blocks(scores, 0.0)["a"].all()
    for delta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            kept_blocks(scores, delta)


# Few groups, for speed; MobileNetV2's layers have no common divisor.
GROUPS = {"vgg16_bn": 8}


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet20", "mobilenet_v2"])
def test_snacs_prune(name: str) -> None:
    model = network(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = snacs_prune(model, images(60), delta=0.7, protected_fraction=0.1, groups=GROUPS.get(name))
    graph = layer_graph(model, images()[0][0][:1])
    assert list(found.masks) == [weight_name(layer) for layer in graph.layers]
    assert found.report["sparsity"] == pytest.approx(sparsity(found.masks)) and 0 < sparsity(found.masks) < 0.7
    for row in found.report["layers"]:
        assert row["pruned"] <= row["gamma"] + 1e-9
        mask, safe = found.masks[weight_name(row["layer"])], found.protected[row["layer"]]
        per = len(mask) // len(safe)
        assert bool(mask[safe.repeat_interleave(per)].all())  # protected filters lose no connection
    assert bool(found.masks[weight_name(graph.layers[0])].all())
    assert graph.layers[0] in found.report["not_scored"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    apply_masks(model, found.masks)


def test_a_network_of_ones_own() -> None:
    model, batches = separable()
    found = snacs_prune(model, batches, delta=0.5, estimator="mint")
    assert found.scores["layers.1"].shape == (4, 4) and 0 <= sparsity(found.masks) <= 0.5


def test_bad_input() -> None:
    model, batches = separable()
    x, y = batches[0]
    with pytest.raises(ValueError, match=r"delta 1\.2 is outside \[0, 1\]"):
        snacs_prune(model, batches, delta=1.2)
    with pytest.raises(ValueError, match="none of class 2 of 4"):
        snacs_prune(model, [(x[y != 2], y[y != 2])])
    with pytest.raises(ValueError, match=r"3 groups do not divide the 4 filters of layer 'layers.1'.*\[1, 2, 4\]"):
        snacs_prune(model, batches, groups=3)
    with pytest.raises(ValueError, match="no batch at all"):
        snacs_prune(model, [])
    with pytest.raises(ValueError, match="no batch at all"):
        layer_pairs(model, [])
    with pytest.raises(ValueError, match="nothing to prune"):
        snacs_prune(Chain(4, 4), batches)
    with pytest.raises(ValueError, match="did you mean 'mint'"):
        snacs_prune(model, batches, estimator="mintt")
    with pytest.raises(FloatingPointError, match="not finite"):
        snacs_prune(model, [(x / 0, y)])


class Branching(nn.Module):
    """Cannot be traced: its course depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.head = (nn.Linear(a, b) for a, b in ((4, 8), (8, 4), (8, 4), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if x.mean() > -1:
            x = torch.relu(torch.cat([self.a(x), self.b(x)], 1))
        return self.head(x)


def test_a_graph_made_before() -> None:
    _, batches = separable()
    torch.manual_seed(0)
    model = Branching()
    with pytest.raises(TraceError, match="Hand the graph on as graph="):
        snacs_prune(model, batches)
    graph = layer_graph(model, batches[0][0], parents={"a": ["first"], "b": ["first"], "head": ["a", "b"]})
    found = snacs_prune(model, batches, delta=0.6, graph=graph)
    assert [row["parents"] for row in found.report["layers"]] == ["first", "first", "a + b"]
    assert 0 < found.report["sparsity"] < 0.6 and found.report["not_scored"] == ["first"]
    chain, batches = separable()
    mine = snacs_prune(chain, batches, delta=0.5, graph=layer_graph(chain, batches[0][0]))
    assert all(torch.equal(mine.masks[k], mask) for k, mask in snacs_prune(chain, batches, delta=0.5).masks.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_give_nearly_the_same(dtype: torch.dtype) -> None:
    model, batches = network(), images(60)
    options = {"delta": 0.6, "groups": 4, "protected_fraction": 0.1}
    whole = snacs_prune(model, batches, **options)
    other = model.to(dtype).train()
    state = {key: value.clone() for key, value in other.state_dict().items()}
    found = snacs_prune(other, [(x.to(dtype), y) for x, y in batches], **options)
    assert all(module.training for module in other.modules())
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    same = torch.cat([(mask == found.masks[name]).flatten() for name, mask in whole.masks.items()])
    assert same.float().mean() > (0.9 if dtype == torch.bfloat16 else 0.98)
    apply_masks(other, found.masks)
    constant = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(dtype)
    nn.init.constant_(constant[1].weight, 0.5)
    assert bool(torch.isfinite(scaled_weights(constant, "1")).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_on_another_device() -> None:
    model, batches = separable()
    here, there = snacs_prune(model, batches, delta=0.5), snacs_prune(model.cuda(), batches, delta=0.5)
    assert all(mask.is_cuda and torch.equal(mask.cpu(), here.masks[name]) for name, mask in there.masks.items())


@pytest.mark.parametrize("hold", [to_torch_prune, to_parametrize])
def test_weights_held_elsewhere_are_refused(hold) -> None:
    model, batches = separable()
    hold(model, {"layers.1.weight": torch.eye(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"weights of 'layers\.1' are held by torch\.nn\.utils"):
        snacs_prune(model, batches)


def test_weights_that_are_0_already_are_reported() -> None:
    model, batches = separable()
    assert snacs_prune(model, batches, delta=0.5).report["zero_before"] == {"layers.0": 0.75}
    model.layers[2].weight.data[:, 1] = 0
    assert snacs_prune(model, batches, delta=0.5).report["zero_before"] == {"layers.0": 0.75, "layers.2": 0.25}


def test_a_pair_with_nothing_to_prune_is_kept_and_said() -> None:
    model, batches = separable()
    found = snacs_prune(model, batches, delta=0.0)
    assert sparsity(found.masks) == 0
    assert found.report["nothing_pruned"] == ["layers.1", "layers.2", "layers.3"]


def test_peers() -> None:
    model = network()
    graph = layer_graph(model, images()[0][0][:1])
    masks = filter_masks(model, graph, 0.5)
    for layer in graph.layers[:-1]:
        rows = masks[weight_name(layer)].flatten(1)
        assert bool((rows.all(1) | ~rows.any(1)).all()) and int(rows.any(1).sum()) == len(rows) - round(len(rows) / 2)
    assert bool(masks[weight_name(graph.layers[-1])].all())
    kept = ranked_blocks({"a": torch.arange(100.0).view(10, 10), "b": 1000 + torch.arange(100.0).view(10, 10)}, 0.5)
    assert (~kept["a"]).sum() == 96 and kept["b"].all()


# --- removal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet20", "resnet18", "alexnet", "mobilenet_v2"])
def test_removing_silenced_filters_keeps_the_outputs(name: str) -> None:
    model, x = network(name), images()[0][0]
    graph = layer_graph(model, x[:1])
    generator, masks = torch.Generator().manual_seed(2), Masks()
    for layer in graph.layers:
        weight = model.get_submodule(layer).weight
        rows = torch.rand(len(weight), generator=generator) < 0.7
        if "resnet" in name:  # every other channel of the residual stream, so that it can go
            rows = torch.arange(len(weight)) % 2 == 0
        rows[0] = True
        if layer == graph.layers[-1]:
            rows[:] = True
        masks[weight_name(layer)] = rows.view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape).clone()
    quiet = silenced(model, graph, masks)
    with pytest.raises(ValueError, match="apply the masks first"):
        remove_filters(model, graph, quiet)
    apply_masks(model, quiet)
    smaller = remove_filters(model, graph, quiet)
    with torch.no_grad():
        assert torch.allclose(smaller(x), model(x), atol=1e-5)
    assert parameters(smaller) < 0.75 * parameters(model) and macs(smaller, x) < macs(model, x)
    assert (
        model.get_submodule(graph.layers[1]).weight.shape == network(name).get_submodule(graph.layers[1]).weight.shape
    )


def test_a_filter_that_still_sends_a_constant_stays() -> None:
    model, x = network(), images()[0][0]
    graph = layer_graph(model, x[:1])
    masks = filter_masks(model, graph, 0.3)
    apply_masks(model, masks)  # not silenced: BatchNorm's shift goes on
    smaller = remove_filters(model, graph, masks)
    with torch.no_grad():
        assert parameters(smaller) == parameters(model) and torch.allclose(smaller(x), model(x), atol=1e-6)


def test_a_filter_that_nothing_reads_goes_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    graph = layer_graph(model, torch.zeros(1, 4))
    masks = Masks({"0.weight": torch.ones(6, 4, dtype=torch.bool), "2.weight": torch.ones(3, 6, dtype=torch.bool)})
    masks["2.weight"][:, 2] = False
    quiet = silenced(model, graph, masks)
    assert not bool(quiet["0.weight"][2].any()) and quiet["0.bias"].tolist() == [True, True, False, True, True, True]
    smaller = remove_filters(apply_masks(model, quiet), graph, quiet)
    assert smaller[0].weight.shape == (5, 4) and smaller[2].weight.shape == (3, 5)


def test_filters_behind_which_zero_does_not_stay_zero_only_lose_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
    graph, x = layer_graph(model, torch.zeros(1, 4)), torch.randn(5, 4)
    masks = Masks({"0.weight": torch.ones(6, 4, dtype=torch.bool), "2.weight": torch.ones(3, 6, dtype=torch.bool)})
    masks["0.weight"][2] = False
    quiet = silenced(model, graph, masks)
    assert quiet.keys() == masks.keys() and bool(quiet["2.weight"].all())
    apply_masks(model, quiet)
    assert torch.allclose(remove_filters(model, graph, quiet)(x), model(x))


def test_a_network_that_is_cut_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    graph = layer_graph(model, torch.zeros(1, 4))
    masks = Masks({"0.weight": torch.zeros(6, 4, dtype=torch.bool), "2.weight": torch.ones(3, 6, dtype=torch.bool)})
    quiet = silenced(model, graph, masks)
    with pytest.raises(ValueError, match="layer '0' would keep no filter"):
        remove_filters(apply_masks(model, quiet), graph, quiet)


def test_masks_spread_blocks_over_weights() -> None:
    model = network()
    graph = layer_graph(model, images()[0][0][:1])
    pairs, _ = layer_pairs(model, images(), groups=4, graph=graph)
    scores = connection_scores(model, pairs, phi="none", scales=(4.0,))
    kept = ranked_blocks(scores, 0.5)
    masks = block_masks(graph, model, pairs, kept)
    for pair in pairs:
        removed = int((pair.block_sizes() * ~kept[pair.layer]).sum())
        assert int((~masks[weight_name(pair.layer)]).sum()) == removed


class Offset(nn.Module):
    """A sum with a number or a parameter: a channel that is 0 before is not behind it."""

    def __init__(self, offset: object) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x) + self.offset))).mean((2, 3)))


@pytest.mark.parametrize("offset", [1.0, nn.Parameter(torch.ones(1, 6, 1, 1))], ids=["number", "parameter"])
def test_a_filter_that_something_is_added_to_stays(offset: object) -> None:
    model, images = Offset(offset).eval(), torch.rand(4, 3, 8, 8)
    model.a.weight.data[2] = 0
    graph = layer_graph(model, images[:1])
    masks = Masks({f"{name}.weight": model.get_submodule(name).weight != 0 for name in graph.layers})
    smaller = remove_filters(model, graph, masks)
    assert smaller.a.weight.shape[0] == 6 and torch.allclose(smaller(images), model(images), atol=1e-6)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize("told", [None, {"head": ["conv"]}], ids=["attention", "told graph"])
def test_where_what_lies_behind_is_unknown_nothing_is_removed(told: dict | None) -> None:
    model, images = Attending().eval(), torch.rand(2, 3, 6, 6)
    graph = layer_graph(model, images[:1], parents=told)
    masks = Masks({f"{name}.weight": torch.ones_like(model.get_submodule(name).weight).bool() for name in graph.layers})
    masks["conv.weight"][1] = False
    apply_masks(model, silenced(model, graph, masks))
    smaller = remove_filters(model, graph, masks)
    assert smaller.conv.out_channels == 8 and torch.allclose(smaller(images), model(images), atol=1e-6)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_a_layer_that_computes_something_else_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    batches = [(torch.rand(30, 3, 8, 8), torch.arange(30) % 3)]
    with pytest.raises(ValueError, match="layer '2' is a Standardised with a forward of its own"):
        snacs_prune(model, batches, delta=0.5)
