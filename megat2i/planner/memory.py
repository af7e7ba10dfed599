"""Memory of every rank by part, as the torch code holds it: what autograd saves, what schedules keep in flight.

Counted on model/layers.py, parallel/layers.py, pipeline.py, kernels/ on GPUs and DeepSpeed's BF16_Optimizer.
All figures in bytes.
"""

from dataclasses import dataclass, fields, replace
from functools import cache

from megat2i.config import ModelConfig
from megat2i.model import cost
from megat2i.pipeline_order import BACKWARD, FORWARD, WEIGHTS, training_order
from megat2i.planner.hardware import Gpu
from megat2i.planner.layout import Job, Layout, qk_norm_apart, rank_stages, up_width
from megat2i.planner.speed import rank_parameters
from megat2i.planner.system import CHUNK_ROWS

REDUCE_BUCKET = 500_000_000  # elements that DeepSpeed copies together for one all-reduce
# Assumed, not measured: CUDA context, cuBLAS workspaces and NCCL's buffers for four groups; what the caching allocator
# holds and cannot use.
CONTEXT, WASTE = 1.5e9, 0.05
BF16 = 2
_orders = cache(training_order)  # one order serves many layouts


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. ``activations``: of all micro-batches in flight; ``head``: the states,
    exponentials and gradients of the loss head, or the gradients inside one layer; ``buffers``: what the optimizer step
    needs once activations are gone, where it is more than they were."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    buffers: float
    framework: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def fits(self, gpu: Gpu) -> bool:
        return self.total <= gpu.memory


def memory(job: Job, layout: Layout) -> Memory:
    """Memory of the fullest rank under DeepSpeed's ZeRO-1 in bfloat16."""
    return max((rank_memory(job, layout, rank) for rank in range(layout.pipeline)), key=lambda memory: memory.total)


def rank_memory(job: Job, layout: Layout, rank: int) -> Memory:
    """Memory of pipeline rank ``rank``."""
    parameters = rank_parameters(job, layout, rank)
    tokens, shape = layout.micro_tokens(job), job.shape
    activations, head = peak(
        job,
        layout,
        rank,
        kept=tokens * layer_bytes(shape, layout),
        deferred=tokens * deferred_bytes(shape, layout),
        layer=layer_backward_bytes(job, layout),
        head=head_bytes(job, layout),
    )
    step = min(parameters, REDUCE_BUCKET) * 4 if layout.data > 1 else 0.0
    weights, gradients, optimizer = BF16 * parameters, 4 * parameters, 12 * parameters / layout.data
    buffers = max(0.0, step - activations - head)
    framework = CONTEXT + WASTE * (weights + gradients + optimizer + activations + head + buffers)
    return Memory(weights, gradients, optimizer, activations, head, buffers, framework)


def layer_bytes(shape: ModelConfig, layout: Layout) -> float:
    """What one token of one layer keeps for the backward pass, in bfloat16.

    Norms and residuals: cut along tokens by sequence parallelism; the rest by tensor parallelism.
    """
    t, s = layout.tensor, layout.tensor if layout.sequence else 1
    if layout.recompute == "full":
        return BF16 * shape.hidden / s
    joined, up = cost.joined_width(shape) / t, up_width(shape) / t
    if layout.recompute == "selective":  # the residual before and after attention, the two wide products
        return BF16 * (2 * shape.hidden / s + joined + up)
    # inputs and outputs of both norms; query, key and value; attention's output; the two sides of SwiGLU
    widths = 4 * shape.hidden / s + joined + cost.attention_width(shape) / t + up + shape.ffn_hidden / t
    return BF16 * widths + copies_bytes(shape, t) + 4 * shape.heads / t  # attention's log-sum-exp


def copies_bytes(shape: ModelConfig, tensor: int) -> float:
    """What one token of one layer keeps of queries and keys beside their projection: ready for attention, with keys
    and values repeated where groups of queries share them; and what ops keep that cannot norm them in one pass."""
    query = cost.attention_width(shape) / tensor
    both = query * (1 + shape.key_value_heads / shape.heads)
    kept = BF16 * (3 * query if shape.key_value_heads < shape.heads else 2 * query)
    apart = qk_norm_apart(shape, tensor)
    if apart or shape.positions == "rotary_interleaved":
        kept += BF16 * both
    return kept + (3 * 4 * both if apart and not shape.qk_norm_per_head else 0)  # in plain float32


