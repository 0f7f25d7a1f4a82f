"""DICOM files that contradict themselves or the standard: their pixels, and what is told."""

import io
import re
import zlib

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_files import (
    BIG,
    EXPLICIT,
    IMPLICIT,
    J2K,
    JPEG,
    JPEG_LOSSLESS,
    JPEG_LS,
    RLE,
    SECONDARY,
    item,
    lut,
    made,
    reason,
    with_value,
)
from PIL import Image
from pydicom.pixels import apply_windowing

from medsiglip_jax.preprocess.decode import decode, decode_with_facts
from medsiglip_jax.preprocess.dicom import official, streams
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.load import load_images

RNG = np.random.default_rng(0)
OFFICIAL = Rules("official")
JPEG_XL, JPEG_XL_JPEG, JPEG_XL_ANY = (f"1.2.840.10008.1.2.4.{n}" for n in (110, 111, 112))
SYNTAX = b"\x02\x00\x10\x00"  # the tag of Transfer Syntax UID
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"


def seen(data, rules=Rules()):
    return decode_with_facts(data, rules=rules)[1].seen


# --------------------------------------------------------------------------- CT in Hounsfield units

HU = np.linspace(-1024, 1500, 4096).reshape(64, 64).round().astype(np.int16)
SHIFTED = (HU + 1024).astype(np.uint16)
RESCALE = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
WINDOW = {"WindowCenter": "50", "WindowWidth": "101"}
ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"


def ct(stored=SHIFTED, **tags):
    return made(stored, **{"Modality": "CT", **RESCALE, **WINDOW, **tags})


@pytest.mark.parametrize("tags", [
    {},
    {"RescaleType": "HU"},
    {"RescaleType": "HU", "SOPClassUID": SECONDARY},
    {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_PERFUSION"]},
    {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]},  # compressed with loss
    {"ImageType": ["DERIVED", "SECONDARY", "MPR"], "SOPClassUID": ENHANCED},
    {"RescaleType": "US"},  # the values decide
    {"RescaleType": "US", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]},
])  # fmt: skip
def test_windows_of_ct_are_for_hounsfield_units(tags):
    hu = HU.astype(float)[..., None]
    windows = np.array([(-1225, 2250), (-135, 350), (0, 80)])
    want = np.rint(255 * np.clip((hu - windows[:, 0]) / windows[:, 1], 0, 1))
    np.testing.assert_array_equal(decode(ct(**tags)), want)
    assert ("taken for Hounsfield units" in seen(ct(**tags))) == (tags.get("RescaleType") == "US")


@pytest.mark.parametrize("why, tags", [
    ("Rescale Type MGML", {"RescaleType": "MGML"}),
    ("Rescale Type Z_EFF", {"RescaleType": "Z_EFF"}),
    ("Rescale Type HU_MOD", {"RescaleType": "HU_MOD"}),
    ("Rescale Type of another name", {"RescaleType": "SECRET"}),
    ("Rescale Type US", {"RescaleType": "US", "ImageType": ["DERIVED", "PRIMARY", "TOMO"]}),
    ("Rescale Type US", {"RescaleType": "US", "RescaleIntercept": "0"}),
    ("no CT Image, and no Rescale Type", {"SOPClassUID": SECONDARY}),
    ("Image Type names", {"ImageType": ["DERIVED", "SECONDARY", "OTHER", "VRT"]}),
    ("Image Type names", {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "CT_PERFUSION"]}),
    ("Image Type names", {"ImageType": ["ORIGINAL", "PRIMARY", "TOMOSYNTHESIS"]}),
    ("Image Type names", {"ImageType": ["DERIVED", "SECONDARY", "3D"]}),
    ("none of its values could be air",
     {"ImageType": ["DERIVED", "SECONDARY"], "RescaleIntercept": "0"}),
    ("its modality LUT has no type", {"ModalityLUTSequence": [lut(0, range(4096), 12)]}),
])  # fmt: skip
def test_other_values_of_ct_are_shown_in_the_window_of_the_file(why, tags):
    other = {**tags, "Modality": "MR"}
    for rules in (Rules(), Rules(ct_window=(350, 40))):
        np.testing.assert_array_equal(decode(ct(**tags), rules), decode(ct(**other)))
        told = seen(ct(**tags), rules)
        assert "W/L 101/50; not in Hounsfield units" in told and why in told
        assert told.endswith("asked for is not used") == (rules.ct_window is not None)
        assert "SECRET" not in told


