"""Addresses in requests: what is refused before a socket is opened, and what servers may do."""

import asyncio
import contextlib
import datetime
import gzip
import re
import socket
import ssl
import threading
import time
import zlib

import hostile_http as hostile
import pytest
from waiting import HANGS

pytest.importorskip("aiohttp")

from medsiglip_jax import __version__
from medsiglip_jax.serve import fetching
from medsiglip_jax.serve.addresses import AllowList
from medsiglip_jax.serve.errors import CREDENTIALS, HTTP, NOT_ALLOWED, InstanceError
from medsiglip_jax.serve.fetching import Fetcher, OwnCredentials

PUBLIC, OTHER, PUBLIC_6 = "93.184.215.14", "203.1.113.9", "2606:2800:21f:cb07::1"
STORE = "https://healthcare.googleapis.com/v1/projects/p/locations/l/datasets/d/dicomStores/s"
STUDY = "/dicomWeb/studies/1.2/series/3.4/instances/5.6"
HOSTS = ["good.example", "*.below.example", "odd.example:8042", "203.1.113.9", "10.0.0.5:8042",
         "[fd12::5]:8042"]  # fmt: skip
PREFIXES = ["gs://bucket/prefix/", STORE]

# What is refused before anything is looked up, with the hosts and prefixes above allowed.
ADDRESSES = [
    # Other schemes
    "file:///etc/passwd", "ftp://good.example/a", "gopher://good.example:70/_x", "data:,x",
    "data:image/png;base64,AAAA", "dict://good.example:11211/", "ws://good.example/",
    "s3://bucket/prefix/a",
    "//good.example/a", "good.example/a", "http:good.example/a", "http:/good.example/a", "",
    "http://",
    "http:///a", "jar:http://good.example/a", "unix:///run/docker.sock",
    # Other hosts, or none
    "http://evil.example/", "http://good.example.evil.example/", "http://evilgood.example/",
    "http://below.example/", "http://evilbelow.example/", "http://.below.example/",
    "http://a..below.example/",
    "http://localhost/", "http://localhost./",
    "http://metadata.google.internal/computeMetadata/v1/",
    # Names and passwords, and what parsers disagree on
    "http://good.example@evil.example/", "http://user:password@good.example/",
    "http://@good.example/",
    "http://good.example:80@evil.example/", "http://evil.example#@good.example/",
    "http://evil.example?@good.example/", "http://good.example\\@evil.example/",
    "http:\\\\good.example/", "http://evil.example\\.good.example/",
    "http://good.example\t.evil.example/",
    "http://good.example\n/", "http://good.example\r\nHost: evil.example/",
    "http://good.example\x00.evil/",
    "http://good.example /", " http://good.example/", "\x01http://good.example/",
    "http://good.example\ud800/",
    "http://good%2eexample/", "http://%67ood.example/", "http://%31%32%37.0.0.1/",
    "http://good.example%00/",
    "http://good.example:/", "http://[good.example]/", "http://good.example]/",
    "http://good.example../",
    "http://127。0。0。1/", "http://１２７.0.0.1/", "http://①②⑦.1/", "http://good.example／evil/",
    "http://good.example／@evil/", "http://good。example。evil/", "http://\u200b/", "http://..。/",
    "http://" + "a" * 254 + ".below.example/", "http://" + "ü" * 250 + ".below.example/",
    "http://" + 5 * ("a" * 60 + ".") + "below.example/", "http://good.example/" + "a" * 2048,
    "http://good.example/a\\b", "http://good.example/a\nb", "http://good.example/?\ud800",
    "gs://bucket/prefix/\udfff",
    # Ports
    "http://good.example:22/", "http://good.example:443/", "https://good.example:80/",
    "http://good.example:0/",
    "http://good.example:65616/", "http://good.example:80:80/", "http://good.example:8０/",
    "http://odd.example/",
    "http://odd.example:80/", "http://10.0.0.5/", "https://10.0.0.5:443/",
    # IP addresses: loopback, private, link-local, metadata, each in disguise
    "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0177.0.0.1/", "http://017700000001/", "http://127.0.0.1./", "http://0/",
    "http://0.0.0.0/",
    "http://0x/", "http://10.0.0.6:8042/", "http://10.5:8042/", "http://0xa.0.0.5:8042/",
    "http://167772165:8042/",
    "http://012.0.0.5:8042/", "http://10.0.0.05:8042/", "http://a.below.example.1/",
    "http://192.168.0.1/",
    "http://172.16.0.1/", "http://169.254.169.254/latest/meta-data/", "http://0xa9fea9fe/",
    "http://2852039166/",
    "http://100.64.0.1/", "http://224.0.0.1/", "http://255.255.255.255/", "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:10.0.0.5]:8042/", "http://[::ffff:7f00:1]/",
    "http://[::127.0.0.1]/",
    "http://[fd00:ec2::254]/", "http://[fe80::1]/", "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://[::1", "http://::1/",
    "http://[::1]good.example/",
    "http://[0:0:0:0:0:0:0:1]:80/", "http://[v1.a]/", "http://93.184.215.14/",
    # Outside of the prefixes
    "gs://bucket/other/a.png", "gs://bucket/prefixed.png", "gs://bucket/prefix/../other/a.png",
    "gs://bucket/prefix/./a.png", "gs://bucket/prefix/a/..", "gs://bucket", "gs://bucket/",
    "gs://bucket2/prefix/a.png",
    "gs://user@bucket/prefix/a.png", "gs://BUCKET/prefix/a.png", "GS://bucket/prefix/a.png",
    "gs:///bucket/prefix/a",
    "gs://bucket/prefix\\..\\other", "gs://bucket/prefix/a\nb", "gs://bucket//prefix/a.png",
    *(STORE.replace(old, new) + STUDY for old, new in (
        ("https", "http"), (".com", ".com:443"), (".com", ".com.evil.example"), (".com", ".com."),
        (".com", ".com@evil.example"), ("healthcare", "HEALTHCARE"),
    )),
    *(STORE + end for end in (
        f"2{STUDY}", ":getIamPolicy", f"/../s2{STUDY}", f"/%2e%2e/s2{STUDY}", "/%2E%2E%2Fs2", "/..",
        "/./a", "//a", f"{STUDY}?access_token=x", f"{STUDY}#x", f"{STUDY}/", "/a\\..\\..",
    )),
    "https://storage.googleapis.com/storage/v1/b/bucket/o/prefix%2Fa?alt=media",
]  # fmt: skip

