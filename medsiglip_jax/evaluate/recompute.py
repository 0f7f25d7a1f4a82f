"""One evaluation from data to report, in a folder from which a killed one goes on.

    DIR/embeddings/PRESET/   of `embed`, computed once; PRESET-train and -validation of other parts,
                             whole: draws and labels choose among them
    DIR/images.parquet       id, sex, age, view and what else is known
    DIR/grid/*.parquet       scores of the variants, with `grid`
    DIR/retrieval.parquet    ranks of texts and images, of tasks with texts
    DIR/scores.parquet       id, class, score, label, group
    DIR/report.html, DIR/report.md, and last DIR/results.json

`learned` lists the files of what is learned from labels. Each file knows the run that it is of: of
two, the first of which a killed second replaced in part, nothing is computed. Everything below the
scores is computed from files, and can be again: `recompute`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax.embeddings.probe import logistic
from medsiglip_jax.evaluate import learned, retrieval, scores
from medsiglip_jax.evaluate.data import datasets
from medsiglip_jax.evaluate.job import GRID, PART, RESULTS, Job
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.options import AS_GIVEN, LEARN, Options
from medsiglip_jax.evaluate.report import document
from medsiglip_jax.evaluate.results import results
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.places import Given, Place
from medsiglip_jax.inference.embed import Progress
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.image import PRESETS


def evaluate(
    task: Task,
    model: Model | Callable[[], Model],
    data: Given,
    output: Given,
    options: Options = Options(),
    embeddings: Given | None = None,
    on_progress: Callable[[Progress], Any] = lambda progress: None,
    on_total: Callable[[int], Any] = int,
    on_fit: Callable[[], Any] = int,
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
        on_fit: called after each fit of what is learned.

    Raises:
        FileNotFoundError: data is missing: what, how much, and where it is had.
        ModuleNotFoundError: a probe needs scikit-learn.
        ValueError: prompts, tables or embeddings that do not fit.
    """
    task = replace(task, score=options.score or task.score)
    readings = _readings(task, options)
    if embeddings and options.grid:
        raise ValueError("a grid embeds with every preset; it cannot use given embeddings")
    if task.kind == "pairs" and (options.learn or options.grid):
        raise ValueError(f"task {task.name} is of pairs without classes: no --learn, no --grid")
    if options.learn == "probe":
        logistic.installed()  # it would be a pity to hear of it after hours
    task, parts = datasets.read_parts(
        task, data, options.policy, options.allow_missing, options.seed, LEARN[options.learn]
    )
    task.check_prompts()
    model = model if isinstance(model, Model) else model()
    if embeddings is None:
        presets = len(PRESETS) - 1 if options.grid else 0  # beside the run's own
        on_total(parts.images() + presets * len(parts.whole.pool))
    folder = places.at(output)
    job = Job(task, readings, parts, model, folder, options, embeddings, on_progress, on_fit)
    job.run()
    return recompute(output)


def _readings(task: Task, options: Options) -> list[str]:
    """Names of the readings to score, that of the run itself among them."""
    if options.reading not in (there := [AS_GIVEN, *task.readings]):
        task.with_reading(options.reading)  # raises the error that lists them
    return there if options.grid else [options.reading]


def recompute(
    output: Given, resamples: int | None = None, prevalence: float | None = None
) -> dict[str, Any]:
    """Computes results and report again from the files in a folder; no model is needed.

    Args:
        output: folder that `evaluate` wrote.
        resamples: of bootstraps; None is as before.
        prevalence: at which predictive values are stated; None is as before.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: files are of different runs, or there are no thresholds to state values of.
    """
    folder = places.at(output)
    found, attributes = _read(folder)
    found = _with(found, resamples, prevalence)
    drawn = (found.meta.get("learned") or {}).get("drawn", False)
    part = attributes.pop(PART) if drawn else None
    cells = {name: scores.read(folder / GRID / name) for name in found.meta["cells"]}
    runs = {f"{GRID}/{name}": cell.meta.get("run") for name, cell in cells.items()}
    ranks = None
    if found.meta.get("retrieval"):
        ranks = retrieval.read(folder / retrieval.FILE)
        runs[retrieval.FILE] = retrieval.run_of(ranks)
    scores.check_runs(folder, found.meta.get("run"), runs)
    ranks = None if ranks is None else retrieval.summary(ranks)
    content = results(found, attributes, list(cells.values()), _learned(folder, found, part), ranks)
    texts = {
        "report.md": document.markdown(content),
        "report.html": document.page(content, found),
        RESULTS: json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        with storage.new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return content


def _read(folder: Place) -> tuple[Scores, dict[str, list[str]]]:
    """Scores of all images, of pairs for no classes, and what else is known of them."""
    if scores.of_pairs(folder):
        columns, meta = scores.read_columns(folder / scores.IMAGES)
        ids, groups = columns.pop("id"), columns.pop("group", None)
        nothing = np.zeros((len(ids), 0))
        return Scores(ids, [], nothing, nothing, groups, meta), columns
    found = scores.read(folder / scores.FILE)
    columns, meta = scores.read_columns(folder / scores.IMAGES)
    scores.check_runs(folder, found.meta.get("run"), {scores.IMAGES: meta.get("run")})
    if columns.pop("id") != list(found.ids):
        raise ValueError(
            f"{folder}: {scores.IMAGES} and {scores.FILE} are of different images; evaluate again"
        )
    return found, columns


def _with(found: Scores, resamples: int | None, prevalence: float | None) -> Scores:
    """The same with other statistics, which need no scores to be computed again."""
    facts = found.meta.get("learned")
    given = {"prevalence": prevalence, "learn": "thresholds" if facts else ""}
    given |= {} if resamples is None else {"resamples": resamples}
    Options(**given)  # checks them
    meta = dict(found.meta)
    if resamples is not None:
        meta["statistics"] = {**meta["statistics"], "resamples": resamples}
    if prevalence is not None:
        meta["learned"] = {**(facts or {}), "prevalence": prevalence}
    return replace(found, meta=meta)


def _learned(folder: Place, found: Scores, part: list[str] | None) -> Learned | None:
    facts: Mapping[str, Any] | None = found.meta.get("learned")
    if facts is None:
        return None
    if part is not None:
        found = found.select(np.flatnonzero(np.array(part) == "test"))
    return learned.read(folder, found, facts)
