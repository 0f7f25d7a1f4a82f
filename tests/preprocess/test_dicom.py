"""DICOM files against pydicom, the standard's formulas and the container's rules; hostile files."""

import io
import json
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from dicom_files import (
    BIG,
    EXPLICIT,
    HTJ2K,
    IMPLICIT,
    J2K,
    JPEG,
    JPEG_LOSSLESS,
    JPEG_LS,
    item,
    lut,
    made,
    reason,
)
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import inputs
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.inference.manifest import MANIFEST
from medsiglip_jax.preprocess import codec as files
from medsiglip_jax.preprocess import xla
from medsiglip_jax.preprocess.decode import decode, decode_with_facts
from medsiglip_jax.preprocess.dicom import file, grey, official, pixels, sniff
from medsiglip_jax.preprocess.dicom import tags as dicom_tags
from medsiglip_jax.preprocess.dicom.rules import Rules, from_dict, parse
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import serving, value_range
from medsiglip_jax.preprocess.load import load_images

WHEEL = Path(pydicom.__file__).parent / "data"
FILES = sorted(p for p in WHEEL.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))
NAMES = [str(p.relative_to(WHEEL)) for p in FILES]
# Segmentations and radiotherapy doses, which have pixels and are no images.
NO_IMAGES = [name for name in NAMES if "liver" in name or ("rtdose" in name and ".dcm" in name)]
OFFICIAL = Rules("official")
RNG = np.random.default_rng(0)


# ---------------------------------------------------------------------------------- pydicom's files


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_of_pydicom_gives_pixels_or_a_reason(path):
    data = path.read_bytes()
    for rules in (Rules(), OFFICIAL):
        try:
            image, facts = decode_with_facts(path, rules=rules)
        except UnreadableImage as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert "cannot be made sense of" not in str(error), "a reason of no kind"
            continue
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert sniff.is_dicom(data[: sniff.START]) and facts.frames >= 1


def test_as_many_give_pixels_as_have_some_that_can_be_read():
    outcomes = {}
    for name, path in zip(NAMES, FILES, strict=True):
        try:
            decode(path)
            outcomes[name] = "pixels"
        except UnreadableImage as error:
            outcomes[name] = str(error).removeprefix(f"{path}: ")
    readable = sum(o == "pixels" for o in outcomes.values())
    refused = {
        name.rpartition("/")[2]: why for name, why in outcomes.items()
        if why != "pixels" and "without pixels" not in why and "PIL can read" not in why
        and name not in NO_IMAGES
    }  # fmt: skip
    assert len(NO_IMAGES) >= 8 and all("which is not an image" in outcomes[n] for n in NO_IMAGES)
    assert readable >= 94 and refused.keys() == {
        "JPEG2000-embedded-sequence-delimiter.dcm", "MR_truncated.dcm", "badVR.dcm",
        "meta_missing_tsyntax.dcm", "nested_priv_SQ.dcm",
    }  # fmt: skip
    assert "cut off" in refused["MR_truncated.dcm"]
    assert refused["badVR.dcm"] == "damaged DICOM: NumberOfFrames is malformed"
    for name, why in outcomes.items():  # nothing that pydicom reads is given up
        is_dicom = sniff.is_dicom((WHEEL / name).read_bytes()[: sniff.START])
        if why != "pixels" and is_dicom and name not in NO_IMAGES:
            assert pydicom_pixels(WHEEL / name) is None


