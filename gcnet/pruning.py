"""Scores -> exact masks -> applied masks; the base pruners; what sparsity they reached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gcnet.errors import unknown
from gcnet.store import atomic_write
from gcnet.synaptic_flow import flow, linearized

Scores = dict[str, Tensor]


class Masks(dict[str, Tensor]):
    """{parameter name: bool tensor of its shape}, True = kept. Saved bit-packed as safetensors, without pickle."""

    def save(self, path: str | Path) -> None:
        """Write atomically, one bit a weight."""
        packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().ravel())) for name, mask in self.items()}
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        with atomic_write(Path(path)) as temporary:
            save_file(packed, temporary, metadata={"format": "gcnet-masks-1", "shapes": json.dumps(shapes)})

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what `save` wrote. Raises ValueError when the file is truncated or is not a mask file."""
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != "gcnet-masks-1":
                    raise ValueError(f"'{path}' is a safetensors file but holds no masks")
                shapes: dict[str, list[int]] = json.loads(meta["shapes"])
                masks = cls()
                for name, shape in shapes.items():
                    count = int(np.prod(shape))
                    bits = np.unpackbits(file.get_tensor(name).numpy(), count=count).astype(bool)
                    masks[name] = torch.from_numpy(bits).view(shape)
                return masks
        except SafetensorError as error:
            raise ValueError(f"mask file '{path}' is truncated or damaged: {error}") from error


def prunable_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the Conv2d and Linear modules, in the order they are registered."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


def weight_name(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def weights(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """{parameter name: detached weight} of the named layers. Raises ValueError for a layer that is not there, and for
    two layers that share one weight: each would have a mask of its own."""
    known = prunable_layers(model)
    found, owners = {}, {}
    for layer in layers:
        if layer not in known:
            raise unknown("layer", layer, known)
        weight = model.get_submodule(layer).weight
        other = owners.setdefault(id(weight), layer)
        if other != layer:
            raise ValueError(
                f"layers '{other}' and '{layer}' share one weight: prune with layers=... without one of them"
            )
        found[weight_name(layer)] = weight.detach()
    return found


def check_sparsity(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1)")
    return float(sparsity)


def pruned_count(total: int, sparsity: float) -> int:
    """How many of `total` weights a sparsity removes: the nearest whole number."""
    return round(check_sparsity(sparsity) * total)


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Share of the masked weights that is removed, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0


def collapsed_layers(masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Layers that lost every weight: nothing passes them any more."""
    return tuple(name.removesuffix(".weight") for name, mask in masks.items() if not bool(mask.any()))


def zero_before(model: nn.Module, layers: Iterable[str]) -> dict[str, float]:
    """{layer: share of its weights that are 0 already}, of layers with more than 1 %."""
    zero = {layer: float((model.get_submodule(layer).weight == 0).double().mean()) for layer in layers}
    return {layer: share for layer, share in zero.items() if share > 0.01}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Set the removed weights to exactly 0, in place. Raises ValueError for masks of another network."""
    from gcnet.training import apply_held, hold

    apply_held(hold(model, masks))
    return model


# --- scores to masks ------------------------------------------------------------------------------------------------


def _checked(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise FloatingPointError(f"'{name}': weights or pruning scores are not finite (NaN or infinity)")


def keep_top(flat: Tensor, kept: int) -> Tensor:
    """Bool mask of exactly `kept` largest entries of a flat tensor; of equal ones the first (by index) stay."""
    if kept <= 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    if kept >= flat.numel():
        return torch.ones_like(flat, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - kept + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: kept - int(mask.sum())]] = True
    return mask


def global_masks(scores: Scores, pruned: int) -> Masks:
    """Remove exactly `pruned` weights, those of the lowest score over all layers together."""
    _checked(scores)
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = keep_top(flat, flat.numel() - pruned)
    parts = mask.split([score.numel() for score in scores.values()])
    return Masks({name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)})


def layer_masks(scores: Scores, pruned: int) -> Masks:
    """Remove the same share of every layer; the total is exactly `pruned` (largest remainders get the odd ones)."""
    _checked(scores)
    sizes = np.array([score.numel() for score in scores.values()])
    exact = sizes * (pruned / sizes.sum())
    counts = np.floor(exact).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: pruned - counts.sum()]] += 1
    return Masks(
        {
            name: keep_top(score.flatten(), score.numel() - int(count)).view(score.shape)
            for (name, score), count in zip(scores.items(), counts, strict=True)
        }
    )


# --- base pruners ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What a score may need beside the weights: the shape of an input, a seed."""

    example_input: Tensor | None = None
    seed: int = 0


Score = Callable[[nn.Module, Sequence[str], Context], Scores]


def random_score(model: nn.Module, layers: Sequence[str], context: Context) -> Scores:
    """Uniform random numbers from the seed: the control."""
    generator = torch.Generator().manual_seed(context.seed)
    return {
        name: torch.rand(weight.shape, generator=generator).to(weight.device)
        for name, weight in weights(model, layers).items()
    }


