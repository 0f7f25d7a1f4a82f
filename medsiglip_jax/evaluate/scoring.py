"""The steps of one evaluation: embeddings of images and prompts, scores, and their files."""

import functools
import hashlib
import importlib.metadata
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from medsiglip_jax import __version__
from medsiglip_jax.data import expansion
from medsiglip_jax.data.rows import Rows, from_tuples
from medsiglip_jax.embeddings import provenance
from medsiglip_jax.evaluate import (
    image_embeddings,
    learned,
    localization,
    near_copies,
    retrieval,
    scores,
    tasks,
    zero_shot,
)
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.data.leaks import Leak, refuse
from medsiglip_jax.evaluate.data.splits import Splits
from medsiglip_jax.evaluate.image_embeddings import ImageEmbeddings
from medsiglip_jax.evaluate.learned import LabelledSplits
from medsiglip_jax.evaluate.options import AS_GIVEN, EvaluateOptions, GridCell
from medsiglip_jax.evaluate.recompute import RESULTS
from medsiglip_jax.evaluate.zero_shot import ClassPrompts
from medsiglip_jax.files import places
from medsiglip_jax.files.json_text import to_hash
from medsiglip_jax.inference import classifier
from medsiglip_jax.inference.embed import EmbedOptions, EmbedProgress, embed
from medsiglip_jax.inference.manifest import ERRORS
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.image import PRESETS
from medsiglip_jax.preprocess.load import warn_about_pixels
from medsiglip_jax.trust.maps.targets import of_classifier

EMBEDDINGS = "embeddings"  # folder of the evaluation
_SHARD = 512  # images per file: a killed run loses at most this many


def label_columns(name: str, labels: Sequence[str]) -> list[int]:
    """The labels that a class may be: that of its name, or those which differ from it in capitals
    and underscores, as data sets do."""
    if name in labels:
        return [labels.index(name)]
    alike = lambda text: text.casefold().replace("_", " ").strip()  # noqa: E731
    return [i for i, label in enumerate(labels) if alike(label) == alike(name)]


@dataclass(frozen=True, eq=False)
class _Computed:
    """What a run has computed before it replaces files of an earlier one.

    Attributes:
        main: the variant that is reported.
        embedded: the test images.
        cells: the scores of the variants of a grid.
        scored: the scores of the run; None for pairs.
        ranks: of retrieval, if the task has texts.
        learnable: the splits, if anything is learned.
        meta: what is written with the scores.
    """

    main: GridCell
    embedded: ImageEmbeddings
    cells: Mapping[GridCell, scores.Scores]
    scored: scores.Scores | None
    ranks: pa.Table | None
    learnable: LabelledSplits
    meta: dict[str, Any]


