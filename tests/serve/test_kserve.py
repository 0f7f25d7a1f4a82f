"""The Open Inference Protocol in JSON."""

import types
from typing import Any

import numpy as np
import pytest

from medsiglip_jax.inference.encode import encode_files
from medsiglip_jax.serve.contracts import kserve
from medsiglip_jax.serve.errors import RequestError
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.service import Service
from medsiglip_jax.serve.settings import Settings

INFER = "/v2/models/tiny/infer"
TEXTS = ["photo of a a", "scan of a b"]


def tensor(name: str, data: list, datatype: str = "BYTES", shape: list | None = None) -> dict:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data}


def outputs(answer) -> dict[str, np.ndarray]:
    assert answer.status == 200, answer.body
    assert answer.body["model_name"] == "tiny"
    assert {o["datatype"] for o in answer.body["outputs"]} == {"FP32"}
    return {o["name"]: np.reshape(o["data"], o["shape"]) for o in answer.body["outputs"]}


@pytest.mark.parametrize("path", [INFER, "/v2/models/tiny/versions/1/infer"])
def test_texts_and_images(client, model, files, encoded, path):
    inputs = [tensor("text", TEXTS), tensor("image", encoded)]
    answer = client.post(path, {"id": "7", "inputs": inputs, "parameters": {"x": 1}})
    found = outputs(answer)
    assert answer.body["id"] == "7"
    ztxt = model.encode_text(model.processor.texts(TEXTS))
    np.testing.assert_allclose(found["text_embeddings"], ztxt, atol=1e-5)
    zimg = encode_files(model, files).vectors
    np.testing.assert_allclose(found["image_embeddings"], zimg, atol=1e-5)


@pytest.mark.parametrize("flat", [True, False])
def test_pixels_are_taken_as_they_are(client, model, files, flat):
    pixels = model.processor.images(files, "serving")
    data = pixels.ravel().tolist() if flat else pixels.tolist()
    given = tensor("image", data, "UINT8", list(pixels.shape))
    found = outputs(client.post(INFER, {"inputs": [given]}))["image_embeddings"]
    np.testing.assert_allclose(found, model.encode_image(pixels), atol=1e-5)


def test_outputs_are_those_asked_for(client, encoded):
    inputs = [tensor("image", encoded[:1]), tensor("text", [[t] for t in TEXTS], shape=[2, 1])]
    body = {"inputs": inputs, "outputs": [{"name": "text_embeddings"}]}
    assert list(outputs(client.post(INFER, body))) == ["text_embeddings"]


def test_metadata_and_health(client, model):
    assert client.get("/v2").body["name"] == "medsiglip-jax"
    for path, body in {
        "/v2/health/live": {"live": True}, "/v2/health/ready": {"ready": True},
        "/v2/models/tiny/ready": {"name": "tiny", "ready": True},
    }.items():  # fmt: skip
        answer = client.get(path)
        assert (answer.status, answer.body) == (200, body)
    found = client.get("/v2/models/tiny").body
    assert found == client.get("/v2/models/tiny/versions/1").body
    assert found["inputs"] == [
        {"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("text", "image")
    ]
    assert {tuple(o["shape"]) for o in found["outputs"]} == {(-1, model.config.embed_dim)}


@pytest.mark.parametrize("path", [
    "/v2/models/other", "/v2/models/other/ready", "/v2/models/tiny/versions/2",
    "/v2/models/tiny/versions/2/ready",
])  # fmt: skip
def test_other_models_and_versions(client, path):
    answer = client.get(path)
    assert answer.status == 404 and "error" in answer.body


@pytest.mark.parametrize("inputs, said", [
    ([tensor("sound", ["a"])], "inputs[0].name: expected one of text, image"),
    ([tensor("text", ["a"]), tensor("text", ["a"])], "inputs[1].name: there twice"),
    ([tensor("text", [1], "INT64")], "inputs[0].datatype: expected one of BYTES"),
    ([tensor("text", ["a", 3])], "inputs[0].data[1]: expected a string"),
    ([tensor("text", ["a"], shape=[2])], "inputs[0].data: 1 elements; the shape says 2"),
    ([tensor("text", ["a"], shape=[1, 2])], "inputs[0].shape: expected [n]"),
    ([tensor("text", ["a"]), tensor("image", ["QUFB", "*"])], "inputs[1].data[0]: "),
    ([tensor("image", [1] * 12, "UINT8", [1, 2, 2, 3])], "inputs[0].shape: expected [n, "),
])  # fmt: skip
def test_a_tensor_that_is_wrong(client, inputs, said):
    answer = client.post(INFER, {"inputs": inputs})
    assert answer.status == 400
    assert answer.body["error"].startswith(said), answer.body


@pytest.mark.parametrize("value, said", [
    (256, "expected whole numbers"), (-1, "expected whole numbers"),
    (0.5, "expected whole numbers"), ("a", "expected whole numbers"), (1 << 70, "expected"),
    (True, None), ([1, 2], "expected numbers"),
])  # fmt: skip
def test_pixels_that_are_none(client, model, value, said):
    side = model.config.vision.image_size
    data = [value, *[0] * (side * side * 3 - 1)]
    given = tensor("image", data, "UINT8", [1, side, side, 3])
    answer = client.post(INFER, {"inputs": [given]})
    assert answer.status == (400 if said else 200)  # among numbers numpy takes true for 1
    if said:
        assert answer.body["error"].startswith(f"inputs[0].data: {said}"), answer.body


def test_binary_tensors_are_refused_with_what_to_do(client):
    answer = client.post(INFER, b"{}\0\0", inference_header_content_length="2")
    assert answer.status == 400 and "binary_data=False" in answer.body["error"]


def test_an_output_that_is_not_made(client):
    body = {"inputs": [tensor("text", ["a"])], "outputs": [{"name": "image_embeddings"}]}
    answer = client.post(INFER, body)
    assert answer.status == 400 and answer.body["error"].startswith("outputs[0].name")


def test_nothing_is_ready_while_the_model_is_loaded():
    from starlette.testclient import TestClient

    from medsiglip_jax.serve.app import build
    from medsiglip_jax.serve.state import State

    client = TestClient(build(State(Settings(), "tiny")), base_url="http://localhost")
    statuses = {
        path: client.get(path).status_code
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready",
                     "/v2/models/tiny", "/.well-known/live", "/.well-known/ready", "/v1/models")
    }  # fmt: skip
    assert list(statuses.values()) == [200, 503, 503, 503, 204, 503, 200]


def test_pixels_for_a_model_without_an_image_tower_are_refused_by_name():
    service: Any = object.__new__(Service)  # nothing of it is used but this
    service.model = types.SimpleNamespace(config=types.SimpleNamespace(vision=None))
    tensor = Fields({"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3]}, "inputs[0]")
    with pytest.raises(RequestError, match="no image tower"):
        kserve._pixels(service, tensor, "image")
