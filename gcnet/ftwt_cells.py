"""What notebook 08 shows, each computed once: estimates, gated and static networks, shifts, latency; its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet import snacs_cells
from gcnet.cells import (
    cell_inputs,
    cells,
    dense,
    dense_cell,
    dense_inputs,
    example_input,
    network,
    normalized_batches,
    precision,
    recipe,
    rows_under_shift,
    save_model,
    shift_inputs,
    shift_rows,
    splits,
)
from gcnet.claims import Comparison, judged
from gcnet.data import Dataset, stratified
from gcnet.dynamic import Firing, Gated, estimate_flops, gate, l1_filter_masks, measure, start_heads, train_gated
from gcnet.evaluation import accuracy, bootstrap, by_shift, calibration_error
from gcnet.skipping import DynamicInference, dense_layouts, time_ms
from gcnet.store import Store, read_json, write_json
from gcnet.study import Study
from gcnet.training import Recipe, autocast, pick_device, train

VERSIONS = {"ftwt_estimate": 1, "ftwt_cell": 1, "ftwt_shift": 1, "ftwt_latency": 1}
STATIC = "l1_filter"


@dataclass(frozen=True)
class GatedCell:
    """One network: mode decoupled or joint at an r, or l1_filter: static pruning to the MACs that decoupled reached."""

    mode: str
    r: float
    seed: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def gated_cells(study: Study) -> list[GatedCell]:
    """Every network of notebook 08, those that others are matched to first; at r = 1 there is little to match."""
    found = []
    for seed in study.seeds:
        found += [GatedCell("decoupled", r, seed) for r in study.ftwt_r]
        found += [GatedCell("joint", r, seed) for r in study.ftwt_joint_r]
        found += [GatedCell(STATIC, r, seed) for r in study.ftwt_r if r < 1]
    return found


# --- estimate before training ---------------------------------------------------------------------------------------


def estimate_images(study: Study) -> Dataset:
    """The training images, not augmented, that reductions are estimated on."""
    train_set = splits(study).train
    count = study.ftwt_estimate_images
    if not count or count >= len(train_set):
        return train_set
    return train_set.take(stratified(train_set.labels, int(count), study.split_seed + 5)[1])


def estimate_rows(study: Study, seed: int) -> list[dict[str, Any]]:
    """r, seed, macs, macs_authors, reduction, reduction_authors of the dense network's own targets, for each r."""
    r_grid = sorted({*study.ftwt_r, *study.ftwt_joint_r})
    inputs = {
        "version": VERSIONS["ftwt_estimate"],
        "dense": Store.key("dense", dense_inputs(study, seed)),
        "images": study.ftwt_estimate_images or None,
        "r": r_grid,
    }

    def compute(folder: Path) -> None:
        net = dense(study, seed)
        rows = estimate_flops(net[1], normalized_batches(net, estimate_images(study)), r_grid)
        write_json(folder / "estimate.json", rows.assign(seed=seed).to_dict("records"))

    return read_json(Store().once("ftwt_estimate", inputs, compute) / "estimate.json")


# --- trained networks -----------------------------------------------------------------------------------------------


def _cell_inputs(study: Study, cell: GatedCell) -> dict[str, Any]:
    static = cell.mode == STATIC
    return {
        "version": VERSIONS["ftwt_cell"],
        "dense": Store.key("dense", dense_inputs(study, cell.seed)),
        **cell.row(),
        **study.only("ftwt_epochs", "ftwt_lr"),
        **study.only("ftwt_head_pool", "ftwt_head_scaled", "ftwt_head_lr", "ftwt_head_cooldown", "ftwt_head_start"),
        "estimate_images": None if static or study.ftwt_head_start != "targets" else study.ftwt_estimate_images or None,
        "gradient": "divided" if cell.mode == "joint" and study.ftwt_head_scaled else None,  # dynamic.Head
        "matched": Store.key("ftwt_cell", _cell_inputs(study, replace(cell, mode="decoupled"))) if static else None,
        "precision": precision(study),
    }


def gated_recipe(study: Study) -> Recipe:
    """The backbone's training: that of the dense network with its own number of epochs and peak rate."""
    return replace(recipe(study), epochs=study.ftwt_epochs, lr=study.ftwt_lr, schedule="one_cycle")


def _gated(study: Study, cell: GatedCell, model: nn.Module, example: Tensor | None = None) -> Gated:
    mode = "decoupled" if cell.mode == STATIC else cell.mode
    example = example_input(study) if example is None else example
    return gate(
        model, example, r=cell.r, mode=mode, head_pool=study.ftwt_head_pool,
        head_scaled=study.ftwt_head_scaled, seed=cell.seed,
    )  # fmt: skip


