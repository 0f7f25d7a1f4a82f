"""Names of files, whatever bytes they hold: the file is read, and its name is shown on one line
without anything that a terminal would obey."""

import json
import os
import subprocess
import sys
import tarfile

import pyarrow.parquet
import pytest

from medsiglip_jax.cli import output
from medsiglip_jax.preprocess import names

# A byte that is not UTF-8, a sequence that colours the terminal, marks that reverse the direction
# of writing, line ends, and one of Unicode's.
NAMES = [b"\xff.png", b"\x1b[31m.png", "\u202egnp.png".encode(), b"a\nb.png", b"a\rb.png",
         "a\u2028b.png".encode(), b"\x9b1m.png"]  # fmt: skip
OBEYED = ["\x1b", "\r", "\u202e", "\u2028", "\x9b", "a\nb"]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems refuse such names of files"
)


@pytest.fixture
def odd(tmp_path, untouched_pictures):
    """A folder of images, and one of them in a tar."""
    folder = tmp_path / "odd"
    folder.mkdir()
    data = (untouched_pictures / "0.png").read_bytes()
    for name in NAMES:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(data)
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        tar.add(os.fsdecode(os.path.join(os.fsencode(folder), NAMES[0])), os.fsdecode(NAMES[0]))
    return folder


def test_a_file_is_opened_by_its_own_name(run, checkpoint, odd, tmp_path):
    out = tmp_path / "out"
    code, *_ = run("embed", odd, odd.with_suffix(".tar"), "--model", checkpoint, "--output", out)
    table = pyarrow.parquet.read_table(out / "part-00000.parquet")
    assert code == 0 and table.num_rows == len(NAMES) + 1
    assert r"\udcff.png" in table["id"].to_pylist()


def test_an_escaped_name_is_a_files_own_name_first(tmp_path):
    own, other = tmp_path / r"\udcff.png", tmp_path / os.fsdecode(b"\xff.png")
    other.touch()
    assert names.parse(str(own)) == (str(other), None)
    assert names.parse(f"{own}#frame=2") == (str(other), names.Frame(2))
    own.touch()
    assert names.parse(str(own)) == (str(own), None)


def test_no_name_reaches_the_terminal_as_it_is(run, checkpoint, odd, tmp_path):
    images, sheet = sorted(odd.iterdir()), tmp_path / "s.html"
    gone, model = tmp_path / "gone\x1b[31m\n\u202e", ["--model", checkpoint]
    for path in images[:2]:
        path.write_bytes(b"no image")
    commands = {
        "classify": ["classify", *model, "--text", "a", *images[:3], gone],
        "preview": ["preview", odd, "--output", sheet],
        "embed, gone": ["embed", *model, gone, "--output", tmp_path / "e"],
        "preview, gone": ["preview", gone, "--output", sheet],
        "info, gone": ["info", gone],
        "convert, gone": ["convert", gone, tmp_path / "c", "--format", "orbax"],
        "plan, gone": ["plan", "--config", gone],
        "compare, gone": ["compare", gone, gone],
        "a wrong flag": ["info", checkpoint, "--\x1b[31m"],
    }
    for name, command in commands.items():
        _, out, err = run(*command)
        shown = out + err
        assert not any(mark in shown for mark in OBEYED), (name, shown)
        assert ("gone" in name) <= (err.count("\n") == 1), (name, err)


def test_json_is_utf8_and_names_survive_it(odd, tmp_path):
    """In a process of its own whose locale is C, where Python would pass such bytes through."""
    command = ["preview", odd, "--output", tmp_path / "s.html", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "medsiglip_jax", *map(str, command)],
        stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    text = done.stdout.decode()
    images = {os.path.basename(image["source"]) for image in json.loads(text)["images"]}
    assert images == {names.escaped(os.fsdecode(name)) for name in NAMES}
    assert not any(mark in text for mark in OBEYED)


def test_letters_of_every_script_are_shown_as_they_are():
    text = "Röntgen 胸部 می\u200cخواهم 1\u00a0%\ttab\nline"
    assert output.printable(text, "utf-8") == text
    assert output.printable("µm ö", "latin-1") == "µm ö"
    assert output.printable("胸", "ascii") == r"\u80f8"


def test_an_output_whose_name_is_not_utf8_is_refused(run, checkpoint, untouched_pictures, tmp_path):
    out = tmp_path / os.fsdecode(b"\xff")
    code, _, err = run("embed", untouched_pictures, "--model", checkpoint, "--output", out)
    assert code == 2 and "UTF-8" in err and not out.exists()


@pytest.mark.filterwarnings("default")
def test_names_that_begin_with_a_hyphen_are_names_everywhere(
    run, checkpoint, untouched_pictures, tmp_path, monkeypatch
):
    """The official notebooks' own images are called so. Given, in a folder, met by a glob that we
    expand, in a table and in a list, and for outputs."""
    monkeypatch.chdir(tmp_path)
    data = (untouched_pictures / "0.png").read_bytes()
    for name in ("-5669.png", "--b.png", "-f/-c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "-t.csv").write_text("image\n-5669.png\n--b.png\n")
    (tmp_path / "-l.txt").write_text("-5669.png\n-f/-c.png\n")
    wanted = {
        "-f": {"-c.png"}, "-*.png": {"-5669.png", "--b.png"}, "-t.csv": {"-5669.png", "--b.png"},
        "-l.txt": {"-5669.png", "-f/-c.png"},
        "-5669.png": {"-5669.png"},
    }  # fmt: skip
    for number, (given, ids) in enumerate(wanted.items()):
        code, _, err = run("embed", "--model", checkpoint, f"--output=-o{number}", "--", given)
        assert code == 0, err
        assert {
            *pyarrow.parquet.read_table(f"-o{number}/part-00000.parquet")["id"].to_pylist()
        } == ids
    code, out, _ = run(
        "search", "--embeddings=-o1", "--model", checkpoint, "--image=-5669.png", "--output=-h.csv",
        "--json",
    )  # fmt: skip
    (result,) = json.loads(out)
    assert code == 0 and result["query"] == "-5669.png" and len(result["hits"]) == 2
    assert "'-5669.png" in (tmp_path / "-h.csv").read_text()  # no formula to a spreadsheet
