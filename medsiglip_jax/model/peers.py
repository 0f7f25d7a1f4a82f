"""The processes of one run watch each other: where one is lost, the others end and say which.

Process 0 has a connection to each of the others, on which both sides send a heartbeat. A process
that is killed closes its connection; one that has stopped, or whose host is gone, is silent. So is
one that holds Python's lock, as while a library is loaded from a slow disk: where that can take
40 s, give all processes more in MEDSIGLIP_JAX_HEARTBEAT_SECONDS. On Windows the main thread is not
interrupted by a signal: the process ends 10 s after the line, whatever it does.

Jax has heartbeats, too, but what follows there is LOG(FATAL): a stack trace and SIGABRT, which
nothing in Python can catch. Up to jax 0.11.2 its client takes a Python function as
`missed_heartbeat_callback`, but calling it ends in std::bad_cast. Jax therefore has more time than
this module takes (`JAX_SECONDS`), and does not see the end of its connection to process 0
(`relay.Relay`).
"""

import atexit
import contextlib
import os
import secrets
import selectors
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from medsiglip_jax.model import exits

JAX_SECONDS = 300  # after which jax ends what does not end by itself; two heartbeats fit into it
_BEAT = 5.0  # seconds between heartbeats
# Seconds without a heartbeat after which a process is lost. Loading a library of gigabytes from a
# network disk holds Python's lock, and with it the heartbeat, for tens of seconds.
_LIMIT = 40.0
_LIMIT_NAME = "MEDSIGLIP_JAX_HEARTBEAT_SECONDS"  # sets another limit
_GRACE = 10.0  # seconds for this process to save what it has, and for others that fail with it
_PATIENCE = {"lost": 0.0, "failed": _GRACE}  # seconds in which an error of its own may end it
_TICK = 0.2  # seconds
_LINE = 4096  # bytes; only a stranger sends longer lines
# What an error says if the network between processes, or another of them, has failed: whatever its
# class, for jax raises some as a ValueError; and if its class is jax's.
_LIBRARIES, _STATUSES = ("Gloo", "NCCL"), ("UNAVAILABLE", "DEADLINE", "ABORTED", "collective")


@dataclass
class _Peer:
    """The other end of a connection; `index` is None until it has said which process it is."""

    connection: socket.socket
    heard: float
    index: int | None = None
    where: str = ""
    unread: bytes = b""
    done: bool = False
    over: bool = False  # it ends because it has failed, or because another is lost


