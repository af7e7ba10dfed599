"""What must hold on every rank between two steps: copies of a parameter are equal.

Data-parallel copies follow from one all-reduce and are the same bits. Tensor-parallel copies of what is not cut (gains
of norms) get gradients that were reduced in several groups, which may add in another order each: they may drift apart
by roundings, and are compared as numbers.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megat2i.parallel.shard import Shard
from megat2i.topology import ParallelGroups

DRIFT = 1e-2  # of a parameter's largest value: far above roundings, far below what a lost message does
PIECE = 1 << 24  # elements at a time: their bits as 64-bit integers take four times the memory of bfloat16


@torch.no_grad()
def unequal_copy(
    parameters: dict[str, nn.Parameter], shards: dict[str, Shard], groups: ParallelGroups
) -> tuple[str, str] | None:
    """(axis, name) of a parameter whose copies differ between ranks, as this rank sees it, or None. Collective."""
    names = list(parameters)
    sums = torch.stack([_checksum(parameters[name]) for name in names])
    by_axis = [("data", names, _differ(sums, groups.data) > 0)]
    replicated = [name for name in names if shards[name].is_whole]
    if replicated and groups.tensor_size > 1:
        values = torch.cat([parameters[name].flatten().float() for name in replicated])
        sizes = [parameters[name].numel() for name in replicated]
        drift = torch.stack([part.max() for part in _differ(values, groups.tensor).split(sizes)])
        largest = torch.stack([part.abs().max() for part in values.split(sizes)])
        by_axis.append(("tensor", replicated, ~(drift <= DRIFT * largest)))
    # all axes before the verdict: ranks that found a difference must not leave the others waiting in the next one
    for axis, of_axis, differing in by_axis:
        if differing.any():
            return axis, of_axis[int(differing.nonzero()[0])]
    return None


def _differ(values: Tensor, group: ProcessGroup) -> Tensor:
    """Largest minus smallest of each value over the ranks of ``group``."""
    low, high = values.clone(), values.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return (high != low) if values.dtype == torch.int64 else high - low


def _checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum of the bits, in which a value also counts by its place."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, bits in enumerate(tensor.detach().contiguous().view(integer).flatten().split(PIECE)):
        place = torch.arange(len(bits), device=bits.device) * 2 + (2 * PIECE * number + 1)
        total += (bits.long() * place).sum()
    return total
