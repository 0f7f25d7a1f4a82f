"""One score for each patient or study: the arithmetic, the labels, and what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import special
from sklearn.metrics import roc_auc_score

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aggregation, tasks, units
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.units import Unit


def scored(seed=0, n=60, classes=2, patients=15):
    rng = np.random.default_rng(seed)
    groups = [f"p{i}" for i in rng.integers(patients, size=n)]
    labels = (rng.random((n, classes)) < 0.3).astype(float)
    labels[rng.random(labels.shape) < 0.2] = np.nan
    values = rng.random((n, classes))
    return Scores([f"i{i}" for i in range(n)], ["a", "b"][:classes], values, labels, groups, {})


def task(score):
    return tasks.parse("t", {
        "title": "T", "kind": "multi_label", "score": score, "data": {"adapter": "folders"},
        "classes": [{"name": "a", "present": ["x"], "absent": ["y"]}],
    })  # fmt: skip


def test_noisy_or_of_log_odds_is_that_of_their_probabilities():
    """Pairs of prompts have log odds, which rank, beside the probabilities that files state."""
    scores = scored()
    odds = replace(scores, scores=special.logit(scores.scores), log_odds=True)
    of_odds = aggregation.of_units(odds, scores.groups, "noisy-or", exclusive=False)
    want = aggregation.of_units(scores, scores.groups, "noisy-or", exclusive=False)
    np.testing.assert_allclose(of_odds.stated, want.scores, rtol=1e-12)
    aggregation.check(Unit("patient", "noisy-or"), task("pair_softmax"), scores.groups, {}, False)


def test_noisy_or_of_many_certain_images_still_ranks_units():
    """Their probabilities are all 1 in float64, which would tie them, and has no log odds."""
    sizes, odds = {"p": 200, "q": 300, "r": 3, "s": 1}, {"p": 3.0, "q": 3.0, "r": 40.0, "s": -60.0}
    groups = [name for name, n in sizes.items() for _ in range(n)]
    values = np.array([[odds[name]] for name in groups])
    scores = Scores(groups, ["a"], values, np.ones_like(values), groups, {}, log_odds=True)
    combined = aggregation.of_units(scores, groups, "noisy-or", exclusive=False).scores[:, 0]
    want = [n * np.log1p(np.exp(odds[name])) for name, n in sizes.items()][:3]  # -log(1 - P)
    np.testing.assert_allclose(combined, [*want, -60.0], rtol=1e-12)


BY_HAND = {
    "mean": np.mean,
    "max": np.max,
    "top1": np.max,
    "top3": lambda x: np.mean(sorted(x)[-3:]),
    "top99": np.mean,
    "noisy-or": lambda x: 1 - np.prod([1 - p for p in x]),
}


@pytest.mark.parametrize("how", BY_HAND)
def test_scores_of_a_patient_are_combined_as_by_hand(how):
    scores = scored()
    found = aggregation.of_units(scores, scores.groups, how, exclusive=False)
    assert found.ids == list(dict.fromkeys(scores.groups)) and found.groups is None
    for row, patient in enumerate(found.ids):
        mine = [i for i, group in enumerate(scores.groups) if group == patient]
        for j in range(2):
            own = [scores.scores[i, j] for i in mine]
            assert found.scores[row, j] == pytest.approx(BY_HAND[how](own), abs=1e-15)
            known = [scores.labels[i, j] for i in mine if not np.isnan(scores.labels[i, j])]
            want = max(known) if known else np.nan
            np.testing.assert_equal(found.labels[row, j], want)


def test_the_auc_of_patients_is_that_of_their_combined_scores():
    scores = scored(n=200, patients=60)
    found = aggregation.of_units(scores, scores.groups, "max", exclusive=False)
    rows = ~np.isnan(found.labels[:, 0])
    own = metrics.auc(found.scores[rows, 0], found.labels[rows, 0])
    assert own == pytest.approx(roc_auc_score(found.labels[rows, 0], found.scores[rows, 0]))


def test_studies_stay_rows_of_their_patients():
    scores = scored()
    studies = [f"{group}/{i % 2}" for i, group in enumerate(scores.groups)]
    attributes = {"study": studies, "sex": ["F" if g > "p5" else "M" for g in scores.groups],
                  "view": ["PA" if i % 3 else "AP" for i in range(60)]}  # fmt: skip
    unit = Unit("study")
    unit_of = aggregation.names(unit, scores, attributes)
    found = aggregation.of_units(scores, unit_of, unit.aggregate, exclusive=False)
    assert found.groups == [name.split("/")[0] for name in found.ids]
    common = aggregation.of_attributes(attributes, unit_of)
    assert common["sex"] == ["F" if name.split("/")[0] > "p5" else "M" for name in found.ids]
    assert "" in common["view"]  # both views


def test_exclusive_images_of_several_classes_have_no_label():
    labels = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    scores = Scores(list("abcd"), ["x", "y"], np.eye(4)[:, :2], labels, ["p", "p", "q", "q"], {})
    found = aggregation.of_units(scores, scores.groups, "mean", exclusive=True)
    np.testing.assert_equal(found.labels, [[1, 0], [np.nan, np.nan]])
    found = aggregation.of_units(scores, scores.groups, "mean", exclusive=False)
    np.testing.assert_equal(found.labels, [[1, 0], [1, 1]])


def test_a_class_without_scores_keeps_none():
    scores = scored()
    scores.scores[:, 1] = np.nan
    for how in BY_HAND:
        found = aggregation.of_units(scores, scores.groups, how, exclusive=False)
        assert np.isnan(found.scores[:, 1]).all() and not np.isnan(found.scores[:, 0]).any()


def test_what_does_not_fit_is_one_line():
    scores = scored()
    for how in ("top0", "top", "median", "noisy_or", ""):
        with pytest.raises(ValueError, match="expected mean, max, topN"):
            Unit("patient", how)
    by_cosine = task("cosine")
    with pytest.raises(ValueError, match="noisy-or needs probabilities, and scores by cosine are"):
        aggregation.check(Unit("patient", "noisy-or"), by_cosine, scores.groups, {}, False)
    with pytest.raises(ValueError, match="the first: 's'; choose another column"):
        attributes = {"study": ["s"] * 60}
        aggregation.check(Unit("study"), by_cosine, scores.groups, attributes, False)
    with pytest.raises(ValueError, match="with --learn only patient"):
        aggregation.check(Unit("study"), by_cosine, scores.groups, {"study": ["s"] * 60}, True)
    aggregation.check(Unit("patient"), by_cosine, scores.groups, {}, True)
    with pytest.raises(ValueError, match="images of several patients, the first: 's'"):
        aggregation.of_units(scores, ["s"] * 60, "mean", exclusive=False)
    with pytest.raises(ValueError, match="per is 'study'; expected one of patient, sex"):
        aggregation.names(Unit("study"), scores, {"sex": []})
    with pytest.raises(ValueError, match="1 of 60 images have none"):
        aggregation.names(Unit("study"), scores, {"study": ["s"] * 59 + [""]})
    bare = Scores(scores.ids, scores.classes, scores.scores, scores.labels, None, {})
    with pytest.raises(ValueError, match="the data names no patients"):
        aggregation.names(Unit(units.PATIENT), bare, {})
    learned = Learned("h", None, scores, scores)
    of_patients = aggregation.of_learned(learned, Unit(units.PATIENT), exclusive=False)
    assert len(of_patients.validation.ids) == 15 and of_patients.probe is None
