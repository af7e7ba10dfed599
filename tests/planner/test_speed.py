"""The time of a step: bubbles against schedules played through, bytes on the links against their formulas."""

from dataclasses import replace

import pytest

from megat2i.config import ModelConfig
from megat2i.pipeline_order import BACKWARD, FORWARD, WEIGHTS, training_order
from megat2i.planner.hardware import GPUS, matmul_seconds, ring_bandwidth
from megat2i.planner.layout import Job, Layout, stages_of
from megat2i.planner.speed import Costs, Work, bubble, rank_parameters, step_time
from megat2i.planner.system import ours

GPU = GPUS["a100-80"]
JOB = Job(ModelConfig(), 66_816, 66_668, 1152, 896)
SYSTEM = ours(JOB.shape, 1)


def played(schedule: str, ranks: int, virtual_stages: int, micro_batches: int, stage_seconds) -> float:
    """Seconds of a step whose messages take no time. ``stage_seconds`` [stage]: of forward, input and weight passes."""
    orders = training_order(schedule, ranks, virtual_stages, micro_batches)
    work = [[a for a in order if a.kind in (FORWARD, BACKWARD, WEIGHTS)] for order in orders]
    finished, clock, stages = {}, [0.0] * ranks, ranks * virtual_stages
    while any(work):
        for rank in range(ranks):
            while work[rank]:
                action = work[rank][0]
                towards = {FORWARD: -1, BACKWARD: 1, WEIGHTS: 0}[action.kind]
                before = action._replace(stage=action.stage + towards)
                if towards and 0 <= before.stage < stages and before not in finished:
                    break
                forward, inputs, weights = stage_seconds[action.stage]
                late = weights if schedule != "zero_bubble" else 0.0
                seconds = {FORWARD: forward, BACKWARD: inputs + late, WEIGHTS: weights}[action.kind]
                clock[rank] = max(clock[rank], finished.get(before, 0.0)) + seconds
                finished[action] = clock[rank]
                work[rank].pop(0)
    return max(clock)


CASES = [
    ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 2), ("zero_bubble", 3),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "virtual_stages"), CASES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_bubble_is_that_of_the_schedule_played_through(schedule, virtual_stages, ranks, rounds):
    stages = ranks * virtual_stages
    job = replace(JOB, shape=replace(JOB.shape, layers=stages), columns=1, global_batch=ranks * rounds)
    layout = Layout(1, ranks, 1, 1, schedule=schedule, virtual_stages=virtual_stages)
    costs = Costs(layer=Work(matmul=3.0), again=Work(), weights=1.0, head=0.0)
    busy = 3.0 * virtual_stages * layout.micro_batches(job)
    seconds = played(schedule, ranks, virtual_stages, layout.micro_batches(job), [(1.0, 1.0, 1.0)] * stages)
    assert bubble(job, layout, costs) == pytest.approx(seconds - busy)


@pytest.mark.parametrize(("schedule", "virtual_stages"), CASES)
def test_uneven_stages_too_within_three_percent_of_the_step(schedule, virtual_stages):
    """The partition leaves stages of 6 and 7 layers, and the last one with a head."""
    layout = Layout(1, 4, 1, 1, schedule=schedule, virtual_stages=virtual_stages)
    job = replace(JOB, global_batch=32)
    stages = stages_of(job, 4 * virtual_stages)
    sizes = [stage.stop - stage.first + 2.54 * stage.head for stage in stages]
    costs = Costs(layer=Work(matmul=3.0), again=Work(), weights=1.0, head=3 * 2.54)
    seconds = played(schedule, 4, virtual_stages, 32, [(size, size, size) for size in sizes])
    busy = max(3 * sum(sizes[rank::4]) for rank in range(4)) * 32
    assert busy + bubble(job, layout, costs) == pytest.approx(seconds, rel=0.03)


