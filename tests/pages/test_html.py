"""The frame of all pages: well-formed enough for a browser, escaped, nothing from elsewhere."""

import importlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import source_files

from medsiglip_jax.inference import heatmap
from medsiglip_jax.pages import charts, contact_sheet, html
from medsiglip_jax.train import quickstart
from medsiglip_jax.trust import overlay

NASTY = "<script>alert('x')</script> & \"quoted\""


def test_whatever_is_text_stays_text():
    body = [html.paragraph(NASTY), html.table([(NASTY, "b")], (NASTY, "c")), html.paragraph("")]
    page = "".join(html.page(NASTY, "", body, NASTY))
    seen, tags = [], []

    class Reader(HTMLParser):
        def handle_data(self, data):
            seen.append(data)

        def handle_starttag(self, tag, attrs):
            tags.append(tag)

    Reader().feed(page)
    assert seen.count(NASTY) == 6 and "script" not in tags  # title, heading, body, caution
    assert tags.count("p") == 2 and not re.search(r"(src|href)=|url\(|@import", page)
    assert page.startswith('<!doctype html><html lang="en">') and 'charset="utf-8"' in page
    assert '<meta name="viewport" content="width=device-width"' in page


def test_cells_and_headings_of_a_table():
    assert html.table([("a", "b")], ("x", "y")) == ("<table><tr><th>x<th>y<tr><td>a<td>b</table>")
    assert html.table([("a", "b")], headed=True) == "<table><tr><th>a<td>b</table>"


def test_the_colours_of_a_page_are_others_in_the_dark():
    """Every colour of letters, lines and paper is a variable that the style for the dark sets."""
    figure = charts.lines("t", [charts.Series("a", [(0, 1), (1, 2)])], levels={"b": 1})
    page = "".join(html.page("t", "", [figure, html.table([("a",)], ("b",))], "c"))
    dark = re.search(r"@media \(prefers-color-scheme:dark\)\{:root\{(.*?)\}", page)[1]
    named = set(re.findall(r"var\(--(c\w+),", page))
    assert named and named <= set(re.findall(r"--(c\w+):", dark)) and "color-scheme:light" in page
    by_day = page.replace(dark, "")
    for light in (html.INK, html.FAINT, html.GREY, html.RULE):
        assert not re.search(f"(?<!,){light}", by_day)
    alone = html.unthemed(figure)
    assert "var(" not in alone and html.GREY in alone and html.themed("#123456") == "#123456"


# --------------------------------------------------------------------------------------- contrast


def rgb(colour):
    return np.array(list(bytes.fromhex(colour.removeprefix("#"))))


def luminance(levels):
    """Relative luminance of WCAG 2.2, of levels 0 to 255."""
    share = np.asarray(levels) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    """Contrast ratio of WCAG 2.2, which asks for 4.5 of text."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast(rgb("#000000"), rgb("#ffffff")) == pytest.approx(21)
    assert contrast(rgb("#767676"), rgb("#ffffff")) == pytest.approx(4.54, abs=0.005)


class Palette:
    """The colours of a page by day or by night, as its style sets them."""

    def __init__(self, page, night):
        dark = "".join(
            re.findall(r"@media \(prefers-color-scheme:dark\)\{:root\{(.*?)\}", page, re.S)
        )
        by_day = re.findall(r"(--\w+):(#\w+)", page.replace(dark, ""))
        self._set = dict(by_day) | (dict(re.findall(r"(--\w+):(#\w+)", dark)) if night else {})
        ground = re.search(r"background:(#\w+)", dark) if night else None
        self.ground = self("var(--ground)", ground[1] if ground else html.GROUND)
        self.paper = self("var(--paper)", self(html.themed(html.PAPER)))

    def __call__(self, colour, otherwise=None):
        name, light = re.fullmatch(r"(?:var\((--\w+),?)?(#\w+)?\)?", colour).groups()
        return self._set.get(name, light or otherwise)


FIGURES = (
    charts.lines("t", [charts.Series("a", [(0, 1), (1, 2)])], charts.Axis("x"), charts.Axis("y"))
    + charts.forest("t", [charts.Estimate("a", 0.6, summary=True)], charts.Axis("AUC", (0.5, 1)))
    + charts.matrix("t", ["aa", "bb"], [[1, 0], [1, 1]])
)


def pages():
    """Every page by the file that holds its colours, and the page /ui."""
    for path, text in source_files.texts().items():
        if not re.search(r"[^-\w]color:", text) or path == "pages/html.py":
            continue
        name = f"medsiglip_jax.{path.removesuffix('.py').replace('/', '.')}"
        module = importlib.import_module(name)
        style = contact_sheet._style(160) if module is contact_sheet else module._STYLE
        yield name, "".join(html.page("t", style, [FIGURES], "c"))
    yield "serve/ui.html", (source_files.PACKAGE / "serve" / "ui.html").read_text()


@pytest.mark.parametrize("night", [False, True], ids=["day", "night"])
def test_letters_stand_out_from_what_they_stand_on(night):
    """4.5, as WCAG 2.2 asks for: on the page and on paper, or on what their own rule paints."""
    found = dict(pages())
    assert len(found) >= 4, "pages with colours of their own"
    for name, page in found.items():
        palette, seen = Palette(page, night), 0
        for rule in re.findall(
            r"\{([^{}]*)\}", "".join(re.findall(r"<style>.*?</style>", page, re.S))
        ):
            for letters in re.findall(r"(?<![-\w])color:(#\w+|var\([^)]*\))", rule):
                own = re.search(r"background:(#\w+|var\([^)]*\))", rule)
                below = [palette(own[1])] if own else [palette.ground, palette.paper]
                for ground in below:
                    ratio = contrast(rgb(palette(letters)), rgb(ground))
                    assert ratio >= 4.5, (name, letters, ground, ratio)
                seen += 1
        assert seen, name
        assert (palette.ground == html.GROUND) is not night


@pytest.mark.parametrize("night", [False, True], ids=["day", "night"])
def test_letters_of_figures_stand_out(night):
    """Also on the deepest cell of a matrix, which lets the page shine through."""
    page = "".join(html.page("t", "", [FIGURES], "c"))
    palette = Palette(page, night)
    inks = {palette(fill) for fill in re.findall(r'<text[^>]* fill="([^"]+)"', FIGURES)}
    cells = re.findall(r'<rect[^>]* fill="([^"]+)" fill-opacity="([^"]+)"', FIGURES)
    assert len(inks) == 2 and len(cells) == 4
    for ink in inks:
        assert contrast(rgb(ink), rgb(palette.ground)) >= 4.5, ink
    for fill, opacity in cells:
        cell = float(opacity) * rgb(palette(fill)) + (1 - float(opacity)) * rgb(palette.ground)
        assert contrast(rgb(palette(charts.INK)), cell) >= 4.5, (fill, opacity)


def test_letters_of_pictures_stand_out():
    drawn = {quickstart.INK, quickstart.GREY, quickstart.RED}
    drawn |= {overlay._INK, overlay._GREY, heatmap._INK, heatmap._GREY}
    for ink in drawn:
        assert contrast(rgb(ink), rgb("#ffffff")) >= 4.5, ink
    for ink in (html.INK, html.FAINT):  # of contact sheets
        assert contrast(rgb(ink), rgb(html.PAPER)) >= 4.5, ink
