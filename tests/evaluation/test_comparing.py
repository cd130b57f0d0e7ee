"""`hdit compare`: what is ranked, what is refused, and what is said of it."""

import json
import re

import pytest

from hdit.evaluation import comparing
from hdit.evaluation.published import PUBLISHED

SHA, OTHER = "ab" * 32, "cd" * 32


def a_card(fid, **changes):
    """What `hdit evaluate` writes, in short; changes are of a, b, features or the whole."""
    made = {
        "protocol": "0123456789ab",
        "fid": fid,
        "kid": {
            "mean": fid / 100, "standard_error": 0.1, "subsets": 1, "sizes": [5, 5], "seed": 0,
        },
        "precision": 1 - fid / 100,
        "intervals": {"fid": {"low": fid - 0.5, "high": fid + 0.5, "error": 0.25, "method": "x"}},
        "settings": {"precision": {"k": 3}},
        "a": {"place": "samples", "kind": "samples", "images": 50_000, "sizes": "8 x 8"},
        "b": {"place": "data", "kind": "npz", "images": 10, "sizes": "8 x 8", "pixels_sha256": SHA},
        "features": {"name": "net", "sha256": SHA, "dimensions": 4, "input": "as it is"},
        "versions": {"hdit": "1"},
    }  # fmt: skip
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    return made


@pytest.fixture
def compare(tmp_path, monkeypatch, hdit):
    """Writes cards 0.json, 1.json, ... and runs the verb on them."""
    monkeypatch.chdir(tmp_path)

    def run(*cards, options=()):
        for i, made in enumerate(cards):
            (tmp_path / f"{i}.json").write_text(json.dumps(made))
        return hdit("compare", *(f"{i}.json" for i in range(len(cards))), *options)

    return run


def test_cards_are_ranked_by_their_figure(compare):
    status, out, err = compare(a_card(9), a_card(3), a_card(5))
    assert status == 0, err
    lines = [line.split(" | ") for line in out.splitlines() if ".json" in line]
    assert [(line[0].strip("| "), line[1]) for line in lines] == [
        ("1.json", "1"), ("2.json", "2"), ("0.json", "3"),
    ]  # fmt: skip
    assert "3 (95%: 2.5 to 3.5)" in out
    assert "chance" not in out


def test_precision_ranks_from_the_highest_and_is_chosen_by_name(compare):
    _, out, _ = compare(a_card(9), a_card(3), options=("--metric", "precision", "--json"))
    found = json.loads(out)
    assert [one["card"] for one in found["cards"]] == ["1.json", "0.json"]
    assert found["cards"][0]["value"] == 0.97


def test_intervals_that_overlap_are_told(compare):
    _, out, _ = compare(a_card(9), a_card(8.5), a_card(3))
    assert "1.json and 0.json: intervals overlap, so that their order may be chance" in out
    assert "2.json and" not in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"b": {"pixels_sha256": OTHER}}, "reference: 0.json has ab.*, 1.json has cd"),
        ({"features": {"sha256": OTHER}}, "features: 0.json has abababababab..., 1.json"),
        ({"features": {"input": "resized"}}, "input: 0.json has as it is, 1.json has resized"),
        ({"a": {"images": 10_000}}, "images: 0.json has 50000, 1.json has 10000"),
        ({"a": {"sizes": "4 x 4"}}, "sizes: 0.json has 8 x 8, 1.json has 4 x 4"),
        ({"b": {"statistics_sha256": OTHER}}, "reference: 0.json has ab.*, 1.json has cd"),
    ],
)
def test_cards_of_different_protocols_are_refused_and_the_difference_is_named(
    compare, changes, words
):
    status, out, err = compare(a_card(9), a_card(3, **changes))
    assert status == 1
    assert out == ""
    assert re.search(words, err), err
    status, out, err = compare(a_card(9), a_card(3, **changes), options=("--unranked",))
    assert status == 0, err
    assert "rank" not in out
    assert re.search(f"differs: .*{words}", out), out


