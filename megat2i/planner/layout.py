"""What is to be trained (``Job``), how it may be cut over GPUs (``Layout``), and all sensible cuts."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from megat2i.config import Config, ModelConfig
from megat2i.model.partition import StageLayers, partition
from megat2i.planner.hardware import NODE

SCHEDULES = ("1f1b", "interleaved", "zero_bubble")
RECOMPUTE = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 3, 4, 6, 7, 8, 12, 14, 16, 24, 28, 32)  # sequences; more fill no GPU better


@dataclass(frozen=True)
class Job:
    """A model and its batch. ``rows`` of the vocabulary tables, of which ``columns`` may receive probability."""

    shape: ModelConfig
    rows: int
    columns: int
    sequence_length: int
    global_batch: int  # sequences

    @staticmethod
    def of(config: Config) -> "Job":
        layout = config.vocab_layout
        columns = sum(stop - start for start, stop in layout.ranges)
        return Job(config.model, layout.size, columns, config.data.sequence_length, config.training.global_batch_size)

    @property
    def tokens(self) -> int:
        """Positions of a global batch, padding included."""
        return self.global_batch * self.sequence_length


@dataclass(frozen=True)
class Layout:
    """One way to use ``gpus`` = tensor x pipeline x data ranks."""

    tensor: int
    pipeline: int
    data: int
    micro_batch: int  # sequences
    sequence: bool = False
    schedule: str = "1f1b"
    virtual_stages: int = 1
    recompute: str = "none"

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    def micro_batches(self, job: Job) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        return job.global_batch // (self.data * self.micro_batch)

    def micro_tokens(self, job: Job) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch * job.sequence_length

    def describe(self) -> str:
        """E.g. "4.2.8 sequence interleaved x2 micro-batch 1 recompute full": pipeline.tensor.data."""
        words = [f"{self.pipeline}.{self.tensor}.{self.data}"]
        words += ["sequence"] if self.sequence else []
        words += [self.schedule] if self.pipeline > 1 else []
        words += [f"x{self.virtual_stages}"] if self.virtual_stages > 1 else []
        words += [f"micro-batch {self.micro_batch}"]
        words += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return " ".join(words)


def up_width(shape: ModelConfig) -> int:
    """Outputs of the feed-forward's first product: gate and up, or up alone."""
    return shape.ffn_hidden * (2 if shape.feed_forward == "swiglu" else 1)


def qk_norm_apart(shape: ModelConfig, tensor: int) -> bool:
    """Whether queries and keys are normed apart from attention's op, which splits and rotates them."""
    needs_all_ranks = tensor > 1 and not shape.qk_norm_per_head
    unknown = shape.norm == "layer_norm_no_gain" or shape.positions == "rotary_interleaved"
    return shape.qk_norm and (needs_all_ranks or unknown)


@cache
def stages_of(job: Job, stages: int) -> tuple[StageLayers, ...]:
    """The balanced partition."""
    return partition(job.shape, job.columns, job.sequence_length, stages)


def rank_stages(job: Job, layout: Layout, rank: int) -> tuple[StageLayers, ...]:
    """What pipeline rank ``rank`` holds: stages rank, rank + P, rank + 2P, ..."""
    return stages_of(job, layout.pipeline * layout.virtual_stages)[rank :: layout.pipeline]


def candidates(job: Job, gpus: int) -> Iterator[Layout]:
    """Every sensible layout: tensor ranks are a power of two within a node that divides heads and ffn, data ranks
    divide the batch, a pipeline gets at least as many micro-batches as it has ranks; tied tables need one rank."""
    tensor, deepest = 1, 1 if job.shape.tied_embeddings else job.shape.layers
    while tensor <= min(NODE, gpus):
        if gpus % tensor == job.shape.key_value_heads % tensor == job.shape.ffn_hidden % tensor == 0:
            for pipeline in range(1, deepest + 1):
                if gpus // tensor % pipeline == 0 and job.global_batch % (gpus // tensor // pipeline) == 0:
                    yield from _variants(job, tensor, pipeline, gpus // tensor // pipeline)
        tensor *= 2


def _variants(job: Job, tensor: int, pipeline: int, data: int) -> Iterator[Layout]:
    share = job.global_batch // data
    for micro_batch in MICRO_BATCHES:
        if share % micro_batch or share // micro_batch < pipeline:
            continue
        for schedule, virtual_stages in _schedules(job, pipeline, share // micro_batch):
            divides = tensor > 1 and micro_batch * job.sequence_length % tensor == 0
            for sequence in (False, True) if divides else (False,):
                for recompute in RECOMPUTE:
                    yield Layout(tensor, pipeline, data, micro_batch, sequence, schedule, virtual_stages, recompute)


def _schedules(job: Job, pipeline: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """(schedule, virtual stages); virtual stages deal micro-batches out in rounds of one for each rank."""
    yield "1f1b", 1
    if pipeline == 1:
        return
    yield "zero_bubble", 1
    if micro_batches % pipeline:
        return
    for virtual_stages in (2, 3, 4):
        if pipeline * virtual_stages <= job.shape.layers:
            yield "interleaved", virtual_stages
            yield "zero_bubble", virtual_stages
