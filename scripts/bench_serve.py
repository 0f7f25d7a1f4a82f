"""The server under load, on loopback: how fast, how fair, and what is lost.

    python scripts/bench_serve.py throughput   # beside embed, and beside a server without batches
    python scripts/bench_serve.py faults       # a tenth of the images broken
    python scripts/bench_serve.py overload     # three times more than it can answer, for 30 s
    python scripts/bench_serve.py drain        # SIGTERM in the middle
    python scripts/bench_serve.py health       # while 100 addresses do not answer
    python scripts/bench_serve.py soak --seconds 600
    python scripts/bench_serve.py all --json

Requests are encoded before the clock starts, in one client process, whose CPU seconds are reported:
it runs on the same cores. Nothing leaves loopback.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
from PIL import Image
from served import Served

SIZE = "base-224"
_PRESET = "serving"  # of the route that is asked


# ------------------------------------------------------------------------------------- the client


def client(spec: dict[str, Any]) -> dict[str, Any]:
    """Sends requests and reports what came back; runs in a process of its own.

    Args:
        spec: "port"; "files"; "connections"; "count" of requests, or "seconds"; "rate" per second,
            of an open loop, or None for one request after the other on each connection; "keep"
            whether the vectors are returned.
    """
    requests = [_request(Path(file).read_bytes()) for file in spec["files"]]
    told = _Told(keep=spec.get("keep", False))
    start, cpu = time.perf_counter(), time.process_time()
    asyncio.run(_ask(spec, requests, told, start))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "client_cpu": time.process_time() - cpu, **told.summary()}


def _request(content: bytes) -> bytes:
    image = {"input_bytes": base64.b64encode(content).decode()}
    body = json.dumps({"instances": [{"image": image}]}).encode()
    head = (
        "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Told:
    """Answers by status, with their seconds."""

    def __init__(self, keep: bool):
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.keep, self.answers, self.errors = keep, {}, collections.Counter()

    def add(self, number: int, status: int, seconds: float, body: bytes) -> None:
        self.seconds[str(status)].append(seconds)
        if status == 200:
            [answer] = json.loads(body)["predictions"]
            if "error" in answer:
                self.errors[answer["error"]["code"]] += 1
            if self.keep:
                self.answers[number] = answer

    def lost(self, error: str) -> None:
        self.seconds[f"lost: {error}"].append(0.0)

    def summary(self) -> dict[str, Any]:
        told = {
            "answers": {status: len(s) for status, s in sorted(self.seconds.items())},
            "ms": {status: _spread(s) for status, s in sorted(self.seconds.items())},
            "instance_errors": dict(self.errors),
        }
        return {**told, "kept": self.answers} if self.keep else told


def _spread(seconds: list[float]) -> dict[str, float]:
    at = {"p50": 50, "p99": 99, "max": 100}
    return {name: round(1000 * float(np.percentile(seconds, q)), 1) for name, q in at.items()}


async def _ask(spec: dict[str, Any], requests: list[bytes], told: _Told, start: float) -> None:
    numbers = iter(range(spec.get("count") or 1 << 60))
    end = start + spec["seconds"] if spec.get("seconds") else float("inf")
    rate, lock = spec.get("rate"), asyncio.Lock()

    async def next_number() -> int | None:
        async with lock:
            number = next(numbers, None)
        if number is not None and rate:
            await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        return None if number is None or time.perf_counter() > end else number

    async def connection() -> None:
        streams = None
        while (number := await next_number()) is not None:
            sent = time.perf_counter()
            try:
                if streams is None:
                    streams = await asyncio.open_connection("127.0.0.1", spec["port"])
                    sent = time.perf_counter()
                status, body, closes = await _exchange(*streams, requests[number % len(requests)])
            except (OSError, EOFError) as error:
                told.lost(type(error).__name__)
                streams = None
                if isinstance(error, ConnectionRefusedError):
                    return  # it has ended
                continue
            told.add(number, status, time.perf_counter() - sent, body)
            if closes:
                streams[1].close()
                streams = None

    await asyncio.gather(*(connection() for _ in range(spec["connections"])))


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, bytes, bool]:
    writer.write(request)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    body = await reader.readexactly(int(lines["content-length"]))
    return int(head.split()[1]), body, lines.get("connection") == "close"


def ask(port: int, files: list[Path], **spec: Any) -> "subprocess.Popen[bytes]":
    """Starts a client; `told` waits for what it reports."""
    spec = {"port": port, "files": [str(file) for file in files], "connections": 16, **spec}
    command = [sys.executable, __file__, "client"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(json.dumps(spec).encode())
    process.stdin.close()
    return process


def told(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    assert process.stdout
    report = json.loads(process.stdout.read())
    process.wait()
    return report


# ------------------------------------------------------------------------------------- the server


class Server(Served):
    """The server, and what it tells of itself."""

    def metric(self, name: str) -> float:
        """The sum of all series of this name in /metrics."""
        return _metric(self.port, name)

    def usage(self) -> dict[str, float]:
        """MiB of memory and number of threads."""
        return {"mib": self.status("VmRSS") / 1024, "threads": self.status("Threads")}


def _metric(port: int, name: str) -> float:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return sum(float(value) for key, value in rows if key.split("{")[0] == name)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_until_ready(port: int, process: "subprocess.Popen[Any]") -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return
        time.sleep(0.2)
    raise SystemExit("the server has ended before it was ready")


# --------------------------------------------------------------------------------------- measures

_UNBATCHED = """
import base64, io, sys
from fastapi import FastAPI
from pydantic import BaseModel
from medsiglip_jax.preprocess.dicom.rules import Rules
import medsiglip_jax, numpy as np, uvicorn
model = medsiglip_jax.load(sys.argv[1])
app = FastAPI()

