"""Embedding files: every row accounted for, resumable, never half written."""

import errno
import http.server
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import references
from image_files import write_pictures
from PIL import Image

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import inputs as manifest
from medsiglip_jax.files import limits, locks, places
from medsiglip_jax.inference import run_folder
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.inference.manifest import ERRORS, MANIFEST
from medsiglip_jax.model import sharding
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import facts, sources
from medsiglip_jax.preprocess.dicom.rules import Rules

TERMS = references.model_terms(references.SMALL)


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


def read(folder):
    return pq.ParquetDataset(sorted(folder.glob("part-*.parquet"))).read().to_pylist()


def test_embeddings_are_those_of_the_model(model, pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("photo of a b\nscan of a c\n")
    rows = manifest.rows([pictures, tmp_path / "notes.txt"])
    done = []
    options = EmbedOptions(batch_size=3, shard_size=4)
    out = tmp_path / "out"
    result = embed(model, rows, out, options, done.append)
    assert sum(d.rows for d in done) == len(rows) == 10 and sum(d.errors for d in done) == 1
    assert all(0 < d.busy <= 1 for d in done)
    table = read(out)
    assert [row["id"] for row in table] == [r.id for r in rows if "damaged" not in r.id]
    assert [row["kind"] for row in table] == ["image"] * 7 + ["text"] * 2
    images = [r["source"] for r in table if r["kind"] == "image"]
    want = model.encode_image(model.processor.images(images))
    got = np.array([r["embedding"] for r in table], np.float32)
    references.assert_close(got[:7], want, TERMS)
    texts = model.processor.texts(["photo of a b", "scan of a c"])
    references.assert_close(got[7:], model.encode_text(texts), TERMS)
    schema = pq.read_schema(out / "part-00000.parquet")
    assert schema.names == ["id", "source", "kind", "embedding"]
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float not null>[16]"
    errors = pq.read_table(out / ERRORS).to_pylist()
    assert len(errors) == 1 and errors[0]["source"].endswith("damaged.jpg")
    assert "truncated" in errors[0]["reason"].lower()
    assert result.embedded == 9 and result.errors == 1 and result.rows == 10
    assert result.model.sha256 == model.sha256 and result.preprocess == "big_vision"
    assert (out / MANIFEST).read_text() == json.dumps(result.to_dict(), indent=2) + "\n"
    assert sorted(p.name for p in out.iterdir()) == [
        "errors.parquet", "manifest.json", "part-00000.parquet", "part-00001.parquet",
        "part-00002.parquet", "run.json",
    ]  # fmt: skip


def test_a_finished_run_is_returned_and_another_is_refused(model, pictures, tmp_path):
    rows = manifest.rows([pictures])
    out = tmp_path / "out"
    first = embed(model, rows, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert embed(model, rows, out) == first
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    for other_rows, options in (
        (rows[1:], EmbedOptions()),
        (rows, EmbedOptions(preprocess="serving")),
    ):
        with pytest.raises(FileExistsError, match="another run .*differ"):
            embed(model, other_rows, out, options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("x")
    with pytest.raises(FileExistsError, match="not an embedding run"):
        embed(model, rows, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.doc"]


def test_how_16_bit_grey_was_scaled_is_recorded(model, tmp_path):
    for n, most in enumerate((4095, 65535)):
        levels = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(levels).save(tmp_path / f"{n}.png")
    rows, out = manifest.rows([tmp_path]), tmp_path / "out"
    found = embed(model, rows, out)
    assert (found.dark, found.dicom_rules.grey16) == (1, None)
    stretched = EmbedOptions(dicom=Rules(grey16="stretch"))
    with pytest.raises(FileExistsError, match="another run \\(dicom differ\\)"):
        embed(model, rows, out, stretched)
    found = embed(model, rows, tmp_path / "again", stretched)
    assert (found.dark, found.dicom_rules.grey16) == (0, "stretch")
    with pytest.warns(UserWarning, match="1 of 2 images of 16 bits come out dark"):
        medsiglip_jax.encode_files(model, [row.source for row in rows])


def test_the_same_weights_from_elsewhere_go_on(model, checkpoint, pictures, tmp_path):
    rows, out = manifest.rows([pictures]), tmp_path / "out"
    first = embed(model, rows, out)
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert embed(medsiglip_jax.load(tmp_path / "copy"), rows, out) == first
    other = medsiglip_jax.load(checkpoint)
    other.params["b"] = other.params["b"] + 1
    medsiglip_jax.save(other, tmp_path / "other")
    with pytest.raises(FileExistsError, match="another run \\(model differ\\)"):
        embed(medsiglip_jax.load(tmp_path / "other"), rows, out)


def test_two_runs_on_one_folder(model, pictures, tmp_path):
    out = tmp_path / "out"
    with locks.lock(out / ".lock"), pytest.raises(FileExistsError, match="another run"):
        embed(model, manifest.rows([pictures]), out)


def test_an_interrupted_run_resumes_where_it_stopped(model, pictures, tmp_path):
    rows = manifest.rows([pictures])
    embed(model, rows, tmp_path / "whole", EmbedOptions(shard_size=2))

    class Stop(Exception):
        pass

    def stop(progress, seen=[]):  # noqa: B006
        seen.append(progress.rows)
        if sum(seen) == 5:
            raise Stop

    options = EmbedOptions(shard_size=2, batch_size=1)
    with pytest.raises(Stop):
        embed(model, rows, tmp_path / "out", options, stop)
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == [
        "part-00000.parquet", "part-00001.parquet", "run.json", "unfinished-00002.parquet",
    ]  # fmt: skip
    left.pop()
    stamps = [(tmp_path / "out" / n).stat().st_mtime_ns for n in left]
    embed(model, rows, tmp_path / "out", EmbedOptions(shard_size=2))
    assert stamps == [(tmp_path / "out" / n).stat().st_mtime_ns for n in left[:2]] + stamps[2:]
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "out")
    for a, b in zip(whole, resumed, strict=True):
        references.assert_close(a.pop("embedding"), b.pop("embedding"), TERMS)
        assert a == b


# ------------------------------------------------------------- devices, processes, batch sizes


def vectors(folder):
    """id -> vector."""
    return {row["id"]: np.array(row["embedding"], np.float32) for row in read(folder)}


@pytest.fixture(scope="module")
def reference(model, many, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    embed(model, manifest.rows([many]), folder, EmbedOptions(batch_size=64))
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty images and a damaged one."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(1)
    write_pictures(folder, 40, rng)
    (folder / "17.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    return folder


def assert_close(one, two):
    a, b = vectors(one), vectors(two)
    assert list(a) == list(b) and len(a) == 40
    for name in a:
        references.assert_close(a[name], b[name], TERMS)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_makes_no_difference(model, many, reference, tmp_path, batch_size):
    options = EmbedOptions(batch_size=batch_size, shard_size=16)
    embed(model, manifest.rows([many]), tmp_path / "out", options)
    assert_close(tmp_path / "out", reference)


def test_neighbours_make_no_difference(model, many, reference, tmp_path):
    rows = manifest.rows([many])
    backwards = rows[::-1]
    embed(model, backwards, tmp_path / "out", EmbedOptions(batch_size=7))
    got, want = vectors(tmp_path / "out"), vectors(reference)
    assert list(got) == list(want)[::-1]
    for name in want:
        references.assert_close(got[name], want[name], TERMS)


def test_eight_devices_make_no_difference(checkpoint, many, reference, tmp_path):
    model = medsiglip_jax.load(checkpoint, mesh=sharding.make_mesh(local=True))
    assert model.mesh.size == 8
    embed(model, manifest.rows([many]), tmp_path / "out", EmbedOptions(batch_size=7))
    assert_close(tmp_path / "out", reference)


def two_processes(checkpoint, inputs, out, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medsiglip_jax", "embed", "--model", str(checkpoint)]
    command += ["--output", str(out), "--shard-size", "8", "--batch-size", "3", "--json", *flags]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", str(inputs)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([*command, "--process-id", str(i)], **pipes) for i in range(2)]


@pytest.mark.slow
def test_two_processes_share_the_shards(checkpoint, many, reference, tmp_path):
    """Real ones, over jax.distributed; each writes every other shard, process 0 the manifest."""
    started = two_processes(checkpoint, many, tmp_path / "out")
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [3, 3]
    assert json.loads(outputs[0])["embedded"] == 40 and not outputs[1]
    assert_close(tmp_path / "out", reference)
    assert len(list((tmp_path / "out").glob("part-*"))) == 6
    assert not list((tmp_path / "out").glob(".*"))


def test_stored_as_half(model, many, reference, tmp_path):
    result = embed(
        model,
        manifest.rows([many]),
        tmp_path / "out",
        EmbedOptions(stored="float16", batch_size=64),
    )
    assert result.stored == "float16"
    schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: halffloat not null>[16]"
    half, full = vectors(tmp_path / "out"), vectors(reference)
    for name in full:
        np.testing.assert_array_equal(half[name], full[name].astype(np.float16))


def test_a_bucket_holds_the_same(model, many, reference, bucket):
    for file in many.iterdir():
        (places.at(f"{bucket}/many") / file.name).write_bytes(file.read_bytes())
    out = places.at(f"{bucket}/embedded")
    result = embed(model, manifest.rows([f"{bucket}/many"]), str(out), EmbedOptions(shard_size=16))
    assert result.embedded == 40 and result.errors == 1
    part = pq.read_table((out / "part-00000.parquet").open("rb"))
    want = vectors(reference)
    assert part["source"][0].as_py() == "gs://bucket/many/00.png"
    for row in part.to_pylist():
        references.assert_close(row["embedding"], want[row["id"]], TERMS)
    assert sorted(p.name for p in out.iterdir()) == [
        "errors.parquet", "manifest.json", "part-00000.parquet", "part-00001.parquet",
        "part-00002.parquet", "run.json",
    ]  # fmt: skip


def test_too_many_unreadable_inputs_end_the_run(model, many, tmp_path):
    for i in range(3):
        (tmp_path / "more").mkdir(exist_ok=True)
        (tmp_path / "more" / f"{i}.jpg").write_bytes(b"no")
    rows = manifest.rows([many, tmp_path / "more"])
    options = EmbedOptions(shard_size=10, batch_size=1, max_errors=2)
    with pytest.raises(
        ValueError, match="3 inputs could not be read, more than max_errors=2.*1.jpg"
    ):
        embed(model, rows, tmp_path / "out", options)
    left = sorted(p.name for p in (tmp_path / "out").glob("part-*"))
    assert left == [f"part-0000{i}.parquet" for i in range(4)]
    result = embed(model, rows, tmp_path / "out", replace(options, max_errors=4))
    assert result.errors == 4 and result.embedded == 40


# ------------------------------------------------------------------- what is not the input's fault


def test_a_failing_disk_is_no_damaged_file(model, many, reference, tmp_path, monkeypatch):
    """The run ends, its shard is not written, and the next one ends as if nothing had been."""
    rows, options = manifest.rows([many]), EmbedOptions(shard_size=10, batch_size=64)
    whole, out = tmp_path / "whole", tmp_path / "out"
    embed(model, rows, whole, options)

    def fail(file, span):
        if "/25.png" in file:
            raise OSError(errno.EIO, "Input/output error")
        return read_file(file, span)

    read_file = content._read
    monkeypatch.setattr(content, "_read", fail)
    with pytest.raises(content.Outage, match="25.png: cannot be read: Input/output error"):
        embed(model, rows, out, options)
    assert sorted(p.name for p in out.glob("part*")) == ["part-00000.parquet", "part-00001.parquet"]
    monkeypatch.undo()
    embed(model, rows, out, options)
    assert_same_bytes(out, whole)


def test_a_network_is_tried_again(monkeypatch):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/net/a", b"content")
    calls = []

    def fail(file, span, real=content._read_remote):
        calls.append(file)
        if len(calls) < 3:
            raise ConnectionError("reset")
        return real(file, span)

    monkeypatch.setattr(content, "_read_remote", fail)
    monkeypatch.setattr(content, "_PAUSES", (0.0, 0.0))
    assert sources.read_bytes("memory://net/a") == b"content" and len(calls) == 3
    calls[:] = []
    monkeypatch.setattr(content, "_PAUSES", (0.0,))
    with pytest.raises(content.Outage, match="net/a: cannot be read: ConnectionError: reset"):
        sources.read_bytes("memory://net/a")


@pytest.fixture
def web(pictures):
    """Serves a picture at /200/…, and answers /403/… with that status; and what was asked for."""
    picture, asked = (pictures / "0.png").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status = int(self.path.split("/")[1])
            asked.append(self.path)
            body = picture if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def addresses(tmp_path, *urls):
    (tmp_path / "urls.csv").write_text("image\n" + "\n".join(urls))
    return manifest.rows([tmp_path / "urls.csv"])


def test_a_dead_address_is_one_unreadable_row(model, web, tmp_path, monkeypatch):
    """Whether the server says so at once, or fails at each try, or asks who it is that asks."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(content, "_PAUSES", (0.0, 0.0))
    (url, asked), out = web, tmp_path / "out"
    dead = {401: 1, 403: 1, 404: 1, 407: 1, 410: 1, 451: 1, 429: 3, 500: 3, 503: 3}
    paths = [f"/{status}/x" for status in dead]
    with socket.socket() as free:  # a port at which nobody listens
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    rows = addresses(tmp_path, f"{url}/200/a", *(url + path for path in paths), closed)
    result = embed(model, rows, out, EmbedOptions())
    assert result.embedded == 1 and result.errors == len(dead) + 1
    reasons = {e["source"]: e["reason"] for e in pq.read_table(out / ERRORS).to_pylist()}
    for (status, tries), path in zip(dead.items(), paths, strict=True):
        assert asked.count(path) == tries
        assert status == 404 or reasons[url + path].startswith(f"HTTP {status} ")


@pytest.mark.parametrize(("code", "tries"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 2)])
def test_a_name_that_cannot_be_looked_up_is_one_unreadable_row(monkeypatch, code, tries):
    """Each address may have a domain of its own, which may have expired; many in a row are an
    outage, as other refusals are. Only a resolver that fails is asked again."""
    pytest.importorskip("aiohttp")
    asked = []

    def fail(file, span):
        asked.append(file)
        raise socket.gaierror(code, "Name or service not known")

    monkeypatch.setattr(content, "_read_remote", fail)
    monkeypatch.setattr(content, "_PAUSES", (0.0,))
    with pytest.raises(facts.Refused, match="its name cannot be looked up"):
        sources.read_bytes("https://nowhere.example/a.png")
    assert len(asked) == tries


@pytest.mark.parametrize("error", [PermissionError("denied"), OSError("Forbidden: a\nno access")])
def test_what_a_bucket_refuses_is_one_unreadable_row(monkeypatch, error):
    """As s3fs and gcsfs say it."""

    def fail(file, span):
        raise error

    monkeypatch.setattr(content, "_read_remote", fail)
    with pytest.raises(facts.Refused, match="permission denied|HTTP 403"):
        sources.read_bytes("memory://bucket/a.png")


def test_many_dead_addresses_in_a_row_are_an_outage(model, web, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(content, "_PAUSES", ())
    monkeypatch.setattr("medsiglip_jax.inference.engine.REFUSED_IN_ROW", 5)
    url, _ = web
    statuses = [403] * 4 + [200] + [503] * 3 + [200] + [401] * 5
    rows = addresses(tmp_path, *(f"{url}/{status}/{i}" for i, status in enumerate(statuses)))
    result = embed(model, rows[:9], tmp_path / "few", EmbedOptions(batch_size=2))
    assert result.errors == 7
    with pytest.raises(content.Outage, match="^5 inputs in a row .*the last .*/401/13: HTTP 401"):
        embed(model, rows, tmp_path / "out", EmbedOptions(batch_size=2))
    result = embed(model, rows, tmp_path / "out", EmbedOptions(batch_size=2, max_errors=12))
    assert result.errors == 12


SECRETS = ("pass-word-of-nobody", "signature-of-nobody", "uid-of-nobody")


def with_secrets(url):
    return f"{url.replace('://', f'://user:{SECRETS[0]}@')}?X-Amz-Signature={SECRETS[1]}"


def everything_in(folder):
    """What is written below a folder: names, bytes, and the cells of Parquet files."""
    for path in filter(Path.is_file, folder.rglob("*")):
        yield str(path)
        yield path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            yield str(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata)


@pytest.mark.filterwarnings("default")  # which are printed
def test_credentials_of_addresses_are_neither_printed_nor_written(
    checkpoint, web, tmp_path, monkeypatch, capfd
):
    """In a table, in a list and on the command line, of rows that are embedded and that are not;
    the rows are still told apart, and one more run resumes the first."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(content, "_PAUSES", ())
    url, out = web[0], tmp_path / "out"
    paths = ["/200/a.png", "/401/b.png", "/503/c.png"]
    dicom = [f"{url}/200/wado?objectUID={SECRETS[2]}.{i}" for i in range(2)]
    table = tmp_path / "urls.csv"
    table.write_text("image\n" + "\n".join([*map(with_secrets, map(url.__add__, paths)), *dicom]))
    (tmp_path / "list.txt").write_text(with_secrets(f"{url}/200/listed.png"))
    named = [with_secrets(f"{url}/200/named.png?sig=a/b"), with_secrets(f"{url}/403/no.png")]
    command = ["embed", "--model", checkpoint, "--output", out, table, tmp_path / "list.txt"]
    for again in (["--json"], []):
        assert cli.main([*map(str, command), *named, *again]) == 3
    parts, errors = pq.read_table(out / "part-00000.parquet"), pq.read_table(out / ERRORS)
    ids, sources = parts["id"].to_pylist(), parts["source"].to_pylist()
    assert sources.count(f"{url}/200/wado") == 2 and len(set(ids)) == len(ids) == 5
    assert {"named.png", f"{url}/200/a.png", f"{url}/200/listed.png"} <= set(ids)
    assert errors["source"].to_pylist() == [
        f"{url}/401/b.png",
        f"{url}/503/c.png",
        f"{url}/403/no.png",
    ]
    sheet = ["preview", "--output", str(tmp_path / "out" / "sheet.html"), str(table), *named]
    assert cli.main([*sheet, "--json"]) == cli.main(sheet) == 3
    wrong = with_secrets("http://127.0.0.1:1/gone.parquet")
    assert cli.main(["embed", "--model", wrong, "--output", str(tmp_path / "no"), wrong]) == 1
    assert cli.main(["embed", "--model", str(checkpoint), "--output", str(tmp_path / "no"),
                     f"foo://u:{SECRETS[0]}@h/x", f"sftp://u:{SECRETS[0]}@h/x"]) == 2  # fmt: skip
    assert cli.main(["embed", f"--nonesuch={wrong}"]) == 2
    printed = "".join(capfd.readouterr())
    for text, secret in itertools.product((printed, *everything_in(out)), SECRETS):
        assert secret not in text, text[text.index(secret) - 300 :][:400]


def test_a_traceback_shows_no_credentials(capfd):
    try:
        raise KeyError(with_secrets("https://host/a.png"))
    except KeyError as error:
        cli.main(["--version"])
        sys.excepthook(type(error), error, error.__traceback__)
    printed = capfd.readouterr().err
    assert "KeyError: 'https://host/a.png'" in printed and SECRETS[0] not in printed


def test_what_is_read_from_other_machines_has_limits_that_are_flags(
    checkpoint, web, tmp_path, monkeypatch, capsys
):
    """A protocol that is not allowed is a row in a table, and a mistake on the command line."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(content, "_PAUSES", ())
    table, before = tmp_path / "urls.csv", limits.current()
    table.write_text(f"image\n{web[0]}/200/a\nftp://host/b.png\n")
    command = ["embed", "--model", str(checkpoint), "--output", str(tmp_path / "out"), str(table)]
    assert cli.main([*command, "--max-bytes", "100"]) == 3
    errors = pq.read_table(tmp_path / "out" / ERRORS)["reason"].to_pylist()
    assert errors == ["more than 100 bytes (--max-bytes)", "ftp:// is not read here (--protocols)"]
    assert limits.current() is before
    for flags, said in (
        (["ftp://host/b.png"], "ftp://host/b.png: ftp:// cannot be reached here"),
        (["--timeout", "0"], "timeout is 0.0; expected more than 0"),
        (["--max-bytes", "1G"], "--max-bytes"),
    ):
        capsys.readouterr()
        assert cli.main([*command, *flags]) == 2
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1


def test_files_that_vanish_all_at_once_are_a_disk_that_is_gone(model, tmp_path, monkeypatch):
    monkeypatch.setattr("medsiglip_jax.inference.shard_work._MISSING_IN_ROW", 30)
    (tmp_path / "m.csv").write_text("image\n" + "\n".join(f"gone/{i}.png" for i in range(60)))
    rows = manifest.rows([tmp_path / "m.csv"])
    with pytest.raises(OSError, match="in a row are missing, the last .*gone/3.*disk gone"):
        embed(model, rows, tmp_path / "out", EmbedOptions(shard_size=50, batch_size=8))
    assert not list((tmp_path / "out").glob("part*"))
    result = embed(model, rows, tmp_path / "out", EmbedOptions(shard_size=50, max_errors=60))
    assert result.errors == 60


def test_a_finished_run_is_held_against_its_files(model, pictures, tmp_path):
    rows, out = manifest.rows([pictures]), tmp_path / "out"
    first = embed(model, rows, out, EmbedOptions(shard_size=4))
    part = out / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ValueError, match="part-00001.parquet: missing or damaged; remove it and"):
        embed(model, rows, out, EmbedOptions(shard_size=4))
    (out / MANIFEST).unlink()
    with pytest.raises(ValueError, match="part-00001.parquet: damaged .*remove it"):
        embed(model, rows, out, EmbedOptions(shard_size=4))
    part.unlink()
    assert embed(model, rows, out, EmbedOptions(shard_size=4)) == first
    (out / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match="not what embed writes"):
        embed(model, rows, out, EmbedOptions(shard_size=4))


def test_cut_texts_are_counted(model, tmp_path):
    (tmp_path / "t.txt").write_text("scan of a b\n" + "scan of a c " * 99 + "\n")
    assert embed(model, manifest.rows([tmp_path / "t.txt"]), tmp_path / "out").cut == 1


@pytest.mark.slow
def test_where_one_process_fails_all_end(checkpoint, many, tmp_path):
    """Process 1 finds more damaged files than it may; process 0 must not wait for it."""
    inputs = tmp_path / "in"
    shutil.copytree(many, inputs)
    for i in range(8, 16):
        (inputs / f"{i:02d}.png").write_bytes(b"damaged")
    started = two_processes(checkpoint, inputs, tmp_path / "out", "--max-errors", "3")
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "inputs could not be read, more than max_errors=3" in said[1]
    assert "process 1 has stopped" in said[0]


# -------------------------------------------------------------------------------------- damage


def damaged(good, rng):
    """One of the ways in which a file of a picture is none, or may be none."""
    data = bytearray(good)
    kind = rng.choice(["flips", "cut", "empty", "bomb", "no pixels", "other suffix", "text"])
    if kind == "flips":
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == "cut":
        del data[rng.integers(1, len(data)) :]
    elif kind in ("bomb", "no pixels"):
        file = io.BytesIO()
        Image.new("L", (1, 1)).save(file, "PNG")
        side = 100_000 if kind == "bomb" else 0
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + file.getvalue()[24:29]
        checked = header + zlib.crc32(header).to_bytes(4, "big")
        data = file.getvalue()[:12] + checked + file.getvalue()[33:]
    return {"empty": b"", "text": b"Dear colleague,"}.get(kind, bytes(data))


def pillow_refuses(path):
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception:
        return True
    return False


@pytest.mark.torture
def test_damaged_files_are_named_and_the_others_embedded(model, tmp_path, torture):
    """Half of the files are good; strict Pillow is the judge of the others."""
    rng = np.random.default_rng(5)
    for i in range(50 * torture):
        pixels = Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8))
        suffix = str(rng.choice(["png", "jpg", "bmp", "gif", "webp", "tiff"]))
        pixels.save(tmp_path / f"{i}-good.{suffix}")
        data = damaged((tmp_path / f"{i}-good.{suffix}").read_bytes(), rng)
        (tmp_path / f"{i}-damaged.{rng.choice(['png', 'jpg'])}").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = {str(p) for p in tmp_path.iterdir() if pillow_refuses(p)}
    rows = manifest.rows([tmp_path])
    result = embed(model, rows, tmp_path / "out", EmbedOptions(batch_size=32))
    errors = pq.read_table(tmp_path / "out" / ERRORS).to_pylist()
    assert {error["source"] for error in errors} == refused and all(e["reason"] for e in errors)
    assert len(errors) > 15 * torture and result.embedded == len(rows) - len(errors)
    assert {row["source"] for row in read(tmp_path / "out")} == {r.source for r in rows} - refused
    assert all("-damaged." in source for source in refused)


# ---------------------------------------------------------------------------------------- kills


CHILD = """
import sys, medsiglip_jax
from medsiglip_jax.data import inputs as manifest
from medsiglip_jax.inference.embed import EmbedOptions, embed
model, inputs, out = sys.argv[1:]
rows = manifest.rows([inputs])
options = EmbedOptions(batch_size=32, shard_size=50, save_seconds=0.01)  # kills meet saves, too
embed(medsiglip_jax.load(model), rows, out, options, lambda progress: print(flush=True))
"""


@pytest.mark.slow
@pytest.mark.torture
def test_kill_9_at_any_time_loses_nothing(checkpoint, tmp_path, torture):
    """A job of 2,000 images and some damaged ones ends with the bytes of an uninterrupted one."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(2000):
        Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8)).save(tmp_path / f"in/{i}.png")
    for i in range(0, 2000, 97):
        (tmp_path / f"in/{i}.png").write_bytes(b"damaged")
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(tmp_path / "in")]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with subprocess.Popen([*command, str(whole)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # it has begun to embed
        start = time.monotonic()
        process.wait()
    seconds = time.monotonic() - start
    names = sorted(p.name for p in whole.iterdir())
    assert len(names) == 43 and len(read(whole)) == 2000 - 21
    kills = 0
    while kills < 5 * torture:
        with subprocess.Popen([*command, str(cut)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.4 * seconds))
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        for part in cut.glob("part-*.parquet"):
            assert part.read_bytes() == (whole / part.name).read_bytes()
        if (cut / MANIFEST).exists():
            assert_same_bytes(cut, whole)
            shutil.rmtree(cut)
    subprocess.run([*command, str(cut)], check=True, stdout=subprocess.DEVNULL)
    assert_same_bytes(cut, whole)


def assert_same_bytes(one, two):
    names = sorted(p.name for p in two.iterdir())
    assert sorted(p.name for p in one.iterdir() if p.suffix != ".partial") in (
        names, [".lock", *names],  # of a run killed after its manifest
    )  # fmt: skip
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_options_are_checked():
    with pytest.raises(ValueError, match="batch_size is 0"):
        EmbedOptions(batch_size=0)
    with pytest.raises(ValueError, match="stored is 'int8'; expected one of float32, float16"):
        EmbedOptions(stored="int8")
    with pytest.raises(ValueError, match="big_vision, big_vision_pad, huggingface, serving"):
        EmbedOptions(preprocess="imagenet")


def test_a_failure_that_cannot_be_noted_hides_no_other(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(run_folder.json_files, "write", full)
    with pytest.warns(UserWarning, match="failed-0: other processes cannot be told: .*No space"):
        with pytest.raises(KeyboardInterrupt), run_folder.report_failure(tmp_path):
            raise KeyboardInterrupt


def test_a_disk_that_fails_is_not_a_folder_without_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for none in ("file", "missing", ""):
        assert run_folder.recorded_dtype(tmp_path / none) is None

    def fails(path, *problem):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(run_folder.json_files, "read", fails)
    with pytest.raises(OSError, match="Input/output error"):
        run_folder.recorded_dtype(tmp_path)
