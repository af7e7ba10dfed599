"""A file of lines that a full disk does not end: what cannot be written waits in memory and is tried again."""

import os
from collections import deque
from pathlib import Path

from megat2i.files import DataFileError
from megat2i.progress import count, say

WAITING = 100_000  # lines in memory, at most


class RecordFile:
    """Lines appended to ``path``. The first failure is said, and so is what is lost in the end."""

    def __init__(self, path: Path):
        self.path, self.lost = path, 0
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o666)
        self._waiting: deque[bytes] = deque()
        self._failed = False

    def append(self, line: str) -> None:
        """Write ``line``, after those that wait. Raises DataFileError where the file was removed."""
        if os.fstat(self._file).st_nlink == 0:
            raise DataFileError(self.path, "was removed while the run goes on", "Leave the folder of a run in place")
        self._waiting.append(line.encode() + b"\n")
        self._write_waiting()
        if len(self._waiting) > WAITING:
            del self._waiting[1]  # the first may be written in part
            self.lost += 1

    def sync(self) -> None:
        """Bring every line to the disk, as far as it takes them."""
        self._write_waiting()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._say(error)

    def close(self) -> None:
        """The last try; says how many lines are lost."""
        self.sync()
        os.close(self._file)
        if lost := self.lost + len(self._waiting):
            say(f"{self.path}: {count(lost, 'line')} could not be written and {'are' if lost > 1 else 'is'} lost")

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting[0])
                rest = self._waiting.popleft()[written:]
                if rest:
                    self._waiting.appendleft(rest)
        except OSError as error:
            self._say(error)
        else:
            self._failed = False

    def _say(self, error: OSError) -> None:
        if not self._failed:
            say(f"{self.path}: cannot be written ({error.strerror}): training goes on, and its lines wait in memory")
        self._failed = True
