"""The operations of the model, imported as ``megat2i.kernels``; ``choose_ops`` picks implementations."""

from megat2i.kernels import interpreter
from megat2i.kernels.linear_cross_entropy import linear_cross_entropy
from megat2i.kernels.ops import Ops, choose_ops, describe
from megat2i.kernels.outputs import GradientBound, LiveTokens, TokenLosses, gradient_bound

if interpreter.interpreting():
    interpreter.install()

__all__ = [
    "GradientBound",
    "LiveTokens",
    "Ops",
    "TokenLosses",
    "choose_ops",
    "describe",
    "gradient_bound",
    "linear_cross_entropy",
]
