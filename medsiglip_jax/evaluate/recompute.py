"""Results and report from the files of an evaluation, without the model."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa

from medsiglip_jax.evaluate import (
    aggregation,
    learned,
    localization,
    options,
    retrieval,
    scores,
    tasks,
)
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.report import document
from medsiglip_jax.evaluate.report import export as exports
from medsiglip_jax.evaluate.results import maps as of_maps
from medsiglip_jax.evaluate.results.summary import summarize
from medsiglip_jax.evaluate.scores import GRID, PART, Scores
from medsiglip_jax.evaluate.units import IMAGE, Unit
from medsiglip_jax.files import places, settings, storage
from medsiglip_jax.files.json_text import dumps

RESULTS = "results.json"


def recompute(
    output: places.Given,
    resamples: int | None = None,
    prevalence: float | None = None,
    export: bool = False,
    unit: Unit | None = None,
) -> dict[str, Any]:
    """Recomputes results and report from the files in a folder; needs no model.

    Args:
        output: folder that `run.evaluate` wrote.
        resamples: the number of resamples of bootstraps; None is as before.
        prevalence: a share of positives for which predictive values are stated; None is as before.
        export: also write every table and figure as a file; see `report.export`.
        unit: what to judge instead of single images; None is as before.

    Returns:
        The content of results.json.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: files are of different runs, or there are no thresholds to state values of.
    """
    folder = places.at(output)
    run, attributes = _read(folder)
    run = _with_statistics(run, resamples, prevalence)
    if unit is not None:
        asked = None if unit.per == IMAGE else asdict(unit)
        run = replace(run, meta={**run.meta, "unit": asked})
    facts, held_out = run.meta.get("learned"), run
    if facts and facts.get("drawn"):  # from all images: what was learned is of some of them
        splits = np.array(attributes.pop(PART))
        held_out = run.select(np.flatnonzero(splits == "test"))
    cells, ranks, maps = _read_others(folder, run)
    recalls = None if ranks is None else retrieval.summary(ranks)
    learning = learned.read(folder, held_out, facts) if facts else None
    run, attributes, judged, learning = _of_units(run, attributes, cells, learning)
    localized = maps and of_maps.summary(*maps, run.classes)
    content = summarize(run, attributes, judged, learning, recalls, localized)
    _write(folder, content, run, learning)
    if export:
        exports.export(folder, content, run, learning)
    return content


def _write(
    folder: places.Place, content: dict[str, Any], run: Scores, learning: Learned | None
) -> None:
    """Writes the reports, and last results.json."""
    texts = {
        "report.md": document.markdown(content),
        "report.html": document.page(content, run, learning),
        RESULTS: dumps(content, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        with storage.new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _read(folder: places.Place) -> tuple[Scores, dict[str, list[str]]]:
    """Scores of all images, without classes for pairs, and what else is known of the images."""
    if scores.of_pairs(folder):
        columns, meta = scores.read_columns(folder / scores.IMAGES)
        ids, groups = columns.pop("id"), columns.pop("group", None)
        nothing = np.zeros((len(ids), 0))
        return Scores(ids, [], nothing, nothing, groups, meta), columns
    run = scores.read(folder / scores.FILE)
    columns, meta = scores.read_columns(folder / scores.IMAGES)
    scores.check_runs(folder, run.meta.get("run"), {scores.IMAGES: meta.get("run")})
    if columns.pop("id") != list(run.ids):
        raise ValueError(
            f"{folder}: {scores.IMAGES} and {scores.FILE} are of different images; evaluate again"
        )
    return run, columns


def _read_others(
    folder: places.Place, run: Scores
) -> tuple[list[Scores], pa.Table | None, tuple[pa.Table, localization.MapFacts] | None]:
    """Scores of the variants, ranks of retrieval and measures of maps, as far as the run has them.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one of them is of another run.
    """
    if odd := [name for name in run.meta["cells"] if not places.is_plain_name(name)]:
        raise ValueError(f"{folder / scores.FILE} names {odd[0]!r}; expected {places.PLAIN_NAME}")
    cells = {name: scores.read(folder / GRID / name) for name in run.meta["cells"]}
    runs = {f"{GRID}/{name}": cell.meta.get("run") for name, cell in cells.items()}
    ranks = retrieval.read(folder / retrieval.FILE) if run.meta.get("retrieval") else None
    runs |= {} if ranks is None else {retrieval.FILE: retrieval.run_of(ranks)}
    maps = None
    if run.meta.get("localization"):
        maps = localization.read(folder / localization.FILE)
        runs[localization.FILE] = maps[1].run
    scores.check_runs(folder, run.meta.get("run"), runs)
    return [*cells.values()], ranks, maps


def _of_units(
    run: Scores, attributes: dict[str, list[str]], cells: list[Scores], learning: Learned | None
) -> tuple[Scores, dict[str, list[str]], list[Scores], Learned | None]:
    """One score for each patient or study, if that is what the run is to be judged by."""
    if not run.meta.get("unit"):
        return run, attributes, cells, learning
    unit = settings.build(Unit, run.meta["unit"], "unit")
    task = tasks.from_dict(run.meta["task"])
    aggregation.check(unit, task, run.groups, attributes, learning is not None)
    exclusive, unit_of = task.exclusive, aggregation.names(unit, run, attributes)
    of_run, *of_cells = (
        aggregation.of_units(side, unit_of, unit.aggregate, exclusive) for side in (run, *cells)
    )
    unlabelled = int(np.isnan(of_run.labels).all(axis=1).sum())
    counts = {"images": len(run.ids), "without_label": unlabelled}
    meta = {**run.meta, "unit": {**run.meta["unit"], **counts}}
    kept = {name: column for name, column in attributes.items() if name != unit.per}
    learning = learning and aggregation.of_learned(learning, unit, exclusive)
    kept = aggregation.of_attributes(kept, unit_of)
    return replace(of_run, meta=meta), kept, of_cells, learning


def _with_statistics(run: Scores, resamples: int | None, prevalence: float | None) -> Scores:
    """The same scores with other statistics, which need no model."""
    facts = run.meta.get("learned")
    changes = {"prevalence": prevalence, "learn": "thresholds" if facts else ""}
    changes |= {} if resamples is None else {"resamples": resamples}
    options.EvaluateOptions(**changes)  # checks them
    meta = dict(run.meta)
    if resamples is not None:
        meta["statistics"] = {**meta["statistics"], "resamples": resamples}
    if prevalence is not None:
        meta["learned"] = {**(facts or {}), "prevalence": prevalence}
    return replace(run, meta=meta)
