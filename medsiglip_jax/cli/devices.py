"""What the commands set for JAX before it starts, which is not for a library to set.

Each is an environment variable that JAX reads; one that the user has set stays.
"""

import contextlib
import os
import pkgutil
import sys
from glob import glob
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from medsiglip_jax.files import places

_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
_CACHE = "jax._src.compilation_cache"
_TPU = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def prepare() -> None:
    """Sets what is not set; without effect once JAX is imported."""
    if "jax" in sys.modules:
        return
    gpu = any(map(os.path.exists, _NVIDIA))
    tpu = find_spec("libtpu") is not None and any(map(glob, _TPU))
    settings = {}
    if gpu:
        from medsiglip_jax.plan import gpus

        settings["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(gpus.FRACTION)
    with contextlib.suppress(RuntimeError):  # a user without a home
        settings["JAX_COMPILATION_CACHE_DIR"] = _folder()
    # A start needs 20 to 40 programs, most of which compile in 20 to 300 ms.
    settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if platforms := _platforms(gpu, tpu):
        settings["JAX_PLATFORMS"] = platforms
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    sys.meta_path.insert(0, _OurCache())


def prepare_worker() -> None:
    """Gives our compilation cache to a process that has the environment of a command and has
    imported jax, but compiled nothing: an actor of Ray."""
    with contextlib.suppress(ModuleNotFoundError):
        keep_programs(import_module(_CACHE))


class _OurCache:
    """Gives jax our compilation cache when it is imported, which commands without it never do.

    jax has no public place for one. Where a later version has it elsewhere, its own stays.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _CACHE:
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(fullname)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: Any) -> None:
            execute(module)
            keep_programs(module)

        spec.loader.exec_module = execute_and_replace
        return spec


def keep_programs(module: Any) -> None:
    """Makes jax's module of the persistent compilation cache keep programs in ours."""
    theirs = getattr(module, "get_file_cache", None)

    def open_cache(folder: str) -> Any:
        from jax import config

        from medsiglip_jax.files.compilation_cache import MOST, CompilationCache

        if theirs and places.is_remote(folder):
            return theirs(folder)
        most = getattr(config, "jax_compilation_cache_max_size", -1)
        cache = CompilationCache(folder, MOST if most < 0 else most, own=_is_own(folder))
        return cache, folder

    module.get_file_cache = open_cache


def _folder() -> str:
    return str(places.cache() / "compiled")


def _is_own(folder: str) -> bool:
    try:
        return os.path.abspath(folder) == os.path.abspath(_folder())
    except RuntimeError:  # a user without a home
        return False


def _platforms(gpu: bool, tpu: bool) -> str:
    """The platforms that are here, if jax would try others, at length and with complaints: a
    compiler that is installed for `plan` also looks for its device. "" leaves the choice to jax."""
    installed = _plugins()
    cuda = {name for name in installed if name.startswith("xla_cuda")}
    libtpu = find_spec("libtpu") is not None
    missing = (cuda and not gpu) or (libtpu and not tpu)
    if installed - cuda or not missing:  # other plugins know their own devices
        return ""
    return ",".join(["cuda"] * bool(cuda and gpu) + ["tpu"] * tpu + ["cpu"])


def _plugins() -> set[str]:
    """The names of the plugins that jax will find."""
    plugins = find_spec("jax_plugins")
    folders = (plugins and plugins.submodule_search_locations) or ()
    return {module.name for module in pkgutil.iter_modules(list(folders))}
