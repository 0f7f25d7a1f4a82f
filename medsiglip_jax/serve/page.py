"""The page /ui: one HTML file whose script and style its headers name by their hashes."""

import base64
import functools
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from medsiglip_jax.serve.openapi import Described, Operation
from medsiglip_jax.serve.state import State

PATH = "/ui"


def routes(state: State) -> list[Described]:
    """The page, where only this machine can reach it, or a key is asked for."""

    async def show(request: Request) -> Response:
        return Response(page(), headers=headers())

    if not (state.settings.is_loopback or state.settings.api_keys):
        return []
    return [
        Described(PATH, show, Operation("A page to try the server", media="text/html", open=True))
    ]


@functools.cache
def page() -> bytes:
    """The page in UTF-8, to be sent with `headers`."""
    # As text, so that line ends are "\n" on every system: browsers hash them so.
    file = resources.files("medsiglip_jax.serve") / "ui.html"
    return file.read_text(encoding="utf-8").encode()


def _source(tag: str) -> str:
    """The only element of this kind, as a source of a Content-Security-Policy."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page().decode(), re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@functools.cache
def headers() -> dict[str, str]:
    """What the page is sent with."""
    policy = {
        "default-src": "'none'",
        "script-src": _source("script"),
        "style-src": _source("style"),
        "img-src": "blob: data:",  # chosen files and fetched thumbnails; the empty icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # a page of an older version would ask for what is gone
    }
