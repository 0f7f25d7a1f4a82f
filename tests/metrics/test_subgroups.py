"""AUCs of subgroups are those of their rows; gaps hold the truth, by patient."""

import math

import numpy as np
import pytest
from scipy import special

from medsiglip_jax.metrics import (
    auc,
    bootstrap,
    delong,
    proportion,
    subgroup_aucs,
    subgroup_shares,
)


def test_subgroups():
    rng = np.random.default_rng(0)
    n = 600
    sex = rng.choice(["F", "M"], n).astype(object)
    sex[:15] = "unknown"
    labels = (rng.random(n) < 0.3).astype(float)
    labels[20:25] = np.nan
    labels[25:30] = -1
    scores = rng.normal(size=n) + np.where(sex == "F", 2.0, 0.5) * (labels == 1)
    found = {g.name: g for g in subgroup_aucs(scores, labels, sex)}
    assert list(found) == ["F", "M", "unknown"]
    there = ~np.isnan(labels) & (labels >= 0)
    for name, group in found.items():
        mine = there & (sex == name)
        want = delong(scores[mine], labels[mine], student=True)
        assert [group.auc.low, group.auc.high] == pytest.approx([want.low, want.high], abs=1e-12)
        rest = there & (sex != name)
        gap = auc(scores[mine], labels[mine]) - auc(scores[rest], labels[rest])
        assert group.gap.value == pytest.approx(gap, abs=1e-12)
        assert group.positives == (labels[mine] == 1).sum()
        assert group.negatives == (labels[mine] == 0).sum()
        assert group.missing == ((sex == name) & ~there).sum()
        assert (group.p < 0.05) == (0.0 not in group.gap)
    assert [g.flagged for g in found.values()] == [False, False, True]
    assert found["F"].gap.low > 0 > found["M"].gap.high

    def gap_of(s, y, f):
        return auc(s[f], y[f]) - auc(s[~f], y[~f])

    by_hand = bootstrap(gap_of, scores[there], labels[there], sex[there] == "F", samples=500)
    limits = [found["F"].gap.low, found["F"].gap.high]
    assert limits == pytest.approx([by_hand.low, by_hand.high], abs=0.015)


def test_p_is_one_minus_the_level_whose_limit_is_zero():
    rng = np.random.default_rng(3)
    labels = rng.random(120) < 0.4
    scores = rng.normal(size=120) + labels
    names = rng.choice(["a", "b", "c"], 120)
    for i, group in enumerate(subgroup_aucs(scores, labels, names)):
        gap = subgroup_aucs(scores, labels, names, level=1 - group.p)[i].gap
        assert (gap.low if gap.value > 0 else gap.high) == pytest.approx(0, abs=1e-6)


def test_copies_of_a_patient_tell_nothing_new():
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.4
    scores, age = rng.normal(size=200) + labels, rng.choice(["old", "young"], 200)
    once = subgroup_aucs(scores, labels, age)
    four = [np.repeat(x, 4) for x in (scores, labels, age, np.arange(200))]
    copied = subgroup_aucs(*four[:3], groups=four[3])
    for one, other in zip(once, copied, strict=True):
        assert (other.gap.low, other.gap.high) == pytest.approx((one.gap.low, one.gap.high))
        assert (other.auc.low, other.p) == pytest.approx((one.auc.low, one.p))


def test_many_images_of_few_patients_are_flagged():
    labels, sex = np.arange(80) % 2, np.repeat(["F", "M"], 40)
    for patients, flagged in ((4, True), (20, False)):
        groups = np.arange(80) // 2 % patients + 100 * (sex == "M")
        found = subgroup_aucs(np.arange(80) % 7, labels, sex, groups=groups)
        assert [g.flagged for g in found] == [flagged, flagged]


