"""Folders, links and globs, local and remote: which files they name, and in which order."""

import errno
import io
import threading
import time
from collections import Counter

import fsspec
import numpy as np
import pytest
from image_files import FILES, cells, contents, put
from PIL import Image
from test_inputs import tar_of

from medsiglip_jax.data import expansion, ids, inputs, listing, tables, tar
from medsiglip_jax.files import limits, threads
from medsiglip_jax.preprocess import bytes as file_bytes
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.parts import Parts


def test_a_folder_is_its_images(folder):
    found = inputs.rows([folder])
    assert contents(found) == FILES and sorted(row.id for row in found) == sorted(FILES)
    assert all(row.source == f"{folder}/{row.id}" for row in found)
    assert [row.id for row in inputs.rows([f"{folder}/"])] == [row.id for row in found]


def test_remote_folders_have_the_order_of_local_ones(tmp_path):
    rng = np.random.default_rng(0)
    for depth in rng.integers(1, 5, 200):
        name = "/".join("".join(rng.choice(list("ab-z"), 2)) for _ in range(depth))
        for place in (tmp_path / "x", "memory://x"):
            put(f"{place}/{name}.png", name)
    local, remote = inputs.rows([tmp_path / "x"]), inputs.rows(["memory://x"])
    assert cells(local) == cells(remote) and contents(local) == contents(remote)


def test_a_folder_is_named_as_it_was_given(folder, tmp_path, monkeypatch):
    if "://" not in folder:
        monkeypatch.chdir(folder)
        assert inputs.rows(["."])[0].source == "b.png"
        monkeypatch.chdir(tmp_path)
        assert inputs.rows(["place//"])[0].source == "place/b.png"


@pytest.mark.filterwarnings("ignore:.*skipped other files")  # the link to itself
def test_links_are_followed_but_not_round_in_circles(tmp_path):
    put(f"{tmp_path}/far/x/1.png", b"1")
    put(f"{tmp_path}/near/2.png", b"2")
    for name, target in [
        ("near/link", "far"), ("near/again", "near"), ("far/x/back", "far"),
        ("far/self", "far/self"), ("near/3.png", "far/x/1.png"),
    ]:  # fmt: skip
        (tmp_path / name).symlink_to(tmp_path / target)
    found = inputs.rows([tmp_path / "near"])
    assert contents(found) == {"2.png": b"2", "3.png": b"1", "link/x/1.png": b"1"}
    (tmp_path / "given").symlink_to(tmp_path / "near")
    assert [row.id for row in inputs.rows([tmp_path / "given"])] == [row.id for row in found]
    table = tables.read_table(f"{tmp_path}/far")  # folders of classes
    assert table.columns["image"].to_pylist() == ["x/1.png"]


@pytest.mark.parametrize(
    "pattern, ids",
    [
        ("**/*.png", ["b.png", "sub/1.2.840.png"]),
        ("*", ["b.png", "notes.md", "z.tif"]),
        ("sub/*/c.*", ["deep/c.JPEG"]),
        ("[bz].*", ["b.png", "z.tif"]),
    ],
)
def test_a_glob_is_the_files_that_it_matches(folder, pattern, ids):
    if pattern == "*":
        fsspec.core.url_to_fs(folder)[0].rm(f"{folder}/list.csv")
    found = inputs.rows([f"{folder}/{pattern}"])
    start = folder + "/sub" * pattern.startswith("sub")
    assert [(row.id, row.source) for row in found] == [(id, f"{start}/{id}") for id in ids]


def test_a_file_that_looks_like_a_glob_is_that_file(tmp_path):
    put(f"{tmp_path}/scan[1].png", b"1")
    put(f"{tmp_path}/scan1.png", b"2")
    assert contents(inputs.rows([tmp_path / "scan[1].png"])) == {"scan[1].png": b"1"}


