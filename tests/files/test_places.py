"""Local paths and URIs, and which of them can be written."""

import os
import re
from pathlib import Path

import pytest

from medsiglip_jax.files import limits, places


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        places.check_writable(tmp_path / "file" / "out")
    places.check_writable(tmp_path / "not" / "yet" / "there")
    with pytest.raises(ValueError, match="only a local folder"):
        places.check_writable(Path("gs://bucket/out"))


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(PermissionError, match=f"no permission in {re.escape(str(tmp_path))}"):
        places.check_writable(tmp_path / "not" / "there")


def test_a_bucket_nobody_can_reach_is_one_line():
    with pytest.raises(ValueError, match="nowhere:// cannot be reached here"):
        places.at("nowhere://x/y")
    assert places.at("gs://x") != places.Path("gs:/x") and places.is_remote(places.Path("gs://x/y"))


def test_protocols_are_those_of_the_list():
    """Also those that fsspec knows and nobody has asked for, such as files in archives."""
    assert limits.PROTOCOLS == {"file", "local", "gs", "https", "http", "hf"}
    for protocol in ("s3", "ftp", "sftp", "zip", "github", "data", "simplecache"):
        with pytest.raises(
            places.NotAllowed, match=f"^{protocol}://h/x: .*--protocols {protocol} "
        ):
            places.at(f"{protocol}://u:pw@h/x")
        with pytest.raises(places.NotAllowed):
            places.read_bytes(f"{protocol}://h/x")
    with limits.use(limits.parse("zip, nonesuch://", None, None)):
        places.check_protocol("zip://x")
        with pytest.raises(places.NotReachable, match="Protocol not known: nonesuch"):
            places.check_protocol("nonesuch://x")
    with pytest.raises(places.NotAllowed):
        places.check_protocol("zip://x")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("s3;ftp", None, None), "--protocols s3;ftp"), ((None, 0, None), "max_bytes is 0"),
        ((None, None, 0.0), "timeout is 0.0"), ((None, None, float("nan")), "timeout is nan"),
    ],
)  # fmt: skip
def test_limits_that_are_none(given, said):
    with pytest.raises(ValueError, match=said):
        limits.parse(*given)


def test_what_is_given_as_a_uri(tmp_path):
    local = places.at(f"file://{tmp_path}/x")
    assert local == tmp_path / "x" and isinstance(local, type(tmp_path))
    assert str(places.at("memory:/a/b")) == str(places.at("memory://a/b")) == "memory://a/b"
    assert not places.is_remote(tmp_path) and places.is_remote("gs://bucket")


def test_no_test_reads_or_fills_the_cache_of_the_user(tmp_path_factory):
    assert places.cache().is_relative_to(tmp_path_factory.getbasetemp())


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


@pytest.mark.parametrize("name", [
    "", ".", "..", "../x", "a/b", r"a\b", "/etc/passwd", "C:x", ".hidden", "a\n", "a\0b", "x.",
    "x ", "CON", "nul.txt", "lpt1", "x" * 201, "é" * 101, "\u202etxt.exe", "gs://b", "*", "a:b", 3,
    None, ["a"],
])  # fmt: skip
def test_names_that_may_not_become_part_of_a_path(name):
    assert not places.is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["part-00000.parquet", "v1.0", "as given", "été", "-x", "a..b", "+"]
)
def test_names_that_may(name, tmp_path):
    assert places.is_plain_name(name) and places.below(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/passwd", r"..\x", "gs://b/x"])
@pytest.mark.parametrize("root", ["data", "/data", "memory://b/data"])
def test_paths_that_lead_out_of_a_folder(root, name):
    """Whatever the system's separator, and in buckets, too, where they are names like any other."""
    with pytest.raises(ValueError, match="leads out of .*data; expected a path below it"):
        places.below(places.at(root), name)


def test_paths_that_stay_in_a_folder(tmp_path):
    for name in ("a", "a/b", "./a", "a/../b", "..a/b", "a b", str(tmp_path / "a")):
        place = places.below(tmp_path, name)
        assert os.path.realpath(place) == os.path.realpath(tmp_path / name)
    assert str(places.below(places.at("memory://b/data"), "x/y")) == "memory://b/data/x/y"
