"""`python -m gcnet`: run a notebook, sweep a study's cells, say what is done and where a result comes from."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from gcnet import archive, paths, report, run, verify
from gcnet.connectivity import SIMILARITIES
from gcnet.data import DATASETS
from gcnet.errors import unknown
from gcnet.executors import EXECUTORS, cores, default_jobs, open_executor
from gcnet.hybrid import HYBRIDS
from gcnet.networks import NETWORKS
from gcnet.pruning import PRUNERS
from gcnet.shifts import CORRUPTIONS, NATURAL_SHIFTS
from gcnet.study import Study, studies
from gcnet.sweep import sweep, times

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns 0, 1 when something that was started failed, 2 when what was asked for is wrong."""
    options = _parser().parse_args(arguments)
    # A polite kill unwinds like Ctrl-C does, so that kernels and workers stop and temporary files go.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return options.command(options)
    except run.NotebookError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, the next run continues", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {sys.executable} has no package '{error.name}': `make env` installs it", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m gcnet", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    def with_study(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--study", default="digits", help="name in params/, or a params file (default: digits)")
        sub.add_argument(
            "-p", dest="overrides", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
            help="override a parameter; the value is YAML: -p width 0.5 -p 'seeds' '[0, 1]'",
        )  # fmt: skip

    sub = command("run", _run, "execute a notebook headless with a study's parameters")
    sub.add_argument("notebook", type=Path)
    with_study(sub)
    sub = command("sweep", _sweep, "compute every cell of a study that the store does not hold, on all cores")
    sub.add_argument("--jobs", type=int, help="worker processes (default: one a core; on a GPU at most 4)")
    sub.add_argument("--executor", choices=EXECUTORS, default="local", help="where the tasks run (default: local)")
    sub.add_argument("--address", default="", help="of a running Dask scheduler; without one, workers of this machine")
    sub.add_argument(
        "--option", dest="options", action="append", default=[], metavar="KEY=VALUE",
        help="of submitit: --option slurm_partition=gpu --option gpus_per_node=1 --option timeout_min=240",
    )  # fmt: skip
    with_study(sub)
    sub = command("verify", _verify, "compute a study again in a folder of its own and compare every table")
    sub.add_argument("--jobs", type=int, default=cores(), help="worker processes (default: one a core)")
    sub.add_argument("--keep", type=Path, help="compute in this folder and keep it (default: a temporary one)")
    with_study(sub)
    sub = command("grid", _grid, "build the tables across studies from their results")
    sub.add_argument("name", help="the tables go to results/NAME/tables/")
    sub.add_argument("studies", nargs="+", metavar="STUDY")
    sub = command("pack", _pack, "write what a study computed, without the large files, to results/<study>/store.zip")
    with_study(sub)
    sub = command("unpack", _unpack, "put the results in results/<study>/store.zip into the store")
    sub.add_argument("--study", default="digits")
    sub = command("report", _report, "write results/<study>/report.html, one page of all that its notebooks wrote")
    sub.add_argument("--study", default="digits")
    command("readme", _readme, "fill in the parts of README.md that come from results")
    sub = command("status", _status, "which stages of a study are done or stale, and why")
    sub.add_argument("--study", default="digits")
    command("list", _list, "the names that a study may use")
    sub = command("why", _why, "what a store entry was computed from, and by what")
    sub.add_argument("key", metavar="KEY", help="entry in the store, or the start of its name: cell-3f2a")
    return parser


def _study(options: argparse.Namespace) -> Study:
    return run.load_study(options.study, dict(run.parse_override(*pair) for pair in options.overrides))


