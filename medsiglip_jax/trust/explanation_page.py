"""The page of explanations: image, map, curves and figures of each, in one file."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from medsiglip_jax.pages import charts, html
from medsiglip_jax.trust import overlay
from medsiglip_jax.trust.explanation import Explanation
from medsiglip_jax.trust.maps.rollout import LABEL

MARK = "medsiglip_jax explain"
_STYLE = f"""body{{max-width:1320px}}h2{{overflow-wrap:anywhere}}figure{{margin:0}}
section{{border-top:1px solid {html.themed(html.RULE)};padding:4px 0 20px}}
.row{{display:flex;flex-wrap:wrap;gap:24px}}
.row>*{{margin:0;flex:0 1 400px;min-width:0}}.row img{{display:block;width:100%;
max-width:400px;background:{html.themed(html.PAPER)}}}.bar{{height:14px;margin-top:8px}}
figcaption{{font-size:13px;color:{html.themed(html.FAINT)};display:flex;
gap:12px;margin-top:4px}}figcaption>*{{flex:1}}
figcaption>:nth-child(2){{text-align:center}}
figcaption>:last-child:not(:first-child){{text-align:right}}.warning{{font-weight:600}}"""
_INTRODUCTION = (
    "A map shows which parts of an image the logit of a text, or of a label, comes from; yellow "
    "speaks for it, violet against it. A colour means the same in every picture: the numbers of "
    "the scale are multiples of the value of a map that lies evenly on the image. Beside each map "
    "stands how well it does: the cells that it ranks highest are put first into an empty image "
    "(insertion) or taken first out of the image (deletion), and the area between the two curves "
    "is compared with that of random maps that are as smooth. A map that is not better than all "
    "of them is drawn grey."
)


def page(sections: Iterable[str]) -> Iterator[str]:
    """The page, in pieces; `sections` are of `section` and `unreadable`."""
    body = [html.paragraph(_INTRODUCTION)]
    caution = "Maps are of the model, not of the disease. Not a medical device."

    def pieces() -> Iterator[str]:
        yield from body
        yield from sections

    return html.page("Why this score", _STYLE, pieces(), caution, MARK)


def unreadable(image: str, reason: str) -> str:
    """The section of an image that could not be read."""
    return f"<section><h2>{html.escape(image)}</h2>{html.paragraph(reason)}</section>\n"


def section(pixels: UInt8[np.ndarray, "h w 3"], explanations: Sequence[Explanation]) -> str:
    """The section of one image, with its maps.

    Args:
        pixels: uint8 [h, w, 3], those of the original.
        explanations: the maps of the image, at least one.
    """
    name = html.escape(explanations[0].image)
    original = _figure(overlay.grey(pixels), f"{explanations[0].image}", "image")
    parts = [_part(pixels, explanation, original) for explanation in explanations]
    return f"<section><h2>{name}</h2>\n{''.join(parts)}</section>\n"


def _part(pixels: np.ndarray, explanation: Explanation, original: str) -> str:
    first, *others = overlay.notes(explanation)
    warnings = [note for note in others if not note.startswith("insertion")]
    said = "".join(f'<p class="warning">{html.escape(note)}</p>' for note in warnings)
    picture = overlay.blend(pixels, explanation)
    return (
        f"<h3>{html.escape(first)}</h3>{said}<div class=row>{original}"
        f"{_figure(picture, first, *overlay.scale_marks(explanation), bar=_bar(explanation))}"
        f"<div>{_curves(explanation)}{_figures(explanation)}</div></div>\n"
    )


def _figure(picture: Image.Image, alt: str, *caption: str, bar: str = "") -> str:
    words = "".join(f"<span>{html.escape(word)}</span>" for word in caption)
    return f"<figure>{_img(picture, alt)}{bar}<figcaption>{words}</figcaption></figure>"


def _img(picture: Image.Image, alt: str, attributes: str = "") -> str:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}"{attributes} src="data:image/png;base64,{data}">'


def _bar(explanation: Explanation) -> str:
    bar = overlay.scale_bar(400, explanation.better, explanation.of_text)
    return _img(bar, "scale of the colours", " class=bar")


def _curves(explanation: Explanation) -> str:
    measured = explanation.faithfulness
    shares = measured.shares.tolist()
    series = [
        charts.Series(name, list(zip(shares, values.tolist(), strict=True)))
        for name, values in (("insertion", measured.insertion), ("deletion", measured.deletion))
    ]
    axis = charts.Axis("share of the cells", (0, 1))
    return charts.lines("Insertion and deletion", series, axis, charts.Axis("logit"))


def _figures(explanation: Explanation) -> str:
    """The table beside the pictures."""
    rows = [
        ("logit", f"{explanation.score:.3f}"),
        ("logit of mid-grey", f"{explanation.baseline_score:.3f}"),
        ("method", explanation.method if explanation.of_text else f"rollout: {LABEL}"),
    ]
    if explanation.steps is not None:
        name = "steps" if explanation.method == "ig" else "occluded images"
        rows.append((name, f"{explanation.steps}"))
    if explanation.completeness is not None:
        rows.append(("sum of the map is off by", f"{explanation.completeness:.2%}"))
    if explanation.on_padding:
        rows.append(("sum on the padding", f"{explanation.on_padding:.3f}"))
    random = ", ".join(f"{value:.2f}" for value in explanation.faithfulness.random_maps)
    rows += [
        ("insertion - deletion", f"{explanation.insertion_minus_deletion:.3f}"),
        ("of random maps, mean", f"{explanation.random:.3f}"),
        ("each", random),
    ]
    return html.table(rows, headed=True)
