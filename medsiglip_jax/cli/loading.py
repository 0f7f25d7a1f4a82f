"""The model, the devices and the processes that a command computes with."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from medsiglip_jax.cli import output
from medsiglip_jax.cli.parser import add_flags

# The flags that say which model it is.
OF_MODELS = ("model", "dtype", "tokenizer", "matmul_precision", "attention")
ADDED = (*OF_MODELS, "batch_size", "workers")  # by `add_model`


def add_model(
    sub: argparse.ArgumentParser,
    required: bool = True,
    batch_on_accelerators: str = "",
    batches: bool = True,
) -> None:
    """Flags of `load`, and with `batches` --workers and --batch-size: by default 8, or what
    `batch_size` makes of None, which `batch_on_accelerators` describes."""
    from medsiglip_jax.model.attention import ATTENTION
    from medsiglip_jax.model.weights.checkpoint import DTYPES

    flags = {
        "--model M": "checkpoint folder, folder of a PEFT (LoRA) adapter, big_vision .npz, or "
        "Hugging Face repo id (google/medsiglip-448)",
        "--tokenizer PATH": "spiece.model, tokenizer.json or a folder with one, if there is none "
        "beside M",
        "--dtype T": f"data type to store and compute with: {', '.join(DTYPES)}, or auto: bfloat16 "
        "on accelerators, float32 on CPUs; default %(default)s",
        "--matmul-precision NAME": "jax's name of a precision; the default computes float32 in "
        "full on every device",
        "--attention NAME": f"one of {', '.join(ATTENTION)}; by default the fastest of the device",
    }
    add_flags(sub, flags, model={"required": required}, dtype="float32")
    if batches:
        text = "inputs per batch; default 8"
        text += batch_on_accelerators and f", on accelerators {batch_on_accelerators}"
        size = int if batch_on_accelerators else 8
        add_flags(sub, {"--batch-size N": text}, batch_size=size)
        add_workers(sub)


def add_workers(sub: argparse._ActionsContainer) -> None:
    """The flag --workers, which `cli.app` passes on to `files.threads`."""
    text = (
        "threads that read and decode images; default the cores of this process, or the CPU quota "
        "of its container"
    )
    add_flags(sub, {"--workers N": text}, workers=int)


def load(args: argparse.Namespace, mesh=None, recorded: str | None = None, weights: bool = True):
    """The model that the flags of `add_model` ask for.

    Args:
        args: the flags.
        mesh: the devices.
        recorded: the dtype of what this adds to, such as the earlier part of a run, or None;
            --dtype auto takes it.
        weights: without them, `model.params` is empty.
    """
    from medsiglip_jax.model import api

    if args.dtype == "auto":
        args.dtype = recorded or "auto"
    load = api.load if weights else api.without_weights
    source, *settings = (getattr(args, name) for name in OF_MODELS)
    named = dict(zip(OF_MODELS[1:], settings, strict=True))
    model = load(source, mesh=mesh, **named)
    note_export(model)
    return model


def note_export(model) -> None:
    """Says so on stderr if a fine-tuning run was given, and its export was meant."""
    from medsiglip_jax.model.weights import outputs

    for note in model.checkpoint.notes if model.checkpoint else ():
        if note.startswith(outputs.EXPORT_OF):
            output.note(f"the model is {model.source}, {note}")


def local_mesh():
    """The devices of this process, or None if there is one."""
    import jax

    from medsiglip_jax.model import sharding

    return sharding.make_mesh(local=True) if jax.local_device_count() > 1 else None


def batch_size(args: argparse.Namespace, model=None) -> int:
    """The batch size asked for; by default 8, on accelerators what fits the memory that `model`
    leaves, or without it 64 per device."""
    import jax

    if args.batch_size is not None:
        return args.batch_size
    if jax.default_backend() == "cpu":
        return 8
    if model is None:
        return 64 * jax.local_device_count()
    from medsiglip_jax.plan import fitting

    return fitting.batch_size(model)


def add_processes(sub: argparse.ArgumentParser) -> None:
    """Flags of `join_other_processes`."""
    flags = {
        "--distributed": "this is one process of several, started on every host; on Cloud TPU, "
        "Slurm and Open MPI they find each other; without any of these it runs alone",
        "--coordinator HOST:PORT": "address of process 0, for other launchers; needs --processes "
        "and --process-id",
        "--processes N": "number of processes",
        "--process-id I": "number of this process, from 0",
    }
    add_flags(sub, flags, processes=int, process_id=int)


def join_other_processes(args: argparse.Namespace, resumes: Callable[[], str]) -> bool:
    """Starts jax.distributed if asked to; returns whether this process prints the results.

    Args:
        args: the flags of `add_processes`.
        resumes: what the same command does where another process was lost.

    Raises:
        ValueError: of the number of processes, that of this one and where process 0 is some are
            given, and no launcher knows the others.
    """
    import jax

    from medsiglip_jax.model import processes

    def say(line: str) -> None:
        again = f"the same command again on every host {resumes()}"
        output.note(f"medsiglip-jax {args.run.__name__}: {line}; {again}")

    given = args.coordinator, args.processes, args.process_id
    if (args.distributed or args.coordinator) and processes.join(*given, say):
        _keep_stdout_for_results()
        # jax.distributed has a handler of its own, which swallows it.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    elif given != (None, None, None):  # each process would do the whole job
        raise ValueError(
            "--processes and --process-id need --coordinator HOST:PORT, and the other way round, "
            "where no launcher (Cloud TPU, Slurm, Open MPI) knows them"
        )
    elif args.distributed:
        output.note(
            "--distributed: no launcher (Cloud TPU, Slurm, Open MPI) here, so this process runs "
            "alone; for several processes give --coordinator, --processes and --process-id"
        )
    return jax.process_index() == 0


def _keep_stdout_for_results() -> None:
    """Sends to stderr what C++ code prints on stdout: gloo names the peers that it has found."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", encoding="utf-8")
