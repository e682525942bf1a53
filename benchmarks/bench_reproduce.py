"""`make reproduce` in a fresh clone with nothing computed, and once more when all is done."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent


def run(quick: bool = False) -> list[dict[str, Any]]:
    study = "smoke" if quick else "digits"
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(PROJECT), str(clone)], check=True)
        environment = {**os.environ, "GCNET_RUNS": str(Path(folder) / "runs")}
        command = ["make", "-s", "reproduce", f"STUDY={study}", f"PYTHON={sys.executable}"]
        spent = []
        for _ in range(2):
            started = time.perf_counter()
            subprocess.run(command, cwd=clone, env=environment, check=True)
            spent.append(time.perf_counter() - started)
    first = {"case": f"{study}, nothing computed", "ours_s": spent[0], "target": "at most 360 s"}
    again = {"case": f"{study}, all done", "ours_s": spent[1], "target": "at most 2 s"}
    return [{"peer": "", "peer_s": None, "ratio": None, **row} for row in (first, again)]
