"""The server around the contracts: keys, limits, ids, logs, numbers, and how it ends."""

import functools
import http.client
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from waiting import wait_for

from medsiglip_jax.serve import run, settings
from medsiglip_jax.serve.errors import LOG
from medsiglip_jax.serve.settings import Settings

KEY = "0123456789abcdef-key"


@pytest.fixture(scope="module")
def guarded(model, serving):
    """A server that expects a key, logs requests, and takes small bodies only."""
    chosen = Settings(
        port=0, max_batch=2, api_keys=frozenset([KEY, "another-key-of-mine"]), max_body=20_000,
        log_requests=True, cors_origins=("https://viewer.example.org",), drain_delay=0.0,
    )  # fmt: skip
    with serving(model, chosen) as client:
        yield client


def test_only_those_with_a_key_are_answered(guarded):
    body = {"instances": [{"text": "lung"}]}
    for wrong in ("Bearer wrong", KEY, f"Bearer {KEY[:-1]}", "Bearer ", "Basic " + KEY, ""):
        answer = guarded.post("/predict", body, authorization=wrong)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in json.dumps(answer.body)
    for right in (KEY, "another-key-of-mine"):
        answer = guarded.post("/predict", body, authorization=f"Bearer {right}")
        assert answer.status == 200


def test_orchestrators_need_no_key(guarded):
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert guarded.get(path).status == 200
    assert guarded.get("/v1/info").status == 401


@pytest.mark.parametrize("path, place", [
    ("/predict", ["error"]), ("/v1/embeddings", ["error", "message"]),
    ("/v2/models/tiny/infer", ["error"]), ("/", ["error"]), ("/vectorize", ["error"]),
    ("/v1/classify", ["error", "message"]),
])  # fmt: skip
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused_in_the_words_of_its_contract(
    guarded, chunked, path, place
):
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=30)
    parts = (b"x" * 10_000 for _ in range(3))
    body = parts if chunked else b"x" * 30_000
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "long-1"}
    connection.request("POST", path, body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    assert answer.status == 413 and answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"] == "long-1"
    said = functools.reduce(lambda found, name: found[name], place, json.loads(answer.read()))
    assert said == "the body is larger than this server takes (--max-body)"
    connection.close()


def test_a_length_that_is_too_large_is_refused_before_the_body_is_asked_for(guarded):
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as connection:
        head = f"Authorization: Bearer {KEY}\r\nExpect: 100-continue\r\nContent-Length: 20001"
        connection.sendall(f"POST /predict HTTP/1.1\r\n{head}\r\n\r\n".encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_a_request_keeps_the_id_that_it_came_with_and_else_gets_one(client):
    assert client.get("/v1/info", x_request_id="a-7").headers["x-request-id"] == "a-7"
    for hostile in ("x" * 200, "a b", '"}{"'):
        given = client.get("/v1/info", x_request_id=hostile).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", given)


def test_the_log_has_a_line_for_each_request_and_no_content(guarded, monkeypatch):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.dumps(vars(record), default=str))
    monkeypatch.setattr(LOG, "handlers", [handler])
    monkeypatch.setattr(LOG, "level", logging.INFO)
    LOG.setLevel(logging.INFO)
    secret = "Miller^Anna"
    guarded.post("/predict", {"instances": [{"text": secret}, {"image": {"input_bytes": secret}}]},
                 authorization=f"Bearer {KEY}")  # fmt: skip
    guarded.get(f"/{secret}", authorization=f"Bearer {KEY}")
    guarded.get("/health")
    wait_for(lambda: len(lines) == 2)  # they are written after the answers
    assert not any(secret in line or KEY in line for line in lines)
    noted = json.loads(lines[0])["fields"]
    assert (noted["route"], noted["status"]) == ("/predict", 200)
    assert re.fullmatch("[0-9a-f]{64}", noted["sha256"]) and noted["model"] == "tiny"


def test_a_bug_is_told_by_its_place_and_not_by_its_words(client, monkeypatch):
    service, lines = client.server.state.service, []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.dumps(vars(record), default=str))
    monkeypatch.setattr(LOG, "handlers", [handler])
    LOG.setLevel(logging.INFO)

    async def fails(instances):
        raise KeyError("secret")

    monkeypatch.setattr(service, "embed", fails)
    answer = client.post("/predict", {"instances": [{"text": "secret"}]})
    assert (answer.status, answer.body) == (500, {"error": "Internal server error."})
    errors = [line for line in lines if "internal error" in line]
    assert len(errors) == 1 and "KeyError" in errors[0] and "secret" not in errors[0]


def test_pages_of_the_origins_named_may_ask_and_others_not(guarded):
    asked = {"access_control_request_method": "POST"}
    allowed = guarded.send(
        "OPTIONS", "/predict", None, {"origin": "https://viewer.example.org", **asked}
    )
    assert allowed.headers["access-control-allow-origin"] == "https://viewer.example.org"
    other = guarded.send(
        "OPTIONS", "/predict", None, {"origin": "https://evil.example.org", **asked}
    )
    assert "access-control-allow-origin" not in other.headers


def test_metrics_count_requests_and_instances(client, encoded):
    client.post("/predict", {"instances": [{"image": {"input_bytes": "*"}}]})
    text = client.get("/metrics").body.decode()
    assert 'medsiglip_jax_requests_total{code="200",route="/predict"}' in text
    assert 'medsiglip_jax_instance_errors_total{code="INVALID_REQUEST_FIELD_ERROR"}' in text
    assert "medsiglip_jax_pending_rows 0.0" in text
    client.get("/a/path/of/somebody")
    assert "somebody" not in client.get("/metrics").body.decode()


