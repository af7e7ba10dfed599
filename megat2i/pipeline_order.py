"""In which order each pipeline rank works: forward and backward passes of its stages, and when tensors travel.

Stage s lives on rank s modulo the number of ranks P; with V virtual stages a rank holds s = r, r + P, r + 2P, ...

- 1F1B (Narayanan et al. 2019, "PipeDream-2BW"; V = 1): after P - 1 - r forward passes, one forward, one backward.
- Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): V > 1 divides the bubble by V.
- Zero bubble (Qi et al. 2023, arXiv 2401.10241, its ZB-H1): a backward pass leaves the gradients of the layers' weights
  for later, rank r delays them by r micro-batches, and they fill the bubble at the end.
"""

from typing import NamedTuple

FORWARD, BACKWARD, WEIGHTS = "forward", "backward", "weights"
SEND, RECEIVE = "send", "receive"  # of what a forward pass leaves behind
SEND_GRADIENT, RECEIVE_GRADIENT = "send gradient", "receive gradient"

SCHEDULES = ("1f1b", "interleaved", "zero_bubble")


class Action(NamedTuple):
    """One thing that a rank does for one micro-batch of one stage (numbered over all ranks)."""

    kind: str
    stage: int
    micro_batch: int


def training_order(schedule: str, ranks: int, virtual_stages: int, micro_batches: int) -> list[list[Action]]:
    """What every rank does in one step, communication included. Raises ValueError where it cannot be scheduled."""
    if virtual_stages > 1 and micro_batches % ranks:
        raise ValueError(f"{micro_batches} micro-batches with virtual stages must be a multiple of {ranks} ranks")
    computation = [_rank_order(schedule, rank, ranks, virtual_stages, micro_batches) for rank in range(ranks)]
    return _with_communication(computation, ranks, ranks * virtual_stages)


def evaluation_order(ranks: int, virtual_stages: int, micro_batches: int) -> list[list[Action]]:
    """Forward passes only."""
    computation = [
        [Action(FORWARD, stage, m) for m in range(micro_batches) for stage in range(r, ranks * virtual_stages, ranks)]
        for r in range(ranks)
    ]
    return _with_communication(computation, ranks, ranks * virtual_stages)


def peak_in_flight(order: list[Action]) -> int:
    """The most micro-batches (of one stage each) whose activations a rank holds at once."""
    held, peak = 0, 0
    split = any(action.kind == WEIGHTS for action in order)
    for action in order:
        held += (action.kind == FORWARD) - (action.kind == (WEIGHTS if split else BACKWARD))
        peak = max(peak, held)
    return peak


def _rank_order(schedule: str, rank: int, ranks: int, virtual_stages: int, micro_batches: int) -> list[Action]:
    groups = [range(start, min(start + ranks, micro_batches)) for start in range(0, micro_batches, ranks)]
    stages = range(rank, ranks * virtual_stages, ranks)
    forward = [Action(FORWARD, stage, m) for group in groups for stage in stages for m in group]
    backward = [Action(BACKWARD, stage, m) for group in groups for stage in reversed(stages) for m in group]
    ahead = ranks - 1 - rank
    if virtual_stages > 1:
        # zero bubble keeps activations longer, so it starts fewer passes ahead to hold as many in all
        ahead = ahead * (1 if schedule == "zero_bubble" else 2) + (virtual_stages - 1) * ranks
    delay = rank if schedule == "zero_bubble" else 0
    order, done = forward[:ahead], 0
    ahead = len(order)
    for number, back in enumerate(backward):
        order += forward[ahead + number : ahead + number + 1]
        order.append(back)
        if schedule == "zero_bubble" and number >= delay:
            order.append(backward[done]._replace(kind=WEIGHTS))
            done += 1
    if schedule == "zero_bubble":
        order += [back._replace(kind=WEIGHTS) for back in backward[done:]]
    return order


def _with_communication(computation: list[list[Action]], ranks: int, stages: int) -> list[list[Action]]:
    """Adds sends and receives where one global order of events puts them.

    The ranks' work is played through, each action taking one tick. Where an action makes a tensor for another rank, its
    send and its receive are noted on both ranks at that point. Every rank's list is what it sees of one common order,
    so the ranks cannot wait for each other in a circle, even where a link carries its messages strictly in turn.
    """
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    position, seen = [0] * ranks, set()
    while any(at < len(actions) for at, actions in zip(position, computation, strict=True)):
        now = [
            actions[at]
            for at, actions in zip(position, computation, strict=True)
            if at < len(actions) and _needs(actions[at], stages) <= seen
        ]
        if not now:
            raise ValueError(f"the schedule stops at {[a[p] for a, p in zip(computation, position, strict=True)]}")
        for action in now:
            rank = action.stage % ranks
            position[rank] += 1
            orders[rank].append(action)
            seen.add(action)
            target = action.stage + {FORWARD: 1, BACKWARD: -1, WEIGHTS: 0}[action.kind]
            if 0 <= target < stages and target % ranks != rank:
                send, receive = (SEND, RECEIVE) if action.kind == FORWARD else (SEND_GRADIENT, RECEIVE_GRADIENT)
                orders[rank].append(action._replace(kind=send))
                orders[target % ranks].append(Action(receive, target, action.micro_batch))
    return orders


def _needs(action: Action, stages: int) -> set[Action]:
    """What must have happened before ``action``."""
    kind, stage, m = action
    if kind == FORWARD:
        return {Action(FORWARD, stage - 1, m)} if stage else set()
    if kind == WEIGHTS:
        return {Action(BACKWARD, stage, m)}
    return {Action(FORWARD, stage, m)} | ({Action(BACKWARD, stage + 1, m)} if stage + 1 < stages else set())
