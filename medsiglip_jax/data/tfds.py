"""Data sets that TFDS has prepared, by name: found, indexed once, and read like a table.

Only their shards and JSON files are read; neither TFDS nor the code of a data set is needed. The
index is Parquet, with a row per example and a column per feature that has a single value. It is
kept in the user's cache and not beside the shards, which belong to another program and are often
shared and read-only. Only making it takes TensorFlow.
"""

import dataclasses
import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from tqdm import tqdm

from medsiglip_jax.data import examples, tables
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import to_hash
from medsiglip_jax.files.places import Place

PREFIX = "tfds:"

# As tfds spells names (core/naming.py `_NAME_REG`), without namespaces and arguments of builders.
_NAME = re.compile(r"tfds:(\w+)(?:/([\w+\-.]+))?(?::((?:\d+|\*)(?:\.(?:\d+|\*)){2}))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO, _FEATURES = "dataset_info.json", "features.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
# Default names, which a data set may lack, and values of `positives` that are no features.
_NOT_NEEDED = ("text", "split", "group", "label")
_INDEX_FORMAT = "1"  # with another one, old indices are made again


def read(
    path: str,
    *,
    root: str | os.PathLike | None = None,
    image: str = "image",
    label: str | Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    **columns: Any,
) -> examples.Examples:
    """Reads a data set that TFDS has prepared, with the names of its splits.

    Args:
        path: "tfds:NAME[/CONFIG][:VERSION]"; the version may have wildcards, "3.*.*", and the
            highest is taken; without a configuration TFDS's default.
        root: TFDS's data_dir, local or a URI; default $TFDS_DATA_DIR or ~/tensorflow_datasets.
        image: feature of encoded images; under the default name also the only one there is.
        label: feature of classes, or several of 0 and 1. Features within others are "a/b".
        classes: names and order of the classes; default those of the ClassLabel.
        **columns: other arguments of `examples.read`, which name features instead of columns.

    Raises:
        FileNotFoundError: it is not prepared; where was looked, and what to run.
        ValueError: all that is wrong with it or with the features that were asked for.
    """
    source = find(path, root)
    if image == "image" and len(images := source.names("image")) == 1:
        image = images[0]
    source.check(image, [label] if isinstance(label, str) else label or (), columns)
    if isinstance(label, str) and classes is None:
        classes = source.features[label].classes or None
    table = dataclasses.replace(tables.read_table(str(_index(source))), path=path)
    return examples.read(table, image=image, label=label, classes=classes, **columns)


# ---------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Feature:
    """What `features.json` says about one feature.

    Attributes:
        kind: "image", "class" or "value" (a text or one number); otherwise a description for
            messages.
        classes: the names of the classes of a "class", in TFDS's order.
    """

    kind: str
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A data set that TFDS has prepared.

    Attributes:
        path: as given, for messages.
        folder: the folder of one version.
        info: the content of `dataset_info.json`.
        features: the features by name.
    """

    path: str
    folder: Place
    info: Mapping[str, Any]
    features: Mapping[str, Feature]

    def names(self, *kinds: str) -> list[str]:
        """The features of these kinds."""
        return [name for name, feature in self.features.items() if feature.kind in kinds]

    def check(self, image: str, labels: Sequence[str], columns: Mapping[str, Any]) -> None:
        """Raises one ValueError that names every feature that is asked for and cannot be read."""
        others = map(columns.get, ("text", "split", "group", "positives"))
        names = [*labels, *(name for name in others if name and name not in _NOT_NEEDED)]
        problems = [self._problem(name, ("class", "value")) for name in names]
        problems.insert(0, self._problem(image, ("image",)))
        if text := "; ".join(filter(None, problems)):
            there = ", ".join(f"{name} ({x.kind})" for name, x in self.features.items())
            raise ValueError(f"{self.path}: {text}; there are {there}")

    def _problem(self, name: str, kinds: Sequence[str]) -> str:
        if name not in self.features:
            return f"no feature {name!r}"
        if (kind := self.features[name].kind) in kinds:
            return ""
        expected = "encoded images" if "image" in kinds else "a class, a text or one number"
        return f"feature {name!r} is {kind}, expected {expected}"

    def shards(self) -> Iterator[tuple[str, str, int]]:
        """(split, path, number of examples) of every shard."""
        for split in self.info["splits"]:
            lengths = split.get("shardLengths", ())
            template = split.get("filepathTemplate") or _TEMPLATE
            digits = max(5, len(str(len(lengths))))
            for number, length in enumerate(lengths):
                i, n = f"{number:0{digits}}", f"{len(lengths):0{digits}}"
                name = template.format(
                    DATASET=self.info["name"], SPLIT=split["name"], FILEFORMAT="tfrecord",
                    SHARD_INDEX=i, NUM_SHARDS=n, SHARD_X_OF_Y=f"{i}-of-{n}",
                )  # fmt: skip
                _check_name(name, self.folder / _INFO)
                yield split["name"], str(self.folder / name), int(length)


def find(path: str, root: str | os.PathLike | None = None) -> Prepared:
    """Finds the folder of a prepared data set and reads its JSON files; see `read`."""
    match = _NAME.fullmatch(path)
    if match is None:
        raise ValueError(f"{path}: expected tfds:NAME[/CONFIG][:VERSION], the version as 1.2.3")
    name, config, version = match.groups()
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir = places.at(os.path.expanduser(os.fspath(root or default)))
    if isinstance(data_dir, Path):
        data_dir = data_dir.absolute()
    folder = _version_folder(data_dir / name, config, version or "*")
    if folder is None:
        prepared = ", ".join(_prepared(data_dir / name)) or "nothing of that name"
        raise FileNotFoundError(
            f"{path}: not prepared in {data_dir} (there is {prepared}); run: pip install "
            f"tensorflow-datasets && tfds build {path.removeprefix(PREFIX)} --data_dir={data_dir}, "
            "or say where it is with TFDS_DATA_DIR or data.root"
        )
    return _read_json_files(path, folder)


def _version_folder(base: Place, config: str | None, pattern: str) -> Place | None:
    """The highest version of a configuration, or of a data set without any."""
    metadata = base / ".config" / "metadata.json"
    if config is None and metadata.exists():
        config = _json(metadata).get("default_config_name")
        _check_name(config or "none", metadata)
    folder = base / config if config else base
    versions = [v for v in _versions(folder) if fnmatch.fnmatchcase(v, pattern)]
    return folder / versions[-1] if versions else None


def _versions(folder: Place) -> list[str]:
    names = [place.name for place in folder.iterdir()] if folder.is_dir() else []
    versions = [n for n in names if _VERSION.fullmatch(n) and (folder / n / _INFO).exists()]
    return sorted(versions, key=lambda name: tuple(map(int, name.split("."))))


def _prepared(base: Place) -> list[str]:
    """The prepared versions of a data set, spelled as TFDS does."""
    configs = sorted(place.name for place in base.iterdir()) if base.is_dir() else []
    plain = [f"{base.name}:{version}" for version in _versions(base)]
    return plain + [f"{base.name}/{c}:{v}" for c in configs for v in _versions(base / c)]


def _read_json_files(path: str, folder: Place) -> Prepared:
    info, tree = _json(folder / _INFO), _json(folder / _FEATURES)
    if (format := info.get("fileFormat", "tfrecord")) != "tfrecord":
        raise ValueError(
            f"{path}: {folder} holds {format} files, which are not read here; build it as TFRecord "
            "(tfds build --file_format=tfrecord, with another --data_dir)"
        )
    if "featuresDict" not in tree or "splits" not in info:
        raise ValueError(
            f"{path}: {folder} was prepared by an old TFDS or lacks feature names; prepare it again"
        )
    _check_name(info.get("name"), folder / _INFO)
    with explained(folder / _FEATURES, *_WRONG):
        prepared = Prepared(path, folder, info, dict(_features(tree, folder)))
    with explained(folder / _INFO, *_WRONG):
        list(prepared.shards())
    return prepared


def _check_name(name: Any, place: Place) -> None:
    """Raises a ValueError for a name of a JSON file that would lead out of its folder."""
    if not places.is_plain_name(name):
        raise ValueError(f"{place} names {name!r}; expected {places.PLAIN_NAME}")


def _json(place: Place) -> dict[str, Any]:
    try:
        return json_files.read(place, *_WRONG)
    except FileNotFoundError:
        raise FileNotFoundError(f"{place}: no such file; prepare the data set again") from None


_WRONG = "not what TFDS writes", "prepare the data set again"


def _features(tree: Mapping[str, Any], folder: Place, prefix="") -> Iterator[tuple[str, Feature]]:
    """(name, feature); nested ones are "a/b", as they are named in the shards."""
    for name, feature in tree["featuresDict"]["features"].items():
        name = f"{prefix}{name}"
        if "featuresDict" in feature:
            yield from _features(feature, folder, f"{name}/")
        else:
            yield name, _feature(name, feature, folder)


def _feature(name: str, feature: Mapping[str, Any], folder: Place) -> Feature:
    class_name = feature.get("pythonClassName", "").rpartition(".")[2]
    if "classLabel" in feature:
        return Feature("class", _class_names(name, feature["classLabel"], folder))
    if "text" in feature:
        return Feature("value")
    kind = feature.get("image") or feature.get("tensor") or {}
    shape = kind.get("shape", {}).get("dimensions", ())
    # Images of floats are bit-cast to pixels, and those of a LabeledImage are classes.
    if class_name == "Image" and kind.get("dtype", "uint8") in ("uint8", "uint16"):
        return Feature("image")
    if "tensor" in feature and not shape and kind.get("encoding", "none") == "none":
        return Feature("value")
    return Feature(" ".join(filter(None, (class_name, kind.get("dtype"), "x".join(shape)))))


def _class_names(name: str, label: Mapping[str, Any], folder: Place) -> tuple[str, ...]:
    """The names in the file beside the shards; without that file, numbers."""
    count, file = int(label.get("numClasses", 0)), folder / f"{name.replace('/', '-')}.labels.txt"
    if not file.exists():
        return tuple(map(str, range(count)))
    names = tuple(filter(None, map(str.strip, file.read_text(encoding="utf-8").split("\n"))))
    if len(names) != count:
        raise ValueError(f"{file}: {len(names)} names for {count} classes; prepare it again")
    return names


# --------------------------------------------------------------------------------------- indexing


def _index(source: Prepared) -> Path:
    """The index of a data set, which is made if the cache does not have it."""
    known = [_INDEX_FORMAT, str(source.folder), source.info, dataclasses.asdict(source)["features"]]
    key = hashlib.sha256(to_hash(known, sort_keys=True)).hexdigest()[:16]
    path = places.cache() / "tfds" / f"{source.info['name']}-{key}.parquet"
    if not path.exists():
        tables.write_parquet(path, _columns(source), None, None)
    return path


def _columns(source: Prepared) -> dict[str, pyarrow.ChunkedArray]:
    """The columns of all splits: every feature with a single value, and "split"."""
    features = {name: source.features[name] for name in source.names("image", "class", "value")}
    shards, blocks = list(source.shards()), [pyarrow.table({name: [] for name in features})]
    for split, path, length in tqdm(shards, f"indexing {source.path}", unit="shard", disable=None):
        rows = _rows(path, source)
        if len(rows) != length:
            raise ValueError(f"{path}: {len(rows)} examples, {length} by {_INFO}; prepare it again")
        columns: dict[str, list[Any]] = {"split": [split] * length}  # of one shard at a time
        for name, feature in features.items():
            columns[name] = [_cell(feature, row[name], f"{path}: {name!r}") for row in rows]
        blocks.append(pyarrow.table(columns))
    table = pyarrow.concat_tables(blocks, promote_options="default")
    return dict(zip(table.column_names, table.columns, strict=True))


def _rows(path: str, source: Prepared) -> list[dict[str, Any]]:
    try:
        from medsiglip_jax.data import tfrecord

        images, others = source.names("image"), source.names("class", "value")
        return list(tfrecord.read_shard(path, images, others))
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{source.path}: making its index needs TensorFlow; pip install 'medsiglip-jax[train]'"
        ) from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; prepare the data set again") from None


def _cell(feature: Feature, value: Any, where: str) -> Any:
    """A value as a table has it.

    Raises:
        ValueError: a class that there is not; `where` is the file and the feature.
    """
    if feature.kind == "class":
        if value < 0:  # TFDS's -1: unknown
            return None
        if feature.classes and value >= len(feature.classes):
            raise ValueError(
                f"{where} is class {value}, of {len(feature.classes)} classes by {_FEATURES}; "
                "prepare the data set again"
            )
        return feature.classes[value] if feature.classes else str(value)
    # A string may hold any bytes, and one that nobody asks for must not stop the indexing.
    return value.decode(errors="replace") if isinstance(value, bytes) else value
