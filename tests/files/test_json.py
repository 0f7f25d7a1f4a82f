"""JSON without what JSON lacks."""

import ast
import json

import numpy as np
import pytest
import source_files

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import storage


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


def makes_json(source):
    """Where a file makes JSON without `files.json_text`: json.dump, json.dumps, an encoder."""
    names = {"dump", "dumps", "JSONEncoder", "to_json"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if node.attr == "to_json" or getattr(node.value, "id", "") == "json":
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "json":
            yield from (node.lineno for alias in node.names if alias.name in names)


def test_all_json_is_made_by_the_strict_writer():
    """Python writes NaN and Infinity, which are no JSON, unless it is told not to."""
    found = {
        path: lines
        for path, text in source_files.texts().items()
        if (lines := list(makes_json(text)))
    }
    assert set(found) == {"files/json_text.py"}, "use files.json_text.dumps"
    planted = "import json\nfrom json import dumps\njson.dump({}, f)\nframe.to_json()\n"
    assert list(makes_json(planted)) == [2, 3, 4]


def test_lines_and_text_are_strict(tmp_path):
    lines = storage.Lines(tmp_path / "m.jsonl")
    lines.append({"step": 1, "val_auc": float("nan"), "loss": np.float32(np.inf)})
    written = (tmp_path / "m.jsonl").read_text()
    assert json.loads(written, parse_constant=pytest.fail) == {
        "step": 1, "val_auc": None, "loss": None,
    }  # fmt: skip
    assert json_files.dumps({"n": (1, np.nan)}, separators=(",", ":")) == '{"n":[1,null]}'
