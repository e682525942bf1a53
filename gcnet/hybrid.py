"""Which layers the ghost guides, and the whole method in one call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gcnet.connectivity import connectivity as measure_connectivity
from gcnet.errors import unknown
from gcnet.ghost import build_ghost, build_mixture, check_batchnorm
from gcnet.graph import LayerGraph, given_or_traced
from gcnet.interop import check_plain
from gcnet.pruning import (
    PRUNERS,
    Masks,
    apply_masks,
    check_sparsity,
    collapsed_layers,
    prune,
    pruned_count,
    sparsity,
    summary,
    weight_name,
    zero_before,
)
from gcnet.synaptic_flow import flow, linearized

Role = Literal["direct", "guided", "mixed"]

# name -> (side the ghost guides, share of the weighted layers). Source: GC-Net, Fig. 3.
HYBRIDS: dict[str, tuple[str, float]] = {
    "direct": ("back", 0.0),
    "Full": ("back", 1.0),
    "FH": ("front", 0.5),
    "BH": ("back", 0.5),
    "B25": ("back", 0.25),
}


def mixing_exponent(hybrid: str | Sequence[str]) -> float | None:
    """The exponent of the hybrids "Mix<percent>" (see `hybrid_masks`), None for any other."""
    match = re.fullmatch(r"Mix(\d{1,3})", hybrid) if isinstance(hybrid, str) else None
    return int(match[1]) / 100 if match else None


def side_and_share(hybrid: str) -> tuple[str, float]:
    """("front" or "back", share of the layers the ghost guides) of a hybrid's name. Raises ValueError if unknown."""
    if hybrid in HYBRIDS:
        return HYBRIDS[hybrid]
    match = re.fullmatch(r"([FB])(\d{1,2}|100)", hybrid)
    if match is None:
        raise unknown("hybrid", hybrid, [*HYBRIDS, "F<percent>", "B<percent>", "Mix<percent>"])
    return ("front" if match[1] == "F" else "back"), int(match[2]) / 100


def split(graph: LayerGraph, hybrid: str | Sequence[str]) -> dict[str, Role]:
    """{layer: "direct", "guided" or "mixed"} in execution order.

    hybrid: a name in HYBRIDS; "F<percent>" or "B<percent>" for the first or last share of the weighted layers (choice:
    percentages count layers, rounded, halves to the even count); or the names of the layers to guide. A layer without
    a parent is always pruned directly (GC-Net, Fig. 3). "Mix<percent>" mixes all others, see `hybrid_masks`. Raises
    ValueError for an unknown name.
    """
    layers = graph.layers
    if mixing_exponent(hybrid) is not None:
        return {layer: "mixed" if graph.others(layer) else "direct" for layer in layers}
    if isinstance(hybrid, str):
        side, share = side_and_share(hybrid)
        count = round(share * len(layers))
        guided = set(layers[:count] if side == "front" else layers[len(layers) - count :])
    else:
        for name in hybrid:
            if name not in layers:
                raise unknown("layer", name, layers)
        guided = set(hybrid)
    return {layer: "guided" if layer in guided and graph.others(layer) else "direct" for layer in layers}


@dataclass(frozen=True)
class GhostPruning:
    """masks: over all layers of the original. connectivity: the ghost's matrices. plan: role of each layer.
    report: sparsity reached, layers that collapsed, one row a layer, layers without a parent (pruned directly), the
    share of weights that were 0 before (in layers with more than 1 %), what the graph could not follow."""

    masks: Masks
    connectivity: dict[str, Tensor]
    plan: dict[str, Role]
    report: dict[str, Any] = field(default_factory=dict)


