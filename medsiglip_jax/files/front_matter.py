"""The metadata at the beginning of a README.md that the Hugging Face hub reads."""

import re
from collections.abc import Mapping, Sequence

from medsiglip_jax.files.json_text import dumps

TERMS = ("license", "license_name", "license_link")
TAGS = ("medical", "medsiglip", "medsiglip-jax")


def written(values: Mapping[str, str], tags: Sequence[str] = TAGS) -> str:
    """YAML of plain values, each as JSON writes it, which YAML reads too."""
    lines = [f"{key}: {dumps(str(x), ensure_ascii=False)}" for key, x in values.items()]
    return "\n".join(["---", *lines, f"tags: [{', '.join(tags)}]", "---", "", ""])


def terms(text: str) -> dict[str, str]:
    """Those of `TERMS` that the metadata of a README.md name -> what they say."""
    metadata = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    lines = re.findall(rf"^({'|'.join(TERMS)}): *(.+?) *$", metadata, re.M)
    return {name: value.strip("\"'") for name, value in lines}
