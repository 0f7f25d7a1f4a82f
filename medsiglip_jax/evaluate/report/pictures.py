"""The pictures of a report: forest plots, and galleries of a picture for each class."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.report import learning, tables
from medsiglip_jax.evaluate.results import figures
from medsiglip_jax.evaluate.scores import Scores, known
from medsiglip_jax.pages import charts

_ROWS, _END = 24, 10  # classes in a forest plot; of more, so many at each end
_SHARE = (0.0, 1.0)
_BINS = 30
_MOST_NAMED = 60  # classes of a confusion matrix; more cells could not be told apart
_ABOUT_ROC = (
    "A ring is the threshold with the highest Youden index on validation images, judged on these."
)
_ABOUT_PRECISION = "The line is the share of positives, which is what chance reaches."
_ABOUT_SCORES = "How the scores of images with and without a class are distributed."
_ABOUT_MATRIX = "Each image is called the class of its highest score."
_ABOUT_SEEDS = (
    "Lines are means over seeds, whiskers the lowest and the highest, all on the same images."
)
_ABOUT_SELECTIVE = (
    "Accuracy of the most confident answers by the share of images that get one. It rises to the "
    "left where confidence tells right answers from wrong ones."
)
_ABOUT_CALIBRATION = (
    "Observed share of positives by predicted probability, on images that calibration did not "
    "see; the area of a dot is the number of images. ECE: expected calibration error."
)


@dataclass(frozen=True)
class Picture:
    """A figure and what it is of, by which its file is named."""

    name: str
    svg: str


@dataclass(frozen=True)
class Gallery:
    """Pictures of one kind below a heading; without pictures it is left out."""

    title: str
    pictures: Sequence[Picture]
    text: str = ""


def galleries(results: Mapping[str, Any], scores: Scores, learned: Learned | None) -> list[Gallery]:
    """All pictures beside the forest plots.

    Args:
        results: the content of results.json.
        scores: the scores of all images.
        learned: scores of the held-out images, where anything was learned.
    """

    def draw(one) -> list[Picture]:
        return _of_classes(one, results, scores, learned)

    drawn = [
        Gallery("ROC curves", draw(_roc), _ABOUT_ROC if learned else ""),
        Gallery("Precision and recall", draw(_precision), _ABOUT_PRECISION),
        Gallery("Scores", draw(_histogram), _ABOUT_SCORES),
        Gallery("Confusion", list(_matrices(results, scores, learned)), _ABOUT_MATRIX),
        Gallery("Learning", list(_learning(results)), _ABOUT_SEEDS),
        *_calibration(results),
        *_selective(results),
    ]
    return [gallery for gallery in drawn if gallery.pictures]


# ----------------------------------------------------------------------------------- forest plots


def forests(results: Mapping[str, Any]) -> list[Picture]:
    """AUCs of classes and means; of many classes the highest and the lowest, and then all."""
    classes = results["classes"]
    if len(classes) <= _ROWS:
        return _drawn(Picture("auc", _forest("AUC", results, classes)))
    ordered = sorted((c for c in classes if c["auc"] is not None), key=lambda c: -c["auc"])
    title = f"AUC: the {_END} highest and the {_END} lowest of {len(classes)}"
    ends = _forest(title, results, [*ordered[:_END], *ordered[-_END:]])
    return _drawn(Picture("auc", ends), Picture("auc-all", _forest("AUC", results, ordered)))


def _drawn(*pictures: Picture) -> list[Picture]:
    return [picture for picture in pictures if picture.svg]


def _forest(title: str, results: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> str:
    rows = [_estimate(tables.starred(c), c, faint=c["few"]) for c in classes]
    means = {"mean": results["macro_auc"], **results["means"]}
    rows += [_estimate(name, mean, summary=True) for name, mean in means.items() if mean]
    return charts.forest(title, rows, charts.Axis("AUC", (0.5, 1.0)), "published")


def _estimate(name: str, row: Mapping[str, Any], **style: bool) -> charts.Estimate:
    return charts.Estimate(name, row["auc"], row["low"], row["high"], row["published"], **style)


# ------------------------------------------------------------------------------- for each class


def _of_classes(draw, results: Mapping[str, Any], scores: Scores, learned) -> list[Picture]:
    """A picture of each class that has an AUC, drawn from the scores of each kind."""
    sides = {"": scores}
    if learned:
        sides = {"zero-shot": learned.zero_shot}
        sides |= {} if learned.probe is None else {"probe": learned.probe}
    pictures = []
    for j, row in enumerate(results["classes"]):
        if row["auc"] is not None:
            title = f"{tables.number(row['auc'])} {row['class']}"  # a long name may be cut
            rows = {name: known(side, j) for name, side in sides.items()}
            rows = {name: side for name, side in rows.items() if _both(side)}
            pictures += _drawn(Picture(row["class"], draw(title, row["class"], rows, results)))
    return pictures


def _both(rows: metrics.Known) -> bool:
    return bool(rows.positive.any()) and not rows.positive.all()


def _roc(title: str, name: str, sides: Mapping[str, metrics.Known], results: Mapping) -> str:
    series = []
    for side, rows in sides.items():
        curve = metrics.roc_curve(rows.scores, rows.positive)
        points = _pairs(curve.false_positive_rate, curve.true_positive_rate)
        label = f"{side} {tables.number(metrics.auc(rows.scores, rows.positive))}" if side else ""
        series.append(charts.Series(label, points, rings=_operating_point(results, side, name)))
    axes = charts.Axis("1 − specificity", _SHARE), charts.Axis("sensitivity", _SHARE)
    return charts.lines(title, series, *axes, square=True, diagonal=True)


def _operating_point(results: Mapping, side: str, name: str) -> list[tuple[float, float]]:
    """The point of the threshold that Youden's rule chose on validation images."""
    judged = (results.get("held_out") or {}).get(side.replace("-", "_")) or {}
    return [
        (1 - point["specificity"]["value"], point["sensitivity"]["value"])
        for point in judged.get("operating_points", ())
        if (point["class"], point["rule"]) == (name, "youden")
        and None not in (point["specificity"]["value"], point["sensitivity"]["value"])
    ]


