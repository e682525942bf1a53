"""The expensive things of a study, each computed once: dense training, connectivity, pruned cells, shifted sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gcnet import data, networks, paths
from gcnet.activations import sampled_rows
from gcnet.connectivity import SIMILARITIES, connectivity, spearman
from gcnet.cost import macs
from gcnet.evaluation import score
from gcnet.graph import LayerGraph, layer_graph
from gcnet.hybrid import HYBRIDS, hybrid_masks, passes_signal
from gcnet.pruning import Masks, apply_masks, collapsed_layers, prunable_layers, summary
from gcnet.shifts import NATURAL_SHIFTS, corrupt, load_cifar_c
from gcnet.store import Store, atomic_write, read_json, write_json
from gcnet.study import Study
from gcnet.training import Normalize, Recipe, fast_bfloat16, pick_device, train

# What a result depends on. A number is raised when the computation behind a kind changes its results.
VERSIONS = {"dense": 1, "connectivity": 1, "cell": 1, "corrupted": 1, "shift": 1, "flops": 1, "drift": 1,
            "unshifted": 1, "dense_facts": 1}  # fmt: skip
DATA = ("dataset", "image_size", "channels", "val_share", "split_seed", "train_images", "classes")
NETWORK = ("network", "width")
TRAINING = ("epochs", "batch_size", "lr", "schedule", "momentum", "weight_decay", "label_smoothing", "crop_padding",
            "flip")  # fmt: skip
CORRUPTION_SEED = 0


@lru_cache(maxsize=2)
def _splits(dataset: str, **options: Any) -> data.Splits:
    return data.load(dataset, **options)


def splits(study: Study) -> data.Splits:
    """The study's train, validation and test sets (kept in memory for the next call)."""
    return _splits(**study.only(*DATA))


def precision(study: Study) -> str:
    """The precision that 'auto' stands for on this machine."""
    if study.precision != "auto":
        return study.precision
    return "bfloat16" if fast_bfloat16(pick_device(study.device)) else "float32"


# --- dense networks -------------------------------------------------------------------------------------------------


def recipe(study: Study) -> Recipe:
    return Recipe(**study.only(*TRAINING))


def network(study: Study, seed: int) -> nn.Sequential:
    """Normalisation and the untrained network, as `net[0]` and `net[1]`: takes uint8 images."""
    sets = splits(study)
    model = networks.build(
        study.network, len(sets.train.classes), channels=study.channels, width=study.width, seed=seed
    )
    return nn.Sequential(Normalize(*sets.normalization()), model)


def dense_inputs(study: Study, seed: int) -> dict[str, Any]:
    """What a dense network depends on: hashed into its key, and into the key of all that is made of it."""
    return {
        "version": VERSIONS["dense"],
        **study.only(*DATA, *NETWORK, *TRAINING),
        "train_images": study.train_images or None,
        "classes": study.classes or None,
        "seed": seed,
        "precision": precision(study),
        "data_sha256": splits(study).train.sha256,
    }


def dense_folder(study: Study, seed: int, on_epoch: Callable[[dict[str, float]], None] | None = None) -> Path:
    """The folder with `model.safetensors` and `history.json` of the trained dense network of a seed."""

    def compute(folder: Path) -> None:
        net = network(study, seed).to(pick_device(study.device))
        checkpoint = folder / "checkpoint.pt"
        history = train(
            net, splits(study).train, recipe(study), seed=seed, precision=precision(study), checkpoint=checkpoint,
            on_epoch=on_epoch,
        )  # fmt: skip
        save_model(net[1], folder)
        write_json(folder / "history.json", history)
        checkpoint.unlink(missing_ok=True)

    return Store().once("dense", dense_inputs(study, seed), compute)


