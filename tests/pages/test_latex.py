"""Tables in LaTeX hold what the cells hold."""

import re

from medsiglip_jax.pages import latex

NASTY = r"50 % of a_b & {c} ~ ^ # $x$ \input{/etc/passwd} < 0.001 − – ≥"


def test_whatever_is_text_stays_text():
    """No letter that LaTeX takes for a command remains, and the text can be read back."""
    escaped = latex.escape(NASTY)
    assert not re.search(r"(?<!\\)[%&#_]", escaped) and r"\input" not in escaped
    back = escaped
    words = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
             "$<$": "<", "$-$": "−", r"$\geq$": "≥", "--": "–"}  # fmt: skip
    for word, letter in words.items():
        back = back.replace(word, letter)
    assert re.sub(r"\\([&%$#_{}])", r"\1", back) == NASTY


def test_a_table_has_its_rows_and_rules():
    lines = latex.table(("class", "AUC"), [("a & b", "0.9"), ("c", "0.8")]).splitlines()
    assert lines[1:] == [
        r"\begin{tabular}{lr}", r"\toprule", r"class & AUC \\", r"\midrule", r"a \& b & 0.9 \\",
        r"c & 0.8 \\", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
