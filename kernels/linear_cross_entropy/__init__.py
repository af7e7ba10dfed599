"""The loss head: output projection and cross-entropy in one op that holds a chunk of the [N, V] logits at most.

Design. One matrix product is u = 2 N D V operations; the head needs 3 u (logits, gradient to hidden, gradient to
weight). Two designs were weighed for N = 36,864, D = 2,048, V = 66,816 in bfloat16 (1 u = 10.1 TFLOP: 39 ms at 260
TFLOP/s, what cuBLAS may reach on an A100, 12.8 ms at 790, an H200's):

- Recompute (Apple's CCE): keep two numbers a token, make every tile of logits again inside the gradient kernels. 4 u,
  1.7 GB of memory traffic (inputs and outputs alone), no buffer. At best 75 % of the rate of three products.
- Single-offset scaled exponentials (this one): the epilogue of the logits' product stores E = exp(logits - offset) in
  bfloat16, whose exponents are float32's, so one offset a row serves and no maximum is needed first. The normaliser and
  the token's weight are then factors f = weight * (1 + slope) * exp(offset - lse) of rows, which commute with products:
      gradient to hidden = diag(f) (E W),  gradient to weight = E^T (diag(f) X),
  with E's entry of the target replaced by that of the gradient, made in float32 where it is 1 - p. 3 u, both gradient
  products by cuBLAS without a pass over [N, V] of their own; E is written once and read twice inside products (14.8 GB
  of traffic, 7.4 ms at 2 TB/s, behind 117 ms of arithmetic), and costs a buffer of 3,840 rows, 0.51 GB.

The second wins wherever matrix products are the limit, as here. Only skipping work beats it: ``mode="certified"``
leaves out blocks of both gradient products, so with 97 % image targets and separated modalities 1 u + 2 * 0.27 u.

Errors against float64: of a loss 1e-5 nats where the logits are below 8, beyond that 1.25e-6 of the largest logit (they
are float32 sums); of both gradients, as relative 2-norms, 1e-5 in float32 and 3e-3 in bfloat16, at any peakedness.
Memory beyond inputs, the gradient to hidden and one float32 gradient to weight: 0.56 GB at N = 36,864. The latter is
made in the forward pass and handed to autograd in the weight's dtype; an optimizer's own sum is not written directly.

Making gradients needs the upstream gradient: see ``op.py`` for how the forward pass can make them all the same.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megat2i.kernels import reference
from megat2i.kernels.interpreter import interpreting
from megat2i.kernels.linear_cross_entropy.chunked import CHUNK_ELEMENTS
from megat2i.kernels.linear_cross_entropy.op import linear_cross_entropy_op
from megat2i.kernels.outputs import LiveTokens, TokenLosses

__all__ = ["CHUNK_ELEMENTS", "default_implementation", "linear_cross_entropy"]

IMPLEMENTATIONS = ("reference", "chunked", "triton")
MODES = ("exact", "certified", "masked")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ranges: tuple[tuple[int, int], ...],
    blocks: tuple[tuple[int, int], ...] | None = None,
    mode: str = "exact",
    delta: float = 1e-3,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    group: ProcessGroup | None = None,
    implementation: str | None = None,
    live: LiveTokens | None = None,
) -> TokenLosses:
    """Cross-entropy over the combined vocabulary, per token.

    hidden [N, D] and weight [V, D] of one floating dtype; targets [N] int64 unified ids, ``ignore_index`` where a token
    takes no part; ranges: the (start, end) id ranges of the modalities, ascending and disjoint, the only columns that
    receive probability; token_weight [N] float32 multiplies the loss of each token (it gets no gradient).
    Raises ValueError for shapes that do not fit together; a target outside ``ranges`` gives a NaN loss for its token.

    With a ``group`` of t > 1 ranks the vocabulary is sharded: rank r's ``weight`` [V / t, D] holds the r-th of t equal
    parts of each of ``blocks`` (start, end), in the order of ``blocks``. ``hidden`` and ``targets`` are the same on all
    ranks, and so are the results and the gradient of ``hidden``. One all-gather of 16 bytes a token (for two ranges).

    ``mode``: "exact"; "certified": results and loss are exact, and tiles of 128 rows whose every token gives at most
    ``delta`` of its probability to another modality have that modality's columns left out of both gradient products
    (``gradient_bound`` says how much that can change); "masked": softmax over the target's own range alone, a different
    objective and model, which must then be sampled with the same mask.

    ``live``: the tokens with a target, if the data loader knows them; on a GPU all N rows are computed without it.
    ``implementation`` forces "reference", "chunked" or "triton" (default: ``default_implementation``).
    """
    if mode not in MODES:
        raise ValueError(f"mode '{mode}' is not one of {', '.join(MODES)}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation '{implementation}' is not one of {', '.join(IMPLEMENTATIONS)}")
    sharded = group is not None and group.size() > 1
    rows = weight.shape[0] * (group.size() if sharded else 1)
    blocks = blocks or ((0, rows),)
    _check(hidden, weight, targets, ranges, rows, token_weight)
    if sum(end - start for start, end in blocks) != rows:
        raise ValueError(f"blocks {blocks} must cover the {rows} rows of the vocabulary")
    implementation = implementation or default_implementation(hidden.device, hidden.dtype)
    if implementation == "reference":
        if sharded:
            raise ValueError("the reference implementation knows no sharded vocabulary; use implementation='chunked'")
        return reference.linear_cross_entropy(
            hidden, weight, targets, ranges=ranges, mode=mode, ignore_index=ignore_index, z_loss=z_loss,
            token_weight=token_weight,
        )  # fmt: skip
    gradients = torch.is_grad_enabled()
    loss, others, _, _ = linear_cross_entropy_op(
        hidden, weight, targets, token_weight, None if live is None else live.order,
        [bound for pair in ranges for bound in pair], [bound for pair in blocks for bound in pair], mode, delta,
        ignore_index, z_loss, group.group_name if sharded else "", implementation,
        gradients and hidden.requires_grad, gradients and weight.requires_grad,
    )  # fmt: skip
    return TokenLosses(loss, *others.unbind())


def default_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Triton on CUDA for bfloat16 and wherever it is interpreted; PyTorch in chunks on CPUs and for other dtypes.

    In float32 PyTorch's products are as exact and the time goes there: nothing to win.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        return "triton"
    if interpreting() and dtype in (torch.bfloat16, torch.float32):
        return "triton"
    return "chunked"


def _check(hidden, weight, targets, ranges, rows, token_weight) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: they must have one dtype")
    for name, tensor in (("targets", targets), ("token_weight", token_weight)):
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [N] = [{hidden.shape[0]}]")
    bounds = [bound for pair in ranges for bound in pair]
    empty = not bounds or any(start >= end for start, end in ranges)
    if empty or bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > rows:
        raise ValueError(f"ranges {ranges} must be ascending, disjoint, not empty and within the {rows} rows of weight")
