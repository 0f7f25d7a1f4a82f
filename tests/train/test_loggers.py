"""Who gets the metrics of a run: the values that are logged, and a failure that ends no run."""

import math

import pytest

from medsiglip_jax.train import loggers


class Recorder:
    """Gets metrics, fails at the call of a number, and knows whether it was closed."""

    def __init__(self, fails_at=math.inf, fails_to_close=False):
        self.seen, self.closed = [], False
        self._fails_at, self._fails_to_close = fails_at, fails_to_close

    def __call__(self, step, metrics):
        if len(self.seen) + 1 >= self._fails_at:
            raise ConnectionError("no\nroute to the server")
        self.seen.append((step, metrics))

    def close(self):
        self.closed = True
        if self._fails_to_close:
            raise OSError("no space left")


LINES = [{"step": 2, "loss": 1.5, "val_auc": None}, {"step": 4, "loss": "nan", "grad_norm": "inf"}]


def logged(*recorders):
    """The warnings of a run with these, each named by its number."""
    told = []
    with loggers.Loggers(told.append) as passed_on:
        for number, recorder in enumerate(recorders):
            passed_on.add(f"number {number}", lambda config, recorder=recorder: recorder, {})
        for line in LINES:
            passed_on(line)
    return told


def test_each_line_arrives_as_numbers_and_undefined_ones_do_not():
    recorder, plain = Recorder(), []
    assert logged(recorder, lambda step, metrics: plain.append(step)) == []
    first, (step, metrics) = recorder.seen
    assert first == (2, {"loss": 1.5}) and step == 4 and plain == [2, 4]
    assert math.isnan(metrics["loss"]) and metrics["grad_norm"] == math.inf
    assert recorder.closed


@pytest.mark.parametrize("fails_at, seen", [(1, 0), (2, 1)])
def test_one_that_fails_is_said_once_and_left_out_and_the_others_go_on(fails_at, seen):
    failing, other = Recorder(fails_at), Recorder(fails_to_close=True)
    told = logged(failing, other)
    assert [len(failing.seen), len(other.seen), failing.closed] == [seen, 2, False]
    assert told == [
        "number 0 gets no more metrics, and the run goes on without it: ConnectionError: no route "
        "to the server",
        "number 1 gets no more metrics, and the run goes on without it: OSError: no space left",
    ]


def test_one_that_does_not_start_is_said_and_one_that_is_stopped_stops_the_run():
    told, passed_on = [], loggers.Loggers([].append)
    with loggers.Loggers(told.append) as started:
        started.add("w", lambda config: 1 / config["zero"], {"zero": 0})
        started(LINES[0])
    assert told == ["w gets no more metrics, and the run goes on without it: ZeroDivisionError: "
                    "division by zero"]  # fmt: skip

    def interrupt(step, metrics):
        raise KeyboardInterrupt

    passed_on.add("i", lambda config: interrupt, {})
    with pytest.raises(KeyboardInterrupt):
        passed_on(LINES[0])


def test_a_function_is_found_in_a_module_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def start(config):\n    return config\n\nnumber = 1\n")
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    assert loggers.find(f"{tmp_path}/mine.py:start")({"a": 1}) == {"a": 1}
    monkeypatch.chdir(tmp_path)
    assert loggers.find("mine.py:start")(3) == 3
    assert loggers.find("math:sqrt") is math.sqrt
    for name, say in {
        "mine.py": "file.py:function$",
        "mine.py:": "file.py:function$",
        "mine.py:stop": "has no attribute 'stop'",
        "mine.py:number": "number is no function",
        "gone.py:start": "No such file",
        "no_such_module:start": "No module named 'no_such_module'",
        "broken.py:start": "ModuleNotFoundError: No module named 'no_such_package'",
    }.items():
        with pytest.raises(ValueError, match=f"logger is '{name}'; expected module.*{say}"):
            loggers.find(name)
