"""What the page of `hdit watch` draws, against known answers."""

import json
import math
import os
import socket

import numpy as np
import pytest

from hdit.report.watch.data import FIRST_EVENTS, LAST_EVENTS, VALIDATIONS, describe, differences
from hdit.report.watch.data import distinct as names_of
from hdit.report.watch.series import hours, some, thin
from hdit.runs.history import History

NOW = 1_700_000_000.0


def describe_run(folder, now=NOW, **files):
    """What is told of a run of these lines."""
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    history = History(folder)
    history.update()
    told = describe([history], now)
    json.dumps(told, allow_nan=False)  # or no page could hold it
    return told["runs"][0]


def lines(n, **values):
    return [{"images": 10 * (i + 1), "images_per_second": 100.0} | values for i in range(n)]


# ---- curves --------------------------------------------------------------------------------------


def test_few_points_stay_as_they_are():
    curve = thin(np.arange(5.0), np.array([1, math.nan, 3, 4, 5]))
    assert curve == {"x": [0, 2, 3, 4], "y": [1, 3, 4, 5]}


def test_thinned_curve_keeps_extremes_ends_and_means():
    rng = np.random.default_rng(0)
    x, y = np.arange(1.0, 100_001), rng.normal(size=100_000)
    y[[31_234, 77_777]] = 50, -60
    curve = thin(x, y, points=100)
    assert len(curve["x"]) == len(curve["y"]) == len(curve["lo"]) == len(curve["hi"]) == 102
    assert (max(curve["hi"]), min(curve["lo"])) == (50, -60)
    assert abs(curve["x"][curve["hi"].index(50)] - 31_235) <= 500  # its group has 1000 points
    assert (curve["x"][0], curve["x"][-1]) == (1, 100_000)
    assert curve["y"][-1] == pytest.approx(y[-1], rel=1e-5)
    assert curve["each"] == [1000]
    # Six digits of each mean are kept.
    expected = y.reshape(100, 1000).mean(1)
    np.testing.assert_allclose(curve["y"][1:-1], expected, rtol=1e-5)
    np.testing.assert_allclose(curve["lo"][1:-1], y.reshape(100, 1000).min(1), rtol=1e-5)


def test_thinned_curve_has_no_more_points_than_asked_for_whatever_their_number():
    for n in (201, 250, 1999):
        curve = thin(np.arange(float(n)), np.arange(float(n)), points=100)
        assert len(curve["x"]) == 102
        assert curve["x"] == sorted(curve["x"])


def test_some_indices_are_spread_and_keep_ends_and_what_must_stay():
    assert some(3, 5) == [0, 1, 2]
    assert some(101, 5) == [0, 25, 50, 75, 100]
    assert some(101, 5, [7, 25]) == [0, 7, 25, 50, 75, 100]


def test_hours_are_the_seconds_where_each_line_has_them():
    images, seconds = np.array([10.0, 20.0]), np.array([36.0, 72.0])
    taken, guessed = hours(images, seconds, np.array([1.0, 1.0]))
    assert taken.tolist() == [0.01, 0.02]
    assert not guessed


def test_hours_are_guessed_from_speeds_where_a_line_lacks_seconds():
    images = np.array([100.0, 200.0, 400.0, 500.0])
    speeds = np.array([10.0, 5.0, math.nan, 100.0])
    taken, guessed = hours(images, np.array([math.nan, 1, 2, 3]), speeds)
    np.testing.assert_allclose(taken * 3600, [10, 30, 30, 31])
    assert guessed


def test_axes_turn_images_into_hours_and_macs(tmp_path):
    metrics = [{"images": 100 * i, "seconds": 360.0 * i * i, "macs": 5e6 * i} for i in range(1, 4)]
    run = describe_run(tmp_path / "run", metrics=metrics)
    assert run["axes"] == {
        "images": [0, 100, 200, 300],
        "hours": [0, 0.1, 0.4, 0.9],
        "macs": [0, 5e6, 1e7, 1.5e7],
    }
    assert run["state"]["macs"] == pytest.approx(5e6 / 3 / 100)  # forward, of one image
    assert run["notes"] == []


def test_run_of_an_older_version_has_guessed_hours_and_no_macs_and_says_so(tmp_path):
    run = describe_run(tmp_path / "run", metrics=lines(3, loss=1.0))
    assert run["axes"]["hours"] == pytest.approx([0, *(0.1 * i / 3600 for i in (1, 2, 3))], 1e-5)
    assert "macs" not in run["axes"]
    assert any("images/s" in note for note in run["notes"])
    assert any("no MACs" in note for note in run["notes"])
    assert set(run["curves"]) == {"loss", "images_per_second"}


# ---- by sigma and validation ---------------------------------------------------------------------

EDGES = [0.01, 0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 5.0, 100.0]


def test_training_loss_by_sigma_is_a_curve_for_each_bin(tmp_path):
    metrics = lines(2, sigma_edges=EDGES, loss_by_sigma=[None, *range(1, 8)])
    run = describe_run(tmp_path / "run", metrics=metrics)
    assert run["sigma"]["edges"] == EDGES
    assert run["sigma"]["bins"][0] == {"x": [], "y": []}
    assert run["sigma"]["bins"][7] == {"x": [10, 20], "y": [7, 7]}


@pytest.mark.parametrize("edges", [None, EDGES[:-1], EDGES[::-1], [0.0, *EDGES[1:]], ["x"] * 9])
def test_training_loss_without_sound_edges_is_left_out(tmp_path, edges):
    metrics = lines(2, sigma_edges=edges, loss_by_sigma=list(range(8)))
    assert describe_run(tmp_path / "run", metrics=metrics)["sigma"] is None


