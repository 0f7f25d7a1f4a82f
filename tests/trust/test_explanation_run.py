"""The command: files of maps, pictures and a page, under names that are plain and never shared."""

import json
import re

import numpy as np
import pytest
from dicom_files import made
from PIL import Image

from medsiglip_jax import cli
from medsiglip_jax.files.places import is_plain_name
from medsiglip_jax.trust import overlay
from medsiglip_jax.trust.explanation import Explanation
from medsiglip_jax.trust.explanation_run import file_names
from medsiglip_jax.trust.maps.faithfulness import Faithfulness

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients for:UserWarning")
TEXT = ["--text", "photo of a a"]


@pytest.fixture
def run(capsys, checkpoint):
    def call(*argv):
        code = cli.main(["explain", "--model", str(checkpoint), *map(str, argv)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.mark.parametrize("completeness, said", [(0.01, False), (0.02, True), (np.nan, True)])
def test_a_map_that_is_not_shown_to_be_complete_says_so(completeness, said):
    shares = np.linspace(0, 1, 3)
    measured = Faithfulness(shares, shares, shares, 0.5, (0.1,))
    values = np.zeros((2, 2), np.float32)
    made = Explanation("a", "t", None, "ig", values, 1.0, 0.0, 4, completeness, 0.0, measured)
    assert any(note.startswith("incomplete") for note in overlay.notes(made)) is said


def test_maps_pictures_page_and_record(run, tmp_path, untouched_pictures):
    out, images = tmp_path / "out", [untouched_pictures / "0.png", untouched_pictures / "1.png"]
    damaged = untouched_pictures / "sub" / "damaged.jpg"
    code, text, _ = run(*TEXT, *images, damaged, "--output", out, "--json")
    record = json.loads(text)
    assert code == 3 and record == json.loads((out / "explain.json").read_text())
    first, second, unreadable = record["images"]
    assert first["image"] == str(images[0]) and set(unreadable) == {"image", "error"}
    with np.load(out / first["map"]) as file:
        assert file["map"].shape == (20, 31) and file["map"].dtype == np.float32
        total = file["map"].sum(dtype=float)
    difference = first["score"] - first["baseline_score"]
    error = abs(total - difference) / max(abs(difference), 0.1)
    assert first["completeness"] == pytest.approx(error, abs=1e-3)
    assert (first["map"], second["overlay"]) == ("0.npz", "1.png")
    with Image.open(out / "0.png") as picture:
        assert picture.format == "PNG"
    names = {path.name for path in out.iterdir()}
    assert names == {"0.npz", "0.png", "1.npz", "1.png", "explain.html", "explain.json"}
    page = (out / "explain.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "Insertion and deletion" in page
    assert "unreadable: " in page and not re.search(r'(src|href)="(?!data:)', page)
    code, text, _ = run(*TEXT, images[0], "--output", out, "--method", "rollout")
    assert code == 0 and not (out / "1.npz").exists()
    assert "where the model looks, whatever the text" in (out / "explain.html").read_text()


def test_a_frame_of_dicom_and_several_texts(run, tmp_path):
    cine = np.random.default_rng(0).integers(0, 256, (3, 24, 36), dtype=np.uint8)
    path = tmp_path / "cine.dcm"
    path.write_bytes(made(cine, Modality="US", NumberOfFrames="3", PatientName="Nemo^Captain"))
    out = tmp_path / "out"
    flags = ["--text", "photo of a b", "--contrast", "scan of a c", "--steps", 4]
    code, _, _ = run(*TEXT, *flags, f"{path}#frame=2", "--output", out)
    assert code == 0
    assert np.load(out / "cine-frame-2.2.npz")["map"].shape == (24, 36)
    record = json.loads((out / "explain.json").read_text())
    assert [i["text"] for i in record["images"]] == ["photo of a a", "photo of a b"]
    assert record["images"][0]["steps"] == 4 and record["contrast"] == "scan of a c"


def test_a_map_that_is_not_better_than_random_is_grey(run, tmp_path, untouched_pictures):
    out, images = tmp_path / "out", [untouched_pictures / f"{i}.png" for i in range(4)]
    run(*TEXT, *images, "--output", out, "--method", "rollout")
    shown = json.loads((out / "explain.json").read_text())["images"]
    page = (out / "explain.html").read_text()
    assert {i["better_than_random"] for i in shown} == {True, False}
    for image in shown:
        better = image["insertion_minus_deletion"] > max(image["random_maps"])
        assert image["better_than_random"] == better
        with Image.open(out / image["overlay"]) as file:
            picture = np.asarray(file, int)[20:250, 20:390]
        assert (np.ptp(picture, axis=-1).max() > 0) == better
    grey = sum(not image["better_than_random"] for image in shown)
    assert page.count("Not better than random maps") == grey


def test_what_is_not_of_the_command_stays(run, tmp_path, untouched_pictures):
    out, image = tmp_path / "out", untouched_pictures / "0.png"
    flags = [*TEXT, "--method", "rollout", "--output", out]
    assert run(*flags, image)[0] == 0
    (out / "notes.txt").write_text("mine")
    code, _, err = run(*flags, image)
    assert code == 2 and "holds notes.txt, which no explanation wrote" in err
    (out / "notes.txt").rename(out / ".notes")
    assert run(*flags, image)[0] == 2 and (out / ".notes").read_text() == "mine"
    own = out / "own.png"
    own.write_bytes(image.read_bytes())
    code, _, err = run(*flags, own, "--overwrite")
    assert code == 2 and "lies in" in err and own.exists()
    assert run(*flags, image, "--overwrite")[0] == 0 and not (out / ".notes").exists()
    code, _, err = run(*TEXT, image, "--output", image)
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "expected either texts, or a label"),
        ([*TEXT, "--method", "gradcam"], "method is 'gradcam'"),
        ([*TEXT, "--method", "occlusion", "--steps", "5"], "no effect: --steps"),
        ([*TEXT, "--steps", "5", "--max-steps", "8"], "no effect: --max-steps"),
        (["--label", "a"], "no classifier"),
        (["--probe", "gone.npz", "--label", "a"], "no such file: gone.npz"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, untouched_pictures, flags, message):
    code, _, err = run(*flags, untouched_pictures / "0.png", "--output", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


SOURCES = [
    "a/3.png", "b/3.PNG", "c/3-2.png", "ct.dcm#frame=4", "s.svs#tile=-8,0,1,224", "../..",
    "x/con.png", "a\tb\n.png", "https://u:p@host/scan.png?token=geheim", ".hidden.png", "A.png",
    "a.png", "long" * 99, "\u80f8" * 99, "a/",
]  # fmt: skip


def test_names_are_plain_and_never_shared():
    names = file_names(SOURCES)
    assert names[:5] == ["3", "3-2", "3-2-2", "ct-frame-4", "s-tile--8-0-1-224"]
    assert len({name.casefold() for name in names}) == len(SOURCES)
    assert all(is_plain_name(f"{name}.12.npz") for name in names), names
    assert not any("geheim" in name for name in names)