@pytest.mark.parametrize("path, document", [
    ("/predict", {"instances": [{"image": {"input_bytes": "*"}}]}),
    ("/v1/classify", {"texts": ["a"], "images": ["data:x"]}),
    ("/v1/embeddings", {"modality": "image", "input": ["data:x"]}),
    ("/", {"inputs": "data:x", "parameters": {"candidate_labels": ["a"]}}),
    ("/v2/models/tiny/infer", {"inputs": [
        {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["data:x"]}]}),
    ("/vectorize", {"images": ["data:x"]}),
])  # fmt: skip
def test_what_is_wrong_with_one_instance_is_counted_once_on_every_route(client, path, document):
    name = 'medsiglip_jax_instance_errors_total{code="INVALID_REQUEST_FIELD_ERROR"} '

    def counted() -> float:
        return float((client.get("/metrics").body.decode() + f"{name}0").split(name)[1].split()[0])

    before = counted()
    assert client.post(path, document).status in (200, 400)
    assert counted() == before + 1


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/predict", 405), ("POST", "/health", 405), ("GET", "/nothing", 404),
    ("GET", "/../etc/passwd", 404), ("GET", "/%2e%2e/etc/passwd", 404),
])  # fmt: skip
def test_what_there_is_not_is_told_in_json(client, method, path, status):
    answer = client.send(method, path, None, {})
    assert answer.status == status and list(answer.body) == ["error"]


def status(url: str, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(url, data) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_it_listens_while_it_loads_and_says_so(model):
    release, ready = threading.Event(), threading.Event()

    def load():
        release.wait(60)
        return model

    server = run.Server(
        Settings(port=0, max_batch=1, drain_delay=0.0), "m", load, on_ready=ready.set
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{server.port}"
    assert status(f"{url}/health/live") == 200
    for path, data in (("/health/ready", None), ("/health", None), ("/predict", b"{}")):
        assert status(f"{url}{path}", data) == 503
    release.set()
    assert ready.wait(60) and status(f"{url}/health") == 200
    server.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(tmp_path):
    def load():
        raise FileNotFoundError("no such checkpoint: x")

    server = run.Server(Settings(port=0), "m", load)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        server.run()


def test_a_port_that_is_taken_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match=r"cannot listen on 127.0.0.1, port \d+: .*--port"):
            run.Server(Settings(port=taken.getsockname()[1]), "m", lambda: None)  # pyright: ignore


@pytest.mark.slow
def test_sigterm_loses_no_request_that_was_accepted(checkpoint, encoded):
    """Not ready first, then everything in flight is answered, then exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medsiglip_jax", "serve", "--model", str(checkpoint), "--port",
               str(port), "--drain-delay", "2", "--max-batch", "4"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline().startswith("ready: http://127.0.0.1:")
    body = json.dumps({"instances": [{"image": {"input_bytes": c}} for c in encoded]}).encode()
    answers: list[int] = []
    refused = threading.Event()

    def ask():
        while not refused.is_set():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", body) as answer:
                    answers.append(len(json.load(answer)["predictions"]))
            except OSError as error:  # reset if the port closed before the server had taken it
                assert isinstance(getattr(error, "reason", error), ConnectionError), error
                refused.set()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: status(f"http://127.0.0.1:{port}/health/ready") == 503)
    for thread in threads:
        thread.join(60)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    served = [line for line in lines if line.get("route") == "/predict" and line["status"] == 200]
    assert len(served) == len(answers) and set(answers) == {4}


def test_settings_are_checked_by_name():
    for wrong, said in (
        ({"max_batch": 48}, "max_batch is 48; expected a power of two"),
        ({"port": 70_000}, "port is 70000"), ({"queue": 0}, "queue is 0"),
        ({"preprocess": "x"}, "preprocess is 'x'"), ({"health_route": "x"}, "health_route is 'x'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(said)):
            Settings(**wrong)  # pyright: ignore[reportArgumentType]


def test_vertex_sets_port_and_routes():
    said = {"AIP_HTTP_PORT": "8085", "AIP_PREDICT_ROUTE": "/p", "AIP_HEALTH_ROUTE": "/h"}
    found = settings.on_vertex(Settings(), said)
    assert (found.port, found.host, found.predict_route, found.health_route) == (
        8085, "0.0.0.0", "/p", "/h",
    )  # fmt: skip
    assert settings.on_vertex(Settings(), {}) == Settings()
    with pytest.raises(ValueError, match="AIP_HTTP_PORT"):
        settings.on_vertex(Settings(), {"AIP_HTTP_PORT": "http"})


def test_keys_are_read_from_a_file_and_never_shown(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the viewer\n{KEY}\n\n")
    assert settings.read_keys(file) == {KEY}
    for content, said in (("", "no API key"), ("# note\n", "no API key"), ("short\n", "line 1"),
                          (f"{KEY}\nschlüssel-von-mir-hier\n", "line 2")):  # fmt: skip
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=said) as caught:
            settings.read_keys(file)
        assert "short" not in str(caught.value).replace(str(file), "")


def test_a_page_whose_name_leads_to_this_machine_is_not_answered(client, guarded):
    body = {"instances": [{"text": "a"}]}
    assert client.post("/predict", body, host="evil.example").status == 421
    assert client.post("/predict", body, host="localhost:80").status == 200
    key = f"Bearer {KEY}"  # which no page of others has
    assert guarded.post("/predict", body, host="s.example", authorization=key).status == 200


def test_clients_are_told_to_connect_elsewhere_while_it_drains(model, serving):
    with serving(model, Settings(port=0, max_batch=1, drain_delay=0.0)) as client:
        assert "connection" not in client.get("/v1/info").headers
        client.server.state.draining = True
        assert client.get("/v1/info").headers["connection"] == "close"
        assert client.get("/health/ready").status == 503
