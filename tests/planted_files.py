"""Small files of every format with words of one's own wherever the format lets one write any."""

import io
import struct
import tarfile
import zlib

import imagecodecs
import nibabel
import numpy as np
import tifffile
from damage import flipped
from dicom_files import J2K, made
from PIL import Image, PngImagePlugin, TiffImagePlugin

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
# What a slide's name may look like: files that only their suffix makes a slide or a volume.
BY_SUFFIX = (".svs", ".nii", ".nii.gz")


def files(word: str) -> dict[str, bytes]:
    """Name -> content. All of them can be read, the slide where OpenSlide is installed."""
    return {
        "a.png": png(word), "a.jpg": jpeg(word), "a.tif": tiff(word), "a.gif": gif(word),
        "a.bmp": saved("BMP") + word.encode(), "a.ppm": netpbm(word), "a.webp": saved(
            "WEBP", lossless=True, exif=exif(word), xmp=xmp(word)
        ),
        "a.avif": saved("AVIF", exif=exif(word), xmp=xmp(word)), "a.jp2": jpeg_2000(word),
        "a.ico": boxed_ico(png(word)), "a.icns": icns(word), "a.psd": psd(word),
        "a.pcx": saved("PCX") + word.encode(), "a.sgi": sgi(word), "a.ras": sun(word),
        "a.qoi": bytes(imagecodecs.qoi_encode(PIXELS)) + word.encode(), "a.dds": dds(word),
        "a.dcm": dicom(word), "j2k.dcm": dicom(word, J2K), "a.nii": nifti(word),
        "a.nii.gz": gzipped(nifti(word)), "a.svs": slide(word),
    }  # fmt: skip


def broken(word: str) -> dict[str, bytes]:
    """Name -> content that cannot be read, for a reason that is made of the word."""
    w = word.encode()
    return {
        "width.ppm": b"P6 " + w + b" 5 255\n" + bytes(75), "depth.ppm": b"P6 5 5 " + w + b"\n",
        "token.pgm": b"P2 2 2 255\n1 2 " + w + b" 4\n", "bit.pbm": b"P1 2 2 1 0 " + w,
        "tuple.pam": b"P7\nWIDTH 2\nTUPLTYPE " + w + b"\nENDHDR\n", "scale.pfm": b"Pf 2 2 " + w,
        "mode.qoi": b"qoif" + w, "bits.bmp": b"BM" + w * 9, "tags.tif": b"II*\0\x08\0\0\0" + w * 9,
        "boxes.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + w * 9, "chunk.png": saved("PNG")[:33] + w * 9,
        "fourcc.dds": dds(word)[:76] + struct.pack("<II", 32, 4) + w[:4] + bytes(44),
        "marker.jpg": b"\xff\xd8\xff\xe0\0\x10" + w * 9, "type.avif": b"\0\0\0\x20ftypavif" + w * 9,
        "blocks.icns": b"icns\0\0\1\0" + w * 9, "a.txt.png": w * 9, "mode.psd": b"8BPS" + w * 9,
        "chunks.webp": b"RIFF\0\1\0\0WEBP" + w * 9, "head.dcm": bytes(128) + b"DICM" + w * 99,
        "head.nii": w * 99, "head.svs": w * 99, "number.dcm": dicom(word, Rows=None, number=word),
        "slide.mrxs": w * 9, "set.vms": b"[Virtual Microscope Specimen]\nNoLayers=" + w,
        "head.tar": w * 99, "json.tar": tar({"1.json": b'{"caption": ' + w, "1.png": w}),
    }  # fmt: skip


def saved(format: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, format, **options)
    return out.getvalue()


def exif(word: str) -> bytes:
    tags = Image.Exif()
    for tag in (0x010D, 0x010E, 0x010F, 0x0131, 0x013B, 0x8298, 0x9C9C):
        tags[tag] = word
    return tags.tobytes()


def xmp(word: str) -> bytes:
    return f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{word}</x:xmpmeta>".encode()


def png(word: str) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", word)
    notes.add_text(word, word, zip=True)
    notes.add_itxt("Author", word, "en", word)
    notes.add(b"teSt", word.encode())
    return saved("PNG", pnginfo=notes, exif=exif(word))


