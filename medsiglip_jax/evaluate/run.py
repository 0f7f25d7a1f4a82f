"""The work of one evaluation: from images and prompts to files of scores."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from medsiglip_jax import __version__
from medsiglip_jax.embeddings.probe import features
from medsiglip_jax.evaluate import learned, retrieval, scores, vectors, zero_shot
from medsiglip_jax.evaluate.data import datasets
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.data.datasets import Parts
from medsiglip_jax.evaluate.learned import Sample
from medsiglip_jax.evaluate.options import AS_GIVEN, DEFAULT, Cell, Options
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.evaluate.vectors import Vectors
from medsiglip_jax.files import places
from medsiglip_jax.files.places import Given, Place
from medsiglip_jax.inference.embed import ERRORS, Progress
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.image import PRESETS

EMBEDDINGS, GRID, RESULTS = "embeddings", "grid", "results.json"
PART = "part"  # column of images.parquet, where parts were drawn from the images of the test


class Job:
    """What the steps of one evaluation share."""

    def __init__(self, task: Task, readings: list[str], parts: Parts, model: Model, folder: Place,
                 options: Options, embeddings: Given | None,
                 on_progress: Callable[[Progress], Any], on_fit: Callable[[], Any]):  # fmt: skip
        self.task, self.parts, self.model, self.folder = task, parts, model, folder
        self.options, self.embeddings = options, embeddings
        self.on_progress, self.on_fit = on_progress, on_fit
        read = {AS_GIVEN: task} | {name: task.with_reading(name) for name in task.readings}
        self.readings = {name: read[name] for name in readings}
        # First, for it takes no time and may fail.
        self.prompts = {name: self._prompts(read) for name, read in self.readings.items()}
        self.finished: list[Place] = []
        # Files of labels may hold images, too, and be large; every cell of a grid names them.
        self.labels = functools.cache(_labels)

    def run(self) -> None:
        """Writes the files; the scores of the run itself, or of pairs the images, last.

        What takes long or may fail comes before the first file of an earlier run is replaced.
        """
        cells = self._grid() if self.options.grid else {}
        embedded = self._vectors(self.options.preprocess or DEFAULT, self.parts.whole)
        preprocess = embedded.manifest["preprocess"]
        main = Cell(preprocess, self.options.reading, self.options.temperature)
        found = self._scores(main, embedded) if self.task.classes else None
        ranks = None
        if self.task.retrieval:
            asked = self.readings[self.options.reading]
            ranks = retrieval.compute(self.model, asked, self.parts.whole, embedded)
        parts = self._parts(preprocess, embedded)
        samples = {name: Sample(of.select(z.images), z.array) for name, (of, z) in parts.items()}
        meta = self._meta(main, self.parts.whole, embedded)
        meta |= {"cells": [cell.file for cell in cells], "retrieval": ranks is not None}
        meta["counts"] |= self._left_out(parts)
        if parts:
            digests = {name: datasets.labels_sha256(of) for name, (of, _) in parts.items()}
            meta["provenance"]["parts_sha256"] = digests
        meta["run"] = run = self._run(meta, embedded, samples)
        (self.folder / RESULTS).unlink(missing_ok=True)  # they are not of the files that follow
        for cell, of in cells.items():
            of = replace(of, meta={**of.meta, "run": run})
            scores.write(self.folder / GRID / cell.file, of)
        if ranks is not None:
            retrieval.write(self.folder / retrieval.FILE, ranks, run)
        if samples:
            validation = self._scores(main, parts["validation"][1], parts["validation"][0])
            meta["learned"] = self._learn(validation, samples, meta, embedded.manifest)
        if found is None:
            (self.folder / scores.FILE).unlink(missing_ok=True)
            self._write_images(embedded, meta)
            return
        self._write_images(embedded, {"run": run})
        scores.write(self.folder / scores.FILE, replace(found, meta=meta))

    def _run(
        self, meta: Mapping[str, Any], embedded: Vectors, samples: Mapping[str, Sample]
    ) -> str:
        """Identity of the run, which every file of it has."""
        names = [c.name for c in self.task.classes]
        of = learned.digest(samples, names, self._exclusive) if samples else ""
        draws = asdict(self.options.draws) if self.options.learn == "probe" else {}
        keys = ("task", "provenance", "counts", "cells", "retrieval")
        identity = [*(meta[key] for key in keys), embedded.images.tolist(), of, draws]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _grid(self) -> dict[Cell, Scores]:
        found = {}
        for preprocess, group in itertools.groupby(self._cells(), lambda cell: cell.preprocess):
            embedded = self._vectors(preprocess, self.parts.whole)
            found |= {cell: self._scores(cell, embedded) for cell in group}
        return found

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

    def _vectors(self, preprocess: str, found: Dataset, name: str = "") -> Vectors:
        """Embeddings of the images of the test, or of a part; all of its pool are computed."""
        folder = self._embedded(preprocess, found)
        embedded = vectors.read(folder, found)
        if self.embeddings is not None:
            wanted = features.wanted(self.model, self.options.preprocess, dicom=self.options.dicom)
            wanted.check(features.provenance(embedded.manifest), folder)
        lost = len(found) - len(embedded.images)
        if lost and not self.options.allow_missing:
            raise ValueError(
                f"{lost:,} of {len(found):,} {f'{name} ' if name else ''}images have no embedding; "
                f"{folder / ERRORS} lists those that could not be read. --allow-missing goes on "
                "without them"
            )
        return embedded

    def _embedded(self, preprocess: str, found: Dataset) -> Place:
        """Folder of the embeddings, which are computed unless they were given."""
        if self.embeddings is not None:
            return places.at(self.embeddings)
        folder = self.folder / EMBEDDINGS / "-".join(filter(None, (preprocess, found.part)))
        if folder not in self.finished:
            size, dicom = self.options.batch_size, self.options.dicom
            vectors.compute(self.model, found, folder, preprocess, size, dicom, self.on_progress)
            self.finished.append(folder)
        return folder

    def _write_images(self, embedded: Vectors, meta: Mapping[str, Any]) -> None:
        found = self.parts.whole.select(embedded.images)
        columns = {"id": found.ids, **found.attributes}  # of other names: `tasks.RESERVED`
        if self.parts.drawn:
            parts = {"test": self.parts.test, **self.parts.others}
            part_of = {name: part for part, of in parts.items() for name in of.ids}
            columns[PART] = [part_of.get(name, "") for name in found.ids]
        if not self.task.classes and found.groups is not None:
            columns["group"] = found.groups
        scores.write_columns(self.folder / scores.IMAGES, columns, meta)

    # ------------------------------------------------------------------------------------ scores

    def _scores(self, cell: Cell, embedded: Vectors, part: Dataset | None = None) -> Scores:
        """Of the images of the test, or of a part."""
        whole = part or self.parts.whole
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
            **self.labels(found),
            **asdict(self.options.policy),
            "versions": {**manifest["versions"], "medsiglip_jax": __version__, **versions},
        }

    # ---------------------------------------------------------------------------------- learning

    def _learn(
        self, validation: Scores, samples: Mapping[str, Sample], meta: Mapping[str, Any],
        manifest: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Writes what is learned; returns what has to be known to read it back."""
        how = self.parts.how
        validation = replace(validation, meta={**validation.meta, "run": meta["run"]})
        scores.write(self.folder / learned.VALIDATION, validation)
        if self.options.learn == "probe":
            of = {key: meta[key] for key in ("run", "provenance")}
            of |= {"how": how, "images": {name: len(s.found) for name, s in samples.items()}}
            made = features.provenance(manifest)
            learned.learn(
                self.folder, samples, validation.classes, self._exclusive, made,
                self.options.draws, of, self.on_fit,
            )  # fmt: skip
        facts = {"probe": self.options.learn == "probe", "prevalence": self.options.prevalence}
        return {"how": how, "drawn": self.parts.drawn, **facts}

    @property
    def _exclusive(self) -> bool:
        return self.task.kind == "multi_class"

    def _parts(self, preprocess: str, embedded: Vectors) -> dict[str, tuple[Dataset, Vectors]]:
        """Images of each part, and their embeddings; nothing where nothing is learned."""
        if not self.parts.others:
            return {}
        test = {"test": self.parts.test} if self.parts.drawn else {}
        others = {**self.parts.others, **test}
        parts = {name: (of, self._vectors(preprocess, of, name)) for name, of in others.items()}
        return {"test": (self.parts.whole, embedded), **parts}

    def _left_out(self, parts: Mapping[str, tuple[Dataset, Vectors]]) -> dict[str, int]:
        """What is not there of the other parts of the data set, of which some may be drawn."""
        found: dict[str, int] = {}
        for of, embedded in parts.values():
            if of.part:
                found |= {f"{what} ({of.part})": count for what, count in of.counts.items()}
                unreadable = f"unreadable ({of.part})"
                found[unreadable] = found.get(unreadable, 0) + len(of) - len(embedded.images)
        return found


def _labels(found: Dataset) -> dict[str, Any]:
    """Which labels, and the files that they were read from."""
    return {
        "labels_sha256": datasets.labels_sha256(found),
        "label_files": datasets.files_sha256(found),
    }
