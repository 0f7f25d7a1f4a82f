"""One notion of a label: what a cell means, the same for training, probes and evaluation."""

import warnings

import numpy as np
import pytest

from medsiglip_jax.data import examples, labels
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate.data import labels as evaluated
from medsiglip_jax.evaluate.data.layout import LabelColumns

CELLS = ["1", "1.0", "true", "TRUE", "Yes", "0", "0.0", "False", "no", "", "-1", "-1.0"]
WANT = np.float32([1, 1, 1, 1, 1, 0, 0, 0, 0, np.nan, np.nan, np.nan])


@pytest.mark.parametrize("policy", [Policy(), Policy("positive"), Policy("negative", "negative")])
def test_cells_mean_what_the_policy_says(policy):
    choice = {"ignore": np.nan, "positive": 1, "negative": 0}
    values, wrong = labels.finding(CELLS, policy)
    want = [*WANT[:9], choice[policy.blank], choice[policy.uncertain], choice[policy.uncertain]]
    np.testing.assert_array_equal(values, np.float32(want))
    assert values.dtype == np.float32 and not wrong


def test_other_cells_are_no_labels():
    values, wrong = labels.finding(["1", "2", "maybe", "0", "2"])
    assert (
        wrong == [1, 2, 4] and values[[0, 3]].tolist() == [1, 0] and np.isnan(values[wrong]).all()
    )
    assert labels.is_finding(CELLS) and not labels.is_finding(["0", "1", "2"])


