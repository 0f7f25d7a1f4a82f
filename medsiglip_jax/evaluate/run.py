"""One evaluation from data to report, in a folder in which a killed run resumes.

    DIR/embeddings/PRESET/   of `embed`, computed once; PRESET-train and PRESET-validation of other
                             parts, always whole, because draws and labels choose among their images
    DIR/images.parquet       id, sex, age, view and what else is known
    DIR/grid/*.parquet       scores of the variants, with `grid`
    DIR/retrieval.parquet    ranks of texts and images, of tasks with texts
    DIR/localization.parquet whether maps lie where the finding is; `localization` has its files
    DIR/scores.parquet       id, class, score, label, group
    DIR/report.html, DIR/report.md, and last DIR/results.json

`learned` lists the files of what is learned from labels. Every file names the run that it belongs
to, so that the files of a killed run are never mixed with those of the run before it. Everything
below the scores is computed from files: `recompute` does it again without the model.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from medsiglip_jax import __version__
from medsiglip_jax.data import expansion
from medsiglip_jax.data.rows import Rows, from_tuples
from medsiglip_jax.embeddings import provenance
from medsiglip_jax.evaluate import (
    aggregation,
    image_embeddings,
    learned,
    localization,
    near_copies,
    retrieval,
    scores,
    tasks,
    zero_shot,
)
from medsiglip_jax.evaluate.data import digits
from medsiglip_jax.evaluate.data import splits as data_splits
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.data.leaks import Leak, refuse
from medsiglip_jax.evaluate.data.splits import Splits
from medsiglip_jax.evaluate.image_embeddings import ImageEmbeddings
from medsiglip_jax.evaluate.learned import LabelledSplits
from medsiglip_jax.evaluate.options import AS_GIVEN, LEARN, EvaluateOptions, GridCell
from medsiglip_jax.evaluate.recompute import RESULTS, recompute
from medsiglip_jax.evaluate.zero_shot import ClassPrompts
from medsiglip_jax.files import places
from medsiglip_jax.files.json_text import to_hash
from medsiglip_jax.inference import classifier, run_folder
from medsiglip_jax.inference.embed import EmbedOptions, EmbedProgress, embed
from medsiglip_jax.inference.manifest import ERRORS
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import ClassifierConfig
from medsiglip_jax.preprocess.image import PRESETS
from medsiglip_jax.preprocess.load import warn_about_pixels
from medsiglip_jax.trust.maps.targets import of_classifier

EMBEDDINGS = "embeddings"
# What an evaluation that was begun has in its folder.
_OWN = (EMBEDDINGS, scores.GRID, scores.FILE, scores.IMAGES, RESULTS, *digits.FOLDERS)
_SHARD = 512  # images per file: a killed run loses at most this many


def evaluate(
    task: tasks.Task,
    model: Model | Callable[[], Model],
    data: places.Given,
    output: places.Given,
    options: EvaluateOptions = EvaluateOptions(),
    embeddings: places.Given | None = None,
    on_progress: Callable[[EmbedProgress], Any] = lambda progress: None,
    on_total: Callable[[int], Any] = int,
    on_fit: Callable[[], Any] = int,
    on_maps: Callable[[int, int], Any] = lambda maps, images: None,
    on_map: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Scores a model on a task, writes a report, and returns the content of results.json.

    Args:
        task: see `tasks.read`.
        model: with both towers and a tokenizer; or a function that loads it, called when the data
            has been read.
        data: folder of the data set.
        output: folder of the report; the same call again reuses the embeddings in it.
        options: see `EvaluateOptions`.
        embeddings: of these images by this checkpoint, instead of new ones.
        on_progress: see `embed.embed`.
        on_total: called with the number of images that `on_progress` will count.
        on_fit: called after each fit of what is learned.
        on_maps, on_map: see `localization.compute`.

    Raises:
        FileExistsError: `output` holds something else than an evaluation.
        FileNotFoundError: data is missing: which, how much, and where to get it.
        ValueError: prompts, tables or embeddings that do not fit.
    """
    folder = places.at(output)
    check_folder(folder)
    task = replace(task.by(options.by), score=options.score or task.score)
    if options.reading != AS_GIVEN:
        task.with_reading(options.reading)  # fail now if there is none
    if embeddings and options.grid:
        raise ValueError("a grid embeds with every preset; it cannot use given embeddings")
    if task.kind == "pairs" and (options.learn or options.grid):
        raise ValueError(f"task {task.name} is of pairs without classes: no --learn, no --grid")
    task, splits = data_splits.read(
        task, data, options.policy, options.allow_missing, options.seed, LEARN[options.learn],
        options.prefer, options.allow_leaks, options.part_policies,
    )  # fmt: skip
    if lacking := [name for name in options.by if name not in splits.whole.attributes]:
        raise ValueError(f"{data}: no table of {task.title} has a column {', '.join(lacking)}")
    if options.unit:
        whole, learning = splits.whole, bool(options.learn)
        aggregation.check(options.unit, task, whole.groups, whole.attributes, learning)
    plan = localization.plan_maps(task, splits.whole, options)
    model = model if isinstance(model, Model) else model()
    if model.config.classifier:
        task = _by_classifier(task, model.config.classifier, options)
    elif task.score == zero_shot.CLASSIFIER:
        raise ValueError(f"--score {task.score} is of models with a classifier; this one has none")
    task.check_prompts()
    if embeddings is None:
        presets = len(PRESETS) - 1 if options.grid else 0  # beside the run's own
        on_total(splits.images() + presets * len(splits.whole.pool))
    run = EvaluationRun(task, splits, model, folder, options, embeddings, on_progress, on_fit)
    run.write(plan, on_maps, on_map)
    return recompute(folder, export=options.export)


