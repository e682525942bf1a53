"""Ghost Connect-Net and its peers: pruning neural networks so that they hold under distribution shift."""

__version__ = "0.1.0"

from gcnet.connectivity import connectivity
from gcnet.cost import macs
from gcnet.dynamic import Gated, dynamic_macs, estimate_flops, gate, mask_targets, measure
from gcnet.evaluation import evaluate
from gcnet.ghost import build_ghost
from gcnet.graph import layer_graph
from gcnet.hybrid import GhostPruning, ghost_prune
from gcnet.pruning import Masks, apply_masks, prune, sparsity
from gcnet.shifts import corrupt
from gcnet.skipping import DynamicInference
from gcnet.study import Study

__all__ = [
    "DynamicInference",
    "Gated",
    "GhostPruning",
    "Masks",
    "Study",
    "apply_masks",
    "build_ghost",
    "connectivity",
    "corrupt",
    "dynamic_macs",
    "estimate_flops",
    "evaluate",
    "gate",
    "ghost_prune",
    "layer_graph",
    "macs",
    "mask_targets",
    "measure",
    "prune",
    "sparsity",
]
