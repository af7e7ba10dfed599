"""The plain PyTorch twin of every op: the specification, and the oracle of the tests. Read this first.

Shapes: N tokens, D hidden width, V rows of the vocabulary table, B batch, H heads, S sequence, W head width.
Every function works in any floating dtype (float64 in tests) and materialises whatever it likes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megat2i.kernels.outputs import TokenLosses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ranges: tuple[tuple[int, int], ...],
    mode: str = "exact",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
) -> TokenLosses:
    """Cross-entropy of ``hidden @ weight.T`` over the columns in ``ranges``; see ``linear_cross_entropy``.

    Mode "certified" leaves nothing out here: its gradients are the exact ones.
    """
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    column_range = torch.full((weight.shape[0],), -1, device=weight.device)
    for number, (start, end) in enumerate(ranges):
        column_range[start:end] = number
    logits = logits.masked_fill(column_range < 0, float("-inf"))

    live = targets != ignore_index
    in_table = live & (targets >= 0) & (targets < weight.shape[0])
    safe_targets = torch.where(in_table, targets, ranges[0][0])
    known = in_table & (column_range[safe_targets] >= 0)
    own_range = column_range[None, :] == column_range[safe_targets][:, None]  # [N, V]
    if mode == "masked":
        logits = logits.masked_fill(~own_range, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    nll = lse - logits.gather(1, safe_targets[:, None]).squeeze(1)
    nll = torch.where(known | ~live, nll, torch.nan)
    off_range_mass = (logits - lse[:, None]).exp().masked_fill(own_range, 0.0).sum(dim=-1)
    loss = nll + z_loss * lse.square()
    if token_weight is not None:
        loss = loss * token_weight
    zero = torch.zeros_like(nll)
    return TokenLosses(
        loss=torch.where(live, loss, zero),
        nll=torch.where(live, nll, zero).detach(),
        lse=torch.where(live, lse, zero).detach(),
        correct=torch.where(live, (nll <= lse - logits.amax(dim=-1)).to(nll.dtype), zero).detach(),
        off_range_mass=torch.where(live, off_range_mass, zero).detach(),
        skipped=zero.detach(),
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension; statistics in float32 or better, result in the dtype of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; statistics in float32 or better, result in the dtype of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions in the half-split layout (Su et al. 2021; GPT-NeoX's order of dimensions).

    x [B, H, S, W]; cosine and sine [S, W/2] or [B, 1, S, W/2] in float32 or better. Result in the dtype of ``x``.
    """
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of x + residual, x + residual)."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm, split into heads and rotary positions of q and k [B, S, H * W]; see ``qk_norm_rope.py``."""
    results = []
    for x, weight, bias, count in ((q, q_weight, q_bias, heads), (k, k_weight, k_bias, kv_heads or heads)):
        if weight is not None:
            parts = x.unflatten(-1, (-1, weight.shape[0]))
            x = (layer_norm(parts, weight, bias, eps) if centred else rms_norm(parts, weight, eps)).flatten(-2)
        x = x.unflatten(-1, (count, -1)).transpose(1, 2)
        results.append(x if cosine is None else rotary(x, cosine, sine))
    return tuple(results)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return F.silu(gate) * up


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, q, k, v [B, H, S, W] -> [B, H, S, W]; causal unless ``mask`` (True: may look) is given."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, position: Tensor) -> Tensor:
    """Attention of one query a row over a cache whose positions ``first`` [B] .. ``position`` [1] are the row's own.

    q [B, H, 1, W], keys and values [B, K, L, W], each serving H / K consecutive query heads -> [B, H, 1, W]. A row that
    has not begun (``first`` beyond ``position``) looks at ``position`` alone.
    """
    at = torch.arange(keys.shape[2], device=keys.device)
    seen = (at >= torch.minimum(first, position)[:, None]) & (at <= position)  # [B, L]
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (keys, values))
    return attention(q, keys, values, seen[:, None, None])
