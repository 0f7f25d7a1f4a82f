"""Files that cost more than they are worth, or that are made to be quoted: each is one bad file."""

import io
import json
import os
import struct
import subprocess
import sys
import traceback
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import planted_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from dicom_files import J2K, made
from PIL import Image

from medsiglip_jax import cli
from medsiglip_jax.data import columns, examples, inputs
from medsiglip_jax.data.loader import Input, epoch_batches
from medsiglip_jax.data.order import Order
from medsiglip_jax.inference.manifest import RunRecord
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import facts, image, sources, tiff, xla
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom import rules as dicom_rules
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import serving
from medsiglip_jax.preprocess.load import load_images

VOLUME = Rules(volume="percentile")
WORDS = [f"Wolpertinger{n:03d}" for n in range(100)]


def reason(source, rules=VOLUME):
    with pytest.raises(UnreadableImage) as caught:
        sources.read(str(source), rules=rules)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def put(path, data):
    Path(path).write_bytes(data)
    return str(path)


# ---------------------------------------------------------------------- nothing of a file is quoted


def test_every_format_can_be_read_with_words_in_all_places(tmp_path):
    """Else the tests below would show nothing of what is read after the header."""
    for name, data in planted_files.files(WORDS[0]).items():
        source = put(tmp_path / name, data) + "#tile=0,0,0,32" * (name == "a.svs")
        assert sources.read(source, rules=VOLUME)[0].shape == (32, 32, 3), name


def test_reasons_quote_no_word_of_the_file(tmp_path, recwarn):
    """Nor does anything that a traceback of the error would print, or a warning."""
    said = []
    for n, word in enumerate(WORDS):  # some of the files for each
        rng, broken = np.random.default_rng(n), planted_files.broken(word)
        files = {**planted_files.files(word), **broken} if n < 2 else broken
        chosen = list(files)[n % 10 :: 10] if n >= 2 else files
        for name, data in ((name, files[name]) for name in chosen):
            data = planted_files.damaged(rng, data) if name not in broken or n > 50 else data
            tile = "#tile=0,0,0,32" * name.endswith((".svs", ".mrxs", ".vms"))
            try:
                sources.read(put(tmp_path / name, data) + tile, rules=VOLUME)
            except UnreadableImage as error:
                said.append("".join(traceback.format_exception(error)))
    said += [str(warning.message) for warning in recwarn]
    assert len(said) > 250
    assert not [line for line in said if "wolpertinger" in line.lower()]


def test_a_reason_keeps_what_pil_says_of_no_file(tmp_path):
    whole = planted_files.jpeg("a")
    assert "image file is truncated" in reason(put(tmp_path / "a.jpg", whole[:-300]))


# --------------------------------------------------------------------------------- bounds on images


def test_limits_of_size_are_rules_that_every_reader_follows(tmp_path):
    """Of any format, and on the command line; a run of before resumes, as it is what they were."""
    small, names = Rules(volume="percentile", max_pixels=32 * 31), planted_files.files("a")
    for name in names.keys() - {"a.svs"}:
        why = reason(put(tmp_path / name, names[name]), small)
        assert "32x32 = 1024 pixels is more than the limit of 992" in why, name
    path, page = str(tmp_path / "a.png"), str(tmp_path / "a.html")
    for flags, code in ((["--max-side", "31"], 3), (["--max-side", "32"], 0)):
        assert cli.main(["preview", path, "--output", page, *flags]) == code
    assert "max_side" not in Rules().to_dict()
    assert dicom_rules.from_dict(small.to_dict()) == small
    with pytest.raises(ValueError, match="max_side is 0; expected at least 1"):
        Rules(max_side=0)
    assert RunRecord.__dataclass_fields__["dicom"].default is None


