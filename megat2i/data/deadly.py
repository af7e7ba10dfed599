"""Pictures whose decoding ends the process: found by what a killed run left, tried alone, and refused.

Limits on images keep decoders from dying of memory, but a decoder may have faults, and a machine less memory than we
think. So every part keeps a small file of the samples that are being decoded. A process that dies leaves it behind, and
the next run of the part decodes those samples in a process of its own first: only what ends that one too is refused, so
a run that was interrupted over a good picture writes the bytes of one that was not.
"""

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue

from megat2i.data.samples import Part, Refused, Sample
from megat2i.files import storage_errors, store_path, write_file

Decode = Callable[[Iterable[tuple[int, Sample | Refused]]], object]  # of numbered samples; must be picklable

NUMBER_BYTES = 8
PROCESSOR_SECONDS = 120  # that a picture may take alone; the limits on images keep it below 10
TRIES = 2  # a sample is refused when so many trials took the whole job along


class DecodingGuard:
    """Notes which samples of a part are being decoded, in the file PREFIX.underway, and knows which must not be.

    ``reasons`` to refuse samples, by their numbers. A context manager: a file that is left says that the process died.
    """

    def __init__(self, part: Part, prefix: Path, fingerprint: str, threads: int, decode: Decode):
        """Tries what a killed run of ``part`` left, by ``decode``. ``fingerprint``: of all that decides the pixels."""
        self.reasons = _deadly_samples(part, prefix, fingerprint, decode)
        self._path, self._record_path = _under_way_path(prefix), _record_path(prefix)
        self._slots: SimpleQueue[int] = SimpleQueue()
        head = _digest(fingerprint)
        for slot in range(threads):
            self._slots.put(len(head) + slot * NUMBER_BYTES)
        with storage_errors(self._path):
            self._file = os.open(self._path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
            os.write(self._file, head + bytes(threads * NUMBER_BYTES))

    def __enter__(self) -> "DecodingGuard":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    @contextmanager
    def decoding(self, number: int) -> Iterator[None]:
        """Note the sample ``number`` while the block runs."""
        slot = self._slots.get()
        os.pwrite(self._file, (number + 1).to_bytes(NUMBER_BYTES), slot)
        try:
            yield
        finally:
            os.pwrite(self._file, bytes(NUMBER_BYTES), slot)
            self._slots.put(slot)

    def forget(self) -> None:
        """Remove what is noted about a part that is finished."""
        self._record_path.unlink(missing_ok=True)


def _deadly_samples(part: Part, prefix: Path, fingerprint: str, decode: Decode) -> dict[int, str]:
    record = _Record.read(prefix, fingerprint)
    for number in sorted(_left_under_way(prefix, fingerprint) | record.tries.keys()):
        if number in record.reasons:
            continue
        record.tries[number] = record.tries.get(number, 0) + 1
        record.write(prefix, fingerprint)  # before the trial, which may take this process along
        if record.tries[number] > TRIES:
            record.reasons[number] = "decoding it ended the job, several times"
        elif reason := _trial(part, number, decode):
            record.reasons[number] = reason
        del record.tries[number]
        record.write(prefix, fingerprint)
    return record.reasons


class _Record:
    """What is known of the samples of a part: reasons to refuse them, and trials that did not come to an end."""

    def __init__(self, reasons: dict[int, str], tries: dict[int, int]):
        self.reasons, self.tries = reasons, tries

    @classmethod
    def read(cls, prefix: Path, fingerprint: str) -> "_Record":
        try:
            content = json.loads(_record_path(prefix).read_bytes())
            if content["fingerprint"] != fingerprint:
                return cls({}, {})
            reasons, tries = ({int(k): v for k, v in content[name].items()} for name in ("reasons", "tries"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged: it is found out again
            return cls({}, {})
        return cls(reasons, tries)

    def write(self, prefix: Path, fingerprint: str) -> None:
        content = {"fingerprint": fingerprint, "reasons": self.reasons, "tries": self.tries}
        write_file(_record_path(prefix), json.dumps(content).encode())


def _left_under_way(prefix: Path, fingerprint: str) -> set[int]:
    """Numbers of the samples that a killed run of the same part was decoding."""
    try:
        content = _under_way_path(prefix).read_bytes()
    except FileNotFoundError:
        return set()
    head = _digest(fingerprint)
    if content[: len(head)] != head:
        return set()
    starts = range(len(head), len(content), NUMBER_BYTES)
    numbers = (int.from_bytes(content[start : start + NUMBER_BYTES]) for start in starts)
    return {number - 1 for number in numbers if number}


def _trial(part: Part, number: int, decode: Decode) -> str | None:
    """Decode a sample in a process of its own; the reason to refuse it where the process dies of it."""
    child = get_context("spawn").Process(target=_decode_alone, args=(part, number, decode))
    child.start()
    child.join()
    if child.exitcode >= 0:
        return None
    if -child.exitcode == signal.SIGXCPU:
        return f"decoding it takes more than {PROCESSOR_SECONDS} seconds"
    return f"decoding it ends the process ({signal.Signals(-child.exitcode).name})"


def _decode_alone(part: Part, number: int, decode: Decode) -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this process is the one to go
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 1))
    decode(islice(enumerate(part.samples()), number, number + 1))


def _digest(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()


def _under_way_path(prefix: Path) -> Path:
    return store_path(prefix, ".underway")


def _record_path(prefix: Path) -> Path:
    return store_path(prefix, ".deadly.json")
