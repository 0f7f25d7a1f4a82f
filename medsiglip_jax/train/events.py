"""Metrics as TensorBoard reads them.

Not by `tf.summary`: its `scalar` needs the package tensorboard on the training machine, writes
tensors, which `EventAccumulator.Scalars` does not list, and reaches no s3:// and gs:// only with
TensorFlow's own credentials. An event is a protobuf that TensorFlow has, in a TFRecord.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from medsiglip_jax.files import places, storage


class EventFile:
    """A file of events. Every run on a folder adds one of its own, also one that resumes.

    Its first event says where it starts, and TensorBoard forgets what a run that was killed had
    logged from that step on.

    A bucket takes whole files only: there a local file is uploaded again after
    `storage.UPLOAD_SECONDS`, and by `close`.
    """

    def __init__(self, folder: places.Place):
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
        self._place, self._uploaded = folder / name, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._local = Path(folder if isinstance(folder, Path) else tempfile.mkdtemp()) / name
        self._file = tf.io.TFRecordWriter(str(self._local))
        self._started = False
        self._write(file_version="brain.Event:2")

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes metrics."""
        if not self._started:
            start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
            self._write(step=step, session_log=start)
            self._started = True
        values = [
            tf.compat.v1.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
        ]
        self._write(step=step, summary=tf.compat.v1.Summary(value=values))

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
