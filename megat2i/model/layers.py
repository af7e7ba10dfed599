"""The layers of the decoder block: norm, attention with optional qk-norm and rotary positions, SwiGLU or GELU.

Parameters carry open_lm's names and shapes, so its checkpoints load without a map. Layers receive plain callables
(``Ops``), numbers and the ranks that share them, never a configuration. Between the layers stand tokens [N, D], N = B x
S of them (with sequence parallelism this rank's N / t). Shape suffixes: B batch, S sequence, D hidden, H query heads
and K key and value heads of this rank, W head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megat2i.kernels import Ops
from megat2i.parallel.collectives import TensorParallel, gather_statistics, shared_parameter, summed_gradient
from megat2i.parallel.layers import ColumnParallelLinear, RowParallelLinear, WeightGradients
from megat2i.parallel.shard import Shard

INIT_CUT = 3.0  # open_lm cuts its normal initialisation at 3 standard deviations


@dataclass(frozen=True)
class BlockShape:
    """What a block is made of; the words are those of ``ModelConfig``. ``qk_norm``: None | heads | head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    feed_forward: str
    norm: str
    eps: float
    qk_norm: str | None


class Norm(nn.Module):
    """LayerNorm (with bias, gain only, or neither) or RMSNorm over the last dimension; the same on all ranks."""

    def __init__(self, width: int, kind: str, eps: float, ops: Ops, parallel: TensorParallel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if kind != "layer_norm_no_gain" else None
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer_norm" else None
        self.kind, self.eps, self.ops, self.parallel = kind, eps, ops, parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms_norm":
            return self.ops.rms_norm(x, *self._gain(x))
        return self.ops.layer_norm(x, *self._gain(x))

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), in one pass over memory where the op can."""
        if self.kind == "rms_norm":
            return self.ops.add_rms_norm(x, residual, *self._gain(x))
        return self.ops.add_layer_norm(x, residual, *self._gain(x))

    def _gain(self, x: Tensor) -> tuple:
        """What the op takes after its inputs: gain, bias unless it has none by kind, epsilon."""
        if self.weight is None:
            return x.new_ones(x.shape[-1]), None, self.eps
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
        self.weight = nn.Parameter(torch.empty(self.shard.local_shape)) if kind != "layer_norm_no_gain" else None
        self.bias = nn.Parameter(torch.empty(self.shard.local_shape)) if kind == "layer_norm" else None
        self.kind, self.eps, self.parallel = kind, eps, parallel
        self.by_op = parallel.size == 1 and self.weight is not None

    def gain(self) -> tuple[Tensor, Tensor | None]:
        """Gain and bias for attention's own op, which norms in its pass (where ``by_op``)."""
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Norm of [..., width / t] where the op cannot, as it knows this rank's part alone."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(dim=-1, keepdim=True) if self.kind != "rms_norm" else torch.zeros_like(wide[..., :1])
        spread = (wide - mean).square().mean(dim=-1, keepdim=True)
        means, spreads = gather_statistics(torch.cat((mean, spread), dim=-1), self.parallel).split(1, dim=-1)
        centre = means.mean(dim=0)
        # parts of equal size: the variance of all is the mean of the parts' variances about the common centre
        variance = (spreads + (means - centre).square()).mean(dim=0)
        normed = (wide - centre) * torch.rsqrt(variance + self.eps)
        normed = normed if self.weight is None else normed * self.weight
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)


