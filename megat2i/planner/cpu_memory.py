"""Memory that a rank's tensors take at their peak on a CPU, with the torch engine: what the planner can be checked on.

The same counting as memory.py; different are the engine, which shards nothing, the attention, whose scores exist in
bfloat16 (kernels/ops.py), and RMSNorm, which PyTorch composes of several operations.
"""

from dataclasses import replace

from megat2i.kernels.linear_cross_entropy import CHUNK_ELEMENTS
from megat2i.planner.layout import Job, Layout
from megat2i.planner.memory import deferred_bytes, layer_bytes, peak
from megat2i.planner.speed import rank_parameters

SIZES = {"float32": 4, "bfloat16": 2}


def cpu_peak(job: Job, layout: Layout, dtype: str, rank: int = 0) -> float:
    """Bytes of all tensors of pipeline rank ``rank`` at the peak of a training step, the first one excepted.

    Weights, masters where they are others, sums of gradients and two moments; then activations with either what the
    loss head or what one layer's backward pass needs.
    """
    size = SIZES[dtype]
    static = (size + (4 if dtype == "bfloat16" else 0) + 4 + 8) * rank_parameters(job, layout, rank)
    tokens = layout.micro_tokens(job)
    activations, beside = peak(
        job,
        layout,
        rank,
        kept=tokens * _layer(job, layout, size),
        deferred=tokens * deferred_bytes(job.shape, layout) * size / 2,
        layer=_layer_backward(job, layout, size),
        head=_head(job, layout, size),
    )
    return static + activations + beside


def _layer(job: Job, layout: Layout, size: int) -> float:
    """What one token of a layer keeps."""
    shape, t = job.shape, layout.tensor
    kept = layer_bytes(shape, layout) * size / 2
    if layout.recompute != "none":
        return kept
    if shape.norm == "rms_norm":  # the input in float32 and its normalised form
        kept += 2 * shape.hidden * (4 + (2 if size == 2 else 0)) / (t if layout.sequence else 1)
    if size == 2:  # attention by matrix products keeps its probabilities
        kept += 2 * job.sequence_length * shape.heads / t
    return kept


def _layer_backward(job: Job, layout: Layout, size: int) -> float:
    """Gradients that one layer's backward pass holds at once, and what it computed again."""
    tokens, t, shape = layout.micro_tokens(job), layout.tensor, job.shape
    gradients = size * tokens * (2 * shape.hidden + 5 * shape.ffn_hidden / t)
    if size == 2:
        scores = size * tokens * job.sequence_length * shape.heads / t
        gradients = max(gradients, 2 * scores + size * tokens * 4 * shape.hidden / t)
    whole = replace(layout, recompute="none")
    return gradients + tokens * (_layer(job, whole, size) - _layer(job, layout, size))


def _head(job: Job, layout: Layout, size: int) -> float:
    """The loss head's backward pass: logits, their gradient (and it in bfloat16), the table's gradient, states."""
    tokens, t, hidden = layout.micro_tokens(job), layout.tensor, job.shape.hidden
    chunk = min(CHUNK_ELEMENTS, tokens * job.columns / t)
    # oneDNN copies a transposed bfloat16 operand
    logits = chunk * (4 + 4 + (2 + 2 if size == 2 else 0))
    table = hidden * (4 * job.rows + size * job.columns) / t
    return logits + table + 4 * size * tokens * hidden
