"""Sparse training: masks from the start (ERK, SNIP, GraSP), masks that move (SET, RigL), magnitude rewinding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet.data import Dataset, stratified
from gcnet.errors import unknown
from gcnet.pruning import (
    Masks,
    check_sparsity,
    global_masks,
    keep_top,
    prunable_layers,
    prune,
    pruned_count,
    weight_name,
    weights,
)
from gcnet.training import Penalty, Recipe, train

# name -> how it is called in figures and tables. "rewind" starts from a trained dense network, the others from scratch.
METHODS = {
    "dense": "dense",
    "rst": "RST (ERK)",
    "set": "SET",
    "rigl": "RigL",
    "rewind": "magnitude rewinding",
    "snip": "SNIP",
    "grasp": "GraSP",
}
# SNIP and GraSP look at this many images of each class (GraSP's own number).
IMAGES_PER_CLASS = 10
GRASP_TEMPERATURE = 200.0


# --- static masks: random with ERK densities ------------------------------------------------------------------------


def erk_densities(model: nn.Module, sparsity: float, layers: Sequence[str] | None = None) -> dict[str, float]:
    """{layer: share of its weights to keep}, in (0, 1]: the Erdos-Renyi-kernel densities of a global sparsity.

    A layer's density is proportional to (C_out + C_in + k_h + k_w) / (C_out C_in k_h k_w), for Linear layers to
    (out + in) / (out in), scaled so that the whole network keeps 1 - sparsity, with layers that would keep more than
    all of their weights kept whole. C_in is that of a group. Raises ValueError for a sparsity outside [0, 1), unknown
    layers. Source: Evci et al., arXiv 1911.11134; as used by Liu et al., arXiv 2202.02643.
    """
    found = weights(model, prunable_layers(model) if layers is None else layers)
    if not found:
        raise ValueError("there is no Conv2d or Linear layer to make sparse")
    kept = (1 - check_sparsity(sparsity)) * sum(weight.numel() for weight in found.values())
    raw = {name: sum(weight.shape) / weight.numel() for name, weight in found.items()}
    whole: set[str] = set()
    while True:
        budget = kept - sum(found[name].numel() for name in whole)
        rest = [name for name in found if name not in whole]
        scale = budget / sum(raw[name] * found[name].numel() for name in rest) if rest else 0.0
        over = {name for name in rest if scale * raw[name] > 1}
        if not over:
            break
        whole |= over
    densities = {name: 1.0 if name in whole else scale * raw[name] for name in found}
    return {name.removesuffix("weight").removesuffix("."): density for name, density in densities.items()}


def random_masks(model: nn.Module, sparsity: float, *, seed: int = 0, layers: Sequence[str] | None = None) -> Masks:
    """Random masks of ERK densities that remove exactly the sparsity's number of weights (Random Sparse Training).

    Fractions of a weight go to the layers with the largest remainders. Source: Liu et al., arXiv 2202.02643.
    """
    densities = erk_densities(model, sparsity, layers)
    found = weights(model, densities)
    total = sum(weight.numel() for weight in found.values())
    exact = {weight_name(layer): density * found[weight_name(layer)].numel() for layer, density in densities.items()}
    counts = {name: math.floor(count + 1e-9) for name, count in exact.items()}
    left = total - pruned_count(total, sparsity) - sum(counts.values())
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:left]:
        counts[name] += 1
    generator = torch.Generator().manual_seed(seed)
    return Masks(
        {
            name: keep_top(torch.rand(weight.numel(), generator=generator), counts[name]).view(weight.shape)
            for name, weight in found.items()
        }
    )


# --- at initialisation, from data -----------------------------------------------------------------------------------


def _loss_twin(
    model: nn.Module, layers: Sequence[str] | None, images: Tensor, labels: Tensor
) -> tuple[nn.Module, dict[str, nn.Parameter], Tensor, Tensor]:
    """A copy of the model in training mode on its device, its weights, and the images and labels there."""
    twin = copy.deepcopy(model).train()
    names = prunable_layers(model) if layers is None else tuple(layers)
    weights(model, names)  # names that are not there
    device = next(twin.parameters()).device
    parameters = {weight_name(layer): twin.get_submodule(layer).weight for layer in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return twin, parameters, images.to(device), labels.to(device)


def _drawn_alike(twin: nn.Module, images: Tensor) -> Tensor:
    """The twin's logits, float32; dropout draws the same whatever was drawn before, and leaves no trace."""
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        return twin(images).float()


