"""Where things are: absolute paths below the project, whichever folder a notebook or command runs in."""

from __future__ import annotations

import os
from pathlib import Path


def project() -> Path:
    """The nearest folder at or above the working directory that holds `params/` and `notebooks/`, else the latter."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def params() -> Path:
    return project() / "params"


def results(study: str) -> Path:
    """Where a study's figures and tables go: below `GCNET_RESULTS`, default `results/`."""
    return project() / os.environ.get("GCNET_RESULTS", "results") / study


def runs() -> Path:
    """Where computed things are kept: `GCNET_RUNS`, default `runs/`."""
    return project() / os.environ.get("GCNET_RUNS", "runs")


def images() -> Path:
    """Where images are looked for and downloaded to: `GCNET_DATA`, default `data/`."""
    return project() / os.environ.get("GCNET_DATA", "data")