def test_a_screenshot_of_8_bits_is_as_stored():
    stored = RNG.integers(0, 256, (20, 30)).astype(np.uint8)
    same = {"RescaleSlope": "1", "RescaleIntercept": "0", "Modality": "CT"}
    for tags in ({}, {"SOPClassUID": SECONDARY}, {"RescaleType": "HU"}):
        image = decode(made(stored, **same, **tags))
        np.testing.assert_array_equal(image, stored[..., None].repeat(3, 2))
        assert "as stored; not in Hounsfield units (8 bits" in seen(made(stored, **same, **tags))


def test_frames_have_units_of_their_own():
    def of_frame(units):
        transformation = item(**RESCALE, RescaleType=units)
        return item(PixelValueTransformationSequence=[transformation])

    file = made(
        np.stack([SHIFTED] * 2), Modality="CT", SOPClassUID=ENHANCED, NumberOfFrames="2",
        PerFrameFunctionalGroupsSequence=[of_frame("HU"), of_frame("MGML")], **WINDOW,
    )  # fmt: skip
    np.testing.assert_array_equal(decode(file, Rules(frame=0)), decode(ct()))
    np.testing.assert_array_equal(decode(file, Rules(frame=1)), decode(ct(Modality="MR")))


def test_a_perfusion_map_in_unspecified_units_is_not_taken_for_hounsfield_units():
    """Stored from 1024 on, as some are: no value is that of air."""
    flow = RNG.integers(1024, 1124, (40, 40)).astype(np.uint16)
    assert "Rescale Type US" in seen(ct(flow, RescaleType="US"))
    signed = RNG.integers(0, 100, (40, 40)).astype(np.int16)
    original = ["ORIGINAL", "PRIMARY", "AXIAL"]
    told = seen(ct(signed, RescaleIntercept="0", RescaleType="US", ImageType=original))
    assert "Rescale Type US" in told


def test_unusual_files_are_counted_where_nobody_looks_at_each():
    unusual = [ct(RescaleType="MGML"), ct(), made(ACTIVE, PixelPresentation="COLOR")]
    with pytest.warns(UserWarning, match="2 of 3 images are DICOM files with something unusual"):
        load_images(unusual, 28)


# --------------------------------------------------------------------------- windows and tables


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("center", [-2000, 9000])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_that_misses_every_value_is_applied_and_told(photometric, center, function):
    """It is as the standard and pydicom have it: all black, or all white."""
    stored = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    tags = {"PhotometricInterpretation": photometric, "BitsStored": 12, "Modality": "MR"}
    data = made(stored, WindowCenter=center, WindowWidth=400, VOILUTFunction=function, **tags)
    want = apply_windowing(stored, pydicom.dcmread(io.BytesIO(data))) / 4095
    want = 1 - want if photometric == "MONOCHROME1" else want
    np.testing.assert_array_equal(decode(data)[..., 0], np.rint(255 * want))
    assert "no value is inside the window" in seen(data)
    assert "inside" not in seen(made(stored, WindowCenter=2000, WindowWidth=400, **tags))


def test_values_that_are_padding_do_not_count_as_shown():
    stored = RNG.integers(0, 1000, (20, 30)).astype(np.int16)
    stored[:9] = -2000
    tags = {"WindowCenter": "-1500", "WindowWidth": "1500", "PixelPaddingValue": -2000}
    assert "no value is inside the window" in seen(made(stored, **tags))
    assert "no value is" not in seen(made(np.full((4, 4), 7, np.int16), **tags))  # nothing to tell


def test_a_voi_lut_and_the_windows_of_ct_can_miss_every_value_too():
    stored = RNG.integers(0, 1000, (20, 30)).astype(np.uint16)
    data = made(stored, VOILUTSequence=[lut(2000, range(256))])
    assert not decode(data).any() and "no value is inside the window" in seen(data)
    far = ct(stored, RescaleIntercept="5000", RescaleType="HU")
    assert "no value is inside the window" in seen(far)


def test_a_window_without_width_is_not_used_and_told():
    stored = RNG.integers(0, 1000, (20, 30)).astype(np.uint16)
    data = made(stored, WindowCenter="500", WindowWidth="0")
    np.testing.assert_array_equal(decode(data), decode(made(stored)))
    assert "percentiles 0.5 and 99.5; the width of its window is below 1" in seen(data)


def test_empty_items_of_functional_groups_hide_nothing():
    groups = {"Modality": "MR", "NumberOfFrames": "1", **WINDOW}
    of_all = [item(FrameVOILUTSequence=[item(WindowCenter="900", WindowWidth="300")])]
    of_each = [item(FrameVOILUTSequence=[item()], PixelValueTransformationSequence=[item()])]
    for shared, window in ((of_all, ("900", "300")), ([], ("50", "101"))):
        data = made(
            SHIFTED[None], PerFrameFunctionalGroupsSequence=of_each,
            SharedFunctionalGroupsSequence=shared, **groups,
        )  # fmt: skip
        want = made(SHIFTED, Modality="MR", WindowCenter=window[0], WindowWidth=window[1])
        np.testing.assert_array_equal(decode(data), decode(want))


