"""Makes the project's environment or brings it up to date: ``make env`` is ``python tools/install.py .venv demo``.

Installs what the demo needs, with ``test`` also what the tests need, and stamps the folder with ``.installed`` and
``.installed-test``. A folder that an interrupted installation left is emptied and filled again. The whole output of pip
is in the folder's ``install.log``. Every failure is one sentence. Needs only the standard library.
"""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UPDATING = "updating"
BEGUN = {".installing", "install.log", "tmp", "bin", "include", "lib", "lib64"}  # before there is a pyvenv.cfg
STAMPS = {"demo": (".installed",), "test": (".installed", ".installed-test")}
# GB, pip's downloads included: with PyTorch's CPU build, and with its CUDA build.
SPACE = {"demo": (1.8, 10.0), "test": (3.3, 12.0)}
# Python compiles a module when it is first imported; most of what is installed never is.
PIP_INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile")
FULL_DISK = "No space left on device"
UNREACHABLE = re.compile(
    "Connection refused|Network is unreachable|name resolution|Name or service not known|timed out|ProxyError|SSLError"
)


class InstallError(Exception):
    """The environment cannot be made; the message is the sentence for the user."""


class Progress:
    """A line about the work in hand: rewritten twice a second on a terminal, printed every 3 seconds elsewhere."""

    def __init__(self, site_packages: Path):
        self._site_packages = site_packages
        self._work, self._packages = "making the environment", []
        self._began, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def follow(self, line: str) -> None:
        """Take the work in hand from a line of pip's output."""
        word, _, rest = line.strip().partition(" ")
        if word == "Progress":
            done, total = (int(number) / 1e6 for number in rest.split(" of "))
            self._work = f"{self._work.partition(':')[0]}: {done:.0f} of {total:.0f} MB"
        elif word == "Installing" and rest.startswith("collected packages"):
            self._packages, self._unpacking_since = rest.partition(": ")[2].split(", "), time.time()
        elif word in ("Collecting", "Downloading", "Building", "Preparing"):
            self._work, self._packages = re.sub(r" \(.*|:.*", "", line.strip()).lower(), []

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def _line(self) -> str:
        packages = self._packages
        if not packages:
            return self._work
        # pip unpacks its list in order and says nothing; the metadata of a package comes last.
        number = 0
        for metadata in self._site_packages.glob("*.dist-info"):
            with contextlib.suppress(FileNotFoundError):  # an older release, removed at this moment
                number += metadata.stat().st_mtime >= self._unpacking_since
        number = min(number, len(packages) - 1)
        return f"unpacking {number + 1} of {len(packages)}: {packages[number]}"

    def _show(self) -> None:
        terminal = sys.stdout.isatty()
        while not self._ended.wait(0.5 if terminal else 3.0):
            line = f"{self.seconds():5.0f} s  {self._line()}"
            print(f"\r{line:78.78}" if terminal else line, end="" if terminal else "\n", flush=True)
        if terminal:
            print(f"\r{'':78}\r", end="", flush=True)


