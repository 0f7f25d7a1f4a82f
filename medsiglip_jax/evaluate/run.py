"""One evaluation from data to report, in a folder from which a killed one goes on.

    DIR/embeddings/PRESET/   of `embed`, computed once
    DIR/images.parquet       id, sex, age, view and what else is known
    DIR/grid/*.parquet       scores of the variants, with `grid`
    DIR/scores.parquet       id, class, score, label, group
    DIR/report.html, DIR/report.md, and last DIR/results.json

Everything below the scores is computed from them, and can be again: `recompute`.
"""

import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medsiglip_jax import __version__, places, storage
from medsiglip_jax.api import Model
from medsiglip_jax.embed import ERRORS, Progress
from medsiglip_jax.evaluate import datasets, report, scores, vectors, zero_shot
from medsiglip_jax.evaluate.dataset import Dataset, Policy
from medsiglip_jax.evaluate.results import results
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.evaluate.vectors import Vectors
from medsiglip_jax.places import Given, Place
from medsiglip_jax.preprocess.image import PRESETS, preset

SCORES, IMAGES, RESULTS = "scores.parquet", "images.parquet", "results.json"
EMBEDDINGS, GRID = "embeddings", "grid"
AS_GIVEN, DEFAULT = "as given", "big_vision"


@dataclass(frozen=True)
class Options:
    """How a task is run.

    Attributes:
        preprocess: pixel preset; None is that of the given embeddings, or "big_vision".
        score: a rule of `zero_shot.RULES`; None is the task's own.
        reading: of the task's `readings`, or "as given".
        temperature: what softmax rules multiply cosines with: "logit_scale" or "none".
        policy: what labels that are neither 0 nor 1 mean.
        allow_missing: go on without images that are missing or unreadable.
        resamples: of bootstraps.
        seed: of bootstraps.
        batch_size: images per call of the encoder.
        grid: also every preset, reading of the prompts and, for softmax over classes, temperature.
    """

    preprocess: str | None = None
    score: str | None = None
    reading: str = AS_GIVEN
    temperature: str = "logit_scale"
    policy: Policy = Policy()
    allow_missing: bool = False
    resamples: int = 2000
    seed: int = 0
    batch_size: int = 8
    grid: bool = False

    def __post_init__(self):
        preset(self.preprocess or DEFAULT)
        if self.score is not None:
            zero_shot.rule(self.score)
        zero_shot.check_temperature(self.temperature)
        if self.resamples < 1:
            raise ValueError(f"resamples is {self.resamples}; expected at least 1")


@dataclass(frozen=True)
class Cell:
    """One variant: a preset, a reading of the prompts, a temperature of the softmax."""

    preprocess: str
    reading: str
    temperature: str

    @property
    def file(self) -> str:
        return "-".join(asdict(self).values()).replace(" ", "_") + ".parquet"