def test_a_perfect_subgroup_has_a_gap_with_a_width():
    labels, part = np.arange(80) % 2, np.repeat(["a", "b"], 40)
    noise = 2 * np.random.default_rng(0).normal(size=80) * (part == "b")
    perfect, other = subgroup_aucs(labels + noise, labels, part)
    assert perfect.auc == delong(labels[:40], labels[:40]) and perfect.auc.low < 1
    down, up = 1 - perfect.auc.low, other.auc.high - other.auc.value
    assert perfect.gap.value - perfect.gap.low == pytest.approx(math.hypot(down, up))
    assert perfect.gap.high - perfect.gap.value == pytest.approx(other.auc.value - other.auc.low)


def test_gaps_of_nearly_perfect_aucs_have_no_limits():
    """No gap of theirs could be told from none, however large it is in these patients."""
    labels, part = np.arange(80) % 2, np.repeat(["a", "b"], 40)
    scores = labels * 1.0
    for swapped, withheld in ((0, True), (1, True), (12, False)):
        wrong = np.flatnonzero((part == "b") & (labels == 0))[:swapped]
        scores[wrong] = 2
        perfect, _ = subgroup_aucs(scores, labels, part)
        assert math.isnan(perfect.gap.low) is withheld and math.isnan(perfect.gap.high) is withheld
        assert (perfect.p < 0.05) is not withheld


@pytest.mark.slow
@pytest.mark.parametrize("views", [False, True])
def test_gaps_hold_the_truth(views):
    """Of patients with 3 images each, in subgroups of patients, or of images (such as views)."""
    held, units = [], np.repeat(np.arange(60), 3)
    for seed in range(200):
        rng = np.random.default_rng([2, seed])
        of_images, of_patients = rng.random(180) < 0.4, rng.random(60)[units] < 0.4
        part, labels = of_images if views else of_patients, rng.random(60)[units] < 0.4
        apart = math.sqrt(2) * special.ndtri(np.where(part, 0.85, 0.75))
        noise = rng.normal(size=60)[units] + rng.normal(size=180)
        found = subgroup_aucs(noise / math.sqrt(2) + apart * labels, labels, part, groups=units)
        held.append(0.85 - 0.75 in found[1].gap)
    assert 0.91 <= np.mean(held) <= 0.995


def test_shares_in_subgroups_are_proportions_and_gaps_newcombes():
    rng = np.random.default_rng(0)
    hits, names, groups = rng.random(90) < 0.7, rng.choice(["F", "M"], 90), np.arange(90) // 2
    female, male = subgroup_shares(hits, names, groups=groups)
    inside = names == "F"
    assert female.share == proportion(hits[inside], groups[inside])
    assert male.share == proportion(hits[~inside], groups[~inside])
    gap, a, b = female.gap, female.share, male.share
    assert gap.value == pytest.approx(hits[inside].mean() - hits[~inside].mean())
    assert gap.value - gap.low == pytest.approx(math.hypot(a.value - a.low, b.high - b.value))
    assert (male.gap.low, male.gap.high) == pytest.approx((-gap.high, -gap.low))
    assert female.rows == inside.sum() and not female.flagged
    few = subgroup_shares(hits, names, groups=groups // 9)
    assert all(found.flagged for found in few)
    with pytest.raises(ValueError, match=r"subgroups has shape \(1,\)"):
        subgroup_shares(hits, ["F"])


def test_newcombes_published_example():
    """56 of 70 against 48 of 80: 0.2, from 0.0524 to 0.3339 (Newcombe 1998, table II, (a))."""
    hits = np.repeat([True, False, True, False], [56, 14, 48, 32])
    found = subgroup_shares(hits, np.repeat(["a", "b"], [70, 80]))[0].gap
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_a_single_subgroup_has_no_gap():
    (found,) = subgroup_aucs([1, 2, 3, 4], [0, 1, 0, 1], ["a"] * 4)
    assert found.auc.value == 0.75 and math.isnan(found.gap.value) and found.flagged
    assert math.isnan(found.p) and math.isnan(found.gap.low)
    with pytest.raises(ValueError, match=r"subgroups has shape \(1,\)"):
        subgroup_aucs([1, 2], [0, 1], ["a"])
