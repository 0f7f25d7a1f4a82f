"""What keeps jax's client from aborting a process as soon as process 0 is gone."""

import contextlib
import socket
import threading
import time

_CONNECT_SECONDS = 10.0
_RETRY_SECONDS = 0.2


class Relay:
    """A port of this machine whose connections are passed on to process 0, for jax's client.

    Once `holds` is set, the end of process 0 is not passed on: jax would abort this process before
    `peers.Watch` can say what has happened.
    """

    def __init__(self, host: str, port: int):
        self.holds = threading.Event()
        self._target = host, port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while self._server.fileno() >= 0:
            try:
                inner, _ = self._server.accept()
            except OSError:  # too many open files
                time.sleep(_RETRY_SECONDS)
                continue
            try:
                outer = socket.create_connection(self._target, timeout=_CONNECT_SECONDS)
            except OSError:  # process 0 has not started yet; jax tries again
                inner.close()
                continue
            outer.settimeout(None)
            threading.Thread(target=self._up, args=(inner, outer), daemon=True).start()
            threading.Thread(target=self._down, args=(outer, inner), daemon=True).start()

    def _up(self, inner: socket.socket, outer: socket.socket) -> None:
        _copy(inner, outer)
        _close(outer)
        _close(inner)

    def _down(self, outer: socket.socket, inner: socket.socket) -> None:
        _copy(outer, inner)
        if not self.holds.is_set():
            _close(inner)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
    connection.close()
