"""DICOM files made for tests."""

import io

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage

IMPLICIT, EXPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{x}" for x in ("", ".1", ".2", ".1.99"))
RLE, JPEG, JPEG_LOSSLESS, JPEG_LS, J2K, HTJ2K = (
    f"1.2.840.10008.1.2.{x}" for x in ("5", "4.50", "4.70", "4.80", "4.90", "4.201")
)

SECONDARY, CT_IMAGE = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("7", "2"))

CINE = np.random.default_rng(0).integers(0, 256, (7, 30, 40, 3)).astype(np.uint8)


def made(array, syntax=EXPLICIT, encoded=None, private=(), **tags):
    """A file of an array [H, W], [H, W, 3] or of `tags["NumberOfFrames"]` of those.

    It is a CT Image where the modality is CT, else a Secondary Capture.
    """
    array = np.asarray(array)
    sop_class = tags.get("SOPClassUID", CT_IMAGE if tags.get("Modality") == "CT" else SECONDARY)
    colour = array.shape[-1] == 3 and array.ndim > 2
    meta = FileMetaDataset()
    known = UID(syntax).is_transfer_syntax  # pydicom writes no others
    meta.TransferSyntaxUID = syntax if known else RLE
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, "1"
    found = FileDataset(
        None, {}, file_meta=meta, preamble=bytes(128), is_implicit_VR=syntax == IMPLICIT,
        is_little_endian=syntax != BIG,
    )  # fmt: skip
    shape = array.shape[:-1] if colour else array.shape
    bits = array.dtype.itemsize * 8
    values = {
        "SOPClassUID": sop_class, "Modality": "OT",
        "SamplesPerPixel": 3 if colour else 1, "Rows": shape[-2], "Columns": shape[-1],
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "BitsAllocated": bits, "BitsStored": bits, "PixelRepresentation": array.dtype.kind == "i",
        **({"PlanarConfiguration": 0} if colour else {}), **tags,
    }  # fmt: skip
    values.setdefault("HighBit", values["BitsStored"] - 1)
    for name, value in values.items():
        setattr(found, name, int(value) if isinstance(value, (bool, np.integer)) else value)
    for number, text in enumerate(private, start=1):
        found.private_block(0x0009, private[0], create=True).add_new(number, "LO", text)
    order = ">" if syntax == BIG else "<"
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    data += bytes(len(data) % 2)
    found.PixelData = data if encoded is None else encapsulate(encoded)
    found["PixelData"].VR = "OW" if bits > 8 else "OB"
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    data = stream.getvalue()
    return data if known else with_value(data, b"\x02\x00\x10\x00", b"UI", syntax)


def reason(data, rules=Rules()):
    """Why a file cannot be read, which is one line."""
    with pytest.raises(UnreadableImage) as caught:
        decode(data, rules)
    assert "\n" not in str(caught.value)
    return str(caught.value).split(": ", 1)[1]


def item(**tags):
    """An item of a sequence."""
    found = Dataset()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def lut(first, values, bits=8):
    """An item of a LUT sequence."""
    found = item(LUTDescriptor=[len(values), first, bits], LUTData=list(values))
    found["LUTData"].VR = "US"
    return found


def with_value(data, tag, vr, value):
    """A file with another value of an element, which pydicom would not write."""
    value = value.encode() + b" " * (len(value) % 2)
    element = tag + vr + len(value).to_bytes(2, "little") + value
    start = data.index(tag + vr)
    length = int.from_bytes(data[start + 6 : start + 8], "little")
    return data[:start] + element + data[start + 8 + length :]
