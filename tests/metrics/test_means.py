"""Intervals of mean AUCs: of one class that of `delong`, else as often right as they say."""

import math

import numpy as np
import pytest
from scipy import special

from medsiglip_jax.metrics import bootstrap, delong, delong_test, macro_auc, macro_delong
from medsiglip_jax.metrics import macro_delong_test as compare


def exclusive(rng, n, areas):
    """Scores and labels of classes of equal size that no image shares."""
    labels = np.arange(n)[:, None] % len(areas) == np.arange(len(areas))
    apart = math.sqrt(2) * special.ndtri(np.array(areas))
    return rng.normal(size=labels.shape) + apart * labels, labels.astype(float)


def test_of_one_class_it_is_delongs():
    scores, labels = exclusive(np.random.default_rng(0), 60, [0.8, 0.6])
    groups = np.arange(60) // 2
    found = macro_delong(scores[:, :1], labels[:, :1], groups=groups)
    want = delong(scores[:, 0], labels[:, 0], groups=groups, student=True)
    assert [found.auc.low, found.auc.high] == pytest.approx([want.low, want.high], abs=1e-12)
    # The class twice tells no more: its patients are the same.
    twice = macro_delong(scores[:, [0, 0]], labels[:, [0, 0]], groups=groups).auc
    assert [twice.low, twice.high] == pytest.approx([want.low, want.high], abs=1e-3)


def test_large_samples_have_the_limits_of_the_bootstrap():
    rng = np.random.default_rng(0)
    scores, labels = exclusive(rng, 900, [0.7, 0.8, 0.9])
    scores += rng.normal(size=(300, 3))[np.arange(900) // 3]
    groups = np.arange(900) // 3
    labels[::7, 1] = np.nan
    found = macro_delong(scores, labels, groups=groups).auc
    want = bootstrap(macro_auc, scores, labels, groups=groups, samples=2000)
    assert found.value == pytest.approx(want.value, abs=1e-12)
    assert [found.low, found.high] == pytest.approx([want.low, want.high], abs=0.004)


def long_tailed(rng, classes=40, n=200):
    weights = 1 / np.arange(1, classes + 1)
    truth = rng.choice(classes, n, p=weights / weights.sum())
    labels = (truth[:, None] == np.arange(classes)).astype(float)
    areas = special.expit(np.linspace(0.5, 3, classes))
    apart = math.sqrt(2) * special.ndtri(areas)
    return rng.normal(size=labels.shape) + apart * labels, labels, areas


@pytest.mark.slow
def test_long_tailed_classes_hold_the_truth():
    """Of 40 classes some are absent and some have one image; the bootstrap fails here."""
    held = []
    for seed in range(150):
        scores, labels, areas = long_tailed(np.random.default_rng([1, seed]))
        found = macro_delong(scores, labels)
        assert found.lone > 0 and found.absent + found.classes == 40
        held.append(float(areas[labels.any(0)].mean()) in found.auc)
    assert 0.91 <= np.mean(held) <= 0.99


def test_few_patients_have_no_interval_however_many_images():
    scores, labels = exclusive(np.random.default_rng(0), 70, [0.8, 0.7])
    for patients, there in ((2, False), (7, False), (8, True)):
        found = macro_delong(scores, labels, groups=np.arange(70) % patients)
        assert math.isnan(found.auc.low) is not there
        assert found.withheld.startswith(f"{patients} patients") is not there
        other = compare(scores, -scores, labels, groups=np.arange(70) % patients)
        assert math.isnan(other.p) is not there
    lone = macro_delong(np.arange(20.0).reshape(10, 2), np.eye(10)[:, :2])
    assert "two positives" in lone.withheld and math.isnan(lone.auc.low)
    assert math.isnan(macro_delong(np.zeros((9, 2)), np.ones((9, 2))).auc.value)


def test_many_images_of_few_patients_hold_the_truth_as_often_as_they_say():
    """Images of a patient that are hardly alike tell more than one image of each patient would."""
    held, units, areas = [], np.repeat(np.arange(8), 20), [0.7, 0.8, 0.9]
    for seed in range(400):
        rng = np.random.default_rng([3, seed])
        scores, labels = exclusive(rng, 160, areas)
        scores += 0.5 * rng.normal(size=(8, 3))[units]
        truth = special.ndtr(special.ndtri(areas) / math.sqrt(1.25)).mean()
        held.append(truth in macro_delong(scores, labels, groups=units).auc)
    assert 0.93 <= np.mean(held) <= 0.97


def test_perfect_classes_are_no_certainty_in_the_mean():
    labels = np.arange(60)[:, None] % 3 == np.arange(3)
    found = macro_delong(labels * 1.0, labels).auc
    alone = delong(labels[:, 0] * 1.0, labels[:, 0])
    assert (found.value, found.high) == (1, 1) and alone.low < found.low < 1
    difference = compare(labels * 1.0, labels * 2.0, labels).difference
    assert difference.low == pytest.approx(found.low - 1) and difference.high == -difference.low


def test_equal_means_differ_as_rarely_as_p_says():
    rng, p = np.random.default_rng(0), []
    for _ in range(300):
        shared, labels = exclusive(rng, 90, [0.7, 0.8, 0.9])
        first, second = shared + rng.normal(size=(2, *shared.shape))
        p.append(compare(first, second, labels).p)
    assert 0.05 <= np.mean(np.array(p) < 0.1) <= 0.15


def test_of_one_class_the_test_has_the_difference_and_z_of_delongs():
    rng = np.random.default_rng(0)
    scores, labels = exclusive(rng, 80, [0.8, 0.6])
    other = scores + rng.normal(size=scores.shape)
    found = compare(scores[:, :1], other[:, :1], labels[:, :1])
    want = delong_test(scores[:, 0], other[:, 0], labels[:, 0])
    assert found.difference.value == pytest.approx(want.difference.value, abs=1e-12)
    assert found.z == pytest.approx(want.z, rel=1e-9)
