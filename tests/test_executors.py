"""The same sweep on a Dask cluster that loses a worker, and as submitit's jobs: the same results to the last bit."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from gcnet.cells import cell_result, cells, shift_rows
from gcnet.executors import JobExecutor, cores, open_executor, run_at
from gcnet.study import Study
from gcnet.sweep import sweep
from tests.test_sweep import STUDY as SMALL
from tests.test_sweep import Here

pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
submitit = pytest.importorskip("submitit", reason="the extra 'cluster' is not installed")

STUDY = Study.create(**{**SMALL.model_dump(), "sparsities": [0.3, 0.5, 0.7], "guidance": {}, "notebooks": ["05"]})


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are processes of their own, which find the package and these tests here."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def results(root: Path, patch: pytest.MonkeyPatch) -> list[object]:
    """All facts of all cells as the store at `root` has them."""
    patch.setenv("GCNET_RUNS", str(root))
    return [(cell_result(STUDY, cell), shift_rows(STUDY, cell)) for cell in cells(STUDY)]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root))
        assert sweep(STUDY, Here()) == []
    return root


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """A scheduler and three workers, processes of their own on the loopback; the workers know no folder of ours."""
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GCNET_")} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *words]
        log = (tmp_path / f"{words[0]}-{time.monotonic_ns()}.log").open("w")
        return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)

    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
    workers = [start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(3)]
    try:
        yield address, workers
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


def wait_for_workers(address: str, count: int) -> None:
    from distributed import Client

    with Client(address, timeout=30, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=90)


@pytest.mark.slow
def test_a_dask_sweep_that_loses_a_worker_gives_the_same_results(
    serial: Path, cluster: tuple[str, list[subprocess.Popen]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, workers = cluster
    wait_for_workers(address, 3)

    class KillOne(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("cells 1/"):
                workers[0].kill()

    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "runs"))
    log, handler = logging.getLogger("gcnet"), KillOne()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with open_executor("dask", 1, address=address) as executor:
            assert sweep(STUDY, executor) == []
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    assert workers[0].wait(timeout=10) != 0 and workers[1].poll() is None
    assert results(tmp_path / "runs", monkeypatch) == results(serial, monkeypatch)


@contextmanager
def listening(says: bytes | None) -> Iterator[int]:
    """A port where something answers each caller with these bytes, or where nobody ever picks up."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            with suppress(OSError):
                while says is not None:
                    caller, _ = server.accept()
                    caller.sendall(says)

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


@pytest.mark.parametrize("there", ["nothing", "silence", "a web server"])
def test_a_scheduler_that_is_not_there_is_said_within_ten_seconds(there: str) -> None:
    with ExitStack() as stack:
        says = {"silence": None, "a web server": b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9}
        port = free_port() if there == "nothing" else stack.enter_context(listening(says[there]))
        started = time.perf_counter()
        with pytest.raises(ConnectionError, match="no Dask scheduler answers"):
            stack.enter_context(open_executor("dask", 1, address=f"tcp://127.0.0.1:{port}"))
        assert time.perf_counter() - started < 14  # ten, and a busy machine


@pytest.mark.slow
def test_a_dask_cluster_of_this_machine_divides_its_cores() -> None:
    with open_executor("dask", 2) as executor:
        assert executor.submit(torch.get_num_threads).result(timeout=60) == max(1, cores() // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "resources", "says"), [(2, {}, "one task at a time"), (1, {"GPU": 1}, ""), (None, {}, "has no workers")]
)
def test_the_workers_of_a_scheduler_are_looked_at(threads: int | None, resources: dict, says: str) -> None:
    from distributed import LocalCluster

    workers = 0 if threads is None else 1
    with LocalCluster(
        n_workers=workers, threads_per_worker=threads or 1, resources=resources, processes=False, dashboard_address=None
    ) as cluster:
        try:
            with open_executor("dask", 1, address=cluster.scheduler_address) as executor:
                assert executor.submit(str.upper, "on a gpu").result(timeout=60) == "ON A GPU"
                assert not says and executor.executor._kwargs["resources"] == resources
        except (ValueError, ConnectionError) as error:
            assert says and says in str(error)


@pytest.mark.slow
def test_submitit_jobs_give_the_same_results(serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "runs"))
    few = STUDY.model_copy(update={"sparsities": (0.5,), "pruners": ("l1",)})
    with open_executor("slurm", 1, options={"cluster": "local", "timeout_min": 5}) as executor:
        assert sweep(few, executor) == []
    for cell in cells(few):
        monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "runs"))
        theirs = (cell_result(few, cell), shift_rows(few, cell))
        monkeypatch.setenv("GCNET_RUNS", str(serial))
        assert theirs == (cell_result(few, cell), shift_rows(few, cell))


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    executor = JobExecutor(submitit.AutoExecutor(folder=tmp_path, cluster="local"), poll_s=0.1)
    futures = [executor.submit(str.upper, "done"), executor.submit(json.loads, "no json")]
    wait(futures, timeout=60)
    assert futures[0].result() == "DONE" and "JSONDecodeError: Expecting value" in str(futures[1].exception())
    executor.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit(str.upper, "late")


def test_a_cluster_that_takes_no_jobs_fails_the_tasks_not_the_sweep(tmp_path: Path) -> None:
    class Refuses(submitit.LocalExecutor):
        def batch(self, *_: object, **__: object) -> None:
            raise FileNotFoundError("sbatch")

    executor = JobExecutor(Refuses(folder=tmp_path), poll_s=0.01)
    with pytest.raises(FileNotFoundError, match="sbatch"):
        executor.submit(str.upper, "a").result(timeout=60)
    executor.shutdown()


def test_a_worker_takes_the_places_it_was_not_told_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", "its own")
    monkeypatch.setenv("GCNET_DATA", "removed in a moment")
    monkeypatch.delenv("GCNET_DATA")
    places = {"GCNET_RUNS": "ours", "GCNET_DATA": "ours"}
    assert [run_at(places, os.environ.get, name) for name in places] == ["its own", "ours"]


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("dusk", {}, "unknown executor 'dusk'; did you mean 'dask'"),
        ("local", {"options": {"timeout_min": 5}}, "takes no options, got timeout_min"),
        ("local", {"address": "tcp://a:1"}, "takes no address"),
        ("slurm", {"options": {"cluster": "local", "minutes": 5}}, "options of executor 'slurm'"),
    ],
)
def test_wrong_words_are_refused(kind: str, more: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):  # noqa: SIM117
        with open_executor(kind, 1, **more):
            pass
