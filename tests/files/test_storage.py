"""Files and folders that appear complete or not at all."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from medsiglip_jax.files import places, storage


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


def test_two_writers_at_once_never_mix(tmp_path):
    """Each has a temporary file of its own; the last rename wins, whole."""
    path, together = tmp_path / "page.html", threading.Barrier(4)

    def write(number: int) -> None:
        for _ in range(10):
            with storage.new_file(path) as partial, open(partial, "w") as file:
                for _ in range(3):
                    together.wait()
                    file.write(str(number) * 1000)
                    file.flush()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in {str(number) * 3000 for number in range(4)}
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_planted_link_is_never_followed(tmp_path, monkeypatch):
    """At the name that earlier versions used, at the very name of the temporary file, and at the
    output itself."""
    other, path = tmp_path / "other", tmp_path / "out.json"
    other.write_text("somebody's")
    (tmp_path / ".out.json.partial").symlink_to(other)
    path.symlink_to(other)
    tokens = iter(["planted", "planted", "free"])
    monkeypatch.setattr(storage.secrets, "token_hex", lambda n: next(tokens))
    with storage.new_file(path) as partial:
        partial.write_text("ours")
    partial.symlink_to(other)
    with storage.new_file(path) as partial:
        partial.write_text("ours again")
    assert "free" in partial.name
    assert other.read_text() == "somebody's" and not path.is_symlink()
    assert path.read_text() == "ours again"


def test_files_of_killed_writers_are_removed_and_those_of_others_are_not(tmp_path):
    code = "import os, sys, pathlib; from medsiglip_jax.files import storage\n" \
        "with storage.new_file(pathlib.Path(sys.argv[1])) as partial: os._exit(9)\n"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")])
    assert len(os.listdir(tmp_path)) == 1
    with storage.new_file(tmp_path / "b"):  # of another name
        pass
    assert len(os.listdir(tmp_path)) == 2
    with storage.new_file(tmp_path / "a") as first:
        with storage.new_file(tmp_path / "a") as second:  # the first is alive
            assert first.exists() and first != second
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


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


def test_folders_of_killed_writers_are_removed(tmp_path):
    code = "import os, sys, pathlib; from medsiglip_jax.files import storage\n" \
        "with storage.new_folder(pathlib.Path(sys.argv[1])) as partial:\n" \
        "    (partial / 'half').write_text('x')\n" \
        "    os._exit(9)\n"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
    assert any(path.is_dir() for path in tmp_path.iterdir())
    with storage.new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("y")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["whole"]


def test_of_two_writers_of_a_folder_one_is_refused(tmp_path):
    with storage.new_folder(tmp_path / "out") as partial:
        (partial / "first").touch()
        with (
            pytest.raises(FileExistsError, match="another run is writing"),
            storage.new_folder(tmp_path / "out", overwrite=True) as other,
        ):
            (other / "second").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["first"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_planted_beside_a_folder_is_never_followed(tmp_path, monkeypatch):
    """At the name that earlier versions used, at that of the temporary folder, of the lock, and at
    the output itself."""
    other, path = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    (other / "file").write_text("somebody's")
    for name in (".out.partial", ".out.lock", "out"):
        (tmp_path / name).symlink_to(other / "file" if "lock" in name else other)
    tokens = iter(["planted", "free", "before"])
    monkeypatch.setattr(storage.secrets, "token_hex", lambda n: next(tokens))
    storage._unused(path).symlink_to(other)
    tokens = iter(["planted", "free", "before"])
    with storage.new_folder(path, overwrite=True) as partial:
        assert "free" in partial.name
        (partial / "new").write_text("ours")
    assert os.listdir(other) == ["file"] and (other / "file").read_text() == "somebody's"
    assert not path.is_symlink() and os.listdir(path) == ["new"]


def test_the_folder_before_stays_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "out"
    with storage.new_folder(path) as partial:
        (partial / "old").touch()
    replace = os.replace

    def fail_for_new(source, target):
        if (source / "new").exists() and target == path:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(storage, "_renameat2", lambda *_: errno.ENOSYS)
    monkeypatch.setattr(storage.os, "replace", fail_for_new)
    with pytest.raises(OSError), storage.new_folder(path, overwrite=True) as partial:
        (partial / "new").touch()
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["out"]


# Writes "new" instead of "old", and is killed before each of the calls that change files.
KILLED = """
import os, pathlib, sys
from torture_process import Process, Writes
from medsiglip_jax import cli
from medsiglip_jax.files import storage

root = pathlib.Path(sys.argv[1])

def write(name, content):
    if name == "file":
        with storage.new_file(root / name) as partial:
            partial.write_text(content)
    else:
        with storage.new_folder(root / name, overwrite=True) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "x").write_text(content)

