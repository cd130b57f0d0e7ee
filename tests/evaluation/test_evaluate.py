"""`hdit evaluate`, and the classifier that its features may come from."""

import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.evaluation.card import compare, protocol
from hdit.evaluation.distances import kernel_distance
from hdit.evaluation.extractor import Extractor
from hdit.evaluation.image_sets import open_set
from scripts import train_classifier

CPU = torch.device("cpu")
KID = 0.06345908941751614  # of the two sets below, over 3 subsets of 10


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in, with features `mine:thumbnail` in 12 numbers, and two sets of 8x8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "mine.py").write_text(
        "from torch.nn.functional import adaptive_avg_pool2d\n"
        "def thumbnail(x): return adaptive_avg_pool2d(x.double() / 255, 2).flatten(1)\n"
    )
    random = np.random.default_rng(0)
    for name, top in (("a", 256), ("b", 200)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random.integers(0, top, (30, 8, 8, 3), np.uint8))
    yield tmp_path
    sys.modules.pop("mine", None)


MINE = ("--features", "mine:thumbnail", "--workers", 0)


def card(hdit, *arguments, features="mine:thumbnail"):
    options = ("--features", features, "--workers", 0, "--json")
    status, out, err = hdit("evaluate", *arguments, *options)
    assert status == 0, err
    return json.loads(out), err


def test_evaluate_gives_the_distance_of_the_features(here, hdit):
    found, err = card(hdit, "a.npz", "b.npz", "--batch-size", 7, "--out", "card.json")
    x, y = (
        np.load(f"{name}.npz")["arr_0"].reshape(30, 2, 4, 2, 4, 3).mean((2, 4)) / 255
        for name in "ab"
    )
    x, y = (v.transpose(0, 3, 1, 2).reshape(30, 12) for v in (x, y))
    eigenvalues = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T))
    trace = np.sqrt(eigenvalues.real).sum()
    fid = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T)) - 2 * trace
    assert found["fid"] == pytest.approx(fid, rel=1e-9)
    assert found["kid"]["mean"] > 0
    assert json.loads((here / "card.json").read_text()) == found
    assert [found[which]["images"] for which in "ab"] == [30, 30]
    assert "30 against 30" in err


def test_evaluate_prints_a_table(here, hdit):
    status, out, err = hdit("evaluate", "a.npz", "a.npz", *MINE)
    assert status == 0, err
    for words in ("FID", "KID", "30 of 8 x 8", "mine:thumbnail", "protocol"):
        assert words in out
    assert "A and B are the same images" in err


def test_evaluate_of_a_run_is_that_of_its_samples(here, hdit, trained):
    number = ("-n", 13, "--seed", 5, "--steps", 3, "--guidance", 2)
    found, _ = card(hdit, trained, trained / "config.toml", *number)
    status, _, err = hdit("sample", trained, *number, "--out", here / "samples")
    assert status == 0, err
    again, _ = card(hdit, here / "samples", trained / "config.toml")
    assert found["a"]["pixels_sha256"] == again["a"]["pixels_sha256"]
    assert found["fid"] == pytest.approx(again["fid"], rel=1e-9)
    assert found["protocol"] == again["protocol"]
    assert found["a"]["seeds"] == [5, 17]
    assert found["a"]["labels"] == "all 10 in turn"
    assert found["a"]["sampling"]["steps"] == 3
    assert found["a"]["sampling"]["guidance"]["scale"] == 2
    record = json.loads((here / "samples" / "samples.json").read_text())
    assert found["a"]["evaluations"] == record["evaluations"]


def test_protocol_tells_what_can_be_compared(here, hdit):
    first = card(hdit, "a.npz", "b.npz")[0]["protocol"]
    random = np.random.default_rng(1)
    np.savez("other.npz", arr_0=random.integers(0, 256, (30, 8, 8, 3), np.uint8))
    np.savez("fewer.npz", arr_0=random.integers(0, 256, (29, 8, 8, 3), np.uint8))
    shuffled = np.load("b.npz")["arr_0"][::-1]
    np.savez("shuffled.npz", arr_0=shuffled)
    assert card(hdit, "other.npz", "b.npz")[0]["protocol"] == first
    assert card(hdit, "a.npz", "shuffled.npz")[0]["protocol"] == first
    assert card(hdit, "fewer.npz", "b.npz")[0]["protocol"] != first
    assert card(hdit, "a.npz", "other.npz")[0]["protocol"] != first


def test_kid_of_evaluate_is_of_the_seed_that_its_card_tells(here, monkeypatch, hdit):
    """The figure was computed by numpy alone, from its Philox generator of seed 0."""
    few = partial(kernel_distance, subsets=3, size=10)
    monkeypatch.setattr("hdit.evaluation.metrics.kernel_distance", few)
    first, _ = card(hdit, "a.npz", "b.npz")
    assert first["kid"]["mean"] == pytest.approx(KID, rel=1e-9)
    assert [first["kid"][key] for key in ("subsets", "sizes", "seed")] == [3, [10, 10], 0]
    monkeypatch.setattr("hdit.evaluation.metrics.KID_SEED", 1)
    second, _ = card(hdit, "a.npz", "b.npz")
    assert second["kid"]["seed"] == 1
    assert second["kid"]["mean"] != pytest.approx(KID, rel=1e-3)


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("subsets", 4), ("sizes", [10, 11])])
def test_protocol_changes_with_each_choice_of_kid(here, hdit, key, value):
    found, _ = card(hdit, "a.npz", "b.npz")
    assert protocol(found) == found["protocol"]
    assert protocol({**found, "kid": {**found["kid"], key: value}}) != found["protocol"]


