"""What TensorBoard reads of a run, and of one that resumes."""

import pytest

tf = pytest.importorskip("tensorflow")

from medsiglip_jax.train import events  # noqa: E402


def records(file):
    return [tf.compat.v1.Event.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(file))]


def test_metrics_are_scalars_of_their_step(tmp_path):
    write = events.EventFile(tmp_path / "tensorboard")
    write(3, {"loss": 1.5, "val_auc": 0.75})
    write(6, {"loss": 1.0})
    write.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in records(file)]
    assert found == [(0, {}), (3, {}), (3, {"loss": 1.5, "val_auc": 0.75}), (6, {"loss": 1.0})]


def test_a_file_begins_with_the_step_from_which_earlier_ones_are_forgotten(tmp_path):
    """TensorBoard drops what it read from that step on, so that no step is there twice."""
    write = events.EventFile(tmp_path)
    write(3, {"loss": 1.5})
    write.close()
    version, start, _ = records(next(tmp_path.iterdir()))
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == start.session_log.START and start.step == 3
