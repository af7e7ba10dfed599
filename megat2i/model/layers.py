"""The layers of open_lm's decoder block: norm, attention with optional qk-norm and rotary positions, SwiGLU.

Parameters carry open_lm's names and shapes, so its checkpoints load without a map. Layers receive plain callables
(``Ops``) and numbers, never a configuration. Shape suffixes: B batch, S sequence, D hidden, H heads, W head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megat2i.kernels import Ops

INIT_CUT = 3.0  # open_lm cuts its normal initialisation at 3 standard deviations


class Norm(nn.Module):
    """LayerNorm (with bias or gain only) or RMSNorm over the last dimension, with a gain."""

    def __init__(self, width: int, kind: str, eps: float, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer_norm" else None
        self.kind, self.eps, self.ops = kind, eps, ops

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms_norm":
            return self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class LayerCache:
    """Keys and values of one layer for the positions already written: static storage [B, H, length, W] each."""

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.keys = torch.zeros(batch, heads, length, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, S, W] at ``start`` and return all positions up to its end."""
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]


@dataclass(frozen=True)
class Positions:
    """What attention needs to know about where the tokens stand; made once a forward pass.

    ``cosine`` and ``sine`` [S, W/2] or [B, 1, S, W/2] (None without rotary positions); ``mask`` [B, 1, S, keys],
    True where a query may look (None: causal); ``start``: position in the cache of the first token.
    """

    cosine: Tensor | None = None
    sine: Tensor | None = None
    mask: Tensor | None = None
    start: int = 0


class Attention(nn.Module):
    """Multi-head causal self-attention. in_proj's rows are [Q; K; V], each head-major."""

    def __init__(self, hidden: int, heads: int, qk_norm: bool, norm: str, eps: float, ops: Ops):
        super().__init__()
        self.heads, self.head_dim, self.ops = heads, hidden // heads, ops
        self.in_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        # open_lm normalises the whole vector of all heads, before it is split
        self.q_norm = Norm(hidden, norm, eps, ops) if qk_norm else None
        self.k_norm = Norm(hidden, norm, eps, ops) if qk_norm else None

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.in_proj(x).split(hidden, dim=-1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(batch, length, self.heads, self.head_dim).transpose(1, 2) for t in (q, k, v))  # [B, H, S, W]
        if positions.cosine is not None:
            q = self.ops.rotary(q, positions.cosine, positions.sine)
            k = self.ops.rotary(k, positions.cosine, positions.sine)
        if cache is not None:
            k, v = cache.append(positions.start, k, v)
        out = self.ops.attention(q, k, v, positions.mask)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, hidden))


class FeedForward(nn.Module):
    """SwiGLU. w12's rows are [gate; up]."""

    def __init__(self, hidden: int, ffn: int, ops: Ops):
        super().__init__()
        self.w12 = nn.Linear(hidden, 2 * ffn, bias=False)
        self.w3 = nn.Linear(ffn, hidden, bias=False)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.ops.swiglu(gate, up))


class Block(nn.Module):
    """Pre-norm decoder block with sequential residuals."""

    def __init__(self, hidden: int, heads: int, ffn: int, norm: str, eps: float, qk_norm: bool, ops: Ops):
        super().__init__()
        self.attention_norm = Norm(hidden, norm, eps, ops)
        self.attention = Attention(hidden, heads, qk_norm, norm, eps, ops)
        self.ffn_norm = Norm(hidden, norm, eps, ops)
        self.feed_forward = FeedForward(hidden, ffn, ops)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, cache)
        return x + self.feed_forward(self.ffn_norm(x))
