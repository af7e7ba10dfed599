"""One verdict for all ranks: what fails on one fails on all, and nobody is left waiting in a collective."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megat2i.printable import printable


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


def together(action: Callable[[], None], what: str) -> None:
    """Run ``action`` on every rank; if it fails on any, raise CheckpointError on all. Collective."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:  # whatever it is, the other ranks must hear of it before it is raised
        problem = error
    if not all_ranks(problem is None):
        raise CheckpointError(f"{what}: {problem or 'another rank failed, see its message'}") from problem


def all_ranks(ok: bool) -> bool:
    """Whether ``ok`` holds on every rank. Collective."""
    return not any_rank([not ok])[0]


def any_rank(flags: list[bool]) -> list[bool]:
    """For each flag whether it is set on any rank; as many on every rank. Collective."""
    found = torch.tensor(flags, dtype=torch.uint8, device=device_of_collectives())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, the same on every rank; None where none has. Collective."""
    ranks = dist.get_world_size()
    first = torch.tensor(ranks if problem is None else dist.get_rank(), device=device_of_collectives())
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if first == ranks:
        return None
    return bytes(from_rank(int(first), list((problem or "").encode()))).decode()


def first_rank_decides(verdict: bool) -> bool:
    """The first rank's ``verdict``. Collective: for decisions on sums that ranks may have added in other orders."""
    decided = torch.tensor(int(verdict), device=device_of_collectives())
    dist.broadcast(decided, src=0)
    return bool(decided)


def from_first_rank(numbers: list[int]) -> list[int]:
    """The first rank's ``numbers``; those of the others are ignored. Collective."""
    return from_rank(0, numbers)


def from_rank(source: int, numbers: list[int]) -> list[int]:
    """The ``numbers`` of rank ``source``; those of the others are ignored. Collective."""
    count = torch.tensor([len(numbers)], device=device_of_collectives())
    dist.broadcast(count, src=source)
    values = torch.zeros(int(count.item()), dtype=torch.int64, device=count.device)
    if dist.get_rank() == source:
        values.copy_(torch.tensor(numbers, dtype=torch.int64))
    dist.broadcast(values, src=source)
    return values.tolist()


def device_of_collectives() -> torch.device:
    """Where the tensors of small collectives are."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
