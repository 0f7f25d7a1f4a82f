"""Nothing that identifies a patient is written, printed or logged by any command.

Files with known values go through every command that takes images; then every byte that was
written, also inside what is compressed or encoded, is searched for those values in many forms.
"""

import base64
import gzip
import hashlib
import io
import itertools
import json
import logging
import re
import traceback
import zipfile
from collections.abc import Iterator

import imagecodecs
import numpy as np
import planted_files
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from dicom_files import JPEG_LS, item, made, with_value
from PIL import Image, PngImagePlugin

from medsiglip_jax import cli
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom import pixels
from medsiglip_jax.preprocess.facts import UnreadableImage

RNG = np.random.default_rng(0)
NAME, NUMBER, ACCESSION, PLACE, PRIVATE = (
    "Quetzalcoatl", "MRN-7731-XQ", "ACC55019Q", "Ytterby", "Wolpertinger",
)  # fmt: skip
BORN, STUDIED = "19370213", "20190823"
UID = "9.8.7.6543210.55"
INSTANCE = itertools.count()
SECRETS = (NAME, NUMBER, ACCESSION, PLACE, PRIVATE, UID, BORN, STUDIED)


def identified(array, *args, **tags):
    """A file that says whose it is wherever it may."""
    return made(
        array, *args, private=("CREATOR", PRIVATE), PatientName=f"{NAME}^Xochitl",
        PatientID=NUMBER, PatientBirthDate=BORN, StudyDate=STUDIED, ContentDate=STUDIED,
        StudyInstanceUID=UID, SeriesInstanceUID=f"{UID}.1",
        SOPInstanceUID=f"{UID}.2.{next(INSTANCE)}",
        FrameOfReferenceUID=f"{UID}.3", InstitutionName=PLACE, AccessionNumber=ACCESSION,
        StudyDescription=f"{NAME} {PLACE}", OtherPatientIDs=NUMBER,
        RequestAttributesSequence=[item(PatientName=NAME, ScheduledProcedureStepID=ACCESSION)],
        **tags,
    )  # fmt: skip


# ------------------------------------------------------------------------------- what is looked for


def dates(day):
    year, month, date = day[:4], day[4:6], day[6:]
    for parts in ((year, month, date), (date, month, year), (month, date, year)):
        yield from (mark.join(parts) for mark in ("", "-", "/", "."))
    yield day[::-1]


def forms(secret):
    """Bytes that would give a value away, in lower case."""
    texts = [*dates(secret)] if secret in (BORN, STUDIED) else [secret]
    encoded = [secret.encode()]
    texts += [hashlib.new(name, encoded[0]).hexdigest() for name in ("md5", "sha1", "sha256")]
    texts.append(base64.b64encode(encoded[0]).decode().rstrip("="))
    for text in texts:
        yield text.lower().encode()
        for wide, rest in (("utf-16-le", 1), ("utf-32-le", 3)):  # big endian ones hold them, too
            yield text.lower().encode(wide)[:-rest]


FORMS = {secret: tuple(forms(secret)) for secret in SECRETS}


def leaks(data: bytes) -> set[str]:
    """The values that can be found in bytes, or in anything that they hold."""
    found = set()
    for content in inside(data):
        content = content.lower()
        found |= {s for s, some in FORMS.items() if any(form in content for form in some)}
    return found


def inside(data: bytes) -> Iterator[bytes]:
    """The bytes, and those of everything in them that a search in bytes would miss."""
    yield data
    if data.startswith(b"PAR1"):
        table = pq.read_table(io.BytesIO(data))
        texts = table.select([c for c in table.column_names if c != "embedding"])
        yield f"{table.schema}{table.schema.metadata}{texts.to_pylist()}".encode()
    elif data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield from inside(archive.read(name))
    elif data.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(data)) as image:
            yield repr((image.info, dict(image.getexif()))).encode()
    elif data.startswith(b"\x1f\x8b"):
        yield from inside(gzip.decompress(data))
    for match in re.finditer(rb"\x28\xb5\x2f\xfd", data):  # Zstandard: checkpoints
        yield inflated(data[match.start() :])
    for match in re.finditer(rb"base64,([A-Za-z0-9+/=]+)", data):
        yield from inside(base64.b64decode(match[1]))


