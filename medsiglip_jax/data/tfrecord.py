"""TFRecord shards: written with an index beside them, and the shards of others indexed.

With the index, which `tables.read_index` reads, neither training nor `embed` needs TensorFlow: the
images are ranges of bytes of the shards.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from medsiglip_jax.data.examples import Examples, write
from medsiglip_jax.data.tables import INDEX
from medsiglip_jax.files import places, storage
from medsiglip_jax.preprocess import facts, sources

# A TFRecord is length (8 bytes), its CRC (4), content, CRC (4).
_HEADER, _FOOTER = 12, 4
_GZIP = b"\x1f\x8b\x08"
_PER_SHARD = 1000


def write_shards(examples: Examples, folder: str | os.PathLike, shards: int | None = None) -> None:
    """Packs examples into shards of `tf.train.Example`, with an index that `examples.read` reads.

    The files of the images are copied as they are, in order, not decoded. A record has the features
    that the examples have: `image`, `text`, `group`, `split` (bytes), `label` (int64, or a float
    per class), `positives` (int64).

    Args:
        examples: what to write.
        folder: new or empty, local or remote; it appears when it is complete.
        shards: number of files; default one per 1,000 images.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        UnreadableImage: the file of an image is missing or cannot be read.
        ValueError: no examples, more shards than examples, or a class named like another column.
    """
    if not len(examples) or (shards is not None and not 1 <= shards <= len(examples)):
        raise ValueError(
            f"cannot write {len(examples)} examples to shards={shards}; expected 1 to "
            f"{len(examples)} shards, so that each has an example"
        )
    count = shards or -(-len(examples) // _PER_SHARD)
    with storage.new_folder(places.at(folder), marker=INDEX) as partial:
        images = []
        for number, rows in enumerate(np.array_split(np.arange(len(examples)), count)):
            name = f"{number:05d}-of-{count:05d}.tfrecord"
            images += _write_shard(partial / name, examples, rows.tolist())
        write(replace(examples, images=images), partial / INDEX)


def _write_shard(path: Path, examples: Examples, rows: Sequence[int]) -> list[str]:
    """Writes the rows; returns "path#offset:length" of every image."""
    images, position = [], 0
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            source = examples.images[row]
            try:
                data = sources.read_bytes(source)
            except facts.UnreadableImage as error:
                raise error.of(source) from None
            record = _example(data, examples, row).SerializeToString()
            writer.write(record)
            start = position + _HEADER + record.index(data)
            images.append(f"{path}#{start}:{len(data)}")
            position += _HEADER + len(record) + _FOOTER
    return images


def _example(data: bytes, examples: Examples, row: int) -> Any:
    columns = {
        "text": examples.texts, "group": examples.groups, "split": examples.splits,
        "label": examples.labels, "positives": examples.positives,
    }  # fmt: skip
    cells = {name: column[row] for name, column in columns.items() if column is not None}
    features = {name: _feature(cell) for name, cell in {"image": data, **cells}.items()}
    return tf.train.Example(features=tf.train.Features(feature=features))


def _feature(cell: Any) -> Any:
    if isinstance(cell, str | bytes):
        data = cell.encode() if isinstance(cell, str) else cell
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))
    if cell.dtype == np.float32:
        return tf.train.Feature(float_list=tf.train.FloatList(value=cell))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[int(cell)]))


def index_shards(
    paths: Sequence[str], image: str = "image", text: str | None = "text", label: str | None = None
) -> Examples:
    """Reads through shards that another program wrote, once, to find the images in them.

    `examples.write` keeps the result as a table for the next time. Data sets prepared by TFDS are
    such shards, too; `tfds.read` finds them by name.

    Args:
        paths: the files, local or gs://.
        image: feature with the bytes of an encoded image.
        text: feature with the caption; the default may be absent.
        label: feature with a class index (-1 is unknown) or a class name.

    Returns:
        Examples whose images are "shard#offset:length".

    Raises:
        ValueError: there are no examples, a file is not TFRecord or is cut off, an example lacks a
            feature, or one is not of the right type.
    """
    others = [name for name in (text, label) if name]
    optional = {"text"} - {label}
    rows = [row for path in paths for row in read_shard(path, [image], others, optional)]
    if not rows:
        raise ValueError(f"{', '.join(paths) or 'no shards'}: no examples")
    texts = [_decoded(row[text], text, row[image]) for row in rows if text and text in row]
    if texts and len(texts) < len(rows):
        raise ValueError(f"only {len(texts)} of {len(rows)} examples have the feature {text!r}")
    indices, classes = _classes(rows, label, image) if label else (None, ())
    return Examples([row[image] for row in rows], texts or None, indices, classes)


def read_shard(
    path: str, images: Sequence[str], others: Sequence[str], optional: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields name -> value for every example of a shard; an image is "path#offset:length".

    Args:
        path: the shard, local or a URI.
        images: features with the bytes of an image.
        others: features with one number or one string of bytes.
        optional: those of `others` that an example may lack.

    Raises:
        ValueError: the file is not TFRecord or is cut off, or an example lacks a feature.
    """
    for start, record in _records(path):
        features, row = _features(path, start, record), {}
        for name in (*images, *others):
            if name in features or name not in optional:
                row[name] = _value(features, name, path, start)
        for name in images:
            row[name] = f"{path}#{start + record.index(row[name])}:{len(row[name])}"
        yield row


def _decoded(value: Any, name: str, where: str) -> str:
    """The text of a feature of the example at `where`."""
    if not isinstance(value, bytes):
        raise ValueError(f"{where}: feature {name!r} is {value!r}; expected text")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: feature {name!r} is not UTF-8 text ({error.reason})") from None


def _classes(
    rows: Sequence[Mapping[str, Any]], label: str, image: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Whole numbers as they are (-1 is unknown), so that all splits agree; names sorted."""
    labels = [row[label] for row in rows]
    if all(isinstance(value, int) for value in labels):
        indices = np.array(labels, np.int32)
        return indices, tuple(map(str, range(max(labels) + 1)))
    names = [_decoded(row[label], label, row[image]) for row in rows]
    classes, indices = np.unique(names, return_inverse=True)
    return indices.astype(np.int32), tuple(classes.tolist())


def _records(path: str) -> Iterator[tuple[int, bytes]]:
    """(position, content) of every record; framing of tensorflow/core/lib/io/record_writer.h."""
    position = 0
    with places.in_words(path), places.open_binary(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        while position < end:
            header = file.read(_HEADER)
            length = int.from_bytes(header[:8], "little")
            if position + _HEADER + length + _FOOTER > end:
                reason = "compressed by gzip" if header.startswith(_GZIP) else "or cut off"
                raise ValueError(f"{path}: not a TFRecord file, {reason}, at byte {position}")
            yield position + _HEADER, file.read(length)
            file.read(_FOOTER)
            position += _HEADER + length + _FOOTER


def _features(path: str, start: int, record: bytes) -> Mapping[str, Any]:
    try:
        return tf.train.Example.FromString(record).features.feature
    except Exception as error:  # protobuf's DecodeError, which moved between its versions
        raise ValueError(f"{path}: no tf.train.Example at byte {start}") from error


def _value(features: Mapping[str, Any], name: str, path: str, start: int) -> Any:
    kind = features[name].WhichOneof("kind") if name in features else None
    values = getattr(features[name], kind).value if kind else ()
    if len(values) != 1:
        raise ValueError(
            f"{path}, byte {start}: feature {name!r} has {len(values)} values, expected one; the "
            f"features are {', '.join(sorted(features))}"
        )
    return values[0]
