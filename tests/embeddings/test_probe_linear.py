"""The linear probe: the optimum of scikit-learn, and files that refuse what they are not."""

import json
import sys

import numpy as np
import pytest
from embedding_runs import DIM, MADE, draw, findings
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from medsiglip_jax import metrics
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.embeddings.probe import features, fitting, linear, logistic, scaling, solver
from medsiglip_jax.embeddings.probe.linear import open_probe
from medsiglip_jax.embeddings.provenance import Provenance


def rows_of(labels):
    return Examples([str(i) for i in range(len(labels))], labels=labels)


def reference(x, y, strength):
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    with threadpool_limits(1):
        model.fit((x - mean) / deviation, y)
    return lambda z: model.predict_proba((z - mean) / deviation)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classes_have_the_probabilities_of_sklearn(classes):
    train, chosen = draw(300, classes), draw(200, classes, seed=1)
    fitted = linear.fit(*train, *chosen)
    strength = fitted.facts["strengths"][0]
    test = draw(50, classes, seed=2)[0]
    np.testing.assert_allclose(
        fitted.predict(test), reference(*train, strength)(test), rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(fitted.predict(test).sum(axis=1), 1, rtol=1e-12)
    # The strength is the best of all that were tried, each fitted by itself.
    tried = [metrics.macro_auc(reference(*train, c)(chosen[0]), chosen[1])
             for c in linear.logistic.STRENGTHS]  # fmt: skip
    own = metrics.macro_auc(fitted.predict(chosen[0]), chosen[1])
    assert own == pytest.approx(max(tried), abs=2e-4)


def test_findings_are_fitted_one_by_one_on_what_is_known():
    train, chosen = findings(400), findings(200, seed=1)
    fitted = linear.fit(*train, *chosen, ["a", "b", "c"], rule="sensitivity", at_least=0.9)
    test = draw(50, seed=2)[0]
    mean, deviation = train[0].mean(0, dtype=np.float64), train[0].std(0, dtype=np.float64)
    for k, strength in enumerate(fitted.facts["strengths"]):
        known = ~np.isnan(train[1][:, k])
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        with threadpool_limits(1):
            model.fit(((train[0] - mean) / deviation)[known], train[1][known, k])
        want = model.predict_proba((test - mean) / deviation)[:, 1]
        np.testing.assert_allclose(fitted.predict(test)[:, k], want, rtol=0, atol=1e-4)
        rows = metrics.known(fitted.predict(chosen[0])[:, k], chosen[1][:, k])
        point = metrics.operating_point(rows.scores, rows.positive, fitted.thresholds[k])
        assert point.sensitivity.value >= 0.9
        assert fitted.thresholds[k] == metrics.choose_threshold(
            rows.scores, rows.positive, "sensitivity", 0.9
        )
        assert fitted.facts["validation_auc"][k] == metrics.auc(rows.scores, rows.positive)
    called = fitted.positive(fitted.predict(chosen[0]))
    assert called.dtype == bool and called.any() and not called.all()


def test_without_a_validation_auc_the_middle_strength_is_taken(monkeypatch):
    monkeypatch.setattr(logistic, "STRENGTHS", (0.1, 1.0, 10.0))
    (x, y), (xv, _) = draw(100, 2), draw(30, 2, seed=1)
    fitted = linear.fit(x, y, xv, np.zeros(30, np.int32))
    assert fitted.facts["strengths"] == [1, 1] and fitted.facts["validation_auc"] == [None, None]
    assert np.isnan(fitted.thresholds).all()


@pytest.mark.parametrize("scale", scaling.SCALES)
def test_scales(scale):
    (x, y), chosen = draw(200), draw(100, seed=1)
    fitted = linear.fit(x, y, *chosen, scale=scale)
    assert fitted.facts["scale"] == scale and fitted.scaling.unit == (scale == "unit")
    scaled = fitted.scaling(x)
    if scale == "standard":
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-6)
    elif scale == "unit":
        np.testing.assert_allclose(fitted.predict(3 * x), fitted.predict(x), atol=1e-6)
    else:
        np.testing.assert_array_equal(scaled, x)
        # The strengths to choose from are for features of mean square 1, whatever their size.
        larger = linear.fit(100 * x, y, 100 * chosen[0], chosen[1], scale=scale)
        np.testing.assert_allclose(larger.predict(100 * x), fitted.predict(x), atol=1e-5)
    assert metrics.macro_auc(fitted.predict(chosen[0]), chosen[1]) > 0.8


