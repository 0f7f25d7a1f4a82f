"""Embeds the shards of a run with Ray actors, each of which holds the model.

The driver hands out one shard at a time to actors (`ray_actor`). One may be lost at any time, with
its machine or without: its shard goes to another one, and a new actor takes its place as soon as
the cluster has room for it.
"""

import contextlib
import os
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medsiglip_jax.files import locks
from medsiglip_jax.inference.ray_actor import Actor, for_actors, probe
from medsiglip_jax.inference.ray_cluster import (
    Resources,
    check_room,
    connected,
    default_resources,
    import_ray,
    room,
)
from medsiglip_jax.inference.shard_work import (
    EmbedOptions,
    EmbedProgress,
    Errors,
    Job,
    check_errors,
)
from medsiglip_jax.model.api import Model

_POLL_SECONDS = 1.0  # between two looks at how large the cluster is
_PATIENCE = 60.0  # seconds without any actor after which the user is told
_GRACE = 20.0  # seconds for actors to end their batch when the run is stopped
_TRIES = 10  # actors that may be lost over one shard, or one after the other before they start
_PER_ACCELERATOR = 64  # rows of a batch, as for commands that know nothing of the memory


@dataclass(frozen=True)
class RayRunner:
    """Starts or joins a Ray cluster, and has its actors embed shards.

    Attributes:
        load: loads the model in an actor; it is pickled.
        address: of a cluster, such as "auto" on one of its hosts, or None for one on this machine.
            The hosts have to reach the model, the inputs and the output by the same names.
        actors: the largest number; a cluster that scales by demand grows for them. None is as many
            as the cluster has room for, which may change.
        resources: what an actor reserves, by Ray's names: "CPU", "GPU", "TPU" or others. None is
            one GPU and its share of the CPUs, or a whole host where there are none.
        batch_size: rows per call of the encoder, in place of that of the options; 0 is 64 per
            accelerator of an actor, or 8.

    An actor reads and decodes with as many threads as it has CPUs, unless `EmbedOptions.workers`
    says otherwise.
    """

    load: Callable[[], Model]
    address: str | None = None
    actors: int | None = None
    resources: Resources | None = None
    batch_size: int | None = None

    def __call__(
        self, job: Job, numbers: Sequence[int], check: locks.Check, errors: Errors
    ) -> Generator[EmbedProgress]:
        """Embeds shards of a job; a `medsiglip_jax.inference.embed.Runner`."""
        if not numbers:
            return
        stdout = sys.stdout
        with connected(self.address, job.rows):
            resources = self.resources or default_resources()
            check_room(resources, self.address)
            accelerators = int(resources.get("GPU", 0) + resources.get("TPU", 0))
            size = self.rows_per_call(job.options, accelerators)
            workers = job.options.workers or int(resources.get("CPU", 0)) or None
            job = replace(job, options=replace(job.options, batch_size=size, workers=workers))
            with contextlib.closing(_Driver(self, job, resources, errors).run(numbers)) as steps:
                for progress in steps:
                    check()
                    with contextlib.redirect_stdout(stdout):
                        yield progress

    def rows_per_call(self, options: EmbedOptions, accelerators: int) -> int:
        """The batch size of an actor that has so many accelerators."""
        if self.batch_size is None:
            return options.batch_size
        return self.batch_size or _PER_ACCELERATOR * accelerators or 8


@dataclass
class _Turn:
    """An actor at work on a shard, and what it has done of it."""

    actor: Any
    host: str
    number: int
    rows: int = 0
    kept: int = 0  # rows of an earlier run, beside `rows`
    errors: int = 0
    busy: float = 0.0


