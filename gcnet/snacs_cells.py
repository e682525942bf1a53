"""The expensive things of notebook 06, each computed once: scores and limits, pruned cells, the estimator's checks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gcnet import cells, data
from gcnet.cost import latency, macs, parameters
from gcnet.graph import LayerGraph
from gcnet.hybrid import hybrid_masks
from gcnet.information import acmi, check_groups, mint_gmi
from gcnet.pruning import Masks, sparsity, summary
from gcnet.removal import dead_filters, remove_filters, silenced
from gcnet.snacs import (
    LayerPair,
    block_masks,
    connection_scores,
    filter_masks,
    kept_blocks,
    layer_pairs,
    operating_limits,
    protected_groups,
    ranked_blocks,
    sensitivity,
)
from gcnet.store import Store, read_json, write_json
from gcnet.study import Study

VERSIONS = {"snacs_scores": 1, "snacs_mint": 1, "snacs_cell": 1, "snacs_shift": 1, "snacs_truth": 1, "snacs_speed": 1,
            "snacs_latency": 1}  # fmt: skip
ESTIMATOR = ("snacs_conditioning", "snacs_linear", "snacs_scales")
PRUNER, HYBRID = "os_synflow", "B25"  # GC-Net's side of the comparison
LATENCY_BATCHES = (1, 64)
TIMED_PAIRS = 4  # trees that are timed for each group count; the rest cost the same


# --- scores, limits, protection -------------------------------------------------------------------------------------


def images(study: Study, per_class: int) -> data.Dataset:
    """A fixed class-balanced part of the training images, not augmented."""
    found = cells.splits(study).train
    count = per_class * len(found.classes)
    return found if count >= len(found) else found.take(data.stratified(found.labels, count, study.split_seed + 5)[1])


def pairs_of(
    study: Study, net: nn.Sequential, per_class: int, groups: int | None = None
) -> tuple[list[LayerPair], Tensor, LayerGraph]:
    """The network's layer pairs on so many images a class; groups: default the study's."""
    graph = cells.graph(study, net[1])
    groups = study.snacs_groups if groups is None else groups
    pairs, labels = layer_pairs(
        net[1], cells.normalized_batches(net, images(study, per_class)), groups=groups, graph=graph
    )
    return pairs, labels, graph


def scores_inputs(study: Study, seed: int) -> dict[str, Any]:
    return {
        "version": VERSIONS["snacs_scores"],
        "dense": Store.key("dense", cells.dense_inputs(study, seed)),
        **study.only("split_seed", "snacs_groups", "snacs_images", "snacs_phi", "snacs_weights", *ESTIMATOR,
                     "snacs_tolerance", "snacs_rule", "snacs_protected", "residual"),
    }  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """What SNACS knows of a network: per pruned layer its scores, limit, accuracies on the grid, protected groups."""

    scores: dict[str, Tensor]
    limits: dict[str, float]
    curves: dict[str, list[float]]
    protected: dict[str, Tensor]
    sensitivity: dict[str, list[float]]


def analysis(study: Study, seed: int) -> Analysis:
    """Scores, limits and protected groups of the dense network of a seed."""

    def compute(folder: Path) -> None:
        net = cells.dense(study, seed)
        pairs, labels, graph = pairs_of(study, net, study.snacs_images)
        started = time.perf_counter()
        scores = connection_scores(
            net[1], pairs, phi=study.snacs_phi, weights=study.snacs_weights, conditioning=study.snacs_conditioning,
            linear=study.snacs_linear, scales=study.snacs_scales, seed=seed,
        )  # fmt: skip
        scored = time.perf_counter()
        limits, curves = operating_limits(
            pairs, scores, labels, tolerance=study.snacs_tolerance, rule=study.snacs_rule
        )  # fmt: skip
        contributed = sensitivity(net[1], graph, weights=study.snacs_weights)
        protected = protected_groups(pairs, contributed, study.snacs_protected)
        save_file({k: v.cpu().contiguous() for k, v in scores.items()}, folder / "scores.safetensors")
        rows = [
            {
                "layer": pair.layer,
                "limit": limits[pair.layer],
                "curve": curves[pair.layer],
                "protected": protected[pair.layer].tolist(),
                "sensitivity": contributed[pair.layer].tolist(),
            }
            for pair in pairs
        ]
        spent = {"scores_s": scored - started, "limits_s": time.perf_counter() - scored}
        write_json(folder / "layers.json", {"layers": rows, **spent})

    folder = Store().once("snacs_scores", scores_inputs(study, seed), compute)
    rows = read_json(folder / "layers.json")["layers"]
    scores = load_file(folder / "scores.safetensors")
    return Analysis(
        scores={row["layer"]: scores[row["layer"]] for row in rows},
        limits={row["layer"]: row["limit"] for row in rows},
        curves={row["layer"]: row["curve"] for row in rows},
        protected={row["layer"]: torch.tensor(row["protected"]) for row in rows},
        sensitivity={row["layer"]: row["sensitivity"] for row in rows},
    )


def mint_inputs(study: Study, seed: int) -> dict[str, Any]:
    return {
        "version": VERSIONS["snacs_mint"],
        "dense": Store.key("dense", cells.dense_inputs(study, seed)),
        **study.only("split_seed", "snacs_mint_groups", "snacs_mint_images", "residual"),
    }


def mint_scores(study: Study, seed: int) -> dict[str, Tensor]:
    """MINT's scores of the dense network, without weight scaling: {layer: (child groups, parent groups)}."""

    def compute(folder: Path) -> None:
        net = cells.dense(study, seed)
        pairs, _, _ = pairs_of(study, net, study.snacs_mint_images, study.snacs_mint_groups)
        scores = connection_scores(net[1], pairs, phi="none", estimator=mint_gmi, seed=seed)
        save_file({k: v.cpu().contiguous() for k, v in scores.items()}, folder / "scores.safetensors")
        write_json(folder / "layers.json", list(scores))

    folder = Store().once("snacs_mint", mint_inputs(study, seed), compute)
    scores = load_file(folder / "scores.safetensors")
    return {layer: scores[layer] for layer in read_json(folder / "layers.json")}


