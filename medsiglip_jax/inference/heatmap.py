"""How well each tile of a slide fits a text, drawn over the slide."""

import json
import textwrap
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from medsiglip_jax.data import inputs
from medsiglip_jax.data.rows import EXTRA, Rows
from medsiglip_jax.files import places, storage
from medsiglip_jax.inference.classify import encode_texts, probabilities
from medsiglip_jax.inference.engine import Engine
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess import formats
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.parts import Parts

# Viridis of matplotlib (CC0), ten of its colours: equal steps look equal, to the colour-blind, too.
_COLOURS = np.array(
    [
        (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
        (31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37),
    ]
)  # fmt: skip
_OPACITY = 0.6  # of colours over the slide, which is grey, so that every colour is a score
_GLASS = 243  # its grey in the picture, and so that of the legend
_MARGIN, _LEGEND, _BAR, _LEADING, _LEAST = 24, 300, 14, 20, 480  # pixels
_INK, _GREY = "#1f2933", "#52606d"


def check(path: places.Given) -> None:
    """Raises ValueError unless a picture can have this name."""
    if Path(str(path)).suffix.lower() != ".png":
        raise ValueError(f"{path}: expected a name ending in .png")


def tiles(slide: str, parts: Parts) -> Rows:
    """The tiles of one slide, by default of `slides.MPP`.

    Raises:
        ValueError: it is none, or has none.
    """
    slides = formats.SLIDES.load()
    try:
        slides.check(slide, parts)
    except UnreadableImage as error:
        raise ValueError(f"{slide}: {error}; a heatmap is drawn over one slide") from None
    parts = replace(parts, series=False, mpp=parts.mpp or slides.MPP)
    return inputs.rows([slide], parts=parts)


def heatmap(
    model: Model,
    slide: str,
    rows: Rows,
    texts: Sequence[str],
    output: places.Given,
    preprocess: str = "big_vision",
    batch_size: int = 8,
    on_batch: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Scores the tiles of a slide for the first text, and writes a picture and a table of them.

    Args:
        model: with both towers and a tokenizer.
        slide: local file.
        rows: of `tiles`.
        texts: the score is softmax over them; of one text it is its sigmoid.
        output: of the picture, .png; the table is beside it, .parquet.
        preprocess: pixel preset.
        batch_size: tiles per call of the encoder.
        on_batch: called with the number of tiles just done.

    Returns:
        `{"slide", "texts", "score": "softmax" or "sigmoid", "picture", "table", "tiles": [{"x",
        "y", "level", "size", "mpp", "score"}, …], "errors": [{"source", "reason"}, …]}`.

    Raises:
        ValueError: no tile can be read.
    """
    slides = formats.SLIDES.load()

    check(output)
    engine = Engine(model, preprocess, True, batch_size)
    table, errors = scores(model, rows, texts, engine, batch_size, on_batch)
    if not len(table):
        raise ValueError(f"{slide}: no tile can be read; the first: {errors[0][1]}")
    downsamples = np.array(slides.downsamples(slide))
    side = table["size"].to_numpy() * downsamples[table["level"].to_numpy()]
    made = {
        "slide": slide,
        "texts": list(texts),
        "score": "softmax" if len(texts) > 1 else "sigmoid",
        "model": {"source": model.source, "sha256": model.sha256},
        "preprocess": preprocess,
        "parts": rows.parts.to_dict(),
    }
    picture = draw(*slides.thumbnail(slide), table, side, texts)
    path = places.at(output)
    with storage.new_file(path) as partial:
        picture.save(partial, format="PNG")
    with storage.new_file(path.with_suffix(".parquet")) as partial:
        pq.write_table(table.replace_schema_metadata({"medsiglip_jax": json.dumps(made)}), partial)
    return {
        **made,
        "picture": str(path),
        "table": str(path.with_suffix(".parquet")),
        "tiles": table.drop_columns(["id", "logits"]).to_pylist(),
        "errors": [{"source": source, "reason": reason} for source, reason in errors],
    }


# ----------------------------------------------------------------------------------------- scores


def scores(
    model: Model,
    rows: Rows,
    texts: Sequence[str],
    engine: Engine,
    batch_size: int,
    on_batch: Callable[[int], Any] = int,
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Scores tiles for the first of the texts.

    Returns:
        Columns id, those of the tile, float32 `score` and `logits` [texts]; and (source, reason)
        of the tiles that cannot be read.
    """
    ztxt = encode_texts(model, texts)
    tables, errors = [], []
    with closing(engine.run(rows.batches(batch_size))) as parts:
        for part in parts:
            logits = np.asarray(model.similarity(part.vectors, ztxt))
            tables.append(_table(part.rows.table.filter(pa.array(part.readable)), logits))
            errors += part.errors
            on_batch(len(part.rows))
    return pa.concat_tables(tables), errors


def _table(rows: pa.Table, logits: np.ndarray) -> pa.Table:
    sigmoid, softmax = probabilities(logits)
    score = (softmax if logits.shape[1] > 1 else sigmoid)[:, 0]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
    found = rows.select(["id", *EXTRA.names])
    found = found.append_column("score", pa.array(score.astype(np.float32)))
    return found.append_column("logits", lists)


# ---------------------------------------------------------------------------------------- picture


def draw(
    thumbnail: UInt8[np.ndarray, "h w 3"],
    scale: float,
    table: pa.Table,
    side: Float[np.ndarray, " tiles"],
    texts: Sequence[str],
) -> Image.Image:
    """A picture of the scores, with a legend.

    Args:
        thumbnail: of the slide.
        scale: pixels of level 0 in one of its pixels.
        table: of `scores`; not empty.
        side: of the tiles, in pixels of level 0.
        texts: the first is that of the scores.
    """
    score = table["score"].to_numpy()
    low, high = float(score.min()), float(score.max())
    field = _field(thumbnail.shape[:2], scale, table, side)
    colours = colour((field - low) / ((high - low) or 1.0))
    grey = np.asarray(Image.fromarray(thumbnail).convert("L"), np.float32)[..., None]
    opacity = np.where(np.isnan(field), 0, _OPACITY)[..., None]
    blended = np.rint(grey + opacity * (colours - grey)).astype(np.uint8)
    return _page(Image.fromarray(blended), low, high, texts)


def colour(share: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """Colours of shares 0..1, red, green and blue 0..255; of NaN that of 0."""
    share, stops = np.nan_to_num(share), np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(share, stops, channel) for channel in _COLOURS.T], -1)


def _field(shape: tuple[int, int], scale: float, table: pa.Table, side: np.ndarray) -> np.ndarray:
    """The score of each pixel, NaN where there is no tile."""
    field = np.full(shape, np.nan)
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    edges = (np.rint(ends / scale).astype(int).tolist() for ends in (x, y, x + side, y + side))
    for left, top, right, bottom, score in zip(*edges, table["score"].to_pylist(), strict=True):
        field[top:bottom, left:right] = score
    return field


def _page(picture: Image.Image, low: float, high: float, texts: Sequence[str]) -> Image.Image:
    """The picture, and under it the legend."""
    width = max(picture.width, _LEAST)
    how = f"softmax against: {', '.join(texts[1:])}" if len(texts) > 1 else "sigmoid"
    lines = [(line, _INK) for line in textwrap.wrap(texts[0], width // 8)]
    lines += [(line, _GREY) for line in textwrap.wrap(how, width // 8)]
    top = picture.height + 2 * _MARGIN
    height = top + _LEADING * (len(lines) + 2) + _BAR + _MARGIN
    page = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    page.paste(picture, (_MARGIN, _MARGIN))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for line, ink in lines:
        pen.text((_MARGIN, top), line, ink, font)
        top += _LEADING
    bar = colour(np.broadcast_to(np.linspace(0, 1, _LEGEND), (_BAR, _LEGEND)))
    bar = np.rint(_GLASS + _OPACITY * (bar - _GLASS)).astype(np.uint8)
    page.paste(Image.fromarray(bar), (_MARGIN, top + 4))
    top += _BAR + 6
    pen.text((_MARGIN, top), f"{low:.3g}", _INK, font)
    pen.text((_MARGIN + _LEGEND, top), f"{high:.3g}", _INK, font, anchor="ra")
    pen.text((_MARGIN, top + _LEADING), "Not a medical device.", _GREY, font)
    return page
