"""config.json of a fine-tuning run: what the run is, and whether a folder holds the same one."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from medsiglip_jax.files import credentials, locks, places, settings, storage
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import dumps, to_hash
from medsiglip_jax.model import tree
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.train import build, loop
from medsiglip_jax.train.recipe import Data

CONFIG = "config.json"
_VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")  # recorded with a run
# Keys that may change between a run and its resumption; others make another run of it.
_FREE = frozenset(
    "total_steps epochs log_every eval_every checkpoint_every keep best max_unreadable max_skipped "
    "loader workers data_service mesh attention remat loss_chunk tensorboard logger learning_rate "
    "optimizer".split()
)


@contextmanager
def opened(workdir: places.Place) -> Iterator[locks.Check]:
    """Locks the workdir; refuses a folder of anything else before any work is done.

    Raises:
        FileExistsError: another run is writing to it, or it holds something else than a run.
        ValueError: its config.json is damaged.
    """
    with locks.lock(workdir / ".lock") as check:
        if not read(workdir) and places.visible(workdir):
            raise FileExistsError(
                f"{workdir}: not empty, and not a fine-tuning run; choose another folder"
            )
        yield check


def read(workdir: places.Place) -> dict[str, Any] | None:
    """The content of the config.json of a fine-tuning run; None where there is none, or that of
    another program.

    Raises:
        ValueError: it is damaged.
    """
    path, problem = workdir / CONFIG, "not the config of a fine-tuning run as finetune wrote it"
    try:
        content = json_files.read(path, problem)
    except FileNotFoundError:
        return None
    if "init_sha256" not in content:
        return None
    with explained(path, problem):
        settings.build(_Recorded, {name: content.get(name) for name in ("recipe", "data_sha256")})
        known = {name: content["recipe"].get(name) for name in ("data", "objective")}
        settings.build(_RecordedRecipe, known, "recipe")
    return content


@dataclass(frozen=True)
class _Recorded:
    """What of config.json a later run is compared by."""

    recipe: Mapping[str, Any]
    data_sha256: str


@dataclass(frozen=True)
class _RecordedRecipe:
    """What of a recipe has changed its form between versions."""

    data: tuple[Mapping[str, Any], ...]
    objective: Mapping[str, Any]


def claim(workdir: places.Place, prepared: build.PreparedRun, warn: Callable[[str], None]) -> None:
    """Writes config.json, after comparing this run with one that is there already.

    Raises:
        FileExistsError: see `compare`.
    """
    run, before = _identity(prepared), read(workdir)
    saved = bool(loop.saved_steps(workdir))
    if before is not None:
        compare(workdir, before, run, saved, warn)
    with storage.new_file(workdir / CONFIG) as partial:
        partial.write_text(dumps(run, indent=2, default=str) + "\n", encoding="utf-8")


def compare(
    workdir: places.Place,
    before: dict[str, Any],
    run: dict[str, Any],
    saved: bool,
    warn: Callable[[str], None],
) -> None:
    """Refuses another run than the recorded one; warns of keys that may change.

    Args:
        workdir: the folder of the run, for messages.
        before: the content of config.json, from `read`.
        run: what this run would write there.
        saved: whether there is a checkpoint; without one any key may change.
        warn: called with a line for each key that has changed.

    Raises:
        FileExistsError: a key has changed that makes it another run.
    """
    old, new = before["recipe"], json_files.parse(dumps(run["recipe"], default=str))
    # Runs of earlier versions lack keys that came later, whose defaults are what they did.
    defaults = {f.name: f.default for f in dataclasses.fields(Data) if f.name != "path"}
    old["data"] = [{**defaults, **data} for data in old["data"]]
    old["dicom"] = {**dataclasses.asdict(Rules()), **old.get("dicom", {})}
    # Runs from before objectives had settings of their own list those of all.
    old["objective"] = {name: old["objective"].get(name) for name in new["objective"]}
    lines = {key: f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in new}
    changed = [key for key in new if old.get(key) != new[key]]
    for key in ("init_sha256", "data_sha256"):
        lines[key] = f"{key.split('_')[0]}: its content changed"
        changed += [key] if before[key] != run[key] else []
    fixed = [lines[key] for key in changed if key not in _FREE]
    if fixed and saved:
        raise FileExistsError(
            f"{workdir}: holds a run of another config ({'; '.join(fixed)}); give the old config "
            "to resume it, or choose another workdir"
        )
    for key in changed:
        warn(f"{'resuming' if saved else 'starting again'} with a changed config: {lines[key]}")


def _identity(prepared: build.PreparedRun) -> dict[str, Any]:
    digest, checkpoint = hashlib.sha256(), prepared.model.checkpoint
    for rows in prepared.training:
        columns = [list(rows.images), list(rows.texts or ()), np.asarray(rows.labels).tolist()]
        digest.update(to_hash(columns))
    return {
        "recipe": _without_credentials(dataclasses.asdict(prepared.recipe)),
        "model": prepared.model.config.to_dict(),
        "init_sha256": prepared.model.sha256,
        "init_repo": checkpoint.repo if checkpoint else None,
        "data_sha256": digest.hexdigest(),
        "examples": [len(rows) for rows in prepared.training],
        "held_out": sum(map(len, prepared.held_out)),
        "test": sum(map(len, prepared.test)),
        "classes": list(prepared.training[0].classes),
        "trained": tree.size(prepared.state["params"]),
        "parameters": tree.size(prepared.model.params),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "versions": {name: version(name) for name in _VERSIONS},
    }


def _without_credentials(setting: Any) -> Any:
    """A setting, or all of a recipe, whose addresses are `credentials.without` them."""
    if isinstance(setting, dict):
        return {key: _without_credentials(value) for key, value in setting.items()}
    if isinstance(setting, list | tuple):
        return [_without_credentials(value) for value in setting]
    return credentials.without(setting) if isinstance(setting, str) else setting
