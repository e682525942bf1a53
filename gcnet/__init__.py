"""Ghost Connect-Net and its peers: pruning neural networks so that they hold under distribution shift."""

__version__ = "0.1.0"

from gcnet.cka import CKASparsityRegularizer, linear_cka, minibatch_cka
from gcnet.connectivity import connectivity
from gcnet.cost import latency, macs
from gcnet.dynamic import Gated, dynamic_macs, estimate_flops, gate, mask_targets
from gcnet.evaluation import evaluate
from gcnet.ghost import build_ghost
from gcnet.graph import layer_graph
from gcnet.hybrid import GhostPruning, ghost_prune
from gcnet.interop import from_parametrize, from_torch_prune, to_parametrize, to_torch_prune
from gcnet.pruning import Masks, apply_masks, prune, sparsity
from gcnet.removal import remove_filters, silenced
from gcnet.shifts import corrupt
from gcnet.skipping import DynamicInference
from gcnet.snacs import SnacsPruning, acmi, mint_gmi, operating_limits, sensitivity, snacs_prune
from gcnet.sparse_training import magnitude_rewinding, sparse_train
from gcnet.structured import (
    GhostImportance,
    StructuredPruning,
    export,
    filter_scores,
    load_structured,
    snacs_filter_scores,
    structured_prune,
)
from gcnet.study import Study
from gcnet.two_four import to_two_four, two_four_masks

__all__ = [
    "CKASparsityRegularizer",
    "DynamicInference",
    "Gated",
    "GhostImportance",
    "GhostPruning",
    "Masks",
    "SnacsPruning",
    "StructuredPruning",
    "Study",
    "acmi",
    "apply_masks",
    "build_ghost",
    "connectivity",
    "corrupt",
    "dynamic_macs",
    "estimate_flops",
    "evaluate",
    "export",
    "filter_scores",
    "from_parametrize",
    "from_torch_prune",
    "gate",
    "ghost_prune",
    "latency",
    "layer_graph",
    "linear_cka",
    "load_structured",
    "macs",
    "magnitude_rewinding",
    "mask_targets",
    "minibatch_cka",
    "mint_gmi",
    "operating_limits",
    "prune",
    "remove_filters",
    "sensitivity",
    "silenced",
    "snacs_filter_scores",
    "snacs_prune",
    "sparse_train",
    "sparsity",
    "structured_prune",
    "to_parametrize",
    "to_torch_prune",
    "to_two_four",
    "two_four_masks",
]
