"""A full queue is told at once on every route, and who has gone keeps no place in it."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from waiting import wait_for

from medsiglip_jax.serve.corpus import Corpus
from medsiglip_jax.serve.settings import Settings

QUEUE = 4
FILE = b"x" * 1000  # which is fetched, and is no image
ADDRESS = {"image": {"image_url": "https://images.example.org/a.png"}}
INFER = "/v2/models/tiny/infer"
TEXTS = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}


class Rows(Corpus):
    """Stands for a run of a single row."""

    preset, rules = "big_vision", Settings().rules

    def __init__(self, dim):
        self.dim = dim

    def check(self, model):
        pass

    def vector(self, row):
        return np.ones(self.dim, np.float32)

    def find(self, vector, k):
        return []

    def thumbnail(self, row):
        return b"png"


class Fetched:
    """Stands for the fetcher."""

    async def fetch(self, address):
        return FILE

    async def close(self):
        pass


@pytest.fixture(scope="module")
def small(model, serving):
    """A server with a short queue and one thread that reads."""
    chosen = Settings(port=0, max_batch=1, queue=QUEUE, workers=1, drain_delay=0.0)
    with serving(model, chosen, corpus=Rows(model.config.embed_dim), fetcher=Fetched()) as client:
        yield client


@contextmanager
def busy(client, places):
    """The thread that reads is at work, and so many places of the queue are taken."""
    service, release = client.server.state.service, threading.Event()
    service._pool.submit(release.wait, 60)
    service.queue.pending += places
    try:
        yield release
    finally:
        service.queue.pending -= places
        release.set()


@pytest.mark.parametrize("path, document, places", [
    (INFER, {"inputs": [TEXTS]}, QUEUE), (INFER, {"inputs": [TEXTS]}, QUEUE - 1),
    ("/v1/search", {"row": 0}, QUEUE), ("/v1/thumbnails/0", None, QUEUE),
    ("/predict", {"instances": [{"text": "a"}]}, QUEUE),
    ("/v1/classify", {"images": ["AAAA"], "texts": ["a"]}, QUEUE),
])  # fmt: skip
def test_a_full_queue_is_told_before_anything_waits_for_a_thread(small, path, document, places):
    def ask():
        return small.get(path) if document is None else small.post(path, document)

    with ThreadPoolExecutor(1) as pool, busy(small, places) as release:
        asked = pool.submit(ask)
        try:
            answer = asked.result(5)
        finally:
            release.set()
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
    assert ask().status == 200 and small.server.state.service.queue.pending == 0


def test_a_request_has_its_places_until_it_is_answered(small):
    """What embeds and then searches cannot be refused between the two."""
    service = small.server.state.service
    with ThreadPoolExecutor(1) as pool, busy(small, QUEUE - 1) as release:
        asked = pool.submit(small.post, "/v1/search", {"row": 0})
        wait_for(lambda: service.queue.pending == QUEUE)
        assert not service.ready
        release.set()
        assert asked.result(30).status == 200
    assert service.queue.pending == 0


def test_fetched_files_are_held_within_the_limit_of_bodies_until_they_are_decoded(small):
    held = small.server.state.held
    with ThreadPoolExecutor(1) as pool, busy(small, 0) as release:
        asked = pool.submit(small.post, "/predict", {"instances": [ADDRESS]})
        wait_for(lambda: held.size > len(FILE))  # beside the body
        release.set()
        assert "not an image" in asked.result(30).body["predictions"][0]["error"]["description"]
    assert held.size == 0


def test_a_fetched_file_beyond_the_limit_is_an_error_that_says_so(small):
    held = small.server.state.held
    taken = held.most - len(FILE)  # the body fits, and the file does not
    held.size += taken
    try:
        answer = small.post("/predict", {"instances": [ADDRESS, {"text": "a"}]})
        named = small.post("/v1/embeddings", {"modality": "image", "input": ["https://a.org/b"]})
    finally:
        held.size -= taken
    wrong, right = answer.body["predictions"]
    assert wrong["error"]["code"] == "TOO_MANY_REQUESTS_ERROR" and "embedding" in right
    assert named.status == 429 and named.headers["retry-after"] == "1"
    assert held.size == 0


def left(port, path, document):
    """Asks, and goes at once."""
    body = json.dumps(document).encode()
    method = "GET" if document is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: gone\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield
    yield


@pytest.mark.parametrize("path, document, places", [
    ("/predict", {"instances": [{"image": {"input_bytes": "AAAA"}}, ADDRESS]}, 2),
    ("/v1/embeddings", {"input": ["a text that nobody has asked for", "and another"]}, 2),
    (INFER, {"inputs": [TEXTS]}, 2), ("/v1/search", {"row": 0}, 1), ("/v1/thumbnails/0", None, 1),
])  # fmt: skip
def test_nothing_more_is_done_for_a_client_that_has_gone(
    small, path, document, places, monkeypatch
):
    service, lines = small.server.state.service, []
    monkeypatch.setattr("medsiglip_jax.serve.logs.LOG.info", lambda *_, extra: lines.append(extra))
    monkeypatch.setattr(service._batcher, "submit", None)  # would fail
    with busy(small, 0):
        client = left(small.port, path, document)
        next(client)
        wait_for(lambda: service.queue.pending == places)
        next(client)
        wait_for(lambda: service.queue.pending == 0 and lines)
        queue = service._pool._work_queue
        waiting = [queue.get_nowait() for _ in range(queue.qsize())]
        assert waiting and all(item.future.cancelled() for item in waiting)
    [line] = lines
    assert (line["fields"]["status"], line["fields"]["id"]) == (499, "gone")
    assert 'code="499"' in small.get("/metrics").body.decode()
    assert small.server.state.held.size == 0


def test_of_several_requests_of_one_connection_the_one_at_work_is_told(small):
    """uvicorn itself tells the last one only."""
    service = small.server.state.service
    body = json.dumps({"row": 0}).encode()
    asked = f"POST /v1/search HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with busy(small, 0):
        with socket.create_connection(("127.0.0.1", small.port)) as client:
            client.sendall(asked + b"GET /health HTTP/1.1\r\n\r\n")
            wait_for(lambda: service.queue.pending == 1)
        wait_for(lambda: service.queue.pending == 0)


def test_rows_that_wait_for_the_device_go_with_their_client(small, monkeypatch):
    service, release = small.server.state.service, threading.Event()
    encode, empty = service._batcher._encoders["text"]
    encoded = []

    def slow(values):
        encoded.append(len(values))
        release.wait(30)
        return encode(values)

    monkeypatch.setitem(service._batcher._encoders, "text", (slow, empty))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(small.post, "/predict", {"instances": [{"text": "the first text"}]})
        wait_for(lambda: encoded)
        client = left(small.port, "/v1/embeddings", {"input": ["x", "y"]})
        next(client)
        wait_for(lambda: service._batcher.waiting() == 2)
        next(client)
        wait_for(lambda: service.queue.pending == 1)
        release.set()
        assert first.result(30).status == 200
    wait_for(lambda: service._batcher.waiting() == 0)
    assert encoded == [1]
