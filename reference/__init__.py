"""The paper's Dual Cross-Attention in plain PyTorch: the oracle and the baseline."""

from reference.dca import DCA

__all__ = ["DCA"]
