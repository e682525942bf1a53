"""Which classification networks of torchvision (and some of timm) work: one row a network; nothing is downloaded."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision import models

import gcnet

TIMM = ("resnet26", "efficientnet_lite0", "mobilenetv3_small_100", "ghostnet_100", "rexnet_100", "convnext_atto",
        "regnetx_002", "densenet121", "res2net50_26w_4s", "dla34", "mobilenetv4_conv_small", "hardcorenas_a",
        "selecsls42", "vovnet39a", "skresnet18", "ecaresnet26t")  # fmt: skip
LARGEST = 1.5e8  # parameters: every family has a smaller member


def candidates(quick: bool) -> Iterator[tuple[str, str, int]]:
    """(library, name, size of the images)."""
    names = models.list_models(module=torchvision.models)
    for name in ("resnet18", "squeezenet1_1") if quick else names:
        yield "torchvision", name, {"alexnet": 63, "inception_v3": 75, "maxvit_t": 64, "vit_h_14": 28}.get(name, 32)
    for name in () if quick else TIMM:
        yield "timm", name, 64


def build(library: str, name: str, size: int) -> nn.Module:
    """With two classes, so that eight images hold all of them."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False, num_classes=2)
    if name == "maxvit_t":  # its own builder insists on 224 px
        return models.MaxVit((64, 64), 64, 2, [64, 128, 256, 512], [2, 2, 5, 2], 32, 0.2, num_classes=2)
    extra = {"image_size": size} if name.startswith("vit") else {}
    extra |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=2, **extra)


def row(library: str, name: str, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"library": library, "network": name}
    try:
        model = build(library, name, size).eval()
    except ImportError as error:
        return {**found, "masks": f"not tried: {error}"}
    size_of = sum(parameter.numel() for parameter in model.parameters())
    if size_of > LARGEST:
        return {**found, "masks": f"not tried: {size_of / 1e6:.0f} million parameters"}
    images, labels = torch.randn(8, 3, size, size), torch.arange(8) % 2
    started = time.perf_counter()
    try:
        graph = gcnet.layer_graph(model, images)
        found |= {
            "layers": len(graph.layers),
            "graph_s": time.perf_counter() - started,
            "direct": sum(not parents for parents in graph.parents.values()),
        }
        pruning = gcnet.ghost_prune(model, [(images, labels)], pruner="l1", sparsity=0.5, hybrid="Full", graph=graph)
        found["masks"] = "yes" if abs(gcnet.sparsity(pruning.masks) - 0.5) < 1e-3 else "wrong sparsity"
    except Exception as error:  # the table says why, whatever it is
        return {**found, "masks": f"no: {str(error)[:200]}"}
    try:
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that eight images are few
            blocks = gcnet.snacs_prune(model, [(images, labels)], delta=0.5, graph=graph)
        found |= {"snacs": "yes" if 0 < blocks.report["sparsity"] <= 0.6 else "no: nothing or too much was pruned"}
        found |= {"snacs_s": time.perf_counter() - started}
    except Exception as error:
        found["snacs"] = f"no: {str(error)[:200]}"
    try:
        cut = gcnet.structured_prune(model, [(images, labels)], macs=0.5, hybrid="direct", graph=graph)
        share = cut.report["macs"] / cut.report["macs_dense"]
        found |= {"structured": "yes", "macs_left": share, "layers_kept_whole": len(cut.report["frozen"])}
    except Exception as error:
        found["structured"] = f"no: {str(error)[:200]}"
    return found


def run(quick: bool = False) -> list[dict[str, Any]]:
    rows = []
    for library, name, size in candidates(quick):
        rows.append(row(library, name, size))
        print(rows[-1], flush=True)
    return rows