def check_folder(folder: places.Place) -> None:
    """Raises FileExistsError if a folder holds anything, and no evaluation that began there."""
    names = places.visible(folder) if folder.is_dir() else set()
    if names and names.isdisjoint(_OWN):
        raise FileExistsError(f"{folder}: not empty, and not an evaluation; choose a new folder")


def _by_classifier(task: tasks.Task, own: ClassifierConfig, options: EvaluateOptions) -> tasks.Task:
    """The task scored by a model's own labels, which must be its classes."""
    asked = {
        "--score": options.score not in (None, zero_shot.CLASSIFIER),
        "--grid": options.grid,
        "--reading": options.reading != AS_GIVEN,
        "--temperature": options.temperature != zero_shot.TEMPERATURES[0],
        "--over-prompts": options.over_prompts != zero_shot.OVER_PROMPTS[0],
        "--learn probe": options.learn == "probe",
    }
    if unfit := ", ".join(name for name, given in asked.items() if given):
        raise ValueError(
            f"the model is a classifier, whose labels are scored without prompts: {unfit} cannot "
            "apply (--learn thresholds can)"
        )
    lacking = [c.name for c in task.classes if len(_columns(c.name, own.labels)) != 1]
    if lacking or not task.classes:
        raise ValueError(
            f"the model is a classifier of {', '.join(own.labels)}, and task {task.name} "
            f"asks for {', '.join(lacking) or 'pairs of images and texts'}"
        )
    return replace(task, score=zero_shot.CLASSIFIER)


def _columns(name: str, labels: Sequence[str]) -> list[int]:
    """The labels that a class may be: that of its name, or those which differ from it in capitals
    and underscores, as data sets do."""
    if name in labels:
        return [labels.index(name)]
    alike = lambda text: text.casefold().replace("_", " ").strip()  # noqa: E731
    return [i for i, label in enumerate(labels) if alike(label) == alike(name)]


