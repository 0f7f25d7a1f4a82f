"""What the pixels of a DICOM frame depend on, and nothing that identifies a patient."""

from dataclasses import dataclass

import numpy as np

# Those of the standard, including retired ones (PS3.3 C.7.3.1.1.1).
_MODALITIES = frozenset(
    "AR ASMT AU BI CR CT DOC DX ECG EPS ES FID GM HD IO IVOCT IVUS KER KO LEN LS M3D MG MR NM OAM "
    "OCT OP OPM OPT OPV OSS OT PLAN PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTPLAN RTRECORD "
    "RTSTRUCT RWV SEG SM SMR SR SRF STAIN TG US VA XA XC".split()
)


@dataclass(frozen=True, eq=False)
class Lut:
    """A lookup table: of the modality, of the VOI, or a palette.

    Attributes:
        first: the stored value that maps to `values[0]`.
        values: uint16 [n], or [n, 3] of a palette.
        bits: of each entry, according to the file.
    """

    first: int
    values: np.ndarray
    bits: int

    @property
    def bits_in_use(self) -> int:
        """The bits of the entries: fewer than the file says where the highest four are never used.

        Some writers (Agfa CR) say 16 of entries of 12 bits, or of 8, which would make the image
        nearly black; Horos and Cornerstone go by the greatest entry, too.
        """
        used = max(8, int(self.values.max(initial=0)).bit_length())
        return used if used <= self.bits - 4 else self.bits

    @property
    def note(self) -> str:
        """A note on entries that do not have the bits that the file says; "" if they do."""
        if self.bits_in_use == self.bits:
            return ""
        return f"entries of {self.bits_in_use} bits, said to be of {self.bits}"


@dataclass(frozen=True, eq=False)
class Header:
    """One frame of a file.

    Attributes:
        syntax: UID of the transfer syntax.
        sop_class: UID.
        modality: "CT" and so on, "" if the file has none.
        image_type: the words of Image Type, of the frame where it has its own.
        photometric: interpretation, "MONOCHROME2" and so on.
        samples: per pixel.
        planar: whether the samples of a frame follow each other plane by plane.
        rows, columns: of a frame, in pixels.
        frames: number of frames in the file, 1 if it does not say.
        frame: which of them this is, from 0.
        allocated, stored, high: bits per sample, bits in use, and the highest of them.
        signed: whether samples are two's complement.
        padding: first and last stored value that mark pixels outside of the image.
        slope, intercept: of the rescale to measured values; None if the file has none.
        modality_lut: replaces the rescale.
        units: of measured values: Rescale Type, or Modality LUT Type; "" if the file has none.
        colours_from: the first stored value that a supplemental palette colours; None without one.
        overlays: whether the bits that are not in use hold overlays.
        windows: (center, width) of each window; None for an invalid one.
        function: shape of the windows: "LINEAR", "LINEAR_EXACT" or "SIGMOID".
        voi_luts: replace the windows.
        burned_in: whether the file says that its pixels hold annotation that may identify.
        notes: what was left out while the header was read, in words of this project.
    """

    syntax: str
    sop_class: str
    modality: str
    image_type: tuple[str, ...]
    photometric: str
    samples: int
    planar: bool
    rows: int
    columns: int
    frames: int
    frame: int
    allocated: int
    stored: int
    high: int
    signed: bool
    padding: tuple[int, int] | None
    slope: float | None
    intercept: float | None
    modality_lut: Lut | None
    units: str
    colours_from: int | None
    overlays: bool
    windows: tuple[tuple[float, float] | None, ...]
    function: str
    voi_luts: tuple[Lut, ...]
    burned_in: bool
    notes: tuple[str, ...] = ()

    @property
    def modality_named(self) -> str:
        """The modality as it may be printed: the file may hold anything there, even a name."""
        if self.modality in _MODALITIES:
            return self.modality
        return "of another name" if self.modality else "none"

    @property
    def grey(self) -> bool:
        """Whether stored values are levels of grey."""
        return self.photometric in ("MONOCHROME1", "MONOCHROME2")

    @property
    def is_plain(self) -> bool:
        """Whether stored values are already grey levels: at most 8 bits, and no transformation."""
        scaled = (self.slope or 1.0, self.intercept or 0.0) != (1.0, 0.0)
        return self.stored <= 8 and not (scaled or self.modality_lut or self.signed)

    @property
    def frame_bytes(self) -> int:
        """Size of the uncompressed frame."""
        samples = 2 if self.photometric in ("YBR_FULL_422", "YBR_PARTIAL_422") else self.samples
        return -(-self.rows * self.columns * samples * self.allocated // 8)
