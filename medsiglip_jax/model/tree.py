"""Nested dicts of arrays, addressed by "/"-joined paths."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Tree = Mapping[str, Any]


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a/b/c", leaf) in sorted order, the order in which JAX flattens dicts."""
    for key in sorted(tree):
        path = f"{prefix}{key}"
        if isinstance(tree[key], Mapping):
            yield from items(tree[key], f"{path}/")
        else:
            yield path, tree[key]


def flatten(tree: Tree) -> dict[str, Any]:
    return dict(items(tree))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`; a ValueError if a path is given twice or lies under a leaf."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} lies under another parameter")
        if name in node:
            raise ValueError(f"{path!r} is given twice, or is also a folder")
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Applies `function(path, leaf)` to every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in items(tree)})


def match(rules: Sequence[tuple[str, Any]], paths: Sequence[str]) -> dict[str, Any]:
    """Gives every path the value of the first rule whose regex matches all of it.

    Args:
        rules: (regex, value) pairs for `re.fullmatch`; the first match wins (big_vision
            utils.py:1195).
        paths: "/"-joined paths.

    Raises:
        ValueError: a rule matches no path at all (a typo), or a path matches no rule.
    """
    hits = {regex: sum(1 for p in paths if re.fullmatch(regex, p)) for regex, _ in rules}
    if dead := [regex for regex, count in hits.items() if not count]:
        raise ValueError(f"patterns that match no parameter: {', '.join(map(repr, dead))}")
    matched = {}
    for path in paths:
        values = [value for regex, value in rules if re.fullmatch(regex, path)]
        if not values:
            raise ValueError(f"no pattern matches the parameter {path!r}; end with ('.*', …)")
        matched[path] = values[0]
    return matched


# In the path of a parameter that holds all layers of a tower, stacked on axis 0.
STACK = "/encoderblock/"


def layer_paths(path: str, leaf: Any) -> list[str]:
    """The paths that rules match: for a stack one per layer, "…/encoderblock_3/…", else `path`."""
    if STACK not in path:
        return [path]
    return [path.replace(STACK, f"{STACK[:-1]}_{i}/") for i in range(leaf.shape[0])]


def match_layers(rules: Sequence[tuple[str, Any]], tree: Tree) -> dict[str, list[Any]]:
    """`match` over `layer_paths`: gives every path of the tree the values of its layers."""
    paths = {path: layer_paths(path, leaf) for path, leaf in items(tree)}
    matched = match(rules, [layer for layers in paths.values() for layer in layers])
    return {path: [matched[layer] for layer in layers] for path, layers in paths.items()}


def size(tree: Tree) -> int:
    """Number of scalars in all leaves."""
    return sum(int(leaf.size) for _, leaf in items(tree))
