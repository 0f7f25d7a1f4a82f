"""Figures: what is drawn lies where its axes say, inside, well-formed; and what reports draw."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from medsiglip_jax.evaluate import results, tasks
from medsiglip_jax.evaluate.report import document
from medsiglip_jax.evaluate.report.tables import Section
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.pages import charts
from medsiglip_jax.pages.charts import Axis, Estimate, Series

NUMBER = r"-?\d+(?:\.\d+)?"


def parsed(figure):
    return ET.fromstring(figure.strip())


def letters(figure):
    """(text, x, y, anchor) of every text."""
    return [
        (
            t.text or "",
            float(t.get("x")),
            float(t.get("y")),
            t.get("anchor") or t.get("text-anchor"),
        )
        for t in parsed(figure).iter("text")
    ]


def lines_of(figure):
    """Points of every line, the diagonal left out."""
    return [
        np.array([[float(v) for v in p.split(",")] for p in line.get("points").split()])
        for line in parsed(figure).iter("polyline")
        if line.get("stroke-dasharray") is None
    ]


def value(text):
    return float(text.replace(",", "").replace("M", "e6"))


def read_x(figure, pixels, log=False):
    """Values of pixels, by the ticks below the plot."""
    at = [(value(t), x) for t, x, _, anchor in letters(figure) if anchor == "middle"]
    return between(at, pixels, log)


def read_y(figure, pixels):
    at = [
        (value(t), y - 4)
        for t, x, y, anchor in letters(figure)
        if anchor == "end" and x == 40 and re.fullmatch(r"[-\d.,eM]+", t)
    ]
    return between(at, pixels)


def between(at, pixels, log=False):
    assert len(at) >= 2
    values, places = map(np.array, zip(*at, strict=True))
    slope, start = np.polyfit(places, np.log(values) if log else values, 1)
    found = start + slope * np.asarray(pixels)
    return np.exp(found) if log else found


# ------------------------------------------------------------------------------------------ ticks


def test_ticks_of_values_that_hardly_differ_are_told_apart():
    points = [(0, 0.99981), (1, 0.99999), (2, 0.99993)]
    drawn = charts.lines("AUC", [charts.Series("", points)], charts.Axis("n", (0, 2)))
    names = re.findall(r">(0\.99\d*|1\.0\d*|1)<", drawn)
    assert len(names) > 2 and len(set(names)) == len(names)


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_few_round_and_inside(seed):
    rng = np.random.default_rng(seed)
    low = rng.normal() * 10.0 ** rng.integers(-6, 9)
    high = low + 10.0 ** rng.uniform(-3, 2) * abs(low)
    found = np.array(charts.ticks(low, high))
    assert 2 <= len(found) <= 7
    step = found[1] - found[0]
    assert found[0] > low - 1e-6 * step and found[-1] < high + 1e-6 * step
    assert found[0] - step < low and found[-1] + step > high  # none is missing at the ends
    first = float(f"{step:.6e}".split("e")[0])
    assert round(first, 4) in (1, 2, 5, 10)
    np.testing.assert_allclose(found / step, np.round(found / step), atol=1e-4)


@pytest.mark.parametrize("seed", range(40))
def test_log_ticks_are_few_and_inside(seed):
    rng = np.random.default_rng(seed)
    low = 10.0 ** rng.uniform(-5, 5)
    high = low * 10.0 ** rng.uniform(1, 9)
    found = charts.log_ticks(low, high)
    assert 2 <= len(found) <= 7 and low * 0.999 <= found[0] and found[-1] <= high * 1.001
    assert all(f"{v:.3e}"[0] in "125" for v in found)
    assert charts.log_ticks(1, 20) == [1, 2, 5, 10, 20]
    assert charts.log_ticks(1, 1e6) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]
    assert charts.log_ticks(3000, 4000) == charts.ticks(3000, 4000)


# ----------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e5])
def test_points_lie_where_the_ticks_say(scale):
    x, y = np.linspace(0, 12000, 40), scale * np.random.default_rng(0).normal(size=40)
    figure = charts.lines("t", [Series("a", list(zip(x.tolist(), y.tolist(), strict=True)))])
    (line,) = lines_of(figure)
    np.testing.assert_allclose(read_x(figure, line[:, 0]), x, atol=12000 / 300)
    np.testing.assert_allclose(read_y(figure, line[:, 1]), y, atol=np.ptp(y) / 120)


def test_points_of_a_logarithmic_axis():
    points = [(n, 0.5 + 0.1 * i) for i, n in enumerate((10, 40, 300, 5000))]
    figure = charts.lines("t", [Series("a", points)], Axis("n", log=True))
    np.testing.assert_allclose(
        read_x(figure, lines_of(figure)[0][:, 0], log=True), [10, 40, 300, 5000], rtol=0.02
    )
    nothing = charts.lines("t", [Series("a", [(0, 1.0), (-1, 2.0)])], Axis(log=True))
    assert nothing == ""


def test_a_square_ends_in_its_corners():
    points = [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    share = Axis("x", (0.0, 1.0)), Axis("y", (0.0, 1.0))
    figure = charts.lines("t", [Series("", points)], *share, square=True, diagonal=True)
    (a, b, c), root = lines_of(figure)[0], parsed(figure)
    assert c[0] - a[0] == a[1] - c[1] and b[0] == a[0] and b[1] == c[1]
    dashed = [p.get("points") for p in root.iter("polyline") if p.get("stroke-dasharray")]
    assert dashed == [f"{a[0]},{a[1]} {c[0]},{c[1]}"]


def test_no_peak_is_lost_among_many_points():
    y = np.random.default_rng(0).normal(size=100_000)
    y[54_321], y[77_777] = 50, -50
    figure = charts.lines("t", [Series("a", list(enumerate(y.tolist())))])
    (line,) = lines_of(figure)
    assert len(line) < 700
    assert (np.diff(line[:, 0]) >= 0).all()
    found = read_y(figure, line[:, 1])
    np.testing.assert_allclose([found.max(), found.min()], [50, -50], atol=0.5)
    for end, at in ((0, 0), (-1, 99_999)):
        np.testing.assert_allclose(read_x(figure, line[end, 0]), at, atol=400)


def test_what_is_not_finite_is_left_out():
    points = [(0, 1.0), (1, None), (2, float("nan")), (3, float("inf")), (4, 2.0)]
    figure = charts.lines("t", [Series("a", points), Series("gone", [(1, None)])])
    assert len(lines_of(figure)) == 1 and len(lines_of(figure)[0]) == 2
    assert "gone" not in figure and "nan" not in figure.lower()
    assert charts.lines("t", [Series("a", [(1, None)])]) == charts.lines("t", []) == ""
    assert len(lines_of(charts.lines("t", [Series("a", [(5, 3.0)])]))[0]) == 1
    flat = charts.lines("t", [Series("a", [(1, 0.0), (2, 0.0)])])
    np.testing.assert_allclose(read_y(flat, lines_of(flat)[0][:, 1]), 0, atol=0.02)


def test_whiskers_levels_and_weights():
    series = [
        Series("a", [(1, 0.5), (2, 0.6)], [(1, 0.4, 0.55), (2, 0.58, 0.7)], dots=True),
        Series("b", [(1, 0.3), (2, 0.2)], weights=[100, 400]),
    ]
    figure = charts.lines("t", series, levels={"level": 0.9})
    ends = re.findall(rf"M{NUMBER} ({NUMBER})V({NUMBER})M", figure)
    got = read_y(figure, np.array(ends, float).ravel())
    np.testing.assert_allclose(got, [0.4, 0.55, 0.58, 0.7], atol=0.005)
    level = re.search(rf'd="M46 ({NUMBER})H\d+" stroke="#7b8794" stroke-width="1.5"', figure)
    assert level and read_y(figure, [float(level[1])])[0] == pytest.approx(0.9, abs=0.005)
    radii = [float(c.get("r")) for c in parsed(figure).iter("circle")]
    assert radii[0] == radii[1] and radii[3] == 2 * radii[2]  # areas are as 1 to 4
    assert "400 rows" in figure
    names = [t for t, *_ in letters(figure)]
    assert {"a", "b", "level"} <= set(names)
    label = parsed(figure)[0].get("aria-label")
    assert label == "t; a 0.5 to 0.6; b 0.3 to 0.2; level at 0.9"


NASTY = """<b title='x'>&amp; "quoted" ]]> </svg> é"""


@pytest.mark.parametrize("width", [3, 30, 300])
def test_any_name_is_escaped_and_stays_inside(width):
    name = (NASTY * 10)[:width]
    drawn = [
        charts.lines(
            name,
            [Series(f"{name}{i}", [(0, i), (12_345_678, -1e-7)], dots=True) for i in range(9)],
            Axis(name[:20]),
            Axis(name[:20]),
            levels={name: 0.5},
            square=square,
        )
        for square in (True, False)
    ]
    rows = [Estimate(name, 0.7, 0.6, 0.8, 0.75, faint=True), Estimate(name, None, summary=True)]
    for figure in [*drawn, charts.forest(name, rows, Axis(name[:20], (0.5, 1.0)), name)]:
        svg = parsed(figure)[0]
        assert svg.get("role") == "img" and svg.get("aria-label").startswith(name)
        _, _, wide, high = map(float, svg.get("viewBox").split())
        assert wide <= 460  # more would be too small to read on a phone
        for text, x, y, anchor in letters(figure):
            length = 6.96 * len(text)
            start = x - {"end": length, "middle": length / 2}.get(anchor, 0)
            assert start >= -8 and start + length <= wide + 20 and 10 <= y <= high
        for x, y in np.concatenate([*lines_of(figure), np.zeros((0, 2))]):
            assert 0 <= x <= wide and 0 <= y <= high


# ----------------------------------------------------------------------------------- forest plots


def test_a_forest_lies_where_its_ticks_say():
    rows = [
        Estimate("first", 0.81, 0.72, 0.9, 0.85),
        Estimate("second", 0.4, 0.35, 0.45, faint=True),
        Estimate("third", None),
        Estimate("mean", 0.6, 0.55, 0.66, 0.7, summary=True),
    ]
    figure = charts.forest("AUC", rows, Axis("AUC", (0.5, 1.0)), "published")
    dots = [float(c.get("cx")) for c in parsed(figure).iter("circle")]
    np.testing.assert_allclose(read_x(figure, dots), [0.81, 0.4], atol=0.003)
    ends = re.findall(
        rf'M({NUMBER}) {NUMBER}H({NUMBER})" stroke="#0072b2" stroke-width="2"', figure
    )
    got = read_x(figure, np.array(ends, float))
    np.testing.assert_allclose(got, [(0.72, 0.9), (0.35, 0.45), (0.55, 0.66)], atol=0.003)
    marks = re.findall(rf'd="M({NUMBER}) {NUMBER}v14"', figure)
    np.testing.assert_allclose(read_x(figure, np.array(marks, float)), [0.85, 0.7], atol=0.003)
    chance = re.search(rf'd="M({NUMBER}) \d+V\d+" stroke="#7b8794" stroke-dasharray', figure)
    assert chance and read_x(figure, [float(chance[1])])[0] == pytest.approx(0.5, abs=0.003)
    texts = [t for t, *_ in letters(figure)]
    assert ["0.810", "0.400", "–", "0.600"] == [t for t in texts if re.fullmatch(r"0\.\d{3}|–", t)]
    assert "published" in texts and figure.count('opacity="0.45"') == 2
    assert charts.forest("AUC", [Estimate("a", None)], Axis("AUC")) == ""
    bare = charts.forest("AUC", [Estimate("a", 0.7)], Axis("AUC"), "published")
    assert "published" not in [t for t, *_ in letters(bare)]


# ------------------------------------------------------------------------- pictures of evaluations


def evaluated(count, n=300):
    """Results of that many classes, without a model."""
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(count)]
    content = {
        "title": "A task", "kind": "multi_class", "score": "cosine", "data": {"adapter": "csv"},
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
    return results.results(found, {}), found


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
    assert len(svgs(page)) == 1 + 3 and "<details" not in page
    hints = [t.text for t in svgs(page)[0].iter("title")]
    assert any("0.660 to compare" in h for h in hints) and any("0.770 to comp" in h for h in hints)


def test_many_classes_are_folded_away():
    content, scores = evaluated(79, 1500)
    page = document.page(content, scores)
    assert page.count("<details") == page.count("</details>") == 2
    opened = re.sub(r"<details.*?</details>", "", page, flags=re.S)
    (forest,) = svgs(opened)
    names = [t.text for t in forest.iter("text") if (t.text or "").startswith("class ")]
    ordered = sorted(content["classes"], key=lambda c: -c["auc"])
    starred = [c["class"] + (" *" if c["few"] else "") for c in ordered]
    assert names == starred[:10] + starred[-10:]
    assert len(svgs(page)) == 1 + 1 + 79


def test_classes_without_an_auc_are_said_to_have_none():
    content, scores = evaluated(3)
    content["classes"][1] |= {"auc": None, "low": None, "high": None}
    page = document.page(content, scores)
    assert "class 1 undefined" in svgs(page)[0].get("aria-label") and len(svgs(page)) == 3


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
    monkeypatch.setattr(document, "sections", lambda results: map(Section, ("Result", "Classes")))


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
