"""Asks `serve` for vectors through the public clients of its contracts, beside those of `embed`.

    python3 -m venv .venv-clients
    .venv-clients/bin/pip install -r scripts/serve_clients.txt
    .venv-clients/bin/python scripts/serve_clients.py --python .venv/bin/python

It runs in an environment of the clients, whose versions clash with this project's; --python names
the one that has medsiglip_jax. A server of a small model with random weights is started on
loopback, each client is given the same images and texts, and the table says by how much what came
back differs from the files of `embed`. The exit code is 1 if that is more than 1e-5 anywhere, if a
client gets no answer, or if the server does not end well. Weaviate's module is written in Go; its
requests are sent as it writes them.
"""

import argparse
import base64
import http.client
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from served import ROOT, Served, environment

TOLERANCE = 1e-5
TEXTS = ["photo of a a", "scan of a b", "drawing of a f", "photo of a f"]
LABELS = ["a a", "a b", "a c"]
TEMPLATE = "scan of {}"
PATCHES = [(2, 0, 64, 64), (10, 20, 100, 50)]
PATCH_FIELDS = ("x_origin", "y_origin", "width", "height")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="of the main environment")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare)
        return 0
    os.environ.pop("HF_HUB_OFFLINE", None)  # which also keeps huggingface_hub from loopback
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([args.python, __file__, "--prepare", folder], check=True, env=environment())
        given = Given(folder)
        with Served(folder / "model", "--drain-delay", "0", python=args.python) as server:
            asked = CLIENTS.items()
            failed = [name for name, ask in asked if not shown(name, ask, given, server.port)]
        code = server.process.returncode
    print(f"the server ended with exit code {code}")
    return 1 if failed or code else 0


def shown(name: str, ask: Callable[["Given", int], Iterator], given: "Given", port: int) -> bool:
    """Prints the lines of one client; whether all is well."""
    package = name.split()[0]
    version = "" if package == "weaviate" else importlib.metadata.version(package)
    well = True
    try:
        for what, found, expected in ask(given, port):
            apart = float(np.abs(np.asarray(found) - np.asarray(expected)).max())
            good = np.shape(found) == np.shape(expected) and apart <= TOLERANCE
            well &= good
            shape = "x".join(map(str, np.shape(found)))
            mark = "" if good else "  WRONG"
            print(f"{name:24} {version:8} {what:44} {shape:8} {apart:.1e}{mark}", flush=True)
    except Exception:
        traceback.print_exc()
        print(f"{name:24} {version:8} FAILED", flush=True)
        return False
    return well


# ----------------------------------------------------------------------- in the main environment


def prepare(folder: Path) -> None:
    """Writes a model, images, and what `embed` makes of them."""
    import pyarrow.parquet as pq
    from PIL import Image

    import medsiglip_jax
    from medsiglip_jax import cli

    sys.path.insert(0, str(ROOT / "tests"))
    write_model(folder / "model")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for name, mode in {"a.png": "RGB", "b.png": "L", "c.png": "P", "d.jpg": "RGB"}.items():
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
        page = coarse.resize((200, 150), Image.Resampling.BICUBIC).convert(mode)
        page.save(folder / "images" / name)
    page = Image.open(folder / "images" / "a.png")
    (folder / "patches").mkdir()
    for i, (x, y, width, height) in enumerate(PATCHES):
        page.crop((x, y, x + width, y + height)).save(folder / "patches" / f"{i}.png")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    prompts = [TEMPLATE.format(label) for label in LABELS]
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in prompts))
    runs = {
        "images": ["images"], "texts": ["texts.txt"], "prompts": ["prompts.txt"],
        "served_images": ["images", "--preprocess", "serving"],
        "served_patches": ["patches", "--preprocess", "serving"],
    }  # fmt: skip
    vectors = {}
    for name, (source, *flags) in runs.items():
        output = str(folder / f"run_{name}")
        model = str(folder / "model")
        embed = ["embed", str(folder / source), "--model", model, "--output", output, *flags]
        assert cli.main(embed) == 0
        [part] = Path(output).glob("part-*.parquet")
        rows = pq.read_table(part, columns=["embedding"])  # in the order of names, or of lines
        vectors[name] = found = np.array(rows["embedding"].to_pylist(), np.float32)
        apart = np.abs(found[:, None] - found).max(axis=-1) + np.eye(len(found))
        assert apart.min() > 100 * TOLERANCE, f"{name}: two are nearly the same"
    model = medsiglip_jax.load(folder / "model")
    for name in "tb":
        vectors[name] = np.asarray(model.params[name]).reshape(())
    vectors["pixels"] = model.processor.images(sorted((folder / "images").iterdir()))
    np.savez(folder / "expected.npz", **vectors)


