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
import tempfile
from dataclasses import fields
from pathlib import Path

from medsiglip_jax.files import places
from medsiglip_jax.preprocess.facts import Subject

VARIABLE = "MEDSIGLIP_JAX_SALT"
COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Subject))

_LEAST = 16  # characters of a key; shorter keys can be guessed by trying all
_DIGITS = 16  # hexadecimal digits of a hash: among a billion patients two collide with odds 1 : 37


class Hashed:
    """Names subjects by keyed hashes (HMAC-SHA256).

    Attributes:
        name: what a run records; it identifies the key without revealing it.
    """

    def __init__(self, key: bytes):
        self._key = key
        self.name = f"hashed, key {self._digest('key', '')}"

    def __call__(self, subject: Subject) -> tuple[str | None, ...]:
        """One name for each of `COLUMNS`; None where the file has none."""
        values = ((name, getattr(subject, name)) for name in COLUMNS)
        return tuple(self._digest(name, value) if value else None for name, value in values)

    def _digest(self, name: str, value: str) -> str:
        message = f"{name}:{value}".encode(errors="backslashreplace")
        return hmac.new(self._key, message, "sha256").hexdigest()[:_DIGITS]


class Kept:
    """Names subjects as the files do."""

    name = "as in the files"

    def __call__(self, subject: Subject) -> tuple[str | None, ...]:
        """One name for each of `COLUMNS`; None where the file has none."""
        values = (getattr(subject, name) for name in COLUMNS)
        return tuple(v.encode(errors="backslashreplace").decode() or None for v in values)


Naming = Hashed | Kept
KINDS = ("hashed", "kept")


def naming(kind: str, alone: bool = True) -> Naming:
    """How subjects are named, by a name of `KINDS`; raises as `key` does."""
    return Kept() if kind == "kept" else Hashed(key(alone))


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
        secret = _made_once(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; set {VARIABLE} instead") from None
    if len(secret) < _LEAST:
        raise ValueError(
            f"{path}: not a key; restore the file, or remove it, after which all hashes differ"
        )
    return secret


def _made_once(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # for this user only
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process made it first
                os.link(file.name, path)
    return path.read_bytes().strip()
