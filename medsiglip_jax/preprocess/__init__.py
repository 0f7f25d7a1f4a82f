"""Pixels and tokens: from files and strings to the inputs of a model."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, load="load_images", image="PRESETS resize_bilinear", decode="decode_with_facts",
    sources="", formats="FORMATS", facts="Facts Subject UnreadableImage", names="Frame Tile",
    parts="Parts Tiles", text="Tokenizer canonicalize", xla="", augment="Augment", dicom="",
    slides="", volumes="",
)  # fmt: skip
