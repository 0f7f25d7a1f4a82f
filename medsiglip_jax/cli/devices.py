"""What the commands set for JAX before it starts, which is not for a library to set.

Each is an environment variable that JAX reads; one that the user has set stays.
"""

import os
import pkgutil
import sys
from glob import glob
from importlib.util import find_spec

from medsiglip_jax.files import places

_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
_TPU = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def prepare() -> None:
    """Sets what is not set; without effect once JAX is imported."""
    if "jax" in sys.modules:
        return
    from medsiglip_jax.plan import gpus

    gpu = any(map(os.path.exists, _NVIDIA))
    tpu = find_spec("libtpu") is not None and any(map(glob, _TPU))
    settings = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(gpus.FRACTION)} if gpu else {}
    if gpu or tpu:  # a second start need not compile again
        settings["JAX_COMPILATION_CACHE_DIR"] = str(places.cache() / "compiled")
    if platforms := _platforms(gpu, tpu):
        settings["JAX_PLATFORMS"] = platforms
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _platforms(gpu: bool, tpu: bool) -> str:
    """The platforms that are here, if jax would try others, at length and with complaints: a
    compiler that is installed for `plan` also looks for its device. "" leaves the choice to jax."""
    found = _plugins()
    cuda = {name for name in found if name.startswith("xla_cuda")}
    libtpu = find_spec("libtpu") is not None
    missing = (cuda and not gpu) or (libtpu and not tpu)
    if found - cuda or not missing:  # other plugins know their own devices
        return ""
    return ",".join(["cuda"] * bool(cuda and gpu) + ["tpu"] * tpu + ["cpu"])


def _plugins() -> set[str]:
    """The names of the plugins that jax will find."""
    plugins = find_spec("jax_plugins")
    folders = (plugins and plugins.submodule_search_locations) or ()
    return {module.name for module in pkgutil.iter_modules(list(folders))}
