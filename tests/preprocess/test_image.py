"""The presets against TensorFlow, transformers and the official container's own numbers.

Parity runs live where those are installed, and against tests/golden/preprocess.json everywhere.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import make_goldens_preprocess as goldens
import numpy as np
import pytest
from PIL import Image

from medsiglip_jax.preprocess import image as preprocess
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import (
    PRESETS,
    big_vision_pad,
    huggingface,
    resize_bilinear,
    serving,
    value_range,
)
from medsiglip_jax.preprocess.load import load_images

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "preprocess.json").read_text())


def noise(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def tf_resize():
    tf = pytest.importorskip("tensorflow")

    def resize(image, size):
        out = tf.image.resize(image, size, method="bilinear", antialias=False)
        return tf.cast(out, tf.uint8).numpy()

    return resize


@pytest.fixture(scope="module")
def processor():
    """(uint8 or float HWC image, size, rescale) -> pixel_values of SiglipImageProcessorPil, HWC."""
    transformers = pytest.importorskip("transformers")

    def process(image, size, rescale=True):
        process = transformers.SiglipImageProcessorPil(
            size={"height": size, "width": size}, do_rescale=rescale
        )
        values = process(image, input_data_format="channels_last")["pixel_values"][0]
        return np.asarray(values).transpose(1, 2, 0)

    return process


def container(image, size, processor):
    """The official container's steps: to [0, 1], zero-pad to a square, HF without rescaling."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.zeros((side, side, 3), np.float32)
    padded[top : top + height, left : left + width] = image.astype(np.float32) / 255
    return processor(padded, size, rescale=False)


def padded(image):
    """The image in the centre of a black square, the odd row or column after it."""
    side = max(image.shape[:2])
    top, left = ((side - n) // 2 for n in image.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    square[top : top + len(image), left : left + image.shape[1]] = image
    return square


def shipped_images():
    """Colour images inside the scikit-image wheel: a retina, stained tissue, photographs."""
    data = pytest.importorskip("skimage.data")
    folder = Path(data.__file__).parent
    names = ["retina.jpg", "ihc.png", "microaneurysms.png", "rocket.jpg", "chelsea.png", "cell.png"]
    return [decode(folder / name) for name in names]


# ---------------------------------------------------------------------------------- resize_bilinear


@pytest.mark.float
@pytest.mark.parametrize("row", GOLDEN["resize"], ids=lambda r: f"{r['shape']}-{r['size']}")
def test_resize_matches_tensorflow_goldens(row):
    out = resize_bilinear(goldens.pattern(*row["shape"]), tuple(row["size"]))
    if "pixels" in row:
        np.testing.assert_array_equal(out, row["pixels"])
    assert goldens.sha(out) == row["sha256"]


@pytest.mark.float
def test_resize_equals_tensorflow_on_random_sizes(tf_resize):
    rng = np.random.default_rng(0)
    for i in range(600):
        largest = [3, 30, 300, 1500][i % 4]
        height, width = rng.integers(1, largest + 1, 2)
        size = tuple(int(n) for n in rng.integers(1, rng.choice([4, 64, 500]) + 1, 2))
        image = noise(rng, height, width, [1, 3, 4, 3, 2][i % 5])
        if i % 7 == 0:  # only the extremes: the steepest slopes
            image = (image > 127).astype(np.uint8) * np.uint8(255)
        expected = tf_resize(image, size)
        np.testing.assert_array_equal(resize_bilinear(image, size), expected, str((i, image.shape)))


@pytest.mark.parametrize("size", [(448, 448), (224, 224), (896, 512)])
def test_resize_equals_tensorflow_on_real_images(tf_resize, size):
    for image in shipped_images():
        np.testing.assert_array_equal(resize_bilinear(image, size), tf_resize(image, size))


def test_resize_equals_tensorflow_at_the_largest_size(tf_resize):
    image = noise(np.random.default_rng(1), 6000, 5000, 3)
    np.testing.assert_array_equal(resize_bilinear(image, (448, 448)), tf_resize(image, (448, 448)))


def test_resize_takes_views(tf_resize):
    image = noise(np.random.default_rng(2), 90, 80, 3)[::-2, 1::3]
    expected = tf_resize(np.ascontiguousarray(image), (33, 44))
    np.testing.assert_array_equal(resize_bilinear(image, (33, 44)), expected)


def test_resize_truncates_and_keeps_the_same_size():
    image = goldens.pattern(9, 8, 3)
    np.testing.assert_array_equal(resize_bilinear(image, (9, 8)), image)
    # 0 and 255 at 1/4 and 3/4: 63.75 and 191.25, not rounded.
    step = np.array([[[0], [255]]], np.uint8)
    np.testing.assert_array_equal(resize_bilinear(step, (1, 4))[0, :, 0], [0, 63, 191, 255])


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), (2, 2), "image is float32.*expected uint8"),
        (np.zeros((4, 4), np.uint8), (2, 2), r"uint8 \(4, 4\), expected uint8 \[H, W, C\]"),
        (np.zeros((4, 0, 3), np.uint8), (2, 2), "at least one"),
        (np.zeros((4, 4, 3), np.uint8), (0, 2), "size is 0"),
        (np.zeros((4, 4, 3), np.uint8), (2.5, 2), "size is 2.5"),
        (np.zeros((4, 4, 3), np.uint8), (2, 2, 3), "height, width"),
    ],
)
def test_resize_refuses(image, size, message):
    with pytest.raises(ValueError, match=message):
        preprocess._check_resize(image, size)  # the annotations of the public one come first here