def png(width, height, colour=0, bits=8):
    """All zeros."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    line = 1 + width * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * bits // 8
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(bytes(line * height), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def blank(mode, size, format, **options):
    out = io.BytesIO()
    Image.new(mode, size).save(out, format, **options)
    return out.getvalue()


def lying_jp2(tile):
    data = bytearray(blank("RGB", (64, 64), "JPEG2000"))
    at = data.index(b"ihdr") + 4
    data[at : at + 8] = struct.pack(">II", 13_000, 13_000)
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 13_000, 13_000)
    data[at + 16 : at + 24] = struct.pack(">II", tile, tile)
    return bytes(data)


def many_scans():
    data = blank("L", (2048, 2048), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 2000 + b"\xff\xd9"


SMALL = Rules(max_pixels=1 << 22, volume="percentile")  # in proportion, to be fast


def wide_tiles():
    """A TIFF of 32x32 whose tiles say that they are 65,520 squared."""
    out = io.BytesIO()
    tifffile.imwrite(out, planted_files.PIXELS, tile=(16, 16), photometric="rgb")
    data = out.getvalue()
    for tag in (322, 323):
        data = data.replace(
            struct.pack("<HHII", tag, 4, 1, 16), struct.pack("<HHII", tag, 4, 1, 65_520)
        )
    return data


BOMBS = {
    "blank.webp": (lambda: blank("RGB", (2048, 1600), "WEBP", lossless=True), "takes 0.1 GiB"),
    "blank.avif": (lambda: blank("RGB", (2000, 1600), "AVIF", speed=10), "takes 0.1 GiB"),
    "tile.jp2": (lambda: lying_jp2(13_000), "more than the limit"),
    "tiles.jp2": (lambda: lying_jp2(64), "more than the limit"),
    "scans.jpg": (many_scans, "decoded 20"),
    "tile.tif": (wide_tiles, "tiles of 65520x65520, larger than the image"),
    "row.ico": (
        lambda: planted_files.boxed_ico(png(66_000, 1)), "66000x1: a side is longer than the limit",
    ),
    "frame.dcm": (
        lambda: made(np.zeros((1500, 2000, 3), np.uint8), J2K, [b"\xff\x4f\xff\x51" + bytes(99)]),
        "decoding it takes 0.1 GiB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_takes_no_more_than_its_bytes_can_be_worth(tmp_path, name):
    """Memory and work are judged by the header; the same limits let real images pass."""
    make, said = BOMBS[name]
    assert said in reason(put(tmp_path / name, make()), SMALL)


@pytest.mark.parametrize(("tile", "said"), [(13_000, "decoding it takes 3."), (64, "41616 tiles")])
def test_a_header_of_jpeg_2000_over_less_data_is_refused(tmp_path, tile, said):
    assert said in reason(put(tmp_path / "a.jp2", lying_jp2(tile)))


def test_large_images_of_any_mode_are_converted_in_bands_to_the_same_pixels(monkeypatch):
    rng = np.random.default_rng(0)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK"):
        image = Image.fromarray(rng.integers(0, 256, (90, 70, 3), np.uint8)).convert(mode)
        format = "TIFF" if mode == "CMYK" else "PNG"
        out = io.BytesIO()
        options = {"transparency": 3} if mode == "P" else {}
        image.save(out, format, **options)
        expected = decode(out.getvalue())
        with monkeypatch.context() as patch:
            patch.setattr("medsiglip_jax.preprocess.pil._AT_ONCE", 1000)
            patch.setattr("medsiglip_jax.preprocess.pil._BAND", 7 * 70)
            np.testing.assert_array_equal(decode(out.getvalue()), expected)


def test_strips_are_padded_as_if_the_square_existed():
    """`serving`, to the bit, where the padding is left out: narrow, blank, and with odd sides."""
    rng = np.random.default_rng(0)
    for n, (height, width) in enumerate([(900, 41), (700, 1), (333, 80), (1200, 399), (40, 900)]):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        image = (image // 128 * 255).astype(np.uint8) if n == 2 else image
        side, size = max(height, width), (56, 224, 448)[n % 3]
        square = np.zeros((side, side, 3), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = image if n != 2 else image // 255
        expected = np.array(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(serving(image, size), expected * (255 if n == 2 else 1))


def test_directories_of_a_tiff_that_share_bytes_end():
    """Each begins 12 bytes after the one before, and has 4,000 entries."""
    data, count = bytearray(100_000), 4000
    data[:8] = b"II*\0\x08\0\0\0"
    for n in range(count):
        at = 8 + 12 * n
        struct.pack_into("<H", data, at, count)
        struct.pack_into("<I", data, at + 2 + 12 * count, at + 12)
    assert len(list(tiff.directories(io.BytesIO(bytes(data))))) < 4


# ----------------------------------------------------------------------------------- lack of memory


def exhausted(*args, **kwargs):
    raise MemoryError


PLACES = {
    "a.png": "medsiglip_jax.preprocess.pil._rgb_pixels",
    "a.jpg": "medsiglip_jax.preprocess.bytes._read",
    "a.dcm": "medsiglip_jax.preprocess.dicom.file.File.native",
    "a.nii": "medsiglip_jax.preprocess.volumes.np.memmap",
    "a.nii.gz": "medsiglip_jax.preprocess.volumes._read",
    "a.svs#tile=0,0,0,32": "medsiglip_jax.preprocess.slides._over_white",
}


@pytest.mark.parametrize("source", PLACES)
def test_a_lack_of_memory_is_one_unreadable_image(tmp_path, monkeypatch, source):
    """Where it is read, decoded or rendered; in the loader of a training run, too."""
    name = source.partition("#")[0]
    path = put(tmp_path / name, planted_files.files("a")[name]) + source[len(name) :]
    monkeypatch.setattr(PLACES[source], exhausted)
    assert reason(path) == facts.NO_MEMORY
    told = []
    input = Input((examples.Examples([path]),), Order((1,)), 8, dicom=VOLUME)
    batch = next(epoch_batches(input, 1, on_error=lambda *pair: told.append(pair)))
    assert told == [(path, facts.NO_MEMORY)] and not batch["mask"].any()


def test_a_resize_that_lacks_memory_costs_one_image(tmp_path, monkeypatch, checkpoint):
    """Which is a listed row of `embed` and `preview`, and the others are embedded."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        put(folder / name, planted_files.png("a"))
    calls = iter((exhausted, image.big_vision))
    monkeypatch.setattr(xla, "_resize", lambda *a, slow: next(calls)(*a))
    output = tmp_path / "out"
    assert (
        cli.main(["embed", "--model", str(checkpoint), "--output", str(output), str(folder)]) == 3
    )
    assert json.loads((output / "manifest.json").read_text())["embedded"] == 1
    reasons = pq.read_table(output / "errors.parquet")["reason"].to_pylist()
    assert reasons == [facts.NO_MEMORY]
    monkeypatch.setitem(image.PRESETS, "serving", exhausted)
    with pytest.raises(UnreadableImage, match=facts.NO_MEMORY):
        load_images([str(folder / "a.png")], 8, "serving")


