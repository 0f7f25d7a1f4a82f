"""Whole or not at all."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from medsiglip_jax.files import locks, places, storage


def test_new_file_replaces_in_one_step(tmp_path):
    path = tmp_path / "deep" / "file"
    with storage.new_file(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), storage.new_file(path) as partial:
        partial.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file"]


def test_new_folder_appears_whole(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), storage.new_folder(path) as partial:
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with storage.new_folder(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
    assert os.listdir(tmp_path) == ["out"] and (path / "sub" / "file").exists()
    with pytest.raises(FileExistsError, match="already exists"), storage.new_folder(path):
        pass
    with storage.new_folder(path, overwrite=True) as partial:
        (partial / "new").write_text("y")
    assert os.listdir(path) == ["new"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    with storage.new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("y")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["whole"]


def hold(path, held):
    with locks.lock(path):
        held.set()
        time.sleep(60)


def test_the_second_run_is_refused_and_the_lock_dies_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(FileExistsError, match="another run"), locks.lock(path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locks.lock(path):
        pass


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ValueError), locks.lock(tmp_path / "new" / ".lock"):
        raise ValueError
    assert os.listdir(tmp_path) == []
    with locks.lock(tmp_path / "new" / ".lock"):
        (tmp_path / "new" / "file").write_text("x")
    assert os.listdir(tmp_path / "new") == ["file"]


def test_one_holder_at_a_time_though_the_file_comes_and_goes(tmp_path):
    inside, seen = [], []

    def work(_):
        for _ in range(300):
            try:
                with locks.lock(tmp_path / ".lock"):
                    inside.append(1)
                    seen.append(len(inside))
                    inside.pop()
            except FileExistsError:
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(seen) > 300 and set(seen) == {1}
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        places.check_writable(tmp_path / "file" / "out")
    places.check_writable(tmp_path / "not" / "yet" / "there")
    with pytest.raises(ValueError, match="only a local folder"):
        places.check_writable(Path("gs://bucket/out"))


@pytest.mark.skipif(os.geteuid() != 0, reason="drops root's rights to test permissions")
def test_permissions():
    code = (
        "import os, sys; os.setuid(65534)\n"
        "from pathlib import Path\n"
        "from medsiglip_jax.files import locks\n"
        "try: places.check_writable(Path('/root-only-place/out'))\n"
        "except PermissionError as error: print(error)"
    )
    folder = Path(storage.__file__).parents[1]
    readable = os.stat(folder).st_mode & 0o5 and os.access(folder, os.R_OK)
    if not readable:
        pytest.skip("the package is not readable for others")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if out.returncode:
        pytest.skip("python itself is not readable for others")
    assert "no permission in /" in out.stdout


# ------------------------------------------------------------------------------------- in a bucket


def names(place):
    return sorted(p.name for p in place.iterdir())


def test_a_bucket_gets_files_and_folders_whole(bucket):
    place = places.at(f"{bucket}/whole")
    with pytest.raises(RuntimeError), storage.new_file(place / "file") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert not (place / "file").exists()
    with storage.new_file(place / "file") as partial:
        partial.write_text("whole")
    assert (place / "file").read_text() == "whole"
    with pytest.raises(FileExistsError, match="already exists"), storage.new_folder(place):
        pass
    with storage.new_folder(place / "deep", marker="a") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("b")
        (partial / "a").write_text("a")
    assert names(place / "deep") == ["a", "sub"] and (place / "deep/sub/b").read_text() == "b"
    with storage.new_folder(place / "deep", overwrite=True) as partial:
        (partial / "c").write_text("c")
    assert names(place / "deep") == ["c"]


def test_the_marker_of_a_remote_folder_comes_last(bucket, monkeypatch):
    place, uploaded = places.at(f"{bucket}/marked"), []
    upload = storage._upload
    monkeypatch.setattr(storage, "_upload", lambda f, p: (uploaded.append(p.name), upload(f, p)))
    with storage.new_folder(place, marker="b") as partial:
        for name in "cbad":
            (partial / name).write_text(name)
    assert uploaded[-1] == "b" and sorted(uploaded) == list("abcd")


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_lines_grow_and_lose_what_a_kill_cut_short(bucket, tmp_path, kind):
    place = tmp_path / "lines" if kind == "local" else places.at(f"{bucket}/lines")
    lines = storage.Lines(place)
    for step in range(4):
        lines.append({"step": step})
    lines.flush()
    assert storage.read_lines(place) == [{"step": i} for i in range(4)]
    place.write_text(place.read_text() + '{"step": 4')
    lines = storage.Lines(place, lambda line: line["step"] < 2)
    lines.append({"step": 2})
    lines.flush()
    assert place.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_a_lock_in_a_bucket_is_refused_while_its_holder_lives(bucket, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    monkeypatch.setattr(locks, "LEASE_TIMEOUT", 1.5)
    path = places.at(f"{bucket}/locked/.lock")
    with locks.lock(path):
        with pytest.warns(UserWarning, match="waiting up to"):
            with pytest.raises(FileExistsError, match="another run is writing"), locks.lock(path):
                pass
        assert path.exists()
    assert not path.exists()
    path.write_text('{"owner": "killed", "beat": 7}')
    start = time.monotonic()
    with pytest.warns(UserWarning, match="waiting up to"), locks.lock(path):
        assert time.monotonic() - start > 1 and "killed" not in path.read_text()


def test_a_bucket_nobody_can_reach_is_one_line():
    with pytest.raises(ValueError, match="nowhere:// cannot be reached here"):
        places.at("nowhere://x/y")
    assert places.at("gs://x") != places.Path("gs:/x") and places.is_remote(places.Path("gs://x/y"))


def test_what_is_given_as_a_uri(tmp_path):
    local = places.at(f"file://{tmp_path}/x")
    assert local == tmp_path / "x" and isinstance(local, type(tmp_path))
    assert str(places.at("memory:/a/b")) == str(places.at("memory://a/b")) == "memory://a/b"
    assert not places.is_remote(tmp_path) and places.is_remote("gs://bucket")


def test_a_variable_that_is_empty_is_not_set(tmp_path, monkeypatch):
    folders = {"XDG_CACHE_HOME": (places.cache, ".cache"),
               "XDG_CONFIG_HOME": (places.configuration, ".config")}  # fmt: skip
    for variable, (folder, default) in folders.items():
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv(variable, "")
        assert folder() == tmp_path / default / "medsiglip_jax"
        monkeypatch.setattr(Path, "home", None)  # a container's user may have none
        monkeypatch.setenv(variable, "/own")
        assert folder() == Path("/own/medsiglip_jax")
        monkeypatch.undo()


def test_where_the_disk_cannot_lock_a_heartbeat_does(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    monkeypatch.setattr(locks, "LEASE_TIMEOUT", 1.5)

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with locks.lock(tmp_path / ".lock") as check:
        check()
        with pytest.warns(UserWarning, match="waiting up to"):
            with pytest.raises(FileExistsError, match="another run"):
                locks.lock(tmp_path / ".lock").__enter__()
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_slept_through_its_heartbeats_is_told(bucket, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    path = places.at(f"{bucket}/slept/.lock")
    with locks.lock(path) as check:
        path.write_text('{"owner": "another", "beat": 1}')
        time.sleep(0.5)
        with pytest.raises(FileExistsError, match="has taken over"):
            check()
    assert "another" in path.read_text()


def test_a_place_that_is_no_bucket_gets_a_whole_file_or_none(monkeypatch):
    """Half of a copy under the final name would be taken for done."""
    monkeypatch.setattr(storage, "_BUCKETS", ())
    place = places.at("memory://disk/file")
    put = type(place.fs).put_file

    def half(self, source, target, **kwargs):
        put(self, source, target, **kwargs)
        raise ConnectionError

    monkeypatch.setattr(type(place.fs), "put_file", half)
    with pytest.raises(ConnectionError), storage.new_file(place) as partial:
        partial.write_text("x")
    assert not place.exists()
    monkeypatch.setattr(type(place.fs), "put_file", put)
    with storage.new_file(place) as partial:
        partial.write_text("x")
    assert place.read_text() == "x"
