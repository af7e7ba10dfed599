"""Registers functions as PyTorch custom ops.

``torch.library.custom_op`` does the same, but its wrapper imports torch._dynamo at the first call: 1.5 s and 140 MB in
every process, compiled or not.
"""

from collections.abc import Callable

import torch


def custom_op(name: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorator: the function, which changes none of its arguments, becomes the op megat2i::``name`` on every device.

    The annotations are its schema. ``torch.library.register_fake`` and ``register_autograd`` complete it.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        qualified = f"megat2i::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(qualified, "default")(function)
        return getattr(torch.ops.megat2i, name).default

    return register
