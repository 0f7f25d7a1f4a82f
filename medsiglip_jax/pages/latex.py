"""Tables in LaTeX, in which plain text stays plain."""

from collections.abc import Iterable, Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$",
    ">": "$>$", "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$", "–": "--", "\n": " ", "\r": " ",
}  # fmt: skip


def escape(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A tabular of plain text with the rules of the package booktabs; numbers are on the right."""
    rows = [[escape(cell) for cell in row] for row in rows]
    lines = [" & ".join(row) + r" \\" for row in [list(map(escape, header)), *rows]]
    columns = "l" + "r" * (len(header) - 1)
    before = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    after = [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*before, lines[0], r"\midrule", *lines[1:], *after])
