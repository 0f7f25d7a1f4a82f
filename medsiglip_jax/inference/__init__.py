"""A model applied to many files: embeddings, zero-shot scores, heatmaps, previews."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, engine="Embedded Engine", encode="Encoded encode_files", embed="EmbedOptions",
    manifest="Manifest parse_manifest", classify="", heatmap="", preview="PreviewOptions",
    pseudonyms="",
)  # fmt: skip
