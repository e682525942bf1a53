"""All cells of a study over worker processes; whatever is in the store already is found, not computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path
from typing import Any

import pandas as pd

from gcnet import ablations, cka_cells, ftwt_cells, progress, snacs_cells, structured_cells
from gcnet.cells import (
    Cell,
    cell_result,
    cells,
    connectivity_matrices,
    corrupted_images,
    dense_facts,
    dense_folder,
    drift_rows,
    flops_rows,
    shift_rows,
    unshifted_rows,
)
from gcnet.executors import default_jobs, open_executor
from gcnet.store import looking, read_json
from gcnet.study import Study

log = logging.getLogger("gcnet")


def run_dense(study: Study, seed: int) -> str:
    dense_folder(study, seed)
    dense_facts(study, seed)
    for similarity in study.guidance:
        connectivity_matrices(study, seed, similarity)
    return f"dense seed {seed}"


def run_corruption(study: Study, name: str) -> str:
    for severity in study.severities:
        corrupted_images(study, name, severity)
    return f"corruption {name}"


def run_flops(study: Study, of: tuple[int, str]) -> str:
    flops_rows(study, *of)
    return f"multiply-accumulates seed {of[0]} {of[1]}"


def run_drift(study: Study, seed: int) -> str:
    drift_rows(study, seed)
    unshifted_rows(study, seed)
    return f"connectivity under shift, seed {seed}"


def run_cell(study: Study, cell: Cell) -> str:
    if not cell.is_dense:
        cell_result(study, cell)
    shift_rows(study, cell)
    return " ".join(str(value) for value in cell.row().values())


def sweep(study: Study, executor: Executor) -> list[dict[str, Any]]:
    """Compute every cell that the store does not hold; returns the failures (task, error), which stop nothing.

    A failed task is tried once more. Raises nothing for a failed cell: the tables show what is missing.
    """
    return [failure for name, tasks in stages(study) for failure in run_stage(tasks, executor, name)]


def ready(study: Study, notebook: str) -> None:
    """Compute what a notebook shows and the store does not hold, on all cores; a second where the store holds it all.

    notebook: its number, such as "05"; "09" shows what all the others computed. In an open notebook a bar tells the
    time left. Raises RuntimeError naming the tasks that failed.
    """
    needed = (notebook, *(other for other in _ALSO.get(notebook, ()) if study.runs(other)))
    wanted = study if notebook == "09" else study.model_copy(update={"notebooks": needed})
    with open_executor("local", default_jobs(study.device)) as executor:
        failures = sweep(wanted, executor)
    if failures:
        named = "; ".join(f"{f['stage']}: {f['task']}: {f['error']}" for f in failures[:3])
        raise RuntimeError(f"{len(failures)} of the tasks that this notebook needs failed: {named}")


_ALSO = {"03": ("04",), "05": ("02",)}  # 03 shows the cells of 04; the claims of 05 speak of how connectivity moves

Task = tuple[Callable[..., str], Study, Any]


def stages(study: Study) -> Iterator[tuple[str, list[Task]]]:
    """(name, tasks) in the order in which they are computed; the tasks of one stage do not need each other."""
    if set(study.notebooks) != {"07"}:  # which trains networks of its own
        yield "dense", [(run_dense, study, seed) for seed in study.seeds]
    if not study.notebooks or set(study.notebooks) - {"01", "03"}:  # which look at clean images only
        yield "corruptions", [(run_corruption, study, name) for name in study.corruptions]
    if study.runs("02"):
        yield "drift", [(run_drift, study, seed) for seed in study.seeds]
    if study.runs("04"):
        by_metric = [(seed, s) for seed in study.seeds for s in ("none", *study.flops_similarities)]
        yield "multiply-accumulates", [(run_flops, study, of) for of in by_metric]
    if study.runs("04") or study.runs("05"):
        yield "cells", [(run_cell, study, cell) for cell in cells(study)]
    for notebook, more in SYSTEMS.items():
        if study.runs(notebook):
            yield from more(study)


# What the other systems compute: number of the notebook that shows it -> its stages.
SYSTEMS: dict[str, Callable[[Study], Iterable[tuple[str, list[Task]]]]] = {
    "06": snacs_cells.stages,
    "07": cka_cells.stages,
    "08": ftwt_cells.stages,
    "10": structured_cells.stages,
    "11": ablations.stages,
}


def _submitted(executor: Executor, task: Task) -> Future[str]:
    """A future of the task; one that has failed where the executor takes no more (a worker of it was killed)."""
    try:
        return executor.submit(*task)
    except RuntimeError as error:  # BrokenExecutor is one
        future: Future[str] = Future()
        future.set_exception(error)
        return future


def entries(task: Task) -> tuple[set[Path], bool]:
    """(the store's folders that hold what a task makes, whether that is all of it)."""
    function, study, argument = task
    with looking() as found:
        try:
            function(study, argument)
        except Exception:  # missing, or it fails while it is looked for: then it will, and be reported, in its turn
            return found, False
    return found, True


def times(study: Study) -> pd.DataFrame:
    """times.csv: what the stored results of each stage took where they were computed.

    stage, kind, entries, seconds (summed over the processes that computed them), threads (of each), device. An entry is
    counted in the first stage that has it.
    """
    rows, counted = [], set()
    for name, tasks in stages(study):
        for task in tasks:
            for folder in sorted(entries(task)[0] - counted):
                entry = read_json(folder / "entry.json")
                made = entry["provenance"]
                facts = {"stage": name, "kind": entry["kind"], "device": made["device"], "threads": made["threads"]}
                rows.append({**facts, "entries": 1, "seconds": entry["wall_s"]})
                counted.add(folder)
    table = pd.DataFrame(rows, columns=["stage", "kind", "device", "threads", "entries", "seconds"])
    return table.groupby(["stage", "kind", "device", "threads"], sort=False).sum().reset_index()


def run_stage(tasks: list[Task], executor: Executor, name: str) -> list[dict[str, Any]]:
    """Run the tasks that the store does not hold, each tried twice at most; returns the failures."""
    found = len(tasks)
    tasks = [task for task in tasks if not entries(task)[1]]
    found -= len(tasks)
    if found or tasks:
        log.info("%s: %d found in the store, %d to compute", name, found, len(tasks))
    started, failures, finished = time.perf_counter(), [], 0
    pending = {_submitted(executor, task): (task, 1) for task in tasks}
    bar = progress.bar(len(tasks), name)
    while pending:
        for future in as_completed(list(pending)):
            task, attempt = pending.pop(future)
            error = future.exception()
            if error is None:
                finished += 1
                bar.update()
                spent = time.perf_counter() - started
                left = spent / finished * (len(tasks) - finished)
                text = "%s %d/%d, %.0f s, about %.0f s left: %s"
                log.info(text, name, finished, len(tasks), spent, left, future.result())
            elif attempt == 1 and not isinstance(error, FileNotFoundError):  # images that are not there: no use
                log.warning("%s: %s failed (%s), trying once more", name, task[2], error)
                pending[_submitted(executor, task)] = (task, 2)
            else:
                log.error("%s: %s failed: %s", name, task[2], error)
                failures.append({"stage": name, "task": str(task[2]), "error": f"{type(error).__name__}: {error}"})
    bar.close()
    return failures
