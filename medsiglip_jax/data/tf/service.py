"""A tf.data service: other machines read and decode the images of a slice whose hosts are too slow.

    python -m medsiglip_jax.data.tf.service dispatcher --port 5050
    python -m medsiglip_jax.data.tf.service worker grpc://HOST:5050        # on every other machine

A graph cannot carry Python to another process, and Python reads the bytes here. So a worker has to
be started as above: it registers our functions under a name that does not change, which the graph
calls. What they need to know, such as the list of the images, travels in the graph as a constant.

The dispatcher hands out single steps, each to whichever worker is free. They arrive out of order
and are put in order here; a step that was lost with its worker is made here.
"""

import argparse
import dataclasses
import hashlib
import re
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

import tensorflow as tf

from medsiglip_jax import __version__
from medsiglip_jax.data.order import Once, Order
from medsiglip_jax.data.tf.pixels import Call, local_call, pixel_batches
from medsiglip_jax.data.tf.rows import PixelRows
from medsiglip_jax.files import settings
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.preprocess.augment import Augment
from medsiglip_jax.preprocess.dicom.rules import Rules

Pixels = dict[str, Any]  # an element of `pixels.pixel_batches`

_TOKEN = "medsiglip_jax.data.tf.service"
_METHODS = frozenset((b"plan", b"fetch", b"decode", b"resize", b"recolour"))
_ADDRESS = re.compile(r"grpc://([^/:]+):(\d{1,5})")
_START = "python -m medsiglip_jax.data.tf.service"
_AHEAD = 16  # steps that may wait for an earlier one before that is made here
_MOST = 1 << 30  # bytes of what travels in a graph, which may have 2 GiB
_PATIENCE = 10.0  # seconds; TensorFlow itself would wait for a dispatcher for an hour

# In a worker, by the hash of what came with the graph: those that were called last, the latest at
# the end. A worker outlives many runs, and the list of the images of each may take a gigabyte.
_known: dict[bytes, PixelRows] = {}
_KEPT = 16  # a run calls two in turns: for training and for validation
_lock = threading.Lock()


def served_batches(
    rows: PixelRows, steps: range, address: str, workers: int | None = None
) -> tf.data.Dataset:
    """`pixels.pixel_batches`, made by the workers of a service, in the same order.

    Args:
        rows: what determines the batches.
        steps: which.
        address: of the dispatcher, "grpc://HOST:PORT".
        workers: number of threads where a step is made here.

    Raises:
        ValueError: the address is none, nobody answers there, or there are too many images.
    """
    check_answers(address)
    arriving = pixel_batches(rows, steps, _remote_call(rows)).apply(
        tf.data.experimental.service.distribute(
            tf.data.experimental.service.ShardingPolicy.DYNAMIC, address
        )
    )

    def make(step: int) -> Pixels:
        return next(iter(pixel_batches(rows, range(step, step + 1), local_call(rows), workers)))

    def ordered() -> Iterator[Pixels]:
        return in_order(_arriving(arriving, address, rows), steps, make)

    return tf.data.Dataset.from_generator(ordered, output_signature=arriving.element_spec)


def in_order(
    arriving: Iterator[Pixels], steps: Iterable[int], make: Callable[[int], Pixels]
) -> Iterator[Pixels]:
    """Yields the batches of `steps` in order, which arrive in another; those that do not come are
    made."""
    waiting: dict[int, Pixels] = {}
    for step in steps:
        while step not in waiting and len(waiting) < _AHEAD:
            if (batch := next(arriving, None)) is None:
                break
            if (number := int(batch["step"][0])) >= step:
                waiting[number] = batch
        yield waiting.pop(step) if step in waiting else make(step)


def check_address(address: str) -> tuple[str, int]:
    """Host and port of a dispatcher; ValueError if it is no address of one."""
    if not (match := _ADDRESS.fullmatch(address)):
        raise ValueError(f"data_service is {address!r}; expected grpc://HOST:PORT of a dispatcher")
    return match[1], int(match[2])


def check_answers(address: str) -> None:
    """Raises ValueError if nobody listens at the address of a dispatcher."""
    try:
        socket.create_connection(check_address(address), timeout=_PATIENCE).close()
    except OSError as error:
        raise ValueError(
            f"data_service {address}: nobody answers ({error}); start a dispatcher there with "
            f"{_START} dispatcher"
        ) from None


def _arriving(dataset: Iterable[Pixels], address: str, rows: PixelRows) -> Iterator[Pixels]:
    """The batches as they come, and in words why they do not."""
    try:
        yield from dataset
    except tf.errors.OpError as error:
        message = f"a worker failed: {error.message}"
        if "Could not find callback" in error.message and _TOKEN in error.message:
            message = (
                "one of its workers is a plain one of TensorFlow, which lacks our decoders; start "
                f"workers with {_START} worker {address}"
            )
        failure = ValueError(f"data_service {address}: {message}")
        rows.failures.append(failure)
        raise failure from error


# ------------------------------------------------------------------- what travels in the graph