# ---------------------------------------------------------------------------------- cells and files

CELLS = {
    "a\0b.png": "no file can have such a name", "a\0.nii.gz": "no file can have such a name",
    "a\0.svs#tile=0,0,0,9": "", "ok.bin#0:99999999999": "the file ends before byte 99999999999",
    "ok.bin#9000000000:1": "the file ends before byte 9000000001",
    "ok.bin#frame=" + "9" * 5000: "", "ok.bin#row=" + "9" * 5000 + ",a": "",
    "a" * 5000 + ".png": "File name too long", "a/" * 3000 + "b.png": "File name too long",
    "ok.bin#tile=1,2,99,99999999999": "", "dev": "not a file",
}  # fmt: skip


def test_a_bad_cell_is_one_unreadable_row(tmp_path, checkpoint):
    """Of a table; the good row beside them is embedded."""
    put(tmp_path / "ok.bin", planted_files.png("a"))
    os.symlink("/dev/zero", tmp_path / "dev")
    rows = [*CELLS, "ok.bin"]
    pq.write_table(pa.table({"image": rows}), tmp_path / "rows.parquet")
    output = tmp_path / "out"
    command = ["embed", "--model", str(checkpoint), "--output", str(output), "--volume", "ct"]
    assert cli.main([*command, str(tmp_path / "rows.parquet")]) == 3
    errors = pq.read_table(output / "errors.parquet").to_pylist()
    assert len(errors) == len(CELLS)
    for error, expected in zip(errors, CELLS.values(), strict=True):
        assert expected in error["reason"] and error["reason"], error


def test_a_range_beyond_the_file_allocates_nothing(tmp_path):
    path = put(tmp_path / "a.bin", bytes(10))
    tracemalloc.start()
    assert "the file ends before byte 4000000000" in reason(f"{path}#0:4000000000")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such file")
def test_a_file_without_size_is_empty_whatever_reading_it_gives():
    """The memory of the process: reading it fails as a disk does."""
    assert reason("/proc/self/mem") == "empty, 0 bytes"


@pytest.mark.parametrize(("name", "size"), [("a.png", 60 << 30), ("a.tif", 5 << 30)])
def test_a_file_of_gigabytes_is_refused_unread(tmp_path, name, size):
    """Sparse, so that it costs the disk nothing; a slide has to be asked for."""
    path = put(tmp_path / name, b"")
    os.truncate(path, size)
    assert reason(path) == (
        f"{size} bytes, more than the limit of {content.MAX_BYTES} for one image; is it a slide? "
        "Then use --mpp, else raise --max-bytes"
    )


