"""SNACS: blocks of kernels ranked by adaptive conditional mutual information, with limits and protection found alone.

Source: arXiv 2006.12463. What is known of it and what is a choice stands at each function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet.activations import Tap, stream
from gcnet.cost import evaluation_mode
from gcnet.errors import unknown
from gcnet.graph import LayerGraph, given_or_traced, layer_graph
from gcnet.information import acmi, check_groups, divisors, mint_gmi
from gcnet.interop import check_forward, check_plain
from gcnet.pruning import Masks, sparsity, summary, weight_name, zero_before

__all__ = ["LayerPair", "SnacsPruning", "acmi", "layer_pairs", "mint_gmi", "operating_limits", "sensitivity",
           "snacs_prune"]  # fmt: skip

Grouping = int | Mapping[str, int] | None

# A layer has at most this many groups where nothing else is asked for. Source: the code (64 x 64 a pair on VGG16).
MOST_GROUPS = 64
GRID = tuple(p / 100 for p in range(1, 100, 5))

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda m: m,
    "square": torch.square,
    "exp": lambda m: torch.exp(-m.square() / 2),
    "none": torch.ones_like,
}
WEIGHTS = ("absolute", "signed_global")
# What a study compares at the sparsity that SNACS reaches; the other systems' are in snacs_cells.
METHODS = ("snacs", "mint", "l1_block", "l1_filter", "gcnet")
# No peer takes more than this share of a layer: the end of the grid on which SNACS looks for its limits (choice).
MOST_OF_A_LAYER = GRID[-1]
RULES = ("first", "last")


# --- pairs of layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerPair:
    """A layer (the child) with what feeds it (the parent), on the same images.

    child: (N, C_out) spatial means of the layer's own output. parent: (N, U) of the filters that feed it, or, where a
    column is fed by a sum, of what the layer receives. unit: (C_in,) the parent column that feeds each input column.
    groups: (child groups, parent groups). patches: (N, C_in * kernel) mean input under each kernel entry, from which
    the child's activations follow for any weights. weight, bias: of the layer, in float32.
    """

    layer: str
    parents: tuple[str, ...]
    child: Tensor
    parent: Tensor
    unit: Tensor
    groups: tuple[int, int]
    patches: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def block(self) -> Tensor:
        """(C_in,) the parent group of each input column."""
        return self.unit // (self.parent.shape[1] // self.groups[1])

    def matrix(self, blocks: Tensor) -> Tensor:
        """(child groups, parent groups) -> (C_out, C_in)."""
        return blocks.repeat_interleave(len(self.weight) // self.groups[0], 0)[:, self.block.to(blocks.device)]

    def spread(self, blocks: Tensor) -> Tensor:
        """(child groups, parent groups) -> one value a weight."""
        rows = self.matrix(blocks)
        return rows.view(*rows.shape, *[1] * (self.weight.ndim - 2)).expand(self.weight.shape)

    def means(self, weight: Tensor) -> Tensor:
        """(child groups, parent groups): a tensor of the weight's shape averaged over kernel and block."""
        columns = weight.flatten(2).mean(2) if weight.ndim > 2 else weight
        rows = columns.view(self.groups[0], -1, columns.shape[1]).mean(1)
        total = rows.new_zeros(self.groups).index_add_(1, self.block.to(rows.device), rows)
        return total / torch.bincount(self.block, minlength=self.groups[1]).to(rows)

    def block_sizes(self) -> Tensor:
        """(child groups, parent groups) int64: weights in each block."""
        columns = torch.bincount(self.block, minlength=self.groups[1])
        return (columns * (self.weight.numel() // self.weight.shape[1] // self.groups[0])).expand(self.groups).cpu()

    def activations(self, kept: Tensor) -> Tensor:
        """(N, C_out) the child's activations when only the `kept` (bool) blocks are there."""
        weight = torch.where(self.spread(kept), self.weight, 0.0).flatten(1)
        out = self.patches @ weight.T
        return out if self.bias is None else out + self.bias


def group_count(filters: int, groups: Grouping, layer: str) -> int:
    """Into how many groups a layer's filters fall.

    groups: a number (a layer with no more filters has one group a filter, and so has the output, whose filters are
    classes), {layer: number}, or None: the largest divisor up to 64. Raises ValueError, naming layer and divisors,
    where a number does not divide the filters.
    """
    wanted = groups.get(layer) if isinstance(groups, Mapping) else groups
    if not wanted:
        return max(d for d in divisors(filters) if d <= MOST_GROUPS)
    return check_groups(filters, min(wanted, filters), f"layer '{layer}'")


def scored_layers(model: nn.Module, graph: LayerGraph) -> list[str]:
    """The layers that are pruned: those with a parent, without grouped and depthwise convolutions (choice)."""
    ungrouped = [layer for layer in graph.layers if getattr(model.get_submodule(layer), "groups", 1) == 1]
    found = [layer for layer in ungrouped if graph.parents[layer]]
    for layer in found:
        check_forward(model.get_submodule(layer), layer)
    if not found:
        raise ValueError("there is nothing to prune: no (ungrouped) layer of this network has a parent layer")
    return found


def _units(graph: LayerGraph, layer: str) -> tuple[Tensor, bool]:
    """(C_in,) number of the parent filter that feeds each input column, in order of first use; columns fed by the
    same filters (a flattened map) share one. And whether every column is fed by exactly one filter."""
    rows = torch.stack([source.index.cpu() for source in graph.sources[layer]])
    number = graph.input_groups(layer).cpu()
    first = torch.full((int(number.max()) + 1,), len(number)).scatter_reduce_(
        0, number, torch.arange(len(number)), "amin"
    )
    return first.argsort().argsort()[number], bool(((rows >= 0).sum(0) == 1).all())


def _patch_means(module: nn.Module, x: Tensor) -> Tensor:
    """(N, C_in * kernel): the mean, over output positions, of the input under each kernel entry."""
    if isinstance(module, nn.Linear):
        return x.float() if x.ndim == 2 else x.float().flatten(1, -2).mean(1)
    x = x.float()
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    rows, columns = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    found = [
        x[:, :, i * dh : i * dh + sh * (rows - 1) + 1 : sh, j * dw : j * dw + sw * (columns - 1) + 1 : sw].mean((2, 3))
        for i in range(kh)
        for j in range(kw)
    ]
    return torch.stack(found, 2).flatten(1)


@torch.no_grad()
def layer_pairs(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    groups: Grouping = None,
    graph: LayerGraph | None = None,
) -> tuple[list[LayerPair], Tensor]:
    """Every layer that is pruned with its activations and its parent's, from one pass, and the labels (N,).

    batches: (images, labels), images as the model takes them, not augmented; the same images serve parent and child.
    groups: as in `group_count`. Activations are the layer's own output before BatchNorm and activation, averaged over
    positions (source: code); where several filters meet in one input column (a sum), the parent is what the layer
    receives (choice). A layer that does not see the images (a position bias: its output has other rows than images) is
    left out. Raises ValueError for groups that do not divide, fewer than 8 images, a class without images.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("SNACS needs images: got no batch at all")
    device = next(model.parameters()).device
    graph = graph or layer_graph(model, first[0][:1].to(device))
    layers = scored_layers(model, graph)
    unit, single = {}, {}
    for layer in layers:
        unit[layer], single[layer] = _units(graph, layer)
    counts = {layer: _pair_groups(graph, layer, unit[layer], groups) for layer in layers}
    taps: set[Tap] = {(layer, "conv") for layer in layers}
    for layer in layers:
        taps |= {(parent, "conv") for parent in graph.parents[layer]} if single[layer] else {(layer, "input")}
    kept: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    patches: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    calls: dict[str, Tensor] = {}

    def keep(layer: str, module: nn.Module, x: Tensor) -> None:
        if layer not in calls:  # of a layer called more than once the first call counts, as for its activations
            calls[layer] = _patch_means(module, x)

    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(lambda m, args, layer=layer: keep(layer, m, args[0]))
        for layer in layers
    ]
    labels = []
    try:
        for values, y in stream(model, chain([first], iterator), graph, taps):
            for tap in taps:
                kept[tap].append(values[tap])
            for layer in layers:
                patches[layer].append(calls[layer])
            calls.clear()
            labels.append(y)
    finally:
        for hook in hooks:
            hook.remove()
    y = torch.cat(labels)
    _check_classes(model, first[0][:1].to(device), y)
    values = {tap: torch.cat(parts) for tap, parts in kept.items()}
    strange = {layer for (layer, _), rows in values.items() if len(rows) != len(y)}
    layers = [layer for layer in layers if not strange & {layer, *graph.parents[layer]}]
    pairs = []
    for layer in layers:
        module = model.get_submodule(layer)
        columns = values[layer, "input"] if not single[layer] else _fed(graph, layer, values)
        units = int(unit[layer].max()) + 1
        total = columns.new_zeros(len(y), units).index_add_(1, unit[layer].to(device), columns)
        parent = total / torch.bincount(unit[layer], minlength=units).to(total)
        bias = None if module.bias is None else module.bias.detach().float()
        pairs.append(
            LayerPair(
                layer=layer,
                parents=graph.parents[layer],
                child=values[layer, "conv"],
                parent=parent,
                unit=unit[layer].to(device),
                groups=counts[layer],
                patches=torch.cat(patches[layer]),
                weight=module.weight.detach().float(),
                bias=bias,
            )
        )
    return pairs, y


def _pair_groups(graph: LayerGraph, layer: str, unit: Tensor, groups: Grouping) -> tuple[int, int]:
    """Groups of a layer's filters and of what feeds it; a parent that feeds it whole is grouped as it is itself."""
    units = int(unit.max()) + 1
    parents = graph.parents[layer]
    whole = len(parents) == 1 and units == graph.out_channels[parents[0]]
    name = parents[0] if whole else f"what feeds {layer}"
    groups_of_parent = None if isinstance(groups, Mapping) and not whole else groups
    # The filters of the output are classes: each is a group of its own unless the layer is named.
    read = any(layer in parents for parents in graph.parents.values())
    of_child = groups if read or isinstance(groups, Mapping) else None
    return group_count(graph.out_channels[layer], of_child, layer), group_count(units, groups_of_parent, name)


def _fed(graph: LayerGraph, layer: str, values: Mapping[Tap, Tensor]) -> Tensor:
    """(N, C_in) the activation of the one filter that feeds each input column."""
    parts = []
    for source in graph.sources[layer]:
        of_parent = values[source.parent, "conv"]
        index = source.index.to(of_parent.device)
        parts.append(of_parent[:, index.clamp_min(0)] * (index >= 0))
    return sum(parts[1:], parts[0])


def _check_classes(model: nn.Module, example: Tensor, labels: Tensor) -> None:
    with evaluation_mode(model):
        out = model(example)
    count = out.shape[-1] if isinstance(out, Tensor) else int(labels.max()) + 1
    present = set(labels.unique().tolist())
    missing = [k for k in range(count) if k not in present]
    if missing:
        raise ValueError(f"the images hold none of class {', '.join(map(str, missing))} of {count}; take all classes")


# --- scores ---------------------------------------------------------------------------------------------------------


def scaled_weights(model: nn.Module, layer: str, weights: str = "absolute") -> Tensor:
    """A layer's weights in [0, 1]: |w| scaled by the layer's own least and largest (choice), or "signed_global": w by
    the least and largest entry of the whole state dict (source: code; strongly negative weights then count least)."""
    if weights not in WEIGHTS:
        raise unknown("weight scaling", weights, WEIGHTS)
    weight = model.get_submodule(layer).weight.detach().float()
    if weights == "absolute":
        weight = weight.abs()
        low, high = weight.min(), weight.max()
    else:
        state = [v for v in model.state_dict().values() if v.is_floating_point()]
        low, high = min(v.min().float() for v in state), max(v.max().float() for v in state)
    return (weight - low) / (high - low).clamp_min(1e-30)


def connection_weights(model: nn.Module, pair: LayerPair, phi: str = "mean", weights: str = "absolute") -> Tensor:
    """(child groups, parent groups): phi of the scaled weights averaged over kernel and block; the factor of the score.

    phi: "mean" m, "square" m^2, "exp" exp(-m^2 / 2), "none" 1. Source: the paper (weight-based scaling) and code.
    """
    if phi not in PHI:
        raise unknown("phi", phi, PHI)
    return PHI[phi](pair.means(scaled_weights(model, pair.layer, weights)).double())


def connection_scores(
    model: nn.Module,
    pairs: Sequence[LayerPair],
    *,
    phi: str = "mean",
    weights: str = "absolute",
    estimator: Callable[..., Tensor] = acmi,
    **options: Any,
) -> dict[str, Tensor]:
    """{layer: (child groups, parent groups)} scores of all blocks; low = unimportant. options go to the estimator."""
    return {
        pair.layer: estimator(
            pair.parent, pair.child, pair.groups, connection_weights(model, pair, phi, weights), **options
        )
        for pair in pairs
    }


# --- limits and protection ------------------------------------------------------------------------------------------


def lowest(scores: Tensor, count: int) -> Tensor:
    """Bool tensor of exactly `count` lowest scores; of equal ones the first (by index)."""
    order = scores.flatten().argsort(stable=True)[:count]
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order] = True
    return mask.view(scores.shape)


def operating_limits(
    pairs: Sequence[LayerPair],
    scores: Mapping[str, Tensor],
    labels: Tensor,
    *,
    tolerance: float = 0.7,
    rule: str = "first",
    grid: Sequence[float] = GRID,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """({layer: largest share of its blocks that may go}, {layer: accuracy at each share of the grid}).

    One layer at a time: its lowest-scored share p of the grid is zeroed, and a support-vector classifier (RBF,
    scikit-learn's defaults), fitted on the layer's original activations (negative ones clamped to 0), is scored on
    those that are left. The limit is the largest p with accuracy >= best - tolerance (best - worst): up to the first
    violation (rule "first", choice), or the last p that holds ("last", code). 0 where not even the first does.
    Nothing is trained again and no number is set by hand for a layer. Source: code.
    """
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance {tolerance} is outside [0, 1]")
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    y = labels.cpu().numpy()
    limits, curves = {}, {}
    for pair in pairs:
        rho = scores[pair.layer]
        accuracies = _separability(pair, rho.to(pair.weight.device), y, grid)
        best, worst = max(accuracies), min(accuracies)
        holds = [a >= best - tolerance * (best - worst) - 1e-12 for a in accuracies]
        if rule == "first":
            allowed = next((k for k, fine in enumerate(holds) if not fine), len(grid))
        else:
            allowed = max((k + 1 for k, fine in enumerate(holds) if fine), default=0)
        limits[pair.layer], curves[pair.layer] = (grid[allowed - 1] if allowed else 0.0), accuracies
    return limits, curves


def _separability(pair: LayerPair, rho: Tensor, y: np.ndarray, grid: Sequence[float]) -> list[float]:
    """Accuracy of the classifier of the whole layer on the layer with a share of its blocks zeroed, for each share."""
    from sklearn.svm import SVC

    whole = pair.activations(torch.ones_like(rho, dtype=torch.bool)).clamp_min(0)
    spread = whole.double().var(correction=0).item()
    gamma = 1 / (whole.shape[1] * spread) if spread > 0 else 1.0  # what gamma="scale" is
    squares = whole.square().sum(1)

    def kernel(rows: Tensor) -> Tensor:
        squared = rows.square().sum(1)[:, None] + squares - 2 * rows @ whole.T
        return squared.clamp_min_(0).mul_(-gamma).exp_()

    # Kernel and votes are computed here, many times faster than inside libsvm, and for the same classifier.
    vote = _votes(SVC(kernel="precomputed").fit(kernel(whole).cpu().numpy(), y), whole)
    target = torch.from_numpy(y).to(whole.device)
    found = []
    for share in grid:
        kept = ~lowest(rho, int(share * rho.numel()))
        guess = vote(kernel(pair.activations(kept).clamp_min(0)))
        found.append((guess == target).double().mean().item())
    return found


def _votes(classifier: Any, like: Tensor) -> Callable[[Tensor], Tensor]:
    """(rows, images) kernel -> (rows,) class, as scikit-learn's one-against-one support-vector classifier decides."""
    classes, counts = classifier.classes_, classifier.n_support_
    starts = np.cumsum([0, *counts])
    pairs = [(i, j) for i in range(len(classes)) for j in range(i + 1, len(classes))]
    weights = np.zeros((len(classifier.support_), len(pairs)))
    for column, (i, j) in enumerate(pairs):
        for own, other in ((i, j - 1), (j, i)):
            rows = slice(starts[own], starts[own + 1])
            weights[rows, column] = classifier.dual_coef_[other, rows]
    support = torch.from_numpy(classifier.support_.astype(np.int64)).to(like.device)
    matrix, shift = (torch.from_numpy(a).to(like) for a in (weights, classifier.intercept_))
    # With two classes scikit-learn turns both signs round.
    sign = -1.0 if len(classes) == 2 else 1.0
    first, second = (torch.tensor([pair[k] for pair in pairs], device=like.device) for k in range(2))

    def decide(kernel: Tensor) -> Tensor:
        wins = sign * (kernel[:, support] @ matrix + shift) > 0
        chosen = torch.where(wins, first, second)
        votes = torch.zeros(len(kernel), len(classes), device=like.device)
        votes.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=votes.dtype))
        return torch.from_numpy(classes).to(like.device)[votes.argmax(1)]

    return decide


