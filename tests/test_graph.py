"""The layer graph against networks computed by hand, and against what really changes when a channel is perturbed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gcnet
from gcnet.connectivity import connectivity
from gcnet.graph import LayerGraph, Source, TraceError, layer_graph, trace

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def index(graph: LayerGraph, layer: str, parent: str) -> list[list[int]]:
    return [source.index.tolist() for source in graph.sources[layer] if source.parent == parent]


# --- the judge: perturb one channel, freeze every other layer, see which input columns move -----------------------


class Frozen(nn.Module):
    """Stands in for a layer: always gives the same random output, but with some channels of some images shifted."""

    def __init__(self, layer: nn.Module, seed: int) -> None:
        super().__init__()
        self.layer, self.seed = [layer], seed  # in a list, so that it is not turned to float64 with the rest
        self.axis = -3 if isinstance(layer, nn.Conv2d) else -1
        self.shifts: list[tuple[int, int, float]] = []
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        shape = self.layer[0](x[:1].float()).shape
        out = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), dtype=x.dtype)
        out = out.repeat(len(x), *[1] * (out.ndim - 1))
        for image, channel, shift in self.shifts:
            if image < len(out):  # a layer may run on a table of positions and not on the images
                out[image].select(self.axis, channel).add_(shift)
        return out


def wrong_columns(
    model: nn.Module, x: Tensor, graph: LayerGraph, per_layer: int = 10**9, exact: bool = True
) -> list[str]:
    """Every (parent channel, layer) whose changed input columns are not those the graph names; at most some channels.

    exact=False: only columns that the graph names and that do not change (attention moves more than any graph names).

    Image 0 is clean, every further image carries one shift of one channel: all are seen in a few passes.
    """
    frozen = {name: Frozen(model.get_submodule(name), seed) for seed, name in enumerate(graph.nodes)}
    replaced: dict[int, nn.Module] = {id(stand_in.layer[0]): stand_in for stand_in in frozen.values()}
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            replaced[id(module)] = nn.Identity()  # would leak a channel's shift into the statistics of the others
        elif isinstance(module, nn.ReLU):
            replaced[id(module)] = nn.Softplus()  # has no dead zone to hide a shift, nor a zero to multiply gates
    model = copy.deepcopy(model, replaced).double().eval()
    draw = torch.Generator().manual_seed(0)
    cases = [
        (name, channel)
        for name in graph.nodes
        for channel in torch.randperm(graph.out_channels[name], generator=draw)[:per_layer].tolist()
    ]
    wrong = []
    for start in range(0, len(cases), 32):
        chunk = cases[start : start + 32]
        for stand_in in frozen.values():
            stand_in.shifts, stand_in.inputs = [], []
        for k, (parent, channel) in enumerate(chunk):
            # Both signs: one of them gets through any rectifier.
            frozen[parent].shifts += [(1 + 2 * k, channel, 9.0), (2 + 2 * k, channel, -9.0)]
        with torch.no_grad():
            model(x[:1].double().repeat(1 + 2 * len(chunk), *[1] * (x.ndim - 1)))
        for name, stand_in in frozen.items():
            moved = torch.zeros(len(chunk), graph.in_channels[name], dtype=torch.bool)
            for value in stand_in.inputs:
                if len(value) == 1:  # a table of positions: no image reaches it
                    continue
                rows = value.movedim(stand_in.axis, 1).flatten(2) if value.ndim > 2 else value.unsqueeze(2)
                change = ((rows - rows[:1]).abs() > 1e-10).any(2)[1:]
                moved |= change[0::2] | change[1::2]
            for k, (parent, channel) in enumerate(chunk):
                told = torch.zeros(graph.in_channels[name], dtype=torch.bool)
                for source in graph.sources[name]:
                    if source.parent == parent:
                        told |= source.index == channel
                if not torch.equal(told, moved[k] if exact else moved[k] & told):
                    wrong.append(
                        f"{parent}[{channel}] -> {name}: moved {moved[k].nonzero().flatten().tolist()}, "
                        f"graph says {told.nonzero().flatten().tolist()}"
                    )
    return wrong


# --- by hand -------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def test_chain_with_flatten() -> None:
    graph = layer_graph(Chain(), IMAGE)
    assert graph.layers == ("features.0", "features.4", "classifier")
    assert graph.parents == {"features.0": (), "features.4": ("features.0",), "classifier": ("features.4",)}
    assert index(graph, "features.4", "features.0") == [[0, 1]]
    assert index(graph, "classifier", "features.4") == [[0] * 4 + [1] * 4 + [2] * 4]
    assert graph.via == {("features.4", "features.0"): (), ("classifier", "features.4"): ("flatten",)}
    assert graph.positions == {"features.0": 64, "features.4": 4, "classifier": 1}
    assert graph.in_channels == {"features.0": 3, "features.4": 2, "classifier": 12}
    assert graph.out_channels == {"features.0": 2, "features.4": 3, "classifier": 5}
    assert graph.notes == () and graph.shared == ()
    assert graph.sources["features.4"][0].index.dtype == torch.int64


class Residual(nn.Module):
    """stem, then two identity blocks of two layers, then a block with a projected shortcut, then the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.b1, self.b2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.c1, self.c2, self.short = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        x = F.relu(x + self.b2(F.relu(self.b1(x))))
        out = self.c2(F.relu(self.c1(x)))
        out += self.short(x)
        return self.head(F.adaptive_avg_pool2d(F.relu(out, inplace=True), 1).flatten(1))


