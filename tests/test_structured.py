"""Whole filters go: scores by hand, the smaller network against the masked one, files, what cannot be cut."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gcnet
from gcnet import networks
from gcnet.connectivity import connectivity
from gcnet.cost import macs
from gcnet.graph import TraceError, layer_graph
from gcnet.interop import from_parametrize, from_torch_prune, to_parametrize, to_torch_prune
from gcnet.pruning import Masks, apply_masks
from gcnet.snacs import layer_pairs
from gcnet.structured import (
    GhostImportance,
    filter_scores,
    ghost_filter_scores,
    load_structured,
    resize,
    snacs_filter_scores,
    structured_masks,
    structured_prune,
    weight_filter_scores,
)
from gcnet.study import Study
from gcnet.training import Recipe

tp = pytest.importorskip("torch_pruning", reason="extra `structured` is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*(images are fewer|parent filters)")
LABELS = torch.arange(6) % 2


def lively(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and slopes as after training, so that mistakes in them show."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
    return model


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(6, channels, size, size, generator=torch.Generator().manual_seed(2))


def batches(size: int = 32, channels: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images(size, channels), LABELS)]


def built(name: str) -> nn.Module:
    return lively(networks.build(name, 4, width=0.25, seed=0))


class Joined(nn.Module):
    """A gate, a sum, a concatenation, a depthwise and a grouped convolution, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.depthwise = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=False), nn.BatchNorm2d(20))
        self.point, self.grouped = nn.Conv2d(20, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.linear, self.head = nn.Linear(8 * 16, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.a(x) * torch.sigmoid(self.gate(x))
        y = torch.relu(self.depthwise(torch.cat([y, torch.relu(self.b(x))], 1)))
        y = torch.relu(self.grouped(torch.relu(self.point(y))))
        y = nn.functional.adaptive_avg_pool2d(y, 4).flatten(1)
        return self.head(torch.relu(self.linear(y)))


def joined() -> nn.Module:
    torch.manual_seed(0)
    return lively(Joined())


# --- scores ---------------------------------------------------------------------------------------------------------


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def test_ghost_scores_by_hand() -> None:
    model, x = chain(), torch.zeros(1, 1, 2, 2)
    graph = layer_graph(model, x)
    matrices = {"2": torch.tensor([[1.0, -3.0], [0.0, 2.0], [0.5, 0.5]])}
    matrices["5"] = torch.tensor([[1.0] * 4 + [2.0] * 4 + [3.0] * 4, [-3.0] * 4 + [0.0] * 4 + [1.0] * 4])
    scores = ghost_filter_scores(model, graph, matrices)
    assert torch.allclose(scores["0"], torch.tensor([0.5, 5.5 / 3]).double())  # only columns: nothing feeds it
    assert torch.allclose(scores["2"], torch.tensor([(2 + 2) / 2, (1 + 1) / 2, (0.5 + 2) / 2]).double())
    assert torch.allclose(scores["5"], torch.tensor([2.0, 4 / 3]).double())  # only rows: it feeds nothing


def test_columns_of_a_grouped_layer_belong_to_their_group() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    graph = layer_graph(model, torch.zeros(1, 1, 2, 2))
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    assert ghost_filter_scores(model, graph, {"1": matrix})["0"].tolist() == [2.0, 3.0, 6.0, 7.0]


def test_snacs_blocks_spread_over_filters_by_hand() -> None:
    model = chain()
    x = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    graph = layer_graph(model, x)
    pairs, _ = layer_pairs(model, [(x, torch.arange(16) % 2)], groups={"2": 1, "0": 2, "5": 2}, graph=graph)
    assert [(pair.layer, pair.groups) for pair in pairs] == [("2", (1, 2)), ("5", (2, 1))]
    blocks = {"2": torch.tensor([[1.0, 3.0]]), "5": torch.tensor([[2.0], [4.0]])}
    scores = snacs_filter_scores(model, graph, pairs, blocks)
    assert scores["0"].tolist() == [1.0, 3.0]  # only columns: nothing feeds it
    assert scores["2"].tolist() == [(2 + 3) / 2] * 3  # row mean 2, columns of the next layer mean 3
    assert scores["5"].tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match=r"block scores of layer '5' are \(1, 2\); its groups are \(2, 1\)"):
        snacs_filter_scores(model, graph, pairs, {**blocks, "5": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="block scores of layer '5' are none"):
        snacs_filter_scores(model, graph, pairs, {"2": blocks["2"]})


def test_a_network_cut_by_snacs_scores() -> None:
    model, x = joined(), torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    data = [(x, torch.arange(24) % 3)]
    graph = layer_graph(model, x)
    scores = snacs_filter_scores(model, graph, layer_pairs(model, data, groups=2, graph=graph)[0])
    found = structured_prune(model, data, macs=0.5, scores=scores, graph=graph)
    masked = apply_masks(copy.deepcopy(model), found.masks)
    assert torch.allclose(found.network(x), masked(x), atol=1e-5)
    assert {layer for layer, role in found.plan.items() if role == "guided"} == set(scores)
    assert 0.3 < found.report["macs"] / found.report["macs_dense"] <= 0.5


def test_given_scores_decide() -> None:
    model = joined()
    found = structured_prune(model, batches(8), macs=0.6, scores={"linear": torch.arange(10.0)})
    kept = found.channels["linear"]["out"]
    assert kept == list(range(10 - len(kept), 10)) and len(kept) < 10
    direct = structured_prune(model, batches(8), macs=0.6, hybrid="direct")
    assert found.channels["stem.0"] == direct.channels["stem.0"] and found.plan["point"] == "direct"


def test_hybrids_score_guided_layers_by_the_ghost_and_the_rest_by_weights() -> None:
    model = joined()
    graph = layer_graph(model, images(8))
    matrices = connectivity(model, batches(8), graph=graph)
    scores, plan = filter_scores(model, graph, matrices, hybrid=["grouped"])
    assert [layer for layer, role in plan.items() if role == "guided"] == ["grouped"]
    ghost, direct = ghost_filter_scores(model, graph, matrices), weight_filter_scores(model, graph.layers)
    for layer, score in scores.items():
        raw = ghost[layer] if layer == "grouped" else direct[layer]
        assert torch.allclose(score, raw / raw.mean()) and abs(float(score.mean()) - 1) < 1e-9
    with pytest.raises(ValueError, match="no connectivity is given for the guided layers"):
        filter_scores(model, graph, {}, hybrid="Full")
    with pytest.raises(ValueError, match="'Mix50' ranks single weights"):
        filter_scores(model, graph, {}, hybrid="Mix50")


# --- the smaller network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet20", "mobilenet_v2", "alexnet", "joined"])
def test_the_smaller_network_gives_what_the_masked_one_gives(name: str, ranking: str, round_to: int) -> None:
    model = joined() if name == "joined" else built(name)
    size = 8 if name == "joined" else 32
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = structured_prune(model, batches(size), macs=0.6, hybrid="B25", ranking=ranking, round_to=round_to)
    masked = apply_masks(copy.deepcopy(model), found.masks).eval()
    with torch.no_grad():
        expected = masked(images(size))
        got = found.network.eval()(images(size))
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max().clamp_min(1)))
    report = found.report
    assert report["macs"] == macs(found.network, images(size)) <= 0.6 * report["macs_dense"]
    assert report["macs"] > 0.35 * report["macs_dense"]
    assert macs(model, images(size), found.masks) == report["macs"]  # masks count what is left, columns too
    kept = sum(int(mask.sum()) for mask in found.masks.values())
    untouched = sum(p.numel() for key, p in model.named_parameters() if key not in found.masks)
    assert kept + untouched == sum(p.numel() for p in found.network.parameters()) == report["parameters"]
    assert type(found.network) is type(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_filters_of_the_lowest_scores_go() -> None:
    model = chain()
    with torch.no_grad():
        model[2].weight[1] = 0.001
        model[0].weight[1] = 5.0
    found = structured_prune(model, [(torch.rand(2, 1, 2, 2), LABELS[:2])], macs=0.7, hybrid="direct")
    assert found.channels["2"]["out"] == [0, 2]
    assert found.channels["5"]["in"] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_all_methods_get_networks_of_one_size() -> None:
    model = built("resnet20")
    widths = set()
    for how in ({"hybrid": "direct"}, {"hybrid": "Full"}, {"importance": tp.importance.GroupMagnitudeImportance()}):
        found = structured_prune(model, batches(), macs=0.5, **how)
        widths.add(tuple(tuple(p.shape) for p in found.network.parameters()))
    assert len(widths) == 1


def test_taylor_takes_the_gradients_of_the_model() -> None:
    model = built("resnet20").eval()
    nn.functional.cross_entropy(model(images()), LABELS).backward()
    found = structured_prune(model, batches(), macs=0.5, importance=tp.importance.GroupTaylorImportance())
    assert found.report["macs"] <= 0.5 * found.report["macs_dense"]
    assert all(parameter.grad is None for parameter in found.network.parameters())


def test_ghost_importance_in_torch_prunings_own_pruner() -> None:
    model = built("resnet20")
    graph = layer_graph(model, images()[:1])
    scores, _ = filter_scores(model, graph, connectivity(model, batches(), graph=graph), hybrid="Full")
    cut = copy.deepcopy(model)
    pruner = tp.pruner.BasePruner(
        cut, images()[:1], GhostImportance(cut, scores), pruning_ratio=0.5, ignored_layers=[cut.classifier]
    )
    pruner.step()
    assert macs(cut, images()) < 0.5 * macs(model, images())
    with torch.no_grad():
        assert cut.eval()(images()).shape == (6, 4)
    with pytest.raises(ValueError, match="was pruned after it was scored"):
        tp.pruner.BasePruner(cut, images()[:1], GhostImportance(cut, scores), ignored_layers=[cut.classifier]).step()
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="made for another model"):
        tp.pruner.BasePruner(other, images()[:1], GhostImportance(model, scores)).step()


