"""Sends hostile requests, images, addresses and clients to a server on this machine.

    python scripts/hostile_serve.py fuzz          # 2,000 requests, two minutes
    python scripts/hostile_serve.py bodies        # JSON of 32 MiB
    python scripts/hostile_serve.py bombs         # images that are large where they look small
    python scripts/hostile_serve.py addresses     # that lead to inner networks; nothing is asked
    python scripts/hostile_serve.py slow          # 200 clients that send a byte per second
    python scripts/hostile_serve.py all --json

The server is the command in a process of its own with 6 GB of address space, and a small model. A
secret is in the headers, texts, images and paths of every request. The exit code is 1 if a request
is answered with 5xx, with an error of more than 1 kB or with its secret, if the log has a secret or
a traceback, or if the server is not ready afterwards or answers a good request with another vector.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from served import ROOT, Served

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import planted_files  # noqa: E402

Rng = np.random.Generator
LIMIT = 6 << 30  # bytes of address space of the server
STEM = "Wolperting"  # what all secrets begin with
THREADS, SECONDS = 4, 60.0
# By their contracts these repeat texts or ids of the request when they answer it.
REPEATS = re.compile(r"/v1/classify|/models/|/pipeline/|/v2/models/|/$")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    parser.add_argument("--count", type=int, default=2000, help="requests of fuzz, default 2000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="what is named so: bodies, bombs, clients")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the server ends with us
    names = list(COMMANDS) if args.command == "all" else [args.command]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        report = {name: COMMANDS[name](args, Path(folder)) for name in names}
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 1 if any(part["wrong"] for part in report.values()) else 0


def text(report: dict[str, Any]) -> str:
    lines = []
    for name, part in report.items():
        lines += [name, *_table(part["rows"]), *(f"WRONG {line}" for line in part["wrong"]), ""]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows beneath each other, with as much room for each column as its longest value."""
    lines = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)) for line in lines]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {count}" for key, count in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------- the server


