"""Tokens from a `tokenizer.json`, as SigLIP 2 has it: Gemma's pieces, read by `tokenizers`.

transformers builds two tokenizers by their class and takes only the vocabulary, the merges and the
end tokens from the file: Gemma's (transformers 5.23 models/gemma/tokenization_gemma.py) and, with
lower-casing before it, SigLIP 2's (models/siglip2/tokenization_siglip2.py). Others are the file.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from medsiglip_jax.files import settings
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained, reason
from medsiglip_jax.files.json_text import dumps, to_hash
from medsiglip_jax.preprocess.text import TextEncoder

GEMMA, SIGLIP2 = "GemmaTokenizer", "Siglip2Tokenizer"
# By the name in tokenizer_config.json: what a class adds to the vocabulary if it is not there.
_GEMMAS_TOKENS = dict(
    bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
)
CLASSES: dict[str, dict[str, str]] = {
    GEMMA: _GEMMAS_TOKENS,
    SIGLIP2: _GEMMAS_TOKENS,
    "PreTrainedTokenizer": {},
    "TokenizersBackend": {},
}
_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


class JsonTokenizer(TextEncoder):
    """The tokenizer that a `tokenizer.json` describes."""

    def __init__(
        self, data: bytes, kind: str, options: Mapping[str, Any], context_length: int = 64
    ):
        """Reads a tokenizer.

        Args:
            data: the content of `tokenizer.json`.
            kind: the class that transformers reads it with, one of `CLASSES`.
            options: what the files beside it say: special tokens by name, `extra_special_tokens`,
                `padding_side`, `truncation_side` and, with its properties, every token of
                `added_tokens`.
            context_length: tokens per text.

        Raises:
            ModuleNotFoundError: `tokenizers` is not installed.
            ValueError: it cannot be read, cuts texts on the left, or says nothing about padding.
        """
        options = CLASSES[kind] | dict(options)
        gemma = kind in (GEMMA, SIGLIP2)
        file = _object(data)
        cut = options.get("truncation_side") or (file.get("truncation") or {}).get("direction")
        if str(cut or "right").lower() != "right":
            raise ValueError(f"tokenizer.json cuts long texts at {cut!r}; expected 'Right'")
        if "added_tokens" in options:
            file["added_tokens"] = options["added_tokens"]
        if gemma:
            _as_gemma(file, lower_case=kind == SIGLIP2)
        self.context_length, self._tokenizer = context_length, _open(file)
        names = [options[name] for name in _TOKENS if options.get(name)]
        self._tokenizer.add_special_tokens([*names, *options.get("extra_special_tokens", ())])
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.added = self.vocab_size - self._tokenizer.get_vocab_size(with_added_tokens=False)
        padding = file.get("padding") or {}
        pad = options.get("pad_token") or padding.get("pad_token")
        if pad is None:
            raise ValueError(
                "tokenizer.json and tokenizer_config.json name no pad_token, and every text is "
                f"padded to {context_length} tokens; name it in tokenizer_config.json"
            )
        side = options.get("padding_side") or str(padding.get("direction") or "").lower()
        side = side or ("left" if gemma else "right")
        self.pad_id = self._tokenizer.token_to_id(pad)
        self.end_pads = pad == options.get("eos_token")
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.enable_padding(
            direction=side, pad_id=self.pad_id, pad_token=pad, length=context_length
        )
        decides = [kind, pad, side, names, file.get("added_tokens")]
        self.sha256 = hashlib.sha256(data + to_hash(decides)).hexdigest()

    def _row(self, text: str) -> tuple[list[int], bool]:
        encoding = self._tokenizer.encode(text)
        return encoding.ids, bool(encoding.overflowing)


def _object(data: bytes) -> dict[str, Any]:
    with explained("tokenizer.json", "not a JSON object"):
        file = parse(data)
    if not isinstance(file.get("model"), dict):
        raise ValueError("tokenizer.json describes no tokenizer: it has no model")
    for name in ("truncation", "padding"):
        if not isinstance(file.get(name), dict | None):
            shown = settings.shown(file[name])
            raise ValueError(f"tokenizer.json: {name} is {shown}; expected an object")
    return file


def _as_gemma(file: dict[str, Any], lower_case: bool) -> None:
    """Everything but vocabulary, merges and what surrounds a text is the class's own."""
    model = file["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer.json holds a {model.get('type')} model; expected Gemma's BPE")
    model |= dict(fuse_unk=True, byte_fallback=True, unk_token="<unk>", dropout=None)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\N{LOWER ONE EIGHTH BLOCK}"}
    lower = [{"type": "Lowercase"}] if lower_case else []
    file["normalizer"] = {"type": "Sequence", "normalizers": [*lower, space]}
    split = dict(pattern={"String": " "}, behavior="MergedWithPrevious", invert=False)
    file["pre_tokenizer"] = dict(type="Split", **split)


def _open(file: dict[str, Any]) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ModuleNotFoundError(
            "this model's tokenizer is a tokenizer.json (as of SigLIP 2), which the package "
            "tokenizers reads; it comes with `pip install 'medsiglip-jax[siglip2]'`"
        ) from None
    try:
        return tokenizers.Tokenizer.from_str(dumps(file))
    except Exception as error:  # the library raises plain exceptions
        raise ValueError(f"tokenizer.json cannot be read ({reason(error)})") from error
