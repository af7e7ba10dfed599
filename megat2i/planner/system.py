"""How a training system computes: what its kernels read and write, and what it sends. Ours, and those we compare with.

Elementwise kernels cost the bytes they move. A "pass" is one reading or one writing of a bfloat16 tensor: of width
``hidden`` for norms and residuals (cut along tokens by sequence parallelism), of width ``hidden`` inside attention and
``ffn`` inside the feed-forward (both cut by tensor parallelism). The passes of ours are counted on the code in
model/layers.py and kernels/, whose block makes one pass for each group of operations.
"""

from dataclasses import dataclass

from megat2i.config import ModelConfig
from megat2i.model import cost
from megat2i.planner.layout import qk_norm_apart

CHUNK_ROWS = 3840  # tokens at a time, at most: that of kernels/linear_cross_entropy/triton_head.py, which needs Triton


@dataclass(frozen=True)
class Passes:
    """Passes of one layer over tensors of each kind."""

    hidden: float
    attention: float
    ffn: float

    def bytes(self, shape: ModelConfig, tensor: int, sequence: bool) -> float:
        """Bytes for one token on one of ``tensor`` ranks."""
        outer = self.hidden * shape.hidden / (tensor if sequence else 1)
        inner = self.attention * cost.attention_width(shape) + self.ffn * shape.ffn_hidden
        return 2 * (outer + inner / tensor)


@dataclass(frozen=True)
class Head:
    """The loss head: three matrix products, and bytes that elementwise kernels move for each logit, each number of the
    tokens' states, and each of the table's gradient, once and for every chunk of ``chunk`` tokens (None: one chunk)."""

    logit_bytes: float
    state_bytes: float = 0
    table_bytes: float = 0
    chunk_bytes: float = 0
    chunk: int | None = None


@dataclass(frozen=True)
class System:
    """``scores``: bytes moved for each attention score (0: fused attention that keeps none), forward and backward;
    ``flash``: speed of fused attention, FlashAttention-2 = 1.
    ``hidden_reductions``: whether the backward pass reduces gradients over tensor-parallel ranks beside the products
    of the weights' gradients. ``gradient``, ``weights``: bytes for each parameter of the two data-parallel transfers of
    a step, an all-reduce and an all-gather; ``overlap``: whether they run under the backward pass."""

    forward: Passes
    backward: Passes
    scores: tuple[float, float]
    flash: float
    head: Head
    hidden_reductions: bool
    gradient: float
    weights: float
    overlap: bool
    accumulate: float  # bytes moved for each parameter to add one micro-batch's gradient to the sum
    update: float  # bytes moved for each parameter by the optimizer step, on the rank that owns it


def ours(shape: ModelConfig, tensor: int) -> System:
    """This repository on GPUs, ``tensor`` of them to a layer: DeepSpeed's ZeRO-1, flash attention, Triton kernels."""
    forward, backward = _attention_passes(shape, tensor)
    # SwiGLU, and backward the gradients of gate and up joined; GELU
    ffn = (3, 5 + 4) if shape.feed_forward == "swiglu" else (2, 3)
    # Exponentials come from a product's epilogue. States: gathered (4), masked (4), the target's logit (2), scaled for
    # the table's gradient (4); their gradients summed in float32 over two ranges (10), scaled (6), cleared (2), put in
    # place (4) and scaled (4). The table's is cleared and scaled, and each chunk's product reads and writes it.
    head = Head(logit_bytes=0, state_bytes=40, table_bytes=4 + 6, chunk_bytes=6, chunk=CHUNK_ROWS)
    return System(
        # norm, norm of a sum, sum; backward likewise, the norm of the sum adding the residual's gradient on its way
        Passes(hidden=2 + 4 + 3, attention=forward, ffn=ffn[0]),
        Passes(hidden=3 + 4 + 3, attention=backward, ffn=ffn[1]),
        scores=(0, 0), flash=1, head=head, hidden_reductions=True,
        gradient=4, weights=2, overlap=False, accumulate=10, update=34,
    )  # fmt: skip


def _attention_passes(shape: ModelConfig, tensor: int) -> tuple[float, float]:
    """Passes forward and backward between attention's projections and its scores."""
    keys = shape.key_value_heads / shape.heads
    both = 1 + keys  # queries and keys
    # norm, split into heads and rotary positions of each in one pass; gradients joined with the values'
    forward, backward = 2 * both, 2 * both + 2 * (both + keys)
    if keys < 1:  # repeated for all the queries that they serve; gradients summed, those of values put in tokens' order
        forward, backward = forward + 4, backward + 2 * (both + keys)
    if shape.positions == "rotary_interleaved":  # copied into the order of the op
        forward, backward = forward + 2 * both, backward + 2 * both
    if not shape.qk_norm:
        return forward, backward
    if not qk_norm_apart(shape, tensor):
        return forward, backward + both
    if shape.qk_norm_per_head:
        return forward + 2 * both, backward + 3 * both
    return forward + 34 * both, backward + 78 * both  # PyTorch's operations in float32, which count double
