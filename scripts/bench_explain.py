"""Integrated gradients beside forward passes of the same batch size; `bench.py explain` runs it.

python scripts/bench.py explain --size base-224
python scripts/bench.py explain --size so400m-448 --memory   # compiled, not run
"""

import resource
import statistics
import sys
import time
import warnings

import measure


def explain(args) -> dict:
    """How many forward passes a map takes, and the memory of the program that makes it."""
    import numpy as np

    from medsiglip_jax.model import api
    from medsiglip_jax.trust.maps import gradients, targets, tower

    model = api.init(args.size)
    rows = tower.Tower.of(model, args.batch)
    target = _target(model, targets)
    row = {"batch": rows.rows, "steps": args.steps, **_memory(rows, target)}
    if not args.memory:
        warnings.simplefilter("ignore")  # 16 steps may not be enough, and are what is timed
        image = np.random.default_rng(0).uniform(-1, 1, (rows.size, rows.size, 3))
        image = image.astype(np.float32)
        calls = {
            "forward": lambda: rows.embed([image] * rows.rows),
            "ig": lambda: gradients.integrate_evenly(rows, target, image, 1e9, args.steps),
        }
        times = measure.interleaved(calls, args.repeats)
        row["forward_seconds"] = measure.summary([t / rows.rows for t in times["forward"]])
        row["ig_seconds"] = measure.summary(times["ig"])
        medians = {name: statistics.median(values) for name, values in times.items()}
        row["forward_passes"] = round(medians["ig"] / medians["forward"] * rows.rows, 1)
    row["peak_resident_bytes"] = _peak()
    return {"repeats": args.repeats, "unit": "seconds an image", "rows": [row]}


def _target(model, targets):
    """A direction of the right size; texts would need a tokenizer."""
    import jax.numpy as jnp
    import numpy as np

    direction = np.random.default_rng(1).normal(size=(1, model.config.embed_dim))
    numbers = {"coefficients": jnp.asarray(direction, jnp.float32), "intercepts": jnp.zeros(1)}
    form = targets.Form(normalize=True)
    return targets.Target("a direction", None, form, {**numbers, "index": jnp.array(0)}, model)


def _memory(rows, target) -> dict:
    """Bytes of the weights of both towers, of those that the program reads, and of the rest of it,
    as compiled."""
    import jax
    import numpy as np

    from medsiglip_jax.trust.maps import tower

    size = sum(x.nbytes for x in jax.tree.leaves(target.model.params))
    image, points = np.zeros((rows.size, rows.size, 3), np.float32), np.zeros(rows.rows, np.float32)
    start = time.perf_counter()
    compiled = tower._gradient.lower(
        rows.params, target.numbers, image, image, points, points, target.form, rows.config,
        rows.compute,
    ).compile()  # fmt: skip
    memory = compiled.memory_analysis()
    return {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "weights_bytes": size,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "weights_and_temporary_bytes": size + memory.temp_size_in_bytes,
    }


def _peak() -> int:
    """Peak of the device's memory where it counts that, else of this process."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident *= 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use", resident)


def add_parsers(commands, common) -> None:
    """The sub-command; `common` adds the flags that all share."""
    sub = commands.add_parser("explain", help="integrated gradients, in forward passes")
    common(sub, "so400m-448")
    sub.add_argument("--batch", type=int, default=8, help="images in a call (default 8)")
    sub.add_argument("--steps", type=int, default=16, help="steps (default 16)")
    sub.add_argument("--memory", action="store_true", help="only compile, for the memory")
    sub.set_defaults(run=explain)
