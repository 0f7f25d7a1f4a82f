"""What the devices are that a program runs on, or is compiled for."""

import re
from typing import Any

import jax

from medsiglip_jax.files import cpu

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


# How many times as fast products of bfloat16 are with float32 results as with bfloat16 ones, on two
# cores, jax 0.10.2: 2.3 in the image tower of So400m/448 on an Intel Xeon with AMX (both kinds in
# turns in `bench.py encode`, bfloat16, 2026-11-30; products alone 2 to 2.7), and 0.8 for products
# alone on an AMD EPYC Milan, which has neither of these.
_FAST = {"amx_bf16", "avx512_bf16"}


def wide_products(device: Any, dtype: str) -> bool:
    """Whether products of this element type are asked for in float32, and rounded afterwards.

    Both accumulate in float32, and the second rounds once, so that its numbers are the better ones.
    Which is faster on a CPU depends on whether the CPU multiplies in bfloat16 itself; elsewhere it
    is the same.
    """
    return device.platform == "cpu" and dtype == "bfloat16" and bool(_FAST & cpu.features())


# A train step of ViT-B/16, batch 8, float32, jax 0.10.2, two cores of an Intel Xeon with AMX, on
# 2026-11-30, without -> with both of the next two: 10.6 -> 9.6 s, the lower of two turns each, of
# which one was disturbed; 2,333 -> 2,117 MB of temporaries, as compiled. Not measured one by one.
def flat_gradients(device: Any) -> bool:
    """Whether gradients of products with a kernel are taken as products of two matrices.

    XLA flattens the product itself, but on CPUs not always its gradients: it transposes copies of
    activations and kernels for them, and takes a slower product for some. What that is worth on
    accelerators has not been measured.
    """
    return device.platform == "cpu"


def step_options(device: Any) -> dict[str, Any] | None:
    """What XLA is told when it compiles a train step.

    On CPUs XLA would copy both moments of AdamW before it overwrites them, because the update of
    the parameters reads them too; with the analysis that it makes on accelerators anyway, it orders
    the three instead.
    """
    if device.platform != "cpu":
        return None
    return {"xla_cpu_copy_insertion_use_region_analysis": True}