def gated_folder(study: Study, cell: GatedCell, needs: Sequence[str] | None = None) -> Path:
    """The folder with `model.safetensors` (the gated network, trained) and `cell.json`, what it does on test images.

    needs: the files that are wanted, None for all.
    """
    if cell.mode == STATIC:
        return _static_folder(study, cell, needs)

    def compute(folder: Path) -> None:
        net = dense(study, cell.seed)
        net = nn.Sequential(net[0], _gated(study, cell, net[1]))
        sets, how = splits(study), precision(study)
        if study.ftwt_head_start == "targets":
            start_heads(net[1], normalized_batches(net, estimate_images(study)))
        history = train_gated(
            net, sets.train, gated_recipe(study), seed=cell.seed, head_lr=study.ftwt_head_lr,
            head_cooldown=study.ftwt_head_cooldown, precision=how, checkpoint=folder / "checkpoint.pt",
        )  # fmt: skip
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        save_model(net[1], folder)
        firing = _fire(study, net, sets.test)
        write_json(folder / "cell.json", {**cell.row(), **_facts(firing, sets.test), "history": history,
                                          "layers": _layer_facts(net[1], firing, sets.test)})  # fmt: skip

    return Store().once("ftwt_cell", _cell_inputs(study, cell), compute, needs)


def _static_folder(study: Study, cell: GatedCell, needs: Sequence[str] | None) -> Path:
    """The same network with the same filters off for every image, those of the smallest L1 norm in each layer."""

    def compute(folder: Path) -> None:
        matched = gated_result(study, replace(cell, mode="decoupled"))
        net = dense(study, cell.seed)
        net = nn.Sequential(net[0], _gated(study, cell, net[1]))
        sets, how = splits(study), precision(study)
        masks = l1_filter_masks(net[1], matched["macs"])
        with net[1].forced(masks):
            history = train(
                net, sets.train, gated_recipe(study), seed=cell.seed, precision=how,
                checkpoint=folder / "checkpoint.pt",
            )  # fmt: skip
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            firing = _fire(study, net, sets.test)
        save_file({name: mask[0] for name, mask in masks.items()}, folder / "masks.safetensors")
        save_model(net[1], folder)
        # No head is asked, so none is paid for.
        firing = replace(firing, macs=firing.macs - net[1].macs_heads)
        facts = {**_facts(firing, sets.test), "mask_accuracy": None}
        write_json(folder / "cell.json", {**cell.row(), **facts, "history": history,
                                          "layers": _layer_facts(net[1], firing, sets.test)})  # fmt: skip

    return Store().once("ftwt_cell", _cell_inputs(study, cell), compute, needs)


def gated_result(study: Study, cell: GatedCell) -> dict[str, Any]:
    """The facts of a network: accuracy, ece, macs, macs_authors, reductions, mask_accuracy, layers, history."""
    return read_json(gated_folder(study, cell, ["cell.json"]) / "cell.json")


def gated_network(study: Study, cell: GatedCell) -> nn.Sequential:
    """The trained gated network of a cell behind its normalisation, in eval mode. A static one has its masks forced."""
    folder = gated_folder(study, cell)
    net = network(study, cell.seed).to(pick_device(study.device))
    gated = _gated(study, cell, net[1])
    gated.load_state_dict(load_file(folder / "model.safetensors"))
    if cell.mode == STATIC:
        masks = load_file(folder / "masks.safetensors")
        for layer, block in gated.blocks.items():
            block.force = masks[layer][None].to(block.conv.weight.device)
    return nn.Sequential(net[0], gated).eval()


def _fire(study: Study, net: nn.Sequential, images: Dataset) -> Firing:
    with autocast(pick_device(study.device), precision(study)):
        return measure(net[1], normalized_batches(net, images))


def _facts(firing: Firing, images: Dataset) -> dict[str, Any]:
    filters = sum(firing.filters)
    return {
        "accuracy": accuracy(firing.logits, images.labels),
        "ece": calibration_error(firing.logits, images.labels),
        "images": len(images),
        "macs_dense": firing.macs_dense,
        "macs": firing.macs.mean().item(),
        "macs_authors": firing.macs_authors.mean().item(),
        "macs_reduction": firing.reduction,
        "macs_reduction_authors": firing.reduction_authors,
        "mask_accuracy": firing.mask_accuracy,
        "filters_used": firing.k.double().sum(1).mean().item() / filters,
        "filters_wanted": firing.k_target.double().sum(1).mean().item() / filters,
    }


