"""report.md and report.html: the tables of `sections`, and pictures of the same numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.report import learning, tables
from medsiglip_jax.evaluate.report.sections import sections
from medsiglip_jax.evaluate.scores import Scores, known
from medsiglip_jax.pages import charts, html

_STYLE = """body{max-width:1080px}figure{display:inline-block;margin:8px 12px 12px 0;
vertical-align:top;max-width:100%}div{overflow-x:auto}td+td:not(:last-child){white-space:nowrap}
td:nth-child(2):last-child{overflow-wrap:anywhere}summary{cursor:pointer;color:#0072b2}
header{display:flex;flex-wrap:wrap;gap:0 32px}header>*{flex:1 1 320px}
header>figure{flex:0 1 auto;margin-top:32px}"""
_OPEN = 16  # pictures of one kind; more are folded away
_ROWS, _END = 24, 10  # classes in a forest plot; of more, so many at each end
_SHARE = (0.0, 1.0)
_ABOUT_SEEDS = (
    "Lines are means over seeds, whiskers the lowest and the highest, all on the same images."
)
_ABOUT_CALIBRATION = (
    "Observed share of positives by predicted probability, on images that calibration did not "
    "see; the area of a dot is the number of images. ECE: expected calibration error."
)


def markdown(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    return tables.markdown(results["title"], sections(results))


def page(results: Mapping[str, Any], scores: Scores) -> str:
    """The report as one HTML page that needs nothing else.

    Args:
        results: the content of results.json.
        scores: of the images, for ROC curves.
    """
    parts = []
    for section in sections(results):
        if section.title == "Result":
            overview, every_class = _forests(results)
            parts.append(f"<header><div>{_section(section)}</div>{overview}</header>{every_class}")
        else:
            parts.append(_section(section))
        if section.title == "Classes":
            parts.append(_gallery("ROC curves", list(_roc_curves(results, scores))))
            parts.append(_gallery("Learning", list(_learning(results)), _ABOUT_SEEDS))
            parts += _calibration(results)
    return "".join(html.page(results["title"], _STYLE, parts, tables.CAUTION))


def _section(section: tables.ReportSection) -> str:
    table = f"<div>{html.table(section.rows, section.header)}</div>" if section.rows else ""
    return f"<h2>{html.escape(section.title)}</h2>{html.paragraph(section.text)}{table}\n"


def _gallery(title: str, figures: Sequence[str], text: str = "") -> str:
    """Pictures below a heading; many are folded away."""
    if not any(figures):
        return ""
    shown = "".join(figures)
    if len(figures) > _OPEN:
        shown = f"<details><summary>{len(figures)} pictures</summary>{shown}</details>"
    return f"<h2>{html.escape(title)}</h2>{html.paragraph(text)}{shown}\n"


# ----------------------------------------------------------------------------------- forest plots


def _forests(results: Mapping[str, Any]) -> tuple[str, str]:
    """AUCs of classes and means; of many classes the highest and the lowest, and all, folded."""
    classes = results["classes"]
    if len(classes) <= _ROWS:
        return _forest("AUC", results, classes), ""
    ordered = sorted((c for c in classes if c["auc"] is not None), key=lambda c: -c["auc"])
    title = f"AUC: the {_END} highest and the {_END} lowest of {len(classes)}"
    ends, drawn = [*ordered[:_END], *ordered[-_END:]], _forest("AUC", results, ordered)
    folded = f"<details><summary>All {len(classes)} classes</summary>{drawn}</details>\n"
    return _forest(title, results, ends), folded


def _forest(title: str, results: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> str:
    rows = [_estimate(tables.starred(c), c, faint=c["few"]) for c in classes]
    means = {"mean": results["macro_auc"], **results["means"]}
    rows += [_estimate(name, mean, summary=True) for name, mean in means.items() if mean]
    return charts.forest(title, rows, charts.Axis("AUC", (0.5, 1.0)), "published")


def _estimate(name: str, row: Mapping[str, Any], **style: bool) -> charts.Estimate:
    return charts.Estimate(name, row["auc"], row["low"], row["high"], row["published"], **style)


# ----------------------------------------------------------------------------------------- curves


def _roc_curves(results: Mapping[str, Any], scores: Scores) -> Iterator[str]:
    for j, row in enumerate(results["classes"]):
        if row["auc"] is not None:
            rows = known(scores, j)
            curve = metrics.roc_curve(rows.scores, rows.positive)
            x, y = curve.false_positive_rate.tolist(), curve.true_positive_rate.tolist()
            title = f"{tables.number(row['auc'])} {row['class']}"  # a long name may be cut
            series = [charts.Series("", list(zip(x, y, strict=True)))]
            axes = charts.Axis("1 − specificity", _SHARE), charts.Axis("sensitivity", _SHARE)
            yield charts.lines(title, series, *axes, square=True, diagonal=True)


def _learning(results: Mapping[str, Any]) -> Iterator[str]:
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
        yield charts.lines(title, series, charts.Axis(label, log=True), levels=levels)


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


def _calibration(results: Mapping[str, Any]) -> Iterator[str]:
    held_out = results.get("held_out") or {}
    own = tables.scores_of(results)
    for key, name in (("zero_shot", own), ("probe", "the probe's scores")):
        rows = (held_out.get(key) or {}).get("calibration", ())
        yield _gallery(f"Reliability of {name}", [*map(_reliability, rows)], _ABOUT_CALIBRATION)


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
