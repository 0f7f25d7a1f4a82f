"""results.json -> the tables of a report, for Markdown, HTML and the terminal alike."""

from collections.abc import Iterator, Mapping
from typing import Any

from medsiglip_jax.evaluate import retrieval
from medsiglip_jax.evaluate.report import learning, localization, tables
from medsiglip_jax.evaluate.report.tables import (
    ReportSection,
    estimated,
    interval,
    number,
    p_value,
    starred,
)


def sections(results: Mapping[str, Any]) -> Iterator[ReportSection]:
    """A whole report but its pictures."""
    yield from figures(results)
    yield from filter(None, [_grid(results)])
    yield from learning.sections(results)
    others = localization.section(results), subgroups(results), recalls(results)
    yield from filter(None, [*others, *cohort(results)])
    yield _provenance(results)


def figures(results: Mapping[str, Any]) -> Iterator[ReportSection]:
    """The main figures: in words, of classes and means, and of exclusive classes."""
    return filter(None, (_summary(results), classes(results), _grades(results)))


def cohort(results: Mapping[str, Any]) -> Iterator[ReportSection]:
    """Which images were evaluated, and which were not."""
    return filter(None, (_flow(results), _characteristics(results), _left_out(results)))


def _summary(results: Mapping[str, Any]) -> ReportSection:
    macro, groups = results["macro_auc"], results["groups"]
    whose = "" if groups is None else f" of {groups:,} patients or groups"
    text = [f"{results['images']:,} {tables.judged(results)}{whose}."]
    if unit := results["unit"]:
        text.append(
            f"Each has one score, by {unit['aggregate']} over its images "
            f"({unit['images']:,} in all){_whose_label(results, unit)}."
        )
    if macro is not None:
        text.append(
            f"Macro AUC {estimated(macro)} over {results['classes_in_mean']} classes, "
            f"{tables.how_scored(results)}."
        )
    if results["probe"]:
        text.append(f"Linear probe: {learning.probe_line(results['probe'])}.")
    if names := ", ".join(results["undefined"]):
        text.append(f"Not in the mean, because all their images have the same label: {names}.")
    if published := results["published"]:
        same = "" if published["same_images"] else " on other images, so not directly comparable"
        text.append(f"Published: {published['where']}{same}. {published['note']}".strip())
        images = (results["unit"] or results)["images"]
        if published["images"] not in (None, images) and published["same_images"]:
            text.append(f"The published figures are of {published['images']:,} images.")
    if answer := results["trained_on"]:
        answer = f"{answer[0].upper()}{answer[1:]}."
        text.append(f"Was MedSigLIP trained on these images? {answer}")
    return ReportSection("Result", " ".join([*text, *results["notes"]]))


def _whose_label(results: Mapping[str, Any], unit: Mapping[str, Any]) -> str:
    if results["one_class_each"] is None:
        return "; it has a finding if one of its images has it"
    return f"; {unit['without_label']:,} have images of several classes, and so no label"


def classes(results: Mapping[str, Any]) -> ReportSection | None:
    """The table of classes and means; None for pairs."""
    if not results["classes"]:
        return None
    means = {"mean": results["macro_auc"], **results["means"]}
    head, cells = tables.auc_columns((*results["classes"], *means.values()))
    counts = ("positives", "negatives", "unknown")
    rows = [
        (starred(c), *cells(c), *(f"{c[key]:,}" for key in counts), number(c["average_precision"]))
        for c in results["classes"]
    ]
    rows += [(name, *cells(mean), *[""] * 4) for name, mean in means.items()]
    text = (
        "Intervals: score intervals of DeLong's variance with Student's t, by patient where "
        f"patients are known.{_withheld(means)} AP: average precision. {tables.FEW}"
    )
    return ReportSection("Classes", text, ("class", *head, *counts, "AP"), rows)


def _withheld(means: Mapping[str, Mapping[str, Any]]) -> str:
    """Why means have no interval, or whose variance they borrow."""
    text = ""
    for name, mean in means.items():
        if mean["withheld"]:
            text += f" No interval of {name}: {mean['withheld']}."
        elif mean["lone"]:
            text += (
                f" Of the classes of {name}, {mean['lone']} have a single patient with or without "
                "it, whose variance is taken from the other classes."
            )
    return text


def _grades(results: Mapping[str, Any]) -> ReportSection | None:
    grades = results["one_class_each"]
    if grades is None:
        return None
    rows = []
    for name, figure in grades["figures"].items():
        of_others = {k: other.get(name) for k, other in grades["others"].items()}
        named = figure["published"], *of_others.values()
        shown = number(figure["value"]), interval(figure)
        rows.append((_FIGURES.get(name) or name.replace("_", " "), *shown, *map(number, named)))
    if "from" in grades:
        auc, blank = grades["auc_from"], ["–"] * (1 + len(grades["others"]))
        shown = number(auc["auc"]), interval(auc)
        rows.append((f"AUC of {grades['from']} and above", *shown, *blank))
    others = [f"published, {name}" for name in grades["others"]]
    header = ("of the highest score", "", "95 % interval", "published", *others)
    if not any(cell != "–" for row in rows for cell in row[3:]):
        header, rows = header[:3], [row[:3] for row in rows]
    text = (
        "Intervals are by patient where patients are known: Wilson's for accuracies, otherwise the "
        "bootstrap's. Balanced accuracy is the mean recall of the classes."
    )
    return ReportSection("One class for each image", text, header, rows)


