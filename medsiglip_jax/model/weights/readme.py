"""The README.md of a Hugging Face folder whose source has none, and the terms of the weights."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from medsiglip_jax.files import front_matter
from medsiglip_jax.model.config import NAMED, ModelConfig
from medsiglip_jax.model.weights.checkpoint import Checkpoint

NAME = "README.md"
_MEDSIGLIP = {
    "license": "other",
    "license_name": "health-ai-developer-foundations",
    "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
}


def terms(companions: Iterable[Any], config: ModelConfig, source: str | None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of weights; none where they are not known.

    Args:
        companions: the files that lie beside the weights: their model card comes first.
        config: the architecture. That of MedSigLIP is its alone among published models.
        source: where the weights come from; None for weights that began at random.
    """
    card = next((file for file in companions if file.name == NAME), None)
    said = front_matter.terms(card.read_text(encoding="utf-8", errors="replace")) if card else {}
    own = NAMED["so400m-448"]
    is_medsiglip = source is not None and config.vision == own.vision
    return said or (dict(_MEDSIGLIP) if is_medsiglip else {})


def metadata(config: ModelConfig, base: str | None, terms: Mapping[str, str]) -> dict[str, str]:
    """What the hub reads of a model: the library, the task, the base and the terms."""
    task = "zero-shot-image-classification" if config.text else "image-feature-extraction"
    values = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification" if config.classifier else task,
    }
    return values | ({"base_model": base} if base else {}) | dict(terms)


def written(config: ModelConfig, origin: Checkpoint | None, terms: Mapping[str, str]) -> str:
    """The README.md of a model that brings none.

    `save` keeps a README.md that it finds, so that nothing here depends on dtype or resolution.

    Args:
        config: the architecture.
        origin: what the weights were loaded from, if they were.
        terms: those of the weights.
    """
    base = origin.repo if origin else None
    lines = [
        "# A SigLIP model\n",
        f"Written by medsiglip-jax {version('medsiglip-jax')}. `transformers` and "
        "`medsiglip_jax.load` load this folder.",
    ]
    if config.text:
        lines.append(
            "So does `sentence_transformers.SentenceTransformer`, which embeds texts and images. "
            "Texts are padded to "
            f"{config.context_length} tokens, as in training; other padding gives other vectors."
        )
    if made := config.trained:
        lines.append(f"Images were prepared with the preset `{made.preprocess}` in training.")
    if origin and not terms:
        lines.append("The terms of the weights that it was made from apply to it too.")
    return front_matter.written(metadata(config, base, terms)) + "\n".join(lines) + "\n"