def _precision(title: str, name: str, sides: Mapping[str, metrics.Known], results: Mapping) -> str:
    series, shares = [], []
    for side, rows in sides.items():
        positives = int(rows.positive.sum())
        curve = metrics.roc_curve(rows.scores, rows.positive)
        right = curve.true_positive_rate[1:] * positives
        called = right + curve.false_positive_rate[1:] * (len(rows.positive) - positives)
        points = _pairs(curve.true_positive_rate[1:], right / called)
        precision = tables.number(metrics.average_precision(rows.scores, rows.positive))
        series.append(charts.Series(f"{side} AP {precision}".strip(), points))
        shares.append(positives / len(rows.positive))
    axes = charts.Axis("recall", _SHARE), charts.Axis("precision", _SHARE)
    levels = {"chance": shares[0]} if shares else None
    return charts.lines(name, series, *axes, square=True, levels=levels)


def _histogram(title: str, name: str, sides: Mapping[str, metrics.Known], results: Mapping) -> str:
    """Of the scores that were evaluated, not of the probe's, which are on another scale."""
    if not sides:
        return ""
    rows = next(iter(sides.values()))
    edges = np.linspace(rows.scores.min(), rows.scores.max(), _BINS + 1)
    if edges[0] == edges[-1]:
        return ""
    series = []
    for label, chosen in (("without", ~rows.positive), ("with", rows.positive)):
        shares = np.histogram(rows.scores[chosen], edges)[0] / chosen.sum()
        corners = np.repeat(edges, 2)[1:-1]
        series.append(charts.Series(label, _pairs(corners, np.repeat(shares, 2))))
    axes = charts.Axis("score", (float(edges[0]), float(edges[-1]))), charts.Axis("share")
    return charts.lines(name, series, *axes, square=True)


def _pairs(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(x.tolist(), y.tolist(), strict=True))


# ---------------------------------------------------------------------------------- whole task