def test_a_text_of_megabytes_is_one_unreadable_row(tmp_path, checkpoint, monkeypatch):
    """In a list, a table or a shard; a training run names its line."""
    monkeypatch.setattr(facts, "MAX_CHARACTERS", 200_000)
    long = "a" * 200_001
    put(tmp_path / "a.csv", f"text\n{long}\nshort\n".encode())
    put(tmp_path / "b.txt", f"{long}\nshort\n".encode())
    output = tmp_path / "out"
    command = ["embed", "--model", str(checkpoint), "--output", str(output)]
    assert cli.main([*command, str(tmp_path / "a.csv"), str(tmp_path / "b.txt")]) == 3
    errors = pq.read_table(output / "errors.parquet")["reason"].to_pylist()
    assert errors == ["a text of 200001 characters, more than the limit of 200000"] * 2
    assert json.loads((output / "manifest.json").read_text())["embedded"] == 2
    put(tmp_path / "c.csv", f"image,text\na.png,b\nb.png,{long}\n".encode())
    with pytest.raises(ValueError, match="column 'text', line 3: a text of 200001 characters"):
        examples.read(tmp_path / "c.csv")


def repeated(text, count):
    indices = pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(bytes(4 * count))])
    return pa.DictionaryArray.from_arrays(indices, pa.array([text]))


def test_tables_that_are_large_inside_are_told(tmp_path):
    """100 million empty cells, one text of 2 kB a million times, a .csv.gz of 3 GB."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.nulls(columns.MAX_ROWS + 1, pa.string())}), path)
    with pytest.raises(ValueError, match="16777217 rows, more than the limit of 16777216; split"):
        inputs.rows([path])
    pq.write_table(pa.table({"text": repeated("a" * 2200, 1_000_000)}), path, store_schema=False)
    with pytest.raises(ValueError, match="column 'text': 2200000000 bytes of text, more than"):
        inputs.rows([path])


def test_text_that_inflates_beyond_the_limit_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "MAX_BYTES", 1 << 20)
    for name, data in (
        ("a.csv.gz", planted_files.gzipped(bytes(1 << 22))),
        ("b.txt", b"a" * (1 << 21)),
    ):
        path = put(tmp_path / name, data)
        with pytest.raises(ValueError, match="more than 1048576 bytes of text; split the file"):
            columns.read_text_bytes(path)


def test_equal_pictures_of_a_table_are_kept_once(tmp_path):
    """50 kB of Parquet may hold a megabyte 2,000 times."""
    picture = planted_files.png("a") + bytes(1 << 20)
    indices = pa.array([0] * 2000, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array([picture]))
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet", store_schema=False)
    before = pa.total_allocated_bytes()
    assert sources.read(f"{tmp_path / 'a.parquet'}#row=1999,image")[0].shape == (32, 32, 3)
    assert pa.total_allocated_bytes() - before < 1 << 25


@pytest.mark.parametrize("text", ["[" * 99_999, "9" * 9_999])
def test_json_that_python_cannot_read_is_told(tmp_path, text):
    """Deep nesting, and numbers of too many digits: of a table, and of one member of a shard."""
    path = put(tmp_path / "a.jsonl", f'{{"image": {text}'.encode())
    with pytest.raises(ValueError, match="a.jsonl, line 1: "):
        inputs.rows([path])
    members = {"1.json": text.encode(), "2.png": planted_files.png("a")}
    found = inputs.rows([put(tmp_path / "a.tar", planted_files.tar(members))])
    assert "1.json: not JSON" in found.reasons


@pytest.mark.slow
@pytest.mark.torture
def test_hostile_inputs_in_processes_of_4_gb(torture):
    script = Path(__file__).parents[2] / "scripts" / "fuzz_inputs.py"
    command = [sys.executable, str(script), "--count", str(50 * torture)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_jpeg_2000_takes_time_as_its_file_is_worth():
    """PIL's decoder keeps all other threads waiting: 6 kB of 100 megapixels stopped a server."""
    with pytest.raises(UnreadableImage, match="6000x6000 JPEG 2000 of .* too much work"):
        decode(blank("L", (6000, 6000), "JPEG2000"))
    assert decode(blank("L", (2500, 2500), "JPEG2000")).shape == (2500, 2500, 3)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1500), np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "JPEG2000", quality_mode="rates", quality_layers=[100])
    strict = Rules(max_pixels=1_500_000)  # of which it may have an eighth, and more for its bytes
    assert decode(written.getvalue(), strict).shape == (1000, 1500, 3)