def test_what_was_never_seen_is_listed_and_never_called():
    (x, y), (xv, yv) = draw(200, 4), draw(100, 4, seed=1)
    fitted = linear.fit(x[y != 2], y[y != 2], xv, yv)
    assert fitted.fitted.tolist() == [True, True, False, True]
    assert (fitted.predict(xv)[:, 2] == 0).all() and not fitted.positive(fitted.predict(xv))[
        :, 2
    ].any()
    assert fitted.facts["validation_auc"][2] is None
    found = fitting.judge(fitted, features.Features(xv, rows_of(yv), fitted.provenance))
    assert found["undefined"] == ["2"] and found["classes"]["2"]["positives"] == (yv == 2).sum()
    assert found["classes"]["2"]["auc"] is None and found["classes"]["2"]["sensitivity"] is None
    seen = [found["classes"][name]["auc"] for name in "013"]
    assert found["macro_auc"] == pytest.approx(np.mean(seen), abs=1e-12)
    (x, y), (xv, yv) = findings(200), findings(100, seed=1)
    y[:, 1], yv[:, 2] = 0, 1
    fitted = linear.fit(x, y, xv, yv)
    assert fitted.fitted.tolist() == [True, False, True]
    scores = fitted.predict(xv)
    assert np.isnan(scores[:, 1]).all() and not np.isnan(scores[:, [0, 2]]).any()
    assert np.isnan(fitted.thresholds[1:]).all() and not fitted.positive(scores)[:, 1:].any()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scale="z"), "scale 'z'.*standard, unit, raw"),
        (dict(rule="best"), "rule is 'best'"),
        (dict(strength=0.0), "strength is 0.0; expected 1e-12 to 1e12"),
        (dict(hidden=-1), "hidden is -1"),
        (dict(hidden=8, strength=1.0), "no strength with a hidden layer"),
        (dict(rule="sensitivity"), "at_least is None"),
        (dict(labels=np.zeros(60, np.int32)), "60 training rows with a label, of 1 class"),
        (dict(labels=np.full(60, 7, np.int32), classes=("a", "b")), r"values \[7\]"),
        (dict(labels=np.zeros(59, np.int32)), r"shape \(59,\)"),
        (dict(vectors=np.full((60, DIM), np.inf, np.float32)), r"vectors \[0, 1.* not finite"),
    ],
)
def test_fit_refuses(change, message):
    (x, y), chosen = draw(60), draw(30, seed=1)
    arguments = dict(vectors=x, labels=y, validation_vectors=chosen[0], validation_labels=chosen[1])
    with pytest.raises(ValueError, match=message):
        linear.fit(**(arguments | change))


