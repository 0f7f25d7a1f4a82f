"""How well each tile of a slide fits a text, drawn over the slide."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from medsiglip_jax.data import inputs
from medsiglip_jax.data.rows import EXTRA, Rows
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.inference.classify import encode_texts, probabilities
from medsiglip_jax.inference.encode import encode_rows
from medsiglip_jax.model.api import Model
from medsiglip_jax.pages.colours import viridis
from medsiglip_jax.pages.contact_sheet import save_png
from medsiglip_jax.preprocess import facts, formats
from medsiglip_jax.preprocess.parts import Parts

_OPACITY = 0.6  # of colours over the slide, which is drawn in grey, so that every colour is a score
_GLASS = 243  # grey of empty glass in the picture, and so the background of the legend
_MARGIN, _LEGEND, _BAR, _LEADING, _LEAST = 24, 300, 14, 20, 480  # pixels
_INK, _GREY = "#1f2933", "#52606d"


def tiles(slide: str, parts: Parts) -> Rows:
    """The tiles of one slide, by default at `slides.MPP` micrometres per pixel.

    Raises:
        ValueError: the file is not a slide, or none of its tiles is wanted.
    """
    slides = formats.SLIDES.load()
    try:
        slides.check(slide, parts)
    except facts.UnreadableImage as error:
        raise ValueError(f"{slide}: {error}; a heatmap is drawn over one slide") from None
    parts = replace(parts, series=False, mpp=parts.mpp or slides.MPP)
    return inputs.rows([slide], parts=parts)


def heatmap(
    model: Model,
    slide: str,
    rows: Rows,
    texts: Sequence[str],
    output: places.Given,
    preprocess: str | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Scores the tiles of a slide for the first text, and writes a picture and a table of them.

    Args:
        model: with both towers and a tokenizer.
        slide: local file.
        rows: from `tiles`.
        texts: the score is the softmax over them; with one text it is the sigmoid.
        output: the picture, .png; the table is written beside it, .parquet.
        preprocess: pixel preset; by default as `encode.encode_files`.
        batch_size: tiles per call of the encoder.
        on_batch: called with the number of tiles just done, for progress.

    Returns:
        `{"slide", "texts", "score": "softmax" or "sigmoid", "picture", "table", "tiles": [{"x",
        "y", "level", "size", "mpp", "score"}, …], "errors": [{"source", "reason"}, …]}`.

    Raises:
        ValueError: no tile can be read.
    """
    slides = formats.SLIDES.load()
    places.check_suffix(output, ".png")
    ztxt, tables, errors = encode_texts(model, texts), [], []
    preset = model.config.prepared(preprocess).preprocess
    for batch in encode_rows(model, rows, preset, batch_size=batch_size, on_batch=on_batch):
        logits = np.asarray(model.similarity(batch.vectors, ztxt))
        tables.append(_table(batch.rows.table.filter(pa.array(batch.readable)), logits))
        errors += batch.errors
    table = pa.concat_tables(tables)
    if not len(table):
        raise ValueError(f"{slide}: no tile can be read; the first: {errors[0][1]}")
    downsamples = np.array(slides.downsamples(slide))
    side = table["size"].to_numpy() * downsamples[table["level"].to_numpy()]
    made = {
        "slide": slide,
        "texts": list(texts),
        "score": "softmax" if len(texts) > 1 else "sigmoid",
        "model": {"source": model.source, "sha256": model.sha256},
        "preprocess": preset,
        "parts": rows.parts.to_dict(),
    }
    thumbnail, scale = slides.thumbnail(slide)
    picture, path = draw(thumbnail, scale, table, side, texts), places.at(output)
    beside = path.with_suffix(".parquet")
    # Both get their names at the end, one after the other, so that hardly ever they differ.
    with storage.new_file(path) as png, storage.new_file(beside) as parquet:
        save_png(picture, png)
        pq.write_table(table.replace_schema_metadata({"medsiglip_jax": dumps(made)}), parquet)
    return {
        **made,
        "picture": str(path),
        "table": str(beside),
        "tiles": table.drop_columns(["id", "logits"]).to_pylist(),
        "errors": [{"source": source, "reason": reason} for source, reason in errors],
    }


