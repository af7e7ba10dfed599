"""Which launch owns a run folder, and what tells whether it lives: the part of the lock that anyone may read.

RUN/lock is described in ``run_lock``, which takes it; this module only reads.
"""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megat2i.files import DataFileError, read_json_object
from megat2i.processes import Process

FOLDER, OWNED, RELEASED = "lock", ".json", ".released"
HEARTBEAT_S = 5.0
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


def last_owner(folder: Path) -> tuple[int, Path | None]:
    """Number and file of the last owner; (0, None) where there was none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    owners = [folder / name for name in names if name.endswith((OWNED, RELEASED)) and name.split(".")[0].isdecimal()]
    last = max(owners, key=lambda path: int(path.stem), default=None)
    return (0, None) if last is None else (int(last.stem), last)


def heartbeat(path: Path) -> int:
    """The owner's last sign of life: the time of its file, in nanoseconds. Raises FileNotFoundError."""
    descriptor = os.open(path, os.O_RDONLY)  # NFS asks the server when a file is opened, and not for its name alone
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def holder(path: Path) -> int | None:
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


def _text(path: str) -> str:
    return Path(path).read_text().strip() if os.path.exists(path) else ""
