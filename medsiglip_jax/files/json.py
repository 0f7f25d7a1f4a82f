"""JSON as this project writes it: indented, UTF-8, and null for what is no finite number."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from medsiglip_jax.files.places import Place


def plain(value: Any) -> Any:
    """Replaces what JSON lacks: tuples, NumPy's arrays and numbers, and NaN and infinity (null)."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Place, content: Any) -> None:
    """Writes a JSON document to `path` (use `storage.new_file` where it must appear whole)."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
