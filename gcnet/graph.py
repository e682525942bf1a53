"""The layer graph: weighted layers in execution order, and which channel of which parent feeds each input channel.

The network is traced with torch.fx and interpreted once. Beside every tensor travels its *provenance*: integer
tensors of the same shape that hold, at each element, the number of the (layer, output channel) it came from, counted
from 1 through the whole network; 0 is the network input, constants and anything unknown. Shape operations are applied
to these numbers themselves, so flatten, concatenation, channel shuffle and the like need no rules of their own (and
zero padding comes out as unknown); only operations that compute do.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules import activation, batchnorm, dropout, normalization, padding, pooling

from gcnet.cost import check_channels, check_example, evaluation_mode
from gcnet.errors import unknown
from gcnet.training import Normalize

RESIDUAL = ("all", "nearest")

_TORCH = str(Path(torch.__file__).parent) + os.sep

# More producers than this behind one channel means that channels were mixed, not added (choice).
MAX_MIXED = 256


class TraceError(ValueError):
    """The network's forward cannot be traced symbolically; the message names the line and the ways out."""


@dataclass(frozen=True, eq=False)
class Source:
    """One parent of a layer and the input channels it feeds.

    index: (C_in,) int64, C_in the layer's full number of input channels (before grouping); the parent's output
    channel that reaches each input channel, or -1 where this parent does not reach.
    """

    parent: str
    index: Tensor


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """Conv2d and Linear layers of a network in execution order and what feeds each of them; print it to see it.

    layers: names (module paths). parents: names per layer, in execution order; () if only the image feeds it.
    sources: which channel of a parent feeds which input channel. Sources that share a column are a sum, disjoint
    columns a concatenation, a channel that fills several columns a flatten; one parent may have several sources.
    via: {(layer, parent): words}, what lies between: sum, concat (the parent fills some columns only), split (some of
    its channels arrive only), flatten, repeat, shuffle, gate; and grouped or depthwise for the layer itself.
    module: the network as traced in eval mode; it shares the submodules of the model (and is the model itself where
    the parents were given). nodes: fx node of a layer's first call. activation_nodes: last node of the chain of
    normalisation, activation, dropout behind that call. positions: outputs per channel and image at the first call
    (H * W, tokens, or 1; 0 for a layer that only a whole module or function uses, as attention does: it is listed,
    has no parents and no node). outputs: layers whose output reaches the network's output with no other layer between.
    shared: layers called more than once, whose parents are those of all calls. notes: where the analysis gave up or
    guessed.
    """

    layers: tuple[str, ...]
    parents: dict[str, tuple[str, ...]]
    sources: dict[str, tuple[Source, ...]]
    via: dict[tuple[str, str], tuple[str, ...]]
    module: nn.Module
    nodes: dict[str, str]
    activation_nodes: dict[str, str]
    in_channels: dict[str, int]
    out_channels: dict[str, int]
    positions: dict[str, int]
    outputs: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _table(self)

    def others(self, layer: str) -> tuple[str, ...]:
        """The parents of a layer but itself: one that is called again on its own output is its own parent."""
        return tuple(parent for parent in self.parents[layer] if parent != layer)

    def input_groups(self, layer: str) -> Tensor:
        """(C_in,) number of the group of each input column: columns fed by the same filters (a flattened map) share
        one, a column that no layer feeds (of the images, say) has one of its own."""
        rows = torch.stack([source.index for source in self.sources[layer]])
        unfed = (rows < 0).all(0)
        rows[0, unfed] = -2 - torch.arange(int(unfed.sum()), device=rows.device)
        return torch.unique(rows, dim=1, return_inverse=True)[1]


def given_or_traced(
    graph: LayerGraph | None, model: nn.Module, example_input: Tensor, residual: str | None
) -> LayerGraph:
    """The graph that was given, or the model's. Raises ValueError where residual is asked for beside a graph, which has
    settled it."""
    if graph is not None and residual is not None:
        raise ValueError(f"residual='{residual}' says how a graph is made: give it to layer_graph, or leave graph out")
    return graph or layer_graph(model, example_input, residual=residual or "all")


def layer_graph(
    model: nn.Module,
    example_input: Tensor,
    *,
    residual: str = "all",
    gates: bool = False,
    leaf_modules: Iterable[type | str] = (),
    tracer: fx.Tracer | None = None,
    parents: Mapping[str, Sequence[str]] | None = None,
) -> LayerGraph:
    """Weighted layers of a network in execution order, with the parents of each, channel by channel.

    example_input: (N, C, H, W), or (N, ..., features) without convolutions; only the first image is run, in eval
    mode, without gradients. The model's mode, buffers and weights are as before on return.
    residual: "all" = the parents of a layer are all weighted layers whose output reaches it through shape-preserving
    operations and additions, back along the whole residual stream; "nearest" = each operand of an addition keeps only
    the most recently executed layer. gates: whether a multiplicative gate (squeeze and excitation, attention maps)
    is a parent beside what it gates. leaf_modules: module types or names not to trace into. tracer: a torch.fx tracer
    of your own instead of ours. parents: {layer: its parents}; nothing is traced then, the model is run once, and the
    channels follow from the widths: parents as wide as the layer's input are a sum, others stand side by side in the
    order given, and what is left over is a flatten. Layers that are not named have no parent.
    Raises ValueError (unknown residual, leaf or layer name, example_input the network cannot take, no layer, parents
    that do not fit) and TraceError.
    Source: GC-Net, Fig. 2 (outputs that converge into one layer); the walk along the residual stream is a choice.
    """
    if residual not in RESIDUAL:
        raise unknown("residual", residual, RESIDUAL)
    check_example(model, example_input)
    if parents is not None:
        return _told(model, example_input, parents)
    with evaluation_mode(model), torch.no_grad():
        traced = trace(model, leaf_modules=leaf_modules, tracer=tracer)
        _put_back(traced, model)
        run = _Provenance(traced, tuple(example_input.shape), residual == "nearest", gates)
        if not run.names:
            raise ValueError(f"{type(model).__name__} calls no Conv2d or Linear layer, so there is no layer graph")
        run.run(example_input[:1])
    traced.training = model.training
    called = {id(traced.get_submodule(name)) for name in run.order}
    unseen = [name for name, module in model.named_modules() if _is_layer(module) and id(module) not in called]
    if unseen:
        run.note(f"never called as a layer in eval mode, so not in the graph: {', '.join(unseen)}")
    return run.layer_graph(example_input.device)


