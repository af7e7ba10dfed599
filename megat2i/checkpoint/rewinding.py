"""Going back in the middle of a run: to a checkpoint from before a step, and without those that came after it."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megat2i.checkpoint.agreement import together
from megat2i.checkpoint.folder import Checkpoint, committed, remove, step_number
from megat2i.checkpoint.loading import latest, load_engine
from megat2i.checkpoint.saving import finish
from megat2i.optim.engine import Engine


def go_back(
    folder: Path, engine: Engine, before: int, passing: int, report: Callable[[str], None]
) -> Checkpoint | None:
    """Fill ``engine`` from a checkpoint of a step ``before`` one, as ``latest`` chooses it; None where there is none.

    The checkpoints between the two belong to steps that are done again and are removed: a run which is killed now must
    not continue from one of them. Collective; raises CheckpointError.
    """
    finish()
    found = latest(folder, report, before, passing)
    if found is None:
        return None
    load_engine(found, engine)

    def remove_later() -> None:
        for path in committed(folder):
            if found.step < step_number(path) < before:
                remove(path)

    together(lambda: remove_later() if dist.get_rank() == 0 else None, f"cannot remove what follows {found.path}")
    return found
