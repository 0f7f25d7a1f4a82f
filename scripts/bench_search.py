"""Exact search side by side with faiss and a NumPy loop; `bench.py search` runs it."""

import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

SIDES = ("ours", "numpy", "faiss", "faiss_blas")


def search(args) -> dict:
    """Seconds for all queries: over vectors in memory, and over files as `embed` writes them.

    The threads of faiss and NumPy slow each other down in one process, so faiss has its own. It
    takes one query after the other unless it is told to use BLAS
    (`distance_compute_blas_threshold`); both are measured.
    """
    if importlib.util.find_spec("faiss") is None:
        raise SystemExit("faiss is missing: pip install faiss-cpu")
    rows = []
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as folder:
        for where, count in (("memory", args.rows), ("files", args.file_rows)):
            rows += _compare(args, where, count, Path(folder))
    return {
        "dim": args.dim, "dtype": args.dtype, "top_k": args.top_k, "repeats": args.repeats,
        "unit": "seconds for all queries; files are in the page cache", "rows": rows,
    }  # fmt: skip


def _compare(args, where: str, count: int, folder: Path) -> list[dict]:
    measure.progress(f"making {count} rows in {where}")
    if where == "files":
        _write(folder, count, args.dim, args.dtype)
    processes = [_Side(where, folder, count, args, env) for env in ({}, _for_faiss())]
    by_side = {side: processes["faiss" in side] for side in args.sides}
    rows = []
    for queries in args.queries:
        found = {}

        def call(side, queries=queries, found=found):
            found[side] = by_side[side].ask({"side": side, "queries": queries})["rows"]

        calls = {side: functools.partial(call, side) for side in args.sides}
        times = measure.interleaved(calls, args.repeats)
        row = {"where": where, "rows": count, "queries": queries}
        row |= {side: measure.summary(times[side]) for side in args.sides}
        row |= _ratios({side: statistics.median(times[side]) for side in args.sides})
        row["hits_in_common"] = min(_overlap(found["ours"], found[s]) for s in args.sides)
        measure.progress(str(row))
        rows.append(row)
    peak = round(processes[0].ask({"peak": True})["peak"] / 1024)
    measure.progress(f"{where}: peak memory of the process of ours and numpy {peak} MB")
    for process in processes:
        process.close()
    return rows


def _ratios(medians: dict[str, float]) -> dict[str, float]:
    """How many times as long the others take; the faster one for faiss."""
    others = {name: [m for side, m in medians.items() if name in side] for name in SIDES[1:3]}
    return {
        f"ratio_to_{name}": round(min(found) / medians["ours"], 3)
        for name, found in others.items()
        if found
    }


def _overlap(one: list, other: list) -> float:
    pairs = zip(one, other, strict=True)
    return round(sum(len(set(a) & set(b)) for a, b in pairs) / sum(map(len, one)), 4)


def _for_faiss() -> dict[str, str]:
    """The OpenBLAS in faiss 1.15's wheel (0.3.15) takes CPUs that are newer for ones without AVX,
    where a search of 64 queries takes four times as long."""
    return {"OPENBLAS_CORETYPE": "SkylakeX"} if "avx512f" in measure.cpu().split() else {}


class _Side:
    """A process that searches when asked: a line of JSON in, a line of JSON out."""

    def __init__(self, where, folder, count, args, env):
        self._process = subprocess.Popen(
            [sys.executable, __file__, where, str(folder), str(count), str(args.dim), args.dtype,
             str(args.top_k)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**env, **os.environ},
        )  # fmt: skip

    def ask(self, question: dict) -> dict:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(where: str, folder: str, count: str, dim: str, dtype: str, top_k: str) -> None:
    """What a `_Side` runs."""
    import numpy as np

    queries = _unit(np.random.default_rng(1), 1024, int(dim))
    x = None if where == "files" else _array(int(count), int(dim))
    search = _Search(x, folder, int(top_k))
    for line in sys.stdin:
        question = json.loads(line)
        if "peak" in question:
            answer = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        else:
            found = getattr(search, question["side"])(queries[: question["queries"]])
            answer = {"rows": found.tolist()}
        print(json.dumps(answer), flush=True)