def _table(rows: pa.Table, logits: np.ndarray) -> pa.Table:
    """`id`, the columns of the tile, `score` (float32) and `logits` (one per text)."""
    sigmoid, softmax = probabilities(logits)
    score = (softmax if logits.shape[1] > 1 else sigmoid)[:, 0]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
    table = rows.select(["id", *EXTRA.names])
    table = table.append_column("score", pa.array(score.astype(np.float32)))
    return table.append_column("logits", lists)


# ---------------------------------------------------------------------------------------- picture


def draw(
    thumbnail: UInt8[np.ndarray, "h w 3"],
    scale: float,
    table: pa.Table,
    side: Float[np.ndarray, " tiles"],
    texts: Sequence[str],
) -> Image.Image:
    """A picture of the scores over the slide, with a legend.

    A colour is the same score in every picture: the scale goes from 0 to 1.

    Args:
        thumbnail: of the slide.
        scale: pixels of level 0 per pixel of the thumbnail.
        table: columns `x`, `y` and `score`; not empty.
        side: of each tile, in pixels of level 0.
        texts: the first is the one that was scored.
    """
    score = table["score"].to_numpy()
    field = _field(thumbnail.shape[:2], scale, table, side)
    colours = viridis(field)
    grey = np.asarray(Image.fromarray(thumbnail).convert("L"), np.float32)[..., None]
    opacity = np.where(np.isnan(field), 0, _OPACITY)[..., None]
    blended = np.rint(grey + opacity * (colours - grey)).astype(np.uint8)
    return _page(Image.fromarray(blended), float(score.min()), float(score.max()), texts)


def _field(shape: tuple[int, int], scale: float, table: pa.Table, side: np.ndarray) -> np.ndarray:
    """The score at each pixel of the thumbnail, NaN where there is no tile."""
    field = np.full(shape, np.nan)
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    edges = (np.rint(ends / scale).astype(int).tolist() for ends in (x, y, x + side, y + side))
    for left, top, right, bottom, score in zip(*edges, table["score"].to_pylist(), strict=True):
        field[top:bottom, left:right] = score
    return field


def _page(picture: Image.Image, low: float, high: float, texts: Sequence[str]) -> Image.Image:
    """The picture, and the legend below it, with the lowest and the highest score."""
    width = max(picture.width, _LEAST)
    against = f"softmax against: {', '.join(texts[1:])}" if len(texts) > 1 else "sigmoid"
    lines = [(line, _INK) for line in textwrap.wrap(texts[0], width // 8)]
    lines += [(line, _GREY) for line in textwrap.wrap(against, width // 8)]
    top = picture.height + 2 * _MARGIN
    height = top + _LEADING * (len(lines) + 3) + _BAR + _MARGIN
    page = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    page.paste(picture, (_MARGIN, _MARGIN))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for line, ink in lines:
        pen.text((_MARGIN, top), line, ink, font)
        top += _LEADING
    bar = viridis(np.broadcast_to(np.linspace(0, 1, _LEGEND), (_BAR, _LEGEND)))
    bar = np.rint(_GLASS + _OPACITY * (bar - _GLASS)).astype(np.uint8)
    page.paste(Image.fromarray(bar), (_MARGIN, top + 4))
    top += _BAR + 6
    for share, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
        pen.text((_MARGIN + share * _LEGEND, top), f"{share:g}", _INK, font, anchor=anchor)
    scores = f"scores of the tiles here: {low:.3g} to {high:.3g}"
    pen.text((_MARGIN, top + _LEADING), scores, _GREY, font)
    pen.text((_MARGIN, top + 2 * _LEADING), "Not a medical device.", _GREY, font)
    return page
