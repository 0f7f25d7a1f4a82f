"""Folders of images, local and remote."""

import fsspec
import pytest
from image_files import FILES, put


@pytest.fixture(autouse=True)
def memory():
    """An empty file system in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    return f"{tmp_path}/place" if request.param == "local" else "memory://bucket/place"


@pytest.fixture
def folder(place):
    """The images, among things that are none of them."""
    noise = {".hidden.png": b"x", "sub/.git/d.png": b"x", "notes.md": b"x", "list.csv": b"id\n1\n"}
    for name, content in {**FILES, **noise}.items():
        put(f"{place}/{name}", content)
    return place
