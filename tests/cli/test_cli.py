"""The command: exit codes, one line on stderr, one JSON document on stdout."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax import cli


@pytest.fixture
def run(capsys):
    """Runs a command line in this process -> (exit code, stdout, stderr)."""

    def call(*argv):
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def test_classify_json(run, checkpoint, pictures):
    texts = ["photo of a b", "scan of a c", "nothing"]
    flags = [x for t in texts for x in ("--text", t)]
    code, out, err = run("classify", "--model", checkpoint, *flags, "--json", pictures / "0.png")
    assert code == 0
    (result,) = json.loads(out)
    assert result["image"].endswith("0.png")
    assert [s["text"] for s in result["scores"]] == texts
    model = medsiglip_jax.load(checkpoint)
    zimg = model.encode_image(model.processor.images([pictures / "0.png"]))
    logits = np.asarray(
        model.similarity(zimg, model.encode_text(model.processor.texts(texts)))[0], np.float64
    )
    terms = model_terms(model.config)
    assert_close([s["logit"] for s in result["scores"]], logits, terms)
    # In float64, from the logits that stand beside them: relatively, however small.
    logits = np.array([s["logit"] for s in result["scores"]])
    sigmoid = [s["sigmoid"] for s in result["scores"]]
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-logits)), rtol=1e-12)
    softmax = [s["softmax"] for s in result["scores"]]
    np.testing.assert_allclose(softmax, np.exp(logits) / np.exp(logits).sum(), rtol=1e-12)
    assert sum(softmax) == pytest.approx(1, abs=1e-12)


def test_classify_answers_the_readable_ones(run, checkpoint, pictures):
    files = [pictures / "0.png", pictures / "sub" / "damaged.jpg", "gone.png", pictures / "1.png"]
    code, out, _ = run("classify", "--model", checkpoint, "--text", "a b", "--json", *files)
    results = json.loads(out)
    assert code == 3 and [r["image"] for r in results] == [str(f) for f in files]
    assert ["error" in r for r in results] == [False, True, True, False]
    assert "truncated" in results[1]["error"].lower() and results[2]["error"] == "no such file"
    code, out, _ = run("classify", "--model", checkpoint, "--text", "a b", *files)
    assert code == 3 and "unreadable: no such file" in out and "100.0%" in out


@pytest.mark.filterwarnings("default")
def test_classify_warns_once_about_cut_texts(run, checkpoint, pictures):
    long = "scan of a b " * 60
    code, _, err = run("classify", "--model", checkpoint, "--text", long, pictures / "0.png")
    assert code == 0 and err.count("warning:") == 1 and "1 of 1 texts" in err


def test_embed(run, checkpoint, pictures, tmp_path):
    command = ["embed", "--model", checkpoint, "--output", tmp_path / "out", pictures]
    code, out, err = run(*command)
    assert code == 3 and "7 of 8 embedded" in out and "errors.parquet" in err
    code, out, _ = run(*command, "--json")
    assert code == 3 and json.loads(out)["embedded"] == 7


@pytest.mark.parametrize("format", ["huggingface", "orbax", "big_vision"])
def test_convert_and_info(run, checkpoint, tmp_path, format):
    out = tmp_path / "out"
    code, text, _ = run(
        "convert", checkpoint, out, "--format", format, "--dtype", "bfloat16", "--resolution", 42
    )
    assert code == 0 and "bfloat16" in text
    code, text, _ = run("info", out, "--json")
    content = json.loads(text)
    assert code == 0 and content["format"] == format and content["dtype"] == "bfloat16"
    assert content["config"]["vision"]["image_size"] == 42
    assert content["tokenizer"].endswith("spiece.model")
    assert content["parameters"] == sum(content["contains"].values())
    code, text, _ = run("info", out)
    assert code == 0 and f"{content['parameters']:,}" in text and content["sha256"] in text


def test_convert_keeps_the_stored_dtype(run, checkpoint, tmp_path):
    run("convert", checkpoint, tmp_path / "a", "--format", "orbax", "--dtype", "bfloat16")
    run("convert", tmp_path / "a", tmp_path / "b", "--format", "huggingface")
    assert json.loads(run("info", tmp_path / "b", "--json")[1])["dtype"] == "bfloat16"


@pytest.fixture
def wrong(checkpoint, pictures, tmp_path):
    """Command lines that are somebody's mistake, and a word the answer must hold."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    image, ok = pictures / "0.png", ["--model", checkpoint, "--text", "a"]
    out = ["--output", tmp_path / "out"]
    return {
        "no command": ([], "COMMAND"),
        "unknown command": (["clasify"], "clasify"),
        "unknown flag": (["info", checkpoint, "--jsn"], "--jsn"),
        "no model": (["classify", "--text", "a", image], "--model"),
        "no text": (["classify", "--model", checkpoint, image], "--text"),
        "empty text": (["classify", "--model", checkpoint, "--text", " ", image], "none of them"),
        "no image": (["classify", *ok], "IMAGE"),
        "no such model": (["classify", "--model", "/no/model", "--text", "a", image], "/no/model"),
        "empty model": (["info", tmp_path / "empty"], "no config.json"),
        "a file": (["info", tmp_path / "file"], "not a checkpoint"),
        "preset": (["classify", *ok, "--preprocess", "clip", image], "big_vision"),
        "dtype": (["classify", *ok, "--dtype", "int4", image], "bfloat16"),
        "attention": (["classify", *ok, "--attention", "flash", image], "xla"),
        "batch": (["classify", *ok, "--batch-size", "0", image], "batch_size"),
        "not a number": (["classify", *ok, "--batch-size", "x", image], "--batch-size"),
        "tokenizer": (["classify", *ok, "--tokenizer", "gone.model", image], "gone.model"),
        "empty input": (["embed", "--model", checkpoint, *out, tmp_path / "empty"], "nothing to"),
        "no input": (["embed", "--model", checkpoint, *out, "gone"], "gone"),
        "output is a file": (
            ["embed", "--model", checkpoint, "--output", tmp_path / "file", image], "is a file"),
        "output below a file": (
            ["embed", "--model", checkpoint, "--output", tmp_path / "file" / "x", image], "is a"),
        "DST exists": (
            ["convert", checkpoint, pictures, "--format", "orbax"], "already exists"),
        "format": (["convert", checkpoint, tmp_path / "x", "--format", "onnx"], "onnx"),
        "resolution": (
            ["convert", checkpoint, tmp_path / "x", "--format", "orbax", "--resolution", "5"],
            "patch_size"),
    }  # fmt: skip


