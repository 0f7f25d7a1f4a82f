"""Evaluation: a model and a data set -> AUCs with intervals, beside the published ones.

`tasks.read` gives a task, `run.evaluate` scores a model on it, `recompute` does what needs no
model again. In the order of the work: `data` (a data set on disk -> images and labels), `run`,
`retrieval` and `learned` (images -> files of scores), `results` (scores -> numbers), `report`
(numbers -> tables and pages).
"""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, tasks="Task", run="", options="", recompute="", scores="Scores", zero_shot="",
)  # fmt: skip
