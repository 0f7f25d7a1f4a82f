"""The training loop: takes any batches, writes checkpoints and metrics, resumes when run again."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from medsiglip_jax.files import places, settings, storage
from medsiglip_jax.model import processes
from medsiglip_jax.train.checkpoints import Checkpoints
from medsiglip_jax.train.step import Batch, Metrics, State, place_shapes

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
# The keys of a line of metrics that differ between two runs that are otherwise equal to the bit.
TIMES = ("seconds", "images_per_second")


@dataclass(frozen=True)
class LoopOptions:
    """When the loop logs, evaluates, saves and gives up.

    Attributes:
        total_steps: steps in all, those of earlier runs included.
        log_every: steps between lines of metrics. Only these wait for the device.
        eval_every: steps between evaluations; 0 evaluates only after the last step.
        checkpoint_every: steps between checkpoints; 0 saves only after the last step, or when the
            run is stopped.
        keep: number of latest checkpoints to keep.
        best: the evaluation metric whose best checkpoint is kept, too.
        mode: whether the "max" or the "min" of `best` is the best.
        max_skipped: after so many updates in a row that are not finite the run ends, at the next
            line of metrics.
    """

    total_steps: int
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    best: str | None = None
    mode: str = "max"
    max_skipped: int = 10

    def checkpoints(self, workdir: places.Place) -> Checkpoints:
        """The checkpoints of a run, which are kept as these options say."""
        return Checkpoints(workdir / CHECKPOINTS, self.keep, self.best, self.mode)

    def due(self, every: int, done: int) -> bool:
        """Whether what is done `every` so many steps, and at the end, follows step `done`."""
        return done == self.total_steps or bool(every and done % every == 0)


def saved_steps(workdir: places.Place) -> list[int]:
    """The steps that have a checkpoint, without opening them."""
    folder = workdir / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


class Stopped(Exception):
    """A signal ended the run after a step, and its checkpoint was saved."""

    def __init__(self, number: int, step: int):
        self.exit_code = 128 + number  # as a shell reports a process that a signal ended
        name = signal.Signals(number).name
        super().__init__(
            f"{name}: stopped and saved after step {step}; the same command goes on, and "
            "--workdir D --export-only exports what there is"
        )


def fit(
    workdir: places.Place,
    state: State,
    step: Callable[[State, Batch], tuple[State, Metrics]],
    batches: Callable[[int], Iterator[Batch]],
    options: LoopOptions,
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
    on_step: Callable[[int, dict[str, float] | None], None] = lambda done, values: None,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
) -> State:
    """Trains until `options.total_steps`, from the latest checkpoint in `workdir` if there is one.

    Args:
        workdir: gets `metrics.jsonl` and `checkpoints/`.
        state: where to start if there is no checkpoint; donated.
        step: from `step.make_train_step`.
        batches: number of steps already done -> the batches of the steps after it; each is a pure
            function of its step.
        options: when to log, evaluate and save.
        evaluate: state -> metrics, which are logged under their names.
        on_step: called before the first step and after each with the number of steps done, and
            with the metrics of the step if it was logged.
        on_log: called with every line that goes into `metrics.jsonl`.

    Returns:
        The state after the last step.

    Raises:
        FloatingPointError: `options.max_skipped` updates in a row were not finite.
        Stopped: the process got SIGTERM or SIGINT; everything is saved.
        ValueError: `batches` ended early, or the checkpoint is of another model.
    """
    with options.checkpoints(workdir) as checkpoints, _signals() as caught:
        start, state = _restore(checkpoints, state)
        checkpoints.remove_surplus()
        if start > options.total_steps:
            raise ValueError(
                f"total_steps is {options.total_steps}, but {workdir} is at step {start} already; "
                "give more steps, or another workdir"
            )
        log, stream = MetricsLog(workdir / METRICS, start), batches(start)
        on_step(start, None)
        for done in range(start + 1, options.total_steps + 1):
            if (batch := next(stream, None)) is None:
                raise ValueError(
                    f"the batches ended after step {done - 1} of {options.total_steps}; expected "
                    "one per step"
                )
            rows = len(batch["mask"])
            state, metrics = step(state, batch)
            values = _read(metrics, state) if options.due(options.log_every, done) else None
            results = _evaluate(evaluate, state) if options.due(options.eval_every, done) else None
            if values or results:
                on_log(log.write(done, {**(values or {}), **(results or {})}, rows))
            _check_best(options, results)
            stop = _agreed(caught, bool(values))
            diverged = values is not None and values["skipped_in_row"] >= options.max_skipped
            ranked = bool(options.best and results)
            if stop or diverged or ranked or options.due(options.checkpoint_every, done):
                log.flush()
                checkpoints.save(done, _saved(state), results)
            if diverged:
                raise FloatingPointError(
                    f"training has diverged: loss or gradient was not finite for at least "
                    f"{options.max_skipped} steps in a row, up to step {done}; what is saved is "
                    "from before them. Lower the learning rate, lengthen the warm-up, or look for "
                    "bad values in the data"
                )
            on_step(done, values)
            if stop and done < options.total_steps:
                raise Stopped(stop, done)
    return state


def _saved(state: State) -> State:
    """All but the frozen part, which never changes and is read from its source again."""
    return {name: part for name, part in state.items() if name != "frozen"}


def shapes_of(state: State) -> State:
    """The shapes that `Checkpoints.restore` takes."""
    saved = _saved(state)
    return place_shapes(saved, jax.tree.map(lambda x: x.sharding, saved))


def _restore(checkpoints: Checkpoints, state: State) -> tuple[int, State]:
    if not checkpoints.steps():
        return 0, state
    shapes = shapes_of(state)
    for leaf in jax.tree.leaves(_saved(state)):
        leaf.delete()  # otherwise the state would be in memory twice
    checkpoint = checkpoints.restore(shapes)
    assert checkpoint is not None
    done, restored = checkpoint
    return done, {**restored, "frozen": state["frozen"]}


def _read(metrics: Metrics, state: State) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    return {**values, "skipped": float(state["skipped"])}


def _evaluate(evaluate: Callable | None, state: State) -> dict[str, float] | None:
    return {name: float(x) for name, x in evaluate(state).items()} if evaluate else None


def _check_best(options: LoopOptions, results: Mapping[str, float] | None) -> None:
    if results is not None and options.best and options.best not in results:
        raise ValueError(
            f"best is {options.best!r}, which is none of the validation metrics of this run: "
            f"{', '.join(results)}"
        )


# How `metrics.jsonl` has what is no number of JSON; see `_written`.
_NOT_FINITE = ("nan", "inf", "-inf")


def read_metrics(path: places.Place) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, a ValueError if one holds what is no number."""
    lines = storage.read_lines(path, step=int)
    for line in lines:
        for name, value in line.items():
            if not isinstance(value, int | float | None) and value not in _NOT_FINITE:
                shown = settings.shown(value)
                raise ValueError(f"{path}: {name} of step {line['step']} is {shown}; remove it")
    return lines


