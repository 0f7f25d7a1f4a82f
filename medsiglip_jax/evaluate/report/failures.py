"""Where a model is known to fail: what results.json shows to be wrong or does not show at all."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medsiglip_jax.evaluate.report import tables
from medsiglip_jax.evaluate.report.tables import estimated, interval, signed

Results = Mapping[str, Any]

TESTED = (
    "classes no better than chance, below the published figure or of too few patients; subgroups "
    "that are worse; maps that point elsewhere; calibration and confidence; unreadable and leaked "
    "images"
)


def known_failures(results: Results) -> Iterator[str]:
    """Sentences on what an evaluation found wrong, each with its numbers.

    Args:
        results: the content of results.json.
    """
    yield from _classes(results)
    yield from _subgroups(results)
    yield from _maps(results)
    for key, name in {"zero_shot": tables.scores_of(results), "probe": "the probe"}.items():
        if judged := (results["held_out"] or {}).get(key):
            yield from _shares(name, judged)
            yield from _calibration(name, judged)
            yield from _confidence(name, judged)
    yield from _images(results)


def _classes(results: Results) -> Iterator[str]:
    for row in results["classes"]:
        name = row["class"]
        if row["low"] is None:
            continue
        if row["high"] < 0.5:
            yield f"The score of {name} orders images the wrong way round: AUC {estimated(row)}."
        elif row["low"] <= 0.5:
            yield f"{name} is not shown to be better than chance: AUC {estimated(row)}."
        if row["inside"] is False and row["difference"] < 0:
            published = tables.number(row["published"])
            yield f"{name} is below the published AUC of {published}: {estimated(row)}."
    if few := [row["class"] for row in results["classes"] if row["few"]]:
        yield f"Fewer than 10 patients with or without it, so not judged well: {', '.join(few)}."
    if results["undefined"]:
        yield f"Not judged, for want of both labels: {', '.join(results['undefined'])}."


def _subgroups(results: Results) -> Iterator[str]:
    for row in results["subgroups"]:
        if row["p_holm"] is not None and row["p_holm"] < 0.05 and row["gap"] < 0:
            yield (
                f"{_subgroup(row)} have a lower AUC of {row['class']} than the others: "
                f"{estimated(row)}, {signed(row['gap'])} "
                f"({interval(row, 'gap_low', 'gap_high')})."
            )


def _subgroup(row: Results) -> str:
    return f"Images of {row['attribute'].replace('_', ' ')} {row['subgroup']}"


def _maps(results: Results) -> Iterator[str]:
    localization = results.get("localization") or {"classes": []}
    for row in localization["classes"]:
        rate, chance = row["hit_rate"], row["chance"]
        if rate["low"] is not None and rate["low"] <= chance:
            yield (
                f"Maps of {row['class']} are not shown to point at it more often than a random "
                f"point: hit rate {estimated(rate, 'value')}, chance {tables.number(chance)}."
            )


def _shares(name: str, judged: Results) -> Iterator[str]:
    for row in judged["subgroups"]:
        if row["gap_high"] is not None and row["gap_high"] < 0:
            yield (
                f"{_subgroup(row)} have a lower {row['share']} for {row['class']} at the threshold "
                f"of {name}, which all share: {estimated(row, 'value')}, {signed(row['gap'])} "
                f"({interval(row, 'gap_low', 'gap_high')}, not adjusted)."
            )


def _calibration(name: str, judged: Results) -> Iterator[str]:
    for row in judged["calibration"]:
        slope = row["after"]["slope"]
        of = f"{name}, {row['of']}"
        if row["reversed"]:
            yield f"The calibration curve of {of} falls: validation images are ordered wrong."
        elif slope and slope["low"] is not None and not slope["low"] <= 1 <= slope["high"]:
            side = "over" if slope["value"] < 1 else "under"
            shown = estimated(slope, "value")
            yield f"{of} is {side}confident after calibration: slope {shown}, not adjusted."


def _confidence(name: str, judged: Results) -> Iterator[str]:
    for row in judged["selective"]:
        risk = 1 - row["accuracy"][0]["value"]
        if risk and row["aurc"]["value"] >= risk:
            yield (
                f"Of {name}, {row['of']}, confident answers are wrong as often as others: AURC "
                f"{estimated(row['aurc'], 'value')}, {tables.number(risk)} of all are wrong."
            )


def _images(results: Results) -> Iterator[str]:
    for reason, images in results["counts"].items():
        if images and "unreadable" in reason:
            yield f"{images:,} images could not be read and were left out ({reason})."
    leaks: Sequence[Mapping[str, Any]] = results["leaks"]
    if leaks:
        yield (
            f"Training and test images overlap in {len(leaks)} ways that were allowed, so scores "
            "are better than those of new images; see the notes of the result."
        )