def read(name):
    return (root / name if name == "file" else root / name / "sub" / "x").read_text()

cli.main = lambda command: write(*command) or 0
if sys.argv[2] == "two steps":
    storage._renameat2 = lambda *_: 38
for name in ("file", "folder"):
    write(name, "old")
    Process([name, "new"], counted := Writes(root)).wait()
    calls, *_ = counted.told
    for number in range(1, calls + 1):
        write(name, "old")
        code, text = Process([name, "new"], Writes(root, number)).wait()
        assert code == -9, (code, text)
        try:
            kept = read(name)
        except FileNotFoundError:
            kept = "hidden"
        try:
            storage.check_new(root / name)
        except FileExistsError:
            pass
        print(name, kept, read(name), *sorted(os.listdir(root)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("way", ["one step", "two steps"])
def test_a_writer_that_is_killed_anywhere_loses_nothing(tmp_path, way):
    """Neither where names are swapped in one step nor where that takes two; and whoever asks for
    the name next removes what was left."""
    scripts = Path(__file__).parents[2] / "scripts"
    paths = [os.environ.get("PYTHONPATH", ""), str(scripts), str(scripts.parent)]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), way], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    ends = [line.split() for line in run.stdout.splitlines()]
    assert len(ends) > 15
    for name, kept, later, *left in ends:
        two_steps = way == "two steps" and name == "folder"
        assert kept in ("old", "new", *["hidden"] * two_steps) and later in ("old", "new")
        assert left == (["file"] if name == "file" else ["file", "folder"])
    kinds = {kept for name, kept, *_ in ends if name == "folder"}
    can_swap = sys.platform == "linux" and way == "one step"
    assert kinds == ({"old", "new"} if can_swap else {"old", "new", "hidden"})


@pytest.mark.parametrize("can_rename", [True, False])
def test_an_exclusive_file_is_the_first_one(tmp_path, monkeypatch, can_rename):
    """It gets its name in one step where the system can, else it has two names for a moment."""
    if not can_rename:
        monkeypatch.setattr(storage, "_renameat2", lambda *_: errno.ENOSYS)
    elif sys.platform == "linux":
        monkeypatch.setattr(storage.os, "link", None)
    with storage.new_file(tmp_path / "a", exclusive=True) as partial:
        partial.write_text("first")
    with pytest.raises(FileExistsError), storage.new_file(tmp_path / "a", exclusive=True):
        pass
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_what_an_earlier_process_of_the_same_number_left_is_removed(tmp_path, monkeypatch):
    """In a container that is started again all processes have the numbers that they had."""
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_PROCESS", "0" * 4)
        storage._temporary(tmp_path / "a")
        storage._temporary(tmp_path / "a", folder=True)
    with storage.new_file(tmp_path / "a"), storage.new_file(tmp_path / "a"):
        assert len(os.listdir(tmp_path)) == 2  # those of this process
    assert os.listdir(tmp_path) == ["a"]


ELSEWHERE = """
import os, pathlib, sys
from medsiglip_jax.files import storage
number, kind, path = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
os.getpid = lambda: number
with storage.temporary(path, folder=kind == "folder") as partial:
    print(partial.name, flush=True)
    sys.stdin.read()
    (partial / "x" if kind == "folder" else partial).write_text("whole")
    os.replace(partial, path)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux")
@pytest.mark.parametrize("number", ["that of this process", "that of none"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_writer_in_a_container_with_this_host_name_keeps_what_it_writes(tmp_path, kind, number):
    """Its number says nothing: it is also that of another process here, or of none."""
    path = tmp_path / "out"
    pid = os.getpid() if number == "that of this process" else 1 << 22  # above the largest
    command = [sys.executable, "-c", ELSEWHERE, str(pid), kind, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as writer:
        name = writer.stdout.readline().strip()
        storage.remove_leftovers(path)
        assert os.listdir(tmp_path) == [name]
        writer.communicate()
    assert (path / "x" if kind == "folder" else path).read_text() == "whole"
    with subprocess.Popen(command, **pipes) as writer:
        name = writer.stdout.readline().strip()
        writer.kill()
    assert name in os.listdir(tmp_path)
    storage.remove_leftovers(path)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux")
def test_where_nothing_can_be_locked_all_stays(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_PROCESS", "0" * 4)
        left = storage._temporary(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", no_locks)
        with storage.new_file(tmp_path / "a") as partial:
            partial.write_text("whole")
        assert left.exists() and (tmp_path / "a").read_text() == "whole"
    storage.remove(tmp_path / "a")
    assert os.listdir(tmp_path) == []


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