def save_model(model: nn.Module, folder: Path, name: str = "model.safetensors", masks: Masks | None = None) -> None:
    """Write the state of a network (without its normalisation); of the weights that have masks only what is kept."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    state |= {name: state[name][mask.cpu()] for name, mask in (masks or {}).items()}
    save_file(state, folder / name)


def loaded(study: Study, seed: int, folder: Path) -> nn.Sequential:
    """The network that `save_model` wrote, behind its normalisation, in eval mode on the study's device.

    Weights of which only the kept ones were written are put where the masks in the same folder say.
    """
    net = network(study, seed)
    state, shapes = load_file(folder / "model.safetensors"), {n: p.shape for n, p in net[1].named_parameters()}
    if any(state[name].shape != shape for name, shape in shapes.items()):
        for name, mask in Masks.load(folder / "masks.safetensors").items():
            state[name] = torch.zeros(shapes[name]).masked_scatter(mask, state[name])
    net[1].load_state_dict(state)
    return net.to(pick_device(study.device)).eval()


def dense(study: Study, seed: int) -> nn.Sequential:
    """The trained dense network of a seed, behind its normalisation, in eval mode on the study's device."""
    return loaded(study, seed, dense_folder(study, seed))


def dense_facts(study: Study, seed: int) -> dict[str, Any]:
    """weights, macs and val_accuracy (None without validation images) of a dense network."""

    def compute(folder: Path) -> None:
        net = dense(study, seed)
        facts = {
            "weights": sum(net[1].get_submodule(name).weight.numel() for name in prunable_layers(net[1])),
            "macs": macs(net[1], example_input(study)),
            "val_accuracy": val_accuracy(study, net),
        }
        write_json(folder / "dense.json", facts)

    inputs = {"version": VERSIONS["dense_facts"], "dense": Store.key("dense", dense_inputs(study, seed))}
    return read_json(Store().once("dense_facts", inputs, compute) / "dense.json")


def val_accuracy(study: Study, net: nn.Module) -> float | None:
    """Accuracy on the validation images; None where the study has none."""
    val = splits(study).val
    return score(net, val, precision=precision(study))["accuracy"] if len(val) else None


def example_input(study: Study) -> Tensor:
    """(1, C, H, W) zeros: an input's shape, on the study's device."""
    shape = (1, study.channels, study.image_size, study.image_size)
    return torch.zeros(shape, device=pick_device(study.device))


def graph(study: Study, model: nn.Module) -> LayerGraph:
    return layer_graph(model, example_input(study), residual=study.residual)


# --- connectivity ---------------------------------------------------------------------------------------------------


def normalized_batches(net: nn.Sequential, images: data.Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalised images, labels): what the network behind the normalisation takes."""
    device = next(net[1].parameters()).device
    for x, y in images.batches(250, device):
        yield net[0](x), y


def connectivity_images(study: Study) -> data.Dataset:
    """The training images, not augmented, that connectivity is measured on."""
    train_set = splits(study).train
    count = study.connectivity_images
    if not count or count >= len(train_set):
        return train_set
    return train_set.take(data.stratified(train_set.labels, int(count), study.split_seed + 3)[1])


def connectivity_inputs(study: Study, seed: int, similarity: str) -> dict[str, Any]:
    """What connectivity depends on: hashed into its key, and into the key of all that is guided by it."""
    return {
        "version": VERSIONS["connectivity"],
        "dense": Store.key("dense", dense_inputs(study, seed)),
        "similarity": similarity,
        "tap": study.tap or SIMILARITIES[similarity].tap,
        "classwise": study.classwise or None,
        "absolute": study.absolute or None,
        "residual": None if study.residual == "all" else study.residual,
        "images": study.connectivity_images or None,
        "width": "of images from everywhere" if similarity == "hsic" else None,
        "precision": "float32",
    }


def connectivity_matrices(study: Study, seed: int, similarity: str) -> dict[str, Tensor]:
    """{layer: (C_out, C_in per group)} of a dense network, measured in float32."""

    def compute(folder: Path) -> None:
        net, images = dense(study, seed), connectivity_images(study)
        if SIMILARITIES[similarity].basis == "samples":  # of which only these are kept
            images = images.take(sampled_rows(len(images), SIMILARITIES[similarity].most, seed))
        matrices = connectivity(
            net[1], normalized_batches(net, images), similarity=similarity, tap=study.tap,
            classwise=study.classwise, absolute=study.absolute, graph=graph(study, net[1]), seed=seed,
        )  # fmt: skip
        save_file({k: v.cpu().contiguous() for k, v in matrices.items()}, folder / "connectivity.safetensors")
        write_json(folder / "layers.json", list(matrices))  # the file sorts its entries by name

    folder = Store().once("connectivity", connectivity_inputs(study, seed, similarity), compute)
    device = pick_device(study.device)
    matrices = load_file(folder / "connectivity.safetensors")
    return {layer: matrices[layer].to(device) for layer in read_json(folder / "layers.json")}


# --- cells ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One point of the grid. The dense network is pruner, hybrid and similarity `none` at sparsity 0."""

    pruner: str
    hybrid: str
    similarity: str
    sparsity: float
    seed: int

    @property
    def is_dense(self) -> bool:
        return self.pruner == "none"

    def row(self) -> dict[str, Any]:
        return asdict(self)


