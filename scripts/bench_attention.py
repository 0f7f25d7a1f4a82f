"""Attention back ends, compiled for a TPU or GPU that need not be present: memory, bytes moved."""

import json
import subprocess
import sys

import measure

WAYS = ("forward", "none", "dots", "block")  # without a gradient, and with each remat policy


def add_parsers(commands) -> None:
    sub = commands.add_parser(
        "attention", help="attention for TPUs (needs libtpu) or GPUs (needs jax[cuda12]), compiled"
    )
    sub.add_argument("--topology", default="v5e:1x1", help="one device: v5e:1x1 (default), h100")
    sub.add_argument("--images", type=int, default=16, help="batch size (default 16)")
    sub.add_argument("--depth", type=int, default=2, help="blocks of So400m/14 at 448 px (2)")
    sub.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    sub.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="default all")
    sub.add_argument("--names", nargs="+", help="back ends; default xla and the one by default")
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sub.set_defaults(run=attention)


def attention(args) -> dict:
    """Compiles each variant with both back ends, in a process that sees no device."""
    from medsiglip_jax.plan import topologies, worker

    topology = topologies.parse(args.topology)
    topology.check_installed()
    names = args.names or ("xla", "cudnn" if topology.unit == "card" else "splash")
    rows = []
    for way in args.ways:
        row = {"way": way}
        for name in names:
            asked = [args.topology, str(args.images), str(args.depth), args.dtype, way, name]
            done = subprocess.run(
                [sys.executable, __file__, *asked], env=worker.environment(topology),
                check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            row[name] = json.loads(done.stdout.splitlines()[-1])
        measure.progress(f"{args.topology} {way}: {row}")
        rows.append(row)
    asked = {key: getattr(args, key) for key in ("topology", "images", "depth", "dtype")}
    return {**asked, "unit": "bytes", "rows": rows}


def one(topology: str, images: str, depth: str, dtype: str, way: str, name: str) -> dict:
    """Compiles one variant in this process."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from medsiglip_jax.model import towers
    from medsiglip_jax.model.config import VisionConfig
    from medsiglip_jax.plan import topologies

    place = SingleDeviceSharding(topologies.parse(topology).compiler_devices()[0])
    config = VisionConfig(448, 14, 1152, int(depth), 4304, 16)
    precision = "highest" if dtype == "float32" else "default"
    compute = towers.Compute(dtype, precision, name, "none" if way == "forward" else way)
    blocks = towers.Encoder(config, compute)
    shape = (int(images), config.num_tokens, config.width)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    params = jax.eval_shape(lambda x: blocks.init(jax.random.key(0), x), x)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place), params)

    def loss(params, x):
        return jnp.mean(blocks.apply(params, x).astype(jnp.float32) ** 2)

    work = blocks.apply if way == "forward" else jax.grad(loss, argnums=(0, 1))
    with jax.default_matmul_precision(precision):
        program = jax.jit(work).lower(params, x).compile()
    moved = (program.cost_analysis() or {}).get("bytes accessed")  # not known for GPUs
    return {"temporaries": program.memory_analysis().temp_size_in_bytes, "bytes_moved": moved}


if __name__ == "__main__":
    print(json.dumps(one(*sys.argv[1:])))
