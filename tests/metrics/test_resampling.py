"""The bootstrap: the same by weights and by rows, whole patients, fixed strata, right as often as
it says."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from test_auc_variance import two_normals

from medsiglip_jax.metrics import (
    auc,
    average_precision,
    bootstrap,
    bootstrap_pair,
    delong,
    macro_auc,
)
from medsiglip_jax.metrics.ranking import auc_of_weights, average_precision_of_weights
from medsiglip_jax.metrics.resampling import _acceleration, _design, _draw, limits


def case(seed=0, n=120, levels=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(int)
    scores = rng.normal(size=n) + labels
    return (
        (scores if levels is None else np.round(scores * levels)),
        labels,
        rng.integers(40, size=n),
    )


HOW = [
    {},
    {"groups": case()[2]},
    {"strata": case()[1]},
    {"groups": case()[2], "strata": case()[1]},
    {"groups": case()[2].astype(str), "level": 0.5},
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("statistic", [auc, average_precision])
@pytest.mark.parametrize("levels", [None, 2])
def test_weights_give_what_drawn_rows_give(statistic, levels, how):
    scores, labels, _ = case(levels=levels)
    fast = bootstrap(statistic, scores, labels, samples=40, **how)
    slow = bootstrap(lambda s, y: statistic(s, y), scores, labels, samples=40, **how)
    for name in ("value", "low", "high", "dropped"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), rel=0, abs=1e-14)


@pytest.mark.parametrize("seed", range(8))
def test_weights_are_sample_weights(seed):
    scores, labels, _ = case(seed, levels=3)
    weights = np.random.default_rng(seed).integers(4, size=120)
    assert auc_of_weights(scores, labels)(weights) == pytest.approx(
        roc_auc_score(labels, scores, sample_weight=weights), abs=1e-12
    )
    assert average_precision_of_weights(scores, labels)(weights) == pytest.approx(
        average_precision_score(labels, scores, sample_weight=weights), abs=1e-12
    )


def test_macro_auc_by_weights():
    rng = np.random.default_rng(0)
    classes = rng.integers(4, size=60)
    scores = rng.normal(size=(60, 4)) + np.eye(4)[classes]
    findings = (rng.random((60, 4)) < 0.3).astype(float)
    findings[rng.random((60, 4)) < 0.2] = np.nan
    findings[:, 3] = 0  # never defined, and left out
    for labels in (classes, findings):
        fast = bootstrap(macro_auc, scores, labels, samples=40)
        slow = bootstrap(lambda s, y: macro_auc(s, y), scores, labels, samples=40)
        assert fast.value == pytest.approx(macro_auc(scores, labels), abs=1e-14)
        assert [fast.low, fast.high] == pytest.approx([slow.low, slow.high], abs=1e-14)


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    one, labels, groups = case(n=150)
    other = one + 0.2 * rng.normal(size=150)
    by_hand = bootstrap(lambda a, b, y: auc(a, y) - auc(b, y), one, other, labels, samples=100)
    for statistic in (auc, lambda s, y: auc(s, y)):
        found = bootstrap_pair(statistic, one, other, labels, samples=100).difference
        assert [found.value, found.low, found.high] == pytest.approx(
            [by_hand.value, by_hand.low, by_hand.high], abs=1e-14
        )
    alone = bootstrap(auc, one, labels, samples=100)
    assert by_hand.high - by_hand.low < 0.5 * (alone.high - alone.low)
    same = bootstrap_pair(auc, one, one, labels, samples=50, groups=groups).difference
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("statistic", [auc, lambda s, y: auc(s, y)])
def test_a_pair_is_both_and_their_difference(statistic, how):
    one, labels, _ = case()
    other = one + np.random.default_rng(0).normal(size=120)
    found = bootstrap_pair(statistic, one, other, labels, samples=40, **how)
    assert found.first == bootstrap(statistic, one, labels, samples=40, **how)
    assert found.second == bootstrap(statistic, other, labels, samples=40, **how)
    by_hand = bootstrap(
        lambda a, b, y: auc(a, y) - auc(b, y), one, other, labels, samples=40, **how
    )
    for name in ("value", "low", "high"):
        assert getattr(found.difference, name) == pytest.approx(getattr(by_hand, name), abs=1e-14)


def test_a_pair_draws_and_weighs_once():
    asked = []

    def counted(scores, labels):
        asked.append(len(scores))
        return scores.mean()

    one, labels, _ = case()
    bootstrap_pair(counted, one, one + 1, labels, samples=200)
    assert len(asked) == 2 * (1 + 200 + 50)


# ---------------------------------------------------------------------------------------- limits


def scipys(statistic, data, distribution, level=0.95, **how):
    """BCa limits by scipy, which is lent our resamples and does its own jackknife."""
    lent = type("", (), {"bootstrap_distribution": distribution})
    found = stats.bootstrap(
        data, statistic, n_resamples=0, vectorized=False, method="BCa", confidence_level=level,
        bootstrap_result=lent, **how,
    )  # fmt: skip
    return list(found.confidence_interval)


@pytest.mark.parametrize("level, levels", [(0.9, None), (0.99, 1)])
def test_limits_are_those_of_scipy(level, levels):
    scores, labels, _ = case(levels=levels)
    scores = scores**3  # skewed, and of rounded scores, many resamples tie with the data
    chosen = (np.repeat(np.arange(120), count) for count in drawn(120))
    for statistic in (lambda s, y: auc(s, y), lambda s, y: float(s @ y) / 120):
        found = bootstrap(statistic, scores, labels, samples=500, level=level)
        values = np.array([statistic(scores[rows], labels[rows]) for rows in chosen])
        want = scipys(statistic, (scores, labels), values, level, paired=True)
        assert [found.low, found.high] == pytest.approx(want, rel=1e-9)
        chosen = (np.repeat(np.arange(120), count) for count in drawn(120))


def test_limits_of_strata_are_those_of_scipys_samples():
    scores, labels, _ = case()
    parts = scores[labels == 0], scores[labels == 1]
    scores, labels = np.concatenate(parts), np.sort(labels)

    def of_two(negatives, positives):
        return auc(
            np.append(negatives, positives), np.repeat([0, 1], [len(negatives), len(positives)])
        )

    values = auc_of_weights(scores, labels)(drawn(120, 1000, strata=labels))
    found = bootstrap(auc, scores, labels, strata=labels, samples=1000)
    want = scipys(of_two, parts, values)
    assert [found.low, found.high] == pytest.approx(want, rel=1e-9)


def test_limits_of_patients_are_those_of_scipys_rows():
    """A mean over patients of 1 to 4 images is one of rows that hold the sums of a patient each."""
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(60, size=150))
    x = rng.exponential(size=150) + rng.exponential(size=60)[groups]
    sums, images = (np.bincount(groups, w, 60)[np.unique(groups)] for w in (x, np.ones(150)))
    of_images = lambda x: float(x.mean())  # noqa: E731
    of_patients = lambda s, n: float(s.sum() / n.sum())  # noqa: E731
    counts = drawn(len(sums))
    values = (counts @ sums) / (counts @ images)
    found = bootstrap(of_images, x, groups=groups, samples=500)
    want = scipys(of_patients, (sums, images), values, paired=True)
    assert [found.low, found.high] == pytest.approx(want, rel=1e-9)


def test_limits_follow_a_scale_that_is_bent():
    """Those of exp(x) are exp of those of x: so are not those of an estimate and its error."""
    values = np.random.default_rng(0).normal(0.1, 1, size=999)
    # Ranks that are not whole lie between two values, whose exp is no mean of theirs.
    straight, bent = limits(values, 0.0, 0.1, 0.9), limits(np.exp(values), 1.0, 0.1, 0.9)
    np.testing.assert_allclose(np.log(bent), straight, rtol=0, atol=1e-3)
    turned = limits(-values, -0.0, -0.1, 0.9)
    np.testing.assert_allclose(turned, [-x for x in straight[::-1]], rtol=0, atol=1e-12)


def test_limits_move_for_bias_and_acceleration():
    values = np.arange(1001.0)
    assert limits(values, 500.0, 0.0, 0.9) == pytest.approx((50, 950), abs=1e-9)
    # Of 1,001 values, 421 lie below: z0 = ndtri(0.421) = -0.2, and the ranks move by 2 z0.
    z = stats.norm.ppf(420.5 / 1001) * 2 + stats.norm.ppf([0.05, 0.95])
    assert limits(values, 420.0, 0.0, 0.9) == pytest.approx(1000 * stats.norm.cdf(z), rel=1e-9)
    low, high = limits(values, 500.0, 0.1, 0.9)
    assert low > 50 and high > 950


def test_ties_are_no_bias():
    values = np.arange(1001.0)
    tied = np.where(abs(values - 500) < 300, 500.0, values)
    assert limits(tied, 500.0, 0.0, 0.9) == pytest.approx((50, 950), abs=1e-9)


@pytest.mark.parametrize(
    "value, acceleration",
    [(-1.0, 0.1), (1000.0, 0.1), (500.0, math.nan), (999.0, 1 / 6), (0.0, -1 / 6)],
)
def test_limits_that_cannot_be_moved_are_percentiles(value, acceleration):
    """All resamples on one side, no acceleration, or one past where the scale ends."""
    values = np.arange(1000.0)
    found = limits(values, value, acceleration, 0.999)
    assert found == pytest.approx(tuple(np.quantile(values, [0.0005, 0.9995])), rel=1e-9)


def test_limits_ignore_resamples_without_a_value():
    values = np.random.default_rng(0).normal(size=500)
    holes = np.insert(values, [3, 70, 70, 500], np.nan)
    assert limits(holes, 0.1, 0.05, 0.95) == limits(values, 0.1, 0.05, 0.95)
    assert all(math.isnan(x) for x in limits(np.full(3, np.nan), 0.1, 0.05, 0.95))


def test_at_the_edge_the_interval_is_that_of_the_resamples():
    labels = np.arange(40) < 10
    assert (lambda i: (i.value, i.low, i.high))(bootstrap(auc, labels, labels)) == (1, 1, 1)
    highest = bootstrap(lambda x: float(x.max()), np.arange(40.0))  # never above the data
    assert 30 < highest.low < highest.high == highest.value == 39
    one_patient = bootstrap(auc, np.arange(40), labels, groups=np.zeros(40))
    assert one_patient.low == one_patient.value == one_patient.high


@pytest.mark.parametrize("samples", [1, 7, 8, 20])
@pytest.mark.parametrize("strata", [None, np.arange(120), np.arange(120) // 2])
def test_few_resamples_and_many_strata_still_have_limits(samples, strata):
    scores, labels, _ = case()
    found = bootstrap(auc, scores, labels, samples=samples, strata=strata)
    assert 0 <= found.low <= found.high <= 1


def test_blocks_stand_for_their_units():
    """10,000 sorted rows in 500 blocks: as of the 10,000, whose skewness of a mean is known."""
    x = np.sort(np.random.default_rng(0).exponential(size=10_000))
    asked = []

    def mean_of_weights(weights):
        asked.append(len(np.atleast_2d(weights)))
        return (weights @ x) / weights.sum(-1)

    units, members = slice(None), [np.arange(10_000)]
    found = _acceleration(mean_of_weights, units, members, 500)
    assert sum(asked) == 500
    assert found == pytest.approx(stats.skew(x) / 6 / 100, abs=3 * 0.41 / 500)


# ----------------------------------------------------------------------------------------- draws


def drawn(n, samples=500, groups=None, strata=None):
    design = _design(n, samples, groups, strata)
    return np.concatenate(list(_draw(np.random.default_rng(0), *design, samples)))


def test_rows_are_drawn_with_replacement():
    counts = drawn(50, 4000)
    assert counts.shape == (4000, 50) and (counts.sum(axis=1) == 50).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.08)
    # Multinomial: variance 1 - 1/n, covariance -1/n.
    covariance = np.cov(counts.T)
    np.testing.assert_allclose(np.diag(covariance), 0.98, atol=0.12)
    assert covariance[~np.eye(50, dtype=bool)].mean() == pytest.approx(-0.02, abs=0.002)


def test_strata_keep_their_sizes_and_groups_stay_whole():
    strata = np.arange(50) % 3
    counts = drawn(50, strata=strata)
    for k in range(3):
        assert (counts[:, strata == k].sum(axis=1) == (strata == k).sum()).all()
    groups = np.random.default_rng(0).integers(12, size=50)
    counts = drawn(50, groups=groups)
    for g in range(12):
        assert (np.ptp(counts[:, groups == g], axis=1) == 0).all()
    first = [np.flatnonzero(groups == g)[0] for g in range(12)]
    assert (counts[:, first].sum(axis=1) == 12).all()


def test_groups_in_several_strata_are_a_stratum_of_their_own():
    groups = np.repeat(np.arange(12), 3)
    strata = np.zeros(36, int)
    strata[:12], strata[12:15] = 1, [0, 1, 0]  # 4 groups all 1, one mixed, 7 all 0
    counts = drawn(36, groups=groups, strata=strata)[:, ::3]
    assert (counts[:, :4].sum(axis=1) == 4).all()
    assert (counts[:, 4] == 1).all()
    assert (counts[:, 5:].sum(axis=1) == 7).all()


def test_a_seed_is_a_draw():
    scores, labels, _ = case()
    assert bootstrap(auc, scores, labels) == bootstrap(auc, scores, labels)
    assert bootstrap(auc, scores, labels) != bootstrap(auc, scores, labels, seed=1)


# ------------------------------------------------------------------------------------ what it says


def test_copies_of_a_patient_tell_nothing_new():
    scores, labels, _ = case()
    once = bootstrap(auc, scores, labels)
    copied = [np.repeat(x, 4) for x in (scores, labels)]
    assert bootstrap(auc, *copied, groups=np.repeat(np.arange(120), 4)) == once
    naive = bootstrap(auc, *copied)
    assert (naive.high - naive.low) / (once.high - once.low) == pytest.approx(0.5, abs=0.05)


def test_the_mean_has_the_interval_it_should():
    x = np.random.default_rng(0).normal(size=400)
    found = bootstrap(lambda x: float(x.mean()), x, samples=4000)
    error = x.std() / 20
    assert found.value == x.mean()
    assert [found.low, found.high] == pytest.approx(
        [x.mean() - 1.96 * error, x.mean() + 1.96 * error], abs=0.15 * error
    )


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of plain rows; that strata are drawn as they should is held against SciPy above."""
    rng = np.random.default_rng(0)
    labels = np.arange(150) < 50
    hits = []
    for seed in range(300):
        scores = rng.normal(size=150) + labels * math.sqrt(2) * 0.6744897501960817  # AUC 0.75
        hits.append(0.75 in bootstrap(auc, scores, labels, samples=300, seed=seed))
    assert 0.92 <= np.mean(hits) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("area", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("positives", [30, 100])
def test_from_30_positives_on_every_interval_holds_the_truth(positives, area):
    """Of 1,000 data sets; `scripts/bench.py coverage` prints the shares, and those of 5 positives.

    Of 30 positives at AUC 0.9 the shares of 4,000 are too near to 93 % to tell from 1,000 (standard
    error 0.8 %), and DeLong's as published, without Student's t, is below: 92.8 %.
    """
    hardest = (positives, area) == (30, 0.9)
    rng, hits = np.random.default_rng(0), []
    for seed in range(4000 if hardest else 1000):
        columns = two_normals(rng, positives, 500, area)
        intervals = (
            delong(*columns),
            delong(*columns, student=True),
            bootstrap(auc, *columns, samples=1000, seed=seed),
        )
        hits.append([area in interval for interval in intervals])
    published, student, resampled = np.mean(hits, axis=0)
    assert 0.93 <= student <= 0.97 and 0.93 <= resampled <= 0.97
    assert (0.92 if hardest else 0.93) <= published <= 0.97


def test_resamples_without_a_value_are_counted():
    labels = np.arange(40) < 2
    found = bootstrap(auc, np.arange(40), labels)
    assert found.dropped / 2000 == pytest.approx(0.95**40, abs=0.03)
    assert bootstrap(auc, np.arange(40), labels, strata=labels).dropped == 0
    nothing = bootstrap(auc, np.arange(40), np.zeros(40))
    assert math.isnan(nothing.value) and math.isnan(nothing.low)


@pytest.mark.parametrize(
    "arguments, how, message",
    [
        ((auc, [0.1, 0.2], [0, 1, 1]), {}, r"shapes \(2,\), \(3,\)"),
        ((auc, [], []), {}, "at least one row, and equally many"),
        ((auc, [0.1, 0.2], [0, 1]), {"groups": [1]}, r"groups has shape \(1,\)"),
        ((auc, [0.1, 0.2], [0, 1]), {"strata": [1]}, r"strata has shape \(1,\)"),
        ((auc, [0.1, 0.2], [0, 1]), {"samples": 0}, "0 samples of 2 rows"),
        ((auc, [0.1, 0.2], [0, 1]), {"level": 95.0}, "level is 95"),
        ((auc, [0.1, np.nan], [0, 1]), {}, "the first at row 1"),
    ],
)
def test_refuses(arguments, how, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(*arguments, **how)
