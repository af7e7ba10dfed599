"""The machine's own pip settings as the two secrets of an image's build: a pip.conf and a certificate.

Folders that these settings name (wheels, an index on the disk) are not in the build's root: they are served over HTTP
on the loopback device, which a build that shares the machine's network reaches.
"""

import ast
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

LISTS = ("extra-index-url", "find-links", "trusted-host")  # options with any number of values


@dataclass(frozen=True)
class PipSecrets:
    """The two files, and ``traces``, which no image may hold: a mark in each file and the address of the folders."""

    conf: Path
    certificate: Path
    traces: tuple[str, ...]


@contextmanager
def pip_secrets(folder: Path, local: bool = True) -> Iterator[PipSecrets]:
    """Write both files into ``folder`` and serve the local folders while the context lasts.

    Without ``local`` they are left out: a folder may hold a CPU build of torch that pip prefers to the CUDA build.
    """
    options = _options() if local else _without_folders(_options())
    marks = [f"mark-{uuid.uuid4().hex}" for _ in range(2)]
    with _served(_local_folders(options)) as address:
        local = {value: address + path for value, path in _paths(options).items()}
        lines = [f"# {marks[0]}", "[global]", "timeout = 180", "cert = /run/secrets/ca"]
        for name, values in options.items():
            lines.append(f"{name} = {' '.join(local.get(value, value) for value in values)}")
        conf, certificate = folder / "pip.conf", folder / "ca.crt"
        conf.write_text("\n".join(lines) + "\n")
        certificate.write_text(f"# {marks[1]}\n{_certificates()}")
        yield PipSecrets(conf, certificate, (*marks, address.removeprefix("http://")))


def _options() -> dict[str, list[str]]:
    """What pip would use here to find packages: {option: values}."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    options: dict[str, list[str]] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):  # the environment wins
        name, _, value = line.partition("=")
        name = name.rpartition(".")[2]
        if name in ("index-url", *LISTS):
            options[name] = ast.literal_eval(value).split()
    return options


def _certificates() -> str:
    """The text of the bundle with which pip verifies an index here."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", ":env:.cert"], capture_output=True, text=True
    )
    if listed.returncode:
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.cert"], capture_output=True, text=True
        )
    bundle = listed.stdout.strip() or "/etc/ssl/certs/ca-certificates.crt"
    return Path(bundle).read_text()


def _paths(options: dict[str, list[str]]) -> dict[str, str]:
    """{value of an option: path} for the values that name folders of this machine."""
    values = [value for name in ("index-url", "extra-index-url", "find-links") for value in options.get(name, ())]
    return {value: urlsplit(value).path for value in values if urlsplit(value).scheme in ("", "file")}


def _without_folders(options: dict[str, list[str]]) -> dict[str, list[str]]:
    paths = _paths(options)
    remaining = {name: [value for value in values if value not in paths] for name, values in options.items()}
    return {name: values for name, values in remaining.items() if values}


def _local_folders(options: dict[str, list[str]]) -> list[Path]:
    """Folders to serve: of an index also the files beside it, to which its pages refer."""
    paths = {Path(path) for path in _paths(options).values()}
    return [path.parent if path.name == "simple" else path for path in paths]


@contextmanager
def _served(folders: list[Path]) -> Iterator[str]:
    """Serve ``folders`` under their own paths and nothing else; yields the address without a path."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory="/")

        def send_head(self):
            path = Path(self.translate_path(self.path)).resolve()
            if any(path.is_relative_to(folder.resolve()) for folder in folders):
                return super().send_head()
            return self.send_error(HTTPStatus.NOT_FOUND)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