# What a name may lead to that is refused; none of it is connected to.
LOOKUPS = {
    "loopback": ["127.0.0.1"], "all of loopback": ["127.255.0.9"], "loopback 6": ["::1"],
    "private 10": ["10.1.2.3"], "private 172": ["172.31.0.1"], "private 192": ["192.168.1.1"],
    "private 6": ["fd12:3456::1"], "site-local 6": ["fec0::1"], "carrier": ["100.64.0.1"],
    "link-local": ["169.254.1.1"], "link-local 6": ["fe80::1"], "scoped": ["fe80::1%eth0"],
    "metadata": ["169.254.169.254"], "AWS 6": ["fd00:ec2::254"], "Google 6": ["fd20:ce::254"],
    "Azure": ["168.63.129.16"], "Alibaba": ["100.100.100.200"], "Oracle": ["192.0.0.192"],
    "unspecified": ["0.0.0.0"], "of network 0": ["0.1.2.3"], "unspecified 6": ["::"],
    "multicast": ["224.0.0.251"], "multicast 6": ["ff02::1"], "global multicast 6": ["ff0e::1"],
    "reserved": ["240.0.0.1"], "broadcast": ["255.255.255.255"], "benchmarks": ["198.18.0.1"],
    "documentation": ["192.0.2.1"], "documentation 6": ["2001:db8::1"], "more of it": ["3fff::1"],
    "discard": ["100::1"], "mapped loopback": ["::ffff:127.0.0.1"], "mapped": ["::ffff:10.0.0.1"],
    "mapped metadata": ["::ffff:169.254.169.254"], "compatible": ["::10.0.0.1"],
    "NAT64 loopback": ["64:ff9b::127.0.0.1"], "NAT64 private": ["64:ff9b::10.0.0.1"],
    "local NAT64": ["64:ff9b:1::a00:1"], "6to4": ["2002:a00:1::1"], "6to4 public": ["2002:5db8::1"],
    "Teredo": ["2001:0:5db8:d70e:0:0:f5ff:fffe"], "ORCHID": ["2001:20::1"],
    "one of two": [PUBLIC, "10.0.0.5"], "the other of two": ["::1", PUBLIC_6],
    "named on the list, with its port": ["10.0.0.5"],
}  # fmt: skip


