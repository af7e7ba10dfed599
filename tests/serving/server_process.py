"""A server process as a test sees it."""

import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image


class Running:
    """A server process on a free port."""

    def __init__(self, repository: Path, run: Path, errors: Path, *arguments: str):
        command = [sys.executable, str(repository / "tools/serve.py"), "--run", str(run), "--port", "0", *arguments]
        self.errors = errors
        with errors.open("w") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ)
        self.url = self.line("ready: ").split()[1]
        self.address = urlsplit(self.url).netloc

    def line(self, start: str) -> str:
        """The next line of the output that begins with ``start``."""
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise AssertionError(f"no line '{start}': {self.errors.read_text()}")

    def ask(self, method: str, path: str, body=None, headers: dict | None = None) -> tuple[int, dict, bytes]:
        """(status, headers, body) of an answer; ``body``: bytes, or an object that is sent as JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=120)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def images(self, **wanted) -> list[np.ndarray]:
        """Pixels [H, W, 3] of the images of a request."""
        status, _, body = self.ask("POST", "/v1/images/generations", wanted)
        assert status == 200, body
        return [pixels(image["b64_json"]) for image in json.loads(body)["data"]]

    def health(self) -> dict:
        return json.loads(self.ask("GET", "/health")[2])

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def pixels(png: str) -> np.ndarray:
    """[H, W, 3] uint8 of a PNG in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
