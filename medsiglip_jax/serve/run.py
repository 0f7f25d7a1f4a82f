"""A server from its first moment to its last: it listens, loads, answers, drains and ends."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import uvicorn

from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.inference.abstain import Abstention, KnownImages
from medsiglip_jax.model.api import Model
from medsiglip_jax.serve import images
from medsiglip_jax.serve.app import build
from medsiglip_jax.serve.connections import Connection
from medsiglip_jax.serve.corpus import Corpus
from medsiglip_jax.serve.service import Fetches, Service
from medsiglip_jax.serve.settings import Settings
from medsiglip_jax.serve.state import State

_KEEP_ALIVE = 75  # seconds; longer than the 60 of the load balancers that sit in front
_BACKLOG = 2048


class Server:
    """Answers requests until it is stopped.

    It listens before the model is loaded, and says 503 until then, so that an orchestrator sees
    the difference between a slow start and none.

    Attributes:
        state: what its routes see.
        port: where it listens.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        load: Callable[[], Model],
        probes: Mapping[str, Probe] | None = None,
        corpus: Corpus | None = None,
        fetcher: Fetches | None = None,
        tls: tuple[str, str] | None = None,
        on_ready: Callable[[], Any] = lambda: None,
        known: KnownImages | None = None,
        abstention: Abstention | None = None,
    ):
        """Opens the port.

        Args:
            settings: of the server.
            name: of the model, for requests and answers.
            load: gives the model.
            probes: by the names that requests have.
            corpus: embeddings of this model to search.
            fetcher: of addresses; None refuses them all.
            tls: files of the certificate chain and of its key; None speaks plain HTTP.
            on_ready: called once the first request would be answered.
            known: images of a reference, which must be of this model.
            abstention: of that reference; /v1/classify says when there is no answer.

        Raises:
            OSError: the port is taken, or the certificate cannot be read.
        """
        self.state = State(
            settings, name, probes=dict(probes or {}), corpus=corpus, known=known,
            abstention=abstention,
        )  # fmt: skip
        self._load, self._fetcher, self._on_ready = load, fetcher, on_ready
        self._socket = _listen(settings.host, settings.port)
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            build(self.state), log_config=None, access_log=False, server_header=False, ws="none",
            lifespan="off", timeout_keep_alive=_KEEP_ALIVE, backlog=_BACKLOG,
            http=Connection, ssl_certfile=tls and tls[0], ssl_keyfile=tls and tls[1],
        )  # fmt: skip
        self._uvicorn = _Uvicorn(config, self.state, fetcher)
        self._failure: BaseException | None = None
        self._loading = threading.Thread(target=self._start, name="loading", daemon=True)

    @property
    def is_loading(self) -> bool:
        """Whether the model is still being loaded or compiled, which nothing can interrupt."""
        return self._loading.is_alive()

    @property
    def signal(self) -> int | None:
        """The signal that ended `run`."""
        return self._uvicorn.signal

    def run(self) -> None:
        """Serves until a signal or `stop`; SIGTERM drains first, a second signal ends at once.

        Raises:
            Exception: what `load` has raised, or a ValueError if probes or embeddings are of
                another model.
        """
        images.remove_leftovers()
        self._loading.start()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._socket.close()
        if self._failure is not None:
            raise self._failure
        if self.state.service is not None:
            self.state.service.close()

    def stop(self) -> None:
        """Ends `run` after what was accepted is answered; may be called from any thread."""
        self._uvicorn.should_exit = True

    def _start(self) -> None:
        try:
            model = self._load()
            self.state.check(model)
            state, fetcher = self.state, self._fetcher
            service = Service(model, state.settings, state.measures, fetcher, state.held)
            service.start()
        except BaseException as error:  # raised in `run`, on the main thread
            self._failure = error
            self.stop()
            return
        self.state.service = service
        self._on_ready()


class _Uvicorn(uvicorn.Server):
    """Ends as Kubernetes needs it: not ready first, and the socket closed only some time later."""

    def __init__(self, config: uvicorn.Config, state: State, fetcher: Fetches | None):
        super().__init__(config)
        self._state, self._fetcher, self._loop = state, fetcher, None
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._fetcher is not None:
            await self._fetcher.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._state.draining or self._loop is None:
            os._exit(128 + sig)
        self._state.draining, self.signal = True, sig
        # Nobody waits for the news at a terminal.
        delay = 0.0 if sig == signal.SIGINT else self._state.settings.drain_delay
        self._loop.call_soon_threadsafe(self._loop.call_later, delay, self._close)

    def _close(self) -> None:
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"cannot listen on {host}, port {port}: {reason}; choose another (--host, --port)"
        ) from None
