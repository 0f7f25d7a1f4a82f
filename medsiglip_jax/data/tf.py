"""TensorFlow: a codec for `loader`, equal to PIL and numpy to the bit; TFRecord; TensorBoard.

The only file that imports TensorFlow, which never sees an accelerator here.

JPEG is decoded by TensorFlow with the DCT that PIL uses, and the default preset is its own
`tf.image.resize`. Everything else, and every file that it refuses, goes through `decode`, so that
verdicts and messages are the same with and without TensorFlow.

The kernels are called eagerly from `loader`'s threads, and not from a tf.data graph: there an
unreadable file ends the iterator or loses its place, where it should become a masked row.
Images/s against a plain PIL loader (1024-px JPEG to 448 px; 1 thread, 2 threads): `loader` 1.0x and
0.8x, these kernels 1.65x and 1.8x, the same through tf.data's `numpy_function` 1.0x and 1.4x, in a
tf.data graph, without masks, 1.85x and 1.85x.
"""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL.JpegImagePlugin import JpegImageFile

from medsiglip_jax.data.examples import Examples, write
from medsiglip_jax.data.tables import INDEX
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.places import Place
from medsiglip_jax.preprocess import facts
from medsiglip_jax.preprocess.codec import Codec
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import preset
from medsiglip_jax.preprocess.sources import read_bytes

# A TFRecord is length (8 bytes), its CRC (4), content, CRC (4).
_HEADER, _FOOTER = 12, 4
_GZIP = b"\x1f\x8b\x08"


def tf_codec(preprocess: str, dicom: Rules = Rules()) -> Codec:
    """TensorFlow's decoder, and its resize for the preset that is defined by it."""
    tf.config.set_visible_devices([], "GPU")  # or it takes the memory that JAX needs
    if preprocess == "big_vision":
        return Codec(lambda data: _decode(data, dicom), _resize, dicom)
    return Codec(lambda data: np.asarray(_decode(data, dicom)), preset(preprocess), dicom)


def _decode(data: bytes, dicom: Rules) -> Any:
    """uint8 [H,W,3] as a tensor or an array, bit-equal to `decode`; raises what that raises."""
    if data.startswith(b"\xff\xd8") and _is_plain_jpeg(data):
        try:
            return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        except tf.errors.InvalidArgumentError:
            pass
    return decode(data, dicom)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether PIL accepts the header, and TensorFlow then gives the same pixels.

    Of 6,000 mutated files none was judged differently after PIL had read the header, and pixels
    differed only where scans of a progressive file were missing.
    """
    try:
        header = JpegImageFile(io.BytesIO(data))
    except Exception:  # `decode` says what is wrong
        return False
    plain = header.mode in ("L", "RGB") and "progressive" not in header.info
    return plain and 0 < header.width * header.height <= facts.MAX_PIXELS


def _resize(image: Any, size: int) -> np.ndarray:
    """The preset "big_vision" by the kernel that it is defined by."""
    if tuple(image.shape[:2]) == (size, size):
        return np.array(image)
    # What tf.image.resize(antialias=False) calls, without 0.1 ms of Python around it.
    resized = tf.raw_ops.ResizeBilinear(
        images=tf.expand_dims(image, 0), size=(size, size), half_pixel_centers=True
    )
    return resized.numpy()[0].astype(np.uint8)  # truncates (big_vision pp/ops_image.py:57-87)


class EventFile:
    """Metrics as TensorBoard reads them; every run on a folder adds a file of its own."""

    def __init__(self, folder: Place):
        name = f"events.out.tfevents.{time.time_ns() // 1_000_000_000}.{os.getpid()}"
        self._place, self._uploaded = folder / name, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._local = Path(folder if isinstance(folder, Path) else tempfile.mkdtemp()) / name
        self._file = tf.io.TFRecordWriter(str(self._local))
        self._write(file_version="brain.Event:2")

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of a line of `metrics.jsonl`."""
        values = [
            tf.compat.v1.Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self._write(step=line["step"], summary=tf.compat.v1.Summary(value=values))

    def _write(self, **event: Any) -> None:
        event_proto = tf.compat.v1.Event(wall_time=time.time(), **event)
        self._file.write(event_proto.SerializeToString())
        self._file.flush()
        if time.monotonic() > self._uploaded + storage.UPLOAD_SECONDS:
            self._upload()

    def _upload(self) -> None:
        if self._local != self._place:
            with storage.new_file(self._place) as partial:
                shutil.copyfile(self._local, partial)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()
        self._upload()
        if self._local != self._place:
            shutil.rmtree(self._local.parent)


def write_tfrecords(
    examples: Examples, folder: str | os.PathLike, shards: int | None = None
) -> None:
    """Packs examples into shards of `tf.train.Example`, and an index that `examples.read` reads.

    The files of the images are copied as they are, in order, not decoded. Every feature that the
    examples have is there: `image`, `text`, `group`, `split` (bytes), `label` (int64, or float per
    class), `positives` (int64).

    Args:
        examples: what to write.
        folder: new or empty, local or remote; it appears when it is complete.
        shards: number of files; default one per 1,000 images.

    Raises:
        FileExistsError: `folder` is there and not empty.
        UnreadableImage: a file of an image is missing or cannot be read.
        ValueError: no examples or fewer than shards, or a class with the name of another column.
    """
    if not len(examples) or (shards is not None and not 1 <= shards <= len(examples)):
        raise ValueError(
            f"cannot write {len(examples)} examples to shards={shards}, expected 1 or more in each"
        )
    count = shards or -(-len(examples) // 1000)
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
                data = read_bytes(source)
            except UnreadableImage as error:
                raise error.of(source) from None
            record = _example(data, examples, row).SerializeToString()
            writer.write(record)
            start = position + _HEADER + record.index(data)
            images.append(f"{path}#{start}:{len(data)}")
            position += _HEADER + len(record) + _FOOTER
    return images


def _example(data: bytes, examples: Examples, row: int) -> Any:
    features = {"image": _bytes_feature(data)}
    for name, column in [
        ("text", examples.texts), ("group", examples.groups), ("split", examples.splits),
    ]:  # fmt: skip
        if column is not None:
            features[name] = _bytes_feature(column[row].encode())
    for name, column in [("label", examples.labels), ("positives", examples.positives)]:
        if column is not None and column.dtype == np.float32:
            features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=column[row]))
        elif column is not None:
            value = [int(column[row])]
            features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=value))
    return tf.train.Example(features=tf.train.Features(feature=features))