class Network:
    """Names and sockets of a test: sockets that are asked for are noted, and lead to no network.

    Args:
        names: name -> what each lookup of it finds, the last one again and again.
        server: the port on this machine that stands in for all servers; without it none answers.
    """

    def __init__(self, names, server=None):
        self._names, self._server = {name: list(found) for name, found in names.items()}, server
        self.lookups, self.opened = [], []

    async def look_up(self, name, port):
        self.lookups.append(name)
        found = self._names.get(name) or []
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return found.pop(0) if len(found) > 1 else found[0]

    def open_socket(self, info):
        self.opened.append(info[4][:2])
        if self._server is None:
            raise OSError(f"no way to {info[4]}")
        server = self._server

        class Diverted(socket.socket):
            def connect(self, address):
                super().connect(("127.0.0.1", server))

        diverted = Diverted(socket.AF_INET, socket.SOCK_STREAM)
        diverted.setblocking(False)
        return diverted


def fetch(address, allowed, network=None, **options):
    """What becomes of an address: its bytes, or the error."""

    async def run():
        return await outcome(fetcher, address)

    if network:
        options |= {"lookup": network.look_up, "open_socket": network.open_socket}
    fetcher = Fetcher(allowed, **options)
    return running(fetcher, run())


def running(fetcher, work):
    async def run():
        try:
            return await work
        finally:
            await fetcher.close()

    return asyncio.run(run())


async def outcome(fetcher, address):
    try:
        return await fetcher.fetch(address)
    except InstanceError as error:
        return error


def token():
    return {"authorization": "Bearer of-the-server"}


def assert_refused(got, case=""):
    assert isinstance(got, InstanceError) and got.code == NOT_ALLOWED, (case, got)
    assert "example" not in got.description and "password" not in got.description
    assert not any(ip in got.description for ip in ("10.", "127.", "169.", "::"))


# ------------------------------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def refusing():
    """A fetcher and its network for addresses of the table, which use neither."""
    network = Network({"good.example": [[PUBLIC]]})
    ways = {"lookup": network.look_up, "open_socket": network.open_socket, "credentials": token}
    return network, Fetcher(AllowList(HOSTS, PREFIXES), **ways)


@pytest.mark.parametrize("address", ADDRESSES, ids=ascii)
def test_refused_before_a_name_is_looked_up(address, refusing):
    network, fetcher = refusing
    assert_refused(asyncio.run(outcome(fetcher, address)))
    assert not network.lookups and not network.opened


@pytest.mark.parametrize(
    "address", ["http://good.example/", "https://good.example/", "gs://bucket/prefix/a.png",
                STORE + STUDY, "http://127.0.0.1/", f"http://{PUBLIC}/"],
)  # fmt: skip
def test_nothing_is_allowed_by_default(address):
    network = Network({})
    assert_refused(fetch(address, AllowList(private=True), network))
    assert not network.lookups and not network.opened


def looked_up(allowed):
    """What becomes of a name for each row of LOOKUPS: (outcomes, network)."""
    names = {f"host-{i}.below.example": [ips] for i, ips in enumerate(LOOKUPS.values())}
    network = Network(names)

    async def each():
        found = [await outcome(fetcher, f"http://{name}/a?key=password") for name in names]
        return dict(zip(LOOKUPS, found, strict=True))

    fetcher = Fetcher(allowed, lookup=network.look_up, open_socket=network.open_socket)
    got = running(fetcher, each())
    assert network.lookups == list(names)
    return got, network


def test_refused_for_what_a_name_leads_to():
    got, network = looked_up(AllowList(HOSTS))
    for case, error in got.items():
        assert_refused(error, case)
    assert not network.opened


def test_prefixes_are_looked_up_with_the_same_care():
    names = {
        name: [["10.0.0.1"]] for name in ("storage.googleapis.com", "healthcare.googleapis.com")
    }
    for address in ("gs://bucket/prefix/a.png", STORE + STUDY):
        network = Network(names)
        got = fetch(address, AllowList(HOSTS, PREFIXES), network, credentials=token)
        assert_refused(got)
        assert len(network.lookups) == 1 and not network.opened


def test_a_name_that_is_bound_again_is_looked_up_once_and_then_refused():
    """DNS rebinding: what was checked is what is connected to."""
    network = Network({"good.example": [[PUBLIC], ["127.0.0.1"]]})

    async def twice():
        return [await outcome(fetcher, "http://good.example/") for _ in range(2)]

    fetcher = Fetcher(AllowList(HOSTS), lookup=network.look_up, open_socket=network.open_socket)
    first, second = running(fetcher, twice())
    assert (first.code, first.description) == (HTTP, "no connection")
    assert_refused(second)
    assert len(network.lookups) == 2 and network.opened == [(PUBLIC, 80)]


