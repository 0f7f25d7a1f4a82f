"""The one way in which this project makes JSON: strict, so that every program reads it."""

import json
import math
from collections.abc import Mapping
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


def to_hash(content: Any, **options: Any) -> bytes:
    """What stands for `content` in a hash, and is never read: NaN may be in it, as ever."""
    return json.dumps(content, **options).encode()