def _layer_facts(gated: Gated, firing: Firing, images: Dataset) -> list[dict[str, Any]]:
    """Per layer: filters, how many are used (mean, 5 and 95 %, by class), wanted, and mask accuracy."""
    by_class = [firing.k[images.labels.cpu() == c].double().mean(0) for c in range(len(images.classes))]
    rows = []
    for column, (layer, filters) in enumerate(zip(firing.layers, firing.filters, strict=True)):
        k = firing.k[:, column].double()
        low, high = torch.quantile(k, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        rows.append(
            {
                "layer": layer,
                "filters": filters,
                "k": k.mean().item(),
                "k_low": low,
                "k_high": high,
                "k_wanted": firing.k_target[:, column].double().mean().item(),
                "mask_accuracy": firing.agreement[:, column].double().mean().item(),
                "k_by_class": [values[column].item() for values in by_class],
            }
        )
    return rows


# --- shifts ---------------------------------------------------------------------------------------------------------


def gated_shift_rows(study: Study, cell: GatedCell) -> list[dict[str, Any]]:
    """shift, severity and the facts of a network on it: accuracy, macs, mask_accuracy, filters used and wanted.

    Severity 0 is the whole clean test set; natural shifts stand at severity 1.
    """
    inputs = {
        "version": VERSIONS["ftwt_shift"],
        "cell": Store.key("ftwt_cell", _cell_inputs(study, cell)),
        **shift_inputs(study),
    }

    def compute(folder: Path) -> None:
        net = gated_network(study, cell)
        free = net[1].macs_heads if cell.mode == STATIC else 0

        def facts(images: Dataset) -> dict[str, Any]:
            firing = _fire(study, net, images)
            found = _facts(replace(firing, macs=firing.macs - free), images)
            return {**found, "mask_accuracy": None} if cell.mode == STATIC else found

        write_json(folder / "shift.json", rows_under_shift(study, facts))

    return read_json(Store().once("ftwt_shift", inputs, compute) / "shift.json")


# --- latency --------------------------------------------------------------------------------------------------------


def latency_rows(study: Study, repeats: int = 15) -> list[dict[str, Any]]:
    """r, image_size, batch, threads, macs_reduction, dense_ms (fastest layout), dense_layout, dynamic_ms, ratio.

    First seed, decoupled networks, on the CPU with one thread, in float32, on test images (resized where the size is
    another one). macs_reduction is that of the images timed.
    """
    inputs = {
        "version": VERSIONS["ftwt_latency"],
        "cells": [Store.key("ftwt_cell", _cell_inputs(study, cell)) for cell in _timed(study)],
        "sizes": list(study.ftwt_latency_sizes),
        "batches": list(study.ftwt_latency_batches),
        "repeats": repeats,
    }

    def compute(folder: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            rows = [row for cell in _timed(study) for row in _latency(study, cell, repeats)]
        finally:
            torch.set_num_threads(threads)
        write_json(folder / "latency.json", rows)

    return read_json(Store().once("ftwt_latency", inputs, compute) / "latency.json")


def _timed(study: Study) -> list[GatedCell]:
    return [GatedCell("decoupled", r, study.seeds[0]) for r in study.ftwt_r]


def _latency(study: Study, cell: GatedCell, repeats: int) -> Iterator[dict[str, Any]]:
    plain, net = dense(study, cell.seed).cpu(), gated_network(study, cell).cpu()
    dynamic, images = DynamicInference(net[1]), splits(study).test.images
    for size in study.ftwt_latency_sizes:
        for batch in study.ftwt_latency_batches:
            wanted = batch * min(repeats, len(images) // batch)
            pixels = net[0](images[:wanted].cpu()).contiguous()
            if size != study.image_size:
                pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
            parts = list(pixels.split(batch))
            spent = time_ms({**dense_layouts(plain[1], parts[0]), "dynamic": dynamic}, parts)
            dynamic_ms = spent.pop("dynamic")
            layout = min(spent, key=lambda name: spent[name])
            sized = _gated(study, cell, plain[1], parts[0])  # the same network, counted at this size
            sized.load_state_dict(net[1].state_dict())
            firing = measure(sized, [(part, torch.empty(0)) for part in parts])
            yield {
                "r": cell.r,
                "image_size": size,
                "batch": batch,
                "threads": 1,
                "macs_reduction": firing.reduction,
                "dense_layout": layout,
                "dense_ms": spent[layout],
                "dynamic_ms": dynamic_ms,
                "ratio": spent[layout] / dynamic_ms,
            }


# --- what a sweep computes ------------------------------------------------------------------------------------------


def run_estimate(study: Study, seed: int) -> str:
    estimate_rows(study, seed)
    return f"estimate seed {seed}"


def run_gated(study: Study, cell: GatedCell) -> str:
    gated_result(study, cell)
    gated_shift_rows(study, cell)
    return " ".join(str(value) for value in cell.row().values())


def run_latency(study: Study, _: None) -> str:
    latency_rows(study)
    return "latency"


def stages(study: Study) -> Iterator[tuple[str, list[tuple[Callable[..., str], Study, Any]]]]:
    """What notebook 08 needs, in order; static networks wait for those that they are matched to."""
    networks = gated_cells(study)
    yield "FTWT estimates", [(run_estimate, study, seed) for seed in study.seeds]
    yield "FTWT", [(run_gated, study, cell) for cell in networks if cell.mode != STATIC]
    yield "FTWT, static peers", [(run_gated, study, cell) for cell in networks if cell.mode == STATIC]
    yield "FTWT, latency", [(run_latency, study, None)]


# --- tables ---------------------------------------------------------------------------------------------------------


def accuracy_table(study: Study) -> pd.DataFrame:
    """ftwt_accuracy.csv: one row a network; the dense one has mode none and no r."""
    rows = []
    for seed in study.seeds:
        clean = next(row for row in shift_rows(study, dense_cell(seed)) if not row["severity"])
        rows.append({"network": study.network, "r": None, "mode": "none", "seed": seed, "accuracy": clean["accuracy"],
                     "macs_reduction": 0.0, "macs_reduction_authors": 0.0, "mask_accuracy": None,
                     "ece": clean["ece"], "filters_used": 1.0, "filters_wanted": None})  # fmt: skip
    for cell in gated_cells(study):
        result = gated_result(study, cell)
        columns = ("accuracy", "macs_reduction", "macs_reduction_authors", "mask_accuracy", "ece", "filters_used",
                   "filters_wanted")  # fmt: skip
        row = {"network": study.network, "r": cell.r, "mode": cell.mode, "seed": cell.seed}
        rows.append({**row, **{name: result[name] for name in columns}})
    return pd.DataFrame(rows)


def estimate_table(study: Study, accuracies: pd.DataFrame) -> pd.DataFrame:
    """ftwt_estimate.csv: the reduction estimated on the dense network beside that of the trained one."""
    rows = []
    for seed in study.seeds:
        estimated = {row["r"]: row for row in estimate_rows(study, seed)}
        part = accuracies[(accuracies.seed == seed) & accuracies["mode"].isin(["decoupled", "joint"])]
        for trained in part.itertuples():
            rows.append(
                {
                    "network": study.network,
                    "r": trained.r,
                    "estimated": estimated[trained.r]["reduction"],
                    "measured": trained.macs_reduction,
                    "mode": trained.mode,
                    "seed": seed,
                    "estimated_authors": estimated[trained.r]["reduction_authors"],
                    "measured_authors": trained.macs_reduction_authors,
                }
            )
    return pd.DataFrame(rows)


def layer_table(study: Study) -> pd.DataFrame:
    """ftwt_layers.csv: one row a network and layer: filters, k used (mean, 5 and 95 % over images), k wanted."""
    rows = []
    for cell in gated_cells(study):
        for layer in gated_result(study, cell)["layers"]:
            rows.append({**cell.row(), **{name: value for name, value in layer.items() if name != "k_by_class"}})
    return pd.DataFrame(rows)


def class_shares(study: Study, cell: GatedCell) -> pd.DataFrame:
    """Share of each layer's filters that images of each class use, classes down, layers across."""
    layers = gated_result(study, cell)["layers"]
    shares = {layer["layer"]: [k / layer["filters"] for k in layer["k_by_class"]] for layer in layers}
    return pd.DataFrame(shares, index=splits(study).test.classes)


def shift_table(study: Study) -> pd.DataFrame:
    """ftwt_shift.csv: one row a network, shift and severity (0 = the clean test set)."""
    columns = ("shift", "severity", "accuracy", "macs_reduction", "mask_accuracy", "filters_used", "filters_wanted")
    return pd.DataFrame(
        [
            {"network": study.network, **cell.row(), **{name: row[name] for name in columns}}
            for cell in gated_cells(study)
            for row in gated_shift_rows(study, cell)
        ]
    )


def latency_table(study: Study) -> pd.DataFrame:
    """ftwt_latency.csv: network, r, batch, threads, dense_ms, dynamic_ms, ratio, and what they were measured on."""
    order = ["network", "r", "batch", "threads", "dense_ms", "dynamic_ms", "ratio"]
    table = pd.DataFrame(latency_rows(study)).assign(network=f"{study.network} x{study.width:g}")
    return table[[*order, *(name for name in table if name not in order)]]


def unstructured_table(study: Study) -> pd.DataFrame:
    """Cells of direct pruning, GC-Net and SNACS on the same dense networks as far as the store has them.

    Columns: system, setting, seed, sparsity, macs_reduction (theoretical), accuracy. Nothing is computed for it.
    """
    found = []
    for cell in cells(study):
        folder = None if cell.is_dense else Store().find("cell", cell_inputs(study, cell), ["cell.json"])
        if folder:
            setting = f"{cell.pruner} {cell.hybrid} {cell.similarity} {cell.sparsity:g}"
            found.append(("direct" if cell.hybrid == "direct" else "GC-Net", setting, read_json(folder / "cell.json")))
    found += [("SNACS", f"delta {result['delta']:g}", result) for result in snacs_cells.stored_results(study)]
    if not found:
        return pd.DataFrame()
    total = gated_result(study, gated_cells(study)[0])["macs_dense"]
    return pd.DataFrame([
        {"system": system, "setting": setting, "seed": result["seed"], "sparsity": result["sparsity"],
         "macs_reduction": 1 - result["macs"] / total, "accuracy": result["accuracy"]}
        for system, setting, result in found
    ])  # fmt: skip


# --- claims ---------------------------------------------------------------------------------------------------------

ESTIMATE_MARGIN, ACCURACY_MARGIN = 0.05, 0.005


def claims_table(study: Study, accuracies: pd.DataFrame, estimates: pd.DataFrame, shifts: pd.DataFrame) -> pd.DataFrame:
    """ftwt_claims.csv, with the columns of claims.csv.

    Paired by seed, averaged over r and severities (see `by_shift`). Margins (choices): an estimate is good within 5
    points of MACs, "no worse" is half a point of accuracy, at the same r and at the MACs that joint training reached
    (decoupled interpolated between its r), "similar accuracy" is no loss against the static peer at the same MACs.
    """
    decoupled = estimates[estimates["mode"] == "decoupled"]
    off = decoupled.assign(value=-(decoupled.estimated - decoupled.measured).abs())
    gaps = [
        ("ftwt-1", "MACs saved, minus the distance of estimate and outcome",
         off.pivot_table(index="seed", columns="r", values="value"), ESTIMATE_MARGIN),
        ("ftwt-2", "clean accuracy, difference: decoupled - L1 filter", _gap(accuracies, "decoupled", STATIC), 0.0),
        ("ftwt-2", "accuracy under shift, difference: decoupled - L1 filter",
         _gap(shifts[shifts.severity > 0], "decoupled", STATIC), 0.0),
        ("ftwt-3", "clean accuracy at the same r, difference: decoupled - joint",
         _gap(accuracies, "decoupled", "joint"), ACCURACY_MARGIN),
        ("ftwt-3", "clean accuracy at the same MACs, difference: decoupled - joint",
         _gap_at_macs(accuracies), ACCURACY_MARGIN),
    ]  # fmt: skip
    return judged(
        [
            Comparison(claim, measure, bootstrap(by_shift(values)), margin=margin)
            for claim, measure, values, margin in gaps
            if values.size
        ]
    )


def _gap(rows: pd.DataFrame, mode: str, against: str) -> pd.DataFrame:
    """Differences in accuracy by seed (down) and r, shift and severity where there are any (across)."""
    columns = [name for name in ("r", "shift", "severity") if name in rows]
    parts = (
        rows[rows["mode"] == m].pivot_table(index="seed", columns=columns, values="accuracy") for m in (mode, against)
    )
    first, second = parts
    return (first - second).dropna(axis=1, how="any").dropna()


def _gap_at_macs(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Decoupled minus joint accuracy at the MACs that joint training reached, by seed: decoupled between its own r; a
    seed whose joint networks all save more or less than any decoupled one is left out."""
    gaps: dict[int, list[float]] = {}
    for seed, part in accuracies.groupby("seed"):
        curve = part[part["mode"] == "decoupled"].sort_values("macs_reduction")
        for joint in part[part["mode"] == "joint"].itertuples():
            if len(curve) and curve.macs_reduction.iloc[0] <= joint.macs_reduction <= curve.macs_reduction.iloc[-1]:
                there = np.interp(joint.macs_reduction, curve.macs_reduction, curve.accuracy)
                gaps.setdefault(seed, []).append(float(there) - joint.accuracy)
    return pd.DataFrame({"gap": {seed: float(np.mean(values)) for seed, values in gaps.items()}}, dtype=float)
