"""Corruptions at 32 px: ours against the package `imagecorruptions`, image for image.

Both sides get the same images, severities 1 to 5, one process and one thread (with more, a busy machine would
be what is measured). Ours uses the table `cifar-c`; the package knows ImageNet-C's parameters only.
The package no longer runs on current numpy and scikit-image, so it gets an environment of its own with old
versions; corruptions that fail even there are left out of the sum on both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gcnet.shifts import CORRUPTIONS, corrupt

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".bench-env" / "imagecorruptions"
PEER = "imagecorruptions 1.1.2"
COLUMNS = ("case", "ours_s", "peer", "peer_s", "ratio", "target")
TARGET = "at least 20"
# setuptools 81 drops pkg_resources, which the package imports; numpy 2 drops np.float_, which its fog uses.
REQUIREMENTS = (
    "numpy==1.26.4",
    "scipy==1.11.4",
    "scikit-image==0.20.0",
    "pillow==10.4.0",
    "opencv-python-headless==4.9.0.80",
    "setuptools==80.9.0",
)

PEER_PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import cv2, numpy, imagecorruptions
cv2.setNumThreads(1)
images = numpy.load(sys.argv[1])
seconds = {}
for name in sys.argv[2:]:
    try:
        total = 0.0
        for severity in range(1, 6):
            imagecorruptions.corrupt(images[0], corruption_name=name, severity=severity)
            start = time.perf_counter()
            for image in images:
                imagecorruptions.corrupt(image, corruption_name=name, severity=severity)
            total += time.perf_counter() - start
        seconds[name] = total
    except Exception as error:
        seconds[name] = f"{type(error).__name__}: {error}"
print("RESULT " + json.dumps(seconds))
"""


def run(quick: bool = False) -> list[dict]:
    """Seconds for severities 1 to 5 on the same images, ours and the peer's: a row a corruption and the sum.

    Returns rows with the keys of COLUMNS; a corruption that the peer cannot run has no peer_s and no ratio.
    Raises RuntimeError if the peer's environment cannot be built or the peer does not start.
    """
    images = _images(60 if quick else 400)
    python = _peer_python()
    peer = _time_peer(python, images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = {name: _time_ours(images, name) for name in CORRUPTIONS}
    finally:
        torch.set_num_threads(threads)
    rows = [_row(name, ours[name], peer[name], "") for name in CORRUPTIONS]
    both = [name for name in CORRUPTIONS if isinstance(peer[name], float)]
    if not both:
        raise RuntimeError(f"{PEER} runs none of the corruptions; first error: {next(iter(peer.values()))}")
    case = f"all {len(both)} that the peer runs"
    rows.append(_row(case, sum(ours[n] for n in both), sum(float(peer[n]) for n in both), TARGET))
    return rows


def _row(case: str, ours: float, peer: float | str, target: str) -> dict:
    known = isinstance(peer, float)
    return {
        "case": case,
        "ours_s": round(ours, 4),
        "peer": PEER if known else f"{PEER} ({peer})",
        "peer_s": round(peer, 4) if known else None,
        "ratio": round(peer / ours, 2) if known else None,
        "target": target,
    }


def _images(count: int) -> Tensor:
    """Smooth random pictures (count, 3, 32, 32), uint8: JPEG and the like work as on photographs."""
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse.to(torch.float32), size=32, mode="bilinear").to(torch.uint8)


def _time_ours(images: Tensor, name: str, repeats: int = 3) -> float:
    """Seconds for the five severities, best of `repeats`, after a first call that fills caches."""
    total = 0.0
    for severity in range(1, 6):
        corrupt(images[:1], name, severity)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            corrupt(images, name, severity)
            seconds.append(time.perf_counter() - start)
        total += min(seconds)
    return total


def _time_peer(python: Path, images: Tensor, repeats: int = 3) -> dict[str, float | str]:
    """Seconds of the peer for the five severities, best of `repeats` runs, or why it cannot."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    best: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, images.permute(0, 2, 3, 1).contiguous().numpy())
        for _ in range(repeats):
            command = [str(python), "-c", PEER_PROGRAM, str(path), *CORRUPTIONS]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **single})
            line = next((s for s in done.stdout.splitlines() if s.startswith("RESULT ")), None)
            if line is None:
                raise RuntimeError(f"{PEER} does not start in {python.parent.parent}: {done.stderr[-1000:]}")
            for name, value in json.loads(line.removeprefix("RESULT ")).items():
                known = best.get(name)
                best[name] = min(known, value) if isinstance(known, float) and isinstance(value, float) else value
    return best


def _peer_python() -> Path:
    """The interpreter of the peer's environment, which is built on the first call and kept."""
    python = ENVIRONMENT / "bin" / "python"
    wanted = "\n".join((PEER, *REQUIREMENTS))
    # Written last, so that an environment that was interrupted half-way is built again.
    ready = ENVIRONMENT / "ready.txt"
    if ready.is_file() and ready.read_text() == wanted:
        return python
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
        [*install, *REQUIREMENTS],
        # Without its own requirements: they ask for an OpenCV that needs a display.
        [*install, "--no-deps", PEER.replace(" ", "==")],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            version = ".".join(map(str, sys.version_info[:2]))
            reason = (done.stderr or done.stdout)[-1000:]
            raise RuntimeError(
                f"the environment of {PEER} cannot be built in {ENVIRONMENT} with Python {version} "
                f"(3.11 and a package registry are known to work): {' '.join(step)}: {reason}"
            )
    ready.write_text(wanted)
    return python
