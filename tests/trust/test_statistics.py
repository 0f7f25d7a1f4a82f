"""Statistics of the monitor against slow references."""

import numpy as np
import pytest
from scipy import stats

from medsiglip_jax.metrics import auc
from medsiglip_jax.trust.monitor import gaussian, kernel, samples, thresholds, windows


def vectors(n, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def mask(n, size, count=4, seed=0):
    return windows.draw(np.arange(n), size, count, np.random.default_rng(seed))


def mmd_by_pairs(x, y, bandwidth):
    def k(a, b):
        return np.exp(-((a.astype(float) - b) ** 2).sum() / bandwidth)

    n, m = len(x), len(y)
    within = [
        sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) for z in (x, y)
    ]
    between = sum(k(a, b) for a in x for b in y)
    return within[0] / n / (n - 1) + within[1] / m / (m - 1) - 2 * between / n / m


def test_mmd_is_the_sum_over_pairs():
    x, y = vectors(30), vectors(20, seed=1) + 0.5
    assert kernel.mmd(x, y, 7.0) == pytest.approx(mmd_by_pairs(x, y, 7.0), rel=1e-4)


def test_mmd_of_windows_is_that_of_each_window_and_the_rest():
    x = vectors(700, seed=2)  # more than a block
    drawn = mask(700, 50)
    found, total = kernel.mmd_of_windows(x, drawn, 9.0)
    assert found == pytest.approx([kernel.mmd(x[w], x[~w], 9.0) for w in drawn], abs=1e-6)
    distances = ((x[:, None].astype(float) - x[None]) ** 2).sum(-1)
    assert total == pytest.approx(np.exp(-distances / 9).sum(), rel=1e-5)


def test_the_bandwidth_is_the_median_squared_distance_of_pairs():
    x = vectors(41)
    squares = [((a.astype(float) - b) ** 2).sum() for i, a in enumerate(x) for b in x[:i]]
    assert kernel.median_bandwidth(x) == pytest.approx(np.median(squares), rel=1e-5)
    with pytest.raises(ValueError, match="fewer than two different"):
        kernel.median_bandwidth(np.ones((5, 3), np.float32))


def test_distances_to_neighbours_skip_those_of_the_same_patient():
    x, groups = vectors(40), np.arange(40) // 2
    far = np.sqrt(((x[:, None].astype(float) - x[None]) ** 2).sum(-1))
    far[groups[:, None] == groups] = np.inf
    found = kernel.neighbour_distances(x, x, 3, groups)
    assert found == pytest.approx(np.sort(far, axis=1)[:, 2], rel=1e-4)
    assert kernel.neighbour_distances(x[:5], x, 1) == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("per_patient", [1, 3])
@pytest.mark.parametrize("n", [24, 60])
def test_distances_are_those_of_fits_without_the_patient(per_patient, n):
    x, groups = vectors(n, 30) * np.linspace(0.1, 3, 30).astype(np.float32), np.arange(n) // 3
    groups = groups if per_patient == 3 else np.arange(n)
    fitted = gaussian.fit(x)
    found = gaussian.held_out_distances(fitted, x, groups)
    for group in np.unique(groups)[:5]:
        others, own = x[groups != group].astype(float), x[groups == group]
        mean, covariance = others.mean(axis=0), np.cov(others.T, ddof=0)
        shrunk = (1 - fitted.shrinkage) * covariance
        shrunk += fitted.shrinkage * fitted.variances.mean() * np.eye(30)
        inverse = np.linalg.inv(shrunk)
        want = [np.sqrt((row - mean) @ inverse @ (row - mean)) for row in own]
        assert found[groups == group] == pytest.approx(want, rel=1e-4)


def test_the_shrinkage_is_the_papers_and_distances_are_those_of_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance")
    x = vectors(50, 20) * np.linspace(0.5, 2, 20).astype(np.float32)
    ours, s = gaussian.fit(x), np.cov(x.astype(float).T, ddof=0)
    squares, square = np.trace(s @ s), np.trace(s) ** 2
    want = (0.9 * squares + square) / ((50 + 0.9) * (squares - square / 20))
    assert ours.shrinkage == pytest.approx(want, rel=1e-4)
    theirs = covariance.ShrunkCovariance(shrinkage=ours.shrinkage).fit(x.astype(float))
    assert ours.distances(x) ** 2 == pytest.approx(theirs.mahalanobis(x.astype(float)), rel=1e-4)


def test_the_frechet_distance_has_the_root_of_the_product_of_covariances():
    from scipy.linalg import sqrtm

    x, y = vectors(80, 5), vectors(40, 5, seed=1) * 1.5 + 0.3
    a, b = (np.cov(z.astype(float).T, ddof=0) for z in (x, y))
    root = np.trace(np.real(sqrtm(a @ b)))
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert gaussian.frechet_distance(gaussian.fit(x), y) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("ties", [False, True])
def test_tests_of_samples_are_those_of_scipy(ties):
    values = np.random.default_rng(0).normal(size=(60, 2))
    values = np.round(values) if ties else values
    drawn = mask(60, 20)
    found = samples.kolmogorov_smirnov(values, drawn)
    want = [max(stats.ks_2samp(c[w], c[~w]).statistic for c in values.T) for w in drawn]
    assert found == pytest.approx(want)
    ours = samples.anderson_darling(values[:, 0], drawn)
    # SciPy gives it standardised: the same number up to a shift and a scale.
    with np.errstate(all="ignore"):
        theirs = [_anderson(values[w, 0], values[~w, 0]) for w in drawn]
    slope = np.diff(theirs) / np.diff(ours)
    assert slope == pytest.approx(slope[0], rel=1e-6)


