"""DICOM files to pixels. Only `file` imports pydicom, and only `frames` the codecs."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, rules="Rules", file="File", series="Stack into_stacks", sniff="is_dicom",
)  # fmt: skip
