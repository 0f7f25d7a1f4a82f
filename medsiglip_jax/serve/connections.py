"""Connections of clients that send or read nothing, or send no end of headers: they are closed.

uvicorn waits for the end of headers, and for clients to read answers, as long as it takes, and its
parser httptools keeps headers and trailers of any length.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0  # in which the headers of a request have to be there, from their first byte
READ_SECONDS = 60.0  # in which a client has to read an answer
HEAD_BYTES = 64 << 10  # of headers, or of trailers, beside what one read from the socket brings


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits."""

    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    _answered: Any = None  # not `cycle`, which is the newest of several requests at once
    _unfinished = 0  # bytes since the parser has last come to the end of something

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Load balancers open connections before they need them.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._answered is not None:
            self._answered.disconnected = True  # else it would write to what is closed
            self._answered.message_event.set()  # and go on working

    def data_received(self, data: bytes) -> None:
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("Headers or trailers are too long.")

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        self._unfinished = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unfinished = 0
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unfinished = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        super().resume_writing()
