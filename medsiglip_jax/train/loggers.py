"""Who gets the metrics of a run beside `metrics.jsonl`: TensorBoard, W&B or anything else."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, cast

OnMetrics = Callable[[int, dict[str, float]], Any]
# The content of the run's `config.json` and its `workdir` -> what gets the metrics.
Start = Callable[[dict[str, Any]], OnMetrics]


def find(name: str) -> Start:
    """The function that a recipe's `logger` names.

    Args:
        name: "module:function", or "file.py:function".

    Raises:
        ValueError: there is none.
    """
    module, colon, function = name.rpartition(":")
    expected = f"logger is {name!r}; expected module:function or file.py:function"
    if not colon or not function:
        raise ValueError(expected)
    try:
        start = getattr(_module(module), function)
    except Exception as error:  # whatever a user's file may do wrong
        raise ValueError(f"{expected}: {type(error).__name__}: {error}") from error
    if not callable(start):
        raise ValueError(f"{expected}: {function} is no function")
    return cast(Start, start)


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("logger", os.path.abspath(name))
    assert spec is not None and spec.loader is not None, "the suffix is one of Python's"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loggers(contextlib.AbstractContextManager["Loggers"]):
    """Passes the metrics on; one that fails is said, and gets no more, and the run goes on.

    What has a method `close` is closed at the end, also of a run that fails.
    """

    def __init__(self, warn: Callable[[str], None]):
        self._warn, self._loggers = warn, dict[str, OnMetrics]()

    def add(self, name: str, start: Start, config: dict[str, Any]) -> None:
        """Starts one; `name` is what a warning calls it."""
        with self._guarded(name):
            self._loggers[name] = start(config)

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Passes on a line of `metrics.jsonl`, without what is undefined."""
        values = {name: float(x) for name, x in line.items() if name != "step" and x is not None}
        for name, logger in list(self._loggers.items()):
            with self._guarded(name):
                logger(line["step"], dict(values))

    def __exit__(self, *_) -> None:
        for name, logger in list(self._loggers.items()):
            with self._guarded(name):
                getattr(logger, "close", lambda: None)()

    @contextlib.contextmanager
    def _guarded(self, name: str):
        try:
            yield
        except Exception as error:
            self._loggers.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"{name} gets no more metrics, and the run goes on without it: {reason}")
