"""The worked examples: each runs as it stands and shows what it says, and its notebook is the same.

`pytest -m examples` runs them on the model of one quickstart, that of MEDSIGLIP_QUICKSTART if the
variable is set.
"""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import medsiglip_jax

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]
# What an example needs that the package works without.
NEEDS = {
    "classification": "optax",
    "contrastive_finetuning": "optax",
    "ct_series": "pydicom",
    "serving_client": "starlette",
    "slide_tiles": "openslide",
    "training_loop": "optax",
}


def numbers(pattern, out):
    return [float(number) for number in re.findall(pattern, out, re.MULTILINE)]


def shows_quick_start(out):
    words = "zero one two three four five six seven eight nine".split()
    named = re.findall(r"^(\d)\.png  a handwritten (\w+)", out, re.MULTILINE)
    assert len(named) == 10 and sum(words[int(n)] == word for n, word in named) >= 8


def shows_serving_client(out):
    (difference,) = numbers(r"called directly: (\S+)", out)
    (cosine,) = numbers(r"cosine of image and text: (\S+)", out)
    assert difference <= 1e-5 and cosine > 0.2


def shows_contrastive_finetuning(out):
    before, after = numbers(r"accuracy (\S+)", out)
    assert before < 0.8 and after > 0.9


def shows_classification(out):
    even, loop = numbers(r"(?:even|loop)  auc (\S+)  sensitivity", out)
    assert min(even, loop) > 0.9


def shows_linear_probe(out):
    assert "'train': 290, 'validation': 60, 'test': 100" in out
    few, all_rows = (numbers(rf"^ *{n} labels.* (\S+)$", out) for n in (10, 290))
    assert 0.7 < min(few) and 0.98 < min(all_rows) and len(few) == 3


def shows_tpu_start(out):
    assert "450 images of 16 pixels, computed in float32" in out
    assert min(numbers(r"call: (\d+) images/s", out)) > 0


def shows_ct_series(out):
    """In the order of the positions, not of the names, the tube fills the middle third."""
    found = re.findall(r"^series/(\d+)\.dcm +(\S+)$", out, re.MULTILINE)
    assert [int(name) for name, _ in found] == [5 * place % 12 for place in range(12)]
    fits = [float(logit) > 0 for _, logit in found]
    assert fits == [4 <= place < 8 for place in range(12)]


def shows_slide_tiles(out):
    """Two circles of 1,200 pixels hold 45 tiles of 448; the nearest lie in that of the query."""
    assert 40 < numbers(r"^(\d+) tiles", out)[0] < 70
    assert min(numbers(r"#tile=(\d+),", out)) > 3072 and out.count("#tile") == 6


def shows_semantic_search(out):
    three, eight = re.findall(r"-> (.*)", out)
    assert three.split().count("three") >= 9 and eight.split().count("eight") >= 9
    assert min(numbers(r"^(\S+)  \d+ and \d+", out)) >= 0.999


def shows_monitoring(out):
    assert "new: exit code 0, alarms: none" in out
    assert re.search(r"changed: exit code 4, alarms: .*mmd", out)


def shows_training_loop(out):
    first, last = numbers(r"steps? \S+: (\S+),", out) + numbers(r"81-100: (\S+)", out)
    assert last < 0.6 * first


