"""Ghost Connect-Net and its peers: pruning neural networks so that they hold under distribution shift."""

__version__ = "0.1.0"

from gcnet.connectivity import connectivity
from gcnet.cost import latency, macs
from gcnet.evaluation import evaluate
from gcnet.ghost import build_ghost
from gcnet.graph import layer_graph
from gcnet.hybrid import GhostPruning, ghost_prune
from gcnet.interop import from_parametrize, from_torch_prune, to_parametrize, to_torch_prune
from gcnet.pruning import Masks, apply_masks, prune, sparsity
from gcnet.shifts import corrupt
from gcnet.structured import (
    GhostImportance,
    StructuredPruning,
    export,
    filter_scores,
    load_structured,
    structured_prune,
)
from gcnet.study import Study

__all__ = [
    "GhostImportance",
    "GhostPruning",
    "Masks",
    "StructuredPruning",
    "Study",
    "apply_masks",
    "build_ghost",
    "connectivity",
    "corrupt",
    "evaluate",
    "export",
    "filter_scores",
    "from_parametrize",
    "from_torch_prune",
    "ghost_prune",
    "latency",
    "layer_graph",
    "load_structured",
    "macs",
    "prune",
    "sparsity",
    "structured_prune",
    "to_parametrize",
    "to_torch_prune",
]
