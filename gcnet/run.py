"""The launcher: a notebook runs headless with a study's parameters, and counts as done only when all of it ran."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gcnet import paths
from gcnet.errors import unknown
from gcnet.store import atomic_write, provenance, sha256_file
from gcnet.study import Study

# papermill and nbformat are imported where they are used: they take a second, and most commands do without.
if TYPE_CHECKING:
    from nbformat import NotebookNode

KERNEL = "python3"
# A path of a Unix socket holds 107 characters on Linux; the longest one in the scratch folder ends in /k-ipc-5.
_LONGEST_SOCKET_FOLDER = 95
_DIED = "the kernel died (the system kills one that runs out of memory)"


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message says in which cell, why, and where the partial one is kept."""


# --- studies and stages ---------------------------------------------------------------------------------------------


def load_study(name: str, overrides: dict[str, Any] | None = None) -> Study:
    """The validated study of a params file; its `study:` must be the file's name, or results would mix."""
    study = Study.load(name, **(overrides or {}))
    if "study" not in (overrides or {}) and study.study != Path(name).stem:
        raise ValueError(f"params file '{name}' says study: {study.study}; write study: {Path(name).stem}")
    return study


def parse_override(key: str, text: str) -> tuple[str, Any]:
    """(key, value typed as YAML): 'true' is a bool, '0.5' a float, '[1, 2]' a list. Raises ValueError."""
    if key not in Study.model_fields:
        raise unknown("parameter", key, Study.model_fields)
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"value {text!r} of parameter '{key}' is not YAML") from None


def stages(study: str) -> dict[str, list[str]]:
    """{stage: the stages whose results it needs}: what the Makefile goes by, kept in step by a test."""
    asked = load_study(study)
    names = sorted(p.stem for p in (paths.project() / "notebooks").glob("[0-9][0-9]_*.ipynb") if asked.runs(p.stem))
    last = [name for name in names if name.startswith("09_")]
    before: dict[str, list[str]] = {"sweep": []}
    for name in [*(n for n in names if n not in last), *last]:
        before[name] = [] if _is_quick_start(name) else ["sweep"]
        if name in last:
            before[name] += [n for n in names if n not in last and not _is_quick_start(n)]
    return before


def _is_quick_start(name: str) -> bool:
    """Whether a notebook stands outside the chain: it needs nothing of a study, and need not take its parameters."""
    return name.startswith("00_")


def marker(study: str, stage: str) -> Path:
    """The file that says a stage is done: written last, and its time is when the stage *started*.

    So whatever is edited while a stage runs is newer than its marker, and make runs the stage again.
    """
    return paths.runs() / "done" / study / f"{stage}.json"


def mark_done(study: Study, stage: str, started: float, **facts: Any) -> None:
    """Write the marker of a stage; `started` is seconds since the epoch."""
    code = {k: v for k, v in provenance().items() if k in ("git_sha", "git_dirty", "versions")}
    facts |= {"seconds": round(time.time() - started, 1), **code, "study": study.model_dump(mode="json")}
    with atomic_write(marker(study.study, stage)) as temporary:
        temporary.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.utime(temporary, (started, started))


def status(study: str) -> list[tuple[str, str, str]]:
    """(stage, 'done' | 'stale' | 'missing', why), by the same file times that make goes by."""
    root = paths.project()
    code = sorted((root / "gcnet").glob("*.py"))
    rows: list[tuple[str, str, str]] = []
    state: dict[str, str] = {}
    for stage, before in stages(study).items():
        done = marker(study, stage)
        notebook = [] if stage == "sweep" else [root / "notebooks" / f"{stage}.ipynb"]
        if notebook:
            notebook.append(root / "params" / "claims.yaml")
        needs = [*notebook, root / "params" / f"{study}.yaml", *code, *(marker(study, name) for name in before)]
        again = [name for name in before if state[name] != "done"]
        if not done.exists():
            failed = paths.results(study) / "notebooks" / f"{stage}.failed.ipynb"
            why = f"failed: see {short(failed)}" if failed.exists() else "not run yet"
            state[stage] = "missing"
        elif newer := [p for p in needs if p.exists() and p.stat().st_mtime_ns > done.stat().st_mtime_ns]:
            why = "newer: " + ", ".join(short(p) for p in newer[:3]) + (", ..." if len(newer) > 3 else "")
            state[stage] = "stale"
        elif again:
            why = f"after {again[0]}, which will run again"
            state[stage] = "stale"
        else:
            facts = json.loads(done.read_text(encoding="utf-8"))
            why = f"{facts['seconds']:.0f} s, git {facts['git_sha'][:9]}{' (edited)' if facts['git_dirty'] else ''}"
            state[stage] = "done"
        rows.append((stage, state[stage], why))
    return rows


