"""Files of at most 1 MiB that cost as much memory and time as their format allows; what they take.

    python scripts/worst_images.py                  # all of them, half an hour
    python scripts/worst_images.py --only jpeg,tiff --json

Each file is read and resized by each of the four presets, in a process of its own per file. The
exit code is 1 if one takes more than 2 GiB (of memory, beyond what an empty process takes, for the
slowest preset) or 20 s, raises anything but `UnreadableImage`, or ends its process.
"""

import argparse
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from measure import cpu_limit
from PIL import Image

SECONDS, GIB = 20, 2.0
MOST = 1 << 20  # bytes of a file
SIDE = 13_377  # squared just below 178,956,970 pixels
LONG, SHORT = 65_500, 2_732  # the same, as long as JPEG goes
CHILD_LIMIT = 90  # seconds of CPU time, after which a file is given up


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="files whose names contain one of these words")
    parser.add_argument("--presets", default="big_vision,big_vision_pad,huggingface,serving")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "PRESET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with cpu_limit(CHILD_LIMIT):
            print(json.dumps(read(*args.child)))
        return 0
    words = args.only.split(",")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = measured(["", "big_vision"])["gib"]
        for name, make in WORST.items():
            if any(word in name for word in words):
                path = Path(scratch) / name.partition("#")[0]
                path.write_bytes(make())
                for preset in args.presets.split(","):
                    rows.append(measure(path.with_name(name), path.stat().st_size, preset, base))
                    print(text(rows[-1:]), file=sys.stderr, flush=True)
                path.unlink()
    print(json.dumps(rows, indent=2) if args.json else text(rows))
    return 1 if any(row["wrong"] for row in rows) else 0


def measure(path: Path, size: int, preset: str, base: float) -> dict:
    found = measured([str(path), preset])
    gib = round(found["gib"] - base, 2)
    wrong = found["outcome"].startswith("WRONG") or gib > GIB or found["seconds"] > SECONDS
    return {
        "file": path.name, "bytes": size, "preset": preset, "gib": gib,
        "seconds": found["seconds"], "outcome": found["outcome"], "wrong": wrong,
    }  # fmt: skip


def measured(command: list[str]) -> dict:
    """What a child says of a file, with its peak memory."""
    places = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", *command], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    start = time.perf_counter()
    out, err = child.communicate()
    try:
        return json.loads(out)
    except ValueError:
        said = (err.strip().splitlines() or [""])[-1]
        seconds = round(time.perf_counter() - start, 1)
        return {"gib": 0, "seconds": seconds, "outcome": f"WRONG: ends: {child.returncode} {said}"}


def read(path: str, preset: str) -> dict:
    """Reads a file as commands do: pixels, or a reason; with seconds and the peak of the memory."""
    from medsiglip_jax.preprocess import sources
    from medsiglip_jax.preprocess.dicom.rules import Rules
    from medsiglip_jax.preprocess.facts import UnreadableImage
    from medsiglip_jax.preprocess.image import preset as preset_of

    rules, outcome = Rules(volume="percentile"), ""
    start = time.process_time()
    try:
        if path:
            pixels, _ = sources.read(path, rules=rules)
            outcome = "x".join(map(str, pixels.shape[1::-1]))
            preset_of(preset)(pixels, 448)
    except UnreadableImage as error:
        outcome = error.reason
    except BaseException as error:
        outcome = f"WRONG: {type(error).__name__}: {str(error)[:99]}"
    seconds = round(time.process_time() - start, 1)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    return {"gib": peak, "seconds": seconds, "outcome": outcome}


