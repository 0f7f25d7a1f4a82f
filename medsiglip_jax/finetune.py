"""`finetune`: a recipe and a folder in, a fine-tuned model out."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsiglip_jax import api, freeze, lora, report, storage, train, tree
from medsiglip_jax.checkpoint import Checkpoints
from medsiglip_jax.job import Job, prepare
from medsiglip_jax.objectives import Params
from medsiglip_jax.recipe import Recipe
from medsiglip_jax.step import State, make_train_step

CONFIG, EXPORT, REPORT, UNREADABLE = "config.json", "export", "report.html", "unreadable.jsonl"
# Keys that may change between a run and its resumption; others make another run of it.
_FREE = frozenset(
    "total_steps log_every eval_every checkpoint_every keep best max_unreadable max_skipped loader "
    "mesh attention remat loss_chunk tensorboard".split()
)


def run(
    recipe: Recipe,
    workdir: str | os.PathLike,
    on_start: Callable[[Job], None] = lambda job: None,
    on_step: Callable[[int, dict[str, float] | None], None] = lambda done, values: None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fine-tunes, or goes on with the run that `workdir` holds.

    Args:
        recipe: what to do.
        workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/`, `export/` (Hugging Face
            layout), `report.html` and, if need be, `unreadable.jsonl` and `tensorboard/`.
        on_start: called once with the job, before the first step.
        on_step: see `train.fit`.
        warn: called with a line for the user.

    Returns:
        `steps`, the last `metrics`, `export`, `report`, `trained` and `parameters` (numbers of
        scalars), `unreadable` (rows that were masked).

    Raises:
        ValueError: anything wrong with the recipe, its data or its checkpoint.
        FileExistsError: another run is writing there, or what is there is of another recipe.
        FloatingPointError, train.Stopped: see `train.fit`.
    """
    storage.refuse_remote(workdir)
    workdir = Path(workdir)
    with storage.lock(workdir / ".lock") if jax.process_index() == 0 else nullcontext():
        job = prepare(recipe)
        _claim(workdir, job, warn)
        on_start(job)
        unreadable = Unreadable(workdir / UNREADABLE, recipe.max_unreadable)
        step = make_train_step(
            job.objective, job.optimizer, recipe.objective.accumulate, recipe.objective.negatives
        )
        options = train.Options(
            **{f.name: getattr(recipe, f.name) for f in dataclasses.fields(train.Options)
               if hasattr(recipe, f.name)}
        )  # fmt: skip
        batches = functools.partial(job.batches, unreadable)
        evaluate = job.evaluate if job.held_out else None
        on_log = _event_file(workdir, recipe)
        state = train.fit(workdir, job.state, step, batches, options, evaluate, on_step, on_log)
        return _finish(workdir, job, options, state, unreadable)


def _event_file(workdir: Path, recipe: Recipe) -> Callable[[dict[str, Any]], None]:
    if not recipe.tensorboard or jax.process_index():
        return lambda line: None
    from medsiglip_jax.data import EventFile

    return EventFile(workdir / "tensorboard")


class Unreadable:
    """Counts and lists images that could not be read; ends the run when there are too many."""

    def __init__(self, path: Path, limit: int):
        self.path, self.limit, self.count = path, limit, 0

    def __call__(self, image: str, reason: str) -> None:
        self.count += 1
        if jax.process_index() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"image": image, "reason": reason}) + "\n")
        if self.count > self.limit:
            raise ValueError(
                f"{self.count} images could not be read, more than max_unreadable={self.limit}; "
                f"the last: {image}: {reason}. All are listed in {self.path}"
            )


# ------------------------------------------------------------------------------------ the folder


def _claim(workdir: Path, job: Job, warn: Callable[[str], None]) -> None:
    """Writes config.json, or holds the run that is there against this one."""
    run = _identity(job)
    path = workdir / CONFIG
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        _compare(workdir, before, run, warn)
    elif any(p for p in workdir.iterdir() if not p.name.startswith(".")):
        raise FileExistsError(f"{workdir}: not empty, and not a fine-tuning run; choose another")
    if jax.process_index() == 0:
        with storage.new_file(path) as partial:
            partial.write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="utf-8")