class _Driver:
    """Hands out shards, and takes note of who has which."""

    def __init__(self, runner: RayRunner, job: Job, resources: Resources, errors: Errors):
        self._ray = import_ray()
        self._runner, self._job, self._resources = runner, job, resources
        self._errors = list(errors)
        self._todo: deque[int] = deque()
        self._idle: list[tuple[Any, str]] = []
        self._starting: dict[Any, Any] = {}  # what `start` returns -> the actor
        self._working: dict[Any, _Turn] = {}  # what `embed` yields -> the turn
        self._lost: Counter[int | None] = Counter()  # by shard; None is before it had one
        self._shared, self._probe = self._ray.put(for_actors(job)), probe(job.rows)
        self._remote = self._ray.remote(Actor).options(
            num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0),
            resources={n: x for n, x in resources.items() if n not in ("CPU", "GPU")},
        )  # fmt: skip
        self._waiting_since: float | None = time.monotonic()

    def run(self, numbers: Sequence[int]) -> Generator[EmbedProgress]:
        """Returns when all these shards are written."""
        self._todo.extend(numbers)
        try:
            while self._todo or self._working:
                self._hand_out()
                self._start_actors()
                self._tell_of_no_actors()
                waited = [*self._starting, *self._working]
                for ref in self._ray.wait(waited, timeout=_POLL_SECONDS)[0]:
                    if ref in self._starting:
                        self._started(ref)
                    else:
                        yield from self._step(ref)
        finally:
            self._stop()

    def _hand_out(self) -> None:
        while self._todo and self._idle:
            (actor, host), number = self._idle.pop(), self._todo.popleft()
            ref = actor.embed.options(num_returns="streaming").remote(number)
            self._working[ref] = _Turn(actor, host, number)

    def _start_actors(self) -> None:
        """Asks for actors while there are shards for them."""
        most = self._runner.actors or max(1, room(self._resources))
        wanted = min(most - len(self._working), len(self._todo))
        while len(self._starting) < wanted:
            actor = self._remote.remote()
            shared = [self._shared]
            ref = actor.start.remote(self._runner.load, shared, os.getcwd(), self._probe)
            self._starting[ref] = actor

    def _tell_of_no_actors(self) -> None:
        """Warns once if nothing happens, since an actor that finds no room waits for ever."""
        if self._working:
            self._waiting_since = None
        elif self._waiting_since and time.monotonic() > self._waiting_since + _PATIENCE:
            asked = ", ".join(f"{name}={number:g}" for name, number in self._resources.items())
            warnings.warn(
                f"no actor has started yet: the model is loading, or the cluster has no host with "
                f"{asked} to spare (--actor-resources)",
                stacklevel=2,
            )
            self._waiting_since = None

    def _started(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            self._idle.append((actor, self._get(ref)))
            self._lost[None] = 0
        except self._ray.exceptions.RayError as error:
            self._count_loss(None, "before it had loaded the model", error)

    def _step(self, ref: Any) -> Generator[EmbedProgress]:
        """Takes the next progress of an actor, or notes that it has finished or is lost."""
        turn = self._working[ref]
        try:
            progress = self._get(next(ref))
            if progress.busy is None:
                turn.kept += progress.rows
            else:
                turn.rows, turn.errors = turn.rows + progress.rows, turn.errors + progress.errors
            turn.busy = progress.busy or 0.0
            yield self._progress(progress)
        except StopIteration:
            del self._working[ref]
            self._finished(turn)
        except self._ray.exceptions.RayError as error:
            del self._working[ref]
            self._todo.appendleft(turn.number)
            self._count_loss(turn.number, f"on {turn.host} with shard {turn.number}", error)
            yield self._progress(EmbedProgress(-turn.kept))
            yield self._progress(EmbedProgress(-turn.rows, 0.0, -turn.errors))

    def _progress(self, progress: EmbedProgress) -> EmbedProgress:
        busy = [turn.busy for turn in self._working.values()]
        if progress.busy is not None:
            progress = replace(progress, busy=sum(busy) / max(1, len(busy)))
        return replace(progress, actors=len(self._working) + len(self._idle))

    def _get(self, ref: Any) -> Any:
        """A result of an actor.

        Raises:
            RayError: the actor or its result is lost.
            Exception: what the actor has raised.
        """
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.UnserializableException as error:  # no loss: it has answered
            reason = " ".join(str(error).split())
            raise OSError(f"an actor has failed: {reason[:1000]}") from None

    def _finished(self, turn: _Turn) -> None:
        path = self._job.path(turn.number)
        if not path.is_file():
            raise ValueError(
                f"{turn.host} has written {path}, which is not here: --output has to be a folder "
                "that all hosts reach by that name, on a network disk or gs://"
            )
        self._idle.append((turn.actor, turn.host))
        if self._job.options.max_errors is not None:
            (note,) = self._job.notes([turn.number])
            self._errors += note.errors
            check_errors(self._job, self._errors)

    def _count_loss(self, number: int | None, where: str, error: Exception) -> None:
        """Warns of a lost actor.

        Raises:
            OSError: that has happened too often.
        """
        self._lost[number] += 1
        reason = " ".join(str(error).split())
        if self._lost[number] >= _TRIES:
            raise OSError(
                f"{self._lost[number]} actors were lost {where}: {reason}. What is "
                "embedded is kept, and the same command resumes"
            )
        warnings.warn(f"an actor was lost {where}: {reason[:300]}", stacklevel=2)

    def _stop(self) -> None:
        """Ends actors that are at work, when the run is stopped, after the batch that they have."""
        end = time.monotonic() + _GRACE
        for ref in self._working:
            self._ray.cancel(ref)
        while self._working and (left := end - time.monotonic()) > 0:
            for ref in self._ray.wait([*self._working], timeout=left)[0]:
                try:
                    next(ref)
                except StopIteration:
                    del self._working[ref]
        actors = [turn.actor for turn in self._working.values()]
        for actor in (*actors, *self._starting.values(), *(actor for actor, _ in self._idle)):
            self._ray.kill(actor)