@pytest.mark.parametrize("empty", [{}, {"LUTExplanation": "none"}, {"LUTDescriptor": [4, 0, 8]}])
def test_items_of_lut_sequences_without_a_table_are_left_out(empty):
    """As pydicom does: the window then applies, or the rescale, or the next table."""
    stored = RNG.integers(0, 256, (20, 30)).astype(np.uint16)
    tags = {"WindowCenter": "100", "WindowWidth": "80", "Modality": "MR"}
    alone = made(stored, VOILUTSequence=[item(**empty)], **tags)
    np.testing.assert_array_equal(decode(alone), decode(made(stored, **tags)))
    falling = lut(0, range(255, -1, -1))
    second = made(stored, VOILUTSequence=[item(**empty), falling])
    np.testing.assert_array_equal(decode(second)[..., 0], 255 - stored)
    units = {"RescaleSlope": "2", "RescaleIntercept": "-9"}
    modality = made(stored, ModalityLUTSequence=[item(**empty)], **units, **tags)
    np.testing.assert_array_equal(decode(modality), decode(made(stored, **units, **tags)))
    for data, name in ((alone, "VOI"), (second, "VOI"), (modality, "Modality")):
        assert f"an item of {name}LUTSequence that holds no table is left out" in seen(data)


def test_a_voi_lut_of_12_bits_said_to_be_of_16_is_as_bright_as_its_entries():
    """Of 4,095 the brightest pixel is 4,032, which is 251 of 255, as with a descriptor of 12."""
    stored = np.minimum(np.add.outer(np.arange(64), np.arange(64)) * 32, 4095).astype(np.uint16)
    data = made(stored, Modality="CR", BitsStored=12, VOILUTSequence=[lut(0, range(4096), 16)])
    np.testing.assert_array_equal(decode(data)[..., 0], np.rint(stored * (255 / 4095)))
    assert "entries of 12 bits, said to be of 16" in seen(data)


@pytest.mark.parametrize("bits, top", [(8, 255), (10, 1023), (12, 4095)])
def test_a_palette_whose_entries_are_of_fewer_bits_than_it_says(bits, top):
    colours = np.rint(RED_TO_BLUE * (top / 255)).astype(int)
    stored = RNG.integers(0, 256, (20, 30)).astype(np.uint8)
    tags = palette(colours, 0, 16)
    data = made(stored, PhotometricInterpretation="PALETTE COLOR", **tags)
    np.testing.assert_array_equal(decode(data), RED_TO_BLUE[stored])
    assert seen(data).endswith(f"a palette of colours; entries of {bits} bits, said to be of 16")


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_the_first_value_of_a_table_given_as_unsigned_beside_signed_pixels(sequence):
    stored = RNG.integers(-200, 100, (20, 30)).astype(np.int16)
    right = made(stored, **{sequence: [lut(-150, range(256))]})
    wrong = right.replace(b"\x28\x00\x02\x30SS", b"\x28\x00\x02\x30US")
    assert wrong != right and decode(right).any()
    np.testing.assert_array_equal(decode(wrong), decode(right))


def test_a_dark_table_of_8_bits_stays_dark():
    stored = RNG.integers(0, 16, (20, 30)).astype(np.uint8)
    data = made(stored, VOILUTSequence=[lut(0, range(16))])
    np.testing.assert_array_equal(decode(data)[..., 0], stored)


# --------------------------------------------------------------------------- supplemental palettes

RED_TO_BLUE = np.stack([np.arange(256), np.zeros(256, int), 255 - np.arange(256)], -1)


def palette(colours=RED_TO_BLUE, first=1000, bits=8, syntax=EXPLICIT):
    tags = {}
    for n, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(colours), first, bits]
        words = colours[:, n].astype("u1" if bits == 8 else "<u2").view("<u2")
        words = words.astype(">u2" if syntax == BIG else "<u2")
        tags[f"{name}PaletteColorLookupTableData"] = words.tobytes()
    return tags


ACTIVE = np.linspace(0, 1300, 4096).reshape(64, 64).astype(np.uint16)
GREY = {"Modality": "MR", "WindowCenter": "500", "WindowWidth": "1000"}


