"""Servers that are hostile or broken cost one row each, in bounded time and memory."""

import gzip
import io
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import hostile_http as hostile
import numpy as np
import pytest
from PIL import Image

from medsiglip_jax.data import columns
from medsiglip_jax.data import inputs as manifest
from medsiglip_jax.data.parquet_columns import ParquetColumns
from medsiglip_jax.files import limits, places
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.facts import NoSuchFile, Refused, UnreadableImage
from medsiglip_jax.preprocess.parts import Parts

pytest.importorskip("aiohttp")

MOST = 1 << 20
TOO_LARGE, TOO_SLOW = "more than 1,048,576 bytes", "no answer within 1 s"
ELSEWHERE, NO_HTTP = "redirected to what is no address of http or https", "no valid HTTP"
# What is said of each server, and whether it, and not the file, is what is wrong.
SAID = {
    "endless": (TOO_LARGE, False), "endless_chunks": (TOO_LARGE, False),
    "gzip_bomb": (TOO_LARGE, False), "deflate_bomb": (TOO_LARGE, False),
    "lying_long": (TOO_LARGE, False), "silent": (TOO_SLOW, True), "silent_body": (TOO_SLOW, True),
    "drip": (TOO_SLOW, True), "drip_of_headers": (TOO_SLOW, True),
    "endless_continue": (TOO_SLOW, True), "huge_headers": (NO_HTTP, True),
    "no_http": (NO_HTTP, True), "to_file": (ELSEWHERE, True), "to_ftp": (ELSEWHERE, True),
    "to_bucket": (ELSEWHERE, True), "to_itself": ("redirected more than 5 times", True),
    "unauthorized": ("HTTP 401 Unauthorized", True),
    "proxy_unauthorized": ("HTTP 407 Proxy Authentication Required", True),
    "gone": ("HTTP 410 Gone", True), "short_body": ("the answer ends early", True),
    "damaged_gzip": ("the answer ends early, or is damaged", True), "empty": ("empty", False),
    "hangs_up": ("no connection", True), "lying_short": ("", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def servers():
    with hostile.servers() as running:
        yield running


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(content, "_PAUSES", (0.0,))
    with limits.use(limits.parse(None, MOST, 1.0)):
        yield


@pytest.fixture
def serve():
    """Starts a server that answers with a function of what was asked."""
    running = []

    def start(answer, name="x"):
        running.append(hostile.Server(name, answer))
        return running[-1]

    yield start
    for server in running:
        server.close()


def outcome(read, url):
    try:
        return read(url)
    except Exception as error:
        return error


def outcomes(read, servers):
    """What became of each server; a reader that hangs is a failure, and does not hang the tests."""
    with ThreadPoolExecutor(len(servers)) as pool:
        found = {name: pool.submit(outcome, read, s.url) for name, s in servers.items()}
        return {name: future.result(timeout=60) for name, future in found.items()}


def test_each_server_costs_one_row_with_a_reason(servers):
    """Bodies without end, bombs, silence, dripping, redirects, refusals and lies; a server that is
    silent or refuses is not asked twice, and whatever is wrong with it is no outage."""
    asked = {name: server.asked for name, server in servers.items()}
    found = outcomes(lambda url: sources.read(url)[0].shape, servers)
    assert set(servers) == {*SAID, *hostile.READABLE}
    assert [found.pop(name) for name in hostile.READABLE] == [(30, 40, 3)] * 3
    for name, error in found.items():
        reason, refused = SAID[name]
        assert isinstance(error, UnreadableImage) and reason in error.reason, (name, error)
        assert isinstance(error, Refused) == refused or not reason, (name, error)
    for name in ("silent", "drip", "unauthorized", "to_file", "endless", "huge_headers"):
        assert servers[name].asked == asked[name] + 1, name
    assert servers["to_itself"].asked == asked["to_itself"] + 6


def test_headers_of_files_are_read_within_the_same_limits(servers):
    """Also those of a server that sends no parts of files, where the whole file is read."""
    found = outcomes(sources.frames, servers)
    assert [found.pop(name) for name in hostile.READABLE] == [1, 1, 1]
    assert all(isinstance(error, UnreadableImage) for error in found.values()), found


def test_tables_and_shards_from_such_servers_are_one_line(servers):
    few = {name: servers[name] for name in ("endless", "silent_body", "gone", "short_body")}

    def read_whole(url):
        return columns.read_lines(f"{url}?.csv")

    for read in (read_whole, ParquetColumns, places.read_bytes):
        for name, error in outcomes(read, few).items():
            assert isinstance(error, (limits.TooLarge, places.Failed)), (name, error)
            assert f"/{name}.png: {SAID[name][0]}" in str(error)


def test_a_dead_address_on_the_command_line_is_a_row_as_in_a_table(servers, serve):
    """Unless there is no such file, as of a local path."""
    urls = [servers[name].url for name in ("good", "unauthorized", "to_file")]
    assert len(manifest.rows(urls, parts=Parts("every=2"))) == 3
    missing = serve(lambda send: send(hostile.whole(b"", status="404 Not Found"))).url
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        manifest.rows([missing])
    with pytest.raises(NoSuchFile):
        sources.read(missing)


def test_a_slow_line_that_is_steady_is_not_cut(serve):
    """It takes longer than the timeout, and each part of it does not."""
    block = bytes(40_000)

    def slowly(send):
        send(hostile.head(f"Content-Length: {24 * len(block)}"))
        for _ in range(24):
            send(block)
            time.sleep(0.05)

    assert len(sources.read_bytes(serve(slowly).url)) == 24 * len(block)


def test_a_part_of_a_table_may_be_larger_than_an_image(serve):
    body = np.random.default_rng(0).bytes(2 * MOST)
    part = hostile.head(f"Content-Length: {len(body)}", status="206 Partial Content") + body
    assert places.read_bytes(serve(lambda send: send(part)).url, 0, len(body)) == body
    with pytest.raises(limits.TooLarge, match="more than 100 bytes$"):  # than was asked for
        places.read_bytes(serve(lambda send: send(part)).url, 0, 100)


def test_a_range_of_a_server_that_sends_whole_files_is_no_image(servers):
    for part, said in (
        ("0:30", "its server sends no parts of files"),
        ("0:2000000", "2,000,000 b"),
    ):
        with pytest.raises(UnreadableImage, match=said):
            sources.read(f"{servers['good'].url}#{part}")


def test_bytes_are_counted_after_decompression(serve):
    whole = gzip.compress(bytes(MOST + 1))
    assert len(whole) < 2000
    server = serve(lambda send: send(hostile.whole(whole, "Content-Encoding: gzip")))
    with pytest.raises(UnreadableImage, match=TOO_LARGE):
        sources.read(server.url)


@pytest.mark.parametrize(
    "cell",
    [
        "http://", "http:///x", "https://[::1", "http://h:99999/x", "http://h:x/", "http://..../x",
        f"http://{'a' * 300}/x", "foo://x", "s3://bucket/x", "data://x", "array:///x/y/0", "hf://x",
        "file:///dev/zero", "local:///dev/zero", "file:///", "simplecache::http://h/x", "://x",
    ],
)  # fmt: skip
def test_a_cell_that_is_no_address_is_one_row(cell):
    """Devices that never end among them, and protocols that nobody has allowed."""
    with pytest.raises(UnreadableImage) as caught:
        sources.read(cell)
    assert not isinstance(caught.value, Refused)


def test_what_is_not_of_one_address_is_an_outage(monkeypatch):
    """A package that is missing, and a bucket's server, which has all files of the bucket."""
    for error in (places.NotReachable("install gcsfs"), limits.TooSlow("no answer within 60 s")):

        def fail(file, span, error=error):
            raise error

        monkeypatch.setattr(content, "_read_remote", fail)
        with pytest.raises(content.Outage, match="gs://bucket/x: cannot be read: "):
            sources.read_bytes("gs://bucket/x")


def test_objects_of_other_file_systems_are_bounded_too():
    import fsspec

    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bounded/a.png", picture.getvalue())
    memory.pipe_file("/bounded/b.png", bytes(MOST + 1))
    assert sources.read("memory://bounded/a.png")[0].shape == (9, 9, 3)
    with pytest.raises(UnreadableImage, match=TOO_LARGE):
        sources.read("memory://bounded/b.png")


@pytest.mark.slow
def test_a_table_of_hostile_servers_from_end_to_end():
    done = subprocess.run([sys.executable, hostile.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
