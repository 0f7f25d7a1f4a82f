"""Damages checkpoint folders and tars, and sends them through the commands that read them.

    python scripts/fuzz_files.py                 # 300 files, a minute or two
    python scripts/fuzz_files.py --count 60 --json

Headers of safetensors files, configs, tokenizers, processor files and PEFT adapters go through
`info` and `classify`, tars through `embed`. Bytes are flipped, cut off, repeated and replaced, and
values of JSON files by values of other types. The exit code is 1 unless each command ends with 0, 2
or 3, says at most one line about an error, and raises nothing.
"""

import argparse
import collections
import contextlib
import io
import json
import shutil
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from damage import flipped  # noqa: E402

Rng = np.random.Generator


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="damaged files, default 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    codes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        originals = write_originals(Path(scratch) / "originals")
        for i in range(args.count):
            kind = list(KINDS)[i % len(KINDS)]
            rng = np.random.default_rng([args.seed, i])
            code, problem = attempt(kind, rng, originals, Path(scratch) / "damaged")
            codes[kind][code] += 1
            wrong += [f"{i} {kind}: {problem}"] if problem else []
    report = {"codes": {kind: dict(sorted(found.items())) for kind, found in codes.items()},
              "wrong": wrong}  # fmt: skip
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 1 if wrong else 0


def text(report: dict) -> str:
    lines = [f"{'damaged':14} exit codes"]
    for kind, codes in report["codes"].items():
        shown = ", ".join(f"{code}: {count}" for code, count in codes.items())
        lines.append(f"{kind:14} {shown}")
    return "\n".join([*lines, *(f"WRONG {line}" for line in report["wrong"])])


# ------------------------------------------------------------------------------------ originals


def write_originals(folder: Path) -> Path:
    """A checkpoint folder with all processor files, one with a tokenizer.json, and a tar."""
    from medsiglip_jax import load, save
    from medsiglip_jax.model import config
    from medsiglip_jax.model.api import init
    from medsiglip_jax.preprocess import text

    pieces = text.train(["a chest X-ray", "no finding", "lung"], 64)
    rows = text.Tokenizer(pieces).vocab_size
    size = config.two_towers(
        image_size=28, patch_size=14, width=16, depth=1, mlp_dim=16, num_heads=2, vocab_size=rows
    )
    model = init(size)
    model.processor.tokenizer_source = pieces
    save(model, folder / "siglip")
    again = load(folder / "siglip")
    save(again, folder / "siglip2")
    for name in ("spiece.model", "special_tokens_map.json"):
        (folder / "siglip2" / name).unlink()
    (folder / "siglip2" / "tokenizer.json").write_text(json.dumps(gemma(rows)))
    described = {"tokenizer_class": "Siglip2Tokenizer", "pad_token": "<pad>"}
    (folder / "siglip2" / "tokenizer_config.json").write_text(json.dumps(described))
    write_adapter(folder / "adapter", folder / "siglip")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for i in range(3):
            tar.add(folder / "image.png", f"{i}.png")
            caption = io.BytesIO(f"caption {i}".encode())
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = len(caption.getvalue())
            tar.addfile(member, caption)
    return folder


def gemma(rows: int) -> dict:
    """A tokenizer.json with as many pieces."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {piece: i for i, piece in enumerate(special)}
    vocab |= {chr(0x61 + i): len(special) + i for i in range(rows - len(special))}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}
    return {"version": "1.0", "added_tokens": [], "model": model}


def write_adapter(folder: Path, base: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    name = "base_model.model.vision_model.encoder.layers.0.mlp.fc1"
    tensors = {f"{name}.lora_A.weight": np.ones((2, 16), np.float32),
               f"{name}.lora_B.weight": np.ones((16, 2), np.float32)}  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc1"],
                "base_model_name_or_path": str(base)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


# --------------------------------------------------------------------------------------- damage


def changed(rng: Rng, data: bytes) -> bytes:
    """One value of a JSON file replaced, removed or nested; or damaged bytes."""
    if rng.random() < 0.25:
        return flipped(rng, data)
    content = json.loads(data)
    node = content
    while isinstance(node, dict) and node:
        key = list(node)[rng.integers(len(node))]
        if isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        values = [None, -1, 0, 10**30, 1e-9, "x" * 50, "", [], {}, True, [[1]], "../../etc/passwd"]
        node[key] = values[rng.integers(len(values))]
        if rng.random() < 0.2:
            del node[key]
        break
    return json.dumps(content).encode()


def weights(rng: Rng, data: bytes) -> bytes:
    """The header of a safetensors file, its length included."""
    return flipped(rng, data, 8 + int.from_bytes(data[:8], "little"))


Damage = Callable[[Rng, bytes], bytes]
# What is damaged -> the folder, the file in it, how.
KINDS: dict[str, tuple[str, str, Damage]] = {
    "safetensors": ("siglip", "model.safetensors", weights),
    "config": ("siglip", "config.json", changed),
    "spiece": ("siglip", "spiece.model", flipped),
    "tokenizer": ("siglip", "tokenizer_config.json", changed),
    "tokenizer.json": ("siglip2", "tokenizer.json", changed),
    "preprocessor": ("siglip", "preprocessor_config.json", changed),
    "adapter": ("adapter", "adapter_model.safetensors", weights),
    "adapter config": ("adapter", "adapter_config.json", changed),
    "tar": ("", "shard.tar", flipped),
}


def attempt(kind: str, rng: Rng, originals: Path, folder: Path) -> tuple[int, str]:
    """The exit code of the command, and what is wrong with how it ended."""
    shutil.rmtree(folder, ignore_errors=True)
    where, name, damage = KINDS[kind]
    if where:
        shutil.copytree(originals / where, folder)
    else:
        folder.mkdir()
    original = (originals / where / name).read_bytes()
    (folder / name).write_bytes(damage(rng, original))
    image, model = str(originals / "image.png"), str(originals / "siglip")
    if kind == "tar":
        command = ["embed", "--model", model, "--output", str(folder / "out"), str(folder / name)]
    else:
        command = ["classify", "--model", str(folder), "--text", "a lung", image]
    return outcome(command)


def outcome(command: list[str]) -> tuple[int, str]:
    from medsiglip_jax import cli

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = cli.main(command)
    except BaseException:
        return -1, traceback.format_exc().strip().splitlines()[-1]
    said = [line for line in err.getvalue().splitlines() if line.startswith("medsiglip-jax")]
    problems = []
    if code not in (0, 2, 3):
        problems.append(f"exit code {code}: {err.getvalue().strip()[-200:]}")
    if code == 2 and len(said) != 1:
        problems.append(f"{len(said)} lines: {err.getvalue().strip()[:300]}")
    if "Traceback" in err.getvalue():
        problems.append("a traceback")
    return code, "; ".join(problems)


if __name__ == "__main__":
    sys.exit(main())
