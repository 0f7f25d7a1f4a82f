"""What TFDS has prepared is found by name and read; a miniature of it, with its JSON to the letter.

Made by tensorflow-datasets 4.9.10 of `GeneratorBasedBuilder`s, the JSON files then cut down to the
features here. TFDS's own reading of such data sets gave the same bytes, texts and labels.
"""

import gzip
import io
import json

import pytest
from PIL import Image

from medsiglip_jax.data import examples, tfds
from medsiglip_jax.files import places
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.sources import read_bytes
from medsiglip_jax.train import build, recipe

tf = pytest.importorskip("tensorflow")

from medsiglip_jax.data import tfrecord  # noqa: E402

CORE = "tensorflow_datasets.core.features"


def tensor(dtype, *shape, encoding="none"):
    dimensions = {"dimensions": list(map(str, shape))} if shape else {}
    content = {"dtype": dtype, "encoding": encoding, "shape": dimensions}
    return {"pythonClassName": f"{CORE}.tensor_feature.Tensor", "tensor": content}


def image(dtype="uint8", kind="image_feature.Image"):
    shape = {"dimensions": ["-1", "-1", "3"]}
    content = {"dtype": dtype, "encodingFormat": "png", "shape": shape}
    return {"image": content, "pythonClassName": f"{CORE}.{kind}"}


def class_label(count):
    name = f"{CORE}.class_label_feature.ClassLabel"
    return {"classLabel": {"numClasses": str(count)}, "pythonClassName": name}


TEXT = {"pythonClassName": f"{CORE}.text_feature.Text", "text": {}}


def features_dict(**features):
    name = f"{CORE}.features_dict.FeaturesDict"
    return {"featuresDict": {"features": features}, "pythonClassName": name}


FEATURES = dict(
    scan=image(),
    label=class_label(3),
    grade=class_label(12),
    text=TEXT,
    patient=tensor("int64"),
    blob=tensor("string"),
    meta=features_dict(view=class_label(2), note=TEXT),
    boxes={
        "pythonClassName": f"{CORE}.sequence_feature.Sequence",
        "sequence": {"feature": class_label(2), "length": "-1"},
    },
    clip={
        "pythonClassName": f"{CORE}.video_feature.Video",
        "video": image()["image"] | {"shape": {"dimensions": ["2", "4", "4", "3"]}},
    },
    real=image("float32"),
    mask=image(kind="labeled_image.LabeledImage"),
    raw=tensor("uint8", 4, 4, 3),
    packed=tensor("float32", encoding="zlib"),
)
NAMES = ("pneumonia", "normal", "Edema, acute")  # in an order of their own
SPLITS = {"train": (3, 4), "validation": (2,), "test": (1, 1)}


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (5 + i, 4), (i, 2 * i, 3 * i)).save(file, "PNG")
    return file.getvalue()


def record(i):
    values = {
        "scan": png(i), "label": -1 if i == 8 else i % 3, "grade": i, "patient": i // 2,
        "text": f"zwölf, {i}".encode(), "blob": b"\xff\xfe", "meta/view": i % 2,
        "meta/note": b"n%d" % i,
    }  # fmt: skip
    features = tf.train.Features()
    for name, value in values.items():
        kind = "bytes_list" if isinstance(value, bytes) else "int64_list"
        getattr(features.feature[name], kind).value.append(value)
    features.feature["boxes"].int64_list.SetInParent()
    features.feature["clip"].bytes_list.value.extend([png(0), png(1)])
    return tf.train.Example(features=features).SerializeToString()


def prepare(folder, name="chest", splits=SPLITS, **changes):
    """Writes what TFDS would have; returns the shards."""
    folder.mkdir(parents=True)
    listed, paths, rows = [], [], iter(range(100))
    for split, lengths in splits.items():
        for number, length in enumerate(lengths):
            file = f"{name}-{split}.tfrecord-{number:05d}-of-{len(lengths):05d}"
            paths.append(folder / file)
            with tf.io.TFRecordWriter(str(paths[-1])) as writer:
                for _ in range(length):
                    writer.write(record(next(rows)))
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        shards = {"numBytes": "1", "shardLengths": list(map(str, lengths))}
        listed.append({"filepathTemplate": template, "name": split, **shards})
    info = {"fileFormat": "tfrecord", "moduleName": "chest.builder", "name": name, "splits": listed}
    (folder / "dataset_info.json").write_text(json.dumps(info | {"version": "1.0.0"} | changes))
    (folder / "features.json").write_text(json.dumps(features_dict(**FEATURES)))
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (folder / "meta-view.labels.txt").write_text("PA\nAP\n")
    return paths


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def chest(data_dir):
    return prepare(data_dir / "chest" / "1.0.0")