def sensitivity(model: nn.Module, graph: LayerGraph, *, weights: str = "absolute") -> dict[str, Tensor]:
    """{layer: (C_out,) how strongly each filter contributes to the layers that it feeds}; 1 everywhere for the last.

    Of each filter of a following layer the scaled weights are averaged over the kernel and divided by their sum: the
    share of each input; a filter's sensitivity is its share, averaged over all filters it feeds. Source: code, for
    consecutive layers; a filter that feeds several layers counts with its mean (choice).
    """
    found: dict[str, list[Tensor]] = {layer: [] for layer in graph.layers}
    for layer in graph.layers:
        module = model.get_submodule(layer)
        if not graph.parents[layer] or getattr(module, "groups", 1) > 1:
            continue
        scaled = scaled_weights(model, layer, weights).double()
        columns = scaled.flatten(2).mean(2) if scaled.ndim > 2 else scaled
        share = (columns / columns.sum(1, keepdim=True).clamp_min(1e-30)).mean(0)
        of_parent = {p: share.new_zeros(graph.out_channels[p]) for p in graph.parents[layer]}
        for source in graph.sources[layer]:
            index = source.index.to(share.device)
            reached = index >= 0
            of_parent[source.parent].index_add_(0, index[reached], share[reached])
        for parent, value in of_parent.items():
            found[parent].append(value)
    return {
        layer: torch.stack(parts).mean(0) if parts else torch.ones(graph.out_channels[layer], dtype=torch.float64)
        for layer, parts in found.items()
    }


