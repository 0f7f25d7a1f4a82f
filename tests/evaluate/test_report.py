"""The page of an evaluation: which pictures it has, in which order, and what they show."""

import csv
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from figures import NUMBER, lines_of, read_x, read_y
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_auc_score

from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.report import document, export, pictures, sections, tables
from medsiglip_jax.evaluate.report.tables import ReportSection
from medsiglip_jax.evaluate.results.summary import summarize
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.pages import png


def evaluated(count, n=300):
    """Results of that many classes, without a model."""
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(count)]
    content = {
        "title": "A task", "kind": "multi_class", "score": "cosine", "data": {"adapter": "folders"},
        "classes": [{"name": name, "present": ["x"]} for name in names],
        "published": {"where": "a paper", "mean": 0.77, "auc": {"class 1": 0.66}},
    }  # fmt: skip
    labels = np.eye(count)[rng.integers(count, size=n)]
    meta = {
        "task": tasks.parse("a", content).to_dict(), "cells": [], "counts": {}, "provenance": {},
        "statistics": {"resamples": 20, "seed": 0},
    }  # fmt: skip
    values = rng.normal(size=(n, count)) + labels
    found = Scores([str(i) for i in range(n)], names, values, labels, None, meta)
    return summarize(found, {}), found


def svgs(page):
    return [ET.fromstring(s) for s in re.findall(r"<svg.*?</svg>", page, re.S)]


def titles(page):
    return [next(svg.iter("text")).text for svg in svgs(page)]


def test_the_forest_comes_first_with_what_was_published():
    content, scores = evaluated(3)
    page = document.page(content, scores)
    assert page.index("<svg") < page.index("<h2>Classes")
    label = svgs(page)[0].get("aria-label")
    want = [f"{c['class']} {c['auc']:.4g}" for c in content["classes"]]
    assert label == "; ".join(["AUC", *want, f"mean {content['macro_auc']['auc']:.4g}"])
    assert len(svgs(page)) == 1 + 3 * 3 + 1 and "<details" not in page
    hints = [t.text for t in svgs(page)[0].iter("title")]
    assert any("0.660 to compare" in h for h in hints) and any("0.770 to comp" in h for h in hints)


def test_many_classes_are_folded_away():
    content, scores = evaluated(79, 1500)
    page = document.page(content, scores)
    assert page.count("<details") == page.count("</details>") == 1 + 3
    opened = re.sub(r"<details.*?</details>", "", page, flags=re.S)
    (forest,) = svgs(opened)
    names = [t.text for t in forest.iter("text") if (t.text or "").startswith("class ")]
    ordered = sorted(content["classes"], key=lambda c: -c["auc"])
    starred = [c["class"] + (" *" if c["few"] else "") for c in ordered]
    assert names == starred[:10] + starred[-10:]
    assert len(svgs(page)) == 1 + 1 + 3 * 79  # and no confusion matrix


def test_classes_without_an_auc_are_said_to_have_none():
    content, scores = evaluated(3)
    content["classes"][1] |= {"auc": None, "low": None, "high": None}
    page = document.page(content, scores)
    assert "class 1 undefined" in svgs(page)[0].get("aria-label")
    assert len(svgs(page)) == 1 + 3 * 2 + 1


def test_p_values_have_the_digits_of_journals():
    """None of them is rounded onto another side of 0.05, 0 or 1."""
    written = {None: "–", 0.0: "< 0.001", 0.00099: "< 0.001", 0.0014: "0.001", 0.0096: "0.010",
               0.034: "0.03", 0.0449: "0.04", 0.0494: "0.049", 0.05: "0.05", 0.2149: "0.21",
               0.99: "0.99", 0.994: "> 0.99", 1.0: "> 0.99"}  # fmt: skip
    assert {p: tables.p_value(p) for p in written} == written


PROBE = {
    "macro_auc": {"auc": 0.86, "low": 0.8, "high": 0.9, "published": 0.88},
    "zero_shot_macro": {"auc": 0.81},
    "learning_curve": [
        {"method": m, "n": n, "seed": s, "auc": 0.5 + b * np.log10(n) / 10 + s / 100}
        for m, b in (("logistic", 1), ("centroid", 0.5))
        for n in (10, 100, 1000)
        for s in (0, 1, 5)
    ]
    + [{"method": "logistic", "n": 3, "seed": 0, "auc": None}],
    "few_shot": [{"method": "logistic", "shots": k, "seed": 0, "auc": 0.6} for k in (1, 2, 4)],
}  # fmt: skip


@pytest.fixture
def bare(monkeypatch):
    """A report without the tables that would go with the pictures."""
    monkeypatch.setattr(
        document, "sections", lambda results: map(ReportSection, ("Result", "Classes"))
    )


