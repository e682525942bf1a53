"""Ghost Connect-Net and its peers: pruning neural networks so that they hold under distribution shift."""

__version__ = "0.1.0"