@pytest.mark.parametrize("bits, scale", [(8, 1), (16, 257)])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
def test_values_from_the_first_of_a_supplemental_palette_on_are_coloured(bits, scale, syntax):
    """PS3.3 C.8.16.2.1.1.1: those below are grey; those above it get its last colour."""
    tags = {"PixelPresentation": "COLOR", **GREY}
    data = made(ACTIVE, syntax, **tags, **palette(RED_TO_BLUE * scale, 1000, bits, syntax))
    image, grey = decode(data), decode(made(ACTIVE, **GREY))
    coloured = ACTIVE >= 1000
    np.testing.assert_array_equal(image[~coloured], grey[~coloured])
    index = np.clip(ACTIVE[coloured].astype(int) - 1000, 0, 255)
    np.testing.assert_array_equal(image[coloured], RED_TO_BLUE[index])
    assert image[-1, -1].tolist() == [255, 0, 0]
    assert seen(data).endswith("a palette colours the values from 1000")


def test_a_supplemental_palette_of_signed_values_and_without_a_window():
    """The greys are stretched by the grey values only, and padding stays black."""
    stored = ACTIVE.astype(np.int16) - 1200
    stored[:2], stored[2:4] = 50, -1999
    tags = {"PixelPresentation": "MIXED", "Modality": "MR", "PixelPaddingValue": -1999}
    data = made(stored, **tags, **palette(first=-100))
    grey = stored < -100
    image = decode(data)
    below = np.where(grey, stored, -1999)
    np.testing.assert_array_equal(image[grey], decode(made(below, **tags))[grey])
    assert image[0, 0].tolist() == [150, 0, 105] and not image[2:4].any()


def test_the_frame_says_whether_it_is_coloured():
    def of_frame(shown):
        return item(MRImageFrameTypeSequence=[item(PixelPresentation=shown)])

    data = made(
        np.stack([ACTIVE] * 2), NumberOfFrames="2", PixelPresentation="MIXED", **GREY, **palette(),
        PerFrameFunctionalGroupsSequence=[of_frame("MONOCHROME"), of_frame("COLOR")],
    )  # fmt: skip
    np.testing.assert_array_equal(decode(data, Rules(frame=0)), decode(made(ACTIVE, **GREY)))
    single = decode(made(ACTIVE, PixelPresentation="COLOR", **GREY, **palette()))
    np.testing.assert_array_equal(decode(data, Rules(frame=1)), single)


@pytest.mark.parametrize("note, tags", [
    ("a palette that the file does not apply", palette()),
    ("a palette that the file does not apply", {"PixelPresentation": "MONOCHROME", **palette()}),
    ("in colour, but without a palette", {"PixelPresentation": "COLOR"}),
    ("in colours that are not supported", {"PixelPresentation": "COLOR_RANGE", **palette()}),
])  # fmt: skip
def test_palettes_that_are_not_applied_are_told(note, tags):
    data = made(ACTIVE, **GREY, **tags)
    np.testing.assert_array_equal(decode(data), decode(made(ACTIVE, **GREY)))
    assert note in seen(data)


def test_a_palette_of_more_than_256_entries_of_8_bits():
    """pydicom 3.0 takes their numbers modulo 256."""
    colours = RNG.integers(0, 256, (1000, 3))
    stored = RNG.integers(0, 1200, (30, 40)).astype(np.uint16)
    data = made(stored, PhotometricInterpretation="PALETTE COLOR", **palette(colours, 100))
    want = colours[np.clip(stored.astype(int) - 100, 0, 999)]
    np.testing.assert_array_equal(decode(data), want)
    short = palette(colours, 100) | {"GreenPaletteColorLookupTableData": bytes(900)}
    assert "palette" in reason(made(stored, PhotometricInterpretation="PALETTE COLOR", **short))


# --------------------------------------------------------------------------- colours of streams

RGB = np.asarray(Image.fromarray(RNG.integers(40, 216, (6, 8, 3), np.uint8)).resize((64, 48)))
YBR = np.asarray(Image.fromarray(RGB).convert("YCbCr"))
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"


def adobe(transform):
    return b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


