"""`python -m medsiglip_jax.plan.worker`: one request on stdin, one answer on stdout, as JSON.

Its environment is `environment()`: CPU only, no question to a metadata server, no lock on libtpu.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def environment() -> dict[str, str]:
    """For the process that loads libtpu; this one's stays as it is."""
    about_tpus = ("TPU_", "LIBTPU_", "MEGASCALE_")
    return {
        **{name: x for name, x in os.environ.items() if not name.startswith(about_tpus)},
        "JAX_PLATFORMS": "cpu",
        # One CPU device is enough; XLA_FLAGS may ask for more, or for flags libtpu does not know.
        "XLA_FLAGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # or libtpu looks for the machine's, and complains
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        # Nothing here runs on a TPU, so several plans may load libtpu, and beside a TPU's owner.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Has a process of its own answer, with `program.compiled`'s keys.

    Raises:
        ValueError: what is asked for cannot be.
        ModuleNotFoundError: libtpu is not installed.
        OSError: the compiler died.
    """
    check_libtpu()
    done = subprocess.run(
        [sys.executable, "-m", "medsiglip_jax.plan.worker"], input=json.dumps(request),
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise OSError(
            f"the compiler ended with exit code {done.returncode}, out of memory perhaps: {last}"
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def check_libtpu() -> None:
    """Raises ModuleNotFoundError, with what to install, where libtpu is missing."""
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "a plan compiles with libtpu, which is not installed; pip install "
            "'medsiglip-jax[plan]' (Linux; no TPU needed)"
        )


def main() -> None:
    request = json.load(sys.stdin)
    from medsiglip_jax.plan import program, topologies
    from medsiglip_jax.train import recipe

    try:
        answer = program.compiled(
            recipe.from_dict(request["recipe"]), topologies.parse(request["topology"]),
            request["embed"], request["limit_mib"],
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