def test_learning_curves(bare):
    content, scores = evaluated(2)
    page = document.page({**content, "probe": PROBE}, scores)
    learning, few = svgs(page)[-2:]
    assert titles(page)[-2:] == ["Learning curve: macro AUC", "Few-shot: macro AUC"]
    figure = ET.tostring(learning, encoding="unicode").join(["<figure>", "</figure>"])
    for line, slope in zip(lines_of(figure), (1, 0.5), strict=True):
        x, y = read_x(figure, line[:, 0], log=True), read_y(figure, line[:, 1])
        np.testing.assert_allclose(x, [10, 100, 1000], rtol=0.03)
        np.testing.assert_allclose(y, 0.52 + slope * np.log10([10, 100, 1000]) / 10, atol=0.003)
    ends = re.findall(rf"M{NUMBER} ({NUMBER})V({NUMBER})M", figure)
    low, high = read_y(figure, np.array(ends, float)).T
    assert len(ends) == 6
    np.testing.assert_allclose(high - low, 0.05, atol=0.003)
    for svg in (learning, few):
        names = {t.text for t in svg.iter("text")}
        assert {"logistic", "zero-shot 0.810", "published probe 0.880"} <= names
    assert not re.findall(rf"M{NUMBER} {NUMBER}V", ET.tostring(few, encoding="unicode"))


def curve(predicted, observed, rows, ece):
    curve = {"predicted": predicted, "observed": observed, "rows": rows}
    return {"ece": ece, "ece_mass": ece, "brier": 0.1, "curve": curve}


def test_reliability_curves(bare):
    content, scores = evaluated(2)
    before = curve([0.1, 0.9], [0.3, 0.6], [90, 10], 0.21)
    after = curve([0.3, 0.6], [0.3, 0.6], [90, 10], 0.0)
    found = [
        {"of": "class <0>", "method": "Platt", "before": before, "after": after},
        {"of": "class 1", "method": "Platt", "before": None, "after": after},
    ]
    held_out = {"zero_shot": {"calibration": found}, "probe": None}
    page = document.page({**content, "held_out": held_out, "probe": None}, scores)
    assert "Reliability of zero-shot" in page and "Reliability of the probe" not in page
    both, one = svgs(page)[-2:]
    assert [t.text for t in both.iter("text")][0] == "class <0>"
    figure = ET.tostring(both, encoding="unicode").join(["<figure>", "</figure>"])
    for line, want in zip(lines_of(figure), (before, after), strict=True):
        for got, key in ((read_x(figure, line[:, 0]), "predicted"),
                         (read_y(figure, line[:, 1]), "observed")):  # fmt: skip
            np.testing.assert_allclose(got, want["curve"][key], atol=0.005)
    assert {"before, ECE 0.210", "after, ECE 0.000"} <= {t.text for t in both.iter("text")}
    assert len(list(one.iter("circle"))) == 2
    folded = [{**found[1], "of": f"class {i}"} for i in range(30)]
    page = document.page({**content, "held_out": {"probe": {"calibration": folded}}}, scores)
    assert "<summary>30 pictures" in page and "Reliability of the probe" in page


def figure_of(svg):
    return f"<figure>{svg[svg.index('<svg') : svg.rindex('</svg>') + 6]}</figure>"


def gallery(title, content, scores, learned=None):
    found = pictures.galleries(content, scores, learned)
    return next(g for g in found if g.title == title).pictures


def test_precision_and_recall_are_those_of_scikit_learn():
    content, scores = evaluated(3)
    for j, picture in enumerate(gallery("Precision and recall", content, scores)):
        assert picture.name == f"class {j}"
        figure = figure_of(picture.svg)
        (line,) = lines_of(figure)
        recall, precision = read_x(figure, line[:, 0]), read_y(figure, line[:, 1])
        want = precision_recall_curve(scores.labels[:, j], scores.scores[:, j])
        points = np.stack(want[1::-1], axis=1)[:-1]
        apart = np.abs(np.stack([recall, precision], axis=1)[:, None] - points).max(axis=2)
        assert (apart.min(axis=1) < 0.01).all() and len(line) > 50


def test_histograms_show_where_the_scores_are():
    content, scores = evaluated(2)
    figure = figure_of(gallery("Scores", content, scores)[1].svg)
    for line, label in zip(lines_of(figure), (0, 1), strict=True):
        x, y = read_x(figure, line[:, 0]), read_y(figure, line[:, 1])
        mean = (x[1::2] + x[::2]) / 2 @ y[::2]
        own = scores.scores[scores.labels[:, 1] == label, 1]
        assert y[::2].sum() == pytest.approx(1, abs=0.05)
        assert mean == pytest.approx(own.mean(), abs=0.15)


