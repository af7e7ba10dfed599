"""Outputs with guards around them: what a kernel leaves unwritten stays NaN, what it writes beside them shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GUARD = 1 << 16  # bytes on either side: more than a tile of any kernel
NAN = 0xFF  # every byte: NaN in bfloat16, float16, float32 and float64


@contextmanager
def guarded() -> Iterator[None]:
    """Within, memory that PyTorch's ``empty`` and ``zeros`` functions give out stands between guards.

    Raises AssertionError at the end where one was written to.
    """
    buffers: list[tuple[Tensor, int]] = []

    def between_guards(shape, dtype, device, zeros: bool) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = original["full"]((2 * GUARD + size,), NAN, dtype=torch.uint8, device=device)
        inside = buffer[GUARD : GUARD + size]
        buffers.append((buffer, size))
        return (inside.zero_() if zeros else inside).view(dtype).view(shape)

    def function(zeros: bool):
        def make(*shape, dtype=torch.float32, device="cpu"):
            one = len(shape) == 1 and not isinstance(shape[0], int)
            return between_guards(shape[0] if one else shape, dtype, device, zeros)

        return make

    def like(x: Tensor, dtype=None, memory_format=None) -> Tensor:
        return between_guards(x.shape, dtype or x.dtype, x.device, False)

    def new(zeros: bool):
        return lambda x, shape, dtype=None, device=None: between_guards(
            (shape,) if isinstance(shape, int) else tuple(shape), dtype or x.dtype, device or x.device, zeros
        )

    replaced = {
        (torch, "empty"): function(False),
        (torch, "zeros"): function(True),
        (torch, "empty_like"): like,
        (Tensor, "new_empty"): new(False),
        (Tensor, "new_zeros"): new(True),
    }
    original = {name: getattr(owner, name) for owner, name in replaced} | {"full": torch.full}
    for (owner, name), function_ in replaced.items():
        setattr(owner, name, function_)
    try:
        yield
    finally:
        for owner, name in replaced:
            setattr(owner, name, original[name])
    assert buffers, "nothing was allocated"
    for buffer, size in buffers:
        beside = torch.cat((buffer[:GUARD], buffer[GUARD + size :]))
        written = (beside != NAN).nonzero()[:, 0]
        assert not len(written), f"{len(written)} bytes beside an output of {size} bytes, from {written[0] - GUARD} on"
