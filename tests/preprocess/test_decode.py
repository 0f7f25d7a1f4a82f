"""Every kind of image file and array against the pixels it must give, and hostile files."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence, features

from medsiglip_jax.preprocess import facts, sources
from medsiglip_jax.preprocess.decode import decode, decode_with_facts
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.load import load_images
from medsiglip_jax.preprocess.names import parse

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = RGB[..., 0]
WIDE = RNG.integers(0, 65536, (6, 5), dtype=np.uint16)
WIDE[0, :4] = [0, 128, 129, 65535]  # 128 / 257 rounds down, 129 / 257 up
GREY3 = np.dstack([GREY] * 3)
WIDE3 = np.dstack([np.floor(WIDE / 257 + 0.5).astype(np.uint8)] * 3)


def encoded(image, format="PNG", **kwargs):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def png(width, height, bits, colour, data, *chunks):
    """A PNG by hand, for what PIL cannot write."""

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *(chunk(*c) for c in chunks)]
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")])


def palette_image(**kwargs):
    """Indices 0..29 into a palette of the colours of RGB."""
    image = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5), mode=None).convert("L")
    image = Image.frombytes("P", (5, 6), image.tobytes())
    image.putpalette(RGB.tobytes() + bytes(768 - 90))
    image.info.update(kwargs)
    return image


def cmyk():
    return Image.frombytes("CMYK", (2, 1), bytes([0, 0, 0, 0, 255, 0, 0, 128]))


RGBA = np.dstack([RGB, np.arange(30, dtype=np.uint8).reshape(6, 5)])
ONE_BIT = Image.fromarray(GREY > 127)
BLACK_OR_WHITE = np.dstack([np.where(GREY > 127, 255, 0).astype(np.uint8)] * 3)
RGB16 = RNG.integers(0, 65536, (6, 5, 3), dtype=np.uint16)
FILTERED = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB16)  # no PNG row filter

MODES = {
    "RGB": (Image.fromarray(RGB), RGB),
    "RGB-png": (encoded(RGB), RGB),
    "RGB-png-transparent": (encoded(RGB, transparency=tuple(int(v) for v in RGB[0, 0])), RGB),
    "RGB-bmp": (encoded(RGB, "BMP"), RGB),
    "RGB-ppm": (encoded(RGB, "PPM"), RGB),
    "RGB-webp": (encoded(RGB, "WEBP", lossless=True), RGB),
    "RGB-jpeg2000": (encoded(RGB, "JPEG2000"), RGB),
    "RGB-tiff-lzw": (encoded(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "RGBX": (Image.fromarray(RGB).convert("RGBX"), RGB),
    "RGBA": (Image.fromarray(RGBA), RGB),
    "RGBA-png": (encoded(RGBA), RGB),
    "L": (Image.fromarray(GREY), GREY3),
    "L-png": (encoded(GREY), GREY3),
    "L-png-transparent": (encoded(GREY, transparency=7), GREY3),
    "LA": (Image.fromarray(np.dstack([GREY, RGBA[..., 3]]), "LA"), GREY3),
    "LA-png": (encoded(Image.fromarray(np.dstack([GREY, RGBA[..., 3]]), "LA")), GREY3),
    "P": (palette_image(), RGB),
    "P-png": (encoded(palette_image()), RGB),
    "P-png-transparent-index": (encoded(palette_image(), transparency=3), RGB),
    "P-png-transparent-table": (encoded(palette_image(), transparency=bytes(range(30))), RGB),
    "P-gif": (encoded(palette_image(), "GIF"), RGB),
    "P-gif-transparent": (encoded(palette_image(), "GIF", transparency=3), RGB),
    "PA": (palette_image().convert("PA"), RGB),
    "1": (ONE_BIT, BLACK_OR_WHITE),
    "1-png": (encoded(ONE_BIT), BLACK_OR_WHITE),
    "1-tiff": (encoded(ONE_BIT, "TIFF", compression="group4"), BLACK_OR_WHITE),
    "CMYK": (cmyk(), np.array([[[255, 255, 255], [0, 127, 127]]], np.uint8)),
    "CMYK-tiff": (encoded(cmyk(), "TIFF"), np.array([[[255, 255, 255], [0, 127, 127]]], np.uint8)),
    "I;16": (Image.fromarray(WIDE), WIDE3),
    "I;16-png": (encoded(WIDE), WIDE3),
    "I;16-tiff": (encoded(WIDE, "TIFF"), WIDE3),
    "I;16B": (Image.frombytes("I;16B", (5, 6), WIDE.astype(">u2").tobytes()), WIDE3),
    "I;16L": (Image.frombytes("I;16L", (5, 6), WIDE.astype("<u2").tobytes()), WIDE3),
    "I;16-pgm": (b"P5 5 6 65535\n" + WIDE.astype(">u2").tobytes(), WIDE3),
    "I": (Image.fromarray(WIDE.astype(np.int32)), WIDE3),
    "I-tiff": (encoded(WIDE.astype(np.int32), "TIFF"), WIDE3),
    "RGB16-png": (png(5, 6, 16, 2, FILTERED), (RGB16 >> 8).astype(np.uint8)),
    "2-bit-png": (png(4, 1, 2, 0, b"\0\x1b"), np.array([[[0], [85], [170], [255]]]).repeat(3, 2)),
    "array": (RGB, RGB),
    "array-grey": (GREY, GREY3),
    "array-1": (GREY[..., None], GREY3),
    "array-2": (np.dstack([GREY, RGBA[..., 3]]), GREY3),
    "array-4": (RGBA, RGB),
    "array-uint16": (WIDE, WIDE3),
    "array-uint16-big-endian": (WIDE.astype(">u2"), WIDE3),
    "array-uint16-4": (np.dstack([WIDE] * 4), WIDE3),
}


@pytest.mark.parametrize("name", list(MODES))
def test_every_mode_gives_its_pixels(name, tmp_path):
    item, expected = MODES[name]
    out = decode(item)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, expected)
    if isinstance(item, bytes):
        (tmp_path / "no-extension").write_bytes(item)
        np.testing.assert_array_equal(decode(tmp_path / "no-extension"), expected)
        np.testing.assert_array_equal(decode(str(tmp_path / "no-extension")), expected)
        np.testing.assert_array_equal(decode(bytearray(item)), expected)


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "HSV"])
def test_other_colour_spaces_become_rgb(mode):
    image = Image.fromarray(RGB).convert(mode)
    out = decode(image)
    np.testing.assert_array_equal(out, np.asarray(image.convert("RGB")))
    # 8-bit round trip; the raw channels would be 60 levels away.
    assert np.abs(out.astype(int) - RGB).mean() < 2


def test_cmyk_jpeg_is_converted_not_cut_to_three_channels():
    flat = Image.new("CMYK", (16, 16), (0, 200, 200, 20))
    out = decode(encoded(flat, "JPEG", quality=100)).astype(int)
    assert np.abs(out - [235, 51, 51]).max() <= 3


def test_16_bit_is_linear_over_its_whole_range():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    exact = np.array([(2 * v + 257) // 514 for v in range(65536)])  # round(v / 257), in integers
    np.testing.assert_array_equal(decode(every)[..., 0].ravel(), exact)
    np.testing.assert_array_equal(decode(encoded(every))[..., 2].ravel(), exact)
    levels = np.arange(256, dtype=np.uint16).reshape(1, 256) * 257
    np.testing.assert_array_equal(decode(levels)[0, :, 0], np.arange(256))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-5, 3]], np.int32), r"values -5\.\.3, outside 0\.\.65535; window or scale"),
        (np.array([[0, 65536]], np.int32), r"values 0\.\.65536, outside"),
        (np.array([[0.5, 0.25]], np.float32), r"mode F.*scale them to uint8 or uint16"),
    ],
)
def test_pixels_without_an_agreed_range_are_refused(values, message):
    for item in [Image.fromarray(values), encoded(values, "TIFF")]:
        with pytest.raises(UnreadableImage, match=message):
            decode(item)


@pytest.mark.parametrize("format", ["TIFF", "PNG", "WEBP", "GIF", "AVIF"])
def test_pages_and_frames(format, tmp_path):
    """The first, unless one is asked for: then what PIL shows there, in any order of asking."""
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this build of PIL has no AVIF")
    shown = [Image.fromarray(p) for p in (RGB, 255 - RGB, np.roll(RGB, 1, 0))]
    how = {} if format in ("TIFF", "GIF") else {"lossless": True}
    data = encoded(shown[0], format, save_all=True, append_images=shown[1:], duration=9, **how)
    (tmp_path / "pages").write_bytes(b"before" + data)
    source = f"{tmp_path}/pages#6:{len(data)}"
    assert sources.frames(*parse(source)) == 3
    want = [
        np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(io.BytesIO(data)))
    ]
    if format in ("TIFF", "PNG"):
        np.testing.assert_array_equal(want[1], 255 - RGB)
    for number in (2, 0, 1):
        pixels, seen = sources.read(f"{source}#frame={number}")
        np.testing.assert_array_equal(pixels, want[number])
        assert (seen.frames, seen.frame) == (3, number)
        np.testing.assert_array_equal(decode(data, Rules(frame=number)), want[number])
    pixels, seen = decode_with_facts(data)
    np.testing.assert_array_equal(pixels, want[0])
    assert (seen.frames, seen.frame) == (3, 0)
    for asked in (lambda: sources.read(f"{source}#frame=3"), lambda: decode(data, Rules(frame=3))):
        with pytest.raises(UnreadableImage, match=f"{format} of 3 pages; number 3 is asked for"):
            asked()


def test_a_damaged_later_page_does_not_cost_the_first():
    whole = encoded(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    first = len(encoded(RGB, "TIFF"))
    for end in range(first, len(whole), 7):
        np.testing.assert_array_equal(decode(whole[:end]), RGB)


def test_a_single_image_has_one_frame():
    """A thumbnail in a JPEG (MPO) and the layers of other formats are no pages."""
    mpo = encoded(RGB, "MPO", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    for data in (mpo, encoded(RGB, "JPEG"), encoded(RGB, "BMP")):
        np.testing.assert_array_equal(decode(data, Rules(frame=1)), decode(data))
        assert decode_with_facts(data)[1].frames == 1


def test_exif_orientation_is_reported_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(RGB, "JPEG", exif=exif)
    pixels, facts = decode_with_facts(jpeg)
    assert facts.orientation == 6
    np.testing.assert_array_equal(pixels, decode(encoded(RGB, "JPEG")))
    with Image.open(io.BytesIO(jpeg)) as image:
        assert decode_with_facts(image)[1].orientation == 6
    assert decode_with_facts(encoded(RGB))[1].orientation == 1
    assert decode_with_facts(RGB)[1].orientation == 1
    exif[0x0112] = 77
    assert decode_with_facts(encoded(RGB, "JPEG", exif=exif))[1].orientation == 1


def test_jpeg_is_bit_equal_to_tensorflow_integer_accurate():
    tf = pytest.importorskip("tensorflow")
    smooth = np.asarray(Image.fromarray(RGB).resize((61, 47), Image.Resampling.BICUBIC))
    noisy = np.random.default_rng(1).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    for image in [smooth, noisy, smooth[..., 0]]:
        for subsampling in [0, 1, 2]:
            data = encoded(image, "JPEG", quality=85, subsampling=subsampling)
            expected = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()
            np.testing.assert_array_equal(decode(data), expected)


def test_real_files(real_data):
    images = real_data / "images"
    assert decode(images / "image.jpeg").shape == (67, 100, 3)
    grey = decode(images / "image_bw.jpeg")
    assert (grey == grey[..., :1]).all()
    slide = decode(images / "multiframe_camelyon_challenge_image.png")
    assert slide.shape == (700, 1152, 3)
    assert decode(images / "test.dcm").shape[2] == 3


# ----------------------------------------------------------------------------------------- refusals


def bomb(width, height):
    return png(width, height, 8, 0, b"")


def test_bombs_are_refused_from_the_header_alone():
    side = 13_400  # 179.6 million pixels
    with pytest.raises(UnreadableImage, match="13400x13400 = 179560000 pixels.*178956970"):
        decode(bomb(side, side))
    with pytest.raises(UnreadableImage, match="pixels"):
        decode(bomb(2**31 - 1, 2**31 - 1))


def test_no_noise_where_pil_only_warns(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 30 pixels: PIL.Image.open would warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(encoded(RGB)), RGB)
    monkeypatch.setattr(facts, "MAX_PIXELS", 29)
    for item in [encoded(RGB), Image.fromarray(RGB)]:
        with pytest.raises(UnreadableImage, match="5x6 = 30 pixels is more than the limit of 29"):
            decode(item)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (b"", "^image of 0 bytes: empty, 0 bytes$"),
        (b"P", "not an image file PIL can read"),
        (b"not an image at all " * 9, "^image of 180 bytes: not an image file PIL can read$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image file"),
        (encoded(RGB)[:-50], "corrupt|truncated"),
        (encoded(RGB)[:40], "corrupt|not an image"),
        (encoded(np.tile(RGB, (40, 40, 1)), "JPEG")[:3000], "truncated"),
        (encoded(RGB, "BMP")[:-9], "truncated"),
        (encoded(RGB).replace(b"IDAT\x78", b"IDAT\x79"), "corrupt"),
        (png(0, 4, 8, 0, b""), "no pixels|not an image"),
        (Image.new("RGB", (0, 3)), "PIL image .mode RGB, 0x3.: no pixels"),
        (np.zeros((0, 3, 3), np.uint8), r"uint8 array \(0, 3, 3\): no pixels"),
        (np.zeros((3, 3, 5), np.uint8), r"uint8 array \(3, 3, 5\): expected.*channels last"),
        (np.zeros((1, 3, 3, 3), np.uint8), "expected a path, bytes, an open file"),
        (np.zeros((3, 3), np.float32), "float32 array .*expected.*uint8/uint16"),
        (np.zeros((3, 3), np.int16), "int16 array"),
        (np.zeros((3, 3), np.uint32), "uint32 array"),
        (np.zeros((3, 3), bool), "bool array"),
        (None, "object of type NoneType: expected a path"),
        (3.5, "object of type float: expected a path"),
        ("bad\0name.png", "name.png"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_refusals_are_one_line_and_say_why(item, message):
    with pytest.raises(UnreadableImage, match=message) as caught:
        decode(item)
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_pipes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        decode(tmp_path / "gone.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"dangling\.png: no such file"):
        decode(str(tmp_path / "dangling.png"))
    with pytest.raises(UnreadableImage, match=f"{tmp_path}: a folder"):
        decode(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(UnreadableImage, match="pipe: not a file"):
        decode(tmp_path / "pipe")
    (tmp_path / "two\nlines.png").write_bytes(b"junk")
    with pytest.raises(UnreadableImage, match=r"two\\nlines.png': not an image"):
        decode(tmp_path / "two\nlines.png")
    (tmp_path / "good.png").write_bytes(encoded(RGB))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        decode(tmp_path / "good.png")
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_closed_pil_image_is_unreadable(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RGB))
    image = Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(UnreadableImage, match="PIL image"):
        decode(image)


def seeds():
    yield from (item for item, _ in MODES.values() if isinstance(item, bytes))
    big = np.tile(RGB, (8, 8, 1))
    for format in ["JPEG", "TIFF", "GIF", "ICO", "PCX", "SGI", "DDS", "AVIF"]:
        if format in Image.SAVE:
            yield encoded(big, format)
    yield encoded(big, "JPEG", progressive=True)
    for compression in ["tiff_deflate", "jpeg", "packbits"]:
        yield encoded(big, "TIFF", compression=compression)


def mutate(rng, data):
    data = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    if kind == 1:  # anywhere
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] = rng.integers(256)
    elif kind == 2:  # in the header
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(min(len(data), 120))] = rng.choice([0, 1, 2, 127, 128, 255])
    else:
        data = data[: rng.integers(4, 40)] + rng.bytes(rng.integers(300))
    return bytes(data)


@pytest.mark.torture
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about broken metadata
def test_fuzzed_files_decode_or_are_unreadable(torture):
    Image.init()
    rng, originals = np.random.default_rng(7), list(seeds())
    refused = 0
    for i in range(1000 * torture):
        data = mutate(rng, originals[i % len(originals)])
        try:
            out, facts = decode_with_facts(data)
            assert out.dtype == np.uint8 and out.shape[2] == 3 and 1 <= facts.orientation <= 8
        except UnreadableImage as error:
            refused += 1
            assert len(str(error)) < 400 and "\n" not in str(error)
    assert 0.3 < refused / (1000 * torture) < 0.95


class Tensor:
    """As far as torch's are used; importing torch takes seconds."""

    def __init__(self, pixels):
        self.numpy, self.shape, self.dtype = (lambda: pixels), pixels.shape, f"torch.{pixels.dtype}"
        self.cpu = self.detach = lambda: self

    def __array__(self, *_, **__):
        raise TypeError("is on a device, or has a gradient")


