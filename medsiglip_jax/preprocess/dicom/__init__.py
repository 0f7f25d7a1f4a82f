"""DICOM -> pixels. Only `file` imports pydicom and only `frames` a codec, when a file is met."""
