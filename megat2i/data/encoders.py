"""The processes that encode the parts of a job, each with threads that decode for it, and the progress they make.

With a network on CUDA there is one encoder process per device and the workers are its decode threads. Otherwise the
encoder is as busy as the decoder, so every worker is a process of its own with one decode thread, which reads ahead.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path

import torch

from megat2i.data.encode_part import EncodedPart, Encoding, encode_part, open_tokenizers, use_device
from megat2i.data.images import share_turn
from megat2i.data.samples import Part
from megat2i.files import DataFileError
from megat2i.progress import Progress
from megat2i.tokenizers.image import NETWORKS

Job = tuple[Part, Path]  # a part and the prefix of its store


def encode_parts(jobs: Sequence[Job], encoding: Encoding, workers: int) -> Iterator[tuple[int, EncodedPart]]:
    """(number of the job, what was done) as parts are finished. A single process is this one itself."""
    if not jobs:
        return
    devices = torch.cuda.device_count() if open_tokenizers(encoding)[1].kind in NETWORKS else 0
    processes = min(devices or workers, workers, len(jobs))
    threads = -(-workers // processes)
    progress, refused = _Progress([part for part, _ in jobs]), 0
    run = _run_here if processes == 1 else _run_processes
    with progress.bar as bar:
        for number, encoded in run(jobs, encoding, processes, threads, progress):
            refused += encoded.refused
            bar.note(f"{refused:,} refused")
            progress.part_done(jobs[number][0], encoded)
            yield number, encoded


class _Progress:
    """The progress bar. The total is estimated while there are parts (tar shards) whose number is not known."""

    def __init__(self, parts: Sequence[Part]):
        self._known = sum(part.expected for part in parts if part.expected is not None)
        self._unknown = sum(part.expected is None for part in parts)
        self._counted, self._samples = 0, 0
        total = None if self._unknown else self._known
        self.bar = Progress(total, "encoding", "images")

    def part_done(self, part: Part, encoded: EncodedPart) -> None:
        if encoded.kept:
            self.bar.skip(encoded.samples)
        if part.expected is None:
            self._counted, self._samples = self._counted + 1, self._samples + encoded.samples
            estimate = self._known + round(self._samples / self._counted * self._unknown)
            self.bar.total = max(estimate, self.bar.done)


def _run_here(jobs, encoding: Encoding, _: int, threads: int, progress: _Progress):
    for number, (part, prefix) in enumerate(jobs):
        yield number, encode_part(part, prefix, encoding, progress.bar.update, threads)


def _run_processes(jobs, encoding: Encoding, processes: int, threads: int, progress: _Progress):
    context = get_context("spawn")  # the same on every platform; forking a process that has threads is not safe
    shared = context.Value("q", 0), context.Value("i", 0), context.Lock()
    done_samples = shared[0]
    waiting, running, shown, others = iter(enumerate(jobs)), {}, 0, set(active_children())
    with ProcessPoolExecutor(processes, context, _start_worker, shared) as pool:
        try:
            while True:
                for number, (part, prefix) in islice(waiting, 2 * processes - len(running)):
                    running[pool.submit(_work, part, prefix, encoding, threads)] = number
                if not running:
                    return
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                done = done_samples.get_obj().value  # without the lock, which a killed worker may hold for ever
                progress.bar.update(done - shown)
                shown = done
                for future in finished:
                    encoded = future.result()
                    yield running.pop(future), encoded
        except BrokenProcessPool as error:
            remedy = (
                "Often its memory ran out: use fewer --workers. The same command goes on where it was, and refuses a "
                "picture that kills its decoder"
            )
            unfinished = sorted(number for future, number in running.items() if not future.done() or future.exception())
            sources = ", ".join(dict.fromkeys(jobs[number][0].source for number in unfinished[:processes]))
            problem = f"a worker process was killed; under way were parts of {sources}"
            raise DataFileError(jobs[0][1].parent, problem, remedy) from error
        except BaseException:  # an interruption too: do not wait for the parts that are under way
            pool.shutdown(wait=False, cancel_futures=True)
            workers = set(active_children()) - others
            for worker in workers:
                worker.terminate()
            for worker in workers:  # nothing writes any more when the caller lets go of its lock
                worker.join()
            raise


_done_samples = None  # in a worker: the shared number of samples done by all


def _start_worker(done_samples, started, turn) -> None:
    global _done_samples
    _done_samples = done_samples
    share_turn(turn)
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else every worker keeps an idle thread per core
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    use_device(number)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for work forever."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _work(part: Part, prefix: Path, encoding: Encoding, threads: int) -> EncodedPart:
    return encode_part(part, prefix, encoding, _report, threads)


def _report(samples: int) -> None:
    with _done_samples.get_lock():
        _done_samples.value += samples
