"""The striped vocabulary tables against whole ones: rows looked up, logits in the order of the ids, gradients."""

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks

from megat2i.parallel.collectives import ALONE, TensorParallel
from megat2i.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead

ROWS, WIDTH, BLOCKS = 24, 5, ((16, 24), (0, 16))  # the second block of the ids lies first on every rank


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(kind, table: torch.Tensor, parallel: TensorParallel):
    module = kind(ROWS, WIDTH, BLOCKS, parallel).double()
    with torch.no_grad():
        module.weight.copy_(module.shard.cut(table))
    return module


def check_embedding(sequence: bool) -> None:
    parallel = TensorParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), sequence)
    ids = torch.tensor([*range(ROWS), 0, 15, 16, 23, 3, 3, 3, 17])  # every row, the blocks' ends, repeated ones
    table = numbers(0, ROWS, WIDTH).requires_grad_()
    weight = numbers(1, len(ids), WIDTH)
    (table[ids] * weight).sum().backward()
    embedding = make(VocabParallelEmbedding, table, parallel)
    out = embedding(ids)
    mine = slice(*parallel.share(len(ids))) if sequence else slice(None)
    torch.testing.assert_close(out, table[ids][mine])
    (out * weight[mine]).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, embedding.shard.cut(table.grad))


def check_head() -> None:
    parallel = TensorParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    table, hidden = numbers(0, ROWS, WIDTH), numbers(1, 2, 3, WIDTH)
    head = make(VocabParallelHead, table, parallel)
    with torch.no_grad():
        logits = head(hidden)
        torch.testing.assert_close(logits, hidden @ table.T)
        for columns in (slice(16, 24), slice(0, 9), slice(3, 20), slice(16, 17)):
            torch.testing.assert_close(head(hidden[:, -1], columns), (hidden[:, -1] @ table.T)[:, columns])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_rows_and_logits_are_those_of_the_whole_tables(ranks):
    def check():
        check_head()
        for sequence in (False, True):
            check_embedding(sequence)

    run_ranks(ranks, check)


@pytest.mark.parametrize("what", ["embedding", "head"])
def test_blocks_in_another_order_are_noticed(what):
    def check():
        build = VocabParallelEmbedding.__base__.__init__

        def other_order(self, rows, width, blocks, parallel):
            build(self, rows, width, blocks, parallel)
            held = self.shard
            if what == "head":
                self.blocks = blocks[::-1]
            else:  # the weights are cut one way and looked up the other
                self.shard = type("Cut", (), {"pieces": held.pieces[::-1], "cut": held.cut})()

        VocabParallelEmbedding.__base__.__init__ = other_order
        check_embedding(False) if what == "embedding" else check_head()

    with pytest.raises(RankError, match="not close"):
        run_ranks(2, check)


def test_every_rank_holds_its_share_of_both_blocks():
    for rank, pieces in enumerate([((16, 18), (0, 4)), ((18, 20), (4, 8)), ((20, 22), (8, 12)), ((22, 24), (12, 16))]):
        assert VocabParallelHead(ROWS, WIDTH, BLOCKS, TensorParallel(None, rank, 4)).shard.pieces == pieces
    assert VocabParallelHead(ROWS, WIDTH, BLOCKS, ALONE).shard.is_whole
    with pytest.raises(ValueError, match="8 does not divide into 16"):
        VocabParallelHead(ROWS, WIDTH, BLOCKS, TensorParallel(None, 0, 16))
