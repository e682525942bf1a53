"""What happens when the machine does not play along: a full disk, a kill, a file that is only half there.

Faults that belong to one module are tested with it; here are those that go through several.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gcnet import data, paths
from gcnet.cells import (
    cell_folder,
    cells,
    connectivity_matrices,
    corrupted_images,
    dense,
    dense_folder,
    network,
    recipe,
    shift_rows,
    splits,
)
from gcnet.store import Store, read_json, write_json
from gcnet.study import Study
from gcnet.training import train

STUDY = Study.create(
    study="small", dataset="digits", channels=1, network="resnet20", width=0.125, seeds=[0], epochs=2, batch_size=40,
    train_images=80, crop_padding=0, flip=False, pruners=["l1"], sparsities=[0.5], guidance={"pearson": ["B25"]},
    finetune_epochs=1, shifts=["contrast"], severities=[1], shift_images=30, device="cpu", precision="float32",
)  # fmt: skip


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: writes really fail, in the middle of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def entries() -> list[Path]:
    return [folder for folder in paths.runs().iterdir() if (folder / "entry.json").exists()]


def weights(study: Study) -> list[torch.Tensor]:
    return [p.detach().clone() for p in dense(study, 0).parameters()]


def by_hand(study: Study) -> list[torch.Tensor]:
    net = network(study, 0)
    train(net, splits(study).train, recipe(study), seed=0, precision="float32")
    return [p.detach() for p in net.parameters()]


STAGES: dict[str, Callable[[], object]] = {
    "dense": lambda: dense_folder(STUDY, 0),
    "connectivity": lambda: connectivity_matrices(STUDY, 0, "pearson"),
    "cell": lambda: cell_folder(STUDY, cells(STUDY)[2]),
    "corrupted": lambda: corrupted_images(STUDY, "contrast", 1),
    "shift": lambda: shift_rows(STUDY, cells(STUDY)[2]),
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root))
        for stage in STAGES.values():
            stage()
    return root


@pytest.fixture
def store(computed: Path) -> None:
    """A copy of its own of the computed store, to do damage to."""
    shutil.copytree(computed, paths.runs())


@pytest.mark.parametrize("limit", [300, 3000])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("store")
def test_a_full_disk_loses_nothing_and_the_next_run_continues(stage: str, limit: int) -> None:
    expected = STAGES[stage]()
    (mine,) = [folder for folder in entries() if folder.name.startswith(f"{stage}-")]
    shutil.rmtree(mine)
    others = {folder.name for folder in entries()}
    if stage == "shift" and limit > 1000:
        limit = 400  # a small file
    with full_disk(limit), pytest.raises((OSError, RuntimeError, SafetensorError)):
        STAGES[stage]()
    assert {folder.name for folder in entries()} == others
    again = STAGES[stage]()
    if isinstance(expected, torch.Tensor):
        assert torch.equal(again, expected)
    elif isinstance(expected, dict):
        assert all(torch.equal(again[name], value) for name, value in expected.items())
    else:
        assert again == expected
    assert mine in entries() and not list(mine.glob(".*"))


def test_a_full_disk_while_the_images_are_cached() -> None:
    with full_disk(5000), pytest.raises((OSError, RuntimeError, SafetensorError)):
        data.load("digits", channels=1)
    cache = paths.runs() / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []
    assert len(data.load("digits", channels=1).test) == 450


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The checkpoint of the epoch before is still whole, and the run goes on from it to the same bits."""
    path, net = tmp_path / "c.pt", network(STUDY, 0)
    study = STUDY.model_copy(update={"epochs": 3})

    def fill_up(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    with full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[0]), pytest.raises((RuntimeError, OSError)):
        train(net, splits(study).train, recipe(study), seed=0, precision="float32", checkpoint=path, on_epoch=fill_up)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["c.pt"]
    resumed = network(study, 0)
    history = train(resumed, splits(study).train, recipe(study), seed=0, precision="float32", checkpoint=path)
    assert len(history) == 3
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), by_hand(study), strict=True))


KILLED = """
import sys, torch
torch.set_num_threads(1)
from gcnet.cells import dense_folder
from gcnet.study import Study
dense_folder(Study.create(**{values!r}), 0, on_epoch=lambda row: print(row["epoch"], flush=True))
"""


def test_a_killed_training_goes_on_to_the_same_bits() -> None:
    study = STUDY.model_copy(update={"epochs": 25})
    code = KILLED.format(values=study.model_dump(mode="json"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=paths.project())
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 3:
            break
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert process.returncode == -signal.SIGKILL and entries() == []
    assert not list(paths.runs().glob("dense-*"))
    done: list[float] = []
    dense_folder(study, 0, on_epoch=lambda row: done.append(row["epoch"]))
    assert done[0] >= 3 and done[-1] == 25
    assert all(torch.equal(a, b) for a, b in zip(weights(study), by_hand(study), strict=True))


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("stage", ["dense", "connectivity", "cell", "corrupted"])
def test_half_a_file_is_never_read(stage: str) -> None:
    """Every file of the stage cut in half: found out, set aside, computed again to the same result."""
    (mine,) = [folder for folder in entries() if folder.name.startswith(f"{stage}-")]
    for name in [p.name for p in mine.iterdir()]:
        whole = read_json(mine / "entry.json")["files"]
        content = (mine / name).read_bytes()
        (mine / name).write_bytes(content[: len(content) // 2])
        STAGES[stage]()
        again = read_json(mine / "entry.json")["files"]
        same = {file for file in whole if whole[file] == again[file]}
        assert same >= {"model.safetensors", "connectivity.safetensors", "images.npy"} & set(whole)
    aside = list(paths.runs().glob(f"{mine.name}.corrupt-*"))
    assert len(aside) == len(list(mine.iterdir()))


@pytest.mark.usefixtures("store")
def test_an_old_damage_upstream_does_not_reach_what_was_made_of_it() -> None:
    """A dense network that is damaged later is trained again; the cells made of the whole one still stand."""
    (mine,) = [folder for folder in entries() if folder.name.startswith("dense-")]
    before = weights(STUDY)
    (mine / "model.safetensors").write_bytes(b"")
    folder = cell_folder(STUDY, cells(STUDY)[2])
    assert not list(paths.runs().glob("cell-*.corrupt-*")) and (folder / "cell.json").exists()
    assert all(torch.equal(a, b) for a, b in zip(weights(STUDY), before, strict=True))


def test_a_folder_that_may_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("in the way")
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "a_file"))
    with pytest.raises(OSError, match="a_file"):
        Store().once("dense", {"seed": 0}, lambda folder: write_json(folder / "x.json", 1))