def recorded_dtype(output: places.Given, embeddings: places.Given | None = None) -> str | None:
    """The dtype of the embeddings that an evaluation is given, or has begun; None if there are
    none."""
    if embeddings is not None:
        return run_folder.recorded_dtype(places.at(embeddings))
    folder = places.at(output) / EMBEDDINGS
    begun = sorted(folder.iterdir(), key=str) if folder.is_dir() else []
    return next(filter(None, map(run_folder.recorded_dtype, begun)), None)


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
        """
        options = self.options
        cells = self._grid() if options.grid else {}
        embedded = self._embeddings(self.prepared.preprocess, self.splits.whole)
        main = GridCell(embedded.manifest.preprocess, options.reading, options.temperature)
        zero_shot = self._scores(main, embedded) if self.task.classes else None
        ranks = None
        if self.task.retrieval:
            ranks = retrieval.compute(self.model, self.readings[options.reading], embedded)
        splits = self._embedded_splits(embedded)
        leaks = self._leaks(splits or {"test": embedded})
        learnable = LabelledSplits(splits, [c.name for c in self.task.classes], self.task.exclusive)
        meta = self._meta(main, embedded)
        meta |= {"cells": [cell.file for cell in cells], "retrieval": ranks is not None}
        meta["leaks"] = [leak.to_dict() for leak in leaks]
        maps = None
        if plan is not None:
            maps = localization.compute(
                plan, self._map_inputs(main, meta), self.folder, on_maps, on_map
            )
        meta["localization"] = plan and {**asdict(plan.facts), "images": plan.dataset.ids}
        meta["task"]["notes"] += (*self._said(), *map(_sentence, leaks))
        meta["counts"] |= _left_out(splits)
        if splits:
            digests = {name: images.whole.labels_sha256() for name, images in splits.items()}
            meta["provenance"]["parts_sha256"] = digests
        digest = learnable.digest() if splits else ""
        meta["run"] = run = self._identity(meta, embedded.images.tolist(), digest)
        (self.folder / RESULTS).unlink(missing_ok=True)  # it does not belong to what follows
        for cell, of_cell in cells.items():
            of_cell = replace(of_cell, meta={**of_cell.meta, "run": run})
            scores.write(self.folder / scores.GRID / cell.file, of_cell)
        if ranks is not None:
            retrieval.write(self.folder / retrieval.FILE, ranks, run)
        if maps is not None and plan is not None:
            facts = replace(plan.facts, run=run)
            localization.write(self.folder / localization.FILE, maps, facts)
        if splits:
            meta["learned"] = self._learn(main, learnable, meta)
        if zero_shot is None:
            (self.folder / scores.FILE).unlink(missing_ok=True)
            self._write_images(embedded, meta)
            return
        self._write_images(embedded, {"run": run})
        scores.write(self.folder / scores.FILE, replace(zero_shot, meta=meta))

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
            found = embed(self.encoder, rows, folder, options, self.on_progress)
            warn_about_pixels(0, 0, found.unusual, found.dark, len(rows))
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

    def _said(self) -> list[str]:
        """What reading the data said, once, whichever parts it was said of."""
        read = self.splits.whole, *self.splits.others.values()
        return list(dict.fromkeys(note for split in read for note in split.notes))

    def _leaks(self, splits: Mapping[str, ImageEmbeddings]) -> list[Leak]:
        """What the parts share, all of it allowed; copies within the test, said of them."""
        found = near_copies.find(splits)
        refuse(found, self.options.allow_leaks)
        leaks = [*self.splits.leaks, *found]
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
            values = shares[:, [_columns(name, self.classifier.labels)[0] for name in classes]]
        else:
            assert prompts is not None
            factor = self._factor(cell)
            values = zero_shot.score(self.task.score, embedded.vectors, *prompts, factor)
        found = learned.scores_of(embedded.dataset, classes, values, self._meta(cell, embedded))
        return replace(found, log_odds=zero_shot.rule(self.task.score).log_odds)

    def _map_inputs(self, cell: GridCell, meta: Mapping[str, Any]) -> localization.MapInputs:
        """Maps are made of what the scores of the cell rank images by."""
        if self.classifier:
            names = [c.name for c in self.task.classes]
            own = [_columns(name, self.classifier.labels)[0] for name in names]
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
