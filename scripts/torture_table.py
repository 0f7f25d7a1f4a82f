"""Every output of every command, and what the commands read to make them.

A command with a flag that names an output has to be here, which tests/cli/test_outputs.py checks.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz_files import write_originals
from PIL import Image
from torture_process import Process


@dataclass(frozen=True)
class Writer:
    """One output of one command.

    Attributes:
        output: the name of what it writes.
        command: the variant, "a" or "b" -> the command line; "{out}" is the output, "{ray}" the
            address in the variable TORTURE_RAY.
        replaces: writes over an earlier output of its own; else it refuses, or resumes.
        starts_with: a folder that the output is a copy of, to which the command adds files or whose
            files it replaces; "{v}" is the variant.
        codes: exit codes of a command that is done.
    """

    output: str
    command: Callable[[str], Sequence[str]]
    replaces: bool = True
    starts_with: str = ""
    codes: tuple[int, ...] = (0,)

    def clean(self, place: Path, v: str) -> None:
        """Leaves nothing at the place but what the command starts with."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if self.starts_with:
            shutil.copytree(self.start(v), place / self.output)

    def start(self, v: str) -> Path:
        """The folder that the output is a copy of."""
        return Path(self.starts_with.replace("{v}", v))

    def filled(self, v: str, place: Path) -> list[str]:
        """The command line with the output at a place."""
        named = {"{out}": str(place / self.output), "{ray}": os.environ.get("TORTURE_RAY", "")}
        return [named.get(part, part) for part in self.command(v)]


MODEL = ["--model", "originals/siglip"]
RESAMPLES = ["--resamples", "20"]
_HITS = ["--text", "lung", "--top-k", "3"]
_TASK = ["--task", "task.toml", *MODEL, *RESAMPLES]
_TRAIN = ["--config.init=originals/siglip", "--config.batch_size=4", "--config.total_steps=3",
          "--config.checkpoint_every=1", "--config.log_every=1"]  # fmt: skip
_LORA = ["--config", "lora", *_TRAIN, "--config.data.text=text"]
_CLASSES = ["--config", "classification", *_TRAIN, "--config.data.label=label"]


def _search(v: str, *flags: str) -> list[str]:
    return ["search", *MODEL, "--embeddings", f"embedded-{v}", *_HITS, *flags, "{out}"]


def _pairs(v: str) -> list[str]:
    return ["search", "--self", "--embeddings", f"embedded-{v}", "--threshold", "0.01", "--output",
            "{out}"]  # fmt: skip


def _fit(v: str) -> list[str]:
    return ["probe", "fit", "--data", f"{v}.csv", "--embeddings", f"embedded-{v}", "--label",
            "label", "--output", "{out}"]  # fmt: skip


def _predict(v: str) -> list[str]:
    return ["probe", "predict", "--probe", f"{v}.npz", "--embeddings", f"embedded-{v}",
            "--output", "{out}"]  # fmt: skip


def _embed(v: str, *flags: str) -> list[str]:
    return ["embed", *MODEL, v, "--output", "{out}", "--shard-size", "4", *flags]


def _evaluate(v: str, *flags: str) -> list[str]:
    return ["evaluate", *_TASK, "--data", f"data-{v}", "--output", "{out}", *flags]


def _convert(v: str, format: str) -> list[str]:
    return ["convert", f"model-{v}", "{out}", "--format", format]


def _finetune(v: str, flags: Sequence[str]) -> list[str]:
    return ["finetune", *flags, f"--config.data.path={v}-train.csv", "--workdir", "{out}"]


WRITERS: dict[str, Writer] = {
    "preview .html": Writer("o.html", lambda v: ["preview", v, "--output", "{out}"]),
    "preview .png": Writer("o.png", lambda v: ["preview", v, "--output", "{out}"]),
    "heatmap": Writer("o.png", lambda v: ["classify", *MODEL, "--text", "lung", f"{v}.svs",
                                          "--tissue", "0", "--heatmap", "{out}"]),
    "search .csv": Writer("o.csv", lambda v: _search(v, "--output")),
    "search .parquet": Writer("o.parquet", lambda v: _search(v, "--output")),
    "search sheet": Writer("o.html", lambda v: _search(v, "--sheet")),
    "search pairs": Writer("o.csv", _pairs),
    "search index": Writer("o", lambda v: ["search", "--build-index", "--embeddings", "{out}",
                                           "--kind", "image" if v == "a" else "any"],
                           replaces=False, starts_with="embedded-a"),
    "probe fit": Writer("o.npz", _fit),
    "probe predict": Writer("o.csv", _predict),
    "compare": Writer("o.md", lambda v: ["compare", "judged-a", f"judged-{v}", "--output",
                                         "{out}", *RESAMPLES]),
    "card": Writer("o.md", lambda v: ["card", f"judged-{v}", "--output", "{out}"]),
    "monitor fit": Writer("o.npz", lambda v: ["monitor", "fit", "--embeddings", f"known-{v}",
                                              "--output", "{out}"]),
    "monitor check": Writer("o", lambda v: ["monitor", "check", "--reference", "known.npz",
                                            "--embeddings", f"known-{v}", "--window", "20",
                                            "--output", "{out}"], codes=(0, 4)),
    "explain": Writer("o", lambda v: ["explain", *MODEL, "--text", "lung", "--method", "rollout",
                                      f"{v}/{v}0.png", f"{v}/{v}1.png", "--output", "{out}"]),
    "embed": Writer("o", _embed, replaces=False),
    "embed part": Writer("o", lambda v: _embed(v, "--part", "0/1"), replaces=False),
    "embed ray": Writer("o", lambda v: _embed(v, "--runner", "ray", "--address", "{ray}",
                                              "--actors", "1", "--actor-resources", "CPU=1"),
                        replaces=False),
    "evaluate": Writer("o", _evaluate, replaces=False),
    "evaluate learn": Writer("o", lambda v: ["evaluate", "--task", "digits", "--output", "{out}",
                                             "--sizes", "16", "--seeds", str(1 + "ab".index(v)),
                                             *RESAMPLES], replaces=False),
    "evaluate maps": Writer("o", lambda v: _evaluate(v, "--explain", "rollout"), replaces=False),
    "evaluate from": Writer("o", lambda v: ["evaluate", "--from", "{out}", "--export",
                                            "--resamples", "30"],
                            replaces=False, starts_with="judged-{v}"),
    "evaluate average": Writer("o", lambda v: ["evaluate", "--average", "judged-a", f"judged-{v}",
                                               "--output", "{out}", *RESAMPLES], replaces=False),
    "convert orbax": Writer("o", lambda v: _convert(v, "orbax"), replaces=False),
    "convert hf": Writer("o", lambda v: _convert(v, "huggingface"), replaces=False),
    "convert .npz": Writer("o.npz", lambda v: _convert(v, "big_vision"), replaces=False),
    "finetune": Writer("o", lambda v: _finetune(v, _LORA), replaces=False),
    "finetune classes": Writer("o", lambda v: _finetune(v, _CLASSES), replaces=False),
    "finetune export": Writer("o", lambda v: ["finetune", "--workdir", "{out}", "--export-only"],
                              replaces=False, starts_with="trained-{v}"),
    "finetune recipe": Writer("o.py", lambda v: ["finetune", "--copy-config",
                                                 {"a": "lora", "b": "contrastive"}[v], "{out}"],
                              replaces=False),
    "examples": Writer("o", lambda v: ["examples", "--copy", "{out}"], replaces=False),
    "quickstart": Writer("o", lambda v: ["quickstart", "--workdir", "{out}", "--seed",
                                         str("ab".index(v))], replaces=False),
}  # fmt: skip


