"""The official container's contract: requests of its clients are answered field by field."""

import base64
import contextlib
import io
import json
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest

from medsiglip_jax.files import storage
from medsiglip_jax.inference.encode import encode_files
from medsiglip_jax.preprocess import handles
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.serve import images

ALIAS = "/v1/projects/p/locations/us/endpoints/7:predict"
OFFICIAL = Rules("official")


def image(content: str, **more) -> dict:
    return {"image": {"input_bytes": content, **more}}


@pytest.mark.parametrize("path", ["/predict", ALIAS])
def test_vectors_are_those_of_embed(client, model, files, encoded, path):
    texts = ["photo of a a", "scan of a b"]
    asked = [{"text": texts[0]}, *map(image, encoded), {"text": texts[1]}]
    answer = client.post(path, {"instances": asked, "parameters": {"ignored": 1}})
    assert answer.status == 200
    predictions = answer.body["predictions"]
    assert [p["input_type"] for p in predictions] == ["text", *["image"] * len(files), "text"]
    found = np.array([p["embedding"] for p in predictions])
    zimg = encode_files(model, files, "serving", dicom=OFFICIAL).vectors
    ztxt = np.asarray(model.encode_text(model.processor.texts(texts)))
    np.testing.assert_allclose(found, [ztxt[0], *zimg, ztxt[1]], atol=1e-5)
    # The raw log temperature, as in the official container: the logit is exp(t) * cosine + b.
    t, b = (float(np.asarray(model.params[name]).squeeze()) for name in "tb")
    for prediction in predictions:
        assert prediction["model_temperature"] == pytest.approx(t)
        assert prediction["model_bias"] == pytest.approx(b)


def test_patches_are_embedded_each_on_its_own(client, model, files, encoded):
    from PIL import Image

    places = [(0, 0, 64, 64), (10, 20, 100, 50)]
    asked = [dict(zip(("x_origin", "y_origin", "width", "height"), p, strict=True)) for p in places]
    answer = client.post(
        "/predict", {"instances": [image(encoded[0], patch_coordinates_list=asked)]}
    )
    [prediction] = answer.body["predictions"]
    assert [p["patch_coordinate"] for p in prediction["patch_embeddings"]] == asked
    page = Image.open(files[0])
    cut = [np.asarray(page.crop((x, y, x + w, y + h))) for x, y, w, h in places]
    expected = model.encode_image(model.processor.images(cut, "serving"))
    found = np.array([p["embedding"] for p in prediction["patch_embeddings"]])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_whole_numbers_may_be_floats_as_googles_clients_send_them(client, encoded):
    place = {"x_origin": 2.0, "y_origin": 0.0, "width": 10.0, "height": 10.0}
    answer = client.post(
        "/predict", {"instances": [image(encoded[0], patch_coordinates_list=[place])]}
    )
    [patch] = answer.body["predictions"][0]["patch_embeddings"]
    assert patch["patch_coordinate"] == place
    asked = [image(encoded[0], patch_coordinates_list=[{**place, "width": 10.5}])]
    answer = client.post("/predict", {"instances": asked})
    assert answer.status == 400 and "width: expected a whole number" in answer.body["error"]


def test_a_patch_beyond_the_image_is_black_there_if_that_is_allowed(client, model, files, encoded):
    place = {"x_origin": 150, "y_origin": 100, "width": 100, "height": 100}
    extensions = {"require_patches_fully_in_source_image": "False"}
    asked = image(encoded[0], patch_coordinates_list=[place], extensions=extensions)
    answer = client.post("/predict", {"instances": [asked]})
    [patch] = answer.body["predictions"][0]["patch_embeddings"]
    from PIL import Image

    page = np.zeros((100, 100, 3), np.uint8)
    page[:50, :50] = np.asarray(Image.open(files[0]))[100:150, 150:200]
    expected = model.encode_image(model.processor.images([page], "serving"))[0]
    np.testing.assert_allclose(patch["embedding"], expected, atol=1e-5)


def test_an_instance_that_is_wrong_does_not_harm_the_others(client, encoded):
    wrong = {
        "INVALID_REQUEST_FIELD_ERROR": image("***"),
        "UNHANDLED_GENERIC_BYTES_ERROR": image("aGVsbG8="),
        "PATCH_OUTSIDE_OF_IMAGE_DIMENSIONS_ERROR": image(
            encoded[0], patch_coordinates_list=[{"x_origin": 180, "y_origin": 0}]
        ),
        "UNAPPROVED_SOURCE_ERROR": {"image": {"image_url": "http://127.0.0.1/x.png"}},
        "INVALID_CREDENTIALS_ERROR": {
            "image": {"gcs_uri": "gs://b/x.png", "access_credential": "secret-token"}
        },
    }
    asked = [image(encoded[0]), *wrong.values(), {"text": ""}]
    answer = client.post("/predict", {"instances": asked})
    first, *errors, last = answer.body["predictions"]
    assert answer.status == 200 and "embedding" in first and "embedding" in last
    assert [error["error"]["code"] for error in errors] == list(wrong)
    assert "secret-token" not in json.dumps(answer.body)


