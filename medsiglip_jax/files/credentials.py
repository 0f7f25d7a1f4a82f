"""Addresses without the credentials that they may hold, as they are shown and written.

https://user:password@host/a.png?X-Amz-Signature=… becomes https://host/a.png. Everything that
prints, logs or writes an address does so through these functions.
"""

import re

# The same patterns are used by `re` and, on columns of a million addresses, by Arrow's RE2.
# What stands before "@" in the host, and behind "?"; a part such as "#frame=3" stays.
PATTERNS = (
    (r"(?is)^([a-z][a-z0-9+.:-]*://)[^/?#]*@", r"\1"),
    (r"(?is)^(https?://[^?]*)\?.*?(#(?:frame=|tile=|row=|\d+:)[^?#]*)?$", r"\1\2"),
)
# The same of addresses inside of a sentence, where an address ends before a space.
_IN_TEXT = (
    (re.compile(r"(?i)([a-z][a-z0-9+.-]*://)[^/?#\s]*@"), r"\1"),
    (
        re.compile(r"(?i)(https?://[^?\n]*?)\?[^\s#'\"<>]+?(?=[:;,.)]*(?:[\s#'\"<>]|$))"),
        r"\1",
    ),
)
_PATTERNS = [(re.compile(pattern), kept) for pattern, kept in PATTERNS]


def without(source: str) -> str:
    """An address or a name of a part of one without user name, password and query."""
    if "://" in source:
        for pattern, kept in _PATTERNS:
            source = pattern.sub(kept, source)
    return source


def without_in_text(text: str) -> str:
    """A text, such as an error message, whose addresses are `without` them."""
    if "://" in text:
        for pattern, kept in _IN_TEXT:
            text = pattern.sub(kept, text)
    return text
