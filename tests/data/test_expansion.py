"""Files with several frames become several rows, wherever they are named."""

import numpy as np
import pyarrow as pa
import pytest
from dicom_files import CINE, made
from PIL import Image
from pyarrow import parquet

from medsiglip_jax.data import expansion, inputs
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.names import Range, part_of
from medsiglip_jax.preprocess.parts import Parts


@pytest.mark.parametrize(("frame", "want"), [
    ("middle", ["a.dcm", "b.dcm", "c.png"]),
    (2, ["a.dcm", "b.dcm", "c.png"]),  # by the rules
    ("every=3", ["a.dcm#frame=0", "a.dcm#frame=3", "a.dcm#frame=6", "b.dcm", "c.png"]),
])  # fmt: skip
def test_frames_become_rows(cine, frame, want):
    seen = []
    found = inputs.rows([cine], parts=Parts(frame), on_file=seen.append)
    assert [row.id for row in found] == want and found.parts == Parts(frame)
    assert [row.source for row in found] == [f"{cine}/{name}" for name in want]
    assert sum(seen) == (3 if frame == "every=3" else 0)  # or a million headers are read for none
    assert expansion.names([str(cine)], Parts(frame)) == [row.source for row in found]


def test_rows_of_tables_and_shards_become_frames_too(cine, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "image,id,text\nin/a.dcm,one,a cine\nin/c.png,two,\nin/a.dcm#frame=5,three,\n"
    )
    found = inputs.rows([tmp_path / "rows.csv"], parts=Parts("every=4"))
    assert [(row.id, row.kind) for row in found] == [
        ("one#frame=0", "image"), ("one#frame=4", "image"), ("two", "image"), ("three", "image"),
        ("one", "text"),
    ]  # fmt: skip
    assert found[1].source == f"{tmp_path}/in/a.dcm#frame=4"
    content = (cine / "a.dcm").read_bytes()
    (tmp_path / "shard").write_bytes(b"before" + content + b"after")
    inside = part_of(str(tmp_path / "shard"), Range(6, len(content)))
    names = expansion.names([inside], Parts("every=6"))
    assert names == [f"{inside}#frame=0", f"{inside}#frame=6"]
    np.testing.assert_array_equal(sources.read(names[1])[0], CINE[6])


def test_a_part_can_be_an_input(cine):
    (row,) = inputs.rows([f"{cine}/a.dcm#frame=6"])
    assert row.source == f"{cine}/a.dcm#frame=6"
    with pytest.raises(FileNotFoundError, match="none.dcm#frame=6"):
        inputs.rows([f"{cine}/none.dcm#frame=6"])
    content = (cine / "c.png").read_bytes()
    for name in ("x.tfrecord-00000-of-00001", "x.tar", "x.csv", "x.nii.gz"):
        (cine / name).write_bytes(b"before" + content)
        (row,) = inputs.rows([f"{cine}/{name}#6:{len(content)}"])
        np.testing.assert_array_equal(sources.read(row.source)[0], CINE[3])


def test_damaged_files_stay_for_who_reads_them(cine):
    (cine / "a.dcm").write_bytes((cine / "a.dcm").read_bytes()[:200])
    (cine / "d.dcm").write_bytes(b"")
    found = inputs.rows([cine], parts=Parts("all"))
    assert [row.id for row in found] == ["a.dcm", "b.dcm", "c.png", "d.dcm"]


def test_of_files_that_are_cut_off_all_frames_are_rows(cine):
    """Those that are left can be read; without the one in the middle, the file is one error."""
    grey = CINE[..., 0]
    whole = made(grey, NumberOfFrames="7", Modality="US")
    for frames, rows in ((5, 7), (4, 7), (3, 1)):
        (cine / "a.dcm").write_bytes(whole[: len(whole) - (7 - frames) * grey[0].nbytes])
        found = expansion.names([f"{cine}/a.dcm"], Parts("all"))
        assert len(found) == rows
        with pytest.raises(UnreadableImage, match="cut off"):
            sources.read(found[-1])


def test_rows_are_few_chunks_of_memory(cine):
    for n in range(50):
        (cine / f"{n}.dcm").write_bytes((cine / "a.dcm").read_bytes()[: 9000 * (n % 2 + 1)])
    found = inputs.rows([cine], parts=Parts("all")).table
    assert len(found) > 50 and max(column.num_chunks for column in found.columns) <= 2


def test_pages_of_pictures_become_rows(cine, tmp_path):
    """Beside DICOM, in tables of pictures, and where a file has one page, as itself."""
    pages = [Image.fromarray(frame) for frame in CINE[:3]]
    pages[0].save(cine / "d.tif", save_all=True, append_images=pages[1:])
    found = inputs.rows([cine], parts=Parts("every=2"))
    assert [row.id for row in found if row.id[0] in "cd"] == [
        "c.png",
        "d.tif#frame=0",
        "d.tif#frame=2",
    ]
    table = pa.table({"image": [(cine / "d.tif").read_bytes()]})
    parquet.write_table(table, tmp_path / "t.parquet")
    rows = inputs.rows([tmp_path / "t.parquet"], parts=Parts("all"))
    assert [row.id for row in rows] == [f"t.parquet:1#frame={n}" for n in range(3)]
    np.testing.assert_array_equal(sources.read(rows[2].source)[0], CINE[2])


@pytest.mark.parametrize(
    ("parts", "said"),
    [(Parts(series=True), "--series has no effect"), (Parts(mpp=0.5), "--mpp has no effect")],
)
def test_parts_that_no_input_has_are_told(cine, parts, said):
    with pytest.warns(UserWarning, match=said):
        assert len(inputs.rows([cine / "c.png"], parts=parts)) == 1


def test_rules_that_no_input_needs_are_told(cine, recwarn):
    pictures, rules = [f"{cine}/c.png", "b.jpg#frame=1"], Rules(ct_window=(350, 40), volume="ct")
    expansion.warn_of_unused(Rules(), pictures)
    for other in ("x.dcm", "noname", "shard.tar#0:9", "v.nii.gz#frame=2"):
        expansion.warn_of_unused(rules, [*pictures, other])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="^--ct-window, --volume: without effect"):
        expansion.warn_of_unused(rules, pictures)
