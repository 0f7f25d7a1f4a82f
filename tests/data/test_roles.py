"""Which column holds the images: known by the names of others, or asked for; never guessed."""

import re

import pyarrow as pa
import pytest
from image_files import contents, put
from pyarrow import parquet

from medsiglip_jax.data import examples, inputs, roles

NAMES = ["file_name", "Image", "IMAGE PATH", "Path", "filepath", "image-url", "Image Index"]


@pytest.mark.parametrize("name", NAMES)
def test_other_names_of_the_column_are_read_and_told(tmp_path, name):
    put(f"{tmp_path}/a.png", b"1")
    path = put(f"{tmp_path}/m.csv", f"{name},caption\na.png,x\n")
    with pytest.warns(UserWarning) as told:
        found = inputs.rows([path])
    assert [str(w.message) for w in told] == [
        f"{path}: column {name!r} is read as images", f"{path}: column 'caption' is read as texts",
    ]  # fmt: skip
    assert contents(found) == {"a.png": b"1"} and found[1].text == "x"
    with pytest.warns(UserWarning):
        learned = examples.read(path)
    assert learned.images == [f"{tmp_path}/a.png"] and learned.texts == ["x"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("scan,text\na.png,x\n", "no column of images is named, but 'scan' looks like one; .*"
         r"\(--image-column"),
        ("image_path,file_name,text\na.png,b.png,x\n", "which column is the image, 'image_path' or "
         r"'file_name'\? Name it \(--image-column"),
        ("image,caption,report\na.png,x,y\n", r"which column is the text.*--text-column"),
        ("scan,note\na,x\n", "no column 'image' or 'text'; there are .*; name it .--image-"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_a_question(tmp_path, text, message):
    path = put(f"{tmp_path}/m.csv", text)
    with pytest.raises(ValueError, match=f"^{re.escape(path)}: {message}") as asked:
        inputs.rows([path])
    assert "\n" not in str(asked.value)


def test_lists_of_images_are_no_text_job(tmp_path):
    put(f"{tmp_path}/m.jsonl", '{"file_names": ["a.png", "b.png"], "text": "x"}')
    pictures = pa.array([[{"bytes": b"1", "path": "a"}]])
    parquet.write_table(pa.table({"images": pictures, "text": ["x"]}), tmp_path / "m.parquet")
    for name, column in (("m.jsonl", "file_names"), ("m.parquet", "images")):
        with pytest.raises(ValueError, match=f"but '{column}' looks like one"):
            inputs.rows([tmp_path / name])
        with pytest.raises(ValueError, match=f"column '{column}' holds .*expected strings"):
            inputs.rows([tmp_path / name], image=column)


def test_a_table_of_texts_is_one_with_a_word(tmp_path, recwarn):
    path = put(f"{tmp_path}/m.csv", "id,text\n1,x\n")
    assert len(inputs.rows([path])) == 1 and not recwarn.list
    put(path, "url,text,grade\nhttp://c4.org/page,see a.png,2\n")  # addresses of no images
    with pytest.warns(UserWarning, match="no column of images, so only its texts are read"):
        assert [row.kind for row in inputs.rows([path])] == ["text"]


def test_labels_need_no_texts(tmp_path):
    """A column that is called like texts does not replace captions made of labels."""
    path = put(f"{tmp_path}/m.csv", "image,description,label\na.png,,cat\n")
    found = examples.read(path, label="label", captions="a {label}")
    assert found.texts == ["a cat"] and examples.read(path, label="label").texts is None


@pytest.mark.parametrize(
    "cell, want",
    [
        ("a/b.PNG", True), ("ct.nii.gz#frame=3", True), ("http://x/y.jpg?size=3#top", True),
        ("s.svs", True), ("a scan", False), ("http://x/page", False), ("a.txt", False),
    ],
)  # fmt: skip
def test_names_of_images(cell, want):
    assert roles.names_image(cell) == want
