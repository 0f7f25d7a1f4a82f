"""report.md and report.html: the tables of `sections`, and pictures of the same numbers."""

from collections.abc import Mapping
from typing import Any

from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.report import pictures, tables
from medsiglip_jax.evaluate.report.sections import sections
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.pages import html
from medsiglip_jax.pages.html import themed

_STYLE = f"""body{{max-width:1080px}}figure{{display:inline-block;margin:8px 12px 12px 0;
vertical-align:top;max-width:100%}}div{{overflow-x:auto}}
td+td:not(:last-child){{white-space:nowrap}}td:nth-child(2):last-child{{overflow-wrap:anywhere}}
summary{{cursor:pointer;color:{themed(html.LINK)}}}header{{display:flex;flex-wrap:wrap;gap:0 32px}}
header>*{{flex:1 1 320px}}header>figure{{flex:0 1 auto;margin-top:32px}}"""
_OPEN = 16  # pictures of one kind; more are folded away


def markdown(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    return tables.markdown(results["title"], sections(results))


def page(results: Mapping[str, Any], scores: Scores, learned: Learned | None = None) -> str:
    """The report as one HTML page that needs nothing else.

    Args:
        results: the content of results.json.
        scores: the scores of the images, for curves.
        learned: scores of held-out images, where anything was learned.
    """
    parts = []
    for section in sections(results):
        if section.title == "Result":
            overview, *more = pictures.forests(results) or [pictures.Picture("", "")]
            parts.append(f"<header><div>{_section(section)}</div>{overview.svg}</header>")
            parts += [_folded(f"All {len(results['classes'])} classes", p.svg) for p in more]
        else:
            parts.append(_section(section))
        if section.title == "Classes":
            parts += map(_gallery, pictures.galleries(results, scores, learned))
    return "".join(html.page(results["title"], _STYLE, parts, tables.CAUTION))


def _section(section: tables.ReportSection) -> str:
    table = f"<div>{html.table(section.rows, section.header)}</div>" if section.rows else ""
    return f"<h2>{html.escape(section.title)}</h2>{html.paragraph(section.text)}{table}\n"


def _gallery(gallery: pictures.Gallery) -> str:
    """Pictures below a heading; many are folded away."""
    shown = "".join(picture.svg for picture in gallery.pictures)
    if len(gallery.pictures) > _OPEN:
        shown = _folded(f"{len(gallery.pictures)} pictures", shown)
    return f"<h2>{html.escape(gallery.title)}</h2>{html.paragraph(gallery.text)}{shown}\n"


def _folded(summary: str, shown: str) -> str:
    return f"<details><summary>{summary}</summary>{shown}</details>\n"
