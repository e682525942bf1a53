"""Data sets: every image once, at the right place, with the right label, or an error that names what is wrong."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

from gcnet import paths
from gcnet.data import DATASETS, Dataset, load, load_test, stratified


def picture(path: Path, value: int | tuple[int, int, int] | np.ndarray, size: tuple[int, int] = (8, 8)) -> None:
    """A PNG of one colour (or of an array), size as (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, np.ndarray):
        Image.fromarray(value).save(path)
    else:
        Image.new("L" if isinstance(value, int) else "RGB", size, value).save(path)


def folder_of(root: Path, part: str = "", per_class: int = 3, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """Image k of class c has grey value 100 c + 10 k; 100 more in a test part."""
    for c, name in enumerate(classes):
        for k in range(per_class):
            picture(root / part / name / f"{k:03}.png", 100 * c + 10 * k + 5 * (part in ("test", "val")))
    return root


def greys(data: Dataset) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


def rows(*parts: Dataset) -> Tensor:
    return torch.cat([part.images.flatten(1) for part in parts])


# --- digits ---------------------------------------------------------------------------------------------------------


def test_digits_are_split_into_disjoint_parts_that_hold_every_image() -> None:
    sets = load("digits", image_size=8, channels=1)
    assert [len(sets.train), len(sets.val), len(sets.test)] == [1211, 136, 450]
    whole = np.rint(load_digits().data * (255 / 16)).astype(np.uint8)
    ours = rows(sets.train, sets.val, sets.test).numpy()
    assert np.array_equal(ours[np.lexsort(ours.T)], whole[np.lexsort(whole.T)])


def test_digits_have_their_labels() -> None:
    digits = load_digits()
    label_of = {np.rint(x * (255 / 16)).astype(np.uint8).tobytes(): y for x, y in zip(digits.data, digits.target)}  # noqa: B905
    sets = load("digits", image_size=8, channels=1)
    for part in (sets.train, sets.val, sets.test):
        assert [label_of[row.tobytes()] for row in rows(part).numpy()] == part.labels.tolist()
        assert part.classes == tuple("0123456789") and part.images.dtype == torch.uint8


def test_splits_follow_from_the_seed() -> None:
    first, again = load("digits", channels=1), load("digits", channels=1)
    other = load("digits", channels=1, split_seed=1)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(first, part).images, getattr(again, part).images)
        assert not torch.equal(getattr(first, part).images, getattr(other, part).images)


def test_the_validation_part_follows_from_the_seed(tmp_path: Path) -> None:
    mine = f"image_folder:{folder_of(folder_of(tmp_path / 'mine', 'train', per_class=9), 'test')}"
    first, again, other = (load(mine, image_size=8, channels=1, val_share=0.5, split_seed=k) for k in (0, 0, 1))
    assert greys(first.val) == greys(again.val) != greys(other.val)
    assert greys(first.test) == greys(other.test)


def test_every_class_has_its_share_in_every_part() -> None:
    sets = load("digits", channels=1, val_share=0.1)
    whole = np.bincount(load_digits().target)
    assert np.array_equal(sets.test.labels.bincount().numpy(), np.rint(0.25 * whole))
    assert np.array_equal(sets.val.labels.bincount().numpy(), np.rint(0.1 * (whole - np.rint(0.25 * whole))))


def test_the_sha256_of_what_was_loaded_is_stable() -> None:
    # Not resized: the digest is that of scikit-learn's images and labels alone.
    sets = load("digits", image_size=8, channels=1)
    assert sets.train.sha256 == sets.test.sha256 == "1cb4d70ff1855bc8fc340af97ade4133ddb4ca60eef08a264991529d553bf942"
    assert load("digits", image_size=16, channels=1).train.sha256 != sets.train.sha256


def test_fewer_training_images_are_balanced_and_leave_the_rest_alone() -> None:
    whole, few = load("digits", channels=1), load("digits", channels=1, train_images=200)
    assert len(few.train) == 200 and few.train.labels.bincount().tolist() == [20] * 10
    assert torch.equal(few.val.images, whole.val.images) and torch.equal(few.test.images, whole.test.images)
    known = {row.numpy().tobytes() for row in rows(whole.train)}
    assert all(row.numpy().tobytes() in known for row in rows(few.train))