def snip_masks(
    model: nn.Module, images: Tensor, labels: Tensor, sparsity: float, *, layers: Sequence[str] | None = None
) -> Masks:
    """Masks that keep the weights of largest |w dL/dw| on a batch, globally; the model is left as it is.

    images: as the model takes them, labels (N,). Raises ValueError for a sparsity outside [0, 1).
    Source: Lee et al., arXiv 1810.02340.
    """
    check_sparsity(sparsity)
    twin, parameters, images, labels = _loss_twin(model, layers, images, labels)
    loss = F.cross_entropy(_drawn_alike(twin, images), labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    scores = {n: (w.detach() * g).abs() for (n, w), g in zip(parameters.items(), gradients, strict=True)}
    return global_masks(scores, pruned_count(sum(s.numel() for s in scores.values()), sparsity))


def grasp_masks(
    model: nn.Module, images: Tensor, labels: Tensor, sparsity: float, *, layers: Sequence[str] | None = None
) -> Masks:
    """Masks that keep the weights whose removal would most lower the gradient's norm: largest w * (H g), globally.

    g is the gradient of the loss at logits / 200, H its Hessian. images, labels, errors: as for `snip_masks`.
    Source: Wang et al., arXiv 2002.07376 (temperature 200 and the sign as in its algorithm 2).
    """
    check_sparsity(sparsity)
    twin, parameters, images, labels = _loss_twin(model, layers, images, labels)
    loss = F.cross_entropy(_drawn_alike(twin, images) / GRASP_TEMPERATURE, labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    product = sum((g.detach() * g).sum() for g in gradients)
    seconds = torch.autograd.grad(product, list(parameters.values()))
    scores = {n: w.detach() * hg for (n, w), hg in zip(parameters.items(), seconds, strict=True)}
    return global_masks(scores, pruned_count(sum(s.numel() for s in scores.values()), sparsity))


def initial_masks(
    model: nn.Module,
    method: str,
    sparsity: float,
    *,
    seed: int = 0,
    data: Dataset | None = None,
    layers: Sequence[str] | None = None,
) -> Masks:
    """The masks that a method starts with. data: training images, which SNIP and GraSP look at.

    Raises ValueError for a method that does not start from masks.
    """
    if method in ("rst", "set", "rigl"):
        return random_masks(model, sparsity, seed=seed, layers=layers)
    if method not in ("snip", "grasp"):
        raise unknown("method with masks from the start", method, ["rst", "set", "rigl", "snip", "grasp"])
    if data is None:
        raise ValueError(f"{method} ranks weights by their gradients: it needs training images")
    chosen = data.take(stratified(data.labels, min(len(data), IMAGES_PER_CLASS * len(data.classes)), seed)[1])
    score = snip_masks if method == "snip" else grasp_masks
    return score(model, chosen.images, chosen.labels, sparsity, layers=layers)


# --- masks that move ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewiring:
    """Dynamic sparse training: now and then the smallest weights of a layer go and as many others come, from 0.

    grow: "gradient" (RigL: where the loss's gradient is largest) or "random" (SET). every: steps between exchanges.
    fraction: share of a layer's kept weights exchanged at first, in [0, 1], falling with a cosine to 0 at the share
    `until` of the training. seed: of SET's draws. A weight that goes and comes back at once keeps its value; a new one
    starts at 0 without momentum. Every layer keeps its number of weights.
    Raises ValueError for values out of range. Source: SET, arXiv 1707.04780; RigL, arXiv 1911.11134 (algorithm 1, its
    cosine); that the exchange follows the step of the same gradient, instead of replacing it, is a choice.
    """

    grow: str
    every: int = 100
    fraction: float = 0.3
    until: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grow not in ("gradient", "random"):
            raise unknown("way to grow", self.grow, ["gradient", "random"])
        if self.every < 1 or not 0 <= self.fraction <= 1 or not 0 < self.until <= 1:
            raise ValueError(
                f"rewiring needs every >= 1, fraction in [0, 1], until in (0, 1], got every {self.every}, fraction "
                f"{self.fraction}, until {self.until}"
            )

    def share(self, step: int, steps: int) -> float:
        """The share of a layer's kept weights that is exchanged after this step (0 for most steps)."""
        if not step or step % self.every or step >= self.until * steps:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * step / (self.until * steps)))

    @torch.no_grad()
    def __call__(
        self, pairs: Sequence[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, step: int, steps: int
    ) -> None:
        """Exchange weights after an optimizer step: masks, weights and momentum change in place."""
        share = self.share(step, steps)
        if not share:
            return
        generator = torch.Generator().manual_seed((self.seed << 24) + step)
        for weight, mask in pairs:
            if weight.grad is None:
                continue
            before = mask.clone()
            kept = int(before.sum())
            survivors = keep_top(torch.where(before, weight.abs(), -1.0).flatten(), kept - round(share * kept))
            drawn = weight.grad.abs()
            if self.grow == "random":
                drawn = torch.rand(weight.shape, generator=generator).to(weight.device)
            # Survivors rank above all: the best of the others fill the layer up to the number it had.
            rank = torch.where(survivors, torch.inf, drawn.flatten().float())
            mask.copy_(keep_top(rank, kept).view(mask.shape))
            lasting = mask & before
            weight.mul_(lasting)
            momentum = optimizer.state[weight].get("momentum_buffer")
            if momentum is not None:
                momentum.mul_(lasting)


# --- training -------------------------------------------------------------------------------------------------------


def sparse_train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    method: str,
    sparsity: float,
    seed: int,
    layers: Sequence[str] | None = None,
    every: int = 100,
    fraction: float = 0.3,
    penalty: Penalty | None = None,
    precision: str = "auto",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> tuple[Masks, list[dict[str, float]]]:
    """Train from scratch with masks held: (final masks, one row an epoch); the model holds the trained weights.

    method: "dense" (no masks, sparsity ignored), "rst", "set", "rigl", "snip", "grasp". model: takes uint8 batches.
    layers: Conv2d and Linear modules to make sparse, default all; together they lose exactly the given sparsity at
    every step. every, fraction: see `Rewiring`. The rest: see `train`. Raises ValueError for unknown methods and
    values out of range. Magnitude rewinding, which begins with a trained network, is `magnitude_rewinding`.
    """
    known = [name for name in METHODS if name != "rewind"]
    if method not in known:
        raise unknown("sparse training method", method, known)
    masks = (
        Masks() if method == "dense" else initial_masks(model, method, sparsity, seed=seed, data=data, layers=layers)
    )
    grow = {"set": "random", "rigl": "gradient"}.get(method)
    history = train(
        model, data, recipe, seed=seed, masks=masks, penalty=penalty, precision=precision, checkpoint=checkpoint,
        rewire=Rewiring(grow, every, fraction, seed=seed) if grow else None, on_epoch=on_epoch,
    )  # fmt: skip
    return masks, history


def round_sparsities(sparsity: float, rounds: int) -> list[float]:
    """Sparsities after each round of iterative pruning: every round removes the same share of what is left."""
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    density = 1 - check_sparsity(sparsity)
    return [1 - density ** (k / rounds) for k in range(1, rounds)] + [sparsity]


def magnitude_rewinding(
    model: nn.Module,
    early: Mapping[str, Tensor],
    data: Dataset,
    recipe: Recipe,
    *,
    sparsity: float,
    seed: int,
    rounds: int = 1,
    rewind_epochs: int = 1,
    layers: Sequence[str] | None = None,
    penalty: Penalty | None = None,
    precision: str = "auto",
    folder: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> tuple[Masks, list[dict[str, float]]]:
    """Lottery tickets: remove the smallest weights of a trained network, put the others back, train again; repeat.

    model: trained; it ends with the trained ticket. early: its state_dict after `rewind_epochs` epochs of the same
    training (0: as initialised); schedule and order of the images go on from there. rounds: of pruning, each removing
    the same share of what is left (1: one shot). folder: where each round keeps a checkpoint, to resume from.
    Returns (masks, history of the last round). Raises ValueError for values out of range.
    Source: Frankle and Carbin, arXiv 1803.03635; rewinding to an early epoch: arXiv 1912.05671; global ranking.
    """
    if not 0 <= rewind_epochs < recipe.epochs:
        raise ValueError(f"rewind_epochs {rewind_epochs} must lie in 0..{recipe.epochs - 1}, before training ends")
    masks, history = Masks(), []
    for number, level in enumerate(round_sparsities(sparsity, rounds), 1):
        marks = folder / f"round{number}.masks" if folder else None
        if marks and marks.exists():  # interrupted in or after this round: the weights it was cut from are gone
            masks = Masks.load(marks)
        else:
            masks = prune(model, pruner="l1", sparsity=level, layers=layers)
            if marks:
                masks.save(marks)
        model.load_state_dict(early)
        history = train(
            model, data, recipe, seed=seed, masks=masks, penalty=penalty, precision=precision,
            checkpoint=folder / f"round{number}.pt" if folder else None, first_epoch=rewind_epochs, on_epoch=on_epoch,
        )  # fmt: skip
    return masks, history
