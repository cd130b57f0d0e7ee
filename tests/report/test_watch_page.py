"""The page of `hdit watch` as a file: whole, safe, small; and the mathematics of its scripts."""

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from hdit.report.watch import grids
from hdit.report.watch.page import SCRIPTS, in_script, write_page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\u2028"


class Page(HTMLParser):
    """The elements of a page, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.attributes, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "script"
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])


def run(folder, images=(), config="", **files):
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "samples").mkdir()
    for n in images:
        png(folder / "samples" / f"{n:012d}.png")
    return folder


def png(path, side=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_page_is_one_file_that_asks_for_nothing_else(tmp_path):
    text = write_page([run(tmp_path / "run", [10], metrics=[{"images": 1, "loss": 2.0}])])
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "srcset", "action")]
    links = set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.\w+[^\s\"']*", text))
    assert links == {"http://www.w3.org/2000/svg"}  # the name of SVG, which no browser fetches
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    assert "default-src 'none'" in text
    assert "{{" not in text


def test_text_of_a_run_is_never_markup(tmp_path):
    folder = run(
        tmp_path / "a<script>b&c",
        config=f"[data]\nclasses = [{json.dumps(EVIL)}]\n",
        events=[{"kind": EVIL, "images": 1, "path": EVIL}],
        validation=[{"images": 1, "weights": {EVIL: {"loss": 1}}}],
    )
    text = write_page([folder])
    page = Page(text)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert "alert(1)" not in page.scripts[1]
    assert page.data["runs"][0]["name"] == "a<script>b&c"
    assert page.data["runs"][0]["events"][0]["kind"].startswith("</script><script>alert(1)")
    assert "<title>hdit watch: a&lt;script&gt;b&amp;c</title>" in text


def test_data_in_a_script_is_ascii_without_markup_and_reads_the_same():
    value = {"a": EVIL, "b": ["\udcff", 1.5, None]}
    text = in_script(value)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_scripts_set_no_markup():
    """All that they put into the page is text, or attributes of elements that they made."""
    for name in SCRIPTS:
        script = resources.files("hdit.report.watch").joinpath(name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval", script)


# ---- grids ---------------------------------------------------------------------------------------


def test_grids_are_in_the_page_as_they_are(tmp_path):
    folder = run(tmp_path / "run", [10, 20])
    told = Page(write_page([folder])).data["runs"][0]
    assert [grid["images"] for grid in told["grids"]] == [10, 20]
    head, _, content = told["grids"][1]["src"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == (folder / "samples" / "000000000020.png").read_bytes()
    assert told["grid_notes"] == []


def test_many_grids_are_thinned_between_the_first_and_the_last(tmp_path):
    paths = {n: tmp_path / f"{n}.png" for n in range(1, 501)}
    png(paths[1])
    for path in list(paths.values())[1:]:
        shutil.copy(paths[1], path)
    size = len("data:image/png;base64,") + len(base64.b64encode(paths[1].read_bytes()))
    found, notes = grids.embed(paths, 100.5 * size)
    assert 90 <= len(found) <= 100
    counts = [grid["images"] for grid in found]
    assert (counts[0], counts[-1]) == (1, 500)
    assert max(b - a for a, b in itertools.pairwise(counts)) <= 6
    assert f"{len(found)} of 500 grids" in notes[0]
    assert str(tmp_path) in notes[0]


def test_large_grids_are_made_smaller_within_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "SIDE", 64)
    paths = {n: tmp_path / f"{n}.png" for n in range(6)}
    for n, path in paths.items():
        png(path, side=120, seed=n)  # of noise: no grid is larger
    [one], _ = grids.embed({0: paths[0]}, paths[0].stat().st_size)
    budget = 4.5 * len(one["src"])
    found, notes = grids.embed(paths, budget)
    assert 2 < len(found) < 5
    assert sum(len(grid["src"]) for grid in found) <= budget
    assert {found[0]["images"], found[-1]["images"]} == {0, 5}
    content = base64.b64decode(found[0]["src"].partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))
    assert any("64 pixels" in note for note in notes)


def test_damaged_grid_is_left_out_and_told_of(tmp_path):
    folder = run(tmp_path / "run", [10, 20])
    (folder / "samples" / "000000000020.png").write_bytes(b"no image")
    told = Page(write_page([folder])).data["runs"][0]
    assert [grid["images"] for grid in told["grids"]] == [10]
    assert told["grid_notes"] == ["1 grids could not be read."]


# ---- scripts -------------------------------------------------------------------------------------

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="no node, which runs JavaScript")


def javascript(*calls):
    """The values of expressions after maths.js."""
    script = resources.files("hdit.report.watch").joinpath("maths.js").read_text()
    script += f"console.log(JSON.stringify([{','.join(calls)}]))"
    done = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_node
def test_scripts_are_sound_javascript(tmp_path):
    files = [resources.files("hdit.report.watch").joinpath(name).read_text() for name in SCRIPTS]
    (tmp_path / "all.js").write_text("\n".join(files))
    done = subprocess.run(
        ["node", "--check", tmp_path / "all.js"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_node
def test_numbers_are_brief_and_round():
    assert javascript(
        "brief(1234567)", "brief(999999)", "brief(0.00012)", "brief(0.0512345)", "brief(0)",
        "brief(-2500)", "duration(0)", "duration(3725)", "duration(59.7)",
        "duration(100000)", "whole(1234567.2)",
    ) == ["1.235M", "1M", "1.2e−4", "0.05123", "0", "-2.5k", "0 s", "1 h 2 min", "1 min",
          "1 d 3 h", "1,234,567"]  # fmt: skip


@needs_node
def test_ticks_are_round_numbers_within_the_range():
    assert javascript(
        "ticks(0, 48000, 8)", "ticks(0.1, 0.35, 5)", "ticks(3, 3, 5)", "logTicks(0.05, 30, 9)",
        "logTicks(1e-6, 1e6, 4)", "logTicks(0.05, 0.1, 4)",
    ) == [
        [0, 10000, 20000, 30000, 40000],
        [0.1, 0.15, 0.2, 0.25, 0.3, 0.35],
        [3],
        [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20],
        [1e-6, 1e-3, 1, 1e3, 1e6],
        [0.05, 0.06, 0.08, 0.1],
    ]  # fmt: skip


@needs_node
def test_smoothing_is_the_mean_by_distance_on_both_sides():
    x, y = [0, 1, 3, 7, 8, 20], [5, -1, 2, 2, 9, 4]
    weights = np.exp(-np.abs(np.subtract.outer(x, x)) / 2.5)
    expected = weights @ y / weights.sum(1)
    [found, raw] = javascript(f"smooth({x}, {y}, 2.5)", f"smooth({x}, {y}, 0)")
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert raw == y


@needs_node
def test_search_and_interpolation_find_what_lies_at_x():
    assert javascript(
        "before([1, 3, 5], 0)", "before([1, 3, 5], 3)", "before([1, 3, 5], 9)",
        "nearest([1, 3, 5], 3.9)", "nearest([1, 3, 5], 4.1)", "nearest([], 1)",
        "interpolate([0, 10, 20], [0, 1, 5], 15)", "interpolate([0, 10, 20], [0, 1, 5], 30)",
        "interpolate([0], [0], 7)", "extent([[3, null, -1], [7]], false)",
        "extent([[3, null, -1], [7]], true)", "extent([[]], false)", "middles([1, 4, 16])",
        "nearer([0.001, 1, 2, 3, 1000])", "nearer([0.5, 1, 2, 3, 4])", "nearer([1, 100])",
    ) == [-1, 1, 2, 1, 2, -1, 3, 9, 0, [-1, 7], [3, 7], None, [2, 8],
          [0.125, 1, 2, 3, 24], [0.5, 1, 2, 3, 4], [1, 100]]  # fmt: skip
