"""What is in a folder: digests of its files, and whether each is whole."""

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torture_process import in_child

# The files below a folder, each with a digest of its content.
State = dict[str, str]


def state(folder: Path) -> State:
    """The files in a folder, hidden ones too, each with a digest of its content; orbax's folders of
    arrays, whose files have random names, as one."""
    arrays = [path.parent for path in sorted(folder.rglob("_METADATA"))]
    files = {
        path: hashlib.sha256(_content(path)).hexdigest()[:12]
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and not set(path.parents) & set(arrays)
    }
    digests = files | (_digests_of_arrays(arrays) if arrays else {})
    return {path.relative_to(folder).as_posix(): digest for path, digest in digests.items()}


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return os.readlink(path).encode()
    return _of_index(path) if path.stem == "index" else path.read_bytes()


def _of_index(path: Path) -> bytes:
    """What two builds of an index have in common: threads decide which graph of several it is. Of
    the graph that is whether it belongs to the record."""
    if not path.with_name("index.json").is_file():  # a build that was interrupted
        return path.read_bytes()
    record = json.loads(path.with_name("index.json").read_text())
    if path.name == "index.json":
        kept = {key: value for key, value in record.items() if key not in ("bytes", "sha256")}
        return json.dumps(kept).encode()
    return str(hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]).encode()


def _digests_of_arrays(folders: Sequence[Path]) -> dict[Path, str]:
    """Of all arrays that orbax restores from each; "unreadable" if it does not."""

    def work() -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            for folder, result in zip(folders, results, strict=True):
                with contextlib.suppress(Exception):
                    result.write_text(_digest(checkpointer.restore(folder.absolute())))

    with tempfile.TemporaryDirectory() as scratch:
        results = [Path(scratch, str(number)) for number in range(len(folders))]
        in_child(work, quiet=True)
        found = (path.read_text() if path.exists() else "unreadable" for path in results)
        return dict(zip(folders, found, strict=True))


def _digest(tree: Any) -> str:
    import jax

    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(x).tobytes())
    return digest.hexdigest()[:12]


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def is_whole(path: Path) -> bool:
    """Whether a file is one of its format and can be read to its end."""
    kind = path.suffix or ".json"  # those of orbax have no suffix
    if kind not in _READERS:
        return False
    try:
        _READERS[kind](path.read_bytes())
    except Exception:
        return False
    return True


def _read_lines(data: bytes) -> None:
    *lines, _ = data.decode().split("\n")  # a kill may cut the last one short, which is dropped
    for line in lines:
        json.loads(line)


def _read_arrays(data: bytes) -> None:
    with np.load(io.BytesIO(data)) as arrays:
        for name in arrays.files:
            arrays[name]


def _read_parquet(data: bytes) -> None:
    import pyarrow.parquet as pq

    pq.read_table(io.BytesIO(data), use_threads=False)


def _read_picture(data: bytes) -> None:
    from PIL import Image

    Image.open(io.BytesIO(data)).load()


def _read_safetensors(data: bytes) -> None:
    from safetensors.numpy import load

    load(data)


def _read_page(data: bytes) -> None:
    assert data.rstrip().endswith(b"</html>")


def _read_index(data: bytes) -> None:
    from usearch.index import Index

    assert len(Index.restore(data, view=False))


def _read_commit(data: bytes) -> None:
    assert data.startswith(b"Checkpoint commit was successful to /")  # by orbax


_READERS: dict[str, Callable[[bytes], object]] = {
    ".json": json.loads, ".jsonl": _read_lines, ".npz": _read_arrays, ".parquet": _read_parquet,
    ".png": _read_picture, ".safetensors": _read_safetensors, ".html": _read_page,
    ".txt": _read_commit, ".usearch": _read_index,
}  # fmt: skip


def is_temporary(name: str) -> bool:
    return is_hidden(name) or ".orbax-checkpoint-tmp" in name
