"""A line of JSON for each request: what was asked and how long it took, never what was in it."""

import hashlib
import logging
import re
import secrets
import sys
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.serve.errors import LOG
from medsiglip_jax.serve.http import GONE
from medsiglip_jax.serve.state import State

HEADER = b"x-request-id"
_ID = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)
_OWN = ("error", "at", "request", "fields")


class RequestLog:
    """Middleware: gives each request an id, counts it, and writes its line."""

    def __init__(self, app: ASGIApp, state: State):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        noted = _Noted(scope, self.state)
        try:
            await self.app(scope, noted.receiving(receive), noted.sending(send))
        finally:
            seconds = time.perf_counter() - noted.start
            self.state.measures.request(noted.path(), noted.status, seconds, noted.size)
            if not noted.is_probe():
                LOG.info("request", extra={"fields": noted.line(seconds)})


class _Noted:
    """What is noted of one request while it passes."""

    def __init__(self, scope: Scope, state: State):
        self.scope, self.start, self.size, self.status = scope, time.perf_counter(), 0, GONE
        self.hash = hashlib.sha256() if state.settings.log_requests else None
        self.state = state
        given = dict(scope["headers"]).get(HEADER, b"")
        self.id = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        scope["request_id"] = self.id.decode()

    def receiving(self, receive: Receive) -> Receive:
        """`receive`, which counts the bytes of the body and, if they are asked for, hashes them."""

        async def received() -> Message:
            message = await receive()
            body = message.get("body", b"")
            self.size += len(body)
            if self.hash is not None:
                self.hash.update(body)
            return message

        return received

    def sending(self, send: Send) -> Send:
        """`send`, which notes the status, and adds the id of the request to the headers."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                closing = [(b"connection", b"close")] if self.state.draining else []
                message["headers"] = [*message.get("headers", ()), (HEADER, self.id), *closing]
            await send(message)

        return sent

    def path(self) -> str:
        """That of the route as it was declared, so that there are few of them."""
        return getattr(self.scope.get("route"), "path", "other")

    def is_probe(self) -> bool:
        """Whether it is of a route that says so; see `openapi.Operation`."""
        operation = getattr(self.scope.get("route"), "operation", None)
        return operation is not None and operation.probe

    def line(self, seconds: float) -> dict[str, Any]:
        """What the log says of the request, which took so many seconds; none of its content."""
        line: dict[str, Any] = {
            "id": self.id.decode(), "route": self.path(), "status": self.status,
            "ms": round(1000 * seconds, 1), "bytes": self.size,
        }  # fmt: skip
        if self.hash is not None:
            from medsiglip_jax import __version__

            line |= {
                "sha256": self.hash.hexdigest(),
                "model": self.state.name,
                "version": __version__,
            }
        return line


class _Lines(logging.Formatter):
    """One JSON object per record, of the fields that are known to hold no content."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{when}.{record.msecs:03.0f}Z", "level": record.levelname.lower(),
                "event": record.getMessage()}  # fmt: skip
        own = {name: getattr(record, name) for name in _OWN if hasattr(record, name)}
        return dumps({**line, **own.pop("fields", {}), **own})


def to_stderr() -> None:
    """Writes the log of the server on stderr; called once by the command."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
