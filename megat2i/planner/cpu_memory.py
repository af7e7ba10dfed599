"""Memory that a rank's tensors take at their peak on a CPU, with the torch engine: what the planner can be checked on.

The same counting as memory.py; different are the engine, which shards nothing, and the operations, which PyTorch
composes (kernels/ops.py; in bfloat16 attention's scores exist), and the loss head (linear_cross_entropy/chunked.py).
"""

from dataclasses import replace

from megat2i.kernels.linear_cross_entropy import CHUNK_ELEMENTS
from megat2i.model import cost
from megat2i.planner.layout import Job, Layout, up_width
from megat2i.planner.memory import BF16, deferred_bytes, layer_bytes, peak
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
        kept=tokens * layer_kept(job, layout, size),
        deferred=tokens * deferred_bytes(job.shape, layout) * size / BF16,
        layer=_layer_backward(job, layout, size),
        head=_head(job, layout, size),
    )
    return static + activations + beside


def layer_kept(job: Job, layout: Layout, size: int) -> float:
    """What one token of a layer keeps."""
    shape, t, s = job.shape, layout.tensor, layout.tensor if layout.sequence else 1
    if layout.recompute != "none":
        return layer_bytes(shape, layout) * size / BF16
    query, joined = cost.attention_width(shape) / t, cost.joined_width(shape) / t
    if size == 2:  # copies for matrix products, of their result too; the probabilities; the projection if it is normed
        attention = 4 * query + (joined if shape.qk_norm else 0) + job.sequence_length * shape.heads / t
    else:  # query and key normed or rotated; attention's result, and its copy in the order of tokens; its log-sum-exp
        copies = 4 if shape.positions != "none" else 3 if shape.qk_norm else 1
        attention = joined + copies * query + shape.heads / t
    # inputs and outputs of both norms and their statistics; gate, up, silu and their product, or of GELU both sides
    kept = size * (attention + 4 * shape.hidden / s + 4 / s + 2 * up_width(shape) / t)
    if shape.qk_norm and t > 1:  # over all ranks' heads, in plain float32 operations
        kept += 3 * 4 * 2 * query
    if shape.norm == "rms_norm":  # the input in float32 and its normalised form
        kept += 2 * shape.hidden * (4 + (2 if size == 2 else 0)) / s
    return kept


def _layer_backward(job: Job, layout: Layout, size: int) -> float:
    """Gradients that one layer's backward pass holds at once, and what it computed again."""
    tokens, t, shape = layout.micro_tokens(job), layout.tensor, job.shape
    gradients = size * tokens * (2 * shape.hidden + 5 * shape.ffn_hidden / t)
    if size == 2:
        scores = size * tokens * job.sequence_length * shape.heads / t
        gradients = max(gradients, 2 * scores + size * tokens * 4 * shape.hidden / t)
    whole = replace(layout, recompute="none")
    return gradients + tokens * (layer_kept(job, whole, size) - layer_kept(job, layout, size))


def _head(job: Job, layout: Layout, size: int) -> float:
    """What the loss head holds in the forward pass: the backward pass only scales gradients."""
    tokens, t, hidden = layout.micro_tokens(job), layout.tensor, job.shape.hidden
    columns, logits = job.columns / t, min(CHUNK_ELEMENTS, tokens * job.columns / t)
    # states before and behind the norm and those with a label; their gradient, of all and of a chunk, in float32
    states = tokens * hidden * (3 * size + 2 * 4)
    # the table's gradient and its columns that are used, the latter also in float32
    table = hidden * (4 * job.rows / t + size * columns + (4 * columns if size == 2 else 0))
    chunk = logits * (4 + (2 if size == 2 else 0))  # exponentials, and as gradient in bfloat16
    # a lone chunk's gradient of the table; of several, logits made while those before them are there, or a float32 copy
    rest = tokens * columns - logits
    beside = 4 * (logits if size == 2 else min(logits, rest)) if rest else size * columns * hidden
    return states + table + chunk + beside