def _remote_call(rows: PixelRows) -> Call:
    """Calls the methods of `rows` in whichever process runs the graph."""
    register()
    content = _packed(rows)
    if len(content) > _MOST:
        raise ValueError(
            f"data_service: the list of {sum(map(len, rows.images)):,} images takes "
            f"{len(content) / 2**30:.1f} GiB, more than fits into a graph; train on a part of it"
        )
    key, spec = tf.constant(hashlib.sha256(content).digest()), tf.constant(content)

    def call(name: str, arguments: list[Any], types: list[tf.DType]) -> list[tf.Tensor]:
        first = [key, spec if name == "plan" else tf.constant(b""), tf.constant(name)]
        return tf.raw_ops.PyFuncStateless(input=[*first, *arguments], token=_TOKEN, Tout=types)

    return call


def _packed(rows: PixelRows) -> bytes:
    fields = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows) if f.compare}
    content = {
        **fields,
        "images": [list(images) for images in rows.images],
        "order": {"kind": type(rows.order).__name__, **dataclasses.asdict(rows.order)},
        "augment": dataclasses.asdict(rows.augment),
        "dicom": dataclasses.asdict(rows.dicom),
        "versions": _versions(),
    }
    return zlib.compress(dumps(content).encode(), 1)


def _unpacked(content: bytes) -> PixelRows:
    """Raises ValueError if the host that sent it makes pixels with other versions."""
    fields = parse(zlib.decompress(content))
    if (theirs := fields.pop("versions")) != (ours := _versions()):
        raise ValueError(
            f"this worker has {ours}, the host that trains {theirs}, so that pixels could differ; "
            "install the same versions on both"
        )
    order = fields.pop("order")
    kind = {"Order": Order, "Once": Once}[order.pop("kind")]
    order = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in order.items()})
    augment = settings.build(Augment, fields.pop("augment"))
    dicom = settings.build(Rules, fields.pop("dicom"))
    part = tuple(fields.pop("part"))
    return PixelRows(order=order, augment=augment, dicom=dicom, part=part, **fields)


def _versions() -> dict[str, str]:
    """The versions of the packages that make the pixels."""
    packages = {name: metadata.version(name) for name in ("numpy", "pillow")}
    return {"medsiglip-jax": __version__, **packages, "tensorflow": tf.__version__}


# ------------------------------------------------------------------------------- in a worker


def register() -> None:
    """Makes our functions known to graphs that come from other processes."""
    # TensorFlow has no public way: its own names, pyfunc_0 and so on, differ between processes.
    from tensorflow.python.ops import script_ops

    script_ops._py_funcs._funcs[_TOKEN] = _serve


def _serve(key: bytes, content: bytes, name: bytes, *arguments: Any) -> Any:
    """What graphs call: a method of the rows of the graph; `plan`, the first, brings them along."""
    if name not in _METHODS:
        raise ValueError(f"no function {name!r} for graphs")
    with _lock:
        rows = _known.pop(key, None) or _unpacked(content)
        _known[key] = rows
        if len(_known) > _KEPT:
            del _known[next(iter(_known))]
    return getattr(rows, name.decode())(*arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a dispatcher or a worker until it is stopped."""
    parser = argparse.ArgumentParser(prog=_START, description=(__doc__ or "").split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    dispatcher = kinds.add_parser("dispatcher", help="hands out steps; one for all hosts")
    worker = kinds.add_parser("worker", help="reads and decodes; one on every other machine")
    worker.add_argument("dispatcher", help="grpc://HOST:PORT")
    worker.add_argument("--host", default=socket.gethostname(), help="how others reach this one")
    for sub in (dispatcher, worker):
        sub.add_argument("--port", type=int, default=0, help="default a free one")
    args = parser.parse_args(argv)
    tf.config.set_visible_devices([], "GPU")
    try:
        server = start_dispatcher(args.port) if args.kind == "dispatcher" else start_worker(
            args.dispatcher, args.port, args.host
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.kind == "dispatcher":
        print(f"grpc://{socket.gethostname()}:{server.target.rpartition(':')[2]}", flush=True)
    server.join()
    return 0


def start_dispatcher(port: int = 0) -> tf.data.experimental.service.DispatchServer:
    """A dispatcher in this process; it stops when it is deleted."""
    service = tf.data.experimental.service
    return service.DispatchServer(service.DispatcherConfig(port=port, protocol="grpc"))


def start_worker(
    address: str, port: int = 0, host: str = "localhost"
) -> tf.data.experimental.service.WorkerServer:
    """A worker in this process; it stops when it is deleted.

    Args:
        address: of the dispatcher, "grpc://HOST:PORT".
        port: to listen on; 0 takes a free one.
        host: the name or address by which the hosts that train reach this one.

    Raises:
        ValueError: nobody answers at the address.
    """
    check_answers(address)
    register()
    service = tf.data.experimental.service
    return service.WorkerServer(
        service.WorkerConfig(
            dispatcher_address=address.removeprefix("grpc://"),
            worker_address=f"{host}:{port or '%port%'}",
            port=port,
            protocol="grpc",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