def trace(
    model: nn.Module, *, leaf_modules: Iterable[type | str] = (), tracer: fx.Tracer | None = None
) -> fx.GraphModule:
    """Trace a network with torch.fx; the result shares the submodules and parameters of the model.

    leaf_modules: module types or names (paths) not to trace into. tracer: your own instead of ours; it must keep
    every Conv2d and Linear whole, and decides by itself what else is a leaf. What depends on the training mode is
    fixed by the trace. Raises TraceError, which names the line of the user's source, and ValueError for a leaf name
    that the model does not have.
    """
    leaves = tuple(leaf_modules)
    names = [name for name, _ in model.named_modules()]
    for leaf in leaves:
        if isinstance(leaf, str) and leaf not in names:
            raise unknown("leaf module", leaf, names)
    # Optional arguments keep their defaults: as proxies they would break "if mask is None".
    defaults = {
        name: argument.default
        for name, argument in inspect.signature(model.forward).parameters.items()
        if argument.default is not inspect.Parameter.empty
    }
    if tracer is not None and leaves:
        raise ValueError("give leaf_modules or a tracer of your own, not both: the tracer decides what is a leaf")
    tracer = tracer or Tracer(leaves)
    try:
        graph = tracer.trace(model, concrete_args=defaults or None)
        return fx.GraphModule(tracer.root, graph, type(model).__name__)
    except Exception as error:  # whatever the user's forward raises when it meets a proxy
        raise TraceError(_trace_message(model, error)) from error


class _Proxy(fx.Proxy):
    """A proxy that keeps x += y in place; torch.fx writes x + y, which is wrong for every other name of x."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class Tracer(fx.Tracer):
    """torch.fx's tracer that also keeps every Conv2d and Linear, our `Normalize`, and the modules asked for, whole."""

    def __init__(self, leaf_modules: Iterable[type | str] = ()) -> None:
        super().__init__()
        leaves = tuple(leaf_modules)
        self.leaf_types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
        self.leaf_names = frozenset(leaf for leaf in leaves if isinstance(leaf, str))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # A subclass of Conv2d from another library is a layer too, although fx would look inside.
        if _is_layer(module) or isinstance(module, (*self.leaf_types, Normalize)) or name in self.leaf_names:
            return True
        return super().is_leaf_module(module, name)

    def to_bool(self, proxy: fx.Proxy) -> bool:
        # An assertion about a shape is no control flow: the trace takes it as holding. (fx's own trace_asserts looks
        # for byte code that current Pythons no longer emit.)
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        return True if line.lstrip().startswith("assert ") else super().to_bool(proxy)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def _trace_message(model: nn.Module, error: Exception) -> str:
    """Where in the user's own source tracing failed, and what can be done about it."""
    # fx calls the model from inside torch, so the user's line is the last frame that is neither torch's nor ours.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, __file__)) and Path(frame.filename).exists()
    ]
    where = (
        f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: `{frames[-1].line}`"
        if frames
        else ("at a line that could not be found")
    )
    return (
        f"torch.fx cannot trace {type(model).__name__}: {where} ({type(error).__name__}: {error}). The course of "
        "forward may not depend on the values or shapes of tensors. Rewrite that line; or keep the submodule it "
        "belongs to whole with layer_graph(..., leaf_modules=(its type or its name,)) or a tracer=... of your own; or "
        "say what feeds what with parents={layer: [its parents], ...}. Hand the graph on as graph=..."
    )


# Operations by what they do to provenance. The names are those of torch functions and tensor methods without leading
# and trailing underscores.


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NORM_OR_ACTIVATION = _names("""
    relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish hardswish hardtanh hardsigmoid sigmoid logsigmoid
    tanh softplus softsign hardshrink softshrink tanhshrink threshold dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm""")
_UNARY = _NORM_OR_ACTIVATION | _names("""
    softmax log_softmax softmin normalize clamp clip clamp_min clamp_max abs absolute neg negative pos exp expm1 log
    log1p log2 sqrt rsqrt square pow reciprocal erf sign floor ceil round trunc sin cos nan_to_num float double half
    bfloat16 to type type_as contiguous clone detach requires_grad stochastic_depth drop_path masked_fill cumsum""")
_GATE = _names("sigmoid hardsigmoid softmax")
_SHAPE = _names("""
    flatten unflatten view reshape view_as reshape_as permute transpose swapaxes swapdims movedim moveaxis t T mT
    chunk split tensor_split hsplit vsplit dsplit split_with_sizes getitem cat concat concatenate stack hstack vstack
    dstack unbind squeeze unsqueeze roll flip expand expand_as broadcast_to repeat repeat_interleave tile narrow
    select index_select take_along_dim gather pad pixel_shuffle pixel_unshuffle channel_shuffle rot90 diagonal
    ravel tril triu data zeros_like new_zeros patch_merging_pad""")
_JOIN = _names("add iadd sub isub subtract maximum minimum fmax fmin where lerp addcmul addcdiv rsub")
_MULTIPLY = _names("mul imul multiply")
_DIVIDE = _names("div divide truediv itruediv true_divide")
_REDUCE = _names("mean sum amax amin max min std var median prod logsumexp norm nanmean nansum std_mean var_mean")
_RESIZE = _names("interpolate upsample upsample_nearest upsample_bilinear")
_PRODUCT = _names("matmul bmm mm")