def write_model(folder: Path) -> None:
    """A checkpoint with a tokenizer, and embeddings of three images."""
    import medsiglip_jax
    from medsiglip_jax.model import config
    from medsiglip_jax.preprocess import text as texts

    pieces = texts.train(["a chest X-ray", "no finding", "lung"], 64)
    model = medsiglip_jax.init(config.two_towers(
        image_size=28, patch_size=14, width=16, depth=1, mlp_dim=16, num_heads=2,
        vocab_size=texts.Tokenizer(pieces).vocab_size,
    ))  # fmt: skip
    model.processor.tokenizer_source = pieces
    medsiglip_jax.save(model, folder / "model")
    (folder / "images").mkdir()
    for name in ("a.png", "a.jpg", "a.gif"):
        (folder / "images" / name).write_bytes(planted_files.files("x")[name])
    command = [sys.executable, "-m", "medsiglip_jax", "embed", "--model", str(folder / "model"),
               "--output", str(folder / "run"), str(folder / "images")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


class Server(Served):
    """The server, and what it costs."""

    def __init__(self, folder: Path, *flags: str):
        own = ["--embeddings", str(folder / "run"), "--max-batch", "8", *flags]
        super().__init__(folder / "model", *own, address_space=LIMIT)

    def __exit__(self, *_: Any) -> None:
        self.process.kill()  # it would wait for the clients that are left hanging
        self.process.wait()

    def mib(self, name: str) -> float:
        """VmRSS, or VmHWM since `reset_peak`."""
        return self.status(name) / 1024

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def cpu(self) -> float:
        """Seconds of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def clients(self) -> set[int]:
        """The ports of the clients whose connections it holds."""
        return {theirs for ours, theirs in self._connections() if ours == self.port and theirs}

    def peers(self) -> set[int]:
        """The ports to which it has, or seeks, connections of its own."""
        return {theirs for ours, theirs in self._connections() if ours != self.port and theirs}

    def _connections(self) -> Iterator[tuple[int, int]]:
        """The ports of each of its sockets, ours and theirs."""
        links = map(_target, Path(f"/proc/{self.process.pid}/fd").iterdir())
        inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] in inodes:
                    ours, theirs = (int(end.rpartition(":")[2], 16) for end in fields[1:3])
                    yield ours, theirs

    def wrong(self, vector: np.ndarray) -> list[str]:
        """What is wrong with it after all."""
        if self.process.poll() is not None:
            return [f"the server ended with {self.process.returncode}: {self.log()[-500:]}"]
        log = self.log()
        wrong = [f"the log has {word}: {log[log.index(word) - 200 :][:600]}"
                 for word in (STEM, "Traceback", "internal error") if word in log]  # fmt: skip
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready") as answer:
            wrong += [] if answer.status == 200 else ["it is not ready"]
        difference = float(np.abs(good_vector(self.port) - vector).max())
        return wrong + ([f"a vector differs by {difference}"] if difference > 1e-6 else [])


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def good_vector(port: int) -> np.ndarray:
    """What a good image and a good text get."""
    image = base64.b64encode(planted_files.files("x")["a.png"]).decode()
    document = {"instances": [{"image": {"input_bytes": image}}, {"text": "lung"}]}
    answer = exchange(port, post("/predict", json.dumps(document).encode()))
    if answer.status != 200:
        raise ValueError(f"a good request got {answer.all[:300]!r} after {answer.seconds:.1f} s")
    return np.array([p["embedding"] for p in json.loads(answer.body)["predictions"]])


# --------------------------------------------------------------------------------------- a client


class Answer(NamedTuple):
    """What came back: status 0 if nothing did; and everything that was read."""

    status: int
    body: bytes
    all: bytes
    seconds: float


class Attempt(NamedTuple):
    """What a client sends and does.

    Attributes:
        sent: bytes.
        then: "read" the answer; "half": close one direction before; "leave" at once.
        complete: whether it is a whole request, which must be answered.
    """

    sent: bytes
    then: str = "read"
    complete: bool = True


def post(path: str, body: bytes, *headers: str) -> bytes:
    given = "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *headers,
                         "Content-Type: application/json",
                         f"Content-Length: {len(body)}"])  # fmt: skip
    return given.encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body


def exchange(port: int, sent: bytes, then: str = "read", seconds: float = SECONDS) -> Answer:
    start, found = time.perf_counter(), b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(seconds)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(sent)
        if then == "leave":
            return Answer(0, b"", b"", 0.0)
        if then == "half":
            client.shutdown(socket.SHUT_WR)
        while not _whole(found, sent.startswith(b"HEAD ")):
            if not (part := client.recv(1 << 20)):
                break
            found += part
    seconds = time.perf_counter() - start
    head, _, body = _without_100(found).partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d+)", head)
    return Answer(int(status[1]) if status else 0, body, found, seconds)


def _without_100(found: bytes) -> bytes:
    return re.sub(rb"^HTTP/1\.1 100 [^\r]*\r\n\r\n", b"", found)


def _whole(found: bytes, is_head: bool) -> bool:
    head, end, body = _without_100(found).partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(end) and (is_head or b" 204 " in head[:13]
                          or (length is not None and len(body) >= int(length[1])))  # fmt: skip


# ------------------------------------------------------------------------------- hostile requests


class Route(NamedTuple):
    """A route that takes JSON."""

    path: str
    example: Any


def routes(port: int) -> list[Route]:
    """Those of /openapi.json, with their examples."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    found = []
    for path, operations in paths.items():
        if "post" in operations:
            content = operations["post"]["requestBody"]["content"]["application/json"]
            for parameter in operations["post"].get("parameters", ()):
                path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
            found.append(Route(path, content["example"]))
    return found


RAW = [
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "-0", "1e-400", "2.0", "1e308",
    "123456789012345678901234567890", "[" * 100_000, "[" * 500 + "]" * 500, "{" + '"a":{' * 900,
    '{"a":1,"a":2}', '{"__proto__":{"a":1}}', "[[[]]]", "null", "true", "-1", "0", "[]", "{}", '""',
    '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\u202e"', '"\\x"', "'a'", "01", "+1", "0x1",
    "1,", '"' + "a" * 300_000 + '"', '"' + "\\u0041" * 2000 + '"', "[" + "0," * 70_000 + "0]",
    '["' + '","' * 70_000 + '"]', "[" + "{}," * 5_000 + "{}]", '["a",1,null,{"b":[]}]', "\ufeff1",
    '"' + "é" * 2000 + '"', '"data:image/png;base64,"', '"data:,"', '"file:///etc/passwd"',
    '"http://127.0.0.1/"', '"http://169.254.169.254/"', '"gs://a/b.png"', '{"url":"http://a/"}',
    '{"bytes":"*"}', '{"bytes":1}', '{"bytes":"","url":""}', '"' + "{}" * 5_000 + '"', "2147483648",
    '"' + "AAAA" * 50_000 + '"',
]  # fmt: skip
FIELDS = [
    "model", "id", "probe", "texts", "images", "image", "text", "row", "top_k", "inputs", "outputs",
    "parameters", "messages", "modality", "dimensions", "encoding_format", "normalize", "truncate",
    "instances", "patch_coordinates_list", "extensions", "radiology_dicom_window_level", "shape",
    "data", "datatype", "name", "truncation_direction", "prompt_name", "hypothesis_template",
    "candidate_labels", "access_credential", "openslide_pyramid_level", "image_url", "input", "x",
    "input_bytes", "gcs_uri", "dicomweb_uri", "x_origin", "width", "height", "", "__class__", "\0",
]  # fmt: skip


def planted(value: Any, secret: str, image: str) -> Any:
    """An example with the secret in its texts, and an image with the secret in it."""
    if isinstance(value, dict):
        return {name: planted(v, secret, image) for name, v in value.items()}
    if isinstance(value, list):
        return [planted(v, secret, image) for v in value]
    if isinstance(value, str) and value.startswith("iVBOR"):
        return image
    return f"{value} {secret}" if isinstance(value, str) and " " in value else value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def mutated(rng: Rng, document: Any, secret: str) -> str:
    """The JSON of a document in which a few values are others, or gone, or new."""
    raw: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        found = list(places(document))
        if not found:
            break
        inside, key = found[int(rng.integers(len(found)))]
        how = int(rng.integers(4))
        raw.append(str(rng.choice([*RAW, json.dumps(secret), json.dumps(f"a/{secret}")])))
        if how == 0 and isinstance(inside, dict):
            inside[str(rng.choice(FIELDS))] = f"@{len(raw) - 1}@"
        elif how == 1:
            del inside[key]
        else:
            inside[key] = f"@{len(raw) - 1}@"
    return re.sub(r'"@(\d+)@"', lambda m: raw[int(m[1])], json.dumps(document))


def picture_of(rng: Rng, secret: str) -> str:
    """Base64 of a file with the secret in its tags, of any format, perhaps damaged."""
    files = {**planted_files.files(secret), **planted_files.broken(secret)}
    data = files[str(rng.choice(list(files)))]
    data = planted_files.damaged(rng, data) if rng.random() < 0.5 else data
    return base64.b64encode(data).decode()


def document_of(rng: Rng, route: Route, secret: str) -> Any:
    return json.loads(json.dumps(planted(route.example, secret, picture_of(rng, secret))))


def values(rng: Rng, route: Route, secret: str) -> Attempt:
    body = mutated(rng, document_of(rng, route, secret), secret)
    return Attempt(post(route.path, body.encode(), _key(secret)))


def images(rng: Rng, route: Route, secret: str) -> Attempt:
    body = json.dumps(document_of(rng, route, secret)).encode()
    return Attempt(post(route.path, body, _key(secret)))


def encodings(rng: Rng, route: Route, secret: str) -> Attempt:
    """Bodies that are no JSON in UTF-8."""
    good = json.dumps(document_of(rng, route, secret))
    data = good.encode()
    cut = int(rng.integers(len(data)))
    forms = [
        good.encode("utf-16"), good.encode("utf-32"), good.encode("utf-16-le"),
        b"\xef\xbb\xbf" + data,
        b"\xff\xfe" + data, gzip.compress(data), data[:cut], data + data, data + b"\0", b"\0" * 999,
        data.replace(b"a", b"\xff"), data.replace(b'"', b"'"), planted_files.damaged(rng, data),
        b"",
        b" " * 99_999, secret.encode(), b'"' + secret.encode() + b'"', b"[" * 200_000, data[::-1],
        data.replace(b"{", b'{"a":1,"a":2,'), data.replace(b"a", b"\xed\xa0\x80"), b"a=b&c=d",
    ]  # fmt: skip
    return Attempt(post(route.path, forms[int(rng.integers(len(forms)))], _key(secret)))


def base64s(rng: Rng, route: Route, secret: str) -> Attempt:
    """Forms of base64 that readers disagree on."""
    image = picture_of(rng, secret)
    forms = [
        image.rstrip("="), image + "====", image.replace("+", "-").replace("/", "_"), image[:-1],
        "\n".join(re.findall(".{1,76}", image)), f" {image} ", image + "\0", image + secret, "=",
        "A",
        "=" * 5000, image.replace("A", "Ａ"), f"data:image/png;base64,{image}",
        f"data:;base64,{image}",
        f"data:image/png,{image}", f"data:{'a' * 9999}/png;base64,{image}",
        "A" * 3_000_000, "-_" * 500,
        base64.b64encode(image.encode()).decode(), image[: len(image) // 2] + "=" + image, "\r\n",
        f"data:image/png;base64;base64,{secret}", f"file:///{secret}", secret, "\ud800", "é",
        f"http://{secret}@127.0.0.1/", f"https://127.0.0.1/{secret}", "data:" + ";a=b" * 5000,
    ]  # fmt: skip
    form = forms[int(rng.integers(len(forms)))]
    document = json.loads(json.dumps(planted(route.example, secret, form)))
    return Attempt(post(route.path, json.dumps(document).encode(), _key(secret)))


def chunked(rng: Rng, route: Route, secret: str) -> Attempt:
    body = json.dumps(document_of(rng, route, secret)).encode()
    size = b"%x" % len(body)
    forms = [
        (size + b"\r\n" + body + b"\r\n0\r\n\r\n", True),
        (b"".join(b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body))) + b"0\r\n\r\n",
        True),
        (b"-1\r\n" + body + b"\r\n0\r\n\r\n", True), (b"zz\r\n" + body + b"\r\n0\r\n\r\n", True),
        (b"0x" + size + b"\r\n" + body + b"\r\n0\r\n\r\n", True),
        (b"f" * 40 + b"\r\n" + body, True),
        (size + b"\n" + body + b"\n0\n\n", True), (size + b"\r\n" + body + b"\r\n", False),
        (size + b";a=" + secret.encode() * 50 + b"\r\n" + body + b"\r\n0\r\n\r\n", True),
        (size + b"\r\n" + body + b"\r\n0\r\nX-A: " + secret.encode() + b"\r\n\r\n", True),
        (size + b"\r\n" + body + b"\r\n0\r\nContent-Length: 3\r\nHost: x\r\n\r\n", True),
        (size + b"\r\n" + body + b"xx0\r\n\r\n", True), (b"ffffffff\r\n" + body, False),
        (size + b"\r\n" + body + b"\r\n0\r\n" + b"X: y\r\n" * 3000 + b"\r\n", True), (b"\r\n",
        True),
        (b"0\r\n\r\n", True), (b"", False), (b" " + size + b"\r\n" + body + b"\r\n0\r\n\r\n", True),
        (size + b" \r\n" + body + b"\r\n0\r\n\r\n", True), (b"+" + size + b"\r\n" + body, True),
    ]  # fmt: skip
    data, complete = forms[int(rng.integers(len(forms)))]
    head = f"POST {route.path} HTTP/1.1\r\nHost: localhost\r\n{_key(secret)}\r\n"
    head += "Transfer-Encoding: chunked"
    return Attempt(head.encode() + b"\r\n\r\n" + data, complete=complete)