def write_model(folder: Path) -> None:
    import references

    import medsiglip_jax
    from medsiglip_jax.model import api
    from medsiglip_jax.preprocess import text

    captions = [f"{what} of a {part}" for what in ("photo", "scan", "drawing") for part in "abcdef"]
    # With the bias of a model before its training all scores would be nearly 0.
    params = medsiglip_jax.init(references.SMALL).params | {"b": np.zeros(1, np.float32)}
    model = api.Model(params, references.SMALL, tokenizer=text.train(captions, 40))
    medsiglip_jax.save(model, folder)


class Given:
    """What the clients send, and what `embed` has made of it.

    Attributes:
        files: the images.
        encoded: the same as base64.
        expected: of `prepare`.
    """

    def __init__(self, folder: Path):
        self.files = sorted((folder / "images").iterdir())
        self.encoded = [base64.b64encode(file.read_bytes()).decode() for file in self.files]
        self.expected = dict(np.load(folder / "expected.npz"))

    def scores(self) -> np.ndarray:
        """Sigmoids of the first image against the prompts."""
        e = self.expected
        logits = np.exp(e["t"]) * (e["prompts"] @ e["images"][0]) + e["b"]
        return 1 / (1 + np.exp(-logits))


# ----------------------------------------------------------------------------------- the clients

Compared = Iterator[tuple[str, Any, Any]]


def openai(given: Given, port: int) -> Compared:
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    [model] = [model.id for model in client.models.list()]
    expected, create = given.expected, client.embeddings.create

    def vectors(answer: openai.types.CreateEmbeddingResponse) -> list[list[float]]:
        return [row.embedding for row in answer.data]

    yield (
        "texts (base64, its default)",
        vectors(create(model=model, input=TEXTS)),
        expected["texts"],
    )
    floats = create(model=model, input=TEXTS, encoding_format="float")
    yield "texts (float)", vectors(floats), expected["texts"]
    uris = [f"data:image/png;base64,{content}" for content in given.encoded]
    answer = create(model=model, input=uris, extra_body={"modality": "image"})
    yield "images (infinity's modality)", vectors(answer), expected["images"]
    found = []
    for uri in uris:
        part = {"type": "image_url", "image_url": {"url": uri}}
        answer = client.post(
            "/embeddings",
            cast_to=openai.types.CreateEmbeddingResponse,
            body={"model": model, "messages": [{"role": "user", "content": [part]}]},
        )
        found += vectors(answer)
    yield "images (vLLM's messages)", found, expected["images"]
    try:
        create(model="another", input="a")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    else:
        raise AssertionError("expected NotFoundError")
    try:
        create(model=model, input=["a", "***"], extra_body={"modality": "image"})
    except openai.BadRequestError as error:
        assert error.param == "input" and "input[0]" in error.message, error
    else:
        raise AssertionError("expected BadRequestError")


def huggingface_hub(given: Given, port: int) -> Compared:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    expected = given.expected
    client = InferenceClient(base_url=f"http://127.0.0.1:{port}")
    yield "feature_extraction", client.feature_extraction(TEXTS), expected["texts"]
    one = client.feature_extraction(TEXTS[1], normalize=True)
    yield "feature_extraction of one text", one, expected["texts"][1:2]
    url = f"http://127.0.0.1:{port}/models/model/pipeline/feature-extraction"
    found = client.feature_extraction(TEXTS, model=url)
    yield "feature_extraction with the path of a task", found, expected["texts"]
    raw = client.feature_extraction(TEXTS, normalize=False)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.01
    yield "feature_extraction, normalize=False", unit, expected["texts"]
    answer = client.zero_shot_image_classification(
        given.files[0].read_bytes(), candidate_labels=LABELS, hypothesis_template=TEMPLATE
    )
    scores = {element.label: element.score for element in answer}
    found = [scores[label] for label in LABELS]
    yield "zero_shot_image_classification", found, given.scores()
    try:
        client.feature_extraction("a", prompt_name="query")
    except HfHubHTTPError as error:
        assert "prompt_name: " in str(error), error
    else:
        raise AssertionError("expected HfHubHTTPError")