@pytest.mark.parametrize("body, status, said", [
    (b"", 400, "No JSON body."),
    (b"{", 400, "No JSON body."),
    (b"[]", 400, "No instances field in request."),
    (b"{}", 400, "No instances field in request."),
    (b'{"instances": 3}', 400, "instances: expected a list"),
    (b'{"instances": [{"text": "a"}, 7]}', 400, "instances[1]: expected an object"),
    (b'{"instances": [{"text": 7}]}', 400, "instances[0].text: expected a string"),
    (b'{"instances": [{"image": {"input_bytes": "QQ==", "image_url": "http://x"}}]}', 400,
     "instances[0].image: expected exactly one of"),
    (b'{"instances": [{"image": {"input_bytes": "QQ==", "extra": "S3CRET"}}]}', 400,
     "instances[0].image: a field that is not known"),
    (b'{"instances": []}', 200, ""),
])  # fmt: skip
def test_what_the_schema_does_not_allow_is_named_by_its_place(client, body, status, said):
    answer = client.post("/predict", body)
    assert answer.status == status
    if status == 200:
        assert answer.body == {"predictions": []}
        return
    assert answer.body["error"].startswith(said)
    assert len(json.dumps(answer.body)) < 1024 and "S3CRET" not in json.dumps(answer.body)


def test_health_is_that_of_the_official_container(client):
    answer = client.get("/health")
    assert (answer.status, answer.body) == (200, b"ok")


def test_a_window_is_applied_to_ct_and_refused_for_radiographs(client, model):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    ct = _written(dataset)
    dataset.Modality = "CR"
    window = {"center": 40, "width": 400}
    asked = [
        image(base64.b64encode(content).decode(), radiology_dicom_window_level=window)
        for content in (ct, _written(dataset))
    ]
    first, second = client.post("/predict", {"instances": asked}).body["predictions"]
    pixels = model.processor.images([ct], "serving", Rules("official", (400, 40)))
    np.testing.assert_allclose(first["embedding"], model.encode_image(pixels)[0], atol=1e-5)
    assert second["error"]["code"] == "INVALID_REQUEST_FIELD_ERROR"
    assert "window" in second["error"]["description"]


def _written(dataset) -> bytes:
    written = io.BytesIO()
    dataset.save_as(written)
    return written.getvalue()


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A pyramid of two levels."""
    pytest.importorskip("openslide")
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 256, (512, 768, 3), np.uint8)
    coarse = np.ascontiguousarray(fine[::2, ::2])
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    with tifffile.TiffWriter(path) as file:
        for level, pixels in enumerate((fine, coarse)):
            said = f"Aperio Image Library v11.2.1\n{pixels.shape[1]}x{pixels.shape[0]} |MPP = 0.5"
            file.write(
                pixels, tile=(256, 256), photometric="rgb", compression="adobe_deflate",
                description=said, metadata=None, subfiletype=int(level > 0),
            )  # fmt: skip
    return path, (fine, coarse)


class Bucket:
    """Stands for the fetcher, which tests of its own cover."""

    def __init__(self, content: bytes):
        self.content = content

    async def fetch(self, address: str) -> bytes:
        return self.content

    async def close(self) -> None:
        pass


def test_a_slide_that_a_killed_server_was_reading_is_removed(tmp_path, monkeypatch):
    """By the next server; that of one that is alive stays. Nobody else may read either."""
    from medsiglip_jax.serve import run
    from medsiglip_jax.serve.settings import Settings

    def load():
        raise ValueError("no model")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_PROCESS", "0" * 4)
        killed = storage._temporary(images._beside(), folder=True)
    (killed / "slide.svs").write_bytes(b"somebody's")
    with storage.temporary(images._beside(), folder=True, mode=0o700) as alive:
        assert stat.S_IMODE(alive.stat().st_mode) == 0o700
        with pytest.raises(ValueError, match="no model"):
            run.Server(Settings(port=0), "m", load).run()
        assert os.listdir(tmp_path) == [alive.name]


def test_patches_of_a_level_of_a_slide(model, slide, serving):
    from medsiglip_jax.serve.settings import Settings

    path, levels = slide
    places = [(0, 0, 100, 80), (60, 40, 64, 64)]
    asked = [dict(zip(("x_origin", "y_origin", "width", "height"), p, strict=True)) for p in places]
    chosen = {(0, "index"): {"index": 0}, (1, "index"): {"index": -1}, (1, "far"): {"index": 9},
              (1, "least"): {"width": 300, "height": 200}}  # fmt: skip
    settings = Settings(port=0, max_batch=2, drain_delay=0.0)
    with serving(model, settings, fetcher=Bucket(path.read_bytes())) as client:
        instances = [
            {"image": {"gcs_uri": "gs://b/a.svs", "openslide_pyramid_level": level,
                       "patch_coordinates_list": asked}}
            for level in chosen.values()
        ]  # fmt: skip
        beyond = {"x_origin": 350, "y_origin": 0, "width": 64, "height": 64}
        instances.append({"image": {**instances[1]["image"], "patch_coordinates_list": [beyond]}})
        *answers, last = client.post("/predict", {"instances": instances}).body["predictions"]
    for (number, _), answer in zip(chosen, answers, strict=True):
        cut = [levels[number][y : y + h, x : x + w] for x, y, w, h in places]
        expected = model.encode_image(model.processor.images(cut, "serving"))
        found = np.array([p["embedding"] for p in answer["patch_embeddings"]])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert last["error"]["code"] == "PATCH_OUTSIDE_OF_IMAGE_DIMENSIONS_ERROR"
    assert not [path for path in _open_files() if "slide.svs" in path]
    assert not [key for key in handles._open if key[1].endswith("slide.svs")]


def _open_files() -> list[str]:
    """Of this process, which is the server's; where it can be told."""
    found = []
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # the listing's own
            found.append(os.readlink(link))
    return found


def test_an_address_is_measured_before_its_form_is_matched(client):
    import time

    start = time.process_time()  # of the server, too, which is a thread
    hostile = {"image": {"gcs_uri": "gs://a/" + "." * 500_000 + "/"}}
    answer = client.post("/predict", {"instances": [hostile]})
    assert answer.status == 400 and "2,048 characters" in answer.body["error"]
    assert time.process_time() - start < 10  # hours, by the regular expression
