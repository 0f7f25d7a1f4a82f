"""A run that is stopped in the middle of a shard: what is kept, and that it makes no difference."""

import errno
import os
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import replace
from importlib import metadata

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import references
from dicom_files import made
from image_files import write_pictures
from PIL import Image

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import inputs
from medsiglip_jax.data.expansion import Parts
from medsiglip_jax.files import limits, locks, places, storage, threads
from medsiglip_jax.inference import shard_work, shards, unfinished
from medsiglip_jax.inference.abstain import Abstention, Gaussian
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.inference.manifest import ERRORS, RUN
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess.dicom.rules import Rules

NAME = "unfinished-00000.parquet"


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twenty pictures, of which 03 and 10 are damaged, a DICOM file without a suffix, and texts."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(1)
    write_pictures(folder, 20, rng)
    for i in (3, 10):
        (folder / f"{i:02d}.png").write_bytes(b"\x89PNG not really")
    slice_ = made(rng.integers(0, 4096, (12, 9), np.uint16), PatientID="p", StudyInstanceUID="1.2")
    (folder / "12b").write_bytes(slice_)
    (folder / "texts.txt").write_text("photo of a b\nscan of a c\n" + "scan of a c " * 99 + "\n")
    return folder


@pytest.fixture(scope="module")
def rows(files):
    return inputs.rows([files], all_files=True)


class Killed(BaseException):
    """What no handler of errors takes for an error of its own."""


def stopped_after(model, rows, out, options, count, error=KeyboardInterrupt):
    """A run that ends once `count` rows are embedded."""
    seen = []

    def stop(progress):
        seen.append(progress.rows)
        if sum(seen) >= count:
            raise error

    with pytest.raises(error):
        embed(model, rows, out, options, stop)


def finished(model, rows, out, options):
    """Ends a run; the number of rows that it has embedded, and of those that were there."""
    seen = []
    embed(model, rows, out, options, seen.append)
    now = sum(progress.rows for progress in seen if progress.busy is not None)
    return now, sum(progress.rows for progress in seen) - now


def assert_same_bytes(one, two):
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(two))
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


# ------------------------------------------------------------------------- stopped and resumed


