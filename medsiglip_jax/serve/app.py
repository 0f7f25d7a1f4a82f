"""The application: all contracts on one port, behind the same keys, limits and log."""

import functools
import hmac
import re
from collections.abc import Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from medsiglip_jax.serve import health, openapi, page
from medsiglip_jax.serve.contracts import (
    huggingface,
    kserve,
    native,
    openai,
    search,
    vertex,
    weaviate,
)
from medsiglip_jax.serve.http import TEXTS_CUT, as_request_error, getter, plain
from medsiglip_jax.serve.logs import RequestLog
from medsiglip_jax.serve.state import State

# A contract is a file and its name here.
CONTRACTS = (vertex, native, search, openai, huggingface, kserve, weaviate)

# Of this machine; HTTP/1.0 has no such header, which all browsers send.
_OWN_HOST = re.compile(rb"((localhost|127\.0\.0\.1|\[::1\])(:\d+)?)?", re.IGNORECASE)


def build(state: State) -> Starlette:
    """The ASGI application of a server.

    Args:
        state: of the server; its service may come later.
    """
    parts = (health, *CONTRACTS, page)
    routes = [route for part in parts for route in part.routes(state)]
    described = functools.cache(lambda: openapi.document(state, routes))  # milliseconds
    routes.append(openapi.Described(
        openapi.PATH, getter(lambda _: described()),
        openapi.Operation("This document", {"type": "object"}, open=True),
    ))  # fmt: skip
    middleware = [Middleware(RequestLog, state=state)]
    if state.settings.is_loopback and not state.settings.api_keys:
        middleware.append(Middleware(OwnHost))
    if origins := state.settings.cors_origins:
        middleware.append(Middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after", TEXTS_CUT],
        ))  # fmt: skip
    if state.settings.api_keys:
        middleware.append(Middleware(Keys, keys=state.settings.api_keys, routes=routes))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _explained},
    )


async def _explained(request: Request, error: Exception) -> Response:
    """What Starlette raises, such as for a path that there is not."""
    assert isinstance(error, HTTPException)
    problem = as_request_error(error)
    return JSONResponse(plain(problem), problem.status, error.headers)


class OwnHost:
    """Middleware: answers to the names of this machine only.

    A page of somebody's whose name is made to lead here (DNS rebinding) would otherwise be answered
    as if it were our own.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope["headers"]).get(b"host", b"") if scope["type"] == "http" else b""
        if _OWN_HOST.fullmatch(host):
            await self.app(scope, receive, send)
            return
        problem = "expected localhost in the header Host; other names need --api-key-file"
        await JSONResponse({"error": problem}, 421)(scope, receive, send)


class Keys:
    """Middleware: expects an API key, but of orchestrators and of readers of the documentation."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], routes: Iterable[openapi.Described]):
        self.app, self._keys = app, [key.encode() for key in keys]
        self._open = {r.path for r in routes if r.operation.open or r.operation.probe}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._known(scope):
            await self.app(scope, receive, send)
            return
        body = {"error": "expected the header Authorization: Bearer KEY"}
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]  # all of them
        return scheme.lower() == b"bearer" and any(matches)
