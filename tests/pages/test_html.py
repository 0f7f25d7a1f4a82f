"""The frame of all pages: well-formed enough for a browser, escaped, nothing from elsewhere."""

import re
from html.parser import HTMLParser

from medsiglip_jax.pages import charts, html

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
    assert page.startswith("<!doctype html>") and 'charset="utf-8"' in page


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
