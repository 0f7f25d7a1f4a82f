"""Tables of a report about what was learned from labels."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medsiglip_jax.evaluate.report.tables import (
    AGAINST,
    Row,
    Section,
    against,
    interval,
    number,
    p_value,
    signed,
)

_WITHOUT = " with and without each finding"
_MANY = 16  # classes; of more the report shows one rule of five
_WHOSE = {"zero_shot": "zero-shot scores", "probe": "the probe"}


def learned(results: Mapping[str, Any]) -> Iterator[Section]:
    """The probe and its curves, operating points and calibration."""
    if probe := results["probe"]:
        yield _probe(probe)
        yield _curves(probe)
    if held_out := results["held_out"]:
        for key, name in _WHOSE.items():
            if found := held_out[key]:
                yield _operating_points(name, found, held_out)
                if found["calibration"]:
                    yield _calibration(name, found)


def probe_line(probe: Mapping[str, Any]) -> str:
    """The probe in one line."""
    macro, difference = probe["macro_auc"], probe["difference"]
    return (
        f"macro AUC {number(macro['auc'])} ({interval(macro)}) on {probe['images']['test']:,} test "
        f"images, {signed(difference['value'])} ({interval(difference)}) against zero-shot on the "
        "same images"
    )


def _probe(probe: Mapping[str, Any]) -> Section:
    counts = probe["images"]
    macro, zero_shot = probe["macro_auc"], probe["zero_shot_macro"]
    compared = any(found["published"] is not None for found in (macro, *probe["classes"]))
    columns = against if compared else lambda found: ()
    text = [
        f"Logistic regression on the embeddings of {counts['train']:,} training images; "
        f"{_strength(probe)}. It is judged on {counts['test']:,} test images, which it did not "
        f"see. Parts: {probe['how']}. Features: {probe['scale']}.",
        "p: of DeLong's paired test with Student's t against zero-shot on the same images, "
        "adjusted by Holm for the number of classes. The interval of the mean's difference is the "
        "paired bootstrap's. * fewer than 10 positives or negatives: read little into it.",
        f"For comparison, macro AUC of zero-shot {number(zero_shot['auc'])} "
        f"({interval(zero_shot)}), of the {probe['knn']['k']} nearest training images "
        f"{number(probe['knn']['macro_auc']['auc'])} ({interval(probe['knn']['macro_auc'])}).",
    ]
    if probe["undefined"]:
        text.append(
            "Not in any of these means, because training or test images do not have both "
            f"labels: {', '.join(probe['undefined'])}."
        )
    header = ("class", "AUC", "95 % interval", *(AGAINST if compared else ()),
              "minus zero-shot", "95 % interval", "p", "positives", "negatives")  # fmt: skip
    rows = [
        (
            found["class"] + (" *" if found["few"] else ""),
            number(found["auc"]), interval(found), *columns(found),
            signed(found["minus_zero_shot"]["value"]), interval(found["minus_zero_shot"]),
            p_value(found["p_holm"]), f"{found['positives']:,}", f"{found['negatives']:,}",
        )
        for found in probe["classes"]
    ]  # fmt: skip
    difference = probe["difference"]
    mean = ("mean", number(macro["auc"]), interval(macro), *columns(macro))
    mean += (signed(difference["value"]), interval(difference), "", "", "")
    return Section("Linear probe against zero-shot", " ".join(text), header, [*rows, mean])


def _strength(probe: Mapping[str, Any]) -> str:
    """What the validation images chose."""
    images, unchosen = f"{probe['images']['validation']:,} validation images", probe["unchosen"]
    chosen = f"its strength was chosen on {images}"
    if not unchosen:
        return chosen
    middle = "the middle one of those tried was taken"
    learned = [name for name, strength in probe["strengths"].items() if strength is not None]
    if probe["exclusive"] or set(learned) <= set(unchosen):
        return f"{images} without both labels of any learned class chose no strength; {middle}"
    return f"{chosen}, but for {', '.join(unchosen)}, without both labels among them, {middle}"


def _curves(probe: Mapping[str, Any]) -> Section:
    rows = [
        *_curve(probe["learning_curve"], "n", ""),
        *_curve(probe["few_shot"], "shots", " of each class" if probe["exclusive"] else _WITHOUT),
    ]
    text = (
        "Macro AUC on the test images by how many training images were learned from; the draws of "
        "one size differ by seed. Strengths of the logistic regression are chosen on all "
        "validation images; prototypes, the mean embedding of each class, need none."
    )
    header = ("method", "training images", "draws", "mean AUC", "lowest to highest")
    return Section("Learning from less", text, header, rows)


def _curve(rows: Sequence[Mapping[str, Any]], name: str, of: str) -> Iterator[Row]:
    """Draws of one method and size in one row."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        found[row["method"], row[name]] += [] if row["auc"] is None else [row["auc"]]
    for (method, size), aucs in found.items():
        mean = sum(aucs) / len(aucs) if aucs else None
        ends = {"low": min(aucs, default=None), "high": max(aucs, default=None)}
        yield (method, f"{size:,}{of}", f"{len(aucs)}", number(mean), interval(ends))


