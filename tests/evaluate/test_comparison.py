"""Two evaluations of the same images: numbers against SciPy and by hand, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medsiglip_jax import cli, metrics
from medsiglip_jax.evaluate import scores
from medsiglip_jax.evaluate.report.comparison import markdown
from medsiglip_jax.evaluate.results.comparison import compare, compare_all
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


# ------------------------------------------------------------------------------ more than two


def test_several_are_compared_with_the_first_and_adjusted_together(pair, tmp_path, capsys):
    good = np.nan_to_num(make().labels) + 0.3 * np.random.default_rng(0).normal(size=(N, 4))
    third = put(tmp_path / "c", make(3, scores=good))
    found = compare_all(pair[0], [pair[1], third])
    alone = [compare(pair[0], other) for other in (pair[1], third)]
    rows = [row for one in alone for row in one["classes"]]
    adjusted = metrics.holm([np.nan if row["p"] is None else row["p"] for row in rows])
    got = [row["p_holm"] for one in found for row in one["classes"]]
    known = [x for x in adjusted if not np.isnan(x)]
    assert [x for x in got if x is not None] == pytest.approx(known)
    assert [x for x in got if x is not None] != [
        row["p_holm"] for row in rows if row["p_holm"] is not None
    ]
    means = metrics.holm([one["macro"]["p"] for one in alone])
    assert [one["macro"]["p_holm"] for one in found] == pytest.approx(means)
    folders, output = [str(x) for x in (*pair, third)], tmp_path / "c.md"
    assert cli.main(["compare", *folders, "--json", "--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out) == found
    headings = [x for x in output.read_text().splitlines() if x.startswith("## AUC")]
    assert len(headings) == 2 and folders[1] in headings[0] and folders[2] in headings[1]


# ------------------------------------------------------------------------------- not inferior


def test_not_inferior_is_a_lower_limit_above_the_margin(pair, capsys):
    found = compare(*pair)
    low = found["macro"]["low"]
    assert found["margin"] is None and found["macro"]["not_inferior"] is None
    for margin in (abs(low) * 0.9, abs(low) * 1.1):
        got = compare(*pair, margin=margin)
        for row in [got["macro"], *got["classes"][:3]]:
            assert row["not_inferior"] == (row["low"] > -margin)
        assert got["classes"][3]["not_inferior"] is None
    assert got["macro"]["not_inferior"] is True or low > 0
    a, b = map(str, pair)
    assert cli.main(["compare", a, b, "--margin", "0.02"]) == 0
    assert "not inferior" in capsys.readouterr().out
    assert cli.main(["compare", a, b, "--margin", "2"]) == 2
    assert "margin is 2; expected an AUC above 0" in capsys.readouterr().err


# -------------------------------------------------------------------------------- at thresholds


def with_validation(folder, found, validation):
    put(folder, replace(found, meta={"learned": {"drawn": False}, **found.meta}))
    return put(folder, validation, "validation.parquet")


def test_sensitivities_are_compared_at_own_thresholds_by_patient(tmp_path):
    of = [make(1), make(2, noise=0.3)]
    others = [make(11), make(12, noise=0.3)]
    folders = [
        with_validation(tmp_path / name, one, other)
        for name, one, other in zip("ab", of, others, strict=True)
    ]
    found = compare(*folders)
    points = {
        (x["class"], x["rule"], x["at_least"], x["share"]): x for x in found["operating_points"]
    }
    assert len(points) == 3 * 5 * 2 and ("Never", "youden", None, "sensitivity") not in points
    row = points["Be|ta", "specificity", 0.9, "sensitivity"]
    known = ~np.isnan(of[0].labels[:, 1])
    thresholds = [
        metrics.choose_threshold(x.scores[known, 1], x.labels[known, 1], "specificity", 0.9)
        for x in others
    ]
    assert row["thresholds"] == thresholds
    positive = of[0].labels[:, 1] == 1
    first, second = (x.scores[positive, 1] >= t for x, t in zip(of, thresholds, strict=True))
    want = metrics.paired_shares(second, first, np.array(of[0].groups)[positive])
    assert (row["first"], row["second"]) == (first.mean(), second.mean())
    assert (row["low"], row["high"], row["p"]) == pytest.approx(
        (want.difference.low, want.difference.high, want.p)
    )
    assert points["Rare", "youden", None, "sensitivity"]["few"]
    assert "Sensitivity and specificity" in markdown(found)
    assert compare(put(tmp_path / "c", of[0]), folders[1])["operating_points"] == []


def test_images_that_thresholds_were_chosen_on_are_no_test_images(tmp_path):
    folders = []
    for name, seed in (("a", 1), ("b", 2)):
        found = make(seed)
        meta = {**found.meta, "learned": {"drawn": True}}
        folder = with_validation(
            tmp_path / name, replace(found, meta=meta), found.select(np.arange(60))
        )
        parts = ["validation"] * 60 + ["test"] * 60
        scores.write_columns(folder / scores.IMAGES, {"id": found.ids, scores.PART: parts})
        folders.append(folder)
    found = compare(*folders)
    held_out = make().labels[60:, 0]
    rows = {x["share"]: x["rows"] for x in found["operating_points"] if x["class"] == "Alpha"}
    assert rows == {"sensitivity": (held_out == 1).sum(), "specificity": (held_out == 0).sum()}


def test_validation_images_of_another_run_choose_nothing(tmp_path):
    found = [make(seed, meta={**make(seed).meta, "run": "r"}) for seed in (1, 2)]
    folders = [
        with_validation(tmp_path / name, one, replace(one, meta={**one.meta, "run": run}))
        for name, one, run in zip("ab", found, ("r", "other"), strict=True)
    ]
    with pytest.raises(ValueError, match=r"b: validation.parquet and scores.parquet are of diff"):
        compare(*folders)
    meta = {**found[1].meta, "learned": {"drawn": True}}
    with_validation(folders[1], replace(found[1], meta=meta), found[1])
    scores.write_columns(folders[1] / scores.IMAGES, {"id": found[1].ids})
    with pytest.raises(ValueError, match=r"images.parquet: no columns id and part"):
        compare(*folders)


def test_runs_judged_per_patient_are_compared_per_patient(tmp_path):
    aggregates, rows = ("max", "mean"), np.arange(N) % 100
    sides = [
        make(k, meta={"unit": {"per": "patient", "aggregate": how}})
        for k, how in enumerate(aggregates)
    ]
    folders = [put(tmp_path / f"{k}", side) for k, side in enumerate(sides)]
    for folder, side in zip(folders, sides, strict=True):
        scores.write_columns(folder / scores.IMAGES, {"id": side.ids})
    found = compare(*folders, resamples=50)
    of_patient = [
        np.array([combine(side.scores[rows == i, 0]) for i in range(100)])
        for side, combine in zip(sides, (np.max, np.mean), strict=True)
    ]
    labels = np.array([sides[0].labels[rows == i, 0].max() for i in range(100)])
    want = metrics.delong_test(of_patient[1], of_patient[0], labels)
    got = by_class(found)["Alpha"]
    assert (got["difference"], got["p"]) == pytest.approx((want.difference.value, want.p))
    assert found["unit"] == {"per": "patient", "count": 100, "aggregates": list(aggregates)}
    said = f"100 of {N} images, judged per patient (max in A and mean in B)"
    assert found["images"] == N and said in markdown(found)
    other = put(tmp_path / "images", make(1))
    with pytest.warns(UserWarning, match="per patient and per image; what is compared here is im"):
        assert compare(folders[0], other, resamples=50)["unit"] is None


def test_thresholds_of_runs_judged_per_patient_are_of_patients(tmp_path):
    meta = {"run": "r", "learned": {"drawn": False}, "unit": {"per": "patient"}}
    found = [make(seed, meta=meta) for seed in (1, 2)]
    folders = [
        with_validation(tmp_path / name, one, one) for name, one in zip("ab", found, strict=True)
    ]
    for folder in folders:
        scores.write_columns(folder / scores.IMAGES, {"id": found[0].ids})
    points = compare(*folders, resamples=50)["operating_points"]
    alpha = [row["rows"] for row in points if (row["class"], row["rule"]) == ("Alpha", "youden")]
    assert sum(alpha) == 100


def test_accuracies_of_several_are_adjusted_together(tmp_path):
    labels, task = np.eye(4)[np.arange(N) % 4], {"kind": "multi_class", "ordinal_from": 0}
    noise = [k * np.random.default_rng(i).normal(size=(N, 4)) for i, k in enumerate((0.5, 0.8, 1))]
    folders = [
        put(tmp_path / f"{k}", make(labels=labels, scores=labels + e, meta={"task": task}))
        for k, e in enumerate(noise)
    ]
    found = compare_all(folders[0], folders[1:], resamples=50)
    right = [one["one_class_each"]["accuracy"] for one in found]
    want = metrics.holm([row["p"] for row in right])
    assert [row["p_holm"] for row in right] == pytest.approx(want.tolist())
    assert right[0]["p_holm"] > right[0]["p"] or right[1]["p_holm"] > right[1]["p"]


def test_images_with_one_class_have_accuracy_and_the_like(tmp_path):
    task = {"kind": "multi_class", "ordinal_from": 0}
    labels = np.eye(4)[np.random.default_rng(0).integers(4, size=N)]
    of = [
        make(seed, labels=labels, scores=labels + np.random.default_rng(seed).normal(size=(N, 4)),
             meta={"task": task})
        for seed in (1, 2)
    ]  # fmt: skip
    found = compare(*(put(tmp_path / name, x) for name, x in zip("ab", of, strict=True)))
    each, truth = found["one_class_each"], labels.argmax(1)
    named = [x.scores.argmax(1) for x in of]
    want = metrics.paired_shares(named[1] == truth, named[0] == truth, np.array(of[0].groups))
    assert each["accuracy"]["difference"] == pytest.approx(want.difference.value)
    assert each["accuracy"]["p"] == pytest.approx(want.p)
    assert each["figures"]["macro_f1"]["first"] == metrics.macro_f1(named[0], truth)
    assert "quadratic_kappa" not in each["figures"]
    assert "One class for each image" in markdown(found) and "macro f1" in markdown(found)


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