# --- cells ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SnacsCell:
    """One pruned network: a method at the sparsity that SNACS reaches for a delta and seed; `none` is the dense one."""

    method: str
    delta: float
    seed: int


def snacs_cells(study: Study) -> list[SnacsCell]:
    """Every cell of the study: per seed the dense network, then each method at each delta."""
    return [
        cell
        for seed in study.seeds
        for cell in (
            SnacsCell("none", 0.0, seed),
            *(SnacsCell(method, delta, seed) for delta in study.snacs_deltas for method in study.snacs_methods),
        )
    ]


def weight_masks(masks: Masks) -> Masks:
    """The masks of weights alone: what sparsity counts."""
    return Masks({name: mask for name, mask in masks.items() if mask.ndim > 1})


def snacs_masks(study: Study, delta: float, seed: int, net: nn.Sequential) -> Masks:
    """SNACS's masks, filters without connections silenced."""
    found = analysis(study, seed)
    pairs, _, graph = pairs_of(study, net, shape_images(study))
    kept = kept_blocks(found.scores, delta, found.limits, found.protected)
    return silenced(net[1], graph, block_masks(graph, net[1], pairs, kept))


def shape_images(study: Study) -> int:
    """Images a class where only the shape of the pairs is needed."""
    return min(10, study.snacs_images)


def matched(make: Callable[[float], Masks], target: float, steps: int = 14) -> Masks:
    """The masks of the share, found by bisection, whose sparsity comes nearest to the target."""
    low, high = 0.0, 1.0
    best = make(low)
    for _ in range(steps):
        middle = (low + high) / 2
        masks = make(middle)
        if abs(sparsity(weight_masks(masks)) - target) < abs(sparsity(weight_masks(best)) - target):
            best = masks
        if sparsity(weight_masks(masks)) < target:
            low = middle
        else:
            high = middle
    return best