# ---------------------------------------------------------------------------------------- inputs


def write_inputs() -> None:
    """Everything that the commands read, in the working directory, each in the variants a and b."""
    write_originals(Path("originals"))
    for number, v in enumerate("ab"):
        rng = np.random.default_rng(number)
        labels, texts, boxes = ["id,label"], ["image,text,label"], ["image,class,x,y,right,bottom"]
        for i in range(8 + number):
            pixels = rng.integers(0, 256, (30, 30, 3), np.uint8)
            name, label = f"{v}{i}.png", "xy"[i % 2]
            for folder in (v, f"data-{v}/{label}"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(Path(folder, name))
            labels.append(f"{name},{label}")
            texts.append(f"{v}/{name},a chest X-ray,{label}")
            boxes.append(f"{name},{label},3,3,20,20")
        for name, lines in (
            (f"{v}.csv", labels), (f"{v}-train.csv", texts), (f"data-{v}/boxes.csv", boxes),
        ):  # fmt: skip
            Path(name).write_text("\n".join(lines) + "\n")
        _write_watched(v, 40 + number)
        _write_slide(f"{v}.svs", rng)
    _write_watched("c", 40)
    Path("task.toml").write_text(TASK)


def _write_watched(v: str, count: int) -> None:
    """Images for a monitor, which needs 40."""
    rng = np.random.default_rng(ord(v))
    Path(f"watched-{v}").mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, (30, 30, 3), np.uint8)
        Image.fromarray(pixels).save(Path(f"watched-{v}", f"{i}.png"))


TASK = """
title = "Two folders"
source = "made up"
trained_on = "no"
kind = "multi_class"
score = "class_softmax"
prompts_source = "made up"
[data]
adapter = "folders"
root = ["."]
[regions]
kind = "boxes"
file = ["boxes.csv"]
image = "image"
finding = "class"
x = "x"
y = "y"
x_max = "right"
y_max = "bottom"
[[classes]]
name = "x"
present = ["a chest X-ray"]
[[classes]]
name = "y"
present = ["lung"]
"""


def _write_slide(name: str, rng: np.random.Generator) -> None:
    import tifffile

    pixels = rng.integers(90, 180, (1024, 1024, 3), np.uint8)
    text = "Aperio Image Library v11.2.1\n1024x1024 (256x256) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(
        name, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", description=text,
        metadata=None,
    )  # fmt: skip


def prepare() -> None:
    """What commands read that other commands write."""
    for v in "abc":
        _run(["embed", *MODEL, f"watched-{v}", "--output", f"known-{v}"])
    for v in "ab":
        _copy_scaled(v)
        temperature = ["--temperature", "logit_scale" if v == "a" else "none"]
        for command in (
            ["embed", *MODEL, v, "--output", f"embedded-{v}"],
            ["evaluate", *_TASK, "--data", "data-a", "--output", f"judged-{v}", *temperature],
            [*_fit(v)[:-1], f"{v}.npz"],
            [*_finetune(v, _LORA)[:-1], f"trained-{v}"],
        ):
            _run(command)
    _run(["monitor", "fit", "--embeddings", "known-c", "--output", "known.npz"])


def _run(command: Sequence[str]) -> None:
    code, text = Process(command).wait()
    assert code == 0, (command, text)


def _copy_scaled(v: str) -> None:
    """Copies the model under another name, with other weights."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree("originals/siglip", f"model-{v}")
    file = f"model-{v}/model.safetensors"
    tensors = load_file(file)
    save_file({name: x * (1 + (v == "b")) for name, x in tensors.items()}, file)
