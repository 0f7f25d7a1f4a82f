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


def test_a_class_of_the_name_of_uncertain_is_not_made_silently(tmp_path):
    path = table(tmp_path, ["1", "-1", "0"])
    with pytest.warns(UserWarning, match=r"names of classes, one of them '-1'.*label=\('edema',\)"):
        assert examples.read(path, label="edema").classes == ("-1", "0", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples.read(path, label="edema", classes=("0", "1", "-1"))
        examples.read(table(tmp_path, ["mild", "-1", "none"]), label="edema")


def test_classes_sort_as_numbers_if_all_are():
    assert labels.sorted_classes(["10", "", "9"]) == ("9", "10")
    assert labels.sorted_classes(["10", "x", "9"]) == ("10", "9", "x")


def test_a_policy_is_one_of_those_there_are():
    with pytest.raises(ValueError, match="uncertain is 'perhaps'; expected one of ignore, pos"):
        Policy("perhaps")
    with pytest.raises(ValueError, match="blank is 'positive'; expected one of ignore, negative"):
        Policy(blank="positive")
