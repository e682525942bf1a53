"""Filters that masks left without any connection: silenced, and removed from the network.

A filter without incoming weights still sends a constant on, through BatchNorm's shift. `silenced` adds that shift and
all weights that read the filter to the masks; after fine-tuning with them held, `remove_filters` gives a smaller dense
network of the same outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gcnet.graph import LayerGraph
from gcnet.pruning import Masks, weight_name

# What lies between layers and keeps a zero channel zero (a user's module of another kind stops the silencing).
_KEEP_ZERO = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.ELU, nn.Identity, nn.Dropout,
              nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
              nn.ZeroPad2d)  # fmt: skip
_KEEP_ZERO_NAMES = ("relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "tanh", "dropout", "max_pool2d",
                    "avg_pool2d", "adaptive_avg_pool2d", "flatten", "add", "iadd", "mean", "contiguous",
                    "cat")  # fmt: skip


def _behind(graph: LayerGraph, layer: str) -> tuple[list[str], bool]:
    """Names of the BatchNorm modules right behind a layer, and whether a filter that these zero stays zero up to the
    next layers and does not reach the network's output."""
    module = graph.module
    if layer not in graph.nodes or not isinstance(module, fx.GraphModule):
        return [], False  # a projection of attention, a graph that was told: what lies behind is not known
    nodes = {node.name: node for node in module.graph.nodes}
    start, norms = nodes[graph.nodes[layer]], []
    node = start
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_module" or not isinstance(module.get_submodule(str(user.target)), _BatchNorm):
            break
        norms.append(str(user.target))
        node = user
    waiting, seen = [node], set()
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "call_module":
                passed = module.get_submodule(str(user.target))
                if isinstance(passed, (nn.Conv2d, nn.Linear)):
                    continue
                fine = isinstance(passed, _KEEP_ZERO)
            else:
                name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
                fine = user.op != "output" and name.strip("_") in _KEEP_ZERO_NAMES
                if name.strip("_") in ("add", "iadd"):  # the sum with a number or a parameter is not 0
                    fine &= len(user.all_input_nodes) == 2 and all(n.op != "get_attr" for n in user.all_input_nodes)
            if not fine:
                return norms, False
            waiting.append(user)
    affine = all(module.get_submodule(name).affine for name in norms)
    return norms, affine and layer not in graph.shared


def _readers(graph: LayerGraph) -> dict[str, list[tuple[str, Tensor]]]:
    """{layer: (reading layer, (C_in,) channel it reads at each input column or -1)}."""
    found: dict[str, list[tuple[str, Tensor]]] = {layer: [] for layer in graph.layers}
    for layer in graph.layers:
        for source in graph.sources[layer]:
            found[source.parent].append((layer, source.index.cpu()))
    return found


def _by_column(mask: Tensor, groups: int) -> Tensor:
    """(C_in,) whether any weight at an input column is kept."""
    rows = mask.flatten(2).any(2) if mask.ndim > 2 else mask
    return rows.view(groups, -1, rows.shape[1]).any(1).flatten()


