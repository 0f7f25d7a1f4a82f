"""NIfTI volumes: axial slices as radiologists see them. nibabel reads the headers.

Axes are reordered and flipped to right, anterior, superior (RAS) as nearly as that goes without
resampling: slice 0 is nearest to the feet; anterior is up, and the patient's right is on the left.
Where a file has no orientation, nibabel assumes that the first axis runs from right to left.

The files do not say what their values are, so `Rules.volume` has to: "ct" means Hounsfield units,
rendered in the windows of CT; "percentile" renders from the 0.5th to the 99.5th percentile of the
volume, not of the slice, so that slices can be compared and air is not stretched to noise. Volumes
of colours (RGB24, RGBA32) are shown as they are, whatever it says.
"""

import gzip
import io
import math
import os
import threading
import zlib
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.preprocess.bytes import open_binary, read_bytes
from medsiglip_jax.preprocess.dicom import grey, samples
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import (
    NIFTI_PAIR,
    Facts,
    UnreadableImage,
    is_nifti_header,
)

# Bytes that a compressed volume may inflate to: 4,000 slices of 512x512 pixels at 16 bits.
MAX_INFLATED = 1 << 31
# Volumes that may be inflated at the same time; `handles.MAX_BYTES` counts finished ones only.
_AT_ONCE = threading.Semaphore(2)
_MAX_OFFSET = 1 << 26  # bytes before the first voxel: the header and its extensions
_MAX_SIDE = 1 << 16  # voxels, along one axis
_HEADERS = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}  # by their size
_COLOURS = (tuple("RGB"), tuple("RGBA"))  # fields of nibabel's dtypes; alpha is dropped
_GZIP = b"\x1f\x8b"
_SAMPLED = 64  # evenly spaced slices that percentiles are computed from
_BAND = 1 << 24  # voxels of a slice that are copied at a time
_VALUES = 1 << 24  # how many of their values are taken at most


@dataclass(frozen=True)
class _Layout:
    """Where the values are stored, and what they mean.

    Attributes:
        shape: of the first volume in the file, as stored.
        volumes: number of volumes in the file.
        dtype, offset: of the first value.
        slope, intercept: value = stored * slope + intercept.
        axes: nibabel's orientation: the RAS axis of each stored axis, and 1 or -1.
    """

    shape: tuple[int, ...]
    volumes: int
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float
    axes: np.ndarray

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def frames(self) -> int:
        return self.shape[self.axes[:, 0].tolist().index(2)]


def count_frames(stream: Any) -> int:
    """How many axial slices a volume has, from its header.

    Raises:
        UnreadableImage: not NIfTI, or damaged; the reason.
    """
    return _layout(_inflated(stream)).frames


def open_file(path: str) -> "Volume":
    """Opens a volume: memory-mapped if the file is local and not compressed, else read.

    Raises:
        UnreadableImage: not NIfTI, damaged, cut off, or compressed and larger than `MAX_INFLATED`;
            the reason, without the path.
    """
    if "://" in path:
        with _AT_ONCE:
            plain = _inflated(io.BytesIO(read_bytes(path)))
            layout = _layout(plain)
            return Volume(_read(plain, layout), layout)
    with open_binary(path) as stream:
        plain = _inflated(stream)
        layout = _layout(plain)
        if plain is stream:
            if os.path.getsize(path) < layout.offset + layout.nbytes:
                raise UnreadableImage("NIfTI with fewer values than it says: cut off")
            stored = np.memmap(path, layout.dtype, "r", layout.offset, layout.shape, order="F")
            return Volume(stored, layout)
        with _AT_ONCE:
            return Volume(_read(plain, layout), layout)


