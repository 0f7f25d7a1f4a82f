"""Patients, studies and series in what is written: hashes under a key that stays on this machine.

Numbers of patients are short: whoever had a hash and the key could try them all. So the key is in
no output. It is the environment variable MEDSIGLIP_JAX_SALT, or else a file in the user's folder of
configuration, made when it is first needed; with the same key the same patient has the same hash in
every run.
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

_LEAST = 16  # characters of a key; of fewer, all can be tried
_DIGITS = 16  # of a hash, in hexadecimal: among a billion patients, two alike are 1 in 37


class Hashed:
    """Subjects as salted hashes, HMAC-SHA256.

    Attributes:
        name: what a run records: which key it was, and nothing about what it is.
    """

    def __init__(self, key: bytes):
        self._key = key
        self.name = f"hashed, key {self._digest('key', '')}"

    def __call__(self, subject: Subject) -> tuple[str | None, ...]:
        """Of each of `COLUMNS`; None where the file does not say."""
        values = ((name, getattr(subject, name)) for name in COLUMNS)
        return tuple(self._digest(name, value) if value else None for name, value in values)

    def _digest(self, name: str, value: str) -> str:
        message = f"{name}:{value}".encode(errors="backslashreplace")
        return hmac.new(self._key, message, "sha256").hexdigest()[:_DIGITS]


class Kept:
    """Subjects as the files have them."""

    name = "as in the files"

    def __call__(self, subject: Subject) -> tuple[str | None, ...]:
        """Of each of `COLUMNS`; None where the file does not say."""
        values = (getattr(subject, name) for name in COLUMNS)
        return tuple(v.encode(errors="backslashreplace").decode() or None for v in values)


Naming = Hashed | Kept
KINDS = ("hashed", "kept")


def naming(kind: str, alone: bool = True) -> Naming:
    """That of `KINDS`; raises as `key` does."""
    return Kept() if kind == "kept" else Hashed(key(alone))


def key(alone: bool = True) -> bytes:
    """The key of this user.

    Args:
        alone: whether this process works alone; several may be on machines with different keys.

    Raises:
        ValueError: the variable is too short, or has to be set.
    """
    given = os.environ.get(VARIABLE, "")
    if given and len(given) < _LEAST:
        raise ValueError(
            f"{VARIABLE} has {len(given)} characters; expected at least {_LEAST}, at random: "
            "whoever guesses it can find out patients"
        )
    if not given and not alone:
        raise ValueError(
            f"{VARIABLE} is not set; set it to the same secret for all processes, so that they "
            "hash patients alike"
        )
    return given.encode() if given else _from_file(places.configuration() / "key")


def _from_file(path: Path) -> bytes:
    """The key in a file that only its owner may read, made if it is not there."""
    try:
        found = _made_once(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; set {VARIABLE} instead") from None
    if len(found) < _LEAST:
        raise ValueError(f"{path}: no key; restore it, or remove it and all hashes will be others")
    return found


def _made_once(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # which only we may read
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(file.name, path)
    return path.read_bytes().strip()