class Picture(BaseModel):
    input_bytes: str

class Instance(BaseModel):
    image: Picture

class Body(BaseModel):
    instances: list[Instance]

@app.get("/health")
def health():
    return "ok"

@app.post("/predict")
def predict(body: Body):
    answers = []
    for instance in body.instances:
        content = base64.b64decode(instance.image.input_bytes)
        pixels = model.processor.images(content, "serving", Rules("official"))
        vector = np.asarray(model.encode_image(pixels))[0]
        answers.append({"embedding": vector.tolist(), "input_type": "image"})
    return {"predictions": answers}

model.encode_image(np.zeros((1, *[model.config.image_size] * 2, 3), np.uint8))
uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""


def throughput(args: argparse.Namespace, model: Path, files: list[Path]) -> list[dict]:
    """Ours, `embed` on the same files, and one forward pass for each request."""
    import medsiglip_jax

    loaded, rows = medsiglip_jax.load(model), []
    with Server(model) as server, _unbatched(model) as plain_port:
        direct = _direct(loaded, files)
        sides = {"ours": server.port, "unbatched": plain_port}
        reports: dict[str, list[dict]] = collections.defaultdict(list)
        seconds, before = [], [0.0, 0.0]
        for turn in range(args.repeats + 1):
            start = time.perf_counter()
            direct()
            took = time.perf_counter() - start
            for side, port in sides.items():
                if port is not None:
                    report = told(ask(port, files, count=len(files)))
                    if turn:
                        reports[side].append(report)
            if turn:
                seconds.append(took)
            else:
                before = _batches(server)
        rows_and_batches = np.subtract(_batches(server), before)
        mean = float(rows_and_batches[0] / rows_and_batches[1])
        rate = statistics.median(len(files) / s for s in seconds)
        rows.append({"what": "encode_files, as embed", "images_per_s": rate})
        for side, several in reports.items():
            rates = [len(files) / report["seconds"] for report in several]
            row = {"what": f"{side}, 16 connections", "images_per_s": statistics.median(rates),
                   "of_embed": statistics.median(rates) / rate,
                   "client_cpu_s": statistics.median(r["client_cpu"] for r in several),
                   "answers": several[-1]["answers"]}  # fmt: skip
            rows.append(row | ({"mean_batch": mean} if side == "ours" else {}))
        if sides["unbatched"] is None:
            rows.append({"what": "unbatched", "not run": "FastAPI is not installed"})
        rows += _idle(sides, loaded, files)
    return rows


def _batches(server: Server) -> list[float]:
    """Rows and batches so far."""
    return [server.metric(f"medsiglip_jax_batch_rows_{what}") for what in ("sum", "count")]