def cell_masks(study: Study, cell: SnacsCell, net: nn.Sequential) -> Masks:
    """The masks of a cell: SNACS's, or a peer's at the sparsity that SNACS reaches (filters without connections
    silenced in all but GC-Net's unstructured masks)."""
    own = snacs_masks(study, cell.delta, cell.seed, net)
    if cell.method == "snacs":
        return own
    target = sparsity(weight_masks(own))
    graph, model = cells.graph(study, net[1]), net[1]
    if cell.method == "gcnet":
        return hybrid_masks(
            model, graph, cells.connectivity_matrices(study, cell.seed, "pearson"), pruner=PRUNER, sparsity=target,
            hybrid=HYBRID, example_input=cells.example_input(study), seed=cell.seed, batchnorm=study.ghost_batchnorm,
        )[0]  # fmt: skip
    if cell.method == "l1_filter":
        return matched(lambda share: silenced(model, graph, filter_masks(model, graph, share)), target)
    groups = study.snacs_mint_groups if cell.method == "mint" else None
    pairs, _, _ = pairs_of(study, net, shape_images(study), groups)
    if cell.method == "mint":
        scores = mint_scores(study, cell.seed)
    else:
        scores = {pair.layer: pair.means(pair.weight.abs()).cpu() for pair in pairs}
    return matched(
        lambda share: silenced(model, graph, block_masks(graph, model, pairs, ranked_blocks(scores, share))), target
    )


def _cell_inputs(study: Study, cell: SnacsCell) -> dict[str, Any]:
    guided = cell.method == "gcnet"
    return {
        "version": VERSIONS["snacs_cell"],
        "scores": Store.key("snacs_scores", scores_inputs(study, cell.seed)),
        "mint": Store.key("snacs_mint", mint_inputs(study, cell.seed)) if cell.method == "mint" else None,
        "connectivity": (
            Store.key("connectivity", cells.connectivity_inputs(study, cell.seed, "pearson")) if guided else None
        ),
        "ghost_batchnorm": study.ghost_batchnorm if guided and study.ghost_batchnorm != "identity" else None,
        **asdict(cell),
        "finetune_epochs": study.finetune_epochs,
        "finetune_lr": study.finetune_lr,
        "precision": cells.precision(study),
    }


def cell_folder(study: Study, cell: SnacsCell, needs: Sequence[str] | None = None) -> Path:
    """The folder with `masks.safetensors`, `model.safetensors` (fine-tuned once) and `cell.json` of a pruned cell.

    needs: the files that are wanted, None for all.
    """

    def compute(folder: Path) -> None:
        net = cells.dense(study, cell.seed)
        masks = cell_masks(study, cell, net)
        before, after = cells.fine_tuned(
            study, net, folder, seed=cell.seed, epochs=study.finetune_epochs, lr=study.finetune_lr, masks=masks
        )
        weights = weight_masks(masks)
        result = {
            **asdict(cell),
            "sparsity": sparsity(weights),
            "kept_weights": sum(int(mask.sum()) for mask in weights.values()),
            "macs": macs(net[1], cells.example_input(study), weights),
            "accuracy_before": before["accuracy"],
            "accuracy": after["accuracy"],
            "val_accuracy": cells.val_accuracy(study, net),
            "layers": summary(weights),
            "structure": structure(study, net, masks),
        }
        masks.save(folder / "masks.safetensors")
        cells.save_model(net[1], folder)
        write_json(folder / "cell.json", result)

    return Store().once("snacs_cell", _cell_inputs(study, cell), compute, needs)


@torch.no_grad()
def structure(study: Study, net: nn.Sequential, masks: Masks) -> dict[str, Any]:
    """What is left when filters without connections are removed physically, and that the outputs stay the same."""
    net.eval()
    model, example = net[1], cells.example_input(study)
    graph = cells.graph(study, model)
    facts = {
        "dead_filters": sum(int(dead.sum()) for dead in dead_filters(masks, graph).values()),
        "filters": sum(graph.out_channels.values()),
        "parameters_dense": parameters(model),
        "macs_dense": macs(model, example),
    }
    try:
        smaller = remove_filters(model, graph, masks)
    except ValueError as error:  # cut through: nothing is left to run
        return {**facts, "cut": str(error)}
    x = net[0](cells.splits(study).test.images[:100].to(example.device))
    return {
        **facts,
        "parameters": parameters(smaller),
        "macs": macs(smaller, example),
        "difference": (model(x) - smaller(x)).abs().max().item(),
    }