def lengths(rng: Rng, route: Route, secret: str) -> Attempt:
    """Lengths that are wrong, there twice, or contradict each other."""
    body = json.dumps(document_of(rng, route, secret)).encode()
    n, te = len(body), "Transfer-Encoding: chunked"
    second = f"GET /{secret} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    forms = [
        ([f"Content-Length: {n // 2}"], body, True), ([f"Content-Length: {n + 99}"], body, False),
        (["Content-Length: -1"], body, True), (["Content-Length: 9999999999999999999999"],
        body, True),
        (["Content-Length: a"], body, True), ([f"Content-Length: {n}", "Content-Length: 3"],
        body, True),
        ([f"Content-Length: {n}, {n}"], body, True), ([f"Content-Length: +{n}"], body, True),
        (["Content-Length: 1000000000"], body, True), ([f"Content-Length: 0x{n:x}"], body, True),
        (["Content-Length: 4", te], b"0\r\n\r\n" + second, True), ([], body, True), ([], b"", True),
        ([te, "Content-Length: 4"], b"0\r\n\r\n" + second, True), (["Content-Length:"], body, True),
        (["Transfer-Encoding: identity", f"Content-Length: {n}"], body, True),
        (["Transfer-Encoding : chunked"], b"0\r\n\r\n" + second, True),
        (["Transfer-Encoding: xchunked"], b"0\r\n\r\n" + second, True),
        ([te, "Transfer-Encoding: gzip"], b"0\r\n\r\n" + second, True),
        ([te, "Transfer-Encoding: identity"], b"0\r\n\r\n" + second, True),
        (["Content-Length: 4\r\n Transfer-Encoding: chunked"], b"0\r\n\r\n" + second, True),
        (["Content-Length: 4\rTransfer-Encoding: chunked"], b"0\r\n\r\n" + second, True),
        (["Transfer-Encoding:\x0bchunked"], b"0\r\n\r\n" + second, True),
    ]  # fmt: skip
    given, data, complete = forms[int(rng.integers(len(forms)))]
    lines = [f"POST {route.path} HTTP/1.1", "Host: localhost", _key(secret), *given]
    return Attempt("\r\n".join(lines).encode() + b"\r\n\r\n" + data, complete=complete)


