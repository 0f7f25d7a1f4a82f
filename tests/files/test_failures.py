"""Whatever fails on a file is one line that names it, and of the right kind."""

import errno
import re
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow
import pytest
from safetensors import SafetensorError

import medsiglip_jax
from medsiglip_jax.cli import app
from medsiglip_jax.files import arrays, documents, failures, storage
from medsiglip_jax.model import config


@pytest.mark.parametrize("error, says", [
    (KeyError("x"), "PATH: not a thing (it lacks 'x'); try another"),
    (RecursionError("maximum depth"), "PATH: not a thing (nested too deeply); try another"),
    (SafetensorError("bad\nheader"), "PATH: not a thing (bad header); try another"),
    (pyarrow.ArrowNotImplementedError("no"), "PATH: not a thing (no); try another"),
    (OSError("truncated file"), "PATH: not a thing (truncated file); try another"),
    (zipfile.BadZipFile(""), "PATH: not a thing (BadZipFile); try another"),
    (ValueError("PATH: known"), "PATH: known"),
    (ValueError("x" * 9999), f"PATH: not a thing ({'x' * 300}…); try another"),
])  # fmt: skip
def test_content_is_at_fault_in_one_line(error, says):
    with (
        pytest.raises(ValueError) as caught,
        failures.explained("PATH", "not a thing", "try another"),
    ):
        raise error
    assert str(caught.value) == says


@pytest.mark.parametrize("error", [
    FileNotFoundError("gone"), OSError(errno.ENOSPC, "full"), MemoryError(), KeyboardInterrupt(),
    ModuleNotFoundError("no module"), PermissionError("no"), TimeoutError(errno.ETIMEDOUT, "late"),
])  # fmt: skip
def test_the_machine_is_not_taken_for_content(error):
    with pytest.raises(type(error)) as caught, failures.explained("PATH", "not a thing"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [
    ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: No space left on device]"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
    OSError("Error writing bytes: No space left on device"),
    OSError(errno.ENOSPC, "No space left on device"),
])  # fmt: skip
def test_a_full_disk_is_the_machine_whatever_a_library_calls_it(tmp_path, error):
    with pytest.raises(OSError) as caught, storage.new_folder(tmp_path / "out"):
        raise error
    code, line = app._explained(caught.value)
    assert (code, line) == (1, f"{tmp_path / 'out'}: No space left on device")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["huggingface", "big_vision"])
