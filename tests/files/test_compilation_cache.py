"""Compiled programs in a folder: whole or not there, whatever happens to the disk."""

import errno
import os
import threading
import warnings

import pytest

from medsiglip_jax.files import compilation_cache, storage
from medsiglip_jax.files.compilation_cache import CompilationCache

PROGRAM = bytes(range(256)) * 40


def entries(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_programs_are_kept_for_the_next_process(tmp_path):
    CompilationCache(tmp_path / "new" / "folder").put("jit_f-1", PROGRAM)
    later = CompilationCache(tmp_path / "new" / "folder")
    assert later.get("jit_f-1") == PROGRAM and later.get("jit_f-2") is None
    assert len(entries(tmp_path / "new" / "folder")) == 1
    assert os.stat(tmp_path / "new" / "folder").st_mode & 0o077 == 0  # others may not add code


@pytest.mark.parametrize("name, other", [
    ("platform.machine", "sparc"), ("cpu.features", frozenset({"sse2", "avx512_bf16"})),
    ("threads.processors", 1000),
])  # fmt: skip
def test_another_cpu_beside_a_shared_home_reads_its_own_programs(
    name, other, tmp_path, monkeypatch
):
    CompilationCache(tmp_path).put("jit_f", b"for this one")
    monkeypatch.setattr(f"medsiglip_jax.files.compilation_cache.{name}", lambda: other)
    there = CompilationCache(tmp_path)
    assert there.get("jit_f") is None
    there.put("jit_f", b"for the other")
    assert there.get("jit_f") == b"for the other"
    monkeypatch.undo()
    assert CompilationCache(tmp_path).get("jit_f") == b"for this one"


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="only Linux lists features so")
def test_the_features_of_the_cpu_are_read():
    assert len(compilation_cache.cpu.features()) > 10


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:7], lambda data: data[:32], lambda data: data[:-1],
    lambda data: data + b"\0", lambda data: bytes([data[0] ^ 1]) + data[1:],
    lambda data: data[:5000] + bytes([data[5000] ^ 16]) + data[5001:],
    lambda data: bytes(len(data)),
])  # fmt: skip
def test_what_is_damaged_is_missing_and_gets_replaced(damage, tmp_path):
    cache = CompilationCache(tmp_path)
    cache.put("jit_f", PROGRAM)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("jit_f") is None
    cache.put("jit_f", PROGRAM)
    assert cache.get("jit_f") == PROGRAM and len(entries(tmp_path)) == 1


def full(path, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_permission(path, data):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("fault, said", [
    (full, "No space left"), (no_permission, "Permission denied"), (None, "Not a directory"),
])  # fmt: skip
def test_a_disk_that_takes_nothing_is_one_warning(fault, said, tmp_path, monkeypatch):
    folder = tmp_path
    if fault:
        monkeypatch.setattr(storage, "replace", fault)
    else:
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "folder"
    cache = CompilationCache(folder)
    with pytest.warns(UserWarning, match=said) as warned:
        for key in "abc":
            assert cache.get(key) is None
            cache.put(key, PROGRAM)
    assert len(warned) == 1 and "JAX_COMPILATION_CACHE_DIR" in str(warned[0].message)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CompilationCache(tmp_path).put("jit_f", PROGRAM)
    assert not entries(tmp_path)


def test_what_was_used_longest_ago_makes_room(tmp_path):
    """Others' files stay, and so does what a writer at work has not finished."""
    writer = CompilationCache(tmp_path)
    for age, key in enumerate("edcba"):
        writer.put(key, PROGRAM)
        (path,) = tmp_path.glob(f"{key}-*")
        os.utime(path, times=(1e9 - age, 1e9 - age))
    assert CompilationCache(tmp_path).get("a") == PROGRAM  # and is now the last one used
    theirs = {"jit_x-cache", "film.mkv.partial", ".film.partial", "film.program", "b.medsiglip-jax"}
    old = f".{path.name}.0123abcd-77-89abcdef.partial"
    new = f".{path.name}.0123abcd-77-89abcdee.partial"
    for name, age in (*dict.fromkeys(theirs, 1e9).items(), (old, 1e9), (new, None)):
        (tmp_path / name).write_bytes(PROGRAM)
        if age is not None:
            os.utime(tmp_path / name, times=(age, age))
    size = path.stat().st_size
    CompilationCache(tmp_path, 3 * size + 10).put("new", b"")
    kept = set(entries(tmp_path))
    assert kept > {new, *theirs}
    assert {name.partition("-")[0] for name in kept - {new, *theirs}} == {"new", "a", "e", "d"}


def test_one_process_that_writes_much_makes_room_again(tmp_path):
    """A sixteenth more than may be kept can be there for a while."""
    most, largest = 40 * len(PROGRAM), 0
    cache = CompilationCache(tmp_path, most)
    for number in range(100):
        cache.put(f"jit_{number}", PROGRAM)
        largest = max(largest, sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert most * 15 / 16 < largest < most * 18 / 16


@pytest.mark.parametrize("own", [True, False])
def test_what_jax_itself_has_kept_goes_from_our_own_folder_only(tmp_path, own):
    names = {"jit_f-0a-cache", "jit_f-0a-atime", "jit_g-0b-cache"}
    for name in names:
        (tmp_path / name).write_bytes(PROGRAM)
        os.utime(tmp_path / name, times=(1e9, 1e9))
    CompilationCache(tmp_path, len(PROGRAM), own).put("jit_f", PROGRAM[:10])
    assert len(names & set(entries(tmp_path))) == (1 if own else 3)


@pytest.mark.parametrize("most", [0, len(PROGRAM) - 1])
def test_what_is_larger_than_all_may_be_is_not_kept(most, tmp_path):
    CompilationCache(tmp_path, most).put("jit_f", PROGRAM)
    assert not entries(tmp_path)


def test_writers_at_once_never_mix(tmp_path):
    """Each reader gets the whole program of one of them, or none."""
    values = [bytes([number]) * 100_000 for number in range(3)]
    found, done = [], threading.Event()

    def write(value: bytes) -> None:
        for _ in range(20):
            CompilationCache(tmp_path).put("jit_f", value)

    def read() -> None:
        while not done.is_set():
            found.append(CompilationCache(tmp_path).get("jit_f"))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(value,)) for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
    assert set(found) <= {None, *values} and CompilationCache(tmp_path).get("jit_f") in values
    assert len(entries(tmp_path)) == 1
