"""How much a probe learns from how little: learning curves, few shots, nearest neighbours."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from medsiglip_jax import metrics
from medsiglip_jax.embeddings.probe import linear
from medsiglip_jax.embeddings.probe.features import unit
from medsiglip_jax.embeddings.probe.linear import Labels

# Powers of 8, as in the figures of arXiv 2507.05201.
SIZES = (64, 512, 4096, 32768)
SHOTS = (1, 2, 4, 8, 16, 32)
# Vectors and their labels.
Rows = tuple[Float[np.ndarray, "_ d"], Labels]
# (training, validation, test, classes) -> scores of the test rows.
Method = Callable[[Rows, Rows, Rows, int], Float64[np.ndarray, "n c"]]
# Queries compared with all training vectors at a time.
_BLOCK = 512


def logistic(train: Rows, validation: Rows, test: Rows, classes: int) -> Float64[np.ndarray, "n c"]:
    """Scores of a probe; see `probe.fit`. NaN of training rows that are all of one class."""
    if train[1].ndim == 1 and len(np.unique(train[1][train[1] >= 0])) < 2:
        return np.full((len(test[0]), classes), np.nan)
    names = list(map(str, range(classes)))
    return linear.fit(*train, *validation, names).predict(test[0])


def nearest(
    train: Rows, validation: Rows, test: Rows, classes: int, k: int = 20
) -> Float64[np.ndarray, "n c"]:
    """Shares of each class among the k nearest training rows by cosine; needs no validation.

    Fewer rows than k are all neighbours. A neighbour whose label is unknown has no vote; where none
    has, the score is that of the whole training set.
    """
    labels, x, k = linear.columns(train[1], classes), unit(train[0]), min(k, len(train[0]))
    prior = _share(labels)
    scores = np.empty((len(test[0]), classes))
    for start in range(0, len(scores), _BLOCK):
        cosines = unit(test[0][start : start + _BLOCK]) @ x.T
        shares = _share(labels[_highest(cosines, k).T])
        scores[start : start + _BLOCK] = np.where(np.isnan(shares), prior, shares)
    return scores


def _highest(cosines: Float[np.ndarray, "q n"], k: int) -> Int64[np.ndarray, "q k"]:
    """Columns of the k highest of each row, by column; of equal ones the first.

    Those that a stable sort would have first, without sorting: of 512 x 86,524 in 0.8 s, not
    6.8.
    """
    count = cosines.shape[1]
    if k == count:
        return np.tile(np.arange(count), (len(cosines), 1))
    bound = np.partition(cosines, -k, axis=1)[:, -k, None]
    near = cosines >= bound
    for row in np.flatnonzero(near.sum(axis=1) > k):
        equal = np.flatnonzero(cosines[row] == bound[row])
        near[row, equal[k - near[row].sum() :]] = False
    return np.flatnonzero(near).reshape(-1, k) % count


def _share(labels: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the labels that are known, NaN of none."""
    known = ~np.isnan(labels)
    total, count = np.where(known, labels, 0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def prototypes(
    train: Rows, validation: Rows, test: Rows, classes: int
) -> Float64[np.ndarray, "n c"]:
    """Cosine with the mean unit vector of each class; needs no validation, for few shots.

    Source: Snell et al., arXiv 1703.05175, with cosines. A class without a row scores -1.
    """
    members = np.nan_to_num(linear.columns(train[1], classes))
    means = members.T @ unit(train[0])
    length = np.linalg.norm(means, axis=1, keepdims=True)
    cosines = unit(test[0]) @ (means / np.where(length > 0, length, 1)).T
    return np.where(length[:, 0] > 0, cosines, -1)


METHODS: dict[str, Method] = {"logistic": logistic, "knn": nearest, "prototypes": prototypes}


def learning_curve(
    train: Rows,
    validation: Rows,
    test: Rows,
    *,
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    method: str = "logistic",
    done: Sequence[Mapping[str, Any]] = (),
    on_row: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> list[dict[str, Any]]:
    """Learns from more and more rows: data-efficient classification.

    The rows of one seed and size contain those of the smaller sizes. All validation rows choose C.

    Args:
        train: what is drawn from; test patients must not be among them (`features.split`).
        validation: see `probe.fit`.
        test: what the AUC is computed on.
        sizes: rows to learn from; those above the number of training rows are left out, and all of
            them, with the first seed only, are added.
        seeds: of the draws.
        method: of `METHODS`.
        done: rows of an earlier call on the same parts, which are not computed again.
        on_row: called with every row of the result.

    Returns:
        Rows of `method`, `n`, `seed`, `auc` (macro, one against the rest) and `undefined`, the
        numbers of the classes that have none: the draw, or the test rows, have only one of the
        labels. Where that is all of them, `auc` is None.

    Raises:
        ValueError: an unknown method, or as for `probe.fit`.
    """
    n = len(train[0])
    orders = {seed: np.random.default_rng(seed).permutation(n) for seed in seeds}
    draws = [(size, s, orders[s][:size]) for size in sizes if size < n for s in seeds]
    draws.append((n, seeds[0], np.arange(n)))
    return list(_curve("n", draws, train, validation, test, method, done, on_row))


def few_shot(
    train: Rows,
    validation: Rows,
    test: Rows,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    method: str = "prototypes",
    done: Sequence[Mapping[str, Any]] = (),
    on_row: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> list[dict[str, Any]]:
    """Learns from a few rows of each class; for findings, of each with and without it.

    Where a class has fewer rows than shots, it gives all. See `learning_curve` for the arguments.

    Returns:
        Rows of `method`, `shots`, `seed`, `auc` and `undefined`.
    """
    draws = [(shot, seed, draw_per_class(train[1], shot, seed)) for shot in shots for seed in seeds]
    return list(_curve("shots", draws, train, validation, test, method, done, on_row))


def draw_per_class(labels: Labels, shots: int, seed: int) -> np.ndarray:
    """Rows, each once: that many of each class; of each label of each finding, at least as many."""
    order = np.random.default_rng(seed).permutation(len(labels))
    findings = labels[:, None] if labels.ndim == 1 else labels
    chosen = np.zeros(len(labels), bool)
    for column in findings.T:
        for value in np.unique(column[column >= 0]):
            mine = order[column[order] == value]
            chosen[mine[: max(0, shots)]] = True
    return np.flatnonzero(chosen)


def _curve(name: str, draws, train, validation, test, method: str, done, on_row) -> Iterator[dict]:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    labels = [x[1] for x in (train, validation, test)]
    classes = int(labels[0].shape[1] if labels[0].ndim == 2 else max(x.max() for x in labels) + 1)
    there = {(row["method"], row[name], row["seed"]): dict(row) for row in done if name in row}
    for size, seed, rows in draws:
        if (found := there.get((method, size, seed))) is None:
            drawn = train[0][rows], train[1][rows]
            scores = METHODS[method](drawn, validation, test, classes)
            judged = judge(scores, drawn[1], test[1])
            found = {"method": method, name: size, "seed": seed, **judged}
        on_row(found)
        yield found


def judge(scores: Float[np.ndarray, "n c"], learnt: Labels, labels: Labels) -> dict[str, Any]:
    """`auc` and `undefined` of scores of test rows; see `learning_curve`.

    Args:
        scores: of the test rows.
        learnt: labels of the rows learnt from: a class that they do not have and lack has no AUC.
        labels: of the test rows.
    """
    known = linear.columns(learnt, scores.shape[1])
    both = (known == 0).any(axis=0) & (known == 1).any(axis=0)
    wanted = np.where(both, linear.columns(labels, scores.shape[1]), np.nan)
    found = metrics.class_aucs(np.where(both, scores, 0), wanted)
    macro = None if np.isnan(found.macro) else found.macro  # JSON has no NaN
    return {"auc": macro, "undefined": [int(name) for name in found.undefined]}
