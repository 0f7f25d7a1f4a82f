"""One DICOM file -> uint8 RGB [H, W, 3], by the rules asked for."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.preprocess import decode as decoding
from medsiglip_jax.preprocess.decode import Facts, UnreadableImage
from medsiglip_jax.preprocess.dicom import colour, frames, grey, official, samples
from medsiglip_jax.preprocess.dicom.file import File
from medsiglip_jax.preprocess.dicom.header import Header
from medsiglip_jax.preprocess.dicom.rules import MIDDLE, Rules

_JPEG = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70))
_BITS = (1, 8, 16, 32, 64)


def decode(data: bytes, rules: Rules) -> tuple[UInt8[np.ndarray, "h w 3"], Facts]:
    """Decodes one frame of a file.

    Args:
        data: the file.
        rules: which frame, and by which rules.

    Returns:
        The pixels, which may be read-only or 4 bytes apart, and what to tell about the file.

    Raises:
        UnreadableImage: the reason, in words of this project: none of the file's values is in it.
    """
    try:
        return _decode(data, rules)
    except UnreadableImage:
        raise
    except Exception:  # whatever hostile input may bring about; its message may hold values
        raise UnreadableImage("damaged DICOM: its pixels cannot be made sense of") from None


def _decode(data: bytes, rules: Rules) -> tuple[np.ndarray, Facts]:
    file = File(data)
    header = file.header(_frame(file.frames, rules))
    _check(header)
    if rules.name == "official":
        official.check(header)
        pixels = official.render(_raw(file, header), header, rules)
    else:
        pixels = _render(file, header, rules)
    return pixels, Facts(burned_in=header.burned_in, frames=header.frames)


def _frame(frames: int, rules: Rules) -> int:
    if rules.frame == MIDDLE or frames == 1:
        return frames // 2
    frame = int(rules.frame)
    if frame >= frames:
        raise UnreadableImage(f"DICOM with {frames} frames; number {frame} is asked for")
    return frame


def _check(header: Header) -> None:
    """Refuses, before anything is decoded, what is no image or too large a one."""
    rows, columns = header.rows, header.columns
    if rows < 1 or columns < 1:
        raise UnreadableImage(f"DICOM with no pixels, {columns}x{rows}")
    if rows * columns > decoding.MAX_PIXELS or header.frame_bytes > 3 * decoding.MAX_PIXELS:
        raise UnreadableImage(
            f"{columns}x{rows} pixels of {header.samples * header.allocated} bits are more than "
            f"the limit of {decoding.MAX_PIXELS} pixels (a decompression bomb or a whole slide)"
        )
    if header.samples not in (1, 3):
        raise UnreadableImage(f"DICOM with {header.samples} samples per pixel, expected 1 or 3")
    if header.allocated not in _BITS:
        raise UnreadableImage(f"DICOM with {header.allocated} bits per sample allocated")
    if not 1 <= header.stored <= header.high + 1 <= header.allocated:
        raise UnreadableImage("damaged DICOM: its numbers of bits contradict each other")
    if not header.photometric:
        raise UnreadableImage("DICOM without PhotometricInterpretation")


def _raw(file: File, header: Header) -> np.ndarray:
    """Samples as the container has them: from the codec, or from `pixel_array`."""
    if frames.compressed(header.syntax):
        guessed = dataclasses.replace(header, photometric="")  # colours are as the stream says
        return frames.decode(file.encoded(header), guessed)[0]
    return samples.in_use(file.native(header), header, header.stored, header.stored - 1)


def _render(file: File, header: Header, rules: Rules) -> np.ndarray:
    pixels = stored_values(file, header)
    if header.samples == 3 and not header.grey:
        return colour.render(pixels, header, done=header.syntax in _JPEG)
    if header.samples == 1 and header.grey:
        return grey.render(pixels, header, rules)
    if header.samples == 1 and header.photometric == "PALETTE COLOR" and header.stored <= 16:
        return colour.from_palette(pixels, header, file.palette(header))
    raise UnreadableImage("DICOM whose colours do not fit its samples per pixel")


def stored_values(file: File, header: Header) -> np.ndarray:
    """The samples of a frame, [H, W] or [H, W, S], with their sign and without bits not in use."""
    if not frames.compressed(header.syntax):
        return samples.in_use(file.native(header), header, header.stored, header.high)
    pixels, precision = frames.decode(file.encoded(header), header)
    if precision is None:
        return samples.in_use(pixels, header, header.stored, header.high)
    bits = min(precision, header.stored)
    return samples.in_use(pixels, header, bits, bits - 1)
