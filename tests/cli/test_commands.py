"""Each command on small inputs: what it prints, as text and as one JSON document."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax.cli import output
from medsiglip_jax.evaluate.recompute import RESULTS
from medsiglip_jax.model import api, devices
from medsiglip_jax.model.config import Preparation
from medsiglip_jax.plan import fitting, program, verdict


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


def test_json_is_strict(capsys):
    """Python would write NaN, which no other program reads."""
    found = {"auc": float("nan"), "scores": [np.float32(np.inf), 1.5, np.array([np.nan, 2.0])]}
    output.show(found, True, str)
    printed = capsys.readouterr().out
    assert json.loads(printed, parse_constant=pytest.fail) == {
        "auc": None, "scores": [None, 1.5, [None, 2.0]],
    }  # fmt: skip


def test_texts_without_finite_numbers_are_named(run, checkpoint, pictures, monkeypatch):
    real = api.Model.encode_text

    def encode_text(self, tokens, *args, **more):
        return real(self, tokens, *args, **more).at[1, 3].set(np.nan)

    monkeypatch.setattr(api.Model, "encode_text", encode_text)
    flags = ["--text", "a scan", "--text", "a drawing", "--json", pictures / "0.png"]
    code, out, err = run("classify", "--model", checkpoint, *flags)
    assert code == 2 and not out and "text 'a drawing'" in err and "not finite" in err


def test_images_without_finite_numbers_are_unreadable(
    run, checkpoint, pictures, tmp_path, monkeypatch
):
    real = api.Model.encode_image

    def encode_image(self, images, *args, **more):
        return real(self, images, *args, **more).at[0].set(np.inf)

    monkeypatch.setattr(api.Model, "encode_image", encode_image)
    names = [pictures / "0.png", pictures / "1.png"]
    flags = ["--model", checkpoint, *names]
    code, out, err = run("embed", *flags, "--output", tmp_path / "out", "--json")
    result = json.loads(out, parse_constant=pytest.fail)
    assert code == 3 and (result["embedded"], result["errors"]) == (1, 1)
    code, out, _ = run("classify", *flags, "--text", "a scan", "--json")
    first, second = json.loads(out, parse_constant=pytest.fail)
    assert code == 3 and "not finite" in first["error"] and "scores" in second


def test_a_temperature_that_is_too_large_is_said(run, checkpoint, pictures, tmp_path):
    model = medsiglip_jax.load(checkpoint)
    model.params["t"] = model.params["t"] * 0 + 100  # exp: 3e43, infinite in float32
    medsiglip_jax.save(model, tmp_path / "diverged")
    flags = ["--text", "a scan", "--text", "a drawing", "--json", pictures / "0.png"]
    code, out, err = run("classify", "--model", tmp_path / "diverged", *flags)
    assert code == 2 and not out and "temperature" in err and err.count("\n") == 1


def accelerator(monkeypatch):
    """From here on "auto" is what it would be on an accelerator."""
    monkeypatch.setattr(devices, "auto_dtype", lambda device: "bfloat16")


def test_dtype_auto_is_what_the_run_began_with(run, checkpoint, pictures, tmp_path, monkeypatch):
    """A run that is resumed, searched or evaluated on another machine stays what it was."""
    command = ["embed", "--model", checkpoint, "--dtype", "auto", "--json", pictures, "--output"]
    assert json.loads(run(*command, tmp_path / "cpu")[1])["dtype"] == "float32"
    (tmp_path / "cpu" / "manifest.json").unlink()
    accelerator(monkeypatch)
    assert json.loads(run(*command, tmp_path / "cpu")[1])["dtype"] == "float32"
    assert json.loads(run(*command, tmp_path / "gpu")[1])["dtype"] == "bfloat16"
    monkeypatch.undo()
    assert json.loads(run(*command, tmp_path / "gpu")[1])["dtype"] == "bfloat16"
    asked = []
    monkeypatch.setattr(api, "load", lambda *args, dtype, **more: asked.append(dtype) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("search", "--model", checkpoint, "--dtype", "auto", "--embeddings", tmp_path / "gpu",
            "--text", "a")  # fmt: skip
    assert asked == ["bfloat16"]


def test_the_batch_size_is_what_the_memory_of_a_device_holds(checkpoint, monkeypatch):
    model = medsiglip_jax.load(checkpoint)
    images = jax.ShapeDtypeStruct((64, 28, 28, 3), np.uint8)
    memory = program.memory_of(model._image.lower(model.params, images).compile())
    needed = memory["peak"] - memory["arguments"] + images.size
    for free, size in ((None, 64), (1 << 40, 128), (needed / (1 - verdict.HEADROOM), 64), (1, 1)):
        monkeypatch.setattr(fitting, "_free_memory", lambda model, free=free: free)
        assert fitting.batch_size(model) == size


def test_a_batch_that_the_compiler_refuses_is_halved(checkpoint, monkeypatch):
    """As libtpu does, whose compiler knows the memory of the device."""
    model, asked = medsiglip_jax.load(checkpoint), []
    compiled = model._image
    monkeypatch.setattr(fitting, "_free_memory", lambda model: 1 << 40)

    class Refused:
        def lower(self, params, images):
            asked.append(images.shape[0])
            return self if images.shape[0] > 32 else compiled.lower(params, images)

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm")

    monkeypatch.setattr(model, "_image", Refused())
    assert fitting.batch_size(model) == 32 and asked == [128, 64, 32]


@pytest.mark.parametrize("format", ["huggingface", "orbax", "big_vision"])
def test_convert_and_info(run, checkpoint, tmp_path, format):
    out = tmp_path / "out"
    code, text, _ = run(
        "convert", checkpoint, out, "--format", format, "--dtype", "bfloat16", "--resolution", 42
    )
    assert code == 0 and "bfloat16" in text
    command = ("convert", checkpoint, tmp_path / "again", "--format", format, "--resolution", 42)
    code, text, _ = run(*command, "--json")
    converted = json.loads(text)
    assert code == 0 and converted["destination"] == str(tmp_path / "again")
    code, text, _ = run("info", out, "--json")
    content = json.loads(text)
    assert {key: converted[key] for key in ("format", "image_size", "parameters")} == {
        "format": content["format"], "image_size": 42, "parameters": content["parameters"]
    }  # fmt: skip
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


def test_all_problems_of_a_checkpoint_are_listed(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    from safetensors.numpy import save_file

    save_file({"x": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    code, _, err = run("info", tmp_path)
    assert code == 2 and "problems" in err and "unexpected tensor x" in err
    assert "missing tensor logit_scale" in err


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
        "        mesh=dict(data=1), loader='pil', preprocess='serving'))\n"
    )
    (tmp_path / "log.py").write_text(
        "import json\n"
        "def write(*words):\n"
        f"    with open({str(tmp_path / 'log')!r}, 'a') as file:\n"
        "        print(*words, file=file)\n"
        "def start(config):\n"
        "    write(config['recipe']['batch_size'], config['workdir'])\n"
        "    return lambda step, metrics: write(step, json.dumps(metrics))\n"
    )
    flags = ["finetune", "--config", tmp_path / "config.py", "--workdir", tmp_path / "run"]
    code, _, err = run(*flags, "--config.logger=gone.py:start")
    assert code == 2 and "expected module:function or file.py:function" in err
    assert not (tmp_path / "run" / "config.json").exists()
    code, out, err = run(
        *flags, "--json", "--config.log_every=1", f"--config.logger={tmp_path}/log.py:start"
    )
    result = json.loads(out)
    start, *lines = (tmp_path / "log").read_text().splitlines()
    assert start == f"4 {tmp_path / 'run'}"
    logged = [(int(step), json.loads(rest)) for step, rest in (x.split(" ", 1) for x in lines)]
    written = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert logged == [(line.pop("step"), line) for line in written]
    # notes.md in the folder is no image: masked, listed, and said so by the exit code.
    assert code == 3 and result["unreadable"] > 0 and result["steps"] == 2
    exported, before = (medsiglip_jax.load(f).config for f in (result["export"], checkpoint))
    assert exported == dataclasses.replace(before, preparation=Preparation("serving"))

    code, out, err = run(*flags, "--config.log_every=1")
    assert code in (0, 3) and "report.html" in out
    exported = tmp_path / "run" / "export"
    question = ("classify", "--text", "a photo", pictures / "0.png", "--json", "--model")
    code, answer, err = run(*question, tmp_path / "run")
    assert code == 0 and f"the model is {exported}, the export of the fine-tuning run" in err
    assert answer == run(*question, exported)[1]
    for folder in ("checkpoints", "checkpoints/2", "checkpoints/2/default"):
        code, _, err = run(*question, tmp_path / "run" / folder)
        assert code == 2 and f"with its optimiser; give its export, {exported}\n" in err
    shutil.rmtree(exported)
    code, _, err = run(*question, tmp_path / "run")
    assert code == 2 and err.count("\n") == 1
    assert f"`medsiglip-jax finetune --workdir {tmp_path / 'run'} --export-only`" in err
    code, out, _ = run("finetune", "--workdir", tmp_path / "run", "--export-only", "--json")
    assert code == 0 and json.loads(out)["exported_step"] == 2
    assert answer == run(*question, tmp_path / "run")[1]
    for more, say in (
        (["--config.seed=3"], "another config (seed: 0 -> 3)"),
        (["--config.sede=3"], "config has no key sede"),
        (["--config.data.path=/no/rows.csv"], "/no/rows.csv"),
        (["--export-only"], "with --export-only these flags have no effect: --config"),
    ):
        code, out, err = run(*flags, *more)
        assert code == 2 and say in err and err.count("\n") == 1 and not out
    code, _, err = run("info", checkpoint, "--config.seed=3")
    assert code == 2 and "unrecognized arguments: --config.seed=3" in err
    code, _, err = run("finetune", "--config", "no.py", "--workdir", tmp_path / "run")
    assert code == 2 and err.startswith("medsiglip-jax finetune: no.py: neither a config file nor")


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
    code, _, err = run("probe", "predict", *flags, "--model", checkpoint, "--workers", 1)
    assert code == 2 and "with --embeddings these flags have no effect: --model, --workers" in err
    assert run("probe", "predict", *flags)[0] == 0
    first = (tmp_path / "s.csv").read_text().splitlines()[1].split(",")
    assert float(first[1]) == pytest.approx(scored[str(tmp_path / "in/0.png")]["probability"])
    code, text, _ = run("probe", "curve", *data, "--sizes", 16, "--seeds", 2, "--json")
    assert code == 0 and [row["n"] for row in json.loads(text)][:2] == [16, 16]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / RESULTS).write_text("{}")
    (tmp_path / "above").mkdir()
    shutil.copytree(checkpoint, tmp_path / "above" / "model")
    for place, say in (
        (out, f"embeddings, which `embed` wrote; give a model, such as {checkpoint}"),
        (tmp_path / "p.npz", "a probe, which `probe fit` wrote; give it as --probe"),
        (tmp_path / "report", "what `evaluate` wrote"),
        (tmp_path / "above", f"give {tmp_path / 'above' / 'model'}"),
    ):
        code, _, err = run("embed", "--model", place, "--output", tmp_path / "x", tmp_path / "in")
        assert code == 2 and say in err and err.count("\n") == 1
    code, _, err = run("probe", "fit", *data[:-2], "--label", "light", "--output", "p.npz")
    assert code == 2 and "no column 'light'" in err and err.count("\n") == 1