_FIGURES = {
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "matthews": "Matthews correlation",
    "cohen_kappa": "Cohen's kappa",
    "quadratic_kappa": "quadratic weighted kappa",
}


def _grid(results: Mapping[str, Any]) -> ReportSection | None:
    if not results["grid"]:
        return None
    names = [c["class"] for c in results["classes"]]
    shown = names if len(names) <= 16 else []
    choices = ("preprocess", "reading", "temperature")
    numbers = ("macro_auc", "difference", "mean_distance")
    rows = []
    for cell in results["grid"]:
        aucs = [*(cell[key] for key in numbers), *(cell["classes"][name] for name in shown)]
        rows.append((*(cell[key] for key in choices), *map(number, aucs)))
    text = (
        "The published figures do not say which of these variants they are of. Difference: macro "
        "AUC minus the published mean. Mean distance: mean absolute difference of the AUCs of the "
        "classes."
    )
    header = (*choices, "macro AUC", "difference", "mean distance", *shown)
    return ReportSection("All variants", text, header, rows)


def subgroups(results: Mapping[str, Any]) -> ReportSection | None:
    """AUCs of subgroups against the others; None where nothing is known of the images."""
    if not results["subgroups"]:
        return None
    header = ("", "subgroup", "class", "AUC", "95 % interval", "minus the others",
              "95 % interval", "p (Holm)", "positives", "negatives")  # fmt: skip
    rows = []
    for row in results["subgroups"]:
        names = row["attribute"].replace("_", " "), starred(row, "subgroup"), row["class"]
        gap = number(row["gap"]), interval(row, "gap_low", "gap_high"), p_value(row["p_holm"])
        counts = f"{row['positives']:,}", f"{row['negatives']:,}"
        rows.append((*names, number(row["auc"]), interval(row), *gap, *counts))
    text = (
        "Intervals are by patient where patients are known. p: of no difference to the others, "
        f"adjusted by Holm for the {len(rows)} rows of this table."
    )
    if any(row["gap"] is not None and row["gap_low"] is None for row in results["subgroups"]):
        text += (
            " A difference without an interval: too few images of both are ordered wrong, or are "
            "of two labels, to tell how far it is from none."
        )
    if names := ", ".join(results["not_compared"]):
        text += f" Not compared, because they have more than 20 values: {names}."
    return ReportSection("Subgroups", f"{text} {tables.FEW}", header, rows)


def recalls(results: Mapping[str, Any]) -> ReportSection | None:
    """The table of retrieval; None where there is none."""
    ranks = results.get("retrieval")
    if not ranks:
        return None
    names = [f"recall@{k}" for k in retrieval.KS]
    header = ("", *(cell for name in names for cell in (name, "95 % interval")), "median rank")
    rows = []
    for key, shown in retrieval.DIRECTIONS.items():
        shares = [ranks[key][name] for name in names]
        cells = [cell for share in shares for cell in (number(share["value"]), interval(share))]
        rows.append((shown, *cells, f"{ranks[key]['median_rank']:,.1f}"))
    last = retrieval.KS[-1]
    text = [
        f"{ranks['images']:,} images and {ranks['texts']:,} different texts. Recall@k: how often "
        "the text of an image, or an image of a text, is among the first k. By chance, the text of "
        f"an image is among the first {last} in {number(min(1.0, last / ranks['texts']))}."
    ]
    if ranks["truncated"]:
        text.append(f"{ranks['truncated']:,} texts were longer than the model reads, and were cut.")
    if ranks["without_text"]:
        text.append(f"{ranks['without_text']:,} images without a text were left out.")
    return ReportSection("Retrieval", " ".join(text), header, rows)


def _flow(results: Mapping[str, Any]) -> ReportSection | None:
    """None where every image was evaluated."""
    if len(results["flow"]) < 3:
        return None
    rows = [(row["step"], f"{row['images']:,}", f"{row['left']:,}") for row in results["flow"]]
    text = "From the images that the data set names to those that were evaluated (TRIPOD 13a)."
    return ReportSection("Flow of images", text, ("", "images", "left"), rows)


def _characteristics(results: Mapping[str, Any]) -> ReportSection | None:
    rows = []
    for row in results["characteristics"]:
        share = row["images"] / max(1, results["images"])
        patients = "–" if row["groups"] is None else f"{row['groups']:,}"
        name = row["attribute"].replace("_", " ")
        rows.append((name, row["value"], f"{row['images']:,} ({share:.0%})", patients))
    text = (
        f"Of the {tables.judged(results)} that were evaluated (TRIPOD 13b). A patient with images "
        "of several values counts for each of them."
    )
    header = ("", "value", tables.judged(results), "patients")
    return ReportSection("Characteristics", text, header, rows) if rows else None


def _left_out(results: Mapping[str, Any]) -> ReportSection | None:
    rows = [(reason, f"{count:,}") for reason, count in results["counts"].items() if count]
    return ReportSection("Left out", "", ("reason", "count"), rows) if rows else None


def _provenance(results: Mapping[str, Any]) -> ReportSection:
    made = {"data from": results["source"], "prompts by": results["prompts_source"]}
    content = {**results["provenance"], **results["statistics"], **made}
    rows = [(name, _shown(value)) for name, value in content.items()]
    return ReportSection("Provenance", "", ("", ""), [row for row in rows if row[1]])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        known = ((key, _shown(item)) for key, item in value.items() if item is not None)
        return ", ".join(f"{key} {item}" for key, item in known)
    return "" if value is None else str(value)