def _operating_points(name: str, found: Mapping[str, Any], held_out: Mapping[str, Any]) -> Section:
    points = found["operating_points"]
    many = len({point["class"] for point in points}) > _MANY
    stated = next((point["stated"] for point in points if point["stated"]), None)
    text = [
        f"Thresholds were fixed on {held_out['validation']['images']:,} validation images; what "
        f"they do on {held_out['test']['images']:,} test images, which had no say in them. Parts: "
        f"{held_out['how']}. PPV and NPV are at the prevalence of the test images; intervals are "
        "Wilson's, of images as if each were of another patient."
    ]
    if stated:
        text.append(f"Also at a prevalence of {stated['prevalence']:g}, by Bayes' rule.")
    if many:
        text.append("Shown is Youden's rule; results.json holds the others.")
    reasons = {
        "the training images do not have both labels": found["unlearned"],
        "validation or test images do not have both labels": [
            name for name in found["undefined"] if name not in found["unlearned"]
        ],
    }
    text += [
        f"Without thresholds, because {reason}: {', '.join(names)}."
        for reason, names in reasons.items()
        if names
    ]
    at = f" at {stated['prevalence']:g}" if stated else ""
    header = ("class", "rule", "threshold", "sensitivity", "specificity", "PPV", "NPV",
              *((f"PPV{at}", f"NPV{at}") if stated else ()))  # fmt: skip
    rows = [_point(point) for point in points if point["rule"] == "youden" or not many]
    return Section(f"Operating points of {name}", " ".join(text), header, rows)


def _point(point: Mapping[str, Any]) -> Row:
    at_least = "" if point["at_least"] is None else f" ≥ {point['at_least']:g} on validation"
    threshold = "above all" if point["threshold"] is None else repr(point["threshold"])
    stated = point["stated"] or {}
    return (
        point["class"],
        "Youden" if point["rule"] == "youden" else f"{point['rule']}{at_least}",
        threshold,
        *(_share(point[key]) for key in ("sensitivity", "specificity", "ppv", "npv")),
        *(number(stated[key]) for key in ("ppv", "npv") if key in stated),
    )


def _share(found: Mapping[str, Any]) -> str:
    return "–" if found["value"] is None else f"{number(found['value'])} ({interval(found)})"


def _calibration(name: str, found: Mapping[str, Any]) -> Section:
    text = (
        "Fitted on validation images, measured on test images. ECE: expected calibration error, "
        "in 15 bins of equal width, and of equal mass; Brier: mean squared distance from the "
        "labels, over one class an image summed over the classes. Both are 0 at best. Before: "
        "only where scores are probabilities."
    )
    if left_out := sum(one["left_out"] for one in found["calibration"]):
        text += (
            f" {left_out:,} validation images are of classes that the probe could not learn, and "
            "had no say; test images of them count."
        )
    header = ("of", "method", "ECE before", "after", "ECE (mass) before", "after",
              "Brier before", "after")  # fmt: skip
    rows = [
        (
            one["of"],
            f"{one['method']} ({_parameters(one['parameters'])})",
            *(
                number(side and side[key])
                for key in ("ece", "ece_mass", "brier")
                for side in (one["before"], one["after"])
            ),
        )
        for one in found["calibration"]
    ]
    return Section(f"Calibration of {name}", text, header, rows)


def _parameters(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in values.items())