def protected_groups(
    pairs: Sequence[LayerPair], sensitivities: Mapping[str, Tensor], fraction: float = 0.05
) -> dict[str, Tensor]:
    """{layer: (child groups,) bool}: the share `fraction` (rounded up) of each layer's groups that contribute most.

    They keep all their incoming connections. The abstract protects critical filters; the released code the lowest.
    Where all contribute alike (the last layer) none is protected. Raises ValueError for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"protected fraction {fraction} is outside [0, 1]")
    found = {}
    for pair in pairs:
        of_group = sensitivities[pair.layer].view(pair.groups[0], -1).mean(1).cpu()
        equal = bool((of_group.max() - of_group.min()) <= 1e-12)
        count = 0 if equal else math.ceil(fraction * len(of_group) - 1e-9)
        found[pair.layer] = lowest(-of_group, count)
    return found


# --- pruning --------------------------------------------------------------------------------------------------------


def check_delta(delta: float) -> float:
    if not 0 <= delta <= 1:
        raise ValueError(f"delta {delta} is outside [0, 1]")
    return float(delta)


def kept_blocks(
    scores: Mapping[str, Tensor],
    delta: float,
    limits: Mapping[str, float] | None = None,
    protected: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """{layer: (child groups, parent groups) bool}, True = kept.

    The share delta of lowest scores goes, over all layers together; a layer that would lose more than its limit loses
    its lowest share of the limit's size instead; protected groups keep all. Source: paper and code. Counts, not
    thresholds, decide, so that equal scores take no more with them than asked (choice).
    """
    flat = torch.cat([rho.flatten().cpu() for rho in scores.values()])
    gone = lowest(flat, int(check_delta(delta) * len(flat))).split([rho.numel() for rho in scores.values()])
    kept = {}
    for (layer, rho), part in zip(scores.items(), gone, strict=True):
        rho = rho.cpu()
        part = part.view(rho.shape)
        most = int((limits or {}).get(layer, 1.0) * rho.numel())
        if int(part.sum()) > most:
            part = lowest(rho, most)
        if protected is not None:
            part = part & ~protected[layer].cpu()[:, None]
        kept[layer] = ~part
    return kept


def block_masks(graph: LayerGraph, model: nn.Module, pairs: Sequence[LayerPair], kept: Mapping[str, Tensor]) -> Masks:
    """Masks over every layer of the network; layers that are not pruned are kept whole."""
    of_layer = {pair.layer: pair.spread(kept[pair.layer].to(pair.weight.device)) for pair in pairs}
    masks = Masks()
    for layer in graph.layers:
        weight = model.get_submodule(layer).weight
        masks[weight_name(layer)] = of_layer.get(layer, torch.ones_like(weight, dtype=torch.bool)).clone()
    return masks


def ranked_blocks(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Kept blocks when the lowest-scored share goes over all layers, at most 96 % of each: how peers are pruned."""
    return kept_blocks(scores, share, dict.fromkeys(scores, MOST_OF_A_LAYER))