def _matrices(
    results: Mapping[str, Any], scores: Scores, learned: Learned | None
) -> Iterator[Picture]:
    if results["one_class_each"] is None or len(scores.classes) > _MOST_NAMED:
        return
    sides = {tables.scores_of(results): scores}
    if learned and learned.probe is not None:  # of the same images, where some were held out
        sides = {tables.scores_of(results): learned.zero_shot, "the probe's scores": learned.probe}
    for name, side in sides.items():
        values, _, labels = figures.one_class(side)
        count = len(side.classes)
        called = np.where(np.isnan(values), -np.inf, values).argmax(axis=1)
        counts = np.zeros((count, count), int)
        np.add.at(counts, (labels, called), 1)
        yield Picture(f"confusion {name}", charts.matrix(name, side.classes, counts.tolist()))


def _learning(results: Mapping[str, Any]) -> Iterator[Picture]:
    """Macro AUC of probes by how much they were fitted to."""
    probe = results.get("probe")
    if not probe:
        return
    zero_shot, published = probe["zero_shot_macro"]["auc"], probe["macro_auc"].get("published")
    levels = {"zero-shot": zero_shot, "published probe": published}
    levels = {f"{k} {tables.number(v)}": v for k, v in levels.items() if v is not None}
    for title, key, n, label in (
        ("Learning curve: macro AUC", "learning_curve", "n", "training images"),
        ("Few-shot: macro AUC", "few_shot", "shots", "training images of each class"),
    ):
        series = _by_method(probe.get(key) or (), n)
        axes = charts.Axis(label, log=True), charts.Axis("AUC")
        drawn = charts.lines(title, series, *axes, levels=levels)
        yield from _drawn(Picture(key, drawn))


def _by_method(rows: Sequence[Mapping[str, Any]], n: str) -> list[charts.Series]:
    """A line for each method: means over seeds, whiskers from the lowest to the highest."""
    methods: dict[str, list[tuple[int, list[float]]]] = {}
    for (method, size), aucs in learning.draws(rows, n).items():
        methods.setdefault(method, []).extend([(size, aucs)] if aucs else [])
    series = []
    for method, sizes in methods.items():
        means = [(x, float(np.mean(aucs))) for x, aucs in sorted(sizes)]
        ends = [(x, min(aucs), max(aucs)) for x, aucs in sorted(sizes) if len(aucs) > 1]
        series.append(charts.Series(method, means, ends, dots=True))
    return series


def _judged(results: Mapping[str, Any], rows: str) -> Iterator[tuple[str, Sequence[Mapping]]]:
    """What is known of held-out images, by whose scores they have."""
    held_out = results.get("held_out") or {}
    own = tables.scores_of(results)
    for key, name in (("zero_shot", own), ("probe", "the probe's scores")):
        yield name, (held_out.get(key) or {}).get(rows, ())


def _calibration(results: Mapping[str, Any]) -> Iterator[Gallery]:
    for name, rows in _judged(results, "calibration"):
        drawn = [Picture(row["of"], _reliability(row)) for row in rows]
        yield Gallery(f"Reliability of {name}", _drawn(*drawn), _ABOUT_CALIBRATION)


def _selective(results: Mapping[str, Any]) -> Iterator[Gallery]:
    for name, rows in _judged(results, "selective"):
        drawn = [Picture(row["of"], _coverage(row)) for row in rows]
        yield Gallery(f"Accuracy against coverage of {name}", _drawn(*drawn), _ABOUT_SELECTIVE)


def _coverage(row: Mapping[str, Any]) -> str:
    points = list(zip(row["curve"]["coverage"], row["curve"]["accuracy"], strict=True))
    label = f"AURC {tables.number(row['aurc']['value'])}"
    axes = charts.Axis("coverage", _SHARE), charts.Axis("accuracy")
    return charts.lines(row["of"], [charts.Series(label, points)], *axes, square=True)


def _reliability(row: Mapping[str, Any]) -> str:
    series = []
    for name in ("before", "after"):
        if (side := row[name]) is not None:
            curve = side["curve"]
            points = list(zip(curve["predicted"], curve["observed"], strict=True))
            label = f"{name}, ECE {tables.number(side['ece'])}"
            series.append(charts.Series(label, points, weights=curve["rows"]))
    axes = charts.Axis("predicted", _SHARE), charts.Axis("observed", _SHARE)
    return charts.lines(row["of"], series, *axes, square=True, diagonal=True)
