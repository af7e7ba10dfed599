"""The head on GPUs: exponentials stored by a Triton product's epilogue, gradients by cuBLAS (design in the package).

The offset of a row is the logit of its target (of any column where this rank has no target), so that it follows the
logits wherever they drift. Rows with a logit more than WINDOW above their offset are done again with their largest
logit as offset: the device marks their row tiles, and a second launch finds nothing to do where there are none.
"""

import torch
import triton
from torch import Tensor

from megat2i.kernels.linear_cross_entropy import triton_kernels as kernels
from megat2i.kernels.linear_cross_entropy.columns import over_ranks
from megat2i.kernels.linear_cross_entropy.products import add_product, product
from megat2i.kernels.linear_cross_entropy.tokens import ROW_TILE, Settings, TokenValues, scaled

CHUNK_ROWS = 3840  # at most: 0.51 GB of exponentials in bfloat16 at 66,816 columns
WINDOW = 30.0  # nats; see tokens.FAR
COMBINE_ROWS = 128


class TritonHead:
    """One call's exponentials and gradients; ``hidden`` and ``weight`` both bfloat16 or both float32."""

    def __init__(self, weight: Tensor, settings: Settings):
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"the Triton head computes bfloat16 and float32, not {weight.dtype}; use 'chunked'")
        if max(weight.numel(), CHUNK_ROWS * len(weight)) >= 2**31:
            raise ValueError(f"weight {tuple(weight.shape)} is too large for the Triton head's offsets; use 'chunked'")
        self.weight, self.settings = weight.contiguous(), settings
        self.stored = settings.hidden_gradient or settings.weight_gradient
        self.buffer = weight.new_empty(0)
        tile = kernels.tiles_for(kernels.LOGITS_TILES, weight)["COLUMNS"]
        self.tiles = [triton.cdiv(piece.stop - piece.start, tile) for piece in settings.pieces]

    def rows_at_a_time(self, total: int) -> int:
        """Of ``total``, in chunks of equal size: a short last one would cost as much traffic for the weight."""
        chunks = triton.cdiv(max(total, 1), CHUNK_ROWS)
        return triton.cdiv(max(total, 1), chunks * ROW_TILE) * ROW_TILE

    def statistics(self, hidden: Tensor, local_row: Tensor, own: Tensor, live: Tensor) -> Tensor:
        """[ranges + 2, n] over all ranks' columns (see ``over_ranks``); keeps E for ``differentiate``."""
        pieces, rows = self.settings.pieces, len(hidden)
        self.hidden, self.local_row = hidden.contiguous(), local_row
        if self.stored and self.buffer.shape[0] < rows:
            # the columns are the rows of the weight, so that every piece begins where the weight's does, aligned
            self.buffer = self.weight.new_empty((rows, triton.cdiv(len(self.weight), 8) * 8))
        stand_in = torch.where(local_row >= 0, local_row, pieces[0].start)
        logits = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        width = hidden.shape[1]
        kernels.row_logits[(rows,)](
            self.hidden, self.weight, stand_in, logits, width, self.hidden.stride(0), self.weight.stride(0), BLOCK=1024
        )
        columns = []
        for piece in pieces:
            inside = (local_row >= piece.start) & (local_row < piece.stop)
            column = torch.where(inside, local_row - piece.start, -1)
            computed = own[piece.range] if self.settings.mode == "masked" else live
            columns.append(column.masked_fill(~computed, kernels.DEAD.value).int())
        sums, largest = torch.empty((2, sum(self.tiles), rows), dtype=torch.float32, device=hidden.device)
        self.offset = logits
        again = torch.zeros(triton.cdiv(rows, ROW_TILE), dtype=torch.int32, device=hidden.device)
        self._exponentials(columns, sums, largest, again, redo=False)
        by_range, top = self._combine(sums, largest)
        far = top - logits > WINDOW
        self.offset = torch.where(far, top, logits)
        again = torch.nn.functional.pad(far, (0, -rows % ROW_TILE)).view(-1, ROW_TILE).any(dim=1).int()
        self._exponentials(columns, sums, largest, again, redo=True)
        by_range, top = self._combine(sums, largest)
        target = torch.where(local_row >= 0, logits, float("-inf"))
        return over_ranks(torch.cat((by_range, target[None], top[None])), self.settings.group)

    def _exponentials(self, columns: list[Tensor], sums: Tensor, largest: Tensor, again: Tensor, redo: bool) -> None:
        tiles = kernels.tiles_for(kernels.LOGITS_TILES, self.weight)
        rows, width = self.hidden.shape
        first = 0
        for piece, target, count in zip(self.settings.pieces, columns, self.tiles, strict=True):
            grid = (triton.cdiv(rows, tiles["ROWS"]) * count,)
            kernels.exponentials[grid](
                self.hidden, self.weight[piece.start :], self._part(piece, rows), self.offset, target, sums[first:],
                largest[first:], again, rows, piece.stop - piece.start, width, self.hidden.stride(0),
                self.weight.stride(0), self.buffer.stride(0), STORE=self.stored, REDO=redo, GROUP=8, **tiles,
            )  # fmt: skip
            first += count

    def _combine(self, sums: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp [ranges, n] of each range and the largest logit [n] of all, targets left out."""
        pieces, rows = self.settings.pieces, len(self.hidden)
        by_range = torch.full((len(self.settings.ranges), rows), float("-inf"), device=sums.device)
        top = by_range.clone()
        grid = (triton.cdiv(rows, COMBINE_ROWS),)
        for number in range(len(by_range)):  # pieces stand in the order of their ranges
            before = sum(tiles for piece, tiles in zip(pieces, self.tiles, strict=True) if piece.range < number)
            after = sum(tiles for piece, tiles in zip(pieces, self.tiles, strict=True) if piece.range <= number)
            if before < after:
                kernels.combine[grid](
                    sums, largest, self.offset, by_range[number], top[number], rows, before, after, BLOCK=COMBINE_ROWS
                )
        return by_range, top.amax(dim=0)

    def differentiate(self, values: TokenValues) -> None:
        """Make E's entries at the targets those of the gradient, and ``factor`` what its rows are multiplied by."""
        factor, entry = scaled(values, self.offset)
        self.keep = values.keep
        rows = len(self.hidden)
        place = torch.arange(rows, device=entry.device)
        here, column = self.local_row >= 0, self.local_row.clamp(min=0)
        e = self.buffer[:rows]
        stored = entry.to(e.dtype)
        # where there is no target here, what stands in the column is written again
        e[place, column] = torch.where(here, stored, e[place, column])
        # The entry's rounding goes into the factor, which leaves the target's gradient exact: of flat logits all rows
        # have the same entry, and rounding that is the same for all does not average out. Not where the entry is so
        # small that bfloat16 loses more than a rounding.
        change = entry / stored
        self.factor = torch.where(here & ((change - 1).abs() < 2**-7), factor * change, factor)

    def hidden_gradient(self) -> Tensor:
        """[n, D] in the dtype of the inputs: diag(factor) (E W), summed and scaled in float32."""
        rows, width = self.hidden.shape
        total = None
        if self.keep is not None:
            total = torch.zeros((rows, width), dtype=torch.float32, device=self.hidden.device)
        for piece in self.settings.pieces:
            e, w = self._part(piece, rows), self.weight[piece.start : piece.stop]
            if self.keep is not None:
                tiles = kernels.tiles_for(kernels.HIDDEN_TILES, w)
                grid = (triton.cdiv(width, tiles["WIDTH"]), triton.cdiv(rows, tiles["ROWS"]))
                kernels.hidden_product[grid](
                    e, w, self.keep[:, piece.range].int(), total, rows, len(w), width, e.stride(0), w.stride(0), **tiles
                )
            elif total is None:
                total = product(e, w)
            else:
                add_product(total, e, w)
        return torch.mul(total, self.factor[:, None], out=torch.empty_like(self.hidden))  # without a float32 copy

    def add_weight_gradient(self, hidden: Tensor, total: Tensor, only_chunk: bool) -> None:
        """Add E.T (diag(factor) X) to ``total`` [rows of weight, D] float32."""
        x = torch.mul(hidden, self.factor[:, None], out=torch.empty_like(hidden))
        rows, width = hidden.shape
        for piece in self.settings.pieces:
            e, out = self._part(piece, rows), total[piece.start : piece.stop]
            if self.keep is None:
                add_product(out, e.T, x)
                continue
            kept = self.keep[:, piece.range]
            order = torch.argsort(kept.to(torch.int8), descending=True, stable=True)
            tiles = kernels.tiles_for(kernels.WEIGHT_TILES, x)
            grid = (triton.cdiv(width, tiles["WIDTH"]), triton.cdiv(len(out), tiles["COLUMNS"]))
            kernels.weight_product[grid](
                e, x, order, kept.sum(), out, rows, len(out), width, e.stride(0), x.stride(0), **tiles
            )

    def _part(self, piece, rows: int) -> Tensor:
        """E [rows, columns of the piece]; empty where nothing is stored."""
        return self.buffer[:rows, piece.start : piece.stop] if self.stored else self.buffer
