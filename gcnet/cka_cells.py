"""The expensive things of the CKA-SR notebook, each computed once: sparse training with and without the penalty."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from gcnet import data
from gcnet.cells import (
    DATA,
    TRAINING,
    connectivity_images,
    example_input,
    fine_tuned,
    loaded,
    network,
    normalized_batches,
    precision,
    recipe,
    save_model,
    scores_under_shift,
    splits,
    val_accuracy,
)
from gcnet.cka import CKASparsityRegularizer, epsilon_sparsity, find_stages, minibatch_cka
from gcnet.claims import ALIKE, Comparison, judged
from gcnet.cost import macs
from gcnet.evaluation import bootstrap, by_shift, score
from gcnet.hybrid import ghost_prune
from gcnet.pruning import Masks, prunable_layers, weights
from gcnet.published import published
from gcnet.sparse_training import magnitude_rewinding, sparse_train
from gcnet.store import Store, read_json, write_json
from gcnet.study import Study
from gcnet.training import autocast, pick_device

# A number is raised when the computation behind a kind changes its results.
VERSIONS = {"cka_run": 1, "cka_measure": 1, "cka_shift": 1, "cka_guided": 1, "cka_cost": 1,
            "cka_weights": 1}  # fmt: skip

_PRUNABLE = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Run:
    """One training: a sparse training method at a sparsity, the penalty's beta (0: without), a seed."""

    method: str
    sparsity: float
    beta: float
    seed: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def own(study: Study) -> Study:
    """The study with the network and the epochs of CKA-SR as its own, for what builds and trains networks."""
    changed = {"network": study.cka_network, "width": study.cka_width, "epochs": study.cka_epochs}
    return study.model_copy(update=changed)


# --- training -------------------------------------------------------------------------------------------------------


def _inputs(study: Study, run: Run) -> dict[str, Any]:
    mine = own(study)
    rewinds, moves = run.method == "rewind", run.method in ("set", "rigl")
    return {
        "version": VERSIONS["cka_run"],
        **mine.only(*DATA, *TRAINING, "network", "width"),
        "train_images": study.train_images or None,
        **run.row(),
        "penalty": [study.cka_samples, study.cka_every, study.cka_variant, study.cka_reduction] if run.beta else None,
        "rewiring": [study.cka_rewire_every, study.cka_rewire_fraction] if moves else None,
        "rewind_epochs": study.cka_rewind_epochs if rewinds or run.method == "dense" else None,
        "rounds": study.cka_rounds if rewinds else None,
        "precision": precision(study),
        "data_sha256": splits(study).train.sha256,
    }


def regularizer(study: Study, net: nn.Sequential, beta: float) -> CKASparsityRegularizer | None:
    """The penalty of a study on the network behind its normalisation; None for beta 0."""
    if not beta:
        return None
    return CKASparsityRegularizer(
        net[1], example_input(study), beta=beta, samples=study.cka_samples, every=study.cka_every,
        reduction=study.cka_reduction, variant=study.cka_variant,
    )  # fmt: skip


