"""DeLong against its definition over all pairs, a published example, and simulated truth."""

import math

import numpy as np
import pytest
from scipy import special, stats

from medsiglip_jax.metrics import auc, delong, delong_test


def case(seed, levels=None):
    rng = np.random.default_rng(seed)
    labels = rng.random(80) < 0.3
    labels[:4] = True, True, False, False
    scores = np.stack([rng.normal(size=80) + labels, rng.normal(size=80) + 0.5 * labels])
    return (scores if levels is None else np.round(scores * levels)), labels


def pairs(scores, labels):
    """Right order of every positive (row) with every negative (column)."""
    one, other = scores[labels][:, None], scores[~labels]
    return (one > other) + 0.5 * (one == other)


def covariance(scores, labels):
    """Of the AUCs, by the definition of DeLong 1988: O(positives x negatives)."""
    wins = np.stack([pairs(s, labels) for s in scores])
    v10, v01 = wins.mean(2), wins.mean(1)
    return np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]


def freedom(scores, labels):
    """Of the difference of two AUCs, by Welch and Satterthwaite."""
    wins = pairs(scores[0], labels) - pairs(scores[1], labels)
    of = [wins.mean(axis) for axis in (1, 0)]
    parts = np.array([x.var(ddof=1) / len(x) for x in of])
    return parts.sum() ** 2 / (parts**2 / [len(x) - 1 for x in of]).sum()


@pytest.mark.parametrize("levels", [None, 1, 10])
@pytest.mark.parametrize("seed", range(4))
def test_interval_and_test_are_those_of_the_definition(seed, levels):
    scores, labels = case(seed, levels)
    values, s = [pairs(x, labels).mean() for x in scores], covariance(scores, labels)
    for value, variance, x in zip(values, np.diag(s), scores, strict=True):
        found = delong(x, labels, level=0.9)
        logits = math.log(value / (1 - value)) + np.array([-1, 1]) * (
            1.6448536269514722 * math.sqrt(variance) / (value * (1 - value))
        )
        limits = 1 / (1 + np.exp(-logits))
        assert found.value == pytest.approx(value, abs=1e-12)
        np.testing.assert_allclose([found.low, found.high], limits, rtol=0, atol=1e-10)
    compared = delong_test(*scores, labels)
    difference, error = values[0] - values[1], math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    assert compared.difference.value == pytest.approx(difference, abs=1e-12)
    assert compared.z == pytest.approx(difference / error, rel=1e-9)
    degrees = freedom(scores, labels)
    assert compared.p == pytest.approx(2 * stats.t.sf(abs(difference / error), degrees), rel=1e-9)
    np.testing.assert_allclose(
        [compared.difference.low, compared.difference.high],
        stats.t.interval(0.95, degrees, difference, error), rtol=0, atol=1e-10,
    )  # fmt: skip
    # Against a constant score it is a test that scipy knows.
    tested = stats.brunnermunzel(scores[0][~labels], scores[0][labels], distribution="t")
    assert delong_test(scores[0], np.zeros(80), labels).p == pytest.approx(tested.pvalue, rel=1e-9)


def test_published_example():
    """109 CT images rated by one reader (Hanley and McNeil, Radiology 143 (1982), 29, table I);
    Stata's `roctab` prints DeLong's 0.8932, 0.0307 [0.83295, 0.95339] for them. A constant score
    has the AUC 0.5 and no variance."""
    counts = np.array([[33, 6, 6, 11, 2], [3, 2, 2, 11, 33]])
    ratings = np.concatenate([np.repeat(np.arange(1, 6), row) for row in counts])
    labels = np.repeat([0, 1], counts.sum(axis=1))
    compared = delong_test(ratings, np.zeros(109), labels)
    error = compared.difference.value / compared.z
    limits = stats.norm.interval(0.95, compared.difference.value + 0.5, error)
    assert compared.difference.value + 0.5 == pytest.approx(0.8932, abs=5e-5)
    assert error == pytest.approx(0.0307, abs=5e-5)
    np.testing.assert_allclose(limits, [0.83295, 0.95339], rtol=0, atol=5e-6)
    assert delong(ratings, labels).value == pytest.approx(compared.difference.value + 0.5)


