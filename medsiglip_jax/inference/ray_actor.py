"""An actor of Ray: a process with a model of its own that embeds shards, and what it is given.

It writes to the output folder by the same code as a run without Ray, so that the files are the
same.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from medsiglip_jax.data.rows import Rows
from medsiglip_jax.inference import embed, run_folder
from medsiglip_jax.inference.manifest import RUN
from medsiglip_jax.inference.ray_cluster import import_ray
from medsiglip_jax.inference.shard_work import EmbedProgress, Job, ShardWork
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess import names


class Actor:
    """Embeds shards in a process of its own, with a model of its own."""

    def start(self, load: Callable[[], Model], job: list[Any], folder: str, probe: str) -> str:
        """Loads the model, and makes sure that this host would embed just as the others do.

        Args:
            load: of `RayRunner`.
            job: the reference of the `Job`.
            folder: in which the command was started, where relative names begin.
            probe: an input that the driver sees, or "".

        Returns:
            The name of the host.

        Raises:
            ValueError: it has other weights, decoders or files.
        """
        host = socket.gethostname()
        (shared,) = import_ray().get(job)
        try:
            os.chdir(folder)
        except OSError:
            if any(map(_is_relative, shared.rows.images)):
                raise ValueError(
                    f"{host} does not see {folder}, where the names of inputs begin: give them as "
                    "absolute paths that all hosts reach"
                ) from None
        model = load()
        if not (shared.folder / RUN).is_file():
            raise ValueError(
                f"{host} does not see {shared.folder / RUN}: --output has to be a folder that all "
                "hosts reach by that name, on a network disk or gs://"
            )
        if probe and not os.path.exists(probe):
            raise ValueError(f"{host} does not see {probe}: all hosts have to reach the inputs")
        run = embed.record(model, shared.rows, shared.options, shared.naming)
        if differ := run.differences(run_folder.read_run(shared.folder)):
            raise ValueError(
                f"{host} would make other embeddings than the run ({', '.join(differ)} differ); "
                "install the same versions and give all hosts the same model"
            )
        self._work = ShardWork(shared, model, lambda: None)  # the driver holds the folder
        return host

    def embed(self, number: int) -> Generator[EmbedProgress]:
        """Embeds a shard, or what it can until the driver cancels it."""
        with contextlib.closing(self._work.embed([number])) as steps:
            for progress in steps:
                yield progress
                if import_ray().get_runtime_context().is_canceled():
                    return


def for_actors(job: Job) -> Job:
    """Without the limit on errors, of which an actor knows its own only: the driver counts. That
    there is one says that many refused addresses are no outage."""
    if job.options.max_errors is None:
        return job
    return replace(job, options=replace(job.options, max_errors=sys.maxsize))


def _is_relative(source: str) -> bool:
    return not os.path.isabs(source) and "://" not in source


def probe(rows: Rows) -> str:
    """The first local file among the inputs, as an absolute path, if it is there; or ""."""
    for source in rows.images:
        file = names.parse(source)[0]
        return os.path.abspath(file) if os.path.exists(file) else ""
    return ""
