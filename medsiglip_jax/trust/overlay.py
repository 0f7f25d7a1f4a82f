"""A map in colours over its image, which is grey, so that every colour is a value of the map."""

import textwrap

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medsiglip_jax.pages.colours import viridis
from medsiglip_jax.trust.explanation import Explanation
from medsiglip_jax.trust.maps.gradients import LEAST, TOLERANCE
from medsiglip_jax.trust.maps.rollout import LABEL

# The ends of the scale, the same in all pictures: so many times the value that every pixel would
# have if the whole score lay evenly on the image.
SCALE = 10.0
_OPACITY = 0.8  # at the ends of the scale, and in proportion to the value below them
_SMOOTHING = 1 / 64  # deviation, of the longer side: half a patch of 14 of 448 pixels
_LONGEST, _SHORTEST = 1024, 384  # of the longer side of a picture, in pixels
_MARGIN, _BAR, _LEADING, _LEAST_WIDTH = 20, 14, 20, 420  # pixels
_PADDING = 0.1  # of the difference that is explained; more on the padding is noted
_INK, _GREY = "#1f2933", "#52606d"


def grey(pixels: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """The image in grey, at the size of the pictures."""
    picture = Image.fromarray(pixels).convert("L")
    return picture.resize(_size(picture.size), Image.Resampling.BICUBIC)


def blend(pixels: UInt8[np.ndarray, "h w 3"], explanation: Explanation) -> Image.Image:
    """The map over the image; in shades of grey if it is not better than random maps.

    For the picture alone the map is smoothed.
    """
    below = grey(pixels)
    values = _relative(explanation)
    shown = Image.fromarray(values).resize(below.size, Image.Resampling.BOX)
    smooth = ndimage.gaussian_filter(np.asarray(shown), max(below.size) * _SMOOTHING)
    return _over(np.asarray(below, np.float32), smooth, explanation.better)


def _relative(explanation: Explanation) -> Float[np.ndarray, "h w"]:
    """In multiples of the value that all pixels would have of an even map; see `SCALE`."""
    whole = 1.0
    if explanation.of_text:
        whole = max(abs(explanation.score - explanation.baseline_score), LEAST)
    return explanation.map * np.float32(explanation.map.size / whole)


def _over(below: np.ndarray, values: np.ndarray, coloured: bool) -> Image.Image:
    """Values in colours over levels of grey."""
    share = np.clip(values / SCALE, -1, 1)
    opacity = (_OPACITY * np.abs(share))[..., None]
    place = (share + 1) / 2
    above = viridis(place) if coloured else np.repeat(255 * place[..., None], 3, axis=-1)
    levels = below[..., None] + opacity * (above - below[..., None])
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def scale_bar(width: int, coloured: bool, signed: bool = True) -> Image.Image:
    """The colours of the scale over middle grey; from 0 on if nothing can be negative."""
    values = np.linspace(-SCALE if signed else 0, SCALE, width)
    values = np.broadcast_to(values, (_BAR, width))
    return _over(np.full(values.shape, 128.0), values, coloured)


def scale_marks(explanation: Explanation) -> tuple[str, ...]:
    """What stands below the scale, evenly spread."""
    if not explanation.of_text:
        return "0", f"{SCALE:g} times an even share of the attention"
    return f"against: -{SCALE:g}", "0", f"for: {SCALE:g}"


def notes(explanation: Explanation) -> list[str]:
    """What has to be said of a map, in lines."""
    lines = [f"{explanation.method}: {LABEL}"] if not explanation.of_text else []
    if explanation.of_text:
        against = f" rather than {explanation.contrast}" if explanation.contrast else ""
        lines = [f"{explanation.method}, for {explanation.text}{against}"]
    lines.append(
        f"insertion - deletion {explanation.insertion_minus_deletion:.2f}, random maps "
        f"{explanation.random:.2f}"
    )
    if explanation.completeness is not None and not explanation.completeness <= TOLERANCE:
        lines.append(f"incomplete: its sum is off by {explanation.completeness:.1%}")
    whole = abs(explanation.score - explanation.baseline_score)
    if abs(explanation.on_padding) > _PADDING * max(whole, LEAST):
        lines.append(
            f"{explanation.on_padding:+.2f} of the logit comes from the padding, which is not shown"
        )
    if not explanation.better:
        lines.append("Not better than random maps: drawn grey, and not to be relied on.")
    return lines


def draw(pixels: UInt8[np.ndarray, "h w 3"], explanation: Explanation) -> Image.Image:
    """The picture with what it shows and the scale below it."""
    picture, font = blend(pixels, explanation), ImageFont.load_default(14)
    width = max(picture.width, _LEAST_WIDTH)
    lines = [
        (part, _GREY if number else _INK)
        for number, line in enumerate(notes(explanation))
        for part in textwrap.wrap(line, width // 8)
    ]
    height = picture.height + _MARGIN * 2 + _LEADING * (len(lines) + 2) + _BAR + _MARGIN
    page = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    page.paste(picture, (_MARGIN, _MARGIN))
    pen, top = ImageDraw.Draw(page), picture.height + 2 * _MARGIN
    for line, ink in lines:
        pen.text((_MARGIN, top), line, ink, font)
        top += _LEADING
    page.paste(scale_bar(width, explanation.better, explanation.of_text), (_MARGIN, top + 4))
    top, marks = top + _BAR + 6, scale_marks(explanation)
    for mark, share in zip(marks, np.linspace(0, 1, len(marks)).tolist(), strict=True):
        anchor = {0: "la", 1: "ra"}.get(share, "ma")
        pen.text((_MARGIN + share * width, top), mark, _GREY, font, anchor=anchor)
    unit = "Multiples of an even share of the score. " if explanation.of_text else ""
    pen.text((_MARGIN, top + _LEADING), f"{unit}Not a medical device.", _GREY, font)
    return page


def _size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture, of those of an image."""
    longer = max(size)
    factor = min(max(longer, _SHORTEST), _LONGEST) / longer
    width, height = (max(1, round(side * factor)) for side in size)
    return width, height
