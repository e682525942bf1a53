"""Structured pruning: whole filters go, and what is left is an ordinary, smaller network that runs faster.

Filters that must go together (a residual sum couples layers) are found and removed by torch-pruning's dependency graph
(extra `structured`); which of them go is decided here, by the ghost, by weights, or by any torch-pruning importance.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gcnet import cost
from gcnet.connectivity import connectivity as measure_connectivity
from gcnet.errors import unknown
from gcnet.graph import LayerGraph, layer_graph
from gcnet.hybrid import Role, mixing_exponent, split
from gcnet.interop import check_plain
from gcnet.pruning import Masks, weight_name
from gcnet.snacs import LayerPair, connection_scores
from gcnet.store import write_json

RANKINGS = ("layer", "global")
# How far the smaller network's outputs may be from the masked one's, relative to the largest output (at least 1).
SAME = 1e-5

# {module: {"out": kept output channels, "in": kept input channels}}; normalisation layers have "out" alone.
Channels = dict[str, dict[str, list[int]]]


def torch_pruning() -> ModuleType:
    """The package torch_pruning. Raises ImportError that says how to install it."""
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise ImportError("structured pruning needs torch-pruning: pip install -e '.[structured]'") from error
    return tp


# --- which filters matter -------------------------------------------------------------------------------------------


def _column_means(matrix: Tensor, layer: nn.Module) -> Tensor:
    """(C_out, C_in per group) -> (C_in,): mean strength with which each input channel is used."""
    groups = getattr(layer, "groups", 1)
    return matrix.abs().view(groups, -1, matrix.shape[1]).mean(1).flatten()


def ghost_filter_scores(model: nn.Module, graph: LayerGraph, connectivity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer: (C_out,)}: mean |connectivity| over a filter's row and over its columns in the layers it feeds.

    The mean of the two; of the one there is for the first layers (no row) and the last (no column). Any matrices of
    the shape of connectivity will do, pairwise scores of another method too. Choice (structured variant).
    """
    rows = {layer: matrix.abs().mean(1).double() for layer, matrix in connectivity.items()}
    total = {layer: torch.zeros(graph.out_channels[layer], dtype=torch.float64) for layer in graph.layers}
    count = {layer: torch.zeros_like(values) for layer, values in total.items()}
    for child, matrix in connectivity.items():
        columns = _column_means(matrix, model.get_submodule(child)).double().cpu()
        for source in graph.sources[child]:
            index = source.index.cpu()
            total[source.parent].index_add_(0, index[index >= 0], columns[index >= 0])
            count[source.parent].index_add_(0, index[index >= 0], torch.ones_like(columns[index >= 0]))
    scores = {}
    for layer in graph.layers:
        parts = [rows[layer].cpu()] if layer in rows else []
        if bool((count[layer] > 0).any()):
            parts.append(total[layer] / count[layer].clamp_min(1))
        if parts:
            scores[layer] = torch.stack(parts).mean(0)
    return scores


