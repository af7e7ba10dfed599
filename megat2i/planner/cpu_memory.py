"""Memory that a rank's tensors take at their peak on a CPU, with the torch engine: what the planner can be checked on.

The same counting as memory.py; different are the engine, which shards nothing, the attention, whose scores exist in
bfloat16 (kernels/ops.py), and RMSNorm, which PyTorch composes of several operations.
"""

from megat2i.kernels.linear_cross_entropy import CHUNK_ELEMENTS
from megat2i.planner.layout import Job, Layout, rank_stages
from megat2i.planner.memory import layer_bytes, peak_layers
from megat2i.planner.speed import rank_parameters

SIZES = {"float32": 4, "bfloat16": 2}


def cpu_peak(job: Job, layout: Layout, dtype: str, rank: int = 0) -> float:
    """Bytes of all tensors of pipeline rank ``rank`` at the peak of a training step, the first one excepted.

    Weights, masters where they are others, sums of gradients and two moments; then activations with either what the
    loss head or what one layer's backward pass needs.
    """
    size = SIZES[dtype]
    static = (size + (4 if dtype == "bfloat16" else 0) + 4 + 8) * rank_parameters(job, layout, rank)
    stages = rank_stages(job, layout, rank)
    layers = tuple(stage.stop - stage.first for stage in stages)
    micro_batches = min(layout.micro_batches(job), 3 * layout.pipeline)
    held = peak_layers(layout.schedule, rank, layout.pipeline, layers, micro_batches, 1.0)
    activations = layout.micro_tokens(job) * held * _layer(job, layout, size)
    if layout.recompute != "none":
        whole = Layout(layout.tensor, 1, 1, layout.micro_batch, layout.sequence)
        activations += layout.micro_tokens(job) * (_layer(job, whole, size) - _layer(job, layout, size))
    working = _layer_backward(job, layout, size)
    if any(stage.head for stage in stages):
        working = max(working, _head(job, layout, size))
    return static + activations + working


def _layer(job: Job, layout: Layout, size: int) -> float:
    """What one token of a layer keeps."""
    shape, t = job.shape, layout.tensor
    kept = layer_bytes(shape, layout) * size / 2
    if layout.recompute != "none":
        return kept
    if shape.norm == "rms_norm":  # the input in float32 and its normalised form
        kept += 2 * shape.hidden * (4 + (2 if size == 2 else 0)) / (t if layout.sequence else 1)
    if size == 2:  # attention by matrix products: its probabilities, and copies of query, key and value
        kept += 2 * job.sequence_length * shape.heads / t
        if not shape.qk_norm and shape.positions == "none":
            kept += 0.0
    return kept


def _layer_backward(job: Job, layout: Layout, size: int) -> float:
    """Gradients that one layer's backward pass holds at once."""
    tokens, t, shape = layout.micro_tokens(job), layout.tensor, job.shape
    feed_forward = size * tokens * (2 * shape.hidden + 5 * shape.ffn_hidden / t)
    if size == 4:
        return feed_forward
    scores = size * tokens * job.sequence_length * shape.heads / t
    return max(feed_forward, 2 * scores + size * tokens * 4 * shape.hidden / t)


def _head(job: Job, layout: Layout, size: int) -> float:
    """The loss head's backward pass: logits, their gradient (and it in bfloat16), the table's gradient, states."""
    tokens, t, hidden = layout.micro_tokens(job), layout.tensor, job.shape.hidden
    chunk = min(CHUNK_ELEMENTS, tokens * job.columns / t)
    logits = chunk * (4 + 4 + (2 if size == 2 else 0))
    table = hidden * (4 * job.rows + size * job.columns) / t
    return logits + table + 4 * size * tokens * hidden
