"""Small files that people or other programs may have changed: read, or refused in one line.

Every kind of metadata file that a command reads is mutated, value by value: the outcome is success,
or a ValueError or OSError of one line that names the file, never another exception.
"""

import contextlib
import copy
import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import source_files

from medsiglip_jax.files.failures import explained

GOLDEN = Path(__file__).parent / "golden" / "siglip-tiny"

# Stands for so many nested lists, which json.dumps could not write.
DEEP = {"deep 300": 300, "deep 100000": 100_000}
VALUES = {
    "null": None, "list": [], "object": {}, "list of objects": [{}], "strings": ["a", "b"],
    "huge": 10**30, "million": 1_000_000, "float": 0.5, "NaN": float("nan"),
    "infinity": float("inf"), "text": "\x1b[31mtext", "true": True, "negative": -1, "zero": 0,
    **{name: f"<{name}>" for name in DEEP},
}  # fmt: skip
WHOLE = [b"", b"\0", b"\xff\xfe{", b"{", b"null", b"[]", b'"text"', b"3", b"[" * 100_000,
         b'{"a": ' * 100_000]  # fmt: skip


def nested(text: str, opening: str = "[", closing: str = "]") -> str:
    for name, levels in DEEP.items():
        text = text.replace(f'"<{name}>"', opening * levels + closing * levels)
    return text


class Json:
    @staticmethod
    def load(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    @staticmethod
    def store(path: Path, content: Any) -> None:
        path.write_text(nested(json.dumps(content)), encoding="utf-8")


class Lines:
    """The last line of a .jsonl file."""

    @staticmethod
    def load(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])

    @staticmethod
    def store(path: Path, content: Any) -> None:
        before = path.read_text(encoding="utf-8").splitlines()[:-1]
        text = "\n".join([*before, nested(json.dumps(content))])
        path.write_text(text + "\n", encoding="utf-8")


class Toml:
    @staticmethod
    def load(path: Path) -> Any:
        return tomllib.loads(path.read_text(encoding="utf-8"))

    @staticmethod
    def store(path: Path, content: Any) -> None:
        lines = [f"{json.dumps(key)} = {_toml(value)}" for key, value in content.items()]
        path.write_text(nested("\n".join(lines)), encoding="utf-8")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool | float) else json.dumps(value)


class Probe:
    """The metadata of a probe."""

    @staticmethod
    def load(path: Path) -> Any:
        with np.load(path) as file:
            return json.loads(str(file["metadata"]))

    @staticmethod
    def store(path: Path, content: Any) -> None:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        np.savez(path, **arrays | {"metadata": np.array(nested(json.dumps(content)))})


class Parquet:
    """The metadata of a Parquet file."""

    @staticmethod
    def load(path: Path) -> Any:
        return json.loads(pq.read_schema(path).metadata[b"medsiglip_jax"])

    @staticmethod
    def store(path: Path, content: Any) -> None:
        table = pq.read_table(path)
        metadata = {**table.schema.metadata, b"medsiglip_jax": nested(json.dumps(content)).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)


