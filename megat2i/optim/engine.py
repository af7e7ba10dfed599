"""What the trainer asks of an optimizer engine, and the pieces of state that a checkpoint sees of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megat2i.parallel.shard import Box, Shard
from megat2i.topology import ParallelGroups

WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of elements of one parameter's state that this rank holds.

    ``kind``: the float32 master weight or one of Adam's moments. ``shard``: the part of the global tensor that this
    rank's local one is. ``values``: a 1-D float32 view of the live state, elements ``start`` .. ``start + len(values)``
    of the flattened local tensor; of a weight that does not learn a view of the model's own, in its dtype. ``written``:
    whether this rank saves them; of equal copies one rank does.
    """

    name: str
    kind: str
    shard: Shard
    start: int
    values: Tensor
    written: bool

    @property
    def boxes(self) -> list[Box]:
        """Where the values lie in the global tensor, in their order."""
        return self.shard.boxes(self.start, self.start + self.values.numel())


def first_of_tensor_copies(shard: Shard, groups: ParallelGroups) -> bool:
    """Whether no tensor-parallel rank before this one holds the same part of a parameter."""
    return groups.tensor_rank == 0 or not shard.is_whole


def frozen_weights(model: nn.Module, shards: dict[str, Shard], groups: ParallelGroups) -> list[Fragment]:
    """The weights of ``model`` that do not learn: all the state that they have, and part of every checkpoint."""
    first = groups.data_rank == 0
    return [
        Fragment(name, WEIGHT, shards[name], 0, p.data.view(-1), first and first_of_tensor_copies(shards[name], groups))
        for name, p in model.named_parameters()
        if not p.requires_grad
    ]


class Engine(Protocol):
    """Reduces gradients over data-parallel ranks, clips, updates and zeroes them: those of parameters that learn.

    ``loss_scale``: the factor on each rank's share of the objective with which the reduced gradient is the gradient of
    the whole objective. ``updates``: optimizer updates so far (Adam's step count).
    """

    loss_scale: float
    updates: int

    def step(self, lr: float, accept: Callable[[float], bool] | None = None) -> float:
        """One update at ``lr``; returns the global gradient norm before clipping. Non-finite norms change nothing.

        Nor does a norm that ``accept`` refuses; it must give all ranks the same answer.
        """

    def fragments(self) -> list[Fragment]:
        """Every piece of state that this rank has to fill; over all ranks each element is written exactly once."""

    def loaded(self, updates: int) -> None:
        """To be called once the fragments' values were overwritten: refreshes weights derived from them."""