def run_folder(study: Study, run: Run, needs: Sequence[str] | None = None) -> Path:
    """The folder with `model.safetensors`, `masks.safetensors`, `run.json` and `history.json` of a training.

    Dense networks also leave `early.safetensors`, the weights that rewinding goes back to. needs: the files that are
    wanted, None for all.
    """

    def compute(folder: Path) -> None:
        mine, sets, how = own(study), splits(study), precision(study)
        net = network(mine, run.seed).to(pick_device(study.device))
        early = folder / "early.safetensors"
        if run.method == "dense" and not study.cka_rewind_epochs:
            save_model(net[1], folder, early.name)

        def keep_early(row: dict[str, float]) -> None:
            if run.method == "dense" and row["epoch"] == study.cka_rewind_epochs:
                save_model(net[1], folder, early.name)

        layers = [f"1.{name}" for name, module in net[1].named_modules() if isinstance(module, _PRUNABLE)]
        common = {"seed": run.seed, "sparsity": run.sparsity, "layers": layers, "precision": how}
        if run.method == "rewind":
            trained = run_folder(study, replace(run, method="dense", sparsity=0.0))
            net = loaded(mine, run.seed, trained)
            start = {f"1.{name}": value for name, value in load_file(trained / "early.safetensors").items()}
            masks, history = magnitude_rewinding(
                net, start, sets.train, recipe(mine), penalty=regularizer(study, net, run.beta), folder=folder,
                rounds=study.cka_rounds, rewind_epochs=study.cka_rewind_epochs, **common,
            )  # fmt: skip
        else:
            masks, history = sparse_train(
                net, sets.train, recipe(mine), method=run.method, penalty=regularizer(study, net, run.beta),
                every=study.cka_rewire_every, fraction=study.cka_rewire_fraction, checkpoint=folder / "checkpoint.pt",
                on_epoch=keep_early, **common,
            )  # fmt: skip
        for left in (*folder.glob("*.pt"), *folder.glob("round*.masks")):
            left.unlink()
        masks = Masks({name.removeprefix("1."): mask for name, mask in masks.items()})
        masks.save(folder / "masks.safetensors")
        save_model(net[1], folder)
        write_json(folder / "history.json", history)
        weights = sum(net.get_submodule(layer).weight.numel() for layer in layers)
        test = score(net, sets.test, precision=how)
        result = {
            **run.row(),
            "accuracy": test["accuracy"],
            "val_accuracy": val_accuracy(study, net),
            "ece": test["ece"],
            "weights": weights,
            "kept_weights": sum(int(mask.sum()) for mask in masks.values()) if masks else weights,
            "macs": macs(net[1], example_input(study), masks),
        }
        write_json(folder / "run.json", result)

    return Store().once("cka_run", _inputs(study, run), compute, needs)


def run_result(study: Study, run: Run) -> dict[str, Any]:
    """method, sparsity, beta, seed, accuracy (test), val_accuracy, ece, weights, kept_weights."""
    return read_json(run_folder(study, run, ["run.json"]) / "run.json")


def run_network(study: Study, run: Run) -> tuple[nn.Sequential, Masks]:
    """The trained network behind its normalisation, in eval mode, and its masks (none if dense)."""
    folder = run_folder(study, run)
    return loaded(own(study), run.seed, folder), Masks.load(folder / "masks.safetensors")


# --- beta, chosen on validation images ------------------------------------------------------------------------------


def choice_runs(study: Study) -> list[Run]:
    """The runs that beta is chosen on: RST at one sparsity, seeds of their own, beta 0 for comparison."""
    if len(study.cka_betas) == 1:
        return []
    betas = (0.0, *study.cka_betas)
    return [Run("rst", study.cka_choice_sparsity, beta, seed) for beta in betas for seed in study.cka_choice_seeds]


def choice_table(study: Study) -> pd.DataFrame:
    """cka_sr_choice.csv: beta, seed, val_accuracy of the runs that beta is chosen on."""
    rows = [run_result(study, run) for run in choice_runs(study)]
    return pd.DataFrame(rows, columns=["method", "sparsity", "beta", "seed", "val_accuracy"])


def chosen_beta(study: Study) -> float:
    """The beta of the highest mean accuracy on validation images (of equal ones the smallest), or the only one."""
    if len(study.cka_betas) == 1:
        return study.cka_betas[0]
    table = choice_table(study)
    means = table[table.beta > 0].groupby("beta").val_accuracy.mean()
    return float(means.idxmax())


# --- the runs of a study --------------------------------------------------------------------------------------------

# (method, sparsity, whether the penalty is on, seed): a run before beta is chosen.
Plan = tuple[str, float, bool, int]


def seeds_at(study: Study, sparsity: float) -> tuple[int, ...]:
    """Every seed at a headline sparsity (if none is named, at all of them), else the first three."""
    headline = study.cka_headline_sparsities or study.cka_sparsities
    return study.seeds if sparsity in headline else study.seeds[:3]


def planned(study: Study) -> list[Plan]:
    """Every sparse training of a study, each without and with the penalty."""
    return [
        (method, sparsity, on, seed)
        for sparsity in study.cka_sparsities
        for seed in seeds_at(study, sparsity)
        for method in study.cka_methods
        for on in (False, True)
    ]


def planned_dense(study: Study) -> list[Plan]:
    """The dense trainings that rewinding and GC-Net start from."""
    if "rewind" not in study.cka_methods and not study.cka_guided_sparsity:
        return []
    return [("dense", 0.0, on, seed) for seed in study.seeds for on in (False, True)]


