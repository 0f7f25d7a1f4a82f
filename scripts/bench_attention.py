"""Attention back ends, compiled for a TPU that need not be present: memory and bytes moved."""

import json
import subprocess
import sys

import measure

DEPTH, TOKENS, WIDTH, HEADS, MLP = 2, 1024, 1152, 16, 4304  # two blocks of So400m/14 at 448 px
WAYS = ("forward", "none", "dots", "block")  # without a gradient, and with each remat policy


def add_parsers(commands) -> None:
    sub = commands.add_parser("attention", help="attention for TPUs, compiled (needs libtpu)")
    sub.add_argument("--topology", default="v5e:1x1", help="topology of one chip (default v5e:1x1)")
    sub.add_argument("--images", type=int, default=16, help="batch size (default 16)")
    sub.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="default all")
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sub.set_defaults(run=attention)


def attention(args) -> dict:
    """Compiles each variant with both back ends, in a process that sees no TPU."""
    from medsiglip_jax.plan import worker

    worker.check_libtpu()
    rows = []
    for way in args.ways:
        row = {"way": way}
        for name in ("xla", "splash"):
            done = subprocess.run(
                [sys.executable, __file__, args.topology, str(args.images), way, name],
                env=worker.environment(), check=True, capture_output=True, text=True,
            )  # fmt: skip
            row[name] = json.loads(done.stdout.splitlines()[-1])
        for key in row["xla"]:
            row[f"{key}_ratio"] = row["xla"][key] / row["splash"][key]
        measure.progress(f"{args.topology} {way}: {row}")
        rows.append(row)
    return {"topology": args.topology, "images": args.images, "unit": "bytes", "rows": rows}


def one(topology: str, images: int, way: str, name: str) -> dict[str, int]:
    """Compiles one variant in this process."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from medsiglip_jax.model import towers
    from medsiglip_jax.plan import program, topologies

    place = SingleDeviceSharding(program._devices(topologies.parse(topology))[0])
    remat = "none" if way == "forward" else way
    compute = towers.Compute("bfloat16", "default", name, remat)
    blocks = towers.Encoder(DEPTH, HEADS, MLP, compute)
    x = jax.ShapeDtypeStruct((images, TOKENS, WIDTH), jnp.bfloat16, sharding=place)
    params = jax.eval_shape(lambda x: blocks.init(jax.random.key(0), x), x)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place), params)

    def loss(params, x):
        return jnp.mean(blocks.apply(params, x).astype(jnp.float32) ** 2)

    work = blocks.apply if way == "forward" else jax.grad(loss, argnums=(0, 1))
    program_ = jax.jit(work).lower(params, x).compile()
    return {
        "temporaries": program_.memory_analysis().temp_size_in_bytes,
        "bytes_moved": int(program_.cost_analysis()["bytes accessed"]),
    }


if __name__ == "__main__":
    chip, count, *rest = sys.argv[1:]
    print(json.dumps(one(chip, int(count), *rest)))
