"""Whether the values of a CT file are in Hounsfield units, as the windows of CT expect."""

from collections.abc import Callable

import numpy as np

from medsiglip_jax.preprocess.dicom.header import Header

# The values that occur, and how often.
Histogram = tuple[np.ndarray, np.ndarray]
# Hounsfield units of air, and of tissue, which most slices hold some of.
_AIR, _TISSUE = (-1100.0, -850.0), (-150.0, 150.0)
_SHARE = 0.01  # of the pixels: enough to say that there is some
# CT Image, Enhanced CT Image, Legacy Converted Enhanced CT Image (PS3.4 B.5).
_CT_IMAGES = frozenset(f"1.2.840.10008.5.1.4.1.1.2{x}" for x in ("", ".1", ".2"))
# Parts of Image Type that name no attenuation: renderings, screenshots, tomosynthesis, maps of
# perfusion, materials, statistics (PS3.3 C.8.16.1, and what vendors write).
_OTHER = (
    *("3D", "RENDER", "VRT", "VOLREN", "SSD", "SHADED", "SURFACE", "SCREEN", "CAPTURE", "TOMO"),
    *("PERF", "CBF", "CBV", "MTT", "TTP", "TMAX", "IODINE", "MAT_", "Z_EFF", "ATOMIC", "DENSITY"),
    *("STD_DEV", "DIVISION", "T_TEST", "Z_SCORE", "QUANTITY", "FUSION", "DOSE"),
)
# Defined terms of Rescale Type (PS3.3 C.11.1.1.2); a file may hold anything else there.
_TYPES = frozenset("OD HU US MGML Z_EFF ED EDW HU_MOD PCT".split())


def judged(header: Header, measured: Callable[[], Histogram]) -> tuple[bool, str]:
    """Whether values are in Hounsfield units, and what to tell about it; "" if nothing.

    They are if the file says so. Where it says nothing, a CT Image is in Hounsfield units by the
    standard (PS3.3 C.8.2.1: Rescale Type is required for all others), unless it is derived and
    cannot be. Some scanners say "unspecified" of originals, whose values then decide.

    Args:
        header: of a file of modality CT.
        measured: computes the histogram of its measured values.
    """
    if why := _cannot_be(header):
        return False, f"not in Hounsfield units ({why})"
    if header.units == "HU" or header.units.startswith("HOUNSFIELD"):
        return True, ""
    if header.units in ("US", "UNSPECIFIED") and _is_plausible(header, measured):
        return True, "said to be in unspecified units, and taken for Hounsfield units by its values"
    if header.units:
        named = header.units if header.units in _TYPES else "of another name"
        return False, f"not in Hounsfield units (Rescale Type {named})"
    if header.sop_class not in _CT_IMAGES:
        return False, "not in Hounsfield units (no CT Image, and no Rescale Type)"
    original = header.image_type[:1] == ("ORIGINAL",)
    others = ("TOMO",) if original else _OTHER  # dynamic originals name their perfusion, too
    if any(part in word for word in header.image_type[1:] for part in others):
        return False, "not in Hounsfield units (Image Type names a rendering, a screen or a map)"
    if original or _holds_air(header):
        return True, ""
    return False, "not in Hounsfield units (no original, and none of its values could be air)"


def _cannot_be(header: Header) -> str:
    """Why values are not measured at all; "" if they may be."""
    if header.modality_lut is None and (header.slope is None or header.intercept is None):
        return "it has no rescale"
    if header.modality_lut is not None and not header.units:
        return "its modality LUT has no type"
    return "8 bits without a rescale" if header.is_plain else ""


def _holds_air(header: Header) -> bool:
    """Whether stored values reach down to air."""
    if header.slope is None or header.intercept is None:
        return False
    lowest = -(1 << (header.stored - 1)) if header.signed else 0
    return lowest * header.slope + header.intercept <= _AIR[0] + 200


def _is_plausible(header: Header, measured: Callable[[], Histogram]) -> bool:
    """Whether "unspecified" units are those of Hounsfield."""
    first = header.image_type[:1]
    original = header.sop_class in _CT_IMAGES and first in ((), ("ORIGINAL",))
    if not original or "LOCALIZER" in header.image_type or not _holds_air(header):
        return False
    if first and not header.signed:
        return True  # an original that is shifted by what makes air 0
    values, counts = measured()
    near = ((values >= low) & (values <= high) for low, high in (_AIR, _TISSUE))
    return all(counts[x].sum() >= _SHARE * counts.sum() > 0 for x in near)
