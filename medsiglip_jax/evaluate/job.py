"""The work of one evaluation: from images and prompts to files of scores."""

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medsiglip_jax import __version__, features, places
from medsiglip_jax.api import Model
from medsiglip_jax.embed import ERRORS, Progress
from medsiglip_jax.evaluate import datasets, learned, retrieval, scores, vectors, zero_shot
from medsiglip_jax.evaluate.dataset import Dataset
from medsiglip_jax.evaluate.datasets import Parts
from medsiglip_jax.evaluate.learned import Sample
from medsiglip_jax.evaluate.options import AS_GIVEN, DEFAULT, Cell, Options
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.evaluate.vectors import Vectors
from medsiglip_jax.places import Given, Place
from medsiglip_jax.preprocess.image import PRESETS

IMAGES, EMBEDDINGS, GRID = "images.parquet", "embeddings", "grid"
PART = "part"  # column of images.parquet, where parts were drawn from the images of the test


@dataclass(frozen=True, eq=False)
class Data:
    """What a task is evaluated on.

    Attributes:
        test: all images that are scored by prompts.
        parts: to learn from, to choose on and to judge by, if anything is learned.
    """

    test: Dataset
    parts: Parts | None = None

    @property
    def drawn(self) -> bool:
        """Whether the parts are of the images of the test."""
        return self.parts is not None and list(self.parts.test.ids) != list(self.test.ids)

    @property
    def others(self) -> dict[str, Dataset]:
        """Parts beside the test."""
        named = {"train": self.parts and self.parts.train}
        named |= {"validation": self.parts and self.parts.validation}
        return {name: part for name, part in named.items() if part is not None}

    def images(self) -> int:
        """How many have to be embedded."""
        return len(self.test) + (0 if self.drawn else sum(map(len, self.others.values())))