def test_every_split_is_read(chest):
    found = tfds.read("tfds:chest", label="label", group="patient")
    assert [read_bytes(path) for path in found.images] == [png(i) for i in range(11)]
    assert found.texts == [f"zwölf, {i}" for i in range(11)]
    assert found.classes == NAMES and found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, -1, 0, 1]
    assert found.splits == ["train"] * 7 + ["validation"] * 2 + ["test"] * 2
    assert found.groups == [str(i // 2) for i in range(11)]


def test_features_are_named_as_columns_are(chest):
    found = tfds.read("tfds:chest", label="meta/view", text="meta/note", positives="patient")
    assert found.classes == ("PA", "AP") and found.labels.tolist() == [i % 2 for i in range(11)]
    assert found.texts == [f"n{i}" for i in range(11)]
    assert found.positives[0] == found.positives[1] != found.positives[2]
    assert tfds.read("tfds:chest", label="grade").classes == tuple(map(str, range(12)))
    captioned = tfds.read("tfds:chest", label="meta/view", text=None, captions="a {label} view")
    assert captioned.texts[:2] == ["a PA view", "a AP view"]


def test_labels_only_where_asked_for(chest):
    found = tfds.read("tfds:chest")
    assert found.labels is None and found.classes == () and found.texts is not None


@pytest.mark.parametrize(
    "name, folder",
    [
        ("chest", "small/1.10.0"), ("chest:1.9.*", "small/1.9.0"), ("chest/big", "big/2.0.0"),
        ("chest/small:1.9.0", "small/1.9.0"),
    ],
)  # fmt: skip
def test_names_are_as_tfds_has_them(data_dir, name, folder):
    """The highest version, as numbers, of TFDS's default configuration."""
    for there in ("small/1.9.0", "small/1.10.0", "big/2.0.0"):
        prepare(data_dir / "chest" / there, splits={"train": (1,)})
    (data_dir / "chest" / ".config").mkdir()
    default = {"default_config_name": "small"}
    (data_dir / "chest" / ".config" / "metadata.json").write_text(json.dumps(default))
    (data_dir / "chest" / "small" / "incomplete.XY_3.0.0").mkdir()
    (image,) = tfds.read(f"tfds:{name}").images
    assert image.startswith(f"{data_dir}/chest/{folder}/chest-train.tfrecord-00000-of-00001#")


def test_shards_are_read_once(chest, monkeypatch):
    first = tfds.read("tfds:chest", label="label")
    monkeypatch.setattr(tfrecord, "read_shard", None)
    again = tfds.read("tfds:chest", label="grade")
    assert again.images == first.images and again.texts == first.texts
    assert len(list((places.cache() / "tfds").iterdir())) == 1
    (chest[0].parent / "label.labels.txt").write_text("a\nb\nc\n")
    with pytest.raises(TypeError):  # other names: indexed again
        tfds.read("tfds:chest", label="label")


def test_a_remote_data_dir(data_dir):
    prepare(data_dir / "chest" / "1.0.0")
    remote = places.at("memory://tfds-bucket/data")
    for file in (data_dir / "chest" / "1.0.0").iterdir():
        (remote / "chest" / "1.0.0").mkdir(parents=True, exist_ok=True)
        (remote / "chest" / "1.0.0" / file.name).write_bytes(file.read_bytes())
    found = tfds.read("tfds:chest", root="memory://tfds-bucket/data", label="label")
    assert found.images[0].startswith("memory://tfds-bucket/data/chest/1.0.0/chest-train")
    assert [read_bytes(path) for path in found.images] == [png(i) for i in range(11)]


@pytest.mark.parametrize("path", ["tfds:chest/other", "tfds:chest:3.*.*", "tfds:mnist"])
def test_what_is_not_prepared_is_said_with_what_to_run(chest, data_dir, path):
    with pytest.raises(FileNotFoundError) as caught:
        tfds.read(path)
    said = str(caught.value)
    assert "\n" not in said and f"not prepared in {data_dir} (there is " in said
    assert f"tfds build {path.removeprefix('tfds:')} " in said
    assert ("chest:1.0.0" in said) == ("chest" in path)


@pytest.mark.parametrize("path", ["tfds:", "tfds:a b", "tfds:chest:1", "tfds:kaggle:chest"])
def test_what_is_no_name_is_refused(path):
    with pytest.raises(ValueError, match="expected tfds:NAME"):
        tfds.read(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(image="clip"), "'clip' is Video, expected encoded images"),
        (dict(image="raw"), "'raw' is Tensor uint8 4x4x3, expected encoded images"),
        (dict(image="real"), "'real' is Image float32"),
        (dict(image="mask"), "'mask' is LabeledImage"),
        (dict(image="none", label="boxes", group="packed"),
         "no feature 'none'; feature 'boxes' is Sequence, .*; feature 'packed' is Tensor float32"),
        (dict(label=("grade", "dx"), positives="raw"), "no feature 'dx'; feature 'raw' is"),
        (dict(label="label", classes=("normal",)), "not among the classes normal: 'pneumonia'"),
    ],
)  # fmt: skip
def test_features_that_cannot_be_had_are_one_message(chest, arguments, message):
    with pytest.raises(ValueError, match=f"^tfds:chest: .*{message}") as caught:
        tfds.read("tfds:chest", **arguments)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_plain_tfrecords_are_refused(data_dir):
    prepare(data_dir / "other" / "1.0.0", fileFormat="array_record")
    with pytest.raises(ValueError, match="holds array_record files, which are not read here"):
        tfds.read("tfds:other")
    shards = prepare(data_dir / "chest" / "1.0.0")
    whole = shards[1].read_bytes()
    shards[1].write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="00001-of-00002: not a TFRecord file, compressed by gzip"):
        tfds.read("tfds:chest")
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match="3 examples, 4 by dataset_info.json; prepare"):
        tfds.read("tfds:chest")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002: no such file; prepare"):
        tfds.read("tfds:chest")
    shards[1].write_bytes(whole)
    assert len(tfds.read("tfds:chest")) == 11, "and nothing of this was kept"


