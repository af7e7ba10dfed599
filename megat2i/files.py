"""Files on disk: the error that names a bad one, and the commit that leaves no half-written one.

A commit flushes every file to the disk under a temporary name, renames the files in the order given and flushes the
folder: without that last step a power cut loses files that were already reported as written.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from megat2i.printable import printable


class DataFileError(ValueError):
    """A data file that cannot be used: which file, what is wrong with it, and what to do about it."""

    def __init__(self, path: str | Path, problem: str, remedy: str):
        super().__init__(str(path), problem, remedy)  # all in args, so that the error crosses process boundaries
        self.path, self.problem, self.remedy = str(path), problem, remedy

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.problem}. {self.remedy}")


STEP_DIGITS = 18  # of a step, at most: it fits 64 bits
# What the storage or this process is short of: nothing that is wrong with a file.
TRANSIENT = ("ESTALE", "EIO", "ETIMEDOUT", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT")


def raise_if_transient(path: str | Path, error: Exception) -> None:
    """DataFileError where ``error``, met at ``path``, is the storage's: a second try may go well."""
    if isinstance(error, OSError) and errno.errorcode.get(error.errno) in TRANSIENT:
        remedy = "Free space where it is full, then start the same command again"
        raise DataFileError(path, f"the storage failed ({error.strerror})", remedy) from error


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """``raise_if_transient`` for a block."""
    try:
        yield
    except OSError as error:
        raise_if_transient(path, error)
        raise


def store_path(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + suffix. (``Path.with_suffix`` would cut a prefix that itself contains a dot.)"""
    return Path(f"{prefix}{suffix}")


def step_of(name: str) -> int | None:
    """The step in the name ``step-N`` of a checkpoint folder; None for every name that no run gives to one."""
    number = name.removeprefix("step-")
    plain = number.isascii() and number.isdecimal() and len(number) <= STEP_DIGITS
    return int(number) if plain and name == f"step-{int(number)}" else None


class PendingFile:
    """A file written under a temporary name beside ``path``; ``commit`` gives it its own name."""

    def __init__(self, path: Path):
        self.path = path
        # Unique, so that two writers of one path never mix their bytes; mode 666, so that the umask decides as usual.
        self.temporary = Path(f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        descriptor = os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._file = open(descriptor, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by flush_to_disk or discard)

    def write(self, data) -> None:
        with storage_errors(self.path):
            self._file.write(data)

    def flush_to_disk(self) -> None:
        """Make the content durable and close the file."""
        with storage_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Remove the temporary file; after a commit there is none and nothing happens."""
        with suppress(OSError):  # a full disk fails again on flushing the rest, which nobody needs
            self._file.close()
        self.temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: renames, new files and removals."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(files: Sequence[PendingFile], outdated: Sequence[Path] = ()) -> None:
    """Make all ``files`` (of one folder) durable under their own names; they are renamed in the order given.

    Old files of the same names but the first, and those ``outdated``, are removed before the first rename: a crash
    between two renames then leaves a file missing, never a new file beside an old one that describes different content.
    """
    folder = files[0].path.parent
    for file in files:
        file.flush_to_disk()
    outdated = [path for path in (*outdated, *(file.path for file in files[1:])) if path.exists()]
    for path in outdated:
        path.unlink()
    if outdated:
        fsync_folder(folder)
    for file in files:
        os.replace(file.temporary, file.path)
    fsync_folder(folder)


@contextmanager
def only_run(folder: Path, first: int = 0, number: int = 0) -> Iterator[None]:
    """Make ``folder`` and hold the lock of ``number`` of its parts (0: all) from ``first`` on.

    The system frees it when the process ends, however it ends, also on another machine. Who holds all of it may remove
    the file ``lock``, and the folder afterwards.
    """
    while True:
        with suppress(FileExistsError):  # said also where the folder was removed meanwhile
            folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / "lock", "w")  # noqa: SIM115 (closed below)
        except FileNotFoundError:  # the run before has removed the folder meanwhile
            continue
        with file:
            _acquire(file, folder, first, number)
            # The run before may have removed the file between the two steps: its lock then keeps nobody out.
            if _is_file(file, folder / "lock"):
                yield
                return


def _acquire(file: IO, folder: Path, first: int, number: int) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, number, first)  # a byte for each part
    except (BlockingIOError, PermissionError) as error:
        raise DataFileError(folder, "another run is writing this dataset", "Wait for it, or stop it") from error
    except OSError as error:
        problem = f"its file system has no locks ({error.strerror})"
        raise DataFileError(folder, problem, "Mount it with them, or write to another one") from error


def _is_file(file: IO, path: Path) -> bool:
    """Whether the open ``file`` is the one that has the name ``path`` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def pending_folder(path: Path) -> Iterator[Path]:
    """A new folder to be filled with files, which has a temporary name until the block ends and all is on the disk.

    Nothing is left of it where the block fails. Raises DataFileError where ``path`` exists.
    """
    if path.exists():
        raise DataFileError(path, "exists already, and nothing is overwritten", "Remove it, or choose another folder")
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_dir():
                fsync_folder(inside)
            else:
                with open(inside, "rb") as written:
                    os.fsync(written.fileno())
        fsync_folder(temporary)
        os.rename(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write one file, which has its name only once it is complete and on the disk."""
    file = PendingFile(path)
    try:
        file.write(content)
        commit([file])
    finally:
        file.discard()


def read_regular_file(path: str | Path, maximum: int) -> bytes:
    """The bytes of a file of strangers. OSError, or ValueError where it is longer than ``maximum`` or no file.

    A device or a pipe could deliver for ever. Raises DataFileError where the storage is at fault.
    """
    try:
        # Non-blocking: opening a pipe without a writer would otherwise wait for one. It changes nothing for a file.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            if status.st_size > maximum:
                raise ValueError(f"{status.st_size:,} bytes, more than {maximum:,}")
            return file.read(maximum + 1)
    except OSError as error:
        raise_if_transient(path, error)
        raise


def bounded_lines(file: BinaryIO, maximum: int, end: int | None = None) -> Iterator[bytes | None]:
    """The lines of ``file`` with their line breaks, up to the offset ``end``; None for one longer than ``maximum``."""
    while (end is None or file.tell() < end) and (line := file.readline(maximum + 1)):
        if len(line) <= maximum:
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
            pass
        yield None


def read_json_object(path: Path, remedy: str) -> dict:
    """The JSON object in ``path``; raises DataFileError, with ``remedy``, where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataFileError(path, f"not readable as JSON ({error})", remedy) from error
    if not isinstance(content, dict):
        raise DataFileError(path, "not a JSON object", remedy)
    return content