class Watch:
    """This process's connections to the others, and the thread that listens to them.

    What is sent are lines: "hello TOKEN INDEX WHERE" first, "" as a heartbeat, "done" when a
    process has finished, from process 0 when all have, "bye" before its connection ends, and "lost
    TEXT" or "failed TEXT" when all have to end.
    """

    def __init__(
        self, index: int, count: int, say: Callable[[str], None], close: Callable[[], None]
    ):
        """Watches nobody yet; `say` prints the line on a process that is lost, and `close` is
        called when all have finished. A ValueError if the environment has no good limit."""
        self._index, self._count, self._say, self._close = index, count, say, close
        self._where = f"host {socket.gethostname()}, pid {os.getpid()}"
        self._limit = _heartbeat_limit()
        self._token = secrets.token_hex(8)
        self._peers: list[_Peer] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._over: str | None = None  # why all end
        self._done = self._failed = self._unwound = False
        self._met, self._stopped, self._closed = (threading.Event() for _ in range(3))
        self._started = self._sent = time.monotonic()
        self._absent: set[int] = set()  # go on without a watch
        self._why_absent: Callable[[int], str | None] = lambda index: None

    def listen(self, host: str, why_absent: Callable[[int], str | None] | None = None) -> str:
        """What the others need for `connect`; for process 0, which they reach as `host`.

        `why_absent` tells of a process that has not connected why it goes on without, or None.
        """
        self._why_absent = why_absent or self._why_absent
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.getaddrinfo(host, None)[0][0]
        server = socket.create_server(
            ("", 0), family=family, backlog=self._count, dualstack_ipv6=both
        )
        server.settimeout(0)
        self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))
        return f"{server.getsockname()[1]} {self._token}"

    def connect(self, host: str, said: str) -> None:
        """Connects with process 0, which has said this in `listen`, before that misses this one."""
        port, self._token = said.split()
        self._add(socket.create_connection((host, int(port)), timeout=self._limit / 2))

    def start(self) -> None:
        """Begins to listen."""
        self._started = time.monotonic()
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def finish(self) -> None:
        """Waits until all processes have finished."""
        self._done = True
        if self._index:
            self._send("done")
        self._met.wait()
        self._close()
        self._send("bye")
        self._closed.set()

    def fail(self, error: BaseException) -> None:
        """Ends the others, for this process ends by an error; unless that has come of theirs."""
        of_jax = type(error).__name__ == "JaxRuntimeError"
        if any(word in str(error) for word in _LIBRARIES + (_STATUSES if of_jax else ())):
            _wait(lambda: self.is_lost, self._limit + _BEAT)
        with self._lock:
            self._unwound = True
            if self.is_lost:
                return
            self._failed = True
        name = self._name(self._index, self._where)
        self._send(f"failed {name} has failed or was stopped, as its own message says")
        if self._index == 0:  # the others may still need its keys and values to end
            _wait(lambda: all(peer.over for peer in self._known()), _GRACE)

    @property
    def is_lost(self) -> bool:
        """Whether this process ends because of another one, and has said so."""
        return self._stopped.is_set()

    @property
    def has_ended(self) -> bool:
        """Whether this process ends, and not together with all others after their work."""
        return self._failed or self.is_lost

    # --------------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(_TICK):
                key.data()
            self._beat()
            if not self._over:
                self._judge()

    def _accept(self, server: socket.socket) -> None:
        try:
            self._add(server.accept()[0])
        except OSError:  # too many open files, which must not make this thread spin; or it has gone
            time.sleep(_TICK)

    def _add(self, connection: socket.socket) -> None:
        connection.settimeout(self._limit)
        peer = _Peer(connection, time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(peer))
        self._peers.append(peer)
        if self._index:
            self._send(f"hello {self._token} {self._index} {self._where}", peer)

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return self._remove(peer)
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            self._take(peer, *line.decode(errors="replace").partition(" ")[::2])
        if peer.index is not None:  # a stranger has to say who it is within the limit
            peer.heard = time.monotonic()
        elif len(peer.unread) > _LINE:
            self._remove(peer)

    def _remove(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.index is None:
            return self._peers.remove(peer)
        said_so, peer.over = peer.over, True
        if not said_so:
            self._lose(peer, "it was killed or has crashed")

    def _take(self, peer: _Peer, word: str, rest: str) -> None:
        """Does what a line says; nothing that a stranger sends."""
        if word == "hello":
            token, index, where = (*rest.split(" ", 2), "", "")[:3]
            if token == self._token and index.isdecimal():
                peer.index, peer.where = int(index), where
                if self._index == 0:
                    self._send(f"hello {self._token} 0 {self._where}", peer)
        elif peer.index is None:
            return
        elif word == "done":
            peer.done = True
            if self._index:
                self._met.set()
        elif word == "bye":
            peer.over = True
        elif word in _PATIENCE:
            peer.over = True
            self._end(word, rest)

    def _beat(self) -> None:
        if time.monotonic() > self._sent + _BEAT:
            self._sent = time.monotonic()
            self._send("")

    def _judge(self) -> None:
        now = time.monotonic()
        for peer in [*self._peers]:
            silent = now - peer.heard
            if silent > self._limit and peer.index is None:
                self._remove(peer)
            elif silent > self._limit and not peer.over:
                return self._lose(peer, f"no heartbeat for {silent:.0f} s")
        known = self._known()
        others = range(1, self._count) if self._index == 0 else (0,)
        missing = set(others) - {peer.index for peer in known} - self._absent
        late = now > self._started + self._limit
        if late and (missing := {index for index in missing if not self._is_absent(index)}):
            return self._end("lost", f"{self._name(min(missing))} was lost: it never answered")
        finished = self._done and not missing and all(peer.done for peer in known)
        if self._index == 0 and finished and not self._met.is_set():
            self._send("done")
            self._met.set()

    def _is_absent(self, index: int) -> bool:
        """Whether a process goes on without a watch, as one that cannot connect does."""
        if why := self._why_absent(index):
            self._absent.add(index)
            warnings.warn(why, stacklevel=2)
        return bool(why)

    def _known(self) -> list[_Peer]:
        """The connections of processes of this run, and not of strangers."""
        return [peer for peer in self._peers if peer.index is not None]

    def _name(self, index: int | None, where: str = "") -> str:
        return f"process {index} of {self._count}" + (f" ({where})" if where else "")

    def _lose(self, peer: _Peer, why: str) -> None:
        self._end("lost", f"{self._name(peer.index, peer.where)} was lost: {why}")

    def _end(self, word: str, text: str) -> None:
        """Ends this process, and from process 0 all others, unless that is done already."""
        if self._over:
            return
        self._over = text
        if self._index == 0:
            self._send(f"{word} {text}")
        timer = threading.Timer(_PATIENCE[word], self._stop)
        timer.daemon = True
        timer.start()

    def _stop(self) -> None:
        """Says why, and interrupts the main thread, which may be in a collective without end."""
        with self._lock:
            if self._failed:
                return
            exits.leave_within(_GRACE)
            self._stopped.set()
            try:
                self._say(str(self._over))
            finally:
                if not self._unwound and hasattr(signal, "pthread_kill"):  # not on Windows
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _send(self, line: str, only: _Peer | None = None) -> None:
        all_others = [*self._peers] if self._index else self._known()
        for peer in [only] if only else all_others:
            with contextlib.suppress(OSError):  # `_receive` meets the end of the connection
                peer.connection.sendall(f"{line}\n".encode())


def _heartbeat_limit() -> float:
    """Seconds without a heartbeat after which a process is lost, as the environment says."""
    given, least, most = os.environ.get(_LIMIT_NAME), 2 * _BEAT, JAX_SECONDS
    if given is None:
        return _LIMIT
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0
    if not least <= seconds <= most:
        raise ValueError(f"{_LIMIT_NAME} is {given!r}; expected seconds, {least:.0f} to {most:.0f}")
    return seconds


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    """Waits until a condition holds, but no longer than so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(_TICK)


_watch: Watch | None = None  # of this process


def use(watch: Watch) -> None:
    """Starts a watch, which `ending` looks after."""
    global _watch
    _watch = watch
    watch.start()


def is_lost() -> bool:
    """Whether this process ends because of another one, and has said so."""
    return _watch is not None and _watch.is_lost


def has_ended() -> bool:
    """Whether this process ends without waiting for the others."""
    return _watch is not None and _watch.has_ended


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Has the other processes of the run, if there are any, end with the work of this one.

    After an error this process ends without waiting for them, as jax would do for minutes.
    """
    try:
        yield
        if _watch:
            _watch.finish()
    except BaseException as error:
        if _watch:
            atexit.register(exits.leave)  # of a bug, whose traceback comes after this
            _watch.fail(error)
            exits.leave_within(_GRACE)
        raise
