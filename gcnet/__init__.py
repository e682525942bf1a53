"""Ghost Connect-Net and its peers: pruning neural networks so that they hold under distribution shift."""

__version__ = "0.1.0"

from gcnet.cka import CKASparsityRegularizer, linear_cka, minibatch_cka
from gcnet.connectivity import connectivity
from gcnet.cost import macs
from gcnet.evaluation import evaluate
from gcnet.ghost import build_ghost
from gcnet.graph import layer_graph
from gcnet.hybrid import GhostPruning, ghost_prune
from gcnet.pruning import Masks, apply_masks, prune, sparsity
from gcnet.shifts import corrupt
from gcnet.sparse_training import magnitude_rewinding, sparse_train
from gcnet.study import Study

__all__ = [
    "CKASparsityRegularizer",
    "GhostPruning",
    "Masks",
    "Study",
    "apply_masks",
    "build_ghost",
    "connectivity",
    "corrupt",
    "evaluate",
    "ghost_prune",
    "layer_graph",
    "linear_cka",
    "macs",
    "magnitude_rewinding",
    "minibatch_cka",
    "prune",
    "sparse_train",
    "sparsity",
]
