"""The layers of open_lm's decoder block: norm, attention with optional qk-norm and rotary positions, SwiGLU.

Parameters carry open_lm's names and shapes, so its checkpoints load without a map. Layers receive plain callables
(``Ops``), numbers and the ranks that share them, never a configuration. Between the layers stand tokens [N, D], N = B x
S of them (with sequence parallelism this rank's N / t). Shape suffixes: B batch, S sequence, D hidden, H heads of this
rank, W head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megat2i.kernels import Ops
from megat2i.parallel.collectives import TensorParallel, gather_statistics, shared_parameter
from megat2i.parallel.layers import ColumnParallelLinear, RowParallelLinear, WeightGradients
from megat2i.parallel.shard import Shard

INIT_CUT = 3.0  # open_lm cuts its normal initialisation at 3 standard deviations


@dataclass(frozen=True)
class BlockShape:
    """What a block is made of. ``norm``: layer_norm | layer_norm_gain_only | rms_norm."""

    hidden: int
    heads: int
    ffn: int
    norm: str
    eps: float
    qk_norm: bool


class Norm(nn.Module):
    """LayerNorm (with bias or gain only) or RMSNorm over the last dimension, with a gain; the same on all ranks."""

    def __init__(self, width: int, kind: str, eps: float, ops: Ops, parallel: TensorParallel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer_norm" else None
        self.kind, self.eps, self.ops, self.parallel = kind, eps, ops, parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms_norm":
            return self.ops.rms_norm(x, *self._gain())
        return self.ops.layer_norm(x, *self._gain())

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), in one pass over memory where the op can."""
        if self.kind == "rms_norm":
            return self.ops.add_rms_norm(x, residual, *self._gain())
        return self.ops.add_layer_norm(x, residual, *self._gain())

    def _gain(self) -> tuple:
        """What the op takes after its inputs: gain, bias unless it has none by kind, epsilon."""
        weight = shared_parameter(self.weight, self.parallel)
        if self.kind == "rms_norm":
            return weight, self.eps
        return weight, None if self.bias is None else shared_parameter(self.bias, self.parallel), self.eps


class HeadsNorm(nn.Module):
    """The norm of a query or key vector over all heads together, of which this rank holds its part.

    open_lm normalises before the heads are split, so the statistics are of all ranks' heads.
    """

    def __init__(self, width: int, kind: str, eps: float, ops: Ops, parallel: TensorParallel):
        super().__init__()
        self.shard = Shard((width,), 0, (parallel.share(width),))
        self.weight = nn.Parameter(torch.empty(self.shard.local_shape))
        self.bias = nn.Parameter(torch.empty(self.shard.local_shape)) if kind == "layer_norm" else None
        self.kind, self.eps, self.ops, self.parallel = kind, eps, ops, parallel

    def forward(self, x: Tensor) -> Tensor:
        """Norm of [N, width / t] where several ranks have a part; alone, attention's own op norms in its pass."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(dim=-1, keepdim=True) if self.kind != "rms_norm" else torch.zeros_like(wide[..., :1])
        spread = (wide - mean).square().mean(dim=-1, keepdim=True)
        means, spreads = gather_statistics(torch.cat((mean, spread), dim=-1), self.parallel).split(1, dim=-1)
        centre = means.mean(dim=0)
        # parts of equal size: the variance of all is the mean of the parts' variances about the common centre
        variance = (spreads + (means - centre).square()).mean(dim=0)
        normed = (wide - centre) * torch.rsqrt(variance + self.eps) * self.weight
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)


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

    ``batch``: rows B that the N tokens are. ``cosine`` and ``sine`` [S, W/2] or [B, 1, S, W/2] (None without rotary
    positions); ``mask`` [B, 1, S, keys], True where a query may look (None: causal); ``start``: position in the cache
    of the first token.
    """

    batch: int
    cosine: Tensor | None = None
    sine: Tensor | None = None
    mask: Tensor | None = None
    start: int = 0


