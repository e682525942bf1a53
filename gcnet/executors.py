"""Where a sweep's tasks run: processes of this machine, the workers of a Dask cluster, or jobs of a SLURM cluster.

Each is a `concurrent.futures.Executor`, so `sweep` does not know which. Workers share the store: all machines must see
one `GCNET_RUNS` folder. dask and submitit are the extra `cluster`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from gcnet import paths
from gcnet.errors import unknown
from gcnet.training import pick_device

EXECUTORS = ("local", "dask", "slurm")
_PATIENCE = 10  # seconds that a scheduler may take to answer


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(device: str) -> int:
    """Worker processes on this machine: one a core, on a GPU at most four.

    Every worker on a GPU holds its own context, about half a gigabyte, and they share its speed.
    """
    return cores() if pick_device(device).type == "cpu" else min(4, cores())


@contextlib.contextmanager
def open_executor(
    kind: str, jobs: int, *, address: str = "", options: Mapping[str, Any] | None = None
) -> Iterator[Executor]:
    """The executor of a name in EXECUTORS; on leaving, what has not started is cancelled.

    jobs: worker processes on this machine (local, and dask without an address), which share its cores evenly.
    address: a running Dask scheduler, such as tcp://host:8786; "" starts a cluster on this machine. options: of
    submitit's `update_parameters` (timeout_min, gpus_per_node, slurm_partition, ...), and `cluster: local` to run the
    jobs on this machine. Raises ValueError for an unknown name or wrong options, ConnectionError where no scheduler
    answers within ten seconds.
    """
    if kind not in EXECUTORS:
        raise unknown("executor", kind, EXECUTORS)
    if options and kind != "slurm":
        raise ValueError(f"executor '{kind}' takes no options, got {', '.join(options)}")
    if address and kind != "dask":
        raise ValueError(f"executor '{kind}' takes no address, got '{address}'")
    with contextlib.ExitStack() as stack:
        if kind == "local":
            executor: Executor = Pool(jobs)
        elif kind == "dask":
            executor = stack.enter_context(_dask(jobs, address))
        else:
            executor = _slurm(options or {})
        try:
            yield executor
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


# --- processes of this machine --------------------------------------------------------------------------------------


def _start_worker(threads: int, parent: int) -> None:
    torch.set_num_threads(threads)

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)  # the sweep was killed: nobody waits for this worker any more

    threading.Thread(target=leave_with_parent, daemon=True).start()


class Pool(Executor):
    """Worker processes that share the machine's cores evenly.

    Where one dies (out of memory, mostly), the tasks that were running fail with BrokenProcessPool and the others go on
    in half as many processes, so that a task that is tried again has more of the machine to itself.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs, self.running, self.closed = jobs, 0, False
        self.queue: deque[tuple[Future, Callable[[], Future]]] = deque()
        self.lock = threading.RLock()
        self.breaks_left = 2 + 2 * jobs
        self.processes = _processes(jobs)

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        with self.lock:
            if self.closed:
                raise RuntimeError("the executor was shut down")
            self.queue.append((future, lambda: self.processes.submit(task, *args, **kwargs)))
        self._feed()
        return future

    def _feed(self) -> None:
        """Hand out as many tasks as there are processes: those that wait do not break with a process."""
        with self.lock:
            while self.queue and self.running < self.jobs:
                future, start = self.queue.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    started = start()
                except BrokenExecutor as error:
                    self._reopen(self.processes)
                    future.set_exception(error)
                    continue
                self.running += 1
                started.add_done_callback(partial(self._done, future, self.processes))

    def _done(self, future: Future, processes: ProcessPoolExecutor, finished: Future) -> None:
        with self.lock:
            self.running -= 1
            if isinstance(finished.exception(), BrokenExecutor) and not self.closed:
                self._reopen(processes)
        if error := finished.exception():
            future.set_exception(error)
        else:
            future.set_result(finished.result())
        self._feed()

    def _reopen(self, broken: ProcessPoolExecutor) -> None:
        if broken is self.processes and self.breaks_left:  # else another task has seen to it, or nothing starts at all
            self.breaks_left -= 1
            self.jobs = max(1, self.jobs // 2)
            self.processes = _processes(self.jobs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while wait and not cancel_futures and (self.queue or self.running):
            time.sleep(0.01)
        with self.lock:
            self.closed = True
            queued, self.queue = self.queue, deque()
        for future, _ in queued:
            future.cancel()
        self.processes.shutdown(wait, cancel_futures=cancel_futures)


def _processes(jobs: int) -> ProcessPoolExecutor:
    threads = max(1, cores() // jobs)
    context = multiprocessing.get_context("spawn")  # fork and OpenMP threads do not go together
    return ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(threads, os.getpid()))


# --- Dask -----------------------------------------------------------------------------------------------------------


def _places() -> dict[str, str]:
    """Where this process finds data and results: what a worker goes by that was not told otherwise."""
    return {"GCNET_RUNS": str(paths.runs()), "GCNET_DATA": str(paths.images())}


def run_at(places: Mapping[str, str], task: Callable[..., Any], *args: Any) -> Any:
    """Run a task in a worker that may have been started in another folder."""
    for name, value in places.items():
        os.environ.setdefault(name, value)
    return task(*args)


class _Placed(Executor):
    """Hands tasks to a Dask client's executor, each with the places of this process."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.places = executor, _places()

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        return self.executor.submit(run_at, self.places, task, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.executor.shutdown(wait=not cancel_futures and wait)


def _connected(address: str) -> Any:
    """A client of the scheduler at an address. Its own timeout does not hold where something else listens there."""
    from dask.distributed import Client

    answer: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        try:
            answer.put(Client(address, timeout=_PATIENCE, set_as_default=False))
        except Exception as error:  # a web server's greeting is read as the size of a message: out of memory
            answer.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        found = answer.get(timeout=_PATIENCE)
    except queue.Empty:
        found = TimeoutError(f"no word of it in {_PATIENCE} seconds")
    if isinstance(found, Exception):
        raise ConnectionError(f"no Dask scheduler answers at '{address}': {found}") from None
    return found


@contextlib.contextmanager
def _dask(jobs: int, address: str) -> Iterator[Executor]:
    from dask.distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        if address:
            client = stack.enter_context(_connected(address))
        else:
            cluster = stack.enter_context(LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None))
            client = stack.enter_context(Client(cluster, set_as_default=False))
            client.run(torch.set_num_threads, max(1, cores() // jobs))
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise ConnectionError(f"the Dask scheduler at '{address}' has no workers")
        if any(worker["nthreads"] > 1 for worker in workers.values()):
            # Seeds are set for a whole process, so two tasks in one would draw from each other's.
            raise ValueError("each Dask worker must run one task at a time: start it with `dask worker --nthreads 1`")
        on_gpus = all("GPU" in worker["resources"] for worker in workers.values())
        yield _Placed(client.get_executor(pure=False, **({"resources": {"GPU": 1}} if on_gpus else {})))


# --- SLURM ----------------------------------------------------------------------------------------------------------


def _slurm(options: Mapping[str, Any]) -> Executor:
    import submitit

    options = dict(options)
    folder = str(paths.runs() / ".jobs" / "%j")
    try:
        jobs = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", "slurm"))
        jobs.update_parameters(**options)
    except RuntimeError as error:
        raise ConnectionError(f"no SLURM cluster can be reached from here: {error}") from None
    except (TypeError, NameError, ValueError) as error:
        raise ValueError(f"options of executor 'slurm': {error}") from None
    return JobExecutor(jobs)


class JobExecutor(Executor):
    """submitit's jobs as futures; what is submitted within a moment becomes one job array."""

    def __init__(self, jobs: Any, poll_s: float = 1.0) -> None:
        self.jobs, self.poll_s = jobs, poll_s
        self.queue: list[tuple[Callable[[], Any], Future]] = []
        self.running: dict[Future, Any] = {}
        self.lock, self.wake, self.closed = threading.Lock(), threading.Event(), False
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if self.closed:
            raise RuntimeError("the executor was shut down")
        future: Future = Future()
        with self.lock:
            self.queue.append(((run_at, _places(), task, *args), future))
        return future

    def _watch(self) -> None:
        while not (self.closed and not self.running and not self.queue):
            self.wake.wait(self.poll_s)
            with self.lock:
                queued, self.queue = self.queue, []
            self._start(queued)
            for future, job in list(self.running.items()):
                if job.done():
                    del self.running[future]
                    self._finish(future, job)

    def _start(self, queued: list[tuple[Any, Future]]) -> None:
        if not queued:
            return
        try:
            with self.jobs.batch():
                started = [self.jobs.submit(*call) for call, _ in queued]
        except Exception as error:  # sbatch is not there, or refuses
            for _, future in queued:
                future.set_exception(error)
            return
        for (_, future), job in zip(queued, started, strict=True):
            future.set_running_or_notify_cancel()
            self.running[future] = job

    @staticmethod
    def _finish(future: Future, job: Any) -> None:
        try:
            future.set_result(job.result())
        except Exception as error:
            # submitit's text is a page: the raised error stands at the start of a line of the traceback in it
            raised = re.findall(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b.*", str(error), re.MULTILINE)
            future.set_exception(RuntimeError(f"job {job.job_id}: {raised[-1] if raised else error}"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.closed = True
        if cancel_futures:
            with self.lock:
                queued, self.queue = self.queue, []
            for _, future in queued:
                future.cancel()
            for future, job in list(self.running.items()):
                job.cancel(check=False)
                self.running.pop(future, None)
                if not future.done():
                    future.set_exception(RuntimeError("the sweep ended"))
        self.wake.set()
        if wait:
            self.watcher.join()
