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


@pytest.fixture(scope="module")
def small(model, serving):
    """A server with a short queue and one thread that reads."""
    chosen = Settings(port=0, max_batch=1, queue=QUEUE, workers=1, drain_delay=0.0)
    with serving(model, chosen, corpus=Rows(model.config.embed_dim)) as client:
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
        end = time.perf_counter() + 30
        while service._pending < QUEUE and time.perf_counter() < end:
            time.sleep(0.01)
        assert not service.ready
        release.set()
        assert asked.result(30).status == 200
    assert service._pending == 0