# ---------------------------------------------------------------------------------- running them


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> Path:
    """The folder of a quickstart, which all examples share."""
    if given := os.environ.get("MEDSIGLIP_QUICKSTART"):
        return Path(given).resolve()
    folder = tmp_path_factory.mktemp("examples") / "quickstart"
    command = [sys.executable, "-m", "medsiglip_jax", "quickstart", "--workdir", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def prepared(quickstart, tmp_path, monkeypatch) -> Path:
    """An empty folder to run an example in, with no way out of this machine."""
    monkeypatch.setenv("MEDSIGLIP_QUICKSTART", str(quickstart))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.examples
@pytest.mark.parametrize("name", NAMES)
def test_an_example_shows_what_it_says(prepared, name):
    if package := NEEDS.get(name):
        pytest.importorskip(package)
    shutil.copy(FOLDER / f"{name}.py", prepared)  # so that it finds nothing of ours beside it
    done = subprocess.run([sys.executable, f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    globals()[f"shows_{name}"](done.stdout)


@pytest.mark.examples
def test_a_notebook_runs(prepared):
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    book = nbformat.read(FOLDER / "quick_start.ipynb", as_version=4)
    nbclient.NotebookClient(book, kernel_name="python3", timeout=300).execute()
    printed = [output["text"] for cell in book.cells for output in cell.get("outputs", ())
               if output["output_type"] == "stream"]  # fmt: skip
    shows_quick_start("".join(printed))


# -------------------------------------------------------------------------------- what they are


def test_notebooks_are_what_their_scripts_give():
    pytest.importorskip("jupytext")
    import make_notebooks

    stale = make_notebooks.differing()
    assert not stale, "python scripts/make_notebooks.py writes them"
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_an_example_is_short_and_says_what_people_ask_first(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 25
    assert sum(line.startswith("MODEL = ") for line in code) == 1
    first = "\n".join(lines[: lines.index("# %%")])
    assert first.startswith("# %% [markdown]\n# # ")
    for what in ("Before", "With the real weights", "Cost"):
        assert f"# - **{what}:** " in first
    assert 'set `MODEL = "google/medsiglip-448"`' in re.sub(r"\n#\s*", " ", first)
    assert f"shows_{path.stem}" in globals(), "an example needs a check of what it prints"


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_an_example_uses_public_names_only(path):
    """Those of the package, and of the faces of its rooms and the modules that these name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] == "medsiglip_jax":
                face = importlib.import_module(node.module)
                rooms = {"data"} if face is medsiglip_jax else set()
                assert {alias.name for alias in node.names} <= set(dir(face)) | rooms
                assert Path(str(face.__file__)).name == "__init__.py"


def test_the_table_of_the_examples_is_complete():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[`(\w+)`\]\(\w+\.ipynb\) \|", text, re.MULTILINE)) == NAMES


# ---------------------------------------------------------------------------------- the command


def test_examples_are_listed(run):
    code, out, err = run("examples", "--json")
    listed = json.loads(out)
    assert code == 0 and not err and listed["written"] == []
    assert [example["name"] for example in listed["examples"]] == NAMES
    assert all(example["title"] for example in listed["examples"])
    code, out, _ = run("examples")
    assert code == 0 and all(f"{name} " in out for name in NAMES)


def test_examples_are_copied_and_nothing_is_replaced(run, tmp_path):
    folder = tmp_path / "new" / "examples"
    code, out, _ = run("examples", "--copy", folder, "--json")
    names = {f"{name}{suffix}" for name in NAMES for suffix in (".py", ".ipynb")} | {"README.md"}
    assert code == 0 and {Path(path).name for path in json.loads(out)["written"]} == names
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: (FOLDER / name).read_bytes() for name in names
    }

    mine = folder / "quick_start.py"
    mine.write_text("mine")
    (folder / "monitoring.ipynb").unlink()
    code, out, err = run("examples", "--copy", folder)
    assert code == 2 and not out and "quick_start.py" in err and "--overwrite" in err
    assert mine.read_text() == "mine" and not (folder / "monitoring.ipynb").exists()

    code, out, _ = run("examples", "--copy", folder, "--overwrite", "--json")
    written = {Path(path).name for path in json.loads(out)["written"]}
    assert code == 0 and written == {"quick_start.py", "monitoring.ipynb"}
    assert mine.read_bytes() == (FOLDER / "quick_start.py").read_bytes()


@pytest.mark.parametrize(
    "flags, say",
    [
        (["--overwrite"], "--overwrite has no effect without --copy DIR"),
        (["--copy", "gs://bucket/x"], "gs://bucket/x"),
        (["--copy", "file"], "file: a file"),
        (["--copy", "folder"], "quick_start.py"),
    ],
)
def test_a_copy_that_cannot_be_made_is_refused_in_one_line(run, tmp_path, monkeypatch, flags, say):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder", "quick_start.py").mkdir(parents=True)
    code, out, err = run("examples", *flags)
    assert code == 2 and not out and err.count("\n") == 1 and say in err


def test_a_wheel_holds_the_examples(tmp_path):
    """`examples --copy` has to find them where there is no checkout."""
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "medsiglip_jax", "examples", "--copy", "copied"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copied").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