def removal_cells(study: Study) -> list[SnacsCell]:
    """The cells whose masks take whole filters or blocks: what removal can make smaller."""
    return [cell for cell in snacs_cells(study) if cell.method not in ("none", "gcnet")]


def latency_cells(study: Study) -> list[SnacsCell]:
    """The first seed's structured cells whose networks the store holds (an unpacked one has only their facts)."""
    needs = ["cell.json", "masks.safetensors", "model.safetensors"]
    return [
        cell
        for cell in removal_cells(study)
        if cell.seed == study.seeds[0]
        and Store().find("snacs_cell", _cell_inputs(study, cell), needs)
        and "cut" not in cell_result(study, cell)["structure"]
    ]


def structure_latency_rows(study: Study) -> list[dict[str, Any]]:
    """Rows of `gcnet.cost.latency`, plus method and delta, of the first seed's networks: the dense one (method none),
    then those without their dead filters, in turn. No rows where the store holds none of them."""
    seed, chosen = study.seeds[0], latency_cells(study)
    if not chosen:
        return []
    inputs = {
        "version": VERSIONS["snacs_latency"],
        "cells": [Store.key("snacs_cell", _cell_inputs(study, cell)) for cell in chosen],
        "batches": list(LATENCY_BATCHES),
        "threads": torch.get_num_threads(),
        "device": str(cells.pick_device(study.device)),
    }

    def compute(folder: Path) -> None:
        model, timed = cells.dense(study, seed)[1], {"dense": SnacsCell("none", 0.0, seed)}
        networks, graph = {"dense": model}, cells.graph(study, model)
        for cell in chosen:
            stored = cell_folder(study, cell)
            name, masks = f"{cell.method} {cell.delta:g}", Masks.load(stored / "masks.safetensors")
            timed[name] = cell
            networks[name] = remove_filters(cells.loaded(study, seed, stored)[1], graph, masks)
        rows = latency(networks, cells.example_input(study), batch_sizes=LATENCY_BATCHES)
        write_json(folder / "latency.json", [asdict(timed[row["network"]]) | row for row in rows])

    return read_json(Store().once("snacs_latency", inputs, compute) / "latency.json")


def stored_results(study: Study, method: str = "snacs") -> Iterator[dict[str, Any]]:
    """The facts of a method's cells as far as the store has them; nothing is computed."""
    for cell in snacs_cells(study):
        folder = Store().find("snacs_cell", _cell_inputs(study, cell), ["cell.json"]) if cell.method == method else None
        if folder:
            yield read_json(folder / "cell.json")


def cell_result(study: Study, cell: SnacsCell) -> dict[str, Any]:
    """The facts of a cell; of the dense network those that it has."""
    if cell.method != "none":
        return read_json(cell_folder(study, cell, ["cell.json"]) / "cell.json")
    known = cells.cell_result(study, cells.dense_cell(cell.seed))
    return {
        **asdict(cell),
        **{name: known[name] for name in ("sparsity", "kept_weights", "macs", "accuracy_before", "accuracy", "layers")},
        "val_accuracy": cells.dense_facts(study, cell.seed)["val_accuracy"],
        "structure": {},
    }


def shift_rows(study: Study, cell: SnacsCell) -> list[dict[str, Any]]:
    """Clean, corrupted and natural-shift scores of a cell: shift, severity, accuracy, ece, images."""
    if cell.method == "none":
        return cells.shift_rows(study, cells.dense_cell(cell.seed))
    inputs = {"version": VERSIONS["snacs_shift"], "cell": Store.key("snacs_cell", _cell_inputs(study, cell))}
    return cells.scores_under_shift(
        study, "snacs_shift", inputs, lambda: cells.loaded(study, cell.seed, cell_folder(study, cell))
    )


# --- the estimator itself -------------------------------------------------------------------------------------------