def _direct(model: Any, files: list[Path], batch_size: int = 8) -> Any:
    from medsiglip_jax.inference.encode import encode_files
    from medsiglip_jax.preprocess.dicom.rules import Rules

    rules = Rules("official")
    return lambda: encode_files(model, files, _PRESET, dicom=rules, batch_size=batch_size)


def _idle(sides: dict[str, int | None], model: Any, files: list[Path]) -> list[dict]:
    """One request at a time, in turns with direct calls."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(4):
        for file in files[:5]:
            start = time.perf_counter()
            _direct(model, [file], 1)()
            times["direct call"].append(1000 * (time.perf_counter() - start))
        for side, port in sides.items():
            if port is not None:
                report = told(ask(port, files[:5], count=5, connections=1))
                times[side].append(report["ms"]["200"]["p50"])
    del times["direct call"][:5]  # these compile
    return [{"what": f"{side}, idle", "p50_ms": statistics.median(t)} for side, t in times.items()]


@contextlib.contextmanager
def _unbatched(model: Path) -> Iterator[int | None]:
    """The port of a server that runs the model for each request; None without FastAPI."""
    if subprocess.run([sys.executable, "-c", "import fastapi"], capture_output=True).returncode:
        yield None
        return
    port = _free_port()
    command = [sys.executable, "-c", _UNBATCHED, str(model), str(port)]
    process = subprocess.Popen(command)
    try:
        _wait_until_ready(port, process)
        yield port
    finally:
        process.kill()
        process.wait()


def faults(args: argparse.Namespace, model: Path, files: list[Path]) -> list[dict]:
    """Every tenth image is broken: the others are answered as if it were not there."""
    import medsiglip_jax

    mixed = list(files)
    broken = files[0].parent / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:200])
    for i in range(0, len(mixed), 10):
        mixed[i] = broken
    expected = np.stack(_direct(medsiglip_jax.load(model), files)())
    with Server(model) as server:
        report = told(ask(server.port, mixed, count=len(mixed), keep=True))
    kept = {int(number): answer for number, answer in report.pop("kept").items()}
    good = [n for n in kept if "embedding" in kept[n]]
    found = np.array([kept[n]["embedding"] for n in good])
    row = {"what": "a tenth broken", "asked": len(mixed), **report, "vectors": len(good),
           "largest_difference": float(np.abs(found - expected[good]).max())}  # fmt: skip
    return [row]


def overload(args: argparse.Namespace, model: Path, files: list[Path]) -> list[dict]:
    """An open loop at three times the rate that it can answer."""
    queue = 32
    with Server(model, "--queue", str(queue), "--max-batch", "16") as server:
        told(ask(server.port, files, count=32))
        calm = told(ask(server.port, files, count=4 * queue, connections=queue))
        rate = calm["answers"]["200"] / calm["seconds"]
        before, peak, stop = server.usage(), [0.0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.2):
                peak[0] = max(peak[0], server.usage()["mib"])

        thread = threading.Thread(target=watch)
        thread.start()
        report = told(ask(server.port, files, seconds=args.seconds, rate=3 * rate, connections=256))
        stop.set()
        thread.join()
        bound = 1000 * (queue / rate + 16 / rate)
        return [{
            "what": f"three times overload for {args.seconds:g} s", "rate_calm": rate, **report,
            "bound_of_accepted_p99_ms": round(bound), "mib_before": before["mib"],
            "mib_peak": peak[0], "grown": peak[0] / before["mib"] - 1,
        }]  # fmt: skip


def drain(args: argparse.Namespace, model: Path, files: list[Path]) -> list[dict]:
    """SIGTERM while 16 connections ask: whatever was accepted is answered."""
    with Server(model, "--drain-delay", "2") as server:
        process = ask(server.port, files, seconds=20)
        time.sleep(6)
        server.process.send_signal(signal.SIGTERM)
        start, ready = time.perf_counter(), []
        while server.process.poll() is None:
            with contextlib.suppress(OSError):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health/ready")
                except urllib.error.HTTPError as error:
                    ready.append(error.code)
            time.sleep(0.1)
        took = time.perf_counter() - start
        report, code = told(process), server.process.returncode
        lines = [json.loads(line) for line in server.log().splitlines() if line[:1] == "{"]
    answered = sum(line.get("route") == "/predict" and line["status"] == 200 for line in lines)
    return [{
        "what": "SIGTERM under load", **report, "answered_by_the_server": answered,
        "accepted_and_lost": answered - report["answers"].get("200", 0), "exit_code": code,
        "seconds_to_end": took, "not_ready_first": ready[:1] == [503],
    }]  # fmt: skip


def health(args: argparse.Namespace, model: Path, files: list[Path]) -> list[dict]:
    """Calls of /health while 100 requests wait for addresses that never answer."""
    silent = socket.create_server(("127.0.0.1", 0), backlog=512)
    port = silent.getsockname()[1]
    flags = ["--allow-host", f"127.0.0.1:{port}", "--allow-private"]
    tiny = files[0].parent / "one.png"
    Image.new("RGB", (1, 1)).save(tiny)
    address = {"image": {"image_url": f"http://127.0.0.1:{port}/x.png"}}
    with Server(model, *flags) as server:
        url = f"http://127.0.0.1:{server.port}"
        body = json.dumps({"instances": [address]}).encode()
        asked = urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"})

        def hang() -> None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(asked, timeout=60).read()

        threads = [threading.Thread(target=hang, daemon=True) for _ in range(100)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        one = told(ask(server.port, [tiny], count=1, connections=1))
        times = []
        for _ in range(200):
            start = time.perf_counter()
            urllib.request.urlopen(f"{url}/health").read()
            times.append(time.perf_counter() - start)
        row = {"what": "/health with 100 hanging addresses", "calls": len(times),
               "ms": _spread(times), "image_of_1x1": one["answers"]}  # fmt: skip
    silent.close()
    return [row]


def soak(args: argparse.Namespace, model: Path, files: list[Path]) -> list[dict]:
    """At 80 % of what it can answer, for long: memory and threads stay as they are."""
    with Server(model) as server:
        told(ask(server.port, files, count=64))
        calm = told(ask(server.port, files, count=160))
        rate = calm["answers"]["200"] / calm["seconds"]
        process = ask(server.port, files, seconds=args.seconds, rate=0.8 * rate, connections=32)
        usage, start = [], time.perf_counter()
        while process.poll() is None and time.perf_counter() < start + args.seconds + 30:
            usage.append(server.usage())
            time.sleep(min(5.0, args.seconds / 20))
        report = told(process)
    settled = usage[len(usage) // 5 :]  # the allocator has its pools by then
    half = len(settled) // 2
    first, second = (
        statistics.median(u["mib"] for u in part) for part in (settled[:half], settled[half:])
    )
    threads = [u["threads"] for u in settled]
    return [{
        "what": f"{args.seconds:g} s at 80 % load", "rate": 0.8 * rate, **report,
        "mib_first_half": first, "mib_second_half": second,
        "mib_peak": max(u["mib"] for u in usage),
        "threads_first": threads[0], "threads_last": threads[-1], "exit": server.process.returncode,
    }]  # fmt: skip


COMMANDS = {c.__name__: c for c in (throughput, faults, overload, drain, health, soak)}


# ------------------------------------------------------------------------------------ the material


def write_model(folder: Path, size: str) -> Path:
    """A checkpoint with random weights."""
    import medsiglip_jax

    medsiglip_jax.save(medsiglip_jax.init(size), folder / "model")
    return folder / "model"


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of the size of small radiographs."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        noise = rng.integers(0, 256, (12, 16, 3), np.uint8)
        image = Image.fromarray(noise).resize((512, 400), Image.Resampling.BICUBIC)
        files.append(folder / f"{i}.jpg")
        image.save(files[-1], quality=90)
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*COMMANDS, "all", "client"])
    parser.add_argument("--size", default=SIZE, help="of the model, default %(default)s")
    parser.add_argument("--images", type=int, default=128, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="turns, default %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload and soak")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.command == "client":
        print(json.dumps(client(json.load(sys.stdin))))
        return 0
    names = list(COMMANDS) if args.command == "all" else [args.command]
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), args.size)
        files = write_images(Path(folder), args.images)
        rows = [row for name in names for row in COMMANDS[name](args, model, files)]
    report = {"size": args.size, **measure.environment(), "rows": rows}
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _text(report: dict[str, Any]) -> str:
    lines = [f"{key}: {value}" for key, value in report.items() if key != "rows"]
    for row in report["rows"]:
        lines += ["", *(f"  {k:26s} {_shown(v)}" for k, v in row.items())]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.exit(main())
