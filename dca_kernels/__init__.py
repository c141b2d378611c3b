"""Fused kernels for Dual Cross-Attention (Ates et al., arXiv 2303.17696)."""

from dca_kernels.add import add_dca
from dca_kernels.backends import use_backend
from dca_kernels.module import DCA, warm_up
from dca_kernels.replace import inspect, replace_dca, restore_dca

__all__ = ["DCA", "add_dca", "inspect", "replace_dca", "restore_dca", "use_backend", "warm_up"]
__version__ = "0.1.0"