class _Search:
    """The rows that each side finds, over an array or the parts in a folder."""

    def __init__(self, x, folder, k):
        self._x, self._folder, self._k, self._index = x, folder, k, None

    def ours(self, queries):
        from medsiglip_jax.embeddings.nearest import top_k
        from medsiglip_jax.embeddings.store import ArrayVectors, Embeddings

        source = Embeddings(self._folder) if self._x is None else ArrayVectors(self._x, True)
        return top_k(queries, source, self._k)[1]

    def numpy(self, queries):
        import numpy as np

        def best(x):
            scores = [x @ query for query in queries]
            rows = np.stack([np.argpartition(-s, self._k)[: self._k] for s in scores])
            return np.take_along_axis(np.stack(scores), rows, axis=1), rows

        return self._merged(best)

    def faiss(self, queries, blas: bool = False):
        import faiss

        faiss.cvar.distance_compute_blas_threshold = 1 if blas else 1 << 20
        if self._x is None:
            metric = faiss.METRIC_INNER_PRODUCT
            return self._merged(lambda x: faiss.knn(queries, x, self._k, metric=metric))
        if self._index is None:
            self._index = faiss.IndexFlatIP(self._x.shape[1])
            self._index.add(self._x)
            self._x = self._x[:1]  # it has its own copy
        return self._index.search(queries, self._k)[1]

    def faiss_blas(self, queries):
        return self.faiss(queries, blas=True)

    def _merged(self, best):
        import numpy as np

        if self._x is not None:
            return best(self._x)[1]
        start, scores, rows = 0, [], []
        for path in sorted(Path(self._folder).glob("part-*.parquet")):
            x = _read(path)
            found = best(x)
            scores.append(found[0])
            rows.append(found[1] + start)
            start += len(x)
        scores, rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
        return np.take_along_axis(rows, np.argsort(-scores, axis=1)[:, : self._k], axis=1)


def _read(path: Path):
    import numpy as np
    from pyarrow import parquet

    table = parquet.read_table(path, columns=["embedding"], memory_map=True)
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1).astype(np.float32, copy=False)


def _unit(rng, n: int, dim: int):
    import numpy as np

    x = rng.standard_normal((n, dim), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def _array(count: int, dim: int):
    import numpy as np

    rng, x = np.random.default_rng(0), np.empty((count, dim), np.float32)
    for start in range(0, count, 8192):
        x[start : start + 8192] = _unit(rng, min(8192, count - start), dim)
    return x


def _write(folder: Path, count: int, dim: int, dtype: str) -> None:
    """Parts as `embed` writes them."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    rng, parts = np.random.default_rng(0), []
    for number, start in enumerate(range(0, count, 8192)):
        x = _unit(rng, min(8192, count - start), dim).astype(dtype)
        names = [f"scans/{start + i}.png" for i in range(len(x))]
        columns = {"id": names, "source": names, "kind": ["image"] * len(x)}
        values = pa.array(x.reshape(-1))
        vector = pa.list_(pa.field("element", values.type, nullable=False), dim)
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, type=vector)
        parts.append({"file": f"part-{number:05d}.parquet", "rows": len(x)})
        strings = ["id", "source", "kind"]
        table = pa.table(
            columns,
            pa.schema(
                [
                    *((s, pa.string()) for s in strings),
                    pa.field("embedding", vector, nullable=False),
                ]
            ),
        )
        parquet.write_table(
            table, folder / parts[-1]["file"], row_group_size=8192, use_dictionary=strings,
            compression={s: "zstd" for s in strings}, write_statistics=strings,
        )  # fmt: skip
    manifest = {"model": {"sha256": None}, "preprocess": "", "normalized": True, "dim": dim}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "parts": parts}))


def add_parsers(commands, common) -> None:
    """The sub-command; `common` adds the flags that all share."""
    sub = commands.add_parser("search", help="exact search, against faiss and NumPy")
    common(sub, "so400m-448")
    sub.add_argument(
        "--rows", type=int, default=1_000_000, help="rows in memory, held twice (2 x 4.6 GB)"
    )
    sub.add_argument("--file-rows", type=int, default=262_144, help="rows in files")
    sub.add_argument("--dim", type=int, default=1152)
    sub.add_argument(
        "--dtype", default="float32", choices=["float32", "float16"], help="element type in files"
    )
    sub.add_argument("--queries", type=int, nargs="+", default=[1, 64])
    sub.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    sub.add_argument("--top-k", type=int, default=10)
    sub.set_defaults(run=search)


if __name__ == "__main__":
    serve(*sys.argv[1:])