def _anderson(x, y):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stats.anderson_ksamp([x, y], midrank=False).statistic


def test_anderson_darling_of_two_and_two_by_hand():
    window = np.array([[True, True, False, False]])
    # After 1, 2 and 3 values: (4 - 2)^2 / 3, (8 - 4)^2 / 4 and (8 - 6)^2 / 3; over 2 * 2.
    assert samples.anderson_darling(np.arange(4.0), window) == pytest.approx([5 / 3])


def test_chi_squared_is_that_of_scipy_and_ignores_categories_that_nobody_has():
    categories = np.random.default_rng(0).choice([0, 1, 4], size=60)
    for window in mask(60, 25):
        table = [[(categories[w] == k).sum() for k in (0, 1, 4)] for w in (window, ~window)]
        want = stats.chi2_contingency(table, correction=False).statistic
        assert samples.chi_squared(categories, window[None]) == pytest.approx([want])


def test_labels_are_compared_by_auc_and_calibration():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((80, 2)), rng.integers(2, size=(80, 2)).astype(float)
    labels[:9, 0] = np.nan
    drawn = mask(80, 30)
    known = np.isfinite(labels)
    drops, shifts = [], []
    for window in drawn:
        parts = [[known[:, k] & side for side in (window, ~window)] for k in range(2)]
        areas = [[auc(scores[r, k], labels[r, k]) for r in p] for k, p in enumerate(parts)]
        drops.append(max(rest - own for own, rest in areas))
        means = [[(labels - scores)[r, k].mean() for r in p] for k, p in enumerate(parts)]
        shifts.append(max(abs(own - rest) for own, rest in means))
    assert samples.auc_drop(scores, labels, drawn) == pytest.approx(drops)
    assert samples.calibration_shift(scores, labels, drawn) == pytest.approx(shifts)


def test_the_stability_index_is_zero_of_equal_samples_and_grows():
    x = np.random.default_rng(0).normal(size=1000)
    assert samples.population_stability(x, x) == pytest.approx(0, abs=1e-12)
    small, large = (samples.population_stability(x, x + shift) for shift in (0.2, 1.0))
    assert 0.01 < small < 0.2 < large


def test_windows_are_of_whole_patients_but_the_last():
    groups = np.repeat(np.arange(30), 4)
    for window in windows.draw(groups, 22, 50, np.random.default_rng(0)):
        counts = np.bincount(groups[window])
        assert window.sum() == 22
        assert sorted(counts[counts > 0]) == [2, 4, 4, 4, 4, 4]


def test_new_rows_are_cut_by_number_and_by_time():
    assert [len(w.rows) for w in windows.cut(250, 100, [])] == [100, 100, 50]
    assert [len(w.rows) for w in windows.cut(210, 100, [])] == [100, 100]  # ten say nothing
    assert [len(w.rows) for w in windows.cut(5, 100, [])] == [5]
    times = ["2026-03-02T23:00", "2026-03-08 10:00", "2026-03-09T01:00", "20260330"]
    cut = windows.cut(4, windows.parse_size("7d"), times)
    assert [(w.name, w.rows.tolist()) for w in cut] == [
        ("2026-03-02", [0, 1]), ("2026-03-09", [2]), ("2026-03-30", [3]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="time 'soon' of row 1: expected ISO 8601"):
        windows.cut(1, windows.parse_size("12h"), ["soon"])
    zoned = ["2026-03-02T10:00Z", "2026-03-02T10:00+02:00"]
    assert len(windows.cut(2, windows.parse_size("2h"), zoned)) == 2
    with pytest.raises(ValueError, match="one has a time zone and the other not"):
        windows.cut(2, windows.parse_size("12h"), ["2026-03-02T10:00", "2026-03-02T10:00Z"])
    with pytest.raises(ValueError, match="--time"):
        windows.cut(1, windows.parse_size("4w"), [])
    for wrong in ("7", "0d", "d", "-3", "1y"):
        with pytest.raises(ValueError, match="--window"):
            windows.parse_size(wrong)


def test_a_test_alarms_where_its_statistic_exceeds_its_threshold():
    rng = np.random.default_rng(0)
    for seed in range(200):
        null = rng.random(99)
        measured = {
            str(k): thresholds.Measured(float(x), null)
            for k, x in enumerate(np.random.default_rng(seed).beta(3, 0.2, size=4))
        }
        verdicts = thresholds.judge(measured, 0.1)
        ps = sorted(v.p for v in verdicts.values())
        rejected = next((k for k, p in enumerate(ps) if p * (4 - k) > 0.1), 4)
        assert sum(v.alarm for v in verdicts.values()) == rejected
        assert all(v.alarm == (v.statistic > v.threshold) for v in verdicts.values())


def test_p_values_count_the_window_itself():
    null = np.arange(19.0)
    assert thresholds.Measured(100.0, null).p == pytest.approx(1 / 20)
    assert thresholds.Measured(18.0, null).p == pytest.approx(2 / 20)
    assert thresholds.Measured(-1.0, null).p == 1
    assert thresholds.Measured(0.0, null).quantile(0.01) == np.inf  # too few windows to tell