# --- commands -------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    notebook = run.find_notebook(options.notebook)
    for name in ("papermill", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    study = _study(options)
    print(f"{notebook.stem}: running with study {study.study}", flush=True)
    started = time.perf_counter()
    executed = run.run_notebook(notebook, study)
    print(f"{notebook.stem}: done in {time.perf_counter() - started:.0f} s: {run.short(executed)}", flush=True)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: at least one worker process is needed")
    study = _study(options)
    jobs = options.jobs or default_jobs(study.device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("gcnet").setLevel(logging.INFO)
    where = {"local": f"{jobs} worker processes", "slurm": "jobs of a SLURM cluster"}
    where["dask"] = f"Dask workers at {options.address}" if options.address else f"{jobs} Dask workers"
    print(f"sweep: study {study.study}, {where[options.executor]}", flush=True)
    started = time.time()
    kinds = {"address": options.address, "options": dict(map(_option, options.options))}
    with open_executor(options.executor, jobs, **kinds) as executor:
        run.marker(study.study, "sweep").unlink(missing_ok=True)
        failures = sweep(study, executor)
    if failures:
        _print_failures(failures)
        return 1
    if run.is_params_file(study):
        from gcnet import reporting

        reporting.save_table(times(study), study, "times")
        run.mark_done(study, "sweep", started)
    print(f"sweep: done in {time.time() - started:.0f} s", flush=True)
    return 0


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE with the value typed as YAML. Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option '{text}' is not KEY=VALUE")
    return key, yaml.safe_load(value)


def _print_failures(failures: Sequence[dict[str, Any]]) -> None:
    """Every failed task, those with the same error together: one missing file must not print a page."""
    by_error: dict[str, list[str]] = {}
    for failure in failures:
        by_error.setdefault(failure["error"], []).append(f"{failure['stage']}: {failure['task']}")
    for error, tasks in by_error.items():
        print(f"failed: {error}\n  " + "\n  ".join(tasks), file=sys.stderr)
    if any(error.startswith("BrokenProcessPool") for error in by_error):
        print(
            "a worker process died; the system kills one that runs out of memory. What is finished is kept: run again, "
            "with fewer workers if it repeats: JOBS=1, or --jobs 1",
            file=sys.stderr,
        )


def _status(options: argparse.Namespace) -> int:
    if options.study not in studies():
        raise unknown("study", options.study, studies())
    rows = run.status(options.study)
    width = max(len(stage) for stage, _, _ in rows)
    print(f"study {options.study}")
    for stage, state, why in rows:
        print(f"  {stage:<{width}}  {state:<7}  {why}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    study = _study(options)
    committed = paths.results(study.study) / "tables"
    if not any(committed.glob("*.csv")):
        raise FileNotFoundError(f"study '{study.study}' has no tables below {run.short(committed)} to compare with")
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gcnet-verify-")))
        stack.enter_context(verify.elsewhere(folder.resolve()))
        with open_executor("local", options.jobs) as executor:
            failures = sweep(study, executor)
        if failures:
            _print_failures(failures)
            return 1
        for stage in run.stages(study.study):
            if stage != "sweep" and not stage.startswith("00_"):
                print(f"{stage}: running", flush=True)
                run.run_notebook(run.find_notebook(Path(stage)), study)
        found = verify.compare(committed, paths.results(study.study) / "tables")
    print(found[list(verify.COLUMNS)].to_string(index=False))
    held = verify.holds(found)
    counts = ", ".join(f"{count} {word}" for word, count in found.verdict.value_counts().items())
    print(f"study {study.study}: {'holds' if held else 'does not hold'} ({counts})")
    return 0 if held else 1


def _report(options: argparse.Namespace) -> int:
    page, missing = report.write_report(options.study)
    print(f"{run.short(page)}: {page.stat().st_size / 1e6:.1f} MB")
    for line in missing:
        print(f"not in it: {line}")
    if missing:
        print(f"make reproduce STUDY={options.study} makes what is not in it")
    return 0


def _readme(_: argparse.Namespace) -> int:
    from gcnet import readme

    print(f"{run.short(readme.write())}: filled in from results")
    return 0


def _grid(options: argparse.Namespace) -> int:
    from gcnet import grid

    for study in options.studies:
        if study not in studies():
            raise unknown("study", study, studies())
    folder, tables, missing = grid.write_grid(options.studies, options.name)
    print(f"{run.short(folder)}: {len(tables)} tables")
    for study in missing:
        print(f"no results yet: {study} (make reproduce STUDY={study})")
    return 0


def _pack(options: argparse.Namespace) -> int:
    written, missing = archive.pack(_study(options))
    without = f", without {', '.join(missing)}: not computed yet" if missing else ""
    print(f"{run.short(written)}: {written.stat().st_size / 2**20:.1f} MiB{without}")
    return 0


def _unpack(options: argparse.Namespace) -> int:
    if options.study not in studies():
        raise unknown("study", options.study, studies())
    added, there = archive.unpack(options.study)
    print(f"study {options.study}: {added} results put into {paths.runs()}, {there} were there")
    return 0


def _list(options: argparse.Namespace) -> int:
    registries = {
        "data sets": [*DATASETS, "image_folder:PATH"],
        "networks": [*NETWORKS, "torchvision:NAME"],
        "pruners": PRUNERS,
        "hybrids": HYBRIDS,
        "similarities": SIMILARITIES,
        "shifts": CORRUPTIONS,
        "natural shifts": NATURAL_SHIFTS,
        "studies": studies(),
    }
    width = max(map(len, registries))
    for kind, names in registries.items():
        print(f"{kind:<{width}}  {', '.join(names)}")
    return 0


def _why(options: argparse.Namespace) -> int:
    keys = sorted(p.parent.name for p in paths.runs().glob("*/entry.json") if ".corrupt-" not in p.parent.name)
    found = [key for key in keys if key.startswith(options.key)]
    if options.key in keys:
        found = [options.key]
    if len(found) != 1:
        near = found or get_close_matches(options.key, keys, n=1, cutoff=0.1)
        hint = f" did you mean '{near[0]}'?" if near else ""
        problem = f"'{options.key}' begins the names of {len(found)} store entries;" if found else (
            f"unknown store entry '{options.key}';"
        )  # fmt: skip
        raise ValueError(f"{problem}{hint} {paths.runs()} holds {len(keys)}")
    folder = paths.runs() / found[0]
    entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
    print(folder)
    for part in ("inputs", "provenance", "files"):
        print(f"{part}:")
        for name, value in entry[part].items():
            print(f"  {name}: {json.dumps(value) if isinstance(value, (dict, list)) else value}")
    print(f"wall_s: {entry['wall_s']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
