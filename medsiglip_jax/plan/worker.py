"""`python -m medsiglip_jax.plan.worker`: a request on stdin, the answer on stdout, in JSON.

It runs in the environment that `environment()` makes: no device of this machine, no question to a
metadata server, no lock on libtpu. It ends when its parent does, however that ends.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from medsiglip_jax.files.documents import loads
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.plan.topologies import Topology


def environment(topology: Topology) -> dict[str, str]:
    """The environment of the process that loads a compiler; that of this process stays as it is."""
    # About TPUs; and a cache of programs for devices that are here.
    dropped = ("TPU_", "LIBTPU_", "MEGASCALE_", "JAX_COMPILATION_CACHE_DIR")
    return {
        **{name: x for name, x in os.environ.items() if not name.startswith(dropped)},
        **topology.environment,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }


def ask(request: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """Compiles in a process of its own; returns what `program.compiled` does.

    Raises:
        ValueError: the request is for something impossible.
        ModuleNotFoundError: the compiler is not installed.
        OSError: the compiler died.
    """
    topology.check_installed()
    command = [sys.executable, "-m", "medsiglip_jax.plan.worker"]
    done = run_child(command, dumps(request), environment(topology))
    try:
        answer = loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise OSError(
            f"the compiler ended with exit code {done.returncode}, perhaps out of memory: {last}"
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def run_child(
    command: Sequence[str], line: str, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a child that calls `read_request`: it gets `line` on stdin, and ends with this process.

    The pipe stays open until the child has answered. The system closes it when this process ends,
    by kill -9, too, and the child reads the end of the file.
    """
    read_end, write_end = os.pipe()
    try:
        with subprocess.Popen(
            command, stdin=read_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=dict(env),
        ) as child:  # fmt: skip
            os.close(read_end)
            with (
                contextlib.suppress(BrokenPipeError),  # it has died, and its exit code says more
                open(write_end, "w", encoding="utf-8", closefd=False) as pipe,
            ):
                pipe.write(line + "\n")
            out, err = child.communicate()
            return subprocess.CompletedProcess(command, child.returncode, out, err)
    finally:
        os.close(write_end)


def read_request() -> str:
    """In a child of `run_child`: the line it was given. Afterwards the child ends with its parent.

    Works while a compiler runs, for XLA compiles without holding Python's lock.
    """
    line = sys.stdin.readline()

    def wait_for_end() -> None:
        os.read(sys.stdin.fileno(), 1)  # unbuffered, or the interpreter could not shut down
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
    return line


def main() -> None:
    request = loads(read_request())
    from medsiglip_jax.plan import program, topologies
    from medsiglip_jax.train import recipe

    try:
        answer = program.compiled(
            recipe.from_dict(request["recipe"]), topologies.from_dict(request["topology"]),
            request["dtype"], request["embed"], request["limit_mib"],
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        answer = {"error": str(error)}
    print(dumps(answer))


if __name__ == "__main__":
    main()