def aiplatform(given: Given, port: int) -> Compared:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1 import PredictionServiceClient
    from google.cloud.aiplatform_v1.services.prediction_service import transports
    from google.protobuf import json_format, struct_pb2

    transport = transports.PredictionServiceRestTransport(
        host=f"127.0.0.1:{port}", url_scheme="http", credentials=AnonymousCredentials()
    )
    client = PredictionServiceClient(transport=transport)

    def predict(instances: list[dict]) -> list[dict]:
        values = [json_format.ParseDict(i, struct_pb2.Value()) for i in instances]
        name = "projects/p/locations/us-central1/endpoints/7"
        answer = client.predict(endpoint=name, instances=values)
        return json_format.MessageToDict(type(answer).pb(answer))["predictions"]

    images = [{"image": {"input_bytes": content}} for content in given.encoded]
    found = predict([*images, *({"text": text} for text in TEXTS)])
    vectors = [prediction["embedding"] for prediction in found]
    yield "images (REST)", vectors[: len(images)], given.expected["served_images"]
    yield "texts (REST)", vectors[len(images) :], given.expected["texts"]
    places = [dict(zip(PATCH_FIELDS, place, strict=True)) for place in PATCHES]
    image = {"input_bytes": given.encoded[0], "patch_coordinates_list": places}
    wrong = {"image": {"input_bytes": "***"}}
    [bad, patches] = predict([wrong, {"image": image}])
    assert bad["error"]["code"] == "INVALID_REQUEST_FIELD_ERROR", bad
    vectors = [patch["embedding"] for patch in patches["patch_embeddings"]]
    yield "patches, beside one that is wrong (REST)", vectors, given.expected["served_patches"]


def tritonclient(given: Given, port: int) -> Compared:
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
    [text, image] = client.get_model_metadata("model")["inputs"]
    assert text["name"] == "text" and image["name"] == "image"
    expected = given.expected

    def tensor(name: str, values: np.ndarray, kind: str) -> http.InferInput:
        made = http.InferInput(name, list(values.shape), kind)
        made.set_data_from_numpy(values, binary_data=False)
        return made

    inputs = [
        tensor("text", np.array(TEXTS, object), "BYTES"),
        tensor("image", np.array(given.encoded, object), "BYTES"),
    ]
    answer = client.infer("model", inputs)
    yield "text BYTES", answer.as_numpy("text_embeddings"), expected["texts"]
    yield "image BYTES", answer.as_numpy("image_embeddings"), expected["images"]
    answer = client.infer(
        "model", [tensor("image", expected["pixels"], "UINT8")], model_version="1",
        outputs=[http.InferRequestedOutput("image_embeddings", binary_data=False)],
    )  # fmt: skip
    yield "image UINT8", answer.as_numpy("image_embeddings"), expected["images"]
    binary = http.InferInput("text", [1], "BYTES")
    binary.set_data_from_numpy(np.array(["a"], object))
    try:
        client.infer("model", [binary])
    except InferenceServerException as error:
        assert "binary_data=False" in str(error), error
    else:
        raise AssertionError("expected InferenceServerException")


def weaviate(given: Given, port: int) -> Compared:
    """As Go's encoding/json writes it, without a content type and with null for an empty list."""

    def ask(method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"User-Agent": "Go-http-client/1.1", "Accept-Encoding": "gzip"}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if content else None

    assert ask("GET", "/.well-known/ready") == ask("GET", "/.well-known/live") == (204, None)
    status, meta = ask("GET", "/meta")
    assert status == 200 and isinstance(meta, dict)
    both = json.dumps({"texts": TEXTS, "images": given.encoded}, separators=(",", ":"))
    _, found = ask("POST", "/vectorize", both)
    yield "texts", found["textVectors"], given.expected["texts"]
    yield "images", found["imageVectors"], given.expected["images"]
    _, found = ask("POST", "/vectorize", f'{{"texts":{json.dumps(TEXTS)},"images":null}}')
    yield "texts alone", found["textVectors"], given.expected["texts"]
    status, found = ask("POST", "/vectorize", '{"texts":null,"images":["***"]}')
    assert status == 400 and isinstance(found["error"], str)


def validator(given: Given, port: int) -> Compared:
    """/openapi.json is a document of OpenAPI 3.1."""
    import urllib.request

    from openapi_spec_validator import OpenAPIV31SpecValidator, validate

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json") as answer:
        document = json.load(answer)
    validate(document, cls=OpenAPIV31SpecValidator)
    yield f"{len(document['paths'])} paths are valid", [0.0], [0.0]


CLIENTS: dict[str, Callable[[Given, int], Compared]] = {
    "openai": openai,
    "huggingface_hub": huggingface_hub,
    "google-cloud-aiplatform": aiplatform,
    "tritonclient": tritonclient,
    "weaviate (requests)": weaviate,
    "openapi-spec-validator": validator,
}

if __name__ == "__main__":
    sys.exit(main())