def _module_types(namespace: Any, *but: type) -> tuple[type, ...]:
    """The module classes that one of torch.nn's files defines."""
    return tuple(
        kind
        for kind in vars(namespace).values()
        if isinstance(kind, type)
        and issubclass(kind, nn.Module)
        and kind.__module__ == namespace.__name__
        and kind not in but
    )


_SOFTMAX_MODULES = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
_CHAIN_MODULES = (
    batchnorm._NormBase,
    dropout._DropoutNd,
    nn.Identity,
    *_module_types(normalization),
    *_module_types(activation, nn.MultiheadAttention, nn.GLU, *_SOFTMAX_MODULES),
)
_GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d)
_SHAPE_MODULES = (
    nn.Flatten,
    nn.Unflatten,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    *_module_types(padding),
)
_POOL_MODULES = _module_types(pooling)


def _operation(node: fx.Node) -> str:
    """The plain name of what a call_function or call_method node does: relu, add, cat, ..."""
    if node.target is getattr:
        return str(node.args[1]).strip("_")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.strip("_")


@dataclass(frozen=True, eq=False)
class _Prov:
    """Provenance of one tensor: ids of its shape (none = unknown everywhere), and what happened to it."""

    ids: tuple[Tensor, ...] = ()
    gate: bool = False  # it went through a sigmoid or softmax, so as a factor it is a gate
    gated: frozenset[int] = frozenset()  # numbers of the layers in it that a gate multiplied


_UNKNOWN = _Prov()


