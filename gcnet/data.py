"""Data sets as uint8 tensors in memory: decoded once, cached, split from a seed, known by their sha256."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gcnet import paths
from gcnet.errors import unknown
from gcnet.store import atomic_write

log = logging.getLogger("gcnet")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) uint8 and labels (N,) int64 in 0..len(classes)-1, with the names of the classes."""

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"{self.name}: images must be uint8 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels")
        if len(self.labels) and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < len(self.classes)):
            low, high = int(self.labels.min()), int(self.labels.max())
            raise ValueError(f"{self.name}: labels span {low}..{high}, outside the {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Dataset:
        """The images at `index` (int64), same sha256: it names what was loaded, the index follows from the seeds."""
        return Dataset(self.name, self.images[index], self.labels[index], self.classes, self.sha256)

    def first_classes(self, count: int) -> Dataset:
        """Only the images of the first `count` classes."""
        found = self.take((self.labels < count).nonzero().flatten())
        return replace(found, classes=self.classes[:count])

    def batches(self, batch_size: int = 256, device: torch.device | str = "cpu"):
        """(images uint8, labels) in order, on `device`."""
        for start in range(0, len(self), batch_size):
            chosen = slice(start, start + batch_size)
            yield (
                self.images[chosen].to(device, non_blocking=True),
                self.labels[chosen].to(device, non_blocking=True),
            )


@dataclass(frozen=True)
class Splits:
    """Train, validation and test sets of one data set, and the statistics that normalise its images."""

    train: Dataset
    val: Dataset
    test: Dataset

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and standard deviation of the training images, in [0, 1]."""
        return self._statistics

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        count, channels = self.train.images.shape[0], self.train.images.shape[1]
        total = torch.zeros(channels, dtype=torch.float64)
        squares = torch.zeros(channels, dtype=torch.float64)
        for chunk in self.train.images.split(4096):
            values = chunk.to(torch.float64) / 255
            total += values.sum((0, 2, 3))
            squares += values.square().sum((0, 2, 3))
        pixels = count * self.train.images.shape[2] * self.train.images.shape[3]
        mean = total / pixels
        std = (squares / pixels - mean.square()).clamp_min(1e-6).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())


# --- readers: folder -> {"train": (images, labels), "test": (images, labels)}, class names -------------------------

Arrays = tuple[np.ndarray, np.ndarray]
Reader = Callable[[Path], tuple[dict[str, Arrays], tuple[str, ...]]]


def _digits(root: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return {"all": (images, digits.target.astype(np.int64))}, tuple(map(str, range(10)))


def _torchvision(name: str) -> Reader:
    def read(root: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
        from torchvision import datasets

        kind = getattr(datasets, name)
        parts: dict[str, Arrays] = {}
        classes: tuple[str, ...] = ()
        for part in ("train", "test"):
            try:
                data = kind(str(root), train=part == "train", download=False)
            except (RuntimeError, OSError):
                log.info("%s is not below %s: downloading it", name, root)
                try:
                    data = kind(str(root), train=part == "train", download=True)
                except Exception as error:
                    raise FileNotFoundError(
                        f"{name} is not (completely) below '{root}' and could not be downloaded ({error}); "
                        f"put it there in torchvision's layout or set GCNET_DATA"
                    ) from error
            images = np.asarray(data.data)
            parts[part] = (images if images.ndim == 4 else images[..., None], np.asarray(data.targets, dtype=np.int64))
            classes = tuple(getattr(data, "classes", None) or map(str, range(10)))
        return parts, classes

    return read


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"'{path}' is damaged or holds no images and labels: {error}") from error
    return images if images.ndim == 4 else images[..., None], labels.astype(np.int64)


def _usps(root: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    folder = root / "usps"
    if (folder / "train.npz").exists() and (folder / "test.npz").exists():
        return {part: _npz(folder / f"{part}.npz") for part in ("train", "test")}, tuple(map(str, range(10)))
    return _torchvision("USPS")(root)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _stl10_32(root: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """STL-10's test images of the nine classes shared with CIFAR-10, box-averaged to 32 px, CIFAR-10 labels."""
    ready = root / "stl10_32" / "test.npz"
    if ready.exists():
        return {"test": _npz(ready)}, CIFAR10_CLASSES
    from torchvision import datasets

    try:
        data = datasets.STL10(str(root), split="test", download=not (root / "stl10_binary").exists())
    except Exception as error:
        raise FileNotFoundError(
            f"stl10_32: neither '{ready}' nor STL-10 below '{root}', and no download ({error})"
        ) from error
    numbers = {"car": 1, "monkey": -1} | {c: i for i, c in enumerate(CIFAR10_CLASSES)}
    labels = np.array([numbers[data.classes[y]] for y in data.labels], dtype=np.int64)
    images = data.data.transpose(0, 2, 3, 1)[labels >= 0]
    boxes = images.reshape(len(images), 32, 3, 32, 3, 3).astype(np.float64).mean((2, 4))
    return {"test": (np.rint(boxes).astype(np.uint8), labels[labels >= 0])}, CIFAR10_CLASSES


def _decode(paths: list[Path]) -> list[np.ndarray]:
    """RGB arrays (H, W, 3) of image files. Raises ValueError that names and counts those that do not decode."""
    from PIL import Image

    def one(path: Path) -> np.ndarray | str:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            return f"{path} ({error})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        decoded = list(pool.map(one, paths))
    bad = [item for item in decoded if isinstance(item, str)]
    if bad:
        shown = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
        raise ValueError(f"{len(bad)} of {len(paths)} image files do not decode: {shown}")
    return decoded


def _same_size(images: list[np.ndarray]) -> np.ndarray:
    """One array of images of one size; other sizes are resized (shorter side, then centre crop) to the most common."""
    from PIL import Image

    sizes, counts = np.unique([i.shape[:2] for i in images], axis=0, return_counts=True)
    height, width = map(int, sizes[counts.argmax()])
    for k, image in enumerate(images):
        if image.shape[:2] != (height, width):
            scale = max(height / image.shape[0], width / image.shape[1])
            size = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
            picture = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            images[k] = np.asarray(picture.crop((left, top, left + width, top + height)))
    return np.stack(images)


def _class_folders(folder: Path, classes: tuple[str, ...], inner: str = "") -> Arrays:
    paths, labels = [], []
    for number, name in enumerate(classes):
        here = folder / name / inner if inner and (folder / name / inner).is_dir() else folder / name
        found = sorted(p for p in here.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if here.is_dir() else []
        if not found:
            raise FileNotFoundError(f"no images of class '{name}' in '{here}': the folder is missing or half there")
        paths += found
        labels += [number] * len(found)
    return _same_size(_decode(paths)), np.array(labels, dtype=np.int64)


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _image_folder(folder: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """`train/<class>/` and `test/<class>/` (or `val/`), or `<class>/` alone, which is split from the seed."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data folder '{folder}' does not exist (GCNET_DATA is '{paths.images()}') and is never downloaded; "
            "README, Data, says what goes there; for CIFAR-10 as published set dataset: cifar10"
        )
    if not (folder / "train").is_dir():
        classes = _subfolders(folder)
        if len(classes) < 2:
            raise FileNotFoundError(f"'{folder}' holds {len(classes)} class folders; at least two are needed")
        return {"all": _class_folders(folder, classes)}, classes
    held_out = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    if held_out is None:
        raise FileNotFoundError(f"'{folder}' has train/ but neither test/ nor val/")
    classes = _subfolders(folder / "train")
    if len(classes) < 2:
        raise FileNotFoundError(f"'{folder / 'train'}' holds {len(classes)} class folders; at least two are needed")
    if extra := sorted(set(_subfolders(held_out)) - set(classes)):
        raise ValueError(f"'{held_out}' has classes that training does not know: {', '.join(extra)}")
    train, test = _class_folders(folder / "train", classes), _class_folders(held_out, classes)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"'{folder}': train images are {train[0].shape[1:]}, test images {test[0].shape[1:]}; resize one of them"
        )
    return {"train": train, "test": test}, classes


def _cifar10_jpeg(root: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """CIFAR-10 re-encoded as JPEG (quality 75) in class folders: named apart, since its pixels differ."""
    return _image_folder(root / "cifar10")


def _tiny_imagenet(root: Path) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """The standard layout; the labelled `val` part serves as test set (the original test set has no labels)."""
    folder = root / "tiny-imagenet-200"
    if not (folder / "wnids.txt").exists():
        raise FileNotFoundError(
            f"tiny_imagenet: '{folder}/wnids.txt' is missing; unpack tiny-imagenet-200 below '{root}'"
        )
    classes = tuple((folder / "wnids.txt").read_text().split())
    train = _class_folders(folder / "train", classes, inner="images")
    annotations = folder / "val" / "val_annotations.txt"
    if annotations.exists() and not (folder / "val" / classes[0]).is_dir():
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
        strangers = sorted({wnid for _, wnid in rows} - set(classes))
        if strangers:
            raise ValueError(f"'{annotations}' names classes that wnids.txt does not: {', '.join(strangers)}")
        images = _same_size(_decode([folder / "val" / "images" / file for file, _ in rows]))
        test = images, np.array([classes.index(wnid) for _, wnid in rows], dtype=np.int64)
    else:
        test = _class_folders(folder / "val", classes, inner="images")
    return {"train": train, "test": test}, classes


DATASETS: dict[str, Reader] = {
    "digits": _digits,
    "cifar10": _torchvision("CIFAR10"),
    "cifar10-jpeg": _cifar10_jpeg,
    "fashion_mnist": _torchvision("FashionMNIST"),
    "mnist": _torchvision("MNIST"),
    "usps": _usps,
    "stl10_32": _stl10_32,
    "tiny_imagenet": _tiny_imagenet,
}

# Data sets that are unpacked by hand, below the root: a folder that changes is decoded again.
FOLDERS = {"cifar10-jpeg": "cifar10", "tiny_imagenet": "tiny-imagenet-200", "usps": "usps", "stl10_32": "stl10_32"}


# --- loading --------------------------------------------------------------------------------------------------------


def _resized(images: np.ndarray, image_size: int, channels: int) -> Tensor:
    """(N, H, W, C) uint8 -> (N, channels, image_size, image_size) uint8; antialiased bilinear, Rec. 601 grey."""
    from torchvision.transforms.v2 import functional

    out = torch.empty(len(images), channels, image_size, image_size, dtype=torch.uint8)
    for start in range(0, len(images), 2048):
        chunk = torch.from_numpy(np.ascontiguousarray(images[start : start + 2048])).permute(0, 3, 1, 2)
        if chunk.shape[1] == 3 and channels == 1:
            weights = torch.tensor([299, 587, 114], dtype=torch.int32).view(1, 3, 1, 1)
            luma = (chunk.int() * weights).sum(1, keepdim=True) + 500  # rounded: a grey image keeps its values
            chunk = luma.div(1000, rounding_mode="floor").to(torch.uint8)
        elif chunk.shape[1] == 1 and channels == 3:
            chunk = chunk.expand(-1, 3, -1, -1)
        elif chunk.shape[1] != channels:
            raise ValueError(f"images have {chunk.shape[1]} channels, the study asks for {channels}")
        if chunk.shape[2:] != (image_size, image_size):
            chunk = functional.resize(chunk, [image_size, image_size], antialias=True)
        out[start : start + 2048] = chunk
    return out


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}{tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def _cached(cache: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    if not cache.exists():
        return None
    try:
        with safe_open(cache, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        tensors, meta = {}, {}
    if meta.get("sha256") and _digest(tensors) == meta["sha256"]:
        return tensors, meta
    log.warning("image cache %s is damaged: decoding again", cache)
    return None


def _changed(folder: Path) -> list[tuple[str, int]]:
    """When files were last added to the folders of a data set (train/<class>/images), and its archives written."""
    found = (folder, *(p for pattern in ("*", "*/*", "*/*/images") for p in folder.glob(pattern)))
    return sorted((str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in found if p.exists())


def _load_parts(name: str, image_size: int, channels: int, root: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if name.startswith("image_folder:"):
        folder = paths.project() / Path(name.removeprefix("image_folder:")).expanduser()
        read: Callable[[], tuple[dict[str, Arrays], tuple[str, ...]]] = lambda: _image_folder(folder)  # noqa: E731
        files = sorted(folder.rglob("*")) if folder.is_dir() else []
        stats = [(str(p), s.st_size, s.st_mtime_ns) for p in files if (s := p.stat())]
        source = f"{folder.resolve()} {stats}"
    elif name in DATASETS:
        read = lambda: DATASETS[name](root)  # noqa: E731
        source = f"{name}@{root.resolve()} {_changed(root / FOLDERS[name]) if name in FOLDERS else ''}"
    else:
        raise unknown("data set", name, [*DATASETS, "image_folder:PATH"])
    where = hashlib.sha256(source.encode()).hexdigest()[:8]
    label = "image_folder" if name.startswith("image_folder:") else name
    cache = paths.runs() / "cache" / f"{label}-{image_size}px-{channels}ch-{where}.safetensors"
    found = _cached(cache)
    if found:
        return found
    parts, classes = read()
    tensors: dict[str, Tensor] = {}
    for part, (images, labels) in parts.items():
        tensors[f"{part}.images"] = _resized(images, image_size, channels)
        tensors[f"{part}.labels"] = torch.from_numpy(labels)
    meta = {"classes": json.dumps(classes), "sha256": _digest(tensors)}
    with atomic_write(cache) as temporary:
        save_file(tensors, temporary, metadata=meta)
    return tensors, meta


def stratified(labels: Tensor, share: float | int, seed: int) -> tuple[Tensor, Tensor]:
    """Split row numbers into (kept, held out) with every class in the same proportion, from the seed.

    share: the held-out share if a float in [0, 1), else the number of rows to hold out (balanced over the classes).
    Both parts are sorted. Choice.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    y = labels.numpy()[order]
    # The position of each row within its class: holding out the rows of lowest rank balances the classes.
    rank = np.empty(len(y), dtype=np.int64)
    size = np.bincount(y, minlength=int(y.max()) + 1 if len(y) else 1)
    for number in range(len(size)):
        rank[y == number] = np.arange(size[number])
    if isinstance(share, float):
        held = rank < np.rint(share * size)[y]
    else:
        held = np.zeros(len(y), dtype=bool)
        held[np.argsort(rank, kind="stable")[:share]] = True
    index = torch.from_numpy(np.sort(order[held])), torch.from_numpy(np.sort(order[~held]))
    return index[1], index[0]


def load(
    name: str,
    *,
    image_size: int = 32,
    channels: int = 3,
    val_share: float = 0.1,
    split_seed: int = 0,
    train_images: int = 0,
    classes: int = 0,
    root: Path | None = None,
) -> Splits:
    """Train, validation and test sets of a registered data set, or of a folder (`image_folder:PATH`).

    The validation set is a share of the training images, from `split_seed`; a data set without a test set of its
    own gives a quarter of its images for it (choice). train_images: at most this many training images, class-balanced
    (0: all). classes: only the first so many classes, in the data set's order (0: all). Raises ValueError for an
    unknown name or undecodable files, FileNotFoundError when images are missing or half there.
    """
    tensors, meta = _load_parts(name, image_size, channels, root or paths.images())
    names = tuple(json.loads(meta["classes"]))
    if classes and not 2 <= classes <= len(names):
        raise ValueError(f"classes must be 0 (all) or 2..{len(names)} for '{name}', got {classes}")

    def whole(part: str) -> Dataset:
        found = Dataset(name, tensors[f"{part}.images"], tensors[f"{part}.labels"], names, meta["sha256"])
        if not classes:
            return found
        return found.first_classes(classes)

    if "all.images" in tensors:
        everything = whole("all")
        rest, held = stratified(everything.labels, 0.25, split_seed)
        train, test = everything.take(rest), everything.take(held)
    else:
        if "train.images" not in tensors:
            raise ValueError(f"'{name}' has a test set only: it serves as a natural shift, not for training")
        train, test = whole("train"), whole("test")
    kept, held = stratified(train.labels, float(val_share), split_seed + 1)
    train, val = train.take(kept), train.take(held)
    if train_images and train_images < len(train):
        train = train.take(stratified(train.labels, int(train_images), split_seed + 2)[1])
    return Splits(train, val, test)


def load_test(name: str, *, image_size: int = 32, channels: int = 3, root: Path | None = None) -> Dataset:
    """The test part of a data set alone: what a natural shift is evaluated on."""
    tensors, meta = _load_parts(name, image_size, channels, root or paths.images())
    part = "test" if "test.images" in tensors else "all"
    return Dataset(
        name, tensors[f"{part}.images"], tensors[f"{part}.labels"], tuple(json.loads(meta["classes"])), meta["sha256"]
    )
