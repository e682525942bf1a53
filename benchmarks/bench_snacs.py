"""SNACS's information of all pairs of groups: a whole VGG16-BN, against spanning trees, and how time grows with N."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

import torch

from gcnet.information import acmi
from gcnet.snacs_cells import time_estimators

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def whole_network(samples: int, channels: tuple[int, ...] = CHANNELS) -> tuple[float, float]:
    """(seconds, peak MiB) for 64 x 64 groups of every consecutive pair of VGG16-BN's convolutions at full width."""
    generator = torch.Generator().manual_seed(0)
    spent = 0.0
    for inputs, outputs in pairwise(channels):
        x, y = (torch.randn(samples, count, generator=generator) for count in (inputs, outputs))
        started = time.perf_counter()
        acmi(x, y, 64)
        spent += time.perf_counter() - started
    return spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exponent(sizes: tuple[int, ...], filters: int, repeats: int = 3) -> tuple[float, float]:
    """(slope of log seconds on log N, seconds at the largest N) for one pair of layers in 64 groups."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(max(sizes), filters, generator=generator) for _ in range(2))
    best = dict.fromkeys(sizes, math.inf)
    for _ in range(repeats):
        for n in sizes:
            started = time.perf_counter()
            acmi(x[:n], y[:n], 64)
            best[n] = min(best[n], time.perf_counter() - started)
    logs = torch.tensor([[math.log(n), math.log(best[n])] for n in sizes], dtype=torch.float64)
    centred = logs - logs.mean(0)
    return float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum()), best[max(sizes)]


def run(quick: bool = False) -> list[dict[str, Any]]:
    samples = 500 if quick else 2000
    # In a process of its own, for its peak memory.
    command = [sys.executable, "-m", "benchmarks.bench_snacs", str(samples), "4" if quick else "13"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    spent, peak = float(out[-2]), float(out[-1])
    threads = torch.get_num_threads()
    case = f"all pairs of VGG16-BN{' (first 4 layers)' if quick else ''}, 64 x 64 groups, N = {samples}"
    rows = [
        _row(f"{case}, {threads} threads", spent, "", None, None, "at most 120 s"),
        _row(f"{case}, peak MiB", peak, "", None, None, "at most 4096 MiB"),
    ]
    filters = 64 if quick else 512
    for groups in (16,) if quick else (16, 32, 64, 128, 256):
        ours, *trees = time_estimators(filters, samples, groups)
        for tree in trees:
            case = f"{groups} x {groups} groups of {filters} filters, N = {samples}"
            target = "at least 50" if "vectorised" in tree["estimator"] else "at least 50 (the paper: over 17)"
            peer = f"{tree['estimator']}, from {tree['pairs_timed']} timed pairs"
            rows.append(_row(case, ours["seconds"], peer, tree["seconds"], tree["ratio"], target))
    sizes = (1000, 2000) if quick else (1000, 2000, 4000, 8000)
    slope, last = exponent(sizes, filters)
    rows.append(_row(f"exponent of N from {sizes[0]} to {sizes[-1]}", last, "", None, slope, "at most 1.15"))
    return rows


def _row(case: str, ours: float, peer: str, peer_s: float | None, ratio: float | None, target: str) -> dict[str, Any]:
    return {"case": case, "ours_s": ours, "peer": peer, "peer_s": peer_s, "ratio": ratio, "target": target}


if __name__ == "__main__":
    print(*whole_network(int(sys.argv[1]), CHANNELS[: int(sys.argv[2])]))