def test_only_the_metrics_own_settings_count(compare):
    cards = a_card(9), a_card(3, settings={"precision": {"k": 5}}, kid={"subsets": 7})
    status, out, _ = compare(*cards)
    assert status == 0
    assert "precision does not compare: k: 0.json has 3, 1.json has 5" in out
    _, _, err = compare(*cards, options=("--metric", "precision"))
    assert "k: 0.json has 3, 1.json has 5" in err
    _, _, err = compare(*cards, options=("--metric", "kid"))
    assert "subsets: 0.json has 1, 1.json has 7" in err


def test_a_copy_of_the_features_elsewhere_is_the_same(compare):
    assert compare(a_card(9), a_card(3, features={"name": "copy"}))[0] == 0


def test_cards_of_an_older_version_still_rank(compare):
    old = a_card(4)
    for key in ("intervals", "settings", "precision"):
        del old[key]
    status, out, err = compare(old, a_card(3))
    assert status == 0, err
    assert "| 0.json | 2 | 4 |" in out


def test_papers_are_listed_as_such_and_have_no_rank(compare):
    status, out, err = compare(a_card(3), options=("--published", "imagenet256"))
    assert status == 0, err
    lines = [line for line in out.splitlines() if "(published: " in line]
    assert len(lines) == len(PUBLISHED["imagenet256"]) == 4
    assert all(line.split(" | ")[1] == "-" for line in lines)
    assert "| DiT-XL/2 (published: Peebles &amp; Xie, 2023 (DiT)) | - | 9.62 |" in lines[0]
    assert "ADM's suite" in lines[0]


def test_a_page_plots_the_figure_against_the_cost_of_sampling(compare, tmp_path):
    sampling = {"sampler": {"kind": "heun"}, "guidance": {"scale": 1.5}}
    made = {"evaluations": 99, "macs": 4e11, "sampling": sampling, "weights": "ema"}
    options = ("--html", "page.html", "--out", "table.md")
    status, out, err = compare(a_card(9, a=made), a_card(3), options=options)
    assert status == 0, err
    assert (tmp_path / "table.md").read_text() == out
    assert "heun, 99 evaluations | 1.5 | ema | 400 |" in out
    text = (tmp_path / "page.html").read_text()
    assert "<svg" in text
    assert "GMAC of sampling an image" in text
    compare(a_card(9), a_card(3), options=options)
    assert "<svg" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "0.json: not valid JSON"),
        ("[]", "0.json: must hold an object"),
        ("{}", "0.json: is no card of hdit evaluate"),
        ('{"fid": 3, "protocol": "x"}', "0.json: is a damaged card .KeyError"),
        (json.dumps(a_card(3) | {"kid": {}}), "0.json: is a damaged card"),
        (None, "0.json: does not exist"),
    ],
)
def test_what_is_no_card_is_refused(tmp_path, monkeypatch, hdit, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "0.json").write_text(content)
    status, _, err = hdit("compare", "0.json")
    assert status == 1
    assert re.search(words, err), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--metric", "fud"), "--metric: 'fud' is none; known: fid"),
        (("--metric", "cmmd"), "--metric: cmmd is not in all cards: 0.json has fid, kid"),
        (("--published", "x"), "--published: 'x' is none; known: imagenet256"),
        (("--html", "absent/x"), "--html: .* must name a file"),
        (("0.json",), "a card is named twice"),
    ],
)
def test_options_that_have_no_answer_are_refused(compare, options, words):
    status, _, err = compare(a_card(3), options=options)
    assert status == 1
    assert re.search(words, err), err


def test_published_figures_are_the_papers():
    """A few of them, as printed; the rest are in the same tables."""
    by_name = {(row.name, row.sampling): row for row in PUBLISHED["imagenet256"]}
    row = by_name["HDiT 557M", "50 steps of DPM++(3M) SDE, no guidance"]
    assert row.figures == {"fid": 6.92, "is": 135.2}
    sizes = {row.name: (row.gmac, row.figures["fid"]) for row in PUBLISHED["imagenet256-400k"]}
    assert sizes["DiT-XL/2"] == (118.64, 19.47)
    assert len(sizes) == 12


def test_metric_is_the_first_that_all_cards_have():
    old = a_card(4)
    del old["fid"]
    assert comparing.choose_metric({"a": a_card(3), "b": old}, None) == "kid"
