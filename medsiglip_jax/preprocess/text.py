"""Tokens for the text tower, equal to those of transformers' `SiglipTokenizer`.

Lower-case, delete ASCII punctuation, collapse white space, SentencePiece, append `</s>` (1), keep
63 tokens + `</s>` of longer texts, pad with 1 to 64: the last position, which the tower reads, is
always `</s>`. Punctuation goes without a trace, so "3.5 mm" is "35 mm" and "T2-weighted" is
"t2weighted": that is how the model is served (transformers 5.23 tokenization_siglip.py; big_vision
strips it from zero-shot prompts only, evaluators/proj/image_text/prompt_engineering.py:94-112).

The vocabulary is `spiece.model` of google/medsiglip-448, the 32,000 pieces of big_vision's `c4_en`.
"""

import contextlib
import hashlib
import io
import os
import re
import string
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32

from medsiglip_jax.preprocess.facts import too_long

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # `<pad>` is never used: SigLIP-1 pads with `</s>`
_PIECES = {PAD_ID: "<pad>", EOS_ID: "</s>", UNK_ID: "<unk>"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_PUNCTUATION = str.maketrans("", "", string.punctuation)
WHERE = (
    "spiece.model lies in the checkpoint folder of google/medsiglip-448 on Hugging Face;"
    " put it beside the weights, or name it: --tokenizer PATH (tokenizer=PATH)"
)


def canonicalize(text: str, lower_case: bool = True) -> str:
    """Lower-case (Unicode), no ASCII punctuation, single spaces, stripped.

    The rule of transformers' `SiglipTokenizer`, taken from big_vision
    (evaluators/proj/image_text/prompt_engineering.py:94-112, which first turns "_" into " ").
    """
    text = text.lower() if lower_case else text
    return " ".join(text.translate(_PUNCTUATION).split())


class TextEncoder(ABC):
    """Strings -> int32 [n, context_length] for a text tower.

    Attributes:
        vocab_size: number of tokens, those that were added to the vocabulary included.
        added: how many tokens were added to the vocabulary.
        context_length: tokens per text, the end token included.
        pad_id: the token that fills rows.
        end_pads: whether it is the end token, too.
        sha256: identifies what decides about the ids.
    """

    vocab_size: int
    added: int = 0
    context_length: int
    pad_id: int
    end_pads: bool
    sha256: str

    def __call__(self, texts: Any, warn: bool = True) -> Int32[np.ndarray, "n length"]:
        """Tokenizes texts.

        Args:
            texts: a string or a sequence of strings.
            warn: whether to say so when texts are cut.

        Returns:
            int32 [n, context_length], ids 0..vocab_size - 1, with an end token in each row (for
            SigLIP `</s>`, 1, which fills the row); [0, context_length] for an empty sequence.

        Raises:
            ValueError: something is not a string, or cannot be written as UTF-8.

        Warns:
            UserWarning: once, with the number of texts that were cut.
        """
        out, cut = self.ids_and_cut(texts)
        if cut.any() and warn:
            warnings.warn(
                f"{cut.sum()} of {len(cut)} texts are longer than {self.context_length} tokens and"
                " were cut: the model does not see their ends",
                stacklevel=2,
            )
        return out

    def ids_and_cut(
        self, texts: Any
    ) -> tuple[Int32[np.ndarray, "n length"], Bool[np.ndarray, " n"]]:
        """The ids that a call gives, and which texts were too long for them."""
        texts = [texts] if isinstance(texts, str) else _as_list(texts)
        out = np.empty((len(texts), self.context_length), np.int32)
        cut = np.zeros(len(texts), bool)
        for i, text in enumerate(texts):
            out[i], cut[i] = self._row(_checked(text, i, len(texts)))
        return out, cut

    def lengths(self, ids: Int32[np.ndarray, "n length"]) -> Int32[np.ndarray, " n"]:
        """How many tokens of each row are not there to fill it; an end token counts."""
        return (ids != self.pad_id).sum(axis=1, dtype=np.int32) + np.int32(self.end_pads)

    @abstractmethod
    def _row(self, text: str) -> tuple[list[int], bool]:
        """The `context_length` ids of a text, and whether it was too long for them."""


@dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it stands: found before the text is canonicalized.

    Attributes:
        id: its number.
        lstrip: white space before it is dropped.
        rstrip: white space after it is dropped.
        single_word: it is text like any other unless it stands between spaces.
    """

    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


SPECIAL = {name: AddedToken(i, True, True) for i, name in _PIECES.items() if i != PAD_ID}


class Tokenizer(TextEncoder):
    """SigLIP's tokenizer: a SentencePiece model, and the tokens that were added to it.

    Attributes:
        model_bytes: the serialized SentencePiece model as given: the content of `spiece.model`.
    """

    def __init__(
        self,
        source: str | os.PathLike | bytes,
        context_length: int = 64,
        *,
        lower_case: bool = True,
        added: Mapping[str, AddedToken] | None = None,
        pad: str = "</s>",
        pad_left: bool = False,
    ):
        """Reads a SentencePiece model.

        Args:
            source: path of a `spiece.model`, of a folder that holds one, or the file's content.
            context_length: tokens per text.
            lower_case: whether texts are lower-cased first.
            added: tokens that the SentencePiece model does not know, or does not keep whole.
            pad: the token, a piece or an added one, that fills a row.
            pad_left: fill rows from the left.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a SentencePiece model with `</s>` at 1 and `<unk>` at 2, or it
                has no token `pad`.
        """
        name, self.model_bytes = _read(source)
        self.context_length, self._lower_case, self._pad_left = context_length, lower_case, pad_left
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model_bytes)
            pieces = self._processor.get_piece_size()
            first = [self._processor.id_to_piece(i) for i in range(min(3, pieces))]
            self._prefix_length = len(self._processor.encode("<unk>"))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{name} is not a SentencePiece model ({reason}); {WHERE}") from error
        if first[1:] != [_PIECES[EOS_ID], _PIECES[UNK_ID]]:
            raise ValueError(
                f"{name} is not a SigLIP tokenizer: its first pieces are {first}, expected </s> at"
                f" 1 and <unk> at 2; {WHERE}"
            )
        self._added = SPECIAL | dict(added or {})
        self.pad_id = self._id(pad, name)
        self.end_pads = self.pad_id == EOS_ID
        self._added.setdefault(pad, AddedToken(self.pad_id, True, True))  # a special token is whole
        self.added = len({token.id for token in self._added.values() if token.id >= pieces})
        self.vocab_size = pieces + self.added
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.sha256 = self._hash()

    def plain_ids(self, text: str, end: bool = True) -> list[int]:
        """The ids of a text as it is, as big_vision makes them: with its punctuation, and with
        `</s>` at the `end`, not padded."""
        return [*self._processor.encode(text), *([EOS_ID] if end else [])]

    def id_of(self, token: str) -> int:
        """The id of a piece, such as "<pad>"; ValueError if there is none of that name."""
        return self._id(token, "the tokenizer")

    def _id(self, token: str, name: str) -> int:
        if token in self._added:
            return self._added[token].id
        number = self._processor.piece_to_id(token)
        if self._processor.id_to_piece(number) != token:
            raise ValueError(f"{name} has no token {token!r}, which rows are padded with")
        return number

    def _hash(self) -> str:
        """The hash of the model and of its use, or of the model alone if used as in SigLIP."""
        settings = [self._lower_case, self.pad_id, self._pad_left, sorted(self._added.items())]
        usual = [True, EOS_ID, False, sorted(SPECIAL.items())]
        return hashlib.sha256(
            self.model_bytes + (b"" if settings == usual else repr(settings).encode())
        ).hexdigest()

    def _row(self, text: str) -> tuple[list[int], bool]:
        ids = self._encode(text)
        kept = ids[: self.context_length - 1]
        end = [] if kept and kept[-1] == EOS_ID else [EOS_ID]
        padding = [self.pad_id] * (self.context_length - len(kept) - len(end))
        row = [*padding, *kept, *end] if self._pad_left else [*kept, *end, *padding]
        return row, len(ids) > len(kept)

    def _encode(self, text: str) -> list[int]:
        """Ids without `</s>` or padding; a literal `</s>` or `<unk>` in the text is that token.

        As transformers does: added tokens are found before lower-casing, and each part between
        them is encoded behind "<unk>", whose pieces are then dropped, so that only the first part
        begins with the space that SentencePiece puts before a text.
        """
        ids: list[int] = []
        for part in self._parts(_SPACE + text.replace(_SPACE, " ")):
            if part in self._added:
                ids.append(self._added[part].id)
            elif part := canonicalize(part, self._lower_case):
                ids += self._processor.encode("<unk>" + part)[self._prefix_length :]
        return ids

    def _parts(self, text: str) -> list[str]:
        """The text cut at added tokens (transformers tokenization_python.py, `tokenize`)."""
        parts = [part for part in self._split.split(text) if part]
        for i, part in enumerate(parts):
            token = self._added.get(part)
            if token is None:
                continue
            last = i == len(parts) - 1
            if token.rstrip and not last:
                parts[i + 1] = parts[i + 1].lstrip()
            if token.lstrip and i:
                parts[i - 1] = parts[i - 1].rstrip()
            if token.single_word and i and parts[i - 1] and parts[i - 1][-1] != " ":
                parts[i - 1], parts[i] = parts[i - 1] + part, ""
            elif token.single_word and not last and parts[i + 1] and parts[i + 1][0] != " ":
                parts[i], parts[i + 1] = "", part + parts[i + 1]
        return [part for part in parts if part]


def _read(source: str | os.PathLike | bytes) -> tuple[str, bytes]:
    if isinstance(source, (bytes, bytearray)):
        return f"tokenizer of {len(source)} bytes", bytes(source)
    path = Path(source)
    if path.is_dir():
        path = path / "spiece.model"
    with explained(path):
        return str(path), path.read_bytes()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns errors of reading a tokenizer's file into those that say what to do."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"no tokenizer at {path}: {WHERE}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {str(path)!r} cannot be read ({error}); {WHERE}") from error


def _as_list(texts: Any) -> list:
    if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
        raise ValueError(f"texts is of type {type(texts).__name__}, expected a string or a list")
    return list(texts)


def _checked(text: Any, i: int, n: int) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text {i + 1} of {n} is of type {type(text).__name__}, not a string")
    if reason := too_long(text):
        raise ValueError(f"text {i + 1} of {n}: {reason}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {i + 1} of {n} holds the lone surrogate {text[error.start]!r} at character"
            f" {error.start} and cannot be written as UTF-8; decode its source with the right"
            " encoding"
        ) from None
    return text


def train(captions: Iterable[str], vocab_size: int) -> bytes:
    """Trains a small SentencePiece model with SigLIP's special ids, where no checkpoint is at hand.

    Deterministic (one thread, no sampling) and silent. Captions are canonicalized first, as they
    will be when encoded. `SiglipTokenizer` of transformers reads the result as `spiece.model`.

    Args:
        captions: texts; a few dozen are enough.
        vocab_size: pieces wanted; a small corpus may yield fewer.

    Returns:
        The content of a `spiece.model` with `<pad>` 0, `</s>` 1, `<unk>` 2 and no BOS.

    Raises:
        ValueError: no text to learn from, or a vocabulary smaller than the characters need.
    """
    captions = _as_list(captions)
    texts = [canonicalize(_checked(text, i, len(captions))) for i, text in enumerate(captions)]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"no text among the {len(captions)} captions to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=max(4192, *(len(text.encode()) for text in texts)),
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            pad_piece=_PIECES[PAD_ID],
            eos_piece=_PIECES[EOS_ID],
            unk_piece=_PIECES[UNK_ID],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
    return model.getvalue()