def test_json_files_that_are_damaged_are_named(chest):
    folder = chest[0].parent
    (folder / "label.labels.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="label.labels.txt: 2 names for 3 classes"):
        tfds.read("tfds:chest")
    (folder / "features.json").write_text('{"type": "FeaturesDict", "content": {}}')
    with pytest.raises(ValueError, match="prepared by an old TFDS"):
        tfds.read("tfds:chest")
    (folder / "features.json").write_text("{")
    with pytest.raises(ValueError, match="features.json: not what TFDS writes .*; prepare"):
        tfds.read("tfds:chest")
    (folder / "features.json").unlink()
    with pytest.raises(FileNotFoundError, match="features.json: no such file"):
        tfds.read("tfds:chest")


def test_a_class_that_there_is_not_is_named_with_its_shard(chest):
    folder = chest[0].parent
    (folder / "features.json").write_text(
        json.dumps(features_dict(**FEATURES | {"label": class_label(1)}))
    )
    (folder / "label.labels.txt").write_text("only\n")
    with pytest.raises(ValueError, match=r"tfrecord-\S+: 'label' is class \d, of 1 classes"):
        tfds.read("tfds:chest", label="label")


def test_names_in_json_files_lead_nowhere_else(data_dir, chest):
    """Neither to shards elsewhere, nor to an index that is written elsewhere."""
    info = json.loads((chest[0].parent / "dataset_info.json").read_text())
    split = info["splits"][0]
    for number, changes in enumerate((
        {"name": "../../evil"},
        {"name": "/tmp/evil"},
        {"name": ["chest"]},
        {"splits": [split | {"name": "../train"}]},
        {"splits": [split | {"filepathTemplate": "../x/{SHARD_X_OF_Y}"}]},
        {"splits": [split | {"filepathTemplate": "{DATASET.__class__}"}]},
    )):  # fmt: skip
        folder = prepare(data_dir / f"evil{number}" / "1.0.0")[0].parent
        (folder / "dataset_info.json").write_text(json.dumps(info | changes))
        with pytest.raises(ValueError, match="dataset_info.json names .*; expected a plain file"):
            tfds.read(f"tfds:evil{number}", label="label")
    config = data_dir / "evil0" / ".config"
    config.mkdir()
    (config / "metadata.json").write_text(json.dumps({"default_config_name": "../chest"}))
    with pytest.raises(ValueError, match="metadata.json names '../chest'; expected a plain file"):
        tfds.read("tfds:evil0", label="label")


@pytest.mark.filterwarnings("ignore:(validation|test) examples: ")  # few images, not all classes
def test_a_recipe_trains_on_it(chest):
    asked = recipe.from_dict(
        dict(
            data={"path": "tfds:chest", "label": "label"}, validation="validation", total_steps=1,
            objective={"name": "classification", "pool": "mean"}, batch_size=8, model="tiny-56",
        )
    )  # fmt: skip
    prepared = build.prepare(asked)
    (training,), (held_out,) = prepared.training, prepared.held_out
    assert len(training) == 7 and len(held_out) == 2 and training.classes == NAMES
    examples.check_disjoint(training, held_out)
    batch = next(prepared.batches(lambda *error: pytest.fail(str(error)), 0))
    assert batch["mask"].all() and decode(read_bytes(training.images[0])).shape == (4, 5, 3)