def short(path: Path) -> str:
    """The path from the project's folder where it lies below it."""
    return str(path.relative_to(paths.project())) if path.is_relative_to(paths.project()) else str(path)


# --- running a notebook ---------------------------------------------------------------------------------------------


def find_notebook(path: Path) -> Path:
    """The notebook's absolute path: as given, below the project, or by bare name in `notebooks/`.

    Raises FileNotFoundError naming the nearest one.
    """
    folder = paths.project() / "notebooks"
    for candidate in (path, paths.project() / path, folder / f"{path.stem}.ipynb"):
        if candidate.is_file():
            return candidate.resolve()
    raise FileNotFoundError(str(unknown("notebook", path.stem, (p.stem for p in folder.glob("*.ipynb")))))


def run_notebook(notebook: Path, study: Study) -> Path:
    """Execute a notebook with a study's parameters; returns `results/<study>/notebooks/<name>.ipynb`.

    The kernel is the running interpreter, in the project's folder. The executed notebook is renamed into place only
    when every code cell ran without error; then the stage is marked done, unless the parameters are not those of
    `params/<study>.yaml` (then it is marked as not done: the results on disk are of something else).
    Raises ValueError when the notebook has no cell tagged `parameters`, NotebookError when it does not run to its end.
    """
    import nbformat

    name = notebook.stem
    source = nbformat.read(notebook, as_version=4)
    tagged = any("parameters" in cell.metadata.get("tags", []) for cell in source.cells)
    if not tagged and not _is_quick_start(name):
        raise ValueError(f"notebook '{name}' has no cell tagged 'parameters', so a study cannot be given to it")
    started, digest = time.time(), sha256_file(notebook)
    target = paths.results(study.study) / "notebooks" / f"{name}.ipynb"
    partial = target.with_name(f"{name}.failed.ipynb")
    marker(study.study, name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gcnet-") as scratch:
        output = Path(scratch) / f"{name}.ipynb"
        parameters = study.model_dump(mode="json") if tagged else None
        reason = _execute(notebook, output, parameters, Path(scratch))
        if output.exists():
            executed = nbformat.read(output, as_version=4)
            if reason == _DIED:
                reason += _last_started(executed)
            reason = reason or _unfinished(executed)
            _write(partial if reason else target, _tidy(executed))
    if reason:
        where = f"; what it got to: {short(partial)}" if partial.exists() else ""
        raise NotebookError(f"{name}: {reason}{where}")
    partial.unlink(missing_ok=True)
    if is_params_file(study):
        mark_done(study, name, started, notebook=f"notebooks/{name}.ipynb", notebook_sha256=digest)
    return target


def is_params_file(study: Study) -> bool:
    """Whether these are the parameters of `params/<study>.yaml` (on whatever device)."""
    try:
        return Study.load(study.study, device=study.device) == study
    except (FileNotFoundError, ValueError):
        return False


def _execute(notebook: Path, output: Path, parameters: dict[str, Any] | None, scratch: Path) -> str | None:
    """Run papermill, which writes `output`; returns why it stopped early, None if nothing was raised."""
    import papermill
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    # What goes wrong is said once, by us; parameters that a notebook does not declare reach it all the same.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    _write_kernelspec(scratch)
    config = Config()
    config.KernelManager.connection_file = str(scratch / "k.json")
    if sys.platform == "linux" and len(str(scratch)) <= _LONGEST_SOCKET_FOLDER:
        config.KernelManager.transport = "ipc"  # TCP kernels that start together race for free ports
    search = os.pathsep.join(filter(None, [str(scratch), os.environ.get("JUPYTER_PATH")]))
    try:
        with _environment(JUPYTER_PATH=search, JUPYTER_RUNTIME_DIR=str(scratch)):
            papermill.execute_notebook(
                # papermill formats paths, so a brace in one must be doubled
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)),
                parameters=parameters, kernel_name=KERNEL, cwd=str(paths.project()),
                progress_bar=False, start_timeout=180, iopub_timeout=120, config=config,
            )  # fmt: skip
    except PapermillExecutionError as error:
        return f"{error.ename}: {_first_line(error.evalue)}, in cell [{error.exec_count}]{_where(error.source, error)}"
    except DeadKernelError:
        return _DIED
    except (CellControlSignal, RuntimeError, TimeoutError) as error:
        return f"the kernel could not run it: {_first_line(str(error))}"
    return None