def test_protocol_of_a_card_stays_what_it_was():
    """A figure that was published names it."""
    features = {"name": "f", "sha256": "ab", "dimensions": 4, "input": "as it is"}
    one = {"images": 3, "sizes": "8 x 8", "pixels_sha256": "cd"}
    kid = {"mean": 0.5, "standard_error": None, "subsets": 1, "sizes": [3, 3], "seed": 0}
    assert protocol({"features": features, "kid": kid, "a": one, "b": one}) == "d5a2c645e579"


def test_evaluate_of_a_ruined_model_is_refused_with_its_seeds(here, hdit, ruined):
    status, out, err = hdit("evaluate", ruined, "b.npz", "-n", 3, *MINE)
    assert status == 1
    assert "sample of seed 0, 1, 2: values that are not finite" in err
    assert "FID" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.npz", "b.npz", "--steps", 5), "--steps: has no effect"),
        (("a.npz", "b.npz", "-n", 5), "-n: has no effect"),
        (("one.npz", "b.npz"), "A: a covariance needs two images, got 1"),
        (("mixed", "b.npz"), "of one size; .*0.png is 4 x 4, .*1.png is 5 x 4"),
        (("a.npz", "b.npz", "--out", "absent/card.json"), "--out: .* must name a file"),
    ],
)
def test_evaluate_refuses_what_has_no_answer(here, hdit, arguments, words):
    np.savez("one.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    (here / "mixed").mkdir()
    for i in range(2):
        Image.new("L", (4, 4 + i)).save(here / "mixed" / f"{i}.png")
    status, _, err = hdit("evaluate", *arguments, *MINE)
    assert status == 1
    assert re.search(words, err), err


def test_pictures_may_be_of_many_sizes_where_they_are_resized(here):
    for i in range(3):
        (here / "mixed").mkdir(exist_ok=True)
        Image.new("L", (4, 4 + i), 50 * i).save(here / "mixed" / f"{i}.png")
    extractor = Extractor(
        "mean", "", "4 x 4", lambda x: x[:, :4], lambda x: x.double().mean((2, 3)), CPU
    )
    found = compare(open_set("mixed"), open_set("mixed"), extractor)
    assert found.fid == 0
    assert found.card["a"]["sizes"] == "3 sizes from 4 x 4 to 6 x 4"


def test_evaluate_refuses_a_model_as_the_reference(here, hdit, trained):
    status, _, err = hdit("evaluate", "a.npz", trained, *MINE)
    assert status == 1
    assert "is a model; the reference must be images" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "training.seed=1"), "sampling can change [sampling] settings"),
        (("--set", "sampling.guidance.interval=[0.2,5]"), "has no effect without --guidance"),
        (("--set", "sampling.sampler.kind=dpm_adaptive", "--steps", 5), "chooses its steps"),
    ],
)
def test_evaluate_refuses_settings_that_are_no_sampling(here, hdit, trained, arguments, words):
    status, _, err = hdit("evaluate", trained, "a.npz", *MINE, *arguments)
    assert status == 1
    assert words in err


# ---- the classifier ------------------------------------------------------------------------------


def test_classifier_tells_classes_apart_and_is_taken_as_features(here, hdit, monkeypatch, capfd):
    """Stripes along and across."""
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 10)):
        for name, axis in (("across", 0), ("along", 1)):
            (here / "set" / part / name).mkdir(parents=True)
            for i in range(count):
                stripes = (np.indices((12, 12))[axis] + random.integers(4)) % 4 < 2
                pixels = stripes * 160 + random.integers(0, 80, (12, 12))
                path = here / "set" / part / name / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    options = ["--size", "12", "--width", "4", "--epochs", "6", "--batch-size", "20"]
    arguments = ["set", "--out", "net.pt", *options, "--workers", "0", "--no-mirror"]
    monkeypatch.setattr(sys, "argv", ["train_classifier.py", *arguments])
    train_classifier.main()
    assert "test accuracy: 100.00% of 20" in capfd.readouterr().out
    found, _ = card(hdit, "set/train", "set/test", features="net.pt")
    assert found["features"]["dimensions"] == train_classifier.FEATURES
    far, _ = card(hdit, "set/train/along", "set/test/across", features="net.pt")
    assert far["fid"] > 5 * found["fid"]


def test_classifier_takes_grey_and_colour_of_any_size():
    torch.manual_seed(0)
    net = train_classifier.Classifier(["x", "y", "z"], 1, 12, 2).eval()
    grey = torch.randint(0, 256, (4, 1, 12, 12), dtype=torch.uint8)
    torch.testing.assert_close(net(grey), net(grey.expand(-1, 3, -1, -1)))
    large = grey.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert net(large).shape == (4, train_classifier.FEATURES)
    torch.testing.assert_close(net.probabilities(large).sum(1), torch.ones(4))
    colour = train_classifier.Classifier(["x", "y"], 3, 12, 2).eval()
    torch.testing.assert_close(colour(grey), colour(grey.expand(-1, 3, -1, -1)))
