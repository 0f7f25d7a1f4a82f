"""What a DICOM file holds: no image, a slide's label, or which of several images at one place."""

import re
from collections.abc import Iterable, Iterator, Sequence

from medsiglip_jax.preprocess.dicom.series import Kind
from medsiglip_jax.preprocess.dicom.tags import Tags

# Storage classes (PS3.4 B.5) whose pixels are classes, measures or doses.
_NOT_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
}
# The same by modality, for what some writers store as secondary capture.
_NOT_MODALITIES = {
    "SEG": "a segmentation",
    "RTSTRUCT": "a radiotherapy structure set",
    "RTDOSE": "a radiotherapy dose",
}
# Image Type of a slide's label, and of the photograph of the whole slide, which mostly shows the
# label, too (PS3.3 C.8.12.4.1.1).
_LABELS = ("LABEL", "OVERVIEW")
# Where the standard and manufacturers have the b-value: standard; Siemens and Philips; GE adds a
# multiple of 1e9 (dcm2niix, nii_dicom.cpp).
_B_VALUES = ("DiffusionBValue", 0x0019100C, 0x20011003, 0x00431039)
# What tells images at one place apart where nothing else does.
_TIMES = (
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase"),
    *("TriggerTime", "NominalCardiacTriggerDelayTime", "FrameReferenceTime", "AcquisitionNumber"),
    *("AcquisitionTime", "ContentTime"),
)
_TIMED = ("FrameContentSequence", "CardiacSynchronizationSequence")  # functional groups of these
# The letters that Image Type has for the parts of a complex image.
_COMPLEX = {"MAGNITUDE": "M", "PHASE": "P", "REAL": "R", "IMAGINARY": "I"}
# What `refusal` and `of_frame` look at, beside functional groups.
TAGS = (
    *("SOPClassUID", "Modality", "ImageType", "SpecimenLabelInImage", "ComplexImageComponent"),
    *("EchoTime", *_B_VALUES, *_TIMES),
    *(0x00190010, 0x20010010, 0x00430010),  # whose the private ones are
)


def refusal(tags: Tags, slide_labels: bool = False) -> str | None:
    """Why a file is not to be read as an image; None if it is one.

    Args:
        tags: of the file.
        slide_labels: whether labels and overviews of slides are asked for.
    """
    modality = tags.label("Modality").upper()
    if name := _NOT_IMAGES.get(tags.label("SOPClassUID")) or _NOT_MODALITIES.get(modality):
        return f"DICOM that holds {name}, which is not an image"
    shown = [name.lower() for name in _LABELS if name in tags.words("ImageType")]
    if tags.label("SpecimenLabelInImage").upper() == "YES":
        shown.append("specimen label")
    if shown and not slide_labels:
        return (
            f"DICOM that shows the {shown[0]} of a slide, which may name the patient; "
            "--slide-labels reads it"
        )
    return None


def of_frame(tags: Tags, groups: Sequence[Tags]) -> Kind:
    """What tells a frame from others at its place.

    Args:
        tags: of the file.
        groups: functional groups of the frame, the nearest first.
    """
    frame_type = tags.nested(groups, "MRImageFrameTypeSequence")
    names = {*tags.words("ImageType"), *frame_type.words("FrameType")}
    names.add(frame_type.label("ComplexImageComponent").upper())
    diffusion = tags.nested(groups, "MRDiffusionSequence")
    b = next((b for name in _B_VALUES if (b := diffusion.first(name)) is not None), None)
    echo = tags.nested(groups, "MREchoSequence").first("EffectiveEchoTime")
    timed = (tags.nested(groups, name) for name in _TIMED)
    timed = list(dict.fromkeys([*timed, tags]))  # the file itself once
    times = [next(_known(item.first(name) for item in timed), None) for name in _TIMES]
    return Kind(
        types=_types(names),
        b=None if b is None else b % 1e9,
        echo=tags.first("EchoTime") if echo is None else echo,
        times=tuple(times),
    )


def _known(values: Iterable[float | None]) -> Iterator[float]:
    return (value for value in values if value is not None)


def _types(names: Iterable[str]) -> frozenset[str]:
    """The names, their parts ("SW_M" is also "M"), and the letters of complex images."""
    parts = {part for name in names for part in (name, *re.split(r"[\W_]+", name)) if part}
    return frozenset(parts | {_COMPLEX[part] for part in parts if part in _COMPLEX})
