"""The two vocabulary tables, cut over the tensor-parallel ranks so that each holds its share of text and of image rows.

With contiguous cuts one rank would hold all image codes, and nine labels out of ten are image codes. Each rank holds
its part of every block of the table, in the order of ``blocks``: the image block first, whose parts are multiples of
256 rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megat2i.parallel.collectives import TensorParallel, finished, gather_tokens, leave
from megat2i.parallel.layers import ShardedModule
from megat2i.parallel.shard import Shard

Blocks = tuple[tuple[int, int], ...]


class VocabParallelTable(ShardedModule):
    """``weight`` [rows / t, D]: this rank's rows of the table [rows, D], striped over ``blocks`` (start, stop)."""

    def __init__(self, rows: int, width: int, blocks: Blocks, parallel: TensorParallel):
        super().__init__(_striped(rows, width, blocks, parallel))
        self.parallel, self.blocks = parallel, None if parallel.size == 1 else blocks


class VocabParallelEmbedding(VocabParallelTable):
    """Ids [N] -> tokens between layers [N or N / t, D]."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return F.embedding(ids, self.weight)
        row, here = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        offset = 0
        for start, stop in self.shard.pieces:
            inside = (ids >= start) & (ids < stop)
            row = torch.where(inside, ids - start + offset, row)
            here |= inside
            offset += stop - start
        return leave(F.embedding(row, self.weight) * here[:, None], self.parallel)


class VocabParallelHead(VocabParallelTable):
    """The output projection. In training the loss head uses ``weight``; calling it gives all logits."""

    def collect(self, x: Tensor) -> Tensor:
        """Tokens between layers -> all tokens [N, D], the input of the loss head, which sums their gradient itself."""
        return gather_tokens(x, self.parallel)

    def forward(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """[..., D] on every rank -> logits [..., columns], in the order of the ids. Not for training where t > 1."""
        if self.parallel.size == 1:
            return hidden @ self.weight[columns].T
        logits = hidden @ self.weight.T
        by_rank = finished(self.parallel.start_gather(logits[None]))  # [t, ..., rows / t]
        by_block = by_rank.split([(stop - start) // self.parallel.size for start, stop in self.blocks], dim=-1)
        in_order = sorted(range(len(self.blocks)), key=self.blocks.__getitem__)
        return torch.cat([part for number in in_order for part in by_block[number].unbind()], dim=-1)[..., columns]


def _striped(rows: int, width: int, blocks: Blocks, parallel: TensorParallel) -> Shard:
    if parallel.size == 1:
        return Shard.whole((rows, width))
    pieces = []
    for start, stop in blocks:
        low, high = parallel.share(stop - start)
        pieces.append((start + low, start + high))
    return Shard((rows, width), 0, tuple(pieces))
