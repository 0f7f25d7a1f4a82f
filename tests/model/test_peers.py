"""Processes that watch each other: three real ones, without jax, of which one is lost."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest

from medsiglip_jax.model import peers, processes
from medsiglip_jax.model.relay import Relay

# Arguments: its index, what process 0 has said in `listen` or "", how it ends.
PROCESS = """
import signal, sys, time
from medsiglip_jax.model import peers
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
peers._BEAT, peers._LIMIT, peers._GRACE = 0.2, float(sys.argv[4]), 0.5
peers._PATIENCE["failed"] = 0.5
index, said, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
line = lambda text: print(text, file=sys.stderr, flush=True)
watch = peers.Watch(index, 3, line, lambda: None)
print("ready", watch.connect("localhost", said) if index else watch.listen("localhost"), flush=True)
with peers.ending():
    peers.use(watch)
    if way == "waits":
        time.sleep(60)
    sys.stdin.readline()
    if way == "fails":
        raise ValueError("a disk is full")
    print("done", flush=True)
"""


@pytest.fixture
def three():
    """Starts processes 0, 1 and 2, each with a way to end."""
    started = []

    def start(*ways, limit=30.0):
        said = ""
        for index, way in enumerate(ways):
            command = [sys.executable, "-c", PROCESS, str(index), said, way, str(limit)]
            started.append(subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True))
            ready = started[-1].stdout.readline()
            said = said or ready.removeprefix("ready ").strip()
        time.sleep(0.2)  # for the thread of each
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("lost, number, why", [
    (0, signal.SIGKILL, "it was killed or has crashed"),
    (1, signal.SIGKILL, "it was killed or has crashed"),
    pytest.param(1, signal.SIGSTOP, "no heartbeat for [2-4] s", marks=pytest.mark.slow),
])  # fmt: skip
def test_all_others_name_the_one_that_is_lost(three, lost, number, why):
    """Also those that have no connection with it: process 0 tells them before it ends."""
    processes = three("waits", "waits", "waits", limit=2.5)
    processes[lost].send_signal(number)
    where = f"(host {socket.gethostname()}, pid {processes[lost].pid})"
    for index in {0, 1, 2} - {lost}:
        err = processes[index].communicate(timeout=30)[1].splitlines()
        assert processes[index].returncode == 1 and len(err) == 1
        assert re.fullmatch(re.escape(f"process {lost} of 3 {where} was lost: ") + why, err[0])


def test_an_error_of_one_ends_the_others(three):
    processes = three("waits", "fails", "waits")
    processes[1].stdin.write("\n")
    processes[1].stdin.flush()
    ends = [process.communicate(timeout=30)[1] for process in processes]
    assert "ValueError: a disk is full" in ends[1] and "process" not in ends[1]
    for index in (0, 2):
        assert processes[index].returncode == 1
        assert (
            ends[index].startswith("process 1 of 3") and "has failed or was stopped" in ends[index]
        )


def test_all_end_together_and_nobody_is_missed(three):
    """One that has finished long before the others waits for them."""
    processes = three("ends", "ends", "ends")
    for process in (processes[2], processes[0], processes[1]):
        assert processes[2].poll() is None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    assert [process.communicate(timeout=30)[1] for process in processes] == [""] * 3
    assert [process.returncode for process in processes] == [0] * 3


def test_strangers_are_not_listened_to():
    watch = peers.Watch(0, 2, print, lambda: None)
    port = int(watch.listen("localhost").split()[0])
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"hello x 1 nowhere\nlost all\nhello\n\xff\xfe\n")
        for _ in range(5):
            for key, _ in watch._selector.select(0.1):
                key.data()
    assert watch._over is None and not watch._known()
    for key in [*watch._selector.get_map().values()]:
        key.fileobj.close()


def turn(watch, times=3):
    for _ in range(times):
        for key, _ in watch._selector.select(0.05):
            key.data()
        watch._judge()


def test_strangers_are_closed_and_told_nothing():
    """One that sends no end of line, and one that does not say who it is."""
    watch = peers.Watch(0, 2, print, lambda: None)
    port = int(watch.listen("localhost").split()[0])
    with contextlib.ExitStack() as stack:
        lines, silent = (
            stack.enter_context(socket.create_connection((host, port)))
            for host in ("127.0.0.1", "localhost")
        )
        turn(watch)
        assert len(watch._peers) == 2
        lines.sendall(b"\n" + b"x" * 2 * peers._LINE)
        turn(watch)
        assert len(watch._peers) == 1
        watch._send("lost all")
        watch._limit, watch._absent = -1.0, {1}
        watch._judge()
        for stranger in (lines, silent):
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    assert not watch._peers
    for key in [*watch._selector.get_map().values()]:
        key.fileobj.close()


def test_where_a_port_is_closed_both_warn_and_go_on(monkeypatch):
    """The store of keys and values is that of `jax.distributed`."""
    store = {}
    client = types.SimpleNamespace(
        blocking_key_value_get=lambda key, _: store[key],
        key_value_set=store.__setitem__,
        key_value_try_get=store.__getitem__,
    )
    first, second = (peers.Watch(index, 3, print, lambda: None) for index in range(2))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store[processes._KEY] = f"{port} token"
    said = f"process 1 cannot reach process 0 at 127.0.0.1, port {port} "
    with pytest.warns(UserWarning, match=said):
        assert not processes._connects(second, 1, "127.0.0.1", client)
    first._why_absent = lambda index: processes._why_absent(client, index)
    first._started -= 2 * peers._LIMIT
    ended = []
    monkeypatch.setattr(first, "_end", lambda word, text: ended.append(text))
    with pytest.warns(UserWarning, match=said):
        first._judge()
    assert ended == ["process 2 of 3 was lost: it never answered"]


def test_only_errors_of_collectives_wait_for_the_line_on_another(monkeypatch):
    class JaxRuntimeError(RuntimeError):
        pass

    gloo = "UNKNOWN: Gloo AllGather failed: Connection reset by peer"  # as jax raises it
    for error, waits in (
        (OSError("UNAVAILABLE"), 0), (JaxRuntimeError("UNAVAILABLE"), 1), (ValueError(gloo), 1),
    ):  # fmt: skip
        watch, waited = peers.Watch(1, 2, print, lambda: None), []
        monkeypatch.setattr(peers, "_wait", lambda *_, waited=waited: waited.append(1))
        watch.fail(error)
        assert len(waited) == waits


@pytest.mark.parametrize("address", ["myhost", "myhost:", ":1234", "myhost:http"])
def test_an_address_has_a_port(address):
    with pytest.raises(ValueError, match=f"is '{address}'; expected HOST:PORT"):
        processes.join(address, 2, 0, print)


@pytest.mark.parametrize("seconds", ["soon", "3", "nan", "1000"])
def test_the_limit_of_the_environment_is_checked(monkeypatch, seconds):
    monkeypatch.setenv("MEDSIGLIP_JAX_HEARTBEAT_SECONDS", seconds)
    with pytest.raises(ValueError, match=f"is '{seconds}'; expected seconds, 10 to 300"):
        peers.Watch(0, 2, print, lambda: None)
    monkeypatch.setenv("MEDSIGLIP_JAX_HEARTBEAT_SECONDS", "120")
    assert peers.Watch(0, 2, print, lambda: None)._limit == 120


def test_the_proxy_of_a_site_is_not_asked_for_the_relay(monkeypatch):
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    with processes._no_proxy():
        assert os.environ["no_proxy"] == "intranet,127.0.0.1"
        assert os.environ["no_grpc_proxy"] == "127.0.0.1"
    assert os.environ["no_proxy"] == "intranet" and "no_grpc_proxy" not in os.environ


@pytest.mark.parametrize("platform, cached", [("cpu", False), ("gpu", True), ("tpu", True)])
def test_on_cpus_no_process_reads_what_others_compile(monkeypatch, platform, cached):
    monkeypatch.setattr(processes.jax, "default_backend", lambda: platform)
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        processes._compile_alike()
        assert jax.config.jax_enable_compilation_cache is cached
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def test_a_process_leaves_where_its_output_fails():
    """`sys.stdout.flush` raises, and then blocks."""
    for flush in ("1 / 0", "time.sleep(60)"):
        code = (
            "import sys, time\nfrom medsiglip_jax.model import exits\n"
            f"sys.stdout = type('Broken', (), {{'flush': lambda self: {flush}}})()\n"
            "exits.leave_within(0.2)\nexits.leave(1)"
        )
        assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 1


def test_the_end_of_process_0_is_kept_from_jax():
    """Until the processes have joined, jax itself has to see it, to try again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(*server.getsockname())
        host, port = relay.address.split(":")
        for holds in (False, True):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(b"question")
                service, _ = server.accept()
                assert service.recv(8) == b"question"
                service.sendall(b"answer")
                assert client.recv(6) == b"answer"
                if holds:
                    relay.holds.set()
                service.close()
                client.settimeout(0.5)
                if holds:
                    with pytest.raises(TimeoutError):
                        client.recv(1)
                else:
                    assert client.recv(1) == b""
        relay._server.close()
