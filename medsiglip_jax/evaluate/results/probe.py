"""What learning from labels adds to prompts: the numbers of the probe in results.json."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.results import aucs
from medsiglip_jax.evaluate.scores import Scores, common, known
from medsiglip_jax.evaluate.tasks import Task


def compare(learned: Learned, task: Task) -> dict[str, Any] | None:
    """Compares the probe with the prompts on the same test images; None without a probe.

    Classes that the probe could not learn are left out of both means that are compared. Every
    class is tested by DeLong's paired test, with p-values adjusted by Holm's method over the
    classes, and so are the means.
    """
    if learned.probe is None or learned.probe_validation is None or learned.knn is None:
        return None
    published, facts = task.figures, learned.probe.meta
    compared = learned.probe, learned.zero_shot, learned.knn
    probe, zero_shot, knn = (_learned_classes(scores, learned.probe) for scores in compared)
    test = metrics.macro_delong_test(
        probe.scores, zero_shot.scores, probe.labels, groups=probe.units
    )
    of_classes = aucs.of_classes(probe)
    columns = (common(probe, zero_shot, j) for j in range(len(probe.classes)))
    tests = [metrics.delong_test(*rows, groups=units) for *rows, units in columns]
    return {
        "exclusive": task.exclusive,
        **{key: facts[key] for key in ("images", "how", "scale", "strengths")},
        "judged": {"validation": len(learned.probe_validation.ids), "test": len(probe.ids)},
        "unchosen": _unchosen(learned.probe_validation, task.exclusive),
        "macro_auc": aucs.mean(probe, published.probe_mean),
        "undefined": of_classes.undefined,
        "classes": list(_classes(of_classes, learned.probe, tests, published.probe_auc)),
        "zero_shot_macro": aucs.mean(zero_shot, published.mean),
        "difference": {**aucs.limits(test.difference, "value"), "p": test.p},
        "knn": {"k": learned.knn.meta["k"], "macro_auc": aucs.mean(knn)},
        **{key: _with_names(learned.curves[key], probe.classes) for key in _CURVES},
    }


_CURVES = ("few_shot", "learning_curve")


def _learned_classes(scores: Scores, probe: Scores) -> Scores:
    """Without labels of the classes that the probe has no scores of: means leave them out."""
    values = np.where(probe.learned, scores.scores, 0)
    return replace(scores, scores=values, labels=np.where(probe.learned, scores.labels, np.nan))


def _unchosen(validation: Scores, exclusive: bool) -> Sequence[str]:
    """Learned classes whose strength no AUC on validation images could choose.

    Exclusive classes share one strength: all or none of them are listed.
    """
    if exclusive:
        single = validation.select(np.flatnonzero(validation.labels.sum(axis=1) == 1))
        several = len(np.unique(single.labels.argmax(axis=1))) > 1
        chosen = np.full(len(single.classes), several)
    else:
        labels = [known(validation, j).positive for j in range(len(validation.classes))]
        chosen = np.array([len(np.unique(column)) > 1 for column in labels])
    return np.array(validation.classes, object)[validation.learned & ~chosen].tolist()


def _classes(
    of_classes: metrics.ClassAucs,
    scores: Scores,
    tests: Sequence[metrics.Comparison],
    published: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """Rows of the classes; those that could not be learned are counted all the same."""
    adjusted = metrics.holm([test.p for test in tests])
    rows = zip(of_classes.classes, scores.labels.T, tests, adjusted.tolist(), strict=True)
    for of_class, column, test, p_holm in rows:
        yield {
            "class": of_class.name,
            **aucs.limits(of_class.auc),
            **aucs.counts(column, scores.units),
            **aucs.against(published.get(of_class.name), of_class.auc),
            "minus_zero_shot": aucs.limits(test.difference, "value"),
            "p": test.p,
            "p_holm": p_holm,
        }


def _with_names(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a curve, with names of the classes that have no AUC."""
    return [{**row, "undefined": [classes[i] for i in row["undefined"]]} for row in rows]