@dataclass
class Kind:
    """A kind of file: where one is, how its content is stored, and what a command does with it."""

    file: Path
    read: Callable[[], Any]
    codec: Any = Json

    def mutants(self, seed: int, count: int) -> Iterator[str]:
        """Writes mutated files; yields what each is."""
        content, rng = self.codec.load(self.file), np.random.default_rng(seed)
        cases = [(place, name) for place in places(content) for name in (*VALUES, "missing")]
        chosen = rng.permutation(len(cases))[:count]
        whole = self.file.read_bytes()
        for number in sorted(chosen.tolist()):
            place, name = cases[number]
            with contextlib.suppress(TypeError):  # what TOML cannot hold
                self.codec.store(self.file, changed(content, place, name))
                yield f"{'.'.join(map(str, place))} is {name}"
            self.file.write_bytes(whole)
        for text in [WHOLE[i] for i in rng.permutation(len(WHOLE))[: max(4, count // 2)]]:
            self.file.write_bytes(text)
            yield f"the file is {text[:20]!r}"
        self.file.write_bytes(whole)


def places(content: Any, above: tuple = ()) -> list[tuple]:
    """The places of all values: of lists only the first, the others are like it."""
    found = [above] if above else []
    if isinstance(content, dict):
        items = list(content.items())
    else:
        items = list(enumerate(content))[:1] if isinstance(content, list) else []
    return found + [place for key, value in items for place in places(value, (*above, key))]


def changed(content: Any, place: tuple, name: str) -> Any:
    content = copy.deepcopy(content)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if name != "missing":
        parent[place[-1]] = VALUES[name]
    elif isinstance(parent, dict):
        del parent[place[-1]]
    else:
        parent.pop(place[-1])
    return content


# ------------------------------------------------------------------------------------- the kinds


def checkpoint_files(folder: Path) -> dict[str, Kind]:
    """The JSON files of checkpoints of every layout."""
    import medsiglip_jax
    from medsiglip_jax.model.weights import layouts

    def kind(layout: str, name: str) -> Kind:
        def read() -> None:
            layouts.check(layouts.open_checkpoint(folder / layout))

        return Kind(folder / layout / name, read)

    shutil.copytree(GOLDEN, folder / "siglip")
    model = medsiglip_jax.load(GOLDEN)
    medsiglip_jax.save(model, folder / "orbax", "orbax")
    shutil.copytree(GOLDEN, folder / "sharded")
    index = folder / "sharded" / "model.safetensors.index.json"
    (folder / "sharded" / "model.safetensors").rename(folder / "sharded" / "a.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "sharded" / "a.safetensors", "numpy") as file:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(file.keys(), "a.safetensors")}))
    medsiglip_jax.save(model, folder / "pixels")
    config = json.loads((folder / "pixels" / "preprocessor_config.json").read_text())
    whole = {"image_processor": config}
    shutil.copytree(folder / "pixels", folder / "processor")
    (folder / "processor" / "processor_config.json").write_text(json.dumps(whole))
    _write_classifier(folder / "classifier")
    _write_adapter(folder / "adapter")
    return {
        "config.json": kind("siglip", "config.json"),
        "config.json of a classifier": kind("classifier", "config.json"),
        "preprocessor_config.json": kind("pixels", "preprocessor_config.json"),
        "processor_config.json": kind("processor", "processor_config.json"),
        "model.safetensors.index.json": kind("sharded", "model.safetensors.index.json"),
        "medsiglip_jax.json": kind("orbax", "medsiglip_jax.json"),
        "orbax's _METADATA": kind("orbax", "params/_METADATA"),
        "adapter_config.json": kind("adapter", "adapter_config.json"),
    }


def _write_classifier(folder: Path) -> None:
    import medsiglip_jax
    from medsiglip_jax.model import api
    from medsiglip_jax.model.config import ClassifierConfig, ModelConfig

    model = medsiglip_jax.load(GOLDEN)
    config = ModelConfig(
        model.config.vision, None, ClassifierConfig(("a", "b"), thresholds=(0.5, None))
    )
    width = config.embed_dim
    head = {"kernel": np.ones((width, 2), np.float32), "bias": np.zeros(2, np.float32)}
    img = {k: v for k, v in model.params["img"].items() if k != "MAPHead_0"}
    import dataclasses

    assert config.vision
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, pool="mean"))
    medsiglip_jax.save(api.Model({"img": img, "classifier": head}, config), folder)


def _write_adapter(folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    name = "base_model.model.vision_model.encoder.layers.1.self_attn.q_proj"
    a, b = np.ones((4, 32), np.float32), np.ones((32, 4), np.float32)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = dict(
        peft_type="LORA", base_model_name_or_path=str(GOLDEN), r=4, lora_alpha=6,
        rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 6}, modules_to_save=None,
        auto_mapping={"base_model_class": "SiglipModel"}, init_lora_weights=True,
        target_modules=["q_proj"], use_rslora=False,
    )  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def tokenizer_files(folder: Path, tokens: bytes) -> dict[str, Kind]:
    from medsiglip_jax.preprocess import tokenizer_files as files

    siglip = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>",
              "do_lower_case": True, "model_max_length": 64, "padding_side": "right",
              "extra_special_tokens": [], "added_tokens_decoder": {
                  "1": {"content": "</s>", "lstrip": True, "special": True}}}  # fmt: skip
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
            "extra_special_tokens": ["<x>"],
            "added_tokens_decoder": {"0": {"content": "<pad>", "special": True}}}  # fmt: skip
    special = {"eos_token": {"content": "</s>", "lstrip": True}, "pad_token": "</s>"}
    whole = json.dumps(TOKENIZER).encode()

    def kind(name: str, content: Any, **beside: bytes) -> Kind:
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir()
        (place / name).write_text(json.dumps(content))
        for other, data in beside.items():
            (place / other.replace("_json", ".json")).write_bytes(data)
        if tokens in beside.values():
            (place / "spiece").rename(place / "spiece.model")

        def read() -> None:
            with explained(place, "not a tokenizer"):  # as `Processor` does
                files.open_tokenizer(files.read_files(place), 64)(["a photo"])

        return Kind(place / name, read)

    return {
        "tokenizer_config.json": kind("tokenizer_config.json", siglip, spiece=tokens),
        "special_tokens_map.json": kind(
            "special_tokens_map.json", special, spiece=tokens, tokenizer_config_json=b"{}"
        ),
        "tokenizer.json": kind("tokenizer.json", TOKENIZER),
        "tokenizer_config.json, fast": kind("tokenizer_config.json", fast, tokenizer_json=whole),
    }


