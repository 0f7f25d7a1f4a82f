"""Every table and figure of a report as a file, for papers and slides.

DIR/export/classes.csv, .tex          one for each table
DIR/export/roc-curves-01-edema.svg    one for each picture, and .png where resvg-py is installed
DIR/export/export.json                how many there are
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsiglip_jax.data import spreadsheets
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.report import pictures
from medsiglip_jax.evaluate.report.sections import sections
from medsiglip_jax.evaluate.report.tables import Cells, ReportSection
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.pages import latex, png
from medsiglip_jax.pages.html import unthemed

FOLDER, MARKER = "export", "export.json"
_NUMBER = re.compile(r"[-+]?[\d.,]+%?")
_LONGEST = 40  # letters of a class in a file name


def export(
    folder: places.Place, results: Mapping[str, Any], scores: Scores, learned: Learned | None
) -> dict[str, int]:
    """Writes the files, instead of those of an earlier export.

    Args:
        folder: the folder of the evaluation.
        results: the content of results.json.
        scores: the scores of the images, for curves.
        learned: scores of held-out images, where anything was learned.

    Returns:
        How many `tables`, `figures` and, where they could be drawn, `png` there are.

    Raises:
        FileExistsError: the folder of the files holds something else.
    """
    place = folder / FOLDER
    if place.is_dir() and places.visible(place) and not (place / MARKER).is_file():
        raise FileExistsError(f"{place}: not empty, and not an export; move it away")
    tables = [section for section in sections(results) if section.rows]
    figures, drawn = _figures(results, scores, learned), png.installed() is not None
    counts = {"tables": len(tables), "figures": len(figures), "png": len(figures) * drawn}
    with storage.new_folder(place, overwrite=True, marker=MARKER) as partial:
        for section in tables:
            _write_table(partial, section)
        for name, svg in figures.items():
            (partial / f"{name}.svg").write_text(svg, encoding="utf-8")
            if drawn:
                (partial / f"{name}.png").write_bytes(png.render(svg))
        (partial / MARKER).write_text(dumps(counts) + "\n", encoding="utf-8")
    return counts


def _write_table(folder: Path, section: ReportSection) -> None:
    name, header = _slug(section.title), section.header
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(map(_cells, (header, *section.rows)))
    text = latex.table(header, section.rows)
    (folder / f"{name}.tex").write_text(text, encoding="utf-8")


def _cells(row: Cells) -> list[str]:
    """Cells of a .csv; a number with a sign is no formula."""
    return [cell if _NUMBER.fullmatch(cell) else spreadsheets.protect([cell])[0] for cell in row]


def _figures(results: Mapping[str, Any], scores: Scores, learned: Learned | None) -> dict[str, str]:
    """Name -> figure, as a picture of its own."""
    figures = {picture.name: picture.svg for picture in pictures.forests(results)}
    for gallery in pictures.galleries(results, scores, learned):
        for number, picture in enumerate(gallery.pictures, 1):
            name = f"{_slug(gallery.title)}-{number:02}-{_slug(picture.name)[:_LONGEST]}"
            figures[name.rstrip("-")] = picture.svg
    return {name: _alone(svg) for name, svg in figures.items()}


def _alone(figure: str) -> str:
    """The picture of a page as a file of its own."""
    svg = figure[figure.index("<svg") : figure.rindex("</svg>") + len("</svg>")]
    return unthemed(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)) + "\n"


def _slug(text: str) -> str:
    """Letters, digits and dashes of a name, for a file."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "table"