# What of LOOKUPS may be read on request. The rest is of no use to a hospital.
PRIVATE = (
    "loopback", "all of loopback", "loopback 6", "private 10", "private 172", "private 192",
    "private 6", "carrier", "mapped loopback", "mapped", "NAT64 loopback", "NAT64 private",
    "one of two", "the other of two", "named on the list, with its port",
)  # fmt: skip


def test_private_networks_on_request_and_no_metadata_servers():
    got, network = looked_up(AllowList(HOSTS, private=True))
    for case in PRIVATE:
        assert got.pop(case).description == "no connection", case
    for case, error in got.items():
        assert_refused(error, case)
    assert {ip for ip, _ in network.opened} == {ip for case in PRIVATE for ip in LOOKUPS[case]}


# ------------------------------------------------------------------------------------- allowed

CONNECTED = {
    "http://good.example": (PUBLIC, 80), "https://good.example/a b.png?c=ü": (PUBLIC, 443),
    "HTTPS://GOOD.EXAMPLE.:443/": (PUBLIC, 443), "http://good.example:80/#frame": (PUBLIC, 80),
    "http://ｇｏｏｄ。example/": (PUBLIC, 80), "http://go\u00adod.example?x": (PUBLIC, 80),
    "http://a.below.example/": (PUBLIC_6, 80), "http://b.a_1.below.example/": (PUBLIC_6, 80),
    "https://odd.example:8042/": (PUBLIC, 8042), "http://203.1.113.9/": ("203.1.113.9", 80),
    "http://10.0.0.5:8042/": ("10.0.0.5", 8042), "gs://bucket/prefix/a b?#.png": (PUBLIC, 443),
    STORE + STUDY: (PUBLIC, 443), "http://[FD12:0::5]:8042/": ("fd12::5", 8042),
}  # fmt: skip


@pytest.mark.parametrize("address", CONNECTED, ids=ascii)
def test_connected_to_what_was_looked_up(address):
    here = ["good.example", "odd.example", "storage.googleapis.com", "healthcare.googleapis.com"]
    names = {name: [[PUBLIC]] for name in here}
    names |= dict.fromkeys(("a.below.example", "b.a_1.below.example"), [[PUBLIC_6]])
    network = Network(names)
    got = fetch(address, AllowList(HOSTS, PREFIXES), network, credentials=token)
    assert (got.code, got.description) == (HTTP, "no connection")
    assert network.opened == [CONNECTED[address]]


@pytest.mark.parametrize(
    "entry", ["http://good.example", "good.example/a", "*", "*.", "*.1.2.3", "user@good.example",
              "127.1", "fd12::5", "good.example:0", "good.example:99999", "", "*.10.0.0.5",
              "169.254.169.254", "[fe80::1]", "0.0.0.0", "a b"],
)  # fmt: skip
def test_hosts_that_the_list_cannot_have(entry):
    with pytest.raises(ValueError, match="--allow-host"):
        AllowList([entry])


@pytest.mark.parametrize(
    "entry", ["gs://", "gs:///a", "bucket/a", "gs://bucket/../a", "https://good.example/a",
              "https://healthcare.googleapis.com/v1/projects/p", f"{STORE}?a=b", f"{STORE}/..",
              STORE.replace("https", "http"), "gs://bucket/a\\b", f"{STORE}/%2e%2e"],
)  # fmt: skip
def test_prefixes_that_the_list_cannot_have(entry):
    with pytest.raises(ValueError, match="--allow-prefix"):
        AllowList((), [entry])


# ------------------------------------------------------------------------- redirects and tokens