def jpeg(word: str) -> bytes:
    return saved("JPEG", comment=word.encode(), exif=exif(word), xmp=xmp(word))


def tiff(word: str) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (269, 270, 271, 305, 315, 316, 33432, 65000):
        tags[tag] = word
        tags.tagtype[tag] = 2
    return saved("TIFF", tiffinfo=tags)


def gif(word: str) -> bytes:
    return saved("GIF", comment=word.encode())


def netpbm(word: str) -> bytes:
    return f"P6 # {word}\n32 32 # {word}\n255\n".encode() + PIXELS.tobytes()


def jpeg_2000(word: str) -> bytes:
    """With an XML box before the code stream, and a comment after it."""
    data, note = saved("JPEG2000"), word.encode()
    at = data.index(b"jp2c") - 4
    box = struct.pack(">I4s", 8 + len(note), b"xml ") + note
    return data[:at] + box + data[at:] + box


def boxed_ico(inner: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(inner), 22) + inner


def icns(word: str) -> bytes:
    """An icon of 32 squared, and a block that nothing knows."""
    inner = png(word)
    blocks = struct.pack(">4sI", b"ic11", 8 + len(inner)) + inner
    blocks += struct.pack(">4sI", b"name", 8 + len(word)) + word.encode()
    return struct.pack(">4sI", b"icns", 8 + len(blocks)) + blocks


def psd(word: str) -> bytes:
    """With a resource of a name, as photographers' captions are."""
    name = bytes([len(word)]) + word.encode() + bytes(1 - len(word) % 2)
    resource = b"8BIM" + struct.pack(">H", 1028) + name + struct.pack(">I", len(word))
    resource += word.encode().ljust(len(word) + len(word) % 2, b"\0")
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 32, 32, 8, 3) + bytes(4)
    sections = struct.pack(">I", len(resource)) + resource + bytes(4) + struct.pack(">H", 0)
    return head + sections + np.moveaxis(PIXELS, 2, 0).tobytes()


def sgi(word: str) -> bytes:
    data = saved("SGI")
    return data[:24] + word.encode().ljust(80, b"\0")[:80] + data[104:]


def sun(word: str) -> bytes:
    head = struct.pack(">8I", 0x59A66A95, 32, 32, 24, PIXELS.nbytes, 1, 0, 0)
    return head + PIXELS[..., ::-1].tobytes() + word.encode()


def dds(word: str) -> bytes:
    data = saved("DDS")
    return data[:32] + word.encode().ljust(44, b"\0")[:44] + data[76:]


def dicom(word: str, syntax: str = "1.2.840.10008.1.2.1", number: str = "", **_) -> bytes:
    streams = [bytes(imagecodecs.jpeg2k_encode(PIXELS[..., 0], codecformat="j2k"))]
    tags = dict.fromkeys(("PatientID", "StudyDescription", "ImageComments", "StationName"), word)
    data = made(
        PIXELS[..., 0], syntax, *([streams] if syntax == J2K else []), private=("CREATOR", word),
        PatientName=word, Manufacturer=word, ProtocolName=word, NumberOfFrames="1", **tags,
    )  # fmt: skip
    if number:  # where a number of frames is expected
        at = data.index(b"\x28\0\x08\0IS") + 6
        length = len(number) + len(number) % 2
        value = struct.pack("<H", length) + number.ljust(length).encode()
        data = data[:at] + value + data[at + 4 :]
    return data


def nifti(word: str) -> bytes:
    header = nibabel.Nifti1Header()
    for field, most in (("descrip", 80), ("aux_file", 24), ("db_name", 18), ("intent_name", 16)):
        header[field] = word.encode()[:most]
    image = nibabel.Nifti1Image(PIXELS.astype(np.int16), np.eye(4), header)
    return image.to_bytes()


def gzipped(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def slide(word: str) -> bytes:
    out = io.BytesIO()
    pixels = np.tile(PIXELS, (16, 16, 1))
    note = (
        f"Aperio Image Library {word}\n512x512 [0,0 512x512] |AppMag = 20|MPP = 0.5|User = {word}"
    )
    tifffile.imwrite(
        out, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", description=note,
        metadata=None, software=word,
    )  # fmt: skip
    return out.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes `damage.flipped`, mostly near the start."""
    return flipped(rng, data, int(rng.choice([64, 400, len(data)])))
