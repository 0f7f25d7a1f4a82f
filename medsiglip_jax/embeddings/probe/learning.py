"""Data-efficient classification: learning curves, few-shot learning, nearest neighbours."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from medsiglip_jax import metrics
from medsiglip_jax.data.labels import label_columns
from medsiglip_jax.embeddings.probe import linear, scaling
from medsiglip_jax.embeddings.probe.logistic import Labelled, Labels
from medsiglip_jax.files import json as json_files

# Powers of 8, as in the figures of arXiv 2507.05201.
SIZES = (64, 512, 4096, 32768)
SHOTS = (1, 2, 4, 8, 16, 32)
Scores = Float64[np.ndarray, "n c"]
# (training, validation, test vectors, number of classes) -> scores of the test vectors.
Method = Callable[[Labelled, Labelled, Float[np.ndarray, "_ d"], int], Float64[np.ndarray, "_ c"]]
# Queries compared with all training vectors at a time.
_BLOCK = 512


def logistic(
    train: Labelled, validation: Labelled, test: Float[np.ndarray, "n d"], classes: int
) -> Scores:
    """Scores of a probe, see `linear.fit`; NaN if the training rows are all of one class."""
    if train.labels.ndim == 1 and len(np.unique(train.labels[train.labels >= 0])) < 2:
        return np.full((len(test), classes), np.nan)
    return linear.fit(*train, *validation, list(map(str, range(classes)))).predict(test)


def nearest(train: Labelled, test: Float[np.ndarray, "n d"], classes: int, k: int = 20) -> Scores:
    """The share of each class among the k nearest training rows by cosine.

    With fewer than k training rows, all are neighbours. Neighbours with an unknown label do not
    vote; where none votes, the score is the share in the whole training set.
    """
    labels, x = label_columns(train.labels, classes), scaling.unit(train.vectors)
    k, prior = min(k, len(x)), _share(labels)
    scores = np.empty((len(test), classes))
    for start in range(0, len(scores), _BLOCK):
        cosines = scaling.unit(test[start : start + _BLOCK]) @ x.T
        shares = _share(labels[_highest(cosines, k).T])
        scores[start : start + _BLOCK] = np.where(np.isnan(shares), prior, shares)
    return scores


def _highest(cosines: Float[np.ndarray, "q n"], k: int) -> Int64[np.ndarray, "q k"]:
    """The columns of the k highest values of each row, ascending; among equals the first columns.

    These are the ones that a stable sort puts first, found without sorting: 0.8 instead of 6.8 s
    for 512 x 86,524.
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
    """Mean over the first axis of the known labels; NaN where none is known."""
    known = ~np.isnan(labels)
    total, count = np.where(known, labels, 0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def prototypes(train: Labelled, test: Float[np.ndarray, "n d"], classes: int) -> Scores:
    """Cosine with the mean unit vector of each class, for few shots.

    Source: Snell et al., arXiv 1703.05175, with cosines. A class without training rows scores -1.
    """
    members = np.nan_to_num(label_columns(train.labels, classes))
    means = members.T @ scaling.unit(train.vectors)
    length = np.linalg.norm(means, axis=1, keepdims=True)
    cosines = scaling.unit(test) @ (means / np.where(length > 0, length, 1)).T
    return np.where(length[:, 0] > 0, cosines, -1)


METHODS: dict[str, Method] = {
    "logistic": logistic,
    "knn": lambda train, _, test, classes: nearest(train, test, classes),
    "prototypes": lambda train, _, test, classes: prototypes(train, test, classes),
}


def learning_curve(
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    *,
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    method: str = "logistic",
    done: Sequence[Mapping[str, Any]] = (),
    on_row: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> list[dict[str, Any]]:
    """The AUC on test rows after learning from more and more training rows.

    The draw of one seed and size contains the draws of smaller sizes. C is always chosen on all
    validation rows.

    Args:
        train: the rows to draw from; without test patients (see `features.split`).
        validation: see `linear.fit`.
        test: the AUC is computed on these.
        sizes: numbers of rows to learn from. Those above the number of training rows are left out;
            all training rows are added, with the first seed only.
        seeds: of the draws.
        method: a name of `METHODS`.
        done: results of an earlier call with the same data, which are not recomputed.
        on_row: called with every result.

    Returns:
        For each draw `method`, `n`, `seed`, `auc` (macro, one against the rest) and `undefined`,
        the numbers of the classes without an AUC, because the draw or the test rows have only one
        label. If that is so for all classes, `auc` is None.

    Raises:
        ValueError: an unknown method, no seed, a size below 1, or as for `linear.fit`.
    """
    if not seeds:
        raise ValueError("there are no seeds to draw with; expected at least one")
    if min(sizes, default=1) < 1:
        raise ValueError(f"sizes is {[*sizes]}; expected numbers of rows, each at least 1")
    n = len(train.vectors)
    orders = {seed: np.random.default_rng(seed).permutation(n) for seed in seeds}
    draws = [(size, s, orders[s][:size]) for size in sizes if size < n for s in seeds]
    draws.append((n, seeds[0], np.arange(n)))
    return list(_curve("n", draws, train, validation, test, method, done, on_row))


def few_shot(
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    method: str = "prototypes",
    done: Sequence[Mapping[str, Any]] = (),
    on_row: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> list[dict[str, Any]]:
    """The AUC after learning from a few rows of each class; for findings, of each label of each.

    A class with fewer rows than shots gives all of them. See `learning_curve` for the arguments.

    Returns:
        For each draw `method`, `shots`, `seed`, `auc` and `undefined`.
    """
    labels = train.labels
    draws = [(shot, seed, draw_per_class(labels, shot, seed)) for shot in shots for seed in seeds]
    return list(_curve("shots", draws, train, validation, test, method, done, on_row))


def draw_per_class(labels: Labels, shots: int, seed: int) -> np.ndarray:
    """Row numbers: `shots` of each class, or at least as many of each label of each finding."""
    order = np.random.default_rng(seed).permutation(len(labels))
    findings = labels[:, None] if labels.ndim == 1 else labels
    chosen = np.zeros(len(labels), bool)
    for column in findings.T:
        for value in np.unique(column[column >= 0]):
            mine = order[column[order] == value]
            chosen[mine[: max(0, shots)]] = True
    return np.flatnonzero(chosen)


def _curve(
    axis: str,
    draws: Sequence[tuple[int, int, np.ndarray]],
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    method: str,
    done: Sequence[Mapping[str, Any]],
    on_row: Callable[[dict[str, Any]], Any],
) -> Iterator[dict[str, Any]]:
    """One result for each draw of (size, seed, rows); `axis` is the key of the size."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    classes = linear.count_classes(train.labels, validation.labels, test.labels)
    known = {(row["method"], row[axis], row["seed"]): dict(row) for row in done if axis in row}
    for size, seed, rows in draws:
        result = known.get((method, size, seed))
        if result is None:
            drawn = Labelled(train.vectors[rows], train.labels[rows])
            scores = METHODS[method](drawn, validation, test.vectors, classes)
            judged = judge(scores, drawn.labels, test.labels)
            result = {"method": method, axis: size, "seed": seed, **judged}
        on_row(result)
        yield result


def judge(
    scores: Float[np.ndarray, "n c"], train_labels: Labels, test_labels: Labels
) -> dict[str, Any]:
    """`auc` and `undefined` of scores of test rows; see `learning_curve`.

    Args:
        scores: of the test rows.
        train_labels: of the rows learnt from; a class with only one label among them has no AUC.
        test_labels: of the test rows.
    """
    classes = scores.shape[1]
    learnt = label_columns(train_labels, classes)
    both = (learnt == 0).any(axis=0) & (learnt == 1).any(axis=0)
    wanted = np.where(both, label_columns(test_labels, classes), np.nan)
    aucs = metrics.class_aucs(np.where(both, scores, 0), wanted)
    undefined = [int(name) for name in aucs.undefined]
    return {"auc": json_files.plain(aucs.macro), "undefined": undefined}
