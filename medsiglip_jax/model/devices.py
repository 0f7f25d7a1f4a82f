"""What the devices are that a program runs on, or is compiled for."""

import re
from typing import Any

import jax

AUTO = "auto"


def default() -> Any:
    """The device on which this process computes, unless it is told otherwise."""
    chosen = getattr(jax.config, "jax_default_device", None)
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen or jax.local_devices()[0]


def capability(device: Any) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU, such as (9, 0); None for other devices."""
    found = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return (int(found[1]), int(found[2])) if found else None


def auto_dtype(device: Any) -> str:
    """What the dtype "auto" means: bfloat16 on accelerators that multiply in it, else float32.

    An NVIDIA GPU from before 2020 (capability below 8.0) has float16, in which large activations
    overflow: float32.
    """
    old = (capability(device) or (8, 0)) < (8, 0)
    return "float32" if device.platform == "cpu" or old else "bfloat16"