def _compare(workdir: Path, before: dict, run: dict, warn: Callable[[str], None]) -> None:
    old, new = before["recipe"], json.loads(json.dumps(run["recipe"], default=str))
    changed = [key for key in new if old.get(key) != new[key]]
    lines = [f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in changed]
    for key in ("init_sha256", "data_sha256"):
        if before[key] != run[key]:
            changed.append(key)
            lines.append(f"{key.split('_')[0]}: its content changed")
    if fixed := [line for key, line in zip(changed, lines, strict=True) if key not in _FREE]:
        raise FileExistsError(
            f"{workdir}: holds a run of another config ({'; '.join(fixed)}); repeat the old one to "
            "go on with it, or choose another workdir"
        )
    for line in lines:
        warn(f"resuming with a changed config: {line}")


def _identity(job: Job) -> dict[str, Any]:
    digest = hashlib.sha256()
    for rows in job.training:
        columns = [list(rows.images), list(rows.texts or ()), np.asarray(rows.labels).tolist()]
        digest.update(json.dumps(columns).encode())
    return {
        "recipe": job.recipe.to_dict(),
        "model": job.model.config.to_dict(),
        "init_sha256": job.model.sha256,
        "data_sha256": digest.hexdigest(),
        "examples": [len(rows) for rows in job.training],
        "held_out": len(job.held_out) if job.held_out else 0,
        "classes": list(job.training[0].classes),
        "trained": tree.size(job.state["params"]),
        "parameters": tree.size(job.model.params),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
        },
    }


def _finish(workdir, job: Job, options, state: State, unreadable: Unreadable) -> dict[str, Any]:
    lines = train.read_metrics(workdir / train.METRICS)
    if job.recipe.best:
        state = _best(workdir, options, state)
    export(job, state, workdir / EXPORT)
    if jax.process_index() == 0:
        report.write(workdir / REPORT, json.loads((workdir / CONFIG).read_text()), lines)
    last: dict[str, Any] = {}
    for line in lines:
        last |= {k: v for k, v in line.items() if k not in train.TIMES}
    return {
        "steps": options.total_steps,
        "metrics": last,
        "export": str(workdir / EXPORT),
        "report": str(workdir / REPORT),
        "trained": tree.size(state["params"]),
        "parameters": tree.size(job.model.params),
        "unreadable": unreadable.count,
    }


def _best(workdir: Path, options: train.Options, state: State) -> State:
    folder = workdir / train.CHECKPOINTS
    with Checkpoints(folder, options.keep, options.best, options.mode) as checkpoints:
        shapes = train.shapes_of(state)
        found = checkpoints.restore(shapes, checkpoints.best_step())
    return state if found is None else {**found[1], "frozen": state["frozen"]}


def export(job: Job, state: State, folder: Path) -> None:
    """Writes the model in Hugging Face layout, adapters merged; a head as classifier.npz.

    `classifier.npz` holds `kernel` [D, classes], `bias`, `classes` and `pool`.
    """
    params = lora.merge(job.part.whole(freeze.join(state["params"], state["frozen"])))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index():
        return
    head = params.pop("head", None)
    tokenizer = job.model.processor.tokenizer_bytes
    extra = {} if head is None else {"classifier.npz": _classifier(job, head)}
    model = api.Model(params, job.model.config, tokenizer=tokenizer)
    api.save(model, folder, overwrite=True, extra=extra)


def _classifier(job: Job, head: Params) -> bytes:
    file = io.BytesIO()
    classes = np.array(job.training[0].classes, np.str_)
    kernel, bias = np.asarray(head["kernel"]), np.asarray(head["bias"])
    np.savez(file, kernel=kernel, bias=bias, classes=classes, pool=job.recipe.objective.pool)
    return file.getvalue()
