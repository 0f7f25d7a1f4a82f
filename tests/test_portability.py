"""What holds on systems that are not here: Windows and macOS."""

import errno
import os
import subprocess
import sys

import pytest

from medsiglip_jax.files import storage

POSIX = ["fcntl", "grp", "pwd", "resource", "termios"]


def test_every_module_imports_without_what_only_posix_has():
    code = (
        "import importlib, pkgutil, sys, medsiglip_jax\n"
        # Other packages bring their own ways to do without; this is about ours.
        "import jax, flax.linen, pyarrow.parquet, fsspec, upath, sentencepiece, huggingface_hub\n"
        f"for name in {POSIX}: sys.modules[name] = None\n"
        "for module in pkgutil.walk_packages(medsiglip_jax.__path__, 'medsiglip_jax.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
