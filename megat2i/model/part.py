"""Which part of the model a rank holds."""

from typing import NamedTuple

from megat2i.config import Config
from megat2i.model.partition import StageLayers, partition
from megat2i.parallel.collectives import ALONE, TensorParallel
from megat2i.topology import ParallelGroups


class Part(NamedTuple):
    """A share of every layer of some pipeline stages. ``recompute``: as ``layers.Block``'s."""

    parallel: TensorParallel = ALONE
    stages: tuple[StageLayers, ...] | None = None  # None: the whole depth as one stage
    recompute: str = "none"


WHOLE_MODEL = Part()


def all_stages(settings: Config) -> tuple[StageLayers, ...]:
    """The stages of the whole pipeline; rank r of P holds every P-th from the r-th."""
    columns = sum(stop - start for start, stop in settings.vocab_layout.ranges)
    number = settings.parallel.pipeline * settings.parallel.virtual_stages
    return partition(settings.model, columns, settings.data.sequence_length, number)


def part_of(settings: Config, groups: ParallelGroups) -> Part:
    """The part of this rank under ``settings.parallel``."""
    parallel = settings.parallel
    return Part(
        TensorParallel(groups.tensor, groups.tensor_rank, groups.tensor_size, parallel.sequence),
        all_stages(settings)[groups.pipeline_rank :: groups.pipeline_size],
        parallel.recompute,
    )
