"""The contact sheet of the model's inputs: every pixel of them, and what is said about each."""

import base64
import html
import io
import json
import re
import subprocess
import sys
import tarfile

import imagecodecs
import numpy as np
import pytest
from dicom_files import JPEG_LS, item, lut, made
from PIL import Image

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import inputs
from medsiglip_jax.inference.preview import PreviewOptions, preview
from medsiglip_jax.pages import contact_sheet
from medsiglip_jax.preprocess.decode import decode_with_facts
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.load import load_images

RNG = np.random.default_rng(0)
HU = {"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "-1024"}


@pytest.fixture
def folder(tmp_path):
    """Pictures and DICOM of several kinds; one file is damaged, one is of several frames."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(RNG.integers(0, 256, (30, 50, 3), np.uint8)).save(folder / "a <b>.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (9, 7), "red").save(folder / "b.jpg", exif=turned)
    hu = RNG.integers(0, 3000, (60, 40)).astype(np.int16)
    (folder / "c.dcm").write_bytes(made(hu, BurnedInAnnotation="YES", **HU))
    cine = RNG.integers(0, 256, (9, 40, 70, 3)).astype(np.uint8)
    (folder / "d.dcm").write_bytes(made(cine, Modality="US", NumberOfFrames="9"))
    (folder / "e.dcm").write_bytes(made(hu, **HU)[:-999])
    return folder


@pytest.fixture
def call(capsys):
    def run(*argv):
        code = cli.main(["preview", *(str(a) for a in argv)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def shown(page):
    """The pictures of an HTML sheet."""
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format == "PNG"
            yield np.asarray(image)


def captions(page):
    found = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    return [[html.unescape(part) for part in re.split("<[^>]+>", text) if part] for text in found]


@pytest.mark.parametrize("preprocess", ["big_vision", "serving"])
def test_pictures_are_the_inputs_of_the_model_to_the_bit(
    folder, call, checkpoint, tmp_path, preprocess
):
    flags = [folder, "--preprocess", preprocess, "--ct-window", "350/40", "--frame", 2]
    code, _, _ = call(*flags, "--output", tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    paths = [folder / name for name in ("a <b>.png", "b.jpg", "c.dcm", "d.dcm")]
    rules = Rules(ct_window=(350, 40), frame=2)
    with pytest.warns(UserWarning, match="1 of 4"):
        expected = load_images(paths, 448, preprocess, dicom=rules)
    np.testing.assert_array_equal(list(shown(page)), expected)
    assert code == 3 and expected.dtype == np.uint8
    call(*flags, "--size", 28, "--output", tmp_path / "small.html")
    with pytest.warns(UserWarning, match="1 of 4"):
        expected = medsiglip_jax.load(checkpoint).processor.images(paths, preprocess, rules)
    np.testing.assert_array_equal(list(shown((tmp_path / "small.html").read_text())), expected)


def test_what_is_printed_under_each(folder, call, tmp_path):
    code, out, err = call(folder, "--size", 32, "--output", tmp_path / "sheet.html")
    assert captions((tmp_path / "sheet.html").read_text()) == [
        ["a <b>.png", "50x30 to 32x32, big_vision"],
        ["b.jpg", "9x7 to 32x32, big_vision", "EXIF orientation 6, not applied"],
        ["c.dcm", "40x60 to 32x32, big_vision",
         "modality CT, rules dicom: W/L 2250/-100 350/40 80/40",
         "annotation, which may identify people, is burned in"],
        ["d.dcm", "70x40 to 32x32, big_vision", "modality US, rules dicom: colours",
         "frame 4 of 9, from 0"],
        ["e.dcm"],
    ]  # fmt: skip
    why = "DICOM with fewer pixels than it says: cut off"
    page = (tmp_path / "sheet.html").read_text()
    assert f"<p>unreadable: {why}</p>" in page and "http" not in page and 'src="/' not in page
    assert (code, err) == (3, "")
    assert out == f"{folder}/e.dcm: {why}\n{tmp_path}/sheet.html: 5 images, 1 unreadable\n"


def test_grey_of_12_bits_in_16_is_said_to_be_dark_until_it_is_stretched(call, tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(path)
    argv = [path, "--size", 64, "--output", tmp_path / "sheet.html", "--json"]
    for choice, most, said in [
        ([], 16, "1 images of 16 bits come out dark"),
        (["--grey16", "stretch"], 255, ""),
        (["--grey16", "full"], 16, ""),
    ]:
        code, out, err = call(*argv, *choice)
        (image,) = json.loads(out)["images"]
        assert code == 0 and said in err and bool(err) == image["dark"] == bool(said)
        (pixels,) = shown((tmp_path / "sheet.html").read_text())
        assert np.asarray(pixels).max() == most
    code, _, err = call(*argv, "--grey16", "auto")
    assert code == 2 and "grey16 is 'auto'; expected one of stretch, full" in err


def test_json_is_what_is_printed(folder, call, tmp_path):
    code, out, _ = call(folder, "--size", 32, "--output", tmp_path / "sheet.png", "--json")
    found = json.loads(out)
    assert code == 3 and found["left_out"] == 0 and found["dicom"] == Rules().to_dict()
    rows = inputs.rows([folder])
    assert [(x["id"], x["source"]) for x in found["images"]] == [(r.id, r.source) for r in rows]
    assert found["images"][3] == {
        "id": "d.dcm", "source": str(folder / "d.dcm"), "width": 70, "height": 40, "frame": 4,
        "seen": "modality US, rules dicom: colours", "frames": 9, "burned_in": False,
        "orientation": 1, "dark": False,
    }  # fmt: skip
    assert found["images"][4]["error"].startswith("DICOM with fewer pixels")


WINDOW = {"WindowCenter": ["40", "1000.5"], "WindowWidth": ["400", "2000"]}
CURVE = [lut(0, range(256))]


@pytest.mark.parametrize(("tags", "rules", "words"), [
    (HU, {}, "modality CT, rules dicom: W/L 2250/-100 350/40 80/40"),
    (HU, {"ct_window": (350, -1000)}, "modality CT, rules dicom: W/L 350/-1000"),
    ({"Modality": "MR", **WINDOW}, {}, "modality MR, rules dicom: W/L 400/40"),
    ({"Modality": "MR", **WINDOW}, {"window": 1}, "modality MR, rules dicom: W/L 2000/1000.5"),
    ({"Modality": "MR", "VOILUTFunction": "SIGMOID", **WINDOW}, {},
     "modality MR, rules dicom: W/L 400/40 sigmoid"),
    ({"Modality": "DX", "VOILUTSequence": CURVE, **WINDOW}, {},
     "modality DX, rules dicom: VOI LUT of 256 entries"),
    ({"Modality": "DX", "PhotometricInterpretation": "MONOCHROME1"}, {},
     "modality DX, rules dicom: 0 to 99, percentiles 0.5 and 99.5, inverted"),
    ({"SharedFunctionalGroupsSequence": [item(FrameVOILUTSequence=[item(
        WindowCenter="7", WindowWidth="9")])]}, {}, "modality OT, rules dicom: W/L 9/7"),
    ({"Modality": "DOE JOHN", "VOILUTFunction": "DOE JOHN", **WINDOW}, {},
     "modality of another name, rules dicom: W/L 400/40"),
    ({"Modality": "", **WINDOW}, {}, "modality none, rules dicom: W/L 400/40"),
    (HU, {"name": "official"}, "modality CT, rules official: W/L 2500/100"),
    ({"Modality": "CR", "WindowCenter": "7", "WindowWidth": "9"}, {"name": "official"},
     "modality CR, rules official: W/L 9/7, stretched"),
    ({"Modality": "CR", "PhotometricInterpretation": "MONOCHROME1"}, {"name": "official"},
     "modality CR, rules official: stretched, inverted"),
    ({"Modality": "GM"}, {"name": "official"}, "modality GM, rules official: as stored"),
])  # fmt: skip
def test_the_window_that_was_used_in_words(tags, rules, words):
    stored = np.arange(100, dtype=np.uint16).reshape(10, 10)
    stored = np.repeat(np.repeat(stored, 4, 0), 4, 1)  # or a percentile is no extreme
    assert decode_with_facts(made(stored, **tags), rules=Rules(**rules))[1].seen == words


def test_colours_in_words():
    rgb = RNG.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    coded = made(rgb, JPEG_LS, [bytes(imagecodecs.jpegls_encode(rgb))], Modality="XC")
    assert decode_with_facts(coded)[1].seen == "modality XC, rules dicom: colours"
    tags = {f"{c}PaletteColorLookupTableDescriptor": [4, 0, 8] for c in ("Red", "Green", "Blue")}
    tags |= {f"{c}PaletteColorLookupTableData": bytes(4) for c in ("Red", "Green", "Blue")}
    palette = made(rgb[..., 0] % 4, PhotometricInterpretation="PALETTE COLOR", **tags)
    assert "palette" in decode_with_facts(palette)[1].seen


def test_a_png_shows_the_same_pixels(folder, tmp_path):
    sheet = tmp_path / "sheet.png"
    preview(inputs.rows([folder]), sheet, PreviewOptions(size=200))
    with Image.open(sheet) as image:
        page = np.asarray(image)
    with pytest.warns(UserWarning):
        expected = load_images([folder / n for n in ("a <b>.png", "c.dcm", "d.dcm")], 200)
    pitch, margin = 200 + contact_sheet.PITCH - contact_sheet.SIDE, contact_sheet.MARGIN
    for n, want in zip((0, 2, 3), expected, strict=True):
        left = margin + n * pitch
        np.testing.assert_array_equal(page[margin : margin + 200, left : left + 200], want)
        words = page[margin + 200 : margin + 200 + contact_sheet.LEADING, left : left + 200]
        assert (words < 128).any()
    gone = page[margin : margin + 200, margin + 4 * pitch :][:, :200].reshape(-1, 3)
    assert 2 < len(np.unique(gone, axis=0)) < 256  # text


def test_hits_are_drawn_by_the_rules_of_their_run(folder, tmp_path):
    results = [{"query": "q", "hits": [{"id": "c", "source": str(folder / "c.dcm"), "score": 0.5}]}]
    for rules, grey in ((Rules(), False), (Rules(ct_window=(350, 40)), True)):
        contact_sheet.write(tmp_path / "hits.png", results, dicom=rules)
        with Image.open(tmp_path / "hits.png") as image:
            page = np.asarray(image).astype(int)
        top, left = contact_sheet.MARGIN + 40, contact_sheet.MARGIN + contact_sheet.PITCH + 40
        picture = page[top : top + 80, left : left + 80]
        assert (np.ptp(picture, axis=2).max() == 0) == grey and np.ptp(picture) > 100


def test_limits(folder, call, tmp_path):
    flags = [folder, "--size", 16, "--output", tmp_path / "s.html", "--json"]
    code, out, err = call(*flags, "--limit", 2)
    assert [x["id"] for x in json.loads(out)["images"]] == ["a <b>.png", "b.jpg"] and code == 0
    assert err == "3 more images are not shown (--limit)\n"
    drawn = set()
    for seed in range(4):
        found = json.loads(call(*flags, "--limit", 2, "--seed", seed)[1])
        ids = tuple(x["id"] for x in found["images"])
        assert found["left_out"] == 3 and len(set(ids)) == 2 and ids == tuple(sorted(ids))
        drawn |= set(ids)
    again = json.loads(call(*flags, "--limit", 2, "--seed", seed)[1])
    assert again == found
    assert len(drawn) == 5


def test_parts_of_files(folder, call, tmp_path):
    flags = [folder / "d.dcm", "--frame", "every=4", "--size", 16, "--output", tmp_path / "s.html"]
    found = json.loads(call(*flags, "--json")[1])["images"]
    assert [(x["id"], x["frame"]) for x in found] == [(f"d.dcm#frame={n}", n) for n in (0, 4, 8)]
    expected = [load_images(folder / "d.dcm", 16, dicom=Rules(frame=n))[0] for n in (0, 4, 8)]
    np.testing.assert_array_equal(list(shown((tmp_path / "s.html").read_text())), expected)


def test_manifests_and_texts(folder, call, tmp_path):
    (tmp_path / "rows.csv").write_text("image,text\nin/c.dcm,a scan\nin/gone.png,another\n")
    code, out, _ = call(tmp_path / "rows.csv", "--size", 16, "--output", tmp_path / "s.html",
                        "--json")  # fmt: skip
    found = json.loads(out)["images"]
    assert code == 3 and [x["id"] for x in found] == ["in/c.dcm", "in/gone.png"]
    assert found[1]["error"] == "no such file"
    (tmp_path / "lines.txt").write_text("a\nb\n")
    code, out, err = call(tmp_path / "lines.txt", "--output", tmp_path / "s.html")
    assert (code, out, err) == (
        2, "", "medsiglip-jax preview: no images among the inputs, only texts\n"
    )  # fmt: skip


def test_mistakes(folder, call, tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_PIXELS", 9999)
    page = tmp_path / "s.html"
    for argv, say in (
        ([folder, "--output", tmp_path / "s.pdf"], "s.pdf: expected a name ending in .html or"),
        ([tmp_path / "gone", "--output", page], "gone"),
        ([folder, "--output", page, "--size", 0], "size is 0; expected at least 1"),
        ([folder, "--output", page, "--limit", 0], "limit is 0; expected at least 1"),
        ([folder, "--output", page, "--preprocess", "x"], "unknown preprocess 'x'"),
        ([folder, "--output", page, "--ct-window", "3"], "CT window '3'"),
        (
            [folder, "--output", tmp_path / "s.png", "--size", 16],
            "or a name ending in .html",
        ),
    ):
        code, out, err = call(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1) and say in err, (argv, code, err)
        assert not page.exists() and not (tmp_path / "s.png").exists()


def test_it_needs_no_model_and_no_jax(folder, tmp_path):
    code = (
        "import sys; from medsiglip_jax import cli\n"
        f"code = cli.main(['preview', {str(folder)!r}, '--size', '16', '--output', "
        f"{str(tmp_path / 's.html')!r}])\n"
        "assert code == 3 and not {'jax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_rows_that_were_listed_as_bad_are_unreadable(pictures, tmp_path):
    """Such as the second image of a key in a shard, though its bytes are an image."""
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        for name in ("0.png", "0.jpg"):
            file.add(pictures / "0.png", name)
    result = preview(inputs.rows([tmp_path / "s.tar"]), tmp_path / "p.html")
    first, second = result["images"]
    assert "error" not in first and "second image of the key '0'" in second["error"]


def test_what_is_skipped_is_told_as_by_embed(checkpoint, pictures, tmp_path, capsys):
    """On stderr by both, and in the manifest."""
    (pictures / "7.CT").write_bytes(b"x")
    page, out = str(tmp_path / "p.html"), str(tmp_path / "e")
    cli.main(["preview", str(pictures), "--output", page])
    previewed = capsys.readouterr().err
    cli.main(["embed", "--model", str(checkpoint), "--output", out, str(pictures)])
    line = "skipped other files in folders and shards: .ct 1, .md 1; --all-files looks for images"
    assert line in previewed and line in capsys.readouterr().err
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["skipped"] == {".ct": 1, ".md": 1}
