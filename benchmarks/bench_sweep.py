"""What the sweep itself costs: a thousand cells that do nothing, and finding a finished study of 500 cells."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from gcnet import cells
from gcnet.executors import cores, open_executor
from gcnet.store import Store, write_json
from gcnet.study import Study
from gcnet.sweep import run_stage, stages, sweep


def trivial(study: Study, number: int) -> str:
    """A task like a cell's, but with nothing to compute: one small entry in the store."""
    Store().once("trivial", {"number": number}, lambda folder: write_json(folder / "cell.json", {"number": number}))
    return f"trivial {number}"


class Nobody(Executor):
    """Takes no task: all must have been found."""

    def submit(self, *task: Any, **_: Any) -> Future:
        raise AssertionError(f"computed: {task}")


@contextmanager
def scratch_store() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, GCNET_RUNS=str(Path(folder))):
        yield


def overhead(count: int) -> float:
    """Seconds for so many trivial cells, after the workers have started."""
    study = Study.create(study="trivial")
    with scratch_store(), open_executor("local", cores()) as executor:
        run_stage([(trivial, study, -1 - number) for number in range(2 * cores())], executor, "start")
        started = time.perf_counter()
        assert not run_stage([(trivial, study, number) for number in range(count)], executor, "trivial cells")
        return time.perf_counter() - started


def finding(seeds: int) -> tuple[int, float]:
    """(cells, seconds to find them all) of a study whose networks are real and small, neither trained nor scored."""
    study = Study.create(
        study="found", notebooks=["04", "05"], dataset="digits", network="resnet20", width=0.0625, seeds=range(seeds),
        pruners=["random"], sparsities=[number / 20 for number in range(1, 11)], finetune_epochs=0,
        guidance={"pearson": ["B10", "B20", "B30", "B40"]}, flops_similarities=["pearson"], shifts=["contrast"],
        severities=[1], shift_images=20, train_images=100, connectivity_images=50, device="cpu", precision="float32",
    )  # fmt: skip
    score = {"accuracy": 0.5, "ece": 0.1}
    rows = [{"shift": "clean", "severity": 0, **score}, {"shift": "contrast", "severity": 1, **score}]
    with scratch_store():
        with (
            mock.patch.object(cells, "train", lambda *_, **__: []),
            mock.patch.object(cells, "score", lambda *_, **__: score),
            mock.patch.object(cells, "rows_under_shift", lambda *_, **__: rows),
        ):
            for task in (task for _, tasks in stages(study) for task in tasks):
                task[0](*task[1:])
        cells._splits.cache_clear()
        started = time.perf_counter()
        assert not sweep(study, Nobody())
        return len(cells.cells(study)) - seeds, time.perf_counter() - started


def run(quick: bool = False) -> list[dict[str, Any]]:
    count = 50 if quick else 1000
    spent = overhead(count)
    found, looked = finding(1 if quick else 10)
    row = {"peer": "", "peer_s": None, "ratio": None}
    return [
        {"case": f"a trivial cell, mean of {count}", "ours_s": spent / count, **row, "target": "at most 0.05 s"},
        {"case": f"finding a finished study of {found} cells", "ours_s": looked, **row, "target": "at most 2 s"},
    ]
