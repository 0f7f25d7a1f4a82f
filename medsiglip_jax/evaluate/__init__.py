"""Evaluation of a model on a data set: AUCs with intervals, beside the published figures.

`tasks.read` gives a task, `run.evaluate` scores a model on it, `recompute` needs no model.
"""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, tasks="Task", run="", options="", recompute="", scores="Scores", zero_shot=""
)
