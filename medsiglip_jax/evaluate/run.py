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

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from medsiglip_jax.evaluate import aggregation, localization, scores, tasks, zero_shot
from medsiglip_jax.evaluate.data import digits
from medsiglip_jax.evaluate.data import splits as data_splits
from medsiglip_jax.evaluate.data.splits import Splits
from medsiglip_jax.evaluate.options import AS_GIVEN, LEARN, EvaluateOptions
from medsiglip_jax.evaluate.recompute import RESULTS, recompute
from medsiglip_jax.evaluate.scoring import EMBEDDINGS, EvaluationRun, label_columns
from medsiglip_jax.files import places
from medsiglip_jax.inference import run_folder
from medsiglip_jax.inference.embed import EmbedProgress
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import ClassifierConfig
from medsiglip_jax.preprocess.image import PRESETS

# What an evaluation that was begun has in its folder.
_OWN = (EMBEDDINGS, scores.GRID, scores.FILE, scores.IMAGES, RESULTS, *digits.FOLDERS)


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
        embeddings: a folder of embeddings of these images by this checkpoint, instead of new ones.
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
    _check_options(task, options, embeddings)
    task, splits = data_splits.read(
        task, data, options.policy, options.allow_missing, options.seed, LEARN[options.learn],
        options.prefer, options.allow_leaks, options.part_policies,
    )  # fmt: skip
    _check_data(task, splits, data, options)
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


def _check_options(
    task: tasks.Task, options: EvaluateOptions, embeddings: places.Given | None
) -> None:
    """Raises ValueError for options that do not go with the task, before its data is read."""
    if options.reading != AS_GIVEN:
        task.with_reading(options.reading)  # raises if there is none
    if embeddings and options.grid:
        raise ValueError("a grid embeds with every preset; it cannot use given embeddings")
    if task.kind == "pairs" and (options.learn or options.grid):
        raise ValueError(f"task {task.name} is of pairs without classes: no --learn, no --grid")


def _check_data(
    task: tasks.Task, splits: Splits, data: places.Given, options: EvaluateOptions
) -> None:
    """Raises ValueError for options that do not go with the data, before the model is loaded."""
    whole = splits.whole
    if lacking := [name for name in options.by if name not in whole.attributes]:
        raise ValueError(f"{data}: no table of {task.title} has a column {', '.join(lacking)}")
    if options.unit:
        learning = bool(options.learn)
        aggregation.check(options.unit, task, whole.groups, whole.attributes, learning)


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
    lacking = [c.name for c in task.classes if len(label_columns(c.name, own.labels)) != 1]
    if lacking or not task.classes:
        raise ValueError(
            f"the model is a classifier of {', '.join(own.labels)}, and task {task.name} "
            f"asks for {', '.join(lacking) or 'pairs of images and texts'}"
        )
    return replace(task, score=zero_shot.CLASSIFIER)


def recorded_dtype(output: places.Given, embeddings: places.Given | None = None) -> str | None:
    """The dtype of the embeddings that an evaluation is given, or has begun; None if there are
    none."""
    if embeddings is not None:
        return run_folder.recorded_dtype(places.at(embeddings))
    folder = places.at(output) / EMBEDDINGS
    begun = sorted(folder.iterdir(), key=str) if folder.is_dir() else []
    return next(filter(None, map(run_folder.recorded_dtype, begun)), None)