def test_the_probe_of_the_official_notebook():
    """scikit-learn with its default strength on vectors as they are, one finding at a time."""
    train, chosen, test = findings(300), findings(100, seed=1), draw(50, seed=2)[0]
    fitted = linear.fit(*train, *chosen, scale="raw", strength=1.0)
    assert fitted.facts["strengths"] == [1, 1, 1]
    for k in range(3):
        known = ~np.isnan(train[1][:, k])
        x = train[0][known].astype(np.float64)  # float32 would be fitted in float32
        with threadpool_limits(1):
            model = LogisticRegression(tol=1e-10, max_iter=10_000).fit(x, train[1][known, k])
        want = model.predict_proba(test)[:, 1]
        np.testing.assert_allclose(fitted.predict(test)[:, k], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("exclusive", [False, True])
def test_the_optimum_is_that_of_scikit_learn(n, exclusive, strength):
    """Also with more numbers than rows, a constant one, and two that are equal."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 80)) * np.geomspace(1, 1e-3, 80)
    x[:, 3], x[:, 5] = 7.0, x[:, 4]
    y = (x[:, :3] + 0.5 * rng.normal(size=(n, 3))).argmax(axis=1)
    labels = (y[:, None] == range(3)).astype(np.float64)
    known = exclusive | (rng.random(labels.shape) < 0.8)
    problem = solver.Problem(solver.rotate(x), labels, known, exclusive)
    weights = solver.minimize(problem, strength, problem.start)
    w, b = problem.features.restored(weights)
    for k in range(1 if exclusive else 3):  # classes that exclude each other have one model
        rows = known[:, k]
        target = y if exclusive else labels[rows, k]
        with threadpool_limits(1):
            model = LogisticRegression(C=strength, tol=1e-12, max_iter=100_000)
            model.fit(x[rows], target)
        want = model.decision_function(x)
        ours = x @ w.T + b
        if exclusive:
            ours, want = (side - side.mean(axis=1, keepdims=True) for side in (ours, want))
        else:
            ours = ours[:, k]
        spread = max(1e-2, np.abs(want - want.mean(axis=0)).max())
        np.testing.assert_allclose(ours / spread, want / spread, rtol=0, atol=1e-3)


def ring(n, seed=0):
    """Vectors of two classes, one around the other, which no plane separates."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    angle, radius = rng.uniform(0, 2 * np.pi, n), 1 + 2 * y + 0.3 * rng.normal(size=n)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.concatenate([x, rng.normal(size=(n, 6))], axis=1).astype(np.float32), y


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_hidden_layer_learns_what_a_plane_does_not_separate(exclusive, tmp_path):
    (x, y), (xv, yv), (xt, yt) = ring(600), ring(200, 1), ring(300, 2)
    if not exclusive:  # and a finding that all training rows have
        y, yv, yt = (np.stack([s, 1.0 - s, np.ones(len(s))], axis=1) for s in (y, yv, yt))
        y[::7, 0] = np.nan
    plane, bent = (linear.fit(x, y, xv, yv, hidden=units) for units in (0, 32))
    first = yt if exclusive else yt[:, 0]
    column = 1 if exclusive else 0
    assert metrics.auc(plane.predict(xt)[:, column], first) < 0.7
    assert metrics.auc(bent.predict(xt)[:, column], first) > 0.97
    if not exclusive:
        assert np.isnan(bent.predict(xt)[:, 2]).all() and bent.fitted.tolist() == [1, 1, 0]
    bent.save(tmp_path / "p.npz")
    opened = open_probe(tmp_path / "p.npz")
    np.testing.assert_array_equal(opened.predict(xt), bent.predict(xt))
    assert opened.facts["hidden"] == 32 and opened.facts["epochs"] > 0
    again = linear.fit(x, y, xv, yv, hidden=32)
    np.testing.assert_array_equal(again.predict(xt), bent.predict(xt))


def test_a_hidden_layer_without_optax(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'medsiglip-jax\[evaluate\]'"):
        linear.fit(*draw(60), *draw(30, seed=1), hidden=4)


def test_a_hidden_layer_is_refused_without_labels_to_stop_on():
    (x, y), (xv, _) = draw(100, 2), draw(30, 2, seed=1)
    with pytest.raises(ValueError, match="the validation rows have no labels"):
        linear.fit(x, y, xv, np.full(30, -1), hidden=4)
    with pytest.raises(ValueError, match="all of one class"):
        linear.fit(x, 0 * y, xv, np.zeros(30, int), hidden=4)


def test_a_saved_probe_is_the_same_probe(fitted, tmp_path):
    fitted.save(tmp_path / "p.npz")
    again = linear.fit(*draw(200), *draw(100, seed=1), fitted.classes, provenance=MADE)
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "p.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    opened = open_probe(tmp_path / "p.npz")
    x = draw(40, seed=2)[0]
    np.testing.assert_array_equal(opened.predict(x), fitted.predict(x))
    np.testing.assert_array_equal(opened.thresholds, fitted.thresholds)
    for name in ("classes", "exclusive", "provenance", "facts"):
        assert getattr(opened, name) == getattr(fitted, name)


def test_the_file_needs_no_pickle(fitted, tmp_path):
    fitted.save(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        content = {name: file[name] for name in file}
    assert json.loads(str(content["metadata"]))["provenance"]["model"] == "5a1"
    x = draw(5, seed=2)[0].astype(np.float64)  # and is read without us
    logits = (x - content["mean"]) / content["deviation"] @ content["coefficients"].T
    p = np.exp(logits + content["intercepts"])
    np.testing.assert_allclose(
        p / p.sum(axis=1, keepdims=True), fitted.predict(draw(5, seed=2)[0]), rtol=1e-9
    )


def test_open_probe_refuses_what_is_none(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_probe(tmp_path / "p.npz")
    (tmp_path / "text.npz").write_text("not a probe")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", metadata=np.array({}, object))
    fitted.save(tmp_path / "p.npz")
    content = dict(np.load(tmp_path / "p.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "p.npz").read_bytes()[:-200])
    np.savez(tmp_path / "shape.npz", **content | {"mean": np.zeros(3)})
    newer = str(content["metadata"]).replace("probe 1", "probe 2")
    np.savez(tmp_path / "newer.npz", **content | {"metadata": np.array(newer)})
    for name in ("text", "other", "pickle", "cut", "shape", "newer"):
        with pytest.raises(ValueError, match=f"{name}.npz: not a probe"):
            open_probe(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="ending in .npz"):
        fitted.save(tmp_path / "p.pkl")


@pytest.mark.parametrize("name, change, says", [
    ("coefficients", lambda x: np.where(x == x[0, 0], np.nan, x), "coefficients has 1 values that"),
    ("intercepts", lambda x: x * np.nan, "intercepts are NaN or infinite"),
    ("intercepts", lambda x: np.where(x == x[0], np.nan, x), "intercepts are NaN or infinite"),
    ("mean", lambda x: np.where(x == x[0], np.inf, x), "mean has 1 values that are NaN"),
    ("deviation", lambda x: x * 0, "deviation has values that are not positive"),
    ("coefficients", lambda x: x.astype(complex), "coefficients is complex128 .*; expected floats"),
    ("thresholds", lambda x: x.astype(str), "thresholds is <U.*; expected floats"),
    ("coefficients", lambda x: x.T, r"is float64 \(12, 3\); expected floats \(3, 12\)"),
    ("mean", lambda x: np.array([{}], object), "mean holds pickled objects"),
    ("metadata", lambda x: np.stack([x, x]), "its metadata has the shape"),
    ("metadata", lambda x: np.array('{"format": ' + "[" * 100_000), "nested too deeply"),
])  # fmt: skip
def test_a_probe_of_other_numbers_is_one_line(fitted, tmp_path, name, change, says):
    """Not "nan%" for every image, nor numpy's advice to load a pickle unsafely."""
    fitted.save(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(tmp_path / "p.npz", **arrays | {name: change(arrays[name])})
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/p.npz: not a probe that .*{says}"
    ) as caught:
        open_probe(tmp_path / "p.npz")
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model="0ff"), "with other, .* google/medsiglip-448: sha256 .*'0ff', wanted '5a1'"),
        (dict(preprocess="serving"), "preprocess is 'serving', wanted 'big_vision'"),
        (dict(normalized=False), "normalized is False, wanted True"),
        (dict(dim=13), "dim is 13, wanted 12"),
    ],
)
def test_predicting_on_embeddings_made_another_way_names_both(fitted, change, message):
    given = dict(dim=DIM, model="5a1", preprocess="big_vision", normalized=True, source="other")
    x = draw(3)[0]
    assert fitted.predict(x, Provenance(**given)).shape == (3, 3)
    with pytest.raises(ValueError, match=message):
        fitted.predict(x, Provenance(**(given | change)))
    with pytest.raises(ValueError, match="dim is 11, wanted 12"):
        fitted.predict(x[:, 1:])
    with pytest.raises(ValueError, match=r"vectors \[1\].* not finite"):
        fitted.predict(np.where(np.arange(3)[:, None] == 1, np.nan, x).astype(np.float32))