def test_a_disk_that_is_full_while_weights_are_written(tmp_path, monkeypatch, format):
    """The limit on the size of files stands for the disk; every writer of weights meets it."""
    small = config.two_towers(
        image_size=28, patch_size=14, width=64, depth=1, mlp_dim=64, num_heads=2, vocab_size=64
    )
    model = medsiglip_jax.init(small)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep the first bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            medsiglip_jax.save(model, tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    code, line = app._explained(caught.value)
    assert (code, line) == (1, f"{tmp_path / 'out'}: File too large")
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_full_while_orbax_writes(checkpoint, tmp_path):
    """In a process of its own: orbax leaves tasks behind, which complain in the tests after it."""
    limited = (  # without bytecode, of which Python would keep the first bytes as a whole file
        "import resource, sys; sys.dont_write_bytecode = True; from medsiglip_jax import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = ["convert", str(checkpoint), str(tmp_path / "out"), "--format", "orbax"]
    done = subprocess.run([sys.executable, "-c", limited, *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"medsiglip-jax convert: {tmp_path / 'out'}: File too large\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_full_while_a_checkpoint_is_written(tmp_path):
    """One line: hundreds of arrays fail, in threads of orbax, asyncio and TensorStore."""
    limited = (
        "import functools, resource, sys; from dataclasses import replace\n"
        "sys.dont_write_bytecode = True\n"
        "from medsiglip_jax import cli; from medsiglip_jax.train import quickstart as q\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "few = replace(q.QuickstartSettings(), total_steps=4, warmup_steps=2)\n"
        "q.run = functools.partial(q.run, settings=few)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "quickstart", "--workdir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if "step/s]" not in line and line]
    folder = tmp_path / "out" / "training" / "checkpoints"
    assert lines == [
        f"medsiglip-jax quickstart: {folder}: no space left for a checkpoint (File too large); the "
        "earlier ones are intact, and the same command resumes from them"
    ]


def test_documents_are_tables_of_limited_depth():
    for text in ("[]", "3", "null", "", "{", "[" * 100_000, '{"a":' + "[" * 60 + "]" * 60 + "}"):
        with pytest.raises(ValueError):
            documents.parse(text)
    for text in ("a", "a = " + "[" * 100_000, "a = " + "[" * 60 + "]" * 60):
        with pytest.raises(ValueError):
            documents.parse_toml(text)
    assert documents.parse(b'{"a": [1]}') == documents.parse_toml("a = [1]") == {"a": [1]}


def test_a_damaged_line_in_the_middle_is_told_and_a_cut_one_at_the_end_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in storage.read_lines(path, step=int)] == [1, 2]
    for damage in ('{"st', "[]", "\0\0", '{"step": "2"}', '{"step": true}', "{}"):
        path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match=rf"^{path}, line 2: .*; remove that line$"):
            storage.Lines(path, step=int)
        assert path.read_text().endswith('{"step": 3}\n')


# ------------------------------------------------------------------------------------ arrays


def write(path, members, compression=zipfile.ZIP_DEFLATED):
    """An .npz of (name, header, bytes)."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, (shape, dtype), data in members:
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.write(data)
    return path


def headers(path):
    with failures.explained(path, "not arrays"), arrays.opened(path) as file:
        return {name: header.shape for name, header in file.headers.items()}


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    made = {"a": np.arange(6.0).reshape(2, 3), "b": np.array("text"), "c": np.zeros((0, 2), "V2"),
            "d": np.asfortranarray(np.ones((2, 3)))}  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **made)
        with arrays.opened(tmp_path / "a.npz") as file:
            for name, value in made.items():
                np.testing.assert_array_equal(file.read(name), value)
            with pytest.raises(KeyError):
                file.read("e")


@pytest.mark.parametrize("member, says", [
    (((10,), "<f8"), "has 8 bytes, and its header says"),
    (((10**9, 10**9), "<f8"), "has 8 bytes, and its header says"),
    (((-1,), "<f8"), "its header says|has the shape"),
    (((1,), "|O"), "a holds pickled objects, which could run code and are not read"),
])  # fmt: skip
def test_headers_that_lie_are_found_before_anything_is_read(tmp_path, member, says):
    path = write(tmp_path / "a.npz", [("a", member, bytes(8))])
    with pytest.raises(ValueError, match=says):
        headers(path)


def test_what_unpacks_to_far_more_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_HARMLESS", 1 << 20)
    whole = (1 << 21,), "|u1"
    bomb = write(tmp_path / "bomb.npz", [("a", whole, bytes(1 << 21))])
    many = [(f"a{i}", (whole[0][0] // 8, "|u1"), bytes(1 << 18)) for i in range(8)]
    many = [(name, ((1 << 18,), "|u1"), data) for name, _, data in many]
    for path in (bomb, write(tmp_path / "many.npz", many)):
        with pytest.raises(ValueError, match="would unpack to 2,097,152"):
            headers(path)
    noise = np.random.default_rng(0).integers(256, size=1 << 21, dtype=np.uint8)
    assert headers(write(tmp_path / "ok.npz", [("a", whole, noise.tobytes())])) == {"a": whole[0]}


def test_members_that_share_bytes_are_refused(tmp_path):
    path = write(tmp_path / "a.npz", [("a", ((1000,), "|u1"), bytes(1000))], zipfile.ZIP_STORED)
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry, tail = data[start:end], bytearray(data[end:])
    more = entry.replace(b"a.npy", b"b.npy")
    tail[8:12] = (2).to_bytes(2, "little") * 2
    tail[12:16] = (2 * len(entry)).to_bytes(4, "little")
    path.write_bytes(data[:start] + entry + more + bytes(tail))
    with pytest.raises(ValueError, match="overlap"):
        headers(path)
