"""Many requests at a time: what is accepted is answered, what is too much is refused at once."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from starlette.responses import JSONResponse
from waiting import HANGS, wait_for

from medsiglip_jax.inference.encode import encode_files
from medsiglip_jax.serve import batching, http
from medsiglip_jax.serve.batching import Batcher
from medsiglip_jax.serve.errors import INTERNAL, LOG, InstanceError, RequestError
from medsiglip_jax.serve.instances import Picture, Text
from medsiglip_jax.serve.measures import Measures
from medsiglip_jax.serve.service import Service
from medsiglip_jax.serve.settings import Settings


@pytest.fixture
def service(model):
    made = Service(model, Settings(max_batch=8, queue=16))
    made.start()
    yield made
    made.close()


def embed(service: Service, *requests: list) -> list:
    """What several requests get that come at once: answers, or the error of the request."""

    async def all_of_them():
        return await asyncio.gather(*map(service.embed, requests), return_exceptions=True)

    return asyncio.run(all_of_them())


def batches(measures: Measures) -> list[tuple[float, float]]:
    """(number of batches, number of rows) of each kind."""
    found = {}
    for line in measures.text_format().decode().splitlines():
        if line.startswith("medsiglip_jax_batch_rows_"):
            name, value = line.rsplit(" ", 1)
            found[name.removeprefix("medsiglip_jax_batch_rows_")] = float(value)
    return [(v, found[k.replace("count", "sum")]) for k, v in found.items() if k[:5] == "count"]


def test_images_of_many_requests_share_batches_and_each_gets_its_own(
    service, model, files, encoded
):
    asked = [[Picture(content=encoded[i % 4])] for i in range(12)]
    answers = embed(service, *asked)
    expected = encode_files(model, files, normalize=False).vectors
    for i, [[vector]] in enumerate(answers):
        np.testing.assert_allclose(vector, expected[i % 4], atol=1e-5)
    [(count, rows)] = batches(service.measures)
    assert rows == 12 and count < 12


def test_what_is_more_than_the_queue_is_refused_and_the_rest_is_answered(service, encoded):
    asked = [[Picture(content=encoded[0])] * 5 for _ in range(6)]
    answers = embed(service, *asked)
    refused = [a for a in answers if isinstance(a, RequestError)]
    assert len(refused) == 3 and all(a.status == 429 for a in refused)
    assert all(int(a.headers["Retry-After"]) >= 1 for a in refused)
    answered = [a for a in answers if isinstance(a, list)]
    assert all(len(a) == 5 and all(isinstance(v, list) for v in a) for a in answered)
    [again] = embed(service, asked[0])  # nothing is left behind
    assert isinstance(again, list)


def test_a_request_that_never_fits_says_how_much_would(service):
    [error] = embed(service, [Text(f"{i}") for i in range(17)])
    assert isinstance(error, RequestError)
    assert error.status == 413 and "at most 16" in error.message


def test_a_text_is_embedded_once(service, monkeypatch):
    embed(service, [Text("lung")])
    monkeypatch.setattr(service._batcher, "submit", None)  # would fail
    [[[vector]]] = embed(service, [Text("lung")])
    assert vector.shape == (service.model.config.embed_dim,)


@pytest.fixture
def logged(caplog, monkeypatch):
    """What is logged of errors, one text each."""
    monkeypatch.setattr(LOG, "propagate", True)
    return lambda: [str(vars(r)) for r in caplog.records if r.levelname == "ERROR"]


def test_a_fault_of_ours_in_one_instance_is_logged_by_its_place(service, monkeypatch, logged):
    async def fails(text):
        raise KeyError(text)

    monkeypatch.setattr(service, "_embed_new_text", fails)
    [[error]] = embed(service, [Text("secret")])
    assert isinstance(error, InstanceError) and error.code == INTERNAL
    [line] = logged()
    assert "KeyError" in line and "test_service.py" in line and "secret" not in line


def test_a_batch_is_answered_though_the_one_before_it_ended_later(model):
    """Two threads fetch results, and either may be the first to note when it was done."""
    batcher = Batcher(model, 2, max_wait=0.0)
    batcher.start()
    row = np.zeros(model.config.text.context_length, np.int32)
    for _ in range(2):
        batcher._done_at = time.perf_counter() + HANGS
        batcher.coming("text", 1)
        assert batcher.submit("text", row).result(10).shape == (model.config.embed_dim,)
    batcher.close()


def test_a_batch_that_fails_leaves_the_server_alive(service, encoded, monkeypatch, logged):
    encoders = service._batcher._encoders
    (encode, empty), calls = encoders["image"], []

    def fails_once(values):
        calls.append(len(values))
        if len(calls) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: secret")
        return encode(values)

    monkeypatch.setitem(encoders, "image", (fails_once, empty))
    [[error]] = embed(service, [Picture(content=encoded[0])])
    assert isinstance(error, InstanceError) and "secret" not in str(error)
    [[vectors]] = embed(service, [Picture(content=encoded[0])])
    assert len(vectors) == 1 and service.alive and service.ready
    [line] = logged()
    assert "RuntimeError" in line and "secret" not in line


def test_numbers_that_are_not_finite_are_an_error_of_that_row_alone(service, monkeypatch):
    encoders = service._batcher._encoders
    encode, empty = encoders["text"]

    def spoiled(values):
        return encode(values).at[0].set(np.nan)

    monkeypatch.setitem(encoders, "text", (spoiled, empty))
    [answers] = embed(service, [Text("a"), Text("b")])
    kinds = sorted(type(a).__name__ for a in answers)
    assert kinds in (["InstanceError", "InstanceError"], ["InstanceError", "list"])
    assert "not finite" in str(next(a for a in answers if isinstance(a, InstanceError)))


def test_a_device_that_hangs_is_no_longer_alive(service, encoded, monkeypatch):
    release = threading.Event()
    encode, empty = service._batcher._encoders["image"]

    def hangs(values):
        release.wait(30)
        return encode(values)

    monkeypatch.setattr(batching, "STUCK_SECONDS", 0.2)
    monkeypatch.setitem(service._batcher._encoders, "image", (hangs, empty))
    thread = threading.Thread(target=embed, args=(service, [Picture(content=encoded[0])]))
    thread.start()
    wait_for(lambda: not service.alive and not service.ready)
    release.set()
    thread.join()
    assert service.alive


def test_an_idle_device_takes_the_first_row_at_once_and_waits_for_those_announced(model):
    batcher = Batcher(model, 8, max_wait=HANGS, measures=(measures := Measures()))
    batcher.start()
    row = np.zeros(model.config.text.context_length, np.int32)
    batcher.coming("text", 1)
    batcher.submit("text", row).result(HANGS / 2)  # before what it may wait
    batcher.coming("text", 3)
    first = batcher.submit("text", row)
    time.sleep(0.3)
    assert not first.done()
    rest = [batcher.submit("text", row) for _ in range(2)]
    for future in (first, *rest):
        future.result(30)
    assert batches(measures) == [(2, 4)]
    batcher.close()


def test_rows_that_fail_to_be_read_are_not_waited_for(model, encoded):
    made = Service(model, Settings(max_batch=8, max_wait_ms=1000 * HANGS))
    made.start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(embed, made, [Picture(content="!"), Picture(content=encoded[0])])
        [[wrong, right]] = asked.result(HANGS / 2)
    assert isinstance(wrong, InstanceError) and isinstance(right, list)
    made.close()


def test_errors_keep_their_places(service):
    wrong = InstanceError("X", "y")
    [[vectors]] = embed(service, [Text("a")])
    [found] = embed(service, [wrong, Text("a"), wrong])
    assert [found[0], found[2]] == [wrong, wrong] and found[1][0] is vectors[0]


def test_an_error_is_one_short_line():
    error = InstanceError("X", "a\n" * 2000)
    assert len(json.dumps(error.to_dict())) < 700 and "\n" not in error.description


def test_a_row_that_is_cancelled_harms_no_other(model):
    batcher = Batcher(model, 8, max_wait=0.5)
    batcher.start()
    row = np.zeros(model.config.text.context_length, np.int32)
    batcher.coming("text", 5)  # one more than will come, so that all are in one batch
    futures = [batcher.submit("text", row) for _ in range(4)]
    assert futures[1].cancel()
    for future in (futures[0], *futures[2:]):
        assert future.result(30).shape == (model.config.embed_dim,)
    batcher.coming("text", 1)
    gone = batcher.submit("text", row)
    gone.cancel()
    batcher.coming("text", 1)
    assert batcher.submit("text", row).result(30) is not None  # also after a batch of none
    batcher.close()


def test_the_older_of_two_batches_may_be_the_one_that_hangs(model, monkeypatch):
    batcher = Batcher(model, 2, max_wait=0.0)
    batcher.start()
    monkeypatch.setattr(batching, "STUCK_SECONDS", 0.2)
    batcher._started[-1] = time.perf_counter()
    batcher.coming("text", 1)
    batcher.submit("text", np.zeros(model.config.text.context_length, np.int32)).result(30)
    wait_for(lambda: not batcher.alive)
    batcher.close()


def test_texts_that_are_long_are_not_kept(service):
    embed(service, [Text("lung " * 1000), Text("lung")])
    assert list(service._texts) == ["lung"]
    assert all(known.vector.base is None for known in service._texts.values())


def test_scores_are_those_of_the_model(service):
    rng = np.random.default_rng(0)
    zimg, ztxt = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in rng.normal(size=(2, 3, service.model.config.embed_dim)).astype(np.float32)
    )
    expected = np.asarray(service.model.similarity(zimg, ztxt))
    np.testing.assert_allclose(service.similarity(zimg, ztxt), expected, rtol=1e-6, atol=1e-5)


def test_the_time_to_wait_is_of_the_last_minute(monkeypatch):
    from medsiglip_jax.serve.admission import _Pace

    now = [0.0]
    monkeypatch.setattr("medsiglip_jax.serve.admission.time.monotonic", lambda: now[0])
    pace = _Pace()
    assert pace.seconds(100) == 1
    for _ in range(20):
        now[0] += 1
        pace.add(10)
        pace.add(0)  # requests without instances say nothing
    assert 9 <= pace.seconds(100) <= 11
    now[0] += 3600
    assert pace.seconds(100) == 1
    for _ in range(3):
        now[0] += 1
        pace.add(10)
    assert 8 <= pace.seconds(100) <= 12


def test_others_have_their_turns_while_a_large_answer_is_written():
    vectors = np.random.default_rng(0).normal(size=(64, 1152)).tolist()
    odd = {"a": [], "b": {}, "ü\n": [1, None, True, "x", 0.1], "c": [{"d": [[1], [2, [3]]]}, 4]}
    flat = [value for vector in vectors for value in vector]
    turns = 0

    async def count_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def written(document):
        counting = asyncio.ensure_future(count_turns())
        content = await http.write_json(document)
        counting.cancel()
        return content

    for document, least in ((odd, 0), (vectors, 30), ({"data": flat}, 30), ([], 0), ("é", 0)):
        turns = 0
        content = asyncio.run(written(document))
        assert content == JSONResponse(document).body and turns >= least
