"""The loop: what is logged, saved, resumed and refused, with a step that only counts."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsiglip_jax.files import storage
from medsiglip_jax.train import loop
from medsiglip_jax.train.checkpoints import Checkpoints
from medsiglip_jax.train.loop import LoopOptions, Stopped, fit

ROWS = 4


def new_state():
    return {
        "params": {"sum": jnp.zeros((), jnp.int32)}, "frozen": {}, "opt_state": {},
        **{name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_row")},
    }  # fmt: skip


def step(state, batch, bad=()):
    """Adds up the numbers of the batches; those in `bad` are not finite."""
    value, number = jnp.asarray(batch["value"]), int(batch["value"])
    finite = number not in bad
    in_row = jnp.int32(0) if finite else state["skipped_in_row"] + 1
    new = {
        "params": {"sum": state["params"]["sum"] + (value if finite else 0)},
        "step": state["step"] + 1,
        "skipped": state["skipped"] + (not finite),
        "skipped_in_row": in_row,
    }
    loss = jnp.float32(number if finite else np.nan)
    return state | new, {"loss": loss, "skipped_in_row": in_row}


def batches(start):
    for number in itertools.count(start + 1):
        yield {"value": np.int32(number), "mask": np.ones(ROWS, bool)}


def lines(folder, times=False):
    found = storage.read_lines(folder / loop.METRICS)
    return [{k: v for k, v in x.items() if times or k not in loop.TIMES} for x in found]


def test_logs_evaluates_and_saves_when_due(tmp_path):
    seen = []
    options = LoopOptions(10, log_every=3, eval_every=4, checkpoint_every=6, keep=5)
    state = fit(
        tmp_path, new_state(), step, batches, options,
        lambda state: {"val_sum": float(state["params"]["sum"])},
        lambda done, values: seen.append((done, values and values["loss"])),
    )  # fmt: skip
    assert state["params"]["sum"] == 55
    assert seen == [
        (0, None),
        *((i, float(i) if i in (3, 6, 9, 10) else None) for i in range(1, 11)),
    ]
    log = lines(tmp_path, times=True)
    assert [x["step"] for x in log] == [3, 4, 6, 8, 9, 10]
    assert [x.get("val_sum") for x in log] == [None, 10, None, 36, None, 55]
    assert all(x["seconds"] >= 0 and x["images_per_second"] > 0 for x in log)
    with Checkpoints(tmp_path / loop.CHECKPOINTS, keep=5) as checkpoints:
        assert checkpoints.steps() == [6, 10]


def test_a_finished_run_does_nothing(tmp_path):
    fit(tmp_path, new_state(), step, batches, LoopOptions(3))
    state = fit(tmp_path, new_state(), lambda *_: pytest.fail("a step"), batches, LoopOptions(3))
    assert state["params"]["sum"] == 6 and len(lines(tmp_path)) == 1


class Crash(Exception):
    pass


def crash_at(number, done, values):
    if done == number:
        raise Crash


@pytest.mark.parametrize("at", [1, 5, 7, 9])
def test_resumed_is_uninterrupted(tmp_path, at):
    options = LoopOptions(10, log_every=2, eval_every=3, checkpoint_every=3)

    def evaluate(state):
        return {"val_sum": float(state["params"]["sum"])}

    want = fit(tmp_path / "whole", new_state(), step, batches, options, evaluate)
    with pytest.raises(Crash):
        crash = functools.partial(crash_at, at)
        fit(tmp_path / "cut", new_state(), step, batches, options, evaluate, crash)
    with open(tmp_path / "cut" / loop.METRICS, "a") as file:
        file.write('{"step": 8, "lo')  # what a kill leaves of a line
    starts = []
    got = fit(tmp_path / "cut", new_state(), step, batches, options, evaluate,
              lambda done, _: starts.append(done))  # fmt: skip
    assert starts[0] == at // 3 * 3
    assert got["params"]["sum"] == want["params"]["sum"] == 55
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number):
    before = signal.getsignal(number)

    def on_step(done, values):
        if done == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=f"{number.name}: stopped and saved after step 4") as stop:
        fit(tmp_path, new_state(), step, batches, LoopOptions(10), on_step=on_step)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert fit(tmp_path, new_state(), step, batches, LoopOptions(10))["params"]["sum"] == 55


def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    bad = functools.partial(step, bad=(4, 7, 8, 9))
    options = LoopOptions(20, log_every=1, checkpoint_every=1, max_skipped=3)
    with pytest.raises(FloatingPointError, match="for at least 3 steps in a row, up to step 9"):
        fit(tmp_path, new_state(), bad, batches, options)
    assert [x["loss"] for x in lines(tmp_path)][3:8] == ["nan", 5.0, 6.0, "nan", "nan"]
    assert [x["skipped"] for x in lines(tmp_path)] == [0, 0, 0, 1, 1, 1, 2, 3, 4]
    for line in (tmp_path / loop.METRICS).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    with Checkpoints(tmp_path / loop.CHECKPOINTS) as checkpoints:
        done, state = checkpoints.restore(loop.shapes_of(new_state()))
    assert done == 9 and state["params"]["sum"] == 1 + 2 + 3 + 5 + 6


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(13, "no"), jax.errors.JaxRuntimeError("RESOURCE")]
)
def test_a_checkpoint_that_finds_no_memory_is_not_damaged(tmp_path, monkeypatch, error):
    """An older one would be taken, and the next save would replace the newest."""
    fit(tmp_path, new_state(), step, batches, LoopOptions(4, checkpoint_every=2))
    with Checkpoints(tmp_path / loop.CHECKPOINTS) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", Mock(side_effect=error))
        with pytest.raises(type(error)):
            checkpoints.restore(loop.shapes_of(new_state()))
        assert checkpoints.steps() == [2, 4] and not checkpoints._damaged


def test_the_rest_of_a_checkpoint_that_was_being_removed_goes(tmp_path):
    """By a process that was killed; the best one stays."""
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2}
    options = LoopOptions(4, eval_every=1, checkpoint_every=1, keep=9, best="val_auc")
    fit(tmp_path, new_state(), step, batches, options,
        lambda state: {"val_auc": scores[int(state["step"])]})  # fmt: skip
    shutil.rmtree(tmp_path / loop.CHECKPOINTS / "1" / "default")
    fit(tmp_path, new_state(), step, batches, dataclasses.replace(options, keep=1))
    with Checkpoints(tmp_path / loop.CHECKPOINTS, 1, "val_auc") as checkpoints:
        assert checkpoints.steps() == [2, 4] and checkpoints.best_step() == 2


def test_the_best_is_kept_beside_the_latest(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4}
    options = LoopOptions(5, eval_every=1, checkpoint_every=1, keep=1, best="val_auc")
    fit(tmp_path, new_state(), step, batches, options,
        lambda state: {"val_auc": scores[int(state["step"])]})  # fmt: skip
    with Checkpoints(tmp_path / loop.CHECKPOINTS, 1, "val_auc") as checkpoints:
        assert checkpoints.steps() == [2, 5] and checkpoints.best_step() == 2


def test_a_best_that_is_no_metric(tmp_path):
    options = LoopOptions(5, eval_every=2, best="val_acc")
    with pytest.raises(ValueError, match="best is 'val_acc', .* of this run: val_loss, val_auc$"):
        fit(tmp_path, new_state(), step, batches, options,
            lambda state: {"val_loss": 1.0, "val_auc": 0.5})  # fmt: skip


def test_an_undefined_metric_is_null_and_never_the_best(tmp_path):
    scores = {1: np.nan, 2: 0.9, 3: np.nan, 4: np.nan}
    options = LoopOptions(4, eval_every=1, checkpoint_every=1, keep=1, best="val_auc")
    fit(tmp_path, new_state(), step, batches, options,
        lambda state: {"val_auc": scores[int(state["step"])]})  # fmt: skip
    assert [x["val_auc"] for x in lines(tmp_path)] == [None, 0.9, None, None]
    with Checkpoints(tmp_path / loop.CHECKPOINTS, 1, "val_auc") as checkpoints:
        assert checkpoints.steps() == [2, 4] and checkpoints.best_step() == 2
    for file in (tmp_path / loop.CHECKPOINTS).rglob("metrics/metrics"):
        json.loads(file.read_text(), parse_constant=pytest.fail)


def test_an_unreadable_checkpoint_costs_only_itself(tmp_path):
    options = LoopOptions(6, checkpoint_every=3, keep=3)
    fit(tmp_path, new_state(), step, batches, options)
    newest = tmp_path / loop.CHECKPOINTS / "6"
    for file in newest.rglob("*"):
        if file.is_file() and "d" in file.parts[-2]:
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match="step 6"):
        state = fit(tmp_path, new_state(), step, batches, LoopOptions(6, keep=3))
    assert state["params"]["sum"] == 21
    starts = []
    fit(tmp_path, new_state(), step, batches, LoopOptions(6), None, lambda n, _: starts.append(n))
    assert starts == [6], "the damaged checkpoint was written anew"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(tmp_path, new_state(), step, batches, LoopOptions(2))
    other = new_state() | {"params": {"product": jnp.zeros((3,))}}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="another architecture"):
        fit(tmp_path, other, step, batches, LoopOptions(4))


def test_batches_that_end_early(tmp_path):
    with pytest.raises(ValueError, match="ended after step 2 of 5"):
        fit(tmp_path, new_state(), step, lambda n: itertools.islice(batches(n), 2), LoopOptions(5))


def test_a_full_disk_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def full(self, step, **rest):
        if step == 4:
            raise ValueError("RESOURCE_EXHAUSTED: [Errno 28] No space left on device")
        return save(self, step, **rest)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    options = LoopOptions(6, checkpoint_every=2)
    with pytest.raises(
        OSError, match="no space left for a checkpoint .*; the earlier ones are intact"
    ):
        fit(tmp_path, new_state(), step, batches, options)
    monkeypatch.undo()
    starts = []
    state = fit(tmp_path, new_state(), step, batches, options, None, lambda n, _: starts.append(n))
    assert starts[0] == 2 and state["params"]["sum"] == 21