def text(rows: list[dict]) -> str:
    lines = [
        f"{row['file']:24} {row['bytes']:8} B  {row['preset']:15} {row['gib']:6.2f} GiB "
        f"{row['seconds']:6.1f} s  {'WRONG ' * row['wrong']}{row['outcome'][:110]}"
        for row in rows
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the files


def saved(mode: str, size: tuple[int, int], format: str, **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, format, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deflated(count: int, value: bytes = b"\0") -> bytes:
    """`count` equal bytes, deflated, without ever being in memory."""
    packer, block, out = zlib.compressobj(9), value * (1 << 22), []
    while count > 0:
        out.append(packer.compress(block[:count]))
        count -= len(block)
    return b"".join([*out, packer.flush()])


def png(width: int, height: int, bits: int, colour: int, interlaced: int = 0,
        before: bytes = b"") -> bytes:  # fmt: skip
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = -(-width * samples * bits // 8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    count = (line + 1) * height * (1 + interlaced)  # of an interlaced one more than needed
    data = chunk(b"IDAT", deflated(count))
    return b"\x89PNG\r\n\x1a\n" + head + before + palette + data + chunk(b"IEND", b"")


def fits(width: int, bits: int) -> int:
    """Rows of that width whose samples deflate to less than `MOST` bytes: about 1 to 1,030."""
    return min(MOST * 1020 // (width * bits // 8 + 1), 178_956_970 // width)


def jpeg(mode: str, width: int, height: int, **options) -> bytes:
    return saved(mode, (width, height), "JPEG", quality=1, optimize=True, **options)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is there as often as fits."""
    data = jpeg("L", 8192, 8192, progressive=True)
    last = data.rindex(b"\xff\xda")
    table = data.rindex(b"\xff\xc4", 0, last)
    scan = data[table:-2]
    return data[:-2] + scan * ((MOST - len(data)) // len(scan)) + b"\xff\xd9"


def exif_bomb() -> bytes:
    """Tags in EXIF that all say that their value is half of it."""
    count = 20_000
    size = 12 * count + 6
    entries = b"".join(struct.pack("<HHII", 1000 + n, 7, 500_000, size + 8) for n in range(count))
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4) + bytes(520_000)
    return tiff


def jpeg_of_exif() -> bytes:
    data, exif = jpeg("L", 8, 8), exif_bomb()
    pieces = [exif[n : n + 65_000] for n in range(0, len(exif), 65_000)]
    markers = [b"\xff\xe1" + struct.pack(">H", len(p) + 8) + b"Exif\0\0" + p for p in pieces]
    return data[:2] + b"".join(markers) + data[20:]  # without JFIF, whose resolution would do


def jpeg_of_markers() -> bytes:
    data = jpeg("L", 8, 8)
    marker = b"\xff\xe1" + struct.pack(">H", 9) + b"Exif\0\0" + b"x"
    return data[:2] + marker * (1_000_000 // len(marker)) + data[20:]


def gif(width: int, height: int, frames: int = 1, comments: int = 0) -> bytes:
    one = io.BytesIO()
    Image.new("P", (width, height)).save(one, "GIF", optimize=False)
    data = one.getvalue()
    start = data.index(b"\x2c", 13)
    image = data[start:-1]
    dispose = b"\x21\xf9\x04\x08\0\0\0\0"
    comment = b"\x21\xfe\x01a\0" * comments
    return data[:start] + comment + (dispose + image) * frames + b";"


def small_gif_frames() -> bytes:
    data = gif(13_000, 13_000)
    start = data.index(b"\x2c", 13)
    small = gif(1, 1)
    image = small[small.index(b"\x2c", 13) : -1]
    piece = b"\x21\xf9\x04\x08\0\0\0\0" + image
    return data[:start] + piece * ((MOST - start) // len(piece)) + b";"


def jp2(width: int, height: int, tile: int = 0) -> bytes:
    options = {"tile_size": (tile, tile)} if tile else {}
    return saved("RGB", (width, height), "JPEG2000", **options)


def lying_jp2(name: str) -> bytes:
    """A header of 13,000 squared over 64 squared of data."""
    data = bytearray(saved("RGB", (64, 64), "JPEG2000"))
    if "box" in name:
        at = data.index(b"ihdr") + 4
        data[at : at + 8] = struct.pack(">II", 13_000, 13_000)
    if "siz" in name:
        at = data.index(b"\xff\x4f\xff\x51") + 8
        data[at : at + 8] = struct.pack(">II", 13_000, 13_000)
        if "tile" in name:
            data[at + 16 : at + 24] = struct.pack(">II", 13_000, 13_000)
    return bytes(data)


def tiff(width: int, height: int, bits: int = 8, samples: int = 3, kind: int = 1,
         compression: int = 8, tile: int = 0, data: bytes | None = None, planar: int = 1,
         rows: int = 0) -> bytes:  # fmt: skip
    """One strip or tile; `kind` 1 unsigned, 3 floats."""
    data = deflated(width * height * samples * bits // 8) if data is None else data
    photometric = 2 if samples >= 3 else 1
    shorts = lambda *values: struct.pack(f"<{len(values)}H", *values)  # noqa: E731
    tags = {
        256: (4, 1, struct.pack("<I", width)), 257: (4, 1, struct.pack("<I", height)),
        258: (3, samples, shorts(*[bits] * samples)), 259: (3, 1, shorts(compression)),
        262: (3, 1, shorts(photometric)), 277: (3, 1, shorts(samples)),
        284: (3, 1, shorts(planar)), 339: (3, samples, shorts(*[kind] * samples)),
    }  # fmt: skip
    if samples == 4:
        tags[338] = (3, 1, shorts(2))
    place = {324: b"", 325: b""} if tile else {273: b"", 279: b""}
    if tile:
        tags |= {322: (4, 1, struct.pack("<I", tile)), 323: (4, 1, struct.pack("<I", tile))}
    else:
        tags[278] = (4, 1, struct.pack("<I", rows or height))
    end = 8 + 2 + 12 * (len(tags) + 2) + 4 + 64
    offset, count = place
    tags |= {offset: (4, 1, struct.pack("<I", end)), count: (4, 1, struct.pack("<I", len(data)))}
    extra, entries = b"", b""
    at = 8 + 2 + 12 * len(tags) + 4
    for tag, (type, n, value) in sorted(tags.items()):
        if len(value) > 4:
            value, extra = struct.pack("<I", at + len(extra)), extra + value
        entries += struct.pack("<HHI", tag, type, n) + value.ljust(4, b"\0")
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + extra
    return head.ljust(end, b"\0") + data


def lzw_tiff() -> bytes:
    return saved("RGB", (SIDE, SIDE), "TIFF", compression="tiff_lzw")


def tiff_of_directories() -> bytes:
    """Directories that lie in each other: each begins 12 bytes after the one before."""
    count, size = 30_000, 1 << 20
    out = bytearray(size)
    out[:8] = b"II*\0\x08\0\0\0"
    for n in range(count):
        at = 8 + 12 * n
        struct.pack_into("<H", out, at, count)
        struct.pack_into("<I", out, at + 2 + 12 * count, 8 + 12 * (n + 1))
    base = bytearray(tiff(64, 64, data=deflated(64 * 64 * 3)))
    return bytes(base[:4] + struct.pack("<I", 8) + out[8:])


def ico(inner: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


def icns(inner: bytes) -> bytes:
    block = b"ic10" + struct.pack(">I", len(inner) + 8) + inner
    return b"icns" + struct.pack(">I", len(block) + 8) + block


def psd(width: int, height: int) -> bytes:
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3) + bytes(12)
    line = b"\x81\0" * -(-width // 128)
    lines = 3 * height
    return head + struct.pack(">H", 1) + struct.pack(">H", len(line)) * lines + line * lines


def qoi() -> bytes:
    head = b"qoif" + struct.pack(">IIBB", 13_000, 13_000, 4, 0)
    return head + b"\xfd" * (MOST - 20)


def dds(bits: int, fourcc: bytes = b"") -> bytes:
    flags = 4 if fourcc else 0x41
    form = struct.pack("<II4sIIIII", 32, flags, fourcc or b"\0" * 4, bits, 255, 65280, 1 << 16, 0)
    head = struct.pack("<I", 124) + struct.pack("<IIIIII", 0x1007, SIDE, SIDE, 0, 0, 0) + bytes(44)
    return b"DDS " + head + form + bytes(20) + bytes(5000)


def bmp() -> bytes:
    """Run lengths, most of them jumps of 255 rows."""
    data = b"\0\2\xff\xff" * 800 + b"\xff\1" * 400_000
    info = struct.pack("<IiiHHIIiiII", 40, 13_000, 13_000, 1, 8, 1, len(data), 0, 0, 256, 0)
    head = b"BM" + struct.pack("<IHHI", 54 + 1024 + len(data), 0, 0, 54 + 1024)
    return head + info + bytes(1024) + data


def pcx() -> bytes:
    head = struct.pack("<BBBBHHHHHH", 10, 5, 1, 8, 0, 0, 7999, 8191, 72, 72) + bytes(48)
    return head + b"\0\1" + struct.pack("<H", 8000) + bytes(60) + b"\xff\0" * 500_000


def sgi() -> bytes:
    size, rows = 60_000, 2_900
    head = struct.pack(">HBBHHHHII", 474, 1, 1, 2, size, rows, 1, 0, 255).ljust(512, b"\0")
    table = 512 + 8 * rows
    line = b"\x7f\0" * -(-size // 127) + b"\0"
    return head + struct.pack(">I", table) * rows + struct.pack(">I", len(line)) * rows + line


def sun() -> bytes:
    head = struct.pack(">8I", 0x59A66A95, 8192, 8192, 24, 8192 * 8192 * 3, 2, 0, 0)
    return head + b"\x80\xff\0" * 340_000


def dicom(rows: int, columns: int, syntax: str, frame: bytes, samples: int = 1, bits: int = 8,
          frames: int = 1, photometric: str = "") -> bytes:  # fmt: skip
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(syntax)
    data.SOPClassUID, data.Modality = "1.2.840.10008.5.1.4.1.1.7", "OT"
    data.SOPInstanceUID = "2.25.1"
    data.SamplesPerPixel, data.Rows, data.Columns = samples, rows, columns
    data.PhotometricInterpretation = photometric or ("RGB" if samples == 3 else "MONOCHROME2")
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation, data.NumberOfFrames = bits - 1, 0, frames
    if samples == 3:
        data.PlanarConfiguration = 0
    compressed = not syntax.startswith("1.2.840.10008.1.2.1")
    data.PixelData = encapsulate([frame] * frames) if compressed else frame
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = compressed
    out = io.BytesIO()
    data.save_as(out, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return out.getvalue()


def deflated_dicom() -> bytes:
    """Of 16 bits, 128 Mpixel, deflated as a whole."""
    rows = 11_000
    plain = dicom(rows, rows, "1.2.840.10008.1.2.1", b"\0\0", bits=16)
    start = plain.index(b"\x02\x00\x10\x00")
    end = plain.index(b"\x08\x00\x16\x00")
    meta = plain[:start] + b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
    body = plain[end:-10] + struct.pack("<I", rows * rows * 2)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    out = packer.compress(body)
    for _ in range(rows * rows * 2 // 1_000_000):
        out += packer.compress(bytes(1_000_000))
    return meta + out + packer.flush()


def nifti(shape: tuple[int, int, int], dtype: str) -> bytes:
    import gzip

    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape((1, 1, 1))
    header.set_data_dtype(dtype)
    header["dim"][1:4] = shape
    header["vox_offset"], header["magic"], header["sform_code"] = 352, b"n+1", 1
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = 1
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb") as packed:
        packed.write(header.binaryblock + bytes(4))
        left = int(np.prod(shape)) * np.dtype(dtype).itemsize
        while left > 0:
            packed.write(bytes(min(left, 1 << 22)))
            left -= 1 << 22
    return out.getvalue()


def text_png(kind: bytes, count: int) -> bytes:
    """Texts in chunks that each inflate to a mebibyte, or a million tiny ones."""
    if kind == b"zTXt":
        one = chunk(kind, b"Comment\0\0" + zlib.compress(bytes(1_000_000), 9))
    else:
        one = chunk(kind, b"k\0v")
    return png(8, 8, 8, 2, before=one * count)


def webp(width: int, height: int, **options) -> bytes:
    return saved("RGBA" if options.pop("alpha", 0) else "RGB", (width, height), "WEBP", **options)


def avif(side: int) -> bytes:
    return saved("RGB", (side, side), "AVIF", speed=10, quality=10, max_threads=2)


def _imagecodecs(name: str, shape: tuple[int, ...], **options) -> bytes:
    import imagecodecs

    return bytes(getattr(imagecodecs, f"{name}_encode")(np.zeros(shape, np.uint8), **options))


def _dicom_of(codec: str, syntax: str, shape: tuple[int, ...], **options) -> bytes:
    frame = _imagecodecs(codec, shape, **options)
    stand_in = "4.201" if syntax == "4.110" else syntax  # pydicom lacks the other
    data = dicom(*shape[:2], f"1.2.840.10008.1.2.{stand_in}", frame, 3 if len(shape) > 2 else 1)
    return data.replace(f"1.2.{stand_in}".encode(), f"1.2.{syntax}".encode())


def deflated_frame(rows: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    frame = b"".join(packer.compress(bytes(rows)) for _ in range(rows * 2)) + packer.flush()
    data = dicom(rows, rows, "1.2.840.10008.1.2.4.90", frame, bits=16)  # pydicom lacks the other
    return data.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.8.1\0")


WORST: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: png(SIDE, SIDE, 8, 2),
    "rgb-long.png": lambda: png(LONG, SHORT, 8, 2),
    "rgb-tall.png": lambda: png(SHORT, LONG, 8, 2),
    "rgb-interlaced.png": lambda: png(13_000, fits(13_000, 48), 8, 2, 1),
    "rgba.png": lambda: png(SIDE, SIDE, 8, 6),
    "grey.png": lambda: png(SIDE, SIDE, 8, 0),
    "one-bit.png": lambda: png(SIDE, SIDE, 1, 0),
    "palette.png": lambda: png(SIDE, SIDE, 8, 3),
    "grey-alpha.png": lambda: png(SIDE, SIDE, 8, 4),
    "grey16.png": lambda: png(SIDE, SIDE, 16, 0),
    "grey16-alpha.png": lambda: png(SIDE, fits(SIDE, 32), 16, 4),
    "rgb16.png": lambda: png(SIDE, fits(SIDE, 48), 16, 2),
    "row.png": lambda: png(178_956_970, 1, 8, 0),
    "texts-deflated.png": lambda: text_png(b"zTXt", 60),
    "texts.png": lambda: text_png(b"tEXt", 60_000),
    "grey.jpeg": lambda: jpeg("L", SIDE, SIDE),
    "rgb.jpeg": lambda: jpeg("RGB", LONG, SHORT),
    "cmyk.jpeg": lambda: jpeg("CMYK", SIDE, SIDE // 2),
    "progressive.jpeg": lambda: jpeg("RGB", SIDE, SIDE, progressive=True),
    "scans.jpeg": many_scans,
    "exif.jpeg": jpeg_of_exif,
    "markers.jpeg": jpeg_of_markers,
    "frame.gif": lambda: gif(SIDE, SIDE),
    "frames.gif": small_gif_frames,
    "frames.gif#frame=20000": small_gif_frames,
    "comments.gif": lambda: gif(8, 8, 1, 200_000),
    "lossless.webp": lambda: webp(16_383, 10_900, lossless=True, method=0),
    "alpha.webp": lambda: webp(16_383, 10_900, lossless=True, method=0, alpha=1),
    "lossy.webp": lambda: webp(16_383, 10_900, quality=1, method=0),
    "rgb.avif": lambda: avif(SIDE),
    "box.jp2": lambda: lying_jp2("box"),
    "siz.jp2": lambda: lying_jp2("siz"),
    "box-siz.jp2": lambda: lying_jp2("box siz"),
    "box-siz-tile.jp2": lambda: lying_jp2("box siz tile"),
    "rgb.jp2": lambda: jp2(13_000, 13_000),
    "rgb-7000.jp2": lambda: jp2(7_000, 7_000),
    "tiles.jp2": lambda: jp2(13_000, 13_000, 1024),
    "rgb.tiff": lambda: tiff(SIDE, SIDE),
    "rgba.tiff": lambda: tiff(SIDE, fits(SIDE, 32), samples=4),
    "grey16.tiff": lambda: tiff(SIDE, SIDE, 16, 1),
    "int32.tiff": lambda: tiff(SIDE, SIDE, 32, 1, 2),
    "float.tiff": lambda: tiff(SIDE, SIDE, 32, 1, 3),
    "planar.tiff": lambda: tiff(SIDE, SIDE, planar=2),
    "lzw.tiff": lzw_tiff,
    "tile.tiff": lambda: tiff(64, 64, 8, 1, tile=32_768, data=deflated(1 << 30)),
    "exif.tiff": lambda: tiff(64, 64, data=deflated(64 * 64 * 3))[:4] + exif_bomb()[4:],
    "directories.tiff": tiff_of_directories,
    "png.ico": lambda: ico(png(SIDE, SIDE, 8, 6)),
    "row.ico": lambda: ico(png(178_956_970, 1, 8, 0)),
    "png.icns": lambda: icns(png(SIDE, SIDE, 8, 6)),
    "jp2.icns": lambda: icns(jp2(8_000, 8_000)),
    "rgb.psd": lambda: psd(10_000, 1_600),
    "rgba.qoi": qoi,
    "no-bits.dds": lambda: dds(0),
    "rgb.dds": lambda: dds(32),
    "bc1.dds": lambda: dds(0, b"DXT1"),
    "rle.bmp": bmp,
    "rle.pcx": pcx,
    "rle.sgi": sgi,
    "rle.sun": sun,
    "short.ppm": lambda: b"P6 13000 13000 255\n" + bytes(100),
    "plain.ppm": lambda: b"P3 13000 13000 255\n" + b"1 " * 500_000,
    "plain1.pbm": lambda: b"P1 13000 13000\n" + b"1" * 1_000_000,
    "deflated.dcm": deflated_dicom,
    "deflated-frame.dcm": lambda: deflated_frame(13_000),
    "native-short.dcm": lambda: dicom(13_000, 13_000, "1.2.840.10008.1.2.1", bytes(100)),
    "j2k.dcm": lambda: _dicom_of("jpeg2k", "4.90", (13_000, 13_000, 3), level=0),
    "j2k-grey.dcm": lambda: _dicom_of("jpeg2k", "4.90", (13_000, 13_000), level=0),
    "jpeg.dcm": lambda: _dicom_of("jpeg8", "4.50", (11_000, 11_000, 3), level=1),
    "jpegls.dcm": lambda: _dicom_of("jpegls", "4.80", (13_000, 13_000)),
    "jxl.dcm": lambda: _dicom_of("jpegxl", "4.110", (13_000, 13_000, 3), lossless=True, effort=1),
    "rle.dcm": lambda: dicom(
        13_000, 13_000, "1.2.840.10008.1.2.5",
        struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 500_000,
    ),
    "float64.nii.gz": lambda: nifti((11_000, 11_000, 1), "<f8"),
    "bytes.nii.gz": lambda: nifti((13_000, 13_000, 6), "u1"),
    "int16.nii.gz": lambda: nifti((512, 512, 1_900), "<i2"),
}  # fmt: skip


def names() -> Iterator[str]:
    yield from WORST


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
