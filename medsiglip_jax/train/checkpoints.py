"""The checkpoints of a run, which orbax writes and reads."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from medsiglip_jax.files import failures
from medsiglip_jax.files.places import Given, is_remote
from medsiglip_jax.model.weights.orbax import check_names, orbax

_ITEM = "default"  # the folder of the state in that of a step, as orbax calls it


def _directory(folder: Given) -> Any:
    """What orbax takes: its own kind of path, which reaches gs:// without fsspec, too."""
    from etils import epath

    if not is_remote(folder):
        return epath.Path(Path(str(folder)).absolute())
    if not str(folder).startswith(_REMOTE):
        raise ValueError(f"{folder}: expected a local folder, {', '.join(_REMOTE)} for checkpoints")
    return epath.Path(str(folder))


# What orbax and tensorstore both write to.
_REMOTE = ("gs://", "s3://")


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of a run: one folder per step, which appears whole or not at all.

    Writing goes on in the background, except on a CPU, where it would compete with the training
    and where the arrays to write are those that the next step overwrites.
    """

    def __init__(self, folder: Given, keep: int = 2, best: str | None = None, mode: str = "max"):
        """Opens or creates a folder of checkpoints, and removes what a killed save left there.

        Args:
            folder: of the checkpoints; created if it does not exist.
            keep: number of latest checkpoints to keep.
            best: name of a metric; the checkpoint that is best by it is kept, too.
            mode: whether the "max" or the "min" of `best` is the best.
        """
        ocp = orbax()
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        metric = (lambda metrics: metrics[best]) if best else None
        kept: list[Any] = [policies.LatestN(keep)]
        if metric:
            best_of = {"get_metric_fn": metric, "reverse": mode == "min"}
            kept.append(policies.BestN(**best_of, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=metric,
            best_mode=mode,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        self.folder, self._ocp, self._best, self._keep = folder, ocp, best, keep
        self._damaged: set[int] = set()
        self._manager = ocp.CheckpointManager(_directory(folder), options=options)

    def __exit__(self, *_) -> None:
        with self._disk_full():  # what is still being written in the background
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the best checkpoint by `best`, or else the latest."""
        step = self._manager.best_step() if self._best else None
        return step if step is not None else self._manager.latest_step()

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Saves, unless the step has a checkpoint already that `restore` did not fail to read.

        Raises:
            OSError: no space left; earlier checkpoints are intact.
        """
        if step in self._manager.all_steps():
            if step not in self._damaged:
                return
            self._manager.delete(step)
        # One that is undefined is no best one; and orbax would write it as NaN, which is no JSON.
        best = metrics.get(self._best) if metrics and self._best else None
        values = {self._best: float(best)} if best is not None and math.isfinite(best) else None
        args = self._ocp.args.StandardSave(state)
        with self._disk_full():
            self._manager.save(step, args=args, metrics=values, force=True)

    def remove_surplus(self) -> None:
        """Removes what is not to be kept, which orbax does only after it has saved.

        A process that was killed at that has left the rest of a checkpoint. Only in runs of one
        process, since others may list the folder at another moment.
        """
        if jax.process_count() == 1:
            for step in self.steps()[: -self._keep]:
                if step != self.best_step():
                    self._manager.delete(step)

    @contextlib.contextmanager
    def _disk_full(self) -> Iterator[None]:
        try:
            with failures.writing(self.folder):
                yield
        except OSError as error:
            if error.errno not in failures.CANNOT_WRITE:
                raise
            raise OSError(
                f"{self.folder}: no space left for a checkpoint ({error.strerror}); the earlier "
                "ones are intact, and the same command resumes from them"
            ) from None

    def restore(self, shapes: Any, step: int | None = None) -> tuple[int, Any] | None:
        """Reads the latest checkpoint that can be read, or the one of `step`.

        Args:
            shapes: tree of `jax.ShapeDtypeStruct` with the shardings of the result, which need not
                be those of the saved arrays.
            step: by default the latest.

        Returns:
            (step, state), or None if there is no checkpoint yet.

        Raises:
            ValueError: the tree is not that of `shapes`, or no checkpoint can be read.
            MemoryError, PermissionError, jax.errors.JaxRuntimeError: this process cannot read it,
                or has no memory for it, on the device perhaps; nothing is wrong with it.
        """
        candidates = self.steps()[::-1] if step is None else [step]
        problems = []
        for candidate in candidates:
            try:
                check_names(self._manager.directory / str(candidate) / _ITEM)
                args = self._ocp.args.StandardRestore(shapes)
                return candidate, self._manager.restore(candidate, args=args)
            except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # orbax and tensorstore raise nearly every type there is
                reason = " ".join(str(error).split())[:300]
                problems.append(f"step {candidate}: {reason}")
                self._damaged.add(candidate)
                warnings.warn(f"{self.folder}: {problems[-1]}", stacklevel=2)
        if problems:
            raise ValueError(
                f"{self.folder}: no checkpoint can be restored: they are of another architecture, "
                f"optimiser or adapter, or damaged. {problems[0]}"
            )
        return None
