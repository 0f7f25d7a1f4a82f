"""From an HTTP request to its JSON, and from what a contract answers to a response."""

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from medsiglip_jax.files import documents, json_text
from medsiglip_jax.serve.errors import InstanceError, RequestError, note_bug
from medsiglip_jax.serve.service import COUNTS, Service, TextCounts
from medsiglip_jax.serve.settings import Settings
from medsiglip_jax.serve.state import State

NOT_JSON = "expected a body of JSON"
TEXTS_CUT = "x-texts-cut"  # header: how many texts of the request are longer than the model reads
GONE = 499  # nginx's status, in the log and in /metrics, of a client that has gone
_CLOSE = {"Connection": "close"}  # of those who would go on sending
_TURN = 1 << 15  # characters after which others have a turn: 1 to 2 ms
T = TypeVar("T")
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

    async def answer(document: Any, request: Request) -> Response:
        service = state.current()
        with service.queue.admitted():
            try:
                answered = await handle(service, document, request)
            except InstanceError as error:  # of a contract that has none of a single instance
                state.measures.instance_error(error.code)
                raise
            if isinstance(answered, Response):
                return answered
            return Response(await write_json(answered), media_type="application/json")

    async def respond(request: Request) -> Response:
        COUNTS.set(counts := TextCounts())
        with _counted(state) as count:
            document = await read_json(request, count, state.settings)
            response = await unless_gone(request, answer(document, request))
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


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What work for a request gives, which is cancelled if its client goes before: then nothing
    more of it is read, decoded or computed, but for what has begun.

    Args:
        request: whose body has been read, or is of no interest.
        work: what is awaited.

    Raises:
        ClientDisconnect: the client has gone.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@contextlib.contextmanager
def _counted(state: State) -> Iterator[Callable[[int], None]]:
    """What counts the bytes of one body as held until its request is answered."""
    with state.held.counting() as hold:

        def count(more: int) -> None:
            if not hold(more):
                problem = f"requests of {state.held.most:,} bytes are being answered; try again"
                raise RequestError(429, problem, {"Retry-After": "1", **_CLOSE})

        yield count


async def read_json(request: Request, count: Callable[[int], None], settings: Settings) -> Any:
    """The document in a body. Every route that reads one does so here.

    Args:
        request: whose body it is.
        count: called with the size of each part of it.
        settings: how long it may be, and how long it may take.

    Raises:
        RequestError: 400, it is no JSON; 408, it takes too long; 413, it is too long.
    """
    parts, size, seconds = [], 0, settings.body_seconds
    _check_size(int(request.headers.get("content-length", 0)), settings)
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                _check_size(size, settings)
                count(len(part))
                parts.append(part)
    except TimeoutError:
        raise RequestError(408, f"the body was not there within {seconds:g} s", _CLOSE) from None
    return _parse(b"".join(parts))


def _check_size(size: int, settings: Settings) -> None:
    if size > settings.max_body:
        problem = "the body is larger than this server takes (--max-body)"
        raise RequestError(413, problem, _CLOSE)


def _parse(body: bytes) -> Any:
    """The document. The garbage collector waits: it would go over everything again and again while
    it is made, and 11 million empty lists in 32 MiB took 5.4 s instead of 0.8."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return documents.loads(body, strict=True)
    except ValueError:
        raise RequestError(400, NOT_JSON) from None
    finally:
        if collects:
            gc.enable()


async def write_json(document: Any) -> bytes:
    """The JSON of a document, during which other requests have their turns.

    256 vectors of 1,152 floats take 0.4 s. A thread would not help: the encoder is one call in C,
    in which no other thread runs.
    """
    parts, size = [], 0
    for part in json_text.parts(document):
        parts.append(part)
        size += len(part)
        if size > _TURN:
            await asyncio.sleep(0)
            size = 0
    return "".join(parts).encode()


def as_request_error(
    error: RequestError | InstanceError | HTTPException | ClientDisconnect,
) -> RequestError:
    """The error of a request that something in it, or Starlette, has raised."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InstanceError):
        return RequestError(400, error.description)
    if isinstance(error, ClientDisconnect):
        return RequestError(GONE, "the client has gone")
    return RequestError(error.status_code, str(error.detail))
