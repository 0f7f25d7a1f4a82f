"""What the commands write and is no checkpoint: the model that is meant, or what to give instead.

Recognised by what the higher rooms write: `train.finetune`, `inference.manifest`,
`evaluate.recompute` and `embeddings.probe.linear`.
"""

import zipfile
from pathlib import Path
from typing import Any

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files.places import Place
from medsiglip_jax.model.weights.checkpoint import CheckpointError

EXPORT_OF = "the export of the fine-tuning run"  # how a note begins
_MARKERS = ("config.json", "medsiglip_jax.json")
_EXPORT, _CHECKPOINTS = "export", "checkpoints"


def exported(place: Place) -> tuple[Place, str] | None:
    """The model that a fine-tuning run has exported, and a note that says so; None for no run.

    Raises:
        CheckpointError: the run has exported none.
    """
    run = _run_in(place)
    if run is None:
        return None
    done, total = _last_step(place), _table(run, "recipe").get("total_steps")
    if not any((place / _EXPORT / marker).is_file() for marker in _MARKERS):
        problem = f"a fine-tuning run that has exported no model yet; {_how_to_export(place)}"
        raise CheckpointError(place, [problem])
    note = f"{EXPORT_OF} {place}"
    if done is not None and isinstance(total, int) and done < total:
        note += f", which stopped at step {done} of {total}; {_how_to_export(place)}"
    return place / _EXPORT, note


def _how_to_export(run: Place) -> str:
    return f"`medsiglip-jax finetune --workdir {run} --export-only` exports its last checkpoint"


def explained(place: Place) -> str | None:
    """What a command of ours has written there, and what to give instead; None for all else."""
    names = {p.name for p in place.iterdir()} if place.is_dir() else set()
    if run := _run_around(place):
        there = (run / _EXPORT).is_dir()
        advice = f"give its export, {run / _EXPORT}" if there else _how_to_export(run)
        return f"a checkpoint of the fine-tuning run {run}, with its optimiser; {advice}"
    if "_CHECKPOINT_METADATA" in names:
        return "a checkpoint of a run, with its optimiser; give the model that the run exported"
    if "results.json" in names:
        return "what `evaluate` wrote, which holds no model; give the model that it evaluated"
    if "run.json" in names or {"manifest.json", "errors.parquet"} <= names:
        source = _source(place)
        made_with = f", such as {source}, which they were made with" if source else ""
        return f"embeddings, which `embed` wrote; give a model{made_with}"
    if _is_probe(place):
        return "a probe, which `probe fit` wrote; give it as --probe, and here a model"
    return None


def _run_in(place: Place) -> dict[str, Any] | None:
    content = _json(place / "config.json")
    return content if "init_sha256" in content else None


def _run_around(place: Place) -> Place | None:
    """The run whose checkpoints, or one of them or a part of one, lie there."""
    place = place.absolute() if isinstance(place, Path) else place
    for folder in (place, *list(place.parents)[:2]):
        if folder.name == _CHECKPOINTS and _run_in(folder.parent):
            return folder.parent
    return None


def _last_step(run: Place) -> int | None:
    folder = run / _CHECKPOINTS
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _source(place: Place) -> str | None:
    records = (_json(place / name) for name in ("run.json", "manifest.json"))
    sources = (_table(record, "model").get("source") for record in records)
    return next((source for source in sources if isinstance(source, str)), None)


def _table(content: dict[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := content.get(key), dict) else {}


def _is_probe(place: Place) -> bool:
    files = sorted(place.glob("*.npz")) if place.is_dir() else [place]
    if len(files) != 1 or files[0].suffix != ".npz" or not files[0].is_file():
        return False
    try:
        with files[0].open("rb") as file, zipfile.ZipFile(file) as archive:
            return {"coefficients.npy", "metadata.npy"} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _json(path: Place) -> dict[str, Any]:
    try:
        return json_files.read(path)
    except (ValueError, OSError):
        return {}
