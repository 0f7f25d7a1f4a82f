"""Hits as pictures on one page: HTML that needs nothing else, or PNG."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from medsiglip_jax import places, storage
from medsiglip_jax.preprocess.decode import UnreadableImage, decode
from medsiglip_jax.preprocess.files import read_bytes

SUFFIXES = (".html", ".png")
SIDE, PITCH, MARGIN, LABEL = 160, 176, 24, 40  # pixels: picture, from one to the next, page, text
PER_LINE = 8  # hits in the PNG, right of the query
INK, GREY, PAPER = "#1f2933", "#7b8794", "#eef1f4"

_STYLE = f"""body{{font:14px/1.4 system-ui,sans-serif;color:{INK};margin:24px}}
section{{display:flex;gap:16px;border-top:1px solid #cbd2d9;padding:16px 0}}
div{{display:flex;flex-wrap:wrap;gap:12px}}figure{{margin:0;width:{SIDE}px;flex:none}}
img,figure>p{{width:{SIDE}px;height:{SIDE}px;object-fit:contain;background:{PAPER};margin:0}}
figure>p{{display:flex;align-items:center;justify-content:center;overflow-wrap:anywhere;
overflow:hidden;color:{GREY}}}figcaption{{overflow-wrap:anywhere}}b{{display:block}}"""


def check(path: places.Given) -> None:
    """Raises ValueError unless the name of a sheet says what it is to be."""
    if Path(str(path)).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a name ending in {' or '.join(SUFFIXES)}")


def write(
    path: places.Given, results: Sequence[Mapping[str, Any]], images: Sequence[str] = ()
) -> None:
    """Draws a line for each query: the query at the left, then its hits with score and id.

    Images are read from where they were when embedded; in place of one that is not there any more,
    or of a text, stands its id.

    Args:
        path: ends in .html or .png; replaced in one step.
        results: of `search.search`.
        images: the queries that are image files.
    """
    check(path)
    lines = [_cells(result, images) for result in results]
    with storage.new_file(places.at(path)) as partial:
        if Path(str(path)).suffix.lower() == ".html":
            partial.write_text(_page(lines), encoding="utf-8")
        else:
            _draw(lines).save(partial, format="PNG")


def _cells(result: Mapping[str, Any], images: Sequence[str]) -> list[tuple[Any, str, str]]:
    """The query and its hits as (picture or text, bold label, label)."""
    query = result["query"]
    first = (_thumbnail(query), "query", query) if query in images else (query, "query", "")
    hits = [
        (_thumbnail(hit["source"]) or hit["id"], f"{hit['score']:.4f}", hit["id"])
        for hit in result["hits"]
    ]
    return [first, *hits]


def _thumbnail(source: str) -> Image.Image | None:
    try:
        picture = Image.fromarray(decode(read_bytes(source)))
    except UnreadableImage:
        return None
    return ImageOps.contain(picture, (SIDE, SIDE), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------- HTML


def _page(lines: Sequence[Sequence[tuple[Any, str, str]]]) -> str:
    sections = []
    for query, *hits in lines:
        figures = "".join(_figure(*cell) for cell in hits)
        sections.append(f"<section>{_figure(*query)}<div>{figures}</div></section>")
    return f"""<!doctype html><meta charset="utf-8"><title>Search</title>
<style>{_STYLE}</style><h1>Search</h1>{"".join(sections)}
<p>Scores are cosines. Not a medical device.</p>
"""


def _figure(content: Any, bold: str, label: str) -> str:
    if isinstance(content, Image.Image):
        stream = io.BytesIO()
        content.save(stream, format="JPEG", quality=90)
        data = base64.b64encode(stream.getvalue()).decode()
        shown = f'<img alt="{html.escape(label)}" src="data:image/jpeg;base64,{data}">'
    else:
        shown = f"<p>{html.escape(content or label)}</p>"
    caption = f"<figcaption><b>{html.escape(bold)}</b>{html.escape(label)}</figcaption>"
    return f"<figure>{shown}{caption}</figure>"


# ----------------------------------------------------------------------------------------- PNG


def _draw(lines: Sequence[Sequence[tuple[Any, str, str]]]) -> Image.Image:
    heights = [max(1, -(-(len(cells) - 1) // PER_LINE)) * (SIDE + LABEL + 16) for cells in lines]
    columns = 1 + max(min(PER_LINE, len(cells) - 1) for cells in lines)
    size = (2 * MARGIN + columns * PITCH, 2 * MARGIN + sum(heights))
    page = Image.new("RGB", size, "white")
    top = MARGIN
    for (query, *hits), height in zip(lines, heights, strict=True):
        _put(page, (MARGIN, top), *query)
        for n, cell in enumerate(hits):
            line, column = divmod(n, PER_LINE)
            corner = (MARGIN + (1 + column) * PITCH, top + line * (SIDE + LABEL + 16))
            _put(page, corner, *cell)
        top += height
    return page


def _put(page: Image.Image, corner: tuple[int, int], content: Any, bold: str, label: str) -> None:
    (x, y), pen = corner, ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    pen.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=PAPER)
    if isinstance(content, Image.Image):
        page.paste(content, (x + (SIDE - content.width) // 2, y + (SIDE - content.height) // 2))
    else:
        text = _wrapped(content or label, font)
        pen.multiline_text((x + 6, y + 6), text, GREY, font)
    pen.text((x, y + SIDE + 2), bold, INK, font)
    pen.text((x, y + SIDE + 19), _end(label, font), GREY, font)


def _wrapped(text: str, font: Any) -> str:
    text, lines = " ".join(text.split()), []
    while text and len(lines) < 9:
        count = _fitting(text, SIDE - 12, font)
        lines.append(text[:count])
        text = text[count:].lstrip()
    return "\n".join(lines)


def _end(text: str, font: Any) -> str:
    """As much of an id as fits: its end, which tells it from others."""
    text = " ".join(text.split())
    count = _fitting(text[::-1], SIDE, font)
    return text if count == len(text) else "…" + text[len(text) - count + 1 :]


def _fitting(text: str, width: int, font: Any) -> int:
    """Number of characters from the start that fit, at least 1."""
    counts = range(min(len(text), SIDE), 1, -1)
    return next((n for n in counts if font.getlength(text[:n]) <= width), min(len(text), 1))