def test_the_cut_of_torch_pruning_and_ours_agree() -> None:
    model = joined()
    found = structured_prune(model, batches(8), macs=0.5)
    ours = resize(copy.deepcopy(model), found.channels)
    assert [m.groups for m in ours.modules() if isinstance(m, nn.Conv2d)] == [
        m.groups for m in found.network.modules() if isinstance(m, nn.Conv2d)
    ]
    for (key, a), (_, b) in zip(ours.state_dict().items(), found.network.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert structured_masks(model, found.channels).keys() == found.masks.keys()


# --- files ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_without_torch_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = structured_prune(joined(), batches(8), macs=0.5)
    found.save(tmp_path / "small")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    again = load_structured(Joined(), tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(again(images(8)), found.network.eval()(images(8)))
    assert all(
        torch.equal(mask, found.masks[name]) for name, mask in Masks.load(tmp_path / "small/masks.safetensors").items()
    )


def test_files_of_another_network_or_damaged(tmp_path: Path) -> None:
    structured_prune(joined(), batches(8), macs=0.5).save(tmp_path)
    with pytest.raises(ValueError, match="unknown module 'a'"):
        load_structured(chain(), tmp_path)
    (tmp_path / "channels.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="no saved smaller network, or a damaged one"):
        load_structured(Joined(), tmp_path)
    with pytest.raises(ValueError, match="no saved smaller network"):
        load_structured(Joined(), tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exported_for_use_without_the_code(suffix: str, tmp_path: Path) -> None:
    network = structured_prune(joined(), batches(8), macs=0.5).network.train()
    if suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path = gcnet.export(network, images(8)[:1], tmp_path / f"net{suffix}")
    assert network.training
    with torch.no_grad():
        expected = network.eval()(images(8))
    if suffix == ".pt2":
        got = torch.export.load(path).module()(images(8))
    else:
        session = runtime.InferenceSession(path)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images(8).numpy()})[0])
    assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"exported to \.onnx or \.pt2"):
        gcnet.export(network, images(8), tmp_path / "net.txt")