def _write_kernelspec(scratch: Path) -> None:
    """A private kernelspec in `scratch`: the interpreter that runs the launcher, whatever 'python3' is elsewhere."""
    package = Path(__file__).resolve().parent.parent
    env = {
        "GCNET_HEADLESS": "1",  # nobody looks on: no bars, no panel
        "IPYTHONDIR": str(scratch / "ipython"),  # a user's start-up files and history must not reach a result
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # or the debugger warns about frozen modules in every log
    }
    if package != Path(sysconfig.get_path("purelib")):  # used from a checkout, perhaps never installed
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    folder = scratch / "kernels" / KERNEL
    folder.mkdir(parents=True)
    spec = {
        # The kernel logs tracebacks of its own when it is told to stop; errors of cells are in the notebook.
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"],
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "env": env,
    }
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _unfinished(nb: NotebookNode) -> str | None:
    """Why an executed notebook does not count as run, None if every code cell ran and none left an error.

    papermill's own word is not enough: it calls cells completed that never started.
    """
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                return f"{output.ename}: {_first_line(output.evalue)}, in cell [{cell.execution_count}]"
        if cell.execution_count is None:
            return f"stopped before cell {number} of {len(nb.cells)}, which never ran"
    return None


def _last_started(nb: NotebookNode) -> str:
    """', in the cell that begins: ...' of the last cell that papermill started."""
    begun = [c for c in nb.cells if c.cell_type == "code" and c.metadata.get("papermill", {}).get("start_time")]
    return f", in the cell that begins: {_first_line(begun[-1].source)}" if begun else ""


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def _where(source: str, error: Any) -> str:
    """': <the line of the cell that raised>', read from the traceback's arrow where it has one."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    cell_part = plain.split("\nFile ")[0]
    arrow = re.search(r"^-+> +(\d+) ?(.*)$", cell_part, re.MULTILINE)
    if not arrow:
        return ""
    lines = source.splitlines()
    number = int(arrow.group(1))
    return f", line {number}: {lines[number - 1].strip()}" if number <= len(lines) else ""


# --- what is kept of an executed notebook ---------------------------------------------------------------------------


def _tidy(nb: NotebookNode) -> NotebookNode:
    """Take out what differs between two runs of the same thing: times, random cell ids, paths of this machine."""
    parameters = nb.metadata.pop("papermill", {}).get("parameters", {})
    nb.metadata["papermill"] = {"parameters": parameters}
    for cell in nb.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            _tidy_output(output)
    return nb


def _tidy_output(output: NotebookNode) -> None:
    if output.output_type == "stream":
        output.text = _without_machine(output.text)
    elif output.output_type == "error":
        output.evalue = _without_machine(output.evalue)
        output.traceback = [_without_machine(line) for line in output.traceback]
    else:
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") and isinstance(value, str):
                output.data[kind] = _without_machine(value)


def _without_machine(text: str) -> str:
    text = text.replace(f"{paths.project()}{os.sep}", "").replace(f"{sys.prefix}{os.sep}", "<python>/")
    return re.sub(r"\S*ipykernel_\d+[/\\]\d+\.py", "<cell>", text)


def _write(path: Path, nb: NotebookNode) -> None:
    import nbformat

    with atomic_write(path) as temporary:
        nbformat.write(nb, temporary)
