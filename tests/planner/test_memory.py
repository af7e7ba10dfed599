"""The memory model: what autograd really keeps, what schedules really hold, what DeepSpeed's optimizer holds."""

from dataclasses import replace

import pytest
from meta_block import BATCH, CHANGES, SHAPE, TOKENS, block_model, saved_bytes

from megat2i.config import ModelConfig
from megat2i.pipeline_order import BACKWARD, FORWARD, WEIGHTS, peak_in_flight, training_order
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job, Layout
from megat2i.planner.memory import Memory, copies_bytes, head_bytes, layer_bytes, memory, peak, rank_memory

JOB = Job(ModelConfig(), 66_816, 66_668, 1152, 896)


def layer_kept(shape: ModelConfig, recompute: str, apart: bool = False) -> int:
    one, two = (saved_bytes(block_model(replace(shape, layers=layers), recompute, apart)) for layers in (1, 2))
    return two - one


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_layer_keeps_what_autograd_saves(recompute, change):
    shape = replace(SHAPE, **change)
    predicted = TOKENS * layer_bytes(shape, Layout(1, 1, 1, BATCH, recompute=recompute))
    assert layer_kept(shape, recompute) == pytest.approx(predicted, rel=0.01)


def test_queries_and_keys_normed_over_several_ranks_keep_more():
    shape = replace(SHAPE, qk_norm=True)
    alone, shared = (copies_bytes(shape, tensor) * tensor for tensor in (1, 2))
    predicted = TOKENS * (layer_bytes(shape, Layout(1, 1, 1, BATCH)) + shared - alone)
    assert layer_kept(shape, "none", apart=True) == pytest.approx(predicted, rel=0.01)


def test_the_measurement_tells_what_is_kept_apart():
    """Negative control: each prediction is of its own case only."""
    shapes = [replace(SHAPE, **change) for change in ({}, {"kv_heads": 1}, {"feed_forward": "gelu"})]
    predicted = {
        layer_bytes(shape, Layout(1, 1, 1, BATCH, recompute=recompute))
        for shape in shapes
        for recompute in ("none", "selective", "full")
    }
    assert len(predicted) == 7  # "full" keeps the input alone
    ordered = sorted(predicted)
    assert all(larger / smaller > 1.02 for smaller, larger in zip(ordered, ordered[1:], strict=False))


def test_tensor_parallelism_cuts_all_but_norms_and_sequence_parallelism_these_too():
    whole = layer_bytes(SHAPE, Layout(1, 1, 1, 4))
    assert layer_bytes(SHAPE, Layout(4, 1, 1, 4, sequence=True)) == pytest.approx(whole / 4)
    norms = 2 * 4 * 128
    assert layer_bytes(SHAPE, Layout(4, 1, 1, 4)) == pytest.approx((whole - norms) / 4 + norms)


@pytest.mark.parametrize(
    ("schedule", "virtual_stages"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1)]
)
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_what_is_in_flight_is_what_the_schedule_promises(schedule, virtual_stages, ranks):
    """With equal stages of one layer, and what waits for weight gradients as large as what was kept."""
    shape = replace(JOB.shape, layers=ranks * virtual_stages)
    for micro_batches in (ranks, 2 * ranks, 8 * ranks):
        job = replace(JOB, shape=shape, columns=1, global_batch=micro_batches)
        layout = Layout(1, ranks, 1, 1, schedule=schedule, virtual_stages=virtual_stages)
        orders = training_order(schedule, ranks, virtual_stages, micro_batches)
        for rank in range(ranks):
            held, beside = peak(job, layout, rank, kept=1.0, deferred=1.0, layer=0.0, head=0.0)
            assert (held, beside) == (peak_in_flight(orders[rank]), 0.0)
            if schedule == "1f1b":
                assert held == ranks - rank


def test_the_head_counts_where_it_is_and_when_it_works():
    layout = Layout(1, 2, 1, 1)
    assert peak(JOB, layout, 0, kept=1.0, deferred=1.0, layer=0.5, head=100.0)[1] == 0.5
    assert peak(JOB, layout, 1, kept=1.0, deferred=1.0, layer=0.5, head=100.0)[1] == 100.0


@pytest.mark.parametrize(("schedule", "virtual_stages"), [("1f1b", 1), ("interleaved", 3), ("zero_bubble", 2)])
def test_the_head_s_gradients_wait_for_nothing(schedule, virtual_stages):
    """They are made in its forward pass: no other micro-batch is computed before its backward pass uses them."""
    order = training_order(schedule, 4, virtual_stages, 16)[3]
    work = [action for action in order if action.kind in (FORWARD, BACKWARD, WEIGHTS)]
    heads = [number for number, action in enumerate(work) if action[:2] == (FORWARD, 4 * virtual_stages - 1)]
    assert len(heads) == 16
    for number in heads:
        assert work[number + 1] == work[number]._replace(kind=BACKWARD)


def test_what_the_head_holds():
    """Its table's gradient in float32, and a chunk of exponentials or the scaled gradients."""
    tokens, table = 14 * 1152, 66_816 * 2048
    states, chunk = 2 * tokens * 2048 * 3, 3840 * (2 * 66_816 + 8 * 2048)
    assert head_bytes(JOB, Layout(1, 1, 64, 14)) == pytest.approx(states + 4 * table + chunk)
    wide = replace(JOB, shape=replace(JOB.shape, hidden=8192))
    states, table = 4 * states, 4 * table
    assert head_bytes(wide, Layout(1, 1, 64, 14)) == pytest.approx(states + 4 * table + 2 * table + states / 3)


def test_what_the_optimizer_holds():
    """ZeRO-1: weights 2, float32 gradients 4 on every rank, master and moments 12 over the data-parallel ranks."""
    parameters = 1_507_004_416
    held = rank_memory(JOB, Layout(1, 1, 64, 14), 0)
    assert (held.weights, held.gradients, held.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters / 64)
    assert held.activations == 14 * 1152 * 24 * layer_bytes(JOB.shape, Layout(1, 1, 64, 14))
    alone = rank_memory(JOB, Layout(1, 1, 1, 14), 0)
    assert alone.optimizer == 64 * held.optimizer
    assert rank_memory(JOB, Layout(1, 1, 64, 1, recompute="full"), 0).buffers > 0 == held.buffers


def test_the_fullest_rank_counts():
    layout = Layout(1, 4, 16, 2)
    ranks = [rank_memory(JOB, layout, rank).total for rank in range(4)]
    assert memory(JOB, layout).total == max(ranks) > min(ranks)


def test_what_does_not_fit():
    held = Memory(40e9, 30e9, 0.0, 9.5e9, 0.0, 0.0, 0.0)
    assert held.fits(GPUS["a100-80"]) and not replace(held, head=1e9).fits(GPUS["a100-80"])
    assert not held.fits(GPUS["a100-40"])