def inflated(data: bytes) -> bytes:
    stream, out = pa.CompressedInputStream(pa.BufferReader(data), "zstd"), b""
    try:
        while piece := stream.read(4096):
            out += piece
    except OSError:  # the end of the frame, or no frame
        pass
    return out


def leaks_below(folder) -> dict[str, set[str]]:
    """What can be found in the names and the contents of all files below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(p.relative_to(folder)): leaks(p.read_bytes()) for p in paths}
    return {name: both for name, some in found.items() if (both := some | leaks(name.encode()))}


# ----------------------------------------------------------------------- does it find what is there


def in_png(text):
    notes, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    notes.add_text("note", text, zip=True)
    Image.new("L", (2, 2)).save(stream, "PNG", pnginfo=notes)
    return stream.getvalue()


def in_parquet(text):
    stream = io.BytesIO()
    pq.write_table(pa.table({"a": [text] * 999}), stream, compression="zstd")
    return stream.getvalue()


def in_npz(text):
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.array([text]))
    return stream.getvalue()


HIDING = {
    "text": str.encode,
    "another case": lambda text: text.upper().encode(),
    "json": lambda text: json.dumps({"a": text}).encode(),
    "utf-16": lambda text: text.encode("utf-16-be"),
    "parquet": in_parquet,
    "npz": in_npz,
    "png": in_png,
    "html": lambda text: b"src=data:image/png;base64," + base64.b64encode(in_png(text)),
    "checkpoint": lambda text: b"some" + imagecodecs.zstd_encode(text.encode() * 9) + b"more",
    "hash": lambda text: hashlib.sha256(text.encode()).hexdigest().encode(),
}


@pytest.mark.parametrize("place", HIDING)
def test_every_hiding_place_is_looked_into(place, tmp_path):
    for secret in SECRETS:
        (tmp_path / "file").write_bytes(HIDING[place](secret))
        assert leaks_below(tmp_path) == {"file": {secret}}
        (tmp_path / "file").write_bytes(HIDING[place]("nobody"))
        assert not leaks_below(tmp_path)
    assert leaks(b"born 13.02.1937") == {BORN} == leaks(b"31207391")
    (tmp_path / f"{NUMBER}.txt").write_text("")
    assert leaks_below(tmp_path) == {f"{NUMBER}.txt": {NUMBER}}


# ----------------------------------------------------------------------------------- the commands


def contents():
    """Files that can be read, and files whose damage is a secret; in their names there is none."""
    stored = RNG.integers(0, 3000, (30, 30)).astype(np.int16)
    tags = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "WindowCenter": "1"}
    tags |= {"WindowWidth": "4", "NumberOfFrames": "1", "SpecificCharacterSet": "ISO_IR 100"}
    good = identified(stored, Modality="CT", **tags)
    cine = RNG.integers(0, 256, (4, 20, 20)).astype(np.uint8)
    streams = [bytes(imagecodecs.jpegls_encode(x)) for x in cine]
    coded = identified(cine, JPEG_LS, streams, NumberOfFrames="4")
    yield "good", good
    yield "cine", identified(cine, Modality="US", NumberOfFrames="4", BurnedInAnnotation="YES")
    yield "coded", coded
    yield "short", good[:-100]
    yield "early", good[: good.index(b"\x28\x00\x10\x00")]
    yield "coded-cut", coded[: coded.index(streams[2][:20]) + 9]
    yield "more", identified(cine, NumberOfFrames="40")
    yield "syntax", identified(stored, "1.2.840.10008.1.2.4.100", [b"no stream"])
    for n, (tag, vr) in enumerate([
        (b"\x28\x00\x08\x00", b"IS"), (b"\x28\x00\x50\x10", b"DS"), (b"\x28\x00\x52\x10", b"DS"),
        (b"\x08\x00\x05\x00", b"CS"), (b"\x08\x00\x60\x00", b"CS"), (b"\x28\x00\x04\x00", b"CS"),
    ]):  # fmt: skip
        yield f"malformed{n}", with_value(good, tag, vr, NAME)


@pytest.fixture
def given(tmp_path):
    """A folder of such files, and one of files that can all be read."""
    (tmp_path / "in").mkdir()
    for name, content in contents():
        (tmp_path / "in" / f"{name}.dcm").write_bytes(content)
    (tmp_path / "labelled").mkdir()
    for n in range(8):
        array = RNG.integers(0, 999, (20, 20)).astype(np.uint16)
        (tmp_path / "labelled" / f"{n}.dcm").write_bytes(identified(array, Modality="DX"))
    return tmp_path


@pytest.fixture
def run(tmp_path, checkpoint, capfd, caplog):
    """Runs a command on the files; checks what it printed and logged, and whatever it has written.

    Outputs belong into the folder `out`.
    """
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "jax")  # which tells each step of each compilation
    caplog.set_level(logging.DEBUG, "pydicom")
    (tmp_path / "out").mkdir()

    def call(*argv, model=True, leaking=False):
        flags = ["--model", str(checkpoint)] if model else []
        code = cli.main([*map(str, argv), *flags])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        found = leaks(f"{printed.out}\n{printed.err}\n{caplog.text}".encode())
        below = leaks_below(tmp_path / "out")
        caplog.clear()
        assert leaking or not (found or below), (argv, found, below)
        return code, printed.out + printed.err, found, below

    return call


# What is printed differs, not what is written: the second run of a command resumes or is repeated.
PRINTED = ((), ("--json",))


@pytest.mark.filterwarnings("default")
def test_classify_embed_and_search(given, run):
    folder, out = given / "in", given / "out"
    files = sorted(folder.iterdir())
    query = ["search", "--embeddings", out / "run", "--text", "a b"]
    for flags, rules, suffix, table in zip(
        PRINTED, ("dicom", "official"), ("html", "png"), ("csv", "parquet"), strict=True
    ):
        code, printed, *_ = run("classify", "--text", "a b", "--dicom-rules", rules, *flags, *files)
        assert code == 3 and "malformed" in printed
        code, printed, *_ = run("embed", "--output", out / "run", *flags, folder)
        assert code == 3 and "annotation" in printed
        output = out / f"hits.{table}"
        code, *_ = run(*query, *flags, "--image", files[2], "--sheet", out / f"hits.{suffix}",
                       "--output", output)  # fmt: skip
        assert code == 0 and output.exists()
        assert run("search", "--embeddings", out / "run", "--self", "--threshold", "0.1",
                   "--output", out / "pairs.csv", *flags, model=False)[0] == 0  # fmt: skip
    # classify has met every kind of damage; here those of a tag, of pixels and of a coded stream.
    for name in ("good", "malformed0", "short", "coded-cut"):
        path = folder / f"{name}.dcm"
        assert run(*query, "--image", path, "--sheet", out / "sheet.html")[0] in (0, 2)


@pytest.mark.filterwarnings("default")
def test_patients_are_hashed_unless_they_are_to_be_kept(given, run, monkeypatch):
    monkeypatch.setenv("MEDSIGLIP_JAX_SALT", "known to nobody but this test")
    embed, out = ["embed", given / "labelled", given / "in", "--output"], given / "out"
    for n, flags in enumerate([["--groups"], ["--series", "--frame", "all"]]):
        assert run(*embed, out / f"{n}", *flags)[0] == 3
        found = pq.read_table(out / f"{n}" / "part-00000.parquet")
        for column in ("patient", "study", "series"):
            (value,) = set(found[column].to_pylist()) - {None}
            assert re.fullmatch("[0-9a-f]{16}", value)
    code, _, printed, below = run(*embed, out / "kept", "--keep-uids", leaking=True)
    assert (code, printed, below) == (3, set(), {"kept/part-00000.parquet": {NUMBER, UID}})


@pytest.mark.slow
def test_slides(real_data, run, tmp_path):
    """A real one in DICOM, whole and cut off."""
    slide = pydicom.dcmread(real_data / "images" / "multiframe_camelyon_challenge_image.dcm")
    slide.PatientName, slide.PatientID, slide.PatientBirthDate = NAME, NUMBER, BORN
    slide.StudyInstanceUID, slide.SeriesInstanceUID, slide.StudyDate = UID, f"{UID}.1", STUDIED
    slide.AccessionNumber, slide.InstitutionName = ACCESSION, PLACE
    slide.save_as(tmp_path / "slide.dcm")
    content = (tmp_path / "slide.dcm").read_bytes()
    (tmp_path / "cut").mkdir()  # beside the other, it would be taken for a level of that
    (tmp_path / "cut" / "cut.dcm").write_bytes(content[: len(content) // 2])
    tiles, out = ["--mpp", "29", "--tissue", "0"], tmp_path / "out"
    heatmap = ["classify", "--text", "a b", *tiles, "--heatmap", out / "map.png"]
    both = [tmp_path / "slide.dcm", tmp_path / "cut" / "cut.dcm"]
    for flags in PRINTED:
        assert [run(*heatmap, *flags, path)[0] for path in both] == [0, 2]
        assert run("embed", "--output", out / "tiles", *tiles, *flags, *both)[0] == 3
        preview = ["preview", "--output", out / "s.html", *tiles, *flags]
        assert run(*preview, *both, model=False)[0] == 3


@pytest.mark.filterwarnings("default")
def test_preview(given, run):
    for suffix in ("html", "png"):
        for rules, flags in zip(("dicom", "official"), PRINTED, strict=True):
            output = given / "out" / f"{rules}.{suffix}"
            code, printed, *_ = run("preview", given / "in", "--size", "64", "--dicom-rules", rules,
                                    "--output", output, *flags, model=False)  # fmt: skip
            assert code == 3 and output.exists() and "NumberOfFrames is malformed" in printed
    assert "burned in" in (given / "out" / "dicom.html").read_text()


@pytest.mark.filterwarnings("default")
def test_explain(given, run):
    explain = ["explain", given / "in", "--text", "a b", "--steps", "4", "--output"]
    for n, flags in enumerate(PRINTED):
        output = given / "out" / f"{n}"
        code, printed, *_ = run(*explain, output, *flags)
        assert code == 3 and "annotation" in printed and (output / "explain.json").exists()
        assert (output / "good.npz").exists() and not (output / "short.npz").exists()


@pytest.mark.filterwarnings("default")
def test_probe(given, run):
    out = given / "out"
    rows = [f"{n}.dcm,{'ab'[n % 2]},{'train' if n < 4 else 'val'}" for n in range(8)]
    (out / "labels.csv").write_text("\n".join(["id,label,split", *rows]) + "\n")
    assert run("embed", "--output", out / "run", given / "labelled")[0] == 0
    fit = ["probe", "fit", "--data", out / "labels.csv", "--embeddings", out / "run", "--label"]
    predict = ["probe", "predict", "--probe", out / "p.npz"]
    for flags in PRINTED:
        assert run(*fit, "label", "--output", out / "p.npz", *flags, model=False)[0] == 0
        assert run(*predict, *flags, given / "in")[0] == 3
        assert run(*predict, "--embeddings", out / "run", "--output", out / "scores.parquet",
                   *flags, model=False)[0] == 0  # fmt: skip


TASK = """
title = "One finding"
source = "nowhere"
trained_on = "no"
kind = "multi_label"
score = "pos_minus_neg"
prompts_source = "made up"
[data]
adapter = "csv"
group = "patient"
attributes = { sex = "sex", age = "age" }
[[data.tables]]
file = ["labels.csv"]
[data.images]
path = ["{image}"]
[[classes]]
name = "Alpha"
present = ["photo of a a", "photo of a b"]
absent = ["scan of a a"]
"""


@pytest.mark.filterwarnings("ignore:among the test images are")
def test_evaluate(given, run):
    names = [f"labelled/{n}.dcm" for n in range(8)]
    names += [f"in/{path.name}" for path in sorted((given / "in").iterdir())]
    rows = [f"{name},{n % 2},p{n},F,40" for n, name in enumerate(names)]
    (given / "labels.csv").write_text("\n".join(["image,Alpha,patient,sex,age", *rows]) + "\n")
    (given / "task.toml").write_text(TASK)
    task = ["evaluate", "--task", given / "task.toml", "--data", given, "--resamples", "50"]
    assert run(*task, "--output", given / "out" / "stopped")[0] == 2  # names the unreadable
    for flags in PRINTED:
        code, printed, *_ = run(*task, "--output", given / "out" / "e", "--allow-missing", *flags)
        assert code == 3 and "unreadable" in printed
    assert (given / "out" / "e" / "report.html").exists()


RECIPE = """
from ml_collections import ConfigDict
def get_config(arg=None):
    return ConfigDict(dict(
        init={init!r}, loader="pil", batch_size=8, total_steps=2, log_every=1, mesh=dict(data=1),
        data=dict(path={rows!r}), validation=0.25,
    ))