class EvaluationRun:
    """From images and prompts to files of scores: what the steps of one evaluation share."""

    def __init__(self, task: tasks.Task, splits: Splits, model: Model, folder: places.Place,
                 options: EvaluateOptions, embeddings: places.Given | None,
                 on_progress: Callable[[EmbedProgress], Any],
                 on_fit: Callable[[], Any]):  # fmt: skip
        self.task, self.splits, self.model, self.folder = task, splits, model, folder
        self.classifier = model.config.classifier
        # Of embeddings: a classifier may read other features than `encode_image` gives.
        self.encoder = model.features if self.classifier else model
        self.prepared = model.config.prepared(options.preprocess, options.dicom, options.asked)
        self.asked_rules = options.dicom
        options = replace(options, dicom=self.prepared.dicom)
        self.options, self.embeddings = options, embeddings
        self.on_progress, self.on_fit = on_progress, on_fit
        names = [AS_GIVEN, *task.readings] if options.grid else [options.reading]
        self.readings = {n: task if n == AS_GIVEN else task.with_reading(n) for n in names}
        # Before the images, because it takes no time and may fail.
        self.prompts = {name: self._prompts(task) for name, task in self.readings.items()}
        self.embedded: list[places.Place] = []  # folders that this run has finished
        # Files of labels may hold images, too, and be large; every cell of a grid names them.
        self.labels = functools.cache(_labels)

    def write(
        self,
        plan: localization.MapPlan | None,
        on_maps: Callable[[int, int], Any],
        on_map: Callable[[int], Any],
    ) -> None:
        """Writes the files; the scores of the run itself, or the images of pairs, last.

        Whatever takes long or may fail comes before the first file of an earlier run is replaced.

        Args:
            plan: which maps are made, if any.
            on_maps, on_map: see `localization.compute`.

        Raises:
            ValueError: images have no embedding, parts share images, or embeddings do not fit.
        """
        computed = self._computed()
        maps, meta = None, computed.meta
        if plan is not None:
            inputs = self._map_inputs(computed.main, meta)
            maps = localization.compute(plan, inputs, self.folder, on_maps, on_map)
        meta["localization"] = plan and {**asdict(plan.facts), "images": plan.dataset.ids}
        self._complete(computed)
        (self.folder / RESULTS).unlink(missing_ok=True)  # it does not belong to what follows
        if maps is not None and plan is not None:
            facts = replace(plan.facts, run=meta["run"])
            localization.write(self.folder / localization.FILE, maps, facts)
        self._replace_files(computed)

    def _computed(self) -> _Computed:
        """Embeddings, scores and ranks, and what is recorded of them."""
        options = self.options
        cells = self._grid() if options.grid else {}
        embedded = self._embeddings(self.prepared.preprocess, self.splits.whole)
        main = GridCell(embedded.manifest.preprocess, options.reading, options.temperature)
        scored = self._scores(main, embedded) if self.task.classes else None
        ranks = None
        if self.task.retrieval:
            ranks = retrieval.compute(self.model, self.readings[options.reading], embedded)
        splits = self._embedded_splits(embedded)
        leaks = self._leaks(splits or {"test": embedded})
        learnable = LabelledSplits(splits, [c.name for c in self.task.classes], self.task.exclusive)
        meta = self._meta(main, embedded)
        meta |= {"cells": [cell.file for cell in cells], "retrieval": ranks is not None}
        meta["leaks"] = [leak.to_dict() for leak in leaks]
        meta["task"]["notes"] += (*self._notes(), *map(_sentence, leaks))
        meta["counts"] |= _left_out(splits)
        return _Computed(main, embedded, cells, scored, ranks, learnable, meta)

    def _complete(self, computed: _Computed) -> None:
        """Records the labels of the other parts, and the run that all files will name."""
        meta, learnable = computed.meta, computed.learnable
        splits = learnable.images
        if splits:
            digests = {name: images.whole.labels_sha256() for name, images in splits.items()}
            meta["provenance"]["parts_sha256"] = digests
        digest = learnable.digest() if splits else ""
        meta["run"] = self._identity(meta, computed.embedded.images.tolist(), digest)

    def _replace_files(self, computed: _Computed) -> None:
        """Writes what was computed; the scores, by which a reader knows the run, last."""
        meta, run = computed.meta, computed.meta["run"]
        for cell, of_cell in computed.cells.items():
            of_cell = replace(of_cell, meta={**of_cell.meta, "run": run})
            scores.write(self.folder / scores.GRID / cell.file, of_cell)
        if computed.ranks is not None:
            retrieval.write(self.folder / retrieval.FILE, computed.ranks, run)
        if computed.learnable.images:
            meta["learned"] = self._learn(computed.main, computed.learnable, meta)
        if computed.scored is None:
            (self.folder / scores.FILE).unlink(missing_ok=True)
            self._write_images(computed.embedded, meta)
            return
        self._write_images(computed.embedded, {"run": run})
        scores.write(self.folder / scores.FILE, replace(computed.scored, meta=meta))

    def _identity(self, meta: Mapping[str, Any], images: list[int], digest: str) -> str:
        """Identity of the run, which all of its files name; `digest` is of what is learned."""
        draws = asdict(self.options.draws) if self.options.learn == "probe" else {}
        keys = ("task", "provenance", "counts", "cells", "retrieval", "leaks", "localization")
        identity = [*(meta[key] for key in keys), images, digest, draws]
        return hashlib.sha256(to_hash(identity, sort_keys=True)).hexdigest()

    def _grid(self) -> dict[GridCell, scores.Scores]:
        grid = {}
        for preprocess, cells in itertools.groupby(self._cells(), lambda cell: cell.preprocess):
            embedded = self._embeddings(preprocess, self.splits.whole)
            grid |= {cell: self._scores(cell, embedded) for cell in cells}
        return grid

    def _cells(self) -> Iterator[GridCell]:
        softmax = self.task.score == "class_softmax"  # ranks of other rules do not depend on it
        temperatures = zero_shot.TEMPERATURES if softmax else (self.options.temperature,)
        return itertools.starmap(GridCell, itertools.product(PRESETS, self.readings, temperatures))

    def _prompts(self, task: tasks.Task) -> tuple[ClassPrompts, ClassPrompts | None] | None:
        """The present prompts and, if the rule needs them, the absent ones."""
        if not task.classes or self.classifier:
            return None
        over = self.options.over_prompts
        present = zero_shot.class_prompts(self.model, [c.present for c in task.classes], over)
        if not zero_shot.rule(task.score).pairs:
            return present, None
        absent = [c.absent for c in task.classes]
        return present, zero_shot.class_prompts(self.model, absent, over)

    # -------------------------------------------------------------------------------- embeddings

    def _embeddings(self, preprocess: str, dataset: Dataset, name: str = "") -> ImageEmbeddings:
        """Embeddings of the test images, or of a named split."""
        folder = self._embed(preprocess, dataset)
        embedded = image_embeddings.read(folder, dataset)
        if self.embeddings is not None:
            options = self.options
            raw = False if self.classifier else None
            wanted = provenance.of_model(self.encoder, options.preprocess, raw, options.dicom)
            wanted.check(provenance.of_run(embedded.manifest), folder)
        if embedded.lost and not self.options.allow_missing:
            listed = folder / ERRORS
            where = f"; {listed} lists those that could not be read" if listed.is_file() else ""
            raise ValueError(
                f"{embedded.lost:,} of {len(dataset):,} {f'{name} ' if name else ''}images have no "
                f"embedding{where}. --allow-missing goes on without them"
            )
        return embedded

    def _embed(self, preprocess: str, dataset: Dataset) -> places.Place:
        """The folder of the embeddings of the whole pool, computed unless they were given."""
        if self.embeddings is not None:
            return places.at(self.embeddings)
        folder = self.folder / EMBEDDINGS / "-".join(filter(None, (preprocess, dataset.part)))
        if folder not in self.embedded:
            size, dicom = self.options.batch_size, self.options.dicom
            expansion.warn_of_unused(self.asked_rules, dataset.pool.values())
            pool = ((id, source, "image", None) for id, source in dataset.pool.items())
            options = EmbedOptions(
                preprocess, self.classifier is None, shard_size=_SHARD, batch_size=size, dicom=dicom
            )
            rows = Rows(from_tuples(pool))
            result = embed(self.encoder, rows, folder, options, self.on_progress)
            warn_about_pixels(0, 0, result.unusual, result.dark, len(rows))
            self.embedded.append(folder)
        return folder

    def _embedded_splits(self, embedded: ImageEmbeddings) -> dict[str, ImageEmbeddings]:
        """The splits and their embeddings; empty where nothing is learned."""
        if not self.splits.others:
            return {}
        drawn = {"test": self.splits.test} if self.splits.drawn else {}
        preprocess, others = embedded.manifest.preprocess, {**self.splits.others, **drawn}
        of_others = {n: self._embeddings(preprocess, split, n) for n, split in others.items()}
        return {"test": embedded, **of_others}

    def _notes(self) -> list[str]:
        """What reading the data said, once, whichever parts it was said of."""
        read = self.splits.whole, *self.splits.others.values()
        return list(dict.fromkeys(note for split in read for note in split.notes))

    def _leaks(self, splits: Mapping[str, ImageEmbeddings]) -> list[Leak]:
        """What the parts share, all of it allowed; copies within the test, said of them."""
        copies = near_copies.find(splits)
        refuse(copies, self.options.allow_leaks)
        leaks = [*self.splits.leaks, *copies]
        for leak in leaks:
            warnings.warn(str(leak), stacklevel=2)
        return leaks

    def _write_images(self, embedded: ImageEmbeddings, meta: Mapping[str, Any]) -> None:
        images = embedded.dataset
        columns = {"id": images.ids, **images.attributes}  # of other names: `layout.RESERVED`
        if self.splits.drawn:
            splits = {"test": self.splits.test, **self.splits.others}
            split_of = {id: name for name, split in splits.items() for id in split.ids}
            columns[scores.PART] = [split_of.get(id, "") for id in images.ids]
        if not self.task.classes and images.groups is not None:
            columns["group"] = images.groups
        scores.write_columns(self.folder / scores.IMAGES, columns, meta)

    # ------------------------------------------------------------------------------------ scores

    def _scores(self, cell: GridCell, embedded: ImageEmbeddings) -> scores.Scores:
        classes, prompts = [c.name for c in self.task.classes], self.prompts[cell.reading]
        if self.classifier:
            _, shares, _ = classifier.scores(self.model, embedded.vectors)
            values = shares[:, [label_columns(name, self.classifier.labels)[0] for name in classes]]
        else:
            assert prompts is not None
            factor = self._factor(cell)
            values = zero_shot.score(self.task.score, embedded.vectors, *prompts, factor)
        scored = learned.scores_of(embedded.dataset, classes, values, self._meta(cell, embedded))
        return replace(scored, log_odds=zero_shot.rule(self.task.score).log_odds)

    def _map_inputs(self, cell: GridCell, meta: Mapping[str, Any]) -> localization.MapInputs:
        """Maps are made of what the scores of the cell rank images by."""
        if self.classifier:
            names = [c.name for c in self.task.classes]
            own = [label_columns(name, self.classifier.labels)[0] for name in names]
            labels = [self.classifier.labels[column] for column in own]
            targets = {n: of_classifier(self.model, x) for n, x in zip(names, labels, strict=True)}
        else:
            prompts = self.prompts[cell.reading]
            assert prompts is not None
            factor = self._factor(cell)
            targets = localization.targets_of_prompts(self.model, self.task, *prompts, factor)
        return localization.MapInputs(
            targets, cell.preprocess, self.options.dicom, meta["provenance"]
        )

    def _factor(self, cell: GridCell) -> float:
        softmax = "softmax" in self.task.score
        return zero_shot.factor(self.model, cell.temperature) if softmax else 1.0

    def _meta(self, cell: GridCell, embedded: ImageEmbeddings) -> dict[str, Any]:
        """What is written with scores: how they were made."""
        return {
            "task": self.task.to_dict(),
            "cell": asdict(cell),
            "cells": [],
            "counts": {**embedded.whole.counts, "unreadable": embedded.lost},
            "statistics": {"resamples": self.options.resamples, "seed": self.options.seed},
            "unit": self.options.unit and asdict(self.options.unit),
            "provenance": self._provenance(cell, embedded),
        }

    def _provenance(self, cell: GridCell, embedded: ImageEmbeddings) -> dict[str, Any]:
        recorded = embedded.manifest.to_dict()
        run = (
            "model", "preprocess", "pixels", "dicom", "dtype", "matmul_precision",
            "tokenizer_sha256",
        )  # fmt: skip
        softmax = {"temperature": cell.temperature, "factor": self._factor(cell)}
        versions = {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}
        return {
            **{key: recorded[key] for key in run},
            "score": self.task.score,
            **(softmax if "softmax" in self.task.score else {}),
            "reading": cell.reading,
            "over_prompts": self.options.over_prompts,
            "prompts_sha256": self.readings[cell.reading].prompts_sha256(),
            **self.labels(embedded.whole),
            **asdict(self.options.policy_of("test")),
            **self._part_labels(),
            "versions": {**embedded.manifest.versions, "medsiglip_jax": __version__, **versions},
        }

    def _part_labels(self) -> dict[str, Any]:
        """What labels mean in the parts that the others were read from, if it differs."""
        parts = {split.part for split in self.splits.others.values()} - {""}
        policies = {part: asdict(self.options.policy_of(part)) for part in sorted(parts)}
        test = asdict(self.options.policy_of("test"))
        differ = any(policy != test for policy in policies.values())
        return {"labels_of_parts": policies} if differ else {}

    def _learn(self, main: GridCell, parts: LabelledSplits, meta: dict[str, Any]) -> dict[str, Any]:
        """Writes what is learned; returns what `learned.read` needs to read it back."""
        origin, probe = self.splits.origin, self.options.learn == "probe"
        validation = self._scores(main, parts.images["validation"])
        validation = replace(validation, meta={**validation.meta, "run": meta["run"]})
        scores.write(self.folder / learned.VALIDATION, validation)
        if probe:
            images = {name: len(split.images) for name, split in parts.images.items()}
            of_run = {key: meta[key] for key in ("run", "provenance", "task", "unit")}
            of_run |= {"how": origin, "images": images}
            learned.learn(self.folder, parts, self.options.draws, of_run, self.on_fit)
        facts = {"probe": probe, "prevalence": self.options.prevalence}
        return {"how": origin, "drawn": self.splits.drawn, **facts}


def _left_out(splits: Mapping[str, ImageEmbeddings]) -> dict[str, int]:
    """How many images of the other parts of the data set were left out, by reason and part."""
    counts: dict[str, int] = {}
    for embedded in splits.values():
        if part := embedded.whole.part:
            counts |= {f"{reason} ({part})": n for reason, n in embedded.whole.counts.items()}
            unreadable = f"unreadable ({part})"  # two splits may be drawn from one part
            counts[unreadable] = counts.get(unreadable, 0) + embedded.lost
    return counts


def _sentence(leak: Leak) -> str:
    """What the report says of a leak."""
    return f"{leak.note[0].upper()}{leak.note[1:]}."


def _labels(dataset: Dataset) -> dict[str, Any]:
    """Which labels, and the files that they were read from."""
    return {"labels_sha256": dataset.labels_sha256(), "label_files": dataset.files_sha256()}
