"""Learning curves, few shots, nearest neighbours and prototypes."""

import numpy as np
import pytest
from embedding_runs import draw, findings
from sklearn.neighbors import KNeighborsClassifier

from medsiglip_jax import metrics
from medsiglip_jax.embeddings.probe import learning, linear, scaling
from medsiglip_jax.embeddings.probe.logistic import Labelled


def test_learning_curves_rise():
    parts = draw(800, 4), draw(200, 4, seed=1), draw(400, 4, seed=2)
    seen = []
    rows = learning.learning_curve(
        *parts, sizes=(16, 128, 9999), seeds=(0, 1, 2), on_row=seen.append
    )
    assert rows == seen
    known = [{**row, "auc": 2.0} for row in rows[:2]]  # is believed, and not computed again
    again = learning.learning_curve(*parts, sizes=(16, 128), seeds=(0, 1, 2), done=known)
    assert again == [*known, *rows[2:]]
    assert [(row["n"], row["seed"]) for row in rows] == [
        *((16, s) for s in range(3)), *((128, s) for s in range(3)), (800, 0),
    ]  # fmt: skip
    few, more, full = (np.mean([r["auc"] for r in rows if r["n"] == n]) for n in (16, 128, 800))
    assert few + 0.02 < more < full - 0.003
    fitted = linear.fit(*parts[0], *parts[1])
    want = metrics.macro_auc(fitted.predict(parts[2][0]), parts[2][1])
    assert rows[-1]["auc"] == pytest.approx(want, abs=1e-12)
    assert rows[-1]["undefined"] == []


def test_learning_lists_what_a_draw_lacks():
    (x, y), chosen, test = findings(300), findings(100, seed=1), findings(100, seed=2)
    y[:, 1] = 0
    y[7, 1] = 1
    for method in learning.METHODS:
        rows = learning.learning_curve(
            Labelled(x, y), chosen, test, sizes=(30,), seeds=(1,), method=method
        )
        assert rows[0]["undefined"] == [1] and 0.4 < rows[0]["auc"] <= 1
        assert rows[1]["undefined"] == []
    one = Labelled(draw(40).vectors, np.zeros(40, np.int32))
    (row,) = learning.learning_curve(one, draw(30), draw(30), sizes=())
    assert row["auc"] is None and row["undefined"] == [0, 1, 2]
    with pytest.raises(ValueError, match="method is 'svm'"):
        learning.learning_curve(Labelled(x, y), chosen, test, method="svm")
    for wrong in ({"sizes": (64, -5)}, {"sizes": (0,)}, {"seeds": range(0)}):
        with pytest.raises(ValueError, match="at least (1|one)"):
            learning.learning_curve(Labelled(x, y), chosen, test, **wrong)


def test_nearest_neighbours_are_those_of_sklearn():
    (x, y), (xt, _) = draw(300), draw(700, seed=1)
    x, xt = x - 5, xt - 5
    model = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(x.astype(float), y)
    want = model.predict_proba(xt.astype(float))
    found = learning.nearest(Labelled(x, y), xt, 3)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    assert learning.nearest(Labelled(x[:5], y[:5]), xt, 3).shape == (700, 3)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_of_equally_near_neighbours_the_first_are_taken(k):
    """As a stable sort does; there are 27 different vectors."""
    rng = np.random.default_rng(0)
    x, xt = (rng.integers(-1, 2, size=(n, 3)).astype(np.float32) for n in (200, 60))
    x, xt, y = x + 0.5, xt + 0.5, rng.integers(2, size=(200, 1)).astype(np.float32)
    order = np.argsort(-(scaling.unit(xt) @ scaling.unit(x).T), axis=1, kind="stable")[:, :k]
    want = y[order, 0].mean(axis=1, dtype=float)
    found = learning.nearest(Labelled(x, y), xt, 1, k)
    np.testing.assert_array_equal(found[:, 0], want)


def test_neighbours_are_picked_not_sorted(monkeypatch):
    monkeypatch.setattr(np, "argsort", None)  # of 86,524 training rows, 8 times as slow
    assert learning.nearest(draw(300), draw(50, seed=2).vectors, 3).shape == (50, 3)


def test_neighbours_without_a_label_have_no_vote():
    x = np.eye(4, dtype=np.float32)
    y = np.array([[1], [np.nan], [0], [0]], np.float32)
    near = learning.nearest(Labelled(x, y), x[:2], 1, k=1)
    np.testing.assert_allclose(near, [[1], [1 / 3]])


def test_prototypes_by_hand():
    x = np.array([[3, 0], [0, 1], [0, 5]], np.float32)
    y = np.array([0, 1, 1], np.int32)
    test = np.array([[1, 1], [-2, 0]], np.float32)
    found = learning.prototypes(Labelled(x, y), test, 3)
    r = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[r, r, -1], [-1, 0, -1]], atol=1e-7)


def test_few_shots():
    labels = np.array([0] * 50 + [1] * 3 + [-1] * 7, np.int32)
    rows = learning.draw_per_class(labels, 5, seed=0)
    assert np.bincount(labels[rows]).tolist() == [5, 3]
    assert (rows == learning.draw_per_class(labels, 5, 0)).all()
    assert (rows != learning.draw_per_class(labels, 5, 1)).any()
    matrix = np.array([[0, 1], [0, np.nan], [1, 0], [0, 0]], np.float32)
    assert 2 <= len(learning.draw_per_class(matrix, 1, 0)) <= 4
    parts = draw(600, 4), draw(200, 4, seed=1), draw(400, 4, seed=2)
    parts = [Labelled(x - 5, y) for x, y in parts]
    found = learning.few_shot(*parts, shots=(1, 32), seeds=range(4))
    assert len(found) == 8 and set(found[0]) == {"method", "shots", "seed", "auc", "undefined"}
    one, many = (np.mean([r["auc"] for r in found if r["shots"] == k]) for k in (1, 32))
    assert 0.5 < one < many - 0.05
