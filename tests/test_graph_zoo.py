"""Every classification network of torchvision: the layer graph is proved by perturbation, and pruning works.

Random weights, the smallest input each network takes. Vision transformers are another matter: attention carries
every channel everywhere, so there each connection that the graph names must be real, and layers without a parent are
listed as such.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torchvision
from test_graph import unknown_columns, wrong_columns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import gcnet
from gcnet.cost import parameters
from gcnet.graph import LayerGraph, layer_graph

EVERY = models.list_models(module=torchvision.models)
TRANSFORMERS = [name for name in EVERY if name.startswith(("vit", "swin", "maxvit"))]
CONVOLUTIONAL = [name for name in EVERY if name not in TRANSFORMERS]
# One or two of each family run in `make test`, all of them in `make test-slow`.
QUICK = {"alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2",
         "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "shufflenet_v2_x0_5",
         "squeezenet1_0", "squeezenet1_1", "vgg11_bn", "swin_t"}  # fmt: skip
SMALLEST = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 64, "vit_h_14": 28}
HEAVY = ("alexnet", "vgg11_bn", "resnet50", "swin_t", "convnext_tiny")
LIMIT_S = 120  # what pruning one network may take, loaded machine included


def cases(names: list[str], heavy: tuple[str, ...] = ()) -> list:
    return [
        name if name in QUICK and name not in heavy else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


def network(name: str, classes: int = 1000, images: int = 4) -> tuple[nn.Module, Tensor]:
    """The network with random weights, and random images of the smallest size."""
    torch.manual_seed(0)
    size = SMALLEST.get(name, 32)
    if name == "maxvit_t":  # its own builder insists on 224 px
        model = models.MaxVit((64, 64), 64, 2, [64, 128, 256, 512], [2, 2, 5, 2], 32, 0.2, num_classes=classes)
    elif name.startswith("vit"):
        model = models.get_model(name, weights=None, image_size=size, num_classes=classes)
    elif name in ("googlenet", "inception_v3"):
        model = models.get_model(name, weights=None, init_weights=False, num_classes=classes)
    else:
        model = models.get_model(name, weights=None, num_classes=classes)
    return model, torch.randn(images, 3, size, size)


@pytest.fixture
def in_time() -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    assert seconds < LIMIT_S, f"{seconds:.0f} s"


def without_parent(graph: LayerGraph) -> list[str]:
    return [layer for layer in graph.layers if not graph.parents[layer]]


@pytest.mark.parametrize("name", cases(CONVOLUTIONAL))
def test_a_changed_channel_moves_exactly_the_told_columns(name: str) -> None:
    model, images = network(name)
    graph = layer_graph(model, images, gates=True)
    # The auxiliary heads of googlenet and inception: torchvision calls them in training mode only, so nothing of them
    # can be perturbed.
    assert all("never called" in note for note in graph.notes)
    assert bool(graph.notes) == (name in ("googlenet", "inception_v3"))
    assert without_parent(graph) == [graph.layers[0]]
    assert all(unknown_columns(graph, layer) == 0 for layer in graph.layers[1:])
    assert wrong_columns(model, images[:1], graph, per_layer=1) == []


@pytest.mark.parametrize("name", cases([name for name in CONVOLUTIONAL if name in QUICK or "net_v2" in name]))
def test_without_gates_only_the_gates_own_layers_are_gone(name: str) -> None:
    model, images = network(name)
    every, graph = layer_graph(model, images, gates=True), layer_graph(model, images)
    for layer in graph.layers:
        assert set(graph.parents[layer]) <= set(every.parents[layer])
        gone = set(every.parents[layer]) - set(graph.parents[layer])
        assert all("gate" in every.via[layer, parent] for parent in gone)
        assert graph.parents[layer] or not every.parents[layer]


@pytest.mark.parametrize("name", cases(TRANSFORMERS))
def test_transformers_name_only_real_connections_and_list_the_rest(name: str) -> None:
    model, images = network(name)
    graph = layer_graph(model, images)
    attention = ("attn", "self_attention", "cpb_mlp")
    assert all(any(word in layer for word in attention) for layer in without_parent(graph)[1:])
    guided = [layer for layer in graph.layers if ".mlp." in layer or layer.startswith("head")]
    assert guided and all(graph.parents[layer] for layer in guided)
    assert "none, pruned directly" in str(graph)
    assert wrong_columns(model, images[:1], replace(graph, layers=tuple(graph.nodes)), per_layer=1, exact=False) == []


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", cases(EVERY, heavy=HEAVY))
def test_ghost_pruning_and_macs(name: str) -> None:
    model, images = network(name)
    if parameters(model) > 2e8:
        pytest.skip("more than 200 million parameters: the float64 copy of SynFlow does not fit every machine")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruning = gcnet.ghost_prune(model, [(images, torch.arange(4) % 2)], pruner="l1", sparsity=0.5, hybrid="Full")
    assert abs(gcnet.sparsity(pruning.masks) - 0.5) < 1e-4
    assert "guided" in pruning.plan.values()
    assert set(pruning.report["without_parent"]) <= {n for n, role in pruning.plan.items() if role == "direct"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name in CONVOLUTIONAL:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(images[:1])
        assert gcnet.macs(model, images) == counter.get_total_flops() / 2
        assert gcnet.macs(model, images, pruning.masks) < gcnet.macs(model, images)


@pytest.mark.filterwarnings("ignore:.*(images are fewer|parent filters)")
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", cases(EVERY, heavy=(*HEAVY, "efficientnet_b0")))
def test_snacs_pruning(name: str) -> None:
    model, images = network(name, classes=2, images=8)
    if parameters(model) > 4e7 and name not in ("alexnet", "vgg11_bn", "vit_b_16"):
        pytest.skip("more than 40 million parameters: minutes of inverting matrices as wide as its layers")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # Two groups a layer are the fastest for narrow layers, the default's 64 for wide ones.
    groups = 2 if parameters(model) < 2e7 else None
    pruning = gcnet.snacs_prune(model, [(images, torch.arange(8) % 2)], delta=0.5, groups=groups)
    graph = layer_graph(model, images)
    rows = pruning.report["layers"]
    grouped = [layer for layer in graph.layers if getattr(model.get_submodule(layer), "groups", 1) > 1]
    # The position biases of swin_v2 come from a table, not from the images.
    assert [row["layer"] for row in rows] == [
        n for n in graph.layers if graph.parents[n] and n not in grouped and "cpb_mlp" not in n
    ]
    assert 0 < pruning.report["sparsity"] <= 0.6 and all(row["pruned"] <= row["gamma"] + 1e-9 for row in rows)
    assert all(bool(pruning.masks[f"{layer}.weight"].all()) for layer in pruning.report["not_scored"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name in CONVOLUTIONAL:
        assert gcnet.macs(model, images, pruning.masks) < gcnet.macs(model, images)


def test_the_quick_ones_are_of_every_family() -> None:
    families = {name.split("_")[0].rstrip("0123456789") for name in QUICK}
    assert {"alexnet", "convnext", "densenet", "efficientnet", "mobilenet", "regnet", "shufflenet", "vgg"} <= families
    assert set(EVERY) >= QUICK


@pytest.mark.filterwarnings("ignore:.*(images are fewer|parent filters)")
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "ghostnet_050", "convnext_atto"])
def test_networks_of_timm_are_followed_and_pruned(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    extra = {"zero_init_last": False} if name == "resnet10t" else {}  # a BatchNorm of zeros lets nothing through
    model = timm.create_model(name, pretrained=False, num_classes=2, **extra).eval()
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 2
    assert wrong_columns(model, images[:1], layer_graph(model, images, gates=True), per_layer=1) == []
    graph = layer_graph(model, images)
    assert gcnet.macs(model, images[:1]) > 0
    ghost = gcnet.ghost_prune(model, [(images, labels)], pruner="l1", sparsity=0.5, hybrid="Full", graph=graph)
    snacs = gcnet.snacs_prune(model, [(images, labels)], delta=0.5, groups=2, graph=graph)
    assert gcnet.sparsity(ghost.masks) == pytest.approx(0.5, abs=1e-3) and gcnet.sparsity(snacs.masks) > 0
