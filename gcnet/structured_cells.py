"""The expensive things of structured pruning, each computed once: smaller networks, shift scores, latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from gcnet import cells, cost, data, snacs_cells
from gcnet.claims import Comparison, judged
from gcnet.evaluation import bootstrap, by_shift, each_shift_once
from gcnet.store import Store, read_json, write_json
from gcnet.structured import (
    StructuredPruning,
    load_structured,
    snacs_filter_scores,
    structured_prune,
    torch_pruning,
)
from gcnet.study import Study

VERSIONS = {"structured": 1, "structured_shift": 1, "structured_latency": 1}

# Methods that torch-pruning brings, and what the figures call them.
PEERS = {"tp_magnitude": "magnitude (torch-pruning)", "tp_taylor": "Taylor (torch-pruning)", "tp_random": "random"}


@dataclass(frozen=True)
class StructuredCell:
    """One smaller network: method (a hybrid, "snacs", or a torch-pruning importance), share of MACs left, seed."""

    method: str
    macs: float
    seed: int

    @property
    def is_dense(self) -> bool:
        return self.method == "none"


def by_ghost(method: str) -> bool:
    """Whether a method needs connectivity."""
    return method not in PEERS and method not in ("none", "direct", "snacs")


def structured_cells(study: Study) -> list[StructuredCell]:
    """Per seed the dense network, then every method at every share of MACs."""
    found = []
    for seed in study.seeds:
        found.append(StructuredCell("none", 1.0, seed))
        found += [StructuredCell(m, share, seed) for share in study.structured_macs for m in study.structured_methods]
    return found


def _importance(study: Study, cell: StructuredCell, net: nn.Sequential) -> Any:
    """torch-pruning's importance of a peer method; Taylor's gradients are left in the network."""
    importances = torch_pruning().importance
    if cell.method == "tp_magnitude":
        return importances.GroupMagnitudeImportance(p=2)
    if cell.method == "tp_random":
        torch.manual_seed(cell.seed)
        return importances.RandomImportance()
    net.zero_grad(set_to_none=True)
    train_set = cells.splits(study).train
    count = min(1024, len(train_set))
    chosen = train_set.take(data.stratified(train_set.labels, count, study.split_seed + 5)[1])
    net.eval()
    for images, labels in cells.normalized_batches(net, chosen):
        loss = nn.functional.cross_entropy(net[1](images), labels, reduction="sum") / count
        loss.backward()
    return importances.GroupTaylorImportance()


def smaller(study: Study, cell: StructuredCell) -> StructuredPruning:
    """The smaller network of a cell, without fine-tuning."""
    net = cells.dense(study, cell.seed)
    batches: list[tuple[Tensor, Tensor]] = [(cells.example_input(study), torch.zeros(1, dtype=torch.int64))]
    common: dict[str, Any] = {
        "macs": cell.macs,
        "ranking": study.structured_ranking,
        "round_to": study.structured_round_to,
        "graph": cells.graph(study, net[1]),
        "seed": cell.seed,
    }
    if cell.method in PEERS:
        return structured_prune(net[1], batches, importance=_importance(study, cell, net), **common)
    if cell.method == "snacs":
        pairs, _, graph = snacs_cells.pairs_of(study, net, snacs_cells.shape_images(study))
        blocks = snacs_cells.analysis(study, cell.seed).scores
        return structured_prune(net[1], batches, scores=snacs_filter_scores(net[1], graph, pairs, blocks), **common)
    matrices = {}
    if by_ghost(cell.method):
        matrices = cells.connectivity_matrices(study, cell.seed, study.structured_similarity)
    return structured_prune(net[1], batches, hybrid=cell.method, connectivity=matrices, **common)


def _inputs(study: Study, cell: StructuredCell) -> dict[str, Any]:
    guided, similarity = by_ghost(cell.method), study.structured_similarity
    snacs = {"snacs": Store.key("snacs_scores", snacs_cells.scores_inputs(study, cell.seed))}
    return {
        "version": VERSIONS["structured"],
        "dense": Store.key("dense", cells.dense_inputs(study, cell.seed)),
        "connectivity": (
            Store.key("connectivity", cells.connectivity_inputs(study, cell.seed, similarity)) if guided else None
        ),
        **asdict(cell),
        "ranking": study.structured_ranking,
        "round_to": study.structured_round_to,
        "finetune_epochs": study.structured_finetune_epochs,
        "finetune_lr": study.structured_finetune_lr,
        "precision": cells.precision(study),
        **(snacs if cell.method == "snacs" else {}),
    }


def structured_folder(study: Study, cell: StructuredCell, needs: Sequence[str] | None = None) -> Path:
    """The folder of a smaller, fine-tuned network: what `save_structured` writes, the masks, and `cell.json`.

    needs: the files that are wanted, None for all.
    """

    def compute(folder: Path) -> None:
        pruning = smaller(study, cell)
        net = nn.Sequential(cells.network(study, cell.seed)[0].to(cells.pick_device(study.device)), pruning.network)
        before, after = cells.fine_tuned(
            study, net, folder, seed=cell.seed, epochs=study.structured_finetune_epochs,
            lr=study.structured_finetune_lr,
        )  # fmt: skip
        pruning.save(folder)
        report = pruning.report
        result = {
            **asdict(cell),
            **{name: report[name] for name in ("macs_dense", "parameters_dense", "parameters", "layers", "frozen")},
            "macs_left": report["macs"],
            "accuracy_before": before["accuracy"],
            "accuracy": after["accuracy"],
            "ece": after["ece"],
        }
        write_json(folder / "cell.json", result)

    return Store().once("structured", _inputs(study, cell), compute, needs)


def cell_result(study: Study, cell: StructuredCell) -> dict[str, Any]:
    """The facts of a smaller network: macs_dense, macs_left, parameters, accuracy before and after, layers, frozen."""
    return read_json(structured_folder(study, cell, ["cell.json"]) / "cell.json")


def structured_network(study: Study, cell: StructuredCell) -> nn.Sequential:
    """The fine-tuned smaller network of a cell behind its normalisation, in eval mode on the study's device."""
    if cell.is_dense:
        return cells.dense(study, cell.seed)
    net = cells.network(study, cell.seed)
    load_structured(net[1], structured_folder(study, cell))
    return net.to(cells.pick_device(study.device)).eval()


