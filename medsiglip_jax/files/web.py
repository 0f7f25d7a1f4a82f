"""Answers of servers that cannot hang or fill the memory: how fsspec reaches http(s) and gs://.

aiohttp has a timeout for silence, and one for an answer as a whole, which would end large files on
slow lines. Here the time that an answer may take grows with what has arrived, and bytes are counted
while they arrive, after decompression.
"""

import asyncio
import re
import socket
import time
from collections.abc import Awaitable
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import aiohttp

from medsiglip_jax.files import limits
from medsiglip_jax.files.limits import TooLarge, TooSlow

# Bytes per second. An answer may take `Limits.timeout` seconds, and one more for so many bytes that
# have arrived: one that drips ends soon after the timeout, and a steady line is never cut.
SLOWEST = 65536
REDIRECTS = 5
# When the request began that this task is waiting for, redirects included.
_began: ContextVar[float] = ContextVar("began")


def options(protocol: str) -> dict[str, Any]:
    """Arguments of fsspec's file system of a protocol, with which its answers are measured."""
    return _options(protocol, limits.current().timeout)


@lru_cache  # fsspec has one file system, with one pool of connections, for equal options
def _options(protocol: str, seconds: float) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=None, connect=seconds, sock_read=seconds)
    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(_note_start)
    session = {"response_class": _Answer, "trace_configs": [trace]}
    if protocol == "gs":
        return {"session_kwargs": session, "requests_timeout": timeout}
    # The number that aiohttp takes is the first that is refused.
    return {"client_kwargs": {**session, "timeout": timeout}, "max_redirects": REDIRECTS + 1}


async def _note_start(session: Any, context: Any, params: Any) -> None:
    _began.set(time.monotonic())


class _Answer(aiohttp.ClientResponse):
    """An answer whose headers and body are measured."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        clock = _Clock()
        await clock.wait_for(super().start(connection))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
        # A part of a table may be larger than an image may; the reader has asked for that.
        in_parts = wanted is not None and self.status == 206
        most = int(wanted[2]) - int(wanted[1]) + 1 if wanted and in_parts else None
        self.content: Any = _Body(self.content, clock, most, self.content_length)
        return self


class _Clock:
    """The time that is left of an answer."""

    def __init__(self):
        self._end = _began.get(time.monotonic()) + limits.current().timeout

    async def wait_for(self, work: Awaitable[Any]) -> Any:
        seconds = limits.current().timeout
        try:
            async with asyncio.timeout(self._end - time.monotonic()):
                return await work
        except TimeoutError as error:
            raise TooSlow(
                f"no answer within {seconds:g} s, or less than {SLOWEST >> 10} KiB/s (--timeout)"
            ) from error

    def add(self, count: int) -> None:
        """Gives the time that so many bytes more may take."""
        self._end += count / SLOWEST


class _Body:
    """The stream of an answer's body; what is not here is that of aiohttp's `StreamReader`.

    Args:
        stream: aiohttp's.
        clock: started with the request.
        most: bytes that may be read into memory at once; None is what the limits say.
        announced: the length that the server has announced, if any.
    """

    def __init__(self, stream: Any, clock: _Clock, most: int | None, announced: int | None):
        self._stream, self._clock, self._most, self._announced = stream, clock, most, announced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, count: int = -1) -> bytes:
        if count >= 0:
            return await self._measured(self._stream.read(count))
        most = limits.current().max_bytes if self._most is None else self._most
        received, blocks = self._announced or 0, []
        if received <= most:
            received = 0
            while block := await self._measured(self._stream.readany()):
                blocks.append(block)
                if (received := received + len(block)) > most:
                    break
        if received > most:
            raise TooLarge(f"more than {most:,} bytes" + " (--max-bytes)" * (self._most is None))
        return b"".join(blocks)

    async def _measured(self, reading: Awaitable[bytes]) -> bytes:
        block = await self._clock.wait_for(reading)
        self._clock.add(len(block))
        return block


def explained(error: BaseException) -> tuple[str, bool] | None:
    """Why an address could not be read, in words that do not repeat it, and whether trying again
    may help; None of what is no error of a network, and of a status such as 403."""
    if isinstance(error, TooSlow):
        return str(error), True
    if isinstance(error, aiohttp.TooManyRedirects):
        return f"redirected more than {REDIRECTS} times", False
    if isinstance(error, aiohttp.ClientResponseError):
        malformed = isinstance(error.__cause__, aiohttp.http.HttpProcessingError)
        return ("its server sends no valid HTTP, or too long headers", False) if malformed else None
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer ends early, or is damaged", True
    if isinstance(error, aiohttp.RedirectClientError):
        return "redirected to what is no address of http or https", False
    if isinstance(error, aiohttp.ClientSSLError):
        return "its server has no valid certificate", False
    return _without_answer(error)


def _without_answer(error: BaseException) -> tuple[str, bool] | None:
    """`explained` of errors that come before any answer of a server."""
    of_system = getattr(error, "os_error", error)
    if isinstance(error, aiohttp.ClientConnectorDNSError) or isinstance(of_system, socket.gaierror):
        unknown = isinstance(of_system, socket.gaierror) and of_system.errno == socket.EAI_NONAME
        return "its name cannot be looked up", not unknown
    if isinstance(error, TimeoutError):
        return f"no answer within {limits.current().timeout:g} s (--timeout)", True
    if isinstance(error, ValueError):  # of fsspec's HTTPFile; others are invalid addresses
        of_range = "range requests" in str(error)
        return ("its server sends no parts of files", False) if of_range else None
    if isinstance(error, aiohttp.ClientError | OSError):
        reason = getattr(of_system, "strerror", None) or type(error).__name__
        return f"no connection ({reason})", True
    return None
