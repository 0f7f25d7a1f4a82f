"""Cells that name several classes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medsiglip_jax import cli
from medsiglip_jax.data import examples

# A row that names two classes, one, none (known), and nothing at all (unknown).
NAMED = [["Edema", "Effusion"], ["Mass"], [], None]
LABELS = [[1, 1, 0], [0, 0, 1], [0, 0, 0], [np.nan] * 3]
CLASSES = ("Edema", "Effusion", "Mass")


def csv(tmp_path, cells, name="t.csv"):
    path = tmp_path / name
    quoted = ('"' + cell.replace('"', '""') + '"' for cell in cells)
    lines = (f"{n}.png,{cell}" for n, cell in enumerate(quoted))
    path.write_text("\n".join(["image,label", *lines]) + "\n")
    return path


def written(how):
    return ["" if names is None else how(names) for names in NAMED]


def table_of(tmp_path, form):
    """A table of `NAMED` in one of the forms that people have."""
    if form == "parquet":
        path = tmp_path / "t.parquet"
        images = [f"{n}.png" for n in range(len(NAMED))]
        pq.write_table(pa.table({"image": images, "label": NAMED}), path)
        return path
    if form == "jsonl":
        rows = [{"image": f"{n}.png", "label": names} for n, names in enumerate(NAMED)]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "t.jsonl"
    return csv(tmp_path, written(json.dumps if form == "JSON" else str))


@pytest.mark.parametrize("form", ["JSON", "Python", "jsonl", "parquet"])
def test_lists_are_several_classes_without_being_asked(tmp_path, form):
    found = examples.read(table_of(tmp_path, form), label="label")
    assert found.classes == CLASSES
    np.testing.assert_array_equal(found.labels, LABELS)
    turned = examples.read(table_of(tmp_path, form), label="label", classes=CLASSES[::-1])
    assert turned.classes == CLASSES[::-1]
    np.testing.assert_array_equal(turned.labels, np.array(LABELS)[:, ::-1])
    problem = "(line [12]|row 1): names none of the classes Edema, Mass: "
    with pytest.raises(ValueError, match=problem):
        examples.read(table_of(tmp_path, form), label="label", classes=["Edema", "Mass"])


@pytest.mark.parametrize("mark", ["|", ";", ", ", " / "])
def test_a_separator_splits_where_it_is_given(tmp_path, mark):
    """As ChestX-ray14 has them."""
    path = csv(tmp_path, [f"Edema{mark}Effusion", "Mass", "Effusion", "Edema", ""])
    found = examples.read(path, label="label", label_separator=mark.strip())
    assert found.classes == CLASSES
    np.testing.assert_array_equal(found.labels[:2], LABELS[:2])
    assert np.isnan(found.labels[4]).all()
    whole = examples.read(path, label="label", label_separator="none")
    assert f"Edema{mark}Effusion" in whole.classes and whole.labels.ndim == 1


@pytest.mark.parametrize("mark", ["|", ";", ", "])
def test_nobody_guesses_whether_a_cell_is_one_class(tmp_path, mark):
    path = csv(tmp_path, ["Mass", f"Edema{mark}Effusion", "Effusion", "Edema"])
    asked_of = r"line 3: one class or several\? 'Edema.*Effusion'; "
    said = rf"{asked_of}pass --label-separator '\{mark.strip()}'"
    with pytest.raises(ValueError, match=said + ".*--label-separator none if it is one") as asked:
        examples.read(path, label="label")
    assert "\n" not in str(asked.value)
    given = examples.read(path, label="label", classes=["Mass", f"Edema{mark}Effusion", "Effusion",
                                                        "Edema"])  # fmt: skip
    assert given.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("names", [["nevus, blue", "melanoma"], ["a; ", "b"], ["|", "c"]])
def test_names_with_marks_that_can_only_be_names_are_names(tmp_path, names):
    found = examples.read(csv(tmp_path, names), label="label")
    assert set(found.classes) == {name.strip() for name in names} and found.labels.ndim == 1


@pytest.mark.parametrize(
    "cell",
    ["Mass", '["Edema"', '{"a": 1}', '[["Edema"]]', "[1.5]", "[" * 3000 + "]" * 3000,
     "[__import__('os').getcwd()]", "[null]", f'["{"x" * 20_000}"]'],
)  # fmt: skip
def test_what_is_no_list_among_lists_is_a_problem(tmp_path, cell):
    path = csv(tmp_path, ['["Edema", "Mass"]', cell])
    with pytest.raises(ValueError, match="line 3: expected a list of names, as in other rows, got"):
        examples.read(path, label="label")


@pytest.mark.filterwarnings("default")
def test_a_probe_learns_findings_from_lists(capsys, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random((120, 2)) < 0.5
    vectors = labels @ rng.normal(size=(2, 8)) + 0.3 * rng.normal(size=(120, 8))
    ids = [f"{n}.png" for n in range(120)]
    np.savez(tmp_path / "v.npz", embeddings=vectors.astype(np.float32), ids=np.array(ids))
    cells = ["|".join(np.array(["Edema", "Mass"])[row]) or "No finding" for row in labels]
    path = csv(tmp_path, cells)
    command = ["probe", "fit", "--data", path, "--embeddings", tmp_path / "v.npz", "--json"]
    command = [*map(str, command), "--label", "label", "--output", str(tmp_path / "p.npz")]
    assert cli.main(command) == 2
    assert "--label-separator '|'" in capsys.readouterr().err
    assert cli.main([*command, "--label-separator", "|"]) == 0
    result = json.loads(capsys.readouterr().out)
    classes = result["validation"]["classes"]
    assert set(classes) == {"Edema", "Mass", "No finding"}
    assert min(classes[name]["auc"] for name in ("Edema", "Mass")) > 0.9
