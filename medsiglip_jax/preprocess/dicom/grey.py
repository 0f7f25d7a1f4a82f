"""Grey images by the standard: modality, window, polarity. CT in three windows, as in training.

The chain is stored value -> rescale or modality LUT -> window or VOI LUT -> 0..255, inverted for
MONOCHROME1 (PS3.3 C.11.1, C.11.2; C.7.6.3.1.2). Training mapped three windows of CT to red, green
and blue (MedGemma report, 2507.05201); their width and level are in Hounsfield units, so they are
used for values in these units only. A window is applied even where it misses every value.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, UInt8

from medsiglip_jax.preprocess.dicom import hounsfield, samples
from medsiglip_jax.preprocess.dicom.header import Header, Lut
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage

# (width, level): bone and lung, soft tissue, brain. [-1225, 1025], [-135, 215] and [0, 80] HU.
CT_WINDOWS = ((2250.0, -100.0), (350.0, 40.0), (80.0, 40.0))
# Where a file has no window: the quantiles of its pixels that become black and white.
PERCENTILES = (0.005, 0.995)

# (width, level) of each.
Windows = Sequence[tuple[int | float, int | float]]
Values = Float64[np.ndarray, " k"]
# Measured values -> fractions of white, 0..1, [k] or for each channel [k, channels].
Fractions = Callable[[np.ndarray], np.ndarray]


def render(
    pixels: np.ndarray, header: Header, rules: Rules
) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """Renders a grey frame.

    Args:
        pixels: stored values [H, W].
        header: of the frame.
        rules: which windows.

    Returns:
        The pixels, and a description of the windows used, with what to know about them.

    Raises:
        UnreadableImage: the file has fewer windows than `rules.window` asks for.
    """
    shown = _Shown(pixels, header)
    fractions, words = _fractions(shown, header, rules)
    inverted = header.photometric == "MONOCHROME1"

    def shade(stored: Values) -> UInt8[np.ndarray, "k 3"]:
        levels = np.rint(255 * fractions(measured(stored, header))).astype(np.uint8)
        levels = 255 - levels if inverted else levels
        levels[samples.is_padding(stored, header)] = 0
        return np.broadcast_to(levels.reshape(len(levels), -1), (len(levels), 3))

    words += ", inverted" if inverted else ""
    if shown.is_flat(fractions):
        words += "; no value is inside the window, so all have one grey"
    return samples.shaded(pixels, shade), words


class _Shown:
    """The pixels that are grey: neither padding nor coloured."""

    def __init__(self, pixels: np.ndarray, header: Header):
        self._pixels, self._header = pixels, header

    @functools.cached_property
    def histogram(self) -> tuple[Values, np.ndarray]:
        """The measured values that occur, and how often; of more than 16 bits, each by itself."""
        stored, counts = samples.histogram(self._pixels)
        kept = (counts > 0) & ~samples.is_padding(stored, self._header) & np.isfinite(stored)
        if self._header.colours_from is not None:
            kept &= stored < self._header.colours_from
        return measured(stored[kept], self._header), counts[kept]

    def is_flat(self, fractions: Fractions) -> bool:
        """Whether different values all become one level, and none is shown by its colour."""
        if self._header.colours_from is not None:
            return False
        if self._header.padding is None:
            ends = np.array([self._pixels.min(), self._pixels.max()], np.float64)
            if not _is_one_level(fractions(measured(ends, self._header))):
                return False  # which takes a tenth of the time of the histogram
        values = self.histogram[0]
        if len(values) == 0 or values.min() == values.max():
            return False
        return _is_one_level(fractions(values))

    def limits(self) -> tuple[float, float]:
        """The measured values at `PERCENTILES` of these pixels; zeros if there are none."""
        x, counts = self.histogram
        if not len(x):
            return 0.0, 0.0
        order = np.argsort(x)
        reached = np.cumsum(counts[order]) / counts.sum()
        low, high = (float(x[order][np.searchsorted(reached, share)]) for share in PERCENTILES)
        return low, high


def _is_one_level(shares: np.ndarray) -> bool:
    return not np.ptp(np.rint(255 * shares), axis=0).any()


def _fractions(shown: _Shown, header: Header, rules: Rules) -> tuple[Fractions, str]:
    """How measured values become grey, and a description of it: by the windows of CT, else by VOI
    LUT, window, bits in use, or percentiles of the frame.

    The words are widths and levels, as in `--ct-window`; none of the file's own texts.
    """
    window = None if header.voi_luts or not header.windows else _chosen(header.windows, rules)
    windows, note = _ct_windows(shown, header, rules)
    if windows is not None:
        fractions, words = in_windows(windows)
        return fractions, f"W/L {words}{note}"
    if header.voi_luts:
        fractions, words = _by_lut(_chosen(header.voi_luts, rules))
    elif window is not None:
        function = {"SIGMOID": " sigmoid", "LINEAR_EXACT": " exact"}.get(header.function, "")
        words = f"W/L {window[1]:g}/{window[0]:g}{function}"
        fractions = functools.partial(windowed, window=window, function=header.function)
    elif header.is_plain:
        fractions, words = lambda x: ramp(x, 0.0, 2.0**header.stored - 1), "as stored"
    else:
        low, high = shown.limits()
        first, last = (100 * share for share in PERCENTILES)
        fractions = functools.partial(ramp, low=low, width=high - low)
        words = f"{low:g} to {high:g}, percentiles {first:g} and {last:g}"
    if None in header.windows and window is None and not header.voi_luts:
        note += "; the width of its window is below 1, so it is not used"
    return fractions, words + note


def _by_lut(lut: Lut) -> tuple[Fractions, str]:
    top, note = 2**lut.bits_in_use - 1, f"; {lut.note}" if lut.note else ""
    words = f"VOI LUT of {len(lut.values)} entries{note}"
    return lambda x: np.clip(looked_up(x, lut) / top, 0, 1), words


def in_windows(windows: Windows) -> tuple[Fractions, str]:
    """A channel for each window, and the same in words."""
    words = " ".join(f"{width:g}/{level:g}" for width, level in windows)

    def fractions(x: Values) -> np.ndarray:
        return np.stack([ramp(x, level - width / 2, width) for width, level in windows], -1)

    return fractions, words


def _ct_windows(shown: _Shown, header: Header, rules: Rules) -> tuple[Windows | None, str]:
    """(width, level) for CT, and a note; None for other modalities, and for values not in HU."""
    if header.modality != "CT":
        return None, ""
    in_hu, note = hounsfield.judged(header, lambda: shown.histogram)
    if not in_hu and rules.ct_window is not None:
        note += ", so the window asked for is not used"
    note = f"; {note}" if note else ""
    return ([rules.ct_window] if rules.ct_window else CT_WINDOWS) if in_hu else None, note


def measured(stored: Values, header: Header) -> Values:
    """Stored values -> what the modality measures, by rescale or lookup table (PS3.3 C.11.1)."""
    if header.modality_lut is not None:
        return looked_up(stored, header.modality_lut).astype(np.float64)
    return rescaled(stored, header)


def rescaled(stored: np.ndarray, header: Header) -> np.ndarray:
    """Stored values times slope plus intercept, in float64; unchanged where one is missing."""
    if header.slope is None or header.intercept is None:
        return stored
    return stored.astype(np.float64, copy=False) * header.slope + header.intercept


def looked_up(x: Values, lut: Lut) -> np.ndarray:
    """Entries of a table; values below or above it get the first or the last entry."""
    last = len(lut.values) - 1
    return lut.values[np.clip(np.nan_to_num(x) - lut.first, 0, last).astype(np.int64)]


def windowed(x: Values, window: tuple[float, float], function: str) -> Values:
    """The fraction of white, 0..1, by (center, width) (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    center, width = window
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return ramp(x, center - width / 2, width)
    low = center - 0.5 - (width - 1) / 2
    return ramp(x, low, width - 1) if width > 1 else (x > low).astype(np.float64)


def ramp(x: Values, low: float, width: int | float) -> Values:
    """The fraction of white, 0..1, rising linearly from `low` over `width`.

    It is 0 for NaN, and for all values if `width` is not positive.
    """
    if width <= 0:
        return np.zeros_like(x)
    return np.nan_to_num(np.clip((x - low) / width, 0, 1))


def _chosen(windows: Sequence, rules: Rules):
    number = rules.window if len(windows) > 1 else 0
    if number >= len(windows):
        raise UnreadableImage(f"DICOM with {len(windows)} windows; number {number} is asked for")
    return windows[number]
