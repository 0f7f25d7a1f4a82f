"""Text in CSV files that spreadsheets would take for formulas, which may run commands.

As is usual, such text gets a leading apostrophe. So does text that has one already, so that taking
one away always gives the text that was written.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

# The last four are the wide forms of the first, which spreadsheets in East Asia take for them.
_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
_PROTECTED = re.compile("'+[=+\\-@\t\r\n＝＋－＠]")


def protect(cells: Iterable[Any]) -> list[Any]:
    """Cells of a row, whose texts are no formulas; numbers stay numbers."""
    return [f"'{x}" if isinstance(x, str) and _FORMULA.match(x) else x for x in cells]


def unprotect(cells: Sequence[str]) -> list[str]:
    """Cells of a row as they were before `protect`."""
    if "'" not in "".join(cells):  # a fifth of the time of looking at each
        return [*cells]
    return [cell[1:] if _PROTECTED.match(cell) else cell for cell in cells]
