"""One launch at a time writes a run folder, on whichever of the machines that share it; a dead one does not keep it.

RUN/lock holds a file for each launch: ``000001.json``, ``000002.json``, ... The last one is the owner. Who wants the
folder looks whether that one lives, and then makes the next file, which only one can: it is linked under its name with
its content, and numbers only grow.

An owner lives while a rank holds the file system's lock on its file. Where that says nothing, as many file systems do
between machines, its process decides on its own machine, and elsewhere its heartbeat: the time of the file, which the
owner changes every few seconds. It only counts that it changes, so clocks that differ or are set back do no harm.
"""

import fcntl
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from megat2i.checkpoint.agreement import from_first_rank
from megat2i.config import ConfigError
from megat2i.files import DataFileError, fsync_folder, read_json_object
from megat2i.processes import Process
from megat2i.progress import waiting
from megat2i.trainer import RunError

FOLDER, OWNED, RELEASED = "lock", ".json", ".released"
HEARTBEAT_S = 5.0
# Looks at a silent heartbeat before its owner counts as dead. Looks and not seconds: a storage that stands still for
# the owner does so for the one who looks, and that is one look.
LOOKS, LOOK_EVERY_S = 30, 1.0
FLOCK = "hhqqi"  # struct flock of Linux on 64 bits: type, whence, start, length, process


@dataclass(frozen=True)
class Owner:
    """The first rank of a launch.

    ``machine`` names the installation of its operating system, ``boot`` this run of its kernel, and ``namespace`` the
    processes among which ``pid`` means something. ``since`` is for people.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    started: int
    since: str

    @staticmethod
    def here() -> "Owner":
        """This process."""
        myself = Process.of(os.getpid())
        return Owner(
            host=socket.gethostname(),
            machine=_text("/etc/machine-id"),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            namespace=os.readlink("/proc/self/ns/pid"),
            pid=myself.pid,
            started=myself.started,
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
        )

    @staticmethod
    def read(path: Path) -> "Owner | None":
        """The owner in ``path``; None where the file is damaged. Raises FileNotFoundError."""
        os.stat(path)
        try:
            return Owner(**read_json_object(path, ""))
        except (DataFileError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """The lock of one run folder, held by all ranks of this launch until ``release`` or until they end."""

    def __init__(self, folder: Path, number: int, descriptor: int | None):
        self._path, self._next = _numbered(folder, number), _numbered(folder, number + 1)
        self._descriptor, self._leader, self._ended = descriptor, dist.get_rank() == 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        if self._leader:
            self._thread.start()

    def release(self) -> None:
        """Give the folder back: a launch on another machine need not wait for the heartbeat to stop."""
        self._ended.set()
        if self._leader:
            self._thread.join()
            self._path.rename(self._path.with_suffix(RELEASED))
        if self._descriptor is not None:
            os.close(self._descriptor)

    def require(self) -> None:
        """End this process where another launch has taken the folder over: for the first rank, before it writes there.

        A node that was lost for a while comes back in the middle of anything: its next heartbeat may be too late.
        """
        with suppress(OSError):  # of a storage that fails for a while; the training itself meets it, or does not
            # NFS asks the server when a folder is opened. The file itself must not be: closing it gives the locks back.
            names = os.listdir(self._path.parent) if _exists(self._path.parent) else []
            lost = self._next.name in names or self._path.name not in names
            if lost and not self._ended.is_set():
                self._end()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self._descriptor)
            self.require()

    def _end(self) -> None:
        reason = "another launch has taken it over" if _exists(self._next) else f"{self._path} was removed"
        sentence = f"error: this launch has lost its run folder, since {reason}: it ends here, nothing else is written"
        print(sentence, file=sys.stderr, flush=True)
        os._exit(1)


def take(run_dir: Path, check: Callable[[], None]) -> RunLock:
    """Take the lock of ``run_dir`` for all ranks; the first one then calls ``check``. Collective.

    Raises the same RunError on all ranks where another launch holds the lock, which changes nothing in the folder, or
    where ``check`` raises.
    """
    number, descriptor, problem = 0, None, ""
    if dist.get_rank() == 0:
        try:
            number, descriptor = _become_owner(run_dir)
            check()
        except (RunError, DataFileError, ConfigError) as error:
            problem = str(error)
    number, *text = from_first_rank([number, *problem.encode()])
    if dist.get_rank() and number:
        # A rank that does not see the file goes on without: run_folder.require_shared ends the launch then.
        with suppress(FileNotFoundError):
            descriptor = os.open(_numbered(run_dir / FOLDER, number), os.O_RDWR)
            _lock(descriptor, dist.get_rank())
    lock = RunLock(run_dir / FOLDER, number, descriptor) if number else None
    if text:
        if lock:
            lock.release()
        raise RunError(bytes(text).decode())
    return lock


def require_free(run_dir: Path) -> None:
    """Raises RunError where the launch that holds the lock of ``run_dir`` lives for certain. Only reads."""
    with suppress(OSError):  # released while it was looked at, or no folder: ``take`` looks again, and says so
        _, path = _last(run_dir / FOLDER)
        if path is not None:
            _is_dead(run_dir, path)


def _become_owner(run_dir: Path) -> tuple[int, int]:
    """Make the file of the next owner; its number, and its descriptor, which holds the file system's lock."""
    folder = run_dir / FOLDER
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another launch has changed what is looked at
                number, path = _last(folder)
                if path is not None and not _is_dead(run_dir, path):
                    _wait_for_heartbeat(run_dir, path)
                descriptor = _make_owner(_numbered(folder, number + 1))
                # Another one may have been the owner of this number, and have been followed.
                if descriptor is not None and _last(folder)[0] == number + 1:
                    _remove_others(folder, number + 1)
                    return number + 1, descriptor
    except OSError as error:
        raise RunError(f"{run_dir} cannot be made or written ({error.strerror}): choose another run.dir") from error


