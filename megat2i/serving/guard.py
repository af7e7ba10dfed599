"""What every request passes before anything else looks at it, and what every answer carries.

A page of another site can send requests to a server on this machine through the visitor's browser. Two rules stop it:
while the server listens on the loopback interface alone, the Host header must be one of its names (else a foreign name
that resolves to 127.0.0.1 would be the same origin), and bodies must be JSON (browsers ask first before they send that
to another origin, and nobody says yes here).
"""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megat2i.serving.requests import ApiError

LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
MAX_BODY = 32 << 10  # bytes; a prompt of 1,000 escaped characters has 12 kB
BODY_S = 10.0  # in which a body must have come
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware. ``loopback``: whether the server listens to this machine alone."""

    def __init__(self, app: ASGIApp, loopback: bool):
        self.app, self.loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["method"])
            if scope["method"] == "POST":
                receive = _replay(await _body(receive), receive)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _check(self, headers: Headers, method: str) -> None:
        """Raises ApiError."""
        host = headers.get("host", "")
        if self.loopback and _without_port(host) not in LOOPBACK:
            raise ApiError(403, "the Host header must be localhost, 127.0.0.1 or [::1]", code="wrong_host")
        if method == "POST" and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json", code="wrong_content_type")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdigit() else host.lower()


async def _body(receive: Receive) -> bytes:
    """Raises ApiError where it is too long, too slow or cut off."""
    body = b""
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the connection ended before the body", code="incomplete_body")
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"the body is longer than {MAX_BODY} bytes", code="body_too_long")
                if not message.get("more_body"):
                    return body
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {BODY_S:.0f} s", code="body_too_slow") from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` as it was before ``body`` was read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
