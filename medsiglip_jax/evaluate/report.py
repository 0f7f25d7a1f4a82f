"""report.md and report.html: the tables of `sections`, and ROC curves."""

import html
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.results import known
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.sections import Row, Section, number, sections

_CAUTION = "Not a medical device. Scores are not probabilities of disease."
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:1080px;margin:32px auto;
padding:0 16px}h1{font-size:24px}h2{font-size:18px;margin-top:32px}figure{display:inline-block;
margin:4px}div{overflow-x:auto}table{border-collapse:collapse;margin:12px 0;font-size:14px}
td,th{padding:3px 14px 3px 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{color:#616e7c;font-weight:500}tr+tr td{border-top:1px solid #e4e7eb}
text{font-size:12px;fill:#616e7c}"""
_SIDE, _MARGIN = 200, 24
_POINTS = 200  # of a curve, more than there are pixels


def markdown(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# {results['title']}"]
    for section in sections(results):
        table = [section.header, ["---"] * len(section.header), *section.rows]
        lines = [f"| {' | '.join(_cell(c) for c in row)} |" for row in table if section.rows]
        parts += [f"## {section.title}", section.text, "\n".join(lines)]
    return "\n\n".join(part for part in [*parts, _CAUTION] if part) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def page(results: Mapping[str, Any], scores: Scores) -> str:
    """The report as one HTML page that needs nothing else."""
    title, parts = html.escape(results["title"]), []
    for section in sections(results):
        parts.append(_section(section))
        if section.title == "Classes":
            parts.append(f"<h2>ROC curves</h2>{''.join(_curves(results, scores))}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style><h1>{title}</h1>\n{''.join(parts)}<p>{_CAUTION}</p></html>\n"
    )


def _section(section: Section) -> str:
    text = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    rows = [_row("th", section.header), *(_row("td", row) for row in section.rows)]
    table = f"<div><table>{''.join(rows)}</table></div>" if section.rows else ""
    return f"<h2>{html.escape(section.title)}</h2>{text}{table}\n"


def _row(tag: str, cells: Row) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}' for cell in cells)}"


def _curves(results: Mapping[str, Any], scores: Scores) -> Iterator[str]:
    for j, found in enumerate(results["classes"]):
        if found["auc"] is not None:
            rows = known(scores, j)
            curve = metrics.roc_curve(rows.scores, rows.positive)
            yield _curve(f"{found['class']} {number(found['auc'])}", curve)


def _curve(title: str, curve: metrics.Roc) -> str:
    """An SVG figure; x is 1 - specificity, y sensitivity."""
    x, y = curve.false_positive_rate, curve.true_positive_rate
    shown = np.unique(np.linspace(0, len(x) - 1, _POINTS).round().astype(int))
    points = " ".join(map(_point, x[shown].tolist(), y[shown].tolist()))
    title = html.escape(title)
    return f"""<figure><svg width="{_SIDE + 2 * _MARGIN}" height="{_SIDE + 2 * _MARGIN}" role="img"
aria-label="ROC curve of {title}"><text x="{_MARGIN}" y="15" style="fill:#1f2933">{title}</text>
<path d="M{_MARGIN} {_MARGIN}h{_SIDE}v{_SIDE}h-{_SIDE}zM{_MARGIN} \
{_MARGIN + _SIDE}l{_SIDE}-{_SIDE}" fill="none" stroke="#cbd2d9"/>
<polyline fill="none" stroke="#0b7285" stroke-width="1.8" points="{points}"/>
<text x="{_MARGIN}" y="{_SIDE + 2 * _MARGIN - 6}">1 - specificity</text>
<text x="{_MARGIN - 8}" y="{_MARGIN + _SIDE}" transform="rotate(-90 {_MARGIN - 8} \
{_MARGIN + _SIDE})">sensitivity</text></svg></figure>"""


def _point(x: float, y: float) -> str:
    return f"{_MARGIN + _SIDE * x:.1f},{_MARGIN + _SIDE * (1 - y):.1f}"
