"""The examples of the official container's own tests (Google-Health/medsiglip 56b1447,
python/serving and python/data_accessors), sent over HTTP and answered field by field.

Those tests put a stand-in where the model is: the embedding of an image is the mean of each channel
of its pixels, scaled to -1..1, and that of a text the mean of its 64 ids. So does the server here.
Since its vectors are normalised, they have a further number that is 1 before that.
"""

import base64
import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pydicom
import pytest
from dicom_files import made
from PIL import Image

from medsiglip_jax.model import config
from medsiglip_jax.model.api import Model
from medsiglip_jax.serve.errors import HTTP, InstanceError
from medsiglip_jax.serve.settings import Settings

SIDE = 448
# The means that python/serving/predictor_test.py expects, to four decimals.
WHOLE = [0.2801, 0.2639, 0.2785]
IMAGE_URL, GCS_URI = "https://example.org/image.png", "gs://bucket/image.png"


class StandIn(Model):
    """The official tests' stand-in for a model; further numbers say where an image is bright."""

    def __init__(self, tokenizer: Path):
        sizes = config.two_towers(
            image_size=SIDE, patch_size=14, width=16, depth=1, mlp_dim=16, num_heads=2,
            vocab_size=32_000,
        )  # fmt: skip
        params = {"t": np.ones(1, np.float32), "b": np.zeros(1, np.float32)}
        super().__init__(params, sizes, tokenizer=tokenizer)

    def encode_image(self, images, normalize=True, batch_size=None):
        x = np.asarray(images, np.float64) / 127.5 - 1
        half, all_of = SIDE // 2, (1, 2, 3)
        top, left = x[:, :half].mean(all_of), x[:, :, :half].mean(all_of)
        return jnp.column_stack([x.mean((1, 2)), top, left, np.ones(len(x))])

    def encode_text(self, tokens, normalize=True, batch_size=None):
        means = np.mean(tokens, axis=1)
        return jnp.column_stack([means, np.zeros((len(means), 4)), np.ones(len(means))])


class Stored:
    """In place of what fetches addresses: one image, wherever it is asked for."""

    def __init__(self, content: bytes):
        self._content = content

    async def fetch(self, address: str) -> bytes:
        if address not in (IMAGE_URL, GCS_URI):
            raise InstanceError(HTTP, "404")
        return self._content

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def images(real_data) -> Path:
    return real_data / "images"


@pytest.fixture(scope="module")
def jpeg(images) -> bytes:
    return (images / "image.jpeg").read_bytes()


@pytest.fixture(scope="module")
def rgba(jpeg) -> bytes:
    """The same image as the official tests make a PNG of it, half transparent."""
    page = Image.open(io.BytesIO(jpeg)).convert("RGBA")
    page.putalpha(125)
    return png(page)


@pytest.fixture(scope="module")
def client(serving, real_data, rgba):
    model = StandIn(real_data / "tokenizer")
    settings = Settings(port=0, max_batch=8, queue=16, drain_delay=0.0)
    with serving(model, settings, fetcher=Stored(rgba)) as asked:
        yield asked


def png(page: Image.Image | np.ndarray) -> bytes:
    file = io.BytesIO()
    (page if isinstance(page, Image.Image) else Image.fromarray(page)).save(file, "PNG")
    return file.getvalue()


def image(content: bytes, **more) -> dict:
    return {"image": {"input_bytes": base64.b64encode(content).decode(), **more}}


def place(x: int, y: int, width: int, height: int) -> dict:
    return {"x_origin": x, "y_origin": y, "width": width, "height": height}


def ask(client, *instances) -> list[dict]:
    answer = client.post("/predict", {"instances": list(instances)})
    assert answer.status == 200, answer.body
    return answer.body["predictions"]


def means(prediction: dict) -> list[float]:
    """What the stand-in has given, before it was normalised."""
    vector = prediction["embedding"]
    return [value / vector[-1] for value in vector[:-1]]