def evaluate(
    task: Task,
    model: Model | Callable[[], Model],
    data: Given,
    output: Given,
    options: Options = Options(),
    embeddings: Given | None = None,
    on_progress: Callable[[Progress], Any] = lambda progress: None,
    on_total: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Scores a model on a task, writes a report, and returns the content of results.json.

    Args:
        task: from `tasks.read`.
        model: with both towers and a tokenizer; or what loads it, called when the data is read.
        data: folder of the data set.
        output: folder of the report; the same call again reuses the embeddings in it.
        options: see `Options`.
        embeddings: of these images by this checkpoint, instead of new ones.
        on_progress: of `embed.embed`.
        on_total: called with the number of images that `on_progress` will hear of.

    Raises:
        FileNotFoundError: data is missing: what, how much, and where it is had.
        ValueError: prompts, tables or embeddings that do not fit.
    """
    task = replace(task, score=options.score or task.score)
    readings = _readings(task, options)
    if embeddings and options.grid:
        raise ValueError("a grid embeds with every preset; it cannot use given embeddings")
    task, found = datasets.read(task, data, options.policy, options.allow_missing)
    task.check_prompts()
    model = model if isinstance(model, Model) else model()
    if embeddings is None:
        on_total(len(found) * (len(PRESETS) + 1 if options.grid else 1))
    job = _Job(task, readings, found, model, places.at(output), options, embeddings, on_progress)
    job.run()
    return recompute(output)


def _readings(task: Task, options: Options) -> list[str]:
    """Names of the readings to score, that of the run itself among them."""
    if options.reading not in (there := [AS_GIVEN, *task.readings]):
        task.with_reading(options.reading)  # raises the error that lists them
    return there if options.grid else [options.reading]


def recompute(output: Given) -> dict[str, Any]:
    """Computes results and report again from the scores in a folder; no model is needed.

    Raises:
        FileNotFoundError: there are no scores.
    """
    folder = places.at(output)
    found = scores.read(folder / SCORES)
    attributes = scores.read_columns(folder / IMAGES)
    ids = attributes.pop("id")
    if ids != list(found.ids):
        raise ValueError(f"{folder}: {IMAGES} and {SCORES} are of different images; evaluate again")
    cells = [scores.read(folder / GRID / name) for name in found.meta["cells"]]
    content = results(found, attributes, cells)
    texts = {
        "report.md": report.markdown(content),
        "report.html": report.page(content, found),
        RESULTS: json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        with storage.new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return content


class _Job:
    """What the steps of one evaluation share."""

    def __init__(self, task: Task, readings: list[str], found: Dataset, model: Model,
                 folder: Place, options: Options, embeddings: Given | None,
                 on_progress: Callable[[Progress], Any]):  # fmt: skip
        self.task, self.found, self.model, self.folder = task, found, model, folder
        self.options, self.embeddings, self.on_progress = options, embeddings, on_progress
        read = {AS_GIVEN: task} | {name: task.with_reading(name) for name in task.readings}
        self.readings = {name: read[name] for name in readings}
        # First, for it takes no time and may fail.
        self.prompts = {name: self._prompts(read) for name, read in self.readings.items()}

    def run(self) -> None:
        """Writes the scores; those of the run itself last."""
        (self.folder / RESULTS).unlink(missing_ok=True)
        cells = list(self._cells()) if self.options.grid else []
        for preprocess, group in itertools.groupby(cells, lambda cell: cell.preprocess):
            embedded = self._vectors(preprocess)
            for cell in group:
                scores.write(self.folder / GRID / cell.file, self._scores(cell, embedded))
        embedded = self._vectors(self.options.preprocess or DEFAULT)
        preprocess = embedded.manifest["preprocess"]
        main = Cell(preprocess, self.options.reading, self.options.temperature)
        found = self._scores(main, embedded)
        attributes = self.found.select(embedded.images).attributes
        scores.write_columns(self.folder / IMAGES, {"id": found.ids, **attributes})
        meta = {**found.meta, "cells": [cell.file for cell in cells]}
        scores.write(self.folder / SCORES, replace(found, meta=meta))

    def _cells(self) -> Iterator[Cell]:
        softmax = self.task.score == "class_softmax"  # the others' ranks do not depend on it
        temperatures = zero_shot.TEMPERATURES if softmax else (self.options.temperature,)
        return itertools.starmap(Cell, itertools.product(PRESETS, self.readings, temperatures))

    def _prompts(self, task: Task) -> tuple[np.ndarray, np.ndarray | None]:
        present = zero_shot.class_embeddings(self.model, [c.present for c in task.classes])
        if not zero_shot.rule(task.score).pairs:
            return present, None
        return present, zero_shot.class_embeddings(self.model, [c.absent for c in task.classes])

    def _vectors(self, preprocess: str) -> Vectors:
        if self.embeddings is None:
            folder = self.folder / EMBEDDINGS / preprocess
            size = self.options.batch_size
            embedded = vectors.compute(
                self.model, self.found, folder, preprocess, size, self.on_progress
            )
        else:
            folder = places.at(self.embeddings)
            embedded = vectors.read(folder, self.found)
            vectors.check(embedded.manifest, self.model, self.options.preprocess, folder)
        lost = len(self.found) - len(embedded.images)
        if lost and not self.options.allow_missing:
            raise ValueError(
                f"{lost:,} of {len(self.found):,} images have no embedding; {folder / ERRORS} "
                "lists those that could not be read. --allow-missing goes on without them"
            )
        return embedded

    def _scores(self, cell: Cell, embedded: Vectors) -> Scores:
        found, factor = self.found.select(embedded.images), 1.0
        if "softmax" in self.task.score:
            factor = zero_shot.factor(self.model, cell.temperature)
        zclass = self.prompts[cell.reading]
        return Scores(
            found.ids,
            [c.name for c in self.task.classes],
            zero_shot.score(self.task.score, embedded.array, *zclass, factor),
            found.labels,
            found.groups,
            {
                "task": self.task.to_dict(),
                "cell": asdict(cell),
                "cells": [],
                "counts": {**found.counts, "unreadable": len(self.found) - len(found)},
                "statistics": {"resamples": self.options.resamples, "seed": self.options.seed},
                "provenance": self._provenance(cell, embedded.manifest, factor),
            },
        )

    def _provenance(self, cell: Cell, manifest: Mapping[str, Any], factor: float) -> dict[str, Any]:
        run = ("model", "preprocess", "dtype", "matmul_precision", "tokenizer_sha256")
        softmax = {"temperature": cell.temperature, "factor": factor}
        versions = {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}
        return {
            **{key: manifest.get(key) for key in run},
            "score": self.task.score,
            **(softmax if "softmax" in self.task.score else {}),
            "reading": cell.reading,
            "prompts_sha256": self.readings[cell.reading].prompts_sha256(),
            "labels_sha256": datasets.labels_sha256(self.found),
            "label_files": datasets.files_sha256(self.found),
            **asdict(self.options.policy),
            "versions": {**manifest["versions"], "medsiglip_jax": __version__, **versions},
        }
