"""Nested dicts addressed by paths, and rules that match them."""

import jax
import pytest

from medsiglip_jax.model import tree


def test_tree_paths():
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    flat = tree.flatten(nested)
    assert flat == {"a/b": 1, "a/c/d": 2, "e": 3} and tree.unflatten(flat) == nested
    assert list(flat.values()) == jax.tree.leaves(nested)
    for clash in ({"a": 1, "a/b": 2}, {"a/b": 1, "a": 2}):
        with pytest.raises(ValueError):
            tree.unflatten(clash)


def test_rules_match_whole_paths_first_wins_and_dead_ones_are_errors():
    paths = ["img/kernel", "img/bias", "t"]
    assert tree.match([("img/.*", 1), (".*", 2)], paths) == {
        "img/kernel": 1, "img/bias": 1, "t": 2
    }  # fmt: skip
    assert tree.match([(".*/kernel", 1), (".*", 2)], paths)["img/bias"] == 2
    with pytest.raises(ValueError, match="match no parameter: 'imgs/"):
        tree.match([("imgs/.*", 1), (".*", 2)], paths)
    with pytest.raises(ValueError, match="no pattern matches the parameter 't'"):
        tree.match([("img/.*", 1)], paths)