def served(page: np.ndarray) -> np.ndarray:
    """The means of an image [h, w] or [h, w, 3] of uint8, read as the official server reads it:
    black up to a square, then bicubic to 448. An image of black and white alone, which are the
    integers 0 and 1 there, gets no shades between them."""
    page = page if page.ndim == 3 else np.stack([page] * 3, axis=-1)
    side = max(page.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - page.shape[0]) // 2, (side - page.shape[1]) // 2
    square[top : top + page.shape[0], left : left + page.shape[1]] = page
    most = 1 if set(np.unique(square)) <= {0, 255} else 255
    scaled = Image.fromarray(square // (255 // most))
    resized = np.asarray(scaled.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    return resized.mean((0, 1)) / most * 2 - 1


def test_the_whole_image_and_patches_of_it(client, jpeg):
    [whole] = ask(client, image(jpeg))
    assert means(whole)[:3] == pytest.approx(WHOLE, abs=1e-4)
    assert whole["input_type"] == "image"
    assert (whole["model_temperature"], whole["model_bias"]) == (1.0, 0.0)
    places = [place(2, 2, 10, 10), place(3, 3, 10, 10)]
    [patches] = ask(client, image(jpeg, patch_coordinates_list=places))
    assert [p["patch_coordinate"] for p in patches["patch_embeddings"]] == places
    first, second = map(means, patches["patch_embeddings"])
    assert first[:3] == pytest.approx([1, 1, 1], abs=1e-4)
    assert second[:3] == pytest.approx([1.0, 0.9984, 0.9992], abs=1e-4)


@pytest.mark.parametrize("source", [{"image_url": IMAGE_URL}, {"gcs_uri": GCS_URI}, None])
def test_a_png_with_an_alpha_channel_inline_and_by_address(client, rgba, source):
    [found] = ask(client, {"image": source} if source else image(rgba))
    assert means(found)[:3] == pytest.approx(WHOLE, abs=1e-4)


def test_an_object_that_is_not_there_is_an_error_of_its_instance(client, jpeg):
    gone = {"image": {"gcs_uri": "gs://bucket/gone.png"}}
    first, second = ask(client, gone, image(jpeg))
    assert first["error"]["code"] == "HTTP_ERROR" and "embedding" in second


def test_texts(client):
    found = ask(client, {"text": "test_text_1"}, {"text": "test_text_2"})
    assert [p["input_type"] for p in found] == ["text", "text"]
    assert [means(p)[0] for p in found] == pytest.approx([155.0156, 153.0469], abs=1e-4)


def test_a_text_patches_another_text_and_a_whole_image_come_back_in_order(client, jpeg):
    places = [place(2, 2, 10, 10), place(3, 3, 10, 10)]
    first, patches, second, whole = ask(
        client, {"text": "test_text_1"}, image(jpeg, patch_coordinates_list=places),
        {"text": "test_text_2"}, image(jpeg),
    )  # fmt: skip
    assert means(first)[0] == pytest.approx(155.0156, abs=1e-4)
    assert len(patches["patch_embeddings"]) == 2
    assert means(second)[0] == pytest.approx(153.0469, abs=1e-4)
    assert means(whole)[:3] == pytest.approx(WHOLE, abs=1e-4)


@pytest.mark.parametrize("body", [
    [], {}, {"instances": "foo"}, {"instances": ["foo"]}, {"instances": [{"foo": {}}]},
    {"instances": [{"image": []}]}, {"instances": [{"image": {"foo": {}}}]},
])  # fmt: skip
def test_a_request_that_the_schema_does_not_allow(client, body):
    """In the official container the HTTP layer has the schema, and answers 400 as well."""
    answer = client.post("/predict", body)
    assert answer.status == 400 and list(answer.body) == ["error"]


def test_more_patches_than_the_server_takes(client, jpeg):
    answer = client.post(
        "/predict",
        {"instances": [image(jpeg, patch_coordinates_list=[place(0, 0, 9, 9)] * 17)]},
    )
    assert answer.status == 413 and "17 images" in answer.body["error"]


@pytest.mark.parametrize("shape, top, left", [
    ((1, 2), 1, 0), ((2, 1), 0, 1), ((1, 3), 0, 0), ((3, 1), 0, 0),
])  # fmt: skip
def test_padding_is_centred_and_an_odd_row_goes_below(client, shape, top, left):
    """1x2 becomes the rows [1, 1], [0, 0], and 2x1 the columns [1, 0]."""
    page = np.full((*shape, 3), 255, np.uint8)
    [found] = ask(client, image(png(page)))
    *channels, upper, leftmost = means(found)
    assert channels == pytest.approx(served(page), abs=1e-4)
    mean = channels[0]
    # A white row on top is seen in the upper half alone, but for the slope between the two.
    assert (upper - mean > 0.8) == bool(top) and (leftmost - mean > 0.8) == bool(left)


@pytest.mark.parametrize("box", [
    (5, 0, 4000, 10), (10, 10, 100, 67), (90, 60, 20, 20), (0, 0, 102, 69),
])  # fmt: skip
def test_a_patch_that_reaches_beyond_the_image(client, jpeg, box):
    asked = {"patch_coordinates_list": [place(*box)]}
    [refused] = ask(client, image(jpeg, **asked))
    assert refused["error"]["code"] == "PATCH_OUTSIDE_OF_IMAGE_DIMENSIONS_ERROR"
    for said in (False, "False", "false"):
        allowed = {"require_patches_fully_in_source_image": said}
        [found] = ask(client, image(jpeg, **asked, extensions=allowed))
        [patch] = found["patch_embeddings"]
        x, y, width, height = box
        page = np.asarray(Image.open(io.BytesIO(jpeg)))[y : y + height, x : x + width]
        beyond = ((0, height - page.shape[0]), (0, width - page.shape[1]), (0, 0))
        assert means(patch)[:3] == pytest.approx(served(np.pad(page, beyond)), abs=1e-4)


@pytest.mark.parametrize("dimensions", [
    3, [1, 2], "3x3", {"width": 3}, {"height": 3}, {"width": 0, "height": 3},
    {"width": 3, "height": -1},
])  # fmt: skip
def test_dimensions_that_are_wrong(client, jpeg, dimensions):
    body = {"instances": [image(jpeg, extensions={"image_dimensions": dimensions})]}
    answer = client.post("/predict", body)
    assert answer.status == 400
    assert answer.body["error"].startswith("instances[0].image.extensions.image_dimensions")


@pytest.mark.parametrize("size", [(50, 34), (200, 134)])
def test_an_image_is_resized_before_it_is_cut(client, jpeg, size):
    """Only its size is compared: the official server resizes with OpenCV, which is not here."""
    width, height = size
    inside, beyond = place(width - 9, height - 9, 9, 9), place(width - 9, height - 9, 10, 9)
    resized = {"image_dimensions": {"width": width, "height": height}}
    first, second = ask(
        client, image(jpeg, extensions=resized, patch_coordinates_list=[inside]),
        image(jpeg, extensions=resized, patch_coordinates_list=[beyond]),
    )  # fmt: skip
    assert len(first["patch_embeddings"]) == 1
    assert second["error"]["code"] == "PATCH_OUTSIDE_OF_IMAGE_DIMENSIONS_ERROR"


@pytest.mark.parametrize("profile, code", [
    ("NONE", None), ("noNe", None), ("SRGB", "INVALID_REQUEST_FIELD_ERROR"),
])  # fmt: skip
def test_a_colour_profile(client, jpeg, profile, code):
    """Only "none" is taken; the official server also transforms to five profiles."""
    asked = {"transform_imaging_to_icc_profile": profile}
    [found] = ask(client, image(jpeg, extensions=asked))
    assert found.get("error", {}).get("code") == code


def window(values: np.ndarray, center: int, width: int) -> np.ndarray:
    """generic_dicom_handler._window: 16 bits of what lies in the window."""
    low, high = center - width // 2, center + width // 2
    return np.round((np.clip(values.astype(float), low, high) - low) * 65535 / (high - low))


VALUES = np.array([[-2000, -1024, -500], [-100, 0, 40], [400, 900, 3000]], np.int16)


@pytest.mark.parametrize("tags, asked, used", [
    ({}, None, (100, 2500)),
    ({"WindowCenter": 40, "WindowWidth": 400}, None, (40, 400)),
    ({"WindowCenter": 40, "WindowWidth": 400}, (-600, 1500), (-600, 1500)),
    ({"PhotometricInterpretation": "MONOCHROME1"}, None, (100, 2500)),
])  # fmt: skip
def test_the_window_of_a_ct(client, tags, asked, used):
    """The default, the file's and the request's, each of stored values without a rescaling."""
    more = {}
    if asked:
        more["radiology_dicom_window_level"] = dict(zip(("center", "width"), asked, strict=True))
    [found] = ask(client, image(made(VALUES, Modality="CT", **tags), **more))
    pixels = window(VALUES, *used)
    if "PhotometricInterpretation" in tags:
        pixels = 65535 - pixels
    expected = served((pixels / 65535 * 255).astype(np.uint8))
    assert means(found)[:3] == pytest.approx(expected, abs=1e-4)


def test_a_radiograph_and_what_is_no_dicom_at_all(client, images):
    """encapsulated_cxr.dcm: 8 bits of 1024 x 1024, taken as they are."""
    path = images / "encapsulated_cxr.dcm"
    radiograph, broken = ask(client, image(path.read_bytes()), image(b"none" * 100))
    expected = served(pydicom.dcmread(path).pixel_array)
    assert means(radiograph)[:3] == pytest.approx(expected, abs=1e-3)
    assert broken["error"]["code"] == "UNHANDLED_GENERIC_BYTES_ERROR"


@pytest.mark.parametrize("modality", ["XC", "GM"])
@pytest.mark.parametrize("colour", [True, False])
def test_a_photograph_is_taken_as_it_is(client, modality, colour):
    page = np.random.default_rng(0).integers(0, 256, (20, 30, 3)[: 2 + colour], np.uint8)
    [found] = ask(client, image(made(page, Modality=modality)))
    assert means(found)[:3] == pytest.approx(served(page), abs=1e-4)


@pytest.mark.parametrize("modality", ["MR", "US", "MG", "OP"])
def test_modalities_that_the_official_server_refuses(client, modality):
    page = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    [found] = ask(client, image(made(page, Modality=modality)))
    assert found["error"]["code"] == "DICOM_ERROR"
    assert f"modality {modality}" in found["error"]["description"]


def test_a_grey_jpeg(client, images):
    path = images / "image_bw.jpeg"
    [found] = ask(client, image(path.read_bytes()))
    expected = served(np.asarray(Image.open(path)))
    assert means(found)[:3] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("box", [None, (0, 0, 224, 224), (300, 200, 224, 224)])
def test_a_slide_as_dicom(client, images, box):
    """15 tiles of one level; the same as PNG lies beside it, of another decoder of JPEG."""
    name = images / "multiframe_camelyon_challenge_image"
    asked = {"patch_coordinates_list": [place(*box)]} if box else {}
    [found] = ask(client, image(name.with_suffix(".dcm").read_bytes(), **asked))
    page = np.asarray(Image.open(name.with_suffix(".png")))
    if box:
        [found] = found["patch_embeddings"]
        x, y, width, height = box
        page = page[y : y + height, x : x + width]
    assert means(found)[:3] == pytest.approx(served(page), abs=2e-3)


def test_a_slide_is_not_resized_before_it_is_cut(client, images):
    content = (images / "multiframe_camelyon_challenge_image.dcm").read_bytes()
    resized = {"image_dimensions": {"width": 384, "height": 233}}
    [found] = ask(client, image(content, extensions=resized))
    assert found["error"]["code"] == "IMAGE_DIMENSION_ERROR"
