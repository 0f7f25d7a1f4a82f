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
import tifffile
from PIL import Image, ImageSequence, features

from medsiglip_jax.preprocess import sources, xla
from medsiglip_jax.preprocess.codec import pil_codec
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


def filtered(rows):
    """Rows of a 16-bit PNG, without a row filter."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)


FILTERED = filtered(RGB16)
LA16 = filtered(np.dstack([WIDE, WIDE[::-1]]))

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
    "LA16-png": (png(5, 6, 16, 4, LA16), WIDE3),
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


RAMP = np.linspace(0, 4095, 600).astype(np.uint16).reshape(20, 30)  # 12 bits in 16


def tiff(values, **tags):
    """A TIFF with tags of shorts that PIL does not write."""
    stream = io.BytesIO()
    extra = [(code, 3, 1, value, True) for code, value in tags.pop("codes", {}).items()]
    tifffile.imwrite(stream, values, metadata=None, extratags=extra, **tags)
    return stream.getvalue()


def tiff_of_12_bits(values):
    """Pixels packed to 12 bits each, two in three bytes (TIFF 6.0, section 8)."""
    pairs = values.reshape(-1, 2).astype(int)
    packed = bytes(b for a, c in pairs for b in (a >> 4, (a & 15) << 4 | c >> 8, c & 255))
    height, width = values.shape
    fields = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    fields[279] = len(packed)
    entries = b"".join(struct.pack("<HHII", code, 4, 1, n) for code, n in fields.items())
    directory = struct.pack("<H", len(fields)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory


def png16(values, *chunks, colour=0):
    return png(values.shape[1], values.shape[0], 16, colour, filtered(values), *chunks)


def shares(values, low, high):
    return np.rint(255 * np.clip((values.astype(float) - low) / (high - low), 0, 1))


STATED = {
    "png": (png16(RAMP, (b"sBIT", b"\x0c")), 0, 4095, "sBIT"),
    "png-14-bits": (png16(RAMP, (b"gAMA", bytes(4)), (b"sBIT", b"\x0e")), 0, 16383, "sBIT"),
    "png-alpha": (
        png16(np.dstack([RAMP, RAMP[::-1]]), (b"sBIT", b"\x0c\x10"), colour=4), 0, 4095, "sBIT",
    ),
    "tiff-12-bits": (tiff_of_12_bits(RAMP), 0, 4095, "BitsPerSample"),
    "tiff-max": (tiff(RAMP, codes={281: 4095}), 0, 4095, "MaxSampleValue"),
    "tiff-smax": (tiff(RAMP, codes={340: 0, 341: 5000}), 0, 5000, "SMaxSampleValue"),
    "tiff-smin": (tiff(RAMP + 100, codes={340: 100, 341: 4195}), 0, 4095, "SMaxSampleValue"),
    "tiff-big-endian": (tiff(RAMP, byteorder=">", codes={341: 4095}), 0, 4095, "SMaxSampleValue"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(STATED))
def test_16_bit_grey_is_scaled_by_what_the_file_says(name, tmp_path):
    data, low, high, where = STATED[name]
    pixels, facts = decode_with_facts(data)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], shares(RAMP, low, high))
    assert where in facts.seen and not facts.dark
    (tmp_path / "a").write_bytes(data)
    with Image.open(tmp_path / "a") as image:  # a caller may have opened it
        np.testing.assert_array_equal(decode(image), pixels)
        with Image.open(tmp_path / "a") as again:  # and go on to use it
            assert image.tobytes() == again.tobytes()
    full, facts = decode_with_facts(data, rules=Rules(grey16="full"))
    assert full.max() <= 16 and not facts.dark


def test_what_a_file_says_counts_only_where_no_value_contradicts_it():
    """As in a PNG whose 12 bits were scaled up to 16, which is what the standard asks for."""
    scaled = (RAMP << 4) | (RAMP >> 8)
    for data, values in [
        (png16(scaled, (b"sBIT", b"\x0c")), scaled),
        (tiff(RAMP, codes={341: 4000}), RAMP),
        (tiff(RAMP, codes={340: 1, 341: 4095}), RAMP),
        (tiff(WIDE, codes={281: 4000}), WIDE),
        (tiff(WIDE, codes={281: 50_000}), WIDE),  # a statistic, and no range
    ]:
        pixels, facts = decode_with_facts(data)
        np.testing.assert_array_equal(pixels[..., 1], np.floor(values / 257 + 0.5))
        assert facts.dark == (values is RAMP)


def test_16_bit_grey_that_does_not_say_its_range_is_dark_and_counted():
    least, most = np.quantile(RAMP, (0.005, 0.995), method="inverted_cdf")
    stretched = shares(RAMP, least, most)
    for item in [RAMP, RAMP[..., None], np.dstack([RAMP, RAMP]), Image.fromarray(RAMP),
                 png16(RAMP), tiff(RAMP), tiff(RAMP.astype(np.int32))]:  # fmt: skip
        pixels, facts = decode_with_facts(item)
        assert pixels.max() == 16 and facts.dark and "up to 4095" in facts.seen
        pixels, facts = decode_with_facts(item, rules=Rules(grey16="stretch"))
        np.testing.assert_array_equal(pixels[..., 0], stretched)
        assert not facts.dark and "percentiles 0.5 and 99.5" in facts.seen
        assert not decode_with_facts(item, rules=Rules(grey16="full"))[1].dark
    for item in [np.zeros((3, 3), np.uint16), WIDE, RAMP << 3]:
        assert not decode_with_facts(item)[1].dark
    flat = decode(np.full((3, 3), 700, np.uint16), Rules(grey16="stretch"))
    assert (flat == 0).all()  # there is nothing to stretch
    with pytest.raises(ValueError, match="grey16 is 'auto'; expected one of stretch, full"):
        Rules(grey16="auto")


def test_dark_colours_of_16_bits_are_counted():
    """PIL keeps their high bytes, so there is nothing to stretch."""
    colours = np.dstack([RAMP, RAMP[::-1], RAMP])
    for item in [colours, png16(colours, colour=2), tiff(colours, photometric="rgb")]:
        for choice in (None, "stretch", "full"):
            facts = decode_with_facts(item, rules=Rules(grey16=choice))[1]
            assert facts.dark == (choice != "full")
        assert not decode_with_facts(encoded(RGB >> 3))[1].dark  # 8 bits say what they are
    with pytest.warns(UserWarning, match=r"^2 of 3 images of 16 bits come out dark.*--grey16"):
        load_images([RAMP, colours, RGB], 8)
    for codec in (pil_codec("big_vision"), xla.codec("big_vision")):  # which training reads by
        with pytest.warns(UserWarning, match="^some images of 16 bits come out dark"):
            codec.decode(png16(RAMP))


def test_white_is_zero_in_tiff_of_16_bits_as_in_those_of_8():
    for values in (GREY, WIDE):
        plain, inverted = tiff(values), tiff(values, photometric="miniswhite")
        np.testing.assert_array_equal(decode(inverted), 255 - decode(plain))


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


@pytest.mark.parametrize("bigtiff", [False, True])
def test_reduced_versions_and_masks_are_no_pages_of_a_tiff(bigtiff, tmp_path):
    """Levels of a pyramid, thumbnails and labels with the bits of TIFF 6.0; but what says so and is
    no smaller than any other image is a page."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    small, other = np.ascontiguousarray(RGB[::2, ::2]), 255 - RGB
    mask = RGB[..., 0] > 127
    written = [(small, 1), (RGB, 0), (small, 1), (small, 9), (mask, 4), (other, 2)]
    written += [(np.flipud(other), 1)]
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder="<" if bigtiff else ">") as file:
        for pixels, subfile in written:
            kind = "minisblack" if pixels is mask else "rgb"
            file.write(pixels, photometric=kind, subfiletype=subfile)
    with tifffile.TiffFile(path) as file:
        want = [file.pages[number].asarray() for number in (1, 5, 6)]
    assert sources.frames(str(path)) == 3
    for number, pixels in enumerate(want):
        np.testing.assert_array_equal(sources.read(f"{path}#frame={number}")[0], pixels)
        np.testing.assert_array_equal(decode(path, Rules(frame=number)), pixels)


