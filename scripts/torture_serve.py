"""A server under load is killed: clients get a right answer or a broken connection, and the next
server answers as the first did, to the bit, and leaves nothing on the disk.

What `serve` writes are slides that came in requests, for as long as OpenSlide reads them; what a
killed server left of those, tests/serve/test_vertex.py looks at. The rounds are those of
`torture_kills` at random moments, where "torn" is a wrong answer.
"""

import base64
import collections
import http.client
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torture_process import Process
from torture_state import state
from torture_table import MODEL

NAME = "serve"
CLIENTS, _SECONDS = 4, 0.6  # of load, in which the kill falls
_BROKEN = (OSError, http.client.HTTPException)


def bodies() -> list[bytes]:
    """Requests: texts and images."""
    images = [{"image": {"input_bytes": _encoded(Path(f"a/a{i}.png"))}} for i in range(4)]
    texts = [{"text": text} for text in ("lung", "a chest X-ray")]
    return [json.dumps({"instances": [one]}).encode() for one in (*texts, *images)]


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


class Served:
    """The command in a forked process, ready."""

    def __init__(self):
        self.process = Process(["serve", *MODEL, "--port", "0", "--log-requests"])
        said, end = b"", time.monotonic() + 60
        while b"ready: " not in said or not said.rpartition(b"ready: ")[2].endswith(b"\n"):
            assert select.select([self.process.said], [], [], end - time.monotonic())[0], said
            assert (data := os.read(self.process.said, 4096)), said
            said += data
        self.port = int(said.rpartition(b"ready: ")[2].split()[0].rpartition(b":")[2])

    def end(self, number: int) -> int:
        """Sends a signal and returns the exit code."""
        os.kill(self.process.pid, number)
        return self.process.wait()[0]


def ask(port: int, body: bytes) -> Any:
    """The answer; raises one of `_BROKEN` where it is not whole."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def alike(one: Any, other: Any) -> bool:
    """Whether two answers differ by no more than a batch of another size makes in float32."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-5
    return one == other


class Load:
    """Clients, each of which asks one thing after the other until the server is gone."""

    def __init__(self, port: int, asked: list[bytes], expected: list[Any], begin: int):
        self.counts, self.wrong = collections.Counter[str](), list[str]()
        self._port, self._asked, self._expected = port, asked, expected
        self._threads = [threading.Thread(target=self._work, args=(begin + i,))
                         for i in range(CLIENTS)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        while True:
            index = number % len(self._asked)
            try:
                answer = ask(self._port, self._asked[index])
            except _BROKEN:
                self.counts["broken"] += 1
                return
            except ValueError as error:
                self.wrong.append(f"torn: {error}")
                return
            self.counts["answered"] += 1
            if not alike(answer, self._expected[index]):
                self.wrong.append(f"torn: another answer to request {index}: {answer}")
            number += 1


def rounds(name: str, times: int, done: Mapping[str, Mapping]) -> Iterator[tuple[str, Any]]:
    """As `torture_kills.rounds_of`."""
    server, asked = Served(), bodies()
    expected = [ask(server.port, body) for body in asked]
    assert all(status == 200 for status, _ in expected), expected
    assert server.end(signal.SIGTERM) == 0
    before = state(Path.cwd())
    for number in range(done.get("moment", {}).get("rounds", 0), times):
        found, wrong = _killed(asked, expected, np.random.default_rng(number))
        found["reruns"], again = 1, Served()
        if (answers := [ask(again.port, body) for body in asked]) != expected:
            found["differ"], wrong = 1, [*wrong, f"differ: {answers}"]
        if again.end(signal.SIGTERM):
            found["bad ends"], wrong = found["bad ends"] + 1, [*wrong, "bad ends: after SIGTERM"]
        if (after := state(Path.cwd())) != before:
            found["left over"], wrong = 1, [*wrong, f"left over: {set(after) ^ set(before)}"]
        yield "moment", {"calls": 0, **found, "wrong": wrong}


def _killed(
    asked: list[bytes], expected: list[Any], rng: np.random.Generator
) -> tuple[collections.Counter[str], list[str]]:
    server = Served()
    load = Load(server.port, asked, expected, int(rng.integers(len(asked))))
    time.sleep(rng.uniform(0.02, _SECONDS))
    code = server.end(signal.SIGKILL)
    load.join()
    found = load.counts
    found["torn"] += len(load.wrong)
    if code == -signal.SIGKILL:
        found["kills"] += 1
    else:
        found["bad ends"] += 1
        load.wrong.append(f"bad ends: exit code {code}")
    return found, load.wrong
