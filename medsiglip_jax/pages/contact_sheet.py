"""Pictures on one page with captions: self-contained HTML, or PNG."""

import base64
import bisect
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from medsiglip_jax.files import places, storage
from medsiglip_jax.files.credentials import without
from medsiglip_jax.pages.html import FAINT, INK, PAPER, RULE, escape, page, paragraph, themed
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import MAX_PIXELS, UnreadableImage

SUFFIXES = (".html", ".png")
# What the first bytes of a sheet hold, so that a command knows which files are its own.
MARK = "medsiglip_jax contact sheet"
SIDE, PITCH, MARGIN, LABEL = 160, 176, 24, 40  # pixels: picture, from one to the next, page, text
PER_LINE = 8  # pictures in a line of the PNG
_GAP = PITCH - SIDE
LEADING = 17  # pixels, from one line of text to the next


@dataclass(frozen=True)
class SheetCell:
    """A picture and its caption.

    Attributes:
        content: the picture, or a text in its place; "" is the label.
        bold, label: one line each; if it is too long, its end is shown.
        notes: further lines, which are wrapped.
    """

    content: Image.Image | str
    bold: str
    label: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class SheetSection:
    """Cells in lines, right of the cell that they belong to, if there is one."""

    cells: Sequence[SheetCell]
    head: SheetCell | None = None


@dataclass(frozen=True)
class Sheet:
    """A page.

    Attributes:
        title: at the top of the HTML.
        foot: at its end.
        sections: one below the other; they are read once.
        side: maximum width and height of pictures, in pixels.
        label: height of the caption in the PNG, in pixels.
        per_line: cells in a line of the PNG, beside the head.
        exact: pictures in the HTML are PNG, which keeps their pixels, instead of JPEG.
    """

    title: str
    foot: str
    sections: Iterable[SheetSection]
    side: int = SIDE
    label: int = LABEL
    per_line: int = PER_LINE
    exact: bool = False


def draw(path: places.Given, sheet: Sheet) -> None:
    """Writes a sheet; a file that exists is replaced atomically.

    Raises:
        ValueError: the name ends in neither .html nor .png, or the PNG would be too large.
    """
    suffix = places.check_suffix(path, *SUFFIXES)
    with storage.new_file(places.at(path)) as partial:
        if suffix == ".html":
            with open(partial, "w", encoding="utf-8") as file:
                style = _style(_width(sheet))
                file.writelines(page(sheet.title, style, _body(sheet), sheet.foot, MARK))
        else:
            save_png(_canvas(sheet), partial)


def save_png(image: Image.Image, path: os.PathLike) -> None:
    """Writes a picture whose first bytes hold `MARK`."""
    software = PngInfo()
    software.add_text("Software", MARK)
    image.save(path, format="PNG", pnginfo=software)


def write(
    path: places.Given,
    results: Sequence[Mapping[str, Any]],
    images: Sequence[str] = (),
    dicom: Rules = Rules(),
    queries: Rules | None = None,
) -> None:
    """Draws a line for each query: the query on the left, then its hits with score and id.

    Images are read from the files that were embedded. A text, or an image whose file is gone, is
    shown by its id.

    Args:
        path: ends in .html or .png; replaced atomically.
        results: see `search.search`.
        images: the queries that are image files.
        dicom: how the DICOM files among the hits became pixels.
        queries: how the DICOM files among the queries become pixels; the default is `dicom`.
    """

    def section(result: Mapping[str, Any]) -> SheetSection:
        query, head = result["query"], SheetCell(result["query"], "query")
        if query in images:
            head = SheetCell(thumbnail(query, queries or dicom), "query", without(query))
        hits = [(hit["source"], f"{hit['score']:.4f}", hit["id"]) for hit in result["hits"]]
        cells = [SheetCell(thumbnail(source, dicom), score, id) for source, score, id in hits]
        return SheetSection(cells, head)

    # Lazily: a thumbnail takes 77 kB, and an HTML page is written as they are made.
    sections = map(section, results)
    draw(path, Sheet("Search", "Scores are cosines. Not a medical device.", sections))


