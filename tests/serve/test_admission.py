"""A full queue is told at once on every route, and who has gone keeps no place in it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

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
    service._pending += places
    try:
        yield release
    finally:
        service._pending -= places
        release.set()


def wait_for(happens):
    end = time.perf_counter() + 30
    while not happens() and time.perf_counter() < end:
        time.sleep(0.01)
    assert happens()


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
    assert ask().status == 200 and small.server.state.service._pending == 0


def test_a_request_has_its_places_until_it_is_answered(small):
    """What embeds and then searches cannot be refused between the two."""
    service = small.server.state.service
    with ThreadPoolExecutor(1) as pool, busy(small, QUEUE - 1) as release:
        asked = pool.submit(small.post, "/v1/search", {"row": 0})
        wait_for(lambda: service._pending == QUEUE)
        assert not service.ready
        release.set()
        assert asked.result(30).status == 200
    assert service._pending == 0


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
