"""The launcher: parameters, failures, and when a notebook counts as done. Kernels are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from gcnet import run
from gcnet.__main__ import main
from gcnet.store import sha256_file
from gcnet.study import Study

ROOT = Path(__file__).resolve().parent.parent
STUDY = """study: tiny
notebooks: ["00", "01", "02", "03", "04", "05"]
dataset: digits
width: 0.125
seeds: [0]
lr: 1.0e-2
flip: false
guidance: {pearson: [B25]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with one study and no notebooks."""
    for name in ("params", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "params" / "tiny.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GCNET_RUNS", raising=False)
    return tmp_path


def write_notebook(project: Path, name: str, *cells: str, parameters: str | None = "study = 'digits'") -> Path:
    code = [nbformat.v4.new_code_cell(text, id=f"cell-{i}") for i, text in enumerate(cells)]
    if parameters is not None:
        tagged = {"tags": ["parameters"]}
        code.insert(0, nbformat.v4.new_code_cell(parameters, id="parameters", metadata=tagged))
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    path = project / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel}), path)
    return path


def printed(notebook: Path) -> list[str]:
    """What the cells of an executed notebook printed, line by line."""
    outputs = [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]
    return [line for o in outputs if o.output_type == "stream" for line in o.text.splitlines()]


def executed(project: Path, name: str, study: str = "tiny") -> Path:
    return project / "results" / study / "notebooks" / f"{name}.ipynb"


# --- a notebook that runs ---


def test_cells_see_the_parameters_this_interpreter_and_the_project(project: Path) -> None:
    source = write_notebook(
        project,
        "00_ok",
        f"import os, sys\nprint(sys.executable == {sys.executable!r}, os.getcwd() == {str(project)!r})",
        f"from gcnet import run\nprint(run.__file__ == {run.__file__!r})",
        "print(study, width, lr, flip, tap, guidance)",
    )
    before = time.time()
    target = run.run_notebook(source, Study.load("tiny"))

    assert target == executed(project, "00_ok")
    assert printed(target) == ["True True", "True", "tiny 0.125 0.01 False None {'pearson': ['B25']}"]
    done = json.loads(run.marker("tiny", "00_ok").read_text())
    assert done["study"] == Study.load("tiny").model_dump(mode="json")
    assert done["notebook_sha256"] == sha256_file(source)
    assert done["seconds"] > 0
    assert "git_sha" in done
    # the marker's time is the start: what is edited while a notebook runs is newer, and runs again
    assert before - 1 < run.marker("tiny", "00_ok").stat().st_mtime < target.stat().st_mtime


def test_two_runs_of_the_same_leave_the_same_bytes_and_no_path_of_this_machine(project: Path) -> None:
    cells = ["import warnings\nwarnings.warn('careful')", "from pathlib import Path\nprint(Path.cwd() / 'x')"]
    source = write_notebook(project, "00_ok", *cells)
    first = run.run_notebook(source, Study.load("tiny")).read_bytes()
    assert run.run_notebook(source, Study.load("tiny")).read_bytes() == first
    assert b"careful" in first
    for machine in (str(project), sys.prefix, "ipykernel_", "/tmp/"):
        assert machine.encode() not in first
    assert list(executed(project, "00_ok").parent.iterdir()) == [executed(project, "00_ok")]


def test_overrides_are_typed_and_do_not_mark_the_study_done(project: Path) -> None:
    write_notebook(project, "00_ok", "print(repr(flip), repr(width), repr(seeds), repr(tap))")
    given = ["-p", "flip", "true", "-p", "width", "0.5", "-p", "seeds", "[3, 4]", "-p", "tap", "relu"]
    assert main(["run", "notebooks/00_ok.ipynb", "--study", "tiny", *given]) == 0
    assert printed(executed(project, "00_ok")) == ["True 0.5 [3, 4] 'relu'"]
    assert not run.marker("tiny", "00_ok").exists()


def test_an_override_unmarks_what_an_earlier_run_marked(project: Path) -> None:
    source, study = write_notebook(project, "00_ok", "print(width)"), Study.load("tiny")
    run.mark_done(study, "00_ok", time.time())
    assert run.marker("tiny", "00_ok").exists()
    run.run_notebook(source, Study.load("tiny", width=0.5))
    assert not run.marker("tiny", "00_ok").exists()


def test_the_marker_comes_last(project: Path) -> None:
    # the notebook itself looks: while it runs there is no marker, not even that of an earlier run
    marker = run.marker("tiny", "00_ok")
    source = write_notebook(project, "00_ok", f"from pathlib import Path\nprint(Path({str(marker)!r}).exists())")
    for _ in range(2):
        assert printed(run.run_notebook(source, Study.load("tiny"))) == ["False"]
        assert marker.exists()
        assert marker.stat().st_ctime_ns >= executed(project, "00_ok").stat().st_ctime_ns


def test_the_quick_start_may_take_no_parameters(project: Path) -> None:
    source = write_notebook(project, "00_quick", "print('study' in globals())", parameters=None)
    assert printed(run.run_notebook(source, Study.load("tiny"))) == ["False"]
    assert run.marker("tiny", "00_quick").exists()


# --- a notebook that does not ---


def assert_nothing_is_marked(project: Path, name: str) -> None:
    assert not run.marker("tiny", name).exists()
    assert not executed(project, name).exists()


def test_a_failing_cell_keeps_the_partial_notebook(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_notebook(project, "00_bad", "print('before')", "share = 1\nshare / (share - 1)", "print('after')")
    assert main(["run", "notebooks/00_bad.ipynb", "--study", "tiny"]) == 1
    message = capfd.readouterr().err
    assert message.splitlines() == [
        "failed: 00_bad: ZeroDivisionError: division by zero, in cell [4], line 2: share / (share - 1); "
        "what it got to: results/tiny/notebooks/00_bad.failed.ipynb"
    ]
    assert_nothing_is_marked(project, "00_bad")
    assert printed(executed(project, "00_bad.failed")) == ["before"]


def test_an_earlier_result_survives_a_failure_and_success_removes_the_partial_one(project: Path) -> None:
    study = Study.load("tiny")
    write_notebook(project, "00_nb", "print('first')")
    run.run_notebook(project / "notebooks" / "00_nb.ipynb", study)
    with pytest.raises(run.NotebookError, match="NameError: name 'nothing' is not defined"):
        run.run_notebook(write_notebook(project, "00_nb", "nothing"), study)
    assert printed(executed(project, "00_nb")) == ["first"]
    assert not run.marker("tiny", "00_nb").exists()
    run.run_notebook(write_notebook(project, "00_nb", "print('second')"), study)
    assert printed(executed(project, "00_nb")) == ["second"]
    assert not executed(project, "00_nb.failed").exists()


def test_a_killed_kernel_is_a_failure(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_notebook(project, "00_dead", "import os", "os.kill(os.getpid(), 9)")
    assert main(["run", "notebooks/00_dead.ipynb", "--study", "tiny"]) == 1
    message = capfd.readouterr().err
    assert "00_dead: the kernel died" in message
    assert "begins: os.kill(os.getpid(), 9)" in message
    assert "Traceback" not in message
    assert_nothing_is_marked(project, "00_dead")


def test_leaving_early_is_a_failure_though_papermill_takes_it_for_success(project: Path) -> None:
    source = write_notebook(project, "00_exit", "import sys\nsys.exit(0)", "print('never')")
    with pytest.raises(run.NotebookError, match="SystemExit"):
        run.run_notebook(source, Study.load("tiny"))
    assert_nothing_is_marked(project, "00_exit")


def test_a_notebook_that_stopped_between_cells_is_unfinished() -> None:
    ran = nbformat.v4.new_code_cell("1", execution_count=1)
    empty, text = nbformat.v4.new_code_cell(" "), nbformat.v4.new_markdown_cell("text")
    nb = nbformat.v4.new_notebook(cells=[text, ran, empty])
    assert run._unfinished(nb) is None
    nb.cells.append(nbformat.v4.new_code_cell("2"))
    assert run._unfinished(nb) == "stopped before cell 4 of 4, which never ran"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_stopped_launcher_stops_its_kernel_and_marks_nothing(project: Path, how: signal.Signals) -> None:
    cells = ["import os, time\nopen('pid', 'w').write(str(os.getpid()))", "time.sleep(99)"]
    write_notebook(project, "00_long", *cells)
    command = [sys.executable, "-m", "gcnet", "run", "notebooks/00_long.ipynb", "--study", "tiny"]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": scratch}
        launcher = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        assert within(60, lambda: (project / "pid").exists() and (project / "pid").read_text())
        launcher.send_signal(how)
        assert launcher.wait(30) == (128 + how if how == signal.SIGTERM else -how)
        kernel = int((project / "pid").read_text())
        assert within(30, lambda: not running(kernel))
        assert bool(list(Path(scratch).iterdir())) == (how == signal.SIGKILL)
    assert_nothing_is_marked(project, "00_long")
    assert not (project / "results").exists()


def within(seconds: float, condition: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def running(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody has waited for yet, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- what is wrong before anything starts: exit code 2 and one line ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["00_ok", "--study", "tinny"], "unknown study 'tinny'; did you mean 'tiny'?"),
        (["00_okk", "--study", "tiny"], "unknown notebook '00_okk'; did you mean '00_ok'?"),
        (["00_ok", "--study", "tiny", "-p", "widht", "1"], "unknown parameter 'widht'; did you mean 'width'?"),
        (["00_ok", "--study", "tiny", "-p", "width", "wide"], "width: Input should be a valid number"),
        (["00_ok", "--study", "tiny", "-p", "width", "[1"], "value '[1' of parameter 'width' is not YAML"),
        (["00_ok", "--study", "tiny", "-p", "network", "vgg"], "unknown network 'vgg'"),
        (["00_ok", "--study", "other"], "says study: tiny"),
        (["01_plain", "--study", "tiny"], "no cell tagged 'parameters'"),
    ],
)
def test_bad_input_is_one_line_and_runs_nothing(
    project: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    write_notebook(project, "00_ok", "open('ran', 'w')")
    write_notebook(project, "01_plain", "open('ran', 'w')", parameters=None)
    (project / "params" / "other.yaml").write_text(STUDY)
    assert main(["run", *arguments]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith("error: ")
    assert says in line
    assert not (project / "ran").exists()
    assert not (project / "runs").exists()


# --- status and why ---


def test_status_says_what_is_stale_and_why(project: Path) -> None:
    (project / "gcnet").mkdir()
    code = project / "gcnet" / "ghost.py"
    code.write_text("")
    (project / "params" / "tiny.yaml").write_text(STUDY.replace('"05"', '"09"'))
    for name in ("00_quick", "01_first", "02_second", "09_third"):
        write_notebook(project, name)
    assert {state for _, state, _ in run.status("tiny")} == {"missing"}

    past = time.time() - 100
    os.utime(code, (past, past))
    for file in [*(project / "notebooks").iterdir(), project / "params" / "tiny.yaml"]:
        os.utime(file, (past, past))
    study = Study.load("tiny")
    for place, stage in enumerate(["sweep", "00_quick", "01_first", "02_second", "09_third"]):
        run.mark_done(study, stage, past + 10 + place)
    assert {state for _, state, _ in run.status("tiny")} == {"done"}

    os.utime(project / "notebooks" / "02_second.ipynb")
    rows = {stage: (state, why) for stage, state, why in run.status("tiny")}
    assert rows["02_second"] == ("stale", "newer: notebooks/02_second.ipynb")
    assert rows["09_third"] == ("stale", "after 02_second, which will run again")
    assert [rows[stage][0] for stage in ("sweep", "00_quick", "01_first")] == ["done"] * 3

    run.mark_done(study, "02_second", time.time())
    rows = {stage: (state, why) for stage, state, why in run.status("tiny")}
    assert rows["09_third"] == ("stale", "newer: runs/done/tiny/02_second.json")

    os.utime(code)
    assert [state for _, state, _ in run.status("tiny")] == ["stale"] * 5


def test_why_prints_where_a_result_comes_from(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gcnet.store import Store

    folder = Store().once("cell", {"pruner": "l1", "seed": 0}, lambda f: (f / "x").write_text("1"))
    Store().once("dense", {"seed": 0}, lambda f: (f / "x").write_text("1"))
    assert main(["why", folder.name]) == 0
    assert main(["why", "cell"]) == 0  # the start of a name is enough where only one begins so
    shown = capsys.readouterr().out
    assert "  pruner: l1" in shown
    assert "  git_sha: " in shown
    assert main(["why", folder.name[:-1] + "z"]) == 2
    assert f"did you mean '{folder.name}'?" in capsys.readouterr().err


def test_list_names_every_registry(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("digits", "vgg16_bn", "os_synflow", "B25", "partial", "jpeg_compression", "usps", "tiny"):
        assert name in shown


def test_sweep_refuses_no_workers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--study", "tiny", "--jobs", "0"]) == 2
    assert "--jobs 0" in capsys.readouterr().err


@pytest.mark.slow
def test_sweep_lists_what_failed_and_marks_only_success(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["-p", "shifts", "[fog]", "-p", "severities", "[1]", "-p", "flops_similarities", "[pearson]"]
    assert main(["sweep", "--study", "tiny", "--jobs", "1", *small, "-p", "dataset", "image_folder:nowhere"]) == 1
    failed = capsys.readouterr().err
    assert failed.count("nowhere") == 1, "the same error of many tasks is printed once"
    assert "dense: 0" in failed
    assert not run.marker("tiny", "sweep").exists()

    quick = "epochs: 1\nfinetune_epochs: 0\nsparsities: [0.5]\npruners: [l1]\nshifts: [fog]\nseverities: [1]\n"
    (project / "params" / "tiny.yaml").write_text(STUDY + quick + "flops_similarities: [pearson]\nshift_images: 50\n")
    assert main(["sweep", "--study", "tiny", "--jobs", "1"]) == 0
    assert json.loads(run.marker("tiny", "sweep").read_text())["study"]["epochs"] == 1


def test_a_worker_that_died_is_told_apart_from_a_task_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    from gcnet.__main__ import _print_failures

    _print_failures([{"stage": "cells", "task": "a", "error": "ValueError: no"}])
    assert "JOBS=1" not in capsys.readouterr().err
    _print_failures([{"stage": "cells", "task": t, "error": "BrokenProcessPool: it died"} for t in "ab"])
    shown = capsys.readouterr().err
    assert "failed: BrokenProcessPool: it died\n  cells: a\n  cells: b\n" in shown and "JOBS=1" in shown
