"""Speed and memory of what `monitor check` computes; `bench.py monitor` runs it."""

import resource
import time

import measure
import numpy as np


def monitor(args) -> dict:
    """Seconds and megabytes of the discrepancy alone, of a fit, and of a whole check."""
    from medsiglip_jax.embeddings.provenance import Provenance
    from medsiglip_jax.trust.monitor import check, images, kernel, reference
    from medsiglip_jax.trust.monitor.windows import Window

    rng = np.random.default_rng(0)
    known, new = (rng.normal(size=(n, args.dim)).astype(np.float32) for n in (args.rows, args.new))
    made: list = []

    def fit() -> None:
        made.append(reference.build(images.from_arrays(known), Provenance(args.dim)))

    def compare() -> None:
        run = check.Comparison(made[0], images.from_arrays(new), 0.05, 0)
        window = Window("all", np.arange(len(new)))
        run.verdict(window, run.measure(window))

    bandwidth = kernel.median_bandwidth(known)
    steps = {
        "MMD of two samples": lambda: kernel.mmd(known, new, bandwidth),
        "monitor fit": fit,
        "monitor check, 999 windows in control": compare,
    }
    rows = []
    for name, step in steps.items():
        before = _peak()
        start, used = time.perf_counter(), time.process_time()
        step()
        took, used = time.perf_counter() - start, time.process_time() - used
        more = (_peak() - before) / 1e6
        rows.append(
            {
                "step": name,
                "seconds": round(took, 2),
                "CPU seconds": round(used, 2),
                "MB more": round(more),
            }
        )
        measure.progress(str(rows[-1]))
    return {"reference": args.rows, "new": args.new, "dim": args.dim, "rows": rows}


def _peak() -> float:
    """Bytes of memory that were resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def add_parsers(commands) -> None:
    """The sub-command."""
    sub = commands.add_parser("monitor", help="drift of a window against a reference")
    sub.add_argument("--rows", type=int, default=5000, help="of the reference (default 5,000)")
    sub.add_argument("--new", type=int, default=1000, help="new images (default 1,000)")
    sub.add_argument("--dim", type=int, default=1152, help="numbers of a vector (default 1,152)")
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sub.set_defaults(run=monitor)
