"""Who embeds: this process, the actors of a Ray cluster, or the parts of a batch system."""

import argparse
import functools
import re
from typing import Any

from medsiglip_jax.cli import devices, loading
from medsiglip_jax.cli.parser import Parser, add_flags, given

_FLAGS = {
    "--part I/N": "embed part I of N, counted from 0, of a Slurm array or an indexed job, such as "
    "$SLURM_ARRAY_TASK_ID/64 or $JOB_COMPLETION_INDEX/64; the parts need no contact, and the last "
    "to finish writes the manifest",
    "--runner NAME": "who embeds: local is this process, ray are actors that hold the model and "
    "are replaced when they are lost (pip install 'medsiglip-jax[ray]'); default %(default)s",
    "--address A": "address of a Ray cluster, such as auto on one of its hosts; by default one is "
    "started on this machine",
    "--actors N": "largest number of actors, for which a cluster that scales by demand grows; by "
    "default what the cluster has room for",
    "--actor-resources R": "what an actor reserves, such as GPU=1,CPU=8; by default a GPU and its "
    "share of the CPUs, or a whole host where there are none",
}
_OF_RAY = ("address", "actors", "actor_resources")
_OF_OTHERS = ("distributed", "coordinator", "processes", "process_id", "part")


def add_runners(sub: Parser) -> None:
    """Flags of `runner` and `part`."""
    group = sub.add_argument_group("several machines")
    names = {"default": "local", "choices": ("local", "ray")}
    add_flags(group, _FLAGS, runner=names, actors=int)


def part(args: argparse.Namespace) -> Any:
    """The `Share` of --part, or None without it.

    Raises:
        ValueError: it is none, or flags contradict each other.
    """
    from medsiglip_jax.inference import share

    others = given(args, _OF_OTHERS)
    if len(others) > 1 and "--part" in others:
        raise ValueError(
            f"--part cannot be used with {others[0]}: parts know nothing of each other"
        )
    if args.runner == "ray" and others:
        raise ValueError(f"--runner ray cannot be used with {others[0]}: its actors share the work")
    if args.runner != "ray" and (flags := given(args, _OF_RAY)):
        raise ValueError(f"{flags[0]} needs --runner ray")
    return None if args.part is None else share.parse(args.part)


def runner(args: argparse.Namespace) -> Any:
    """The `RayRunner` of --runner ray, or None without it. This process then leaves the
    accelerators to the actors.

    Raises:
        ValueError: a flag is wrong.
        ModuleNotFoundError: Ray is not installed.
    """
    if args.runner != "ray":
        return None
    import jax

    from medsiglip_jax.files import limits
    from medsiglip_jax.inference import ray_cluster, ray_runner

    ray_cluster.import_ray()
    if args.dtype == "auto":
        raise ValueError("--dtype auto cannot be used with --runner ray; name one, as all actors")
    if args.actors is not None and args.actors < 1:
        raise ValueError(f"--actors {args.actors}: expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    kept = {name: getattr(args, name) for name in loading.OF_MODELS}
    load = functools.partial(_load_in_actor, kept, limits.current())
    resources = _resources(args.actor_resources) if args.actor_resources else None
    size = args.batch_size or 0
    return ray_runner.RayRunner(load, args.address, args.actors, resources, size)


def _load_in_actor(flags: dict[str, Any], bounds: Any) -> Any:
    from medsiglip_jax.files import limits

    devices.prepare_worker()
    limits.keep(bounds)
    return loading.load(argparse.Namespace(**flags), loading.local_mesh())


def _resources(text: str) -> dict[str, float]:
    """Ray's resources from "GPU=1,CPU=8"."""
    resources = {}
    for item in text.split(","):
        match = re.fullmatch(r"([A-Za-z][\w-]*)=(\d+(?:\.\d+)?)", item.strip())
        if not match:
            raise ValueError(f"--actor-resources {text}: expected such as GPU=1,CPU=8")
        resources[match[1]] = float(match[2])
    if not any(resources.values()):
        raise ValueError(f"--actor-resources {text}: expected more than 0 of something")
    return resources