def filter_masks(model: nn.Module, graph: LayerGraph, share: float) -> Masks:
    """L1 filter pruning: of each layer the share of filters with the smallest mean |w| (arXiv 1608.08710).

    Grouped convolutions and the layers that nothing reads (the classifier) keep theirs; a layer keeps one at least.
    """
    read = set(chain.from_iterable(graph.parents.values()))
    masks = Masks()
    for layer in graph.layers:
        module = model.get_submodule(layer)
        norm = module.weight.detach().abs().flatten(1).mean(1)
        count = round(share * len(norm)) if layer in read and getattr(module, "groups", 1) == 1 else 0
        kept = ~lowest(norm, min(count, len(norm) - 1))
        masks[weight_name(layer)] = kept.view(-1, *[1] * (module.weight.ndim - 1)).expand(module.weight.shape).clone()
    return masks


@dataclass(frozen=True)
class SnacsPruning:
    """masks: over all layers. scores, limits, protected: per pruned layer. report: sparsity, one row a layer (layer,
    parents, groups, gamma, protected, pruned, ...), filters that lost every connection, layers not pruned, the share
    of weights that were 0 before (in layers with more than 1 %), notes."""

    masks: Masks
    scores: dict[str, Tensor]
    limits: dict[str, float]
    protected: dict[str, Tensor]
    report: dict[str, Any] = field(default_factory=dict)