def stream(components, markers=b"", subsampling=0, lossless=False):
    """A JPEG of three components as they are, named 1, 2, 3, with these markers only."""
    if lossless:
        plain = bytes(imagecodecs.jpeg8_encode(components, lossless=True, colorspace="RGB"))
    else:
        whole = io.BytesIO()
        Image.fromarray(components, "YCbCr").save(
            whole, "JPEG", quality=100, subsampling=subsampling
        )
        plain = whole.getvalue()
    kept, at = b"\xff\xd8" + markers, 2
    while plain[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(plain[at + 2 : at + 4], "big")
        kept += b"" if plain[at + 1] in (0xE0, 0xEE) else plain[at:end]
        at = end
    return kept.replace(b"R\x11\0G\x11\0B\x11\0", b"\1\x11\0\2\x11\0\3\x11\0") + plain[at:].replace(
        b"R\0G\0B\0", b"\1\0\2\0\3\0", 1
    )


@pytest.mark.parametrize("components, markers, subsampling, right, wrong", [
    (YBR, JFIF, 0, "YBR_FULL_422", "RGB"),  # dcm4che issue 565; pydicom and GDCM agree
    (YBR, JFIF, 1, "YBR_FULL_422", "RGB"),
    (YBR, adobe(1), 0, "YBR_FULL", "RGB"),
    (RGB, adobe(0), 0, "RGB", "YBR_FULL"),
    (RGB, adobe(0), 0, "RGB", "YBR_FULL_422"),
    (YBR, b"", 2, "YBR_FULL_422", "RGB"),  # nobody subsamples RGB
])  # fmt: skip
def test_a_jpeg_knows_its_colours_better_than_the_file(
    components, markers, subsampling, right, wrong
):
    encoded = stream(components, markers, subsampling)
    files = [made(RGB, JPEG, [encoded], PhotometricInterpretation=x) for x in (right, wrong)]
    images = [decode(data).astype(int) for data in files]
    np.testing.assert_array_equal(*images)
    assert np.abs(images[0] - RGB).mean() < (9 if subsampling else 2)
    assert seen(files[0]).endswith("colours") and "colours taken for" in seen(files[1])


@pytest.mark.parametrize("photometric, components", [("RGB", RGB), ("YBR_FULL", YBR)])
def test_a_jpeg_that_does_not_say_has_the_colours_of_the_file(photometric, components):
    data = made(RGB, JPEG, [stream(components)], PhotometricInterpretation=photometric)
    assert np.abs(decode(data).astype(int) - RGB).mean() < 2 and seen(data).endswith("colours")


@pytest.mark.parametrize("photometric, marker", [("RGB", adobe(1)), ("YBR_FULL", adobe(0))])
def test_the_file_knows_the_colours_of_a_lossless_jpeg(photometric, marker):
    """As dcmtk, GDCM and pydicom have it."""
    encoded = stream(RGB, marker, lossless=True)
    tags = {"PhotometricInterpretation": photometric}
    data = made(RGB, JPEG_LOSSLESS, [encoded], **tags)
    np.testing.assert_array_equal(decode(data), decode(made(RGB, **tags)))
    assert "colours taken for" in seen(data)


def test_jpeg_2000_in_boxes_that_say_ycbcr_is_converted_once():
    whole = bytes(imagecodecs.jpeg2k_encode(YBR, codecformat="jp2", reversible=True, mct=False))
    at = whole.index(b"colr") + 7
    sycc = whole[:at] + (18).to_bytes(4, "big") + whole[at + 4 :]
    for photometric, noted in (("YBR_FULL", False), ("RGB", True)):
        data = made(RGB, J2K, [sycc], PhotometricInterpretation=photometric)
        assert np.abs(decode(data).astype(int) - RGB).max() <= 3
        assert ("colours taken for" in seen(data)) == noted


def test_jpeg_2000_transformed_from_rgb_in_a_file_of_ycbcr_is_told():
    encoded = bytes(imagecodecs.jpeg2k_encode(YBR, codecformat="j2k", reversible=True, mct=True))
    data = made(RGB, J2K, [encoded], PhotometricInterpretation="YBR_FULL")
    np.testing.assert_array_equal(
        decode(data), decode(made(YBR, PhotometricInterpretation="YBR_FULL"))
    )
    assert "colours taken for YCbCr: the file says YCbCr, its JPEG 2000 RGB" in seen(data)
    plain = made(RGB, J2K, [encoded], PhotometricInterpretation="YBR_RCT")
    np.testing.assert_array_equal(decode(plain), YBR)
    assert seen(plain).endswith("colours")


def test_three_whole_samples_under_the_name_of_subsampled_ones_are_refused():
    assert "YBR_FULL or RGB" in reason(made(YBR, PhotometricInterpretation="YBR_FULL_422"))


# ------------------------------------------------------------------------- bits beyond Bits Stored

ENCODERS = [
    (JPEG_LS, imagecodecs.jpegls_encode),
    (J2K, lambda x: imagecodecs.jpeg2k_encode(x, codecformat="j2k", reversible=True, level=0)),
    (JPEG_LOSSLESS, lambda x: imagecodecs.jpeg8_encode(x, lossless=True, bitspersample=16)),
    (JPEG_XL, lambda x: imagecodecs.jpegxl_encode(x, lossless=True)),
]


@pytest.mark.parametrize("syntax, encode", ENCODERS)
def test_decoded_values_beyond_bits_stored_are_clipped(syntax, encode):
    stored = RNG.integers(3000, 5000, (20, 30)).astype(np.uint16)
    tags = {"BitsStored": 12, "WindowCenter": "3500", "WindowWidth": "1500"}
    data = made(stored, syntax, [bytes(encode(stored))], **tags)
    np.testing.assert_array_equal(decode(data), decode(made(stored.clip(0, 4095), **tags)))
    assert "values beyond Bits Stored, which are clipped" in seen(data)
    within = stored.clip(0, 4095)
    data = made(within, syntax, [bytes(encode(within))], **tags)
    assert "beyond" not in seen(data)


@pytest.mark.parametrize("syntax, encode", ENCODERS)
def test_signed_values_in_more_bits_than_are_stored(syntax, encode):
    """As two's complement of all bits, or of those stored; with values beyond, or without."""
    tags = {"BitsStored": 12, "WindowCenter": "0", "WindowWidth": "4096"}
    stored = RNG.integers(-2048, 2048, (20, 30)).astype(np.int16)
    want = decode(made(stored, **tags))
    wide, narrow = stored.view(np.uint16), (stored & 0xFFF).view(np.uint16)
    for values in (wide, narrow):
        data = made(stored, syntax, [bytes(encode(values))], **tags)
        np.testing.assert_array_equal(decode(data), want)
        assert "beyond" not in seen(data)
    stored[0, 0], stored[0, 1] = 2100, -2200
    data = made(stored, syntax, [bytes(encode(stored.view(np.uint16)))], **tags)
    np.testing.assert_array_equal(decode(data), decode(made(stored.clip(-2048, 2047), **tags)))
    assert "clipped" in seen(data)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_bits_above_bits_stored_are_told(kind):
    """Without compression they are no part of a value (PS3.5 8.1.1), as in pydicom and dcmtk."""
    half = 2048 if kind is np.int16 else 0
    stored = (RNG.integers(0, 4096, (20, 30)) - half).astype(kind)
    tags = {"BitsStored": 12, "WindowCenter": "1000", "WindowWidth": "2000"}
    for usual in (stored, stored & 0xFFF):
        assert "bits above" not in seen(made(usual, **tags))
    stored[3, 3] = 5000
    data = made(stored, **tags)
    stored[3, 3] = 5000 - 4096
    np.testing.assert_array_equal(decode(data), decode(made(stored, **tags)))
    assert seen(data).endswith("bits above Bits Stored are set, and not used")


@pytest.mark.parametrize("syntax, encode", [*ENCODERS, (EXPLICIT, None)])
def test_overlays_in_the_bits_of_pixels_are_no_values(syntax, encode):
    stored = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    drawn = stored | (RNG.integers(0, 2, stored.shape) << 12).astype(np.uint16)
    tags = {"BitsStored": 12}
    data = made(drawn, syntax, encode and [bytes(encode(drawn))], **tags)
    start, position = (
        b"\xe0\x7f\x10\x00",
        b"\x00\x60\x02\x01US\x02\x00\x0c\x00",
    )  # Overlay Bit Position
    data = data.replace(start, position + start, 1)
    np.testing.assert_array_equal(decode(data), decode(made(stored, **tags)))
    assert "beyond" not in seen(data)


# --------------------------------------------------------------------------- transfer syntaxes


def progressive(array):
    whole = io.BytesIO()
    Image.fromarray(array).save(whole, "JPEG", quality=95, progressive=True)
    return whole.getvalue()


@pytest.mark.parametrize("last", [53, 55])
def test_progressive_jpeg(last):
    stored = np.add.outer(np.arange(64), np.arange(80)).astype(np.uint8)
    encoded = progressive(stored)
    data = made(stored, f"1.2.840.10008.1.2.4.{last}", [encoded])
    np.testing.assert_array_equal(decode(data), decode(encoded))
    assert "cut off" in reason(made(stored, f"1.2.840.10008.1.2.4.{last}", [encoded[:-400]]))


@pytest.mark.parametrize("syntax", [JPEG_XL, JPEG_XL_JPEG, JPEG_XL_ANY])
@pytest.mark.parametrize("top, bits", [(255, 8), (4095, 12), (65535, 16)])
def test_jpeg_xl_is_exact(syntax, top, bits, monkeypatch):
    stored = RNG.integers(0, top + 1, (30, 50)).astype(np.uint8 if bits == 8 else np.uint16)
    encoded = bytes(imagecodecs.jpegxl_encode(stored, lossless=True, bitspersample=bits))
    tags = {"BitsStored": bits, "Modality": "CR"}
    data = made(stored, syntax, [encoded], **tags)
    for rules in (Rules(), OFFICIAL):
        np.testing.assert_array_equal(decode(data, rules), decode(made(stored, **tags), rules))
    assert "cannot be decoded" in reason(made(stored, syntax, [encoded[:-9]], **tags))
    monkeypatch.setattr(imagecodecs.JPEGXL, "available", False)
    assert "the imagecodecs installed here lacks" in reason(data)


def test_jpeg_xl_of_colours_and_of_a_jpeg():
    exact = bytes(imagecodecs.jpegxl_encode(RGB, lossless=True))
    np.testing.assert_array_equal(decode(made(RGB, JPEG_XL, [exact])), RGB)
    tags = {"PhotometricInterpretation": "YBR_FULL"}
    ybr = bytes(imagecodecs.jpegxl_encode(YBR, lossless=True))
    np.testing.assert_array_equal(
        decode(made(RGB, JPEG_XL, [ybr], **tags)), decode(made(YBR, **tags))
    )
    jpeg = stream(YBR, JFIF)
    packed = bytes(imagecodecs.jpegxl_encode_jpeg(jpeg, usecontainer=True))
    for photometric in ("RGB", "YBR_FULL_422"):
        data = made(RGB, JPEG_XL_JPEG, [packed], PhotometricInterpretation=photometric)
        np.testing.assert_array_equal(decode(data), decode(jpeg))
        lossy = made(RGB, JPEG_XL_ANY, [packed], PhotometricInterpretation=photometric)
        assert np.abs(decode(lossy).astype(int) - decode(jpeg)).max() <= 4


@pytest.mark.parametrize("shape", [
    (8, 8), (48, 64), (300, 300), (900, 1600), (600, 800), (37, 1000), (1, 1), (5000, 3),
])  # fmt: skip
def test_the_size_in_a_jpeg_xl_stream_is_read_before_it_is_decoded(shape, monkeypatch):
    encoded = bytes(imagecodecs.jpegxl_encode(np.zeros(shape, np.uint8), lossless=True))
    assert streams.read_jpeg_xl(encoded) == shape
    monkeypatch.setattr(imagecodecs, "jpegxl_decode", None)  # never called
    small = np.zeros((7, 7), np.uint8)
    assert f"has {shape[0]} rows" in reason(made(small, JPEG_XL, [encoded]))
    assert "not what it should be" in reason(made(small, JPEG_XL, [b"\xff\xd8" + encoded]))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_deflated_frames(kind):
    stored = RNG.integers(0, 200, (2, 20, 31)).astype(kind)
    packer = [zlib.compressobj(9, zlib.DEFLATED, -15) for _ in stored]
    encoded = [p.compress(x.tobytes()) + p.flush() for p, x in zip(packer, stored, strict=True)]
    data = made(stored, DEFLATED_FRAMES, encoded, NumberOfFrames="2")
    for n in range(2):
        np.testing.assert_array_equal(decode(data, Rules(frame=n)), decode(made(stored[n])))
    cut = made(stored, DEFLATED_FRAMES, [x[:-20] for x in encoded], NumberOfFrames="2")
    assert "cut off" in reason(cut)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    planes = np.ascontiguousarray(np.moveaxis(RGB, -1, 0)).tobytes()
    planes = packer.compress(planes) + packer.flush()
    planar = made(RGB, DEFLATED_FRAMES, [planes], PlanarConfiguration=1)
    np.testing.assert_array_equal(decode(planar), RGB)


@pytest.mark.parametrize("syntax", [RLE, DEFLATED_FRAMES])
def test_compressed_segmentations_of_one_bit(syntax):
    """Bits are packed from the lowest on; a frame starts with a byte of its own (PS3.5 8.1.1)."""
    mask = RNG.integers(0, 2, (13, 11)).astype(np.uint8)
    packed = np.packbits(mask, bitorder="little").tobytes()
    if syntax == RLE:
        runs = b"".join(b"\0" + packed[i : i + 1] for i in range(len(packed)))
        encoded = np.array([1, 64, *[0] * 14], "<u4").tobytes() + runs
    else:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        encoded = packer.compress(packed) + packer.flush()
    data = made(mask, syntax, [encoded], BitsAllocated=1, BitsStored=1, HighBit=0)
    np.testing.assert_array_equal(decode(data)[..., 0], 255 * mask)


@pytest.mark.parametrize("syntax, why", [
    ("1.2.840.10008.1.2.4.102", "MPEG-4 AVC/H.264 High Profile.*ffmpeg"),
    ("1.2.840.10008.1.2.4.107", "HEVC.*ffmpeg"),
    ("1.2.840.10008.1.2.4.94", "JPIP Referenced"),
    ("1.2.840.113619.5.2", "of a vendor, or unknown"),
])  # fmt: skip
def test_a_transfer_syntax_that_is_not_decoded_is_named(syntax, why):
    stored = np.zeros((4, 4), np.uint8)
    native = with_value(made(stored), SYNTAX, b"UI", syntax)
    for data in (made(stored, syntax, [bytes(40)]), native):  # frames in items, or not
        assert re.search(why, reason(data)), reason(data)


def test_pixels_on_a_server_are_not_called_cut_off():
    data = with_value(made(np.zeros((4, 4), np.uint8)), SYNTAX, b"UI", "1.2.840.10008.1.2.4.94")
    assert "on a server (JPIP)" in reason(data[: data.index(b"\xe0\x7f\x10\x00")])


def undefined(data, tag, syntax):
    """The same file, with pixels laid out in items, as if they were compressed."""
    order = "big" if syntax == BIG else "little"
    start = data.index(tag + b"OW") + 8
    item_tag, end_tag = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
    if syntax == BIG:
        item_tag, end_tag = b"\xff\xfe\xe0\x00", b"\xff\xfe\xe0\xdd"
    body = data[start + 4 :]
    items = item_tag + bytes(4) + item_tag + len(body).to_bytes(4, order) + body
    return data[:start] + b"\xff" * 4 + items + end_tag + bytes(4)


@pytest.mark.parametrize("syntax, tag", [
    (BIG, b"\x7f\xe0\x00\x10"), (EXPLICIT, b"\xe0\x7f\x10\x00"),
])  # fmt: skip
def test_items_are_not_taken_for_pixels(syntax, tag):
    stored = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    data = undefined(made(stored, syntax), tag, syntax)
    assert "one of the two is wrong" in reason(data)


@pytest.mark.parametrize("known", [True, False], ids=["SQ", "UN"])
def test_elements_of_undefined_length_in_big_endian(known):
    stored = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    data = made(stored, BIG)
    tags = (0xFFFEE000, 0x00081150, 0xFFFEE00D, 0xFFFEE0DD)
    halves = [(t >> 16, t & 0xFFFF) for t in tags]
    order = ">" if known else "<"
    start, uid, end, last = (np.array(x, f"{order}u2").tobytes() for x in halves)
    text = (b"UI\x00\x04" if known else (4).to_bytes(4, "little")) + b"1.2\0"
    items = start + b"\xff" * 4 + uid + text + end + bytes(4) + last + bytes(4)
    element = b"\0\x09\x10\x01" + (b"SQ" if known else b"UN") + b"\0\0" + b"\xff" * 4 + items
    at = data.index(b"\x00\x28\x00\x02")
    data = data[:at] + element + data[at:]
    if known:
        np.testing.assert_array_equal(decode(data), decode(made(stored)))
    else:
        assert "unknown type and undefined length" in reason(data)


# --------------------------------------------------------------------------- the rules "official"


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("box", ["j2k", "jp2"])
def test_official_takes_grey_jpeg_2000_as_pil_does(bits, signed, box):
    """Shifted up to 16 bits, and signed samples from the middle of the range on."""
    low = -(1 << (bits - 1)) if signed else 0
    kind = ("int" if signed else "uint") + ("8" if bits == 8 else "16")
    stored = RNG.integers(low, low + (1 << bits), (20, 30)).astype(kind)
    encoded = bytes(imagecodecs.jpeg2k_encode(
        stored, codecformat=box, reversible=True, level=0, bitspersample=bits,
    ))  # fmt: skip
    shifted = (stored.astype(np.int64) - low) << (0 if bits == 8 else 16 - bits)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), shifted)
    tags = {"Modality": "CT", "BitsStored": bits, "WindowCenter": "40", "WindowWidth": "400"}
    data = made(stored, J2K, [encoded], **tags, **RESCALE)
    hu = shifted.astype(np.float64) - 1024
    levels = np.round(np.interp(hu.clip(-160, 240), (-160, 240), (0, 65535))).astype(np.uint16)
    np.testing.assert_array_equal(decode(data, OFFICIAL), official._to_8_bits(levels))
    assert "cut off" in reason(made(stored, J2K, [encoded[:-99]], **tags), OFFICIAL)


def test_official_takes_jpeg_2000_of_colours_as_pil_does():
    encoded = bytes(imagecodecs.jpeg2k_encode(RGB, codecformat="j2k", reversible=True))
    data = made(RGB, J2K, [encoded], Modality="XC")
    np.testing.assert_array_equal(decode(data, OFFICIAL), RGB)
