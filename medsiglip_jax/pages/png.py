"""Figures as PNG, drawn by resvg."""

import tempfile
from pathlib import Path
from typing import Any

from PIL import ImageFont

_ZOOM = 3  # 460 points wide become 1,380 pixels: 300 per inch at 4.6 inches


def installed() -> Any:
    """The package that draws; None where it is not installed."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        return None
    return resvg_py


def render(svg: str) -> bytes:
    """A figure on white, as PNG.

    Letters are those of the font that Pillow brings, so that machines without fonts draw them, too;
    characters that it lacks come from the machine's fonts.

    Raises:
        ModuleNotFoundError: resvg-py is not installed.
    """
    if (resvg := installed()) is None:
        raise ModuleNotFoundError(
            "figures as PNG need resvg-py: pip install 'medsiglip-jax[figures]'"
        )
    font = ImageFont.load_default(12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    name = font.getname()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "font.ttf")
        path.write_bytes(font.font_bytes)
        return bytes(
            resvg.svg_to_bytes(
                svg_string=svg,
                background="#ffffff",
                zoom=_ZOOM,
                font_files=[str(path)],
                font_family=name,
                sans_serif_family=name,
            )  # fmt: skip
        )
