"""Whether bytes are DICOM, and their transfer syntax; file names do not matter."""

import struct

# Transfer syntaxes without compression: implicit and explicit little endian, explicit big endian.
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
START = 132  # bytes that `is_dicom` looks at

# What a data set without a preamble may start with: file meta information, whose group length or
# version some writers leave out; character set, image type, dates and times, SOP class and
# instance, accession number, modality (PS3.3 C.12.1, C.7.2.1); or the patient's name.
_FIRST = {
    2: {0, 1, 2, 3, 0x10},
    8: {0, 1, 5, 8, 0x12, 0x13, 0x14, 0x16, 0x18, *range(0x20, 0x24), 0x30, 0x50, 0x60},
    0x10: {0x10, 0x20},
}
_VRS = frozenset((b"UL", b"OB", b"UI", b"CS", b"DA", b"TM", b"SH", b"PN", b"LO"))
_LONG_VRS = frozenset((b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UR", b"UT", b"UN"))
_TRANSFER_SYNTAX = (2, 0x10)


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts so is DICOM: by its prefix, or by a plausible first element."""
    if start[128:START] == b"DICM":
        return True
    if len(start) < 8:
        return False
    return _plausible(start, "<") or (start[4:6] in _VRS and _plausible(start, ">"))


def is_compressed(syntax: str) -> bool:
    """Whether frames of a transfer syntax are, or may be, compressed; "" is unknown, and native."""
    return syntax not in ("", IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)


def _plausible(start: bytes, endian: str) -> bool:
    group, element, length = struct.unpack(f"{endian}HHI", start[:8])
    if element not in _FIRST.get(group, ()):
        return False
    return start[4:6] in _VRS or (length <= 1024 and length % 2 == 0)


def transfer_syntax(data: bytes) -> tuple[str, int]:
    """UID of the transfer syntax, and offset of the data set; ("", 0) if the file does not say.

    The file meta information is explicit little endian in every file (PS3.10 7.1).
    """
    at, syntax = START if data[128:START] == b"DICM" else 0, ""
    while len(data) >= at + 8:
        group, element, vr, length = struct.unpack_from("<HH2sH", data, at)
        if group != 2:
            break
        at += 8
        if vr in _LONG_VRS:
            if len(data) < at + 4:
                break
            (length,) = struct.unpack_from("<I", data, at)
            at += 4
        if (group, element) == _TRANSFER_SYNTAX:
            syntax = data[at : at + length].rstrip(b"\0 ").decode("ascii", "replace")
        at += length
    return (syntax, at) if syntax else ("", 0)