class Job:
    """What the steps of one evaluation share."""

    def __init__(self, task: Task, readings: list[str], data: Data, model: Model, folder: Place,
                 options: Options, embeddings: Given | None,
                 on_progress: Callable[[Progress], Any], on_fit: Callable[[], Any]):  # fmt: skip
        self.task, self.data, self.model, self.folder = task, data, model, folder
        self.options, self.embeddings = options, embeddings
        self.on_progress, self.on_fit = on_progress, on_fit
        read = {AS_GIVEN: task} | {name: task.with_reading(name) for name in task.readings}
        self.readings = {name: read[name] for name in readings}
        # First, for it takes no time and may fail.
        self.prompts = {name: self._prompts(read) for name, read in self.readings.items()}
        self.unreadable: dict[str, int] = {}

    def run(self) -> None:
        """Writes the files; the scores of the run itself, or of pairs the images, last."""
        cells = list(self._cells()) if self.options.grid else []
        for preprocess, group in itertools.groupby(cells, lambda cell: cell.preprocess):
            embedded = self._vectors(preprocess, self.data.test)
            for cell in group:
                scores.write(self.folder / GRID / cell.file, self._scores(cell, embedded))
        embedded = self._vectors(self.options.preprocess or DEFAULT, self.data.test)
        preprocess = embedded.manifest["preprocess"]
        main = Cell(preprocess, self.options.reading, self.options.temperature)
        meta = self._meta(main, self.data.test, embedded)
        meta["cells"] = [cell.file for cell in cells]
        if self.task.retrieval:
            asked = self.readings[self.options.reading]
            ranks = retrieval.compute(self.model, asked, self.data.test, embedded)
            retrieval.write(self.folder / retrieval.FILE, ranks)
            meta["retrieval"] = True
        if self.data.parts is not None:
            meta["learned"] = self._learn(main, embedded, meta["provenance"])
            meta["counts"] = {**meta["counts"], **self._left_out()}
        if not self.task.classes:
            (self.folder / scores.FILE).unlink(missing_ok=True)
            self._write_images(embedded, meta)
            return
        self._write_images(embedded)
        found = replace(self._scores(main, embedded), meta=meta)
        scores.write(self.folder / scores.FILE, found)

    def _cells(self) -> Iterator[Cell]:
        softmax = self.task.score == "class_softmax"  # the others' ranks do not depend on it
        temperatures = zero_shot.TEMPERATURES if softmax else (self.options.temperature,)
        return itertools.starmap(Cell, itertools.product(PRESETS, self.readings, temperatures))

    def _prompts(self, task: Task) -> tuple[np.ndarray, np.ndarray | None] | None:
        if not task.classes:
            return None
        present = zero_shot.class_embeddings(self.model, [c.present for c in task.classes])
        if not zero_shot.rule(task.score).pairs:
            return present, None
        return present, zero_shot.class_embeddings(self.model, [c.absent for c in task.classes])

    def _vectors(self, preprocess: str, found: Dataset, part: str = "") -> Vectors:
        """Embeddings of the images of the test, or of a part."""
        if self.embeddings is None:
            folder = self.folder / EMBEDDINGS / "-".join(filter(None, (preprocess, part)))
            size = self.options.batch_size
            embedded = vectors.compute(
                self.model, found, folder, preprocess, size, self.on_progress
            )
        else:
            folder = places.at(self.embeddings)
            embedded = vectors.read(folder, found)
            made = features.provenance(embedded.manifest)
            features.wanted(self.model, self.options.preprocess).check(made, folder)
        lost = len(found) - len(embedded.images)
        if lost and not self.options.allow_missing:
            raise ValueError(
                f"{lost:,} of {len(found):,} {f'{part} ' if part else ''}images have no embedding; "
                f"{folder / ERRORS} lists those that could not be read. --allow-missing goes on "
                "without them"
            )
        self.unreadable[part] = lost
        return embedded

    def _write_images(self, embedded: Vectors, meta: Mapping[str, Any] | None = None) -> None:
        found = self.data.test.select(embedded.images)
        columns = {"id": found.ids, **found.attributes}
        if self.data.drawn and self.data.parts is not None:
            parts = {"test": self.data.parts.test, **self.data.others}
            part_of = {name: part for part, of in parts.items() for name in of.ids}
            columns[PART] = [part_of.get(name, "") for name in found.ids]
        if meta is not None and found.groups is not None:
            columns["group"] = found.groups
        scores.write_columns(self.folder / IMAGES, columns, meta)

    # ------------------------------------------------------------------------------------ scores

    def _scores(self, cell: Cell, embedded: Vectors, part: Dataset | None = None) -> Scores:
        """Of the images of the test, or of a part."""
        whole = part or self.data.test
        names, zclass = [c.name for c in self.task.classes], self.prompts[cell.reading]
        assert zclass is not None
        values = zero_shot.score(self.task.score, embedded.array, *zclass, self._factor(cell))
        found = whole.select(embedded.images)
        return learned.made(found, names, values, self._meta(cell, whole, embedded))

    def _factor(self, cell: Cell) -> float:
        softmax = "softmax" in self.task.score
        return zero_shot.factor(self.model, cell.temperature) if softmax else 1.0

    def _meta(self, cell: Cell, found: Dataset, embedded: Vectors) -> dict[str, Any]:
        lost = len(found) - len(embedded.images)
        return {
            "task": self.task.to_dict(),
            "cell": asdict(cell),
            "cells": [],
            "counts": {**found.counts, "unreadable": lost},
            "statistics": {"resamples": self.options.resamples, "seed": self.options.seed},
            "provenance": self._provenance(cell, found, embedded.manifest),
        }

    def _provenance(
        self, cell: Cell, found: Dataset, manifest: Mapping[str, Any]
    ) -> dict[str, Any]:
        run = ("model", "preprocess", "dicom", "dtype", "matmul_precision", "tokenizer_sha256")
        softmax = {"temperature": cell.temperature, "factor": self._factor(cell)}
        versions = {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}
        return {
            **{key: manifest.get(key) for key in run},
            "score": self.task.score,
            **(softmax if "softmax" in self.task.score else {}),
            "reading": cell.reading,
            "prompts_sha256": self.readings[cell.reading].prompts_sha256(),
            "labels_sha256": datasets.labels_sha256(found),
            "label_files": datasets.files_sha256(found),
            **asdict(self.options.policy),
            "versions": {**manifest["versions"], "medsiglip_jax": __version__, **versions},
        }

    # ---------------------------------------------------------------------------------- learning

    def _learn(
        self, main: Cell, embedded: Vectors, provenance: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Writes what is learned; returns what has to be known to read it back."""
        parts = self._parts(main.preprocess, embedded)
        samples = {
            name: Sample(found.select(of.images), of.array) for name, (found, of) in parts.items()
        }
        names = [c.name for c in self.task.classes]
        identity = [provenance, learned.digest(samples, names)]
        run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        validation, of = parts["validation"]
        found = self._scores(main, of, validation)
        found = replace(found, meta={**found.meta, "run": run})
        scores.write(self.folder / learned.VALIDATION, found)
        assert self.data.parts is not None
        how = self.data.parts.how
        if self.options.learn == "probe":
            meta = {"run": run, "how": how, "images": {k: len(s.found) for k, s in samples.items()}}
            made = features.provenance(embedded.manifest)
            exclusive = self.task.kind == "multi_class"
            learned.learn(
                self.folder, samples, names, exclusive, made, self.options.draws, meta, self.on_fit
            )
        facts = {"probe": self.options.learn == "probe", "prevalence": self.options.prevalence}
        return {"run": run, "how": how, "drawn": self.data.drawn, **facts}

    def _parts(self, preprocess: str, embedded: Vectors) -> dict[str, tuple[Dataset, Vectors]]:
        """Images of each part, and their embeddings."""
        assert self.data.parts is not None
        if not self.data.drawn:
            others = self.data.others
            of = {
                name: (part, self._vectors(preprocess, part, name)) for name, part in others.items()
            }
            return {**of, "test": (self.data.test, embedded)}
        names = np.array(self.data.test.ids, object)[embedded.images]
        parts = {**self.data.others, "test": self.data.parts.test}
        return {name: (part, _rows_of(part, embedded, names)) for name, part in parts.items()}

    def _left_out(self) -> dict[str, int]:
        """Images of the other parts that are not there."""
        if self.data.drawn:
            return {}
        missing = {name: part.counts.get("missing", 0) for name, part in self.data.others.items()}
        found = {f"missing ({name})": count for name, count in missing.items()}
        return found | {f"unreadable ({name})": self.unreadable[name] for name in missing}


def _rows_of(part: Dataset, embedded: Vectors, names: np.ndarray) -> Vectors:
    """The embeddings of a part of the images that were embedded, whose names these are."""
    row_of = {name: row for row, name in enumerate(names)}
    rows = np.array([row_of.get(name, -1) for name in part.ids])
    images = np.flatnonzero(rows >= 0)
    return Vectors(images, embedded.array[rows[images]], embedded.manifest)