def test_all_files_are_looked_into_on_request(tmp_path):
    """DICOM and pictures of any name, but not what only looks like text, local and remote."""
    Image.new("L", (8, 8)).save(picture := io.BytesIO(), "JPEG")
    dicom = bytes(128) + b"DICM"
    files = {
        "1.CT": dicom, "2.acr": dicom, "sub/3.seg": dicom, "4.jpe": picture.getvalue(),
        "5.md": b"# title\n\nsome text", "6.csv": b"image\na", "7.bin": b"", "8": dicom,
    }  # fmt: skip
    for top in (tmp_path / "x", "memory://all/x"):
        for name, content in files.items():
            put(f"{top}/{name}", content)
        found = inputs.rows([top], all_files=True)
        assert [row.id for row in found] == ["1.CT", "2.acr", "4.jpe", "8", "sub/3.seg"]
        assert found.skipped == {".bin": 1, ".csv": 1, ".md": 1}
    found = inputs.rows([tmp_path / "x"])
    assert [row.id for row in found] == ["8"]
    left_out = {".acr": 1, ".bin": 1, ".csv": 1, ".ct": 1, ".jpe": 1, ".md": 1, ".seg": 1}
    assert found.skipped == left_out
    skipped = Counter()
    assert expansion.names([str(tmp_path / "x")], Parts(), skipped=skipped) == [f"{tmp_path}/x/8"]
    assert skipped == left_out


def slowly(items):
    for item in items:
        time.sleep(0.2)
        yield item


def test_a_list_that_grows_is_never_given_up(tmp_path, monkeypatch):
    """Each of these takes longer than the limit, and no file or request does."""
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    members = {f"{n}.{kind}": b"x" for n, kind in enumerate(("png", "cap", "cap", "png"))}
    put(f"{tmp_path}/s.tar", tar_of(members))
    put("memory://slow/a.png", b"x")
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, 0.5))
    with monkeypatch.context() as patch:
        patch.setattr(listing, "walk", lambda *a, walk=listing.walk: slowly(walk(*a)))
        assert len(inputs.rows([tmp_path])) == 6
        assert len(expansion.names([str(tmp_path)], Parts())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_headers", lambda *a, headers=tar._headers: slowly(headers(*a)))
        assert len(inputs.rows([tmp_path / "s.tar"])) == 2
    with monkeypatch.context() as patch:  # pages of a bucket, which are one call
        memory = type(fsspec.filesystem("memory"))
        patch.setattr(memory, "find", lambda *a, find=memory.find: time.sleep(0.8) or find(*a))
        assert len(inputs.rows(["memory://slow"])) == 1
    with monkeypatch.context() as patch:  # what follows reads nothing
        patch.setattr(ids, "public_ids", lambda ids: time.sleep(0.8))
        assert len(inputs.rows([tmp_path / "a.png"])) == 1


def test_a_list_that_ends_nowhere_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    release = threading.Event()

    def hang(*_):
        yield "a.png"
        release.wait()

    monkeypatch.setattr(listing, "walk", hang)
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, 0.3))
    for make in (
        lambda: inputs.rows([tmp_path]),
        lambda: expansion.names([str(tmp_path)], Parts()),
    ):
        with pytest.raises(threads.Stalled, match="the list of inputs: not read within 0.3 s"):
            make()
    release.set()


@pytest.mark.parametrize("failures", [1, None])
def test_what_cannot_be_looked_into_is_no_other_file(monkeypatch, failures):
    """A network that fails once is asked again; what may not be read is a row, with the reason."""
    for name in ("a.CT", "b.CT"):
        put(f"memory://looked/{name}", bytes(128) + b"DICM")
    memory, left = type(fsspec.filesystem("memory")), [failures]

    def fail(self, path, *args, **kwargs):
        if path.endswith("a.CT") and left[0] != 0:
            left[0] = left[0] and left[0] - 1
            raise PermissionError(path) if failures is None else OSError(errno.EIO, "gone")
        return original(self, path, *args, **kwargs)

    original = memory.open
    monkeypatch.setattr(memory, "open", fail)
    monkeypatch.setattr(file_bytes, "_PAUSES", (0.0,))
    found = inputs.rows(["memory://looked"], all_files=True)
    assert [row.id for row in found] == ["a.CT", "b.CT"] and not found.skipped
    if failures is None:
        with pytest.raises(UnreadableImage, match="permission denied"):
            sources.read(found[0].source)


def test_a_bucket_whose_list_is_cut_short_is_refused(monkeypatch):
    class Bucket:
        def info(self, path):
            return {"type": "directory"}

        def find(self, path, withdirs, detail):
            files = {f"b/x/{n}.png": {"type": "file"} for n in range(3)}
            return files | {f"b/x/{n}": {"type": "directory"} for n in range(2)}

    monkeypatch.setattr(listing, "file_system", lambda uri: (Bucket(), "b/x"))
    assert len(inputs.rows(["gs://b/x"])) == 3
    monkeypatch.setattr(listing, "_MOST_OF_GCSFS", 5)  # objects may stand for the folders, too
    with pytest.raises(ValueError, match="^gs://b/x: holds about 5 files and .*name the folders"):
        inputs.rows(["gs://b/x"])
