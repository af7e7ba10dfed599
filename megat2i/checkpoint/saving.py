"""Saving: every rank writes what it owns, the first one commits; at once, or in the background of the training.

In the background the training stands still for a copy of the state to host memory only. A thread of each rank then
writes and fsyncs its file and its listing; another one on the first rank commits once all listings are there. Threads
make no collective calls: what became of a save is agreed on at the next one, or by ``finish``.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megat2i.checkpoint.agreement import CheckpointError, together
from megat2i.checkpoint.folder import committed, listing, remove, step_number, write_manifest, write_rank
from megat2i.files import fsync_folder
from megat2i.optim.engine import Engine, Fragment

POLL = 0.05  # seconds between two looks for the other ranks' listings


@dataclass(frozen=True)
class Saved:
    """Where a checkpoint is, or will be, and how long the training stood still for it.

    ``stall_s``: seconds in all, of which ``waited_s`` for the end of the save before.
    """

    path: Path
    waited_s: float
    stall_s: float


def save(
    folder: Path,
    step: int,
    engine: Engine,
    layout: str,
    keep: int,
    background: bool = False,
    *,
    keep_every: int = 0,
    training: dict | None = None,
    fence: Callable[[], None] = lambda: None,
) -> Saved:
    """Write ``folder/step-N`` from all ranks; drop all but the newest ``keep`` and the multiples of ``keep_every``.

    ``training``: state of the loop beside that of the engine, as JSON has it. ``fence``: called on the first rank just
    before the commit; it ends the process where the folder is another launch's by now.

    Collective. If any rank fails, every rank raises CheckpointError and what was committed before stays. With
    ``background`` it returns once the state is copied; the checkpoint is safe when the next ``save`` or ``finish``
    returns, and those raise where it failed. One save is under way at most: the next one waits for its end.
    """
    started = time.perf_counter()
    finish()
    waited = time.perf_counter() - started
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.writing"
    rank, ranks = dist.get_rank(), dist.get_world_size()
    together(lambda: _prepare(temporary) if rank == 0 else None, f"cannot create {temporary}")
    content = {
        "step": step,
        "optimizer_updates": engine.updates,
        "written_by": {"layout": layout, "ranks": ranks, "engine": type(engine).__name__},
        "training": training or {},
    }

    def commit() -> None:
        _commit(temporary, final, ranks, content, keep, keep_every, fence)
        _BACKGROUND.took(time.perf_counter() - started - waited)

    if background:
        copies: list[Fragment] = []
        together(lambda: copies.extend(_BACKGROUND.copied(_owned(engine))), "cannot copy the state to host memory")
        _BACKGROUND.start(copies, temporary, final, commit)
    else:
        together(lambda: write_rank(temporary, rank, _owned(engine)), f"cannot write {temporary}")
        together(lambda: commit() if rank == 0 else None, f"cannot commit {final}")
        _BACKGROUND.took(time.perf_counter() - started - waited)
    return Saved(final, waited, time.perf_counter() - started)


def finish() -> None:
    """Wait for the save in the background, if there is one. Collective; raises CheckpointError where it failed."""
    _BACKGROUND.finish()


def longest_save() -> float:
    """Seconds that the slowest save of this process took, from its beginning to its commit; 0 before there was one.

    Those in the background count on the first rank only, which commits them.
    """
    return _BACKGROUND.longest_s


class _Background:
    """The one save that may be under way in this process, and the host memory that every save uses again."""

    def __init__(self):
        self._memory: dict[tuple[str, str, int, int], Tensor] = {}
        self._under_way: tuple[Path, Path] | None = None  # temporary and final folder
        self.longest_s = 0.0

    def took(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)

    def copied(self, owned: list[Fragment]) -> list[Fragment]:
        """The fragments with copies of their values in host memory; those of the save before are overwritten."""
        before, self._memory, copies = self._memory, {}, []
        for fragment in owned:
            key = (fragment.kind, fragment.name, fragment.start, fragment.values.numel())
            memory = before.get(key)
            if memory is None:
                memory = torch.empty(fragment.values.shape, pin_memory=fragment.values.is_cuda)
            self._memory[key] = memory.copy_(fragment.values, non_blocking=True)
            copies.append(replace(fragment, values=memory))
        if any(fragment.values.is_cuda for fragment in owned):
            torch.cuda.synchronize()
        return copies

    def start(self, copies: list[Fragment], temporary: Path, final: Path, commit: Callable[[], None]) -> None:
        """Begin to write ``copies``; on the first rank ``commit`` follows when every rank has listed its parts."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self._under_way, self._given_up = (temporary, final), threading.Event()
        self._file = _in_thread(partial(write_rank, temporary, rank, copies))
        listings = [listing(temporary, number) for number in range(ranks)]
        self._committed = _in_thread(partial(_when_all_exist, listings, self._given_up, commit)) if rank == 0 else None

    def finish(self) -> None:
        """See the module's ``finish``. That a rank died is noticed by the collective, which waits for no listing."""
        if self._under_way is None:
            return
        (temporary, final), self._under_way = self._under_way, None
        try:
            together(self._file.result, f"cannot write {temporary}")
        except BaseException:
            self._given_up.set()
            if self._committed:
                self._committed.exception()  # waits: nothing of this save goes on behind the next one's back
            raise
        together(lambda: self._committed.result() if self._committed else None, f"cannot commit {final}")


_BACKGROUND = _Background()


def _when_all_exist(files: list[Path], given_up: threading.Event, action: Callable[[], None]) -> None:
    while not all(file.exists() for file in files):
        if given_up.wait(POLL):
            raise CheckpointError("a rank could not write its part")
    action()


def _in_thread(action: Callable[[], None]) -> Future:
    """Run ``action`` in a thread that does not keep a process alive which ends without ``finish``."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except Exception as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _owned(engine: Engine) -> list[Fragment]:
    return [fragment for fragment in engine.fragments() if fragment.written]


def _prepare(temporary: Path) -> None:
    for pattern in ("step-*.writing", "step-*.removing"):  # left by killed attempts
        for leftover in temporary.parent.glob(pattern):
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)


def _commit(
    temporary: Path, final: Path, ranks: int, content: dict, keep: int, keep_every: int, fence: Callable[[], None]
) -> None:
    write_manifest(temporary, ranks, content)
    fence()
    remove(final)  # a damaged attempt at the same step: a sound one would have been resumed
    os.rename(temporary, final)
    fsync_folder(final.parent)
    # Only steps up to this one: what is newer was found damaged and must not push out what is sound.
    for old in [path for path in committed(final.parent) if step_number(path) <= content["step"]][keep:]:
        if keep_every == 0 or step_number(old) % keep_every:
            remove(old)
