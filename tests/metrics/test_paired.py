"""McNemar's test against R, Obuchowski's and Tango's by their definitions, coverage by patient."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from medsiglip_jax.metrics import paired_shares

GOLDEN = json.loads((Path(__file__).parent / "golden/base.json").read_text(encoding="utf-8"))


def calls(a, b, c, d):
    """Rows that both get right, only the first, only the second, and neither."""
    first = np.repeat([True, True, False, False], [a, b, c, d])
    return first, np.repeat([True, False, True, False], [a, b, c, d])


@pytest.mark.parametrize("case", GOLDEN["mcnemar"], ids=lambda case: str(case["table"]))
def test_p_values_are_those_of_r(case):
    found = paired_shares(*calls(*map(int, case["table"])))
    assert found.chi_square == pytest.approx(case["chi_square"][0], abs=1e-12)
    assert stats.chi2.sf(found.chi_square, 1) == pytest.approx(case["p_chi_square"][0], rel=1e-9)
    assert found.p_exact == pytest.approx(case["p_exact"][0], rel=1e-12)
    if found.first_only != found.second_only:
        middle = case["p_exact"][0] - case["half_of_found"][0]
        assert found.p == found.p_mid == pytest.approx(middle, rel=1e-9)
    else:
        assert found.p == 1


def rejected(x, b, c, n):
    """How far x is rejected in standard errors; the other share maximises the likelihood."""

    def surprise(share):
        cells = [(b, share + x), (c, share), (n - b - c, 1 - 2 * share - x)]
        return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

    bounds = (max(0.0, -x), (1 - x) / 2)
    share = optimize.minimize_scalar(surprise, bounds=bounds, method="bounded",
                                     options={"xatol": 1e-12}).x  # fmt: skip
    return abs((b - c) / n - x) / math.sqrt((2 * share + x * (1 - x)) / n)


@pytest.mark.parametrize("b, c, n", [(12, 5, 60), (3, 9, 132), (0, 6, 26), (1, 0, 8), (4, 4, 30)])
def test_limits_are_where_the_score_test_rejects(b, c, n):
    found = paired_shares(*calls(n - b - c, b, c, 0)).difference
    for limit in (found.low, found.high):
        assert rejected(limit, b, c, n) == pytest.approx(stats.norm.ppf(0.975), rel=1e-6)
    swapped = paired_shares(*calls(n - b - c, c, b, 0)).difference
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_models_that_never_differ_are_not_known_to_be_equal():
    found = paired_shares(*calls(10, 0, 0, 10))
    z = stats.norm.ppf(0.975)
    assert found.difference.high == pytest.approx(z * z / (20 + z * z))
    assert (found.difference.value, found.difference.low, found.p) == (0, -found.difference.high, 1)
    wider = paired_shares(*calls(10, 0, 0, 10), np.arange(20) // 4).difference
    assert wider.high == pytest.approx(z * z / (5 + z * z))


def test_all_against_nothing_and_nothing_at_all():
    found = paired_shares(*calls(0, 12, 0, 0)).difference
    assert (found.value, found.high) == (1, 1)
    assert rejected(found.low, 12, 0, 12) == pytest.approx(stats.norm.ppf(0.975), rel=1e-6)
    assert paired_shares(*calls(0, 0, 12, 0)).difference.high == pytest.approx(-found.low)
    nothing = paired_shares(np.zeros(0, bool), np.zeros(0, bool))
    assert math.isnan(nothing.p) and math.isnan(nothing.difference.value)
    one = paired_shares(*calls(3, 2, 1, 1), np.zeros(7))
    assert math.isnan(one.p) and math.isnan(one.difference.low)
    with pytest.raises(ValueError, match="expected equal"):
        paired_shares(np.ones(2, bool), np.ones(3, bool))


def of_patients(rng, patients=40, images=4, apart=0.0):
    """Calls of two models; what is hard for one image of a patient is for the others."""
    units = np.repeat(np.arange(patients), images)
    shared = rng.normal(size=patients)[units]
    own = rng.normal(size=(2, patients))[:, units]
    return *(shared + own + 0.7 * rng.normal(size=own.shape) > [[0], [apart]]), units


def test_by_patient_it_is_obuchowskis_statistic():
    """With the pooled share in the variances and the covariance, as the paper has it."""
    first, second, units = of_patients(np.random.default_rng(0), apart=0.4)
    n, patients = len(units), 40
    hits = [np.bincount(units, x, patients) for x in (first, second)]
    pooled = (first.mean() + second.mean()) / 2
    residuals = [x - np.bincount(units) * pooled for x in hits]
    factor = patients / (patients - 1) / n**2
    variance = sum(factor * (r**2).sum() for r in residuals)
    variance -= 2 * factor * (residuals[0] * residuals[1]).sum()
    want = (first.mean() - second.mean()) ** 2 / variance
    found = paired_shares(first, second, units)
    assert found.chi_square == pytest.approx(want, rel=1e-12)
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(want), 39), rel=1e-9)
    assert math.isnan(found.p_exact) and math.isnan(found.p_mid)


def test_by_patient_equal_models_differ_as_rarely_as_p_says():
    p, naive, held = [], [], []
    for seed in range(400):
        first, second, units = of_patients(np.random.default_rng(seed))
        found = paired_shares(first, second, units)
        p.append(found.p)
        held.append(0.0 in found.difference)
        naive.append(paired_shares(first, second).p)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.08
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(np.array(naive) < 0.05) > 0.12


@pytest.mark.parametrize("b, c", [(3, 9), (0, 5), (600, 700), (5000, 5300)])
def test_the_p_values_of_many_rows_are_those_of_few(b, c):
    """The factors of the binomial overflow, its probabilities do not."""
    first, second = np.zeros((2, b + c + 10), bool)
    first[:b], second[b : b + c] = True, True
    found, exact = paired_shares(first, second), 2 * stats.binom.cdf(min(b, c), b + c, 0.5)
    assert found.p_exact == pytest.approx(exact, rel=1e-9)
    assert found.p_mid == pytest.approx(exact - stats.binom.pmf(b, b + c, 0.5), rel=1e-9)
