"""The processor of a model: images and texts to the arrays that its towers take."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights.checkpoint import TOKENIZER
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.load import load_images
from medsiglip_jax.preprocess.text import WHERE, Tokenizer

_PIECES_OF_MEDSIGLIP = 32_000


class Processor:
    """Turns files, bytes and strings into the arrays that the towers take."""

    def __init__(self, config: ModelConfig, tokenizer: str | os.PathLike | bytes | None):
        self.config = config
        self._tokenizer_source = tokenizer

    def images(
        self, items: Any, preprocess: str = "big_vision", dicom: Rules = Rules()
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Decodes and resizes images.

        Args:
            items: one or a sequence, in which kinds may be mixed, of paths, bytes, open files, PIL
                images, uint8 arrays or tensors [H, W(, C)], and {"bytes", "path"} of Hugging Face's
                `datasets`. DICOM is recognised by its content.
            preprocess: "big_vision" (squash, TF2 bilinear), "huggingface" (squash, PIL bicubic),
                "serving" (zero-pad to a square, PIL bicubic) or "big_vision_pad" (zero-pad, TF2
                bilinear).
            dicom: how DICOM files become pixels, see `preprocess.dicom.rules`.

        Returns:
            uint8 [n, image_size, image_size, 3].
        """
        if self.config.vision is None:
            raise ValueError("this model has no image tower")
        return load_images(items, self.config.vision.image_size, preprocess, dicom=dicom)

    def texts(self, strings: str | Sequence[str]) -> Int32[np.ndarray, "n l"]:
        """Tokenizes strings, to exactly `context_length` ids each (64 for MedSigLIP).

        Raises:
            FileNotFoundError: the checkpoint has no SentencePiece model.
        """
        return self.tokenizer(strings)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, opened when it is first asked for."""
        if self.config.text is None:
            raise ValueError(
                "this model has no text tower (a MedGemma or Gemma 3 checkpoint holds only the "
                "image tower); texts need a SigLIP checkpoint such as google/medsiglip-448"
            )
        source = self._tokenizer_source
        if source is None:
            raise FileNotFoundError(_no_tokenizer(self.config.text.vocab_size))
        tokenizer = Tokenizer(source, self.config.text.context_length)
        if tokenizer.vocab_size != (rows := self.config.text.vocab_size):
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size:,} pieces and the text tower {rows:,} "
                "embeddings: they belong to different models; give the tokenizer that this model "
                "was trained with (tokenizer=, --tokenizer)"
            )
        return tokenizer

    @property
    def tokenizer_bytes(self) -> bytes | None:
        """The serialised SentencePiece model, or None."""
        source = self._tokenizer_source
        if source is None or isinstance(source, bytes):
            return source
        return Path(source).read_bytes()


def _no_tokenizer(rows: int) -> str:
    """What to do about it; MedSigLIP's is of no use to a model with another vocabulary."""
    if rows == _PIECES_OF_MEDSIGLIP:
        return f"the checkpoint has no tokenizer; {WHERE}"
    return (
        f"the checkpoint has no tokenizer, and MedSigLIP's has another vocabulary "
        f"({_PIECES_OF_MEDSIGLIP:,} pieces, this model {rows:,}); name the model's own: "
        "--tokenizer PATH (tokenizer=PATH)"
    )


def tokenizer_path(tokenizer: str | os.PathLike | None) -> Path | None:
    """The SentencePiece model that `tokenizer` names: a file, or a folder that has one."""
    if tokenizer is None:
        return None
    path = Path(tokenizer)
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a SentencePiece model")
    return path
