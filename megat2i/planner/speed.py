"""How long a step takes: seconds of each kind of work on the rank that finishes last, and what the links carry.

A micro-batch's work on a stage is a sum of matrix products (by their FLOPs and traffic), attention, elementwise kernels
and tensor-parallel collectives. The pipeline adds its bubble, the end of the step the data-parallel collectives and the
optimizer. Nothing is taken to overlap that the system does not overlap.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil

from megat2i.model import cost
from megat2i.model.partition import StageLayers
from megat2i.planner.hardware import Gpu, matmul_seconds, memory_seconds, ring_bandwidth
from megat2i.planner.layout import Job, Layout, rank_stages, stages_of, up_width
from megat2i.planner.system import System

FLASH_BACKWARD = 2.5  # FLOPs of fused attention's backward pass for one of its forward pass: it computes scores again


@dataclass(frozen=True)
class Work:
    """Seconds of one micro-batch on one rank, by kind."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    head: float = 0.0
    tensor: float = 0.0  # tensor-parallel collectives

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(part * times for part in self.parts()))

    def parts(self) -> tuple[float, ...]:
        return self.matmul, self.attention, self.elementwise, self.head, self.tensor

    @property
    def seconds(self) -> float:
        return sum(self.parts())


@dataclass(frozen=True)
class Links:
    """Bytes that each rank sends in a step, by kind of link."""

    tensor: float
    pipeline: float
    data: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; their sum is its length."""

    work: Work  # of all micro-batches on the busiest pipeline rank, without what is computed again
    recompute: float
    bubble: float  # idle time while the pipeline fills and drains
    pipeline: float  # sending between stages
    data: float  # exposed data-parallel collectives
    optimizer: float
    links: Links

    @property
    def seconds(self) -> float:
        return self.work.seconds + self.recompute + self.bubble + self.pipeline + self.data + self.optimizer


def layer_forward(job: Job, layout: Layout, system: System, gpu: Gpu) -> Work:
    """One layer's forward pass of one micro-batch on one tensor-parallel rank."""
    tokens, t, shape = layout.micro_tokens(job), layout.tensor, job.shape
    matmul = sum(matmul_seconds(gpu, tokens, inner, columns) for inner, columns in _products(job, t))
    traffic = tokens * system.forward.bytes(shape, t, layout.sequence)
    return Work(
        matmul=matmul,
        attention=_attention(job, layout, system, gpu, passes=1.0, score_bytes=system.scores[0]),
        elementwise=memory_seconds(gpu, traffic),
        tensor=_tensor_bytes(job, layout) / ring_bandwidth(gpu, t, 1),
    )


def layer_backward(job: Job, layout: Layout, system: System, gpu: Gpu) -> Work:
    """One layer's backward pass: gradients of both operands of every product."""
    tokens, t, shape = layout.micro_tokens(job), layout.tensor, job.shape
    matmul = weight_gradients(job, layout, gpu) + sum(
        matmul_seconds(gpu, tokens, columns, inner) for inner, columns in _products(job, t)
    )
    traffic = tokens * system.backward.bytes(shape, t, layout.sequence)
    accumulated = system.accumulate * cost.layer_parameters(shape) / t
    passes = FLASH_BACKWARD if system.scores == (0, 0) else cost.BACKWARD
    return Work(
        matmul=matmul,
        attention=_attention(job, layout, system, gpu, passes=passes, score_bytes=system.scores[1]),
        elementwise=memory_seconds(gpu, traffic + accumulated),
        tensor=_exposed_backward(job, layout, system, gpu),
    )


def _exposed_backward(job: Job, layout: Layout, system: System, gpu: Gpu) -> float:
    """Seconds of one layer's tensor-parallel collectives in the backward pass that no matrix product hides.

    Two reductions of input gradients, each beside the product of a weight's gradient (not with zero bubble, which puts
    it off). With sequence parallelism these are reduce-scatters, half an all-reduce each; the two all-gathers of
    output gradients stand alone, and inputs are gathered once more beside the products of input gradients.
    """
    t = layout.tensor
    collectives = _tensor_bytes(job, layout) / ring_bandwidth(gpu, t, 1)
    gathers = collectives / 2 if layout.sequence else 0.0
    reductions = collectives - gathers
    if not system.hidden_reductions or layout.schedule == "zero_bubble":
        return gathers + reductions
    products = (_products(job, t)[0], _products(job, t)[2])
    tokens = layout.micro_tokens(job)
    beside = sum(matmul_seconds(gpu, inner, tokens, columns) for inner, columns in products)
    return gathers + max(0.0, reductions - beside)