# --- masks for torch's own ways -------------------------------------------------------------------------------------


def half_masks(model: nn.Module) -> Masks:
    return gcnet.prune(model, pruner="l1", sparsity=0.5)


@pytest.mark.parametrize(("there", "back"), [(to_torch_prune, from_torch_prune), (to_parametrize, from_parametrize)])
def test_to_torch_and_back(there, back) -> None:
    model = joined().eval()
    masks = half_masks(model)
    expected = apply_masks(copy.deepcopy(model), masks)
    keys = list(model.state_dict())
    there(model, masks)
    assert torch.allclose(model(images(8)), expected(images(8)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    model(images(8)).square().mean().backward()
    optimizer.step()
    removed = model.point.weight[~masks["point.weight"]]
    assert bool((removed == 0).all())
    found = back(model)
    assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)
    with pytest.raises(ValueError, match="held by torch"):
        gcnet.ghost_prune(model, batches(8))
    with pytest.raises(ValueError, match="held by torch"):
        structured_prune(model, batches(8))
    with pytest.raises(ValueError, match=r"'stem\.0'.*held by torch"):
        there(model, masks)
    back(model, remove=True)
    assert sorted(model.state_dict()) == sorted(keys)
    assert bool((model.point.weight[~masks["point.weight"]] == 0).all())
    with pytest.raises(ValueError, match="Joined"):
        back(model)


def test_masks_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit this network"):
        to_torch_prune(joined(), {"nowhere.weight": torch.ones(1, dtype=torch.bool)})


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"macs": 0.0}, r"macs 0.0 is outside \(0, 1\]"),
        ({"macs": 1.5}, r"macs 1.5 is outside"),
        ({"ranking": "globl"}, "unknown ranking 'globl'; did you mean 'global'"),
        ({"round_to": 0}, "round_to 0 is below 1"),
        ({"hybrid": "B250"}, "unknown hybrid 'B250'"),
        ({"freeze": ("pointt",)}, "unknown layer 'pointt'; did you mean 'point'"),
        ({"macs": 0.9, "round_to": 256}, "groups no wider than round_to stay whole"),
        ({"macs": 1e-4}, "cannot be reached, the least is"),
        ({"scores": {"pointt": torch.ones(8)}}, "unknown layer 'pointt'; did you mean 'point'"),
        ({"scores": {"point": torch.ones(9)}}, r"scores of layer 'point' are \(9,\); it has 8"),
        ({"scores": {}, "importance": lambda _: torch.ones(1)}, "give an importance or scores, not both"),
    ],
)
def test_bad_arguments(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        structured_prune(joined(), batches(8), **options)


def test_no_images() -> None:
    with pytest.raises(ValueError, match="got no batch at all"):
        structured_prune(joined(), [])


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[structured\]'"):
        structured_prune(joined(), batches(8))


class Normed(nn.Module):
    """Where setting to 0 is not removing: LayerNorm over channels, a sigmoid, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.free = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.bent, self.twice, self.into = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.free(self.norm(self.stem(x))))
        x = self.into(torch.sigmoid(self.bent(x)))
        return self.head(self.twice(torch.relu(self.twice(x))).mean((2, 3)))


def test_what_cannot_go_stays_and_is_listed() -> None:
    torch.manual_seed(0)
    model = Normed()
    found = structured_prune(model, batches(8), macs=0.9, hybrid="direct")
    frozen = found.report["frozen"]
    assert "GroupNorm 'norm'" in frozen["stem"] and "does not reach 'into' as 0" in frozen["bent"]
    assert frozen["twice"] == "it is called more than once" and frozen["head"] == "it is the network's output"
    assert "free" not in frozen and len(found.channels["free"]["out"]) < 8
    with pytest.raises(ValueError, match="cannot be reached"):
        structured_prune(model, batches(8), macs=0.1, hybrid="direct")


def test_outputs_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from gcnet import structured

    exact = structured._exact
    for gap, fine in ((9e-6, True), (1.2e-5, False)):
        calls = []

        def shifted(network: nn.Module, example: Tensor, calls: list = calls, gap: float = gap) -> list[Tensor]:
            calls.append(network)
            outputs = exact(network, example)
            return [out + gap * float(out.abs().max().clamp_min(1)) * (len(calls) > 1) for out in outputs]

        monkeypatch.setattr(structured, "_exact", shifted)
        if fine:
            structured_prune(joined(), batches(8), macs=0.6, hybrid="direct")
        else:
            with pytest.raises(ValueError, match=r"output differs from the masked network's by 1\.2e-05"):
                structured_prune(joined(), batches(8), macs=0.6, hybrid="direct")


def test_frozen_on_request() -> None:
    found = structured_prune(joined(), batches(8), macs=0.7, freeze=("linear",))
    assert found.network.linear.out_features == 10 and found.report["frozen"]["linear"] == "asked for"


def test_half_precision_training_mode_and_frozen_parameters_are_kept() -> None:
    model = joined().train()
    model.stem[1].eval()
    model.point.weight.requires_grad_(False)
    found = structured_prune(model, batches(8), macs=0.5)
    assert found.network.training and not found.network.stem[1].training
    assert not found.network.point.weight.requires_grad and found.network.linear.weight.requires_grad
    half = joined().half()
    found = structured_prune(half, [(images(8).half(), LABELS)], macs=0.5)
    assert {p.dtype for p in found.network.parameters()} == {torch.float16}
    assert found.network(images(8).half()).dtype == torch.float16
    assert gcnet.ghost_prune(half, [(images(8).half(), LABELS)], sparsity=0.5, pruner="l1").report["sparsity"] > 0.49
    with pytest.raises(ValueError, match=r"cannot take example_input of shape \(1, 3, 8, 8\): at 'stem.0'"):
        gcnet.ghost_prune(half, batches(8))


def test_a_model_on_another_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot take example_input.*device meta"):
        layer_graph(joined().to("meta"), images(8))


def test_already_pruned_weights_are_reported_and_stay_zero() -> None:
    model = joined()
    masks = half_masks(model)
    apply_masks(model, masks)
    pruning = gcnet.ghost_prune(model, batches(8), pruner="l1", sparsity=0.5, hybrid="B25")
    assert pruning.report["zero_before"]["linear"] > 0.3
    found = structured_prune(model, batches(8), macs=0.5)
    assert float((found.network.linear.weight == 0).double().mean()) > 0.2


class Branching(nn.Module):
    """Cannot be traced: its course depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(12 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if x.mean() > -1:
            x = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


PARENTS = {"a": ["first"], "b": ["first"], "head": ["a", "b"]}


def test_the_ways_out_of_a_network_that_cannot_be_traced() -> None:
    model = Branching()
    with pytest.raises(TraceError, match=r"`if x.mean\(\) > -1:`.*leaf_modules=.*tracer=.*parents="):
        gcnet.ghost_prune(model, batches(8))
    graph = layer_graph(model, images(8), parents=PARENTS)
    assert graph.parents == {"first": (), "a": ("first",), "b": ("first",), "head": ("a", "b")}
    assert graph.sources["head"][1].index.tolist() == [-1] * 24 + [k for k in range(6) for _ in range(4)]
    assert graph.via["head", "b"] == ("concat", "flatten") and graph.outputs == ("head",)
    pruning = gcnet.ghost_prune(model, batches(8), graph=graph, pruner="l1", sparsity=0.5, hybrid="Full")
    assert [layer for layer, role in pruning.plan.items() if role == "direct"] == ["first"]
    small = structured_prune(model, batches(8), macs=0.6, graph=graph, hybrid="Full")
    masked = apply_masks(copy.deepcopy(model), small.masks)
    assert torch.allclose(small.network(images(8)), masked(images(8)), atol=1e-5)


def test_given_parents_measure_what_traced_ones_do() -> None:
    model = lively(networks.build("vgg16_bn", 4, width=0.125, seed=0))
    traced = layer_graph(model, images()[:1])
    told = layer_graph(model, images()[:1], parents=traced.parents)
    a, b = (connectivity(model, batches(), graph=graph) for graph in (traced, told))
    assert all(torch.allclose(a[layer], b[layer]) for layer in a)
    with pytest.raises(ValueError, match=r"tap 'relu'.*parents of this one were given"):
        connectivity(model, batches(), graph=told, tap="relu")


@pytest.mark.parametrize(
    ("parents", "told"),
    [
        ({"heat": ["a"]}, "unknown layer in parents 'heat'; did you mean 'head'"),
        ({"head": ["c"]}, "unknown layer in parents 'c'"),
        ({"b": ["a"]}, "parents of layer 'b', a, have 6 channels; it takes 4"),
    ],
)
def test_parents_that_do_not_fit(parents: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        layer_graph(Branching(), images(8), parents=parents)


def test_a_tracer_of_ones_own() -> None:
    class Mine(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Branching) or super().is_leaf_module(module, name)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Conv2d(3, 3, 1), Branching(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.first(x)))

    graph = layer_graph(Around(), images(8), tracer=Mine())
    assert graph.layers == ("first", "inner.first", "inner.a", "inner.b", "inner.head", "last")
    assert any("inner.first" in note for note in graph.notes)
    pruning = gcnet.ghost_prune(Around(), batches(8), graph=graph, pruner="l1", sparsity=0.5, hybrid="Full")
    assert "inner.a" in pruning.report["without_parent"] and "inner.a.weight" in pruning.masks
    with pytest.raises(ValueError, match="not both"):
        layer_graph(Around(), images(8), tracer=Mine(), leaf_modules=("inner",))


class Ratioed(nn.Module):
    """An operation that the dependency graph takes for elementwise though it mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.a(x), 1)
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


def test_an_operation_that_mixes_channels_keeps_its_filters() -> None:
    found = structured_prune(Ratioed(), batches(8), macs=0.9, hybrid="direct")
    assert "a" in found.report["frozen"] and found.network.a.out_channels == 8


# --- a study --------------------------------------------------------------------------------------------------------

STUDY = Study.create(
    study="small", dataset="digits", channels=1, network="resnet20", width=0.25, seeds=[0, 1], epochs=1, batch_size=40,
    train_images=120, crop_padding=0, flip=False, shifts=["contrast"], severities=[1], shift_images=30, device="cpu",
    precision="float32", structured_macs=[0.6], structured_finetune_epochs=1, structured_round_to=1,
    structured_methods=["direct", "B25", "snacs", "tp_magnitude", "tp_taylor"], structured_latency_batches=[2],
    structured_latency_variants=["float32"], snacs_images=3, snacs_groups=4,
)  # fmt: skip


def test_a_study_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from gcnet import structured_cells as sc

    for _, tasks in sc.stages(STUDY):
        for function, study, argument in tasks:
            assert isinstance(function(study, argument), str)
    for module, name in ((sc.cells, "train"), (sc, "structured_prune"), (sc.cells, "score")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("this was computed before"))
    table = sc.accuracy_table(STUDY)
    assert len(table) == 2 * 6 and set(table.method) == {"none", *STUDY.structured_methods}
    smaller = table[table.method != "none"]
    assert smaller.macs.nunique() == 1 and (smaller.macs <= 0.6 * table.macs.max()).all()
    shifts = sc.shift_table(STUDY)
    assert list(shifts) == ["method", "macs_share", "seed", "shift", "severity", "accuracy", "ece"]
    claims = sc.claims_table(STUDY, shifts)
    assert len(claims) == 3 and not claims.measure.str.contains("snacs").any()
    assert {"claim", "estimate", "ci_low", "ci_high", "n", "verdict"} <= set(claims)
    rows = sc.structured_latency_rows(STUDY)
    assert [row["network"] for row in rows] == ["dense", "direct at 60%"]
    cell = sc.structured_cells(STUDY)[1]
    network = sc.structured_network(STUDY, cell)
    assert macs(network[1], torch.zeros(1, 1, 32, 32)) == sc.cell_result(STUDY, cell)["macs_left"]


def test_what_a_cell_depends_on() -> None:
    """The names that go into the keys of the methods that were there before SNACS's: others would be computed again."""
    from gcnet import structured_cells as sc

    known = {"version", "dense", "connectivity", "method", "macs", "seed", "ranking", "round_to", "finetune_epochs",
             "finetune_lr", "precision"}  # fmt: skip
    found = {m: sc._inputs(STUDY, sc.StructuredCell(m, 0.6, 0)) for m in STUDY.structured_methods}
    assert all(set(inputs) == known for method, inputs in found.items() if method != "snacs")
    assert [m for m, inputs in found.items() if inputs["connectivity"]] == ["B25"]
    assert set(found["snacs"]) == known | {"snacs"}


def test_study_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match=r"share of MACs 1\.0 is outside"):
        Study.create(structured_macs=[1.0])
    with pytest.raises(ValueError, match="unknown hybrid 'tp_hessian'"):
        Study.create(structured_methods=["tp_hessian"])
    with pytest.raises(ValueError, match="unknown variant 'int8'"):
        Study.create(structured_latency_variants=["int8"])
    with pytest.raises(ValueError, match="must be at least 1"):
        Study.create(structured_latency_batches=[0])
    assert Recipe(epochs=1)


def test_a_depthwise_convolution_with_several_filters_a_channel_is_left_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    batches = [(torch.randn(4, 3, 12, 12), torch.zeros(4, dtype=torch.int64))]
    found = structured_prune(model, batches, macs=0.8, hybrid="direct")
    assert found.network[2].weight.shape == (12, 1, 3, 3) and found.network[4].out_channels < 8
    assert any("makes several filters of each channel" in words for words in found.report["frozen"].values())


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.b, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.g(torch.relu(self.a(x)))))).mean((2, 3)))


def test_a_grouped_convolution_may_end_with_one_channel_a_group(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Grouped().eval(), torch.rand(8, 3, 12, 12)
    found = gcnet.structured_prune(model, [(images, torch.arange(8) % 4)], macs=0.3, hybrid="direct")
    assert found.network.g.groups == 4 == found.network.g.in_channels
    found.save(tmp_path / "small")
    again = gcnet.load_structured(Grouped(), tmp_path / "small").eval()
    assert torch.equal(again(images), found.network.eval()(images))