def test_residual_sums_walk_back_along_the_stream() -> None:
    graph = layer_graph(Residual(), IMAGE)
    assert graph.parents["a1"] == ("stem",)
    assert graph.parents["a2"] == ("a1",)
    assert graph.parents["b1"] == ("stem", "a2")
    assert graph.parents["c1"] == graph.parents["short"] == ("stem", "a2", "b2")
    assert graph.parents["head"] == ("c2", "short")
    assert index(graph, "c1", "stem") == [[0, 1, 2, 3]]
    assert graph.via["c1", "stem"] == ("sum",) and graph.via["a2", "a1"] == ()


def test_nearest_keeps_one_layer_an_operand() -> None:
    graph = layer_graph(Residual(), IMAGE, residual="nearest")
    assert graph.parents["b1"] == ("stem", "a2")
    assert graph.parents["c1"] == graph.parents["short"] == ("a2", "b2")
    assert graph.parents["head"] == ("c2", "short")


def test_nearest_is_not_fooled_by_adding_a_constant() -> None:
    class Shifted(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.b1(x + self.a1(x) + 1.0)

    assert layer_graph(Shifted(), IMAGE, residual="nearest").parents["b1"] == ("stem", "a1")


def test_nearest_chooses_channel_by_channel() -> None:
    class Halves(nn.Module):
        """The sum's left operand holds a in its first half and, older, the stem in its second."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)
            self.last = nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            mixed = x + torch.cat([self.a(x), torch.zeros_like(x[:, 2:])], 1)
            return self.last(mixed + self.b(x))

    graph = layer_graph(Halves(), IMAGE, residual="nearest")
    assert index(graph, "last", "stem") == [[-1, -1, 2, 3]]
    assert index(graph, "last", "a") == [[0, 1, -1, -1]]
    assert index(graph, "last", "b") == [[0, 1, 2, 3]]


def test_concatenation_puts_parents_side_by_side() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(5, 1, 1), nn.Conv2d(6, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x, self.a(x)], dim=1)
            return self.c(torch.cat([y, self.b(y)], dim=-3))

    graph = layer_graph(Dense(), IMAGE)
    assert index(graph, "b", "a") == [[-1, -1, -1, 0, 1]]
    assert index(graph, "c", "a") == [[-1, -1, -1, 0, 1, -1]]
    assert index(graph, "c", "b") == [[-1, -1, -1, -1, -1, 0]]
    assert graph.via["c", "a"] == ("concat",)


def test_split_shuffle_and_depthwise() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.part = nn.Conv2d(2, 2, 1)
            self.grouped = nn.Conv2d(4, 2, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            n, _, h, w = x.size()
            x = self.a(x).view(n, 2, 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
            left, right = self.deep(x).chunk(2, dim=1)
            return self.grouped(torch.cat((right, self.part(left)), 1))

    graph = layer_graph(Shuffle(), IMAGE)
    assert index(graph, "deep", "a") == [[0, 2, 1, 3]]
    assert graph.via["deep", "a"] == ("shuffle", "depthwise")
    assert index(graph, "part", "deep") == [[0, 1]]
    assert graph.via["part", "deep"] == ("split",)
    assert index(graph, "grouped", "deep") == [[2, 3, -1, -1]]
    assert index(graph, "grouped", "part") == [[-1, -1, 0, 1]]
    assert graph.via["grouped", "deep"] == ("concat", "split", "grouped")


class Excite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.expand = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.b = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = torch.sigmoid(self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.b(gate * x)


@pytest.mark.parametrize("size", [8, 1])  # on a single pixel only the sigmoid tells the gate from what it gates
def test_a_gate_is_a_parent_only_on_demand(size: int) -> None:
    x = IMAGE[:, :, :size, :size]
    graph = layer_graph(Excite(), x)
    assert graph.parents["squeeze"] == ("a",) and graph.via["squeeze", "a"] == ()
    assert graph.parents["b"] == ("a",) and graph.via["b", "a"] == ("gate",)
    both = layer_graph(Excite(), x, gates=True)
    assert both.parents["b"] == ("a", "expand")
    assert wrong_columns(Excite(), x, both) == []


def test_a_product_of_equals_joins_both() -> None:
    class Product(Excite):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x * self.expand(self.squeeze(x)))

    assert layer_graph(Product(), IMAGE).parents["b"] == ("a", "expand")


def test_gated_linear_unit_keeps_the_gated_half() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.glu(self.a(x), dim=1))

    assert index(layer_graph(Gated(), IMAGE), "b", "a") == [[0, 1]]
    assert sorted(index(layer_graph(Gated(), IMAGE, gates=True), "b", "a")) == [[0, 1], [2, 3]]


def test_a_channel_that_arrives_twice_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.cat([y + y.relu(), y.flip(1) + y], 1))

    graph = layer_graph(Twice(), IMAGE)
    # First half: a[0], a[1] once each; second half: a[0] + a[1] in both columns.
    columns = torch.stack([source.index for source in graph.sources["b"]])
    assert [sorted(i for i in column.tolist() if i >= 0) for column in columns.T] == [[0], [1], [0, 1], [0, 1]]


def test_augmented_assignment_changes_every_name_of_a_tensor() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = z = self.a(x)
            z += self.b(y)
            return self.c(y)

    model = Alias()
    graph = layer_graph(model, IMAGE)
    assert graph.parents["c"] == ("a", "b")
    with torch.no_grad():
        assert torch.equal(graph.module(IMAGE), model(IMAGE))


def test_tokens_and_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 4, 4, stride=4)
            self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
            self.norm = nn.LayerNorm(4)
            self.place = nn.Parameter(torch.ones(1, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2) + self.place
            y = self.norm(x)
            weights = torch.softmax(self.q(y) @ self.k(y).transpose(-2, -1), dim=-1)
            x = x + self.out(weights @ self.v(y))
            return self.q(x.mean(1))

    graph = layer_graph(Attention(), IMAGE)
    assert graph.parents["v"] == ("patch",) and graph.positions["v"] == 4
    assert graph.parents["out"] == ("v",)
    assert graph.parents["q"] == ("patch", "out")  # both of its calls
    assert graph.shared == ("q",)
    assert any("matmul" in note for note in graph.notes)  # the attention weights themselves mix channels


def test_what_mixes_channels_has_no_provenance_and_is_noted() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.up, self.b = nn.Conv2d(3, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.up(self.a(x)))

    graph = layer_graph(Transposed(), IMAGE)
    assert graph.parents["b"] == ()
    assert any("ConvTranspose2d" in note for note in graph.notes)


def test_unknown_operation_of_equal_shape_keeps_its_channels_and_is_noted() -> None:
    class Odd(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.features[4](torch.erfc(self.features[0](x)))

    graph = layer_graph(Odd(), IMAGE)
    assert graph.parents["features.4"] == ("features.0",)
    assert any("erfc" in note for note in graph.notes) and any("classifier" in note for note in graph.notes)


def test_spatial_concatenation_keeps_every_parent() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.pad(torch.cat([self.a(x), self.b(x)], dim=3), (1, 1), value=2.0))

    graph = layer_graph(Beside(), IMAGE)
    assert index(graph, "c", "a") == index(graph, "c", "b") == [[0, 1]]
    assert any("different positions" in note for note in graph.notes)
    assert wrong_columns(Beside(), IMAGE, graph) == []


def test_activation_nodes() -> None:
    graph = layer_graph(Chain(), IMAGE)
    assert graph.nodes == {"features.0": "features_0", "features.4": "features_4", "classifier": "classifier"}
    # Through batch norm and ReLU, but not into the pooling; the classifier ends at itself.
    assert graph.activation_nodes == {
        "features.0": "features_2",
        "features.4": "features_5",
        "classifier": "classifier",
    }


def test_activation_chain_stops_before_an_addition_and_at_a_branch() -> None:
    resnet = layer_graph(torchvision.models.resnet18(weights=None), torch.zeros(1, 3, 32, 32))
    assert resnet.activation_nodes["conv1"] == "relu"
    assert resnet.activation_nodes["layer1.0.conv1"] == "layer1_0_relu"
    assert resnet.activation_nodes["layer1.0.conv2"] == "layer1_0_bn2"
    assert resnet.activation_nodes["layer2.0.downsample.0"] == "layer2_0_downsample_1"
    names = {node.name for node in resnet.module.graph.nodes}
    assert set(resnet.activation_nodes.values()) | set(resnet.nodes.values()) <= names
    branch = layer_graph(Residual(), IMAGE)
    assert branch.activation_nodes["stem"] == "relu"  # the ReLU has several users and is the end of the chain
    assert branch.activation_nodes["a2"] == branch.nodes["a2"]


def test_shared_layer_has_the_parents_of_all_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
            self.again = self.b

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.b(self.a(x)))

    graph = layer_graph(Shared(), IMAGE)
    assert graph.layers == ("a", "b") and graph.shared == ("b",)
    assert graph.parents["b"] == ("a", "b")
    assert wrong_columns(Shared(), IMAGE, graph) == []


def test_string_is_an_aligned_table() -> None:
    lines = str(layer_graph(Residual(), IMAGE)).splitlines()
    assert len(lines) == 10
    column = lines[0].index("parents")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    assert lines[1].endswith("none, pruned directly")
    assert lines[6].startswith("c1 ") and lines[6].endswith("b2, a2, stem  (sum)")


def test_string_cuts_a_long_list_of_parents() -> None:
    graph = layer_graph(torchvision.models.resnet34(weights=None), torch.zeros(1, 3, 32, 32))
    line = next(line for line in str(graph).splitlines() if line.startswith("layer4.0.conv1 "))
    assert line.endswith("layer3.5.conv2, layer3.4.conv2, layer3.3.conv2, 4 more  (sum)")


# --- the model is left as it was, and errors say what to do --------------------------------------------------------


def test_model_is_left_as_it_was() -> None:
    model = Chain().train()
    model.features[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = layer_graph(model, IMAGE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert graph.module.get_submodule("features.0") is model.features[0]


def test_traced_module_computes_the_same() -> None:
    model = Residual()
    graph = layer_graph(model, IMAGE)
    with torch.no_grad():
        assert torch.equal(graph.module(IMAGE), model(IMAGE))


class Branching(Chain):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return super().forward(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 3, 1), Branching(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


def test_trace_error_names_the_line_and_the_ways_out() -> None:
    with pytest.raises(TraceError) as caught:
        layer_graph(Outer(), IMAGE)
    message = str(caught.value)
    line = Branching.forward.__code__.co_firstlineno + 1
    assert f"test_graph.py:{line}" in message and "`if x.mean() > 0:`" in message
    assert "Rewrite that line" in message and "leaf_modules=" in message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("leaf", [Branching, "inner"])
def test_leaf_modules_get_around_what_cannot_be_traced(leaf: type | str) -> None:
    graph = layer_graph(Outer(), IMAGE, leaf_modules=(leaf,))
    assert graph.layers == ("first", "inner.features.0", "inner.features.4", "inner.classifier", "last")
    assert graph.parents["last"] == graph.parents["inner.features.0"] == ()  # listed, pruned directly
    assert any("inner.features.0" in note for note in graph.notes)


def test_model_is_left_as_it_was_after_an_error() -> None:
    model = Outer().train()
    with pytest.raises(TraceError):
        layer_graph(model, IMAGE)
    assert all(module.training for module in model.modules())


def test_assertions_and_optional_arguments_can_be_traced() -> None:
    class Optional(Chain):
        def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
            assert x.dim() == 4, "images, please"
            if mask is not None:
                x = x * mask
            if double:
                x = 2 * x
            return super().forward(x)

    assert layer_graph(Optional(), IMAGE).parents["classifier"] == ("features.4",)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((3, 8, 8), r"\(3, 8, 8\), without a batch dimension"),
        ((2, 4, 8, 8), r"'features\.0' takes 3 input channels but gets 4 .*\(2, 4, 8, 8\)"),
        ((2, 3, 16, 16), r"'classifier' takes 12 input features but gets 48 .*\(2, 3, 16, 16\)"),
        ((0, 3, 8, 8), "empty"),
        ((2, 3, 1, 1), r"\(2, 3, 1, 1\): at 'features\.3'"),
        ((2, 3, 8, 8, 1), r"\(2, 3, 8, 8, 1\); expected \(N, C, H, W\)"),
    ],
)
def test_bad_example_input(shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        layer_graph(Chain(), torch.zeros(shape))


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown residual 'neares'; did you mean 'nearest'"):
        layer_graph(Chain(), IMAGE, residual="neares")
    with pytest.raises(ValueError, match=r"unknown leaf module 'feature'; did you mean 'features'"):
        layer_graph(Chain(), IMAGE, leaf_modules=("feature",))
    with pytest.raises(ValueError, match="ReLU calls no Conv2d or Linear"):
        layer_graph(nn.ReLU(), torch.zeros(1, 3))
    with pytest.raises(TypeError, match="example_input is a list"):
        layer_graph(Chain(), [1.0])


def test_trace_shares_the_parameters() -> None:
    model = Chain().eval()
    assert trace(model).get_parameter("features.0.weight") is model.features[0].weight


# --- perturbation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Chain(), Residual()], ids=["chain", "residual"])
def test_perturbing_any_channel_moves_exactly_the_told_columns(model: nn.Module) -> None:
    assert wrong_columns(model, IMAGE, layer_graph(model, IMAGE)) == []


def test_the_judge_sees_a_wrong_graph() -> None:
    model, graph = Residual(), layer_graph(Residual(), IMAGE)
    graph.sources["c1"] = tuple(
        Source(s.parent, s.index.roll(1)) if s.parent == "a2" else s for s in graph.sources["c1"]
    )
    assert len(wrong_columns(model, IMAGE, graph)) == 4


class Program(nn.Module):
    """A random network: each step makes a new map from earlier ones; the last layers look at all of them."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps, self.layers, channels = [], nn.ModuleList(), [4]
        self.layers.append(nn.Conv2d(3, 4, 1))
        for kind, i, j in steps:
            i, j = i % len(channels), j % len(channels)
            c, d = channels[i], channels[j]
            if kind in ("add", "maximum") and c != d:
                kind = "cat"
            if kind in ("chunk", "shuffle", "halves") and c % 2:
                kind = "flip"
            made = {"cat": c + d, "chunk": c // 2, "conv": 4, "grow": c + 1}.get(kind, c)
            if made > 24:
                continue
            if kind in ("conv", "grow"):
                self.layers.append(nn.Conv2d(c, made, 1))
            elif kind == "depthwise":
                self.layers.append(nn.Conv2d(c, c, 3, padding=1, groups=c))
            self.steps.append((kind, i, j, len(self.layers) - 1))
            channels.append(made)
        self.last = nn.ModuleList([nn.Conv2d(sum(channels), 2, 1), nn.Linear(sum(channels) * 4, 2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.layers[0](x)]
        for kind, i, j, layer in self.steps:
            a, b = maps[i], maps[j]
            n, c, h, w = a.shape
            maps.append(
                {
                    "add": lambda a=a, b=b: a + b,
                    "maximum": lambda a=a, b=b: a - 0.5 * b,
                    "cat": lambda a=a, b=b: torch.cat((a, b), 1),
                    "chunk": lambda a=a: a.chunk(2, 1)[1],
                    "shuffle": lambda a=a, n=n, c=c, h=h, w=w: (
                        a.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
                    ),
                    "halves": lambda a=a: torch.cat(torch.split(a, a.shape[1] // 2, 1)[::-1], 1),
                    "flip": lambda a=a: a.flip(1),
                    "roll": lambda a=a: torch.roll(a, 1, 1),
                    "pool": lambda a=a: F.max_pool2d(a, 3, 1, 1),
                    "spread": lambda a=a: a.mean((2, 3), keepdim=True).expand_as(a),
                    "permute": lambda a=a: a.permute(0, 2, 3, 1)[..., ::1].permute(0, 3, 1, 2),
                    "softplus": lambda a=a: F.softplus(a),
                }.get(kind, lambda a=a, layer=layer: self.layers[layer](a))()
            )
        y = torch.cat(maps, 1)
        return self.last[0](y), self.last[1](F.avg_pool2d(y, 2).flatten(1))


KINDS = [
    "conv",
    "grow",
    "depthwise",
    "add",
    "maximum",
    "cat",
    "chunk",
    "halves",
    "shuffle",
    "flip",
    "roll",
    "pool",
    "spread",
    "permute",
    "softplus",
]


def unknown_columns(graph: LayerGraph, layer: str) -> int:
    """Input columns of a layer that no source reaches."""
    reached = torch.zeros(graph.in_channels[layer], dtype=torch.bool)
    for source in graph.sources[layer]:
        reached |= source.index >= 0
    return int((~reached).sum())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 20), st.integers(0, 20)), max_size=7))
def test_random_networks(steps: list[tuple[str, int, int]]) -> None:
    model, x = Program(steps), IMAGE[:, :, :4, :4]
    graph = layer_graph(model, x)
    assert graph.notes == ()
    for k, layer in enumerate(graph.layers):
        assert all(graph.layers.index(parent) < k for parent in graph.parents[layer])
        assert unknown_columns(graph, layer) == (3 if k == 0 else 0)
        for source in graph.sources[layer]:
            assert source.index.shape == (graph.in_channels[layer],)
            assert set(source.index.tolist()) <= {-1, *range(graph.out_channels[source.parent])}
    assert wrong_columns(model, x, graph) == []
    near = layer_graph(model, x, residual="nearest")
    assert all(set(near.parents[layer]) <= set(graph.parents[layer]) for layer in graph.layers)
    assert all(unknown_columns(near, layer) == 0 for layer in near.layers[1:])


# --- torchvision: the whole list is in test_graph_zoo.py -----------------------------------------------------------


def test_resnet152_is_not_quadratic() -> None:
    graph = layer_graph(torchvision.models.resnet152(weights=None), torch.zeros(1, 3, 32, 32))
    # 36 blocks in the third stage: its projection, then the last layer of each block.
    assert len(graph.parents["layer4.0.conv1"]) == 37
    assert graph.parents["layer3.1.conv1"] == ("layer3.0.conv3", "layer3.0.downsample.0")


class Views(nn.Module):
    """A sum that is written into a tensor of two names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "view":
            v = y.view(y.shape)
            v += self.b(x)
        elif self.how == "chunk":
            half, _ = y.chunk(2, 1)
            half.add_(self.b(x)[:, :2])
        else:
            y += self.b(x)
        return self.c(y)


@pytest.mark.parametrize("how", ["view", "chunk", "itself"])
def test_a_sum_written_through_a_view_is_told(how: str) -> None:
    graph = layer_graph(Views(how), torch.rand(1, 3, 4, 4))
    assert any("through a view" in note for note in graph.notes) == (how != "itself")
    assert (graph.parents["c"] == ("a", "b")) == (how == "itself")


def test_a_graph_that_was_given_has_its_residual_rule() -> None:
    model, batches = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), [(torch.rand(4, 3, 4, 4), torch.arange(4))]
    graph = layer_graph(model, batches[0][0][:1])
    for measure in (connectivity, gcnet.ghost_prune, gcnet.snacs_prune):
        with pytest.raises(ValueError, match="give it to layer_graph"):
            measure(model, batches, graph=graph, residual="nearest")