def _make_owner(path: Path) -> int | None:
    """Make ``path`` for this process, with the lock of its first rank; None where another launch was faster."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    # Open until this process ends: the system gives all locks on a file back when any descriptor of it is closed.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        os.write(descriptor, json.dumps(asdict(Owner.here()), indent=1).encode() + b"\n")
        os.fsync(descriptor)
        _lock(descriptor, 0)
        os.link(temporary, path)
    except FileExistsError:
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):  # NFS also says so when it has done it twice
            os.close(descriptor)
            return None
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return descriptor


def _is_dead(run_dir: Path, path: Path) -> bool:
    """Whether the owner in ``path`` is dead for certain. Raises RunError where one of its ranks lives for certain."""
    if path.suffix == RELEASED:
        return True
    owner, here = Owner.read(path), Owner.here()
    same_kernel = owner is not None and owner.boot == here.boot != ""
    same_numbers = same_kernel and owner.namespace == here.namespace
    if same_numbers and Process(owner.pid, owner.started).alive:
        raise _in_use(run_dir, owner)
    holder = _holder(path)
    if holder:
        raise _in_use(run_dir, owner, holder if same_numbers and holder != owner.pid else None)
    if same_kernel:
        return same_numbers or holder is not None
    if owner is None or not owner.machine:
        return False
    return (owner.host, owner.machine) == (here.host, here.machine)  # which was started again since


def _wait_for_heartbeat(run_dir: Path, path: Path) -> None:
    """Returns when LOOKS looks have seen none; raises RunError at the first one. Raises FileNotFoundError."""
    before, owner = _heartbeat(path), Owner.read(path)
    with waiting(f"{run_dir} was in use by {owner or 'another launch'}: looking whether it lives"):
        for _ in range(LOOKS):
            time.sleep(LOOK_EVERY_S)
            if _heartbeat(path) != before:
                raise _in_use(run_dir, owner)


def _in_use(run_dir: Path, owner: Owner | None, rank: int | None = None) -> RunError:
    remedy = "nothing was changed; wait for its end, stop it there, or choose another run.dir"
    if rank is not None:
        ended = f"by {owner}, has ended, but its process {rank} has not"
        return RunError(f"{run_dir} is in use: the last launch, {ended}: {remedy}")
    return RunError(f"{run_dir} is in use by another launch ({owner or 'its record is damaged'}): {remedy}")


def _heartbeat(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)  # NFS asks the server when a file is opened, and not for its name alone
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _lock(descriptor: int, rank: int) -> None:
    """Lock the byte of ``rank``, where the file system has locks: the kernel gives it back when the process ends."""
    with suppress(OSError):
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)


def _holder(path: Path) -> int | None:
    """The process that holds a lock on ``path`` (-1: one elsewhere), 0 where none does; None without such locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, process = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return 0 if kind == fcntl.F_UNLCK else process if process > 0 else -1


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}{OWNED}"


def _last(folder: Path) -> tuple[int, Path | None]:
    """Number and file of the last owner; (0, None) where there was none."""
    names = os.listdir(folder) if _exists(folder) else []
    owners = [folder / name for name in names if name.endswith((OWNED, RELEASED)) and name.split(".")[0].isdecimal()]
    last = max(owners, key=lambda path: int(path.stem), default=None)
    return (0, None) if last is None else (int(last.stem), last)


def _remove_others(folder: Path, number: int) -> None:
    """Files of earlier owners, and what killed launches left half-made."""
    for path in folder.iterdir():
        if path != _numbered(folder, number):
            path.unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _text(path: str) -> str:
    return Path(path).read_text().strip() if os.path.exists(path) else ""
