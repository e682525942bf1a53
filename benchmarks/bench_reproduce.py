"""`make reproduce` in a fresh clone with nothing computed: GC-Net alone; every system; once more with all done."""

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
        command = ["make", "-s", "reproduce", f"STUDY={study}", f"PYTHON={sys.executable}"]

        def seconds(runs: str) -> float:
            environment = {**os.environ, "GCNET_RUNS": str(Path(folder) / runs)}
            started = time.perf_counter()
            subprocess.run(command, cwd=clone, env=environment, check=True)
            return time.perf_counter() - started

        params = clone / "params" / f"{study}.yaml"
        whole = params.read_text(encoding="utf-8")
        params.write_text(whole + 'notebooks: ["00", "01", "02", "03", "04", "05"]\n', encoding="utf-8")
        first = seconds("first")
        params.write_text(whole, encoding="utf-8")
        every, again = seconds("every"), seconds("every")
    rows = [
        {"case": f"{study}, notebooks 00 to 05, nothing computed", "ours_s": first, "target": "at most 360 s"},
        {"case": f"{study}, every notebook, nothing computed", "ours_s": every, "target": "at most 720 s"},
        {"case": f"{study}, all done", "ours_s": again, "target": "at most 2 s"},
    ]
    return [{"peer": "", "peer_s": None, "ratio": None, **row} for row in rows]
