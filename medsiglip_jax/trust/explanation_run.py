"""`explain`: from files to maps, pictures and a page in a folder.

    DIR/NAME.npz       map, float32 on the pixels of the original
    DIR/NAME.png       the map over the image
    DIR/explain.html   image, map, curves and figures of each
    DIR/explain.json   the same without the maps, and how they were made

The folder appears whole or not at all. NAME is made of the image's own name.
"""

import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax import __version__
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.credentials import without
from medsiglip_jax.pages.contact_sheet import save_png
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.dicom.rules import MIDDLE, Rules
from medsiglip_jax.preprocess.facts import Facts, UnreadableImage, describe
from medsiglip_jax.preprocess.load import warn_about_pixels
from medsiglip_jax.preprocess.names import parse
from medsiglip_jax.trust import explanation_page, folders, overlay
from medsiglip_jax.trust.explanation import Explainer, Explanation

RECORD, PAGE = "explain.json", "explain.html"
_LONGEST = 100  # bytes of an image's name in the names of files


def run(
    explainer: Explainer,
    images: Sequence[str],
    output: places.Given,
    rules: Rules = Rules(),
    overwrite: bool = False,
    on_image: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Explains image files and writes the results.

    Args:
        explainer: makes the maps of its targets.
        images: sources, see `preprocess.names`.
        output: a new folder, or one that this wrote before.
        rules: how DICOM files and volumes become pixels.
        overwrite: replace whatever is there.
        on_image: called with 1 after each image.

    Returns:
        The content of explain.json. Its `images` has, for each image and text, `image`, `text`,
        `contrast`, `method`, `steps`, `completeness`, `score`, `baseline_score`,
        `insertion_minus_deletion`, `random`, `better_than_random`, and the names of its files,
        `map` and `overlay`; or `image` and `error` of an image that is unreadable.

    Raises:
        FileExistsError: `output` holds anything else.
        ValueError: images lie in `output`, which would be replaced, or there are none.
        OSError: a disk or a network fails.
    """
    if not images:
        raise ValueError("no images to explain")
    folder = places.at(output)
    check_folder(folder, images, overwrite)
    with storage.new_folder(folder, overwrite=True, marker=RECORD) as partial:
        writer = _Writer(explainer, rules, partial, on_image)
        with open(partial / PAGE, "w", encoding="utf-8") as page:
            page.writelines(explanation_page.page(writer.sections(images)))
        record = _how(explainer, rules) | {"images": writer.records}
        json_files.write(partial / RECORD, record)
    _warn(writer.facts, images, rules)
    return record


class _Writer:
    """Writes maps and pictures as the sections of the page are asked for."""

    def __init__(
        self, explainer: Explainer, rules: Rules, folder: Path, on_image: Callable[[int], Any]
    ):
        self.records: list[dict[str, Any]] = []
        self.facts: list[Facts] = []
        self._explainer, self._rules, self._folder = explainer, rules, folder
        self._on_image = on_image

    def sections(self, images: Sequence[str]) -> Iterator[str]:
        """The section of each image."""
        for source, name in zip(images, file_names(images), strict=True):
            shown = describe(source)
            try:
                pixels, facts = sources.read(source, rules=self._rules)
                explanations = self._explainer(pixels, shown)
            except UnreadableImage as error:
                self.records.append({"image": without(source), "error": error.reason})
                yield explanation_page.unreadable(shown, f"unreadable: {error.reason}")
            else:
                self.facts.append(facts)
                self.records += self._written(pixels, explanations, source, name)
                yield explanation_page.section(pixels, explanations)
            self._on_image(1)

    def _written(
        self, pixels: np.ndarray, explanations: Sequence[Explanation], source: str, name: str
    ) -> Iterator[dict[str, Any]]:
        for number, explanation in enumerate(explanations, start=1):
            stem = name if len(explanations) == 1 else f"{name}.{number}"
            np.savez_compressed(self._folder / f"{stem}.npz", map=explanation.map)
            save_png(overlay.draw(pixels, explanation), self._folder / f"{stem}.png")
            files = {"map": f"{stem}.npz", "overlay": f"{stem}.png"}
            yield explanation.record | {"image": without(source)} | files


def _how(explainer: Explainer, rules: Rules) -> dict[str, Any]:
    """How the maps are made."""
    options, model = explainer.options, explainer.targets[0].model
    return {
        "generator": explanation_page.MARK,
        "version": __version__,
        "model": {"source": model.source, "sha256": model.sha256},
        "texts": [target.text for target in explainer.targets],
        "contrast": explainer.targets[0].contrast,
        "preprocess": explainer.preprocess,
        "dicom": rules.to_dict(),
        "method": options.method,
        "fill": options.fill,
        "seed": options.seed,
        "scale": overlay.SCALE,
    }


def _warn(facts: Sequence[Facts], images: Sequence[str], rules: Rules) -> None:
    """Says once what should be known of the pixels."""
    warn_about_pixels(
        sum(f.orientation != 1 for f in facts), sum(f.burned_in for f in facts),
        sum(f.unusual for f in facts), sum(f.dark for f in facts), len(images),
    )  # fmt: skip
    several = sum(f.frames > 1 for f in facts)
    if several and rules.frame == MIDDLE and not all(parse(image)[1] for image in images):
        warnings.warn(
            f"{several} of {len(images)} files have several frames, slices or pages; one of each "
            "was taken, the middle one, or of pictures the first, unless named (--frame)",
            stacklevel=3,
        )


# ------------------------------------------------------------------------------ names and folders


def file_names(images: Sequence[str]) -> list[str]:
    """A name for the files of each image: plain, and no two alike, even without regard to case.

    "a/scan.dcm#frame=3" becomes "scan-frame-3"; a second scan.png becomes "scan-2".
    """
    taken, names = set(), []
    for source in images:
        name, number = _plain(source), 1
        while (unique := f"{name}-{number}" if number > 1 else name).casefold() in taken:
            number += 1
        taken.add(unique.casefold())
        names.append(unique)
    return names


def _plain(source: str) -> str:
    file, part = parse(without(source))
    stem = os.path.splitext(re.split(r"[/\\]", file.rstrip("/\\"))[-1])[0]
    stem = f"{stem}-{part}" if part is not None else stem
    letters = unicodedata.normalize("NFC", stem)
    plain = re.sub(r"[^\w.+-]+", "-", letters).lstrip(".")
    plain = plain.encode()[:_LONGEST].decode(errors="ignore").strip("-.")
    return plain if places.is_plain_name(plain) else f"image-{plain}".rstrip("-")


def check_folder(folder: places.Place, images: Sequence[str], overwrite: bool) -> None:
    """Refuses a folder if replacing it would remove what `run` did not write, or what it reads.

    Raises:
        FileExistsError: the folder holds anything else than an earlier result; but with `overwrite`
            only if it is no folder.
        ValueError: an image lies in it.
    """
    if isinstance(folder, Path):
        inside = os.path.join(os.path.realpath(folder), "")
        for source in images:
            if os.path.realpath(parse(source)[0]).startswith(inside):
                raise ValueError(
                    f"{describe(source)} lies in {folder}, which would be replaced; choose another "
                    "folder for the output"
                )
    own = None if overwrite else _own(folder)
    advice = "choose a new folder, or replace it with --overwrite"
    folders.check(folder, own, "explanation", advice)


def _own(folder: places.Place) -> set[str]:
    """Names of the files that an earlier result in the folder consists of."""
    try:
        record = json_files.read(folder / RECORD)
        if record.get("generator") != explanation_page.MARK:
            return set()
        names = {image[key] for image in record["images"] for key in ("map", "overlay")
                 if key in image}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {RECORD, PAGE, *names}