OPTIONS = {
    "all columns": EmbedOptions(batch_size=3, stored="float16", identifiers="kept"),
    "several shards": EmbedOptions(batch_size=3, shard_size=7, normalize=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_wherever_a_run_stops_only_the_rest_is_embedded(model, rows, tmp_path, options):
    embed(model, rows, tmp_path / "whole", options)
    assert not list((tmp_path / "whole").glob("unfinished*"))
    for count in (1, 7, 20):
        out = tmp_path / str(count)
        stopped_after(model, rows, out, options, count)
        now, before = finished(model, rows, out, options)
        assert now + before == len(rows)
        # At most a batch, and unreadable rows at its end, are embedded again.
        assert before >= count - 2 * options.batch_size
        assert_same_bytes(out, tmp_path / "whole")


def test_distances_and_reasons_are_kept(model, rows, tmp_path):
    dim = model.config.embed_dim
    gaussian = Gaussian(
        np.zeros(dim), np.eye(dim, dtype=np.float32), np.arange(1.0, dim + 1), 0.0, 9
    )
    known = Abstention(gaussian, 1e9, 0.99, "0" * 64)
    options = EmbedOptions(batch_size=3, abstention=known)
    embed(model, rows, tmp_path / "far", options)
    distances = pq.read_table(tmp_path / "far" / "part-00000.parquet")["distance"].drop_null()
    limit = float(np.median(distances))
    options = replace(options, abstention=replace(known, limit=limit))
    embed(model, rows, tmp_path / "whole", options)
    part = pq.read_table(tmp_path / "whole" / "part-00000.parquet")
    assert part["distance"].null_count == 3 and 0 < part["no_assist"].null_count < part.num_rows
    stopped_after(model, rows, tmp_path / "out", options, 12)
    assert finished(model, rows, tmp_path / "out", options) == (len(rows) - 12, 12)
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


def test_a_signal_keeps_the_rows_and_the_command_resumes(
    checkpoint, files, tmp_path, monkeypatch, capsys
):
    """By the handlers of the command line, in the middle of the only shard."""
    counted, add, signals, loaders = [], shard_work.ShardWork._add, [], set()
    before = set(threading.enumerate())

    def count(self, batch, shard):
        add(self, batch, shard)
        counted.append(len(batch.rows))
        started = set(threading.enumerate()) - before  # tests of disks that hang leave some behind
        loaders.add(sum(thread.name.startswith("loader") for thread in started))
        if sum(counted) == 9 and signals:
            os.kill(os.getpid(), signals.pop())

    def run(out):
        counted[:] = []
        command = ["embed", "--model", str(checkpoint), "--batch-size", "3", "--workers", "2"]
        code = cli.main([*command, str(files), "--output", str(out)])
        return code, sum(counted)

    monkeypatch.setattr(shard_work.ShardWork, "_add", count)
    code, total = run(tmp_path / "whole")
    assert code == 3 and loaders == {2}  # --workers
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        signals.append(number)
        assert run(out) == (128 + number, 9)
        assert f"{number.name}: stopped" in capsys.readouterr().err
        assert sorted(os.listdir(out)) == [RUN, NAME]
        assert run(out) == (3, total - 9)
        assert_same_bytes(out, tmp_path / "whole")


def copied_after(model, rows, out, options, count, copy):
    """A run that is stopped after `count` rows, and a copy of what was on the disk just before,
    which is what `kill -9` leaves."""

    class Stop(BaseException):
        pass

    def keep(progress, seen=[]):  # noqa: B006
        seen.append(progress.rows)
        if sum(seen) >= count:
            shutil.copytree(out, copy, ignore=shutil.ignore_patterns(".lock"))
            raise Stop

    with pytest.raises(Stop):
        embed(model, rows, out, options, keep)


def test_rows_are_saved_now_and_then(model, rows, tmp_path):
    whole, often = EmbedOptions(batch_size=3), EmbedOptions(batch_size=3, save_seconds=0.0)
    embed(model, rows, tmp_path / "whole", whole)
    copied_after(model, rows, tmp_path / "a", often, 9, tmp_path / "often")
    copied_after(model, rows, tmp_path / "b", whole, 9, tmp_path / "never")
    assert finished(model, rows, tmp_path / "often", whole) == (len(rows) - 9, 9)
    assert finished(model, rows, tmp_path / "never", whole) == (len(rows), 0)
    assert_same_bytes(tmp_path / "often", tmp_path / "whole")


def test_a_kill_while_rows_are_saved_leaves_those_saved_before(model, rows, tmp_path, monkeypatch):
    """The second time that rows are saved, half of the file is written when the kill comes."""
    options, real, calls = EmbedOptions(batch_size=3, save_seconds=0.0), pq.write_table, []
    embed(model, rows, tmp_path / "whole", options)
    gone = subprocess.Popen(["true"])
    gone.wait()

    def write(table, path, **how):
        real(table, path, **how)
        calls.append(path)
        if len(calls) == 3:
            half = path.read_bytes()[:-2000]
            shutil.copytree(path.parent, tmp_path / "out", ignore=lambda *_: [".lock", path.name])
            name = path.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-")
            (tmp_path / "out" / name).write_bytes(half)
            raise Killed

    monkeypatch.setattr(shards.pq, "write_table", write)
    with pytest.raises(Killed):
        embed(model, rows, tmp_path / "stopped", options)
    monkeypatch.undo()
    left = sorted(os.listdir(tmp_path / "out"))
    assert len(left) == 3 and left[0].endswith(".partial") and left[1:] == [RUN, NAME]
    assert finished(model, rows, tmp_path / "out", EmbedOptions(batch_size=3)) == (len(rows) - 6, 6)
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


def test_a_kill_between_the_part_and_the_end_leaves_nothing_behind(model, rows, tmp_path):
    options, out = EmbedOptions(batch_size=3), tmp_path / "out"
    embed(model, rows, tmp_path / "whole", options)
    stopped_after(model, rows, out, options, 9)
    kept = (out / NAME).read_bytes()
    embed(model, rows, out, options)
    (out / "manifest.json").unlink()
    (out / NAME).write_bytes(kept)
    assert finished(model, rows, out, options) == (0, len(rows))
    assert_same_bytes(out, tmp_path / "whole")


def test_another_batch_size_may_resume(model, rows, tmp_path):
    options, other = EmbedOptions(batch_size=3), EmbedOptions(batch_size=4)
    embed(model, rows, tmp_path / "whole", options)
    stopped_after(model, rows, tmp_path / "out", options, 9)
    assert finished(model, rows, tmp_path / "out", other) == (len(rows) - 9, 9)
    tables = [pq.read_table(tmp_path / f / "part-00000.parquet") for f in ("whole", "out")]
    for one, two in zip(*(table.to_pylist() for table in tables), strict=True):
        terms = references.model_terms(model.config)
        references.assert_close(two.pop("embedding"), one.pop("embedding"), terms)
        assert one == two


def test_a_bucket_keeps_them_as_well(model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    options, out = EmbedOptions(batch_size=3), places.at("memory://unfinished/out")
    embed(model, rows, tmp_path / "whole", options)
    stopped_after(model, rows, out, options, 9)
    assert finished(model, rows, out, options) == (len(rows) - 9, 9)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


# ---------------------------------------------------------------------- what is not to be trusted


def changed_vector(path):
    """One bit of a vector, which Parquet does not notice."""
    data = bytearray(path.read_bytes())
    vector = pq.read_table(path)["embedding"][2].values.to_numpy()
    data[data.index(vector.tobytes()) + 2] ^= 1
    path.write_bytes(data)


def changed_count(path):
    """A number in what the file says of itself."""
    table = pq.read_table(path)
    said = {key: value.replace(b'"dark": 0', b'"dark": 7') for key, value in
            table.schema.metadata.items()}  # fmt: skip
    assert said != table.schema.metadata
    pq.write_table(table.replace_schema_metadata(said), path)


def of_another_shard(path):
    path.write_bytes((path.parents[1] / "two" / "unfinished-00001.parquet").read_bytes())


def of_another_run(path):
    path.write_bytes((path.parents[1] / "other" / NAME).read_bytes())


def a_part(path):
    path.write_bytes((path.parents[1] / "whole" / "part-00000.parquet").read_bytes())


NOT_OURS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("Dear colleague,"),
    "a bit of a vector": changed_vector,
    "a count": changed_count,
    "another shard": of_another_shard,
    "another run": of_another_run,
    "a part": a_part,
}


@pytest.fixture(scope="module")
def runs(model, rows, tmp_path_factory):
    """A whole run, one that was stopped, and two whose files are not its own."""
    folder, options = tmp_path_factory.mktemp("runs"), EmbedOptions(batch_size=3, shard_size=12)
    embed(model, rows, folder / "whole", options)
    stopped_after(model, rows, folder / "stopped", options, 9)
    stopped_after(model, rows, folder / "two", options, 15)
    stopped_after(model, rows[1:], folder / "other", options, 9)
    return folder


@pytest.mark.parametrize("change", NOT_OURS.values(), ids=NOT_OURS)
def test_what_this_run_has_not_written_is_not_used_and_that_is_said(
    model, rows, runs, tmp_path, change
):
    for name in os.listdir(runs):
        shutil.copytree(runs / name, tmp_path / name)
    out = tmp_path / "stopped"
    change(out / NAME)
    with pytest.warns(
        UserWarning, match=f"{NAME}: not the kept rows of this run .* again$"
    ) as said:
        now = finished(model, rows, out, EmbedOptions(batch_size=3, shard_size=12))
    assert now == (len(rows), 0) and len(said) == 1 and "\n" not in str(said[0].message)
    assert_same_bytes(out, tmp_path / "whole")


def test_a_disk_that_fails_is_no_damaged_file(model, rows, runs, tmp_path, monkeypatch):
    out = shutil.copytree(runs / "stopped", tmp_path / "out")

    def fail(self):
        raise OSError(errno.EIO, "Input/output error", str(self._path))

    monkeypatch.setattr(unfinished.UnfinishedShard, "_read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        embed(model, rows, out, EmbedOptions(batch_size=3, shard_size=12))
    monkeypatch.undo()
    assert finished(model, rows, out, EmbedOptions(batch_size=3, shard_size=12))[1] == 9


def test_rows_that_cannot_be_kept_do_not_hide_why_the_run_ended(model, rows, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "new_file", full)
    monkeypatch.setattr("medsiglip_jax.files.json.write", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="rows of an unfinished shard are lost: .*No space left"):
        stopped_after(model, rows, tmp_path / "out", EmbedOptions(batch_size=3), 9)


# ------------------------------------------------------------------------- errors and outages


def test_unreadable_rows_at_the_end_are_read_again(model, files, tmp_path):
    """A disk has gone, which somebody sees and stops the run: none of its files is to be listed."""
    folder = shutil.copytree(files, tmp_path / "in")
    rows, options = inputs.rows([folder], all_files=True), EmbedOptions(batch_size=3)
    embed(model, rows, tmp_path / "whole", options)
    for i in range(7, 16):
        os.rename(folder / f"{i:02d}.png", tmp_path / f"{i:02d}.png")
    stopped_after(model, rows, tmp_path / "out", options, 12)
    for i in range(7, 16):
        os.rename(tmp_path / f"{i:02d}.png", folder / f"{i:02d}.png")
    now, before = finished(model, rows, tmp_path / "out", options)
    assert before == 6 and now == len(rows) - 6
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


def test_the_errors_so_far_count(model, files, tmp_path):
    folder = shutil.copytree(files, tmp_path / "in")
    rows = inputs.rows([folder], all_files=True)
    options = EmbedOptions(batch_size=3, max_errors=1)
    with pytest.raises(ValueError, match="2 inputs could not be read.*10.png"):
        embed(model, rows, tmp_path / "out", options)
    kept = shutil.copytree(tmp_path / "out", tmp_path / "kept")
    with pytest.raises(ValueError, match="2 inputs could not be read.*10.png"):
        embed(model, rows, tmp_path / "out", options)
    with pytest.raises(ValueError, match="1 inputs could not be read.*03.png"):
        embed(model, rows, tmp_path / "out", replace(options, max_errors=0))
    assert finished(model, rows, tmp_path / "out", replace(options, max_errors=2))[1] == 9
    assert pq.read_table(tmp_path / "out" / ERRORS).num_rows == 2
    shutil.copy(folder / "11.png", folder / "10.png")  # or somebody mends the file
    assert finished(model, rows, kept, options)[1] == 9
    assert pq.read_table(kept / ERRORS).num_rows == 1


@pytest.fixture
def hanging(monkeypatch):
    """A dead mount: reading 08.png and what is after it never ends, until the test has."""
    release, read = threading.Event(), content._read

    def hang(file, span):
        if (number := re.search(r"/(\d\d)\.png", file)) and int(number[1]) >= 8:
            release.wait()
        return read(file, span)

    monkeypatch.setattr(content, "_read", hang)
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, 0.3))
    yield
    release.set()
    for thread in threads._left:
        thread.join()


def test_a_dead_mount_ends_the_run_and_what_is_embedded_is_kept(model, rows, tmp_path, request):
    options = EmbedOptions(batch_size=3, workers=2)
    embed(model, rows, tmp_path / "whole", options)
    request.getfixturevalue("hanging")
    with pytest.raises(
        threads.Stalled, match=r"/08\.png: not read within 0\.3 s; .*--read-timeout"
    ):
        embed(model, rows, tmp_path / "out", options)
    request.getfixturevalue("monkeypatch").undo()
    assert finished(model, rows, tmp_path / "out", options) == (len(rows) - 6, 6)
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


# ----------------------------------------------------------------------------- decoders' versions


@pytest.fixture
def installed(monkeypatch):
    """Installs versions of packages, or removes them (None), as far as `embed` can tell."""
    real = metadata.version

    def install(**versions):
        def version(name):
            found = versions.get(name.replace("-", "_"), "")
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found or real(name)

        monkeypatch.setattr(metadata, "version", version)

    return install


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A folder of files of each format."""
    folder, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(2)
    for name in ("pictures", "dicom", "volumes"):
        (folder / name).mkdir()
    for i in range(4):
        pixels = rng.integers(0, 256, (12, 9), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        (folder / "dicom" / f"{i}").write_bytes(made(pixels.astype(np.uint16)))  # without a suffix
    volume = nibabel.Nifti1Image(rng.normal(size=(9, 8, 4)).astype(np.float32), np.eye(4))
    nibabel.save(volume, folder / "volumes" / "0.nii")
    return folder


USES = {
    "pictures": (),
    "dicom": ("pydicom", "imagecodecs"),
    "volumes": ("nibabel",),
}


@pytest.mark.parametrize("kind", USES)
@pytest.mark.parametrize("left", ["a part", "kept rows", "all"])
def test_only_decoders_that_rows_have_used_make_another_run(
    model, kinds, tmp_path, installed, kind, left
):
    parts = Parts(frame="all") if kind == "volumes" else Parts()
    rows = inputs.rows([kinds / kind], parts=parts, all_files=True)
    options = EmbedOptions(batch_size=1, shard_size=3, dicom=Rules(volume="percentile"))
    out = tmp_path / "out"
    if left == "all":
        embed(model, rows, out, options)
    else:
        stopped_after(model, rows, out, options, 3 if left == "a part" else 2)
    optional = "pydicom", "imagecodecs", "nibabel", "openslide-python"
    for package in optional:
        installed(**{package.replace("-", "_"): "99.9"})
        if package in USES[kind]:
            with pytest.raises(
                FileExistsError, match=rf"versions differ: {package} \S+ there, 99.9"
            ):
                embed(model, rows, out, options)
    installed(pillow="99.9")
    with pytest.raises(FileExistsError, match=r"another run \(versions differ\)"):
        embed(model, rows, out, options)
    unused = {name.replace("-", "_"): None for name in optional if name not in USES[kind]}
    installed(**unused)
    found = embed(model, rows, out, options).versions
    assert set(found) == {"medsiglip_jax", "jax", "pillow", *USES[kind]}
    assert all(found[name] == metadata.version(name) for name in USES[kind])