def dense_cell(seed: int) -> Cell:
    """The dense network of a seed."""
    return Cell("none", "none", "none", 0.0, seed)


def cells(study: Study) -> list[Cell]:
    """Every cell of a study: per seed the dense network, then direct and guided pruning at each sparsity."""
    found = []
    for seed in study.seeds:
        found.append(dense_cell(seed))
        for sparsity in study.sparsities:
            for pruner in study.pruners:
                found.append(Cell(pruner, "direct", "none", sparsity, seed))
                found += [
                    Cell(pruner, hybrid, similarity, sparsity, seed)
                    for similarity, hybrids in study.guidance.items()
                    for hybrid in hybrids
                ]
            found += [Cell(pruner, "direct", "none", sparsity, seed) for pruner in study.direct_pruners]
    return found


def cell_masks(study: Study, cell: Cell, net: nn.Sequential | None = None) -> Masks:
    """The masks of a cell, without fine-tuning anything."""
    net = net or dense(study, cell.seed)
    guided = cell.hybrid != "direct"
    return hybrid_masks(
        net[1], graph(study, net[1]), connectivity_matrices(study, cell.seed, cell.similarity) if guided else {},
        pruner=cell.pruner, sparsity=cell.sparsity, hybrid=cell.hybrid, example_input=example_input(study),
        seed=cell.seed, batchnorm=study.ghost_batchnorm,
    )[0]  # fmt: skip


def cell_inputs(study: Study, cell: Cell) -> dict[str, Any]:
    guided = cell.hybrid not in ("direct", "none")
    return {
        "version": VERSIONS["cell"],
        "dense": Store.key("dense", dense_inputs(study, cell.seed)),
        "connectivity": (
            Store.key("connectivity", connectivity_inputs(study, cell.seed, cell.similarity)) if guided else None
        ),
        "ghost_batchnorm": study.ghost_batchnorm if guided and study.ghost_batchnorm != "identity" else None,
        **{k: v for k, v in cell.row().items() if k != "similarity"},
        "finetune_epochs": study.finetune_epochs,
        "finetune_lr": study.finetune_lr,
        "precision": precision(study),
    }