def weight_gradients(job: Job, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a layer's products for the gradients of its weights."""
    tokens = layout.micro_tokens(job)
    return sum(matmul_seconds(gpu, inner, tokens, columns) for inner, columns in _products(job, layout.tensor))


def recomputed(job: Job, layout: Layout, system: System, gpu: Gpu) -> Work:
    """What the backward pass of one layer computes again: nothing, attention and elementwise operations, everything."""
    if layout.recompute == "none":
        return Work()
    again = layer_forward(job, layout, system, gpu)
    return again if layout.recompute == "full" else Work(attention=again.attention, elementwise=again.elementwise)


def head_seconds(job: Job, layout: Layout, system: System, gpu: Gpu) -> float:
    """Forward and backward pass of the loss head for one micro-batch, its collectives included.

    Of all positions: ours leaves out those without a label, but how many these are only the data knows.
    """
    tokens, t, hidden = layout.micro_tokens(job), layout.tensor, job.shape.hidden
    columns, head = job.columns / t, system.head
    chunks = 1 if head.chunk is None else ceil(tokens / head.chunk)
    product = chunks * matmul_seconds(gpu, tokens / chunks, hidden, columns)
    traffic = tokens * (head.logit_bytes * columns + head.state_bytes * hidden)
    traffic += hidden * (head.chunk_bytes * chunks * columns + (head.table_bytes + system.accumulate) * job.rows / t)
    # the gradient of the states is reduced, beside the product of the table's; before it the states were gathered
    reduction = _tensor_bytes(job, layout) / 2 / ring_bandwidth(gpu, t, 1)
    gather = reduction / 2 if layout.sequence else 0.0
    exposed = gather + max(0.0, reduction - (product if system.hidden_reductions else 0.0))
    return (1 + cost.BACKWARD) * product + memory_seconds(gpu, traffic) + exposed


@dataclass(frozen=True)
class Costs:
    """Seconds of one micro-batch: a layer, what is computed again of it, its weights' gradients, the loss head."""

    layer: Work
    again: Work
    weights: float
    head: float

    @staticmethod
    def of(job: Job, layout: Layout, system: System, gpu: Gpu) -> "Costs":
        return Costs(
            layer_forward(job, layout, system, gpu) + layer_backward(job, layout, system, gpu),
            recomputed(job, layout, system, gpu),
            weight_gradients(job, layout, gpu),
            head_seconds(job, layout, system, gpu),
        )

    def work(self, stages: tuple[StageLayers, ...]) -> Work:
        """One micro-batch through ``stages``, without what is computed again."""
        layers, heads = sum(stage.stop - stage.first for stage in stages), sum(stage.head for stage in stages)
        return self.layer * layers + Work(head=self.head * heads)

    def seconds(self, stages: tuple[StageLayers, ...]) -> float:
        """One micro-batch through ``stages``."""
        layers = sum(stage.stop - stage.first for stage in stages)
        return self.work(stages).seconds + self.again.seconds * layers


def step_time(job: Job, layout: Layout, system: System, gpu: Gpu) -> StepTime:
    """The step's time on the busiest pipeline rank, and the bytes that its links carry."""
    count = layout.micro_batches(job)
    costs = Costs.of(job, layout, system, gpu)
    ranks = [rank_stages(job, layout, rank) for rank in range(layout.pipeline)]
    busiest = max(ranks, key=costs.seconds)
    work = costs.work(busiest) * count
    parameters = max(rank_parameters(job, layout, rank) for rank in range(layout.pipeline))
    data_bytes, data_seconds = _data_parallel(layout, system, gpu, parameters)
    if system.overlap:  # under the backward pass, two thirds of the work
        data_seconds = max(0.0, data_seconds - work.seconds * 2 / 3)
    sent, sending = _between_stages(job, layout, gpu)
    return StepTime(
        work=work,
        recompute=costs.seconds(busiest) * count - work.seconds,
        bubble=bubble(job, layout, costs),
        pipeline=sending,
        data=data_seconds,
        optimizer=memory_seconds(gpu, system.update * parameters / layout.data + 4 * parameters),
        links=Links(count * sum(_stage_tensor_bytes(job, layout, stage) for stage in busiest), sent, data_bytes),
    )


def bubble(job: Job, layout: Layout, costs: Costs) -> float:
    """Idle seconds of the busiest rank: the first micro-batch's way through the other ranks' stages, and back.

    Virtual stages shorten the way to one of them on each rank (Narayanan et al. 2021, section 2.2). Zero bubble fills
    it with weights' gradients, put off in its forward and its backward half (Qi et al. 2023, arXiv 2401.10241, ZB-H1).
    """
    stages = stages_of(job, layout.pipeline * layout.virtual_stages)
    busiest = max(costs.seconds(rank_stages(job, layout, rank)) for rank in range(layout.pipeline))
    idle = (costs.seconds(stages) - busiest) / layout.virtual_stages
    if layout.schedule == "zero_bubble":
        layers = job.shape.layers / len(stages)
        idle -= 2 * (layout.pipeline - 1) * layers * costs.weights
    return max(0.0, idle)


def rank_parameters(job: Job, layout: Layout, rank: int) -> float:
    """Parameters on one rank of pipeline rank ``rank``; norms are on every tensor-parallel rank."""
    return _parameters(job, layout.tensor, layout.pipeline, layout.virtual_stages)[rank]


@cache
def _parameters(job: Job, tensor: int, pipeline: int, virtual_stages: int) -> tuple[float, ...]:
    """``rank_parameters`` of every pipeline rank."""
    shape, counts = job.shape, []
    for rank in range(pipeline):
        norms, cut = 0, 0
        for stage in stages_of(job, pipeline * virtual_stages)[rank::pipeline]:
            layers = stage.stop - stage.first
            cut += layers * cost.layer_matrices(shape)
            norms += layers * (cost.layer_parameters(shape) - cost.layer_matrices(shape))
            tables = stage.embedding + stage.head - (shape.tied_embeddings and stage.embedding and stage.head)
            cut += job.rows * shape.hidden * tables
            norms += cost.norm_parameters(shape) * stage.head
        counts.append(cut / tensor + norms)
    return tuple(counts)


def _products(job: Job, tensor: int) -> tuple[tuple[float, float], ...]:
    """(inner, columns) of a layer's four matrix products on one tensor-parallel rank."""
    hidden, ffn = job.shape.hidden, job.shape.ffn_hidden
    return (
        (hidden, cost.joined_width(job.shape) / tensor),
        (cost.attention_width(job.shape) / tensor, hidden),
        (hidden, up_width(job.shape) / tensor),
        (ffn / tensor, hidden),
    )


def _attention(job: Job, layout: Layout, system: System, gpu: Gpu, passes: float, score_bytes: float) -> float:
    tokens, shape = layout.micro_tokens(job), job.shape
    flops = passes * tokens * cost.attention_forward_flops(shape, job.sequence_length) / layout.tensor
    if system.scores == (0, 0):
        return flops / (gpu.peak * gpu.attention * system.flash)
    scores = tokens * job.sequence_length * shape.heads / layout.tensor  # all keys are computed, then masked
    return 2 * flops / (gpu.peak * gpu.matmul) + memory_seconds(gpu, score_bytes * scores)


def _tensor_bytes(job: Job, layout: Layout) -> float:
    """Bytes that a rank sends in one layer's forward pass: two all-reduces, or as much in halves (Korthikanti 2022)."""
    t = layout.tensor
    return 2 * 2 * (t - 1) / t * layout.micro_tokens(job) * job.shape.hidden * 2


def _stage_tensor_bytes(job: Job, layout: Layout, stage: StageLayers) -> float:
    one = _tensor_bytes(job, layout)
    again = 0.5 if layout.sequence else 0.0  # inputs gathered once more
    passes = 2 + (layout.recompute == "full") + again
    return one * (passes * (stage.stop - stage.first) + stage.head * (1 + again) / 2 + stage.embedding / 2)


def _between_stages(job: Job, layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """(bytes, seconds): activations forward and their gradients backward, each micro-batch, each virtual stage."""
    if layout.pipeline == 1:
        return 0.0, 0.0
    cut = layout.tensor if layout.sequence else 1
    message = layout.micro_tokens(job) * job.shape.hidden * 2 / cut
    sent = 2 * layout.micro_batches(job) * layout.virtual_stages * message
    neighbour_on_node = layout.gpus <= 8
    return sent, sent / (ring_bandwidth(gpu, 2, 1) if neighbour_on_node else gpu.network)


def _data_parallel(layout: Layout, system: System, gpu: Gpu, parameters: float) -> tuple[float, float]:
    """(bytes, seconds) of the gradients' all-reduce and the weights' all-gather."""
    d = layout.data
    sent = (d - 1) / d * parameters * (2 * system.gradient + system.weights)
    return sent, sent / ring_bandwidth(gpu, d, layout.tensor)
