"""AUCs of subgroups are those of their rows, and gaps those of a bootstrap by hand."""

import math

import numpy as np
import pytest

from medsiglip_jax.metrics import auc, bootstrap, delong, subgroup_aucs


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
