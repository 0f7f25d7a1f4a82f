"""Embeds a table of images whose servers are hostile or broken, with good ones between them.

    python scripts/hostile_http.py                    # half a minute
    python scripts/hostile_http.py --seconds 60 --max-bytes 536870912      # the default limits
    python scripts/hostile_http.py --json

Each address has a server of its own on this machine, written with bare sockets. The table says what
became of each row, for how long its server was held, and the peak memory of the whole command. The
exit code is 1 unless the good rows are embedded, the others are listed as unreadable with a reason,
the command ends with 3, and neither a traceback nor the password in the addresses is printed.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PASSWORD, TOKEN = "pass-word-of-nobody", "signature-of-nobody"
_STEP = 0.1  # seconds between the bytes of a server that drips

Send = Callable[[bytes], None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="--timeout of embed, default 3")
    parser.add_argument(
        "--max-bytes", type=int, default=32 << 20, help="--max-bytes of embed, default 32 MiB"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, servers() as running:
        report = attempt(Path(scratch), running, args.seconds, args.max_bytes)
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 1 if report["wrong"] else 0


def text(report: dict) -> str:
    lines = [f"{'server':20} {'seconds':>8}  what the row got"]
    lines += [f"{row['server']:20} {row['seconds']:8.1f}  {row['got']}" for row in report["rows"]]
    lines.append(
        f"embed: exit code {report['exit_code']}, {report['seconds']:.1f} s, peak "
        f"{report['peak_mib']:,} MiB ({report['plain_peak_mib']:,} MiB with the good rows alone)"
    )
    return "\n".join([*lines, *(f"WRONG {line}" for line in report["wrong"])])


# ------------------------------------------------------------------------------------- servers


def picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 60)).save(file, "PNG")
    return file.getvalue()


def head(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *headers, "", ""]).encode()


def whole(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return head(f"Content-Length: {len(body)}", *headers, status=status) + body


def good(send: Send) -> None:
    send(whole(picture()))


def compressed(send: Send) -> None:
    """A good answer, with the encoding that many servers use."""
    packed = zlib.compressobj(wbits=31)
    send(whole(packed.compress(picture()) + packed.flush(), "Content-Encoding: gzip"))


def endless(send: Send) -> None:
    send(head() + picture())
    while True:
        send(bytes(1 << 20))


def endless_chunks(send: Send) -> None:
    send(head("Transfer-Encoding: chunked"))
    while True:
        send(b"100000\r\n" + bytes(1 << 20) + b"\r\n")


def _bomb(send: Send, encoding: str, wbits: int) -> None:
    packed = zlib.compressobj(9, wbits=wbits)
    start = packed.compress(picture()) + packed.flush(zlib.Z_FULL_FLUSH)
    zeros = packed.compress(bytes(1 << 20)) + packed.flush(zlib.Z_FULL_FLUSH)
    send(head(f"Content-Encoding: {encoding}") + start)
    while True:  # after a full flush a block refers to nothing before it, and can be repeated
        send(zeros)


def gzip_bomb(send: Send) -> None:
    _bomb(send, "gzip", 31)


def deflate_bomb(send: Send) -> None:
    _bomb(send, "deflate", 15)


def silent(send: Send) -> None:
    while True:
        time.sleep(_STEP)
        send(b"")


def silent_body(send: Send) -> None:
    send(head("Content-Length: 1000"))
    silent(send)


def _drip(send: Send, data: bytes) -> None:
    for byte in data:
        send(bytes((byte,)))
        time.sleep(_STEP)


def drip(send: Send) -> None:
    send(head("Content-Length: 100000"))
    _drip(send, bytes(100_000))


def drip_of_headers(send: Send) -> None:
    _drip(send, head(*(f"X-{i}: {i}" for i in range(10_000))))


def endless_continue(send: Send) -> None:
    while True:
        send(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(_STEP)


def huge_headers(send: Send) -> None:
    send(head()[:-2])
    while True:
        send(b"X-Header: " + b"a" * (1 << 20) + b"\r\n")


def _redirect(send: Send, location: str) -> None:
    send(whole(b"", f"Location: {location}", status="302 Found"))


def to_file(send: Send) -> None:
    _redirect(send, "file:///etc/passwd")


def to_ftp(send: Send) -> None:
    _redirect(send, "ftp://127.0.0.1/a.png")


def to_bucket(send: Send) -> None:
    _redirect(send, "gs://bucket/a.png")


def to_itself(send: Send) -> None:
    _redirect(send, "/again.png")


def unauthorized(send: Send) -> None:
    send(whole(b"", "WWW-Authenticate: Basic", status="401 Unauthorized"))


def proxy_unauthorized(send: Send) -> None:
    send(whole(b"", status="407 Proxy Authentication Required"))


def gone(send: Send) -> None:
    send(whole(b"", status="410 Gone"))


def short_body(send: Send) -> None:
    send(head(f"Content-Length: {len(picture()) + 1000}") + picture())


def lying_short(send: Send) -> None:
    send(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + picture())


def lying_long(send: Send) -> None:
    send(head(f"Content-Length: {10**15}") + picture())


def damaged_gzip(send: Send) -> None:
    send(whole(picture(), "Content-Encoding: gzip"))


def empty(send: Send) -> None:
    send(whole(b""))


def hangs_up(send: Send) -> None:
    pass


def no_http(send: Send) -> None:
    send(b"220 mail.example ESMTP\r\n" * 9)


SERVERS: dict[str, Callable[[Send], None]] = {
    function.__name__: function
    for function in (
        good, compressed, endless, endless_chunks, gzip_bomb, deflate_bomb, silent, silent_body,
        drip, drip_of_headers, endless_continue, huge_headers, to_file, to_ftp, to_bucket,
        to_itself, unauthorized, proxy_unauthorized, gone, short_body, lying_short, lying_long,
        damaged_gzip, empty, hangs_up, no_http,
    )
}  # fmt: skip
# Rows that are embedded; a redirect to another port of this machine is followed.
READABLE = ("good", "compressed", "to_loopback")


class Server:
    """Answers every connection in the same way.

    Attributes:
        asked: number of connections.
        seconds: time for which connections were open, together.
        url: of its only file.
    """

    def __init__(self, name: str, answer: Callable[[Send], None]):
        self._answer, self.asked, self.seconds = answer, 0, 0.0
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/{name}.png"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._hold, args=(connection,), daemon=True).start()

    def _hold(self, connection: socket.socket) -> None:
        start = time.perf_counter()
        self.asked += 1
        with connection, suppress(OSError):
            connection.recv(65536)

            def send(data: bytes) -> None:
                connection.sendall(data)
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    if not connection.recv(1, socket.MSG_PEEK):
                        raise ConnectionResetError  # the client has gone
                connection.settimeout(None)

            self._answer(send)
        self.seconds += time.perf_counter() - start


@contextmanager
def servers() -> Iterator[dict[str, Server]]:
    """All servers, running, and one that redirects to another."""
    running = {name: Server(name, answer) for name, answer in SERVERS.items()}
    target = running["good"].url
    running["to_loopback"] = Server("to_loopback", lambda send: _redirect(send, target))
    try:
        yield running
    finally:
        for server in running.values():
            server.close()


# ------------------------------------------------------------------------------------- the run


def attempt(scratch: Path, running: dict[str, Server], seconds: float, most: int) -> dict:
    """Embeds the table of all addresses; returns what is printed with --json."""
    write_model(scratch / "model")
    good_rows = [f"{running['good'].url}?{i}" for i in range(10)]
    _, _, plain_peak, _ = embed(scratch, good_rows, "plain", seconds, most)
    names = {_with_secrets(server.url): name for name, server in running.items()}
    urls = [url for i, hostile in enumerate(names) for url in (hostile, f"{good_rows[0]}-{i}")]
    start = time.perf_counter()
    code, printed, peak, got = embed(scratch, urls, "out", seconds, most)
    elapsed = time.perf_counter() - start
    rows = [
        {"server": name, "seconds": round(server.seconds, 2), "connections": server.asked,
         "got": got.get(f"{name}.png", "MISSING")}
        for name, server in running.items()
    ]  # fmt: skip
    wrong = [f"{row['server']}: {row['got']}" for row in rows
             if (row["got"] == "embedded") != (row["server"] in READABLE)]  # fmt: skip
    wrong += [f"exit code {code}: {printed[-2000:]}"] if code != 3 else []
    wrong += ["a traceback is printed"] * ("Traceback" in printed)
    written = b"".join(path.read_bytes() for path in (scratch / "out").rglob("*") if path.is_file())
    for secret in (PASSWORD, TOKEN):
        wrong += [f"printed: {secret}"] * (secret in printed)
        wrong += [f"written: {secret}"] * (secret.encode() in written)
    return {"rows": rows, "exit_code": code, "seconds": elapsed, "peak_mib": peak,
            "plain_peak_mib": plain_peak, "wrong": wrong}  # fmt: skip


def _with_secrets(url: str) -> str:
    return f"{url.replace('://', f'://user:{PASSWORD}@')}?X-Amz-Signature={TOKEN}"


def write_model(folder: Path) -> None:
    from medsiglip_jax import init, save
    from medsiglip_jax.model import config

    save(
        init(config.two_towers(
            image_size=28, patch_size=14, width=16, depth=1, mlp_dim=16, num_heads=2, vocab_size=64,
        )),
        folder,
    )  # fmt: skip


def embed(
    scratch: Path, urls: list[str], name: str, seconds: float, most: int
) -> tuple[int, str, int, dict[str, str]]:
    """Runs `embed`: its exit code, what it printed, its peak memory in MiB, and of each file
    "embedded" or why not."""
    import pyarrow.parquet as pq

    table, out = scratch / f"{name}.csv", scratch / name
    table.write_text("image\n" + "\n".join(urls) + "\n")
    command = [
        sys.executable, "-m", "medsiglip_jax", "embed", "--model", str(scratch / "model"),
        "--output", str(out), "--timeout", str(seconds), "--max-bytes", str(most), str(table),
    ]  # fmt: skip
    with open(scratch / f"{name}.log", "w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        printed = log.read().decode("utf-8", "replace")
    got = {}
    for path in sorted(out.glob("part-*.parquet")):
        sources = pq.read_table(path, columns=["source"])["source"].to_pylist()
        got |= dict.fromkeys((_file(source) for source in sources), "embedded")
    if (errors := out / "errors.parquet").exists():
        got |= {_file(row["source"]): row["reason"] for row in pq.read_table(errors).to_pylist()}
    return os.waitstatus_to_exitcode(status), printed, usage.ru_maxrss // 1024, got


def _file(source: str) -> str:
    return source.partition("?")[0].rpartition("/")[2]


if __name__ == "__main__":
    sys.exit(main())
