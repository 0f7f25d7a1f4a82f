"""The flow of images adds up, and characteristics are counted by image and by patient."""

import numpy as np
import pytest

from medsiglip_jax.evaluate.results import cohort


def test_the_flow_adds_up_whatever_was_left_out():
    counts = {"missing": 2, "conflicting": 1, "unlabelled": 30, "unreadable": 4, "repeated": 7,
              "images without a label": 99, "unreadable (train)": 5}  # fmt: skip
    rows = cohort.flow(counts, 100)
    assert rows[0] == {"step": "named by the data set", "images": 137, "left": 137}
    assert rows[-1] == {"step": "evaluated", "images": 100, "left": 100}
    assert [row["step"] for row in rows[1:-1]] == list(counts)[:4]
    assert np.cumsum([row["images"] for row in rows[:-1]]).tolist() == [
        r["left"] for r in rows[:-1]
    ]
    assert [row["images"] for row in cohort.flow({}, 5)] == [5, 5]


def test_characteristics_by_image_and_by_patient():
    attributes = {
        "sex": ["F", "F", "M", ""], "age": ["058Y", "", "30", "70"],
        "spacing": ["0.1", "0.2", "0.3", "0.4"], "site": ["a", "b", "a", "b"],
    }  # fmt: skip
    rows = cohort.characteristics(attributes, ["p", "p", "q", "r"])
    found = {(r["attribute"], r["value"]): (r["images"], r["groups"]) for r in rows}
    assert found["sex", "F"] == (2, 1) and found["sex", "unknown"] == (1, 1)
    assert found["age", "40 to 64"] == (1, 1) and found["age", "unknown"] == (1, 1)
    assert found["site", "a"] == (2, 2)
    assert cohort.characteristics({"sex": ["F"]}, None)[0]["groups"] is None


@pytest.mark.parametrize("name", ["age", "weight"])
def test_numbers_have_a_median_and_quartiles(name):
    values = list(range(20, 81))
    cells = [f"{v:03}Y" if name == "age" else str(v) for v in values] + [""]
    (first, *others) = cohort.characteristics({name: cells}, None)
    assert first["value"] == "median 50 (quartiles 35 to 65)" and first["images"] == 61
    assert len(others) == (4 if name == "age" else 0)  # three bands and unknown


def test_many_names_are_only_counted():
    (row,) = cohort.characteristics({"study": [f"s{i}" for i in range(50)]}, None)
    assert row["value"] == "50 different values"
