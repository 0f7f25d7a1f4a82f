"""The report of a check: a page, JSON for a dashboard, and text for Prometheus.

DIR/report.html     what alarms, over time, and the most unusual images
DIR/metrics.prom    of the last window
DIR/monitor.json    everything, last
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.credentials import without
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.pages import charts, contact_sheet, html
from medsiglip_jax.pages.charts import Axis, Series
from medsiglip_jax.pages.html import escape, themed
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.trust import folders

PAGE, METRICS, MARKER = "report.html", "metrics.prom", "monitor.json"
_CAUTION = (
    "An alarm says that images differ from the reference, not that results are wrong, and "
    "results may be wrong without one. Not a medical device."
)
_DRAWN = 4  # lines of a picture, which can be told apart in the dark, too
_SAID = {
    "mmd": "maximum mean discrepancy of the embeddings",
    "mahalanobis": "Mahalanobis distances from the reference (Anderson-Darling)",
    "knn": "distances to the fifth nearest image of the reference (Anderson-Darling)",
    "zero_shot": "zero-shot scores, the most different text (Kolmogorov-Smirnov)",
    "zero_shot_label": "how often each text fits best (chi-squared)",
    "probe": "scores of the probe, the most different class (Kolmogorov-Smirnov)",
    "probe_label": "how often each class is the likeliest (chi-squared)",
    "disagreement": "how often probe and zero-shot scores name different labels (chi-squared)",
    "unreadable": "share of files that cannot be read",
    "auc": "by how much the AUC is lower, the most different class",
    "calibration": "by how much labels minus probabilities differ in the mean",
}
_DESCRIBED = {
    "psi": "population stability index of the Mahalanobis distances",
    "frechet": "squared Fréchet distance of the embeddings",
    "unlike_reference": "images further from the reference than 99 % of its own",
    "disagreement": "probe and zero-shot scores name different labels",
}
_STYLE = f"""body{{max-width:1080px}}figure{{display:inline-block;margin:8px 12px 12px 0;
vertical-align:top;max-width:100%}}div{{overflow-x:auto}}td+td{{white-space:nowrap}}
.alarm{{border-left:4px solid #d55e00;padding-left:12px}}
.calm{{border-left:4px solid #009e73;padding-left:12px}}
.sheet{{display:flex;flex-wrap:wrap;gap:12px}}.sheet figure{{width:160px;margin:0;font-size:13px}}
.sheet img,.sheet figure>p{{width:160px;height:160px;margin:0;object-fit:contain;
background:{themed(html.PAPER)}}}.sheet figure>p{{display:flex;align-items:center;
justify-content:center;color:{themed(html.FAINT)}}}
figcaption{{overflow-wrap:anywhere}}figcaption b{{display:block}}"""


def check_folder(folder: places.Given) -> None:
    """Raises FileExistsError if a folder holds anything but an earlier report, all of which `write`
    would remove."""
    place = places.at(folder)
    folders.check(place, _own(place), "monitor check", "choose a new folder")


def _own(folder: places.Place) -> set[str]:
    """Names of the files of an earlier report in a folder."""
    try:
        record = json_files.read(folder / MARKER)
        return {PAGE, METRICS, MARKER} if record.keys() >= {"alarm", "strata"} else set()
    except (OSError, ValueError, AttributeError):
        return set()


def write(folder: places.Given, result: Mapping[str, Any], dicom: Rules = Rules()) -> None:
    """Writes a report, instead of an earlier one.

    Args:
        folder: the folder of the report.
        result: what `check.check` returned.
        dicom: how DICOM files of the run became pixels, for its pictures.
    """
    check_folder(folder)
    with storage.new_folder(places.at(folder), overwrite=True, marker=MARKER) as partial:
        with open(partial / PAGE, "w", encoding="utf-8") as file:
            file.writelines(page(result, dicom))
        (partial / METRICS).write_text(prometheus(result), encoding="utf-8")
        (partial / MARKER).write_text(dumps(result, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ page


def page(result: Mapping[str, Any], dicom: Rules) -> Iterator[str]:
    """The report as one HTML page that needs nothing else."""
    title = "Something has changed" if result["alarm"] else "No change was found"
    parts = [
        f'<p class="{"alarm" if result["alarm"] else "calm"}">{escape(_summary(result))}</p>',
        *_timeline(result),
        *_tests(result),
        *_described(result),
        _sheet(result, dicom),
        *_notes(result),
    ]
    return html.page(title, _STYLE, parts, _CAUTION, "medsiglip_jax monitor")


def _summary(result: Mapping[str, Any]) -> str:
    known, windows = result["reference"], [w for w in result["windows"] if w["strata"]]
    alarms = [window["name"] for window in windows if window["alarm"]]
    of = f"{result['images']:,} images against a reference of {known['images']:,}"
    if len(windows) == 1:
        ending = f"; {', '.join(_alarms(windows[0]))} alarm." if alarms else "; no test alarms."
        return of + ending
    chance = f"By chance about {result['level'] * len(windows):.1f} would."
    said = f"{len(alarms)} of {len(windows)} windows alarm: {', '.join(alarms)}. {chance}"
    return f"{of}; {said if alarms else 'no window alarms.'}"


def _last(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last window that was tested."""
    return next(window for window in result["windows"] if window["name"] == result["window"])


def _alarms(window: Mapping[str, Any]) -> list[str]:
    """The tests that alarm, with the stratum where that is not all images."""
    return [
        test if stratum == "all" else f"{test} ({stratum})"
        for stratum, tests in window["strata"].items()
        for test, verdict in tests.items()
        if verdict["alarm"]
    ]


def _timeline(result: Mapping[str, Any]) -> Iterator[str]:
    """A picture for each stratum: the statistic of each test as a multiple of its threshold."""
    windows = [w for w in result["windows"] if w["name"] != "whole run"]
    if len(windows) < 2:
        return
    yield "<h2>Over time</h2>" + html.paragraph(
        "Each statistic divided by its threshold: above 1 the test alarms, which the ring marks. "
        f"Of each stratum the {_DRAWN} tests that came nearest to an alarm are drawn. "
        "Windows are numbered from the first, "
        f"{windows[0]['name']}, to the last, {windows[-1]['name']}."
    )
    for stratum in _strata(windows):
        names = dict.fromkeys(t for w in windows for t in w["strata"].get(stratum, {}))
        series = [_series(name, stratum, windows) for name in names]
        nearest = sorted(series, key=_highest, reverse=True)[:_DRAWN]
        series = [line for line in series if line in nearest]
        yield charts.lines(
            stratum, series, Axis("window", (0, len(windows) + 1)), Axis("statistic / threshold"),
            levels={"threshold": 1.0},
        )  # fmt: skip


def _highest(series: Series) -> float:
    return max((share for _, share in series.points if share is not None), default=0.0)


def _series(test: str, stratum: str, windows: list[Mapping[str, Any]]) -> Series:
    points, rings = [], []
    for number, window in enumerate(windows, start=1):
        verdict = window["strata"].get(stratum, {}).get(test)
        share = verdict and _of_threshold(verdict)
        if share is not None:
            points.append((number, share))
            rings += [(number, share)] * verdict["alarm"]
    return Series(test, points, dots=True, rings=rings)


def _of_threshold(verdict: Mapping[str, Any]) -> float | None:
    """The statistic as a multiple of its threshold; None where that has no meaning."""
    threshold = verdict["threshold"]
    if not (math.isfinite(threshold) and threshold > 0):
        return None
    return max(0.0, verdict["statistic"] / threshold)  # an unbiased MMD may be below 0


def _strata(windows: list[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for window in windows for name in window["strata"]))


def _tests(result: Mapping[str, Any]) -> Iterator[str]:
    """The tests of the last window, the nearest to an alarm first, and alarms before it."""
    last, earlier = _last(result), [w for w in result["windows"] if w["name"] != result["window"]]
    title = f"Tests of the last window, {last['name']}" if earlier else "Tests"
    yield f"<h2>{escape(title)}</h2>"
    yield html.paragraph(
        "Thresholds are those that windows of the reference of the same size exceed rarely enough "
        f"that one in control alarms in any test with a probability of at most {result['level']:g}."
    )
    header = ("test", "stratum", "statistic", "threshold", "p", "alarm")
    rows = [
        (_said(test), stratum, _number(v["statistic"]), _number(v["threshold"]), f"{v['p']:.4f}",
         "ALARM" if v["alarm"] else "")
        for stratum, tests in last["strata"].items()
        for test, v in sorted(tests.items(), key=lambda item: item[1]["p"])
    ]  # fmt: skip
    yield f"<div>{html.table(rows, header)}</div>"
    alarmed = [(w["name"], ", ".join(_alarms(w))) for w in earlier if w["alarm"]]
    if alarmed:
        yield "<h2>Other alarms</h2>" + f"<div>{html.table(alarmed, ('window', 'tests'))}</div>"


def _said(test: str) -> str:
    column = test.removeprefix("metadata:")
    return f"{test}: {_SAID.get(test) or f'how often each value of {column} occurs (chi-squared)'}"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _described(result: Mapping[str, Any]) -> Iterator[str]:
    """Figures of the last window without a threshold."""
    described = _last(result)["described"]
    yield "<h2>Described, not tested</h2>" + html.paragraph(
        "These figures depend on the number of images, so that no limit fits them all: compare "
        "them between windows of equal size."
    )
    rows = [
        (said, f"{described[name]:.1%}" if name in ("unlike_reference", "disagreement") else
         _number(described[name]))
        for name, said in _DESCRIBED.items() if name in described
    ]  # fmt: skip
    yield f"<div>{html.table(rows)}</div>"
    if classes := described.get("classes"):
        header = ("class", "AUC", "95 % interval", "calibration error", "positives", "labels")
        rows = [
            (name, _number(c["auc"]), f"{_number(c['low'])} to {_number(c['high'])}",
             _number(c.get("calibration_error", math.nan)), f"{c['positives']:,}",
             f"{c['labels']:,}")
            for name, c in classes.items()
        ]  # fmt: skip
        yield f"<div>{html.table(rows, header)}</div>"


def _sheet(result: Mapping[str, Any], dicom: Rules) -> str:
    """The images that are furthest from the reference, as small pictures."""
    figures = "".join(_figure(row, dicom) for row in result["unusual"])
    said = html.paragraph(
        "Those furthest from the reference by Mahalanobis distance. p: the share of images of the "
        "reference that are as far."
    )
    return f'<h2>Most unusual images</h2>{said}<div class="sheet">{figures}</div>'


def _figure(row: Mapping[str, Any], dicom: Rules) -> str:
    try:
        content = contact_sheet.thumbnail(row["source"], dicom)
    except (OSError, ModuleNotFoundError):  # a report without a picture is better than none
        content = ""
    shown = "<p>cannot be read</p>"
    if isinstance(content, Image.Image):
        stream = io.BytesIO()
        content.save(stream, format="jpeg", quality=90)
        data = base64.b64encode(stream.getvalue()).decode()
        shown = f'<img alt="{escape(row["id"])}" src="data:image/jpeg;base64,{data}">'
    caption = f"<b>{row['distance']:.4g}, p {row['p']:.3g}</b>{escape(without(row['id']))}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    if result["notes"]:
        yield "<h2>Not tested</h2>" + "".join(map(html.paragraph, result["notes"]))
    rows = [(name.replace("_", " "), str(value)) for name, value in result["reference"].items()]
    yield f"<h2>Reference</h2><div>{html.table(rows)}</div>"


# ------------------------------------------------------------------------------------ other forms


def text(result: Mapping[str, Any], folder: str) -> str:
    """What the command prints."""
    return f"{folder}: {'ALARM' if result['alarm'] else 'no alarm'}; {_summary(result)}"


_PROMETHEUS = {
    "alarm": "Whether the test alarms, 1 or 0.",
    "statistic": "How far the images of the last window are from the reference.",
    "threshold": "What the statistic has to exceed for an alarm.",
    "p": "Share of windows in control that are as far from the reference.",
}


def prometheus(result: Mapping[str, Any]) -> str:
    """The last window in the text format of Prometheus, for the textfile collector."""
    name = "medsiglip_jax_monitor"
    lines = [
        f"# HELP {name}_any_alarm Whether any test of any window alarms, 1 or 0.",
        f"# TYPE {name}_any_alarm gauge", f"{name}_any_alarm {int(result['alarm'])}",
        f"# HELP {name}_images Images of the last window.", f"# TYPE {name}_images gauge",
    ]  # fmt: skip
    for stratum, rows in result["rows"].items():
        lines.append(f'{name}_images{{stratum="{_label(stratum)}"}} {rows}')
    for key, help in _PROMETHEUS.items():
        lines += [f"# HELP {name}_{key} {help}", f"# TYPE {name}_{key} gauge"]
        for stratum, tests in result["strata"].items():
            for test, verdict in tests.items():
                labels = f'stratum="{_label(stratum)}",test="{_label(test)}"'
                lines.append(f"{name}_{key}{{{labels}}} {_value(verdict[key])}")
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _value(value: float | bool) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if math.isnan(value):
        return "NaN"
    return f"{value!r}" if math.isfinite(value) else "+Inf"
