"""What a server is started with, checked at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from medsiglip_jax.files import settings, threads
from medsiglip_jax.model.config import ModelConfig, Preparation
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import PRESETS

MAX_PIXELS = 100_000_000  # of an image in a request; a file of somebody unknown may be a bomb
_BODIES = 16  # of the largest size, or as many bytes of fetched files, are held at a time
_PORT = Annotated[int, settings.between(0, 65535)]
_POSITIVE = Annotated[int, settings.at_least(1)]
_SECONDS = Annotated[float, settings.at_least(0)]


@dataclass(frozen=True)
class Settings:
    """How a server answers.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        max_batch: the most rows of one batch, a power of two.
        max_wait_ms: how long a batch waits for rows that are being read.
        queue: rows (images, patches and texts) that are accepted at a time; more are refused.
        max_body: bytes of a request.
        body_seconds: in which the body of a request has to be there.
        preprocess, rules, asked: how images become pixels, see `ModelConfig.prepared`; but for the
            route of Vertex AI, which does as the official container: "serving", and rules
            "official".
        api_keys: one of them is expected with each request; none if it is empty.
        allow_hosts, allow_prefixes, allow_private: which addresses are fetched, see `fetching`.
        fetch_seconds: in which an address has to be fetched.
        drain_delay: seconds between "not ready" and the closed socket when the server ends.
        cors_origins: of pages of others that may ask.
        log_requests: write hash and size of every request, for an audit trail.
        workers: threads that read and decode images.
        cached_texts: texts whose embeddings are kept.
        predict_route, health_route: of Vertex AI.
    """

    host: str = "127.0.0.1"
    port: _PORT = 8080
    max_batch: _POSITIVE = 64
    max_wait_ms: _SECONDS = 5.0
    queue: _POSITIVE = 256
    max_body: _POSITIVE = 32 << 20
    body_seconds: Annotated[float, settings.more_than(0)] = 60.0
    preprocess: Annotated[str | None, settings.one_of(PRESETS)] = None
    rules: Rules = Rules(max_pixels=MAX_PIXELS)
    asked: frozenset[str] = frozenset()
    api_keys: frozenset[str] = frozenset()
    allow_hosts: tuple[str, ...] = ()
    allow_prefixes: tuple[str, ...] = ()
    allow_private: bool = False
    fetch_seconds: Annotated[float, settings.more_than(0)] = 20.0
    drain_delay: _SECONDS = 5.0
    cors_origins: tuple[str, ...] = ()
    log_requests: bool = False
    workers: _POSITIVE = threads.processors()
    cached_texts: Annotated[int, settings.at_least(0)] = 10_000
    predict_route: str = "/predict"
    health_route: str = "/health"

    def __post_init__(self):
        settings.verify(self)
        if self.max_batch & (self.max_batch - 1):
            raise ValueError(f"max_batch is {self.max_batch}; expected a power of two, such as 64")
        for name in ("predict_route", "health_route"):
            if not (route := getattr(self, name)).startswith("/"):
                raise ValueError(f"{name} is {route!r}; expected a path that starts with /")

    def prepared(self, config: ModelConfig) -> Preparation:
        """How images become pixels for a model."""
        return config.prepared(self.preprocess, self.rules, self.asked)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def max_held(self) -> int:
        """Bytes of the bodies of all requests, and of files that wait to be decoded."""
        return _BODIES * self.max_body


def on_vertex(given: Settings, environment: Mapping[str, str]) -> Settings:
    """The settings with what Vertex AI says in AIP_HTTP_PORT and the like, which listens outside.

    Raises:
        ValueError: the port is no number.
    """
    routes = {"predict_route": "AIP_PREDICT_ROUTE", "health_route": "AIP_HEALTH_ROUTE"}
    own_routes = {name: environment[key] for name, key in routes.items() if environment.get(key)}
    port = environment.get("AIP_HTTP_PORT", "")
    if not port:
        return replace(given, **own_routes)
    if not port.isdecimal():
        raise ValueError(f"AIP_HTTP_PORT is {port!r}; expected a number")
    return replace(given, host="0.0.0.0", port=int(port), **own_routes)


def read_keys(path: str | os.PathLike) -> frozenset[str]:
    """The API keys of a file, one per line; lines that start with # are notes.

    Raises:
        ValueError: it has none, or one that a header cannot hold.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path}: no API key in it; expected one per line")
    wrong = [n for n, line in enumerate(lines, 1) if line in keys and not _fits_header(line)]
    if wrong:  # never the key itself
        raise ValueError(
            f"{path}: line {wrong[0]}: expected an API key of 16 to 512 letters of ASCII without "
            "spaces"
        )
    return keys


def _fits_header(key: str) -> bool:
    return 16 <= len(key) <= 512 and key.isascii() and key.isprintable() and " " not in key
