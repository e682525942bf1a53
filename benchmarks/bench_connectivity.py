"""Connectivity of all layers against the plain forward pass on the same images, and against storing and looping."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcnet import layer_graph, networks
from gcnet.activations import Moments, activations
from gcnet.connectivity import connectivity
from gcnet.training import autocast


def images(count: int, batch: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images, the same for both sides: speed and memory do not depend on what they show."""
    for start in range(0, count, batch):
        generator = torch.Generator().manual_seed(start)
        yield torch.randn(min(batch, count - start), 3, 32, 32, generator=generator), torch.zeros(batch).long()


def seconds(*runs: Callable[[], Any], repeats: int = 7) -> list[float]:
    """The shortest time of each, the runs taken in turn: whatever else the machine does only ever adds to a time."""
    spent: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for number, run in enumerate(runs):
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                spent[number].append(time.perf_counter() - started)
    return [min(s) for s in spent]


def against_forward(name: str, precision: str, count: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = networks.build(name, 10, seed=0).to(device, memory_format=torch.channels_last).eval()
    batches = [(x.to(device, memory_format=torch.channels_last), y) for x, y in images(count)]
    graph = layer_graph(model, batches[0][0][:1])

    def forward() -> None:
        with torch.no_grad(), autocast(device, precision):
            for x, _ in batches:
                model(x)

    def ours() -> None:
        with autocast(device, precision):
            connectivity(model, batches, graph=graph)

    plain, full = seconds(forward, ours)
    target = 1.05 if precision == "float32" else 1.15
    case = f"{name} {precision}, {count} images"
    return _row(case, full, "plain forward pass", plain, full / plain, f"at most {target}")


def against_pairwise(count: int) -> dict[str, Any]:
    """The stage itself, forward excluded: streamed moments against np.corrcoef of each pair of stored columns."""
    model = networks.build("vgg16_bn", 10, width=0.25, seed=0).eval()
    graph = layer_graph(model, torch.zeros(1, 3, 32, 32))
    stored, _ = activations(model, images(count), graph, samples=count)
    pairs = [((child, "conv"), (parent, "conv")) for child in graph.layers for parent in graph.parents[child]]
    columns = {name: values.numpy().T for name, values in stored.items()}

    def ours() -> None:
        moments = Moments(pairs)
        for start in range(0, count, 250):
            moments.update({(name, "conv"): values[start : start + 250] for name, values in stored.items()})

    def pairwise() -> None:
        for (child, _), (parent, _) in pairs:
            matrix = np.empty((len(columns[child]), len(columns[parent])))
            for j, y in enumerate(columns[child]):
                for i, x in enumerate(columns[parent]):
                    matrix[j, i] = np.corrcoef(x, y)[0, 1]

    fast, slow = seconds(ours, repeats=3)[0], seconds(pairwise, repeats=1)[0]
    case = f"vgg16_bn quarter width, {count} images, without the forward pass"
    return _row(case, fast, "np.corrcoef pair by pair", slow, slow / fast, "at least 100")


def peak_memory(count: int) -> float:
    """Peak memory in MiB of a process of its own that measures connectivity over `count` images."""
    command = [sys.executable, "-m", "benchmarks.bench_connectivity", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(few: int, many: int) -> dict[str, Any]:
    low, high = peak_memory(few), peak_memory(many)
    return _row(f"peak MiB, {many} against {few} images", high, f"{few} images", low, high / low, "at most 1.05")


def _row(case: str, ours: float, peer: str, peer_s: float, ratio: float, target: str) -> dict[str, Any]:
    return {"case": case, "ours_s": ours, "peer": peer, "peer_s": peer_s, "ratio": ratio, "target": target}


def run(quick: bool = False) -> list[dict[str, Any]]:
    count = 250 if quick else 1000
    rows = [against_forward(n, p, count) for n in ("vgg16_bn", "resnet18") for p in ("float32", "bfloat16")]
    rows.append(against_pairwise(250 if quick else 2000))
    rows.append(memory(500, 2000) if quick else memory(5000, 50000))
    return rows


def _measure(count: int) -> None:
    model: nn.Module = networks.build("vgg16_bn", 10, width=0.25, seed=0)
    connectivity(model, images(count))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    _measure(int(sys.argv[1]))
