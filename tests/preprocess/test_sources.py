"""What a source names; frames of a file, one by one and all at once; files that stay open."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from dicom_files import CINE, DEFLATED, EXPLICIT, JPEG, made
from PIL import Image
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import expansion, inputs, tf
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.loader import Input, epoch_batches
from medsiglip_jax.data.order import Order
from medsiglip_jax.embeddings import store
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.pages import contact_sheet
from medsiglip_jax.preprocess import codec as files
from medsiglip_jax.preprocess import handles, sources
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom import planes
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.load import load_images
from medsiglip_jax.preprocess.names import Frame, Range, Tile, parse, part_of
from medsiglip_jax.preprocess.parts import Parts

RNG = np.random.default_rng(0)


def reason(source, rules=Rules()):
    with pytest.raises(UnreadableImage) as caught:
        sources.read(str(source), rules=rules)
    assert str(caught.value).startswith(f"{source}: ") and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{source}: ")


# -------------------------------------------------------------------------------------- the grammar


@pytest.mark.parametrize("part", [Frame(0), Frame(299), Tile(-3, 40, 2, 448), Range(0, 12)])
@pytest.mark.parametrize("file", ["a.dcm", "/x/y#z.nii.gz", "gs://b/c.svs", "s.tar#512:100"])
def test_a_part_is_named_and_found_again(file, part):
    assert parse(part_of(file, part)) == (file, part)


def test_other_names_are_files(tmp_path):
    for name in ("a#frame=", "a#frame=-1", "a#frame=1x", "a#tile=1,2,3", "a#1:", "a#b", "#"):
        assert parse(name) == (name, None)
    odd = tmp_path / "a.png#frame=1"
    Image.fromarray(CINE[0]).save(odd, format="PNG")
    assert parse(str(odd)) == (str(odd), None)
    np.testing.assert_array_equal(sources.read(str(odd))[0], CINE[0])


# ------------------------------------------------------------------------------------------- frames


def test_frames_are_those_of_the_flag_one_by_one(cine):
    path = cine / "a.dcm"
    for n in range(7):
        pixels, facts = sources.read(part_of(str(path), Frame(n)))
        np.testing.assert_array_equal(pixels, decode(path, Rules(frame=n)))
        np.testing.assert_array_equal(pixels, CINE[n])
        assert (facts.frame, facts.frames) == (n, 7)
    assert sources.frames(str(path)) == 7 and sources.frames(str(cine / "c.png")) == 1


def test_the_size_of_a_picture_is_in_its_header(cine, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (50, 30)).save(path)
    path.write_bytes(path.read_bytes()[:60])  # without pixels
    assert sources.size(str(path)) == (50, 30)
    for source in (str(cine / "b.dcm"), part_of(str(cine / "a.dcm"), Frame(1))):
        height, width, _ = sources.read(source)[0].shape
        assert sources.size(source) == (width, height)
    path.write_bytes(b"no image, but some bytes")
    with pytest.raises(UnreadableImage):
        sources.size(str(path))


def test_mistakes_are_one_line(cine, tmp_path):
    assert reason(f"{cine}/a.dcm#frame=7") == "DICOM with 7 frames; number 7 is asked for"
    assert reason(f"{cine}/b.dcm#frame=1") == "DICOM with 1 frames; number 1 is asked for"
    assert reason(f"{cine}/c.png#frame=1") == "PNG of 1 pages; number 1 is asked for"
    assert reason(f"{cine}/none#frame=0") == "no such file"
    with pytest.raises(FileNotFoundError):
        sources.read(f"{cine}/none#frame=0")
    with pytest.raises(UnreadableImage, match="no bytes of its own"):
        sources.read_bytes(f"{cine}/a.dcm#frame=0")
    (tmp_path / "cut.dcm").write_bytes((cine / "a.dcm").read_bytes()[:-10_000])
    assert "cut off" in reason(f"{tmp_path}/cut.dcm#frame=6")


def test_parts_choose():
    assert [list(Parts(f).chosen(5)) for f in ("middle", "all", "every=2", 4, 5)] == [
        [2], [0, 1, 2, 3, 4], [0, 2, 4], [4], [],
    ]  # fmt: skip
    assert [Parts(f).step for f in ("middle", 3, "all", "every=10")] == [None, None, 1, 10]
    for wrong in ("last", "every=0", "every=", "every=1.5", -1, "ALL"):
        with pytest.raises(ValueError, match="frame is .*expected"):
            Parts(wrong)


@pytest.mark.filterwarnings("ignore:--series has no effect")
def test_a_number_of_frames_that_lies_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(planes, "Plane", None)  # a million of them take seconds
    lie, path = {"NumberOfFrames": str(1 << 20)}, tmp_path / "a.dcm"
    for syntax in (EXPLICIT, DEFLATED, JPEG):
        encoded = [b"abcd"] if syntax == JPEG else None
        path.write_bytes(made(np.zeros((4, 4), np.uint8), syntax, encoded, **lie))
        for look in (sources.frames, sources.planes):
            with pytest.raises(UnreadableImage, match="^DICOM of 1048576 frames, with bytes for"):
                look(str(path))
        for parts in (Parts("all"), Parts("all", series=True)):
            assert expansion.names([str(path)], parts) == [str(path)]
        assert "DICOM" in reason(path)


def test_every_way_to_load_takes_parts(cine):
    names = [f"{cine}/a.dcm#frame=2", f"{cine}/a.dcm#frame=5", f"{cine}/c.png"]
    want = load_images(CINE[[2, 5, 3]], 20)
    np.testing.assert_array_equal(load_images(names, 20), want)
    rows = Input((Examples(names),), Order((3,)), 20)
    for codec in (None, tf.tf_codec("big_vision")):
        (batch,) = epoch_batches(rows, 3, codec=codec)
        np.testing.assert_array_equal(batch["image"], want)
        assert batch["mask"].all()


def test_parts_of_remote_files(cine):
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/parts/a.dcm", (cine / "a.dcm").read_bytes())
    found = inputs.rows(["memory://parts"], parts=Parts("every=3"))
    assert [row.id for row in found] == [f"a.dcm#frame={n}" for n in (0, 3, 6)]
    for row, n in zip(found, (0, 3, 6), strict=True):
        np.testing.assert_array_equal(sources.read(row.source)[0], CINE[n])
    (row,) = inputs.rows(["memory://parts/a.dcm#frame=2"])
    np.testing.assert_array_equal(sources.read(row.source)[0], CINE[2])
    assert reason("memory://parts/none.dcm#frame=2") == "no such file"


def test_embed_of_frames_resumes_and_counts(cine, checkpoint, tmp_path):
    model = medsiglip_jax.load(checkpoint)
    rows = inputs.rows([cine], parts=Parts("all"))
    whole, again = tmp_path / "whole", tmp_path / "again"
    made = embed(model, rows, whole, EmbedOptions(shard_size=4))
    assert (made.embedded, made.multi_frame, made.expansion["frame"]) == (9, 0, "all")
    assert rows[2:5].parts == rows[::2].parts == rows.parts
    embed(model, rows, again, EmbedOptions(shard_size=4))
    for name in ("manifest.json", "part-00001.parquet"):
        (again / name).unlink()
    embed(model, rows, again, EmbedOptions(shard_size=4))
    for path in whole.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    with pytest.raises(FileExistsError, match="rows, rows_sha256"):
        embed(model, inputs.rows([cine], parts=Parts("every=2")), whole, EmbedOptions(shard_size=4))
    vectors = store.Embeddings(whole).gather(np.arange(9))
    single = model.encode_image(model.processor.images(list(CINE)))
    assert_close(vectors[:7], single, model_terms(model.config))
    middle = embed(model, inputs.rows([cine]), tmp_path / "middle", EmbedOptions())
    assert middle.multi_frame == 1


def test_commands_take_frames(cine, checkpoint, tmp_path, capsys):
    def run(*argv):
        code = cli.main([str(a) for a in argv])
        return code, capsys.readouterr()

    model = ["--model", checkpoint]
    code, said = run("classify", *model, "--text", "a", "--frame", "every=4", "--json", cine)
    assert code == 0, said.err
    names = [f"{cine}/{n}" for n in ("a.dcm#frame=0", "a.dcm#frame=4", "b.dcm", "c.png")]
    assert [result["image"] for result in json.loads(said.out)] == names
    code, said = run("embed", *model, "--output", tmp_path / "e", "--frame", "all", cine)
    assert code == 0, said.err
    code, said = run("search", *model, "--embeddings", tmp_path / "e", "--image", cine / "a.dcm",
                     "--frame", "every=3", "--top-k", "1", "--json")  # fmt: skip
    hits = {r["query"]: r["hits"][0]["id"] for r in json.loads(said.out)}
    assert code == 0 and hits.pop(f"{cine}/a.dcm#frame=3") in ("c.png", "a.dcm#frame=3")  # equal
    assert hits == {f"{cine}/a.dcm#frame={n}": f"a.dcm#frame={n}" for n in (0, 6)}
    assert run("embed", *model, "--output", tmp_path / "x", "--frame", "0x", cine)[0] == 2


def test_a_sheet_shows_hits_as_they_were_embedded(checkpoint, tmp_path):
    frames = np.full((4, 16, 16), 60, np.uint8) * np.arange(4, dtype=np.uint8)[:, None, None]
    path, sheet = tmp_path / "a.dcm", tmp_path / "s.png"
    path.write_bytes(made(frames, NumberOfFrames="4", Modality="US"))
    model = ["--model", str(checkpoint)]
    assert cli.main(["embed", *model, "--output", str(tmp_path / "e"), str(path)]) == 0
    assert cli.main(["search", *model, "--embeddings", str(tmp_path / "e"), "--image", str(path),
                     "--frame", "1", "--sheet", str(sheet)]) == 0  # fmt: skip
    with Image.open(sheet) as page:
        top, side, pitch = contact_sheet.MARGIN, contact_sheet.SIDE, contact_sheet.PITCH
        middles = [page.getpixel((top + n * pitch + side // 2, top + side // 2)) for n in (0, 1)]
    assert middles == [(60,) * 3, (120,) * 3]  # the query's frame, and the one in the middle


# ----------------------------------------------------------------------------- files that stay open


class Counter:
    def __init__(self, monkeypatch, module, name):
        self.count, self._lock, real = 0, threading.Lock(), getattr(module, name)

        def counted(*args):
            with self._lock:
                self.count += 1
            return real(*args)

        monkeypatch.setattr(module, name, counted)


def test_a_file_is_parsed_once_by_many_threads(cine, monkeypatch):
    from medsiglip_jax.preprocess.dicom import pixels

    parsed = Counter(monkeypatch, pixels, "open_bytes")
    names = [f"{cine}/a.dcm#frame={n}" for n in range(7)] * 20
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: sources.read(name)[0], names))
    assert parsed.count == 1
    for n, image in enumerate(found):
        np.testing.assert_array_equal(image, CINE[n % 7])


def test_a_file_that_changes_is_read_again(cine):
    path = cine / "a.dcm"
    np.testing.assert_array_equal(sources.read(f"{path}#frame=1")[0], CINE[1])
    path.write_bytes(made(CINE[::-1], Modality="US", NumberOfFrames="7") + b"\0\0")
    np.testing.assert_array_equal(sources.read(f"{path}#frame=1")[0], CINE[5])


def test_damage_is_found_once_and_failures_are_tried_again(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    calls = []

    def damaged(path):
        calls.append(path)
        raise UnreadableImage("broken")

    def failing(path):
        calls.append(path)
        raise OSError("gone")

    for opener, error, count in ((damaged, UnreadableImage, 1), (failing, OSError, 3)):
        calls.clear()
        for _ in range(3):
            with pytest.raises(error):
                handles.opened(str(tmp_path / "a"), opener)
        assert len(calls) == count


def test_few_files_are_kept(tmp_path, monkeypatch):
    opened = []

    class Big:
        nbytes = 100

    def opener(path):
        opened.append(path)
        return Big()

    paths = [str(tmp_path / str(n)) for n in range(handles.MAX_OPEN + 3)]
    for path in (*paths, *paths[3:], paths[0]):
        handles.opened(path, opener)
    assert opened == [*paths, paths[0]]
    monkeypatch.setattr(handles, "MAX_BYTES", 250)
    opened.clear()
    for name in "abccba":
        handles.opened(name, opener)
    assert opened == ["a", "b", "c", "a"]  # there is room for two


def test_presets_that_refuse_name_the_source(cine, monkeypatch):
    def refuse(image, size):
        raise UnreadableImage("too long")

    codec = files.Codec(decode, refuse)
    with pytest.raises(UnreadableImage, match=r"c\.png: too long"):
        files.load_image(f"{cine}/c.png", 10, codec)
