"""One writer at a time, by a lock of the system or by a lease with heartbeats."""

import errno
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from medsiglip_jax.files import locks, places


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
    process.kill()
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


def test_a_folder_that_another_run_begins_to_use_stays(tmp_path, monkeypatch):
    """Whatever the moment at which it does: between a look into the folder and its removal, too."""

    def rmdir(folder):
        (folder / "file").write_text("x")
        os.rmdir(folder)

    monkeypatch.setattr(type(tmp_path), "rmdir", rmdir)
    with locks.lock(tmp_path / "new" / ".lock"):
        pass
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


def test_where_the_disk_cannot_lock_a_heartbeat_does(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows locks without it")
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    monkeypatch.setattr(locks, "LEASE_TIMEOUT", 1.5)

    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
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