def snacs_prune(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    delta: float = 0.8,
    groups: Grouping = None,
    phi: str = "mean",
    weights: str = "absolute",
    protected_fraction: float = 0.05,
    tolerance: float = 0.7,
    rule: str = "first",
    estimator: str = "acmi",
    residual: str | None = None,
    graph: LayerGraph | None = None,
    **options: Any,
) -> SnacsPruning:
    """SNACS in one call: activations, scores, limits, sensitivity, masks. The model is not changed.

    model: any traceable network of Conv2d and Linear layers. batches: (images, labels) as the model takes them, some
    200 a class, not augmented. delta: share of all connections that is asked to go, in [0, 1]; limits and protection
    take less. groups: see `group_count`. estimator: "acmi" or "mint". graph: a layer graph made before, the way out
    for a network that cannot be traced (`layer_graph(..., leaf_modules=...)` or `parents=...`). options: those of
    `acmi` (conditioning, linear, scales, ...). Apply the masks with `apply_masks`, then fine-tune holding them.
    Raises ValueError for a delta outside [0, 1], unknown names, groups that do not divide (naming layer and divisors),
    a class without images, a network without a pair of layers or that cannot be traced, weights that torch's own
    pruning holds; warns when there are too few images.
    """
    check_delta(delta)
    estimators = {"acmi": acmi, "mint": mint_gmi}
    if estimator not in estimators:
        raise unknown("estimator", estimator, estimators)
    check_plain(model)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("SNACS needs images: got no batch at all")
    graph = given_or_traced(graph, model, first[0][:1].to(next(model.parameters()).device), residual)
    pairs, labels = layer_pairs(model, chain([first], batches), groups=groups, graph=graph)
    scores = connection_scores(
        model, pairs, phi=phi, weights=weights, estimator=estimators[estimator], **options
    )  # fmt: skip
    limits, _ = operating_limits(pairs, scores, labels, tolerance=tolerance, rule=rule)
    protected = protected_groups(pairs, sensitivity(model, graph, weights=weights), protected_fraction)
    kept = kept_blocks(scores, delta, limits, protected)
    masks = block_masks(graph, model, pairs, kept)
    report = pruning_report(graph, pairs, masks, kept, limits, protected)
    return SnacsPruning(masks, scores, limits, protected, report | {"zero_before": zero_before(model, graph.layers)})


def pruning_report(
    graph: LayerGraph,
    pairs: Sequence[LayerPair],
    masks: Masks,
    kept: Mapping[str, Tensor],
    limits: Mapping[str, float],
    protected: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What went where: the report of `SnacsPruning`."""
    by_layer = {row["layer"]: row for row in summary(masks)}
    rows = [
        {
            "layer": pair.layer,
            "parents": " + ".join(pair.parents),
            "groups": f"{pair.groups[0]}x{pair.groups[1]}",
            "gamma": limits[pair.layer],
            "protected": int(protected[pair.layer].sum()),
            "pruned": 1 - kept[pair.layer].double().mean().item(),
            "dead_filters": int((~masks[weight_name(pair.layer)].flatten(1).any(1)).sum()),
            "weights": by_layer[pair.layer]["weights"],
            "kept": by_layer[pair.layer]["kept"],
        }
        for pair in pairs
    ]
    return {
        "sparsity": sparsity(masks),
        "layers": rows,
        "nothing_pruned": [row["layer"] for row in rows if row["pruned"] == 0],
        "not_scored": [layer for layer in graph.layers if layer not in {pair.layer for pair in pairs}],
        "notes": graph.notes,
    }
