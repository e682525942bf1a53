"""The Makefile: order, nothing twice, nothing half done. The project's own Makefile on a stand-in for the package.

The stand-in's `python -m gcnet` logs what it is asked for and does what the notebook file says: `ok`, `fail`,
`hang` half-way between writing its result and marking it done, or `edit` the notebook meanwhile. So a chain takes a
fraction of a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gcnet import run

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = """
import os, sys, time
from pathlib import Path
started = time.time()
command, *arguments = sys.argv[1:]
study = arguments[arguments.index("--study") + 1]
if command == "report":
    page = Path(os.environ.get("GCNET_RESULTS", "results"), study, "report.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(page.read_text() + "again" if page.exists() else "once")
    sys.exit()
notebook = Path(arguments[0]) if command == "run" else None
stage = notebook.stem if notebook else "sweep"
with open("log", "a") as log:
    log.write(stage + chr(10))
does = notebook.read_text() if notebook else Path("sweep_does").read_text()
if does == "fail":
    sys.exit(1)
Path("half").write_text(stage)
if does == "slow":
    time.sleep(0.5)
    with open("spans", "a") as spans:
        spans.write(f"{stage} {started} {time.time()} {os.environ.get('OMP_NUM_THREADS', 'all')}" + chr(10))
if does == "hang":
    time.sleep(60)
if does == "edit":
    time.sleep(0.05)
    notebook.write_text("ok")
marker = Path(os.environ.get("GCNET_RUNS", "runs"), "done") / study / (stage + ".json")
marker.parent.mkdir(parents=True, exist_ok=True)
temporary = marker.with_suffix(".temporary")
temporary.write_text('{"seconds": 1, "git_sha": "0123456789", "git_dirty": false}')
os.utime(temporary, (started, started))
temporary.rename(marker)
"""
FREE = ["01_activations", "02_connectivity"]  # these need the sweep, and nothing of each other
CHAIN = [*FREE, "07_cka_sr", "10_own_network", "09_comparison"]  # 07 and 10 run when nothing else does, 09 after all
ALL = ["00_quickstart", "sweep", *CHAIN]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("params", "notebooks", "gcnet"):
        (tmp_path / name).mkdir()
    for name in ("digits", "cifar10_vgg16_bn"):
        (tmp_path / "params" / f"{name}.yaml").write_text(f"study: {name}\n")
    (tmp_path / "params" / "claims.yaml").write_text("- id: a\n")
    (tmp_path / "gcnet" / "__main__.py").write_text(STAND_IN)
    (tmp_path / "sweep_does").write_text("ok")
    for name in ("00_quickstart", *CHAIN):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text("ok")
    for name in ("PYTHON", "GCNET_RUNS", "GCNET_RESULTS", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "STUDY",
                 "JOBS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments, f"PYTHON={python}"], capture_output=True, text=True, timeout=60)


def ran(project: Path) -> list[str]:
    """The stages that ran since this was last asked, in order."""
    log = project / "log"
    stages = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return stages


def marked(project: Path, study: str = "digits") -> set[str]:
    return {p.stem for p in (project / "runs" / "done" / study).glob("*.json")}


def touch(*paths: Path) -> None:
    """Make files newer than all that ran, on file systems with coarse times too."""
    time.sleep(0.02)
    for path in paths:
        os.utime(path)


def in_order(stages: list[str]) -> list[str]:
    """The stages without the quick start, those that need nothing of each other by their numbers."""
    stages = [s for s in stages if s != "00_quickstart"]
    places = [number for number, stage in enumerate(stages) if stage in FREE]
    for place, stage in zip(places, sorted(stages[number] for number in places), strict=True):
        stages[place] = stage
    return stages


@pytest.mark.parametrize("flags", [[], ["-j1"], ["-j4"]])
def test_the_chain_runs_in_order_and_a_second_time_not_at_all(project: Path, flags: list[str]) -> None:
    done = make("reproduce", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    stages = ran(project)
    assert sorted(stages) == sorted(ALL)
    assert in_order(stages) == ["sweep", *CHAIN]

    started = time.perf_counter()
    again = make("reproduce")
    assert time.perf_counter() - started < 2
    assert (again.returncode, ran(project)) == (0, [])
    assert "results/digits/" in again.stdout


def test_the_report_is_written_after_the_notebooks_and_again_when_one_has_run_again(project: Path) -> None:
    page = project / "results" / "digits" / "report.html"
    (project / "notebooks" / f"{CHAIN[-1]}.ipynb").write_text("fail")
    assert make("reproduce").returncode != 0
    assert not page.exists()
    (project / "notebooks" / f"{CHAIN[-1]}.ipynb").write_text("ok")
    assert make("reproduce").returncode == 0
    assert page.read_text() == "once"
    make("reproduce")
    assert page.read_text() == "once"
    touch(project / "notebooks" / f"{CHAIN[-1]}.ipynb")
    make("reproduce")
    assert page.read_text() == "onceagain"
    assert make("report").returncode == 0
    assert page.read_text() == "onceagainagain"


def test_a_study_runs_only_the_notebooks_that_it_names(project: Path) -> None:
    study = project / "params" / "digits.yaml"
    study.write_text(study.read_text() + f'notebooks: ["{CHAIN[0][:2]}", "{CHAIN[-1][:2]}"]\n')
    assert make("reproduce").returncode == 0
    assert ran(project) == ["sweep", CHAIN[0], CHAIN[-1]]


def test_two_notebooks_run_at_once_and_those_that_measure_times_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in CHAIN[:-1]:
        (project / "notebooks" / f"{name}.ipynb").write_text("slow")
    assert make("reproduce").returncode == 0
    spans, threads = {}, {}
    for line in (project / "spans").read_text().splitlines():
        stage, start, end, threads[stage] = line.split()
        spans[stage] = float(start), float(end)
    half = str((len(os.sched_getaffinity(0)) + 1) // 2)
    assert [threads[stage] for stage in CHAIN[:-1]] == [half, half, "all", "all"]
    first, second = (spans[name] for name in FREE)
    assert first[0] < second[1] and second[0] < first[1]
    for name in ("07_cka_sr", "10_own_network"):
        alone = spans[name]
        assert all(end <= alone[0] or start >= alone[1] for other, (start, end) in spans.items() if other != name)


@pytest.mark.parametrize(
    ("edited", "again"),
    [
        ("notebooks/02_connectivity.ipynb", ["02_connectivity", "09_comparison"]),
        ("notebooks/10_own_network.ipynb", ["10_own_network", "09_comparison"]),
        ("notebooks/00_quickstart.ipynb", ["00_quickstart"]),
        ("params/digits.yaml", ALL),
        ("params/claims.yaml", ["00_quickstart", *CHAIN]),
        ("gcnet/__main__.py", ALL),
        ("params/cifar10_vgg16_bn.yaml", []),
        ("Makefile", []),
    ],
)
def test_what_was_edited_runs_again_with_all_that_follows(project: Path, edited: str, again: list[str]) -> None:
    make("reproduce")
    ran(project)
    touch(project / edited)
    stale = [stage for stage, state, _ in run.status("digits") if state != "done"] if again else []
    assert sorted(stale) == sorted(again), "status and make must agree"
    assert make("reproduce").returncode == 0
    assert sorted(ran(project)) == sorted(again)


def test_a_stage_edited_while_it_runs_runs_again(project: Path) -> None:
    notebook = project / "notebooks" / "01_activations.ipynb"
    notebook.write_text("edit")
    assert make("reproduce").returncode == 0
    assert notebook.stat().st_mtime > (project / "runs/done/digits/01_activations.json").stat().st_mtime
    ran(project)
    assert make("reproduce").returncode == 0
    assert ran(project) == ["01_activations", "09_comparison"]
    assert make("reproduce").returncode == 0
    assert ran(project) == []


def test_studies_are_independent(project: Path) -> None:
    make("reproduce")
    ran(project)
    assert make("reproduce", "STUDY=cifar10_vgg16_bn").returncode == 0
    assert sorted(ran(project)) == sorted(ALL)
    assert marked(project) == marked(project, "cifar10_vgg16_bn") == set(ALL)


@pytest.mark.parametrize("failing", ["sweep", "01_activations", "02_connectivity"])
def test_a_failing_stage_stops_the_chain_and_is_not_done(project: Path, failing: str) -> None:
    culprit = project / "sweep_does" if failing == "sweep" else project / "notebooks" / f"{failing}.ipynb"
    culprit.write_text("fail")
    assert make("reproduce", "-j1").returncode == 2
    order = ["sweep", *CHAIN]
    before = order[: order.index(failing)]
    assert [s for s in ran(project) if s != "00_quickstart"] == [*before, failing]
    assert marked(project) - {"00_quickstart"} == set(before)

    culprit.write_text("ok")
    assert make("reproduce", "-j1").returncode == 0
    assert [s for s in ran(project) if s != "00_quickstart"] == order[order.index(failing) :]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_an_interrupted_run_continues_where_it_stopped(project: Path, how: signal.Signals) -> None:
    notebook = project / "notebooks" / "02_connectivity.ipynb"
    notebook.write_text("hang")
    command = ["make", "-j1", "reproduce", f"PYTHON={sys.executable}"]
    # a group of its own, as a terminal has: Ctrl-C reaches make and what it runs
    # where the tests run in the background SIGINT is ignored, and children inherit that
    running = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 30
    while "02_connectivity" not in (project / "half").read_text() if (project / "half").exists() else True:
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(running.pid, how)
    assert running.wait(30) != 0
    assert marked(project) == {"00_quickstart", "sweep", "01_activations"}

    ran(project)
    notebook.write_text("ok")
    assert make("reproduce").returncode == 0
    assert ran(project) == CHAIN[1:]


@pytest.mark.parametrize(
    ("study", "nearest"), [("cifar", "cifar10_vgg16_bn"), ("digit", "digits"), ("cifar10_vgg", "cifar10_vgg16_bn")]
)
@pytest.mark.parametrize("goal", ["reproduce", "status"])
def test_an_unknown_study_names_the_nearest_and_runs_nothing(
    project: Path, goal: str, study: str, nearest: str
) -> None:
    # without PYTHON: the error comes before an environment is built
    result = subprocess.run(["make", goal, f"STUDY={study}"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"unknown study '{study}'; did you mean '{nearest}'? known: cifar10_vgg16_bn digits." in result.stderr
    assert ran(project) == []
    assert not (project / ".venv").exists()


def test_what_was_computed_may_lie_elsewhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCNET_RUNS", str(project / "elsewhere"))
    assert make("reproduce").returncode == 0
    assert {p.stem for p in (project / "elsewhere" / "done" / "digits").iterdir()} == set(ALL)
    ran(project)
    assert (make("reproduce").returncode, ran(project)) == (0, [])


def test_claims_are_no_study(project: Path) -> None:
    assert "unknown study 'claims'" in make("reproduce", "STUDY=claims").stderr


def test_make_alone_prints_help_with_every_target(project: Path) -> None:
    result = subprocess.run(["make"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    for goal in (
        "reproduce",
        "test",
        "test-slow",
        "lint",
        "bench",
        "lab",
        "status",
        "clean",
        "clean-cache",
        "clean-runs",
        "env",
    ):
        assert f"make {goal} " in result.stdout
    for variable in ("STUDY=", "PYTHON=", "JOBS="):
        assert variable in result.stdout
    assert ran(project) == []


def test_an_environment_that_does_not_run_is_said_so(project: Path) -> None:
    result = make("reproduce", python="/nowhere/python")
    assert result.returncode == 2
    assert "PYTHON=/nowhere/python does not run or is older than python 3.11" in result.stderr
    assert ran(project) == []


def test_an_environment_without_the_packages_names_them(project: Path) -> None:
    bare = project / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    result = make("reproduce", python=str(bare))
    assert result.returncode == 2
    assert "python lacks: torch, torchvision, numpy" in result.stderr
    assert ran(project) == []


def test_status_without_an_environment_builds_none(project: Path) -> None:
    result = subprocess.run(["make", "status"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "nothing has run yet" in result.stdout
    assert not (project / ".venv").exists()


def test_an_old_python_is_refused_before_anything_is_built(project: Path) -> None:
    commands = project / "bin"
    commands.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        (commands / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
        (commands / name).chmod(0o755)
    for name in ("requirements.lock", "pyproject.toml"):
        (project / name).touch()
    path = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(["make", "env"], capture_output=True, text=True, timeout=60, env=path)
    assert result.returncode == 2
    assert "python >= 3.11 is needed to build .venv, found: Python 3.9.1" in result.stderr
    assert not (project / ".venv").exists()


def test_clean_keeps_what_was_computed(project: Path) -> None:
    make("reproduce")
    make("reproduce", "STUDY=cifar10_vgg16_bn")
    kept = ["runs/cell-0/entry.json", "data/images/1.png", "results/cifar10_vgg16_bn/tables/accuracy.csv"]
    gone = ["results/digits/tables/accuracy.csv", "gcnet/__pycache__/run.pyc"]
    for name in (*kept, *gone):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    assert make("clean").returncode == 0
    assert all((project / name).exists() for name in kept)
    assert not any((project / name).exists() for name in gone)
    assert (marked(project), marked(project, "cifar10_vgg16_bn")) == (set(), set(ALL))

    for name in ("cache", "corrupted-1", "dense-1"):
        (project / "runs" / name).mkdir(parents=True, exist_ok=True)
    assert make("clean-cache").returncode == 0
    assert (project / "runs" / "dense-1").exists()
    assert not any((project / "runs" / name).exists() for name in ("cache", "corrupted-1"))

    assert "make clean-runs YES=1" in make("clean-runs").stdout
    assert (project / "runs").exists()
    assert make("clean-runs", "YES=1").returncode == 0
    assert not (project / "runs").exists()