def deferred_bytes(shape: ModelConfig, layout: Layout) -> float:
    """What one token of one layer keeps between its backward pass and its weights' gradients (zero bubble): inputs and
    output gradients of the four products; the gradients of residuals are whole on every rank."""
    t, s = layout.tensor, layout.tensor if layout.sequence else 1
    inputs = 2 * shape.hidden / s + (cost.attention_width(shape) + shape.ffn_hidden) / t
    return BF16 * (inputs + (cost.joined_width(shape) + up_width(shape)) / t + 2 * shape.hidden)


def layer_backward_bytes(job: Job, layout: Layout) -> float:
    """What one layer's backward pass holds beside activations: gradients, and what it computed again."""
    tokens, t, shape = layout.micro_tokens(job), layout.tensor, job.shape
    s = t if layout.sequence else 1
    residual, up = shape.hidden * (1 / s + 2), up_width(shape) / t  # with its input and their gradient on every rank
    # gate and up's gradients apart and joined, then beside them the gradient of their weight
    gradients = BF16 * (tokens * residual + max(2 * tokens * up, tokens * up + shape.hidden * up))
    whole = replace(layout, recompute="none")
    return gradients + tokens * (layer_bytes(shape, whole) - layer_bytes(shape, layout))


def head_bytes(job: Job, layout: Layout) -> float:
    """What the loss head holds beside activations, at the end of the forward pass or the beginning of the backward."""
    tokens, t, hidden = layout.micro_tokens(job), layout.tensor, job.shape.hidden
    s, rows = t if layout.sequence else 1, job.rows / t
    states = BF16 * tokens * hidden * (1 / s + 2)  # before the norm, behind it, and their gradient
    chunk = min(CHUNK_ROWS, tokens) * (BF16 * rows + 8 * hidden)  # exponentials, states and their gradient
    # the table's gradient in float32, beside a chunk, then beside the scaled gradients
    return states + 4 * rows * hidden + max(chunk, BF16 * (rows + tokens) * hidden)


def peak(
    job: Job, layout: Layout, rank: int, kept: float, deferred: float, layer: float, head: float
) -> tuple[float, float]:
    """(activations in flight, what a backward pass holds beside them) when their sum is largest on a pipeline rank.

    Of one layer and micro-batch: ``kept`` for the backward pass, ``deferred`` between it and the weights' gradients
    (zero bubble); ``layer`` and ``head``: beside activations in the backward pass of a layer, and of the head.
    """
    stages = rank_stages(job, layout, rank)
    moments = _moments(
        layout.schedule if layout.pipeline > 1 else "1f1b",
        rank,
        layout.pipeline,
        tuple(stage.stop - stage.first for stage in stages),
        # three micro-batches for each rank reach the peak of every schedule
        min(layout.micro_batches(job), 3 * layout.pipeline),
    )
    last = len(stages) - 1 if stages[-1].head else None
    return max(
        (
            (held * kept + waiting * deferred, 0.0 if stage is None else max(layer, head) if stage == last else layer)
            for held, waiting, stage in moments
        ),
        key=sum,
    )


@cache
def _moments(
    schedule: str, rank: int, ranks: int, layers: tuple[int, ...], micro_batches: int
) -> tuple[tuple[int, int, int | None], ...]:
    """What a rank holds at the moments that may be its peak: (layers kept, layers whose weights' gradients wait, which
    of its stages runs its backward pass), of one micro-batch each. ``layers``: of each of its stages."""
    held = waiting = 0
    split = schedule == "zero_bubble"
    moments: set[tuple[int, int, int | None]] = set()
    for action in _orders(schedule, ranks, len(layers), micro_batches)[rank]:
        stage = action.stage // ranks
        if action.kind == FORWARD:
            held += layers[stage]
            moments.add((held, waiting, None))
        elif action.kind == BACKWARD:
            moments.add((held, waiting, stage))
            held -= layers[stage]
            waiting += layers[stage] * split
        elif action.kind == WEIGHTS:
            moments.add((held, waiting, None))
            waiting -= layers[stage]
    return tuple(
        m for m in moments if not any(o != m and o[0] >= m[0] and o[1] >= m[1] and o[2] == m[2] for o in moments)
    )
