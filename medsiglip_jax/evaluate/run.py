"""One evaluation from data to report, in a folder from which a killed one goes on.

    DIR/embeddings/PRESET/   of `embed`, computed once; PRESET-train and -validation of other parts
    DIR/images.parquet       id, sex, age, view and what else is known
    DIR/grid/*.parquet       scores of the variants, with `grid`
    DIR/retrieval.parquet    ranks of texts and images, of tasks with texts
    DIR/scores.parquet       id, class, score, label, group
    DIR/report.html, DIR/report.md, and last DIR/results.json

`learned` lists the files of what is learned from labels. Everything below the scores is computed
from files, and can be again: `recompute`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax import logistic, places, storage
from medsiglip_jax.api import Model
from medsiglip_jax.embed import Progress
from medsiglip_jax.evaluate import datasets, learned, report, retrieval, scores
from medsiglip_jax.evaluate.job import GRID, IMAGES, PART, Data, Job
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.options import AS_GIVEN, LEARN, Options
from medsiglip_jax.evaluate.results import results
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.places import Given, Place
from medsiglip_jax.preprocess.image import PRESETS

RESULTS = "results.json"


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
    task, found = _data(task, data, options)
    task.check_prompts()
    model = model if isinstance(model, Model) else model()
    if embeddings is None:
        on_total(found.images() + (len(PRESETS) * len(found.test) if options.grid else 0))
    folder = places.at(output)
    job = Job(task, readings, found, model, folder, options, embeddings, on_progress, on_fit)
    (folder / RESULTS).unlink(missing_ok=True)
    job.run()
    return recompute(output)


def _readings(task: Task, options: Options) -> list[str]:
    """Names of the readings to score, that of the run itself among them."""
    if options.reading not in (there := [AS_GIVEN, *task.readings]):
        task.with_reading(options.reading)  # raises the error that lists them
    return there if options.grid else [options.reading]


def _data(task: Task, data: Given, options: Options) -> tuple[Task, Data]:
    policy, missing = options.policy, options.allow_missing
    named, test = datasets.read(task, data, policy, missing)
    if not (wanted := LEARN[options.learn]):
        return named, Data(test)
    _, parts = datasets.read_parts(task, data, policy, missing, options.seed, wanted)
    return named, Data(test, parts)


def recompute(output: Given) -> dict[str, Any]:
    """Computes results and report again from the files in a folder; no model is needed.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: files are of different runs.
    """
    folder = places.at(output)
    found, attributes = _read(folder)
    drawn = (found.meta.get("learned") or {}).get("drawn", False)
    part = attributes.pop(PART) if drawn else None
    cells = [scores.read(folder / GRID / name) for name in found.meta["cells"]]
    ranks = None
    if found.meta.get("retrieval"):
        ranks = retrieval.summary(retrieval.read(folder / retrieval.FILE))
    content = results(found, attributes, cells, _learned(folder, found, part), ranks)
    texts = {
        "report.md": report.markdown(content),
        "report.html": report.page(content, found),
        RESULTS: json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        with storage.new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return content


def _read(folder: Place) -> tuple[Scores, dict[str, list[str]]]:
    """Scores of all images, of pairs for no classes, and what else is known of them."""
    if (folder / retrieval.FILE).is_file() and not (folder / scores.FILE).is_file():
        columns, meta = scores.read_columns(folder / IMAGES)
        ids, groups = columns.pop("id"), columns.pop("group", None)
        nothing = np.zeros((len(ids), 0))
        return Scores(ids, [], nothing, nothing, groups, meta), columns
    found = scores.read(folder / scores.FILE)
    columns, _ = scores.read_columns(folder / IMAGES)
    if columns.pop("id") != list(found.ids):
        raise ValueError(
            f"{folder}: {IMAGES} and {scores.FILE} are of different images; evaluate again"
        )
    return found, columns


def _learned(folder: Place, found: Scores, part: list[str] | None) -> Learned | None:
    facts: Mapping[str, Any] | None = found.meta.get("learned")
    if facts is None:
        return None
    if part is not None:
        found = found.select(np.flatnonzero(np.array(part) == "test"))
    return learned.read(folder, found, facts)
