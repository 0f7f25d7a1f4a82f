"""One DICOM file -> uint8 RGB [H, W, 3], by the rules asked for."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.preprocess import costs
from medsiglip_jax.preprocess.dicom import colour, frames, grey, official, samples, sniff
from medsiglip_jax.preprocess.dicom.file import File
from medsiglip_jax.preprocess.dicom.header import Header
from medsiglip_jax.preprocess.dicom.planes import count_frames, is_label, planes  # noqa: F401
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.dicom.tags import damaged
from medsiglip_jax.preprocess.facts import Facts, UnreadableImage

_BITS = (1, 8, 16, 32, 64)
_ABOVE = "bits above Bits Stored are set, and not used"
_BEYOND = "values beyond Bits Stored, which are clipped to it"


class Image:
    """An open file; several threads may render its frames.

    Attributes:
        frames: how many it has.
        nbytes: in memory.
    """

    def __init__(self, data: bytes):
        with damaged("its pixels cannot be made sense of"):
            self._file = File(data)
            self.frames, self.nbytes = self._file.frames, self._file.nbytes

    def render(self, number: int, rules: Rules) -> tuple[UInt8[np.ndarray, "h w 3"], Facts]:
        """Decodes a frame, from 0.

        Returns:
            The pixels, which may be read-only or 4 bytes apart, and what to tell about the file.

        Raises:
            UnreadableImage: the reason, in words of this project: none of the file's values is in
                it.
        """
        if number >= self.frames:
            raise UnreadableImage(f"DICOM with {self.frames} frames; number {number} is asked for")
        with damaged("its pixels cannot be made sense of"):
            return _decode(self._file, number, rules)


open_bytes = Image


def _decode(file: File, frame: int, rules: Rules) -> tuple[np.ndarray, Facts]:
    if reason := file.refusal(rules.slide_labels):
        raise UnreadableImage(reason)
    header = file.header(frame)
    _check(header, rules)
    if rules.name == "official":
        official.check(header)
        pixels, words = official.render(_raw(file, header, rules), header, rules)
    else:
        pixels, words = _render(file, header, rules)
    seen = f"modality {header.modality_named}, rules {rules.name}: {words}"
    return pixels, Facts(1, header.burned_in, header.frames, frame, seen, file.subject)


def _check(header: Header, rules: Rules) -> None:
    """Refuses, before anything is decoded, what is no image or too large a one."""
    rules.check_size(header.columns, header.rows)
    size, limit = header.frame_bytes, 3 * rules.max_pixels
    if size > limit:
        raise UnreadableImage(f"DICOM with frames of {size} bytes, more than the limit of {limit}")
    if header.samples not in (1, 3):
        raise UnreadableImage(f"DICOM with {header.samples} samples per pixel, expected 1 or 3")
    if header.allocated not in _BITS:
        raise UnreadableImage(f"DICOM with {header.allocated} bits per sample allocated")
    if not 1 <= header.stored <= header.high + 1 <= header.allocated:
        raise UnreadableImage("damaged DICOM: its numbers of bits contradict each other")
    if sniff.is_compressed(header.syntax):
        frames.check(header.syntax)
    if not header.photometric:
        raise UnreadableImage("DICOM without PhotometricInterpretation")


def _raw(file: File, header: Header, rules: Rules) -> np.ndarray:
    """Samples as the container has them: from the codec, or from `pixel_array`."""
    if header.syntax in official.BY_PIL:
        return frames.decode_by_pil(_encoded(file, header, rules), header)
    if sniff.is_compressed(header.syntax):
        guessed = dataclasses.replace(header, photometric="")  # colours are as the stream says
        return frames.decode(_encoded(file, header, rules), guessed).pixels
    return samples.in_use(file.native(header), header, header.stored, header.stored - 1)


def _render(file: File, header: Header, rules: Rules) -> tuple[np.ndarray, str]:
    pixels, is_rgb, notes = _stored_values(file, header, rules)
    if header.samples == 3 and not header.grey:
        image, words = colour.render(pixels, header, is_rgb), "colours"
    elif header.samples == 1 and header.grey:
        image, words = grey.render(pixels, header, rules)
        if header.colours_from is not None:
            palette = file.palette(header)
            image = colour.supplemented(image, pixels, header, palette)
            words += f"; a palette colours the values from {header.colours_from}"
            notes += [palette.note] if palette.note else []
    elif header.samples == 1 and header.photometric == "PALETTE COLOR" and header.stored <= 16:
        palette = file.palette(header)
        image, words = colour.from_palette(pixels, palette), "a palette of colours"
        notes += [palette.note] if palette.note else []
    else:
        raise UnreadableImage("DICOM whose colours do not fit its samples per pixel")
    return image, "; ".join([words, *header.notes, *notes])


def _encoded(file: File, header: Header, rules: Rules) -> bytes:
    encoded = file.encoded(header)
    costs.check_frame(header, len(encoded), rules)
    return encoded


def _stored_values(file: File, header: Header, rules: Rules) -> tuple[np.ndarray, bool, list[str]]:
    """The samples of a frame, [H, W] or [H, W, S], with their sign and without bits not in use;
    whether a codec has converted them to RGB; and notes."""
    if not sniff.is_compressed(header.syntax):
        pixels, notes = _laid_out(file.native(header), header)
        return pixels, False, notes
    pixels, precision, is_rgb, note = frames.decode(_encoded(file, header, rules), header)
    notes = [note] if note else []
    if precision is None:
        pixels, notes = _laid_out(pixels, header)
        return pixels, is_rgb, notes
    if precision <= header.stored:
        return samples.in_use(pixels, header, precision, precision - 1), is_rgb, notes
    pixels, beyond = samples.clipped(pixels, header, precision)
    return pixels, is_rgb, [*notes, *([_BEYOND] if beyond else [])]


def _laid_out(pixels: np.ndarray, header: Header) -> tuple[np.ndarray, list[str]]:
    notes = [_ABOVE] if samples.exceeds(pixels, header) else []
    return samples.in_use(pixels, header, header.stored, header.high), notes