def magnitude_score(model: nn.Module, layers: Sequence[str], context: Context) -> Scores:
    """|w|."""
    return {name: weight.abs() for name, weight in weights(model, layers).items()}


def lamp_score(model: nn.Module, layers: Sequence[str], context: Context) -> Scores:
    """w^2 over the sum of all squares of the layer that are no smaller. Source: LAMP, arXiv 2010.07611, eq. 3."""
    scores = {}
    for name, weight in weights(model, layers).items():
        squares = weight.double().square().flatten()
        ordered, order = squares.sort(stable=True)
        surviving = ordered.flip(0).cumsum(0).flip(0)
        values = torch.where(surviving > 0, ordered / surviving, torch.zeros_like(ordered))
        scores[name] = torch.empty_like(squares).scatter_(0, order, values).view(weight.shape)
    return scores


def _synflow_scores(twin: nn.Module, layers: Sequence[str], example_input: Tensor) -> Scores:
    flows = {weight_name(layer): twin.get_submodule(layer).weight for layer in layers}
    with torch.enable_grad():
        grads = torch.autograd.grad(flow(twin, example_input).sum(), list(flows.values()), allow_unused=True)
    return {
        name: (weight.detach() * grad).abs() if grad is not None else torch.zeros_like(weight)
        for (name, weight), grad in zip(flows.items(), grads, strict=True)
    }


def _synflow(iterations: int) -> Callable[[nn.Module, Sequence[str], Context, int], Masks]:
    """SynFlow: |dR/dw * w|, R the output's sum for an all-ones input; Source: arXiv 2006.05467, algorithm 1.

    After iteration k of n a share density^(k/n) is left (the exponential schedule); one iteration is OS-SynFlow.
    """

    def prune_part(model: nn.Module, layers: Sequence[str], context: Context, pruned: int) -> Masks:
        if context.example_input is None:
            raise ValueError("SynFlow sends an all-ones input through the network: pass example_input")
        twin = linearized(model)
        total = sum(w.numel() for w in weights(model, layers).values())
        density = (total - pruned) / total
        masks = Masks()
        for k in range(1, iterations + 1):
            scores = _synflow_scores(twin, layers, context.example_input)
            if masks:  # what went in an earlier iteration ranks below every score, a score of 0 included
                scores = {name: torch.where(masks[name], score, -1.0) for name, score in scores.items()}
            gone = pruned if k == iterations else total - round(total * density ** (k / iterations))
            masks = global_masks(scores, gone)
            apply_masks(twin, masks)
        return masks

    return prune_part


def scored(score: Score, to_masks: Callable[[Scores, int], Masks]) -> Callable[..., Masks]:
    def prune_part(model: nn.Module, layers: Sequence[str], context: Context, pruned: int) -> Masks:
        return to_masks(score(model, layers, context), pruned)

    return prune_part


# name -> (model, layers, context, how many weights to remove) -> Masks of these layers
PRUNERS: dict[str, Callable[[nn.Module, Sequence[str], Context, int], Masks]] = {
    "random": scored(random_score, global_masks),
    "l1": scored(magnitude_score, global_masks),
    "l1_layer": scored(magnitude_score, layer_masks),
    "lamp": scored(lamp_score, global_masks),
    "os_synflow": _synflow(1),
    "synflow": _synflow(100),
}


def prune(
    model: nn.Module,
    *,
    pruner: str,
    sparsity: float,
    layers: Sequence[str] | None = None,
    example_input: Tensor | None = None,
    seed: int = 0,
    pruned: int | None = None,
) -> Masks:
    """Masks that remove exactly the given share of the layers' weights (the model itself is left as it is).

    layers: names of Conv2d and Linear modules, default all. example_input: (1, C, H, W), needed by SynFlow. pruned: a
    number of weights, which goes before the sparsity. Raises ValueError for unknown names, sparsity outside [0, 1),
    and a number that is not below that of the weights.
    """
    if pruner not in PRUNERS:
        raise unknown("pruner", pruner, PRUNERS)
    layers = prunable_layers(model) if layers is None else tuple(layers)
    if not layers:
        raise ValueError("there is no Conv2d or Linear layer to prune")
    found = weights(model, layers)
    if pruner != "random":
        _checked(found)
    total = sum(weight.numel() for weight in found.values())
    if pruned is not None and not 0 <= pruned < total:
        raise ValueError(f"pruned must be at least 0 and less than the {total} weights, got {pruned}")
    count = pruned_count(total, sparsity) if pruned is None else pruned
    return PRUNERS[pruner](model, layers, Context(example_input, seed), count)


def summary(masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row a layer: layer, weights, kept, sparsity."""
    return [
        {
            "layer": name.removesuffix(".weight"),
            "weights": mask.numel(),
            "kept": int(mask.sum()),
            "sparsity": 1 - int(mask.sum()) / mask.numel(),
        }
        for name, mask in masks.items()
    ]
