"""Labels meet embeddings by id, by source or by the end of a path, and never those of another."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_runs import draw, write_labelled_run, write_table

from medsiglip_jax import cli
from medsiglip_jax.embeddings import joining
from medsiglip_jax.embeddings.elsewhere.found import Found
from medsiglip_jax.embeddings.elsewhere.imported import Imported
from medsiglip_jax.embeddings.probe import features
from medsiglip_jax.files import places
from medsiglip_jax.trust.monitor import images as monitored


def run_of(*pairs, lacking=()):
    """Images with these ids and sources."""
    ids, sources = zip(*pairs, strict=True)
    vectors = np.ones((len(ids), 2), np.float32)
    found = Found(vectors, ids, sources, lacking=[(name, "damaged") for name in lacking])
    return Imported(places.at("v.npz"), found, "", True)


# What embed writes of images/ given as a folder.
RELATIVE = [
    ("a/1.png", "images/a/1.png"),
    ("b/1.png", "images/b/1.png"),
    ("b/2.png", "images/b/2.png"),
]
ABSOLUTE = [(id, f"/data/{source}") for id, source in RELATIVE]
WEB = [(f"https://h/{id}", f"https://h/{id}") for id, _ in RELATIVE]


@pytest.mark.parametrize(
    ("run", "names", "root", "by"),
    [
        (RELATIVE, ["a/1.png", "b/1.png", "b/2.png"], "", "id"),
        (ABSOLUTE, ["/data/images/a/1.png", "/data/images/b/1.png", "/data/images/b/2.png"], "",
         "source"),
        (ABSOLUTE, ["images/a/1.png", "images/b/1.png", "images/b/2.png"], "/data", "source"),
        (ABSOLUTE, ["images/a/1.png", "images/b/1.png", "images/b/2.png"], "/elsewhere",
         "the end of the path"),
        (RELATIVE, ["/old/images/a/1.png", "/old/images/b/1.png", "/old/images/b/2.png"], "",
         "the end of the path"),
        (ABSOLUTE, ["/old/a/1.png", "/old/b/1.png", "/old/b/2.png"], "", "the end of the path"),
        (ABSOLUTE, [r"images\a\1.png", r"images\b\1.png", r"images\b\2.png"], "",
         "the end of the path"),
        (ABSOLUTE, ["images/a/1", "images/b/1", "images/b/2"], "", "the end of the path"),
        (WEB, ["a/1.png", "b/1.png", "b/2.png"], "", "the end of the path"),
        (WEB, [f"https://me:secret@h/{id}?X-Signature=1" for id, _ in RELATIVE], "", "source"),
    ],
)  # fmt: skip
def test_the_forms_that_people_have(run, names, root, by):
    found = joining.join(names, run_of(*run), root)
    assert (found.by, found.rows, found.others) == (by, [0, 1, 2], (0, ""))


def test_a_file_name_will_do_if_only_one_image_has_it():
    assert joining.join(["2.png"], run_of(*ABSOLUTE)).rows == [2]
    with pytest.raises(ValueError, match=r"1.png may be .*images/a/1.png.* and .*images/b/1.png"):
        joining.join(["2.png", "1.png"], run_of(*ABSOLUTE))
    with pytest.raises(ValueError, match="12 may be 12.dcm and 12.png"):
        joining.join(["12"], run_of(("12.dcm", "12.dcm"), ("12.png", "12.png")))


def test_what_only_the_ids_would_say_of_two_folders_is_refused():
    """Their ids do not say which folder the images lay in."""
    run = run_of(("1.png", "/new/p1/1.png"), ("2.png", "/new/p2/2.png"))
    with pytest.raises(ValueError, match="/old/p2/1.png and /old/p1/1.png both fit"):
        joining.join(["/old/p2/1.png", "/old/p1/1.png"], run)
    with pytest.raises(ValueError, match="/old/p1/1.png and /old/p3/2.png lie in different"):
        joining.join(["/old/p1/1.png", "/old/p3/2.png"], run)


def test_an_image_that_was_not_embedded_gets_no_other_ones_vector():
    """1.png lies beside sub/1.png: its label is not that of the other, whatever else fits."""
    others = [("2.png", "/d/2.png"), ("sub/1.png", "/d/sub/1.png")]
    found = joining.join(["1.png", "2.png"], run_of(*others))
    assert found.rows == [-1, 0] and found.missing == ["1.png"] and found.others == (1, "sub/1.png")
    assert str(found) == (
        "1 rows are joined by id; 1 have no embedding, the first 1.png; 1 embeddings are of no row,"
        " the first sub/1.png"
    )
    moved = ["x/1.png", "x/2.png"], run_of(("2.png", "/d/x/2.png"), ("sub/1.png", "/d/x/sub/1.png"))
    assert joining.join(*moved).rows == [-1, 0]
    with pytest.raises(ValueError, match="1.png may be .*sub/1.png.* and /d/1.png"):
        joining.join(["1.png"], run_of(("s/sub/1.png", "/d/sub/1.png"), lacking=["/d/1.png"]))


def test_two_vectors_of_one_id_are_refused():
    with pytest.raises(ValueError, match="a may be .*x/a.* and .*y/a"):
        joining.join(["a"], run_of(("a", "x/a"), ("a", "y/a")))


def test_a_run_says_what_could_not_be_read(tmp_path):
    run = write_labelled_run(tmp_path / "run", ["a", "b"], draw(2)[0], errors=1)
    table = pa.table({"source": ["/d/c.png"], "reason": ["damaged"]})
    pq.write_table(table, tmp_path / "run" / "errors.parquet")
    assert run.unreadable == ["/d/c.png"]


def test_a_table_of_own_ids_is_joined_by_its_images(tmp_path):
    """Its column "id" has nothing to do with the embeddings, and its paths are of another disk."""
    vectors, labels = draw(20)
    run = write_labelled_run(tmp_path / "run", [f"p{i % 4}/{i}.png" for i in range(20)], vectors)
    data = write_table(
        tmp_path / "t.csv", id=range(100, 120), image=[f"/mnt/p{i % 4}/{i}.png" for i in range(20)],
        label=labels,
    )  # fmt: skip
    found = features.read(data, run)
    assert found.joined is not None and found.joined.by == "the end of the path"
    np.testing.assert_array_equal(found.vectors, vectors)


def test_the_command_says_how_it_joined(capsys, tmp_path):
    """And counts what it did not, with examples of both sides."""
    vectors, labels = draw(60)
    ids = [f"p/{i}.png" for i in range(60)]
    write_labelled_run(tmp_path / "run", ids, vectors, errors=1)
    rows = dict(
        image=[f"/mnt/{id}" for id in ids[:50]] + ["/mnt/p/gone.png"], label=[*labels[:50], 1]
    )
    flags = ["--data", write_table(tmp_path / "t.csv", **rows), "--embeddings", tmp_path / "run"]
    flags += ["--output", tmp_path / "p.npz", "--json"]
    code = cli.main(["probe", "fit", *map(str, flags)])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert code == 0 and (result["missing"], result["unlabelled"]) == (1, 10)
    assert result["joined_by"] == "the end of the path"
    assert "50 rows are joined by the end of the path; 1 have no embedding, the first " in err
    assert "/mnt/p/gone.png; 10 embeddings are of no row, the first p/5" in err


def test_what_tables_say_of_watched_images_is_joined_alike(tmp_path):
    """Of monitor: the table is of a longer time, and of the disk that the images lay on before."""
    ids = [f"p{i % 4}/{i}.png" for i in range(20)]
    run = write_labelled_run(tmp_path / "run", ids, draw(20)[0])
    order = [*range(19, -1, -1), 99]
    data = write_table(
        tmp_path / "t.csv", image=[f"/mnt/p{i % 4}/{i}.png" for i in order], scanner=order,
        label=[i % 2 for i in order],
    )  # fmt: skip
    columns = monitored.Columns(by=("scanner",))
    found = monitored.read(run, monitored.Given(data, columns, labels=data, label=("label",)))
    assert found.labels is not None
    numbers = [int(id.rpartition("/")[2][:-4]) for id in found.ids]
    assert found.categories["scanner"] == list(map(str, numbers))
    assert found.labels.values[:, 0].tolist() == [n % 2 for n in numbers]
