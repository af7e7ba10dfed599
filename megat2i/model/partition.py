"""Which layers each pipeline stage holds: contiguous, balanced by FLOPs with the wide head counted as work.

At 66,816 columns the head of a 1B model costs as much as 2.7 of its layers, so equal numbers of layers would make every
other stage wait for the last one.
"""

from dataclasses import dataclass

from megat2i.config import ModelConfig
from megat2i.model import cost


@dataclass(frozen=True)
class StageLayers:
    """What one stage holds: layers ``first`` .. ``stop`` - 1 by their global numbers, the embedding, the head."""

    first: int
    stop: int
    embedding: bool
    head: bool


def partition(shape: ModelConfig, columns: int, sequence_length: int, stages: int) -> tuple[StageLayers, ...]:
    """Cut the model into ``stages`` contiguous parts of at least one layer each.

    The stage with the most FLOPs has as few as possible; among such partitions the stage with the most parameters has
    as few as possible (here the embedding weighs in, which computes next to nothing); then the most even one; then the
    one with more layers in later stages, which hold fewer micro-batches in flight. ``columns``: vocabulary rows that
    may receive probability. With V virtual stages on each of P ranks, ``stages`` is P x V and rank r holds the stages
    r, r + P, r + 2P, ... Raises ValueError for more stages than layers.
    """
    if not 1 <= stages <= shape.layers:
        raise ValueError(
            f"{stages} pipeline stages for a model of {shape.layers} layers: every stage needs at least one layer; "
            f"choose 1 to {shape.layers} stages"
        )
    if stages == 1:
        return (StageLayers(0, shape.layers, embedding=True, head=True),)
    counts = min(
        _candidates(shape.layers, stages), key=lambda counts: _badness(counts, shape, columns, sequence_length)
    )
    parts, first = [], 0
    for stage, layers in enumerate(counts):
        parts.append(StageLayers(first, first + layers, embedding=stage == 0, head=stage == stages - 1))
        first += layers
    return tuple(parts)


def stage_forward_flops(stage: StageLayers, shape: ModelConfig, columns: int, sequence_length: int) -> int:
    """FLOPs of one token's forward pass through the stage."""
    layers = (stage.stop - stage.first) * cost.layer_forward_flops(shape, sequence_length)
    return layers + (cost.head_forward_flops(shape, columns) if stage.head else 0)


def stage_parameters(stage: StageLayers, shape: ModelConfig, rows: int) -> int:
    """Parameters that the stage holds; ``rows``: rows of the vocabulary tables."""
    layers = (stage.stop - stage.first) * cost.layer_parameters(shape)
    embedding = cost.embedding_parameters(shape, rows) if stage.embedding else 0
    return layers + embedding + (cost.head_parameters(shape, rows) if stage.head else 0)


def _candidates(layers: int, stages: int):
    """Layers of each stage, for every choice of the two ends; all stages between them are alike, so split evenly."""
    inner = stages - 2
    for first in range(1, layers - inner):
        for last in range(1, layers - first - inner + 1):
            rest = layers - first - last
            if inner:
                share, larger = divmod(rest, inner)
                yield (first, *[share] * (inner - larger), *[share + 1] * larger, last)
            elif not rest:
                yield (first, last)


def _badness(counts: tuple[int, ...], shape: ModelConfig, columns: int, sequence_length: int) -> tuple:
    """What ``partition`` minimises, in the order of importance; integers, so that equal is equal."""
    flops = [layers * cost.layer_forward_flops(shape, sequence_length) for layers in counts]
    flops[-1] += cost.head_forward_flops(shape, columns)
    parameters = [layers * cost.layer_parameters(shape) for layers in counts]
    parameters[0] += cost.embedding_parameters(shape, columns)
    parameters[-1] += cost.head_parameters(shape, columns)
    return max(flops), max(parameters), sum(work**2 for work in flops), counts