def table(tmp_path, cells):
    path = tmp_path / "m.csv"
    path.write_text("image,edema\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    return path


def test_training_and_evaluation_agree(tmp_path):
    path = table(tmp_path, CELLS)
    with pytest.warns(UserWarning) as caught:
        trained = examples.read(path, label=("edema",)).labels
    rows = [{"edema": cell} for cell in CELLS]
    scored, _ = evaluated.of_rows(rows, ["edema"], LabelColumns(), Policy())
    np.testing.assert_array_equal(trained, WANT[:, None])
    np.testing.assert_array_equal(scored, trained)
    (warning,) = caught
    said = "labels of -1 (uncertain) are ignored, as if unknown: edema 2"
    assert str(warning.message) == f"{path}: {said}"


def test_what_is_no_label_is_refused_in_the_same_words(tmp_path):
    expected = r"expected 0, 1, true, false, yes, no, -1 \(uncertain\) or nothing, got 'maybe'"
    with pytest.raises(ValueError, match=rf"m.csv: column 'edema', line 3: {expected} \(2 rows"):
        examples.read(table(tmp_path, ["1", "maybe", "2"]), label=("edema",))
    rows = [{"edema": cell} for cell in ("1", "maybe", "2")]
    with pytest.raises(ValueError, match=rf"^column 'edema': {expected} \(2 rows in all\)$"):
        evaluated.of_rows(rows, ["edema"], LabelColumns(), Policy())


def test_a_class_is_not_called_uncertain(tmp_path):
    """One column of a finding is the same finding for training and for probes."""
    path = table(tmp_path, ["1", "-1.0", "0", ""])
    with pytest.warns(UserWarning, match="'edema' is read as a finding, since it holds -1"):
        found = examples.read(path, label="edema", uncertain="negative")
    assert found.classes == ("edema",) and found.labels.dtype == np.float32
    np.testing.assert_array_equal(found.labels, np.float32([[1], [0], [0], [np.nan]]))
    path = table(tmp_path, ["1", "-1", "0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples.read(path, label="edema", classes=("0", "1", "-1"))
    with pytest.warns(UserWarning, match="as names of classes, of which -1 is one"):
        examples.read(table(tmp_path, ["mild", "-1", "none"]), label="edema")


def test_a_policy_may_differ_by_finding(tmp_path):
    """As for CheXpert; the others are ignored, or as "*" says. For all who read labels."""
    cells = [dict(zip(("edema", "mass", "nodule"), row, strict=True)) for row in (
        ("-1", "-1", "-1"), ("1", "0", ""), ("Uncertain", "Positive", "absent"))]  # fmt: skip
    text = "image,edema,mass,nodule\n" + "".join(
        f"{i},{','.join(row.values())}\n" for i, row in enumerate(cells)
    )
    (tmp_path / "m.csv").write_text(text)
    names, unknown = ("edema", "mass", "nodule"), np.nan
    for uncertain, want in (
        ({"edema": "positive"}, [[1, unknown, unknown], [1, 0, unknown], [1, 1, 0]]),
        ({"mass": "negative", "*": "positive"}, [[1, 0, 1], [1, 0, unknown], [1, 1, 0]]),
    ):
        policy = Policy(uncertain)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = examples.read(tmp_path / "m.csv", label=names, uncertain=uncertain)
        said = [str(w.message).rpartition(": ")[2] for w in told]
        assert said == ([] if "*" in uncertain else ["mass 1, nodule 1"])
        np.testing.assert_array_equal(found.labels, np.float32(want))
        scored, _ = evaluated.of_rows(cells, names, LabelColumns(), policy)
        np.testing.assert_array_equal(scored, found.labels)
    misspelt = "^.*uncertain names 'oedema'; the findings are edema, mass, nodule$"
    for read in (
        lambda policy: examples.read(tmp_path / "m.csv", label=names, uncertain=policy.uncertain),
        lambda policy: evaluated.of_rows(cells, names, LabelColumns(), policy),
    ):
        with pytest.raises(ValueError, match=misspelt):
            read(Policy({"oedema": "positive"}))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("positive", "positive"), ("Edema=positive", {"Edema": "positive"}),
        ("negative, Pleural Effusion=positive", {"*": "negative", "Pleural Effusion": "positive"}),
    ],
)  # fmt: skip
def test_policies_of_the_command_line(text, want):
    assert labels.parse_uncertain(text) == want and Policy(want).uncertain == want


@pytest.mark.parametrize(("text", "want"), [
    ("positive", {"": "positive"}),
    ("test:ignore,train:positive", {"": "ignore", "test": "ignore", "train": "positive"}),
    ("negative, train:positive", {"": "negative", "train": "positive"}),
    ("Edema=negative,train:positive", {
        "": {"Edema": "negative"}, "train": {"Edema": "negative", "*": "positive"}}),
    ("positive,train:Edema=negative,Mass=ignore,validation: Mass = negative", {
        "": {"*": "positive", "Mass": "ignore"},
        "train": {"*": "positive", "Mass": "ignore", "Edema": "negative"},
        "validation": {"*": "positive", "Mass": "negative"}}),
    ("a:b=positive,train:a=b=negative", {
        "": {"a:b": "positive"}, "train": {"a:b": "positive", "a=b": "negative"}}),
])  # fmt: skip
def test_policies_by_part(text, want):
    """A rule of a part goes before one of all, a rule of a finding before one of all findings."""
    found = labels.parse_policies(text, "negative")
    assert {part: policy.uncertain for part, policy in found.items()} == want
    assert {policy.blank for policy in found.values()} == {"negative"}


def test_blank_cells_by_part_and_finding():
    found = labels.parse_policies("positive", "train:negative,Edema=negative,test:Edema=ignore")
    blank = {"": {"Edema": "negative"}, "train": {"Edema": "negative", "*": "negative"},
             "test": {"Edema": "ignore"}}  # fmt: skip
    assert {part: policy.blank for part, policy in found.items()} == blank
    cells = [{"Edema": "", "Mass": ""}]
    for part, want in (("", [0, np.nan]), ("train", [0, 0]), ("test", [np.nan, np.nan])):
        scored, _ = evaluated.of_rows(cells, ("Edema", "Mass"), LabelColumns(), found[part])
        np.testing.assert_array_equal(scored[0], want)
    with pytest.raises(ValueError, match="blank names 'Oedema'; the findings are Edema, Mass"):
        policy = Policy(blank={"Oedema": "negative"})
        evaluated.of_rows(cells, ("Edema", "Mass"), LabelColumns(), policy)


def test_a_part_that_there_is_not_is_no_choice():
    for text in ("trian:positive", "train:perhaps", "train:", ""):
        with pytest.raises(ValueError, match="uncertain is '.*'; expected one of ignore, pos"):
            labels.parse_policies(text, "ignore")


@pytest.mark.parametrize(("blank", "want"), [
    ("ignore", [np.nan, np.nan]), ("negative", [0, 0]), ({"a": "negative"}, [0, np.nan]),
])  # fmt: skip
def test_an_empty_cell_of_names(blank, want):
    rows, layout = [{"names": "a|b"}, {"names": ""}], LabelColumns("names", separator="|")
    found, _ = evaluated.of_rows(rows, ("a", "b"), layout, Policy(blank=blank), False)
    np.testing.assert_array_equal(found, [[1, 1], want])


@pytest.mark.parametrize(
    ("column", "want"),
    [
        (np.int32([0, 1, 2, -1]), []),
        (np.int32([0, 0, -1]), ["no image of the class b, c", "all images are of one class, a"]),
        (np.float32([[0, 1, np.nan], [0, 1, np.nan]]), [
            "no known label of the finding c", "no positive of the finding a",
            "no negative of the finding b"]),
        (np.float32([[0, 1, 0], [1, 0, 1]]), []),
    ],
)  # fmt: skip
def test_what_labels_cannot_teach(column, want):
    assert labels.lacking(column, "abc") == want


def test_classes_sort_as_numbers_if_all_are():
    assert labels.sorted_classes(["10", "", "9"]) == ("9", "10")
    assert labels.sorted_classes(["10", "x", "9"]) == ("10", "9", "x")


def test_a_policy_is_one_of_those_there_are():
    with pytest.raises(ValueError, match="uncertain is 'perhaps'; expected one of ignore, pos"):
        Policy("perhaps")
    with pytest.raises(ValueError, match="blank is 'positive'; expected one of ignore, negative"):
        Policy(blank="positive")
