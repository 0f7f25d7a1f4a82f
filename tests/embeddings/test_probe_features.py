"""Labels meet their embeddings, and splits keep patients together."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_runs import DIM, draw, read_csv, with_splits, write_labelled_run, write_table

from medsiglip_jax.data import inputs
from medsiglip_jax.embeddings.probe import features
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.model.config import PixelConfig


def test_labels_meet_their_vectors(table):
    data, run, vectors, names = table
    found = features.read(data, run)
    assert len(found) == 200 and found.missing == 0
    for id, vector, label in zip(found.examples.names, found.vectors, found.labels, strict=True):
        np.testing.assert_array_equal(vector, vectors[id])
        assert names[id] == ("" if label < 0 else found.examples.classes[label])
    pixels = PixelConfig().to_dict()
    assert found.provenance == Provenance(DIM, "5a1", "big_vision", True, "m", pixels=pixels)
    part = found.select(found.examples.select([5, 3]))
    np.testing.assert_array_equal(part.vectors, found.vectors[[5, 3]])


def test_labels_of_one_column_or_of_several(table):
    data, run, *_ = table
    assert features.read(data, run).examples.classes == ("mild", "none", "severe")
    assert features.read(data, run, label="label").labels.ndim == 1
    for label in ("finding", ["finding"]):  # only 0 and 1: a finding, not two classes
        found = features.read(data, run, label=label)
        assert found.examples.classes == ("finding",) and found.labels.shape == (200, 1)
    same = write_table(
        data.with_name("words.csv"), id=[row["image"] for row in read_csv(data)],
        finding=[("no", "yes")[int(row["finding"])] for row in read_csv(data)],
    )  # fmt: skip
    np.testing.assert_array_equal(features.read(same, run, label="finding").labels, found.labels)
    found = features.read(data, run, label=["finding", "other"], group="patient")
    assert found.labels.shape == (200, 2) and np.isnan(found.labels[:, 1]).sum() == 29
    assert len(set(found.examples.groups)) == 50


@pytest.mark.parametrize(
    "columns, how, message",
    [
        (dict(image=["p00/0.png", "x"], label=["a", "b"]), {}, "1 of 2 labels have no embedding"),
        (dict(image=["x", "y"], label=["a", "b"]), {}, "2 of 2 .*the first 'x'.*the first 'p"),
        (dict(scan=["x"], label=["a"]), {}, "no column 'image'"),
        (dict(id=["p00/0.png"], label=["a"]), {"label": "grade"}, "no column 'grade'; there are"),
        (dict(id=["p00/0.png"]), {}, "no column 'label'"),
        (dict(id=["p00/0.png"], label=["a"]), {"group": "group"}, "no column 'group'"),
        (dict(id=["p00/0.png"], label=["a"]), {"group": ""}, "no column ''"),
        (dict(id=["p00/0.png"], a=["2"], b=["1"]), {"label": ["a", "b"]}, "expected 0, 1"),
    ],
)
def test_a_wrong_join_counts_what_is_missing(table, tmp_path, columns, how, message):
    with pytest.raises(ValueError, match=message):
        features.read(write_table(tmp_path / "t.csv", **columns), table[1], **how)


def test_images_that_embed_could_not_read_are_left_out_and_counted(tmp_path):
    run = write_labelled_run(tmp_path / "run", ["a", "b", "c"], draw(3)[0], errors=1)
    rows = dict(id=["a", "damaged", "c"], label=["x", "y", "x"])
    found = features.read(write_table(tmp_path / "t.csv", **rows), run)
    assert found.examples.names == ["a", "c"] and found.missing == 1


def test_splits_keep_patients_together(table):
    data, run, *_ = table
    found = features.read(data, run, group="patient")
    parts = features.split(found, 0.25, seed=3)
    patients = [set(part.examples.groups) for part in parts[:2]]
    assert not patients[0] & patients[1] and parts.test is None
    assert len(parts.validation) == pytest.approx(50, abs=2)
    again = features.split(found, 0.25, seed=3)
    assert again.train.examples.names == parts.train.examples.names
    assert features.split(found, 0.25, seed=4).train.examples.names != parts.train.examples.names


def test_splits_that_the_table_names(table, tmp_path):
    names = lambda p: "test" if p % 5 == 0 else "dev" if p % 5 == 1 else "train"  # noqa: E731
    found = features.read(with_splits(table, tmp_path / "t.csv", names), table[1], group="patient")
    assert [len(part) for part in features.split(found)] == [120, 40, 40]
    names = lambda p: "test" if p % 5 == 0 else "train"  # noqa: E731
    found = features.read(with_splits(table, tmp_path / "u.csv", names), table[1], group="patient")
    parts = features.split(found)
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [128, 32, 40]
    everyone = [set(part.examples.groups) for part in parts]
    assert not (everyone[0] & everyone[1] or everyone[0] & everyone[2] or everyone[1] & everyone[2])


def test_rows_of_a_split_that_is_not_used_are_counted(table, tmp_path):
    names = lambda p: ("val", "dev", "train", "train")[p % 4]  # noqa: E731
    found = features.read(with_splits(table, tmp_path / "t.csv", names), table[1], group="patient")
    count = found.examples.splits.count("dev")
    with pytest.warns(UserWarning, match=f"these splits are not used: 'dev' {count}$"):
        assert len(features.split(found).validation) == found.examples.splits.count("val")


def test_a_patient_on_both_sides_is_refused(table, tmp_path):
    data = read_csv(table[0])
    columns = {name: [row[name] for row in data] for name in ("image", "patient", "label")}
    splits = ["val" if i % 3 else "train" for i in range(len(data))]
    path = write_table(tmp_path / "t.csv", **columns, split=splits)
    with pytest.raises(ValueError, match="groups are in both"):
        features.split(features.read(path, table[1], group="patient"))


def test_labels_beside_pictures_in_parquet_meet_their_vectors(tmp_path):
    """By the ids that `embed` gives such rows, of which some share a name."""
    named = zip((b"0", b"1", b"2"), ("a", None, "a"), strict=True)
    cells = [{"bytes": content, "path": path} for content, path in named]
    data = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": cells, "label": ["x", "y", "z"]}), data)
    ids = [row.id for row in inputs.rows([data])]
    vectors, _ = draw(3)
    found = features.read(data, write_labelled_run(tmp_path / "run", ids, vectors))
    np.testing.assert_array_equal(found.vectors, vectors)
    assert found.labels.tolist() == [0, 1, 2] and ids == ["a", "t.parquet:2", "t.parquet:3"]


def test_labels_beside_addresses_meet_their_vectors(tmp_path):
    """By ids that show no queries, of which some are all that tells images apart."""
    urls = [f"https://pacs/wado?objectUID=1.{i}" for i in range(3)]
    urls += ["https://u:pw@host/a.png?sig=5f", "scans/b.png"]
    data = write_table(tmp_path / "t.csv", image=urls, label=["x", "y", "z", "x", "y"])
    ids = [row.id for row in inputs.rows([data])]
    assert ids[3:] == ["https://host/a.png", "scans/b.png"] and len(set(ids)) == 5
    assert all(re.fullmatch(r"https://pacs/wado~[0-9a-f]{12}", id) for id in ids[:3])
    vectors, _ = draw(5)
    found = features.read(data, write_labelled_run(tmp_path / "run", ids, vectors))
    np.testing.assert_array_equal(found.vectors, vectors)