class HeadNorm(nn.Module):
    """The norm of each head of a query or key vector by itself (Qwen3): one gain for all heads of all ranks."""

    def __init__(self, width: int, kind: str, eps: float, ops: Ops, parallel: TensorParallel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if kind != "layer_norm_no_gain" else None
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer_norm" else None
        self.width, self.kind, self.eps, self.ops, self.parallel = width, kind, eps, ops, parallel
        self.by_op = self.weight is not None

    def gain(self) -> tuple[Tensor, Tensor | None]:
        """Gain and bias for an op on this rank's heads; the gradients of all ranks' heads are summed."""
        weight = summed_gradient(self.weight, self.parallel)
        return weight, None if self.bias is None else summed_gradient(self.bias, self.parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Norm of [..., heads x W] where attention's own op cannot."""
        heads = x.unflatten(-1, (-1, self.width))
        weight, bias = (x.new_ones(self.width), None) if self.weight is None else self.gain()
        if self.kind == "rms_norm":
            return self.ops.rms_norm(heads, weight, self.eps).flatten(-2)
        return self.ops.layer_norm(heads, weight, bias, self.eps).flatten(-2)


class LayerCache:
    """Keys and values of one layer: static storage [B, K, length, W] each, zeros where nothing was written yet."""

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.keys = torch.zeros(batch, heads, length, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def write(self, places: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put [B, K, S, W] at ``places`` [S] and return all of the storage."""
        return self.keys.index_copy_(2, places, keys), self.values.index_copy_(2, places, values)


@dataclass(frozen=True)
class Positions:
    """What attention needs to know about where the tokens stand; made once a forward pass.

    ``batch``: rows B that the N tokens are. ``cosine`` and ``sine`` [S, W/2] or [B, 1, S, W/2] (None without rotary
    positions); ``interleaved``: they turn neighbouring numbers, else those half a head apart; ``mask`` [B, 1, S, keys],
    True where a query may look (None: causal). With a cache, ``places`` [S] in it of the tokens; where ``mask`` is None
    then, the one token of each row looks from place ``first`` [B] to its own.
    """

    batch: int
    cosine: Tensor | None = None
    sine: Tensor | None = None
    mask: Tensor | None = None
    interleaved: bool = False
    places: Tensor | None = None
    first: Tensor | None = None


class Attention(nn.Module):
    """Multi-head causal self-attention. in_proj's rows are [Q; K; V], each head-major; ranks share the heads.

    With fewer heads of keys and values, each serves a group of consecutive query heads (Ainslie et al. 2023).
    """

    def __init__(self, shape: BlockShape, ops: Ops, parallel: TensorParallel, gradients: WeightGradients):
        super().__init__()
        hidden, width, kv_width = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.heads, self.kv_heads = shape.heads // parallel.size, shape.kv_heads // parallel.size
        self.head_dim, self.ops = shape.head_dim, ops
        self.in_proj = ColumnParallelLinear(hidden, (width, kv_width, kv_width), parallel, gradients)
        self.out_proj = RowParallelLinear(width, hidden, parallel, gradients)
        self.q_norm = self.k_norm = None
        if shape.qk_norm is not None:
            kind, norm = (HeadsNorm if shape.qk_norm == "heads" else HeadNorm), (shape.norm, shape.eps, ops, parallel)
            self.q_norm = kind(width if shape.qk_norm == "heads" else shape.head_dim, *norm)
            self.k_norm = kind(kv_width if shape.qk_norm == "heads" else shape.head_dim, *norm)

    def attend(self, qkv: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """[N, (H + 2 x K) x W] -> [N, H x W]."""
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = qkv.unflatten(0, (positions.batch, -1)).split(widths, dim=-1)  # [B, S, heads x W]
        norms = {}
        if self.q_norm is not None and self.q_norm.by_op and not positions.interleaved:
            (q_weight, q_bias), (k_weight, k_bias) = self.q_norm.gain(), self.k_norm.gain()
            norms = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
            norms |= {"eps": self.q_norm.eps, "centred": self.q_norm.kind != "rms_norm"}
        elif self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions.interleaved:  # into the op's order: the products of queries and keys are the same in any
            q, k = (t.unflatten(-1, (-1, self.head_dim // 2, 2)).transpose(-1, -2).flatten(-3) for t in (q, k))
        angles = (positions.cosine, positions.sine)
        q, k = self.ops.qk_norm_rope(q, k, *angles, self.heads, kv_heads=self.kv_heads, **norms)
        v = v.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # q [B, H, S, W]; k, v [B, K, S, W]
        if cache is not None:
            k, v = cache.write(positions.places, k, v)
        if cache is not None and positions.mask is None:
            out = self.ops.decode_attention(q, k, v, positions.first, positions.places)
        else:
            if self.kv_heads < self.heads:
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
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
        if shape.feed_forward == "swiglu":
            self.feed_forward = FeedForward(shape, ops, parallel, gradients)
        else:  # open_lm keeps these two on the block itself
            self._ff_w1 = ColumnParallelLinear(shape.hidden, (shape.ffn,), parallel, gradients)
            self._ff_w2 = RowParallelLinear(shape.ffn, shape.hidden, parallel, gradients)
        self.gelu, self.recompute = shape.feed_forward == "gelu", recompute

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._run, x, positions, None, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, positions, cache)

    def _run(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        attention = self.attention
        if self.gelu:
            up, activate, down = self._ff_w1, F.gelu, self._ff_w2
        else:
            up, activate, down = self.feed_forward.w12, self.feed_forward.activate, self.feed_forward.w3
        if self.recompute == "selective" and torch.is_grad_enabled():
            qkv = _recomputed(self.attention_norm, attention.in_proj, x)
            x = x + _recomputed(lambda qkv: attention.attend(qkv, positions, cache), attention.out_proj, qkv)
            return x + _recomputed(activate, down, _recomputed(self.ffn_norm, up, x))
        attended = attention.attend(attention.in_proj(self.attention_norm(x)), positions, cache)
        normed, x = self.ffn_norm.of_sum(attention.out_proj(attended), x)
        return x + down(activate(up(normed)))


def _recomputed(function: Callable[[Tensor], Tensor], linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(function(x))`` that keeps x alone: the backward pass calls ``function`` again, but never the product."""
    calls = 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return linear(function(x), computed=calls == 1)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