def structured_shift_rows(study: Study, cell: StructuredCell) -> list[dict[str, Any]]:
    """Clean, corrupted and natural-shift scores of a cell: shift, severity, accuracy, ece, images; severity 0 clean."""
    if cell.is_dense:
        return cells.shift_rows(study, cells.dense_cell(cell.seed))
    inputs = {"version": VERSIONS["structured_shift"], "cell": Store.key("structured", _inputs(study, cell))}
    return cells.scores_under_shift(study, "structured_shift", inputs, lambda: structured_network(study, cell))


def latency_networks(study: Study, chosen: Sequence[StructuredCell]) -> dict[str, nn.Module]:
    """{name: network}: the dense one of the first seed, then each smaller one that differs in its widths."""
    networks: dict[str, nn.Module] = {"dense": cells.dense(study, study.seeds[0])[1]}
    seen: set[tuple[int, ...]] = set()
    for cell in chosen:
        network = structured_network(study, cell)[1]
        widths = tuple(size for parameter in network.parameters() for size in parameter.shape)
        if widths not in seen:
            seen.add(widths)
            networks[f"{cell.method} at {cell.macs:.0%}"] = network
    return networks


def latency_cells(study: Study) -> list[StructuredCell]:
    """The first seed's smaller networks that the store holds (an unpacked one has only their facts)."""
    return [
        cell
        for cell in structured_cells(study)
        if cell.seed == study.seeds[0] and not cell.is_dense and Store().find("structured", _inputs(study, cell))
    ]


def structured_latency_rows(study: Study) -> list[dict[str, Any]]:
    """Rows of `gcnet.cost.latency` for the first seed's networks, dense and smaller in turn, plus their MAC ratios.

    No rows where the store holds none of them.
    """
    chosen = latency_cells(study)
    if not chosen:
        return []
    inputs = {
        "version": VERSIONS["structured_latency"],
        "cells": [Store.key("structured", _inputs(study, cell)) for cell in chosen],
        "batches": list(study.structured_latency_batches),
        "variants": list(study.structured_latency_variants),
        "threads": torch.get_num_threads(),
        "device": str(cells.pick_device(study.device)),
    }

    def compute(folder: Path) -> None:
        networks, example = latency_networks(study, chosen), cells.example_input(study)
        counts = {name: cost.macs(network, example) for name, network in networks.items()}
        rows = cost.latency(
            networks, example, batch_sizes=study.structured_latency_batches,
            variants=study.structured_latency_variants,
        )  # fmt: skip
        for row in rows:
            row |= {"macs": counts[row["network"]], "macs_ratio": counts[row["network"]] / counts["dense"]}
        write_json(folder / "latency.json", rows)

    return read_json(Store().once("structured_latency", inputs, compute) / "latency.json")


