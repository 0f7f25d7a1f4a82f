"""`finetune`: a recipe and a folder in, a fine-tuned model out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax

from medsiglip_jax.files import credentials, places, storage
from medsiglip_jax.files import json as json_files
from medsiglip_jax.model import api, devices, processes, tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights import readme
from medsiglip_jax.pages import card
from medsiglip_jax.preprocess.dicom.rules import TRAINED
from medsiglip_jax.train import build, loggers, loop, lora, report, run_record
from medsiglip_jax.train import recipe as recipes
from medsiglip_jax.train.objectives.objective import Reading
from medsiglip_jax.train.recipe import Recipe
from medsiglip_jax.train.run_record import CONFIG
from medsiglip_jax.train.step import State, learned

EXPORT, REPORT, UNREADABLE = "export", "report.html", "unreadable.jsonl"
ADAPTER, EXPORTED = "adapter", "exported.json"
# What a run is exported with, whatever machines it had: its dispatcher may have stopped, too.
_ALONE = {"mesh": {"data": 1}, "attention": None, "loader": "auto", "data_service": None}


def run(
    recipe: Recipe,
    workdir: places.Given,
    on_start: Callable[[build.PreparedRun], None] = lambda prepared: None,
    on_step: Callable[[int, dict[str, float] | None], None] = lambda done, values: None,
    warn: Callable[[str], None] = lambda line: None,
    on_metrics: loggers.OnMetrics | None = None,
) -> dict[str, Any]:
    """Fine-tunes, or resumes the run in `workdir`.

    Args:
        recipe: the run.
        workdir: local, gs:// or s3://; gets `config.json`, `metrics.jsonl`, `checkpoints/`,
            `export/` (Hugging Face layout; orbax's for a classifier with pool="map"),
            `exported.json` (scores of the exported step), `report.html` and, if need be,
            `adapter/` (PEFT), `unreadable.jsonl` and `tensorboard/`.
        on_start: called once with the prepared run, before the first step.
        on_step: see `loop.fit`.
        warn: called with each line that the user should see.
        on_metrics: called in process 0 with the step and the metrics of each line of
            `metrics.jsonl`, as a recipe's `logger` is; what it raises is a warning.

    Returns:
        `steps`, `exported_step` (the last, or the best), the `metrics` at it, `export`, `adapter`
        (None unless there is one), `report`, `test` (of classes, if there is such a split: see
        `metrics.judge_classes`), `trained` and `parameters` (numbers of scalars), `unreadable`
        (images, each counted once).

    Raises:
        ValueError: something is wrong with the recipe, its data or its checkpoint.
        FileExistsError: another run is writing to `workdir`, or it holds a run of another recipe.
        FloatingPointError, loop.Stopped: see `loop.fit`.
    """
    workdir = places.at(workdir)
    with ExitStack() as stack:
        check = processes.run_on(lambda: stack.enter_context(run_record.opened(workdir)), 0)
        starts = processes.run_on(lambda: _loggers(recipe, workdir, on_metrics), 0) or {}
        prepared = build.prepare(_with_dtype(recipe, workdir))
        recipe = prepared.recipe  # with the number of steps
        processes.run_on(lambda: run_record.claim(workdir, prepared, warn), 0)
        if jax.process_index() == 0 and (line := unlike_before(recipe, prepared.model.config)):
            warn(line)
        on_start(prepared)
        unreadable = Unreadable(workdir, recipe.max_unreadable)
        not_finite = NotFinite(workdir, recipe.max_skipped)
        logged = stack.enter_context(loggers.Loggers(warn))
        for name, start in starts.items():
            logged.add(name, start, {**(run_record.read(workdir) or {}), "workdir": str(workdir)})

        def on_log(line: dict[str, Any]) -> None:
            if check is not None:
                check()
            unreadable.check()
            for problem in not_finite(line):
                warn(problem)
            logged(line)

        parts = prepared.loss, prepared.optimizer, prepared.state, prepared.mesh
        step, options = build.train_step(recipe, *parts), _options(recipe)
        batches = functools.partial(prepared.batches, unreadable)
        evaluate = functools.partial(prepared.evaluate, unreadable) if prepared.held_out else None
        state = loop.fit(workdir, prepared.state, step, batches, options, evaluate, on_step, on_log)
        return _finish(workdir, prepared, state, unreadable)


def unlike_before(recipe: Recipe, config: ModelConfig) -> str | None:
    """A line on images that are prepared otherwise than when the model to start from was trained
    here; None if they are not."""
    if (before := config.trained) is None:
        return None
    pairs = {"preprocess": (recipe.preprocess, before.preprocess)}
    pairs |= {f"dicom.{n}": (getattr(recipe.dicom, n), getattr(before.dicom, n)) for n in TRAINED}
    differ = [f"{name} {now} instead of {was}" for name, (now, was) in pairs.items() if now != was]
    if not differ:
        return None
    what = f"images are prepared otherwise than in the training of {recipe.init}"
    return f"{what}: {', '.join(differ)}"


def export_last(workdir: places.Given) -> dict[str, Any]:
    """Exports a run that has stopped early from its last checkpoint, or its best, on one device.

    Args:
        workdir: of the run; gets `export/`, `report.html` and perhaps `adapter/`, as by `run`, and
            can still be resumed.

    Returns:
        As `run`.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint yet.
        FileExistsError: the run is still going on.
        ValueError: what it started from, or its classes, are no longer there or no longer the same.
    """
    workdir = places.at(workdir)
    before = run_record.read(workdir)
    if before is None:
        raise FileNotFoundError(f"{workdir}: no fine-tuning run here (no {CONFIG} of one)")
    recipe = recipes.from_dict(before["recipe"] | _ALONE)
    with run_record.opened(workdir):
        prepared = build.prepare(recipe)
        now = {"init": prepared.model.sha256, "classes": list(prepared.training[0].classes)}
        then = {"init": before["init_sha256"], "classes": before["classes"]}
        if changed := [name for name in now if now[name] != then[name]]:
            raise ValueError(
                f"{workdir}: {' and '.join(changed)} of this run have changed since it started; "
                "put back what it started with"
            )
        with _options(recipe).checkpoints(workdir) as checkpoints:
            checkpoint = checkpoints.restore(loop.shapes_of(prepared.state))
        if checkpoint is None:
            raise FileNotFoundError(f"{workdir}: this run has no checkpoint yet to export")
        state = {**checkpoint[1], "frozen": prepared.state["frozen"]}
        return _finish(workdir, prepared, state, Unreadable(workdir, recipe.max_unreadable))


def _loggers(
    recipe: Recipe, workdir: places.Place, on_metrics: loggers.OnMetrics | None
) -> dict[str, loggers.Start]:
    """What starts those who get the metrics, by the names that messages call them."""
    starts: dict[str, loggers.Start] = {}
    if recipe.tensorboard:
        from medsiglip_jax.train.events import EventFile

        starts["tensorboard"] = lambda config: EventFile(workdir / "tensorboard")
    if recipe.logger is not None:
        starts[f"logger {recipe.logger}"] = loggers.find(recipe.logger)
    if on_metrics is not None:
        starts["on_metrics"] = lambda config: on_metrics
    return starts


def _with_dtype(recipe: Recipe, workdir: places.Place) -> Recipe:
    """The recipe with what the dtype "auto" is: that of a run that is resumed, if there is one."""
    if recipe.dtype != devices.AUTO:
        return recipe
    recorded = (run_record.read(workdir) or {}).get("recipe", {}).get("dtype")
    own = recorded or devices.auto_dtype(jax.devices()[0])
    dtypes = ("float32", "bfloat16")
    chosen = dtypes[processes.allgather_int(dtypes.index(own))[0]]  # by process 0
    return dataclasses.replace(recipe, dtype=chosen)


def _options(recipe: Recipe) -> loop.LoopOptions:
    shared = {f.name for f in dataclasses.fields(loop.LoopOptions)} & set(vars(recipe))
    mode = "min" if recipe.best and recipe.best.endswith("loss") else "max"
    return loop.LoopOptions(**{name: getattr(recipe, name) for name in shared}, mode=mode)


class Unreadable:
    """Lists images that could not be read, each once, and ends the run when there are too many.

    Every process has a file of its own. Several processes end together, when they log; a single one
    ends at once.
    """

    def __init__(self, workdir: places.Place, limit: int):
        index = jax.process_index()
        self.path = workdir / (f"unreadable-{index}.jsonl" if index else UNREADABLE)
        self.limit, self._last = limit, ""
        self.images = {line["image"] for line in storage.read_lines(self.path, image=str)}
        self._lines = storage.Lines(self.path)

    def __call__(self, image: str, reason: str) -> None:
        image = credentials.without(image)
        self._last = f"{image}: {reason}"
        if image in self.images:
            return
        self.images.add(image)
        self._lines.append({"image": image, "reason": reason})
        if jax.process_count() == 1:
            self.check()

    def count(self) -> int:
        """The number of images, over all processes."""
        return int(processes.allgather_int(len(self.images)).sum())

    def check(self) -> None:
        """Writes the list to disk; raises ValueError if it is longer than the limit."""
        self._lines.flush()
        if (count := self.count()) > self.limit:
            raise ValueError(
                f"{count} images could not be read, more than max_unreadable={self.limit}; the "
                f"last: {self._last}. They are listed in {self.path}"
            )


class NotFinite:
    """Tells from lines of metrics which updates were skipped, and, once, what is undefined."""

    def __init__(self, workdir: places.Place, limit: int):
        lines = loop.read_metrics(workdir / loop.METRICS)
        self._skipped = max((line.get("skipped", 0) for line in lines), default=0)
        self._limit, self._undefined = limit, set()

    def __call__(self, line: Mapping[str, Any]) -> Iterator[str]:
        if (skipped := line.get("skipped", 0)) > self._skipped or line.get("skipped_in_row"):
            yield (
                f"step {line['step']}: loss or gradient was not finite, so that updates were "
                f"skipped ({skipped - self._skipped:.0f} since the last such line; loss now "
                f"{line['loss']}); {self._limit} in a row end the run"
            )
            self._skipped = skipped
        new = {name for name, value in line.items() if value is None} - self._undefined
        if new:
            self._undefined |= new
            yield (
                f"step {line['step']}: undefined, and null in {loop.METRICS}: "
                f"{', '.join(sorted(new))}; among the images held out no class has both images "
                "that show it and others"
            )


def _finish(
    workdir: places.Place, prepared: build.PreparedRun, state: State, unreadable: Unreadable
) -> dict[str, Any]:
    done, lines = int(state["step"]), loop.read_metrics(workdir / loop.METRICS)
    if prepared.recipe.best:
        with _options(prepared.recipe).checkpoints(workdir) as checkpoints:
            checkpoint = checkpoints.restore(loop.shapes_of(state), checkpoints.best_step())
        state = state if checkpoint is None else {**checkpoint[1], "frozen": state["frozen"]}
    step = int(state["step"])
    thresholds, test = prepared.judge(unreadable, state)
    shown: dict[str, Any] = {}
    for line in lines:
        if line["step"] <= step:
            shown |= {k: v for k, v in line.items() if k not in loop.TIMES}
    facts = run_record.read(workdir) or {}, step, shown, test
    export(prepared, state, workdir / EXPORT, thresholds.tolist(), facts)
    adapter = _export_adapter(prepared, state, workdir / ADAPTER)
    if jax.process_index() == 0:
        report.write(workdir / REPORT, facts[0], lines, *facts[1:])
        exported = {"step": step, "metrics": shown, "test": test}
        json_files.write(workdir / EXPORTED, exported)
    return {
        "steps": done,
        "exported_step": step,
        "metrics": shown,
        **({} if test is None else {"test": json_files.plain(test)}),
        "export": str(workdir / EXPORT),
        "adapter": adapter and str(adapter),
        "report": str(workdir / REPORT),
        "trained": tree.size(state["params"]),
        "parameters": tree.size(prepared.model.params),
        "unreadable": unreadable.count(),
    }


def export(
    prepared: build.PreparedRun,
    state: State,
    folder: places.Place,
    thresholds: Sequence[float],
    facts: tuple[dict, int, dict, dict | None],
) -> None:
    """Writes the model in Hugging Face layout, adapters merged; with orbax where that layout has no
    place for its classifier. `facts` are those of its card."""
    whole = prepared.part.whole(learned(state))
    params = processes.gathered(lora.merge(whole))
    if jax.process_index():
        return
    base, recipe = prepared.model, prepared.recipe
    reading = Reading(recipe.preprocess, recipe.dicom, tuple(thresholds))
    config, params = recipe.objective.exported(base.config, params, prepared.labels, reading)
    tokenizer, companions = base.processor.tokenizer_source, base.companions
    model = api.Model(params, config, tokenizer=tokenizer, companions=companions)
    layout = "orbax" if config.classifier and config.classifier.pool == "map" else "huggingface"
    terms = readme.terms(companions, base.config, recipe.init)
    cards = {"README.md": card.of_run(*facts, terms, folder.parent.name, config).encode()}
    for file in companions:
        if file.name == "README.md":
            cards["README.base.md"] = file.read_bytes()  # the terms may lie there
    api.save(model, folder, layout, overwrite=True, extra=cards)


def _export_adapter(
    prepared: build.PreparedRun, state: State, folder: places.Place
) -> places.Place | None:
    """Writes the adapters of a run that has a base for them, which must not be a classifier: its
    classes would come back with it."""
    recipe, base = prepared.recipe, prepared.model.checkpoint
    if not recipe.lora or recipe.init is None or (base and base.config.classifier):
        return None
    whole = prepared.part.whole(learned(state))
    reading = Reading(recipe.preprocess, recipe.dicom)
    config, whole = recipe.objective.exported(
        prepared.model.config, whole, prepared.labels, reading
    )
    if config.classifier and config.classifier.pool == "map":  # transformers' takes the mean
        config = dataclasses.replace(config, classifier=None, preparation=config.trained)
    trained = set(tree.flatten(state["params"]))
    lora.export(recipe.lora, whole, trained, config, recipe.init, folder)
    return folder
