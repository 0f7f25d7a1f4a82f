"""Evaluation: a model and a dataset folder -> AUCs with intervals, beside what was published.

`tasks.read` gives a task, `run.evaluate` scores a model on it, `run.recompute` needs no model.
"""