def test_the_confusion_matrix_is_that_of_scikit_learn():
    content, scores = evaluated(4)
    (picture,) = gallery("Confusion", content, scores)
    shown = [int(t.text) for t in ET.fromstring(figure_of(picture.svg)).iter("text")
             if re.fullmatch(r"\d+", t.text or "")]  # fmt: skip
    want = confusion_matrix(scores.labels.argmax(axis=1), scores.scores.argmax(axis=1))
    assert shown == want.ravel().tolist()


def test_both_confusion_matrices_are_of_the_images_that_were_held_out():
    content, scores = evaluated(4)
    test = scores.select(np.arange(0, len(scores.ids), 3))
    probe = replace(test, scores=test.scores + 2 * test.labels)
    learned = Learned("h", None, test, test, probe, probe, test, {})
    for picture in gallery("Confusion", content, scores, learned):
        shown = re.findall(r">(\d+)</text>", figure_of(picture.svg))
        assert sum(map(int, shown)) == len(test.ids)


def test_the_probe_is_drawn_beside_zero_shot_with_the_chosen_points():
    content, scores = evaluated(2)
    probe = replace(scores, scores=scores.scores + 2 * scores.labels)
    learned = Learned("h", None, scores, scores, probe, probe, scores, {})
    rate = {"value": 0.8, "low": 0.7, "high": 0.9}
    points = [
        {"class": "class 0", "rule": rule, "sensitivity": rate, "specificity": {**rate, "value": x}}
        for rule, x in (("sensitivity", 0.1), ("youden", 0.7))
    ]
    content["held_out"] = {"zero_shot": {"operating_points": points, "calibration": []},
                           "probe": None}  # fmt: skip
    first, second = gallery("ROC curves", content, scores, learned)
    figure = figure_of(first.svg)
    zero_shot, better = lines_of(figure)
    areas = []
    for line in (zero_shot, better):
        areas.append(np.trapezoid(read_y(figure, line[:, 1]), read_x(figure, line[:, 0])))
    want = [roc_auc_score(s.labels[:, 0], s.scores[:, 0]) for s in (scores, probe)]
    np.testing.assert_allclose(areas, want, atol=0.01)
    names = {t.text for t in ET.fromstring(figure).iter("text")}
    assert {f"zero-shot {want[0]:.3f}", f"probe {want[1]:.3f}"} <= names
    (ring,) = ET.fromstring(figure).iter("circle")
    assert read_x(figure, [float(ring.get("cx"))])[0] == pytest.approx(0.3, abs=0.01)
    assert read_y(figure, [float(ring.get("cy"))])[0] == pytest.approx(0.8, abs=0.01)
    assert not list(ET.fromstring(figure_of(second.svg)).iter("circle"))


def test_tables_and_figures_become_files(tmp_path):
    content, scores = evaluated(2)
    content["classes"][0]["class"] = "=cmd() / ../x"
    counts = export.export(tmp_path, content, scores, None)
    folder = tmp_path / "export"
    files = sorted(path.name for path in folder.iterdir())
    by_suffix = {s: [n for n in files if n.endswith(s)] for s in (".csv", ".tex", ".svg", ".png")}
    assert len(by_suffix[".csv"]) == len(by_suffix[".tex"]) == counts["tables"] >= 2
    assert len(by_suffix[".svg"]) == len(by_suffix[".png"]) == counts["figures"] == 1 + 3 * 2 + 1
    assert "roc-curves-01-cmd-x.svg" in files and all(re.fullmatch(r"[\w.-]+", n) for n in files)
    rows = list(csv.reader((folder / "classes.csv").read_text().splitlines()))
    (section,) = [s for s in sections.sections(content) if s.title == "Classes"]
    assert rows[0] == list(section.header) and rows[1][0] == "'=cmd() / ../x"
    assert [row[1:] for row in rows[1:]] == [list(row[1:]) for row in section.rows]
    svg = ET.fromstring((folder / "auc.svg").read_text())
    assert svg.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in ET.tostring(svg).decode()
    picture = Image.open(folder / "auc.png")
    assert picture.width == 3 * float(svg.get("width"))
    assert (np.asarray(picture.convert("L")) < 100).sum() > 500  # letters are drawn
    export.export(tmp_path, content, scores, None)
    (folder / "export.json").unlink()
    with pytest.raises(FileExistsError, match="not an export"):
        export.export(tmp_path, content, scores, None)


def test_without_the_package_that_draws_figures_stay_svg(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    content, scores = evaluated(2)
    assert export.export(tmp_path, content, scores, None)["png"] == 0
    assert not list((tmp_path / "export").glob("*.png"))
    with pytest.raises(ModuleNotFoundError, match=r"medsiglip-jax\[figures\]"):
        png.render("<svg/>")
