"""The bootstrap: the same by weights and by rows, whole patients, fixed strata, right as often as
it says."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from medsiglip_jax.metrics import auc, average_precision, bootstrap, bootstrap_difference, macro_auc
from medsiglip_jax.metrics.bootstrap import resamples
from medsiglip_jax.metrics.ranking import auc_of_weights, average_precision_of_weights


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
    fast = bootstrap(statistic, scores, labels, samples=200, **how)
    slow = bootstrap(lambda s, y: statistic(s, y), scores, labels, samples=200, **how)
    for name in ("value", "low", "high", "dropped"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), rel=0, abs=1e-14)


@pytest.mark.parametrize("seed", range(20))
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
    classes = rng.integers(4, size=90)
    scores = rng.normal(size=(90, 4)) + np.eye(4)[classes]
    findings = (rng.random((90, 4)) < 0.3).astype(float)
    findings[rng.random((90, 4)) < 0.2] = np.nan
    findings[:, 3] = 0  # never defined, and left out
    for labels in (classes, findings):
        fast = bootstrap(macro_auc, scores, labels, samples=100)
        slow = bootstrap(lambda s, y: macro_auc(s, y), scores, labels, samples=100)
        assert fast.value == pytest.approx(macro_auc(scores, labels), abs=1e-14)
        assert [fast.low, fast.high] == pytest.approx([slow.low, slow.high], abs=1e-14)


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    one, labels, groups = case(n=300)
    other = one + 0.2 * rng.normal(size=300)
    by_hand = bootstrap(lambda a, b, y: auc(a, y) - auc(b, y), one, other, labels, samples=200)
    for statistic in (auc, lambda s, y: auc(s, y)):
        found = bootstrap_difference(statistic, one, other, labels, samples=200)
        assert [found.value, found.low, found.high] == pytest.approx(
            [by_hand.value, by_hand.low, by_hand.high], abs=1e-14
        )
    alone = bootstrap(auc, one, labels, samples=200)
    assert by_hand.high - by_hand.low < 0.5 * (alone.high - alone.low)
    same = bootstrap_difference(auc, one, one, labels, samples=50, groups=groups)
    assert (same.value, same.low, same.high) == (0, 0, 0)


# ----------------------------------------------------------------------------------------- draws


def drawn(n, samples=500, **how):
    return np.concatenate(list(resamples(n, samples, seed=0, **how)))


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


@pytest.mark.parametrize("stratified", [False, True])
def test_the_interval_holds_the_truth_as_often_as_it_says(stratified):
    rng = np.random.default_rng(0)
    labels = np.arange(150) < 50
    hits = []
    for seed in range(300):
        scores = rng.normal(size=150) + labels * math.sqrt(2) * 0.6744897501960817  # AUC 0.75
        strata = labels if stratified else None
        hits.append(0.75 in bootstrap(auc, scores, labels, strata=strata, samples=300, seed=seed))
    assert 0.92 <= np.mean(hits) <= 0.97


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
        ((auc, [], []), {}, "expected as many rows in each, and some"),
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