def silenced(model: nn.Module, graph: LayerGraph, masks: Mapping[str, Tensor]) -> Masks:
    """The masks, with all that filters without connections still leave behind.

    A filter that lost every incoming weight also loses its bias and BatchNorm scale and shift, and every weight that
    reads it; one that nothing reads any more loses its incoming weights. Both go on through the network. Filters of
    the output, and those behind which a module does not keep zero (layer norm, sigmoid, ...), only lose weights.
    The masks then hold parameters other than weights too; True = kept. Choice.
    """
    result = Masks({name: mask.cpu().clone() for name, mask in masks.items()})
    readers = _readers(graph)
    sound = {layer: _behind(graph, layer) for layer in graph.layers}
    alive: dict[str, Tensor] = {}
    for layer in graph.layers:
        module, mask = model.get_submodule(layer), result[weight_name(layer)]
        if graph.sources[layer]:
            rows = torch.stack([source.index.cpu() for source in graph.sources[layer]])
            read = torch.stack([
                (source.index.cpu() >= 0) & alive[source.parent][source.index.cpu().clamp_min(0)]
                for source in graph.sources[layer]
            ])  # fmt: skip
            column = read.any(0) | (rows < 0).all(0)
            groups = getattr(module, "groups", 1)
            per_row = column.view(groups, -1).repeat_interleave(len(mask) // groups, 0)
            mask &= per_row.view(*per_row.shape, *[1] * (mask.ndim - 2))
        alive[layer] = mask.flatten(1).any(1) if sound[layer][1] else torch.ones(len(mask), dtype=torch.bool)
    for layer in reversed(graph.layers):
        mask = result[weight_name(layer)]
        norms, fine = sound[layer]
        if not fine:
            continue
        if readers[layer]:
            used = torch.zeros(len(mask), dtype=torch.bool)
            for reader, index in readers[layer]:
                column = _by_column(result[weight_name(reader)], getattr(model.get_submodule(reader), "groups", 1))
                used[index[(index >= 0) & column]] = True
            mask &= used.view(-1, *[1] * (mask.ndim - 1))
        kept = mask.flatten(1).any(1)
        if not bool(kept.all()):
            if model.get_submodule(layer).bias is not None:
                result[f"{layer}.bias"] = kept
            for norm in norms:
                result[f"{norm}.weight"] = result[f"{norm}.bias"] = kept
    return result


def dead_filters(masks: Mapping[str, Tensor], graph: LayerGraph) -> dict[str, Tensor]:
    """{layer: (C_out,) bool}: filters without any incoming weight."""
    return {layer: ~masks[weight_name(layer)].flatten(1).any(1).cpu() for layer in graph.layers}


def _silent(model: nn.Module, graph: LayerGraph, layer: str) -> Tensor:
    """(C_out,) bool: filters whose output is 0 without weights: the shift of BatchNorm (or the layer) is 0."""
    norms = [model.get_submodule(name) for name in _behind(graph, layer)[0]]
    silent = torch.ones(graph.out_channels[layer], dtype=torch.bool)
    for module in norms[-1:] or [model.get_submodule(layer)]:
        if module.bias is not None:
            silent &= (module.bias == 0).cpu()
        if norms:
            silent &= (module.weight == 0).cpu() if module.affine else torch.zeros_like(silent)
    return silent


def removable_filters(model: nn.Module, graph: LayerGraph, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer: (C_out,) bool}: dead filters that can go: those that send nothing on, as after `silenced`.

    Channels that meet in a sum, or pass a depthwise convolution, go together or stay; those around other grouped
    convolutions and those of the output stay.
    """
    dead = {layer: gone & _silent(model, graph, layer) for layer, gone in dead_filters(masks, graph).items()}
    first, total = {}, 0
    for layer in graph.layers:
        first[layer] = total
        total += graph.out_channels[layer]
    together = list(range(total))

    def root(k: int) -> int:
        while together[k] != k:
            together[k] = together[together[k]]
            k = together[k]
        return k

    stays = torch.zeros(total, dtype=torch.bool)
    for layer in graph.layers:
        module, sound = model.get_submodule(layer), _behind(graph, layer)[1]
        groups = getattr(module, "groups", 1)
        depthwise = groups > 1 and groups == module.in_channels == module.out_channels
        own = slice(first[layer], first[layer] + graph.out_channels[layer])
        if not sound or layer in graph.shared or (groups > 1 and not depthwise):
            stays[own] = True
        meeting: dict[int, int] = {}
        for source in graph.sources[layer]:
            for column, channel in enumerate(source.index.tolist()):
                if channel < 0:
                    continue
                k = first[source.parent] + channel
                if layer in graph.shared or (groups > 1 and not depthwise):
                    stays[k] = True
                other = meeting.setdefault(column, first[layer] + column if depthwise else k)
                together[root(k)] = root(other)
    whole = {}
    for layer in graph.layers:
        for channel in range(graph.out_channels[layer]):
            k = first[layer] + channel
            goes = bool(dead[layer][channel]) and not bool(stays[k])
            whole[root(k)] = whole.get(root(k), True) and goes
    return {
        layer: torch.tensor([whole[root(first[layer] + c)] for c in range(graph.out_channels[layer])])
        for layer in graph.layers
    }


@torch.no_grad()
def remove_filters(model: nn.Module, graph: LayerGraph, masks: Mapping[str, Tensor]) -> nn.Module:
    """A smaller copy of a network (with its masks applied) without the filters that can go; the same outputs.

    masks: as `silenced` gives them. A layer keeps at least one filter. Raises ValueError where the masks are not
    held by the network: its outputs would change.
    """
    smaller = copy.deepcopy(model)
    goes = removable_filters(model, graph, masks)
    kept = {layer: ~gone for layer, gone in goes.items()}
    empty = [layer for layer, keep in kept.items() if not bool(keep.any())]
    if empty:
        raise ValueError(f"layer '{empty[0]}' would keep no filter: the network is cut there")
    for name, mask in masks.items():
        if bool((model.get_parameter(name)[~mask.to(model.get_parameter(name).device)] != 0).any()):
            raise ValueError(f"'{name}' is not 0 where its mask is: apply the masks first, and hold them in training")
    for layer in graph.layers:
        module = smaller.get_submodule(layer)
        rows = kept[layer].to(module.weight.device)
        columns = torch.ones(graph.in_channels[layer], dtype=torch.bool, device=rows.device)
        for source in graph.sources[layer]:
            gone = (source.index >= 0).cpu() & goes[source.parent][source.index.cpu().clamp_min(0)]
            columns &= ~gone.to(rows.device)
        depthwise = getattr(module, "groups", 1) > 1
        weight = module.weight[rows] if depthwise else module.weight[rows][:, columns]
        module.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias[rows].clone())
        if isinstance(module, nn.Conv2d):
            module.in_channels, module.out_channels = int(columns.sum()), int(rows.sum())
            module.groups = module.in_channels if depthwise and module.groups == len(columns) else module.groups
        else:
            module.in_features, module.out_features = int(columns.sum()), int(rows.sum())
        for name in _behind(graph, layer)[0]:
            _shrink_norm(smaller.get_submodule(name), rows)
    return smaller


def _shrink_norm(norm: nn.Module, rows: Tensor) -> None:
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            setattr(norm, name, nn.Parameter(getattr(norm, name)[rows].clone()))
    for name in ("running_mean", "running_var"):
        if getattr(norm, name) is not None:
            setattr(norm, name, getattr(norm, name)[rows].clone())
    norm.num_features = int(rows.sum())
