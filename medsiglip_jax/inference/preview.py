"""Shows the exact inputs of the model on a contact sheet, each with a note of how it was made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from PIL import Image

from medsiglip_jax.data.rows import Row, Rows
from medsiglip_jax.files import places, settings, threads
from medsiglip_jax.files.credentials import without
from medsiglip_jax.pages import contact_sheet
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage, describe, within_memory
from medsiglip_jax.preprocess.image import preset

_PAGE, _LINES = 1900, 6  # of a PNG sheet: its width in pixels, lines of text under a picture


@dataclass(frozen=True)
class PreviewOptions:
    """How inputs are made, and which of them are shown.

    Attributes:
        size: height and width of the model's inputs, in pixels.
        preprocess: pixel preset.
        dicom: how DICOM files become pixels.
        limit: show at most this many images, the first ones.
        seed: draw them at random with this seed, instead of the first.
    """

    size: Annotated[int, settings.at_least(1)] = 448
    preprocess: str = "big_vision"
    dicom: Rules = Rules()
    limit: Annotated[int, settings.at_least(1)] = 100
    seed: int | None = None

    def __post_init__(self):
        preset(self.preprocess)
        settings.verify(self)


def preview(
    rows: Rows,
    output: places.Given,
    options: PreviewOptions = PreviewOptions(),
    on_progress: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Draws the images among rows.

    Args:
        rows: from `inputs.rows`; texts are skipped.
        output: ends in .html, for a page whose pictures are PNG of exactly those pixels; or in
            .png, for one picture of all.
        options: see `PreviewOptions`.
        on_progress: called after every image, with 1.

    Returns:
        The options; `images`, a dict for each image with what is printed under it, or with `error`
        if it cannot be read; and `left_out`, the number of images beyond the limit.

    Raises:
        ValueError: `output` has another suffix, or the inputs are only texts.
        OSError: a disk or a network fails.
    """
    places.check_suffix(output, *contact_sheet.SUFFIXES)
    chosen, left_out = _choose(rows, options)
    cells, images = [], []
    with threads.Threads("images", min(8, threads.workers())) as pool:
        look = lambda row: _look(row, options)  # noqa: E731
        for cell, image in pool.map(look, chosen, lambda row: describe(row.source)):
            cells.append(cell)
            images.append(image)
            on_progress(1)
    contact_sheet.draw(output, _sheet(cells, options.size))
    return {
        "output": str(output),
        "size": options.size,
        "preprocess": options.preprocess,
        "dicom": options.dicom.to_dict(),
        "left_out": left_out,
        "images": images,
    }


def _choose(rows: Rows, options: PreviewOptions) -> tuple[list[Row], int]:
    """The images that are shown, in order, and the number of those that are not."""
    images = np.flatnonzero(np.array(rows.table.column("kind").to_pylist()) == "image")
    if not len(images):
        raise ValueError("no images among the inputs, only texts")
    count = min(options.limit, len(images))
    kept = images[:count]
    if options.seed is not None:
        kept = np.sort(np.random.default_rng(options.seed).choice(images, count, replace=False))
    return [rows[int(i)] for i in kept], len(images) - count


def _look(row: Row, options: PreviewOptions) -> tuple[contact_sheet.SheetCell, dict[str, Any]]:
    """One input of the model, and what is said of it."""
    name, entry = describe(row.id), {"id": row.id, "source": without(row.source)}
    try:
        if row.reason is not None:
            raise UnreadableImage(row.reason)
        image, facts = sources.read(row.source, rules=options.dicom)
        with within_memory():
            pixels = Image.fromarray(preset(options.preprocess)(image, options.size))
    except UnreadableImage as error:
        unreadable = contact_sheet.SheetCell(f"unreadable: {error.reason}", name)
        return unreadable, entry | {"error": error.reason}
    entry |= {"width": image.shape[1], "height": image.shape[0]}
    for key in ("seen", "frame", "frames", "burned_in", "orientation", "dark"):
        entry[key] = getattr(facts, key)
    return contact_sheet.SheetCell(pixels, name, notes=_notes(entry, options)), entry


def _sheet(cells: Sequence[contact_sheet.SheetCell], size: int) -> contact_sheet.Sheet:
    pitch = max(size, contact_sheet.SIDE) + contact_sheet.PITCH - contact_sheet.SIDE
    return contact_sheet.Sheet(
        title="What the model sees",
        foot=f"Inputs of {size}x{size} pixels, exactly, as PNG. Not a medical device.",
        sections=[contact_sheet.SheetSection(cells)],
        side=size,
        label=_LINES * contact_sheet.LEADING,
        per_line=max(1, _PAGE // pitch),
        exact=True,
    )


def _notes(entry: Mapping[str, Any], options: PreviewOptions) -> list[str]:
    size = options.size
    notes = (
        (True, f"{entry['width']}x{entry['height']} to {size}x{size}, {options.preprocess}"),
        (entry["seen"] != "", entry["seen"]),
        (entry["frames"] > 1, f"frame {entry['frame']} of {entry['frames']}, from 0"),
        (entry["burned_in"], "annotation, which may identify people, is burned in"),
        (entry["orientation"] != 1, f"EXIF orientation {entry['orientation']}, not applied"),
        (entry["dark"], "dark: of 16 bits 14 or fewer are used; see --grey16"),
    )
    return [note for applies, note in notes if applies]
