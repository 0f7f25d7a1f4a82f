"""The files of a tokenizer as transformers writes them, and the tokenizer that they describe.

`tokenizer_config.json` names the class: SigLIP's (`spiece.model`) or one that `tokenizers` reads
(`tokenizer.json`). What changes ids is honoured, as transformers 5.23 does it
(tokenization_utils_base.py, `_from_pretrained`), or refused by name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsiglip_jax.files import settings
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.preprocess import text, tokenizer_json
from medsiglip_jax.preprocess.text import AddedToken, TextEncoder

SENTENCEPIECE, JSON, CONFIG = "spiece.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
NAMES = (SENTENCEPIECE, JSON, CONFIG, SPECIAL_MAP, ADDED)
_SIGLIP = "SiglipTokenizer"


def main_file(folder: Path) -> Path | None:
    """The file of a folder that holds the vocabulary, or None if there is none."""
    there = [name for name in (SENTENCEPIECE, JSON) if (folder / name).is_file()]
    if len(there) > 1 and (folder / CONFIG).is_file():
        files = {CONFIG: (folder / CONFIG).read_bytes()}
        try:
            there = [SENTENCEPIECE if _kind(files) == _SIGLIP else JSON]
        except ValueError:  # `open_tokenizer` says so when a text comes
            pass
    return folder / there[0] if there else None


def read_files(source: str | os.PathLike | bytes | Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer's files by their names.

    Args:
        source: a folder, the `spiece.model` or `tokenizer.json` in one, which takes those beside it
            along, the content of a `spiece.model`, or what this function has returned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    if isinstance(source, (bytes, bytearray)):
        return {SENTENCEPIECE: bytes(source)}
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    with text.explained(path):
        if path.is_dir():
            return {n: (path / n).read_bytes() for n in NAMES if (path / n).is_file()}
        name = JSON if path.suffix == ".json" else SENTENCEPIECE
        beside = [n for n in NAMES if n not in (SENTENCEPIECE, JSON)]
        there = {n: (path.parent / n).read_bytes() for n in beside if (path.parent / n).is_file()}
        return {name: path.read_bytes()} | there


def open_tokenizer(files: Mapping[str, bytes], context_length: int = 64) -> TextEncoder:
    """The tokenizer that these files describe.

    Raises:
        FileNotFoundError: the file that holds the vocabulary is missing.
        ModuleNotFoundError: `tokenizers` is needed and is not installed.
        ValueError: a file is damaged, or asks for what is not done here.
    """
    config, kind = _object(files, CONFIG), _kind(files)
    _check(config, context_length)
    if kind == _SIGLIP:
        return _siglip(files, config, context_length)
    if kind not in tokenizer_json.CLASSES:
        known = ", ".join((_SIGLIP, *tokenizer_json.CLASSES))
        raise ValueError(f"{CONFIG}: tokenizer_class is {kind!r}; expected one of {known}")
    if JSON not in files:
        raise FileNotFoundError(
            f"{CONFIG} names a {kind}, whose {JSON} is missing; save it with transformers "
            "(AutoTokenizer.from_pretrained and save_pretrained) and put it beside the weights"
        )
    options = _options(files, config)
    if "added_tokens_decoder" in config:
        options["added_tokens"] = _listed(files, config)
    return tokenizer_json.JsonTokenizer(files[JSON], kind, options, context_length)


def _siglip(files: Mapping[str, bytes], config: dict, context_length: int) -> TextEncoder:
    if SENTENCEPIECE not in files:
        raise FileNotFoundError(f"no {SENTENCEPIECE} here; {text.WHERE}")
    options = _options(files, config)
    for name, want in (("eos_token", "</s>"), ("unk_token", "<unk>")):
        if (got := options.get(name, want)) != want:
            raise ValueError(f"{CONFIG}: {name} is {got!r}; expected {want!r}")
    return text.Tokenizer(
        files[SENTENCEPIECE],
        context_length,
        lower_case=bool(config.get("do_lower_case", True)),
        added=_added(files, config, options),
        pad=options.get("pad_token", "</s>"),
        pad_left=config.get("padding_side") == "left",
    )


# What changes ids and is not done here: any other value of these is refused.
_USUAL = dict(split_special_tokens=False, truncation_side="right", sp_model_kwargs={})


def _check(config: dict, context_length: int) -> None:
    problems = [
        f"{name} is {config[name]!r}, and only {usual!r} is supported"
        for name, usual in _USUAL.items()
        if config.get(name) not in (None, usual)
    ]
    if (side := config.get("padding_side")) not in (None, "left", "right"):
        problems.append(f"padding_side is {side!r}; expected 'left' or 'right'")
    longest = config.get("model_max_length")
    if isinstance(longest, (int, float)) and longest < context_length:
        problems.append(
            f"model_max_length is {longest}, and the text tower reads {context_length} tokens"
        )
    if problems:
        raise ValueError(f"{CONFIG}: {'; '.join(problems)}")


def _kind(files: Mapping[str, bytes]) -> str:
    """The class that transformers takes, without "Fast"."""
    config = _object(files, CONFIG)
    usual = _SIGLIP if SENTENCEPIECE in files or JSON not in files else "TokenizersBackend"
    return str(config.get("tokenizer_class") or usual).removesuffix("Fast")


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    with explained(name, "not a JSON object"):
        return parse(files[name])


def _options(files: Mapping[str, bytes], config: dict) -> dict[str, Any]:
    """The special tokens by name, as strings; those of the config come first.

    transformers reads `special_tokens_map.json` only if the config lists no added tokens.
    """
    legacy = {} if "added_tokens_decoder" in config else _object(files, SPECIAL_MAP)
    options: dict[str, Any] = {name: _content(value) for name, value in (config | legacy).items()
            if name.endswith("_token") and value and not isinstance(value, bool)}  # fmt: skip
    options |= {
        side: config[side] for side in ("padding_side", "truncation_side") if config.get(side)
    }
    extra = (config | legacy).get("extra_special_tokens") or config.get("additional_special_tokens")
    extra = list(extra.values()) if isinstance(extra, dict) else extra or []
    if not isinstance(extra, list):
        raise ValueError(
            f"{CONFIG}: extra_special_tokens is {settings.shown(extra)}; expected a list of tokens"
        )
    options["extra_special_tokens"] = [_content(token) for token in extra]
    return options


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        shown = settings.shown(token)
        raise ValueError(f"{CONFIG}: {shown} is not a token; expected a string or its properties")
    return content


def _listed(files: Mapping[str, bytes], config: dict) -> list[dict[str, Any]]:
    """The added tokens by their numbers, each with all its properties.

    transformers reads the other files only if `tokenizer_config.json` does not list them.
    """
    usual = dict(lstrip=False, rstrip=False, single_word=False, special=False)
    try:
        if "added_tokens_decoder" in config:
            listed = [dict(token, id=i) for i, token in config["added_tokens_decoder"].items()]
        else:
            legacy = _object(files, ADDED).items()
            listed = [dict(content=content, id=i) for content, i in legacy]
            listed += _object(files, JSON).get("added_tokens", [])
        complete = [dict(normalized=not token.get("special"), **usual) | token for token in listed]
        for token in complete:
            token["id"] = int(token["id"])
            _content(token)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{CONFIG}: added_tokens_decoder is not a table of tokens") from None
    return sorted(complete, key=lambda token: token["id"])


def _added(files: Mapping[str, bytes], config: dict, options: dict) -> dict[str, AddedToken]:
    """The tokens that were added to a SentencePiece model, by their text."""
    flags, listed = ("id", "lstrip", "rstrip", "single_word"), _listed(files, config)
    added = {token["content"]: AddedToken(*(token[flag] for flag in flags)) for token in listed}
    named = {value for name, value in options.items() if name.endswith("_token")}
    named -= {*text.SPECIAL, options.get("pad_token")}
    unlisted = [t for t in (*sorted(named), *options["extra_special_tokens"]) if t not in added]
    if unlisted:
        raise ValueError(
            f"{CONFIG} names the special token {unlisted[0]!r}, which has no number; save the "
            "tokenizer with transformers, which writes it into added_tokens_decoder"
        )
    return added
