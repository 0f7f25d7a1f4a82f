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


def test_what_the_user_has_set_stays(prepared):
    assert not prepared(plugins=CUDA, JAX_PLATFORMS="cuda")
    chosen = {"JAX_COMPILATION_CACHE_DIR": "mine", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    assert not prepared(gpu=True, **chosen)


def test_accelerators_keep_their_programs_and_gpus_give_their_memory(prepared):
    found = prepared(gpu=True, XDG_CACHE_HOME="/c")
    assert found["JAX_COMPILATION_CACHE_DIR"] == os.path.join("/c", "medsiglip_jax", "compiled")
    assert found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == str(gpus.FRACTION)
    assert set(prepared(tpu=True, libtpu=True)) == {"JAX_COMPILATION_CACHE_DIR"}
    assert not prepared()


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
