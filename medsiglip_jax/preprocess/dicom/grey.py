"""Grey images by the standard: modality, window, polarity. CT in three windows, as in training.

The chain is stored value -> rescale or modality LUT -> window or VOI LUT -> 0..255, inverted for
MONOCHROME1 (PS3.3 C.11.1, C.11.2; C.7.6.3.1.2). Training mapped three windows of CT to red, green
and blue (MedGemma report, 2507.05201); their width and level are in Hounsfield units.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, UInt8

from medsiglip_jax.preprocess.dicom import samples
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
        The pixels, and a description of the windows used.

    Raises:
        UnreadableImage: the file has fewer windows than `rules.window` asks for.
    """
    fractions, words = _fractions(pixels, header, rules)
    inverted = header.photometric == "MONOCHROME1"

    def shade(stored: Values) -> UInt8[np.ndarray, "k 3"]:
        levels = np.rint(255 * fractions(measured(stored, header))).astype(np.uint8)
        levels = 255 - levels if inverted else levels
        levels[_is_padding(stored, header)] = 0
        return np.broadcast_to(levels.reshape(len(levels), -1), (len(levels), 3))

    return samples.shaded(pixels, shade), words + (", inverted" if inverted else "")


def _fractions(pixels: np.ndarray, header: Header, rules: Rules) -> tuple[Fractions, str]:
    """By the windows of CT, else by VOI LUT, window, bits in use, or percentiles of the frame.

    The words are widths and levels, as in `--ct-window`; none of the file's own texts.
    """
    window = None if header.voi_luts or not header.windows else _chosen(header.windows, rules)
    if (windows := _ct_windows(header, rules)) is not None:
        fractions, words = in_windows(windows)
        return fractions, f"W/L {words}"
    if header.voi_luts:
        lut = _chosen(header.voi_luts, rules)
        words, bits = f"VOI LUT of {len(lut.values)} entries", _bits_in_use(lut)
        if bits != lut.bits:
            words += f", which are of {bits} bits and said to be of {lut.bits}"
        return lambda x: np.clip(looked_up(x, lut) / (2**bits - 1), 0, 1), words
    if window is not None:
        function = {"SIGMOID": " sigmoid", "LINEAR_EXACT": " exact"}.get(header.function, "")
        center, width = window
        words = f"W/L {width:g}/{center:g}{function}"
        return lambda x: windowed(x, center, width, header.function), words
    if _is_plain(header):
        return lambda x: ramp(x, 0.0, 2.0**header.stored - 1), "as stored"
    low, high = _limits(pixels, header)
    first, last = (100 * share for share in PERCENTILES)
    words = f"{low:g} to {high:g}, percentiles {first:g} and {last:g}"
    return lambda x: ramp(x, low, high - low), words


def in_windows(windows: Windows) -> tuple[Fractions, str]:
    """A channel for each window, and the same in words."""
    words = " ".join(f"{width:g}/{level:g}" for width, level in windows)

    def fractions(x: Values) -> np.ndarray:
        return np.stack([ramp(x, level - width / 2, width) for width, level in windows], -1)

    return fractions, words


def _ct_windows(header: Header, rules: Rules) -> Windows | None:
    """(width, level) for CT; None for other modalities, and for CT whose values are not in HU."""
    if header.modality != "CT":
        return None
    if rules.ct_window is not None:
        return [rules.ct_window]
    return None if header.slope is None or header.intercept is None else CT_WINDOWS


def measured(stored: Values, header: Header) -> Values:
    """Stored values -> what the modality measures, by rescale or lookup table (PS3.3 C.11.1)."""
    if header.modality_lut is not None:
        return looked_up(stored, header.modality_lut).astype(np.float64)
    return rescaled(stored, header)


def rescaled(stored: np.ndarray, header: Header) -> np.ndarray:
    """In float64, by slope and intercept; unchanged where one is missing."""
    if header.slope is None or header.intercept is None:
        return stored
    return stored.astype(np.float64, copy=False) * header.slope + header.intercept


def _bits_in_use(lut: Lut) -> int:
    """The bits of the entries: fewer than the file says where the highest four are never used.

    Some writers (Agfa CR) say 16 of entries of 12 bits, which would make the image nearly black;
    Horos and Cornerstone go by the greatest entry, too.
    """
    used = int(lut.values.max(initial=0)).bit_length()
    return used if 0 < used <= lut.bits - 4 else lut.bits


def looked_up(x: Values, lut: Lut) -> np.ndarray:
    """Entries of a table; values below or above it get the first or the last entry."""
    last = len(lut.values) - 1
    return lut.values[np.clip(np.nan_to_num(x) - lut.first, 0, last).astype(np.int64)]


def windowed(x: Values, center: float, width: float, function: str) -> Values:
    """The fraction of white, 0..1, in a window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
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


def _is_plain(header: Header) -> bool:
    """Whether stored values are already grey levels: 8 bits or fewer, and no transformation."""
    scaled = (header.slope or 1.0, header.intercept or 0.0) != (1.0, 0.0)
    return header.stored <= 8 and not (scaled or header.modality_lut or header.signed)


def _is_padding(stored: Values, header: Header) -> np.ndarray:
    if header.padding is None:
        return np.zeros(stored.shape, bool)
    return (stored >= header.padding[0]) & (stored <= header.padding[1])


def _limits(pixels: np.ndarray, header: Header) -> tuple[float, float]:
    """`PERCENTILES` of the measured values, without padding."""
    stored, counts = samples.histogram(pixels)
    kept = (counts > 0) & ~_is_padding(stored, header) & np.isfinite(stored)
    if not kept.any():
        return 0.0, 0.0
    x, counts = measured(stored[kept], header), counts[kept]
    order = np.argsort(x)
    reached = np.cumsum(counts[order]) / counts.sum()
    low, high = (float(x[order][np.searchsorted(reached, share)]) for share in PERCENTILES)
    return low, high