def test_images_in_other_containers():
    """Open files, {"bytes", "path"} of Hugging Face, and tensors, by themselves or mixed."""
    data = encoded(RGB)
    written = io.BytesIO()
    written.write(data)  # and stands at its end
    tensors = [jnp.asarray(RGB)]
    tensors += [Tensor(RGB), Tensor(RGB.transpose(2, 0, 1))]
    items = [{"bytes": data, "path": "gone.png"}, {"bytes": data}, written, *tensors]
    for item in items:
        np.testing.assert_array_equal(decode(item), RGB)
        assert load_images(item, 4).shape == (1, 4, 4, 3)
    assert load_images([data, *items, Image.fromarray(RGB)], 4).shape[0] == 2 + len(items)
    assert load_images(jnp.stack([RGB, RGB]), 4).shape[0] == 2
    for item, name in (
        ({"bytes": None, "path": None}, "mapping with the keys bytes, path"),
        ({"bytes": b"junk", "path": "a.png"}, "a.png"),
        (Tensor(np.zeros((3, 8, 8), np.float32)), "float32 tensor"),
        (3, "object of type int"),
    ):  # fmt: skip
        with pytest.raises(UnreadableImage, match=f"^image 2 of 3: {name}"):
            load_images([data, item, data], 4)


def test_a_mapping_may_name_a_part_of_a_file(tmp_path):
    (tmp_path / "shard").write_bytes(b"before" + encoded(RGB))
    image = load_images({"bytes": None, "path": f"{tmp_path}/shard#6:{len(encoded(RGB))}"}, 6)
    np.testing.assert_array_equal(image, load_images(RGB, 6))