def fine_tuned(
    study: Study, net: nn.Sequential, folder: Path, *, seed: int, epochs: int, lr: float, masks: Masks | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores on the test images before and after `net` is fine-tuned in place; masks are applied to `net[1]` and held.

    By the study's recipe, with a peak rate and number of epochs of its own. The folder has the checkpoint meanwhile.
    """
    sets, how, checkpoint = splits(study), precision(study), folder / "checkpoint.pt"
    apply_masks(net[1], masks or {})
    before = score(net, sets.test, precision=how)
    tuning = replace(recipe(study), epochs=epochs, lr=lr, schedule="one_cycle")
    held = {f"1.{name}": mask for name, mask in (masks or {}).items()}
    train(net, sets.train, tuning, seed=seed, masks=held, precision=how, checkpoint=checkpoint)
    checkpoint.unlink(missing_ok=True)
    return before, score(net, sets.test, precision=how)


def cell_folder(study: Study, cell: Cell, needs: Sequence[str] | None = None) -> Path:
    """The folder with `masks.safetensors`, `model.safetensors` (fine-tuned) and `cell.json` of a pruned cell.

    needs: the files that are wanted, None for all.
    """

    def compute(folder: Path) -> None:
        net = dense(study, cell.seed)
        masks = cell_masks(study, cell, net)
        before, after = fine_tuned(
            study, net, folder, seed=cell.seed, epochs=study.finetune_epochs, lr=study.finetune_lr, masks=masks
        )
        result = {
            **cell.row(),
            "kept_weights": sum(int(mask.sum()) for mask in masks.values()),
            "macs": macs(net[1], example_input(study), masks),
            "accuracy_before": before["accuracy"],
            "accuracy": after["accuracy"],
            "ece": after["ece"],
            "accuracy_val": val_accuracy(study, net),
            "collapsed_layers": list(collapsed_layers(masks)),
            "passes_signal": passes_signal(net[1], masks, example_input(study)),
            "layers": summary(masks),
        }
        masks.save(folder / "masks.safetensors")
        save_model(net[1], folder, masks=masks)
        write_json(folder / "cell.json", result)

    return Store().once("cell", cell_inputs(study, cell), compute, needs)


def cell_result(study: Study, cell: Cell) -> dict[str, Any]:
    """The facts of a cell: its row, kept_weights, macs, accuracy before and after fine-tuning, layers."""
    if not cell.is_dense:
        return read_json(cell_folder(study, cell, ["cell.json"]) / "cell.json")
    facts = dense_facts(study, cell.seed)
    clean = next(row for row in shift_rows(study, cell) if row["severity"] == 0)
    return {
        **cell.row(),
        "kept_weights": facts["weights"],
        "macs": facts["macs"],
        "accuracy_before": clean["accuracy"],
        "accuracy": clean["accuracy"],
        "ece": clean["ece"],
        "accuracy_val": None,
        "collapsed_layers": [],
        "passes_signal": True,
        "layers": [],
    }


def pruned_network(study: Study, cell: Cell) -> nn.Sequential:
    """The (fine-tuned) network of a cell behind its normalisation, in eval mode."""
    return loaded(study, cell.seed, dense_folder(study, cell.seed) if cell.is_dense else cell_folder(study, cell))


def flops_rows(study: Study, seed: int, similarity: str) -> list[dict[str, Any]]:
    """Multiply-accumulates left by the study's `flops_pruner`, from masks alone: one row a hybrid and sparsity.

    similarity `none` gives direct pruning. Source: GC-Net, Fig. 4.
    """
    guided = similarity != "none"
    hybrids = [h for h in HYBRIDS if (h != "direct") == guided]
    inputs = {
        "version": VERSIONS["flops"],
        "dense": Store.key("dense", dense_inputs(study, seed)),
        "connectivity": Store.key("connectivity", connectivity_inputs(study, seed, similarity)) if guided else None,
        "ghost_batchnorm": None if study.ghost_batchnorm == "identity" else study.ghost_batchnorm,
        "pruner": study.flops_pruner,
        "hybrids": hybrids,
        "sparsities": list(study.sparsities),
        "seed": seed,
    }

    def compute(folder: Path) -> None:
        net = dense(study, seed)
        dense_macs = macs(net[1], example_input(study))
        rows = []
        for hybrid in hybrids:
            for sparsity in study.sparsities:
                cell = Cell(study.flops_pruner, hybrid, similarity, sparsity, seed)
                left = macs(net[1], example_input(study), cell_masks(study, cell, net))
                rows.append(
                    {
                        "similarity": similarity,
                        "pruner": study.flops_pruner,
                        "hybrid": hybrid,
                        "sparsity": sparsity,
                        "seed": seed,
                        "macs_dense": dense_macs,
                        "macs": left,
                    }
                )
        write_json(folder / "flops.json", rows)

    return read_json(Store().once("flops", inputs, compute) / "flops.json")


# --- shifted data ---------------------------------------------------------------------------------------------------


def shift_images(study: Study) -> data.Dataset:
    """The test images that are corrupted: a fixed, class-balanced subset."""
    test = splits(study).test
    if not study.shift_images or study.shift_images >= len(test):
        return test
    return test.take(data.stratified(test.labels, int(study.shift_images), study.split_seed + 4)[1])


def _published_corruptions(study: Study) -> Path | None:
    """CIFAR-10-C's own files, where the study is on CIFAR-10 itself and they are there."""
    folder = paths.images() / "CIFAR-10-C"
    at_32 = study.dataset == "cifar10" and study.image_size == 32 and study.channels == 3
    return folder if at_32 and folder.is_dir() else None


def corrupted_images(study: Study, name: str, severity: int) -> Tensor:
    """The shifted test images (N, C, H, W) uint8 of one corruption, from a cache made once and read by memory map."""
    published = _published_corruptions(study)
    inputs = {
        "version": VERSIONS["corrupted"],
        **study.only("dataset", "image_size", "channels", "split_seed", "shift_images", "severity_table"),
        "classes": study.classes or None,
        "data_sha256": splits(study).test.sha256,
        "name": name,
        "severity": severity,
        "seed": CORRUPTION_SEED,
        "source": "CIFAR-10-C" if published else None,
    }

    def compute(folder: Path) -> None:
        if published:
            images, _ = load_cifar_c(published, name, severity)
            test = splits(study).test
            chosen = shift_images(study)
            if len(chosen) < len(test):
                images = images[data.stratified(test.labels, int(study.shift_images), study.split_seed + 4)[1]]
        else:
            clean = shift_images(study).images
            images = corrupt(clean, name, severity, CORRUPTION_SEED, table=study.severity_table)
        with atomic_write(folder / "images.npy") as temporary, temporary.open("wb") as file:
            np.save(file, images.cpu().numpy())

    folder = Store().once("corrupted", inputs, compute)
    # "c": a private copy-on-write map; torch warns of read-only arrays
    return torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c"))


def drift_rows(study: Study, seed: int) -> list[dict[str, Any]]:
    """How far Pearson connectivity moves when it is measured on shifted instead of clean test images.

    One row a shift and layer, at severity 3 where the study has it: distance = |P_shift - P_clean| / |P_clean|
    (Frobenius), rank_correlation = Spearman's over the entries. Choice: the empirical companion to the paper's theory,
    whose statements are not at hand.
    """
    severity = 3 if 3 in study.severities else study.severities[-1]
    inputs = {
        "version": VERSIONS["drift"],
        "corrupted": VERSIONS["corrupted"] if VERSIONS["corrupted"] > 1 else None,
        **_drift_inputs(study, seed),
        "shifts": list(study.corruptions),
        "severity": severity,
        "source": "CIFAR-10-C" if _published_corruptions(study) else None,
    }

    def compute(folder: Path) -> None:
        clean = shift_images(study)
        shifted = (
            (name, severity, replace(clean, images=corrupted_images(study, name, severity)))
            for name in study.corruptions
        )
        write_json(folder / "drift.json", _drifted(study, seed, shifted))

    return read_json(Store().once("drift", inputs, compute) / "drift.json")


def unshifted_rows(study: Study, seed: int) -> list[dict[str, Any]]:
    """As `drift_rows`, for as many other test images, clean: what the choice of images alone moves. Severity 0.

    No rows where `shift_images` is all or nearly all of the test set.
    """
    test, used = splits(study).test, len(shift_images(study))
    if len(test) < 2 * used:
        return []

    def compute(folder: Path) -> None:
        kept = data.stratified(test.labels, used, study.split_seed + 4)[0]  # without the images that are corrupted
        others = test.take(kept[data.stratified(test.labels[kept], used, study.split_seed + 6)[1]])
        write_json(folder / "drift.json", _drifted(study, seed, [(OTHERS, 0, others)]))

    inputs = {"version": VERSIONS["unshifted"], **_drift_inputs(study, seed)}
    return read_json(Store().once("unshifted", inputs, compute) / "drift.json")


OTHERS = "other clean images"


def _drift_inputs(study: Study, seed: int) -> dict[str, Any]:
    return {
        "connectivity": VERSIONS["connectivity"] if VERSIONS["connectivity"] > 1 else None,
        "dense": Store.key("dense", dense_inputs(study, seed)),
        **study.only("split_seed", "shift_images", "severity_table"),
        "tap": study.tap,
        "residual": None if study.residual == "all" else study.residual,
    }


def _drifted(study: Study, seed: int, sets: Iterable[tuple[str, int, data.Dataset]]) -> list[dict[str, Any]]:
    """Rows of `drift_rows` for each (name, severity, images) against the clean images that are corrupted."""
    net = dense(study, seed)
    layers = graph(study, net[1])

    def measured(images: data.Dataset) -> dict[str, Tensor]:
        return connectivity(net[1], normalized_batches(net, images), tap=study.tap, graph=layers)

    base = measured(shift_images(study))
    return [
        {
            "seed": seed,
            "shift": name,
            "severity": severity,
            "layer": layer,
            "distance": ((matrix - base[layer]).norm() / base[layer].norm().clamp_min(1e-12)).item(),
            "rank_correlation": spearman(base[layer].reshape(-1, 1), matrix.reshape(-1, 1)).item(),
        }
        for name, severity, images in sets
        for layer, matrix in measured(images).items()
    ]


def shift_inputs(study: Study) -> dict[str, Any]:
    """What scores under shift depend on beside the network: part of the key of every such entry."""
    return {
        "corrupted": VERSIONS["corrupted"] if VERSIONS["corrupted"] > 1 else None,
        **study.only("split_seed", "shift_images", "severity_table", "severities", "natural_shifts"),
        "shifts": list(study.corruptions),
        "source": "CIFAR-10-C" if _published_corruptions(study) else None,
    }


def rows_under_shift(study: Study, facts: Callable[[data.Dataset], dict[str, Any]]) -> list[dict[str, Any]]:
    """shift, severity and `facts(images)` for the clean test set, every corrupted set and every natural shift.

    Severity 0 is the whole clean test set; natural shifts stand at severity 1.
    """
    test, subset = splits(study).test, shift_images(study)
    rows = [{"shift": "clean", "severity": 0, **facts(test)}]
    for name in study.corruptions:
        for severity in study.severities:
            images = corrupted_images(study, name, severity)
            shifted = data.Dataset(test.name, images, subset.labels, test.classes)
            rows.append({"shift": name, "severity": severity, **facts(shifted)})
    for name in study.natural_shifts:
        natural = data.load_test(NATURAL_SHIFTS[name][0], image_size=study.image_size, channels=study.channels)
        if study.classes:
            natural = natural.first_classes(study.classes)
        rows.append({"shift": name, "severity": 1, **facts(natural)})
    return rows


def scores_under_shift(
    study: Study, kind: str, made_of: dict[str, Any], network: Callable[[], nn.Module]
) -> list[dict[str, Any]]:
    """Scores of a network under every shift, see `rows_under_shift`: shift, severity, accuracy, ece, images.

    kind, made_of: of the store's entry, and what the network depends on; network: called where there is no entry yet.
    """

    def compute(folder: Path) -> None:
        net, how = network(), precision(study)
        write_json(folder / "shift.json", rows_under_shift(study, lambda images: score(net, images, precision=how)))

    return read_json(Store().once(kind, made_of | shift_inputs(study), compute) / "shift.json")


def shift_rows(study: Study, cell: Cell) -> list[dict[str, Any]]:
    """Scores of a cell under every shift: shift, severity, accuracy, ece, images."""
    made_of = Store.key("cell", cell_inputs(study, cell))
    if cell.is_dense:
        made_of = Store.key("dense", dense_inputs(study, cell.seed))
    inputs = {"version": VERSIONS["shift"], "cell": made_of}
    return scores_under_shift(study, "shift", inputs, lambda: pruned_network(study, cell))
