"""Training batches do not depend on the number of ranks, resume by arithmetic, and cover every row once an epoch."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from megat2i.data.batches import Sample, TrainingData, evaluation_batches
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.kernels import LiveTokens
from megat2i.vocab import IGNORE, VocabLayout

VOCAB = VocabLayout(300, 64)


@pytest.fixture
def dataset(store):
    return T2IDataset(store, VOCAB, 20, caption_dropout=0.3, seed=11)


@pytest.fixture
def second(tmp_path, write_store, make_documents):
    write_store(tmp_path / "second", make_documents(10, seed=5))
    return T2IDataset(tmp_path / "second", VOCAB, 20)


def global_batch(data: TrainingData, step: int, dp_size: int, micro_batch_size: int):
    """The rows of a step as all ranks together see them: (samples, tokens, labels, modality, text cut)."""
    batches = [b for rank in range(dp_size) for b in data.micro_batches(step, rank, dp_size, micro_batch_size)]
    assert all(len(batch.samples) == len(batch.tokens) == micro_batch_size for batch in batches)
    joined = [torch.cat([getattr(b, field) for b in batches]) for field in ("tokens", "labels", "modality")]
    return [sample for batch in batches for sample in batch.samples], *joined, sum(b.text_cut for b in batches)


def same(left, right) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True))


def test_rows_do_not_depend_on_the_number_of_ranks(dataset, second):
    data = TrainingData([(dataset, 0.7), (second, 0.3)], seed=1, global_batch_size=8)
    for step in range(20):
        alone = global_batch(data, step, 1, 8)
        assert alone[0] == data.samples(step)
        for dp_size, micro_batch_size in ((1, 1), (2, 4), (2, 2), (4, 2), (4, 1), (8, 1)):
            assert same(global_batch(data, step, dp_size, micro_batch_size), alone)
    # Controls: another step, seed or batch size gives other rows, and so does a wrong share of a rank.
    assert not same(alone, global_batch(data, 0, 1, 8))
    assert not same(alone, global_batch(TrainingData([(dataset, 0.7), (second, 0.3)], 2, 8), 19, 1, 8))
    strided = [sample for rank in range(2) for sample in data.samples(19)[rank::2]]
    assert strided != alone[0]


def test_batches_are_the_rows_of_the_datasets(dataset, second):
    data = TrainingData([(dataset, 2), (second, 1)], seed=3, global_batch_size=6)
    for step in range(12):
        for batch in data.micro_batches(step, 1, 2, 3):
            assert (batch.tokens.dtype, batch.labels.dtype, batch.modality.dtype) == (
                torch.int64,
                torch.int64,
                torch.int8,
            )
            rows = [data.datasets[sample.dataset].row(sample.row, sample.epoch) for sample in batch.samples]
            for field in ("tokens", "labels", "modality"):
                assert torch.equal(getattr(batch, field), torch.from_numpy(np.stack([getattr(r, field) for r in rows])))
            assert batch.text_cut == sum(row.text_cut for row in rows)


def test_resuming_gives_the_same_steps(store):
    """A new process has new objects and asks for step k first."""

    def fresh():
        return TrainingData([(T2IDataset(store, VOCAB, 20, caption_dropout=0.3), 1.0)], seed=4, global_batch_size=4)

    uninterrupted = fresh()
    steps = [global_batch(uninterrupted, step, 2, 2) for step in range(15)]
    resumed = fresh()
    assert all(same(global_batch(resumed, step, 4, 1), steps[step]) for step in range(7, 15))
    assert not same(global_batch(resumed, 7, 4, 1), steps[8])  # control


def test_an_epoch_covers_every_row_once(dataset):
    data = TrainingData([(dataset, 1.0)], seed=0, global_batch_size=5)  # 23 rows: epochs do not end with a step
    samples = [sample for step in range(23) for sample in data.samples(step)]
    assert [sample.epoch for sample in samples] == [position // 23 for position in range(115)]
    orders = [tuple(sample.row for sample in samples[start : start + 23]) for start in range(0, 115, 23)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len(set(orders)) == 5 and tuple(range(23)) not in orders
    assert sorted(sample.row for sample in samples[1:24]) != list(range(23))  # control: a shifted window


def test_blend_proportions_and_epochs_per_dataset(dataset, second):
    data = TrainingData([(dataset, 0.7), (second, 0.3)], seed=0, global_batch_size=10)
    samples = [sample for step in range(23) for sample in data.samples(step)]
    assert all(Counter(s.dataset for s in data.samples(step)) == {0: 7, 1: 3} for step in range(23))
    for number, length in ((0, 23), (1, 10)):
        mine = [sample for sample in samples if sample.dataset == number]
        assert len(mine) == {0: 161, 1: 69}[number]
        for start in range(0, len(mine) - length + 1, length):
            epoch = mine[start : start + length]
            assert sorted(sample.row for sample in epoch) == list(range(length))
            assert {sample.epoch for sample in epoch} == {start // length}


def test_caption_dropout_follows_the_sample(dataset):
    """The same (epoch, sample) has the same caption in whatever batch, rank or seed of the order it turns up."""
    captions = {}
    for seed, batch_size in ((0, 4), (1, 6), (2, 23)):
        data = TrainingData([(dataset, 1.0)], seed, batch_size)
        for step in range(3 * 23 // batch_size):
            for batch in data.micro_batches(step, 0, 1, 1):
                captions.setdefault(batch.samples[0], set()).add(batch.tokens[0, 2:5].numpy().tobytes())
    assert all(len(seen) == 1 for seen in captions.values())
    dropped = Counter(
        sample.row
        for sample, seen in captions.items()
        if VOCAB.special("</text>") == np.frombuffer(next(iter(seen)), np.int64)[0]
    )
    assert 5 < sum(dropped.values()) < 0.7 * len(captions)
    assert len({epoch for _, epoch, row in captions if row == 0}) == 3  # control: several epochs were compared


def test_golden_order(dataset):
    """Pinned: the rows of a step are part of what a run is."""
    data = TrainingData([(dataset, 1.0)], seed=1234, global_batch_size=6)
    assert [sample.row for sample in data.samples(0)] == [8, 15, 12, 2, 14, 19]


def test_bad_arguments(dataset, store):
    data = TrainingData([(dataset, 1.0)], seed=0, global_batch_size=12)
    for arguments, message in (
        ((0, 0, 5, 1), "global_batch_size 12 is not a multiple of 5 data-parallel ranks x .* 1"),
        ((0, 0, 2, 4), "not a multiple of 2 data-parallel ranks x .* 4"),
        ((0, 2, 2, 1), "data-parallel rank 2 of 2"),
        ((0, -1, 2, 1), "data-parallel rank -1"),
        ((0, 0, 2, 0), "micro-batches of 0 rows"),
        ((-1, 0, 2, 1), "step -1"),
    ):
        with pytest.raises(ValueError, match=message):
            data.micro_batches(*arguments)
    with pytest.raises(ValueError, match="global_batch_size is 0"):
        TrainingData([(dataset, 1.0)], 0, 0)
    with pytest.raises(ValueError, match="one positive number per dataset"):
        TrainingData([], 0, 4)
    with pytest.raises(ValueError, match="differ in sequence length"):
        TrainingData([(dataset, 1.0), (T2IDataset(store, VOCAB, 21), 1.0)], 0, 4)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 23), (1, 5), (2, 4), (4, 2), (4, 8), (8, 1)])
@pytest.mark.parametrize("rows", [None, 1, 16])
def test_evaluation_sees_every_row_once_in_file_order(dataset, dp_size, micro_batch_size, rows):
    per_rank = [list(evaluation_batches(dataset, rank, dp_size, micro_batch_size, rows)) for rank in range(dp_size)]
    assert len({len(batches) for batches in per_rank}) == 1  # collectives need the same number on every rank
    in_order = [batches[number] for number in range(len(per_rank[0])) for batches in per_rank]
    samples = [sample for batch in in_order for sample in batch.samples]
    assert samples == [Sample(0, None, row) for row in range(rows or 23)]
    for batch in in_order:
        assert batch.tokens.shape == batch.labels.shape == batch.modality.shape == (micro_batch_size, 20)
        for at, sample in enumerate(batch.samples):
            row = dataset.row(sample.row, None)
            assert np.array_equal(batch.tokens[at], row.tokens) and np.array_equal(batch.labels[at], row.labels)
            assert np.array_equal(batch.modality[at], row.modality)
        padding = slice(len(batch.samples), None)
        assert (batch.tokens[padding] == VOCAB.special("<pad>")).all()
        assert (batch.labels[padding] == IGNORE).all() and (batch.modality[padding] == -1).all()


def test_evaluation_drops_no_caption(store, pairs):
    dataset = T2IDataset(store, VOCAB, 30, caption_dropout=1.0)
    (batch,) = evaluation_batches(dataset, 0, 1, 23)
    assert all(
        row[2 : 2 + len(text)].tolist() == text.tolist() for row, (text, _) in zip(batch.tokens, pairs, strict=True)
    )
    assert (dataset.row(0, 0).tokens[2] == VOCAB.special("</text>")) and len(pairs[0][0])  # control: training does


def test_evaluation_arguments_are_checked_at_the_call(dataset):
    for arguments, message in (
        ((2, 2, 1), "rank 2 of 2"),
        ((0, 1, 0), "micro-batches of 0"),
        ((0, 1, 1, 24), "24 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation_batches(dataset, *arguments)
    assert len(list(islice(evaluation_batches(dataset, 0, 1, 1), 5))) == 5


def test_room_for_the_labels_of_a_micro_batch(dataset):
    """The capacity follows the data's average, in whole tiles; what does not fit is told as nothing."""
    labels = [int((dataset.row(number, None).labels != IGNORE).sum()) for number in range(len(dataset))]
    assert dataset.mean_labels == pytest.approx(np.mean(labels))
    data = TrainingData([(dataset, 1.0)], 0, 20)
    (batch,) = data.micro_batches(0, 0, 1, 20)
    assert batch.live_capacity == min(20 * 20, 128 * (-(-int(20 * np.mean(labels) * 1.02) // 128) + 1))
    found = LiveTokens.collect(batch.modality, batch.live_capacity)
    places = found.order[found.order >= 0]
    assert sorted(places.tolist()) == (batch.labels.flatten() != IGNORE).nonzero().flatten().tolist()
    assert found.count == len(places) and len(found.order) == batch.live_capacity
    assert LiveTokens.collect(batch.modality, found.count - 1) is None
    assert batch.to(torch.device("cpu")).live is None
