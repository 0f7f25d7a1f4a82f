"""The one way in which this project makes JSON: strict, so that every program reads it."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Replaces what JSON lacks: tuples, NumPy's arrays and numbers, and NaN and infinity (null)."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(content: Any, **options: Any) -> str:
    """The JSON of `plain(content)`; `options` are those of `json.dumps`."""
    return json.dumps(plain(content), allow_nan=False, **options)


_COMPACT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_AT_ONCE = 2048  # numbers: 1 to 2 ms


def parts(value: Any) -> Iterator[str]:
    """The JSON of a value that is plain, without spaces, in parts of at most some 30,000
    characters, so that a large one does not keep a program busy in a single call.

    What holds no lists or objects itself is one part, but for long lists.
    """
    if isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        for i, (name, inner) in enumerate(value.items()):
            yield f"{',' if i else '{'}{_COMPACT.encode(name)}:"
            yield from parts(inner)
        yield "}"
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for i, inner in enumerate(value):
            yield "," if i else "["
            yield from parts(inner)
        yield "]"
    elif isinstance(value, list) and len(value) > _AT_ONCE:
        for i in range(0, len(value), _AT_ONCE):
            yield ("," if i else "[") + _COMPACT.encode(value[i : i + _AT_ONCE])[1:-1]
        yield "]"
    else:
        yield _COMPACT.encode(value)


def to_hash(content: Any, **options: Any) -> bytes:
    """The bytes of `content` to be hashed; nobody reads them, so NaN may be among its values."""
    return json.dumps(content, **options).encode()
