"""A study over workers: everything once, a failure tried again and reported, the rest not stopped."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gcnet import cells as stages
from gcnet import executors, paths
from gcnet import sweep as sweeping
from gcnet.cells import Cell, cell_result, cells, shift_rows
from gcnet.executors import Pool
from gcnet.study import Study
from gcnet.sweep import sweep

STUDY = Study.create(
    study="small", notebooks=["01", "02", "03", "04", "05"], dataset="digits", channels=1, network="resnet20",
    width=0.125, seeds=[0], epochs=1, batch_size=40, train_images=120, crop_padding=0, flip=False,
    pruners=["l1", "random"], sparsities=[0.5], guidance={"pearson": ["B25"]}, finetune_epochs=0,
    flops_similarities=["pearson"], shifts=["contrast"], severities=[1], shift_images=30, device="cpu",
    precision="float32",
)  # fmt: skip
LABELS = [" ".join(map(str, cell.row().values())) for cell in cells(STUDY)]


class Here(Executor):
    """Runs each task at once, in this thread."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root))
        assert sweep(STUDY, Here()) == []
    return root


@pytest.fixture
def store(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", str(swept))


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep does not look what is there: every task is given to the executor."""
    monkeypatch.setattr(sweeping, "entries", lambda task: (set(), False))


def fail(*_: object, **__: object) -> None:
    raise AssertionError("this was computed before")


@pytest.mark.usefixtures("store")
def test_after_a_sweep_every_cell_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "connectivity", "hybrid_masks", "corrupt", "score"):
        monkeypatch.setattr(stages, name, fail)
    for cell in cells(STUDY):
        assert cell_result(STUDY, cell)["sparsity"] == cell.sparsity and len(shift_rows(STUDY, cell)) == 2


@pytest.mark.usefixtures("store")
def test_a_second_sweep_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "connectivity", "hybrid_masks", "corrupt", "score"):
        monkeypatch.setattr(stages, name, fail)
    before = sorted(paths.runs().iterdir())
    assert sweep(STUDY, Here()) == [] and sorted(paths.runs().iterdir()) == before


@pytest.mark.usefixtures("store")
def test_what_is_found_is_not_given_to_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    class Nobody(Executor):
        def submit(self, *_: Any, **__: Any) -> Future:
            raise AssertionError("nothing is left to do")

    with caplog.at_level(logging.INFO, "gcnet"):
        assert sweep(STUDY, Nobody()) == []
    assert f"cells: {len(LABELS)} found in the store, 0 to compute" in caplog.messages


@pytest.mark.usefixtures("store", "anew")
def test_progress_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gcnet"):
        sweep(STUDY, ThreadPoolExecutor(1))
    lines = [message for message in caplog.messages if message.startswith("cells ")]
    assert [line.split(",")[0] for line in lines] == [f"cells {k}/5" for k in range(1, 6)]
    assert sorted(line.split(": ")[1] for line in lines) == sorted(LABELS)


@pytest.mark.usefixtures("store", "anew")
@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("executor", [Here, lambda: ThreadPoolExecutor(2)], ids=["one", "two"])
def test_a_failing_cell_is_tried_again_and_stops_nothing(
    failures: int, executor: Callable[[], Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, tried, real = cells(STUDY)[2], [], sweeping.shift_rows

    def flaky(study: Study, cell: Cell) -> object:
        tried.append(cell)
        if cell == bad and tried.count(bad) <= failures:
            raise MemoryError("not enough for this one")
        return real(study, cell)

    monkeypatch.setattr(sweeping, "shift_rows", flaky)
    reported = sweep(STUDY, executor())
    assert tried.count(bad) == 2 and set(tried) == set(cells(STUDY))
    if failures == 1:
        assert reported == []
    else:
        (row,) = reported
        assert row["stage"] == "cells" and str(bad) == row["task"]
        assert row["error"] == "MemoryError: not enough for this one"


@pytest.mark.usefixtures("store", "anew")
def test_a_stage_that_fails_does_not_stop_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no corruption today")

    monkeypatch.setattr(sweeping, "corrupted_images", broken)
    reported = sweep(STUDY, Here())
    assert [(row["stage"], row["task"]) for row in reported] == [("corruptions", "contrast")]


def _dies(folder: Path, number: int) -> str:
    """As where the system ends a process that wants more memory than there is."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / str(number)).touch()
    return str(number)


def test_a_worker_that_is_killed_takes_its_own_task_with_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "entries", lambda task: (set(), False))
    with Pool(2) as executor:
        tasks = [(_dies, tmp_path, number) for number in range(8)]
        reported = sweeping.run_stage(tasks, executor, "cells")  # type: ignore[arg-type]
    assert [row["task"] for row in reported] == ["3"] and "terminated abruptly" in reported[0]["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(k) for k in range(8) if k != 3]
    assert executor.jobs == 1  # what is left goes on in one process


def test_a_pool_of_which_no_process_starts_fails_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_start_worker", os._exit)
    with Pool(2) as executor:
        futures = [executor.submit(str, number) for number in range(12)]
        assert all(isinstance(future.exception(timeout=120), BrokenProcessPool) for future in futures)


def _where(number: int) -> tuple[int, int]:
    import torch

    return number, torch.get_num_threads()


def test_the_pool_shares_the_cores() -> None:
    with Pool(2) as workers:
        found = list(workers.map(_where, range(3)))
    assert found == [(number, max(1, len(os.sched_getaffinity(0)) // 2)) for number in range(3)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The local executor is this thread; names what it was opened as."""
    opened: list[str] = []

    @contextmanager
    def open_here(kind: str, jobs: int) -> Iterator[Executor]:
        opened.append(kind)
        yield Here()

    monkeypatch.setattr(sweeping, "open_executor", open_here)
    return opened


@pytest.mark.usefixtures("store")
def test_a_notebook_finds_what_the_sweep_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "connectivity", "hybrid_masks", "corrupt", "score"):
        monkeypatch.setattr(stages, name, fail)
    for notebook in ("01", "03", "05", "09"):
        sweeping.ready(STUDY, notebook)


def test_a_notebook_computes_only_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: list[str]
) -> None:
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path))
    sweeping.ready(STUDY, "01")
    assert here == ["local"]
    assert {p.name.split("-")[0] for p in tmp_path.glob("*-*")} == {"dense", "dense_facts", "connectivity"}


@pytest.mark.usefixtures("here")
def test_a_notebook_says_which_of_its_tasks_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path))
    monkeypatch.setattr(stages, "train", fail)
    with pytest.raises(RuntimeError, match=r"1 of the tasks .* dense: 0: AssertionError: this was computed before"):
        sweeping.ready(STUDY, "01")


@pytest.mark.usefixtures("store")
def test_what_a_study_took_is_read_from_its_entries_each_counted_once() -> None:
    table = sweeping.times(STUDY)
    by_kind = table.groupby("kind").entries.sum()
    assert by_kind["dense"] == len(STUDY.seeds)
    assert by_kind["cell"] == len([cell for cell in cells(STUDY) if not cell.is_dense])
    assert by_kind["shift"] == len(cells(STUDY))
    assert (table.seconds >= 0).all() and table.seconds.sum() > 0