def test_mistakes_are_one_line_and_exit_2_and_leave_nothing(run, wrong, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for name, (argv, word) in wrong.items():
        code, out, err = run(*argv)
        assert code == 2, (name, code, err)
        assert out == "" and err.count("\n") == 1 and word in err, (name, out, err)
        assert sorted(tmp_path.rglob("*")) == before, name


def test_all_problems_of_a_checkpoint_are_listed(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    from safetensors.numpy import save_file

    save_file({"x": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    code, _, err = run("info", tmp_path)
    assert code == 2 and "problems" in err and "unexpected tensor x" in err
    assert "missing tensor logit_scale" in err


@pytest.mark.parametrize("command", ["quickstart", "info", "convert", "classify", "embed"])
def test_every_command_has_help_with_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "example:" in out and f"medsiglip-jax {command}" in out


def test_embed_help_shows_series_and_slides(run):
    _, out, _ = run("embed", "--help")
    examples = out.partition("example:")[2]
    assert all(flag in examples for flag in ("--series", "--mpp", "--volume"))


def test_classify_help_says_what_the_numbers_mean(run):
    _, out, _ = run("classify", "--help")
    assert "sigmoid" in out and "softmax" in out and "calibrate" in out


def test_machine_failures_are_exit_1(run, checkpoint, pictures, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    code, out, err = run("embed", "--model", checkpoint, "--output", tmp_path / "out", pictures)
    assert code == 1 and out == "" and "No space left" in err
    assert not list((tmp_path / "out").glob("*part*"))


def test_ctrl_c_is_one_line(run, checkpoint, pictures, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("medsiglip_jax.inference.embed.embed", interrupt)
    code, _, err = run("embed", "--model", checkpoint, "--output", tmp_path / "out", pictures)
    assert code == 130 and "resumes" in err


def test_installed_command(checkpoint):
    """In a process of its own: stdout is the document alone, whatever libraries print."""
    command = [sys.executable, "-m", "medsiglip_jax", "info", str(checkpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=True)
    assert json.loads(done.stdout)["parameters"] > 0
    assert done.stderr == ""


def test_finetune(run, tmp_path, pictures, checkpoint):
    rows = "\n".join(
        f"{name},photo of a {'ab'[i % 2]}" for i, name in enumerate(os.listdir(pictures))
    )
    (tmp_path / "rows.csv").write_text(f"image,text\n{rows}\n".replace("sub,photo", "0.png,photo"))
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        f"    return ConfigDict(dict(init={str(checkpoint)!r}, total_steps=2, batch_size=4,\n"
        f"        data=dict(path={str(tmp_path / 'rows.csv')!r}, root={str(pictures)!r}),\n"
        "        mesh=dict(data=1), loader='pil'))\n"
    )
    flags = ["finetune", "--config", tmp_path / "config.py", "--workdir", tmp_path / "run"]
    code, out, err = run(*flags, "--json", "--config.log_every=1")
    result = json.loads(out)
    # notes.md in the folder is no image: masked, listed, and said so by the exit code.
    assert code == 3 and result["unreadable"] > 0 and result["steps"] == 2
    assert medsiglip_jax.load(result["export"]).config == medsiglip_jax.load(checkpoint).config

    code, out, err = run(*flags, "--config.log_every=1")
    assert code in (0, 3) and "report.html" in out
    for more, say in (
        (["--config.seed=3"], "another config (seed: 0 -> 3)"),
        (["--config.sede=3"], "config has no key sede"),
        (["--config.data.path=/no/rows.csv"], "/no/rows.csv"),
    ):
        code, out, err = run(*flags, *more)
        assert code == 2 and say in err and err.count("\n") == 1 and not out
    code, _, err = run("info", checkpoint, "--config.seed=3")
    assert code == 2 and "unrecognized arguments: --config.seed=3" in err
    code, _, err = run("finetune", "--config", "no.py", "--workdir", tmp_path / "run")
    assert code == 2 and err == "medsiglip-jax finetune: no.py: no such config file\n"


def test_probe(run, checkpoint, tmp_path):
    """Bright and dark pictures, three of a patient: fitted, scored two ways, as a curve."""
    rng, lines = np.random.default_rng(0), ["id,dark,patient,split"]
    (tmp_path / "in").mkdir()
    for i in range(90):
        pixels = rng.integers(0, 90, (9, 9, 3)) + 160 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "in" / f"{i}.png")
        lines.append(f"{i}.png,{1 - i % 2},p{i // 3},{'test' if i // 3 % 4 == 0 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    assert run("embed", "--model", checkpoint, "--output", out, tmp_path / "in")[0] == 0
    data = ["--data", tmp_path / "labels.csv", "--embeddings", out, "--label", "dark"]
    data += ["--group", "patient", "--split", "split"]
    code, text, _ = run("probe", "fit", *data, "--output", tmp_path / "p.npz", "--json")
    result = json.loads(text)
    assert code == 0 and result["rows"]["test"] == 24 and result["test"]["macro_auc"] > 0.99
    flags = ["--probe", tmp_path / "p.npz", "--model", checkpoint]
    code, text, _ = run("probe", "predict", *flags, "--json", tmp_path / "in", checkpoint / "x.png")
    assert code == 2
    code, text, _ = run("probe", "predict", *flags, "--json", tmp_path / "in")
    scored = {r["image"]: r["scores"][0] for r in json.loads(text)}
    assert code == 0 and len(scored) == 90
    assert scored[str(tmp_path / "in/0.png")]["positive"]
    assert not scored[str(tmp_path / "in/1.png")]["positive"]
    flags = ["--probe", tmp_path / "p.npz", "--embeddings", out, "--output", tmp_path / "s.csv"]
    code, _, err = run("probe", "predict", *flags, "--frame", 3, "--volume", "ct")
    assert code == 2 and "with --embeddings these flags have no effect: --frame, --volume" in err
    assert run("probe", "predict", *flags)[0] == 0
    first = (tmp_path / "s.csv").read_text().splitlines()[1].split(",")
    assert float(first[1]) == pytest.approx(scored[str(tmp_path / "in/0.png")]["probability"])
    code, text, _ = run("probe", "curve", *data, "--sizes", 16, "--seeds", 2, "--json")
    assert code == 0 and [row["n"] for row in json.loads(text)][:2] == [16, 16]
    code, _, err = run("probe", "fit", *data[:-2], "--label", "light", "--output", "p.npz")
    assert code == 2 and "no column 'light'" in err and err.count("\n") == 1


def test_a_closed_pipe_is_no_error(checkpoint):
    command = [sys.executable, "-m", "medsiglip_jax", "info", str(checkpoint)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env=buffered, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