def headers(rng: Rng, route: Route, secret: str) -> Attempt:
    body = json.dumps(document_of(rng, route, secret)).encode()
    forms = [
        f"X-A: {secret * 8000}", "\r\n".join(f"X-{i}: {secret}" for i in range(3000)),
        "Expect: " + secret,
        "Expect: 100-continue", "Content-Type: " + secret,
        "Content-Type: multipart/form-data; boundary=x",
        "Content-Encoding: gzip", "Content-Encoding: " + secret, f"X-Request-Id: {{{secret}}}",
        "Host: b",
        f"X-Request-Id: {'a' * 129}{secret}", "Upgrade: websocket\r\nConnection: Upgrade",
        "X-A: é\x01",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQ", ": x",
        f"Authorization: Basic {secret}", "Cookie: a=" + secret, f" folded: {secret}", "X A: b",
        "no colon",
        f"Origin: https://{secret}", "Range: bytes=0-1", "If-None-Match: *", "Connection: close",
        "Connection: " + "close," * 500, "X-Forwarded-For: " + secret,
        "X-HTTP-Method-Override: PUT",
        "Inference-Header-Content-Length: 5", f"Traceparent: {secret}", "Accept: text/event-stream",
        "X-\0: a", "X: \0", "Keep-Alive: timeout=99999", f"Host: {secret}",
        "Content-Type: text/html",
    ]  # fmt: skip
    return Attempt(post(route.path, body, _key(secret), forms[int(rng.integers(len(forms)))]))


def methods(rng: Rng, route: Route, secret: str) -> Attempt:
    chosen = rng.choice([
        "GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "PRI",
        "post",
        "FOO", "M-SEARCH", "LINK", "", "G" * 5000, "PURGE",
    ])  # fmt: skip
    body = json.dumps(document_of(rng, route, secret)).encode()
    paths = [
        route.path,
        "/health",
        "/ui",
        "/metrics",
        "*",
        "localhost:80",
        f"/{secret}",
        "/v1/info",
    ]
    path = str(rng.choice(paths))
    sent = post(path, body, _key(secret)).replace(b"POST", str(chosen).encode(), 1)
    return Attempt(sent)


