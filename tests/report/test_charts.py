"""The report's line charts: what is drawn, and at which place."""

import json
import re

import pytest
from markupsafe import Markup

from megavlm.base.number_format import number
from megavlm.report.charts import MAX_POINTS, Band, Curve, chart, histogram


def paths(html, kind):
    return re.findall(rf'<path class="{kind}"[^>]* d="([^"]*)"', html)


def points(path):
    return [tuple(map(float, point)) for point in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def labels(html, axis):
    return re.findall(rf'<span class="{axis}"[^>]*>([^<]*)<', html)


def test_places_and_labels():
    html = chart("Loss", [1, 2, 3, 4, 5], [Curve("loss", [0.0, 1.0, 2.0, 3.0, 4.0], "loss")], from_zero=True)
    drawn = points(*paths(html, "line"))
    assert [x for x, _ in drawn] == [0, 250, 500, 750, 1000]
    assert [y for _, y in drawn] == sorted((y for _, y in drawn), reverse=True)  # up is more
    assert drawn[0][1] == 1000  # the axis starts at zero
    assert labels(html, "y") == ["0", "1", "2", "3", "4"]
    assert labels(html, "x") == ["1", "2", "3", "4", "5"]


def test_average_over_light_values():
    html = chart("Loss", [1, 2, 3], [Curve("loss", [3.0, 1.0, 2.0], "loss", average=[2.0, 2.0, 2.0])])
    assert len(points(*paths(html, "raw"))) == 3
    assert len({y for _, y in points(*paths(html, "line"))}) == 1


def test_gap_where_there_is_no_number():
    html = chart("Loss", [1, 2, 3, 4, 5], [Curve("loss", [1.0, 2.0, None, 1.5, None], "loss")])
    (path,) = paths(html, "line")
    assert re.sub(r"[-\d. ]", "", path) == "MLMh"  # two strokes, the second one a dot


def test_values_of_some_steps_are_joined():
    html = chart("Loss", [1, 2, 3, 4], [Curve("held out", [None, 2.0, None, 1.0], "speed", sparse=True)])
    (path,) = paths(html, "line")
    assert [x for x, _ in points(path)] == [pytest.approx(333.3, abs=0.1), 1000]
    assert path.count("M") == 1


def test_log_axis():
    html = chart("Norm", [1, 2, 3], [Curve("norm", [0.0, 0.1, 10.0], "text")], log=True)
    assert len(points(*paths(html, "line"))) == 2  # 0 has no place on it
    assert labels(html, "y") == ["0.1", "1", "10"]


def test_long_curve_is_thinned_and_keeps_its_spike():
    values = [1.0] * 50_000
    values[31_234] = 9.0
    html = chart("Loss", range(50_000), [Curve.smoothed("loss", values, "loss")])
    raw = points(*paths(html, "raw"))
    assert len(raw) <= MAX_POINTS
    assert len(points(*paths(html, "line"))) <= MAX_POINTS + 1
    assert sum(y < 500 for _, y in raw) == 1
    assert len(html) < 100_000


def test_degenerate_curves_are_drawn():
    flat = chart("Memory", [1, 2], [Curve("GiB", [1.5, 1.5], "soft")])
    assert {y for _, y in points(*paths(flat, "line"))} == {500.0}
    zeros = chart("Staleness", [1, 2], [Curve("steps", [0.0, 0.0], "soft")], from_zero=True)
    assert {y for _, y in points(*paths(zeros, "line"))} == {1000.0}
    assert labels(zeros, "y")[::5] == ["0", "1"]
    assert "h0" in chart("Loss", [1], [Curve("loss", [2.0], "loss")])
    assert paths(chart("Norm", [1, 2], [Curve("norm", [0.5, 0.5], "text")], log=True), "line")
    assert chart("MFU", [1, 2], [Curve("MFU", [None, None], "speed")]) == ""
    assert chart("Norm", [1, 2], [Curve("norm", [0.0, 0.0], "text")], log=True) == ""


def test_bands():
    html = chart(
        "Loss", [0, 5, 10], [Curve("loss", [3.0, 2.0, 1.0], "loss")], bands=[Band("a", 0, 4), Band("b", 4, 10)]
    )
    assert labels(html, "band") == ["a", "b"]
    assert "left:40.00%;margin-bottom:7px" in html
    long = [Band("short", 0, 9), Band("a name that is longer than its band", 9, 9.5), Band("last", 9.5, 10)]
    html = chart("Loss", [0, 5, 10], [Curve("loss", [3.0, 2.0, 1.0], "loss")], bands=long)
    places = re.findall(r'<span class="band" style="([^"]*)">', html)
    # the second one ends at the right edge, above the first, on which it would lie; the third beside the first
    assert places == ["left:0.00%;margin-bottom:7px", "right:0;margin-bottom:22px", "right:0;margin-bottom:7px"]
    assert 'style="margin-top:42px"' in html


def test_values_under_the_pointer():
    html = chart("Rate", [1, 2], [Curve("lr", [1e-4, 2e-4], "lr")], label=number)
    data = json.loads(Markup(re.search(r'data-chart="([^"]*)"', html)[1]).unescape())
    assert data == {"left": 1, "right": 2, "curves": [{"name": "lr", "points": [[1, "1.00e-04"], [2, "2.00e-04"]]}]}


def test_names_are_escaped():
    curves = [Curve("<s>'\"", [1, 2], "loss"), Curve("x", [1, 2], "lr")]
    html = chart("<em>", [1, 2], curves, bands=[Band("<u>", 1, 2)])
    for name in ("<s>", "<em>", "<u>"):
        assert name not in html
    assert json.loads(Markup(re.search(r'data-chart="([^"]*)"', html)[1]).unescape())["curves"][0]["name"] == "<s>'\""


def test_histogram_counts_whole_numbers_between_round_bounds():
    drawn = histogram("Lengths", [0, 3, 99, 100, 101, 198, 199], "tokens")
    titles = re.findall("<title>(.*?)</title>", drawn)  # 200 numbers in 40 bars of 5
    assert titles == ["0 to 4 tokens: 2", "95 to 99 tokens: 1", "100 to 104 tokens: 2", "195 to 199 tokens: 2"]
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', drawn)]
    assert heights[0] == heights[2] == pytest.approx(2 * heights[1], abs=0.02)
    assert labels(drawn, "y") == ["0", "1", "2"]  # no halves


def test_histogram_of_one_value_and_of_none():
    assert "<title>7 tokens: 1</title>" in histogram("Lengths", [7], "tokens")
    assert histogram("Lengths", [], "tokens") == ""


def test_labels_of_an_axis_have_one_form():
    """The rates of a short warm-up, 5e-5 apart, and a speed that passes 10,000."""
    rates = chart("Learning rate", [1, 2], [Curve("lr", [0.0, 3e-4], "lr")], from_zero=True)
    assert labels(rates, "y") == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e-4", "3e-4"]
    plain = chart("Learning rate", [1, 2], [Curve("lr", [0.0, 8e-4], "lr")], from_zero=True)
    assert labels(plain, "y") == ["0", "0.0002", "0.0004", "0.0006", "0.0008"]
    speed = chart("Tokens per second", [1, 2], [Curve("speed", [0.0, 12000.0], "speed")], from_zero=True)
    assert labels(speed, "y") == ["0", "2k", "4k", "6k", "8k", "10k", "12k"]
