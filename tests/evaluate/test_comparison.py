"""Two evaluations of the same images: numbers against SciPy and by hand, and what is refused."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medsiglip_jax import cli, metrics
from medsiglip_jax.evaluate import scores
from medsiglip_jax.evaluate.report.comparison import markdown
from medsiglip_jax.evaluate.results.comparison import compare
from medsiglip_jax.evaluate.scores import Scores

CLASSES = ["Alpha", "Be|ta", "Rare", "Never"]
N = 120


def make(seed=0, noise=1.0, **changes):
    """Scores of 120 images of 100 patients, with unknown labels and a class without a positive;
    the labels do not depend on the seed."""
    rng = np.random.default_rng(99)
    labels = np.stack([rng.random(N) < share for share in (0.5, 0.3, 0.04, 0)], 1).astype(float)
    labels[rng.random(N) < 0.1, 1] = np.nan
    shared = np.nan_to_num(labels) + rng.normal(size=labels.shape)
    values = shared + noise * np.random.default_rng(seed).normal(size=labels.shape)
    ids = [f"{i:03d}.png" for i in range(N)]
    groups = [f"p{i % 100}" for i in range(N)]
    meta = {"provenance": {"preprocess": "big_vision", "model": {"sha256": str(seed), "n": 1}}}
    content = dict(ids=ids, classes=CLASSES, scores=values, labels=labels, groups=groups, meta=meta)
    return Scores(**(content | changes))


def put(folder, found, name=scores.FILE):
    folder.mkdir(exist_ok=True)
    scores.write(folder / name, found)
    return folder


@pytest.fixture
def pair(tmp_path):
    return put(tmp_path / "a", make(1)), put(tmp_path / "b", make(2, noise=0.3))


def by_class(found):
    return {c["class"]: c for c in found["classes"]}


# ---------------------------------------------------------------------------------------- numbers


def placements(values, labels):
    """Of positives and of negatives, their share of pairs in the right order: O(n^2)."""
    one, other = values[labels == 1][:, None], values[labels == 0]
    wins = (one > other) + 0.5 * (one == other)
    return wins.mean(1), wins.mean(0)


@pytest.mark.parametrize("name", CLASSES[:3])
def test_a_class_is_the_paired_test_of_independent_images(tmp_path, name):
    a, b = make(1, groups=None), make(2, noise=0.3, groups=None)
    got = by_class(compare(put(tmp_path / "a", a), put(tmp_path / "b", b), resamples=50))[name]
    j = CLASSES.index(name)
    rows = ~np.isnan(a.labels[:, j])
    labels, columns = a.labels[rows, j], [x.scores[rows, j] for x in (a, b)]
    parts = [placements(x, labels) for x in columns]
    differences = [other - one for one, other in zip(*parts, strict=True)]
    variances, counts = zip(*[(d.var(ddof=1) / len(d), len(d)) for d in differences], strict=True)
    error = np.sqrt(sum(variances))
    degrees = error**4 / sum(v * v / (n - 1) for v, n in zip(variances, counts, strict=True))
    aucs = [roc_auc_score(labels, x) for x in columns]
    assert [got["first"], got["second"]] == pytest.approx(aucs, abs=1e-12)
    assert got["difference"] == pytest.approx(aucs[1] - aucs[0], abs=1e-12)
    limits = stats.t.interval(0.95, degrees, got["difference"], error)
    assert [got["low"], got["high"]] == pytest.approx(limits, abs=1e-10)
    p = 2 * stats.t.sf(abs(got["difference"]) / error, degrees)
    assert got["p"] == pytest.approx(p, rel=1e-9)
    counts = got["positives"], got["negatives"], got["unknown"]
    assert counts == ((labels == 1).sum(), (labels == 0).sum(), (~rows).sum())
    assert got["few"] == (name == "Rare")


def test_patients_are_drawn_whole(tmp_path, pair):
    """As `delong_test` with groups says; and copies of a patient say nothing new."""
    a, b = make(1), make(2, noise=0.3)
    units = np.unique(a.groups, return_inverse=True)[1]
    got = by_class(compare(*pair, resamples=50))["Alpha"]
    columns = b.scores[:, 0], a.scores[:, 0], a.labels[:, 0]
    want = metrics.delong_test(*columns, groups=units)
    assert (got["low"], got["p"]) == (want.difference.low, want.p)
    assert got["p"] != metrics.delong_test(*columns).p

    def twice(found):
        ids = [*found.ids, *(f"again {name}" for name in found.ids)]
        many = {k: np.concatenate([getattr(found, k)] * 2) for k in ("scores", "labels")}
        return make(ids=ids, groups=found.groups * 2, meta=found.meta, **many)

    copies = compare(put(tmp_path / "c", twice(a)), put(tmp_path / "d", twice(b)), resamples=50)
    once = compare(*pair, resamples=50)
    assert by_class(copies)["Alpha"]["p"] == pytest.approx(got["p"], rel=1e-9)
    assert copies["macro"]["low"] == pytest.approx(once["macro"]["low"], abs=1e-12)


def test_holm_adjusts_for_the_classes_that_were_tested(pair):
    classes = compare(*pair, resamples=50)["classes"]
    p = [c["p"] for c in classes[:3]]
    order, highest = np.argsort(p), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1, p[k] * (3 - rank)))
        assert classes[k]["p_holm"] == pytest.approx(highest)
    assert classes[3]["p"] is None and classes[3]["p_holm"] is None


def test_the_mean_is_paired(pair):
    a, b = make(1), make(2, noise=0.3)
    got = compare(*pair)["macro"]
    units = np.unique(a.groups, return_inverse=True)[1]
    assert got["classes"] == 3
    assert [got["first"], got["second"]] == pytest.approx(
        [macro(x, np.arange(N)) for x in (a, b)], abs=1e-12
    )
    assert got["difference"] == pytest.approx(got["second"] - got["first"], abs=1e-12)
    want = metrics.macro_delong_test(b.scores, a.scores, a.labels, groups=units)
    limits = [want.difference.low, want.difference.high]
    assert [got["low"], got["high"]] == pytest.approx(limits, abs=1e-12)
    assert got["p"] == pytest.approx(want.p, rel=1e-9)
    alone = [metrics.macro_delong(x.scores, x.labels, groups=units).auc for x in (a, b)]
    unpaired = np.hypot(*(x.high - x.low for x in alone))
    assert got["high"] - got["low"] < unpaired


def macro(found, rows):
    aucs = []
    for values, labels in zip(found.scores[rows].T, found.labels[rows].T, strict=True):
        known = ~np.isnan(labels)
        if set(labels[known]) == {0, 1}:
            aucs.append(roc_auc_score(labels[known], values[known]))
    return np.mean(aucs)


def test_a_run_is_no_better_than_itself(pair):
    found = compare(pair[0], pair[0], resamples=50)
    for c in found["classes"][:3]:
        assert (c["difference"], c["low"], c["high"], c["p"], c["p_holm"]) == (0, 0, 0, 1, 1)
    assert [found["macro"][k] for k in ("difference", "low", "high")] == [0, 0, 0]
    assert found["differs"] == {} and found["left_out"] == {"first": 0, "second": 0}


def test_swapped_runs_mirror(pair):
    one, other = compare(*pair, resamples=200), compare(*pair[::-1], resamples=200)
    for x, y in zip(
        [*one["classes"][:3], one["macro"]], [*other["classes"][:3], other["macro"]], strict=True
    ):
        assert (x["first"], x["second"]) == (y["second"], y["first"])
        mirrored = [-y["difference"], -y["high"], -y["low"]]
        assert [x["difference"], x["low"], x["high"]] == pytest.approx(mirrored, abs=1e-12)
        assert x.get("p") == y.get("p")


# ------------------------------------------------------------------------- which images and classes


def shuffled(found, rows):
    """Those images, and the classes the other way round."""
    found = found.select(np.asarray(rows))
    return make(
        ids=found.ids, groups=found.groups, meta=found.meta, classes=CLASSES[::-1],
        scores=found.scores[:, ::-1], labels=found.labels[:, ::-1],
    )  # fmt: skip


def test_images_are_joined_by_id_and_classes_by_name(tmp_path, pair):
    rows = np.random.default_rng(0).permutation(N)
    other = put(tmp_path / "c", shuffled(make(2, noise=0.3), rows))
    want, got = compare(*pair, resamples=50), compare(pair[0], other, resamples=50)
    assert {**got, "second": ""} == {**want, "second": ""}


def test_images_that_one_lacks(tmp_path, pair):
    less = put(tmp_path / "c", make(2, noise=0.3).select(np.arange(5, N)))
    message = r"5 \(000.png, 001.png, 002.png, …\) only in A, none only in B; --allow-missing"
    with pytest.raises(ValueError, match=message):
        compare(pair[0], less)
    got = compare(pair[0], less, allow_missing=True, resamples=50)
    want = compare(put(tmp_path / "d", make(1).select(np.arange(5, N))), less, resamples=50)
    assert got["left_out"] == {"first": 5, "second": 0} and got["images"] == N - 5
    assert got["classes"] == want["classes"] and got["macro"] == want["macro"]
    strangers = put(tmp_path / "e", make(ids=[f"x{i}" for i in range(N)]))
    with pytest.raises(ValueError, match="no image is in both"):
        compare(pair[0], strangers, allow_missing=True)


def other_label(value):
    labels = make().labels
    labels[2, 0] = value
    return labels


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": [*CLASSES[:3], "Ever"]}, r"1 \(Never\) only in A, 1 \(Ever\) only in B"),
        ({"labels": other_label(np.nan)}, r"1 labels differ, .*002.png, class Alpha: .*unknown in"),
        ({"labels": 1 - make().labels}, r"\d+ labels differ, the first of image 000.png"),
        ({"groups": None}, "different patients"),
        ({"groups": [f"q{i}" for i in range(N)]}, "different patients"),
    ],
)  # fmt: skip
def test_what_is_not_the_same_is_refused_in_one_line(tmp_path, pair, changes, message, capsys):
    other = put(tmp_path / "c", make(2, **changes))
    with pytest.raises(ValueError, match=message) as caught:
        compare(pair[0], other)
    assert "\n" not in str(caught.value)
    assert cli.main(["compare", str(pair[0]), str(other)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_class_that_a_probe_could_not_learn(tmp_path, pair):
    values = make(2).scores
    values[:, 1] = np.nan
    found = compare(pair[0], put(tmp_path / "c", make(2, scores=values)), resamples=50)
    c = found["classes"][1]
    assert [c[k] for k in ("first", "second", "difference", "p", "p_holm")] == [None] * 5
    assert c["positives"] > 0 and found["macro"]["classes"] == 2
    json.dumps(found, allow_nan=False)
    nothing = put(tmp_path / "d", make(2, scores=np.full((N, 4), np.nan)))
    with pytest.raises(ValueError, match="no class has scores in scores.parquet of both"):
        compare(pair[0], nothing)


# ---------------------------------------------------------------------------------------- command


def test_the_command(pair, tmp_path, capsys):
    a, b = map(str, pair)
    output = tmp_path / "new" / "c.md"
    assert cli.main(["compare", a, b, "--resamples", "50", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    found = compare(a, b, resamples=50)
    assert output.read_text() == markdown(found)
    alpha = found["classes"][0]
    shown = [f"{alpha['first']:.3f}", f"{alpha['second']:.3f}", f"{alpha['difference']:+.3f}"]
    for where in (text, output.read_text()):
        line = next(x for x in where.splitlines() if x.lstrip("| ").startswith("Alpha"))
        assert [x for x in shown if x not in line] == []
        assert "Rare *" in where and "model.sha256" in where and "model.n" not in where
    rows = [x for x in output.read_text().splitlines() if x.startswith("|")]
    assert len({x.replace(r"\|", "").count("|") for x in rows[:-3]}) == 1  # one table, then another
    assert cli.main(["compare", a, b, "--json", "--resamples", "50"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_another_file_and_missing_images_on_the_command_line(tmp_path, capsys):
    a = put(tmp_path / "a", make(1), "probe.parquet")
    b = put(tmp_path / "b", make(2).select(np.arange(N - 1)), "probe.parquet")
    probe = ["--scores", "probe.parquet", "--resamples", "20"]
    assert cli.main(["compare", str(a), str(b)]) == 2
    assert "scores.parquet: no such file" in capsys.readouterr().err
    assert cli.main(["compare", str(a), str(b), *probe]) == 2
    assert "1 (119.png) only in A" in capsys.readouterr().err
    assert cli.main(["compare", str(a), str(b), *probe, "--allow-missing"]) == 3
    assert "without 1 images that only A has" in capsys.readouterr().err