def settled(study: Study, plan: Plan) -> Run:
    method, sparsity, on, seed = plan
    return Run(method, sparsity, chosen_beta(study) if on else 0.0, seed)


def runs(study: Study) -> list[Run]:
    return [settled(study, plan) for plan in (*planned_dense(study), *planned(study))]


def measured_runs(study: Study) -> list[Run]:
    """Runs whose representations are compared: dense and RST ones, and those that beta is chosen on."""
    return [run for run in (*runs(study), *choice_runs(study)) if run.method in ("dense", "rst")]


def accuracy_table(study: Study) -> pd.DataFrame:
    """cka_sr_accuracy.csv: method, sparsity, beta, seed, accuracy, ...; one row a training."""
    columns = ["method", "sparsity", "beta", "seed", "accuracy", "val_accuracy", "ece", "kept_weights", "weights"]
    return pd.DataFrame([run_result(study, run) for run in runs(study)], columns=columns)


def published_table(study: Study, accuracy: pd.DataFrame) -> pd.DataFrame:
    """cka_sr_published.csv: source, dataset, method, sparsity, without, with, augmented (AugCKA-SR), gain."""
    rows = []
    for (method, sparsity), part in accuracy[accuracy.method == "rst"].groupby(["method", "sparsity"]):
        means = part.groupby("beta").accuracy.mean()
        row = {"source": "ours", "dataset": study.dataset, "method": method.upper(), "sparsity": sparsity}
        rows.append({**row, "without": means[0.0], "with": means[means.index.max()], "augmented": None})
    given = published("CKA-SR")
    keys = ["source", "dataset", "sparsity"]
    names = {"RST": "without", "RST + CKA-SR": "with", "RST + AugCKA-SR": "augmented"}
    given = given.pivot(index=keys, columns="method", values="accuracy").rename(columns=names).reset_index()
    table = pd.concat([pd.DataFrame(rows), given.assign(method="RST")], ignore_index=True)
    return table.assign(gain=table["with"] - table["without"])


# --- what the penalty does to a network -----------------------------------------------------------------------------


def measured(study: Study, run: Run) -> dict[str, Any]:
    """{"layers", "cka" (a list of rows), "stages", "epsilon": [[epsilon, share of the kept weights below it], ...]}.

    Similarity: minibatch CKA of the block outputs on test images, in float32, batches of 128.
    """
    inputs = {
        "version": VERSIONS["cka_measure"],
        "run": Store.key("cka_run", _inputs(study, run)),
        "images": study.cka_images,
        "epsilons": list(study.cka_epsilons),
        "split_seed": study.split_seed,
    }

    def compute(folder: Path) -> None:
        net, masks = run_network(study, run)
        test = splits(study).test
        if study.cka_images < len(test):
            test = test.take(data.stratified(test.labels, study.cka_images, study.split_seed + 5)[1])
        size = min(128, len(test))
        batches = ((net[0](x), y) for x, y in test.batches(size, pick_device(study.device)))
        names, matrix = minibatch_cka(net[1], batches)
        small = epsilon_sparsity(net[1], study.cka_epsilons, masks)
        result = {
            "layers": list(names),
            "cka": matrix.tolist(),
            "stages": [list(stage) for stage in find_stages(net[1], example_input(study))],
            "epsilon": [[epsilon, share] for epsilon, share in small.items()],
        }
        write_json(folder / "measure.json", result)

    return read_json(Store().once("cka_measure", inputs, compute) / "measure.json")


def similarity_table(study: Study) -> pd.DataFrame:
    """cka_sr_similarity.csv: layer_i, layer_j, beta, seed, cka, method, sparsity, same_stage; every ordered pair."""
    rows = []
    for run in measured_runs(study):
        found = measured(study, run)
        stage = {name: k for k, names in enumerate(found["stages"]) for name in names}
        for i, values in zip(found["layers"], found["cka"], strict=True):
            for j, value in zip(found["layers"], values, strict=True):
                row = {"layer_i": i, "layer_j": j, "beta": run.beta, "seed": run.seed, "cka": value}
                same = i != j and i in stage and stage.get(i) == stage.get(j)
                rows.append({**row, "method": run.method, "sparsity": run.sparsity, "same_stage": same})
    return pd.DataFrame(rows)


