"""Addresses of DICOMweb (DICOM PS3.18): what is asked of a server, with whose credentials.

.../studies/UID, .../studies/UID/series/UID and .../studies/UID/series/UID/instances/UID; below
http(s), or dicomweb:// for https. QIDO-RS lists the instances of a study or series, WADO-RS sends
one as a file. Nothing here touches the network but the search for Google's credentials.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsiglip_jax.files import google
from medsiglip_jax.files.documents import loads

SCHEME = "dicomweb://"
# A bearer token, or the file that holds it, and the start of the addresses that it is sent to: an
# address in a table of somebody else's must not get it.
SERVER, TOKEN, TOKEN_FILE = (
    f"MEDSIGLIP_JAX_DICOMWEB_{name}" for name in ("SERVER", "TOKEN", "TOKEN_FILE")
)
# As one file, in the transfer syntax in which it is stored (PS3.18, section 10.4.1).
AS_STORED = "application/dicom; transfer-syntax=*"
# Servers such as Orthanc and dcm4chee send it in multipart only.
_OR_MULTIPART = f'{AS_STORED}, multipart/related; type="application/dicom"; transfer-syntax=*'
_LIST = "application/dicom+json"
_GOOGLE = "https://healthcare.googleapis.com/"
_PAGE = 1000  # instances that are listed at once

_UID = r"[0-9.]{1,64}"
INSTANCE = re.compile(rf"/studies/{_UID}/series/{_UID}/instances/{_UID}$")
_ADDRESS = re.compile(
    rf"(?P<base>(?:https?|dicomweb)://[^?#]+)/studies/(?P<study>{_UID})"
    rf"(?:/series/(?P<series>{_UID})(?P<instance>/instances/{_UID})?)?/?"
)
_QUERY = re.compile(rf"https?://[^?#]+/studies/{_UID}(?:/series/{_UID})?/instances\?[^#]*")
_SERIES, _INSTANCE, _NUMBER = "0020000E", "00080018", "00200013"


class NotSet(ValueError):
    """The variables with the token are not set as they have to be, whatever the address."""


def over_https(address: str) -> str:
    """dicomweb:// as https://; other addresses as they are."""
    return f"https://{address[len(SCHEME) :]}" if address.startswith(SCHEME) else address


def is_address(address: str) -> bool:
    """Whether this is a study, a series or an instance."""
    return _ADDRESS.fullmatch(address) is not None


def is_instance(address: str) -> bool:
    """Whether this is an instance."""
    match = _ADDRESS.fullmatch(address)
    return match is not None and match["instance"] is not None


def query(address: str, offset: int) -> str:
    """The address that lists the instances of a study or series, from number `offset` on."""
    return f"{over_https(address).rstrip('/')}/instances?limit={_PAGE}&offset={offset}"


def listed(address: str, answer: bytes) -> list[tuple[str, int, str]]:
    """(series, number, UID) of each instance in the answer to a `query`.

    Raises:
        ValueError: it is no such answer.
    """
    try:
        instances = loads(answer) if answer.strip() else []  # HTTP 204: there are none
        return [_named(address, instance) for instance in instances]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("its answer is no list of instances in JSON (QIDO-RS)") from None


def _named(address: str, instance: Mapping[str, Any]) -> tuple[str, int, str]:
    match = _ADDRESS.fullmatch(address)
    series, uid = (
        match and match["series"] or _value(instance, _SERIES),
        _value(instance, _INSTANCE),
    )
    if not (re.fullmatch(_UID, series) and re.fullmatch(_UID, uid)):
        raise ValueError("no UID")
    number = str(_value(instance, _NUMBER, "0"))
    return series, int(number) if re.fullmatch(r"-?\d{1,12}", number) else 0, uid


def _value(instance: Mapping[str, Any], tag: str, default: str | None = None) -> Any:
    values = instance.get(tag, {}).get("Value") or ([] if default is None else [default])
    return values[0]


def study(address: str) -> str:
    """The address of the study, over https unless http was given, with a slash at its end."""
    match = _ADDRESS.fullmatch(address)
    assert match is not None
    return f"{over_https(match['base'])}/studies/{match['study']}/"


def headers(address: str) -> dict[str, str]:
    """The headers of a request; none where the address is not one of DICOMweb.

    Raises:
        NotSet: a token is set, and not for which server, or it is no token.
    """
    if is_instance(address):
        accept = _OR_MULTIPART
    elif _QUERY.fullmatch(address):
        accept = _LIST
    else:
        return {}
    return {"Accept": accept, **_credentials(address)}


def _credentials(address: str) -> Mapping[str, str]:
    server = os.environ.get(SERVER, "").rstrip("/")
    token = os.environ.get(TOKEN, "")
    if file := os.environ.get(TOKEN_FILE, ""):
        token = _read(file)
    if token:
        _check(server, token)
        if address.startswith(f"{over_https(server)}/"):
            return {"Authorization": f"Bearer {token}"}
    return _of_google() if address.startswith(_GOOGLE) else {}


def _read(file: str) -> str:
    """The token in a file, which may be renewed meanwhile."""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise NotSet(f"{TOKEN_FILE} names {file}: {reason}") from None


def _check(server: str, token: str) -> None:
    """Raises NotSet, whose message does not quote the token."""
    if not re.match(r"(https|dicomweb)://.|http://(localhost|127\.0\.0\.1|\[::1\])(:|/|$)", server):
        raise NotSet(
            f"{SERVER} has to be set beside {TOKEN} or {TOKEN_FILE}: the start of the addresses "
            "that the token is sent to, such as https://host/dicom-web"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise NotSet(f"{TOKEN} or {TOKEN_FILE} holds no token: expected one word")


def _of_google() -> Mapping[str, str]:
    try:
        return credentials.headers() if (credentials := _google()) else {}
    except google.Expired:
        return {}  # the server says 401, and `advice` what to do


@functools.cache
def _google() -> google.Credentials | None:
    """Google's credentials, or None. They are looked for once: where there are none, that asks the
    metadata server of a machine, which would take seconds for each address of a table."""
    try:
        return google.Credentials("Cloud Healthcare")
    except (ModuleNotFoundError, ValueError):
        return None


def advice(address: str) -> str:
    """Says what to do where a server wants credentials."""
    if address.startswith(_GOOGLE):
        return "log in (gcloud auth application-default login; pip install 'medsiglip-jax[gcs]')"
    return f"set {TOKEN} or {TOKEN_FILE}, and {SERVER} to the start of the address"


def unpacked(answer: bytes) -> bytes:
    """The file in an answer, which may be in multipart; what is neither stays as it is."""
    if not answer.startswith(b"--") or answer[128:132] == b"DICM":
        return answer
    boundary, _, rest = answer.partition(b"\r\n")
    head, _, content = rest.partition(b"\r\n\r\n")
    end = content.rfind(b"\r\n" + boundary)
    return content[:end] if end >= 0 and b"\r\n--" not in head else answer
