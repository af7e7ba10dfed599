"""Encoder processes that fail or are killed: one error, at once, and nothing goes on behind it."""

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

import pytest
from captioned_images import make_encoding

from megat2i.data import encoders
from megat2i.files import DataFileError

LONG = 30  # seconds


@dataclass(frozen=True)
class TroublePart:
    """A part that takes long, fails when the part of file ``after`` has begun, or is killed holding the lock."""

    source: str
    trouble: str
    after: str = ""
    expected: int | None = 1
    opens_source: bool = False

    def identity(self) -> str:
        Path(self.source).touch()
        return self.source

    def samples(self):
        while self.after and not Path(self.after).exists():
            time.sleep(0.01)
        if self.trouble == "fail":
            raise DataFileError(self.source, "gone", "Start again")
        if self.trouble == "kill":
            encoders._done_samples.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LONG)
        return iter(())


@pytest.mark.parametrize("trouble", ["fail", "kill"])
def test_one_failure_ends_all_workers_at_once(tmp_path, trouble):
    (tmp_path / "in").mkdir()
    names = [str(tmp_path / "in" / name) for name in "abcdefgh"]
    parts = [TroublePart(names[0], trouble, after=names[1])] + [TroublePart(name, "take long") for name in names[1:]]
    jobs = [(part, tmp_path / f"{number:06d}") for number, part in enumerate(parts)]
    start = time.monotonic()
    with pytest.raises(DataFileError) as error:
        list(encoders.encode_parts(jobs, make_encoding(tmp_path), 2))
    assert time.monotonic() - start < LONG
    # all are dead; the pool's own thread may have reaped one and be about to take it from the list
    while active_children():
        assert time.monotonic() - start < LONG
    if trouble == "kill":
        assert f"a worker process was killed; under way were parts of {names[0]}, {names[1]}. Often" in str(error.value)
    else:
        assert str(error.value) == f"{names[0]}: gone. Start again"
    begun = {path.name for path in (tmp_path / "in").iterdir()}
    assert begun <= {"a", "b", "c"}, "queued parts were begun"  # c: where the worker that failed was faster