# --- tables ---------------------------------------------------------------------------------------------------------


def accuracy_table(study: Study) -> pd.DataFrame:
    """structured_accuracy.csv: one row a cell; the dense network is method `none`, macs_share 1."""
    rows = []
    for cell in structured_cells(study):
        shifts = pd.DataFrame(structured_shift_rows(study, cell))
        row = {"method": cell.method, "macs_share": cell.macs, "seed": cell.seed}
        if cell.is_dense:
            network, example = cells.dense(study, cell.seed)[1], cells.example_input(study)
            row |= {"macs": cost.macs(network, example), "parameters": cost.parameters(network)}
            row["accuracy_before"] = row["accuracy"] = shifts[shifts.severity == 0].accuracy.iloc[0]
        else:
            result = cell_result(study, cell)
            row |= {"macs": result["macs_left"], "parameters": result["parameters"]}
            row |= {name: result[name] for name in ("accuracy_before", "accuracy")}
        row["shifted"] = each_shift_once(shifts).accuracy.mean()
        rows.append(row)
    return pd.DataFrame(rows)


def shift_table(study: Study) -> pd.DataFrame:
    """structured_shift_accuracy.csv: one row a cell, shift and severity (0 = the clean test set)."""
    return pd.DataFrame(
        [
            {"method": cell.method, "macs_share": cell.macs, "seed": cell.seed,
             **{name: row[name] for name in ("shift", "severity", "accuracy", "ece")}}
            for cell in structured_cells(study)
            for row in structured_shift_rows(study, cell)
        ]
    )  # fmt: skip


def claims_table(study: Study, shifts: pd.DataFrame, margin: float = 0.005) -> pd.DataFrame:
    """structured_claims.csv, with the columns of claims.csv: each hybrid of the ghost against |weight| and the peers.

    Differences in accuracy under shift at the same share of MACs, seed, shift and severity. margin: the loss that
    "at least as accurate" tolerates.
    """
    ours = [m for m in study.structured_methods if by_ghost(m)]
    others = [m for m in study.structured_methods if m not in (*ours, "snacs")]
    compared = []
    for share in study.structured_macs:
        part = shifts[(shifts.severity > 0) & (shifts.macs_share == share)]
        wide = part.pivot_table(index="seed", columns=["method", "shift", "severity"], values="accuracy")
        for mine in ours:
            for other in others:
                interval = bootstrap(by_shift(wide[mine] - wide[other]))
                measure = f"accuracy under shift, difference: {mine} - {PEERS.get(other, other)} ({share:.0%} of MACs)"
                compared.append(Comparison("structured-1", measure, interval, margin=margin))
    return judged(compared)


# --- stages of the sweep --------------------------------------------------------------------------------------------


def run_structured(study: Study, cell: StructuredCell) -> str:
    if not cell.is_dense:
        cell_result(study, cell)
    structured_shift_rows(study, cell)
    return f"{cell.method} {cell.macs:g} seed {cell.seed}"


def run_connectivity(study: Study, seed: int) -> str:
    cells.connectivity_matrices(study, seed, study.structured_similarity)
    return f"connectivity seed {seed}"


def stages(study: Study) -> Iterator[tuple[str, list[tuple]]]:
    """What notebook 10 needs. The latency is measured by the notebook itself: alone, with all threads."""
    if any(by_ghost(m) for m in study.structured_methods):
        yield "connectivity", [(run_connectivity, study, seed) for seed in study.seeds]
    if "snacs" in study.structured_methods:
        yield "SNACS scores and limits", [(snacs_cells.run_analysis, study, seed) for seed in study.seeds]
    yield "smaller networks", [(run_structured, study, cell) for cell in structured_cells(study)]
