"""Requests that are broken, lie, cost too much or never end: they are refused, and others not."""

import json
import socket
import time

import hostile_serve as hostile
import numpy as np
import pytest
from waiting import HANGS, wait_for

from medsiglip_jax.serve import connections
from medsiglip_jax.serve.corpus import Corpus
from medsiglip_jax.serve.settings import Settings

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def short(model, serving):
    """A server with short limits."""
    chosen = Settings(port=0, max_batch=1, max_body=20_000, body_seconds=1.0, drain_delay=0.0)
    with serving(model, chosen) as client:
        yield client


def test_no_request_gets_5xx_a_long_error_or_its_secret_back(client):
    vector = hostile.good_vector(client.port)
    found = hostile.attempts(client.port, range(110), seed=1)
    assert [row["wrong"] for row in found if row["wrong"]] == []
    assert {row["status"] for row in found} > {0, 200, 400, 404, 405}
    assert client.get("/health/ready").status == 200
    assert np.abs(hostile.good_vector(client.port) - vector).max() <= 1e-6


@pytest.mark.parametrize("path, document, said", [
    (INFER, {"id": "\ud800", "inputs": []}, "id: it cannot be written as UTF-8"),
    (INFER, {"inputs": [{"name": "text", "datatype": "BYTES", "data": ["a"],
                         "shape": [1, *[(1 << 31) - 1] * 20_000]}]}, "expected [n]"),
    (INFER, {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 28, 28, 3],
                         "data": ["a" * 10_000, *[0] * 500_000]}]}, "expected whole numbers"),
    ("/", {"inputs": "AAAA", "parameters": {"candidate_labels": ["a" * 100_000] * 9,
                                            "hypothesis_template": "{}" * 4_000}}, "once"),
    ("/", {"inputs": "AAAA", "parameters": {"candidate_labels": ["a"] * 60_000,
                                            "hypothesis_template": "{}" + "a" * 100_000}}, "once"),
    ("/v1/embeddings", {"input": [""] * 500_000}, "500,000 elements; expected at most 65,536"),
    ("/v1/classify", {"texts": ["a"], "images": [""] * 70_000}, "70,000 elements"),
])  # fmt: skip
def test_what_would_cost_minutes_or_gigabytes_is_refused_at_once(client, path, document, said):
    start = time.process_time()  # of the server, too, which is a thread
    answer = client.post(path, document)
    assert answer.status == 400 and said in json.dumps(answer.body)
    assert time.process_time() - start < 5


def test_a_row_of_any_length_is_no_bug(model, serving):
    class Rows(Corpus):
        def __init__(self):
            pass

        def thumbnail(self, row):
            raise IndexError(row)

        def check(self, model):
            pass

    with serving(model, Settings(port=0, max_batch=1, drain_delay=0.0), corpus=Rows()) as client:
        for row in ("9" * 5000, "9" * 18, "-1", "a", "1.0", "٣"):
            path = "/v1/thumbnails/" + "".join(f"%{byte:02x}" for byte in row.encode())
            assert client.get(path).status == 404


def test_a_model_whose_name_has_health_in_it_has_its_requests_in_the_log(client, monkeypatch):
    lines = []
    monkeypatch.setattr("medsiglip_jax.serve.logs.LOG.info", lambda *_, extra: lines.append(extra))
    for path in ("/v1/models/health", "/health", "/.well-known/live", "/v2/health/ready"):
        client.get(path)
    wait_for(lambda: lines)
    assert [line["fields"]["route"] for line in lines] == ["/v1/models/{model:path}"]


# ---------------------------------------------------------------------------- clients that are slow


@pytest.mark.parametrize("name", ["never reads", "a body", "chunks", "a body after the answer"])
def test_the_slow_clients_of_the_script_get_past_the_check_of_their_host(client, name):
    """Refused with a few bytes, those that never read would have been idle ones."""
    head = hostile.DRIPS[name].partition(b"\r\n\r\n")[0]
    ends = {"never reads": b"", "chunks": b"1\r\n1\r\n0\r\n\r\n"}
    sent = head.replace(b"1000000", b"1") + b"\r\n\r\n" + ends.get(name, b"1")
    answer = hostile.exchange(client.port, sent)
    assert answer.status == (200 if b"GET" in head else 400), answer.all
    if name == "never reads":
        assert len(answer.body) > 20_000  # and 400 of them are more than the buffers of a socket