# ------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", ["huggingface", "serving"])
@pytest.mark.parametrize("row", GOLDEN["squares"], ids=lambda r: f"{r['shape']}-{r['size']}")
def test_bicubic_presets_match_transformers_goldens(name, row):
    assert goldens.sha(PRESETS[name](goldens.pattern(*row["shape"]), row["size"])) == row[name]


@pytest.mark.float
def test_value_range_is_the_processors_arithmetic(processor):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(value_range(levels), processor(levels, 16))  # bit for bit
    assert value_range(levels).min() == -1 and value_range(levels).max() == 1


@pytest.mark.parametrize("preset", list(PRESETS.values()))
def test_pixels_four_bytes_apart_are_resized_as_any_others(preset):
    """Readers leave a fourth byte, of any value, so that PIL copies nothing."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (150, 90, 4), np.uint8)
    np.testing.assert_array_equal(preset(whole[..., :3], 56), preset(whole[..., :3].copy(), 56))
    part = whole[10:, :, 1:]  # begins elsewhere, so it is no picture of PIL
    np.testing.assert_array_equal(preset(part, 56), preset(part.copy(), 56))


@pytest.mark.float
def test_huggingface_is_bit_equal_to_the_processor(processor):
    rng = np.random.default_rng(3)
    random = [noise(rng, *rng.integers(1, 600, 2), 3) for _ in range(40)]
    for image in [*random, *shipped_images(), noise(rng, 448, 448, 3)]:
        np.testing.assert_array_equal(
            value_range(huggingface(image, 448)), processor(image, 448), str(image.shape)
        )


def test_serving_is_the_containers_arithmetic(processor):
    rng = np.random.default_rng(4)
    random = [noise(rng, *rng.integers(1, 600, 2), 3) for _ in range(20)]
    for image in [*random, *shipped_images()]:
        np.testing.assert_allclose(  # x / 255 once more, in float64: 1 float32 ulp at most
            value_range(serving(image, 448)), container(image, 448, processor), rtol=0, atol=1.2e-7
        )


@pytest.mark.parametrize("shape", [(40, 30), (30, 30), (7, 200)])
def test_serving_keeps_the_containers_quirk_for_two_level_images(processor, shape):
    rng = np.random.default_rng(5)
    for image in [rng.choice([0, 255], (*shape, 3)), np.full((*shape, 3), 255)]:
        out = serving(image.astype(np.uint8), 50)
        assert set(np.unique(out)) <= {0, 255}
        np.testing.assert_array_equal(value_range(out), container(image, 50, processor))


@pytest.mark.parametrize(
    ("corner", "expected"),
    [
        (None, [0.2801, 0.2639, 0.2785]),
        ((2, 2), [1.0, 1.0, 1.0]),
        ((3, 3), [1.0, 0.9984, 0.9992]),
    ],
)
@pytest.mark.parametrize("alpha", [False, True])
def test_serving_reproduces_the_containers_channel_means(real_data, corner, expected, alpha):
    image = decode(real_data / "images" / "image.jpeg")  # predictor_test.py at 56b1447
    if alpha:
        image = decode(np.dstack([image, np.full(image.shape[:2], 125, np.uint8)]))
    if corner:
        x, y = corner
        image = image[y : y + 10, x : x + 10]
    means = value_range(serving(image, 448)).astype(np.float64).mean(axis=(0, 1))
    np.testing.assert_array_equal(means.round(4), expected)


def test_serving_centres_on_black_with_the_odd_row_after():
    image = np.full((2, 5, 3), 200, np.uint8)
    expected = np.zeros((5, 5, 3), np.uint8)
    expected[1:3] = 200  # 3 missing rows: 1 before, 2 after
    np.testing.assert_array_equal(serving(image, 5), expected)
    np.testing.assert_array_equal(serving(image.transpose(1, 0, 2), 5), expected.transpose(1, 0, 2))


@pytest.mark.parametrize("shape", [(3000, 5), (5, 3000), (1301, 1299), (448, 448), (1, 1)])
def test_serving_in_two_passes_equals_the_padded_square(shape):
    image = goldens.pattern(*shape, 3)
    direct = Image.fromarray(padded(image)).resize((448, 448), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(serving(image, 448), np.asarray(direct))


def test_serving_refuses_what_cannot_be_padded():
    with pytest.raises(UnreadableImage, match="1000000x1 image is too elongated"):
        serving(np.zeros((1, 1_000_000, 3), np.uint8), 448)


PADDED = [(3000, 5), (5, 3000), (1301, 1299), (448, 448), (200, 448), (1, 1), (2, 3)]


@pytest.mark.parametrize("size", [448, 31])
@pytest.mark.parametrize("shape", PADDED)
def test_big_vision_pad_is_the_resize_of_the_padded_square(shape, size):
    image = goldens.pattern(*shape, 3)
    for picture in (image, image[::-1, ::-1]):
        expected = resize_bilinear(padded(picture), (size, size))
        np.testing.assert_array_equal(big_vision_pad(picture, size), expected)


@pytest.mark.float
def test_big_vision_pad_equals_tensorflow(tf_resize):
    rng = np.random.default_rng(6)
    random = [noise(rng, *rng.integers(1, 600, 2), 3) for _ in range(40)]
    for image in [*random, *shipped_images()]:
        expected = tf_resize(padded(image), (448, 448))
        np.testing.assert_array_equal(big_vision_pad(image, 448), expected, str(image.shape))


def test_both_padded_presets_put_the_image_in_the_same_place():
    for shape in [(2, 5), (5, 2), (4, 4), (1, 4)]:
        image = np.full((*shape, 3), 200, np.uint8)
        np.testing.assert_array_equal(big_vision_pad(image, max(shape)), serving(image, max(shape)))


def test_big_vision_pad_leaves_its_source_alone():
    image = noise(np.random.default_rng(7), 30, 50, 3)
    before = image.copy()
    big_vision_pad(image, 50)
    np.testing.assert_array_equal(image, before)


def test_unknown_preset_names_the_four():
    with pytest.raises(ValueError, match="'tf'.*big_vision, big_vision_pad, huggingface, serving"):
        load_images([], 8, preprocess="tf")


# -------------------------------------------------------------------------------------- load_images


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("cores", [1, 3])
def test_load_images_keeps_order_and_takes_any_mixture(tmp_path, monkeypatch, name, cores):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    images = [goldens.pattern(20 + i, 30 - i, 3) for i in range(12)]
    items = list(images)
    for i in range(0, 12, 3):
        items[i] = tmp_path / f"{i}.png"
        Image.fromarray(images[i]).save(items[i])
    items[1] = Image.fromarray(images[1])
    items[2] = (tmp_path / "3.png").read_bytes()
    images[2] = images[3]
    expected = np.stack([PRESETS[name](image, 16) for image in images])
    np.testing.assert_array_equal(load_images(items, 16, name), expected)


def test_load_images_shapes(tmp_path):
    image = goldens.pattern(8, 6, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    one = resize_bilinear(image, (4, 4))[None]
    paths = np.array([str(tmp_path / "a.png")])
    for items in [
        image,
        [image],
        str(tmp_path / "a.png"),
        image[None],
        paths,
        (x for x in [image]),
    ]:
        np.testing.assert_array_equal(load_images(items, 4), one)
    for items in [[], (), image[:0].reshape(0, 8, 6, 3)]:
        assert load_images(items, 4).shape == (0, 4, 4, 3)
    assert load_images([], 4).dtype == np.uint8


def test_one_lazy_pil_image_may_be_given_many_times(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    image = goldens.pattern(900, 900, 3)  # large enough for the threads to meet in PIL's load()
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = resize_bilinear(image, (32, 32))
    for _ in range(3):
        with Image.open(tmp_path / "a.png") as lazy:
            out = load_images([lazy] * 8, 32)
        np.testing.assert_array_equal(out, np.stack([expected] * 8))


def test_load_images_names_the_item(tmp_path):
    good = goldens.pattern(8, 8, 3)
    with pytest.raises(FileNotFoundError, match="image 2 of 3: .*gone.png: no such file"):
        load_images([good, tmp_path / "gone.png", good], 4)
    with pytest.raises(UnreadableImage, match="image 3 of 3: image of 4 bytes: not an image"):
        load_images([good, good, b"junk"], 4)
    with pytest.raises(UnreadableImage, match=r"^float32 array \(8, 8, 3\): expected a path"):
        load_images(good.astype(np.float32), 4)
    for size in [0, -1, True]:
        with pytest.raises(ValueError, match="size is"):
            load_images([good], size)


def test_load_images_warns_once_about_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(5):
        kwargs = {"exif": exif} if i in (1, 3) else {}
        Image.fromarray(goldens.pattern(16, 8, 3)).save(tmp_path / f"{i}.jpg", **kwargs)
    paths = sorted(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="2 of 5 images carry an EXIF orientation") as caught:
        load_images(paths, 8)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images(paths[:1], 8)


def test_pixels_need_neither_jax_nor_tensorflow():
    code = (
        "import sys, medsiglip_jax.preprocess.load as p, numpy as n;"
        "p.load_images(n.zeros((2, 9, 9, 3), n.uint8), 4);"
        "sys.exit(str({'jax', 'tensorflow', 'torch', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
