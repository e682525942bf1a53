"""Layer graph and ghost pruning of large networks; smaller networks against their MACs and against torch-pruning's."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import gcnet
from gcnet import networks
from gcnet.structured import torch_pruning
from gcnet.two_four import why_not


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def graph_row(quick: bool) -> dict[str, Any]:
    tp = torch_pruning()
    name, size = ("resnet18", 32) if quick else ("resnet152", 224)
    model, image = torchvision.models.get_model(name, weights=None), torch.zeros(1, 3, size, size)
    gcnet.layer_graph(networks.build("resnet20", 10), torch.zeros(1, 3, 32, 32))  # what is loaded on the first call
    return {
        "case": f"layer graph of {name} at {size} px",
        "ours_s": seconds(lambda: gcnet.layer_graph(model, image)),
        "peer": "torch-pruning's dependency graph",
        "peer_s": seconds(lambda: tp.DependencyGraph().build_dependency(model, example_inputs=image)),
        "target": "at most 5 s",
    }


def ghost_row(quick: bool) -> dict[str, Any]:
    name, size, count = ("resnet18", 32, 32) if quick else ("resnet50", 224, 256)
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    batches = [(torch.randn(32, 3, size, size), torch.arange(32) % 10) for _ in range(count // 32)]

    @torch.no_grad()
    def forward() -> None:
        for images, _ in batches:
            model(images)

    seconds(lambda: model(batches[0][0][:2]))
    forward_s = [seconds(forward)]
    ours = seconds(lambda: gcnet.ghost_prune(model, batches, sparsity=0.9))
    forward_s.append(seconds(forward))  # before and after: the machine may have other work
    plain = statistics.mean(forward_s)
    return {
        "case": f"ghost_prune of {name} at {size} px, {count} images (target: 1.3 forward passes + 5 s)",
        "ours_s": ours,
        "peer": "its forward passes",
        "peer_s": plain,
        "target": f"at most {1.3 * plain + 5:.1f} s",
    }


def cut_by_torch_pruning(model: nn.Module, image: Tensor, macs: float) -> nn.Module:
    """torch-pruning's own magnitude pruner at its uniform ratio that leaves at most this many MACs."""
    tp = torch_pruning()
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    position = [m is head for m in model.modules()].index(True)
    low, high, best = 0.0, 0.95, model
    for _ in range(7):
        middle, cut = (low + high) / 2, copy.deepcopy(model)
        last = list(cut.modules())[position]
        importance = tp.importance.GroupMagnitudeImportance()
        tp.pruner.BasePruner(cut, image, importance, pruning_ratio=middle, ignored_layers=[last]).step()
        if gcnet.macs(cut, image) <= macs:
            high, best = middle, cut
        else:
            low = middle
    return best


