"""Building images with buildah and running them with podman, in a storage of their own that goes with its folder."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = {"buildah": "buildah", "podman": "podman", "mmdebstrap": "mmdebstrap", "unshare": "util-linux"}
STORAGE = """[storage]
driver = "overlay"
graphroot = "{folder}/graph"
runroot = "{folder}/run"
"""
ENGINE = """[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
tmp_dir = "{folder}/engine"
"""
UID = 12345  # a user whom no image knows
# crun refuses hybrid control groups, which some machines have: podman runs where their second tree is not mounted.
WITHOUT_HYBRID = 'mountpoint -q /sys/fs/cgroup/unified && umount /sys/fs/cgroup/unified; exec "$@"'


def missing() -> str | None:
    """In one sentence, what the tests of images lack here; None where all is there."""
    packages = [package for command, package in TOOLS.items() if not shutil.which(command)]
    if packages:
        return f"install {', '.join(packages)} (Debian packages) to test the images"
    return None if os.geteuid() == 0 else "images are tested as root: mmdebstrap, buildah and mounts need it"


class Containers:
    """A storage of images in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
        (folder / "containers.conf").write_text(ENGINE.format(folder=folder))
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "BUILDER": "buildah",
        }

    def buildah(self, *arguments: str) -> str:
        """Its output. Raises CalledProcessError."""
        return self._output("buildah", *arguments)

    def make_base(self) -> str:
        """Debian's smallest system as an image, which stands in for ``debian:bookworm-slim``; returns its name."""
        archive, name = self.folder / "base.tar", "localhost/debian-base:bookworm"
        options = ("--quiet", "--variant=minbase", "--include=ca-certificates")
        self._output("mmdebstrap", *options, "bookworm", str(archive))
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(archive), "/")
        self.buildah("commit", "--quiet", container, name)
        self.buildah("rm", container)
        archive.unlink()
        return name

    def make(self, target: str, repository: Path, options: list[str], **environment: str) -> str:
        """``make TARGET`` in ``repository`` with ``options`` for the builder; returns what it printed."""
        command = ["make", "--no-print-directory", target, f"IMAGE_OPTIONS={shlex.join(options)}"]
        environment = self.environment | environment
        return subprocess.run(
            command, cwd=repository, env=environment, check=True, text=True, stdout=subprocess.PIPE
        ).stdout

    def run(self, image: str, *command: str, mounts: dict[Path, str] | None = None, timeout: float = 300):
        """The ended process of ``command`` in a read-only container without network, capabilities or a known user.

        ``mounts``: {folder here: "path in the container" or "path:ro"}.
        """
        options = ["--rm", "--network=none", "--read-only", "--cap-drop=ALL", f"--user={UID}:{UID}"]
        options += [f"--volume={source}:{target}" for source, target in (mounts or {}).items()]
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", WITHOUT_HYBRID, "sh", "podman", "run", *options, image, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def layers(self, image: str) -> Path:
        """A folder of the storage with the image's manifest, configuration and layers (tar files, not compressed)."""
        folder = self.folder / f"layers-{image.rpartition('/')[2]}".replace(":", "-")
        self.buildah("push", "--quiet", "--disable-compression", image, f"dir:{folder}")
        return folder

    def _output(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True)
        if done.returncode:
            raise AssertionError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout


@contextmanager
def containers() -> Iterator[Containers]:
    """A storage that is gone at the end: images are gigabytes, and their mounts outlive a test.

    Not in pytest's folder of temporary files, which other sessions of pytest empty.
    """
    folder = Path(tempfile.mkdtemp(prefix="images-", dir="/var/tmp"))
    storage = Containers(folder)
    try:
        yield storage
    finally:
        for command in (("buildah", "rm", "--all"), ("umount", "--recursive", str(folder / "graph/overlay"))):
            subprocess.run(command, env=storage.environment, capture_output=True)  # there may be nothing to remove
        shutil.rmtree(folder)
