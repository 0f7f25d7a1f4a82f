"""What the commands set for JAX before it starts."""

import os
import subprocess
import sys

import pytest

from medsiglip_jax.cli import devices
from medsiglip_jax.plan import gpus


@pytest.fixture
def prepared(monkeypatch):
    """Runs `prepare` on a made-up machine -> the environment variables that it has set."""

    def call(gpu=False, tpu=False, plugins=(), libtpu=False, **environment):
        monkeypatch.setattr(os, "environ", dict(environment))
        monkeypatch.delitem(sys.modules, "jax", raising=False)
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        before = dict(environment)
        there = {*(devices._NVIDIA if gpu else ()), *(devices._TPU if tpu else ())}
        monkeypatch.setattr(devices.os.path, "exists", there.__contains__)
        monkeypatch.setattr(devices, "glob", lambda pattern: [pattern] * (pattern in there))
        monkeypatch.setattr(devices, "_plugins", lambda: set(plugins))
        monkeypatch.setattr(devices, "find_spec", lambda name: libtpu or None)
        devices.prepare()
        return {name: x for name, x in os.environ.items() if before.get(name) != x}

    return call


CUDA = {"xla_cuda12"}


@pytest.mark.parametrize("machine, platforms", [
    ({}, None),
    ({"plugins": CUDA}, "cpu"), ({"libtpu": True}, "cpu"),  # of the extras of `plan`
    ({"plugins": CUDA, "libtpu": True}, "cpu"),
    ({"plugins": CUDA, "gpu": True}, None), ({"libtpu": True, "tpu": True}, None),
    ({"plugins": CUDA, "libtpu": True, "gpu": True}, "cuda,cpu"),
    ({"plugins": CUDA, "libtpu": True, "tpu": True}, "tpu,cpu"),
    ({"plugins": CUDA | {"rocm"}}, None),  # which knows its own devices
])  # fmt: skip
def test_a_compiler_for_plan_does_not_look_for_a_device(machine, platforms, prepared):
    assert prepared(**machine).get("JAX_PLATFORMS") == platforms


KEPT = {"JAX_COMPILATION_CACHE_DIR": "mine", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "9"}


def test_what_the_user_has_set_stays(prepared):
    assert not prepared(plugins=CUDA, JAX_PLATFORMS="cuda", **KEPT)
    assert not prepared(gpu=True, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", **KEPT)


def test_all_programs_are_kept_and_gpus_give_their_memory(prepared):
    found = prepared(XDG_CACHE_HOME="/c")
    assert found["JAX_COMPILATION_CACHE_DIR"] == os.path.join("/c", "medsiglip_jax", "compiled")
    assert found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert set(found) == set(KEPT) == set(prepared(tpu=True, libtpu=True))
    share = prepared(gpu=True)["XLA_PYTHON_CLIENT_MEM_FRACTION"]
    assert share == str(gpus.FRACTION)


def test_a_user_without_a_home_compiles_each_time(prepared, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(devices.places.Path, "home", homeless)
    assert "JAX_COMPILATION_CACHE_DIR" not in prepared()


COMPUTE = """
from medsiglip_jax.cli import devices
devices.prepare()
import jax, jax.numpy as jnp
x = jnp.arange(12.0).reshape(3, 4)
def first(x): return jnp.sin(x) @ x.T
def second(x): return jnp.cumsum(x * 3, axis=0)
def third(x): return jnp.exp(x - x.max())
print(*(jax.jit(f)(x).tobytes().hex() for f in (first, second, third)))
"""


def test_a_second_start_compiles_nothing_again_and_damage_does_no_harm(tmp_path, monkeypatch):
    """Whatever is compiled is written, as a new file: one that stays was read."""
    for name in KEPT:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "medsiglip_jax" / "compiled"

    def start() -> tuple[str, dict[str, int]]:
        command = [sys.executable, "-W", "error", "-c", COMPUTE]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout, {file.name: file.stat().st_ino for file in folder.iterdir()}

    numbers, written = start()
    assert all(name.endswith(".medsiglip-jax") for name in written)  # by our cache, not by jax's
    names = "first", "second", "third"
    (cut,), (flipped,), (_,) = (folder.glob(f"jit_{name}-*") for name in names)
    cut.write_bytes(cut.read_bytes()[:-100])
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 64
    flipped.write_bytes(data)
    again, mended = start()
    changed = {name for name in mended if mended[name] != written.get(name)}
    assert again == numbers and changed == {cut.name, flipped.name}


def test_a_jax_without_that_module_starts_as_it_is(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    hook = devices._OurCache()
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    assert hook.find_spec("jax._src.compilation_cache") is None and hook not in sys.meta_path


def test_what_jax_left_counts_in_the_folder_of_the_commands_only(tmp_path, monkeypatch):
    from jax._src import compilation_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
    devices.prepare_worker()
    for folder, own in ((tmp_path / "medsiglip_jax" / "compiled", True), (tmp_path, False)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jit_f-0a-cache").touch()
        os.truncate(folder / "jit_f-0a-cache", 2 << 30)  # more than is kept
        compilation_cache.get_file_cache(str(folder))[0].put("jit_f", b"x")
        assert (folder / "jit_f-0a-cache").exists() != own


def test_nothing_is_set_once_jax_has_started(monkeypatch):
    monkeypatch.setattr(devices.os.path, "exists", lambda path: True)
    before = dict(os.environ)
    devices.prepare()
    assert dict(os.environ) == before


def test_commands_are_prepared_before_jax_is_imported():
    code = (
        "import sys\n"
        "from medsiglip_jax.cli import app, devices\n"
        "devices.prepare = lambda: print('jax' in sys.modules)\n"
        "app.main(['info', 'nothing'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