def _bytes_feature(data: bytes) -> Any:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))


def index_tfrecords(
    paths: Sequence[str], image: str = "image", text: str | None = "text", label: str | None = None
) -> Examples:
    """Reads through TFRecord shards of somebody else once, to find the images in them.

    `examples.write` keeps what was found as a manifest, for the next time. Data sets that TFDS has
    prepared are such shards, too; `tfds.read` finds them by name.

    Args:
        paths: the files, local or gs://.
        image: feature with the bytes of an encoded image.
        text: feature with the caption; the default may be absent.
        label: feature with a class index, or with a class name.

    Returns:
        Examples whose images are "shard#offset:length".

    Raises:
        ValueError: a file is not TFRecord, is cut off, or an example lacks a feature.
    """
    others = [name for name in (text, label) if name]
    optional = {"text"} - {label}
    rows = [row for path in paths for row in tfrecord_rows(path, [image], others, optional)]
    texts = [row[text].decode() for row in rows if text in row]
    if texts and len(texts) < len(rows):
        raise ValueError(f"only {len(texts)} of {len(rows)} examples have the feature {text!r}")
    indices, classes = _classes([row[label] for row in rows]) if label else (None, ())
    return Examples([row[image] for row in rows], texts or None, indices, classes)


def tfrecord_rows(
    path: str, images: Sequence[str], others: Sequence[str], optional: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields name -> value for every example of a shard; an image is "path#offset:length".

    Args:
        path: the shard, local or a URI.
        images: features with the bytes of an image.
        others: features with one number or one string of bytes.
        optional: those of them that an example may lack.

    Raises:
        ValueError: the file is not TFRecord, is cut off, or an example lacks a feature.
    """
    for start, record in _records(path):
        features, row = _features(path, start, record), {}
        for name in (*images, *others):
            if name in features or name not in optional:
                row[name] = _value(features, name, path, start)
        for name in images:
            row[name] = f"{path}#{start + record.index(row[name])}:{len(row[name])}"
        yield row


def _classes(labels: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Whole numbers as they are (-1 is unknown), so that all splits agree; names sorted."""
    if all(isinstance(label, int) for label in labels):
        indices = np.array(labels, np.int32)
        return indices, tuple(map(str, range(max(labels) + 1)))
    names = [label.decode() for label in labels]
    classes = sorted(set(names))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in names], np.int32), tuple(classes)


def _records(path: str) -> Iterator[tuple[int, bytes]]:
    """(position, content) of every record; framing of tensorflow/core/lib/io/record_writer.h."""
    position = 0
    with places.open_binary(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        while position < end:
            header = file.read(_HEADER)
            length = int.from_bytes(header[:8], "little")
            if position + _HEADER + length + _FOOTER > end:
                what = "compressed by gzip" if header.startswith(_GZIP) else "or cut off"
                raise ValueError(f"{path}: not a TFRecord file, {what}, at byte {position}")
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
        there = ", ".join(sorted(features))
        raise ValueError(
            f"{path}, byte {start}: no single value of feature {name!r}; there are {there}"
        )
    return values[0]