class Environment:
    """A virtual environment in ``folder``, for the demo or for the tests (``purpose``)."""

    def __init__(self, folder: Path, purpose: str):
        self.folder, self.purpose = folder, purpose
        self.python, self.log = folder / "bin/python", folder / "install.log"
        self.stamps = [folder / name for name in STAMPS[purpose]]
        # There while an installation runs, and after one that did not end. It says UPDATING where the environment was
        # complete before: pip repairs that, so it need not be emptied.
        self.marker = folder / ".installing"

    def fill(self) -> None:
        """Make and fill the folder. Raises InstallError."""
        try:
            self.folder.mkdir(exist_ok=True)
            self._require_own_folder()
            interrupted = self.marker.exists()
            with self.marker.open("a+") as lock:
                self._acquire(lock)
                self._require_space()
                lock.seek(0)
                updating = lock.read() == UPDATING
                if self.stamps[0].exists() and not updating:
                    lock.write(UPDATING)
                    lock.flush()
                self._begin_anew(interrupted and not updating)
                self._install()
                self.marker.unlink()  # while it is locked: after that it may be another command's
        except OSError as error:
            raise InstallError(self._full_disk() if FULL_DISK in str(error) else f"{self.folder}: {error}.") from None

    def _require_own_folder(self) -> None:
        """Raises InstallError where the folder holds anything but an environment: it may have to be emptied."""
        if not (self.folder / "pyvenv.cfg").exists() and {path.name for path in self.folder.iterdir()} - BEGUN:
            raise InstallError(f"{self.folder} holds files and is no virtual environment: name another folder.")

    def _acquire(self, lock) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InstallError(f"Another command is filling {self.folder}; start this one when that is done.") from None
        if not (self.marker.exists() and os.path.samestat(self.marker.stat(), os.fstat(lock.fileno()))):
            raise InstallError(f"Another command has just filled {self.folder}; start this one again.")

    def _require_space(self) -> None:
        present = any(path.is_dir() for path in self.folder.glob("lib/python*/site-packages/torch"))
        if not present and shutil.disk_usage(self.folder).free < SPACE[self.purpose][0] * 1e9:
            raise InstallError(self._full_disk())

    def _full_disk(self) -> str:
        free = shutil.disk_usage(self.folder).free / 1e9
        cpu, cuda = SPACE[self.purpose]
        return (
            f"The disk of {self.folder} is too full ({free:.1f} GB free): the environment needs {cpu:g} GB with a CPU "
            f"build of PyTorch, {cuda:g} GB with a CUDA build."
        )

    def _begin_anew(self, interrupted: bool) -> None:
        """Without stamps, and without what an interrupted installation left."""
        for name in STAMPS["test"]:
            (self.folder / name).unlink(missing_ok=True)
        if not interrupted:
            return
        print(f"{self.folder} is half made, since the last installation did not end: it is made anew", flush=True)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.marker:
                path.unlink()

    def _install(self) -> None:
        extras = "serve,test" if self.purpose == "test" else "serve"
        print(f"Installing into {self.folder} what the {self.purpose} needs", flush=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        with Progress(self.folder / "lib" / version / "site-packages") as progress, self.log.open("w") as log:
            # Resolved: where the environment is active, the interpreter that runs this is its own link to the real one.
            interpreter = str(Path(sys.executable).resolve())
            self._run(log, progress, interpreter, "-m", "venv", "--without-pip", str(self.folder))
            self._run(log, progress, str(self.python), "-m", "ensurepip", "--upgrade")
            # Sources are built with these two, not with a copy that pip would fetch for each of them.
            self._pip(log, progress, "pip", "setuptools", "wheel", bar="off")
            self._pip(log, progress, "--no-build-isolation", "-e", f"{ROOT}[{extras}]")
            if self.purpose == "test":  # by itself it would bring torchvision, made for another torch
                self._pip(log, progress, "--no-deps", "torch-fidelity")
        for stamp in self.stamps:
            stamp.touch()
        print(f"Installed in {progress.seconds():.0f} s", flush=True)

    def _pip(self, log, progress: Progress, *arguments: str, bar: str = "raw") -> None:
        options = (*PIP_INSTALL, "--progress-bar", bar, "--constraint", str(ROOT / "constraints.txt"))
        self._run(log, progress, str(self.python), *options, *arguments)

    def _run(self, log, progress: Progress, *command: str) -> None:
        """Run ``command``, its output to ``log``. Raises InstallError where it fails."""
        scratch = self.folder / "tmp"  # downloads go where there is room for the environment; /tmp is often small
        scratch.mkdir(exist_ok=True)
        environment = os.environ | {"TMPDIR": str(scratch.resolve())}
        output = []
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT) as process:
            try:
                for line in process.stdout:
                    output.append(line)
                    log.write(line)
                    progress.follow(line)
            except BaseException:  # interrupted, or the log's disk is full
                process.terminate()
                raise
        shutil.rmtree(scratch)
        if process.returncode:
            raise InstallError(self._sentence("".join(output)))

    def _sentence(self, output: str) -> str:
        """Of why a command with this output failed."""
        if FULL_DISK in output:
            return self._full_disk()
        errors = re.findall(r"^ *(?:ERROR|error|Error): (.*)", output, re.MULTILINE) or ["without a word of why"]
        reason = UNREACHABLE.search(output)
        if reason:
            remedy = "see to the network, or to the index and the proxy in pip's settings"
            return f"No package index can be reached ({reason[0]}): {remedy} (the words of pip: {self.log})."
        return f"The installation failed: {errors[0].rstrip('.')} (the words of pip: {self.log})."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the environment")
    parser.add_argument("purpose", choices=tuple(STAMPS), help="demo, or test for the demo and the tests")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        Environment(arguments.folder, arguments.purpose).fill()
    except InstallError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command begins anew.")


if __name__ == "__main__":
    main()
