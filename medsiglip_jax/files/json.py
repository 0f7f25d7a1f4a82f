"""JSON as this project writes it: indented, UTF-8, and null for what is no finite number."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from medsiglip_jax.files import storage
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


def read(path: Place) -> dict[str, Any]:
    """Reads a file that holds one JSON object; anything else is a ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def write(path: Place, content: Any) -> None:
    """Writes a JSON file, complete or not at all; one that exists is replaced."""
    text = json.dumps(plain(content), indent=2, allow_nan=False)
    with storage.new_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
