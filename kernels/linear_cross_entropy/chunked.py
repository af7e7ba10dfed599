"""The head in PyTorch operations, a chunk of tokens at a time: the CPU's path, and any device's in float32 and float64.

The logits of a chunk are made in float32 whatever the inputs are, become exponentials in place, then the gradient in
place: one buffer. The offset of a row is the log-sum-exp of its logits but the target's, so that PyTorch's softmax, the
fastest way to exponentials on a CPU, makes them.
"""

import torch
from torch import Tensor

from megat2i.kernels.linear_cross_entropy.columns import over_ranks
from megat2i.kernels.linear_cross_entropy.products import add_product, product
from megat2i.kernels.linear_cross_entropy.tokens import ROW_TILE, Settings, TokenValues

CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MB in float32


class ChunkedHead:
    """One call's logits and gradients; ``hidden`` and ``weight`` of one floating dtype."""

    def __init__(self, weight: Tensor, settings: Settings):
        self.weight, self.settings = weight, settings
        self.sizes = [piece.stop - piece.start for piece in settings.pieces]
        pieces = [weight[piece.start : piece.stop] for piece in settings.pieces]
        # One product over all columns rounds its bfloat16 result once; rows that are not used may hold anything.
        self.rows_used = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        # CPUs multiply into float32 from float32 operands alone; see ``precision``
        kind = weight.dtype if weight.is_cuda else torch.promote_types(weight.dtype, torch.float32)
        self.columns = self.rows_used.to(kind).T

    def rows_at_a_time(self, total: int) -> int:
        """The same on all ranks, whatever share of the ranges each has: every chunk takes part in collectives."""
        group = self.settings.group
        columns = sum(end - start for start, end in self.settings.ranges) // (group.size() if group else 1)
        rows = max(1, CHUNK_ELEMENTS // max(1, columns))
        return rows - rows % ROW_TILE if rows > ROW_TILE else rows

    def statistics(self, hidden: Tensor, local_row: Tensor, own: Tensor, live: Tensor) -> Tensor:
        """[ranges + 2, n] over all ranks' columns (see ``over_ranks``); keeps E for ``gradients``."""
        settings = self.settings
        self.exponentials = e = product(hidden.to(self.columns.dtype), self.columns)
        if settings.mode == "masked":
            for piece, part in zip(settings.pieces, self._parts(e), strict=True):
                part.masked_fill_(~own[piece.range, :, None], float("-inf"))
        here = (local_row >= 0)[:, None]
        self.column = column = self._column(local_row)[:, None]
        target = e.gather(1, column)
        e.scatter_(1, column, target.where(~here, float("-inf")))
        largest = e.amax(dim=1, keepdim=True)
        alone = largest == float("-inf")  # a softmax of nothing is NaN: there, of one logit that is taken out again
        e.scatter_(1, column, torch.where(alone, 0.0, e.gather(1, column)))
        torch.softmax(e, dim=1, out=e)  # a row at a time, and much faster than exp
        self.offset = (largest - e.amax(dim=1, keepdim=True).log()).masked_fill(alone, 0.0)
        e.scatter_(1, column, e.gather(1, column).masked_fill(alone, 0.0))
        target = target.where(here, float("-inf"))
        by_range = e.new_zeros((len(settings.ranges), len(hidden)))
        for piece, part in zip(settings.pieces, self._parts(e), strict=True):
            by_range[piece.range] += part.sum(dim=1)
        statistics = torch.cat((by_range.log() + self.offset.T, target.T, largest.T))
        self.local_row, self.here = local_row, here
        return over_ranks(statistics, settings.group)

    def differentiate(self, values: TokenValues) -> None:
        """Turn E into the gradient to the logits."""
        e = self.exponentials
        e.mul_((values.upstream * (1 + values.slope) * (self.offset[:, 0] - values.lse).exp())[:, None])
        of_target = (values.upstream * values.of_target)[:, None].where(self.here, 0.0)
        e.scatter_(1, self.column, of_target.where(self.here, e.gather(1, self.column)))
        if values.keep is not None:
            for piece, part in zip(self.settings.pieces, self._parts(e), strict=True):
                keep = values.keep[:, piece.range].repeat_interleave(ROW_TILE)[: len(e)]
                part.masked_fill_(~keep[:, None], 0.0)
        self.slots = self._slots(values.keep, len(e))
        self.gradient = e.to(self.weight.dtype)
        # What the target's entry loses to bfloat16, which is all of an error where it is largest: of flat logits every
        # token has the same entry, and rounding that is the same for all does not average out.
        self.lost = of_target - of_target.to(self.weight.dtype) if self.gradient.dtype != e.dtype else None

    def hidden_gradient(self) -> Tensor:
        """[n, D] in the dtype of the inputs or float32."""
        if all(slots is None for slots in self.slots):
            part = self.gradient @ self.rows_used
            if self.lost is None:
                return part
            return self._add_lost(part.to(self.lost.dtype))
        total = torch.zeros((len(self.column), self.weight.shape[1]), dtype=self.offset.dtype)
        for piece, part, slots in zip(self.settings.pieces, self._parts(self.gradient), self.slots, strict=True):
            weight = self.weight[piece.start : piece.stop]
            if slots is None:
                total += product(part, weight)
            elif len(slots):
                total.index_add_(0, slots, product(part[slots], weight))
        return total if self.lost is None else self._add_lost(total)

    def _add_lost(self, total: Tensor) -> Tensor:
        return total.addcmul_(self.lost, self.weight[self.local_row.clamp(min=0)].to(total.dtype))

    def add_weight_gradient(self, hidden: Tensor, total: Tensor, only_chunk: bool) -> None:
        """Add this chunk's part to ``total`` [rows of weight, D] in float32 or better."""
        for piece, part, slots in zip(self.settings.pieces, self._parts(self.gradient), self.slots, strict=True):
            x = hidden
            if slots is not None:
                part, x = part[slots], hidden[slots]
            if only_chunk:  # a result in the dtype of the weight, as it is returned
                total[piece.start : piece.stop] = part.T @ x
            else:
                add_product(total[piece.start : piece.stop], part.T, x)
        if self.lost is not None:
            total.index_add_(0, self.local_row.clamp(min=0), self.lost * hidden)

    def _slots(self, keep: Tensor | None, rows: int) -> list[Tensor | None]:
        """Rows of each piece that have a gradient; None: all, or on a GPU, where asking would wait for the device."""
        if keep is None or keep.is_cuda:
            return [None] * len(self.sizes)
        kept = keep.repeat_interleave(ROW_TILE, dim=0)[:rows]
        of_pieces = [kept[:, piece.range] for piece in self.settings.pieces]
        return [None if rows.all() else rows.nonzero()[:, 0] for rows in of_pieces]

    def _column(self, local_row: Tensor) -> Tensor:
        """Position in the buffer of rows of the weight; 0 for -1."""
        column, offset = torch.zeros_like(local_row), 0
        for piece, size in zip(self.settings.pieces, self.sizes, strict=True):
            inside = (local_row >= piece.start) & (local_row < piece.stop)
            column = torch.where(inside, local_row - piece.start + offset, column)
            offset += size
        return column

    def _parts(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Views of [n, columns of this rank], one for each piece."""
        return columns.split(self.sizes, dim=1)
