"""What must hold on every rank between two steps: copies of a parameter are the same bits."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megat2i.parallel.shard import Shard
from megat2i.topology import ParallelGroups


def unequal_copy(
    parameters: dict[str, nn.Parameter], shards: dict[str, Shard], groups: ParallelGroups
) -> tuple[str, str] | None:
    """(axis, name) of a parameter whose copies differ between ranks, or None; the same answer on all ranks of a group.

    Data-parallel ranks hold copies of everything, tensor-parallel ranks of what is not cut. Collective.
    """
    replicated = [name for name in parameters if shards[name].is_whole]
    axes = (("data", groups.data, list(parameters)), ("tensor", groups.tensor, replicated))
    # all axes before the verdict: ranks that found a difference must not leave the others waiting in the next one
    found = [(axis, names, _differing([parameters[n] for n in names], group)) for axis, group, names in axes]
    return next(((axis, names[number]) for axis, names, number in found if number is not None), None)


@torch.no_grad()
def _differing(tensors: list[Tensor], group: ProcessGroup) -> int | None:
    """Number of the first of ``tensors`` whose checksums differ between the ranks of ``group``."""
    if group.size() == 1 or not tensors:
        return None
    own = torch.stack([_checksum(tensor) for tensor in tensors])
    low, high = own.clone(), own.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    differing = (low != high).nonzero()
    return int(differing[0]) if len(differing) else None


def _checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum of the bits, in which a value also counts by its place."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integer).flatten().long()
    return (bits * (torch.arange(len(bits), device=bits.device) * 2 + 1)).sum()
