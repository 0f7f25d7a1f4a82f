"""The types that every checkpoint layout shares: parameters on disk, and their problems."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from medsiglip_jax.files import failures
from medsiglip_jax.model.config import ModelConfig

# The names that users give to element types.
DTYPES = {str(np.dtype(d)): np.dtype(d) for d in ("float32", ml_dtypes.bfloat16, "float16")}
# float8 and integer checkpoints are quantised: casting them would be wrong, not lossy.
FLOATS = {np.dtype("float64"), *DTYPES.values()}


def dtype_name(dtype: Any) -> str:
    """What `DTYPES` calls an element type of numpy or jax; a string stays as it is."""
    try:
        return dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        raise ValueError(
            f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}, by name or as jnp has it"
        ) from None


def dtype_of(name: str) -> np.dtype:
    """The element type called `name`; a ValueError if it is not one of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message lists every problem found."""

    def __init__(self, source: object, problems: list[str]):
        self.source, self.problems = source, problems
        lines = problems if len(problems) == 1 else [f"{len(problems)} problems", *problems]
        super().__init__(f"{source}: " + "\n  ".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:  # it comes from other processes, too
        return type(self), (self.source, self.problems)


def explained(source: object, problem: str) -> AbstractContextManager[None]:
    """`failures.explained` with a CheckpointError."""
    return failures.explained(source, problem, error=lambda at, text: CheckpointError(at, [text]))


@dataclass(frozen=True)
class Leaf:
    """One parameter on disk.

    Attributes:
        shape: of the whole parameter, the layer axis of a scanned stack included.
        dtype: as stored.
        parts: functions that read it: one for all of it, or one per layer of a stacked one. Each
            returns an array of the part's shape, possibly a strided view.
        problems: why it cannot be read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Callable[[], np.ndarray], ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, whose weights have not been read yet.

    Attributes:
        source: where it is, for messages.
        config: the architecture.
        leaves: path -> `Leaf`, big_vision names with stacked blocks.
        files: the weight files, for hashing.
        problems: those that belong to no single leaf.
        notes: what a user should know (parts left out, a missing pooling head).
        format: the name of its layout, which `layouts` enters.
        tokenizer: the file beside the weights that holds the vocabulary, or None; likewise.
        companions: the other files of its folder: processors, model card, licence; likewise.
        repo: its name on the Hugging Face hub, if it was loaded from there.
    """

    source: str
    config: ModelConfig
    leaves: Mapping[str, Leaf]
    files: tuple[Path, ...]
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    format: str = ""
    tokenizer: Path | None = None
    companions: Sequence[Path] = ()
    repo: str | None = None

    @property
    def dtype(self) -> str:
        """Stored dtypes, joined by "+" where a checkpoint mixes them."""
        return "+".join(sorted({str(leaf.dtype) for leaf in self.leaves.values()}))


@dataclass(frozen=True)
class Layout:
    """One way to lay a checkpoint out on disk: a row of the table in `layouts`.

    Attributes:
        name: what `save(format=)` and `convert --format` call it.
        marker: the file that makes a folder a checkpoint of this layout; it is written last.
        open: opens a path that was recognised; with a `base` it takes that, opened, too.
        write: writes parameters and architecture into a folder that may hold processor files; None
            for a layout that is only read.
        recognise: whether a path holds a checkpoint of this layout, from file names alone; default:
            it is a folder that has the marker.
        write_file: writes the parameters to one file, which `save` does for a path that ends as the
            marker does.
        base: of a layout that holds changes to another checkpoint: the source of that.
    """

    name: str
    marker: str
    open: Callable[..., Checkpoint]
    write: Callable[[Path, dict[str, Any], ModelConfig], None] | None = None
    recognise: Callable[[Path], bool] | None = None
    write_file: Callable[[Path, dict[str, Any]], None] | None = None
    base: Callable[[Path], str] | None = None

    def matches(self, path: Path) -> bool:
        return self.recognise(path) if self.recognise else (path / self.marker).is_file()


def why_unreadable(path: Path, otherwise: str) -> str:
    """Says that a file, or one in a folder, is a pickle; `otherwise` if there is none."""
    pickles = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.suffix in pickles:
            return (
                f"{file.name} is a pickle, which can run code when it is opened, so it is not read;"
                " convert it to safetensors first (transformers: save_pretrained)"
            )
    return otherwise
