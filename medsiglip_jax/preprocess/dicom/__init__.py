"""DICOM -> pixels. Only `file` imports pydicom, and only `frames` the codecs."""