def thumbnail(source: str, dicom: Rules) -> Image.Image | str:
    """A small picture of a source; "" if it cannot be read."""
    try:
        picture = Image.fromarray(sources.read(source, rules=dicom)[0])
    except UnreadableImage:
        return ""
    return ImageOps.contain(picture, (SIDE, SIDE), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------- HTML


def _style(side: int) -> str:
    return f"""body{{margin:24px;padding:0}}section{{display:flex;gap:16px;padding:16px 0;
border-top:1px solid {themed(RULE)}}}div{{display:flex;flex-wrap:wrap;gap:12px}}figure{{margin:0;
width:{side}px;flex:none;font-size:14px}}img,figure>p{{width:{side}px;height:{side}px;margin:0;
object-fit:contain;background:{themed(PAPER)}}}figure>p{{display:flex;align-items:center;color:{themed(FAINT)};
justify-content:center;overflow-wrap:anywhere;overflow:hidden}}
figcaption{{overflow-wrap:anywhere}}b,span{{display:block}}"""


def _body(sheet: Sheet) -> Iterator[str]:
    for section in sheet.sections:
        yield f"<section>{_figure(section.head, sheet.exact) if section.head else ''}<div>"
        yield from (_figure(cell, sheet.exact) for cell in section.cells)
        yield "</div></section>\n"


def _figure(cell: SheetCell, exact: bool) -> str:
    if isinstance(cell.content, Image.Image):
        kind, stream = "png" if exact else "jpeg", io.BytesIO()
        cell.content.save(stream, format=kind, **({} if exact else {"quality": 90}))
        data = base64.b64encode(stream.getvalue()).decode()
        alt = escape(cell.label or cell.bold)
        shown = f'<img alt="{alt}" src="data:image/{kind};base64,{data}">'
    else:
        shown = paragraph(cell.content or cell.label)
    notes = "".join(f"<span>{escape(note)}</span>" for note in cell.notes)
    caption = f"<b>{escape(cell.bold)}</b>{escape(cell.label)}{notes}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


# ----------------------------------------------------------------------------------------- PNG


def _width(sheet: Sheet) -> int:
    """Width of a cell; the captions of small pictures need room, too."""
    return max(sheet.side, SIDE)


def _canvas(sheet: Sheet) -> Image.Image:
    width, cells = _width(sheet), list(_placed(sheet))
    right = max((x for (x, _), _ in cells), default=0) + width
    bottom = max((y for (_, y), _ in cells), default=0) + width + sheet.label + _GAP
    size = right + _GAP + MARGIN, bottom + MARGIN
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"a PNG of {len(cells)} pictures would have {size[0]}x{size[1]} pixels, more than "
            f"{MAX_PIXELS}; expected fewer, or a name ending in .html"
        )
    canvas = Image.new("RGB", size, "white")
    for corner, cell in cells:
        _put(canvas, corner, cell, sheet)
    return canvas


def _placed(sheet: Sheet) -> Iterator[tuple[tuple[int, int], SheetCell]]:
    """Every cell and its upper left corner."""
    width, top = _width(sheet), MARGIN
    across, down = width + _GAP, width + sheet.label + _GAP
    for section in sheet.sections:
        left = MARGIN
        if section.head:
            yield (left, top), section.head
            left += across
        for n, cell in enumerate(section.cells):
            line, column = divmod(n, sheet.per_line)
            yield (left + column * across, top + line * down), cell
        top += max(1, -(-len(section.cells) // sheet.per_line)) * down


def _put(canvas: Image.Image, corner: tuple[int, int], cell: SheetCell, sheet: Sheet) -> None:
    (x, y), width, pen = corner, _width(sheet), ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    pen.rectangle((x, y, x + width - 1, y + width - 1), fill=PAPER)
    if isinstance(cell.content, Image.Image):
        size = cell.content.size
        canvas.paste(cell.content, (x + (width - size[0]) // 2, y + (width - size[1]) // 2))
    else:
        text = _wrapped(cell.content or cell.label, width - 12, font)[: width // LEADING]
        pen.multiline_text((x + 6, y + 6), "\n".join(text), FAINT, font)
    lines = [_end(cell.label, width, font)] if cell.label else []
    lines += [line for note in cell.notes for line in _wrapped(note, width, font)]
    pen.text((x, y + width + 2), _end(cell.bold, width, font), INK, font)
    for n, line in enumerate(lines[: sheet.label // LEADING - 1], start=1):
        pen.text((x, y + width + 2 + n * LEADING), line, FAINT, font)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Lines that fit, cut between words, or inside words that are longer than a line."""
    text, lines = " ".join(text.split()), []
    while text:
        count = _fitting(text, width, font)
        if count < len(text) and (space := text.rfind(" ", 0, count + 1)) > 0:
            count = space
        lines.append(text[:count])
        text = text[count:].lstrip()
    return lines


def _end(text: str, width: int, font: Any) -> str:
    """As much of a name as fits: its end, because that is where names differ."""
    text = " ".join(text.split())
    count = _fitting(text[::-1], width, font)
    return text if count == len(text) else "…" + text[len(text) - count + 1 :]


def _fitting(text: str, width: int, font: Any) -> int:
    """Number of characters from the start that fit, at least 1."""
    counts = range(1, min(len(text), width) + 1)
    fitting = bisect.bisect_right(counts, width, key=lambda n: font.getlength(text[:n]))
    return max(fitting, min(len(text), 1))
