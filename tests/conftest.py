"""Every test has its own empty `runs/` and `data/`; one thread, and the same hypothesis examples on every run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("gcnet", deadline=None, derandomize=True, database=None)
settings.load_profile("gcnet")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("GCNET_DATA", str(tmp_path / "data"))
    yield
    # Loaded data sets are remembered by their parameters, which say nothing of the folders above.
    if "gcnet.cells" in sys.modules:
        sys.modules["gcnet.cells"]._splits.cache_clear()