def epsilon_table(study: Study) -> pd.DataFrame:
    """cka_sr_epsilon.csv: epsilon, beta, seed, share (of the kept weights), method, sparsity."""
    rows = [
        {"epsilon": epsilon, "beta": run.beta, "seed": run.seed, "share": share, "method": run.method,
         "sparsity": run.sparsity}
        for run in measured_runs(study)
        for epsilon, share in measured(study, run)["epsilon"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


WEIGHT_BINS = np.geomspace(1e-6, 10, 71)  # of |weight|; the first and last hold what lies beyond


def weight_shares(study: Study, run: Run) -> list[float]:
    """Percent of the Conv2d and Linear weights that the masks of a run keep in each of WEIGHT_BINS."""
    inputs = {"version": VERSIONS["cka_weights"], "run": Store.key("cka_run", _inputs(study, run))}

    def compute(folder: Path) -> None:
        net, masks = run_network(study, run)
        every = weights(net[1], prunable_layers(net[1]))
        sizes = torch.cat([w[masks[n].to(w.device)] if masks else w.flatten() for n, w in every.items()]).abs().cpu()
        counts, _ = np.histogram(np.clip(sizes.numpy(), 1.01e-6, 9.9), WEIGHT_BINS)
        write_json(folder / "weights.json", (100 * counts / len(sizes)).tolist())

    return read_json(Store().once("cka_weights", inputs, compute) / "weights.json")


def drawn_runs(study: Study) -> list[Run]:
    """The RST runs whose similarity and weights are drawn, by beta; none where the study has no RST run.

    At the sparsity that beta is chosen at, else the highest; of the first seed with the most betas.
    """
    rst = [run for run in dict.fromkeys(measured_runs(study)) if run.method == "rst"]
    levels = sorted({run.sparsity for run in rst}, key=lambda level: (level == study.cka_choice_sparsity, level))
    found = [run for run in rst if run.sparsity == levels[-1]]
    seeds = sorted(run.seed for run in found)
    return sorted((run for run in found if run.seed == max(seeds, key=seeds.count)), key=lambda run: run.beta)


# --- under shift ----------------------------------------------------------------------------------------------------


def shifted(study: Study, run: Run) -> list[dict[str, Any]]:
    """Clean, corrupted and natural-shift scores of a run: shift, severity (0 = clean), accuracy, ece, images."""
    inputs = {"version": VERSIONS["cka_shift"], "run": Store.key("cka_run", _inputs(study, run))}
    return scores_under_shift(study, "cka_shift", inputs, lambda: run_network(study, run)[0])


def shift_table(study: Study) -> pd.DataFrame:
    """cka_sr_shift_accuracy.csv: method, sparsity, beta, seed, shift, severity, accuracy, ece."""
    rows = [
        {**run.row(), **{name: row[name] for name in ("shift", "severity", "accuracy", "ece")}}
        for run in runs(study)
        if run.method in study.cka_shift_methods
        for row in shifted(study, run)
    ]
    return pd.DataFrame(rows, columns=["method", "sparsity", "beta", "seed", "shift", "severity", "accuracy", "ece"])


# --- GC-Net on networks trained with the penalty --------------------------------------------------------------------


def guided(study: Study, run: Run, hybrid: str) -> dict[str, Any]:
    """A dense run pruned directly or under guidance and fine-tuned: accuracy_before, accuracy (test)."""
    inputs = {
        "version": VERSIONS["cka_guided"],
        "run": Store.key("cka_run", _inputs(study, run)),
        "pruner": study.flops_pruner,
        "hybrid": hybrid,
        "sparsity": study.cka_guided_sparsity,
        **study.only("finetune_epochs", "finetune_lr", "residual", "tap"),
        "classwise": study.classwise or None,
        "absolute": study.absolute or None,
        "images": study.connectivity_images or None,
        "ghost_batchnorm": None if study.ghost_batchnorm == "identity" else study.ghost_batchnorm,
    }

    def compute(folder: Path) -> None:
        net, _ = run_network(study, run)
        found = ghost_prune(
            net[1], normalized_batches(net, connectivity_images(study)), pruner=study.flops_pruner, hybrid=hybrid,
            sparsity=study.cka_guided_sparsity, residual=study.residual, tap=study.tap, classwise=study.classwise,
            absolute=study.absolute, batchnorm=study.ghost_batchnorm, seed=run.seed,
        )  # fmt: skip
        before, after = fine_tuned(
            study, net, folder, seed=run.seed, epochs=study.finetune_epochs, lr=study.finetune_lr, masks=found.masks
        )
        write_json(folder / "guided.json", {"accuracy_before": before["accuracy"], "accuracy": after["accuracy"]})

    return read_json(Store().once("cka_guided", inputs, compute) / "guided.json")


GUIDED_HYBRIDS = ("direct", "B25")


def guided_table(study: Study) -> pd.DataFrame:
    """cka_sr_guided.csv: pruner, hybrid, sparsity, beta, seed, accuracy_before, accuracy (after fine-tuning)."""
    rows = []
    for plan in planned_dense(study) if study.cka_guided_sparsity else []:
        run = settled(study, plan)
        for hybrid in GUIDED_HYBRIDS:
            row = {"pruner": study.flops_pruner, "hybrid": hybrid, "sparsity": study.cka_guided_sparsity}
            rows.append({**row, "beta": run.beta, "seed": run.seed, **guided(study, run, hybrid)})
    return pd.DataFrame(rows)


# --- what it costs --------------------------------------------------------------------------------------------------


def cost_rows(study: Study, repeats: int = 12) -> list[dict[str, Any]]:
    """Seconds of a training step with and without the penalty, steps in turn, medians: cka_sr_cost.csv.

    At the study's own setting, the authors' (8 samples, every 5th batch) and the dearest (the whole batch, always).
    """
    settings = dict.fromkeys([(study.cka_samples, study.cka_every), (8, 5), (study.batch_size, 1)])
    inputs = {
        "version": VERSIONS["cka_cost"],
        **own(study).only("network", "width", "batch_size", "image_size", "channels"),
        "settings": [list(setting) for setting in settings],
        "precision": precision(study),
        "device": str(pick_device(study.device)),
    }

    def compute(folder: Path) -> None:
        device = pick_device(study.device)
        net = network(own(study), 0).to(device).train()
        sets = splits(study).train
        images, labels = (part[: study.batch_size].to(device) for part in (sets.images, sets.labels))

        def seconds(penalty: CKASparsityRegularizer | None) -> float:
            started = time.perf_counter()
            with autocast(device, precision(study)):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), labels)
            net.zero_grad(set_to_none=True)
            (loss if penalty is None else loss + penalty()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        rows = []
        for samples, every in settings:
            plain, acting = [], []
            for _ in range(repeats):
                plain.append(seconds(None))
                penalty = CKASparsityRegularizer(net[1], example_input(study), samples=samples, every=1)
                acting.append(seconds(penalty))
                penalty.remove()
            without, dear = statistics.median(plain[2:]), statistics.median(acting[2:])
            blocks = len(penalty.names)
            rows.append(
                {
                    "samples": samples,
                    "every": every,
                    "step_s": without,
                    "step_with_s": without + (dear - without) / every,
                    "overhead": (dear / without - 1) / every,
                    "gram_bytes": 4 * blocks * min(samples, len(images)) ** 2,
                    "blocks": blocks,
                    "batch_size": len(images),
                }
            )
        write_json(folder / "cost.json", rows)

    return read_json(Store().once("cka_cost", inputs, compute) / "cost.json")


def cost_table(study: Study) -> pd.DataFrame:
    """cka_sr_cost.csv: samples, every, step_s, step_with_s, overhead, gram_bytes, blocks, batch_size."""
    return pd.DataFrame(cost_rows(study))


# --- claims ---------------------------------------------------------------------------------------------------------


def paired(rows: pd.DataFrame, beta: float, value: str) -> pd.Series:
    """With `beta` less without, per seed; rows are averaged over everything else first."""
    by = rows.groupby(["beta", "seed"])[value].mean().unstack("beta")
    return (by[beta] - by[0.0]).dropna() if beta in by and 0.0 in by else pd.Series(dtype=float)


def claims_table(
    study: Study, accuracy: pd.DataFrame, similarity: pd.DataFrame, epsilon: pd.DataFrame, shifts: pd.DataFrame,
    combined: pd.DataFrame,
) -> pd.DataFrame:  # fmt: skip
    """cka_sr_claims.csv, with the columns of claims.csv: differences with less without the penalty, paired by seed.

    Only the chosen beta and the study's own seeds: the runs that beta was chosen on judge nothing.
    """
    compared: list[Comparison] = []

    def add(
        claim: str, measure: str, differences: pd.Series | pd.DataFrame, sparsity: float, smallest: float = 0.002
    ) -> None:
        values = differences.dropna().to_numpy()  # not every seed has every sparsity
        if len(values):
            word = "" if values.any() else ALIKE
            compared.append(Comparison(claim, measure, bootstrap(values), sparsity, smallest=smallest, word=word))

    beta = chosen_beta(study)
    similarity, epsilon = (rows[rows.seed.isin(study.seeds)] for rows in (similarity, epsilon))
    for (method, sparsity), part in similarity[similarity.same_stage].groupby(["method", "sparsity"], sort=False):
        seeds = paired(part, beta, "cka")
        add("cka-sr-1", f"fall of CKA inside stages: {method}, beta {beta:g}", -seeds, sparsity, 0.01)
    for (method, sparsity, level), part in epsilon.groupby(["method", "sparsity", "epsilon"], sort=False):
        seeds = paired(part, beta, "share")
        add("cka-sr-2", f"share of kept weights below {level:g}: {method}, beta {beta:g}", seeds, sparsity, 0.001)
    gains = {}
    for (method, sparsity), part in accuracy.groupby(["method", "sparsity"], sort=False):
        gains[method, sparsity] = paired(part, beta, "accuracy")
        if method != "dense":
            add("cka-sr-3", f"clean accuracy: {method}, beta {beta:g}", gains[method, sparsity], sparsity)
    *lower, highest = sorted(study.cka_sparsities)
    for method in study.cka_methods if lower else []:
        others = sum(gains[method, s] for s in lower) / len(lower)
        name = f"gain at {highest:g} less mean gain at lower sparsities: {method}, beta {beta:g}"
        add("cka-sr-4", name, gains[method, highest] - others, highest)
    for (method, sparsity), part in shifts[shifts.severity > 0].groupby(["method", "sparsity"], sort=False):
        wide = part.pivot_table(index="seed", columns=["beta", "shift", "severity"], values="accuracy")
        if {beta, 0.0} <= set(wide.columns.unique("beta")):
            gain = pd.DataFrame(by_shift((wide[beta] - wide[0.0]).dropna()))
            add("cka-sr-5", f"accuracy under shift: {method}, beta {beta:g}", gain, sparsity)
    guided = combined[combined.hybrid != "direct"] if len(combined) else combined  # direct pruning stands beside it
    for hybrid, part in guided.groupby("hybrid", sort=False) if len(guided) else []:
        level = study.cka_guided_sparsity
        add("cka-sr-6", f"accuracy after pruning: {hybrid}, beta {beta:g}", paired(part, beta, "accuracy"), level)
    return judged(compared)


# --- the sweep ------------------------------------------------------------------------------------------------------


def run_choice(study: Study, run: Run) -> str:
    measured(study, run)
    weight_shares(study, run)
    return f"beta {run.beta:g}, seed {run.seed}"


def run_plan(study: Study, plan: Plan) -> str:
    run = settled(study, plan)
    run_result(study, run)
    if run.method in ("dense", "rst"):
        measured(study, run)
    if run.method == "rst":
        weight_shares(study, run)
    if run.method in study.cka_shift_methods:
        shifted(study, run)
    return " ".join(str(value) for value in run.row().values())


def run_guided(study: Study, of: tuple[Plan, str]) -> str:
    guided(study, settled(study, of[0]), of[1])
    return f"{of[1]} pruning, seed {of[0][3]}"


def stages(study: Study) -> Iterator[tuple[str, list[tuple[Any, Study, Any]]]]:
    """What the sweep computes for notebook 07; beta is settled in the workers, when the choice is in the store."""
    if choice := choice_runs(study):
        yield "CKA-SR, choice of beta", [(run_choice, study, run) for run in choice]
    if dense := planned_dense(study):
        yield "CKA-SR, dense", [(run_plan, study, plan) for plan in dense]
    yield "CKA-SR", [(run_plan, study, plan) for plan in planned(study)]
    if study.cka_guided_sparsity:
        both = [(plan, hybrid) for plan in dense for hybrid in GUIDED_HYBRIDS]
        yield "CKA-SR, GC-Net", [(run_guided, study, of) for of in both]
