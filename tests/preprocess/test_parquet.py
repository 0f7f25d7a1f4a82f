"""Pictures inside Parquet are the files that were put there, and a bad cell is one bad image."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from medsiglip_jax.preprocess import handles, sources
from medsiglip_jax.preprocess.facts import NoSuchFile, UnreadableImage
from medsiglip_jax.preprocess.names import Cell, Frame, parse, part_of

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def png(pixels):
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


@pytest.fixture(params=["struct", "binary", "large_binary"])
def table_file(request, tmp_path):
    """Seven pictures in row groups of two, the fifth damaged, the sixth missing."""
    held = [*map(png, PIXELS[:4]), png(PIXELS[4])[:40], None, png(PIXELS[6])]
    if request.param == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": cell, "path": "a.png"} for cell in held], kind)
    else:
        column = pa.array(held, getattr(pa, request.param)())
    parquet.write_table(pa.table({"a scan": column}), tmp_path / "t.parquet", row_group_size=2)
    return f"{tmp_path}/t.parquet"


def test_cells_are_read_as_files_are(table_file, monkeypatch):
    monkeypatch.setattr("medsiglip_jax.preprocess.parquet._KEPT_BYTES", 1)  # a group at a time
    for row in (3, 0, 6, 1, 2):
        pixels, _ = sources.read(part_of(table_file, Cell(row, "a scan")))
        np.testing.assert_array_equal(pixels, PIXELS[row])
    assert sources.read_bytes(f"{table_file}#row=0,a scan") == png(PIXELS[0])


@pytest.mark.parametrize(
    "part, reason",
    [
        ("row=4,a scan", "image"), ("row=5,a scan", r"no picture in column 'a scan', row 5"),
        ("row=7,a scan", "a table of 7 rows; row 7"), ("row=0,b", "without the column 'b'"),
    ],
)  # fmt: skip
def test_a_bad_cell_is_one_unreadable_image(table_file, part, reason):
    with pytest.raises(UnreadableImage, match=f"t.parquet#{part}: .*{reason}"):
        sources.read(f"{table_file}#{part}")


def test_a_bad_file_is_unreadable(tmp_path):
    (tmp_path / "t.parquet").write_text("no table")
    with pytest.raises(UnreadableImage, match="not a Parquet file"):
        sources.read(f"{tmp_path}/t.parquet#row=0,image")
    with pytest.raises(NoSuchFile):
        sources.read(f"{tmp_path}/gone.parquet#row=0,image")


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    for pixels in PIXELS[:2]:
        parquet.write_table(pa.table({"image": [png(pixels)]}), tmp_path / "t.parquet")
        found, _ = sources.read(f"{tmp_path}/t.parquet#row=0,image")
        np.testing.assert_array_equal(found, pixels)
        handles._open.clear()


def test_names_of_cells():
    assert parse("a#b.parquet#row=3,x,y#z") == ("a#b.parquet", Cell(3, "x,y#z"))
    assert parse("t.parquet#row=3,image#frame=2") == ("t.parquet#row=3,image", Frame(2))