def test_a_schedule_without_its_trick_has_a_larger_bubble():
    """Negative control: the four schedules differ, in the order that their papers give."""
    job = replace(JOB, global_batch=32)
    costs = Costs(layer=Work(matmul=3.0), again=Work(), weights=1.0, head=0.0)
    idle = [
        bubble(job, Layout(1, 4, 1, 1, schedule=schedule, virtual_stages=virtual_stages), costs)
        for schedule, virtual_stages in (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2))
    ]
    assert idle == sorted(idle, reverse=True) and idle[0] > 2 * idle[2]


def test_data_parallel_bytes_are_an_all_reduce_and_an_all_gather():
    time = step_time(JOB, Layout(1, 1, 64, 14), SYSTEM, GPU)
    parameters = rank_parameters(JOB, Layout(1, 1, 64, 14), 0)
    assert parameters == 1_507_004_416  # the whole model
    assert time.links.data == pytest.approx(63 / 64 * parameters * (2 * 4 + 2))
    assert time.links.tensor == time.links.pipeline == time.bubble == 0


def test_tensor_parallel_bytes():
    """Two all-reduces of [tokens, hidden] forward, two backward in a layer; embedding and head one each."""
    layout = Layout(4, 1, 16, 7)
    time = step_time(JOB, layout, SYSTEM, GPU)
    all_reduce = 2 * 3 / 4 * (7 * 1152) * 2048 * 2
    assert time.links.tensor == pytest.approx(layout.micro_batches(JOB) * (24 * 4 * all_reduce + 2 * all_reduce))
    # inputs of layers and head are gathered besides: half an all-reduce each
    shared = step_time(JOB, replace(layout, sequence=True), SYSTEM, GPU)
    assert shared.links.tensor == pytest.approx(layout.micro_batches(JOB) * (24 * 5 + 2.5) * all_reduce)
    more = step_time(JOB, replace(layout, recompute="full"), SYSTEM, GPU)
    assert more.links.tensor > time.links.tensor and more.seconds > 1.2 * time.seconds


def test_pipeline_bytes_are_halved_by_two_tensor_parallel_ranks_that_share_the_tokens():
    layout = Layout(2, 4, 8, 2)
    whole = step_time(JOB, layout, SYSTEM, GPU).links.pipeline
    assert whole == 2 * layout.micro_batches(JOB) * (2 * 1152) * 2048 * 2
    assert step_time(JOB, replace(layout, sequence=True), SYSTEM, GPU).links.pipeline == whole / 2


def test_parameters_of_all_ranks_are_the_model_and_copies_of_norms():
    for layout in (Layout(1, 4, 1, 1), Layout(1, 4, 1, 1, schedule="interleaved", virtual_stages=3)):
        assert sum(rank_parameters(JOB, layout, rank) for rank in range(4)) == 1_507_004_416
    norms = 2048 * 2 * (2 * 24 + 1)
    cut = rank_parameters(JOB, Layout(8, 1, 1, 1), 0)
    assert cut == pytest.approx((1_507_004_416 - norms) / 8 + norms)


def test_groups_share_the_cards_of_a_node():
    within = ring_bandwidth(GPU, 8, 1)
    assert ring_bandwidth(GPU, 4, 2) == within == pytest.approx(232.5e9)
    assert ring_bandwidth(GPU, 64, 1) == pytest.approx(8 * 25e9 * 0.85)
    assert ring_bandwidth(GPU, 8, 8) == pytest.approx(25e9 * 0.85)  # one rank on each node
    assert ring_bandwidth(GPU, 8, 8) < ring_bandwidth(GPU, 16, 4) < within


def test_slim_products_are_slower_than_their_flops():
    def rate(rows, inner, columns):
        return 2 * rows * inner * columns / matmul_seconds(GPU, rows, inner, columns)

    assert rate(64, 64, 64) < 0.2 * GPU.peak < rate(8192, 8192, 8192) < GPU.peak * GPU.matmul


def test_the_parts_are_the_step():
    time = step_time(JOB, Layout(2, 2, 16, 7, True, "interleaved", 2, "selective"), SYSTEM, GPU)
    parts = (time.work.seconds, time.recompute, time.bubble, time.pipeline, time.data, time.optimizer)
    assert min(parts) > 0 and time.seconds == pytest.approx(sum(parts))
