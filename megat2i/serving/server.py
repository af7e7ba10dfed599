"""The process: its socket, its signals and its end."""

import asyncio
import signal
import socket
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI

from megat2i.config import ConfigError
from megat2i.serving.worker import Worker

CONNECTIONS = 256  # at a time; more are answered with 503
CLOSING_S = 5  # in which clients must take what is drawn when the server ends


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has its address, before anything slow begins; raises ConfigError."""
    if not 0 <= port <= 65535:  # getaddrinfo would take the rest of a division
        raise ConfigError(f"--port is {port}; it must be between 0 and 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        problem = f"cannot listen on {host}, port {port} ({error})"
        raise ConfigError(f"{problem}; choose others with --host and --port") from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ip_address(bound.getsockname()[0]).is_loopback


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, except for its end: while what was accepted is drawn, new requests are answered with 503."""

    def __init__(self, config: uvicorn.Config, worker: Worker, url: str):
        super().__init__(config)
        self.worker, self.url = worker, url
        self._stopping: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        print(f"ready: {self.url} (stop with Ctrl-C)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops in order, a second one at once."""
        asyncio.get_running_loop().call_soon_threadsafe(self._stop, signal.Signals(sig).name)

    def _stop(self, name: str) -> None:
        if self._stopping is None:
            self.worker.close()
            print(f"{name}: finishing what was accepted; once more ends at once", flush=True)
            self._stopping = asyncio.ensure_future(self._finish())
        else:
            self.worker.close(now=True)
            self.should_exit = self.force_exit = True

    async def _finish(self) -> None:
        await asyncio.to_thread(self.worker.join)
        self.should_exit = True


def serve(app: FastAPI, worker: Worker, bound: socket.socket) -> None:
    """Answer requests until a signal ends it; returns when everything accepted is drawn and delivered."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=CLOSING_S,
    )
    worker.start()
    try:
        asyncio.run(Server(config, worker, url_of(bound)).serve(sockets=[bound]))
    finally:
        worker.close(now=True)
        worker.join()