class Attention(nn.Module):
    """Multi-head causal self-attention. in_proj's rows are [Q; K; V], each head-major; ranks share the heads."""

    def __init__(self, shape: BlockShape, ops: Ops, parallel: TensorParallel, gradients: WeightGradients):
        super().__init__()
        hidden = shape.hidden
        self.heads, self.ops = shape.heads // parallel.size, ops
        self.in_proj = ColumnParallelLinear(hidden, (hidden,) * 3, parallel, gradients)
        self.out_proj = RowParallelLinear(hidden, hidden, parallel, gradients)
        norm = (hidden, shape.norm, shape.eps, ops, parallel)
        self.q_norm = HeadsNorm(*norm) if shape.qk_norm else None
        self.k_norm = HeadsNorm(*norm) if shape.qk_norm else None

    def attend(self, qkv: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """[N, 3 x H x W] -> [N, H x W]."""
        q, k, v = qkv.unflatten(0, (positions.batch, -1)).chunk(3, dim=-1)  # [B, S, H x W]
        norms = {}
        if self.q_norm is not None and self.q_norm.parallel.size > 1:
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.q_norm is not None:
            norms = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight, "eps": self.q_norm.eps}
            norms |= {"q_bias": self.q_norm.bias, "k_bias": self.k_norm.bias}
            norms["centred"] = self.q_norm.kind != "rms_norm"
        q, k = self.ops.qk_norm_rope(q, k, positions.cosine, positions.sine, self.heads, **norms)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # q, k, v: [B, H, S, W]
        if cache is not None:
            k, v = cache.append(positions.start, k, v)
        out = self.ops.attention(q, k, v, positions.mask)
        return out.transpose(1, 2).reshape(qkv.shape[0], -1)


class FeedForward(nn.Module):
    """SwiGLU. w12's rows are [gate; up]; ranks share the columns between the two products."""

    def __init__(self, shape: BlockShape, ops: Ops, parallel: TensorParallel, gradients: WeightGradients):
        super().__init__()
        self.w12 = ColumnParallelLinear(shape.hidden, (shape.ffn,) * 2, parallel, gradients)
        self.w3 = RowParallelLinear(shape.ffn, shape.hidden, parallel, gradients)
        self.ops = ops

    def activate(self, gate_up: Tensor) -> Tensor:
        """[N, 2F] -> [N, F]."""
        return self.ops.swiglu(*gate_up.chunk(2, dim=-1))


class Block(nn.Module):
    """Pre-norm decoder block with sequential residuals.

    ``recompute``: what the backward pass computes again instead of keeping it. "selective": all that costs no matrix
    product of the layers, that is norms, rotary positions, attention and SwiGLU (Korthikanti et al. 2022, section 5);
    "full": everything but the block's input.
    """

    def __init__(
        self, shape: BlockShape, ops: Ops, parallel: TensorParallel, gradients: WeightGradients, recompute: str
    ):
        super().__init__()
        norm = (shape.hidden, shape.norm, shape.eps, ops, parallel)
        self.attention_norm = Norm(*norm)
        self.attention = Attention(shape, ops, parallel, gradients)
        self.ffn_norm = Norm(*norm)
        self.feed_forward = FeedForward(shape, ops, parallel, gradients)
        self.recompute = recompute

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._run, x, positions, None, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, positions, cache)

    def _run(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        attention, feed_forward = self.attention, self.feed_forward
        if self.recompute == "selective" and torch.is_grad_enabled():
            qkv = _recomputed(self.attention_norm, attention.in_proj, x)
            x = x + _recomputed(lambda qkv: attention.attend(qkv, positions, cache), attention.out_proj, qkv)
            gate_up = _recomputed(self.ffn_norm, feed_forward.w12, x)
            return x + _recomputed(feed_forward.activate, feed_forward.w3, gate_up)
        attended = attention.attend(attention.in_proj(self.attention_norm(x)), positions, cache)
        normed, x = self.ffn_norm.of_sum(attention.out_proj(attended), x)
        return x + feed_forward.w3(feed_forward.activate(feed_forward.w12(normed)))


def _recomputed(function: Callable[[Tensor], Tensor], linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(function(x))`` that keeps x alone: the backward pass calls ``function`` again, but never the product."""
    calls = 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return linear(function(x), computed=calls == 1)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