TOKENIZER = {
    "version": "1.0", "truncation": {"direction": "Right", "max_length": 8,
                                     "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    "added_tokens": [{"id": 0, "content": "<pad>", "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False, "special": True}],
    "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "a": 1, "photo": 2}, "unk_token": "<pad>"},
}  # fmt: skip


def embedding_files(folder: Path) -> dict[str, Kind]:
    from embeddings.embedding_runs import draw, write_labelled_run

    from medsiglip_jax.embeddings import index, nearest, provenance, store
    from medsiglip_jax.embeddings.probe import linear
    from medsiglip_jax.inference import abstain, run_folder, shards
    from medsiglip_jax.inference.manifest import RunRecord, Weights
    from medsiglip_jax.model.weights import outputs
    from medsiglip_jax.preprocess.dicom import rules
    from medsiglip_jax.trust import known as trust
    from medsiglip_jax.trust.monitor import images, reference, scores

    dicom = rules.Rules().to_dict()
    vectors, labels = draw(20)
    run = write_labelled_run(
        folder / "run", [f"i{n}" for n in range(20)], vectors, dicom=dicom, versions={"jax": "1"},
        expansion={"mpp": 0.5}, skipped={"hidden": 1}, dim=vectors.shape[1],
        pixels={"mean": [0.5] * 3, "std": [0.5] * 3, "resample": "bicubic"},
        identifiers=None, rows=20,
    ).folder  # fmt: skip
    made = provenance.of_run(store.Embeddings(run).manifest)
    linear.fit(vectors, labels, *draw(20, seed=1), provenance=made).save(folder / "probe.npz")

    def search() -> None:
        embeddings = store.Embeddings(run)
        _ = provenance.of_run(embeddings.manifest)
        _, rows = nearest.top_k(vectors[:1], embeddings, 3)
        embeddings.ids(rows[0].tolist())

    content = json.loads((run / "manifest.json").read_text())
    for part in content["parts"]:
        part["bytes"] = (run / part["file"]).stat().st_size
    (run / "manifest.json").write_text(json.dumps(content))

    def finish() -> None:
        run_folder.finished_manifest(run)

    def predict() -> None:
        probe = linear.open_probe(folder / "probe.npz")
        probe.predict(vectors)
        rules.from_dict(probe.provenance.dicom)

    twice = np.concatenate([vectors, vectors + 0.1])  # as many images as a reference needs
    known = images.Images(
        twice, np.arange(40), {"scanner": ["a", "b"] * 20}, [], [""] * 40, np.arange(40)
    )
    prompts = reference.Prompts(("a photo",), vectors[:1], 1.0, -2.0)
    probe = linear.open_probe(folder / "probe.npz")
    fitted = reference.build(known, made, by=("scanner",), prompts=prompts, probe=probe)
    fitted.save(folder / "reference.npz")

    def check() -> None:
        scores.of_reference(reference.open_reference(folder / "reference.npz"))

    def abstention() -> None:
        known = abstain.open_reference(folder / "reference.npz")
        trust.check(known, made, folder / "reference.npz")
        known.abstention(0.9).judge(vectors)

    record = RunRecord(model=Weights("m", "x"), preprocess="big_vision", normalized=True, dim=12)
    (folder / "begun").mkdir()
    (folder / "begun" / "run.json").write_text(json.dumps(record.to_dict()))

    def resume() -> None:
        outputs.explained(folder / "begun")
        run_folder.recorded_dtype(folder / "begun")
        with run_folder.hold(folder / "begun", record):
            pass

    kinds = {
        "manifest.json": Kind(run / "manifest.json", search),
        "manifest.json, finished": Kind(run / "manifest.json", finish),
        "run.json": Kind(folder / "begun" / "run.json", resume),
        "a probe": Kind(folder / "probe.npz", predict, Probe),
        "a reference": Kind(folder / "reference.npz", check, Probe),
        "a reference, to abstain": Kind(folder / "reference.npz", abstention, Probe),
    }
    shutil.copytree(run, folder / "indexed")
    with contextlib.suppress(ModuleNotFoundError):
        index.build(store.Embeddings(folder / "indexed"))
        approximate = lambda: index.top_k(vectors[:1], store.Embeddings(folder / "indexed"), 3)  # noqa: E731
        kinds["index.json"] = Kind(folder / "indexed" / "index.json", approximate)
    part = folder / "part.parquet"
    import pyarrow as pa

    note = json.dumps({"errors": [["a", "b"]], "turned": 0, "rows": 1}).encode()
    table = pa.table({"id": ["a"]}).replace_schema_metadata({b"medsiglip_jax": note})
    pq.write_table(table, part)
    kinds["the note of a part"] = Kind(part, lambda: shards.read_note(part), Parquet)
    return kinds