def validation(images, loss, **more):
    held = {"loss": loss, "x0": 2 * loss, "loss_by_sigma": [loss] * 8, "x0_by_sigma": [1] * 8}
    return {"images": images, "count": 64, "sigma_edges": EDGES, "weights": {"ema": held}} | more


def test_validation_is_told_by_weights(tmp_path):
    run = describe_run(tmp_path / "run", validation=[validation(10, 0.5)])
    [told] = run["validation"]
    assert (told["images"], told["count"], told["edges"]) == (10, 64, EDGES)
    assert told["weights"]["ema"]["loss"] == 0.5
    assert told["weights"]["ema"]["x0"] == 1.0
    assert told["weights"]["ema"]["loss_by_sigma"] == [0.5] * 8


def test_strange_validation_loses_what_is_no_number(tmp_path):
    strange = {"ema": {"loss": "low", "x0": None, "loss_by_sigma": [1], "x0_by_sigma": "x"}}
    [told] = describe_run(tmp_path / "run", validation=[validation(10, 1, weights=strange)])[
        "validation"
    ]
    assert told["weights"]["ema"] == {
        "loss": None, "x0": None, "loss_by_sigma": [], "x0_by_sigma": [],
    }  # fmt: skip


def test_many_validations_are_thinned_but_for_the_best(tmp_path):
    n, best = 3 * VALIDATIONS, 1000
    told = [validation(10 * i, 0.1 if i == best else 1.0) for i in range(n)]
    run = describe_run(tmp_path / "run", validation=told)
    assert VALIDATIONS <= len(run["validation"]) <= VALIDATIONS + 1
    assert {0, 10 * best, 10 * (n - 1)} <= {v["images"] for v in run["validation"]}
    assert any("validations are left out" in note for note in run["notes"])


# ---- events, configs, names ----------------------------------------------------------------------


def test_events_have_kind_images_time_and_their_facts_as_text(tmp_path):
    event = {"kind": "loss spike", "images": 7, "time": NOW, "loss": 0.123456, "deviations": 9}
    run = describe_run(tmp_path / "run", events=[event])
    assert run["events"] == [
        {"kind": "loss spike", "images": 7, "time": NOW, "text": "loss 0.1235, deviations 9"}
    ]
    assert run["event_counts"] == {"loss spike": 1}


def test_many_events_of_a_kind_are_the_first_and_the_last(tmp_path):
    events = [{"kind": "file skipped", "images": i} for i in range(1000)]
    events.insert(500, {"kind": "slow", "images": 500})
    run = describe_run(tmp_path / "run", events=events)
    shown = [e["images"] for e in run["events"] if e["kind"] == "file skipped"]
    assert shown == [*range(FIRST_EVENTS), *range(1000 - LAST_EVENTS, 1000)]
    assert run["event_counts"] == {"file skipped": 1000, "slow": 1}
    assert sum(e["kind"] == "slow" for e in run["events"]) == 1


def test_differences_are_the_keys_that_are_not_the_same():
    a = {"x": 1, "t": {"lr": 0.1, "same": [1, 2]}, "levels": [{"d": 1}, {"d": 2}]}
    b = {"x": 1, "t": {"lr": 0.2, "same": [1, 2]}, "levels": [{"d": 1}], "only": "b"}
    assert differences([a, b]) == [
        {"key": "levels.1.d", "values": ["2", None]},
        {"key": "only", "values": [None, '"b"']},
        {"key": "t.lr", "values": ["0.1", "0.2"]},
    ]
    assert differences([a, a, {}]) == []
    assert differences([]) == []


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / name for name in ("a/run", "b/run", "other")]
    assert names_of(paths) == ["a/run", "b/run", "other"]
    assert names_of([tmp_path / "a" / "run"]) == ["run"]


def test_name_that_is_not_utf8_is_shown_escaped(tmp_path):
    folder = tmp_path / os.fsdecode(b"run-\xff")
    assert describe_run(folder, metrics=lines(1))["name"] == r"run-\xff"


# ---- where a run stands --------------------------------------------------------------------------


def state(folder, now=NOW, total=100, owner=None, n=5):
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(f"[training]\nimages = {total}\n")
    if owner:
        (folder / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    if n:
        describe_run(folder, metrics=lines(n))
        os.utime(folder / "metrics.jsonl", (NOW, NOW))
    return describe_run(folder, now)["state"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"total": 50}, "finished"),
        ({"owner": True}, "training"),
        ({"owner": True, "now": NOW + 3600}, "stalled"),
        ({}, "stopped"),
        ({"n": 0}, "not begun"),
        ({"n": 0, "owner": True}, "starting"),
    ],
)
def test_state_tells_whether_a_run_goes_on(tmp_path, facts, expected):
    assert state(tmp_path / "run", **facts)["is"] == expected


def test_state_tells_images_speed_and_time_left(tmp_path):
    told = state(tmp_path / "run", owner=True)
    assert (told["images"], told["total"], told["speed"]) == (50, 100, 100)
    assert told["seconds_left"] == 0.5
    assert told["written"] == NOW


def test_state_is_of_the_newest_checkpoint_where_no_line_came_after(tmp_path):
    (tmp_path / "run" / "checkpoints" / "000000000100").mkdir(parents=True)
    told = state(tmp_path / "run")
    assert (told["images"], told["is"]) == (100, "finished")


def test_run_without_any_file_is_described(tmp_path):
    run = describe_run(tmp_path / "run")
    assert run["state"]["images"] == 0
    assert run["curves"] == {}
    assert run["state"]["is"] == "not begun"
