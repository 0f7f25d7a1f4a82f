"""DICOM files to pixels beside a plain pydicom and PIL loop; `bench.py dicom` runs it."""

import functools
import io
import statistics
from pathlib import Path

import measure


def dicom(args) -> dict:
    """Measures milliseconds per file, for each kind of file.

    The plain loop reads the file, applies pydicom's modality and VOI LUTs, scales to 8 bits,
    inverts MONOCHROME1 and resizes with PIL; for CT it makes one window where ours are three.
    """
    from medsiglip_jax.preprocess import xla

    codec, rows = xla.codec("big_vision"), []
    for name, data in files().items():
        calls = {
            "ours": functools.partial(_ours, codec, data, args.size),
            "plain": functools.partial(_plain, data, args.size),
        }
        times = measure.interleaved(calls, args.repeats)
        milliseconds = {side: [1e3 * t for t in times[side]] for side in calls}
        row = {"file": name, **{side: measure.summary(milliseconds[side]) for side in calls}}
        medians = {side: statistics.median(times[side]) for side in calls}
        row["ratio"] = round(medians["plain"] / medians["ours"], 2)
        measure.progress(str(row))
        rows.append(row)
    return {"size": args.size, "repeats": args.repeats, "unit": "ms a file", "rows": rows}


def _ours(codec, data: bytes, size: int):
    return codec.resize(codec.decode(data), size)


def _plain(data: bytes, size: int):
    import numpy as np
    import pydicom
    from PIL import Image
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    found = pydicom.dcmread(io.BytesIO(data))
    pixels = found.pixel_array
    if found.SamplesPerPixel == 1:
        pixels = apply_voi_lut(apply_modality_lut(pixels, found), found).astype(np.float64)
        pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1.0) * 255
        if found.PhotometricInterpretation == "MONOCHROME1":
            pixels = 255 - pixels
    image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def files() -> dict[str, bytes]:
    """Radiographs with and without a window, CT, CT as JPEG 2000, and a colour image.

    Pixels are noise, on which JPEG 2000 takes ten times as long as on a real head (pydicom's
    own file).
    """
    import imagecodecs
    import numpy as np
    import pydicom

    rng = np.random.default_rng(0)
    radiograph = np.clip(rng.normal(2000, 600, (3000, 2500)), 0, 4095).astype(np.uint16)
    slice_ = np.clip(rng.normal(1000, 600, (512, 512)), 0, 4095).astype(np.int16)
    colour = rng.integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    window = {"WindowCenter": "2000", "WindowWidth": "3000", "Modality": "DX", "BitsStored": 12}
    ct = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "Modality": "CT", "RescaleType": "HU"}
    head = Path(pydicom.__file__).parent / "data" / "test_files" / "693_J2KI.dcm"
    packed = bytes(imagecodecs.jpeg2k_encode(slice_.view(np.uint16), codecformat="j2k", level=0))
    return {
        "DX 3000x2500, window": _file(radiograph, **window),
        "DX 3000x2500, MONOCHROME1": _file(
            radiograph, Modality="DX", BitsStored=12, PhotometricInterpretation="MONOCHROME1"
        ),
        "CT 512x512": _file(slice_, **ct),
        "CT 512x512, JPEG 2000, a head": head.read_bytes(),
        "CT 512x512, JPEG 2000, noise": _file(slice_.view(np.uint16), packed, **ct),
        "US 1024x768, RGB": _file(colour, Modality="US"),
    }


def _file(pixels, packed: bytes = b"", **tags) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    colour, bits = pixels.ndim == 3, pixels.dtype.itemsize * 8
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.90" if packed else "1.2.840.10008.1.2.1"
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1"
    found = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # pyright: ignore
    values = {
        "SamplesPerPixel": 3 if colour else 1, "Rows": pixels.shape[0], "Columns": pixels.shape[1],
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2", "BitsAllocated": bits,
        "BitsStored": bits, "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **({"PlanarConfiguration": 0} if colour else {}), **tags,
    }  # fmt: skip
    for name, value in {"HighBit": values["BitsStored"] - 1, **values}.items():
        setattr(found, name, value)
    found.PixelData = encapsulate([packed]) if packed else pixels.tobytes()
    found["PixelData"].VR = "OW" if bits > 8 else "OB"
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def add_parsers(commands) -> None:
    sub = commands.add_parser("dicom", help="DICOM files to pixels, against pydicom and PIL")
    sub.add_argument("--size", type=int, default=448)
    sub.add_argument("--repeats", type=int, default=15)
    sub.add_argument("--json", action="store_true")
    sub.set_defaults(run=dicom)