def evaluation_files(folder: Path) -> dict[str, Kind]:
    from medsiglip_jax.evaluate import scores, tasks
    from medsiglip_jax.evaluate.results.comparison import compare
    from medsiglip_jax.plan import gpus

    library, kinds = Path(tasks.__file__).parent / "library", {}
    for name in ("chexpert-test", "chestmnist"):
        path = Path(shutil.copy(library / f"{name}.toml", folder))

        def read(path=path) -> None:
            task = tasks.read(str(path))
            _ = task.layout, task.figures, task.prompts_sha256()

        kinds[f"task {name}"] = Kind(path, read, Toml)
    path = folder / "chexpert-test.toml"
    (folder / "task.json").write_text(json.dumps(tomllib.loads(path.read_text())))
    kinds["task.json"] = Kind(folder / "task.json", lambda: tasks.read(str(folder / "task.json")))
    task = tasks.read(str(path))
    (folder / "prompts.json").write_text(json.dumps({task.classes[0].name: {"present": ["a"]}}))
    prompts = lambda: task.with_prompts(folder / "prompts.json")  # noqa: E731
    kinds["prompts"] = Kind(folder / "prompts.json", prompts)
    shutil.copy(Path(gpus.__file__).parent / "cards.toml", folder / "cards.toml")
    kinds["cards"] = Kind(folder / "cards.toml", lambda: gpus.read(folder / "cards.toml"), Toml)
    meta = {"task": task.to_dict(), "cell": {}, "cells": [], "counts": {"lost": 0}, "run": "r",
            "statistics": {"resamples": 10, "seed": 0}, "provenance": {"model": "m"}}  # fmt: skip
    values = np.linspace(0, 1, 8).reshape(4, 2)
    made = scores.Scores(list("abcd"), ["x", "y"], values, np.eye(2)[[0, 1, 0, 1]], None, meta)
    for side in "AB":
        scores.write(folder / side / scores.FILE, made)
    compared = lambda: compare(folder / "A", folder / "B", resamples=10)  # noqa: E731
    kinds["scores.parquet"] = Kind(folder / "A" / scores.FILE, compared, Parquet)
    return kinds


def training_files(folder: Path) -> dict[str, Kind]:
    from medsiglip_jax.model.weights import outputs
    from medsiglip_jax.train import finetune, run_record

    run = folder / "workdir"
    (run / "export").mkdir(parents=True)
    (run / "checkpoints" / "3").mkdir(parents=True)
    (run / "export" / "config.json").write_text("{}")
    recipe = {"total_steps": 5, "data": [], "objective": {"name": "x"}}
    content = {"recipe": recipe, "init_sha256": "a", "data_sha256": "b"}
    (run / "config.json").write_text(json.dumps(content))
    before = {**content, "recipe": {**recipe, "total_steps": 6}}

    def resume() -> None:
        outputs.exported(run)
        found = run_record.read(run)
        if found:
            run_record.compare(run, found, before, True, lambda line: None)

    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    from medsiglip_jax.train import loop

    def metrics() -> None:
        finetune.NotFinite(run, 3)
        loop.MetricsLog(run / "metrics.jsonl", 1)

    return {
        "config.json of a run": Kind(run / "config.json", resume),
        "metrics.jsonl": Kind(run / "metrics.jsonl", metrics, Lines),
    }


