"""The schedules played through: dependencies, no rank waits for ever, micro-batches in flight, time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from megat2i.pipeline_order import (
    BACKWARD,
    FORWARD,
    RECEIVE,
    RECEIVE_GRADIENT,
    SEND,
    SEND_GRADIENT,
    WEIGHTS,
    Action,
    evaluation_order,
    peak_in_flight,
    training_order,
)

COMPUTATION = (FORWARD, BACKWARD, WEIGHTS)
RECEIVED_BY = {SEND: RECEIVE, SEND_GRADIENT: RECEIVE_GRADIENT}
# (schedule, ranks, virtual stages, micro-batches)
CASES = [
    ("1f1b", ranks, 1, micro_batches) for ranks in (1, 2, 3, 4, 8) for micro_batches in (1, 2, 3, ranks, 2 * ranks + 1)
]
CASES += [("zero_bubble", *case) for _, *case in CASES]
CASES += [
    (schedule, ranks, virtual_stages, times * ranks)
    for schedule in ("interleaved", "zero_bubble")
    for ranks in (2, 3, 4, 8)
    for virtual_stages in (2, 3, 4)
    for times in (1, 2, 5)
]


@dataclass
class Play:
    """Ranks that go through their lists under the strictest rules: both ends of a message wait for each other.

    At every action its input must be there. ``seen`` by rank: what has been computed, and what has arrived.
    """

    orders: list[list[Action]]
    stages: int
    seen: list[set] = field(default_factory=list)

    def run(self) -> None:
        self.seen = [set() for _ in self.orders]
        position = [0] * len(self.orders)

        def current(rank: int) -> Action | None:
            return self.orders[rank][position[rank]] if position[rank] < len(self.orders[rank]) else None

        moved = True
        while moved:
            moved = False
            for rank in range(len(self.orders)):
                action = current(rank)
                if action is None:
                    continue
                if action.kind in COMPUTATION:
                    self.compute(rank, action)
                elif action.kind in RECEIVED_BY:
                    stage = action.stage + (1 if action.kind == SEND else -1)
                    peer, awaited = (
                        stage % len(self.orders),
                        Action(RECEIVED_BY[action.kind], stage, action.micro_batch),
                    )
                    if current(peer) != awaited:
                        continue
                    produced = FORWARD if action.kind == SEND else BACKWARD
                    assert action._replace(kind=produced) in self.seen[rank], f"rank {rank}: {action} too early"
                    self.seen[peer].add(awaited)
                    position[peer] += 1
                else:
                    continue  # a receive moves with its send
                position[rank] += 1
                moved = True
        assert all(current(rank) is None for rank in range(len(self.orders))), [
            current(rank) for rank in range(len(self.orders))
        ]

    def compute(self, rank: int, action: Action) -> None:
        kind, stage, micro_batch = action
        ranks, seen = len(self.orders), self.seen[rank]
        assert stage % ranks == rank and action not in seen
        if kind == FORWARD:
            before, arrived = stage - 1, RECEIVE
        elif kind == BACKWARD:
            assert action._replace(kind=FORWARD) in seen, f"rank {rank}: {action} before its forward pass"
            before, arrived = stage + 1, RECEIVE_GRADIENT
        else:
            assert action._replace(kind=BACKWARD) in seen, f"rank {rank}: {action} before its backward pass"
            before = None
        if before is not None and 0 <= before < self.stages:
            needed = Action(kind, before, micro_batch) if before % ranks == rank else action._replace(kind=arrived)
            assert needed in seen, f"rank {rank}: {action} without {needed}"
        seen.add(action)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pass_is_made_once_after_what_it_needs_and_no_rank_waits_for_ever(case):
    schedule, ranks, virtual_stages, micro_batches = case
    orders, stages = training_order(*case), ranks * virtual_stages
    Play(orders, stages).run()
    kinds = (FORWARD, BACKWARD, WEIGHTS) if schedule == "zero_bubble" else (FORWARD, BACKWARD)
    for rank, order in enumerate(orders):
        computed = [action for action in order if action.kind in COMPUTATION]
        expected = {
            Action(k, stage, m) for k in kinds for stage in range(rank, stages, ranks) for m in range(micro_batches)
        }
        assert len(computed) == len(expected) and set(computed) == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_evaluation_makes_every_forward_pass_once(ranks, virtual_stages, micro_batches):
    orders = evaluation_order(ranks, virtual_stages, micro_batches)
    Play(orders, ranks * virtual_stages).run()
    computed = [action for order in orders for action in order if action.kind in COMPUTATION]
    everything = {Action(FORWARD, s, m) for s in range(ranks * virtual_stages) for m in range(micro_batches)}
    assert len(computed) == len(everything) and set(computed) == everything


def test_the_play_notices_what_is_wrong():
    def broken(change: Callable[[list[Action]], None]) -> Play:
        orders = training_order("1f1b", 2, 1, 4)
        change(orders[1])
        return Play(orders, 2)

    def swap(kind: str, other: str):
        def change(order: list[Action]) -> None:
            a, b = (next(n for n, action in enumerate(order) if action.kind == wanted) for wanted in (kind, other))
            order[a], order[b] = order[b], order[a]

        return change

    broken(lambda order: None).run()
    with pytest.raises(AssertionError, match="without"):
        broken(swap(FORWARD, RECEIVE)).run()
    with pytest.raises(AssertionError, match="before its forward pass"):
        broken(swap(FORWARD, BACKWARD)).run()
    with pytest.raises(AssertionError, match="too early"):
        broken(swap(SEND_GRADIENT, BACKWARD)).run()
    with pytest.raises(AssertionError, match="receive"):  # the ranks wait for each other

        def receive_all_first(order: list[Action]) -> None:
            order.sort(key=lambda action: action.kind != RECEIVE)

        broken(receive_all_first).run()
    with pytest.raises(AssertionError):
        broken(lambda order: order.pop()).run()


def promised(schedule: str, rank: int, ranks: int, virtual_stages: int, micro_batches: int) -> int:
    """The most micro-batches of one stage that a rank may hold."""
    passes = micro_batches * virtual_stages
    if schedule == "zero_bubble":  # those of 1F1B's first rank, on every rank
        return min(passes, ranks * virtual_stages)
    if virtual_stages > 1:
        return min(passes, 2 * (ranks - 1 - rank) + (virtual_stages - 1) * ranks + 1)
    return min(passes, ranks - rank)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batches_in_flight(case):
    for rank, order in enumerate(training_order(*case)):
        assert peak_in_flight(order) == promised(case[0], rank, *case[1:]), rank
        waiting = most = 0  # what has arrived for a forward pass that is still to be made
        for kind, stage, _ in order:
            waiting += (kind == RECEIVE) - (kind == FORWARD and stage > 0 and case[1] > 1)
            most = max(most, waiting)
        assert most <= case[1], "tensors pile up before a rank"


def makespan(orders: list[list[Action]], ranks: int, virtual_stages: int, times: dict[str, float]) -> float:
    """When the last rank is done, where a stage's pass takes ``times[kind] / virtual_stages`` and sending no time."""
    stages, finished, clock = ranks * virtual_stages, {}, [0.0] * ranks
    queues = [[action for action in order if action.kind in COMPUTATION] for order in orders]
    position = [0] * ranks
    while any(at < len(queue) for at, queue in zip(position, queues, strict=True)):
        for rank, queue in enumerate(queues):
            while position[rank] < len(queue):
                action = queue[position[rank]]
                needed = action._replace(stage=action.stage + {FORWARD: -1, BACKWARD: 1, WEIGHTS: 0}[action.kind])
                waits = action.kind != WEIGHTS and 0 <= needed.stage < stages
                if waits and needed not in finished:
                    break
                start = max(clock[rank], finished[needed] if waits else 0.0)
                clock[rank] = finished[action] = start + times[action.kind] / virtual_stages
                position[rank] += 1
    return max(clock)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_time_of_a_step(ranks, rounds):
    """Forward pass 1, backward pass 2, of which its second half is the weights' gradients."""
    micro_batches = rounds * ranks

    def time(schedule: str, virtual_stages: int) -> float:
        split = schedule == "zero_bubble"
        times = {FORWARD: 1.0, BACKWARD: 1.0 if split else 2.0, WEIGHTS: 1.0}
        orders = training_order(schedule, ranks, virtual_stages, micro_batches)
        return makespan(orders, ranks, virtual_stages, times)

    work, fill = 3.0 * micro_batches, ranks - 1.0
    assert time("1f1b", 1) == work + 3 * fill
    assert time("interleaved", 2) == pytest.approx(work + 3 * fill / 2)
    assert time("interleaved", 4) == pytest.approx(work + 3 * fill / 4)
    assert time("zero_bubble", 1) == work + fill  # ZB-H1: a third of 1F1B's bubble
    for virtual_stages in (2, 4):
        assert time("zero_bubble", virtual_stages) == pytest.approx(work + fill / virtual_stages)


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(ValueError, match="6 micro-batches with virtual stages must be a multiple of 4 ranks"):
        training_order("interleaved", 4, 2, 6)
    assert training_order("1f1b", 4, 1, 6)
