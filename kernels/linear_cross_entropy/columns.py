"""Which columns of the vocabulary a rank computes, and how the ranks' statistics of a token become one."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Ranges = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """Consecutive columns that this rank computes: rows ``start`` .. ``stop`` of its weight, ids from ``first`` on."""

    range: int  # number of the id range that they belong to
    start: int
    stop: int
    first: int


def local_pieces(ranges: Ranges, blocks: Ranges, rank: int, ranks: int) -> tuple[Piece, ...]:
    """The parts of ``ranges`` that lie in this rank's share of each block, in the order of the ranges."""
    pieces, local = [], 0
    for start, end in blocks:
        if (end - start) % ranks:
            raise ValueError(f"block ({start}, {end}) does not divide into {ranks} equal parts")
        share = (end - start) // ranks
        low = start + rank * share
        for number, (first, last) in enumerate(ranges):
            begin, finish = max(first, low), min(last, low + share)
            if begin < finish:
                pieces.append(Piece(number, local + begin - low, local + finish - low, begin))
        local += share
    if not pieces:
        raise ValueError(f"rank {rank} of {ranks} holds no column of {ranges}; shard over fewer ranks")
    return tuple(sorted(pieces))


def local_rows(targets: Tensor, pieces: tuple[Piece, ...]) -> Tensor:
    """Row of this rank's weight [N] int64 that belongs to each target; -1 where another rank has it, or none."""
    rows = torch.full_like(targets, -1)
    for piece in pieces:
        inside = (targets >= piece.first) & (targets < piece.first + piece.stop - piece.start)
        rows = torch.where(inside, targets - piece.first + piece.start, rows)
    return rows


def over_ranks(statistics: Tensor, group: ProcessGroup | None) -> Tensor:
    """Of each token over the columns of all ranks, from the same over one rank's: one all-gather of 16 bytes a token.

    statistics [ranges + 2, n]: log-sum-exp without the target of each range, logit of the target, largest other logit;
    -inf where a rank has none.
    """
    if group is None:
        return statistics
    gathered = statistics.new_empty((group.size() * len(statistics), *statistics.shape[1:]))
    dist.all_gather_into_tensor(gathered, statistics, group=group)
    gathered = gathered.view(group.size(), *statistics.shape)
    return torch.cat((gathered[:, :-2].logsumexp(dim=0), gathered[:, -2:].amax(dim=0)))
