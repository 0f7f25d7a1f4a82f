"""Which addresses in requests may be read; nothing here touches the network.

An address is taken apart once, by the strict grammar below, and is put together again from its
checked parts for the client, so that the two cannot disagree on which host is meant.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import quote, urljoin

from medsiglip_jax.serve.errors import NOT_ALLOWED, InstanceError

LONGEST = 2048  # characters of an address
_LONGEST_HOST = 253  # RFC 1035, section 2.3.4
_PORTS = {"http": 80, "https": 443}
_BUCKETS, _DICOM = "storage.googleapis.com", "healthcare.googleapis.com"

# Control characters, backslashes, which some clients read as "/", and halves of surrogate pairs.
_NEVER = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
_HTTP = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?", re.IGNORECASE)
_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]*)/(.+)")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]]+)(?::([0-9]{1,5}))?")
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
# inet_aton takes a name with such a last label for an IPv4 address: 127.1, 0x7f000001, 2130706433.
_NUMERIC = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")
_PLAIN_PATH = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~@:+=-]+)+")
_PREFIX = re.compile(
    r"gs://[a-z0-9][a-z0-9._-]*(/.+)?"
    rf"|https://{re.escape(_DICOM)}/v1(beta1)?/projects/[\w.:-]+/locations/[\w-]+"
    r"/datasets/[\w.-]+/dicomStores/[\w.-]+(/[\w.-]+)*",
    re.ASCII,
)
_KEPT = "/%:@!$&'()*+,;=~?"  # what `quote` leaves as it is in paths and queries

# Networks that `private=True` opens: RFC 1918 and 6598, loopback, and RFC 4193.
_PRIVATE = [
    ip_network(net)
    for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8",
                "::1/128", "fc00::/7")
]  # fmt: skip
# What is closed in any case, beside what Python 3.11 knows as special. Metadata and other inner
# servers of clouds: Azure, Alibaba, Oracle (in 192.0.0.0/24), AWS, Google. Then the relays of 6to4,
# Teredo, what is in 2001::/23 beside it, documentation, and 6to4.
_CLOSED = [
    ip_network(net)
    for net in ("168.63.129.16/32", "100.100.100.200/32", "192.0.0.0/24", "fd00:ec2::/32",
                "fd20:ce::/32", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16",
                "3fff::/20")
]  # fmt: skip
_GLOBAL_6 = ip_network("2000::/3")  # the only part of IPv6 that is routed on the Internet
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052; an IPv4 address is in the last 32 bits


class Reach(Enum):
    """From where an IP address can be reached: CLOSED ones are never asked."""

    PUBLIC, PRIVATE, CLOSED = "public", "private", "closed"


def reach(ip: IPv4Address | IPv6Address) -> Reach:
    """Where an IP address leads to; that of an IPv4 address which an IPv6 address stands for."""
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped:
            return reach(ip.ipv4_mapped)
        if ip in _NAT64:
            return reach(IPv4Address(int(ip) & 0xFFFFFFFF))
    if any(ip in net for net in _CLOSED):
        return Reach.CLOSED
    if any(ip in net for net in _PRIVATE):
        return Reach.PRIVATE
    routed = ip in _GLOBAL_6 if ip.version == 6 else not (ip.is_multicast or ip.is_reserved)
    return Reach.PUBLIC if routed and ip.is_global else Reach.CLOSED


@dataclass(frozen=True)
class Address:
    """An address that may be read, once its host's IP addresses are checked.

    Attributes:
        scheme: "http" or "https".
        host: a name in lower case and in ASCII, or an IP address, in brackets where it is of IPv6.
        port: number.
        target: path and query, percent-encoded.
        own_credentials: whether the server's own credentials are sent.
    """

    scheme: str
    host: str
    port: int
    target: str
    own_credentials: bool = False

    @property
    def url(self) -> str:
        """The whole address, put together from its checked parts."""
        return f"{self.scheme}://{self.host}:{self.port}{self.target}"


@dataclass(frozen=True)
class _Host:
    """A host of the list; `name` begins with "." where it stands for all names that end so."""

    name: str
    port: int | None

    def matches(self, scheme: str, host: str, port: int) -> bool:
        named = host.endswith(self.name) if self.name.startswith(".") else host == self.name
        return named and port == (self.port or _PORTS[scheme])


class AllowList:
    """The hosts and prefixes that addresses in requests may name; nothing else is read.

    A host that is found by name may only have public IP addresses, whether it is on the list or
    not, unless `private` is true; a private IP address that the list itself names may be read
    without it. Link-local addresses, metadata servers of clouds and the like are never read.

    Args:
        hosts: "example.org", "*.example.org" (names below it, not itself) or IP addresses, each
            with ":PORT" where it is not the scheme's own, 80 or 443.
        prefixes: "gs://bucket", "gs://bucket/folder" or
            "https://healthcare.googleapis.com/v1/projects/P/locations/L/datasets/D/dicomStores/S",
            or longer ones. They end with a whole part: "gs://bucket/a" has "gs://bucket/a/b.png"
            below it, and not "gs://bucket/ab.png". The server's own credentials are used for them.
        private: whether names may lead to private networks and to this machine.

    Raises:
        ValueError: an entry has none of these forms, or could never be read.
    """

    def __init__(
        self, hosts: Iterable[str] = (), prefixes: Iterable[str] = (), private: bool = False
    ):
        self._hosts = [_parse_host(entry) for entry in hosts]
        self.prefixes = [_parse_prefix(entry) for entry in prefixes]
        self._private = private

    def address(self, text: str) -> Address:
        """The address of a request.

        Raises:
            InstanceError: NOT_ALLOWED; the description does not repeat the address.
        """
        _check_characters(text)
        own = _below_bucket(text) if text.startswith("gs://") else _below_dicom_store(text)
        if own and any(f"{text}/".startswith(f"{prefix}/") for prefix in self.prefixes):
            return own
        return self._plain(text)

    def redirect(self, before: Address, location: str) -> Address:
        """Where the answer from an address sends its reader; never with our own credentials.

        Raises:
            InstanceError: NOT_ALLOWED, as of `address`; or https would become http.
        """
        if before.own_credentials:
            raise _refused("its server redirects, which is not followed with credentials")
        try:
            _check_characters(location)
            after = self._plain(urljoin(before.url, location))
        except ValueError:
            raise _refused("redirected to what is no address of http or https") from None
        except InstanceError as error:
            raise _refused(f"redirected: {error.description}") from None
        if before.scheme == "https" and after.scheme == "http":
            raise _refused("redirected from https to http")
        return after

    def check_lookup(self, ips: Iterable[str]) -> None:
        """Checks all IP addresses that a name leads to: one that is refused is enough.

        Raises:
            InstanceError: NOT_ALLOWED; the description does not tell the IP address.
        """
        allowed = {Reach.PUBLIC, Reach.PRIVATE} if self._private else {Reach.PUBLIC}
        for ip in ips:
            if reach(ip_address(ip)) not in allowed:
                raise _refused("its host is in a network that this server does not read from")

    def _plain(self, text: str) -> Address:
        """An address of http(s) on a host of the list."""
        parts = _HTTP.fullmatch(text)
        if not parts:
            raise _refused("neither http(s) nor below a prefix that this server reads from")
        scheme, authority, path, query = parts[1].lower(), parts[2], parts[3], parts[4]
        try:
            host, port = _parse_authority(authority)
        except ValueError:
            raise _refused("a user name, or a host or port that is not written plainly") from None
        port = _PORTS[scheme] if port is None else port
        if not any(entry.matches(scheme, host, port) for entry in self._hosts):
            raise _refused("no host or port that this server reads from (--allow-host)")
        return Address(scheme, host, port, quote((path or "/") + (query or ""), safe=_KEPT))


def _refused(reason: str) -> InstanceError:
    return InstanceError(NOT_ALLOWED, reason)


def _check_characters(text: str) -> None:
    if len(text) > LONGEST:
        raise _refused(f"an address of more than {LONGEST:,} characters")
    if _NEVER.search(text):
        raise _refused("an address with a backslash or a control character")


def _below_bucket(text: str) -> Address | None:
    """The address at which Cloud Storage serves an object, or None."""
    parts = _BUCKET.fullmatch(text)
    if not parts or {".", ".."} & set(parts[2].split("/")):
        return None
    target = f"/storage/v1/b/{parts[1]}/o/{quote(parts[2], safe='')}?alt=media"
    return Address("https", _BUCKETS, 443, target, own_credentials=True)


def _below_dicom_store(text: str) -> Address | None:
    """An address of the Cloud Healthcare API that says one thing to all servers, or None."""
    start = f"https://{_DICOM}"
    path = text.removeprefix(start)
    if path == text or not _PLAIN_PATH.fullmatch(path):
        return None
    return Address("https", _DICOM, 443, path, own_credentials=True)


def _parse_authority(authority: str) -> tuple[str, int | None]:
    """The host and the port of "host:port".

    Raises:
        ValueError: it has a user name, no valid host or port, or hides an IP address.
    """
    parts = _AUTHORITY.fullmatch(authority)
    if not parts or len(parts[1]) > _LONGEST_HOST:
        raise ValueError("no host and port")
    port = None if parts[2] is None else int(parts[2])
    if port is not None and not 0 < port < 65536:
        raise ValueError("no such port")
    return _normal_host(parts[1]), port


def _normal_host(host: str) -> str:
    """The one spelling of a host: ASCII, lower case, without the dot of the root."""
    if host.startswith("["):
        return f"[{IPv6Address(host[1:-1])}]"
    if not host.isascii():
        import idna

        host = idna.encode(host, uts46=True).decode()  # maps full-width letters and dots, too
    host = host.lower().removesuffix(".")
    if not _NAME.fullmatch(host):
        raise ValueError("no name of a host")
    return str(IPv4Address(host)) if _NUMERIC.fullmatch(host) else host


def _parse_host(entry: str) -> _Host:
    wildcard = entry.startswith("*.")
    try:
        name, port = _parse_authority(entry[2:] if wildcard else entry)
    except ValueError:
        raise ValueError(
            f'--allow-host {entry!r}: expected "example.org", "*.example.org" or an IP address '
            'such as "10.0.0.5" or "[fd12::5]", each with ":PORT" if it is not 80 or 443'
        ) from None
    ip = _literal(name)
    if ip and wildcard:
        raise ValueError(f"--allow-host {entry!r}: an IP address has no names below it")
    if ip and reach(ip) is Reach.CLOSED:
        raise ValueError(f"--allow-host {entry!r}: expected a public or private IP address")
    return _Host(f".{name}" if wildcard else name, port)


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None


def _parse_prefix(entry: str) -> str:
    prefix = entry.rstrip("/")
    parts = prefix.split("/")
    if not _PREFIX.fullmatch(prefix) or {".", ".."} & set(parts) or _NEVER.search(prefix):
        raise ValueError(
            f'--allow-prefix {entry!r}: expected "gs://bucket", "gs://bucket/folder" or '
            f'"https://{_DICOM}/v1/projects/P/locations/L/datasets/D/dicomStores/S"'
        )
    return prefix
