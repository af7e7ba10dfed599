"""Runs a function on several ranks: forked processes joined by gloo, on one machine, without a port."""

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

GRACE = 3.0  # seconds that the other ranks have to end by themselves once one has failed


class RankError(AssertionError):
    """A rank raised or died; the message holds its traceback."""


def run_ranks(ranks: int, function: Callable[..., Any], *arguments, timeout: float = 120.0) -> list[Any]:
    """``function(*arguments)`` on each of ``ranks`` processes inside a process group; returns their results by rank.

    Forked, so ``function`` may be a closure; results are pickled. Raises RankError where a rank raises, dies or is not
    done after ``timeout`` seconds; no process is left behind.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_child, args=(rank, ranks, folder, pipes[rank][1], function, arguments))
            for rank in range(ranks)
        ]
        try:
            for process, (_, writer) in zip(processes, pipes, strict=True):
                process.start()
                writer.close()
            return _collect([reader for reader, _ in pipes], processes, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(readers: list, processes: list, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    problems: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    waiting = {reader: rank for rank, reader in enumerate(readers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            rank = waiting.pop(reader)
            try:
                succeeded, content = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join()
                succeeded, content = False, f"died with exit code {processes[rank].exitcode}"
            (results if succeeded else problems)[rank] = content
        if problems:
            deadline = min(deadline, time.monotonic() + GRACE)
    for rank in waiting.values():
        problems[rank] = "was still busy and was killed"
    if problems:
        raise RankError("\n".join(f"rank {rank}: {problem}" for rank, problem in sorted(problems.items())))
    return [results[rank] for rank in range(len(readers))]


def _child(rank: int, ranks: int, folder: str, writer, function: Callable, arguments: tuple) -> None:
    import torch.distributed as dist

    # The parent's objects are no garbage of this process: a collection that goes through them copies all their pages,
    # which takes a third of a second, and DeepSpeed's bfloat16 optimizer alone asks for four collections.
    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    # else a rank whose function needs no other may be gone before the others have connected to it
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    try:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        message = (True, function(*arguments))
        dist.destroy_process_group()
    except BaseException:  # whatever ends this process is the parent's to report
        message = (False, traceback.format_exc())
    writer.send_bytes(pickle.dumps(message))
    writer.close()