class MetricsLog:
    """`metrics.jsonl`: one JSON object per logged step, written by process 0.

    Lines about steps after the last checkpoint of an interrupted run are removed, for these steps
    are repeated.
    """

    def __init__(self, path: places.Place, start: int):
        self._clock, self._step = time.perf_counter(), start
        main = jax.process_index() == 0
        keep = lambda line: line["step"] <= start  # noqa: E731
        self._lines = storage.Lines(path, keep, step=int) if main else None

    def write(self, step: int, values: Mapping[str, float], rows: int) -> dict[str, Any]:
        """Appends a line, with the images per second since the last one; a batch has `rows`."""
        now, before = time.perf_counter(), self._clock
        rate = (step - self._step) * rows / (now - before)
        self._clock, self._step = now, step
        line = {"step": step} | {name: _written(name, value) for name, value in values.items()}
        line |= {"seconds": round(now - before, 3), "images_per_second": round(rate, 2)}
        if self._lines:
            self._lines.append(line)
        return line

    def flush(self) -> None:
        """Writes the lines to disk, before a checkpoint says that their steps are done."""
        if self._lines:
            self._lines.flush()


def _written(name: str, value: float) -> float | str | None:
    """A metric as JSON has it: "nan" or "inf" of a training that diverges, null for a validation
    metric that is undefined."""
    if math.isfinite(value):
        return value
    return None if name.startswith("val_") else str(value)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and the first SIGINT instead of ending by them; a second SIGINT ends."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _agreed(caught: list[int], at_log: bool) -> int:
    """The signal to stop for, or 0. Several hosts have to stop after the same step, and exchange
    their signals when they log."""
    if jax.process_count() > 1 and not at_log:
        return 0
    return int(processes.allgather_int(caught[0] if caught else 0).max())
