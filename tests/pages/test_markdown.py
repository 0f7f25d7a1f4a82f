"""Markdown shows text as it is: cards, reports and comparisons hold names from anybody's tables."""

import html
import re

import pytest

from medsiglip_jax.model.config import NAMED, ClassifierConfig, ModelConfig
from medsiglip_jax.pages import card, markdown

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt;", "a | b",
    "![x](http://e/x)", "[x](javascript:alert(1))", "`</code><b>`", "**bold**", "_a_ b_c __d__",
    "~~gone~~", "a\\", "\\|",
    "# head", "- item", "+ item", "* item", "1. item", "2) x", "> quote", "a\n# b", "a\r\n\n| b |",
    "\x1b[2J", "\u202egnp.exe", "x\u2028y", "<!-- x", "<https://e>", "[a]: http://e", "--- ",
    "a #", "- - -",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_is_shown_and_not_obeyed(text):
    """By the rules of CommonMark and GitHub's tables, a backslash before punctuation shows it."""
    line = markdown.escape(text)
    assert "\n" not in line and line.isprintable() and not re.search("<|&(?!lt;|gt;|amp;)", line)
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", line)
    assert not re.search(r"[`\[\]|~]|\*\S|\S\*|(?<![^\W_])_|_(?![^\W_])", bare)
    assert not re.match(r"(#+|[-+*]|\d+[.)])(\s|$)", bare)
    shown = html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", line))
    seen = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    assert shown == seen
    table = markdown.table(["name", text], [[text, "0.5"], ["-0.5", "+0.1"]]).splitlines()
    assert len(table) == 4 and table[3] == "| -0.5 | +0.1 |"
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in table} == {3}


@pytest.mark.parametrize("text", ["a b", "`a`", "``", "a ``` b", "<b>", "a\n\n<script>"])
def test_code_ends_where_it_should(text):
    line = markdown.code(text)
    fence = re.match("`+", line)[0]
    assert "\n" not in line and line.endswith(fence) and line.count(fence) == 2


def test_plain_names_stay_readable():
    for text in ("No finding", "class_of_2", "Rare *", "0.612 (0.5 to 0.7)", "a-b", "p < 0.001"):
        assert markdown.escape(text) == text.replace("<", "&lt;")


def test_a_card_is_plain_text_and_strict_yaml():
    """Names of classes, files, the base and its licence, whoever wrote them."""
    evil = 'x`\n# <script>alert(1)</script> [a](b) | "c": \\\x1b'
    recipe = {"init": evil, "objective": {"name": "classification"}, "preprocess": "big_vision",
              "data": [{"path": f"d/{evil.replace('/', '')}", "label": evil}]}  # fmt: skip
    run = {"recipe": recipe, "init_repo": evil, "trained": 1, "parameters": 2, "examples": [3],
           "held_out": 4, "classes": [evil]}  # fmt: skip
    base = {"license": evil, "license_name": evil, "license_link": evil}
    row = dict.fromkeys(("auc", "low", "high", "sensitivity", "specificity", "threshold"), 0.5)
    test = {"macro_auc": 0.5, "classes": {evil: row | {"positives": 1, "negatives": 2}}}
    config = ModelConfig(NAMED["tiny-56"].vision, None, ClassifierConfig((evil,)))
    text = card.of_run(run, 5, {f"val_{evil}": 0.5}, test, base, evil, config)
    head, body = text.split("\n---\n", 1)
    yaml = pytest.importorskip("yaml").safe_load(head.removeprefix("---\n"))
    assert yaml["license_name"] == yaml["base_model"] == evil
    without_code = re.sub(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", body)
    assert "<" not in without_code and not re.search(r"(?<!\\)\]\(", without_code), without_code
    assert not any(line.startswith("# &lt;") for line in body.splitlines())
