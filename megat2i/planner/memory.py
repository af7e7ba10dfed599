"""Memory of every rank by part, as the torch code holds it: what autograd saves, what schedules keep in flight.

Counted on model/layers.py, parallel/layers.py, pipeline.py, kernels/linear_cross_entropy.py and DeepSpeed's
BF16_Optimizer. All figures in bytes.
"""

from dataclasses import dataclass, fields
from functools import cache

from megat2i.config import ModelConfig
from megat2i.kernels.linear_cross_entropy import CHUNK_ELEMENTS
from megat2i.pipeline_order import BACKWARD, FORWARD, WEIGHTS, training_order
from megat2i.planner.hardware import Gpu
from megat2i.planner.layout import Job, Layout, rank_stages
from megat2i.planner.speed import rank_parameters

REDUCE_BUCKET = 500_000_000  # elements that DeepSpeed copies together for one all-reduce
# Assumed, not measured: CUDA context, cuBLAS workspaces and NCCL's buffers for four groups; what the caching allocator
# holds and cannot use.
CONTEXT, WASTE = 1.5e9, 0.05
BF16 = 2
_orders = cache(training_order)  # one order serves many layouts


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. ``activations``: of all micro-batches in flight; ``head``: the loss head's chunk of
    logits and the gradient of its table, or the gradients inside one layer; ``buffers``: what the optimizer step needs
    once activations are gone, where it is more than they were."""

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
    activations = in_flight_bytes(job, layout, rank)
    head = working_bytes(job, layout, any(stage.head for stage in rank_stages(job, layout, rank)))
    step = min(parameters, REDUCE_BUCKET) * 4 if layout.data > 1 else 0.0
    weights, gradients, optimizer = BF16 * parameters, 4 * parameters, 12 * parameters / layout.data
    buffers = max(0.0, step - activations - head)
    framework = CONTEXT + WASTE * (weights + gradients + optimizer + activations + head + buffers)
    return Memory(weights, gradients, optimizer, activations, head, buffers, framework)


def layer_bytes(shape: ModelConfig, layout: Layout) -> float:
    """What one token of one layer keeps for the backward pass, in bfloat16.

    Norms and residuals: cut along tokens by sequence parallelism; the rest by tensor parallelism. Values are a view
    that keeps query and key alive, even where normalised or rotated copies of them are kept too; with rotary positions
    attention's output has heads before tokens and is copied for the product after it.
    """
    t, s = layout.tensor, layout.tensor if layout.sequence else 1
    hidden, ffn = shape.hidden, shape.ffn_hidden
    if layout.recompute == "full":
        return BF16 * hidden / s
    joined = 3 * hidden / t
    if layout.recompute == "selective":  # the residual before and after attention, the two wide products
        return BF16 * (2 * hidden / s + joined + 2 * ffn / t)
    copies = (3 if shape.positions == "rotary" else 2 if shape.qk_norm else 0) * hidden / t
    statistics = 4 * (4 / s + shape.heads / t)  # of two norms, and attention's log-sum-exp
    if shape.qk_norm and t > 1:  # statistics over all ranks' heads, in plain float32 operations: three kept of each
        statistics += 3 * 4 * 2 * hidden / t
    # inputs and outputs of both norms; attention's output; gate, up, silu and their product
    return BF16 * (4 * hidden / s + joined + copies + hidden / t + 4 * ffn / t) + statistics


def deferred_bytes(shape: ModelConfig, layout: Layout) -> float:
    """What one token of one layer keeps between its backward pass and its weights' gradients (zero bubble): inputs and
    output gradients of the four products; the gradients of residuals are whole on every rank."""
    t, s = layout.tensor, layout.tensor if layout.sequence else 1
    hidden, ffn = shape.hidden, shape.ffn_hidden
    inputs = 2 * hidden / s + hidden / t + ffn / t
    return BF16 * (inputs + 3 * hidden / t + 2 * ffn / t + 2 * hidden)


def in_flight_bytes(job: Job, layout: Layout, rank: int) -> float:
    """Activations of all micro-batches that the schedule keeps at once on a pipeline rank, and one layer's worth of
    what is computed again."""
    tokens, shape = layout.micro_tokens(job), job.shape
    layers = [stage.stop - stage.first for stage in rank_stages(job, layout, rank)]
    held = peak_layers(
        layout.schedule,
        rank,
        layout.pipeline,
        tuple(layers),
        min(layout.micro_batches(job), 3 * layout.pipeline),
        deferred_bytes(shape, layout) / layer_bytes(shape, layout),
    )
    kept = tokens * held * layer_bytes(shape, layout)
    if layout.recompute == "none":
        return kept
    whole = layer_bytes(shape, Layout(layout.tensor, 1, 1, 1, layout.sequence))
    return kept + tokens * (whole - layer_bytes(shape, layout))


def working_bytes(job: Job, layout: Layout, head: bool) -> float:
    """What the backward pass holds beside activations: in the loss head, or inside one layer."""
    tokens, t, shape = layout.micro_tokens(job), layout.tensor, job.shape
    s = t if layout.sequence else 1
    layer = BF16 * tokens * (4 * shape.hidden / s + 3 * shape.hidden / t + 5 * shape.ffn_hidden / t)
    if not head:
        return layer
    chunk = min(CHUNK_ELEMENTS, tokens * job.columns / t)
    logits = chunk * (4 + 4 + 2 + 2)  # float32, its exponentials, bfloat16 twice: as computed, and joined
    table = job.rows / t * shape.hidden * (4 + BF16 + BF16)  # its gradient, one chunk's part, the result
    # the head's input before and after the norm, its live part, their gradients
    states = BF16 * tokens * shape.hidden * 5
    return max(layer, logits + table + states)


@cache
def peak_layers(
    schedule: str, rank: int, ranks: int, layers: tuple[int, ...], micro_batches: int, deferred: float
) -> float:
    """The most layers (of one micro-batch each) held at once on ``rank``, whose stages have ``layers`` layers.

    ``deferred``: what a layer holds between its backward pass and its weights' gradients, as a share of what it holds
    before. Three micro-batches for each rank reach the peak of every schedule.
    """
    held = peak = 0.0
    for action in _orders(schedule, ranks, len(layers), micro_batches)[rank]:
        size = layers[action.stage // ranks]
        if action.kind == FORWARD:
            held += size
        elif action.kind == BACKWARD:
            held -= size * (1 - deferred) if schedule == "zero_bubble" else size
        elif action.kind == WEIGHTS:
            held -= size * deferred
        peak = max(peak, held)
    return peak