def data_files(folder: Path) -> dict[str, Kind]:
    import pyarrow as pa

    from medsiglip_jax.data import examples, tables, tfds

    base = folder / "tfds" / "x"
    version = base / "c" / "1.0.0"
    version.mkdir(parents=True)
    (base / ".config").mkdir()
    (base / ".config" / "metadata.json").write_text(json.dumps({"default_config_name": "c"}))
    info = {"name": "x", "fileFormat": "tfrecord",
            "splits": [{"name": "train", "shardLengths": ["2", "1"], "filepathTemplate":
                        "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}]}  # fmt: skip
    features = {
        "image": {"pythonClassName": "a.Image", "image": {
            "dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}}},
        "label": {"pythonClassName": "a.ClassLabel", "classLabel": {"numClasses": "2"}},
        "meta": {"pythonClassName": "a.FeaturesDict", "featuresDict": {"features": {
            "note": {"pythonClassName": "a.Text", "text": {}}}}},
        "number": {"pythonClassName": "a.Tensor", "tensor": {
            "dtype": "int64", "encoding": "none", "shape": {}}},
    }  # fmt: skip
    (version / "dataset_info.json").write_text(json.dumps(info))
    (version / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))

    def prepared() -> None:
        found = tfds.find("tfds:x", folder / "tfds")
        list(found.shards())

    rows = folder / "rows.jsonl"
    rows.write_text('{"image": "a.png", "label": 1}\n{"image": "b.png", "label": 0}\n')
    table = folder / "table.parquet"
    content = pa.table({"image": ["a.png", "b.png"], "label": ["x", "y"]})
    meta = json.dumps({"label": "label", "classes": ["x", "y"]}).encode()
    pq.write_table(content.replace_schema_metadata({b"medsiglip_jax": meta}), table)
    return {
        "metadata.json of TFDS": Kind(base / ".config" / "metadata.json", prepared),
        "dataset_info.json": Kind(version / "dataset_info.json", prepared),
        "features.json": Kind(version / "features.json", prepared),
        "rows.jsonl": Kind(rows, lambda: tables.read_table(str(rows)), Lines),
        "metadata of a table": Kind(
            table, lambda: examples.read(tables.read_table(str(table))), Parquet
        ),
    }


# ------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    from medsiglip_jax.preprocess import text

    captions = [f"{what} of a {part}" for what in ("photo", "scan", "drawing") for part in "abcdef"]
    tokens, found = text.train(captions, 40), {}
    for make in (checkpoint_files, embedding_files, evaluation_files, training_files, data_files):
        found |= make(tmp_path_factory.mktemp(make.__name__))
    return found | tokenizer_files(tmp_path_factory.mktemp("tokenizers"), tokens)


@pytest.mark.torture
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused_in_one_line(kinds, torture):
    """For every kind of small file, whatever its values become."""
    problems, refused = [], 0
    for name, kind in kinds.items():
        kind.read()
        for what in kind.mutants(0, 8 * torture):
            if problem := outcome(kind):
                problems.append(f"{name}: {what}: {problem}")
            refused += problem is None
    assert not problems, f"{len(problems)} of {len(kinds)} kinds:\n" + "\n".join(problems[:20])
    assert refused > 6 * len(kinds)


def outcome(kind: Kind) -> str | None:
    """What is wrong with the outcome of reading; None if it is refused, "" if it is read."""
    try:
        kind.read()
    except (ValueError, OSError) as error:
        said = str(error)
        named = [str(path) for path in (kind.file, *list(kind.file.parents)[:3])]
        if not any(path in said for path in named):
            return f"names no file: {said[:200]}"
        lines = getattr(error, "problems", [said])  # a CheckpointError lists several
        if any("\n" in line or len(line) > 700 for line in lines):
            return f"no short line: {said[:200]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def test_json_and_toml_are_read_in_one_place():
    """Where depth and types are checked: `files.documents`."""
    reads = re.compile(r"\b(json|tomllib)\.loads?\(|\bnp\.load\(")
    found = {path for path, text in source_files.texts().items() if reads.search(text)}
    assert found == {"files/documents.py"}
