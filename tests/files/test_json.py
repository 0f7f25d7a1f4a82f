"""JSON without what JSON lacks."""

import json

import numpy as np

from medsiglip_jax.files import json as json_files


def test_nan_infinity_tuples_and_numpy_become_what_json_has():
    content = {"auc": np.float32(0.5), "low": float("nan"), "n": np.int64(3), "name": "x",
               "rows": (1.0, np.array([[np.inf, 2.0]])), "on": np.True_, "none": None}  # fmt: skip
    assert json_files.plain(content) == {
        "auc": 0.5, "low": None, "n": 3, "name": "x", "rows": [1.0, [[None, 2.0]]], "on": True,
        "none": None,
    }  # fmt: skip


def test_what_is_written_is_read_again(tmp_path):
    json_files.write(tmp_path / "a.json", {"ä": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": [1, None]}
