"""A server in a thread, and clients that speak plain HTTP to it."""

import base64
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import medsiglip_jax
from medsiglip_jax.serve import run
from medsiglip_jax.serve.settings import Settings


class Answer(NamedTuple):
    """What a server answered: status, headers in lower case, and the body, parsed if it is JSON."""

    status: int
    headers: dict[str, str]
    body: Any


class Client:
    """Asks one server."""

    def __init__(self, server: run.Server):
        self.server, self.port = server, server.port

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, None, headers)

    def post(self, path: str, document: Any, **headers: str) -> Answer:
        """Sends a document as JSON; headers with underscores for dashes."""
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        return self.send("POST", path, data, {"content_type": "application/json", **headers})

    def send(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, named)
            answer = connection.getresponse()
            content = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return Answer(answer.status, found, json.loads(content) if is_json else content)


@contextmanager
def _serving(model: medsiglip_jax.Model, settings: Settings, **options: Any) -> Iterator[Client]:
    """A server of this model on a free port, which is ready."""
    ready = threading.Event()
    server = run.Server(settings, "tiny", lambda: model, on_ready=ready.set, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(120)
        yield Client(server)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """Starts a server: `with serving(model, settings) as client`."""
    return _serving


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> medsiglip_jax.Model:
    """The small model, with a tokenizer."""
    return medsiglip_jax.load(checkpoint)


@pytest.fixture(scope="session")
def client(model: medsiglip_jax.Model) -> Iterator[Client]:
    """A server with default settings, for tests that do not change it."""
    with _serving(model, Settings(port=0, max_batch=16, drain_delay=0.0)) as asked:
        yield asked


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> list[Path]:
    """Four pictures of different sizes: RGB, grey, with alpha, and with a palette."""
    folder, rng = tmp_path_factory.mktemp("sent"), np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 120, 3), np.uint8)
    smooth = Image.fromarray(noise).resize((200, 150), Image.Resampling.BICUBIC)
    modes = {"rgb": smooth, "grey": smooth.convert("L"), "alpha": smooth.convert("RGBA"),
             "palette": smooth.convert("P")}  # fmt: skip
    for name, image in modes.items():
        image.save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in modes]


@pytest.fixture(scope="session")
def encoded(files) -> list[str]:
    """The pictures as base64."""
    return [base64.b64encode(file.read_bytes()).decode() for file in files]
