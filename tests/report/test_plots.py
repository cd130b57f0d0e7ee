import builtins
import re
from xml.etree import ElementTree

import pytest

from hdit.errors import UserError
from hdit.report.plots import COLOURS, plot_lines


def places(path):
    """The points of an SVG path of straight lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))]


def lines_of(svg):
    root = ElementTree.fromstring(svg)
    paths = root.iter("{http://www.w3.org/2000/svg}path")
    return [p for p in paths if f"stroke: {COLOURS[0]}; stroke-width: 1.8" in p.get("style", "")]


def ticks(svg, axis):
    """The position of each tick's label: x of axis 1, y of axis 2."""
    root = ElementTree.fromstring(svg)
    [group] = [g for g in root.iter() if g.get("id") == f"matplotlib.axis_{axis}"]
    found = {}
    for tick in group:
        texts = [t.text for t in tick.iter("{http://www.w3.org/2000/svg}text")]
        uses = list(tick.iter("{http://www.w3.org/2000/svg}use"))
        if texts and uses:
            found[texts[0].strip()] = float(uses[0].get("xy"[axis - 1]))
    return found


def test_plot_places_points_on_its_axes():
    svg = plot_lines({"a": [(1, 10.0), (100, 1000.0)]}, "x", "y", log_x=True, log_y=True)
    first, last = places(lines_of(svg)[0])
    across, up = ticks(svg, 1), ticks(svg, 2)
    assert first == pytest.approx((across["1"], up["10"]))
    assert last == pytest.approx((across["100"], up["1,000"]))
    assert across["10"] == pytest.approx((first[0] + last[0]) / 2), "logarithmic"


def test_plot_is_the_same_text_each_time_and_needs_nothing_else():
    series = {"dollars $x$": [(1, 2.0), (3, 4.0)], "_b": [(1, 1.0), (2, 2.0)]}
    svg = plot_lines(series, "images", "loss & more", log_y=True)
    assert svg == plot_lines(series, "images", "loss & more", log_y=True)
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")
    assert not re.search(r"(href|src)=\"(?!#)", svg)
    assert not re.search("https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg))
    words = ["".join(t.itertext()).strip() for t in ElementTree.fromstring(svg).iter()]
    for word in ("dollars $x$", "_b", "images", "loss & more"):
        assert word in words


def test_plot_leaves_out_what_an_axis_cannot_show():
    points = [(1, 1.0), (2, float("nan")), (3, 0.0), (4, 2.0), (5, float("inf"))]
    [line, *_] = lines_of(plot_lines({"a": points}, "x", "y", log_y=True))
    assert len(places(line)) == 2
    assert "<svg" in plot_lines({}, "x", "y", log_x=True)


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'hdit\[plots\]'"):
        plot_lines({"a": [(1, 2.0)]}, "x", "y")
