"""Addresses in requests -> bytes, in bounded time and memory, and never from inner networks.

The client is aiohttp's, in the server's event loop. Its three usual ways out are closed: it takes
IP addresses from us, follows no redirect by itself, and knows neither proxies nor cookies.
"""

import asyncio
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from medsiglip_jax import __version__
from medsiglip_jax.files import dicomweb, google
from medsiglip_jax.serve.addresses import Address, AllowList
from medsiglip_jax.serve.errors import CREDENTIALS, HTTP, InstanceError

REDIRECTS = 5
_STEP = 1 << 18  # bytes that are decompressed at once
_REDIRECTED = (301, 302, 303, 307, 308)

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
OpenSocket = Callable[[tuple[Any, ...]], socket.socket]


class Fetcher:
    """Reads addresses that its list allows.

    Every hop is checked anew: its scheme, host and port, then all IP addresses that its name leads
    to. They are looked up once, and a connection, which may be used again, goes to one of them.
    Nothing is looked up for an address that the list does not allow. Certificates are checked
    against the system's authorities, or those of SSL_CERT_FILE. Whatever servers do, at most
    `concurrent * max_bytes` are received at once, which are held twice for a moment; what is done
    with them afterwards is counted elsewhere (`held`).

    Args:
        allowed: what may be read; private networks only as it says.
        max_bytes: of one answer, as it is sent and after decompression.
        seconds: for one address in all, with its redirects and the wait for its turn.
        concurrent: how many addresses are read at once; more wait for their turn.
        lookup: (name, port) -> its IP addresses, at least one, or an OSError; by default the
            system's getaddrinfo.
        open_socket: (family, type, protocol, "", address) -> a socket to connect.
        credentials: -> headers that authorize the server at Google, called in a thread; Google's
            application default credentials by default, which need google-auth.

    Raises:
        ModuleNotFoundError: there are prefixes, and google-auth is not installed.
        ValueError: there are prefixes, and no credentials can be found.
    """

    def __init__(
        self,
        allowed: AllowList,
        *,
        max_bytes: int = 32 << 20,
        seconds: float = 10.0,
        concurrent: int = 32,
        lookup: Lookup | None = None,
        open_socket: OpenSocket | None = None,
        credentials: Callable[[], Mapping[str, str]] | None = None,
    ):
        self._allowed, self._max_bytes, self._seconds = allowed, max_bytes, seconds
        self._turn = asyncio.Semaphore(concurrent)
        # Of its own, so that names whose servers hang hold up no other thread of the process.
        self._threads = ThreadPoolExecutor(concurrent, "fetch")
        self._lookup, self._open_socket = lookup or self._look_up, open_socket
        if allowed.prefixes and credentials is None:
            credentials = OwnCredentials().headers
        self._credentials = credentials
        self._tls = ssl.create_default_context()  # reads hundreds of certificates
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, address: str) -> bytes:
        """The bytes at an address.

        Raises:
            InstanceError: NOT_ALLOWED if the address, a redirect or where they lead is refused;
                CREDENTIALS if the server's own do not suffice; HTTP for what else fails. It tells
                neither the address, nor an IP address, nor what was answered.
        """
        hop = self._allowed.address(address)
        try:
            async with asyncio.timeout(self._seconds), self._turn:
                return await self._follow(hop)
        except TimeoutError:
            raise InstanceError(HTTP, f"not read within {self._seconds:g} s") from None
        except (aiohttp.ClientError, OSError, zlib.error) as error:
            raise InstanceError(HTTP, _said(error)) from None

    async def close(self) -> None:
        """Closes connections; to be called once nothing is being fetched any more."""
        if self._session:
            await self._session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, hop: Address) -> bytes:
        for _ in range(REDIRECTS + 1):
            headers = await self._headers(hop)
            url = URL(hop.url, encoded=True)
            async with self._client().get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status not in _REDIRECTED:
                    _check_status(answer.status, hop)
                    return await self._body(answer)
                location = answer.headers.get("Location", "")
            hop = self._allowed.redirect(hop, location)
        raise InstanceError(HTTP, f"redirected more than {REDIRECTS} times")

    async def _body(self, answer: aiohttp.ClientResponse) -> bytes:
        self._check_size(answer.content_length or 0)
        blocks = [block async for block in self._counted(self._unpacked(answer))]
        return b"".join(blocks)

    async def _counted(self, blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        size = 0
        async for block in blocks:
            size += len(block)
            self._check_size(size)
            yield block

    async def _unpacked(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body in blocks, decompressed in a thread, where bombs do not hold the event loop."""
        unpack = _decompressor(answer)
        async for block in self._counted(answer.content.iter_any()):  # may unpack to nothing
            if unpack is None:
                yield block
                continue
            while part := await self._in_thread(unpack.decompress, block, _STEP):
                yield part
                block = unpack.unconsumed_tail
            if unpack.unused_data:
                raise zlib.error("more than one stream")
        if unpack and not unpack.eof:
            raise zlib.error("less than one stream")

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise InstanceError(HTTP, f"more than {self._max_bytes:,} bytes")

    async def _headers(self, hop: Address) -> Mapping[str, str]:
        accept = {"Accept": dicomweb.AS_STORED} if dicomweb.INSTANCE.search(hop.target) else {}
        if not hop.own_credentials or self._credentials is None:
            return accept
        return {**await self._in_thread(self._credentials), **accept}

    def _client(self) -> aiohttp.ClientSession:
        """The client, made on first use, since it belongs to the event loop that runs."""
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=_Resolver(self._lookup, self._allowed),
                use_dns_cache=False,
                limit=0,  # `_turn` is the limit
                ssl=self._tls,
                socket_factory=self._open_socket,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                # Images are compressed as they are; `_body` counts what is compressed nevertheless.
                headers={
                    "User-Agent": f"medsiglip-jax/{__version__}",
                    "Accept-Encoding": "identity",
                },
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            )
        return self._session

    async def _look_up(self, host: str, port: int) -> list[str]:
        def run() -> list[str]:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [str(address[0]) for *_, address in addresses]

        return await self._in_thread(run)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


class _Resolver(AbstractResolver):
    """Looks a name up, and hands aiohttp its IP addresses if all of them may be connected to."""

    def __init__(self, lookup: Lookup, allowed: AllowList):
        self._lookup, self._allowed = lookup, allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[Any]:
        ips = await self._lookup(host, port)
        self._allowed.check_lookup(ips)
        return [
            {"hostname": host, "host": ip, "port": port, "proto": 0, "flags": socket.AI_NUMERICHOST,
             "family": socket.AF_INET6 if ":" in ip else socket.AF_INET}
            for ip in ips
        ]  # fmt: skip

    async def close(self) -> None:
        pass


class OwnCredentials:
    """Google's application default credentials.

    Raises:
        ModuleNotFoundError: google-auth is not installed.
        ValueError: there are none.
    """

    def __init__(self):
        self._google = google.Credentials("--allow-prefix")

    def headers(self) -> Mapping[str, str]:
        """What authorizes a request; blocks while a token is asked for.

        Raises:
            InstanceError: CREDENTIALS, they have expired.
        """
        try:
            return self._google.headers()
        except google.Expired:
            raise InstanceError(CREDENTIALS, "this server has no valid credentials") from None


def _decompressor(answer: aiohttp.ClientResponse) -> Any:
    """What unpacks a body in gzip or deflate; None of a plain one."""
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise InstanceError(HTTP, "its server compresses the answer in an unknown way")
    return zlib.decompressobj(wbits=47)  # finds out by itself which of the two it is


def _check_status(status: int, hop: Address) -> None:
    if status in (401, 403) and hop.own_credentials:
        raise InstanceError(CREDENTIALS, f"this server may not read it: HTTP {status}")
    if not 200 <= status < 300:
        raise InstanceError(HTTP, f"its server says {status}")


def _said(error: Exception) -> str:
    """Why nothing was read. The texts of aiohttp and of the system have IP addresses in them."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name cannot be looked up"
    if isinstance(error, aiohttp.ClientSSLError):
        return "its server has no valid certificate or TLS"
    if isinstance(error, aiohttp.ClientPayloadError | zlib.error):
        return "the answer ends early, or is damaged"
    if isinstance(error, aiohttp.ClientResponseError):
        return "its server sends no valid HTTP, or too long headers"
    return "no connection"
