"""What holds on systems that are not here: Windows and macOS."""

import ast
import errno
import os
from collections.abc import Iterator

import pytest
import source_files

from medsiglip_jax.files import storage

POSIX = {"fcntl", "grp", "pwd", "resource", "termios"}


def imported_at_once(code: str) -> Iterator[str]:
    """The modules that code imports when it is itself imported: outside functions."""
    nodes: list[ast.AST] = [ast.parse(code)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)


def test_every_module_imports_without_what_only_posix_has():
    code = "try:\n    import pwd\nexcept ImportError:\n    pass\ndef f():\n    import grp"
    assert list(imported_at_once(code)) == ["pwd"]
    for path, text in source_files.texts().items():
        assert not POSIX & set(imported_at_once(text)), path


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
def test_writers_commit_where_a_folder_cannot_be_synced(tmp_path, monkeypatch, number):
    real_open, real_sync = os.open, os.fsync

    def open_file(path, flags, *args, **kwargs):
        if number == errno.EACCES and os.path.isdir(path):  # Windows
            raise PermissionError(number, os.strerror(number), str(path))
        return real_open(path, flags, *args, **kwargs)

    def sync(descriptor):
        if number == errno.EINVAL and os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))  # some network disks
        real_sync(descriptor)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync)
    with storage.new_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    with storage.new_folder(tmp_path / "folder") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert (tmp_path / "folder" / "sub" / "file").read_text() == "whole"


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    def sync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="Input/output"), storage.new_file(tmp_path / "f") as partial:
        partial.write_text("whole")
    assert os.listdir(tmp_path) == []