class _Provenance(fx.Interpreter):
    """Runs a traced network once and carries the provenance of every tensor along."""

    def __init__(self, module: fx.GraphModule, example_shape: tuple[int, ...], nearest: bool, gates: bool) -> None:
        super().__init__(module)
        self.extra_traceback = False  # the failing node is enough; fx would print the whole graph
        self.example_shape, self.nearest, self.gates = example_shape, nearest, gates
        self.prov: dict[fx.Node, Any] = {}
        self.notes: dict[str, None] = {}
        # A module registered under two paths is one layer, named by the path called first.
        self.name_of: dict[int, str] = {}
        self.calls: dict[str, list[fx.Node]] = {}
        for node in module.graph.nodes:
            if node.op == "call_module" and _is_layer(layer := module.get_submodule(node.target)):
                name = self.name_of.setdefault(id(layer), str(node.target))
                self.calls.setdefault(name, []).append(node)
        self.names = list(self.calls)
        self.order = _with_hidden(module, self.name_of)
        channels = {name: _channels(module.get_submodule(name)) for name in self.names}
        self.in_channels = {name: pair[0] for name, pair in channels.items()}
        self.out_channels = {name: pair[1] for name, pair in channels.items()}
        # Ids of layer k are firsts[k] ... firsts[k + 1] - 1.
        self.firsts = [1]
        for name in self.names:
            self.firsts.append(self.firsts[-1] + self.out_channels[name])
        self.bounds = torch.tensor(self.firsts[1:], dtype=torch.int32)
        self.number = {name: k for k, name in enumerate(self.names)}
        self.reached: dict[str, dict[int, list[Tensor]]] = {name: {} for name in self.names}
        self.gated: dict[str, set[int]] = {name: set() for name in self.names}
        self.outputs: frozenset[int] = frozenset()
        self.positions: dict[str, int] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = self.compute(node)
        try:
            self.prov[node] = self.propagate(node, value)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            # A call in a form that no rule foresees costs the parents behind it, not the whole graph.
            self.note(
                f"{node.name}: could not be followed ({type(error).__name__}: {error}); layers behind it have "
                "no parent there"
            )
            self.prov[node] = _unknown(value)
        for dead in self.user_to_last_uses.get(node, ()):
            self.prov.pop(dead, None)
        return value

    def compute(self, node: fx.Node) -> Any:
        """The node's value; an error names the place in the network and the shape of the example."""
        place = node.name
        if node.op == "call_module":
            place, module = str(node.target), self.module.get_submodule(str(node.target))
            operand = node.args[0] if node.args else None
            if _is_layer(module) and isinstance(operand, fx.Node):
                check_channels(place, module, self.env[operand], self.example_shape)
        try:
            return super().run_node(node)
        except Exception as error:
            raise ValueError(
                f"the network cannot take example_input of shape {self.example_shape}: at '{place}': {error}"
            ) from error

    # What the nodes do ------------------------------------------------------------------------------------------

    def propagate(self, node: fx.Node, value: Any) -> Any:
        """Provenance of a node's value: a _Prov for a tensor, the same nesting for tuples, None for the rest."""
        data = isinstance(value, (tuple, list, Mapping)) or (isinstance(value, Tensor) and value.is_floating_point())
        if node.op == "output":
            provs = [prov for n in node.all_input_nodes for prov in _flat(self.prov.get(n))]
            self.outputs = self.layers_in(ids for prov in provs for ids in prov.ids)
        if node.op in ("placeholder", "get_attr", "output") or not data or not _flat(_unknown(value)):
            return _unknown(value)  # sizes, comparisons and positions are no channels
        if node.op == "call_module":
            return self.module_call(node, self.module.get_submodule(str(node.target)), value)
        result = self.function_call(node, _operation(node), value)
        in_place = node.op == "call_method" and str(node.target).endswith("_")
        if in_place or node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
            self.note_views(node)
            self.prov[node.args[0]] = result  # the operand itself has changed for whoever still uses it
        return result

    def note_views(self, node: fx.Node) -> None:
        """Say so where what another layer gives is written into a tensor that also goes by another name (a view)."""
        written = self.env.get(node.args[0])
        if not isinstance(written, Tensor) or len([n for n in node.all_input_nodes if _flat(self.prov.get(n))]) < 2:
            return
        place = written.untyped_storage().data_ptr()
        for other, value in self.env.items():
            named = isinstance(value, Tensor) and other not in node.all_input_nodes
            if named and value.untyped_storage().data_ptr() == place:
                self.note(f"'{node.name}' writes into '{other.name}' through a view: what reads that is not known to")

    def module_call(self, node: fx.Node, module: nn.Module, value: Any) -> Any:
        if _is_layer(module):
            return self.layer_call(node, module, value)
        if isinstance(module, (*_CHAIN_MODULES, *_SOFTMAX_MODULES)):
            return self.unary(node, value, isinstance(module, _GATE_MODULES))
        if isinstance(module, _POOL_MODULES):
            return self.pool(node, value, _spatial(type(module).__name__))
        if isinstance(module, nn.Upsample):
            return self.pool(node, value)
        if isinstance(module, _SHAPE_MODULES):
            return self.shape(node, value)
        if isinstance(module, nn.GLU):
            return self.gated_linear_unit(node, value, module.dim)
        mixes = any(parameter.dim() > 1 for parameter in module.parameters())
        return self.unforeseen(node, value, type(module).__name__, mixes)

    def function_call(self, node: fx.Node, name: str, value: Any) -> Any:
        tensors = self.tensors(node)
        if name in _SHAPE:
            return self.shape(node, value)
        if name in _JOIN or (name in ("max", "min") and len(tensors) > 1):
            return self.join(node, value)
        if name in _MULTIPLY or name in _DIVIDE:
            return self.multiply(node, value, division=name in _DIVIDE)
        if name in _REDUCE:
            return self.reduce(node, value, position=2 if name == "norm" else 1)
        if "pool" in name:
            return self.pool(node, value, _spatial(name))
        if name in _RESIZE:
            return self.pool(node, value)
        if name == "glu":
            return self.gated_linear_unit(node, value, self.argument(node, 1, "dim", -1))
        if name in _UNARY:
            return self.unary(node, value, name in _GATE)
        if name == "scaled_dot_product_attention" and len(tensors) > 2:
            return self.weighted_sum(node, value, tensors[2], -2)
        if name in _PRODUCT and len(tensors) > 1:
            left, right = (self.of(tensor).gate for tensor in tensors[:2])
            if left != right:
                return self.weighted_sum(node, value, tensors[left], -2 if left else -1)
        if name == "einsum" and len(tensors) == 2 and isinstance(node.args[0], str):
            left, right = (self.of(tensor).gate for tensor in tensors)
            if left != right:
                return self.einsum(node, value, tensors, int(left))
        # A weight matrix among the operands, as in F.linear, mixes channels, and so does a product of two maps.
        weights = any(n.op == "get_attr" and self.env[n].dim() > 1 for n in tensors)
        return self.unforeseen(node, value, name, weights or name in (*_PRODUCT, "einsum", "baddbmm"))

    def layer_call(self, node: fx.Node, layer: nn.Module, value: Tensor) -> _Prov:
        """Record what reaches a layer, channel by channel; its output gets ids of its own."""
        name, prov = self.name_of[id(layer)], self.first(node)
        axis = -3 if isinstance(layer, nn.Conv2d) else -1
        for ids in prov.ids:
            columns = _distinct(ids, [dim for dim in range(ids.dim()) if dim != ids.dim() + axis])
            if len(columns) > MAX_MIXED:
                self.note(f"{name}: {len(columns)} channels lie side by side in one input channel; left out")
                continue
            if len(columns) > 1:
                self.note(f"{name}: an input channel has different parents at different positions; all are kept")
            for column in columns:
                column = column.reshape(-1)
                numbers = self.layer_of(column)
                for parent in torch.unique(numbers[column > 0]).tolist():
                    index = torch.where((numbers == parent) & (column > 0), column - self.firsts[parent] + 1, 0)
                    self.reached[name].setdefault(parent, []).append(index)
        self.gated[name] |= prov.gated
        self.positions.setdefault(name, value.numel() // self.out_channels[name])
        fresh = torch.arange(self.out_channels[name], dtype=torch.int32) + self.firsts[self.number[name]]
        return _Prov((fresh.reshape(-1, *[1] * (-axis - 1)).expand(value.shape),))

    def unary(self, node: fx.Node, value: Any, gate: bool) -> _Prov:
        prov = self.first(node)
        return _Prov(_fit(prov.ids, value), gate or prov.gate, prov.gated)

    def shape(self, node: fx.Node, value: Any) -> Any:
        """Apply a shape operation to the ids themselves."""
        operand = node.args[0] if node.args else None
        if node.op == "call_function" and _operation(node) == "getitem" and not isinstance(self.env[operand], Tensor):
            return self.prov[operand][map_arg(node.args[1], lambda n: self.env[n])]
        provs = [prov for n in node.all_input_nodes for prov in _flat(self.prov.get(n)) if prov.ids]
        if not provs:
            return _unknown(value)
        gate, gated = all(prov.gate for prov in provs), frozenset().union(*(prov.gated for prov in provs))
        results = [self.apply(node, k) for k in range(max(len(prov.ids) for prov in provs))]
        return _zip(results, value, lambda ids: _Prov(_unique(map(_compact, ids)), gate, gated))

    def apply(self, node: fx.Node, k: int) -> Any:
        """Run a shape operation on the k-th ids of its operands; 0 stands in where an operand has fewer."""
        args, kwargs = (
            map_arg(a, lambda n: _kth_ids(self.env[n], self.prov.get(n), k)) for a in (node.args, node.kwargs)
        )
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            if isinstance(module, padding._ConstantPadNd):  # whatever it pads with is nobody's channel
                return nn.functional.pad(args[0], module.padding)
            return module(args[0].double()).int()  # reflection and replication have no integer kernels
        name = _operation(node)
        if name in ("cat", "concat", "concatenate"):
            return _cat(*args, **kwargs)
        if name == "pad":
            args, kwargs = args[:3], {key: v for key, v in kwargs.items() if key != "value"}
            return nn.functional.pad(args[0].double(), *args[1:], **kwargs).int()
        if node.op == "call_method":
            # The ids are rarely contiguous, so what may be a view of the values need not be one of theirs.
            method = {"view": "reshape", "view_as": "reshape_as"}.get(str(node.target), str(node.target))
            return getattr(args[0], method)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def join(self, node: fx.Node, value: Tensor) -> _Prov:
        """Addition and its like: the union of what the operands carry."""
        provs = [prov for n in self.tensors(node) if (prov := self.of(n)).ids]
        parts = [self.recent(prov.ids) if self.nearest and len(provs) > 1 else prov.ids for prov in provs]
        ids = _unique(fitted for part in parts for fitted in _fit(part, value))
        return _Prov(ids, gated=frozenset().union(*(prov.gated for prov in provs)))

    def multiply(self, node: fx.Node, value: Tensor, division: bool) -> _Prov:
        """A gate multiplies: what is gated is kept, and the gate dropped unless gates are asked for."""
        tensors = self.tensors(node)
        provs = [self.of(n) for n in tensors]
        if len(tensors) < 2 or not (provs[0].ids and provs[1].ids):
            kept = next((prov for prov in provs if prov.ids), _UNKNOWN)
            by_gate = any(prov.gate for prov in provs if prov is not kept)
            return _Prov(
                _fit(kept.ids, value), kept.gate, kept.gated | (self.layers_in(kept.ids) if by_gate else frozenset())
            )
        sizes, gate = [self.env[n].numel() for n in tensors], None
        if division:
            gate = 1
        elif sizes[0] != sizes[1]:
            gate = int(sizes[1] < sizes[0])  # the factor that is broadcast over the other
        elif provs[0].gate != provs[1].gate:
            gate = int(provs[1].gate)
        if gate is None:
            return self.join(node, value)
        kept, factor = provs[1 - gate], provs[gate]
        ids, gated = _fit(kept.ids, value), kept.gated | self.layers_in(kept.ids)
        if self.gates:
            ids = _unique((*ids, *_fit(factor.ids, value)))
            gated |= factor.gated | self.layers_in(factor.ids)
        return _Prov(ids, kept.gate, gated)

    def gated_linear_unit(self, node: fx.Node, value: Tensor, dim: int) -> _Prov:
        """The first half is gated by the second."""
        prov = self.first(node)
        halves = [ids.chunk(2, dim)[half] for half in range(1 + self.gates) for ids in prov.ids]
        ids = _unique(map(_compact, halves))
        return _Prov(ids, gated=prov.gated | self.layers_in(ids))

    def pool(self, node: fx.Node, value: Any, spatial: int | None = None) -> Any:
        """Pooling and resizing: what a channel holds at any position may reach all its new positions."""
        prov = self.first(node)
        ids: list[Tensor] = []
        for entry in prov.ids:
            channel = 1 if spatial is None else entry.dim() - spatial - 1
            ids += _distinct(entry, range(channel + 1, entry.dim()))
        return _like(value, lambda v: _Prov(_fit(ids, v), prov.gate, prov.gated))

    def reduce(self, node: fx.Node, value: Any, position: int) -> Any:
        """Mean, sum, maximum, ... over some dimensions: the union of the ids along them."""
        prov, rank = self.first(node), self.env[node.all_input_nodes[0]].dim()
        dims = self.argument(node, position, "dim", None)
        if dims is None or isinstance(dims, bool) or dims == ():
            dims = range(rank)
        dims = [dims] if isinstance(dims, int) else list(dims)
        ids = [part for entry in prov.ids for part in _distinct(entry, dims)]
        if len(ids) > MAX_MIXED:
            self.note(
                f"{node.name}: {_operation(node)} over {len(ids)} channels; layers behind it have no parent there"
            )
            return _unknown(value)
        return _like(value, lambda v: _Prov(_unique(_compact(i.reshape(v.shape)) for i in ids), gated=prov.gated))

    def weighted_sum(self, node: fx.Node, value: Tensor, operand: fx.Node, dim: int) -> Any:
        """Attention: a channel of the output is that channel of the values, summed over positions with weights."""
        prov = self.of(operand)
        ids = [part for entry in prov.ids for part in _distinct(entry, [dim])]
        if len(ids) > MAX_MIXED:
            return self.unforeseen(node, value, _operation(node), mixes=True)
        return _Prov(_unique(_fit(ids, value)), gated=prov.gated | self.layers_in(ids))

    def einsum(self, node: fx.Node, value: Tensor, tensors: list[fx.Node], which: int) -> Any:
        """Attention written as einsum: the operand that is no gate, summed over the letters that the result lacks."""
        operands, _, result = node.args[0].replace(" ", "").partition("->")
        letters = operands.split(",")[which]
        if not result or "." in node.args[0] or len(set(letters)) < len(letters):
            return self.unforeseen(node, value, "einsum", mixes=True)
        prov, summed = self.of(tensors[which]), [dim for dim, letter in enumerate(letters) if letter not in result]
        ids = [part for entry in prov.ids for part in _distinct(entry, summed)]
        if len(ids) > MAX_MIXED:
            return self.unforeseen(node, value, "einsum", mixes=True)
        kept = [letter for letter in letters if letter in result]
        order = sorted(range(len(kept)), key=lambda k: result.index(kept[k]))
        ids = [entry.squeeze(tuple(summed)) if summed else entry for entry in ids]
        sizes = [-1 if letter in kept else 1 for letter in result]
        shaped = [entry.permute(order).reshape(_with_ones(entry.permute(order).shape, sizes)) for entry in ids]
        return _Prov(_unique(_fit(shaped, value)), gated=prov.gated | self.layers_in(ids))

    def unforeseen(self, node: fx.Node, value: Any, what: str, mixes: bool) -> Any:
        """An operation without a rule keeps the provenance of its first operand if the shape allows it."""
        prov = self.first(node)
        if not any(part.ids for n in node.all_input_nodes for part in _flat(self.prov.get(n))):
            return _unknown(value)
        if not mixes and prov.ids and isinstance(value, Tensor) and prov.ids[0].shape == value.shape:
            self.note(f"{node.name}: no rule for {what}; taken as keeping its channels")
            return prov
        self.note(f"{node.name}: {what} mixes channels in a way not followed; layers behind it have no parent there")
        return _unknown(value)

    # Small things -----------------------------------------------------------------------------------------------

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a node that are tensors, each once."""
        return [n for n in node.all_input_nodes if isinstance(self.env[n], Tensor)]

    def argument(self, node: fx.Node, position: int, name: str, default: Any) -> Any:
        given = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return map_arg(given, lambda n: self.env[n])

    def of(self, node: fx.Node) -> _Prov:
        prov = self.prov.get(node)
        return prov if isinstance(prov, _Prov) else _UNKNOWN

    def first(self, node: fx.Node) -> _Prov:
        """Provenance of the first tensor operand."""
        return next((self.of(n) for n in self.tensors(node)), _UNKNOWN)

    def layer_of(self, ids: Tensor) -> Tensor:
        """Number of the layer that each id belongs to; layer 0 for the unknown id 0."""
        return torch.bucketize(ids.contiguous(), self.bounds, right=True)

    def layers_in(self, ids: Iterable[Tensor]) -> frozenset[int]:
        known = [core[core > 0] for core in map(_core, ids)]
        return frozenset(torch.unique(self.layer_of(torch.cat(known))).tolist()) if known else frozenset()

    def recent(self, ids: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep, element by element, only the ids of the most recently executed layer."""
        if len(ids) < 2:
            return ids
        numbers = [torch.where((core := _core(entry)) > 0, self.layer_of(core), -1) for entry in ids]
        latest = numbers[0]
        for other in numbers[1:]:
            latest = torch.maximum(latest, other)
        return _unique(
            _compact(torch.where(number == latest, _core(entry), 0).expand(entry.shape))
            for entry, number in zip(ids, numbers, strict=True)
        )

    def note(self, text: str) -> None:
        self.notes.setdefault(text)

    def layer_graph(self, device: torch.device) -> LayerGraph:
        sources: dict[str, tuple[Source, ...]] = {}
        via: dict[tuple[str, str], tuple[str, ...]] = {}
        for name in self.names:
            # Channels that reach a column twice count once, and disjoint columns of one parent make one source.
            rows = {
                parent: torch.stack(_distinct(torch.stack(found), [0])).reshape(-1, self.in_channels[name]) - 1
                for parent, found in sorted(self.reached[name].items())
            }
            layer = self.module.get_submodule(name)
            for parent in rows:
                full = self.out_channels[self.names[parent]]
                via[name, self.names[parent]] = _words(layer, parent, rows, full, parent in self.gated[name])
            sources[name] = tuple(
                Source(self.names[parent], index.long().to(device))
                for parent, indices in rows.items()
                for index in indices
            )
        hidden = [name for name in self.order if name not in sources]
        if hidden:
            self.note(f"used inside a whole module or function, so without parents: {', '.join(hidden)}")
        for name in hidden:
            pair = _channels(self.module.get_submodule(name))
            sources[name], self.positions[name] = (), 0
            self.in_channels[name], self.out_channels[name] = pair
        first_calls = {name: self.calls[name][0] for name in self.names}
        return LayerGraph(
            layers=tuple(self.order),
            parents={name: tuple(dict.fromkeys(source.parent for source in sources[name])) for name in self.order},
            sources=sources,
            via=via,
            module=self.module,
            nodes={name: node.name for name, node in first_calls.items()},
            activation_nodes={name: _chain_end(self.module, node).name for name, node in first_calls.items()},
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            positions=self.positions,
            outputs=tuple(self.names[number] for number in sorted(self.outputs)),
            shared=tuple(name for name in self.names if len(self.calls[name]) > 1),
            notes=tuple(self.notes),
        )


# Ids. They are nearly always constant over positions; kept as repetitions (stride 0) they cost as much as there are
# channels, and the residual stream of a deep network stays cheap.


def _core(ids: Tensor) -> Tensor:
    """The tensor without its repetitions: dimensions of stride 0 cut to size 1."""
    for dim in range(ids.dim()):
        if ids.size(dim) > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids


def _compact(ids: Tensor) -> Tensor:
    """The same values, with every dimension along which they are constant as a repetition."""
    core = _core(ids)
    for dim in range(core.dim()):
        if core.size(dim) > 1 and bool((core == (first := core.narrow(dim, 0, 1))).all()):
            core = first
    return core.expand(ids.shape)


def _fit(ids: Iterable[Tensor], value: Tensor) -> tuple[Tensor, ...]:
    """The ids broadcast to the shape of a value."""
    return tuple(entry if entry.shape == value.shape else entry.expand(value.shape) for entry in ids)


def _with_ones(shape: Iterable[int], sizes: Iterable[int]) -> list[int]:
    """The sizes with each -1 filled from the shape, in order."""
    found = iter(shape)
    return [next(found) if size == -1 else size for size in sizes]


def _distinct(ids: Tensor, dims: Iterable[int]) -> list[Tensor]:
    """The distinct ids along some dimensions, as tensors with those dimensions of size 1; 0 fills up."""
    core, rank = _core(ids), ids.dim()
    dims = sorted(dim % rank for dim in dims)
    small = [1 if dim in dims else size for dim, size in enumerate(ids.shape)]
    if all(core.size(dim) == 1 for dim in dims):
        return [core.expand(small)]
    rows = core.permute(*(dim for dim in range(rank) if dim not in dims), *dims)
    rows = rows.flatten(rank - len(dims)).sort(dim=-1, descending=True).values
    repeated = rows[..., 1:] == rows[..., :-1]
    rows = torch.cat([rows[..., :1], rows[..., 1:].masked_fill(repeated, 0)], dim=-1)
    rows = rows.sort(dim=-1, descending=True).values
    count = max(1, int((rows > 0).sum(-1).max()))
    kept = [1 if dim in dims else core.size(dim) for dim in range(rank)]
    return [rows[..., k].reshape(kept).expand(small) for k in range(count)]


def _unique(ids: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Drop ids that are unknown everywhere or equal to earlier ones."""
    kept: list[tuple[Tensor, Tensor]] = []
    for entry in ids:
        if any(entry is other for other, _ in kept):
            continue
        core = _core(entry)
        if bool((core > 0).any()) and not any(
            core.shape == small.shape and torch.equal(core, small) for _, small in kept
        ):
            kept.append((entry, core))
    return tuple(entry for entry, _ in kept)


def _cat(tensors: Iterable[Tensor], dim: int = 0, axis: int | None = None) -> Tensor:
    """Concatenation that does not write out the repetitions all operands share (dense blocks are made of these)."""
    tensors = list(tensors)
    dim = (dim if axis is None else axis) % tensors[0].dim()
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.size(dim) for tensor in tensors)
    for other in range(len(shape)):
        if other != dim and all(tensor.size(other) == 1 or tensor.stride(other) == 0 for tensor in tensors):
            tensors = [tensor.narrow(other, 0, 1) for tensor in tensors]
    return torch.cat(tensors, dim).expand(shape)


def _kth_ids(value: Any, prov: Any, k: int) -> Any:
    """An operand with its k-th ids in place of its values; what is no data (an index, a size) stays."""
    if isinstance(value, Tensor):
        if isinstance(prov, _Prov) and k < len(prov.ids):
            return prov.ids[k]
        return torch.zeros((), dtype=torch.int32).expand(value.shape) if value.is_floating_point() else value.cpu()
    if isinstance(value, (tuple, list)) and isinstance(prov, tuple):
        return [_kth_ids(part, part_prov, k) for part, part_prov in zip(value, prov, strict=True)]
    return value


# Nested values: chunk gives a tuple of tensors, max over a dimension a pair.


def _like(value: Any, build: Callable[[Tensor], _Prov]) -> Any:
    """The nesting of a value with a provenance for each tensor and None for the rest."""
    if isinstance(value, Tensor):
        return build(value)
    if isinstance(value, Mapping):
        return {key: _like(part, build) for key, part in value.items()}
    return tuple(_like(part, build) for part in value) if isinstance(value, (tuple, list)) else None


def _unknown(value: Any) -> Any:
    return _like(value, lambda _: _UNKNOWN)


def _flat(prov: Any) -> list[_Prov]:
    """All provenances in a nesting."""
    if isinstance(prov, _Prov):
        return [prov]
    parts = prov.values() if isinstance(prov, Mapping) else prov if isinstance(prov, tuple) else ()
    return [leaf for part in parts for leaf in _flat(part)]


def _zip(results: list[Any], value: Any, build: Callable[[list[Tensor]], _Prov]) -> Any:
    """K results of one nesting as one nesting of provenances with K ids each."""
    if isinstance(value, Tensor):
        return build(results)
    return tuple(_zip([result[i] for result in results], part, build) for i, part in enumerate(value))


# A graph whose parents are given: for networks that cannot be traced.


def _told(model: nn.Module, example_input: Tensor, parents: Mapping[str, Sequence[str]]) -> LayerGraph:
    """The layer graph of given parents; order and positions are seen in one run of the model."""
    positions, calls = _seen(model, example_input)
    layers = tuple(positions)
    for name in [*parents, *(parent for given in parents.values() for parent in given)]:
        if name not in layers:
            raise unknown("layer in parents", name, layers)
    channels = {name: _channels(model.get_submodule(name)) for name in layers}
    sources: dict[str, tuple[Source, ...]] = dict.fromkeys(layers, ())
    via: dict[tuple[str, str], tuple[str, ...]] = {}
    for name, given in parents.items():
        layer, indices = model.get_submodule(name), _laid_out(name, channels, model, tuple(given))
        rows = {layers.index(parent): index.unsqueeze(0) for parent, index in indices.items()}
        sources[name] = tuple(Source(parent, index.to(example_input.device)) for parent, index in indices.items())
        for parent in given:
            via[name, parent] = _words(layer, layers.index(parent), rows, channels[parent][1], False)
    fed = {parent for given in parents.values() for parent in given}
    return LayerGraph(
        layers=layers,
        parents={name: tuple(parents.get(name, ())) for name in layers},
        sources=sources,
        via=via,
        module=model,
        nodes={name: name for name in layers},
        activation_nodes={name: name for name in layers},
        in_channels={name: pair[0] for name, pair in channels.items()},
        out_channels={name: pair[1] for name, pair in channels.items()},
        positions=positions,
        outputs=tuple(name for name in layers if name not in fed),
        shared=tuple(name for name in layers if calls[name] > 1),
        notes=("the parents were given, not traced",),
    )


def _seen(model: nn.Module, example_input: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """({layer: positions} in order of execution, {layer: number of calls}) in one run of the model on one image."""
    positions: dict[str, int] = {}
    calls: dict[str, int] = {}

    def note(name: str, channels: int, out: Tensor) -> None:
        positions.setdefault(name, out.numel() // channels)
        calls[name] = calls.get(name, 0) + 1

    handles = [
        module.register_forward_hook(lambda layer, _, out, name=name: note(name, _channels(layer)[1], out))
        for name, module in model.named_modules()
        if _is_layer(module)
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(example_input[:1])
    except (RuntimeError, AssertionError, IndexError) as error:
        shape = tuple(example_input.shape)
        raise ValueError(f"the network cannot take example_input of shape {shape}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return positions, calls


def _laid_out(
    name: str, channels: Mapping[str, tuple[int, int]], model: nn.Module, given: tuple[str, ...]
) -> dict[str, Tensor]:
    """{parent: the channel of it that feeds each input channel of the layer, or -1}, from the widths alone."""
    wanted, widths = channels[name][0], [channels[parent][1] for parent in given]
    linear = isinstance(model.get_submodule(name), nn.Linear)
    if not widths:
        return {}
    if len(set(widths)) == 1 and (wanted == widths[0] or (linear and wanted % widths[0] == 0 and len(widths) == 1)):
        return {parent: torch.arange(wanted) // (wanted // widths[0]) for parent in given}
    total = sum(widths)
    repeat = wanted // total
    if wanted != repeat * total or (repeat != 1 and not linear):
        raise ValueError(
            f"parents of layer '{name}', {', '.join(given)}, have {' and '.join(map(str, widths))} channels; it takes "
            f"{wanted}: that is neither a sum of them nor a concatenation"
        )
    indices, start = {}, 0
    for parent, width in zip(given, widths, strict=True):
        index = torch.full((wanted,), -1)
        index[start : start + width * repeat] = torch.arange(width * repeat) // repeat
        indices[parent], start = index, start + width * repeat
    return indices


# What is read from the finished graph.


def _channels(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _put_back(traced: fx.GraphModule, model: nn.Module) -> None:
    """Where only a layer's weight is used, fx keeps an empty module that holds it: put the layer itself there."""
    for node in traced.graph.nodes:
        path, _, name = str(node.target).removesuffix(".weight").rpartition(".")
        full = f"{path}.{name}".lstrip(".")
        if node.op == "get_attr" and str(node.target).endswith(".weight") and _is_layer(model.get_submodule(full)):
            setattr(traced.get_submodule(path), name, model.get_submodule(full))


def _with_hidden(module: fx.GraphModule, name_of: dict[int, str]) -> list[str]:
    """Names of the layers in order of use: those called, and those whose weights a whole module or function takes."""
    order: dict[str, None] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).endswith(".weight"):
            used = [str(node.target).removesuffix(".weight")]
        elif node.op == "call_module":
            whole = module.get_submodule(str(node.target))
            used = [f"{node.target}.{name}".rstrip(".") for name, _ in whole.named_modules()]
        else:
            continue
        for name in used:
            if _is_layer(layer := module.get_submodule(name)):
                order.setdefault(name_of.setdefault(id(layer), name))
    return list(order)


def _spatial(name: str) -> int:
    """Spatial dimensions of a pooling by its name: 2 for max_pool2d and AdaptiveAvgPool2d."""
    return next((int(character) for character in name if character in "123"), 2)


def _words(layer: nn.Module, parent: int, rows: Mapping[int, Tensor], full: int, gated: bool) -> tuple[str, ...]:
    """What lies between a parent and a layer, read from the columns that the parents fill."""
    own = rows[parent]
    columns = (own >= 0).any(0)
    index = own[0][own[0] >= 0]
    channels = torch.unique(own[own >= 0]).numel()
    repeated = index.numel() > torch.unique(index).numel()
    words = {
        "sum": len(own) > 1 or any(bool(((other >= 0) & columns).any()) for k, other in rows.items() if k != parent),
        "concat": not bool(columns.all()),
        "split": channels < full,
        "flatten": repeated and isinstance(layer, nn.Linear),
        "repeat": repeated and not isinstance(layer, nn.Linear),
        "shuffle": not repeated and bool((index[1:] < index[:-1]).any()),
        "gate": gated,
        "depthwise": _kind(layer).endswith("depthwise"),
        "grouped": "groups" in _kind(layer),
    }
    return tuple(word for word, holds in words.items() if holds)


def _chain_end(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The last node of the chain of normalisations, activations and dropouts that hangs on this node alone."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "call_module":
            chained = isinstance(module.get_submodule(str(user.target)), _CHAIN_MODULES)
        else:
            chained = user.op in ("call_function", "call_method") and _operation(user) in _NORM_OR_ACTIVATION
        if not chained or not user.args or user.args[0] is not node:
            return node
        node = user
    return node


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    kernel = "conv " + "x".join(map(str, layer.kernel_size))
    if layer.groups == 1:
        return kernel
    return f"{kernel} depthwise" if layer.groups == layer.in_channels else f"{kernel} groups {layer.groups}"


def _table(graph: LayerGraph) -> str:
    """The layer graph as an aligned table, one layer a line."""
    rows = [("layer", "kind", "channels", "positions", "parents")]
    for name in graph.layers:
        shape = f"{graph.in_channels[name]} -> {graph.out_channels[name]}"
        kind = _kind(graph.module.get_submodule(name))
        rows.append((name, kind, shape, str(graph.positions[name]), _parents_in_words(graph, name)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:>{widths[2]}}  {count:>{widths[3]}}  {parents}"
        for name, kind, shape, count, parents in rows
    ]
    if graph.shared:
        lines.append(f"called more than once: {', '.join(graph.shared)}")
    return "\n".join([*lines, *(f"note: {note}" for note in graph.notes)])


def _parents_in_words(graph: LayerGraph, name: str, most: int = 3) -> str:
    """The parents of a layer, latest first, those reached in the same way together, long lists cut."""
    if not graph.parents[name]:
        return "none, pruned directly"
    groups: dict[tuple[str, ...], list[str]] = {}
    for parent in reversed(graph.parents[name]):
        groups.setdefault(graph.via[name, parent], []).append(parent)
    parts = []
    for words, names in groups.items():
        # Cutting one name would only put words in its place.
        shown = names if len(names) <= most + 1 else [*names[:most], f"{len(names) - most} more"]
        parts.append(", ".join(shown) + (f"  ({', '.join(words)})" if words else ""))
    return "; ".join(parts)
