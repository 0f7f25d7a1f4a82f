"""JSON files: indented, UTF-8, and null for what is no finite number."""

from typing import Any

from medsiglip_jax.files import storage
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import dumps, plain, to_hash
from medsiglip_jax.files.places import Place

__all__ = ["dumps", "plain", "read", "to_hash", "write"]


def read(path: Place, problem: str = "not a JSON object", advice: str = "") -> dict[str, Any]:
    """Reads a file that holds one JSON object; anything else is a ValueError that names it.

    Args:
        path: of the file.
        problem, advice: what the message says is wrong, and what to do.
    """
    with explained(path, problem, advice):
        return parse(path.read_text(encoding="utf-8"))


def write(path: Place, content: Any, exclusive: bool = False) -> None:
    """Writes a JSON file, complete or not at all; one that exists is replaced, or with `exclusive`
    a FileExistsError."""
    text = dumps(content, indent=2)
    with storage.new_file(path, exclusive) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
