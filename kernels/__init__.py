"""The operations of the model, imported as ``megat2i.kernels``; ``choose_ops`` picks implementations."""

from megat2i.kernels.linear_cross_entropy import linear_cross_entropy
from megat2i.kernels.ops import Ops, choose_ops
from megat2i.kernels.outputs import TokenLosses

__all__ = ["Ops", "TokenLosses", "choose_ops", "linear_cross_entropy"]
