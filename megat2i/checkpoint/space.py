"""Room for a checkpoint, looked at before a byte of it is written."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megat2i.checkpoint.agreement import CheckpointError, device_of_collectives, first_problem
from megat2i.checkpoint.folder import committed
from megat2i.optim.engine import Fragment
from megat2i.progress import count, size_in_words

VALUE_BYTES = 4  # every value is written as float32


def require_space(folder: Path, name: str, owned: list[Fragment]) -> None:
    """Raises CheckpointError on all ranks where ``folder`` has no room for checkpoint ``name`` of ``owned`` of all.

    Headers and the manifest are not counted: what a checkpoint lacks in the end is still noticed when it is written.
    Collective.
    """
    values = sum(fragment.values.numel() for fragment in owned)
    needed = torch.tensor(VALUE_BYTES * values, dtype=torch.int64, device=device_of_collectives())
    dist.all_reduce(needed)
    problem = _shortage(folder, name, int(needed)) if dist.get_rank() == 0 else None
    problem = first_problem(problem)
    if problem:
        raise CheckpointError(problem)


def _shortage(folder: Path, name: str, needed: int) -> str | None:
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    if free >= needed or not system.f_blocks:  # some file systems do not tell
        return None
    old = committed(folder)
    present = (
        f"{count(len(old), 'checkpoint')} there, {size_in_words(sum(map(_bytes, old)))} in all"
        if old
        else "none is there yet"
    )
    return (
        f"{folder / name} needs {size_in_words(needed)}, and its file system has {size_in_words(free)} free "
        f"({present}): free space there, for instance by fewer training.keep_checkpoints or old checkpoints that you "
        "remove, then continue with --resume"
    )


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