class Volume:
    """An open volume; several threads may render its slices.

    Attributes:
        frames: number of axial slices.
        nbytes: in memory.
    """

    def __init__(self, stored: np.ndarray, layout: _Layout):
        self._values = nibabel.orientations.apply_orientation(stored, layout.axes)  # a view
        self._layout, self._lock = layout, threading.Lock()
        self._limits: tuple[float, float] | None = None
        self.frames = layout.frames
        self.nbytes = 0 if isinstance(stored, np.memmap) else layout.nbytes

    def render(self, number: int, rules: Rules) -> tuple[UInt8[np.ndarray, "h w 3"], Facts]:
        """Renders an axial slice, from 0 at the feet.

        Returns:
            The pixels, 4 bytes apart unless they are stored as colours, and facts.

        Raises:
            UnreadableImage: there are fewer slices, or the rules do not serve volumes.
        """
        if rules.name == "official":
            raise UnreadableImage("official rules: NIfTI volumes are not served")
        if not number < self.frames:
            raise UnreadableImage(f"volume of {self.frames} slices; number {number} is asked for")
        plane = self._values[::-1, ::-1, number].T
        rules.check_size(plane.shape[1], plane.shape[0])
        first = f", first of {self._layout.volumes} volumes" if self._layout.volumes > 1 else ""
        if plane.dtype.names:
            pixels = np.stack([plane[name] for name in "RGB"], -1)
            seen = f"NIfTI volume{first}: colours, as stored"
            return pixels, Facts(frames=self.frames, frame=number, seen=seen)
        fractions, words = self._fractions(rules)

        def shade(x: np.ndarray) -> UInt8[np.ndarray, "k 3"]:
            levels = np.rint(255 * fractions(self._measured(x))).astype(np.uint8)
            return np.broadcast_to(levels, (len(x), 3))

        seen = f"NIfTI volume{first}: {words}"
        return _shaded(plane, shade), Facts(frames=self.frames, frame=number, seen=seen)

    def _fractions(self, rules: Rules) -> tuple[grey.Fractions, str]:
        """How measured values become one grey channel, or three, and a description of it."""
        if rules.volume == "ct":
            return grey.in_windows([rules.ct_window] if rules.ct_window else grey.CT_WINDOWS)
        low, high = self._percentiles()
        words = f"{low:g} to {high:g}, the 0.5th to the 99.5th percentile"
        return lambda x: grey.ramp(x, low, high - low)[:, None], words

    def _measured(self, stored: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # stored floats may be NaN or infinite
            return stored.astype(np.float64) * self._layout.slope + self._layout.intercept

    def _percentiles(self) -> tuple[float, float]:
        with self._lock:
            if self._limits is None:
                sampled = self._values[..., :: -(-self.frames // _SAMPLED)]
                step = max(1, math.ceil(math.sqrt(sampled.size / _VALUES)))
                sampled = sampled[::step, ::step]
                finite = sampled[np.isfinite(sampled)]
                finite = finite.astype(finite.dtype.newbyteorder("="))
                limits = np.zeros(1)
                if finite.size:
                    limits = np.quantile(finite, grey.PERCENTILES, method="inverted_cdf")
                measured = self._measured(limits)
                self._limits = float(measured.min()), float(measured.max())
            return self._limits


def _shaded(plane: np.ndarray, shade: samples.Shade) -> UInt8[np.ndarray, "h w 3"]:
    """`samples.shaded` of a slice, some rows at a time: they have to be copied for it."""
    rows = max(1, _BAND // plane.shape[1])
    if len(plane) <= rows:
        return samples.shaded(np.ascontiguousarray(plane), shade)
    pixels = np.empty((*plane.shape, 4), np.uint8)[..., :3]
    for top in range(0, len(plane), rows):
        band = np.ascontiguousarray(plane[top : top + rows])
        pixels[top : top + rows] = samples.shaded(band, shade)
    return pixels


# ----------------------------------------------------------------------------------------- reading


def _inflated(stream: Any) -> Any:
    """The stream, decompressed if its content is gzip, whatever its name."""
    start = stream.read(len(_GZIP))
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if start == _GZIP else stream


def _layout(stream: Any) -> _Layout:
    """Reads the header; only its numbers are used, since its texts may identify a patient."""
    raw = bytes(_exactly(stream, 348))
    sizes = int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")
    size = next((n for n in sizes if n in _HEADERS), 348)
    raw += bytes(_exactly(stream, size - 348))
    if raw[344:347] != b"n+1" and raw[4:7] != b"n+2":
        raise UnreadableImage(NIFTI_PAIR if is_nifti_header(raw) else "not NIfTI")
    try:
        header = _HEADERS[size](raw, check=False)  # its checks print
        shape, dtype = tuple(map(int, header.get_data_shape())), header.get_data_dtype()
        slope, intercept = header.get_slope_inter()
        axes = nibabel.orientations.io_orientation(header.get_best_affine())
        offset = int(header["vox_offset"])
    except Exception:  # nibabel's messages may quote the header
        raise UnreadableImage("damaged NIfTI: its header cannot be read") from None
    shape = (*shape, 1, 1, 1)[: max(3, len(shape))]
    numbers = dtype.kind in "iuf" and dtype.itemsize <= 8
    if not (numbers or dtype.names in _COLOURS) or math.prod(shape[4:]) > 1:
        raise UnreadableImage("NIfTI with vectors, complex numbers or floats of 128 bits")
    sizes_make_sense = 1 <= min(shape) and max(shape) <= _MAX_SIDE and size <= offset <= _MAX_OFFSET
    if not sizes_make_sense or not np.isfinite(axes).all():
        raise UnreadableImage("damaged NIfTI: its header makes no sense")
    return _Layout(
        shape[:3], (*shape, 1)[3], dtype, offset, 1.0 if slope is None else float(slope),
        float(intercept or 0), axes.astype(int),
    )  # fmt: skip


def _read(stream: Any, layout: _Layout) -> np.ndarray:
    if layout.nbytes > MAX_INFLATED:
        limit = f"the limit of {MAX_INFLATED} (a decompression bomb?)"
        raise UnreadableImage(f"NIfTI that inflates to {layout.nbytes} bytes, more than {limit}")
    _exactly(stream, layout.offset - stream.tell())
    values = np.frombuffer(_exactly(stream, layout.nbytes), layout.dtype)
    return values.reshape(layout.shape, order="F")


def _exactly(stream: Any, count: int) -> bytearray:
    """Reads `count` bytes; memory grows as they arrive, for the header may claim any number."""
    data = bytearray()
    try:
        while len(data) < count and (block := stream.read(min(1 << 24, count - len(data)))):
            data += block
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UnreadableImage("damaged NIfTI: it cannot be inflated, or is cut off") from None
    if len(data) < count:
        raise UnreadableImage("NIfTI with fewer values than it says: cut off")
    return data