def _dripping(port, start, piece):
    """What was answered to a client that sends a piece each 0.1 s, until it was closed."""
    end, found = time.perf_counter() + HANGS, b""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(0.1)
        client.sendall(start)
        while time.perf_counter() < end:
            try:
                if not (part := client.recv(65536)):
                    return found
                found += part
            except TimeoutError:
                client.sendall(piece)
            except ConnectionError:
                return found
    raise AssertionError(f"still open: {found!r}")


@pytest.mark.parametrize("head, piece", [
    (b"Content-Length: 9999\r\n\r\n[", b"1"),
    (b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n1\r\n"),
])  # fmt: skip
def test_a_body_that_takes_too_long_is_cut(short, head, piece):
    answer = _dripping(short.port, b"POST /predict HTTP/1.1\r\n" + head, piece)
    assert answer.startswith(b"HTTP/1.1 408") and b"within 1 s" in answer
    assert short.server.state.held.size == 0


@pytest.mark.parametrize("start", [
    b"POST /predict HTTP/1.1\r\nX-A: ", b"GET /health HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nX-A: ",
    b"GET /health HTTP/1.1\r\nContent-Length: 999\r\n\r\n",
])  # fmt: skip
def test_headers_that_take_too_long_are_cut(short, start, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    answer = _dripping(short.port, start, b"a")
    assert answer.startswith(b"HTTP/1.1 200") == (b"health" in start)


@pytest.mark.parametrize("start", [
    b"GET /health HTTP/1.1\r\nX-A: ", b"GET /health HTTP/1.1\r\nX-A: a\r\n",
    b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: ",
])  # fmt: skip
def test_headers_and_trailers_without_end_are_cut(short, start):
    # In two or three pieces: the body, of which trailers are a part, may take a second only.
    piece = b"a" * 32_768 if start.endswith(b" ") else b"X-B: c\r\n" * 4096
    answer = _dripping(short.port, start, piece)
    assert answer.startswith(b"HTTP/1.1 400") and b"too long" in answer


def test_headers_as_long_as_clients_send_and_many_requests_at_once_are_answered(short):
    long = b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 50_000 + b"\r\n\r\n"
    many = b"GET /health HTTP/1.1\r\n\r\n" * 1000
    body = b"POST /nothing HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    body += b"1\r\na\r\n" * 19_000 + b"0\r\n\r\n"
    for sent, count, status in ((long, 1, b"200"), (many, 1000, b"200"), (body, 1, b"404")):
        with socket.create_connection(("127.0.0.1", short.port)) as client:
            client.settimeout(30)
            client.sendall(sent)
            found = b""
            while found.count(b"HTTP/1.1 " + status) < count:
                part = client.recv(1 << 20)
                assert part, found[-300:]
                found += part


def test_a_client_that_does_not_read_is_cut(short, monkeypatch, caplog):
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    held = short.server._uvicorn.server_state.connections
    with socket.create_connection(("127.0.0.1", short.port)) as client:
        client.sendall(b"GET /openapi.json HTTP/1.1\r\n\r\n" * 600)
        end = time.perf_counter() + HANGS
        ours = client.getsockname()  # a connection that has just come or gone has no address

        def is_held() -> bool:
            return any(connection.client == ours for connection in list(held))

        while not is_held():
            assert time.perf_counter() < end
        while is_held():
            assert time.perf_counter() < end
            time.sleep(0.05)
    assert not [record for record in caplog.records if record.exc_info]  # wrote to what is closed


def test_bodies_are_held_up_to_a_limit_and_then_others_wait(short):
    state = short.server.state
    assert state.settings.max_held == 16 * 20_000 and state.held.size == 0
    state.held.size = state.settings.max_held - 100
    try:
        answer = short.post("/predict", {"instances": [{"text": "a" * 200}]})
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
        assert short.post("/predict", {"instances": []}).status == 200
    finally:
        state.held.size -= state.settings.max_held - 100
    assert state.held.size == 0