"""


@pytest.mark.slow
def test_finetune(given, run, checkpoint):
    names = [f"labelled/{n}.dcm" for n in range(8)]
    names += [f"in/{path.name}" for path in sorted((given / "in").iterdir())]
    rows = [f"{name},photo of a {'abc'[n % 3]}" for n, name in enumerate(names)]
    (given / "rows.csv").write_text("\n".join(["image,text", *rows]) + "\n")
    recipe = RECIPE.format(init=str(checkpoint), rows=str(given / "rows.csv"))
    (given / "recipe.py").write_text(recipe)
    out = given / "out" / "run"
    tune = ["finetune", "--config", given / "recipe.py", "--workdir", out]
    assert [run(*tune, *flags, model=False)[0] for flags in PRINTED] == [3, 3]
    assert "malformed" in (out / "unreadable.jsonl").read_text()
    written = {path.name for path in out.iterdir()}
    assert {"metrics.jsonl", "checkpoints", "export", "report.html", "config.json"} <= written


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_words_in_files_of_every_format(run, tmp_path, caplog):
    """In comments, tags, descriptions and headers, also where these make a file unreadable."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, data in {**planted_files.files(NAME), **planted_files.broken(NUMBER)}.items():
        if not name.endswith(".tar"):
            (folder / name).write_bytes(data)
    caplog.clear()  # of what was said while they were made
    shown = ["--volume", "ct", "--mpp", "1", "--tissue", "0"]
    files = sorted(folder.iterdir())
    for flags, suffix in zip(PRINTED, ("html", "png"), strict=True):
        page = out / f"page.{suffix}"
        assert run("preview", folder, "--output", page, *shown, *flags, model=False)[0] == 3
        assert run("classify", "--text", "a b", *shown, *flags, *files)[0] == 3
        assert run("embed", "--output", out / "run", *shown, *flags, folder)[0] == 3
        for path in (folder / "width.ppm", folder / "a.png"):
            query = ["search", "--embeddings", out / "run", "--image", path, *flags]
            assert run(*query)[0] in (0, 2)


def test_no_cause_of_an_error_says_more_than_the_error(given):
    for path in (given / "in").iterdir():
        try:
            decode(path)
        except UnreadableImage as error:
            assert not leaks("".join(traceback.format_exception(error)).encode())


def test_a_decoder_that_tells_would_be_found_out(given, run, monkeypatch):
    def telling(data):
        raise UnreadableImage(f"cannot read {pydicom.dcmread(io.BytesIO(data)).PatientName}")

    monkeypatch.setattr(pixels, "open_bytes", telling)
    path, out = given / "in" / "good.dcm", given / "out"
    code, _, found, below = run("classify", "--text", "a", path, leaking=True)
    assert (code, found, below) == (3, {NAME}, {})
    code, _, _, below = run("embed", "--output", out / "run", path, leaking=True)
    assert code == 3
    assert below == {"run/errors.parquet": {NAME}, "run/part-00000.parquet": {NAME}}
    preview = ["preview", path, "--output", out / "sheet.html", "--size", "9"]
    code, _, found, below = run(*preview, model=False, leaking=True)
    assert (code, found, below["sheet.html"]) == (3, {NAME}, {NAME})
