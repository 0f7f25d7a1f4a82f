"""Classes, grades, subgroups and retrieval against scikit-learn and plain loops."""

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from medsiglip_jax.metrics import (
    auc,
    bootstrap,
    class_aucs,
    delong,
    macro_auc,
    quadratic_kappa,
    recall_at_k,
    retrieval,
    subgroup_aucs,
)

# ----------------------------------------------------------------------------------------- classes


def test_class_aucs_of_one_class_a_row():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=200)
    scores = rng.normal(size=(200, 4)) + np.eye(4)[labels]
    labels[:10] = -1
    groups = rng.integers(60, size=200)
    found = class_aucs(scores, labels, ["a", "b", "c", "d"], groups=groups)
    there = labels >= 0
    for k, one in enumerate(found.classes):
        column = scores[there, k], labels[there] == k
        assert one.auc == delong(*column, groups=groups[there])
        assert one.auc.value == pytest.approx(roc_auc_score(column[1], column[0]), abs=1e-12)
        assert (one.positives, one.missing) == (column[1].sum(), 10)
        assert one.positives + one.negatives == 190
    assert [one.name for one in found.classes] == ["a", "b", "c", "d"]
    assert found.macro == pytest.approx(macro_auc(scores[there], labels[there]), abs=1e-12)
    assert found.undefined == ()


def test_class_aucs_of_findings_lists_what_it_cannot_measure():
    scores = np.array([[0.1, 0.9, 0.3], [0.7, 0.2, 0.3], [0.4, 0.6, 0.1], [0.9, 0.1, 0.2]])
    labels = np.array([[0, 1, 0], [1, np.nan, 0], [0, 0, -1], [1, 0, np.nan]])
    found = class_aucs(scores, labels, ["x", "y", "z"])
    assert found.undefined == ("z",) and math.isnan(found.classes[2].auc.value)
    assert found.macro == (1 + 1) / 2 == macro_auc(scores, labels)
    assert [(c.positives, c.negatives, c.missing) for c in found.classes] == [
        (2, 2, 0), (1, 2, 1), (0, 2, 2),
    ]  # fmt: skip
    assert math.isnan(class_aucs(scores[:, 2:], labels[:, 2:]).macro)


def test_class_aucs_refuse():
    with pytest.raises(ValueError, match="row 1, column 0"):
        class_aucs([[0.1, 0.2], [math.nan, 0.2]], [0, 1])
    with pytest.raises(ValueError, match="1 classes for 2 columns"):
        class_aucs([[0.1, 0.2]], [0], ["a"])
    with pytest.raises(ValueError, match="labels contains .*2"):
        class_aucs([[0.1, 0.2]], [[2, 0]])
    with pytest.raises(ValueError, match=r"labels has shape \(1, 1\)"):
        class_aucs([[0.1, 0.2]], [[1]])
    with pytest.raises(ValueError, match="integers from 0 to 1"):
        class_aucs([[0.1, 0.2]], [2])


@pytest.mark.parametrize("seed", range(10))
def test_quadratic_kappa_matches_sklearn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, size=80)
    grades = np.clip(labels + rng.integers(-1, 3, size=80), 0, 4)
    want = cohen_kappa_score(labels, grades, weights="quadratic", labels=range(5))
    assert quadratic_kappa(grades, labels) == pytest.approx(want, abs=1e-12)
    assert quadratic_kappa(labels, labels) == 1


def test_quadratic_kappa_at_the_edges():
    assert quadratic_kappa([0, 2, 0, 2], [2, 0, 2, 0]) == -1
    assert math.isnan(quadratic_kappa([3, 3], [3, 3]))
    assert math.isnan(quadratic_kappa(np.zeros(0, int), np.zeros(0, int)))
    for labels in ([0, -1], [0.0, 1.0], [0]):
        with pytest.raises(ValueError, match="as many integers"):
            quadratic_kappa([0, 1], labels)


# --------------------------------------------------------------------------------------- subgroups