def pydicom_pixels(path):
    """Dataset and pixels of the frame in the middle, as pydicom has them, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = pydicom.dcmread(path, force=True)
            array = found.pixel_array
        except Exception:
            return None
    count = int(found.get("NumberOfFrames") or 1)
    return found, array[count // 2] if count > 1 else array


def expected_grey(found, array, rules=Rules()):
    """By pydicom's functions; CT and files without a window by numpy's."""
    measured = np.asarray(apply_modality_lut(array, found), np.float64)
    if found.get("Modality") == "CT" and "RescaleSlope" in found:
        shares = [(measured - level + width / 2) / width for width, level in grey.CT_WINDOWS]
    elif "WindowCenter" in found or "VOILUTSequence" in found:
        measured = measured.astype(np.int64) if "VOILUTSequence" in found else measured
        windowed = apply_voi_lut(measured, found, rules.window)
        bits, signed = found.BitsStored, found.PixelRepresentation
        limits = np.array([0, 2**bits - 1]) - (2 ** (bits - 1) if signed else 0)
        if "VOILUTSequence" in found:
            bits = found.VOILUTSequence[rules.window].LUTDescriptor[2]
            limits = np.array([0, 2**bits - 1])
        else:
            limits = limits * float(found.get("RescaleSlope", 1))
            limits += float(found.get("RescaleIntercept", 0))
        shares = [(windowed - limits[0]) / (limits[1] - limits[0])]
    elif found.BitsStored <= 8:
        shares = [measured / (2**found.BitsStored - 1)]
    else:
        padding = array == found.get("PixelPaddingValue", 10**9)
        low, high = np.percentile(measured[~padding], (0.5, 99.5), method="inverted_cdf")
        shares = [(measured - low) / (high - low)]
    levels = np.rint(255 * np.clip(np.stack(shares, -1), 0, 1))
    levels = 255 - levels if found.PhotometricInterpretation == "MONOCHROME1" else levels
    levels[array == found.get("PixelPaddingValue", 10**9)] = 0
    return np.broadcast_to(levels, (*array.shape, 3))


def expected_colour(found, array):
    if found.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, found)
    bits = array.dtype.itemsize * 8
    return np.rint(array * (255 / (2**bits - 1)))


READ = [(n, p) for n, p in zip(NAMES, FILES, strict=True) if pydicom_pixels(p) is not None]


@pytest.mark.parametrize("path", [p for _, p in READ], ids=[n for n, _ in READ])
def test_pixels_are_those_of_pydicom(path):
    found, array = pydicom_pixels(path)
    opened = file.File(path.read_bytes())
    head = opened.header(opened.frames // 2)
    if head.grey:
        np.testing.assert_array_equal(pixels._stored_values(opened, head, Rules())[0], array)
    expected = (expected_grey if head.grey else expected_colour)(found, array)
    np.testing.assert_array_equal(pixels._render(opened, head, Rules())[0], expected)
    if str(path.relative_to(WHEEL)) not in NO_IMAGES:
        np.testing.assert_array_equal(decode(path), expected)


def test_jpeg_in_dicom_has_the_pixels_that_it_has_as_a_file():
    path = WHEEL / "test_files/examples_ybr_color.dcm"
    found = pydicom.dcmread(path)
    frame = list(generate_frames(found.PixelData, number_of_frames=30))[15]
    np.testing.assert_array_equal(decode(path), decode(frame))


# ------------------------------------------------------------------------------- the rules "dicom"


def test_ct_phantom_in_three_windows():
    """(x + 1225) / 2250, (x + 135) / 350 and x / 80 of 255, by hand."""
    hu = [-2000, -1225, -100, 0, 40, 80, 215, 1025, 3000]
    expected = [
        (0, 0, 0), (0, 0, 0), (128, 26, 0), (139, 98, 0), (143, 128, 128), (148, 157, 255),
        (163, 255, 255), (255, 255, 255), (255, 255, 255),
    ]  # fmt: skip
    stored = np.array([hu], np.int16) + 1024
    tags = {"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "-1024"}
    image = decode(made(stored, WindowCenter="40", WindowWidth="400", **tags))
    np.testing.assert_array_equal(image[0], expected)
    inverse = decode(made(stored, PhotometricInterpretation="MONOCHROME1", **tags))
    np.testing.assert_array_equal(inverse, 255 - image)
    one = decode(made(stored, **tags), Rules(ct_window=(350, 40)))
    np.testing.assert_array_equal(one, image[..., 1:2].repeat(3, 2))
    # A slope of 2, unsigned: the same tissue.
    stored = ((np.array([hu[1:-1]]) + 1225) / 2).astype(np.uint16) * 1
    again = decode(made(stored, Modality="CT", RescaleSlope="2", RescaleIntercept="-1225"))
    assert np.abs(again[0].astype(int) - expected[1:-1]).max() <= 4  # halves are lost: 1 HU, 255/80


def test_ct_that_is_not_in_hounsfield_units_is_as_any_other():
    stored = RNG.integers(0, 4096, (16, 16)).astype(np.uint16)
    tags = {"WindowCenter": "2000", "WindowWidth": "900", "BitsStored": 12}
    np.testing.assert_array_equal(
        decode(made(stored, Modality="CT", **tags)), decode(made(stored, Modality="MR", **tags))
    )


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": "2.5", "RescaleIntercept": "-300"}])
def test_windows_of_every_function(function, kind, rescale):
    stored = RNG.integers(0, 2000, (40, 30)).astype(kind) - (1000 if kind is np.int16 else 0)
    for n, photometric in enumerate(["MONOCHROME2", "MONOCHROME1"]):
        data = made(
            stored, Modality="MR", VOILUTFunction=function, WindowCenter=["600", "100.5"],
            WindowWidth=["1600", "333"], PhotometricInterpretation=photometric, **rescale,
        )  # fmt: skip
        rules = Rules(window=n)
        expected = expected_grey(pydicom.dcmread(io.BytesIO(data)), stored, rules)
        np.testing.assert_array_equal(decode(data, rules), expected)
    assert reason(data, Rules(window=2)) == "DICOM with 2 windows; number 2 is asked for"


def test_lookup_tables():
    stored = np.arange(0, 512, dtype=np.uint16).reshape(16, 32)
    curve = (255 * (np.arange(300) / 299) ** 2).astype(int)
    data = made(stored, VOILUTSequence=[lut(100, curve)], WindowCenter="1", WindowWidth="2")
    # By hand: pydicom 3.0 takes entries of 8-bit tables modulo 256.
    expected = curve[np.clip(stored.astype(int) - 100, 0, 299)]
    np.testing.assert_array_equal(decode(data)[..., 0], expected)
    wide = lut(0, [x * x // 4 for x in range(512)], 16)
    falling = lut(5, [65535 - 100 * x for x in range(600)], 16)
    for syntax in (EXPLICIT, IMPLICIT, BIG):
        data = made(stored, syntax, ModalityLUTSequence=[wide], VOILUTSequence=[falling, wide])
        found = pydicom.dcmread(io.BytesIO(data))
        for n in range(2):
            np.testing.assert_array_equal(
                decode(data, Rules(window=n)), expected_grey(found, stored, Rules(window=n))
            )


def test_windows_and_rescale_of_a_frame_of_a_multi_frame_file():
    stored = RNG.integers(0, 4096, (3, 8, 9)).astype(np.uint16)
    frames_of = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope="2", RescaleIntercept=str(n))],
            FrameVOILUTSequence=[item(WindowCenter=str(1000 * n + 500), WindowWidth="700")],
        )
        for n in range(3)
    ]
    for modality in ("MR", "CT"):
        data = made(
            stored, Modality=modality, NumberOfFrames="3",
            SharedFunctionalGroupsSequence=[item()], PerFrameFunctionalGroupsSequence=frames_of,
        )  # fmt: skip
        for n in range(3):
            single = made(
                stored[n], Modality=modality, RescaleSlope="2", RescaleIntercept=str(n),
                WindowCenter=str(1000 * n + 500), WindowWidth="700",
            )  # fmt: skip
            np.testing.assert_array_equal(decode(data, Rules(frame=n)), decode(single))
        np.testing.assert_array_equal(decode(data), decode(data, Rules(frame=1)))
        assert decode_with_facts(data)[1].frames == 3
        assert reason(data, Rules(frame=3)) == "DICOM with 3 frames; number 3 is asked for"


def test_bits_that_are_not_in_use_do_not_count():
    stored = RNG.integers(0, 4096, (9, 9)).astype(np.uint16)
    clean = decode(made(stored, BitsStored=12))
    overlay = stored | (RNG.integers(0, 16, (9, 9)) << 12).astype(np.uint16)
    np.testing.assert_array_equal(decode(made(overlay, BitsStored=12)), clean)
    shifted = (stored << 4) | RNG.integers(0, 16, (9, 9)).astype(np.uint16)
    np.testing.assert_array_equal(decode(made(shifted, BitsStored=12, HighBit=15)), clean)
    signed = (stored.astype(np.int16) - 2048) & 0xFFF  # the sign is in bit 11
    tags = {"WindowCenter": "0", "WindowWidth": "3000"}
    np.testing.assert_array_equal(
        decode(made(signed.astype(np.int16), BitsStored=12, **tags)),
        decode(made(stored.astype(np.int16) - 2048, **tags)),
    )


def test_padding_is_black_and_no_part_of_the_range():
    stored = RNG.integers(1000, 2000, (20, 20)).astype(np.int16)
    alone = decode(made(stored))
    stored[:5] = -2000
    padded = decode(made(stored, PixelPaddingValue=-2000))
    np.testing.assert_array_equal(decode(made(stored, IMPLICIT, PixelPaddingValue=-2000)), padded)
    limits = {"PixelPaddingValue": -2500, "PixelPaddingRangeLimit": -1500}
    np.testing.assert_array_equal(decode(made(stored, **limits)), padded)
    assert not padded[:5].any() and padded[5:].max() == 255
    whole = decode(made(stored))
    assert (
        np.abs(padded[5:].astype(int) - alone[5:]).max() < 10 < np.abs(whole[5:] - padded[5:]).max()
    )
    inverse = decode(made(stored, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1"))
    assert not inverse[:5].any()
    np.testing.assert_array_equal(inverse[5:], 255 - padded[5:])


def test_eight_bits_without_a_window_are_as_they_are():
    stored = RNG.integers(0, 200, (7, 6)).astype(np.uint8)
    for modality in ("US", "XC", "OP", "CT", "CR"):
        np.testing.assert_array_equal(decode(made(stored, Modality=modality))[..., 1], stored)
    inverse = decode(made(stored, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverse[..., 1], 255 - stored)


def test_constant_and_tiny_images():
    for value in (0, 7, 65535):
        assert decode(made(np.full((1, 1), value, np.uint16))).shape == (1, 1, 3)
        assert len(np.unique(decode(made(np.full((5, 4), value, np.uint16))))) == 1


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.uint32, np.int32])
def test_native_syntaxes(syntax, kind):
    stored = RNG.integers(0, 100, (5, 7)).astype(kind)
    tags = {"WindowCenter": "40", "WindowWidth": "50"}
    expected = decode(made(stored.astype(np.uint16), **tags))
    np.testing.assert_array_equal(decode(made(stored, syntax, **tags)), expected)


@pytest.mark.parametrize(("syntax", "encode"), [
    (JPEG_LOSSLESS, lambda x: imagecodecs.jpeg8_encode(
        x, lossless=True, predictor=1, bitspersample=x.dtype.itemsize * 8)),
    (JPEG_LS, imagecodecs.jpegls_encode),
    (J2K, lambda x: imagecodecs.jpeg2k_encode(x, codecformat="j2k", reversible=True, level=0)),
    (HTJ2K, lambda x: imagecodecs.htj2k_encode(x, reversible=True)),
])  # fmt: skip
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_lossless_compression_changes_nothing(syntax, encode, kind):
    stored = (RNG.random((40, 30)) * np.iinfo(kind).max).astype(kind)
    tags = {"WindowCenter": "900", "WindowWidth": "20000"}
    data = made(stored, syntax, [bytes(encode(stored))], **tags)
    np.testing.assert_array_equal(decode(data), decode(made(stored, **tags)))
    colour = RNG.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    data = made(colour, syntax, [bytes(encode(colour))])
    if syntax != JPEG_LOSSLESS:  # which libjpeg takes for YCbCr, as the file does not
        np.testing.assert_array_equal(decode(data), colour)
    found = np.concatenate([colour, colour[::-1]]).reshape(2, 40, 30, 3)
    if syntax == JPEG_LS:
        streams = [bytes(encode(x)) for x in found]
        data = made(found, syntax, streams, NumberOfFrames="2")
        for n in range(2):
            np.testing.assert_array_equal(decode(data, Rules(frame=n)), found[n])


def test_colours_of_every_kind():
    rgb = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode(made(rgb)), rgb)
    planar = np.ascontiguousarray(np.moveaxis(rgb, -1, 0)).reshape(rgb.shape)
    np.testing.assert_array_equal(decode(made(planar, PlanarConfiguration=1)), rgb)
    np.testing.assert_array_equal(decode(made(rgb.astype(np.uint16) * 257)), rgb)
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    full = decode(made(ybr, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_allclose(
        full.astype(int), np.asarray(Image.fromarray(ybr, "YCbCr").convert("RGB")), atol=1
    )
    # Of BT.601: black is (16, 128, 128), white (235, 128, 128), red (81, 90, 240).
    partial = np.array([[[16, 128, 128], [235, 128, 128], [81, 90, 240]]], np.uint8).repeat(2, 0)
    out = decode(made(partial, PhotometricInterpretation="YBR_PARTIAL_420"))
    np.testing.assert_allclose(out[0], [[0, 0, 0], [255, 255, 255], [255, 0, 0]], atol=1)
    # Two pixels share their colour: Y Y Cb Cr.
    shared = np.array([[81, 81, 90, 240, 16, 235, 128, 128]], np.uint8).repeat(2, 0)
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "Columns": 4}
    out = decode(made(shared, PhotometricInterpretation="YBR_PARTIAL_422", **tags))
    expected = [[255, 0, 0], [255, 0, 0], [0, 0, 0], [255, 255, 255]]
    np.testing.assert_allclose(out[0], expected, atol=1)


def test_palette_of_8_and_16_bits():
    colours = RNG.integers(0, 256, (16, 3)).astype(np.uint16)
    stored = RNG.integers(0, 16, (5, 6)).astype(np.uint8)
    for scale, syntax, order in ((1, EXPLICIT, "<"), (257, EXPLICIT, "<"), (257, BIG, ">")):
        tags = {}
        for n, name in enumerate(("Red", "Green", "Blue")):
            tags[f"{name}PaletteColorLookupTableDescriptor"] = [16, 0, 16]
            table = (colours[:, n] * scale).astype(f"{order}u2")
            tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
        data = made(stored, syntax, PhotometricInterpretation="PALETTE COLOR", **tags)
        np.testing.assert_array_equal(decode(data), colours[stored])


def test_headless_files_and_other_names(tmp_path):
    stored = RNG.integers(0, 256, (5, 6)).astype(np.uint8)
    data = made(stored)
    contents = [data, data[132:], data[sniff.transfer_syntax(data)[1] :]]
    implicit = made(stored, IMPLICIT)
    contents.append(implicit[sniff.transfer_syntax(implicit)[1] :])
    for content in contents:
        (tmp_path / "picture.png").write_bytes(content)
        np.testing.assert_array_equal(decode(tmp_path / "picture.png")[..., 0], stored)
    for junk in (
        b"",
        b"DICM",
        b"\x08\x00",
        b"\x08\x00\x05\x00",
        bytes(200),
        b"\x08\x00\x05\x00CX9",
    ):
        assert not sniff.is_dicom(junk)


# ---------------------------------------------------------------------------- the rules "official"


def test_official_is_the_container_to_the_integer_on_the_eye_photograph(real_data):
    image = decode(real_data / "images" / "encapsulated_cxr.dcm", OFFICIAL)
    assert image.shape == (1024, 1024, 3)
    patch = value_range(serving(np.ascontiguousarray(image[:448, :448]), 448))
    means = patch.astype(np.float64).mean((0, 1))
    assert [f"{x:.4f}" for x in means] == ["-0.5749"] * 3


RAMP = (np.arange(9).reshape(3, 3) * 500 - 2000).astype(np.int16)


def ct(**tags):
    return made(RAMP, Modality="CT", BitsStored=12, **tags)


def in_levels(low, high):
    """RAMP in [low, high] as 0..65535, by hand: the ends are integers, halves go to even."""
    shares = [(min(max(x, low), high) - low) / (high - low) for x in RAMP.ravel().tolist()]
    return np.array([round(65535 * share) for share in shares]).reshape(3, 3)


def test_official_window_of_ct():
    tagged = {"WindowCenter": "50", "WindowWidth": "701"}
    for tags, rules, low, high in [
        ({}, OFFICIAL, -1150, 1350),
        (tagged, OFFICIAL, -300, 400),  # of an odd width one is lost
        (tagged, Rules("official", ct_window=(2001, 0)), -1000, 1000),
    ]:
        levels = in_levels(low, high)
        for photometric in ("MONOCHROME2", "MONOCHROME1"):
            data = ct(PhotometricInterpretation=photometric, **tags)
            expected = official._to_8_bits(levels.astype(np.uint16))
            np.testing.assert_array_equal(decode(data, rules), expected)
            levels = 65535 - levels
    # By hand, to 8 bits: (-1000 + 1150) / 2500 = 0.06 -> 3932 -> 15.3 -> 15, and so on.
    image = decode(ct(), OFFICIAL)[..., 0].ravel().tolist()
    assert image == [0, 0, 15, 66, 117, 168, 219, 255, 255]
    with_rescale = ct(RescaleSlope="1", RescaleIntercept="500")
    assert decode(with_rescale, OFFICIAL)[0, 1, 0] == 15  # -1500 + 500
    message = "official rules: CT with only one of slope and intercept"
    assert reason(ct(RescaleSlope="1"), OFFICIAL) == message
    several = ct(WindowCenter=["1", "2"], WindowWidth=["3", "4"])
    assert reason(several, OFFICIAL).startswith("official rules: 2 windows in one file")


def test_official_stretch_and_shift():
    for values, kind, expected in [
        ([3, 4, 5], np.uint16, [0, 32767, 65535]),
        ([5, 6, 7, 10], np.uint16, [0, 13107, 26214, 65535]),
        ([9, 9], np.uint16, [65535, 65535]),
    ]:
        assert official.stretched(np.array(values, kind)).tolist() == expected
    assert official.unsigned(np.array([3, 4, 5000], np.int16)).tolist() == [0, 1, 4997]
    assert official.unsigned(np.array([-128, 6, 7, 127], np.int8)).tolist() == [0, 134, 135, 255]


def test_official_radiographs():
    stored = np.array([[0, 100, 4095]], np.uint16)
    tags = {"Modality": "DX", "BitsStored": 12}
    rescaled = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    wrapped = np.array([64512, 64612, 3071])  # below 0 they wrap
    stretched = ((wrapped - 3071) / (64612 - 3071) * 65535).astype(np.uint16)
    image = decode(made(stored, **tags, **rescaled), OFFICIAL)
    np.testing.assert_array_equal(image, official._to_8_bits(stretched[None]))
    plain = decode(made(stored, **tags, PhotometricInterpretation="MONOCHROME1"), OFFICIAL)
    expected = official._to_8_bits(65535 - np.array([[0, 1600, 65535]], np.uint16))
    np.testing.assert_array_equal(plain, expected)
    windowed = decode(made(stored, **tags, WindowCenter="200", WindowWidth="400"), OFFICIAL)
    np.testing.assert_array_equal(windowed[0, :, 0], [0, 63, 255])  # 100 / 400 -> 16384 -> 63.75
    inverted = made(np.uint8([[3, 9]]), Modality="CR", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(decode(inverted, OFFICIAL)[0, :, 0], [252, 246])


def test_official_takes_other_modalities_as_they_are():
    stored = np.array([[0, 4095]], np.uint16)
    for modality in ("GM", "SM", "XC"):
        data = made(stored, Modality=modality, BitsStored=12, WindowCenter="1", WindowWidth="2")
        np.testing.assert_array_equal(decode(data, OFFICIAL)[0, :, 0], [0, 15])  # 15.93
    rgb = RNG.integers(0, 256, (3, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode(made(rgb, Modality="XC"), OFFICIAL), rgb)


def test_official_8_bits_are_those_of_transformers():
    transforms = pytest.importorskip("transformers.image_transforms")
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    shares = (every.astype(np.float32) / 65535)[..., None].repeat(3, 2)
    expected = np.asarray(transforms.to_pil_image(shares, input_data_format="channels_last"))
    np.testing.assert_array_equal(official._to_8_bits(every), expected)


def test_official_refuses_by_name():
    grey8 = np.zeros((4, 4), np.uint8)
    for modality in ("MR", "US", "MG", "OP", "OPT", "NM", "PT", "XA", "RF", "ES"):
        why = reason(made(grey8, Modality=modality), OFFICIAL)
        assert why.startswith(f"official rules: modality {modality} is not served")
    assert "modality of another name" in reason(made(grey8, Modality="SECRET"), OFFICIAL)
    assert "transfer syntax" in reason(made(grey8, BIG, Modality="CR"), OFFICIAL)
    two = made(np.zeros((2, 4, 4), np.uint8), Modality="CR", NumberOfFrames="2")
    assert "2 frames" in reason(two, OFFICIAL)
    ybr = made(np.zeros((4, 4, 3), np.uint8), Modality="XC", PhotometricInterpretation="YBR_FULL")
    assert "photometric" in reason(ybr, OFFICIAL)


# ------------------------------------------------------------------------------ options and callers


def test_rules_are_checked_and_survive_json():
    for rules in (Rules(), Rules("official", (350, 40.5), 2, 7)):
        assert from_dict(json.loads(json.dumps(rules.to_dict()))) == rules
    assert from_dict(None) == Rules()
    assert parse("official", "1500/-600", 2, "3") == Rules("official", (1500, -600), 2, 3)
    for wrong in ({"name": "x"}, {"ct_window": (0, 1)}, {"window": -1}, {"frame": "last"},
                  {"frame": -1}, {"ct_window": (350, np.nan)}, {"ct_window": (np.inf, 40)},
                  {"ct_window": (350, -np.inf)}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            Rules(**wrong)
    for wrong in ("350", "a/b", "1/2/3", "0/4", "350/nan", "inf/40"):
        with pytest.raises(ValueError, match="expected"):
            parse("dicom", wrong, 0, "middle")


@pytest.fixture
def study(tmp_path):
    """Three files, of which one has no suffix; one says that annotation is burned in."""
    folder = tmp_path / "study"
    (folder / "DICOM").mkdir(parents=True)
    hu = RNG.integers(0, 3000, (60, 50)).astype(np.int16)
    ct = made(hu, Modality="CT", RescaleSlope="1", RescaleIntercept="-1024")
    (folder / "ct.dcm").write_bytes(ct)
    cine = RNG.integers(0, 256, (5, 40, 70, 3)).astype(np.uint8)
    us = made(cine, Modality="US", NumberOfFrames="5", BurnedInAnnotation="YES")
    (folder / "DICOM" / "IM000001").write_bytes(us)
    mr = made(RNG.integers(0, 900, (56, 56)).astype(np.uint16), Modality="MR")
    (folder / "DICOM" / "1.2.840.99.7").write_bytes(mr)
    (folder / "DICOMDIR").write_bytes(ct)
    (folder / "README").write_text("of no format")
    return folder


def test_folders_are_searched_by_content(study):
    rows = inputs.rows([study])
    assert [row.id for row in rows] == ["ct.dcm", "DICOM/1.2.840.99.7", "DICOM/IM000001"]
    assert rows.skipped == {"no suffix": 2}


@pytest.mark.parametrize("preprocess", ["big_vision", "big_vision_pad", "serving"])
def test_every_way_to_load_gives_the_same_pixels(study, preprocess):
    rules = Rules(ct_window=(350, 40), frame=1)
    paths = [row.source for row in inputs.rows([study])]
    with pytest.warns(UserWarning, match="1 of 3 images are DICOM files that say"):
        expected = load_images(paths, 28, preprocess, dicom=rules)
    for codec in (files.pil_codec(preprocess, rules), xla.codec(preprocess, rules)):
        for path, want in zip(paths, expected, strict=True):
            np.testing.assert_array_equal(files.load_image(path, 28, codec), want)
    with pytest.warns(UserWarning, match="1 of 3"):
        other = load_images(paths, 28, preprocess)
    assert [np.array_equal(*pair) for pair in zip(expected, other, strict=True)] == [
        False, True, False,
    ]  # fmt: skip


def test_tensorflow_reads_dicom_alike(study):
    data = pytest.importorskip("medsiglip_jax.data.tf")
    rules = Rules(ct_window=(350, 40))
    for preprocess in ("big_vision", "serving"):
        pair = data.tf_codec(preprocess, rules), files.pil_codec(preprocess, rules)
        for row in inputs.rows([study]):
            images = [files.load_image(row.source, 28, codec) for codec in pair]
            np.testing.assert_array_equal(*images)


def test_a_run_records_its_rules_and_no_other_goes_on_with_it(study, checkpoint, tmp_path):
    model = medsiglip_jax.load(checkpoint)
    rules, out = Rules(ct_window=(350, 40), frame=4), tmp_path / "out"
    rows = inputs.rows([study])
    found = embed(model, rows, out, EmbedOptions(dicom=rules))
    assert (found.burned_in, found.multi_frame, found.errors) == (1, 1, 0)
    assert from_dict(json.loads((out / MANIFEST).read_text())["dicom"]) == rules
    assert embed(model, rows, out, EmbedOptions(dicom=rules)) == found
    with pytest.raises(FileExistsError, match="dicom differ"):
        embed(model, rows, out, EmbedOptions())
    table = pq.read_table(out / "part-00000.parquet").to_pylist()
    with pytest.warns(UserWarning, match="annotation"):
        images = model.processor.images([row["source"] for row in table], dicom=rules)
    want = np.asarray(model.encode_image(images))
    assert_close([row["embedding"] for row in table], want, model_terms(model.config))


def test_without_pydicom_one_line_says_what_to_install(
    study, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for reader in ("pixels", "file"):
        monkeypatch.delitem(sys.modules, f"medsiglip_jax.preprocess.dicom.{reader}")
    argv = ["embed", "--model", checkpoint, "--output", tmp_path / "out", study]
    assert cli.main([str(a) for a in argv]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "pydicom" in line]
    want = "reading DICOM needs pydicom: pip install 'medsiglip-jax[dicom]'"
    assert lines == [f"medsiglip-jax embed: {want}"]


def test_pydicom_is_imported_for_dicom_only(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    code = (
        "import sys\nfrom medsiglip_jax.preprocess.decode import decode\n"
        f"decode({str(tmp_path / 'a.png')!r})\n"
        "assert not {'pydicom', 'imagecodecs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------ hostile files


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    small = np.zeros((4, 4), np.uint8)
    huge = made(small, Rows=60000, Columns=60000)
    assert "60000x60000 = 3600000000 pixels is more than the limit" in reason(huge)
    assert "cut off" in reason(made(small, Rows=400, Columns=400))
    assert "no pixels" in reason(made(small, Rows=0))
    # A stream that claims more than the file does.
    stream = bytes(imagecodecs.jpeg8_encode(np.zeros((300, 200), np.uint8)))
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", None)  # never called
    why = reason(made(small, JPEG, [stream]))
    assert why.startswith("DICOM whose compressed frame has 300 rows, 200 columns")
    assert "is not what it should be" in reason(made(small, JPEG, [b"\xff\xd8" + bytes(40)]))
    assert "transfer syntax" in reason(made(small, "1.2.840.10008.1.2.4.102", [bytes(40)]))
    assert "4x4 = 16 pixels" in reason(made(small), Rules(max_pixels=15))


def test_truncated_streams_are_not_filled_with_grey():
    stored = RNG.integers(0, 256, (64, 64)).astype(np.uint8)
    for syntax, encode in [
        (JPEG, imagecodecs.jpeg8_encode), (JPEG_LS, imagecodecs.jpegls_encode),
        (J2K, lambda x: imagecodecs.jpeg2k_encode(x, codecformat="j2k")),
    ]:  # fmt: skip
        stream = bytes(encode(stored))
        assert decode(made(stored, syntax, [stream])).shape == (64, 64, 3)
        assert "cut off" in reason(made(stored, syntax, [stream[: len(stream) // 2]]))
    whole = made(stored)
    for length in range(140, len(whole), 97):
        with pytest.raises(UnreadableImage):
            decode(whole[:length])


@pytest.mark.parametrize("used", [8, 10, 12])
def test_a_voi_lut_said_to_be_of_more_bits_than_it_has(used):
    """By the standard such a file is nearly black; viewers go by the greatest entry."""
    stored = RNG.integers(0, 1 << used, (40, 50)).astype(np.uint16)
    entries = range(1 << used)
    right = decode(made(stored, VOILUTSequence=[lut(0, entries, used)]))
    assert right.min() == 0 and right.max() >= 254
    wrong = made(stored, VOILUTSequence=[lut(0, entries, 16)])
    np.testing.assert_array_equal(decode(wrong), right)
    assert f"entries of {used} bits, said to be of 16" in decode_with_facts(wrong)[1].seen
    dark = lut(0, [x * 4 for x in range(1 << 12)], 16)  # a table that uses 14 of its 16 bits
    assert "said to be" not in decode_with_facts(made(stored, VOILUTSequence=[dark]))[1].seen


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_padding_given_as_unsigned_beside_signed_pixels(dtype):
    bits = np.dtype(dtype).itemsize * 8
    stored = RNG.integers(-50, 100, (40, 50)).astype(dtype)
    stored[:10], stored[10:12] = -120, -118
    for limit in (None, -118):

        def padded(value, limit=limit):
            found = {"PixelPaddingValue": value}
            return found | ({} if limit is None else {"PixelPaddingRangeLimit": limit})

        right = made(stored, **padded(-120))
        start = right.index(b"\x28\x00\x20\x01SS")
        unsigned = (2**bits - 120).to_bytes(2, "little")
        wrong = right[: start + 4] + b"US" + right[start + 6 : start + 8] + unsigned
        wrong += right[start + 10 :]
        np.testing.assert_array_equal(decode(wrong), decode(right))
        assert decode_with_facts(wrong)[1].seen == decode_with_facts(right)[1].seen
    assert not np.array_equal(decode(right), decode(made(stored)))


STREAMS = [
    (JPEG, lambda x: imagecodecs.jpeg8_encode(x)),
    (JPEG_LS, lambda x: imagecodecs.jpegls_encode(x)),
    (JPEG_LOSSLESS, lambda x: imagecodecs.jpeg8_encode(x, lossless=True)),
    (J2K, lambda x: imagecodecs.jpeg2k_encode(x, codecformat="j2k")),
    (J2K, lambda x: imagecodecs.jpeg2k_encode(x, codecformat="jp2")),
]  # fmt: skip


@pytest.mark.parametrize("syntax, encode", STREAMS)
@pytest.mark.parametrize("rubbish", [
    b"\xd3\x0c\x99\xfa\x51\x00", b"\x01", bytes(300) + b"\x07\x00", b"\xff\xd8" + b"ab" * 4000,
], ids=["few", "odd", "after padding", "many"])  # fmt: skip
def test_bytes_after_the_end_of_a_stream_are_ignored(syntax, encode, rubbish):
    """Some writers leave them; pydicom, dcmtk and gdcm read such files."""
    stored = RNG.integers(0, 256, (64, 64)).astype(np.uint8)
    stream = bytes(encode(stored))
    whole = decode(made(stored, syntax, [stream]))
    np.testing.assert_array_equal(decode(made(stored, syntax, [stream + rubbish])), whole)
    assert "cut off" in reason(made(stored, syntax, [stream[:-40] + rubbish]))


def test_the_end_of_a_thumbnail_is_not_that_of_the_image():
    stored = RNG.integers(0, 256, (64, 64)).astype(np.uint8)
    small, stream = (bytes(imagecodecs.jpeg8_encode(x)) for x in (stored[:8, :8], stored))
    segment = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    stream = stream[:2] + segment + stream[2:]
    assert decode(made(stored, JPEG, [stream])).shape == (64, 64, 3)
    assert "cut off" in reason(made(stored, JPEG, [stream[: len(stream) // 2]]))


@pytest.mark.parametrize("marker", [True, False], ids=["Adobe's marker", "none"])
@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, "1.2.840.10008.1.2.4.57"])
def test_lossless_jpeg_of_ycbcr(syntax, marker):
    """libjpeg converts no colours of a lossless stream: what it gives is what the file says."""
    ybr = RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    stream = bytes(imagecodecs.jpeg8_encode(ybr, lossless=True, colorspace="RGB"))
    if not marker:
        at = stream.find(b"\xff\xeeAdobe"[:2])
        stream = stream[:at] + stream[at + 16 :] if at > 0 else stream
    for photometric in ("YBR_FULL", "RGB"):
        tags = {"PhotometricInterpretation": photometric}
        want = decode(made(ybr, **tags))
        np.testing.assert_array_equal(decode(made(ybr, syntax, [stream], **tags)), want)


@pytest.mark.parametrize("first", [
    "0200 0300", "0200 1000", "0800 1600", "0800 2000", "0800 6000", "1000 1000", "1000 2000",
])  # fmt: skip
def test_files_without_a_preamble_begin_with_any_of_the_usual_elements(first):
    stored = RNG.integers(0, 256, (16, 20)).astype(np.uint8)
    tags = dict(StudyDate="20200101", PatientName="A^B", PatientID="1", SOPInstanceUID="1.2")
    whole = made(stored, **tags)
    cut = whole[whole.index(bytes.fromhex(first)) :]
    assert sniff.is_dicom(cut[: sniff.START])
    np.testing.assert_array_equal(decode(cut), decode(whole))


def test_deflated_files_and_bombs(monkeypatch):
    deflated = (WHEEL / "test_files/image_dfl.dcm").read_bytes()
    assert decode(deflated).shape == (512, 512, 3)
    monkeypatch.setattr(dicom_tags, "MAX_INFLATED", 1000)
    assert "inflates to more than the limit of 1000 bytes" in reason(deflated)
    monkeypatch.setattr(dicom_tags, "MAX_INFLATED", 1 << 20)
    start = sniff.transfer_syntax(deflated)[1]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(50 << 20)) + packer.flush()
    assert "inflates to more than" in reason(deflated[:start] + bomb)
    assert "deflated" in reason(deflated[:start] + b"\xff" * 50)


def test_more_elements_than_the_limit_are_refused(monkeypatch):
    stored = np.zeros((4, 4), np.uint8)
    plain, tables = made(stored), made(stored, VOILUTSequence=[lut(0, range(256))] * 60)
    items = b"\x28\x00\x10\x30SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 900
    start = plain.index(b"\xe0\x7f\x10\x00")
    flood = plain[:start] + items + b"\xfe\xff\xdd\xe0\0\0\0\0" + plain[start:]
    for data in (plain, tables, flood):  # empty items are left out
        assert decode(data).shape == (4, 4, 3)
    monkeypatch.setattr(dicom_tags, "MAX_READS", 900)
    monkeypatch.setattr(dicom_tags, "MAX_ITEMS", 59)
    assert decode(plain).shape == (4, 4, 3)
    assert reason(flood).startswith("DICOM with more elements than the limit")
    assert reason(tables) == "DICOM with VOILUTSequence of more items than the limit"
    monkeypatch.setattr(dicom_tags, "MAX_ITEMS", 60)
    assert decode(tables).shape == (4, 4, 3)
    monkeypatch.setattr(dicom_tags, "MAX_SEQUENCE", 999)
    assert "VOILUTSequence" in reason(tables)


@pytest.mark.slow
@pytest.mark.torture
def test_fuzzed_files_are_embedded_or_named(torture):
    """What the script says is wrong: crashes, hangs, memory, noise, files that are not named."""
    script = Path(__file__).parents[2] / "scripts" / "fuzz_dicom.py"
    command = [sys.executable, str(script), "--count", str(42 * torture), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["files"] == 42 * torture and 0.3 < found["refused"] / found["files"] < 0.95
