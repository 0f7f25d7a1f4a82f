"""Warnings of slices and slides that are left out, or are not what a user may expect."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from medsiglip_jax.preprocess import formats
from medsiglip_jax.preprocess.dicom import series
from medsiglip_jax.preprocess.parts import Parts


def warn_of_series(
    stacks: series.Stacks,
    chosen: Sequence[series.Stack],
    others: int,
    parts: Parts,
    skipped: Counter[str],
) -> None:
    """Warns of series that are left out, split, or sorted by something else than places.

    Args:
        stacks: all that there are.
        chosen: those whose kind is asked for.
        others: number of files in no series, among whose images nothing is chosen.
        parts: what is asked for.
        skipped: gets the number of files and series that are left out.
    """
    sorted_by = Counter(stack.order for stack in chosen if len(stack.slots) > 1)
    lacking = sum(not parts.chosen(len(stack.slots)) for stack in chosen)
    lacking += len({stack.places for stack in stacks.stacks} - {stack.places for stack in chosen})
    skipped.update({"copies of DICOM files": stacks.copies, "series without that slice": lacking})
    if not stacks.stacks:
        warnings.warn("--series has no effect: no input is a slice of a DICOM series", stacklevel=2)
    several, choices = _several(chosen)
    unplaced = "series do not say where their slices are: sorted by"
    _warn(
        "DICOM series",
        (stacks.copies, "files are copies of others and left out"),
        (stacks.split, "series have several orientations, each sorted by itself"),
        (several, f"series have several images at one place, {choices}"),
        *((sorted_by[order], f"{unplaced} {order}") for order in ("instance number", "name")),
        (lacking, f"series have no images for --frame {parts.frame} and are left out"),
        (others, "files are in no series, so that --frame does not choose among their images"),
    )


def _several(stacks: Iterable[series.Stack]) -> tuple[int, str]:
    """How many series have several images at one place; of the fullest how many, and choices."""
    groups = defaultdict(list)
    for stack in stacks:
        groups[stack.places].append(stack)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return 0, ""
    fullest = max(several, key=len)
    places = fullest[0].extent
    count = len(fullest) if places > 1 else sum(len(stack.slots) for stack in fullest)
    options = ", ".join(series.options([stack.kind for stack in fullest]))
    return len(several), (
        f"up to {count} at each of {places} places, and each kind is sorted by itself "
        f"(--frame takes one kind: {options})"
    )


def warn_of_slides(
    images: Sequence[str],
    slides: int,
    empty: int,
    overruled: Sequence[float],
    parts: Parts,
    skipped: Counter[str],
) -> None:
    """Warns of slides that are left out or have another resolution, and of files that are not cut.

    Args:
        images: their sources.
        slides: how many of them are slides.
        empty: how many of these have no tile with enough tissue.
        overruled: um/px that slides record where `Parts.slide_mpp` says something else.
        parts: what is asked for.
        skipped: gets the number of slides that are left out.
    """
    another = f"record another resolution, such as {overruled[0]:.4g} um/px" if overruled else ""
    skipped["slides without enough tissue"] += empty
    remote = sum("://" in s and s.lower().endswith(formats.MAY_BE_SLIDES) for s in images)
    if not remote and not slides:
        warnings.warn("--mpp has no effect: no input is a slide", stacklevel=2)
    _warn(
        "slides",
        (empty, f"have no tile with enough tissue (--tissue {parts.tissue:g}) and are left out"),
        (len(overruled), f"{another}; that of --slide-mpp, {parts.slide_mpp} um/px, is used"),
        (remote, "remote files are not cut into tiles: OpenSlide reads local files only"),
    )


def _warn(subject: str, *counts: tuple[int, str]) -> None:
    """Warns once of all that a user may not expect, each with its number."""
    if notes := [f"{count} {note}" for count, note in counts if count]:
        warnings.warn(f"{subject}: {'; '.join(notes)}", stacklevel=3)