class Server:
    """A server in the event loop of a test, which notes the heads of requests.

    Args:
        answers: the first line of a request -> the whole answer, or a function of nothing.
    """

    def __init__(self, answers, tls=None):
        self.heads, self.names = [], []
        self._answers, self._tls = answers, tls
        if tls:
            tls.sni_callback = lambda sock, name, context: self.names.append(name)

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _answer(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            writer.write(self._answers(head.split()[1]))
            await writer.drain()
        writer.close()


def redirect(location, status="302 Found"):
    return hostile.whole(b"", f"Location: {location}", status=status)


def ask(address, answers, allowed, names, tls=None, **options):
    """Fetches from one server that stands in for all: (outcome, network, server)."""

    async def run():
        async with Server(answers, tls) as server:
            network = Network(names, server.port)
            ways = {"lookup": network.look_up, "open_socket": network.open_socket}
            fetcher = Fetcher(allowed, **ways, **options)
            got = await outcome(fetcher, address)
            await fetcher.close()
            return got, network, server

    return asyncio.run(run())


NAMES = {"good.example": [[PUBLIC]]}


def redirected(targets, names):
    """What becomes of redirects to each of these: (outcomes, network)."""

    async def run():
        async with Server(lambda path: redirect(targets[int(path[1:])])) as server:
            network = Network({**NAMES, **names}, server.port)
            ways = {"lookup": network.look_up, "open_socket": network.open_socket}
            fetcher = Fetcher(AllowList(HOSTS, PREFIXES), **ways, credentials=token)
            addresses = [f"http://good.example/{i}" for i in range(len(targets))]
            got = [await outcome(fetcher, address) for address in addresses]
            await fetcher.close()
            assert len(server.heads) == len(targets)
            return got, network

    return asyncio.run(run())


# A redirect without a scheme or without a host stays on the same server.
ELSEWHERE = re.compile(r"\w+://[^/\n]|data:|unix:|jar:")


def test_redirects_to_what_is_refused():
    """Also to what may be read with our own credentials, which no other server may cause."""
    targets = [
        *(a for a in ADDRESSES if a.isprintable() and ELSEWHERE.match(a)),
        "gs://bucket/prefix/a.png", STORE + STUDY,
    ]  # fmt: skip
    assert len(targets) > 0.8 * len(ADDRESSES)
    got, network = redirected(targets, {})
    for target, error in zip(targets, got, strict=True):
        assert_refused(error, target)
    assert network.lookups == ["good.example"] * len(targets)
    assert network.opened == [(PUBLIC, 80)] * len(targets)


def test_redirects_to_a_name_that_leads_inside():
    names = {f"host-{i}.below.example": [ips] for i, ips in enumerate(LOOKUPS.values())}
    got, network = redirected([f"//{name}/" for name in names], names)
    for case, error in zip(LOOKUPS, got, strict=True):
        assert_refused(error, case)
    assert network.opened == [(PUBLIC, 80)] * len(LOOKUPS)


@pytest.mark.parametrize(
    "location", ["http://[::1", "\udcff", "//good.exa\tmple/", "http://good.example:9/", "/\udce4"]
)
def test_redirects_that_no_client_should_read(location):
    answer = redirect("LOCATION").replace(b"LOCATION", location.encode("utf-8", "surrogateescape"))
    got, network, _ = ask("http://good.example/", lambda path: answer, AllowList(HOSTS), NAMES)
    assert_refused(got)
    assert network.opened == [(PUBLIC, 80)]


def test_a_loop_of_redirects_ends():
    got, network, server = ask(
        "http://good.example/", lambda path: redirect("/again"), AllowList(HOSTS), NAMES
    )
    assert (got.code, got.description) == (HTTP, "redirected more than 5 times")
    assert len(server.heads) == len(network.opened) == len(network.lookups) == 6


def test_a_redirect_to_a_good_address_is_followed():
    def answers(path):
        if path == "/b/image?x=1":
            return hostile.whole(b"image")
        location = "../b/image?x=1" if path == "/a/a" else "//a.below.example/a/a"
        return redirect(location, status)

    names = {**NAMES, "a.below.example": [[OTHER]]}
    for status in ("301 Moved", "303 See Other", "308 Permanent Redirect"):
        got, network, server = ask("http://good.example/?k=1", answers, AllowList(HOSTS), names)
        assert got == b"image", status
        assert network.opened == [(PUBLIC, 80), (OTHER, 80), (OTHER, 80)]
        assert not any(word in "".join(server.heads) for word in ("Referer", "Cookie"))
        assert "Host: a.below.example\r\n" in server.heads[-1]


def test_a_port_of_its_own_is_told_to_the_server():
    names = {"odd.example": [[PUBLIC]]}
    got, _, server = ask(
        "http://odd.example:8042/", lambda path: hostile.whole(b"image"), AllowList(HOSTS), names
    )
    assert got == b"image" and "Host: odd.example:8042\r\n" in server.heads[0]


def test_cookies_are_not_kept_and_proxies_not_asked(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    def answers(path):
        if path == "/next":
            return hostile.whole(b"image")
        return hostile.whole(b"", "Set-Cookie: a=b", "Location: /next", status="302 Found")

    got, network, server = ask("http://good.example/", answers, AllowList(HOSTS), NAMES)
    assert got == b"image" and "Cookie" not in server.heads[1]
    assert f"User-Agent: medsiglip-jax/{__version__}\r\n" in server.heads[0]
    assert "Accept-Encoding: identity\r\n" in server.heads[0]
    assert network.opened == [(PUBLIC, 80)] * 2


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate for the names of these tests, and for nothing else, which signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority of tests")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = ["good.example", "storage.googleapis.com", "healthcare.googleapis.com"]
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in hosts]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def tls(authority, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    return context


def test_the_certificate_is_of_the_name_and_not_of_the_ip_address(tls):
    names = {**NAMES, "a.below.example": [[PUBLIC]]}
    answers = lambda path: hostile.whole(b"image")  # noqa: E731
    address = "https://GOOD.example./%61 b.png?c=ü#d"
    got, _, server = ask(address, answers, AllowList(HOSTS), names, tls)
    assert got == b"image" and server.names == ["good.example"]
    assert server.heads[0].startswith("GET /%61%20b.png?c=%C3%BC HTTP/1.1\r\n")
    assert "Host: good.example\r\n" in server.heads[0]
    got, _, server = ask("https://a.below.example/", answers, AllowList(HOSTS), names, tls)
    assert (got.code, got.description) == (HTTP, "its server has no valid certificate or TLS")
    assert not server.heads


def test_https_never_becomes_http(tls):
    got, network, server = ask(
        "https://good.example/",
        lambda path: redirect("http://good.example/"),
        AllowList(HOSTS),
        NAMES,
        tls,
    )
    assert_refused(got)
    assert got.description == "redirected from https to http" and len(network.opened) == 1


GOOGLE = {name: [[PUBLIC]] for name in ("storage.googleapis.com", "healthcare.googleapis.com")}


@pytest.mark.parametrize(
    "address, line", [
        ("gs://bucket/prefix/a b?#%2e.png",
         "GET /storage/v1/b/bucket/o/prefix%2Fa%20b%3F%23%252e.png?alt=media HTTP/1.1"),
        (STORE + STUDY, f"GET {(STORE + STUDY).removeprefix('https://healthcare.googleapis.com')}"),
    ],
)  # fmt: skip
def test_prefixes_are_read_with_the_credentials_of_the_server(address, line, tls):
    got, _, server = ask(
        address, lambda path: hostile.whole(b"image"), AllowList(HOSTS, PREFIXES), GOOGLE, tls,
        credentials=token,
    )  # fmt: skip
    assert got == b"image" and server.heads[0].startswith(line)
    assert "authorization: Bearer of-the-server\r\n" in server.heads[0]
    stored = "Accept: application/dicom; transfer-syntax=*\r\n" in server.heads[0]
    assert stored == ("instances" in address)


@pytest.mark.parametrize(
    "status, code",
    [("401 Unauthorized", CREDENTIALS), ("403 Forbidden", CREDENTIALS), ("404 Not Found", HTTP)],
)
def test_what_is_said_where_credentials_do_not_suffice(status, code, tls):
    body = b"Bearer of-the-server may not read gs://bucket"
    got, _, _ = ask(
        "gs://bucket/prefix/a.png", lambda path: hostile.whole(body, status=status),
        AllowList(HOSTS, PREFIXES), GOOGLE, tls, credentials=token,
    )  # fmt: skip
    assert got.code == code and "Bearer" not in str(got) and "bucket" not in str(got)


def test_redirects_are_not_followed_with_credentials(tls):
    got, network, _ = ask(
        STORE + STUDY, lambda path: redirect("https://good.example/"), AllowList(HOSTS, PREFIXES),
        {**GOOGLE, **NAMES}, tls, credentials=token,
    )  # fmt: skip
    assert_refused(got)
    assert network.lookups == ["healthcare.googleapis.com"]


def test_no_other_address_gets_a_token(tls):
    """Not even one on the same host, where the host as such is allowed."""
    allowed = AllowList([*HOSTS, "healthcare.googleapis.com"], PREFIXES)
    for address in (
        f"{STORE}2{STUDY}",
        f"{STORE}{STUDY}?x",
        f"{STORE}/../s2",
        "https://good.example/",
    ):
        got, _, server = ask(
            address, lambda path: hostile.whole(b"image"), allowed, {**GOOGLE, **NAMES}, tls,
            credentials=token,
        )  # fmt: skip
        assert got == b"image" and "authorization" not in server.heads[0].lower(), address


def test_credentials_of_google(monkeypatch):
    google = pytest.importorskip("google.auth")
    from google.oauth2.credentials import Credentials

    monkeypatch.setattr(google, "default", lambda scopes: (Credentials("of-google"), "project"))
    assert OwnCredentials().headers()["authorization"] == "Bearer of-google"

    def expired(*_):
        raise google.exceptions.RefreshError("of someone")

    monkeypatch.setattr(Credentials, "before_request", expired)
    got = fetch("gs://bucket/prefix/a.png", AllowList((), PREFIXES), Network(GOOGLE))
    assert got.code == CREDENTIALS and "someone" not in got.description

    def none(scopes):
        raise google.exceptions.DefaultCredentialsError("/home/someone/key.json is not there")

    monkeypatch.setattr(google, "default", none)
    with pytest.raises(ValueError, match="^--allow-prefix needs .* application-default login"):
        Fetcher(AllowList((), PREFIXES))
    Fetcher(AllowList(HOSTS))  # which needs none


# ------------------------------------------------------------------------- servers on this machine

MOST = 1 << 20
TOO_LARGE, TOO_SLOW = "more than 1,048,576 bytes", "not read within 1 s"
ENDS, NO_HTTP = "the answer ends early", "its server sends no valid HTTP"
SAID = {
    "endless": TOO_LARGE, "endless_chunks": TOO_LARGE, "gzip_bomb": TOO_LARGE,
    "deflate_bomb": TOO_LARGE, "lying_long": TOO_LARGE, "silent": TOO_SLOW,
    "silent_body": TOO_SLOW, "drip": TOO_SLOW, "drip_of_headers": TOO_SLOW,
    "endless_continue": TOO_SLOW, "huge_headers": NO_HTTP, "no_http": NO_HTTP,
    "lying_short": NO_HTTP,
    "to_file": "redirected: ", "to_ftp": "redirected: ", "to_bucket": "redirected: ",
    "to_itself": "redirected more than 5 times", "unauthorized": "its server says 401",
    "proxy_unauthorized": "its server says 407", "gone": "its server says 410",
    "short_body": ENDS, "damaged_gzip": ENDS, "hangs_up": "no connection",
}  # fmt: skip


@pytest.fixture(scope="module")
def servers():
    with hostile.servers() as running_servers:
        yield running_servers


def loopback(servers):
    return AllowList([server.url.split("/")[2] for server in servers.values()])


def test_each_hostile_server_costs_one_error_within_its_seconds(servers):
    async def all_of_them():
        return await asyncio.gather(*(outcome(fetcher, s.url) for s in servers.values()))

    fetcher = Fetcher(loopback(servers), max_bytes=MOST, seconds=1.0)
    start = time.perf_counter()
    got = dict(zip(servers, running(fetcher, all_of_them()), strict=True))
    assert time.perf_counter() - start < HANGS
    for name in hostile.READABLE:
        assert got.pop(name) == hostile.picture(), name
    assert got.pop("empty") == b""
    assert set(got) == set(SAID)
    for name, error in got.items():
        assert isinstance(error, InstanceError) and error.description.startswith(SAID[name]), (
            name,
            error,
        )
        assert error.code == (NOT_ALLOWED if SAID[name] == "redirected: " else HTTP)
        assert "127.0.0.1" not in error.description


def test_what_is_compressed_unasked_is_read_whole_or_not_at_all():
    image = bytes(range(256)) * 1024 + bytes(1 << 20)  # ends where a step does
    packed = gzip.compress(image)
    bodies = {
        "gzip": (packed, image), "x-gzip": (packed, image), "GZIP ": (packed, image),
        "deflate": (zlib.compress(image), image), "identity": (image, image),
        "br": (packed, "its server compresses the answer in an unknown way"),
        "gzip, gzip": (gzip.compress(packed), "its server compresses the answer in an unknown way"),
    }  # fmt: skip
    broken = [packed[:-9], packed[:-1], packed + packed, packed + b"x", image, b""]
    cases = [(name, *case) for name, case in bodies.items()]
    cases += [("gzip", body, "the answer ends early, or is damaged") for body in broken]
    for encoding, body, wanted in cases:
        answer = hostile.whole(body, f"Content-Encoding: {encoding}")
        got, _, _ = ask("http://good.example/", lambda path, a=answer: a, AllowList(HOSTS), NAMES)
        assert wanted == (got if isinstance(wanted, bytes) else got.description), encoding


@pytest.mark.parametrize("packed", [False, True])
def test_the_largest_body_is_read_and_one_byte_more_is_not(packed):
    image = bytes(100)
    body = gzip.compress(image) if packed else image
    answer = hostile.head(f"Content-Encoding: {'gzip' if packed else 'identity'}") + body
    for most, wanted in ((100, image), (99, "more than 99 bytes")):
        got, _, _ = ask(
            "http://good.example/", lambda path: answer, AllowList(HOSTS), NAMES, max_bytes=most
        )
        assert wanted == (got if most == 100 else got.description)


def test_bodies_that_unpack_to_nothing_or_go_on_after_their_end_are_counted():
    packed = zlib.compressobj(wbits=31)
    start = packed.compress(b"a") + packed.flush(zlib.Z_FULL_FLUSH)

    def empty_blocks(send):
        send(hostile.head("Content-Encoding: gzip") + start)
        while True:
            send(b"\x00\x00\x00\xff\xff" * 9999)  # stored blocks of no bytes (RFC 1951, 3.2.4)

    def garbage(send):
        send(hostile.head("Content-Encoding: gzip") + gzip.compress(b"a"))
        while True:
            send(bytes(1 << 16))

    for answer, wanted in ((empty_blocks, TOO_LARGE), (garbage, ENDS)):
        server = hostile.Server("x", answer)
        allowed = AllowList([server.url.split("/")[2]])
        assert fetch(server.url, allowed, max_bytes=MOST).description.startswith(wanted)
        server.close()


def test_a_server_that_is_not_there_is_not_told_by_its_ip_address(servers):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        host = f"127.0.0.1:{gone.getsockname()[1]}"
    got = fetch(f"http://{host}/", AllowList([host]))
    assert (got.code, got.description) == (HTTP, "no connection")
    network = Network({})
    got = fetch("http://good.example/", AllowList(HOSTS), network)
    assert (got.code, got.description) == (HTTP, "its name cannot be looked up")


def test_fetches_that_hang_take_turns_and_hold_up_nothing_else():
    """A hundred addresses whose servers never answer: eight sockets, and an idle event loop."""
    silent = hostile.Server("silent", hostile.silent)
    host = silent.url.split("/")[2]
    opened, most = [], []

    def open_socket(info):
        opened.append(socket.socket(info[0], info[1]))
        opened[-1].setblocking(False)
        most.append(sum(each.fileno() >= 0 for each in opened))
        return opened[-1]

    async def many():
        hanging = [asyncio.create_task(outcome(fetcher, silent.url)) for _ in range(100)]
        ticks = []
        while not all(task.done() for task in hanging):
            await asyncio.sleep(0.01)
            ticks.append(sum(task.done() for task in hanging))
        return [task.result() for task in hanging], ticks

    fetcher = Fetcher(AllowList([host]), seconds=1.5, concurrent=8, open_socket=open_socket)
    got, ticks = running(fetcher, many())
    silent.close()
    assert {error.description for error in got} == {"not read within 1.5 s"}
    assert max(most) == 8
    # The loop ran while all of them hung; had it waited for one after the other, it would have run
    # once for each.
    assert ticks.count(0) > 3


def test_names_that_cannot_be_looked_up_hold_no_thread_of_others(monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *args, **options: answer.wait(30))

    async def many():
        hanging = [asyncio.create_task(outcome(fetcher, "http://good.example/")) for _ in range(40)]
        await asyncio.sleep(0.1)
        # Forty of them would hold every thread until the answer, which comes last.
        await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(int) for _ in range(8))), 20)
        got = await asyncio.gather(*hanging)
        answer.set()
        return got

    fetcher = Fetcher(AllowList(HOSTS), seconds=1.0)
    got = running(fetcher, many())
    assert {error.description for error in got} == {"not read within 1 s"}


def test_turns_are_handed_on_whatever_becomes_of_a_fetch(servers):
    """After failures of all kinds, a fetcher for one address at a time still reads."""

    async def run():
        for name in ("good", "gone", "silent", "gzip_bomb", "to_file", "short_body"):
            await outcome(fetcher, servers[name].url)
        assert await fetcher.fetch(servers["good"].url) == hostile.picture()
        cancelled = asyncio.create_task(fetcher.fetch(servers["silent"].url))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return await fetcher.fetch(servers["good"].url)

    fetcher = Fetcher(loopback(servers), max_bytes=MOST, seconds=0.5, concurrent=1)
    assert running(fetcher, run()) == hostile.picture()