def paths(rng: Rng, route: Route, secret: str) -> Attempt:
    forms = [
        f"/{secret}", f"/../../{secret}", f"/%2e%2e/{secret}", f"/%00{secret}",
        "/" + "a" * 60_000 + secret,
        f"/é{secret}", f"/%ff{secret}", f"//{secret}/", f"/v1/models/{secret}",
        f"/v2/models/{secret}/infer",
        f"/v1/thumbnails/{'9' * 5000}", "/v1/thumbnails/-1", "/v1/thumbnails/99",
        "/v1/thumbnails/0",
        f"/v1/thumbnails/{secret}", f"/v1/thumbnails/{'9' * 30}", "/v1/thumbnails/٣", f"/?{secret}",
        f"http://{secret}/predict", "http://[::1/", f"/predict/{secret}", "/predict/", "/PREDICT",
        "?", "#",
        f"/predict?{secret}", f"/predict#{secret}", f"/predict;{secret}", f"/{secret} /x", "/%",
        "/%zz",
        f"/models/{secret}/pipeline/x", f"/pipeline/{secret}/m", f"/v2/models/a/versions/{secret}",
        "/\\..\\",
        f"/v1/projects/{secret}/locations/b/endpoints/c:predict", "/ui/../predict",
        "/.well-known/live", "",
        f"/v1/models/%0d%0aX-A:{secret}", "/openapi.json", "/v1/models/%2e%2e%2f", "/docs",
        "/redoc", "/ui",
    ]  # fmt: skip
    path = forms[int(rng.integers(len(forms)))]
    if rng.random() < 0.5:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{_key(secret)}\r\n\r\n"
        return Attempt(head.encode("utf-8"))
    body = json.dumps(document_of(rng, route, secret)).encode()
    return Attempt(post(path, body, _key(secret)))


def garbage(rng: Rng, route: Route, secret: str) -> Attempt:
    """What is no HTTP/1.1."""
    hello = bytes.fromhex("16030100f1010000ed0303") + rng.bytes(230)
    word = secret.encode()
    forms = [
        (b"GET /" + word + b"\r\n", False), (rng.bytes(3000), True), (hello, True),
        (b"\0" * 3000, True),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", True), (b"GET / HTTP/9.9\r\n\r\n", True),
        (b"\r\n" * 999, False),
        (b"GET / HTTP/1.1\n\n", True), (b"GET\t/\tHTTP/1.1\r\n\r\n", True), (word, True), (b"",
        False),
        (b"GET / HTTP/1.1\r\nHost", False), (b"SSH-2.0-" + word + b"\r\n", True), (b"G", False),
        (b"GET /health HTTP/1.0\r\n\r\n", True), (b"GET /health\r\n\r\n", True),
        (b"GET /health HTTP/1.1\r\n\r\n", True), (b"A" * 100_000, True), (b"*1\r\n$4\r\nPING\r\n",
        True),
        (b"GET /health HTTP/1.1\r\n\r\n" * 200, True), (b"HTTP/1.1 200 OK\r\n\r\n", True),
    ]  # fmt: skip
    data, complete = forms[int(rng.integers(len(forms)))]
    return Attempt(data, complete=complete)


def leaving(rng: Rng, route: Route, secret: str) -> Attempt:
    """Clients that go, or close one direction, before or while they are answered."""
    sent = post(route.path, json.dumps(document_of(rng, route, secret)).encode(), _key(secret))
    cut = sent if rng.random() < 0.5 else sent[: int(rng.integers(len(sent)))]
    return Attempt(cut, str(rng.choice(["half", "leave"])), complete=False)


def _key(secret: str) -> str:
    return f"Authorization: Bearer {secret}"


Make = Callable[[Rng, Route, str], Attempt]
KINDS: dict[str, Make] = {
    make.__name__: make
    for make in (values, images, encodings, base64s, chunked, lengths, headers, methods, paths,
                 garbage, leaving)
}  # fmt: skip


def fuzz(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with Server(folder) as server:
        vector = good_vector(server.port)
        server.reset_peak()
        before, cpu = server.mib("VmRSS"), server.cpu()
        found = attempts(server.port, range(args.count), args.seed)
        used = {"cpu_seconds": server.cpu() - cpu, "mib_before": before,
                "mib_peak": server.mib("VmHWM"), "mib_after": server.mib("VmRSS")}  # fmt: skip
        wrong = [row["wrong"] for row in found if row["wrong"]] + server.wrong(vector)
    return {"rows": by_kind(found), "requests": len(found), **used, "wrong": wrong}


def attempts(port: int, numbers: range, seed: int) -> list[dict[str, Any]]:
    """What became of each request of these numbers."""
    known = routes(port)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda i: attempt(port, known, seed, i), numbers))


