"""How a training system computes: what its kernels read and write, and what it sends. Ours, and those we compare with.

Elementwise kernels cost the bytes they move. A "pass" is one reading or one writing of a bfloat16 tensor: of width
``hidden`` for norms and residuals (cut along tokens by sequence parallelism), of width ``hidden`` inside attention and
``ffn`` inside the feed-forward (both cut by tensor parallelism). The passes of ours are counted on the code in
model/layers.py and kernels/: eager PyTorch, one kernel for each operation.
"""

from dataclasses import dataclass

from megat2i.config import ModelConfig
from megat2i.kernels.linear_cross_entropy import CHUNK_ELEMENTS


@dataclass(frozen=True)
class Passes:
    """Passes of one layer over tensors of each kind."""

    hidden: float
    attention: float
    ffn: float

    def bytes(self, shape: ModelConfig, tensor: int, sequence: bool) -> float:
        """Bytes for one token on one of ``tensor`` ranks."""
        outer = self.hidden * shape.hidden / (tensor if sequence else 1)
        return 2 * (outer + (self.attention * shape.hidden + self.ffn * shape.ffn_hidden) / tensor)


@dataclass(frozen=True)
class Head:
    """The loss head. ``products``: matrix products of [tokens, hidden] x [hidden, columns]; ``logit_bytes``: traffic
    of one logit through elementwise kernels; ``chunk``: logits held at a time (None: all), and with it the traffic of a
    weight gradient that is added to once for every chunk."""

    products: int
    logit_bytes: float
    chunk: int | None


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


def ours(shape: ModelConfig) -> System:
    """This repository on GPUs: DeepSpeed's ZeRO-1, flash attention, the chunked loss head."""
    forward = Passes(hidden=2 * 2 + 2 * 3, attention=0, ffn=2 + 3)  # norms, residual sums; silu, product
    # norms read their input and gradient twice; residual gradients; query, key and value's gradients joined; product,
    # silu, gate and up's gradients joined
    backward = Passes(hidden=2 * 5 + 2 * 3, attention=6, ffn=6 + 3 + 4)
    if shape.qk_norm:
        forward = Passes(forward.hidden, forward.attention + 4, forward.ffn)
        backward = Passes(backward.hidden, backward.attention + 10, backward.ffn)
    if (
        shape.positions == "rotary"
    ):  # in float32, which counts double: 24 passes forward and 26 backward, of two tensors
        forward = Passes(forward.hidden, forward.attention + 48, forward.ffn)
        backward = Passes(backward.hidden, backward.attention + 52, backward.ffn)
    # logits: product, cat, to float32, largest, two log-sum-exps; again product, cat, to float32, three in place,
    # to bfloat16, two products
    head = Head(products=4, logit_bytes=32 + 46, chunk=CHUNK_ELEMENTS)
    return System(
        forward, backward, scores=(0, 0), flash=1, head=head, hidden_reductions=True,
        gradient=4, weights=2, overlap=False, accumulate=10, update=34,
    )  # fmt: skip
