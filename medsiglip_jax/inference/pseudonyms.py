"""Pseudonyms of patients, studies and series: hashes under a key that stays on this machine.

Patient numbers are short: whoever had a hash and the key could find the number by trying them all.
So the key is in no output. It is the environment variable MEDSIGLIP_JAX_SALT, or else a file in the
user's configuration folder, made when it is first needed. With the same key the same patient has
the same hash in every run.
"""

import contextlib
import hmac
import os
import secrets
from dataclasses import fields
from pathlib import Path

from medsiglip_jax.files import places, storage
from medsiglip_jax.preprocess.facts import Subject

VARIABLE = "MEDSIGLIP_JAX_SALT"
COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Subject))

_LEAST = 16  # characters of a key; shorter keys can be guessed by trying all
_DIGITS = 16  # hexadecimal digits of a hash: among a billion patients two collide with odds 1 : 37


class Naming:
    """Names subjects by keyed hashes (HMAC-SHA256), or without a key as the files do.

    Attributes:
        name: what a run records; it identifies the key without revealing it.
    """

    def __init__(self, key: bytes | None):
        self._key = key
        self.name = "as in the files" if key is None else f"hashed, key {self._name('key', '')}"

    def __call__(self, subject: Subject | None) -> tuple[str | None, ...]:
        """One name for each of `COLUMNS`; None where the file has none."""
        values = ((column, getattr(subject, column, "")) for column in COLUMNS)
        return tuple(self._name(column, value) if value else None for column, value in values)

    def _name(self, column: str, value: str) -> str:
        encoded = value.encode(errors="backslashreplace")
        if self._key is None:
            return encoded.decode()
        return hmac.new(self._key, f"{column}:".encode() + encoded, "sha256").hexdigest()[:_DIGITS]


KINDS = ("hashed", "kept")


def naming(kind: str | None, alone: bool = True) -> Naming | None:
    """How subjects are named, by a name of `KINDS`, if at all; raises as `key` does."""
    return Naming(None if kind == "kept" else key(alone)) if kind else None


def key(alone: bool = True) -> bytes:
    """The key of this user.

    Args:
        alone: whether this is the only process; several may run on machines with different keys.

    Raises:
        ValueError: the variable is too short, or several processes run and it is not set.
    """
    value = os.environ.get(VARIABLE, "")
    if value and len(value) < _LEAST:
        raise ValueError(
            f"{VARIABLE} has {len(value)} characters; expected at least {_LEAST}, at random: "
            "whoever guesses it can find out patients"
        )
    if not value and not alone:
        raise ValueError(
            f"{VARIABLE} is not set; set it to the same secret for all processes, so that they "
            "hash patients alike"
        )
    return value.encode() if value else _from_file(places.configuration() / "key")


def _from_file(path: Path) -> bytes:
    """The key in a file that only its owner may read; the file is made if it does not exist."""
    try:
        if not path.exists():
            with (
                contextlib.suppress(FileExistsError),  # another process made it first
                storage.new_file(path, exclusive=True) as partial,
            ):
                partial.chmod(0o600)  # while it is empty
                partial.write_text(secrets.token_hex(32))
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; set {VARIABLE} instead") from None
    if len(secret) < _LEAST:
        raise ValueError(f"{path}: not a key; restore it, or remove it and all hashes change")
    return secret