def test_no_validation_set() -> None:
    sets = load("digits", channels=1, val_share=0)
    assert len(sets.val) == 0 and len(sets.train) + len(sets.test) == 1797


def test_normalisation_is_that_of_the_training_images() -> None:
    sets = load("digits", image_size=16, channels=3)
    mean, std = sets.normalization()
    values = sets.train.images.numpy().astype(np.float64) / 255
    assert np.allclose(mean, values.mean((0, 2, 3))) and np.allclose(std, values.std((0, 2, 3)))


# --- image folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_with_train_and_test(tmp_path: Path, held_out: str) -> None:
    folder_of(tmp_path / "mine", "train")
    folder_of(tmp_path / "mine", held_out, per_class=2)
    sets = load(f"image_folder:{tmp_path}/mine", image_size=8, channels=1, val_share=0)
    assert sets.train.classes == ("ant", "bee")
    assert greys(sets.train) == [0, 10, 20, 100, 110, 120] and sets.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert greys(sets.test) == [5, 15, 105, 115] and sets.test.labels.tolist() == [0, 0, 1, 1]


def test_a_folder_of_classes_alone_is_split(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", per_class=8)
    sets = load(f"image_folder:{tmp_path}/mine", image_size=8, channels=1, val_share=0.5)
    assert [len(sets.train), len(sets.val), len(sets.test)] == [6, 6, 4]
    seen = sorted(greys(sets.train) + greys(sets.val) + greys(sets.test))
    assert seen == [10 * k for k in range(8)] + [100 + 10 * k for k in range(8)]
    for part in (sets.train, sets.val, sets.test):
        assert [grey // 100 for grey in greys(part)] == part.labels.tolist()


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", per_class=4)
    (tmp_path / "mine" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "mine" / ".hidden").mkdir()
    picture(tmp_path / "mine" / "bee" / "LAST.PNG", 190)
    sets = load(f"image_folder:{tmp_path}/mine", image_size=8, channels=1, val_share=0)
    assert len(sets.train) + len(sets.test) == 9 and 190 in greys(sets.train) + greys(sets.test)


def test_files_that_do_not_decode_are_named_and_counted(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", "train")
    folder_of(tmp_path / "mine", "test")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    cut = tmp_path / "mine" / "train" / "ant" / "cut.png"
    picture(cut, noise)
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "mine" / "train" / "bee" / "text.jpg").write_text("this is no JPEG")
    (tmp_path / "mine" / "train" / "bee" / "nothing.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 9 image files do not decode") as told:
        load(f"image_folder:{tmp_path}/mine")
    assert all(name in str(told.value) for name in ("ant/cut.png", "bee/text.jpg", "bee/nothing.png"))
    assert not list(paths.runs().rglob("*.safetensors"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"data folder '{tmp_path}/none' does not exist"):
        load(f"image_folder:{tmp_path}/none")
    with pytest.raises(FileNotFoundError, match=rf"'{paths.images()}/cifar10'.*GCNET_DATA"):
        load("cifar10-jpeg")


def test_folders_that_are_half_there(tmp_path: Path) -> None:
    only_train = folder_of(tmp_path / "a", "train")
    with pytest.raises(FileNotFoundError, match=r"has train/ but neither test/ nor val/"):
        load(f"image_folder:{only_train}")
    empty_class = folder_of(folder_of(tmp_path / "b", "train"), "test")
    (empty_class / "train" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images of class 'cat' in '.*/b/train/cat'"):
        load(f"image_folder:{empty_class}")
    missing_class = folder_of(folder_of(tmp_path / "c", "train"), "test", classes=("ant",))
    with pytest.raises(FileNotFoundError, match=r"no images of class 'bee' in '.*/c/test/bee'"):
        load(f"image_folder:{missing_class}")
    one_class = folder_of(tmp_path / "d", classes=("ant",))
    with pytest.raises(FileNotFoundError, match=r"holds 1 class folders; at least two"):
        load(f"image_folder:{one_class}")


def test_a_train_folder_without_classes(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", "test")
    (tmp_path / "mine" / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"mine/train'.*(0 class folders|at least two|no images)"):
        load(f"image_folder:{tmp_path}/mine")


def test_a_test_class_that_training_does_not_know_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", "train")
    folder_of(tmp_path / "mine", "test", classes=("ant", "bee", "cat"))
    with pytest.raises(ValueError, match=r"cat"):
        load(f"image_folder:{tmp_path}/mine")


def test_images_of_other_sizes_are_cut_to_the_most_common(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", "train")
    folder_of(tmp_path / "mine", "test")
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200  # only the centre survives the crop
    picture(tmp_path / "mine" / "train" / "bee" / "wide.png", wide)
    tall = np.full((32, 16), 30, dtype=np.uint8)
    tall[8:24] = 220
    picture(tmp_path / "mine" / "train" / "bee" / "zall.png", tall)
    sets = load(f"image_folder:{tmp_path}/mine", image_size=8, channels=1, val_share=0)
    assert bool((sets.train.images[6] == 200).all())
    assert bool((sets.train.images[7, 0, 1:-1] == 220).all())  # the rims blend


def test_images_that_are_added_later_are_seen(tmp_path: Path) -> None:
    mine = folder_of(tmp_path / "mine", per_class=8)
    before = load(f"image_folder:{mine}", image_size=8, channels=1)
    picture(mine / "bee" / "new.png", 250)
    after = load(f"image_folder:{mine}", image_size=8, channels=1)
    assert sum(map(len, (after.train, after.val, after.test))) == 17
    assert after.train.sha256 != before.train.sha256


# --- sizes and channels ---------------------------------------------------------------------------------------------


def coloured(root: Path) -> Path:
    for part in ("train", "test"):
        for c, colour in enumerate([(250, 0, 0), (10, 200, 60)]):
            for k in range(2):
                picture(root / part / "ab"[c] / f"{k}.png", colour, (20, 20))
    return root


def test_colour_to_grey_is_luma(tmp_path: Path) -> None:
    sets = load(f"image_folder:{coloured(tmp_path / 'm')}", image_size=20, channels=1, val_share=0)
    expected = [0.299 * 250, 0.299 * 10 + 0.587 * 200 + 0.114 * 60]
    assert sets.train.images.shape == (4, 1, 20, 20)
    assert torch.allclose(sets.train.images[::2, 0, 3, 3].double(), torch.tensor(expected).double(), atol=1)


def test_colour_stays_colour(tmp_path: Path) -> None:
    sets = load(f"image_folder:{coloured(tmp_path / 'm')}", image_size=20, channels=3, val_share=0)
    assert sets.train.images[2, :, 7, 7].tolist() == [10, 200, 60]


def test_grey_to_colour_repeats_the_channel() -> None:
    grey, colour = load("digits", channels=1), load("digits", channels=3)
    assert torch.equal(colour.test.images, grey.test.images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("size", [8, 17, 32, 64])
def test_resizing_keeps_order_and_brightness(size: int) -> None:
    native, sized = load("digits", image_size=8, channels=1), load("digits", image_size=size, channels=1)
    assert sized.train.images.shape[1:] == (1, size, size)
    assert torch.equal(sized.train.labels, native.train.labels)
    means = [x.train.images.double().mean((1, 2, 3)) for x in (native, sized)]
    assert torch.corrcoef(torch.stack(means))[0, 1] > 0.95 and (means[0] - means[1]).abs().max() < 15


def test_resizing_leaves_a_uniform_image_uniform(tmp_path: Path) -> None:
    sets = load(f"image_folder:{coloured(tmp_path / 'm')}", image_size=33, channels=3, val_share=0)
    assert bool((sets.train.images[0] == torch.tensor([250, 0, 0]).view(3, 1, 1)).all())


# --- the standard layouts -------------------------------------------------------------------------------------------


def tiny_imagenet(root: Path) -> Path:
    """Three classes, not in alphabetical order; validation images in one folder with an annotation file."""
    folder = root / "tiny-imagenet-200"
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("n03\nn01\nn02\n")
    for c, name in enumerate(("n03", "n01", "n02")):
        for k in range(2):
            picture(folder / "train" / name / "images" / f"{name}_{k}.JPEG", (60 * c, 60 * c, 60 * c), (64, 64))
    lines = []
    for k, name in enumerate(("n01", "n02", "n03", "n01")):
        picture(folder / "val" / "images" / f"val_{k}.JPEG", (50 + k, 50 + k, 50 + k), (64, 64))
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_tiny_imagenet_in_its_standard_layout() -> None:
    tiny_imagenet(paths.images())
    sets = load("tiny_imagenet", image_size=64, channels=3, val_share=0)
    assert sets.train.classes == ("n03", "n01", "n02")
    assert sets.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and greys(sets.train) == [0, 0, 60, 60, 120, 120]
    assert sets.test.labels.tolist() == [1, 2, 0, 1]
    assert all(abs(grey - 50 - k) <= 2 for k, grey in enumerate(greys(sets.test)))


def test_tiny_imagenet_with_validation_images_in_class_folders() -> None:
    folder = tiny_imagenet(paths.images())
    for c, name in enumerate(("n03", "n01", "n02")):
        picture(folder / "val" / name / "images" / "v.JPEG", (70 + c, 70 + c, 70 + c), (64, 64))
    sets = load("tiny_imagenet", image_size=64, channels=3)
    assert sets.test.labels.tolist() == [0, 1, 2]


def test_tiny_imagenet_half_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200/wnids\.txt' is missing"):
        load("tiny_imagenet")
    folder = tiny_imagenet(paths.images())
    (folder / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"val_2\.JPEG"):
        load("tiny_imagenet")
    for file in (folder / "train" / "n02" / "images").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no images of class 'n02'"):
        load("tiny_imagenet")


def test_tiny_imagenet_annotation_of_an_unknown_class() -> None:
    folder = tiny_imagenet(paths.images())
    with (folder / "val" / "val_annotations.txt").open("a") as file:
        file.write("val_0.JPEG\tn99\t0\t0\t62\t62\n")
    with pytest.raises(ValueError, match="n99"):
        load("tiny_imagenet")


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    """Two training batches and a test batch of four random images each in torchvision's own layout."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    data, labels = rng.integers(0, 256, (12, 3072), dtype=np.uint8), [int(y) for y in rng.integers(0, 10, 12)]
    sums = {}
    for k, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        content = {"data": data[4 * k : 4 * k + 4], "labels": labels[4 * k : 4 * k + 4]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {k}" for k in range(10)]}))
    meta = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": meta})
    return data, labels


def no_internet(*_: object, **__: object) -> None:
    raise URLError("no route to host")


def test_cifar10_in_the_layout_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    data, labels = cifar10(paths.images(), monkeypatch)
    sets = load("cifar10", image_size=32, channels=3, val_share=0)
    assert np.array_equal(sets.train.images.numpy(), data[:8].reshape(8, 3, 32, 32))
    assert np.array_equal(sets.test.images.numpy(), data[8:].reshape(4, 3, 32, 32))
    assert sets.train.labels.tolist() + sets.test.labels.tolist() == labels
    assert sets.train.classes == tuple(f"class {k}" for k in range(10))


@pytest.mark.parametrize("how", ["missing", "truncated", "half there"])
def test_cifar10_that_is_not_whole_and_cannot_be_downloaded(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = paths.images() / "cifar-10-batches-py" / "data_batch_2"
    if how != "missing":
        cifar10(paths.images(), monkeypatch)
        if how == "truncated":
            batch.write_bytes(batch.read_bytes()[:1000])
        else:
            batch.unlink()
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_internet)
    with pytest.raises(FileNotFoundError, match=rf"CIFAR10 is not \(completely\) below '{paths.images()}'.*GCNET_DATA"):
        load("cifar10")


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_and_fashion_mnist_in_the_layout_of_torchvision(name: str, folder: str) -> None:
    rng = np.random.default_rng(1)
    arrays = {}
    for part, count in (("train", 6), ("t10k", 4)):
        arrays[part] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        idx(paths.images() / folder / "raw" / f"{part}-images-idx3-ubyte", arrays[part][0])
        idx(paths.images() / folder / "raw" / f"{part}-labels-idx1-ubyte", arrays[part][1])
    sets = load(name, image_size=28, channels=1, val_share=0)
    assert np.array_equal(sets.train.images[:, 0].numpy(), arrays["train"][0])
    assert np.array_equal(sets.test.images[:, 0].numpy(), arrays["t10k"][0])
    assert sets.test.labels.tolist() == [0, 1, 2, 3] and len(sets.test.classes) == 10


def test_a_truncated_mnist_file(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = paths.images() / "MNIST" / "raw"
    for part in ("train", "t10k"):
        idx(raw / f"{part}-images-idx3-ubyte", np.zeros((6, 28, 28), dtype=np.uint8))
        idx(raw / f"{part}-labels-idx1-ubyte", np.zeros(6, dtype=np.uint8))
    whole = raw / "train-images-idx3-ubyte"
    whole.write_bytes(whole.read_bytes()[:2000])
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_internet)
    with pytest.raises(FileNotFoundError, match="MNIST is not \\(completely\\) below"):
        load("mnist")


def usps(labels: list[int]) -> None:
    folder = paths.images() / "usps"
    folder.mkdir(parents=True)
    images = np.arange(len(labels) * 256, dtype=np.uint32).astype(np.uint8).reshape(-1, 16, 16)
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", images=images, labels=np.array(labels))


def test_usps_as_arrays() -> None:
    usps([3, 1, 4, 1, 5])
    test = load_test("usps", image_size=16, channels=1)
    assert test.labels.tolist() == [3, 1, 4, 1, 5] and test.images[0, 0, 0, :3].tolist() == [0, 1, 2]
    assert load("usps", image_size=16, channels=1, val_share=0).train.labels.tolist() == [3, 1, 4, 1, 5]


@pytest.mark.parametrize("label", [10, -1])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    usps([3, label, 5])
    with pytest.raises(ValueError, match=r"usps: labels span -?\d+\.\.\d+, outside the 10 classes"):
        load("usps", image_size=16, channels=1)


@pytest.mark.parametrize("per_class", [4, 8])
def test_images_unpacked_later_are_decoded(tmp_path: Path, per_class: int) -> None:
    mine = folder_of(tmp_path / "cifar10", per_class=4)

    def found() -> int:
        return len(load("cifar10-jpeg", image_size=8, channels=1, val_share=0, root=tmp_path).test)

    assert found() == 2
    folder_of(mine, per_class=per_class)
    assert found() == per_class // 2


@pytest.mark.parametrize("damage", ["truncated", "another array"])
def test_a_damaged_array_file_is_named(damage: str) -> None:
    usps([3, 1, 4])
    file = paths.images() / "usps" / "train.npz"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    else:
        np.savez(file, pixels=np.zeros(3))
    with pytest.raises((ValueError, OSError), match=r"train\.npz"):
        load("usps")


def test_stl10_serves_as_a_test_set_only() -> None:
    folder = paths.images() / "stl10_32"
    folder.mkdir(parents=True)
    images = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "test.npz", images=images, labels=np.array([0, 9, 5]))
    test = load_test("stl10_32", image_size=32, channels=3)
    assert np.array_equal(test.images.numpy(), images.transpose(0, 3, 1, 2)) and test.labels.tolist() == [0, 9, 5]
    assert test.classes[9] == "truck"
    with pytest.raises(ValueError, match="'stl10_32' has a test set only"):
        load("stl10_32")


def test_stl10_of_torchvision_is_box_averaged_with_the_labels_of_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stl10:
        """As torchvision gives it: (N, 3, 96, 96), its own class order, a monkey that CIFAR-10 does not have."""

        classes = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
        data = np.arange(4 * 3 * 96 * 96, dtype=np.uint64).astype(np.uint8).reshape(4, 3, 96, 96)
        labels = np.array([2, 7, 6, 9])

        def __init__(self, root: str, split: str, download: bool) -> None:
            assert split == "test" and download

    monkeypatch.setattr(datasets, "STL10", Stl10)
    test = load_test("stl10_32")
    assert test.labels.tolist() == [1, 7, 9]
    boxes = torch.nn.functional.avg_pool2d(torch.from_numpy(Stl10.data[[0, 2, 3]]).double(), 3)
    assert torch.equal(test.images.double(), boxes.round())


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'fashion-mnist'; did you mean 'fashion_mnist'\?"):
        load("fashion-mnist")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_every_data_set_that_is_missing_says_where_it_was_looked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cifar", "mnist", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_internet)
    monkeypatch.setattr("torchvision.datasets.usps.download_url", no_internet)
    with pytest.raises(FileNotFoundError, match=str(paths.images())):
        load_test(name)


# --- the cache ------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    (file,) = (paths.runs() / "cache").iterdir()
    return file


def test_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = folder_of(tmp_path / "mine", per_class=8)
    first = load(f"image_folder:{mine}", image_size=16, channels=1)

    def fail(*_: object) -> None:
        raise AssertionError("decoded a second time")

    monkeypatch.setattr(Image, "open", fail)
    again = load(f"image_folder:{mine}", image_size=16, channels=1)
    assert torch.equal(again.train.images, first.train.images) and again.train.sha256 == first.train.sha256
    assert again.train.classes == ("ant", "bee")


def test_another_size_is_another_cache() -> None:
    for size, channels in ((8, 1), (16, 1), (16, 3)):
        assert load("digits", image_size=size, channels=channels).test.images.shape[1:] == (channels, size, size)
    assert len(list((paths.runs() / "cache").iterdir())) == 3


def test_two_folders_of_the_same_name_are_two(tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "1" / "mine", per_class=4), folder_of(tmp_path / "2" / "mine", per_class=8)
    sizes = [len(load(f"image_folder:{f}", image_size=8, channels=1, val_share=0).test) for f in (one, other)]
    assert sizes == [2, 4]


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "text"])
def test_a_damaged_cache_is_decoded_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = load("digits", channels=1)
    file = cache_file()
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-100] ^= 1
    file.write_bytes(
        {"truncated": content[:-7], "empty": b"", "changed": bytes(changed), "text": b"no tensors" * 100}[damage]
    )
    again = load("digits", channels=1)
    assert torch.equal(again.train.images, first.train.images) and torch.equal(again.test.labels, first.test.labels)
    assert "damaged" in caplog.text
    caplog.clear()
    load("digits", channels=1)
    assert "damaged" not in caplog.text


# --- Dataset and stratified -----------------------------------------------------------------------------------------


def test_a_data_set_that_does_not_fit_together() -> None:
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"mine: images must be uint8 \(N, C, H, W\), got torch.float32"):
        Dataset("mine", images.float(), torch.zeros(3, dtype=torch.int64), ("a", "b"))
    with pytest.raises(ValueError, match=r"mine: 3 images but 2 labels"):
        Dataset("mine", images, torch.zeros(2, dtype=torch.int64), ("a", "b"))
    with pytest.raises(ValueError, match=r"mine: labels span 0\.\.2, outside the 2 classes"):
        Dataset("mine", images, torch.tensor([0, 1, 2]), ("a", "b"))


def test_batches_are_all_images_in_order() -> None:
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 1, 8, 8)
    data = Dataset("mine", images, torch.arange(7), tuple("abcdefg"))
    parts = list(data.batches(3))
    assert [len(y) for _, y in parts] == [3, 3, 1]
    assert torch.cat([x for x, _ in parts])[:, 0, 0, 0].tolist() == torch.cat([y for _, y in parts]).tolist()
    assert data.take(torch.tensor([5, 2])).labels.tolist() == [5, 2]


labels = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(labels, st.floats(0, 0.99), st.integers(0, 5))
def test_a_share_of_every_class_is_held_out(labels: list[int], share: float, seed: int) -> None:
    y = torch.tensor(labels)
    kept, held = stratified(y, share, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(y)))
    assert kept.tolist() == sorted(kept.tolist()) and held.tolist() == sorted(held.tolist())
    for number, count in enumerate(y.bincount()):
        assert int((y[held] == number).sum()) == round(share * int(count))
    assert torch.equal(stratified(y, share, seed)[1], held)


@given(labels, st.integers(0, 80), st.integers(0, 5))
def test_a_number_of_rows_is_balanced_over_the_classes(labels: list[int], number: int, seed: int) -> None:
    y = torch.tensor(labels)
    kept, held = stratified(y, number, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(y)))
    assert len(held) == min(number, len(y))
    taken, whole = y[held].bincount(minlength=5), y.bincount(minlength=5)
    short = taken < whole  # a class with rows left is never more than one behind another
    if bool(short.any()):
        assert int(taken.max()) - int(taken[short].min()) <= 1


def test_another_seed_holds_out_others() -> None:
    y = torch.arange(10).repeat(20)
    assert not torch.equal(stratified(y, 0.25, 0)[1], stratified(y, 0.25, 1)[1])