# How the check against Gaussian truth calls the estimators: name -> options of acmi.
READINGS = {
    "residual": {},
    "residual, all hashed": {"linear": "hashed"},
    "projection": {"conditioning": "projection"},
}


def gaussian_layer(samples: int, parents: int, seed: int, draw: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated parents (N, P), 8 children (N, 8) that add some of them and noise, and the true information (8, P).

    seed: of the layer; draw: of its images. Jointly Gaussian, so the information of child and parent given all other
    parents is -1/2 log(1 - r^2) of their partial correlation r: with weight w, noise variance 1 and the parent's
    variance t given the others it is 1/2 log(1 + w^2 t).
    """
    of_layer, of_images = torch.Generator().manual_seed(seed), torch.Generator().manual_seed((seed << 16) + draw + 1)

    def normal(generator: torch.Generator, *size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mixing = torch.eye(parents, dtype=torch.float64) + normal(of_layer, parents, parents) / (2 * math.sqrt(parents))
    weights = normal(of_layer, 8, parents) * (torch.rand(8, parents, generator=of_layer) < 0.5)
    x = normal(of_images, samples, parents) @ mixing
    y = x @ weights.T + normal(of_images, samples, 8)
    alone = 1 / torch.linalg.inv(mixing.T @ mixing).diagonal()
    return x, y, torch.log1p(weights.square() * alone) / 2


def truth_rows(study: Study, parents: int) -> list[dict[str, Any]]:
    """The estimators against the truth of Gaussian layers: one row an estimator and sample size.

    bias: mean of estimate - truth over pairs and repeats; spread: standard deviation over repeats, averaged over pairs;
    error: root mean square; scale: mean truth. In nats.
    """
    inputs = {"version": VERSIONS["snacs_truth"], "parents": parents, **study.only("snacs_scales"),
              **study.only("snacs_truth_samples", "snacs_truth_repeats")}  # fmt: skip

    def compute(folder: Path) -> None:
        rows = []
        for samples in study.snacs_truth_samples:
            layers = [gaussian_layer(samples, parents, parents, draw) for draw in range(study.snacs_truth_repeats)]
            truth = layers[0][2]
            for name, options in READINGS.items():
                found = torch.stack(
                    [acmi(x, y, (8, parents), scales=study.snacs_scales, **options) for x, y, _ in layers]
                )  # fmt: skip
                rows.append(
                    {
                        "estimator": name,
                        "parents": parents,
                        "samples": samples,
                        "scale": truth.mean().item(),
                        "bias": (found.mean(0) - truth).mean().item(),
                        "spread": found.std(0).mean().item(),
                        "error": (found - truth).square().mean().sqrt().item(),
                    }
                )
        write_json(folder / "truth.json", rows)

    return read_json(Store().once("snacs_truth", inputs, compute) / "truth.json")


def speed_rows(study: Study, groups: int) -> list[dict[str, Any]]:
    """Seconds of the information of all pairs of groups of two layers: ours and the trees' (groups, estimator,
    seconds, ratio).

    The trees' time is that of a few pairs, times their number: every pair costs the same. "vectorised" shares the
    distances between pairs; "pair by pair" computes each pair alone, as the released scripts do. Source: the paper's
    timing (one pair of layers, N = 2,000); activations here are random, on which neither time depends.
    """
    inputs = {"version": VERSIONS["snacs_speed"], "groups": groups,
              **study.only("snacs_speed_filters", "snacs_speed_samples", "snacs_scales")}  # fmt: skip

    def compute(folder: Path) -> None:
        write_json(
            folder / "speed.json",
            time_estimators(study.snacs_speed_filters, study.snacs_speed_samples, groups, study.snacs_scales),
        )

    return read_json(Store().once("snacs_speed", inputs, compute) / "speed.json")


def time_estimators(
    filters: int, samples: int, groups: int, scales: Iterable[float] = (2.0, 3.0, 4.0), pairs: int = TIMED_PAIRS
) -> list[dict[str, Any]]:
    """Rows (groups, samples, filters, estimator, seconds, ratio, pairs_timed) of the three ways; ratio is to ours."""
    check_groups(filters, groups, "the layers that are timed")
    if groups < 2:
        raise ValueError("timing needs at least 2 groups")
    generator = torch.Generator().manual_seed(groups)
    x, y = (torch.randn(samples, filters, generator=generator) for _ in range(2))
    width = filters // groups
    scales = tuple(scales)
    acmi(x[:, : 2 * width], y[:, :width], (1, 2), scales=scales)  # what a first call costs is no part of it
    ours = _seconds(lambda: acmi(x, y, groups, scales=scales))
    # One block against the whole parent, with one child and with some more: what children share, and a tree's time.
    more = min(pairs, groups - 1)
    few = _seconds(lambda: mint_pairs(x, y, groups, 1))
    tree = max(1e-9, (_seconds(lambda: mint_pairs(x, y, groups, 1 + more)) - few) / more)
    vectorised = tree * groups**2 + max(0.0, few - tree) * groups
    alone = _seconds(lambda: [mint_alone(x, y, groups, c) for c in range(2)]) / 2 * groups**2
    rows = [
        ("hash (ours)", ours, groups**2),
        ("spanning tree, vectorised", vectorised, 2 + more),
        ("spanning tree, pair by pair", alone, 2),
    ]
    return [
        {
            "groups": groups, "samples": samples, "filters": filters, "estimator": name, "seconds": seconds,
            "ratio": seconds / ours, "pairs_timed": timed,
        }
        for name, seconds, timed in rows
    ]  # fmt: skip


def _seconds(run: Callable[[], Any], most: float = 5.0) -> float:
    """The best time of three runs, or of as many as `most` seconds allow: a busy machine only ever adds."""
    spent: list[float] = []
    while len(spent) < 3 and sum(spent) < most:
        started = time.perf_counter()
        run()
        spent.append(time.perf_counter() - started)
    return min(spent)


def mint_pairs(x: Tensor, y: Tensor, groups: int, children: int) -> Tensor:
    """MINT's scores of the first `children` child blocks with the first parent block given all others."""
    return mint_gmi(x, y[:, : children * (y.shape[1] // groups)], (children, groups), only=1)


def mint_alone(x: Tensor, y: Tensor, groups: int, child: int) -> float:
    """One pair by itself, nothing shared: all distances computed for this pair alone."""
    width = y.shape[1] // groups
    return mint_gmi(x, y[:, child * width : (child + 1) * width], (1, groups), only=1).item()


# --- the sweep ------------------------------------------------------------------------------------------------------

TRUTH_PARENTS = (4, 16)


def run_analysis(study: Study, seed: int) -> str:
    analysis(study, seed)
    return f"SNACS scores and limits, seed {seed}"


def run_mint(study: Study, seed: int) -> str:
    mint_scores(study, seed)
    return f"MINT scores, seed {seed}"


def run_cell(study: Study, cell: SnacsCell) -> str:
    cell_result(study, cell)
    shift_rows(study, cell)
    return f"{cell.method} delta {cell.delta} seed {cell.seed}"


def run_truth(study: Study, parents: int) -> str:
    truth_rows(study, parents)
    return f"Gaussian truth, {parents} parents"


def run_speed(study: Study, groups: int) -> str:
    speed_rows(study, groups)
    return f"speed, {groups} groups"


def stages(study: Study) -> Iterator[tuple[str, list[tuple[Callable[..., str], Study, Any]]]]:
    """(name, tasks) of notebook 06 in the order in which they are computed. The latency of the smaller networks is
    measured by the notebook itself: alone, with all threads."""
    first = [(run_analysis, study, seed) for seed in study.seeds]
    if "mint" in study.snacs_methods:
        first += [(run_mint, study, seed) for seed in study.seeds]
    yield "SNACS scores", [*first, *((run_truth, study, parents) for parents in TRUTH_PARENTS)]
    yield "SNACS cells", [(run_cell, study, cell) for cell in snacs_cells(study)]
    for groups in study.snacs_speed_groups:  # one after the other: they are timed
        yield "SNACS speed", [(run_speed, study, groups)]