def two_normals(rng, positives, negatives, area):
    labels = np.arange(positives + negatives) < positives
    return rng.normal(size=len(labels)) + math.sqrt(2) * special.ndtri(area) * labels, labels


def coverage(positives, negatives, area, draws=1000, **how):
    rng = np.random.default_rng(0)
    data = (two_normals(rng, positives, negatives, area) for _ in range(draws))
    return np.mean([area in delong(*columns, **how) for columns in data])


@pytest.mark.parametrize("student", [False, True])
def test_the_interval_holds_the_truth_as_often_as_it_says(student):
    """Here of 1,000 draws; the slow test in `test_resampling` has the table of the docstring."""
    assert 0.93 <= coverage(30, 100, 0.9, student=student) <= 0.97


def test_few_positives_need_students_t():
    assert coverage(5, 200, 0.75, draws=500) < 0.91
    assert coverage(5, 200, 0.95, draws=500) < 0.85
    assert 0.92 < coverage(5, 200, 0.75, draws=500, student=True) < 0.98
    assert 0.92 < coverage(5, 200, 0.95, draws=500, student=True) < 0.98


def test_p_values_of_equal_models_are_uniform():
    rng = np.random.default_rng(0)
    labels = np.arange(150) < 50
    shared = rng.normal(size=(500, 150)) + labels
    noise = rng.normal(size=(2, 500, 150))
    p = [delong_test(s + a, s + b, labels).p for s, a, b in zip(shared, *noise, strict=True)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_few_positives_find_no_difference_where_there_is_none():
    rng = np.random.default_rng(0)
    labels = np.arange(304) < 4
    shared = rng.normal(size=(500, len(labels))) + 1.2 * labels
    noise = rng.normal(size=(2, *shared.shape))
    found = [delong_test(s + a, s + b, labels) for s, a, b in zip(shared, *noise, strict=True)]
    assert 0.02 < np.mean([x.p < 0.05 for x in found]) < 0.06
    assert np.mean([abs(x.z) > 1.96 for x in found]) > 0.08  # as a normal distribution would


# --------------------------------------------------------------------------------------- patients


def test_rows_of_one_group_each_are_independent_rows():
    scores, labels = case(1, 5)
    groups = np.random.default_rng(0).permutation(80).astype(str)
    for how in ({}, {"student": True}):
        plain, grouped = (
            delong(scores[0], labels, **how),
            delong(scores[0], labels, groups=groups, **how),
        )
        assert [grouped.low, grouped.high] == pytest.approx([plain.low, plain.high], abs=1e-12)
    assert delong_test(*scores, labels, groups=groups).p == pytest.approx(
        delong_test(*scores, labels).p, rel=1e-9
    )


def test_copies_of_a_patient_tell_nothing_new():
    (scores, _), labels = case(2)
    once = delong(scores, labels)
    copied = [np.repeat(x, 4) for x in (scores, labels, np.arange(80))]
    grouped = delong(copied[0], copied[1], groups=copied[2])
    assert [grouped.value, grouped.low, grouped.high] == pytest.approx(
        [once.value, once.low, once.high], abs=1e-12
    )
    naive = delong(copied[0], copied[1])
    assert (naive.high - naive.low) / (once.high - once.low) == pytest.approx(0.5, abs=0.02)


def test_patients_with_both_labels_are_counted_as_obuchowski_does():
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(25, size=80), case(3)[1]
    scores = rng.normal(size=80) + labels + 1.5 * rng.normal(size=25)[groups]
    wins = pairs(scores, labels)
    area, m, n = wins.mean(), labels.sum(), (~labels).sum()
    of10, of01 = groups[labels], groups[~labels]
    sums10 = np.array([(wins.mean(1) - area)[of10 == g].sum() for g in range(25)])
    sums01 = np.array([(wins.mean(0) - area)[of01 == g].sum() for g in range(25)])
    i10, i01 = len(set(of10)), len(set(of01))
    s10 = i10 / ((i10 - 1) * m) * (sums10**2).sum()
    s01 = i01 / ((i01 - 1) * n) * (sums01**2).sum()
    i = len(set(groups))
    s11 = i / (i - 1) * (sums10 * sums01).sum()
    error = math.sqrt(s10 / m + s01 / n + 2 * s11 / (m * n))
    found = delong(scores, labels, groups=groups)
    step = (special.logit(found.high) - special.logit(found.low)) / 2
    assert step * area * (1 - area) / stats.norm.ppf(0.975) == pytest.approx(error, rel=1e-9)


def test_patients_with_unequally_many_rows_do_not_make_the_variance_too_small():
    """Of 6 positive patients, of whom one has 7 equal rows, and as many negative ones: the mean of
    the estimated variances is the variance of the estimates, which Obuchowski's is below."""
    rng, rows = np.random.default_rng(0), np.tile([1, 1, 1, 1, 1, 7], 2)
    groups, labels = np.repeat(np.arange(12), rows), np.repeat(np.arange(12) < 6, rows)
    values, estimated, published = [], [], []
    for _ in range(600):
        scores = (rng.normal(size=12) + 0.4 * (np.arange(12) < 6))[groups]
        found = delong_test(scores, np.zeros(24), labels, groups=groups)
        value = found.difference.value + 0.5
        if 0 < value < 1 and found.difference.value:
            step = delong(scores, labels, groups=groups)
            width = special.logit(step.high) - special.logit(step.low)
            values.append(value)
            estimated.append((found.difference.value / found.z) ** 2)
            published.append((width * value * (1 - value) / 2 / stats.norm.ppf(0.975)) ** 2)
    assert np.mean(estimated) == pytest.approx(np.var(values), rel=0.2)
    assert np.mean(published) < 0.6 * np.var(values)


# --------------------------------------------------------------------------------------- the ends


def binormal(auc, m, n):
    """The variance for normal scores: two pairs that share a row are right together as often as
    two normal variables with a correlation of 0.5 are below the quantile of the AUC."""
    both = stats.multivariate_normal(cov=[[1, 0.5], [0.5, 1]]).cdf([special.ndtri(auc)] * 2)
    return (auc * (1 - auc) + (m + n - 2) * (both - auc**2)) / (m * n)


def test_perfect_order_is_no_certainty():
    """The limit is the AUC at which a perfect order is as far as Student's t allows."""
    found = delong(np.arange(20), np.arange(20) >= 15)
    assert (found.value, found.high) == (1, 1)
    error = math.sqrt(binormal(found.low, 5, 15))
    assert (1 - found.low) / error == pytest.approx(stats.t.ppf(0.975, 4), rel=1e-5)
    assert found == delong(np.arange(20), np.arange(20) >= 15, student=True)
    upside_down = delong(-np.arange(20), np.arange(20) >= 15)
    assert (upside_down.value, upside_down.low) == (0, 0)
    assert upside_down.high == pytest.approx(1 - found.low)
    # Two patients, however many rows: one pair at most is independent.
    assert math.isnan(delong(np.arange(20), np.arange(20) >= 15, groups=np.arange(20) % 2).low)


@pytest.mark.parametrize("positives", [3, 10, 30])
def test_an_almost_perfect_order_has_nearly_the_interval_of_a_perfect_one(positives):
    """One negative outranks one positive, which the interval as published takes for certainty."""
    labels = np.arange(300) >= 300 - positives
    scores = np.arange(300.0)
    perfect = delong(scores, labels, student=True)
    scores[[299 - positives, 300 - positives]] = scores[[300 - positives, 299 - positives]]
    almost = delong(scores, labels, student=True)
    published = delong(scores, labels)
    ratios = [(x.high - x.low) / (perfect.high - perfect.low) for x in (published, almost)]
    assert ratios[0] < 0.1 and 0.25 < ratios[1] < 1


def test_tied_positives_are_no_certainty():
    """Both positives in the middle of three ratings: they do not vary, but others would."""
    labels = np.arange(302) < 2
    ratings = np.concatenate([[1, 1], np.repeat([0, 1, 2], [150, 100, 50])])
    tied = delong(ratings, labels, student=True)
    assert tied.high - tied.low > 0.5
    rng, held = np.random.default_rng(0), []
    share = special.ndtr([0.5, 1.5])
    steps = np.diff([0, *share, 1]), np.diff([0, *special.ndtr([-0.5, 0.5]), 1])  # a shift of 1
    truth = steps[1] @ (np.cumsum(steps[0]) - steps[0] / 2)
    for _ in range(200):
        drawn = np.digitize(rng.normal(size=302) + labels, [0.5, 1.5])
        held.append(truth in delong(drawn, labels, student=True))
    assert np.mean(held) >= 0.93


def test_two_perfect_scores_agree_without_certainty_and_one_score_with_itself_does():
    labels = np.arange(40) >= 30
    perfect, other = np.arange(40.0), np.arange(40.0) ** 3
    found = delong_test(perfect, other, labels)
    reach = 1 - delong(perfect, labels).low
    assert (found.difference.low, found.difference.high) == pytest.approx((-reach, reach))
    assert (found.difference.value, found.p) == (0, 1)
    scores = np.random.default_rng(0).normal(size=40)
    same = delong_test(scores, scores * 2, labels)
    assert (same.difference.low, same.difference.high, same.p) == (0, 0, 1)


def test_turning_scores_round_turns_the_interval_round():
    (scores, _), labels = case(4, 3)
    one, other = delong(scores, labels), delong(-scores, labels)
    assert [other.value, other.low, other.high] == pytest.approx(
        [1 - one.value, 1 - one.high, 1 - one.low], abs=1e-12
    )


def test_what_cannot_be_estimated_is_nan():
    assert math.isnan(delong([1, 2, 3], [1, 1, 1]).value)
    assert math.isnan(delong([], []).value) and math.isnan(delong_test([], [], []).p)
    lone = delong([3, 1, 5, 2], [1, 0, 0, 0])
    assert lone.value == pytest.approx(2 / 3) and math.isnan(lone.low) and math.isnan(lone.high)
    constant = delong(np.ones(10), np.arange(10) % 2)
    assert (constant.value, constant.low, constant.high) == (0.5, 0.5, 0.5)
    same = delong_test([1, 2, 3, 4], [10, 20, 30, 40], [0, 1, 0, 1])
    assert (same.difference.value, same.p) == (0, 1)
    apart = delong_test([1, 2, 3, 4], [4, 3, 2, 1], [0, 0, 1, 1])
    assert apart.difference.value == 1 and math.isnan(apart.p)


def test_it_is_quick():
    n = 400_000  # the pairs would be 3 x 10^10
    scores = np.random.default_rng(0).permutation(n)
    found = delong(scores, scores % 4 == 0)
    assert found.value == auc(scores, scores % 4 == 0) and found.high - found.low < 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(scores=[0.1, math.nan], labels=[0, 1]), "1 NaN of 2, the first at row 1"),
        (dict(scores=[0.1, 0.2], labels=[0, -1]), "Drop the uncertain"),
        (dict(scores=[0.1, 0.2], labels=[0, 1], groups=[1]), r"groups has shape \(1,\)"),
        (dict(scores=[0.1, 0.2], labels=[0, 1], level=95.0), "level is 95"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        delong(**arguments)


@pytest.mark.parametrize("sign", [1, -1])
def test_models_in_perfect_opposite_order_are_compared(sign):
    """One finds the only positive first, the other last: no difference is larger."""
    models = [np.array([1.0, 0, 0, 0]), np.array([0.0, 1, 1, 1])][::sign]
    found = delong_test(*models, [1, 0, 0, 0])
    assert found.difference.value == sign