def latency_rows(name: str, model: nn.Module, size: int, round_to: int, repeats: int) -> list[dict[str, Any]]:
    """The smaller network at half of the MACs against the dense one and torch-pruning's, on one thread and on all."""
    image = torch.zeros(1, 3, size, size)
    cut = {step: halved(model, image, step) for step in (1, 8, 16, 32)}
    ours = cut[round_to]
    if ours is None:
        raise ValueError(f"{name}: half of the MACs cannot be reached with round_to={round_to}")
    dense = gcnet.macs(model, image)
    peer = cut_by_torch_pruning(model, image, gcnet.macs(ours, image) * 1.01)
    share = gcnet.macs(ours, image) / dense
    rows = []
    for threads in dict.fromkeys([1, torch.get_num_threads()]):
        measured = gcnet.latency(
            {"dense": model, "ours": ours, "peer": peer}, image, batch_sizes=[64], repeats=repeats, threads=threads
        )
        time_of = {row["network"]: row["median_s"] for row in measured}
        where = f"{name} at {size} px, batch 64, {threads} thread{'s' * (threads > 1)}, {measured[0]['device']}"
        rows.append(
            {
                "case": f"{where}: share of latency left over share of MACs left, {share:.2f}",
                "ours_s": time_of["ours"],
                "peer": "dense",
                "peer_s": time_of["dense"],
                "ratio": measured[1]["ratio"] / share,
                "target": "at most 1.3",
            }
        )
        rows.append({
            "case": f"{where}: {share:.2f} of the MACs",
            "ours_s": time_of["ours"],
            "peer": f"torch-pruning's pruner, {gcnet.macs(peer, image) / dense:.2f} of the MACs",
            "peer_s": time_of["peer"],
            "target": "at least 1",
        })  # fmt: skip
    # What widths and number formats do to it: the reason for round_to, and for the one that is used above.
    some = {"dense": model} | {str(step): network for step, network in cut.items() if network is not None}
    for variant in ("float32", "channels_last", "bfloat16_channels_last"):
        first, *others = gcnet.latency(some, image, batch_sizes=[64], repeats=repeats, threads=1, variants=(variant,))
        for row in others:
            left = gcnet.macs(some[row["network"]], image) / dense
            rows.append({
                "case": f"{name} at {size} px, batch 64, 1 thread, {variant}, round_to={row['network']}: "
                f"share of latency left over share of MACs left, {left:.2f}",
                "ours_s": row["median_s"],
                "peer": "dense",
                "peer_s": first["median_s"],
                "ratio": row["ratio"] / left,
                "target": "",
            })  # fmt: skip
    return rows


def halved(model: nn.Module, image: Tensor, round_to: int) -> nn.Module | None:
    """The network at half of its MACs; None where multiples of round_to filters are too coarse for that."""
    try:
        batches = [(image, torch.zeros(1))]
        return gcnet.structured_prune(model, batches, macs=0.5, hybrid="direct", round_to=round_to).network
    except ValueError:
        return None


@torch.no_grad()
def two_four_row(quick: bool) -> dict[str, Any]:
    """Two Linear layers in half precision, dense and 2:4; where there are no kernels, why."""
    reason = why_not("cuda")
    if reason:
        return {
            "case": f"2:4 Linear layers, not measured: {reason}",
            "ours_s": math.nan,
            "peer": "dense in half precision",
            "peer_s": math.nan,
            "target": "",
        }
    width, rows = (512, 256) if quick else (4096, 4096)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).cuda()
    masks = gcnet.two_four_masks(dense, {name: dense.get_submodule(name).weight.abs() for name in ("0", "2")})
    networks = {"ours": gcnet.to_two_four(dense, masks), "peer": dense.half().eval()}
    x = torch.randn(rows, width, device="cuda", dtype=torch.float16)
    spent: dict[str, list[float]] = {name: [] for name in networks}
    for repeat in range(25):
        for name, network in networks.items():  # in turn, the first five not counted
            torch.cuda.synchronize()
            took = seconds(lambda network=network: (network(x), torch.cuda.synchronize()))
            spent[name] += [took] if repeat >= 5 else []
    return {
        "case": f"2:4, two Linear layers of {width} x {width}, batch {rows}, {torch.cuda.get_device_name()}",
        "ours_s": statistics.median(spent["ours"]),
        "peer": "dense in half precision",
        "peer_s": statistics.median(spent["peer"]),
        "target": "at least 1",
    }


def run(quick: bool = False) -> list[dict[str, Any]]:
    rows = [graph_row(quick), ghost_row(quick), two_four_row(quick)]
    cases = [("vgg16_bn quarter width", networks.build("vgg16_bn", 10, width=0.25, seed=0), 32, 8)]
    if not quick:
        cases.append(("resnet18 quarter width", networks.build("resnet18", 10, width=0.25, seed=0), 32, 8))
        cases.append(("resnet50", torchvision.models.resnet50(weights=None), 64, 16))
    for name, model, size, round_to in cases:
        rows += latency_rows(name, model.eval(), size, round_to, 3 if quick else 9)
    return [{"ratio": row["peer_s"] / row["ours_s"], **row} for row in rows]
