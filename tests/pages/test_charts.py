"""Figures: what is drawn lies where its axes say, inside, and is well-formed."""

import re

import numpy as np
import pytest
from figures import NUMBER, letters, lines_of, parsed, read_x, read_y

from medsiglip_jax.pages import axes, charts, svg
from medsiglip_jax.pages.charts import Axis, Estimate, Series

GREY, BLUE = re.escape(charts.GREY), re.escape(charts.COLOURS[0])

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
    found = np.array(axes.ticks(low, high))
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
    found = axes.log_ticks(low, high)
    assert 2 <= len(found) <= 7 and low * 0.999 <= found[0] and found[-1] <= high * 1.001
    assert all(f"{v:.3e}"[0] in "125" for v in found)
    assert axes.log_ticks(1, 20) == [1, 2, 5, 10, 20]
    assert axes.log_ticks(1, 1e6) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]
    assert axes.log_ticks(3000, 4000) == axes.ticks(3000, 4000)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_names_of_ticks_never_overlap(seed, square):
    """However long they are, and however small the figure."""
    rng = np.random.default_rng(seed)
    low = float(rng.normal() * 10.0 ** rng.integers(-7, 6))
    high = low + abs(low) * float(10.0 ** rng.uniform(-2.5, 2))
    points = [(low, 0.0), (high, 1.0)]
    figure = charts.lines("t", [Series("", points)], Axis("n", (low, high)), square=square)
    found = re.findall(rf'<text x="({NUMBER})" y="({NUMBER})"[^>]*middle">([^<]+)<', figure)
    places = sorted((float(x), name) for x, _, name in found)
    assert len(places) >= 1 and len({y for _, y, _ in found}) == 1
    for (a, one), (b, two) in zip(places, places[1:], strict=False):
        assert b - a >= (svg.wide(one) + svg.wide(two)) / 2, (one, two)


def test_small_ticks_are_all_written_alike():
    figure = charts.lines("Learning rate", [Series("", [(0, 0.0), (9, 1e-4)])])
    names = re.findall(r'text-anchor="end">([^<]+)<', figure)
    assert names == ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]


def test_an_axis_says_that_it_is_cut_or_logarithmic():
    def words(low, **changes):
        axes = Axis("n", (1, 100), **changes), Axis("AUC")
        return charts.lines("t", [Series("", [(1, low), (100, 0.9)])], *axes)

    assert ">AUC (axis cut)<" in words(0.7) and ">AUC<" in words(-0.1)
    assert ">n (log scale)<" in words(0.7, log=True) and ">n<" in words(0.7)
    full = charts.lines("t", [Series("", [(1, 0.7)])], Axis("n"), Axis("share", (0, 1)))
    assert ">share<" in full
    rows = [Estimate("a", 0.8)]
    assert ">AUC (axis cut)<" in charts.forest("t", rows, Axis("AUC", (0.5, 1)))
    assert ">score<" in charts.forest("t", rows, Axis("score", (0, 1)))


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
    level = re.search(rf'd="M46 ({NUMBER})H\d+" stroke="{GREY}" stroke-width="1.5"', figure)
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
    ends = re.findall(rf'M({NUMBER}) {NUMBER}H({NUMBER})" stroke="{BLUE}" stroke-width="2"', figure)
    got = read_x(figure, np.array(ends, float))
    np.testing.assert_allclose(got, [(0.72, 0.9), (0.35, 0.45), (0.55, 0.66)], atol=0.003)
    marks = re.findall(rf'd="M({NUMBER}) {NUMBER}v14"', figure)
    np.testing.assert_allclose(read_x(figure, np.array(marks, float)), [0.85, 0.7], atol=0.003)
    chance = re.search(rf'd="M({NUMBER}) \d+V\d+" stroke="{GREY}" stroke-dasharray', figure)
    assert chance and read_x(figure, [float(chance[1])])[0] == pytest.approx(0.5, abs=0.003)
    texts = [t for t, *_ in letters(figure)]
    assert ["0.810", "0.400", "–", "0.600"] == [t for t in texts if re.fullmatch(r"0\.\d{3}|–", t)]
    assert "published" in texts and figure.count('opacity="0.45"') == 2
    assert charts.forest("AUC", [Estimate("a", None)], Axis("AUC")) == ""
    bare = charts.forest("AUC", [Estimate("a", 0.7)], Axis("AUC"), "published")
    assert "published" not in [t for t, *_ in letters(bare)]


# --------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("count", [1, 3, 12, 13, 46, 80])
def test_a_matrix_has_a_cell_for_each_pair(count):
    counts = np.random.default_rng(count).integers(0, 2000, (count, count)).tolist()
    counts[0] = [0] * count  # a class without images
    names = [f"a class with a long name & number {i}" for i in range(count)]
    figure = charts.matrix("zero-shot", names, counts)
    cells = list(parsed(figure).iter("rect"))
    shares = np.array([float(c.get("fill-opacity")) for c in cells]).reshape(count, count)
    total = np.maximum(1, np.sum(counts, axis=1, keepdims=True))
    deepest = charts._DEEPEST
    np.testing.assert_allclose(shares, deepest * np.array(counts) / total, atol=5e-4)
    width = float(parsed(figure).find("svg").get("width"))
    right = [float(c.get("x")) + float(c.get("width")) for c in cells]
    assert max(right) <= width + 1e-6 and width <= 610
    numbers = [t for t, *_ in letters(figure) if re.fullmatch(r"[\d,]+", t)]
    shown = [f"{n:,}" for row in counts for n in row]
    assert numbers == (shown if count <= 12 else [])
    hints = [t.text for t in parsed(figure).iter("title")]
    assert any(f"{names[-1]} called {names[0]}" in (hint or "") for hint in hints)


def test_a_matrix_of_nothing():
    assert charts.matrix("t", [], []) == ""


def test_rings_lie_beside_the_line_in_its_colour():
    series = [Series("a", [(0, 0), (1, 1)]), Series("b", [(0, 0), (1, 0.5)], rings=[(0.25, 0.75)])]
    figure = charts.lines("t", series, Axis("x", (0, 1)), Axis("y", (0, 1)), square=True)
    (ring,) = parsed(figure).iter("circle")
    assert ring.get("stroke") == charts.COLOURS[1]
    assert read_x(figure, [float(ring.get("cx"))])[0] == pytest.approx(0.25, abs=0.01)
    assert read_y(figure, [float(ring.get("cy"))])[0] == pytest.approx(0.75, abs=0.01)