def attempt(port: int, known: list[Route], seed: int, number: int) -> dict[str, Any]:
    rng, kinds = np.random.default_rng([seed, number]), list(KINDS)
    kind = kinds[number % len(kinds)]
    route = known[(number // len(kinds)) % len(known)]
    secret = f"{STEM}{number:05d}"
    made = KINDS[kind](rng, route, secret)
    answer = exchange(port, made.sent, made.then, SECONDS if made.complete else 0.5)
    wrong = judged(answer, made, secret)
    shown = f"{number} {kind} {made.sent[:120]!r}: {wrong}" if wrong else ""
    return {"kind": kind, "status": answer.status, "seconds": answer.seconds, "wrong": shown}


def judged(answer: Answer, made: Attempt, secret: str) -> str:
    """What is wrong with an answer."""
    if answer.status == 0:
        lost = made.complete and made.sent and not answer.all
        return "no answer" if lost and answer.seconds >= SECONDS else ""
    path = made.sent.split(b" ", 2)[1].decode("latin-1") if b" " in made.sent[:5000] else ""
    repeats = answer.status < 300 and REPEATS.search(path.partition("?")[0])
    if answer.status >= 500 or answer.status < 200:
        return f"{answer.status}: {answer.body[:300]!r}"
    if answer.status >= 400 and len(answer.body) > 1024:
        return f"{answer.status} with {len(answer.body)} bytes"
    if secret.lower().encode() in answer.all.lower() and not repeats:
        return f"its secret is in the answer: {answer.all[:600]!r}"
    said = next((word for word in (b"Traceback", b"INTERNAL_ERROR") if word in answer.all), None)
    return f"{said!r} in {answer.body[:300]!r}" if said else ""


def by_kind(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        of_kind = [row for row in found if row["kind"] == kind]
        answers = collections.Counter(row["status"] or "none" for row in of_kind)
        seconds = [row["seconds"] for row in of_kind if row["status"]] or [0.0]
        rows.append({
            "requests": kind, "count": len(of_kind), "p50_s": float(np.median(seconds)),
            "slowest_s": max(seconds),
            "answers": dict(sorted(answers.items(), key=lambda item: str(item[0]))),
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------ large bodies


def _filled(start: str, one: str, end: str) -> bytes:
    """As many of one value as 32 MiB hold."""
    count = ((32 << 20) - len(start) - len(end)) // (len(one) + 1)
    return (start + ",".join([one] * count) + end).encode()


def _tensor(name: str, datatype: str, shape: str, data: str) -> bytes:
    tensor = f'"name":"{name}","datatype":"{datatype}","shape":{shape},"data":{data}'
    return f'{{"inputs":[{{{tensor}}}]}}'.encode()


def _labels(template: str, labels: list[str]) -> bytes:
    parameters = {"candidate_labels": labels, "hypothesis_template": template}
    return json.dumps({"inputs": "AAAA", "parameters": parameters}).encode()


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "lists": ("/predict", lambda: _filled("[", "[]", "]")),
    "objects": ("/predict", lambda: _filled('{"instances":[', "{}", "]}")),
    "texts": ("/predict", lambda: _filled('{"instances":[', '{"text":""}', "]}")),
    "patches": ("/predict", lambda: _filled(
        '{"instances":[{"image":{"input_bytes":"AAAA","patch_coordinates_list":[',
        '{"x_origin":0,"y_origin":0}', "]}}]}")),
    "fields": ("/predict", lambda: json.dumps(
        {"instances": [{str(i): 0 for i in range(2_000_000)}]}).encode()),
    "strings": ("/v1/embeddings", lambda: _filled('{"input":[', '""', "]}")),
    "numbers": ("/v1/embeddings", lambda: _filled('{"input":[', "1", "]}")),
    "messages": ("/v1/embeddings", lambda: _filled('{"messages":[', '{"content":[]}', "]}")),
    "one text": ("/v1/embeddings", lambda: json.dumps({"input": "a" * (31 << 20)}).encode()),
    "images": ("/v1/classify", lambda: _filled('{"texts":["a"],"images":[', '""', "]}")),
    "weaviate": ("/vectorize", lambda: _filled('{"images":[', '""', "]}")),
    "labels": ("/", lambda: _labels("{}" + "a" * (1 << 20), ["a"] * 1_000_000)),
    "template": ("/", lambda: _labels("{}" * 100_000, ["a" * 1_000_000])),
    "shape": ("kserve", lambda: _tensor(
        "text", "BYTES", "[1" + ",2147483647" * 2_000_000 + "]", '["a"]')),
    "pixels of strings": ("kserve", lambda: _tensor(
        "image", "UINT8", "[1,28,28,3]", '["' + "a" * 10_000 + '"' + ",0" * 1_000_000 + "]")),
    "pixels": ("kserve", lambda: _tensor("image", "UINT8", "[1,28,28,3]",
    "[0" + ",0" * 9_999_999 + "]")),
    "deep pixels": ("kserve", lambda: _tensor("image", "UINT8", "[1,28,28,3]",
    "[" * 900 + "]" * 900)),
    "bytes": ("kserve", lambda: _tensor("text", "BYTES", "[9999999]",
    "[0" + ",0" * 9_999_998 + "]")),
    "surrogate": ("kserve", lambda: b'{"id":"\\ud800","inputs":[]}'),
}  # fmt: skip


def bodies(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """JSON that costs the more the longer it is; and for how long others wait meanwhile."""
    rows, wrong = [], []
    with Server(folder) as server:
        vector = good_vector(server.port)
        kserve = next(r.path for r in routes(server.port) if r.path.endswith("/infer"))
        for name, (path, make) in BODIES.items():
            if args.only in name:
                sent = post(kserve if path == "kserve" else path, make())
                row, answer = measured(server, sent)
                rows.append({"body": name, **row})
                wrong += [f"{name}: {answer.status} {answer.body[:200]!r}"] if not (
                    200 <= answer.status < 500 and len(answer.body) < 1024) else []  # fmt: skip
        wrong += server.wrong(vector)
    return {"rows": rows, "wrong": wrong}


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def measured(server: Server, sent: bytes) -> tuple[dict[str, Any], Answer]:
    """What a request costs: CPU seconds, memory at its peak, and the longest wait of others."""
    waits: list[float] = []
    server.reset_peak()
    before, cpu = server.mib("VmRSS"), server.cpu()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(exchange, server.port, sent)
        while not running.done():
            waits.append(exchange(server.port, HEALTH).seconds)
            time.sleep(0.02)
        answer = running.result()
    said = _said(answer.body) if answer.status else "no answer"
    row = {"bytes": len(sent), "cpu_s": server.cpu() - cpu, "mib": server.mib("VmHWM") - before,
           "health_s": max(waits), "status": answer.status, "said": said}  # fmt: skip
    return row, answer


def _said(body: bytes) -> str:
    """The description of an error, or "read"."""
    found = re.search(rb'"(?:description|message|error)": ?"([^"]*)', body)
    return found[1].decode()[:110] if found else "read"


# ------------------------------------------------------------------------------- hostile images


def _zip_of(name: str, count: int) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with archive.open(name, "w", force_zip64=True) as member:
            for _ in range(count >> 20):
                member.write(bytes(1 << 20))
    return out.getvalue()


def bombs_of(side: int) -> dict[str, Callable[[], bytes]]:
    """Files whose pixels are just as many as the server allows, or more."""
    import worst_images as worst

    d = worst.dicom
    return {
        "grey-12000.png": lambda: worst.png(12_000, 12_000, 8, 0),
        "row.png": lambda: worst.png(100_000_000, 1, 8, 0),
        "long.png": lambda: worst.png(65_535, side * side // 65_535, 8, 2),
        "grey.png": lambda: worst.png(side, side, 8, 0),
        "one-bit.png": lambda: worst.png(side, side, 1, 0),
        "palette.png": lambda: worst.png(side, side, 8, 3),
        "rgb.png": lambda: worst.png(side, side, 8, 2),
        "rgba.png": lambda: worst.png(side, side, 8, 6),
        "grey16.png": lambda: worst.png(side, side, 16, 0),
        "grey16-alpha.png": lambda: worst.png(side, side, 16, 4),
        "rgb16.png": lambda: worst.png(side, side, 16, 2),
        "interlaced.png": lambda: worst.png(side, side, 8, 2, 1),
        "texts-deflated.png": worst.WORST["texts-deflated.png"],
        "grey.jpeg": lambda: worst.jpeg("L", side, side),
        "rgb.jpeg": lambda: worst.jpeg("RGB", side, side),
        "cmyk.jpeg": lambda: worst.jpeg("CMYK", side, side),
        "progressive.jpeg": lambda: worst.jpeg("RGB", side, side, progressive=True),
        "scans.jpeg": worst.many_scans,
        "exif.jpeg": worst.jpeg_of_exif,
        "frame.gif": lambda: worst.gif(side, side),
        "frames.gif": worst.small_gif_frames,
        "lossless.webp": lambda: worst.webp(16_383, side * side // 16_383, lossless=True, method=0),
        "siz.jp2": lambda: worst.lying_jp2("box siz tile"),
        "rgb.jp2": lambda: worst.jp2(side, side),
        "tiles.jp2": lambda: worst.jp2(side, side, 1024),
        "rgb.tiff": lambda: worst.tiff(side, side),
        "grey16.tiff": lambda: worst.tiff(side, side, 16, 1),
        "int32.tiff": lambda: worst.tiff(side, side, 32, 1, 2),
        "float.tiff": lambda: worst.tiff(side, side, 32, 1, 3),
        "tile.tiff": worst.WORST["tile.tiff"],
        "directories.tiff": worst.tiff_of_directories,
        "png.ico": lambda: worst.ico(worst.png(side, side, 8, 6)),
        "rgb.psd": worst.WORST["rgb.psd"],
        "rgb.dds": worst.WORST["rgb.dds"],
        "rle.bmp": worst.bmp,
        "plain.ppm": worst.WORST["plain.ppm"],
        "deflated.dcm": worst.deflated_dicom,
        "native.dcm": lambda: d(60_000, 60_000, "1.2.840.10008.1.2.1", bytes(100)),
        "frames.dcm": lambda: d(64, 64, "1.2.840.10008.1.2.1", bytes(100), frames=2_147_483_647),
        "rle.dcm": lambda: d(side, side, "1.2.840.10008.1.2.5", worst.struct.pack(
            "<16I", 1, 64, *[0] * 14) + b"\x81\0" * (side * side // 128 + 1)),
        "float64.nii.gz": lambda: worst.nifti((side, side, 1), "<f8"),
        "int16.nii.gz": worst.WORST["int16.nii.gz"],
        "zip.npz": lambda: _zip_of("a.npy", 4 << 30),
        "zip.zip": lambda: _zip_of("a.png", 1 << 30),
    }  # fmt: skip


def bombs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What each of them costs as input_bytes; those above 3 CPU seconds or 500 MB are marked."""
    rows, wrong = [], []
    with Server(folder) as server:
        vector = good_vector(server.port)
        for name, make in bombs_of(10_000).items():
            if args.only not in name:
                continue
            data = make().replace(b"CS\2\0OT", b"CS\2\0DX")  # a modality that this route reads
            image = {"input_bytes": base64.b64encode(data).decode()}
            body = json.dumps({"instances": [{"image": image}]}).encode()
            row, answer = measured(server, post("/predict", body))
            above = row["cpu_s"] > 3 or row["mib"] * 1.048576 > 500
            rows.append({"image": name, **row, "bytes": len(data), "above": "*" * above})
            print(_shown(rows[-1]), file=sys.stderr, flush=True)
            wrong += [] if answer.status == 200 else [f"{name}: {answer.status}"]
        wrong += server.wrong(vector)
    return {"rows": rows, "wrong": wrong}


# -------------------------------------------------------------------- addresses and slow clients


def addresses(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Those of the tests, on each route that reads addresses; nothing may be connected to."""
    sys.path.insert(0, str(ROOT / "tests" / "serve"))
    import test_fetching

    rows, wrong = [], []
    for flags in ((), ("--allow-host", "good.test")):
        with Server(folder, *flags) as server:
            vector = good_vector(server.port)
            for path, of in ADDRESSED.items():
                row, bad = _refusals(server, path, of, test_fetching.ADDRESSES)
                rows.append({"flags": " ".join(flags) or "none", **row})
                wrong += bad
            wrong += server.wrong(vector)
    return {"rows": rows, "wrong": wrong}


ADDRESSED: dict[str, Callable[[str], Any]] = {
    "/predict": lambda url: {"instances": [{"image": {"image_url": url}}]},
    "/v1/classify": lambda url: {"texts": ["a"], "images": [{"url": url}]},
    "/v1/embeddings": lambda url: {"modality": "image", "input": [url]},
    "/v1/search": lambda url: {"image": {"url": url}},
}


def _refusals(
    server: Server, path: str, of: Callable[[str], Any], urls: list[str]
) -> tuple[dict[str, Any], list[str]]:
    seconds, wrong, said, opened = [], [], collections.Counter(), set()
    for url in urls:
        answer = exchange(server.port, post(path, json.dumps(of(url)).encode()))
        seconds.append(answer.seconds)
        opened |= server.peers()
        said[f"{answer.status} {_kind(answer.body)}"] += 1
        if b'embedding"' in answer.body or b"scores" in answer.body or answer.status >= 500:
            wrong.append(f"{path} {url!r}: {answer.status} {answer.body[:200]!r}")
    wrong += [f"{path}: a connection to port {peer}" for peer in opened]
    row = {"route": path, "addresses": len(urls), "slowest_s": max(seconds),
           "connections": len(opened), "answers": dict(said)}  # fmt: skip
    return row, wrong


def _kind(body: bytes) -> str:
    """The code of an instance's error, or the start of what is said."""
    code = re.search(rb'"code": ?"([A-Z_]+)"', body)
    return code[1].decode() if code else re.sub(r"^\S+: ", "", _said(body))[:40]


def slow(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """200 clients of each kind, and how long a good request takes meanwhile."""
    rows, wrong = [], []
    with Server(folder) as server:
        vector = good_vector(server.port)
        rows.append({"clients": "none", **_latencies(server, 3.0)})
        for name, start in DRIPS.items():
            if args.only not in name:
                continue
            count = 20 if name == "never reads" else 200  # each of which asks 400 times
            address = ("127.0.0.1", server.port)
            clients = [socket.create_connection(address) for _ in range(count)]
            for client in clients:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(start)
                client.setblocking(False)
            row, left = _held(server, clients, drips=name not in ("silent", "never reads"))
            rows.append({"clients": f"{count} {name}", **row})
            print(_shown(rows[-1]), file=sys.stderr, flush=True)
            wrong += [f"{name}: {left} connections are still open"] if left else []
        wrong += server.wrong(vector)
    return {"rows": rows, "wrong": wrong}


# What they send first; then a byte each second, but for those that read or send nothing.
DRIPS = {
    "half a head": b"POST /predict HTTP/1.1\r\nHost: ",
    "headers without end": b"GET /health HTTP/1.1\r\nX-A: ",
    "a body": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n[",
    "chunks": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5",
    "a body after the answer": b"GET /health HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n[",
    "silent": b"",
    "never reads": b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400,
}


def _latencies(server: Server, seconds: float) -> dict[str, Any]:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        good_vector(server.port)
        times.append(time.perf_counter() - start)
        time.sleep(0.2)
    return {"good_p50_s": float(np.median(times)), "good_max_s": max(times),
            "mib": server.mib("VmRSS"), "first_closed_s": 0.0, "all_closed_s": 0.0}  # fmt: skip


def _held(server: Server, clients: list[socket.socket], drips: bool) -> tuple[dict[str, Any], int]:
    """Latencies meanwhile, and when the server closed them; how many were open after 200 s."""
    start, ports = time.perf_counter(), {client.getsockname()[1] for client in clients}
    seconds, rows, first = [0.0], [], 200.0
    while ports and seconds[-1] < 200:
        rows.append(_latencies(server, 1.0))
        for client in clients if drips else ():
            with contextlib.suppress(OSError):
                client.send(b"0")
                client.recv(4096)
        ports &= server.clients()
        seconds.append(time.perf_counter() - start)
        first = min(first, seconds[-1]) if len(ports) < len(clients) else 200.0
    for client in clients:
        client.close()
    row = {"good_p50_s": float(np.median([row["good_p50_s"] for row in rows])),
           "good_max_s": max(row["good_max_s"] for row in rows),
           "mib": max(row["mib"] for row in rows),
           "first_closed_s": first, "all_closed_s": None if ports else seconds[-1]}  # fmt: skip
    return row, len(ports)


COMMANDS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    command.__name__: command for command in (fuzz, bodies, bombs, addresses, slow)
}

if __name__ == "__main__":
    sys.exit(main())