def hybrid_masks(
    model: nn.Module,
    graph: LayerGraph,
    connectivity: dict[str, Tensor],
    *,
    pruner: str,
    sparsity: float,
    hybrid: str | Sequence[str],
    example_input: Tensor,
    seed: int = 0,
    batchnorm: str = "identity",
) -> tuple[Masks, dict[str, Role]]:
    """Masks of the original network: guided layers ranked in the ghost, the others in the original.

    Each part has its own ranking and is pruned to the same sparsity; together they lose exactly as many weights as
    direct pruning of the whole network does (choice). Source: GC-Net, Fig. 1 (green, yellow and red modules), Fig. 3.
    hybrid "Mix<percent>" (this project's, not the paper's): one ranking of all layers in the network whose weights are
    magnitude times connectivity to that power, see `build_mixture`; Mix100 is the product, Mix0 is direct pruning.
    """
    exponent, plan = mixing_exponent(hybrid), split(graph, hybrid)
    missing = [layer for layer, role in plan.items() if role != "direct" and layer not in connectivity]
    if missing:
        raise ValueError(f"no connectivity is given for the guided layers {missing}")
    if exponent is not None:
        mixture = build_mixture(model, connectivity, exponent)
        how = {"pruner": pruner, "sparsity": sparsity, "layers": graph.layers}
        return prune(mixture, **how, example_input=example_input, seed=seed), plan
    parts: dict[Role, list[str]] = {"direct": [], "guided": []}
    for layer, role in plan.items():
        parts[role].append(layer)
    size = {role: sum(model.get_submodule(n).weight.numel() for n in names) for role, names in parts.items()}
    total = pruned_count(sum(size.values()), sparsity)
    # A part keeps at least one weight, unless there is none: what it cannot lose, the other part loses (choice).
    most = {role: max(0, count - 1) for role, count in size.items()}
    directly = min(most["direct"], max(pruned_count(size["direct"], sparsity), total - most["guided"]))
    pruned = {"direct": directly, "guided": min(total - directly, most["guided"])}
    found = Masks()
    for role, names in parts.items():
        if names:
            source = model if role == "direct" else build_ghost(model, connectivity, batchnorm=batchnorm)
            found |= prune(
                source, pruner=pruner, sparsity=sparsity, layers=names, pruned=pruned[role],
                example_input=example_input, seed=seed,
            )  # fmt: skip
    return Masks({weight_name(layer): found[weight_name(layer)] for layer in graph.layers}), plan


def ghost_prune(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    pruner: str = "os_synflow",
    sparsity: float = 0.9,
    hybrid: str | Sequence[str] = "B25",
    similarity: str = "pearson",
    tap: Literal["conv", "relu"] | None = None,
    classwise: bool = False,
    absolute: bool = False,
    residual: str | None = None,
    batchnorm: str = "identity",
    connectivity: dict[str, Tensor] | None = None,
    graph: LayerGraph | None = None,
    seed: int = 0,
) -> GhostPruning:
    """GC-Net in one call: graph, activations, connectivity, ghost, pruning, mapping back.

    model: any traceable network of Conv2d and Linear layers; it is not changed (apply the masks with `apply_masks`,
    then fine-tune holding them). batches: (images, labels) as the model takes them. connectivity: matrices measured
    before, to skip that pass. graph: a layer graph made before, the way out for a network that cannot be traced
    (`layer_graph(..., leaf_modules=...)` or `parents=...`). The other parameters are those of `connectivity`,
    `prune` and `split`.
    Raises ValueError for unknown names, a sparsity outside [0, 1), fewer than 2 images, a model that cannot be traced,
    weights that torch's own pruning holds.
    """
    check_sparsity(sparsity)
    if pruner not in PRUNERS:
        raise unknown("pruner", pruner, PRUNERS)
    check_batchnorm(batchnorm)
    check_plain(model)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("ghost_prune needs images: got no batch at all")
    example = first[0][:1].to(next(model.parameters()).device)
    graph = given_or_traced(graph, model, example, residual)
    needed = any(role != "direct" for role in split(graph, hybrid).values())
    if needed and connectivity is None:
        connectivity = measure_connectivity(
            model, chain([first], batches), similarity=similarity, tap=tap, classwise=classwise, absolute=absolute,
            graph=graph, seed=seed,
        )  # fmt: skip
    masks, plan = hybrid_masks(
        model, graph, connectivity or {}, pruner=pruner, sparsity=sparsity, hybrid=hybrid, example_input=example,
        seed=seed, batchnorm=batchnorm,
    )  # fmt: skip
    return GhostPruning(masks, connectivity or {}, plan, _report(model, masks, plan, graph))


def _report(model: nn.Module, masks: Masks, plan: dict[str, Role], graph: LayerGraph) -> dict[str, Any]:
    rows = [{**row, "role": plan[row["layer"]]} for row in summary(masks)]
    return {
        "sparsity": sparsity(masks),
        "kept_weights": sum(row["kept"] for row in rows),
        "collapsed_layers": collapsed_layers(masks),
        "layers": rows,
        "without_parent": tuple(layer for layer in graph.layers if not graph.others(layer)),
        "zero_before": zero_before(model, graph.layers),
        "notes": graph.notes,
    }


@torch.no_grad()
def passes_signal(model: nn.Module, masks: Masks, example_input: Tensor) -> bool:
    """Whether any path from input to output survives: with |weights| and an all-ones input, is the output above 0?"""
    twin = linearized(model)
    apply_masks(twin, masks)
    return bool((flow(twin, example_input) > 0).any())
