"""From an HTTP request to its JSON, and from what a contract answers to a response."""

import json
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from medsiglip_jax.serve.errors import InstanceError, RequestError
from medsiglip_jax.serve.service import COUNTS, Service, TextCounts
from medsiglip_jax.serve.state import State

LOG = logging.getLogger("medsiglip_jax.serve")
NOT_JSON = "expected a body of JSON"
TEXTS_CUT = "x-texts-cut"  # header: how many texts of the request are longer than the model reads
Handle = Callable[[Service, Any, Request], Awaitable[Any]]


def plain(error: RequestError) -> Any:
    """The body of an error, where a contract has no other form."""
    return {"error": error.message}


def endpoint(
    state: State, handle: Handle, failed: Callable[[RequestError], Any] = plain
) -> Callable[[Request], Awaitable[Response]]:
    """What Starlette calls for a route that takes JSON.

    Args:
        state: of the server.
        handle: service, document, request -> what is answered, as JSON or as a response.
        failed: the body of an error in the form of this contract.
    """

    async def respond(request: Request) -> Response:
        COUNTS.set(counts := TextCounts())
        document = await read_json(request)
        answered = await handle(state.current(), document, request)
        response = answered if isinstance(answered, Response) else JSONResponse(answered)
        if counts.cut:
            response.headers[TEXTS_CUT] = str(counts.cut)
        return response

    return answering(respond, failed)


def getter(
    tell: Callable[[Request], Any], failed: Callable[[RequestError], Any] = plain
) -> Callable[[Request], Awaitable[Response]]:
    """What Starlette calls for a route that takes no body.

    Args:
        tell: request -> what is answered, as JSON.
        failed: as of `endpoint`.
    """

    async def respond(request: Request) -> Response:
        return JSONResponse(tell(request))

    return answering(respond, failed)


def answering(
    respond: Callable[[Request], Awaitable[Response]],
    failed: Callable[[RequestError], Any] = plain,
) -> Callable[[Request], Awaitable[Response]]:
    """What Starlette calls for a route: `respond`, with errors in the form of its contract."""

    async def answer(request: Request) -> Response:
        try:
            return await respond(request)
        except (RequestError, InstanceError, HTTPException, ClientDisconnect) as error:
            problem = as_request_error(error)
            return JSONResponse(failed(problem), problem.status, problem.headers)
        except Exception as error:
            note_bug(error, request.scope.get("request_id", ""))
            return JSONResponse(failed(RequestError(500, "Internal server error.")), 500)

    return answer


async def read_json(request: Request) -> Any:
    """The document in a body.

    Raises:
        RequestError: 400, it is no JSON; 413, it is too long.
    """
    body = await request.body()
    try:
        return json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):  # ValueError also of bytes that are no UTF-8
        raise RequestError(400, NOT_JSON) from None


def _refuse(constant: str) -> Any:
    raise ValueError(constant)  # NaN and Infinity are no JSON


def as_request_error(
    error: RequestError | InstanceError | HTTPException | ClientDisconnect,
) -> RequestError:
    """The error of a request that something in it, or Starlette, has raised."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InstanceError):
        return RequestError(400, error.description)
    if isinstance(error, ClientDisconnect):
        return RequestError(400, "the client has gone")
    if error.status_code == 413:
        return RequestError(413, "the body is larger than this server takes (--max-body)")
    return RequestError(error.status_code, str(error.detail))


def note_bug(error: BaseException, request_id: str) -> None:
    """Logs where an error of ours was raised; its message may quote the request."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    kind = type(error).__name__
    LOG.error("internal error", extra={"error": kind, "at": place, "request": request_id})
