"""The web application: the page, OpenAI's ``images/generations``, the page's stream of rows, and the health."""

import asyncio
import base64
import contextlib
import io
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from importlib import resources

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from megat2i.serving.guard import Guard
from megat2i.serving.requests import MAX_IMAGES, MAX_PROMPT, MAX_SEED, ApiError, ImageRequest, ServedRun, seeds_for
from megat2i.serving.worker import Order, QueueFull, Stopping, Worker

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
FAILURES = 3  # batches in a row after which the model itself is taken to be at fault, not one request's settings
SEND_S = 30.0  # in which a client must take a part of its answer

log = logging.getLogger(__name__)


class Progress:
    """The order of one request on the event loop, woken by the worker's thread. A slow reader skips views."""

    def __init__(self, wanted: ImageRequest, run: ServedRun, previews: bool):
        self.prompt, self._changed = wanted.prompt, asyncio.Event()
        wake = partial(_wake, asyncio.get_running_loop(), self._changed)
        tokens, sampling = run.prompt_tokens(wanted.prompt), run.sampling_for(wanted)
        self.order = Order(tokens, seeds_for(wanted), sampling, previews, wake)

    async def next_change(self) -> None:
        """Raises ApiError where the drawing failed."""
        await self._changed.wait()
        self._changed.clear()
        if self.order.error is not None:
            raise ApiError(500, f"drawing failed: {self.order.error}", code="drawing_failed") from self.order.error

    def finished(self, rows: int) -> bool:
        return all(view is not None and view.rows == rows for view in self.order.views)

    async def png(self, index: int, batch_size: int | None = None) -> str:
        """What is to be seen of an image, in base64; with ``batch_size``: how it was drawn is in the file."""
        settings = None
        if batch_size is not None:
            settings = {"prompt": self.prompt, "seed": self.order.seeds[index], **asdict(self.order.sampling)}
            del settings["prompts"]
            settings["batch_size"] = batch_size
        return await run_in_threadpool(_png, self.order.views[index].pixels, settings)


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends, and nobody waits
        loop.call_soon_threadsafe(changed.set)


def _png(pixels: np.ndarray, settings: dict | None) -> str:
    info, file = PngInfo(), io.BytesIO()
    if settings is not None:
        info.add_itxt("megat2i", json.dumps(settings))
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, format="PNG", pnginfo=info)
    return base64.b64encode(file.getvalue()).decode()


class DrawingResponse(StreamingResponse):
    """A stream of rows that gives its order up, however it ends: finished, client gone, or client too slow."""

    def __init__(self, lines: AsyncIterator[str], worker: Worker, order: Order):
        super().__init__(lines, media_type="application/x-ndjson")
        self.worker, self.order = worker, order

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_S):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.warning("a client stopped reading its answer; its connection is closed")
        finally:
            self.worker.abandon(self.order)


class Service:
    """The endpoints over one worker."""

    def __init__(self, run: ServedRun, worker: Worker):
        self.run, self.worker = run, worker

    async def health(self) -> Response:
        """200 while images can be drawn, 503 while the server stops or where FAILURES batches in a row failed."""
        waiting, drawing = self.worker.load()
        sampling = asdict(self.run.sampling)
        del sampling["prompts"]
        facts = {
            "status": "stopping" if self.worker.closed else "failing" if self.worker.failures >= FAILURES else "ok",
            "model": self.run.name,
            "size": self.run.size,
            "rows": self.worker.rows,
            "waiting": waiting,
            "drawing": drawing,
            "drawn": self.worker.drawn,
            "batch_size": self.worker.batch_size,
            "sampling": sampling,
            "guidance": self.run.guidance,
            "limits": {"prompt": MAX_PROMPT, "n": MAX_IMAGES, "seed": MAX_SEED, "waiting": self.worker.capacity},
        }
        return JSONResponse(facts, 200 if facts["status"] == "ok" else 503)

    async def generations(self, wanted: ImageRequest, request: Request) -> Response:
        """OpenAI's images.generate."""
        progress = self._submitted(wanted, previews=False)
        tasks = [asyncio.ensure_future(part) for part in (self._finished(progress), _disconnected(request))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                return Response(status_code=499)  # nobody is there to read it
            images = tasks[0].result()
        finally:
            self.worker.abandon(progress.order)
            for task in tasks:
                task.cancel()
        return JSONResponse({"created": int(time.time()), "data": [{"b64_json": image} for image in images]})

    async def draw(self, wanted: ImageRequest) -> Response:
        """Lines of JSON: ``start`` with the seeds, ``rows`` for what is drawn of an image so far, ``image`` for a
        finished one, and ``error`` where drawing fails."""
        progress = self._submitted(wanted, previews=True)
        return DrawingResponse(self._lines(progress), self.worker, progress.order)

    def _submitted(self, wanted: ImageRequest, previews: bool) -> Progress:
        progress = Progress(wanted, self.run, previews)
        try:
            self.worker.submit(progress.order)
        except QueueFull as error:
            raise ApiError(
                429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)}
            ) from error
        except Stopping as error:
            raise ApiError(503, str(error), code="stopping") from error
        return progress

    async def _finished(self, progress: Progress) -> list[str]:
        """All the images of an order as PNG in base64."""
        while not progress.finished(self.worker.rows):
            await progress.next_change()
        return [await progress.png(index, self.worker.batch_size) for index in range(len(progress.order.views))]

    async def _lines(self, progress: Progress) -> AsyncIterator[str]:
        order, rows = progress.order, self.worker.rows
        yield _line(event="start", seeds=order.seeds, rows=rows)
        sent = [0] * len(order.seeds)
        try:
            while min(sent) < rows:
                await progress.next_change()
                for index, view in enumerate(order.views):
                    if view is None or view.rows == sent[index]:
                        continue
                    sent[index] = view.rows
                    last = view.rows == rows
                    png = await progress.png(index, self.worker.batch_size if last else None)
                    yield _line(event="image" if last else "rows", index=index, rows=view.rows, png=png)
        except ApiError as error:
            yield _line(event="error", **error.body())


def _line(**values) -> str:
    return json.dumps(values) + "\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(run: ServedRun, worker: Worker, loopback: bool) -> FastAPI:
    """``loopback``: whether the server listens to this machine alone; see the guard."""
    service = Service(run, worker)
    app = FastAPI(title="megat2i", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    app.add_middleware(Guard, loopback=loopback)
    for path, (name, media_type) in PAGE.items():
        content = resources.files("megat2i.serving").joinpath(name).read_bytes()
        app.add_api_route(path, _file(content, media_type), include_in_schema=False)
    app.add_api_route("/health", service.health)
    app.add_api_route("/v1/images/generations", service.generations, methods=["POST"])
    app.add_api_route("/draw", service.draw, methods=["POST"])
    app.add_exception_handler(ApiError, lambda _, error: error.response())
    app.add_exception_handler(RequestValidationError, lambda _, error: _invalid(error).response())
    app.add_exception_handler(HTTPException, lambda _, error: _http(error).response())
    app.add_exception_handler(Exception, lambda *_: ApiError(500, "the server failed; its log says why").response())
    return app


def _file(content: bytes, media_type: str):
    async def read() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8")

    return read


def _http(error: HTTPException) -> ApiError:
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def _invalid(error: RequestValidationError) -> ApiError:
    """One sentence on the first thing that is wrong."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no parameter {json.dumps(param[:50])}", param[:50], "unknown_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param or 'the body'}: {message}", param, "invalid_value")
