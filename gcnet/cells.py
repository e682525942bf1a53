"""The expensive things of a study, each computed once: dense training, connectivity, pruned cells, evaluations."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from gcnet import data, networks
from gcnet.store import Store, write_json
from gcnet.study import Study
from gcnet.training import Normalize, Recipe, fast_bfloat16, pick_device, train

# What a result depends on. A number is raised when the computation behind a kind changes its results.
VERSIONS = {"dense": 1}
DATA = ("dataset", "image_size", "channels", "val_share", "split_seed", "train_images")
NETWORK = ("network", "width")
TRAINING = ("epochs", "batch_size", "lr", "schedule", "momentum", "weight_decay", "label_smoothing", "crop_padding", "flip")


@lru_cache(maxsize=2)
def _splits(dataset: str, image_size: int, channels: int, val_share: float, split_seed: int, train_images: int):
    return data.load(
        dataset,
        image_size=image_size,
        channels=channels,
        val_share=val_share,
        split_seed=split_seed,
        train_images=train_images,
    )


def splits(study: Study) -> data.Splits:
    """The study's train, validation and test sets (kept in memory for the next call)."""
    return _splits(**study.only(*DATA))


def precision(study: Study) -> str:
    """The precision that 'auto' stands for on this machine."""
    if study.precision != "auto":
        return study.precision
    return "bfloat16" if fast_bfloat16(pick_device(study.device)) else "float32"


def recipe(study: Study) -> Recipe:
    return Recipe(**study.only(*TRAINING))


def network(study: Study, seed: int) -> nn.Module:
    """Normalisation and the untrained network, as `net[0]` and `net[1]`: takes uint8 images."""
    sets = splits(study)
    model = networks.build(
        study.network, len(sets.train.classes), channels=study.channels, width=study.width, seed=seed
    )
    return nn.Sequential(Normalize(*sets.normalization()), model)


def _dense_inputs(study: Study, seed: int) -> dict[str, Any]:
    return {
        "version": VERSIONS["dense"],
        **study.only(*DATA, *NETWORK, *TRAINING),
        "train_images": study.train_images or None,
        "seed": seed,
        "precision": precision(study),
        "data_sha256": splits(study).train.sha256,
    }


def dense_key(study: Study, seed: int) -> str:
    return Store.key("dense", _dense_inputs(study, seed))


def dense_folder(study: Study, seed: int, on_epoch: Any = None) -> Path:
    """The folder with `model.safetensors` and `history.json` of the trained dense network of a seed."""

    def compute(folder: Path) -> None:
        net = network(study, seed).to(pick_device(study.device))
        checkpoint = folder / "checkpoint.pt"
        history = train(
            net, splits(study).train, recipe(study), seed=seed, precision=precision(study), checkpoint=checkpoint,
            on_epoch=on_epoch,
        )  # fmt: skip
        save_file({k: v.contiguous() for k, v in net[1].state_dict().items()}, folder / "model.safetensors")
        write_json(folder / "history.json", history)
        checkpoint.unlink(missing_ok=True)

    return Store().once("dense", _dense_inputs(study, seed), compute)


def dense(study: Study, seed: int) -> nn.Module:
    """The trained dense network of a seed, with its normalisation, in eval mode on the study's device."""
    net = network(study, seed)
    net[1].load_state_dict(load_file(dense_folder(study, seed) / "model.safetensors"))
    return net.to(pick_device(study.device)).eval()