def test_subgroups():
    rng = np.random.default_rng(0)
    n = 600
    sex = rng.choice(["F", "M"], n).astype(object)
    sex[:15] = "unknown"
    labels = (rng.random(n) < 0.3).astype(float)
    labels[20:25] = np.nan
    labels[25:30] = -1
    scores = rng.normal(size=n) + np.where(sex == "F", 2.0, 0.5) * (labels == 1)
    found = {g.name: g for g in subgroup_aucs(scores, labels, sex, samples=300)}
    assert list(found) == ["F", "M", "unknown"]
    there = ~np.isnan(labels) & (labels >= 0)
    for name, group in found.items():
        mine = there & (sex == name)
        assert group.auc == delong(scores[mine], labels[mine])
        rest = there & (sex != name)
        gap = auc(scores[mine], labels[mine]) - auc(scores[rest], labels[rest])
        assert group.gap.value == pytest.approx(gap, abs=1e-12)
        assert group.positives == (labels[mine] == 1).sum()
        assert group.negatives == (labels[mine] == 0).sum()
        assert group.missing == ((sex == name) & ~there).sum()
    assert [g.flagged for g in found.values()] == [False, False, True]
    assert found["F"].gap.low > 0 > found["M"].gap.high

    def gap_of(s, y, f):
        return auc(s[f], y[f]) - auc(s[~f], y[~f])

    by_hand = bootstrap(gap_of, scores[there], labels[there], sex[there] == "F", samples=300)
    assert found["F"].gap.low == pytest.approx(by_hand.low, abs=1e-12)
    assert found["F"].gap.high == pytest.approx(by_hand.high, abs=1e-12)


def test_subgroups_resample_patients():
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.4
    scores, age = rng.normal(size=200) + labels, rng.choice(["old", "young"], 200)
    once = subgroup_aucs(scores, labels, age, samples=200)
    four = [np.repeat(x, 4) for x in (scores, labels, age, np.arange(200))]
    copied = subgroup_aucs(*four[:3], groups=four[3], samples=200)
    for one, other in zip(once, copied, strict=True):
        assert (other.gap.low, other.gap.high) == pytest.approx((one.gap.low, one.gap.high))
        assert other.auc.low == pytest.approx(one.auc.low)


def test_a_single_subgroup_has_no_gap():
    (found,) = subgroup_aucs([1, 2, 3, 4], [0, 1, 0, 1], ["a"] * 4)
    assert found.auc.value == 0.75 and math.isnan(found.gap.value) and found.flagged
    with pytest.raises(ValueError, match=r"subgroups has shape \(1,\)"):
        subgroup_aucs([1, 2], [0, 1], ["a"])


# --------------------------------------------------------------------------------------- retrieval


def plain_recall(queries, targets, query_ids, target_ids, k):
    """Of one query after the other; no ties."""
    cosines = queries @ targets.T
    cosines /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(targets, axis=1)
    hits = [
        (target_ids[np.argsort(-row)[:k]] == id).any()
        for row, id in zip(cosines, query_ids, strict=True)
        if id in target_ids
    ]
    return np.mean(hits), len(hits)


@pytest.mark.parametrize("tile", [7, 64, 2048])
def test_recall_is_that_of_a_plain_loop(tile, monkeypatch):
    monkeypatch.setattr(retrieval, "_TILE", tile)
    rng = np.random.default_rng(0)
    image_ids, text_ids = np.arange(50), rng.permutation(np.repeat(np.arange(60), 3))
    image_ids[40:] = 100 + np.arange(10)  # images without a text, and texts without an image
    centres = rng.normal(size=(120, 16))
    zimg = (centres[image_ids] + rng.normal(size=(50, 16))).astype(np.float32)
    ztxt = (centres[text_ids] + rng.normal(size=(180, 16))).astype(np.float32)
    found = recall_at_k(zimg, 3 * ztxt, image_ids, text_ids, ks=(1, 5, 10))
    for k in (1, 5, 10):
        want = plain_recall(zimg, ztxt, image_ids, text_ids, k)
        assert (found.image_to_text[k], found.images) == want
        want = plain_recall(ztxt, zimg, text_ids, image_ids, k)
        assert (found.text_to_image[k], found.texts) == want
    assert 0 < found.image_to_text[1] < found.image_to_text[10] < 1


def test_recall_of_pairs_and_of_a_collapsed_model():
    z = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    found = recall_at_k(z, z)
    assert found.image_to_text == found.text_to_image == {1: 1, 5: 1, 10: 1}
    flat = recall_at_k(np.ones((30, 8), np.float32), z)
    assert flat.image_to_text[10] < 1 and flat.text_to_image == {1: 0, 5: 0, 10: 0}
    flat = recall_at_k(z, np.ones((30, 8), np.float32))
    assert flat.image_to_text == {1: 0, 5: 0, 10: 0} and flat.text_to_image[10] < 1


def test_recall_refuses():
    z = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="give image_ids and text_ids"):
        recall_at_k(z, z[:2])
    with pytest.raises(ValueError, match=r"ztxt: rows \[1\]"):
        recall_at_k(z, z * np.array([[1], [0], [1]], np.float32))
    with pytest.raises(ValueError, match="expected at least 1"):
        recall_at_k(z, z, ks=(0,))
    nothing = recall_at_k(z, z, np.array([0, 1, 2]), np.array([3, 4, 5]))
    assert nothing.images == 0 and math.isnan(nothing.image_to_text[1])
