"""Tables about what was learned from labels: the probe, operating points, calibration."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medsiglip_jax.evaluate.report import tables
from medsiglip_jax.evaluate.report.tables import ReportSection, estimated, interval, number, signed

_MANY = 16  # classes; with more the report shows one rule of five


def sections(results: Mapping[str, Any], curves: bool = True) -> Iterator[ReportSection]:
    """The probe and, unless they are not wanted, its curves; operating points and calibration."""
    if probe := results["probe"]:
        yield _probe(probe)
        if curves:
            yield _curves(probe)
    if held_out := results["held_out"]:
        for key, name in {"zero_shot": tables.scores_of(results), "probe": "the probe"}.items():
            if judged := held_out[key]:
                yield _operating_points(key, name, held_out)
                if judged["subgroups"]:
                    yield _subgroups(name, judged)
                if judged["calibration"]:
                    yield _calibration(name, judged)
                if judged["selective"]:
                    yield _selective(name, judged["selective"])


def probe_line(probe: Mapping[str, Any]) -> str:
    """The probe in one line."""
    difference = probe["difference"]
    return (
        f"macro AUC {estimated(probe['macro_auc'])} on {_judged(probe)}, "
        f"{signed(difference['value'])} ({interval(difference)}) against zero-shot on the same "
        "images"
    )


# ------------------------------------------------------------------------------------------ probe


def _judged(probe: Mapping[str, Any], part: str = "test") -> str:
    """The images of a part, and how many patients they were combined for."""
    images, units = probe["images"][part], probe["judged"][part]
    of = f"{units:,} patients with " if units != images else ""
    return f"{of}{images:,} {part} images"


def _probe(probe: Mapping[str, Any]) -> ReportSection:
    images, macro = probe["images"], probe["macro_auc"]
    head, cells = tables.auc_columns((macro, *probe["classes"]))
    text = [
        f"Logistic regression on the embeddings of {images['train']:,} training images; "
        f"{_strength(probe)}. It is judged on {_judged(probe)}, which it did not "
        f"see. Splits: {probe['how']}. Features: {probe['scale']}.",
        "p: of DeLong's paired test with Student's t against zero-shot on the same images, "
        f"adjusted by Holm for the number of classes; the mean is tested alike. {tables.FEW}",
        f"For comparison: macro AUC of zero-shot {estimated(probe['zero_shot_macro'])}, of the "
        f"{probe['knn']['k']} nearest training images {estimated(probe['knn']['macro_auc'])}.",
    ]
    if probe["undefined"]:
        text.append(
            "Not in any of these means, because training or test images do not have both "
            f"labels: {', '.join(probe['undefined'])}."
        )
    header = ("class", *head, "minus zero-shot", "95 % interval", "p", "positives", "negatives")
    rows = []
    for c in probe["classes"]:
        tested = *_difference(c["minus_zero_shot"]), tables.p_value(c["p_holm"])
        counts = f"{c['positives']:,}", f"{c['negatives']:,}"
        rows.append((tables.starred(c), *cells(c), *tested, *counts))
    of_mean = *_difference(probe["difference"]), tables.p_value(probe["difference"]["p"])
    rows.append(("mean", *cells(macro), *of_mean, "", ""))
    return ReportSection("Linear probe against zero-shot", " ".join(text), header, rows)


def _difference(estimate: Mapping[str, Any]) -> tables.Cells:
    return signed(estimate["value"]), interval(estimate)


def _strength(probe: Mapping[str, Any]) -> str:
    """What the validation images chose."""
    images, unchosen = f"{probe['images']['validation']:,} validation images", probe["unchosen"]
    chosen = f"its strength was chosen on {images}"
    if not unchosen:
        return chosen
    middle = "the middle one of those tried was taken"
    learned = [name for name, strength in probe["strengths"].items() if strength is not None]
    if probe["exclusive"] or set(learned) <= set(unchosen):
        return (
            f"its strength could not be chosen, because {images} do not have both labels of any "
            f"learned class; {middle}"
        )
    return (
        f"{chosen}, except for {', '.join(unchosen)}: the validation images do not have both "
        f"labels, so {middle}"
    )


def _curves(probe: Mapping[str, Any]) -> ReportSection:
    shots = " of each class" if probe["exclusive"] else " with and without each finding"
    rows = [*_curve(probe["learning_curve"], "n", ""), *_curve(probe["few_shot"], "shots", shots)]
    text = (
        "Macro AUC on the test images after learning from fewer training images; the draws of one "
        "size differ by seed. Strengths of the logistic regression are chosen on all validation "
        "images; prototypes, the mean embedding of each class, need none."
    )
    if probe["judged"] != {part: probe["images"][part] for part in probe["judged"]}:
        text += " Here each image is judged by itself, not each patient."
    header = ("method", "training images", "draws", "mean AUC", "lowest to highest")
    return ReportSection("Learning from less", text, header, rows)


def draws(rows: Sequence[Mapping[str, Any]], key: str) -> Mapping[tuple[str, int], list[float]]:
    """(method, size) -> the AUCs of its draws that have one; `key` is that of the size."""
    aucs: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        aucs[row["method"], row[key]] += [] if row["auc"] is None else [row["auc"]]
    return aucs


def _curve(rows: Sequence[Mapping[str, Any]], key: str, unit: str) -> Iterator[tables.Cells]:
    """All draws of one method and size in one row."""
    for (method, size), aucs in draws(rows, key).items():
        mean = sum(aucs) / len(aucs) if aucs else None
        ends = {"low": min(aucs, default=None), "high": max(aucs, default=None)}
        yield (method, f"{size:,}{unit}", f"{len(aucs)}", number(mean), interval(ends))


# ------------------------------------------------------------------------------------ thresholds


def _operating_points(key: str, name: str, held_out: Mapping[str, Any]) -> ReportSection:
    judged = held_out[key]
    points = judged["operating_points"]
    many = len({point["class"] for point in points}) > _MANY
    stated = next((point["stated"] for point in points if point["stated"]), None)
    text = [
        f"Thresholds were chosen on {held_out['validation']['images']:,} validation images alone, "
        f"and are judged on {held_out['test']['images']:,} test images. Splits: "
        f"{held_out['how']}. PPV and NPV are at the prevalence of the test images; intervals are "
        f"Wilson's, by patient where patients are known. {tables.FEW}"
    ]
    if stated:
        text.append(f"Also at a prevalence of {stated['prevalence']:g}, by Bayes' rule.")
    if many:
        text.append("Shown is Youden's rule; results.json has the others.")
    unlearned = judged["unlearned"]
    others = [name for name in judged["undefined"] if name not in unlearned]
    reasons = {"the training images": unlearned, "validation or test images": others}
    text += [
        f"Without thresholds, because {images} do not have both labels: {', '.join(names)}."
        for images, names in reasons.items()
        if names
    ]
    at = f" at {stated['prevalence']:g}" if stated else ""
    header = ("class", "rule", "threshold", "sensitivity", "specificity", "PPV", "NPV",
              *((f"PPV{at}", f"NPV{at}") if stated else ()))  # fmt: skip
    rows = [_point(point) for point in points if point["rule"] == "youden" or not many]
    return ReportSection(f"Operating points of {name}", " ".join(text), header, rows)


def _point(point: Mapping[str, Any]) -> tables.Cells:
    at_least = "" if point["at_least"] is None else f" ≥ {point['at_least']:g} on validation"
    threshold = "above all" if point["threshold"] is None else repr(point["threshold"])
    stated = point["stated"] or {}
    return (
        tables.starred(point),
        "Youden" if point["rule"] == "youden" else f"{point['rule']}{at_least}",
        threshold,
        *(estimated(point[key], "value") for key in ("sensitivity", "specificity", "ppv", "npv")),
        *(number(stated[key]) for key in ("ppv", "npv") if key in stated),
    )


def _subgroups(name: str, judged: Mapping[str, Any]) -> ReportSection:
    text = (
        "At the threshold of Youden's rule, which is the same for all. Intervals are by patient "
        "where patients are known, and not adjusted for the number of rows. * fewer than 10 "
        "patients (or images, if unknown): read little into it."
    )
    header = ("", "subgroup", "class", "", "share", "95 % interval", "minus the others",
              "95 % interval", "images")  # fmt: skip
    rows = []
    for row in judged["subgroups"]:
        names = row["attribute"].replace("_", " "), tables.starred(row, "subgroup"), row["class"]
        share = row["share"], number(row["value"]), interval(row)
        gap = signed(row["gap"]), interval(row, "gap_low", "gap_high")
        rows.append((*names, *share, *gap, f"{row['images']:,}"))
    return ReportSection(f"Subgroups at the thresholds of {name}", text, header, rows)


# ------------------------------------------------------------------------------------ calibration


def _calibration(name: str, judged: Mapping[str, Any]) -> ReportSection:
    calibration = judged["calibration"]
    text = (
        "Fitted on validation images, measured on test images. ECE: expected calibration error, "
        "in 15 bins of equal width, and of equal mass. Brier: mean squared distance from the "
        "labels; where an image has one class, summed over the classes. Both are 0 at best. "
        "Slope and intercept: of the logistic regression of test labels on log odds, 1 and 0 at "
        "best; a slope below 1 is overconfident. Before: only where scores are probabilities."
    )
    if names := [row["of"] for row in calibration if row["reversed"]]:
        text += (
            f" Of {', '.join(names)} the score orders images the wrong way round on validation "
            "images: its curve falls."
        )
    if left_out := sum(row["left_out"] for row in calibration):
        text += (
            f" {left_out:,} validation images are of classes that the probe could not learn, and "
            "were left out; test images of them count."
        )
    header = ("of", "method", "ECE before", "after", "ECE (mass) before", "after",
              "Brier before", "after", "slope before", "after", "intercept before",
              "after")  # fmt: skip
    rows = []
    for row in calibration:
        parameters = ", ".join(f"{key} {value:.3g}" for key, value in row["parameters"].items())
        sides = row["before"], row["after"]
        errors = [side and side[key] for key in ("ece", "ece_mass", "brier") for side in sides]
        lines = [side and side[key] for key in ("slope", "intercept") for side in sides]
        lines = [estimated(line, "value") if line else "–" for line in lines]
        rows.append((row["of"], f"{row['method']} ({parameters})", *map(number, errors), *lines))
    return ReportSection(f"Calibration of {name}", text, header, rows)


# ---------------------------------------------------------------------------- selective prediction


def _selective(name: str, rows: Sequence[Mapping[str, Any]]) -> ReportSection:
    text = (
        "Accuracy on test images if only the most confident answers are given. Confidence: of a "
        "finding, the distance of its log odds from the threshold of Youden's rule; of exclusive "
        "classes, the highest calibrated probability. Images that tie are answered together. AURC: "
        "area under the curve of the share of wrong answers against coverage; 0 at best, and for "
        "a confidence that knows nothing the share of wrong answers at full coverage. Least: for "
        "one that puts all wrong answers last. Intervals are by patient where patients are known."
    )
    shares = [share["at_least"] for share in rows[0]["accuracy"]]
    header = ("of", "AURC", "least", *(f"accuracy at {share:.0%}" for share in shares))
    table = [
        (row["of"], estimated(row["aurc"], "value"), number(row["least"]),
         *(estimated(share, "value") for share in row["accuracy"]))
        for row in rows
    ]  # fmt: skip
    return ReportSection(f"Accuracy against coverage of {name}", text, header, table)