def snacs_filter_scores(
    model: nn.Module,
    graph: LayerGraph,
    pairs: Sequence[LayerPair],
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """{layer: (C_out,)}: SNACS's block scores as filter scores, for `structured_prune(..., scores=...)`.

    pairs: from `gcnet.snacs.layer_pairs`. scores: {layer: (child groups, parent groups)}, measured on the pairs if not
    given. Every connection gets its block's score; then as in `ghost_filter_scores`. Choice (SNACS prunes blocks).
    Raises ValueError when blocks do not fit their layer.
    """
    scores = connection_scores(model, pairs) if scores is None else scores
    matrices = {}
    for pair in pairs:
        blocks = scores.get(pair.layer)
        if blocks is None or tuple(blocks.shape) != pair.groups:
            found = "none" if blocks is None else tuple(blocks.shape)
            raise ValueError(f"block scores of layer '{pair.layer}' are {found}; its groups are {pair.groups}")
        matrices[pair.layer] = pair.matrix(blocks)
    return ghost_filter_scores(model, graph, matrices)


def weight_filter_scores(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """{layer: (C_out,)}: mean |weight| of each filter. Source: L1 norm of filters, arXiv 1608.08710."""
    weights = {layer: model.get_submodule(layer).weight.detach() for layer in layers}
    return {layer: weight.abs().flatten(1).mean(1).double().cpu() for layer, weight in weights.items()}


def filter_scores(
    model: nn.Module,
    graph: LayerGraph,
    connectivity: Mapping[str, Tensor] | None = None,
    *,
    hybrid: str | Sequence[str] = "B25",
) -> tuple[dict[str, Tensor], dict[str, Role]]:
    """({layer: (C_out,) scores of mean 1}, role of each layer): guided layers by the ghost, the others by |weight|.

    Raises ValueError when a guided layer has no connectivity, and for "Mix<percent>".
    Source: GC-Net's hybrids, for filters (choice).
    """
    if mixing_exponent(hybrid) is not None:
        raise ValueError(
            f"hybrid '{hybrid}' ranks single weights; filters are scored by a hybrid such as B25 or direct"
        )
    plan = split(graph, hybrid)
    ghost = ghost_filter_scores(model, graph, connectivity or {})
    missing = [layer for layer, role in plan.items() if role == "guided" and layer not in ghost]
    if missing:
        raise ValueError(f"no connectivity is given for the guided layers {missing}")
    direct = weight_filter_scores(model, graph.layers)
    scores = {layer: ghost[layer] if role == "guided" else direct[layer] for layer, role in plan.items()}
    return _of_mean_one(scores), plan


def _of_mean_one(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise FloatingPointError(
                f"'{weight_name(name)}': weights or filter scores are not finite (NaN or infinity)"
            )
    return {layer: score / score.mean() if score.mean() > 0 else score for layer, score in scores.items()}


def _given_scores(
    model: nn.Module, graph: LayerGraph, given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Role]]:
    """As `filter_scores`, of scores that are there: a layer without any is scored by |weight|."""
    for layer, score in given.items():
        if layer not in graph.layers:
            raise unknown("layer", layer, graph.layers)
        if tuple(score.shape) != (graph.out_channels[layer],):
            raise ValueError(f"scores of layer '{layer}' are {tuple(score.shape)}; it has {graph.out_channels[layer]}")
    scores = weight_filter_scores(model, graph.layers) | {k: v.detach().double().cpu() for k, v in given.items()}
    return _of_mean_one(scores), {layer: "guided" if layer in given else "direct" for layer in graph.layers}


class GhostImportance:
    """Filter scores as an importance for torch-pruning's own pruners: `tp.pruner.BasePruner(..., importance=this)`.

    scores: {layer: (C_out,)} as `filter_scores` gives them. The score of coupled filters is the mean over their layers.
    One pruning step only: after it the channels have other numbers, which is an error and not a wrong answer.
    """

    def __init__(self, model: nn.Module, scores: Mapping[str, Tensor]) -> None:
        torch_pruning()
        self.scores = {model.get_submodule(layer): (layer, score) for layer, score in scores.items()}

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor:
        total: Tensor | None = None
        for item in group:
            module, roots = item.dep.target.module, item.root_idxs
            if module not in self.scores or not _is_out(item.dep):
                continue
            layer, score = self.scores[module]
            if len(score) != _width(module):
                raise ValueError(
                    f"layer '{layer}' has {_width(module)} filters and {len(score)} scores: it was pruned after it was "
                    "scored. Score it again for every step (iterative_steps=1)"
                )
            if total is None:
                size = max(max(other.root_idxs) for other in group if other.root_idxs) + 1
                total, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
            total.index_add_(0, torch.tensor(roots), score[torch.tensor(item.idxs)].double())
            count.index_add_(0, torch.tensor(roots), torch.ones(len(roots), dtype=torch.float64))
        if total is None:
            names = [item.dep.target.name for item in group]
            raise ValueError(f"none of {names} has scores: GhostImportance was made for another model")
        return (total / count.clamp_min(1)).float()


def _is_out(dependency: Any) -> bool:
    """Whether a dependency removes output channels of a convolution or Linear layer."""
    tp = torch_pruning()
    return dependency.handler in (
        tp.prune_conv_out_channels,
        tp.prune_depthwise_conv_out_channels,
        tp.prune_linear_out_channels,
    )


def _width(module: nn.Module) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


# --- which filters go together --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """What one module loses with a group's root channels: channels[k] of its side goes with root channel roots[k]."""

    layer: str
    side: str
    channels: Tensor
    roots: Tensor


@dataclass(frozen=True)
class _Group:
    """Filters that go together, as torch-pruning found them; ways: grouped convolutions lose the same in each group."""

    root: str
    tp_group: Any
    size: int
    ways: int
    members: tuple[_Member, ...]


_SIZED = (nn.Conv2d, nn.Linear, _BatchNorm, nn.PReLU)


def _groups(
    scratch: nn.Module, example: Tensor, graph: LayerGraph, freeze: Iterable[str]
) -> tuple[Any, list[_Group], dict[str, str]]:
    """(torch-pruning's graph, groups of filters that may go, {layer: why its filters stay})."""
    tp = torch_pruning()
    name_of = {module: name for name, module in scratch.named_modules()}
    frozen = dict.fromkeys(graph.outputs or _unused(graph), "it is the network's output")
    frozen |= dict.fromkeys(graph.shared, "it is called more than once")
    for name in freeze:
        if name not in graph.layers:
            raise unknown("layer", name, graph.layers)
        frozen[name] = "asked for"
    _check_followed(graph)
    try:
        with torch.enable_grad():
            dependencies = tp.DependencyGraph().build_dependency(scratch, example_inputs=example, verbose=False)
    except Exception as error:  # whatever it raises where it meets an operation in a form it does not know
        name = type(scratch).__name__
        raise ValueError(
            f"torch-pruning cannot follow {name} ({type(error).__name__}: {error}), so its filters cannot be removed; "
            "masks (gcnet.ghost_prune) still work"
        ) from error
    found = []
    for group in dependencies.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        root = name_of[group[0].dep.target.module]
        layers = [name_of[item.dep.target.module] for item in group if _is_out(item.dep)]
        why = next(
            (frozen[layer] for layer in [*layers, *_shared_inputs(group, name_of, graph)] if layer in frozen), ""
        )
        members, ways, odd = _members(group, name_of)
        why = why or odd or _misled(members, graph) or _reaches_through(scratch, example, members)
        if why:
            frozen |= {layer: why for layer in layers if layer not in frozen}
        else:
            found.append(_Group(root, group, len(group[0].idxs), ways, members))
    return dependencies, found, frozen


def _check_followed(graph: LayerGraph) -> None:
    """Raise ValueError for attention written as a function: following it takes torch-pruning forever."""
    hidden = [layer for layer in graph.layers if layer not in graph.nodes]
    module = graph.module
    functional = [
        str(node.target).removesuffix(".weight")
        for node in (module.graph.nodes if isinstance(module, fx.GraphModule) else ())
        if node.op == "get_attr" and str(node.target).removesuffix(".weight") in hidden
    ]
    if functional:
        raise ValueError(
            f"filters cannot be followed through the function that uses the weights of {functional[0]} and "
            f"{len(functional) - 1} more without calling them; masks (gcnet.ghost_prune) still work"
        )


def _unused(graph: LayerGraph) -> list[str]:
    """Layers that nothing follows, as far as the graph can see: the outputs of a network that it could not follow."""
    fed = {parent for parents in graph.parents.values() for parent in parents}
    return [layer for layer in graph.layers if layer not in fed]


def _shared_inputs(group: Any, name_of: Mapping[nn.Module, str], graph: LayerGraph) -> list[str]:
    layers = [name_of.get(item.dep.target.module, "") for item in group]
    return [layer for layer in layers if layer in graph.shared]


def _members(group: Any, name_of: Mapping[nn.Module, str]) -> tuple[tuple[_Member, ...], int, str]:
    """(members, ways, why the group cannot be pruned)."""
    members, ways = [], 1
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return (), 1, "a parameter outside of any layer has its channels"
        if module not in name_of:
            continue  # an operation, not a module: nothing to resize
        if not isinstance(module, _SIZED):
            if not list(module.parameters(recurse=False)) and not list(module.children()):
                continue
            return (), 1, f"{type(module).__name__} '{name_of[module]}' mixes or counts its channels"
        if any(root is None for root in item.root_idxs):
            return (), 1, f"the channels of '{name_of[module]}' could not be followed"
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels != module.out_channels:
            return (), 1, f"'{name_of[module]}' makes several filters of each channel"
        side = "in" if isinstance(module, (nn.Conv2d, nn.Linear)) and not _is_out(item.dep) else "out"
        if isinstance(module, nn.Conv2d) and 1 < module.groups != module.out_channels:
            ways = max(ways, module.groups)
        members.append(_Member(name_of[module], side, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
    size = len(group[0].idxs)
    return tuple(members), ways, "" if size % ways == 0 else f"its {size} filters do not divide by {ways} groups"


def _misled(members: Sequence[_Member], graph: LayerGraph) -> str:
    """Where torch-pruning maps filters to other input channels than the (proved) layer graph does; "" if nowhere."""
    pairs = {m.layer: zip(m.channels.tolist(), m.roots.tolist(), strict=True) for m in members if m.side == "in"}
    of_input = {layer: set(found) for layer, found in pairs.items()}
    for parent in (member for member in members if member.side == "out"):
        root_of = dict(zip(parent.channels.tolist(), parent.roots.tolist(), strict=True))
        for layer, found in of_input.items():
            for source in graph.sources.get(layer, ()):
                if source.parent == parent.layer:
                    told = {(k, root_of[c]) for k, c in enumerate(source.index.tolist()) if c in root_of}
                    if not told <= found:
                        return f"torch-pruning misses some of the input channels of '{layer}' that it feeds"
    return ""


@torch.no_grad()
def _reaches_through(model: nn.Module, example: Tensor, members: Sequence[_Member]) -> str:
    """Why removing filters of a group would not be the same as setting them to 0; "" if it would be.

    Half of the filters are set to 0 and the network is run: what the next layers then receive must be exactly 0.
    """
    gone = {member: member.channels[member.roots % 2 == 1] for member in members}
    saved, seen, handles = [], [], []
    for member in members:
        module = model.get_submodule(member.layer)
        if member.side == "out":
            for parameter in module.parameters(recurse=False):
                saved.append((parameter, parameter.detach().clone()))
                parameter.data[gone[member]] = 0
        else:

            def look(_: nn.Module, args: tuple[Tensor, ...], member: _Member = member) -> None:
                channels = args[0].movedim(1 if isinstance(_, nn.Conv2d) else -1, 0)[gone[member].to(args[0].device)]
                seen.append((member.layer, bool((channels == 0).all())))

            handles.append(module.register_forward_pre_hook(look))
    try:
        with cost.evaluation_mode(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in saved:
            parameter.data.copy_(value)
    leaky = next((layer for layer, silent in seen if not silent), "")
    return f"what is 0 behind it does not reach '{leaky}' as 0" if leaky else ""


# --- how many go ----------------------------------------------------------------------------------------------------


def _kept_count(units: int, ways: int, removed: float, round_to: int) -> int:
    """Units (a filter, or one of each group of a grouped convolution) that are kept, a multiple of round_to filters."""
    step = max(1, round_to // ways)
    if units <= step:
        return units
    return min(units, max(step, round(units * (1 - removed) / step) * step))


def _choose(groups: list[_Group], scores: list[Tensor], removed: float, ranking: str, round_to: int) -> list[Tensor]:
    """For every group a bool tensor over its root channels, True = kept, at a share of filters removed."""
    if ranking == "layer":
        shares = [removed] * len(groups)
    else:
        # One ranking of all filters, each group's scores on a mean of 1; a tenth of every group stays (choice).
        flat = torch.cat([score / score.mean() if score.mean() > 0 else score for score in scores])
        order = torch.zeros(len(flat), dtype=torch.bool)
        order[flat.argsort(stable=True)[: round(removed * len(flat))]] = True
        parts = order.split([len(score) for score in scores])
        shares = [min(0.9, float(part.double().mean())) for part in parts]
    kept = []
    for group, score, share in zip(groups, scores, shares, strict=True):
        count = _kept_count(len(score), group.ways, share, round_to)
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[score.argsort(descending=True, stable=True)[:count]] = True
        kept.append(mask.repeat(group.ways))
    return kept


def _kept_channels(model: nn.Module, groups: list[_Group], kept: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module: {"out" / "in": bool tensor, True = kept}} of the modules that the groups reach."""
    sides: dict[str, dict[str, Tensor]] = {}
    for group, mask in zip(groups, kept, strict=True):
        for member in group.members:
            module = model.get_submodule(member.layer)
            of_module = sides.setdefault(member.layer, _full(module))
            of_module[member.side][member.channels] &= mask[member.roots]
    return sides


def _full(module: nn.Module) -> dict[str, Tensor]:
    sizes = {"out": module.num_features if isinstance(module, _BatchNorm) else len(module.weight)}
    if isinstance(module, nn.Conv2d) and not _is_depthwise(module):
        sizes["in"] = module.in_channels
    elif isinstance(module, nn.Linear):
        sizes["in"] = module.in_features
    return {side: torch.ones(size, dtype=torch.bool) for side, size in sizes.items()}


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels


def _macs_left(model: nn.Module, dense: Mapping[str, int], sides: Mapping[str, dict[str, Tensor]]) -> float:
    left = 0.0
    for layer, count in dense.items():
        share = 1.0
        if layer in sides:
            for mask in sides[layer].values():
                share *= float(mask.double().mean())
        left += count * share
    return left


def _cut_to(
    choose: Callable[[float], list[Tensor]], left: Callable[[list[Tensor]], float], target: float
) -> list[Tensor]:
    """What to keep of every group so that at most the target share of MACs is left, and hardly less.

    The share of filters removed is bisected; where rounding then lets many groups drop at once, groups get their last
    step back, the latest first, as long as the target allows it.
    """
    low, high = 0.0, 1.0
    if left(choose(low)) <= target:
        return choose(low)
    if left(choose(high)) > target:
        raise ValueError(
            f"macs={target:.3g} of the dense network's cannot be reached, the least is {left(choose(high)):.3g}: "
            "filters stay at the output and where they cannot be removed, and groups no wider than round_to stay whole"
        )
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if left(choose(middle)) <= target else (middle, high)
    kept, fuller = choose(high), choose(low)
    for number in reversed(range(len(kept))):
        if int(fuller[number].sum()) > int(kept[number].sum()):
            trial = [*kept[:number], fuller[number], *kept[number + 1 :]]
            kept = trial if left(trial) <= target else kept
    return kept


# --- masks, removal, files ------------------------------------------------------------------------------------------


def structured_masks(model: nn.Module, channels: Mapping[str, Mapping[str, Sequence[int]]]) -> Masks:
    """The removed filters as masks over the dense network's parameters: rows, columns, biases, normalisation."""
    masks = Masks()
    for name, sides in channels.items():
        module = model.get_submodule(name)
        rows, columns = _bool(sides["out"], _full(module)["out"]), None
        if "in" in sides:
            columns = _bool(sides["in"], _full(module)["in"]).view(getattr(module, "groups", 1), -1)[0]
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            mask = rows.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape).clone()
            if columns is not None and parameter.ndim > 1:
                mask &= columns.view(1, -1, *[1] * (parameter.ndim - 2))
            masks[key] = mask
    return masks


def _bool(kept: Sequence[int], like: Tensor) -> Tensor:
    mask = torch.zeros_like(like)
    mask[torch.as_tensor(kept, dtype=torch.int64)] = True
    return mask


@torch.no_grad()
def resize(model: nn.Module, channels: Mapping[str, Mapping[str, Sequence[int]]]) -> nn.Module:
    """Keep only the given channels of a dense network, in place; needs no torch-pruning.

    Raises ValueError when a module is not there or too small: channels of another network.
    """
    modules = dict(model.named_modules())
    for name, sides in channels.items():
        if name not in modules:
            raise unknown("module", name, modules)
        module, full = modules[name], _full(modules[name])
        for side, kept in sides.items():
            if side not in full or (kept and max(kept) >= len(full[side])) or not kept:
                raise ValueError(f"channels of '{name}' do not fit this network: {side}put of {type(module).__name__}")
        _resize_module(module, {side: torch.as_tensor(kept) for side, kept in sides.items()})
    return model


def _resize_module(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    rows, columns = kept["out"], None
    if isinstance(module, nn.Conv2d):
        if _is_depthwise(module):
            module.groups = module.in_channels = len(rows)
        else:
            columns = kept["in"][kept["in"] < module.in_channels // module.groups]
            module.in_channels = len(kept["in"])
        module.out_channels = len(rows)
    elif isinstance(module, nn.Linear):
        columns = kept["in"]
        module.out_features, module.in_features = len(rows), len(columns)
    elif isinstance(module, _BatchNorm):
        module.num_features = len(rows)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(rows)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim:
            smaller = tensor.detach()[rows.to(tensor.device)]
            if columns is not None and tensor.ndim > 1:
                smaller = smaller[:, columns.to(tensor.device)]
            smaller = smaller.clone(memory_format=torch.contiguous_format)
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, nn.Parameter(smaller, requires_grad=tensor.requires_grad))
            else:
                module._buffers[name] = smaller


@dataclass(frozen=True)
class StructuredPruning:
    """network: the smaller network, of the model's own class. masks: what was removed, over the dense parameters.
    channels: kept channels of every resized module. plan: role of each layer ("guided" also where `scores` were given).
    connectivity: the ghost's matrices.
    report: macs and parameters, dense and now, one row a layer, layers whose filters stay and why."""

    network: nn.Module
    masks: Masks
    channels: Channels
    plan: dict[str, Role]
    connectivity: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write `masks.safetensors`, `channels.json` and `model.safetensors` (the smaller network's state)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_structured(self.network, self.channels, folder)
        self.masks.save(folder / "masks.safetensors")
        return folder


def save_structured(network: nn.Module, channels: Channels, folder: Path) -> None:
    """Write a smaller network, fine-tuned or not: `channels.json` and `model.safetensors`."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    write_json(folder / "channels.json", {"format": "gcnet-channels-1", "channels": channels})


def load_structured(model: nn.Module, folder: str | Path) -> nn.Module:
    """The saved smaller network, made in place of a dense one of the same class; needs neither torch-pruning nor data.

    Raises ValueError when the files are damaged or belong to another network.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "channels.json").read_text(encoding="utf-8"))
        if config.get("format") != "gcnet-channels-1":
            raise ValueError(f"'{folder / 'channels.json'}' holds no channels of a smaller network")
        state = load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, OSError) as error:
        raise ValueError(f"'{folder}' holds no saved smaller network, or a damaged one: {error}") from error
    resize(model, config["channels"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"'{folder}' belongs to another network: {error}") from error
    return model


def export(network: nn.Module, example_input: Tensor, path: str | Path) -> Path:
    """Write a network for use without its code: `.onnx` (ONNX) or `.pt2` (torch.export), any batch size, eval mode.

    Raises ValueError for another suffix, ImportError when ONNX's packages are missing.
    """
    path = Path(path)
    # A batch of one would be taken as a constant.
    example = example_input if len(example_input) > 1 else torch.cat([example_input, example_input])
    shapes = ({0: torch.export.Dim("batch")},)
    with cost.evaluation_mode(network), torch.no_grad():
        if path.suffix == ".pt2":
            torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), path)
        elif path.suffix == ".onnx":
            try:
                import onnx  # noqa: F401
                import onnxscript  # noqa: F401
            except ImportError as error:
                raise ImportError(f"writing ONNX needs onnx and onnxscript: {error}") from error
            torch.onnx.export(network, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            raise ValueError(f"'{path.name}': a network is exported to .onnx or .pt2")
    return path


# --- the whole method -----------------------------------------------------------------------------------------------

Importance = Callable[[Any], Tensor]


def structured_prune(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    macs: float = 0.5,
    hybrid: str | Sequence[str] = "B25",
    similarity: str = "pearson",
    ranking: str = "layer",
    round_to: int = 1,
    importance: Importance | None = None,
    scores: Mapping[str, Tensor] | None = None,
    connectivity: dict[str, Tensor] | None = None,
    graph: LayerGraph | None = None,
    freeze: Sequence[str] = (),
    seed: int = 0,
) -> StructuredPruning:
    """A smaller network: whole filters removed until at most a share of the multiply-accumulates is left.

    model: any traceable network; it is not changed. batches: (images, labels) as the model takes them; with
    hybrid="direct", an importance or scores only the first image is used. macs: share of the dense MACs left, (0, 1].
    hybrid: which layers' filters the ghost scores, the others are scored by mean |weight|. ranking: "layer" = every
    group of coupled filters loses the same share, so all scores give networks of one size (choice); "global" = one
    ranking over all groups. round_to: filters are kept in multiples of this, fast on most hardware at 8 or 16.
    importance: any torch-pruning importance instead of the hybrid (Taylor's gradients are taken from `model`).
    scores: {layer: (C_out,)} of your own instead of both, low = goes first, such as `snacs_filter_scores`; each layer's
    are scaled to mean 1, layers without any are scored by mean |weight|.
    connectivity, graph: measured before. freeze: layers that keep all filters.
    A layer's filters stay where removing them would not be the same as setting them to 0 (LayerNorm, activations that
    are not 0 at 0), at the output, and in layers called twice; the report lists them. The smaller network's outputs
    are checked to equal those of the masked network (to 1e-5 of the largest, rounding).
    Raises ValueError for values out of range, unknown names, a share that cannot be reached, weights held by torch's
    own pruning, and a network that torch-pruning cannot cut; ImportError without torch-pruning.
    """
    if not 0 < macs <= 1:
        raise ValueError(f"macs {macs} is outside (0, 1]: it is the share of the dense network's that is left")
    if ranking not in RANKINGS:
        raise unknown("ranking", ranking, RANKINGS)
    if round_to < 1:
        raise ValueError(f"round_to {round_to} is below 1")
    if importance is not None and scores is not None:
        raise ValueError("give an importance or scores, not both")
    torch_pruning()
    check_plain(model)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("structured_prune needs images: got no batch at all")
    example = first[0][:1].to(next(model.parameters()).device)
    graph = graph or layer_graph(model, example)
    plan: dict[str, Role] = dict.fromkeys(graph.layers, "direct")
    if scores is not None:
        scores, plan = _given_scores(model, graph, scores)
    elif importance is None:
        if "guided" in split(graph, hybrid).values() and connectivity is None:
            connectivity = measure_connectivity(
                model, chain([first], batches), similarity=similarity, graph=graph, seed=seed
            )
        scores, plan = filter_scores(model, graph, connectivity, hybrid=hybrid)
    scratch, example = _scratch(model, example)
    dependencies, groups, frozen = _groups(scratch, example, graph, freeze)
    importance = importance or GhostImportance(scratch, scores or {})
    unit_scores = [_unit_scores(importance, group) for group in groups]
    dense = cost.layer_macs(scratch, example)
    total = sum(dense.values())

    kept = _cut_to(
        lambda removed: _choose(groups, unit_scores, removed, ranking, round_to),
        lambda kept: _macs_left(scratch, dense, _kept_channels(scratch, groups, kept)) / total,
        macs,
    )
    sides = _kept_channels(scratch, groups, kept)
    channels = {
        name: {side: mask.nonzero().flatten().tolist() for side, mask in of_module.items()}
        for name, of_module in sides.items()
        if not all(bool(mask.all()) for mask in of_module.values())
    }
    masks = structured_masks(model, channels)
    expected = _masked_output(scratch, masks, example)
    _remove(dependencies, groups, kept, channels)
    _check_same(scratch, example, expected)
    network = _as_the_model(scratch, model)
    report = _report(model, network, graph, sides, plan, frozen, first[0][:1].to(example.device))
    return StructuredPruning(network, masks, channels, plan, connectivity or {}, report)


def _scratch(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy to cut: float32 (half precision has no gradients on CPUs), nothing frozen, with the model's gradients."""
    scratch = copy.deepcopy(model).float().eval()
    for ours, theirs in zip(scratch.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(True)
        ours.grad = None if theirs.grad is None else theirs.grad.detach().float().clone()
    return scratch, example.float()


def _unit_scores(importance: Importance, group: _Group) -> Tensor:
    score = importance(group.tp_group).detach().cpu().double()
    if len(score) != group.size or not bool(torch.isfinite(score).all()):
        raise ValueError(f"the importance of layer '{group.root}' has {len(score)} finite scores of {group.size}")
    return score.view(group.ways, -1).mean(0)


@torch.no_grad()
def _masked_output(scratch: nn.Module, masks: Masks, example: Tensor) -> list[Tensor]:
    """What the masked network gives for noise shaped like the example."""
    masked = copy.deepcopy(scratch)
    for name, parameter in masked.named_parameters():
        if name in masks:
            parameter.mul_(masks[name].to(parameter.device))
    return _exact(masked, example)


def _exact(network: nn.Module, example: Tensor) -> list[Tensor]:
    """Outputs for noise shaped like the example, in full float32 on GPUs too."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return _tensors(network(_noise(example)))


def _noise(example: Tensor) -> Tensor:
    noise = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    return noise.to(example.device)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _remove(dependencies: Any, groups: list[_Group], kept: list[Tensor], channels: Channels) -> None:
    """Let torch-pruning remove what is not kept, and see that every module has the size that was planned."""
    for group, mask in zip(groups, kept, strict=True):
        gone = (~mask).nonzero().flatten().tolist()
        if gone:
            root = group.tp_group[0].dep
            dependencies.get_pruning_group(root.target.module, root.handler, gone).prune()
    model = dependencies.model
    for name, sides in channels.items():
        module = model.get_submodule(name)
        have = {side: len(mask) for side, mask in _full(module).items()}
        # With one channel a group left, a grouped convolution is a depthwise one: no side of its own for inputs.
        planned = {side: len(kept) for side, kept in sides.items() if side in have}
        if have != planned:
            raise ValueError(
                f"torch-pruning cut '{name}' to {have}, planned was {planned}: freeze=('{name}',) leaves it"
            )


@torch.no_grad()
def _check_same(network: nn.Module, example: Tensor, expected: list[Tensor]) -> None:
    try:
        found = _exact(network, example)
    except Exception as error:
        raise ValueError(
            f"the smaller network does not run: {error}; freeze=(layers,) leaves layers as they are"
        ) from error
    for ours, theirs in zip(found, expected, strict=True):
        gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))
        if not gap <= SAME:
            raise ValueError(
                f"the smaller network's output differs from the masked network's by {gap:.2g}: some operation treats "
                "removed filters in another way than filters of 0; freeze=(layers,) leaves layers as they are"
            )


def _as_the_model(scratch: nn.Module, model: nn.Module) -> nn.Module:
    """The cut copy in the model's precision and modes, with its frozen parameters frozen, and without gradients."""
    scratch.zero_grad(set_to_none=True)
    for ours, theirs in zip(scratch.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    for (_, ours), (_, theirs) in zip(scratch.named_parameters(), model.named_parameters(), strict=True):
        ours.data = ours.data.to(theirs.dtype)
        ours.requires_grad_(theirs.requires_grad)
    for (_, ours), (_, theirs) in zip(scratch.named_buffers(), model.named_buffers(), strict=True):
        ours.data = ours.data.to(theirs.dtype)
    return scratch


def _report(
    model: nn.Module,
    network: nn.Module,
    graph: LayerGraph,
    sides: Mapping[str, dict[str, Tensor]],
    plan: Mapping[str, Role],
    frozen: Mapping[str, str],
    example: Tensor,
) -> dict[str, Any]:
    rows = [
        {
            "layer": layer,
            "filters": graph.out_channels[layer],
            "kept": int(sides[layer]["out"].sum()) if layer in sides else graph.out_channels[layer],
            "role": plan[layer],
        }
        for layer in graph.layers
    ]
    return {
        "macs_dense": cost.macs(model, example),
        "macs": cost.macs(network, example),
        "parameters_dense": cost.parameters(model),
        "parameters": cost.parameters(network),
        "layers": rows,
        "frozen": dict(frozen),
        "notes": graph.notes,
    }
