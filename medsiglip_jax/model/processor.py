"""The processor of a model: images and texts to the arrays that its towers take."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from medsiglip_jax.files.failures import explained
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.preprocess import tokenizer_files
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.load import load_images
from medsiglip_jax.preprocess.text import WHERE, TextEncoder

_PIECES_OF_MEDSIGLIP = 32_000


class Processor:
    """Turns files, bytes and strings into the arrays that the towers take.

    Attributes:
        config: the architecture.
        tokenizer_source: a `spiece.model` or `tokenizer.json`, which those beside it belong to; the
            content of a `spiece.model`, or of all these files by their names; or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: str | os.PathLike | bytes | Mapping[str, bytes] | None,
    ):
        self.config, self.tokenizer_source = config, tokenizer

    def images(
        self, items: Any, preprocess: str | None = None, dicom: Rules | None = None
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Decodes and resizes images.

        Args:
            items: one or a sequence, in which kinds may be mixed, of paths, bytes, open files, PIL
                images, uint8 arrays or tensors [H, W(, C)], and {"bytes", "path"} of Hugging Face's
                `datasets`. DICOM is recognised by its content.
            preprocess: "big_vision" (squash, TF2 bilinear), "huggingface" (squash, PIL bicubic, or
                what the model's processor files say), "serving" (zero-pad to a square, PIL
                bicubic) or "big_vision_pad" (zero-pad, TF2 bilinear); by default that of the
                model's training where its export remembers one, else "big_vision".
            dicom: how DICOM files become pixels, see `preprocess.dicom.rules`; default likewise.

        Returns:
            uint8 [n, image_size, image_size, 3].
        """
        vision = self.config.vision
        if vision is None:
            raise ValueError("this model has no image tower")
        how = self.config.prepared(preprocess, dicom)
        size, resample = vision.image_size, vision.pixels.resample
        return load_images(items, size, how.preprocess, how.dicom, resample)

    def texts(self, strings: str | Sequence[str]) -> Int32[np.ndarray, "n l"]:
        """Tokenizes strings, to exactly `context_length` ids each (64 for MedSigLIP).

        Raises:
            FileNotFoundError: the checkpoint has no SentencePiece model.
        """
        return self.tokenizer(strings)

    @functools.cached_property
    def tokenizer(self) -> TextEncoder:
        """The tokenizer, opened when it is first asked for."""
        if self.config.text is None:
            raise ValueError(
                "this model has no text tower (a MedGemma or Gemma 3 checkpoint holds only the "
                "image tower); texts need a SigLIP checkpoint such as google/medsiglip-448"
            )
        source, rows = self.tokenizer_source, self.config.text.vocab_size
        if source is None:
            raise FileNotFoundError(_no_tokenizer(rows))
        files = tokenizer_files.read_files(source)
        name = "tokenizer" if isinstance(source, bytes | Mapping) else source
        with explained(name, "not a tokenizer that is supported"):
            tokenizer = tokenizer_files.open_tokenizer(files, self.config.text.context_length)
        if not _belong_together(tokenizer, rows):
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size:,} pieces and the text tower {rows:,} "
                "embeddings: they belong to different models; give the tokenizer that this model "
                "was trained with (tokenizer=, --tokenizer)"
            )
        return tokenizer

    @property
    def tokenizer_sha256(self) -> str | None:
        """Identifies what decides about the ids of a text; None if texts cannot be tokenized."""
        try:
            return self.tokenizer.sha256
        except (ValueError, FileNotFoundError, ModuleNotFoundError):
            return None

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files that `tokenizer_source` names, by their names in a checkpoint's folder."""
        source = self.tokenizer_source
        return {} if source is None else tokenizer_files.read_files(source)


def _belong_together(tokenizer: TextEncoder, rows: int) -> bool:
    """Whether a text tower with `rows` embeddings was made for this tokenizer.

    `resize_token_embeddings(pad_to_multiple_of=)` leaves rows behind the tokens that were added.
    """
    spare = rows - tokenizer.vocab_size
    return spare == 0 or (tokenizer.added > 0 and rows % 8 == 0 and 0 < spare < 128)


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
    """The vocabulary that `tokenizer` names: a file, or a folder that has one."""
    if tokenizer is None:
        return None
    path = Path(tokenizer)
    found = tokenizer_files.main_file(path) if path.is_dir() else path
    if found is None or not found.is_file():
        raise FileNotFoundError(
            f"{path}: no tokenizer there; expected a spiece.model (a SentencePiece model) or a "
            "tokenizer.json"
        )
    return found