@pytest.mark.parametrize("said", ["Label", "Aperio v1\r\nmacro 50x40", "label_image|x = 1"])
def test_labels_of_slides_in_tiff_are_refused(said, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(encoded(RGB, "TIFF", description=said))
    with pytest.raises(UnreadableImage, match="(label|macro) of a slide.*--slide-labels"):
        sources.read(str(path))
    np.testing.assert_array_equal(decode(path, Rules(slide_labels=True)), RGB)
    for other in ("labels", "Label: left lung", "macrophages", "a macro 2x"):
        np.testing.assert_array_equal(decode(encoded(RGB, "TIFF", description=other)), RGB)


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


def test_tiff_comes_upright():
    """PIL applies the orientation of this format as it reads it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    pixels, facts = decode_with_facts(encoded(RGB, "TIFF", exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(RGB, -1))
    assert facts.orientation == 1


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
    with pytest.raises(UnreadableImage, match="shows the label of a slide"):
        decode(images / "test.dcm")
    assert decode(images / "test.dcm", Rules(slide_labels=True)).shape[2] == 3


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
    for item in [encoded(RGB), Image.fromarray(RGB)]:
        with pytest.raises(UnreadableImage, match="5x6 = 30 pixels is more than the limit of 29"):
            decode(item, Rules(max_pixels=29))
        with pytest.raises(UnreadableImage, match="5x6: a side is longer than the limit of 5 "):
            decode(item, Rules(max_side=5))


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


@pytest.mark.parametrize("size", [(70_000, 1), (1, 70_000)])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_sides_have_a_limit_before_anything_is_decoded(size, format):
    """A small file of one long row would be resized through rows of that length."""
    size = tuple(min(side, 65_501) for side in size)  # which a GIF can have
    Image.new("L", size).save(stream := io.BytesIO(), format)
    with pytest.raises(UnreadableImage, match="a side is longer than the limit of 65500"):
        decode(stream.getvalue())
