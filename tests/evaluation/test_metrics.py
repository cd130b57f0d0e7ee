"""`hdit evaluate` with all metrics, stored references, the cache, pages, and kinds of sets."""

import json
import math
import re
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.evaluation import cache as cache_module
from hdit.evaluation import inception, references
from hdit.evaluation.extractor import sha256
from hdit.evaluation.intervals import groups_of
from hdit.evaluation.metrics import SLOTS, chosen

RANDOM = np.random.default_rng(0)
SETS = {
    "a": RANDOM.integers(0, 256, (60, 8, 8, 3), np.uint8),
    "b": RANDOM.integers(0, 200, (50, 8, 8, 3), np.uint8),
}
LABELS = {"a": np.arange(60) % 3, "b": np.arange(50) % 3}


class Net(torch.nn.Module):
    """Features of 12 numbers, and probabilities of 4 classes."""

    def forward(self, images: torch.Tensor):
        return torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, 2).flatten(1)

    @torch.jit.export
    def probabilities(self, images: torch.Tensor):
        return (20 * self.forward(images)[:, :4]).softmax(1)


class Another(Net):
    """Another file."""

    def forward(self, images: torch.Tensor):
        return torch.nn.functional.adaptive_avg_pool2d(images.double() / 256, 2).flatten(1)


def save(module, path):
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        torch.jit.save(torch.jit.script(module), path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in, with the network net.pt and the sets a.npz and b.npz; no cache yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(cache_module, "default_folder", lambda: tmp_path / "cache")
    save(Net(), "net.pt")
    for name, images in SETS.items():
        np.savez(f"{name}.npz", arr_0=images, arr_1=LABELS[name])
    return tmp_path


def card(hdit, *arguments):
    given = ("--features", "net.pt") * ("--features" not in arguments)
    status, out, err = hdit("evaluate", *arguments, *given, "--workers", 0, "--json")
    assert status == 0, err
    return json.loads(out), err


def refused(hdit, *arguments):
    status, _, err = hdit("evaluate", *arguments, "--workers", 0)
    assert status == 1
    return err


def features(images):
    """Net's, by numpy."""
    parts = images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4)) / 255
    return parts.transpose(0, 3, 1, 2).reshape(len(images), 12)


STAND_INS = ("--dinov2", "net.pt", "--clip", "net.pt")

# ---- figures -------------------------------------------------------------------------------------


def test_all_metrics_come_under_their_keys_with_their_intervals(here, hdit):
    found, _ = card(hdit, "a.npz", "b.npz", "--metrics", "all", *STAND_INS)
    assert set(SLOTS) <= set(found)
    assert found["left_out"] == {}
    assert found["fdd"] == found["fid"]  # the stand-ins are one network
    assert found["kdd"] == found["kid"]
    assert set(found["intervals"]) == set(SLOTS)
    for name, made in found["intervals"].items():
        value = found[name]["mean"] if isinstance(found[name], dict) else found[name]
        assert made["low"] <= value <= made["high"], name
        assert made["low"] < made["high"], name
        assert len(made["method"]) > 20


def test_metrics_are_those_of_the_features_by_other_formulas(here, hdit):
    found, _ = card(hdit, "a.npz", "b.npz", "--metrics", "all", *STAND_INS)
    x, y = (features(SETS[name]) for name in "ab")

    def distances(p, q):
        return np.sqrt(np.square(p[:, None] - q[None]).sum(-1))

    radii = [np.sort(distances(z, z), 1)[:, 3] for z in (x, y)]  # the first is of itself
    across = distances(x, y)
    assert found["precision"] == (across <= radii[1]).any(1).mean()
    assert found["recall"] == (across <= radii[0][:, None]).any(0).mean()

    def kernel(p, q):
        return np.exp(-np.square(distances(p, q)) / 200).mean()

    assert found["cmmd"] == pytest.approx(
        1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-9
    )
    p = np.exp(20 * x[:, :4])
    p /= p.sum(1, keepdims=True)
    parts = [p[groups_of(60, 10).numpy() == i] for i in range(10)]
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in parts]
    assert found["is"] == pytest.approx(np.mean(scores), rel=1e-9)


def test_a_set_against_itself_is_0_and_1(here, hdit):
    found, err = card(hdit, "a.npz", "a.npz", "--metrics", "all", *STAND_INS)
    assert "A and B are the same images" in err
    assert (found["precision"], found["recall"], found["swd"]) == (1, 1, 0)
    assert found["fid"] == pytest.approx(0, abs=1e-12)
    assert found["cmmd"] == pytest.approx(0, abs=1e-9)


def test_metrics_are_chosen_by_name_and_kid_goes_with_fid(here, hdit):
    found, _ = card(hdit, "a.npz", "b.npz", "--metrics", "fid, recall")
    assert {*SLOTS} & {*found} == {"fid", "kid", "recall"}
    whole, _ = card(hdit, "a.npz", "b.npz")
    assert {*SLOTS} & {*whole} == {"fid", "kid", "is", "precision", "recall"}
    assert found["protocol"] == whole["protocol"]
    assert chosen("cmmd,fdd") == (["fdd", "kdd", "cmmd"], ["cmmd", "fdd"])


def test_the_same_images_have_the_same_figures_from_folder_npz_and_tar(here, hdit):
    for i, image in enumerate(SETS["a"]):
        path = here / "folder" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    with tarfile.open("a.tar", "w") as file:
        for path in sorted((here / "folder").iterdir()):
            file.add(path, path.name)
    cards = [
        card(hdit, place, "b.npz", "--metrics", "all", *STAND_INS)[0]
        for place in ("a.npz", "folder", "a.tar")
    ]
    figures = [{name: one[name] for name in (*SLOTS, "protocol")} for one in cards]
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--metrics", "fid,fud"), "--metrics: 'fud' is none; known: fid, kid"),
        (("--features", "inception:x", "--protocol", "other"), "--protocol: 'other' is none"),
        (("--features", "net.pt", "--protocol", "adm"), "--protocol: adm has no effect"),
        (("--features", "net.pt", "--clip", "net.pt"), "--clip: has no effect without .*cmmd"),
        (("--features", "mean.pt", "--metrics", "is"), "is cannot be had: .* predicts no classes"),
        (("--features", "net.pt", "--metrics", "cmmd"), "--features: has no effect without one"),
        (("--features", "net.pt", "--html", "absent/x.html"), "--html: .* must name a file"),
    ],
)
def test_what_has_no_effect_or_no_answer_is_refused(here, hdit, arguments, words):
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            return images.float().mean((2, 3))

    save(Mean(), "mean.pt")
    assert re.search(words, refused(hdit, "a.npz", "b.npz", *arguments))


def test_a_missing_network_is_named_or_its_metrics_are_left_out(here, hdit, monkeypatch):
    monkeypatch.setattr("hdit.evaluation.vits.cache_folder", lambda: here / "none")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "none"))
    monkeypatch.setenv("HOME", str(here))
    err = refused(hdit, "a.npz", "b.npz", "--metrics", "fdd")
    assert "curl -fL --create-dirs -o" in err
    found, err = card(hdit, "a.npz", "b.npz", "--metrics", "all")
    assert {*SLOTS} & {*found} == {"fid", "kid", "is", "precision", "recall", "swd"}
    assert "fdd is left out: --dinov2: the file of DINOv2 ViT-L/14 is not there" in err


def test_few_images_leave_out_what_they_do_not_allow(here, hdit):
    np.savez("few.npz", arr_0=SETS["a"][:3])
    found, err = card(hdit, "few.npz", "b.npz")
    assert {*SLOTS} & {*found} == {"fid", "kid"}
    assert "precision is left out: it takes at least 4 images, got 3 and 50" in err
    assert "not of full rank" in err


def test_probabilities_that_are_none_are_refused(here, hdit):
    class Bad(Net):
        @torch.jit.export
        def probabilities(self, images: torch.Tensor):
            return self.forward(images)

    save(Bad(), "bad.pt")
    err = refused(hdit, "a.npz", "b.npz", "--features", "bad.pt")
    assert "class probabilities must be from 0 and add to 1" in err


# ---- ADM's files ---------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return torch.cat([pooled, pooled.square()], 1)


class Base(torch.nn.Module):
    """Stands in for the Inception."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False):
        return self.layers((x.float() - 128) / 128)


@pytest.fixture
def network(here, monkeypatch):
    """An Inception that has 24 features."""
    monkeypatch.setattr(references, "WIDTH", 24)
    folder = here / "xdg" / "hdit"
    folder.mkdir(parents=True)
    save(Base(), folder / inception.INCEPTION)
    monkeypatch.setattr(inception, "cache_folder", lambda: folder)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256(folder / inception.INCEPTION))


def inception_card(hdit, *arguments):
    status, out, err = hdit("evaluate", *arguments, "--workers", 0, "--json")
    assert status == 0, err
    return json.loads(out), err


def test_a_reference_of_adm_gives_fid_by_its_statistics_and_the_rest_by_its_images(
    here, hdit, network
):
    images, _ = inception_card(hdit, "a.npz", "b.npz", "--protocol", "adm")
    rows = np.random.default_rng(1).standard_normal((300, 24)) * 9
    np.savez("adm.npz", arr_0=SETS["b"], mu=rows.mean(0), sigma=np.cov(rows.T), mu_s=0, sigma_s=0)
    found, err = inception_card(hdit, "a.npz", "adm.npz", "--protocol", "adm")
    assert found["precision"] == images["precision"]
    assert found["kid"] == images["kid"]
    assert found["fid"] > 100 * images["fid"]
    assert found["pipeline"]["features"]["protocol"] == "adm"
    assert found["b"]["statistics_of"] == "ADM's file, by its own pipeline"
    assert found["protocol"] != images["protocol"]
    clean, err = inception_card(hdit, "a.npz", "adm.npz")
    assert "its images are measured: mu and sigma of adm.npz do not say what they are of" in err
    assert "statistics_sha256" not in clean["b"]
    np.savez("no_images.npz", mu=rows.mean(0), sigma=np.cov(rows.T))
    alone, err = inception_card(hdit, "a.npz", "no_images.npz", "--protocol", "edm")
    assert {*SLOTS} & {*alone} == {"fid"}
    assert "KID is left out: the reference has statistics alone" in err
    assert alone["b"]["images"] is None
    assert "with --protocol adm" in refused(hdit, "a.npz", "no_images.npz")


def test_a_written_reference_gives_the_figures_of_its_images(here, hdit):
    wanted, _ = card(hdit, "a.npz", "b.npz")
    options = ("--features", "net.pt", "--workers", 0)
    status, out, err = hdit("evaluate", "b.npz", "--write-reference", "ref.npz", *options)
    assert status == 0, err
    assert "mu and sigma of 50 images, and 50 of the images" in out
    with np.load("ref.npz") as file:
        assert {"mu", "sigma", "arr_0"} <= {*file}
        np.testing.assert_array_equal(file["arr_0"], SETS["b"])
        np.testing.assert_allclose(file["mu"], features(SETS["b"]).mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(features(SETS["b"]).T), rtol=1e-9)
    found, _ = card(hdit, "a.npz", "ref.npz")
    assert found["b"]["statistics_of"]["images"] == 50
    for name in ("fid", "precision", "recall", "is"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-9)
    assert found["kid"] == wanted["kid"]


def test_a_reference_of_other_features_is_refused_or_its_images_are_measured(here, hdit):
    options = ("--features", "net.pt", "--workers", 0)
    hdit("evaluate", "b.npz", "--write-reference", "ref.npz", *options)
    (here / "mine.py").write_text("def mean(x): return x.double().mean((2, 3))\n")
    _, err = card(hdit, "a.npz", "ref.npz", "--features", "mine:mean")
    assert "its images are measured: mu and sigma of ref.npz are of net.pt" in err
    with np.load("ref.npz") as file:
        arrays = {name: file[name] for name in file if name != "arr_0"}
    np.savez("alone.npz", **arrays)
    err = refused(hdit, "a.npz", "alone.npz", "--features", "mine:mean")
    assert "B: mu and sigma of alone.npz are of net.pt" in err


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"mu": np.zeros(3), "sigma": np.zeros((3, 2))},
            "must be .d,. and .d, d., got 3 and 3 x 2",
        ),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "must be finite"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "hdit_record": np.zeros(3, np.uint8)},
            "hdit_record: not valid JSON",
        ),
    ],
)
def test_damaged_statistics_are_refused(here, hdit, arrays, words):
    np.savez("bad.npz", **arrays)
    assert re.search(words, refused(hdit, "a.npz", "bad.npz", "--features", "net.pt"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.npz",), "B: name the reference, or instead of it --write-reference"),
        (("a.npz", "b.npz", "--write-reference", "x.npz"), "B: name the reference, or instead"),
        (("a.npz", "--write-reference", "x.npz", "--metrics", "fid"), "it measures nothing"),
        (("a.npz", "--write-reference", "x.npz", "--no-cache"), "it measures nothing"),
    ],
)
def test_a_reference_is_written_without_another(here, hdit, arguments, words):
    assert words in refused(hdit, *arguments)


# ---- the cache -----------------------------------------------------------------------------------


def test_features_of_the_reference_are_kept_and_taken(here, hdit, monkeypatch):
    first, _ = card(hdit, "a.npz", "b.npz")
    assert "from_cache" not in first["b"]
    second, _ = card(hdit, "a.npz", "b.npz")
    assert set(second["b"]["from_cache"]) == {"features"}
    for name in (*SLOTS, "protocol", "intervals"):
        assert second.get(name) == first.get(name)
    calls = []
    real = cache_module.measure
    monkeypatch.setattr(cache_module, "measure", lambda *a, **k: calls.append(1) or real(*a, **k))
    card(hdit, "a.npz", "b.npz")
    assert not calls
    without, _ = card(hdit, "a.npz", "b.npz", "--no-cache")
    assert "from_cache" not in without["b"]


def test_kept_features_are_of_the_pixels_their_order_and_the_network(here, hdit):
    card(hdit, "a.npz", "b.npz")
    changed = SETS["b"].copy()
    changed[7, 3, 3, 0] ^= 1
    for images in (changed, SETS["b"][::-1]):
        np.savez("b.npz", arr_0=images)
        found, _ = card(hdit, "a.npz", "b.npz")
        assert "from_cache" not in found["b"]
    save(Another(), "other.pt")
    found, _ = card(hdit, "a.npz", "b.npz", "--features", "other.pt")
    assert "from_cache" not in found["b"]


def test_functions_are_not_kept(here, hdit):
    (here / "mine.py").write_text("def mean(x): return x.double().mean((2, 3))\n")
    for _ in range(2):
        found, _ = card(hdit, "a.npz", "b.npz", "--features", "mine:mean")
        assert "from_cache" not in found["b"]
    assert not list(here.glob("cache/*"))


def test_damaged_features_are_made_anew(here, hdit):
    first, _ = card(hdit, "a.npz", "b.npz")
    (path,) = here.glob("cache/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    second, err = card(hdit, "a.npz", "b.npz")
    assert "is damaged and made anew" in err
    assert "from_cache" not in second["b"]
    assert second["fid"] == first["fid"]
    assert "from_cache" in card(hdit, "a.npz", "b.npz")[0]["b"]


def test_a_cache_that_cannot_be_written_costs_no_figures(here, hdit):
    (here / "cache").write_text("a file")
    found, err = card(hdit, "a.npz", "b.npz")
    assert found["fid"] > 0
    assert "warning: features are not kept: " in err


# ---- the page ------------------------------------------------------------------------------------


def test_a_page_shows_neighbours_and_classes_and_needs_no_network(here, hdit):
    images = SETS["a"].copy()
    images[5] = SETS["b"][40]  # a copy of the reference
    images[LABELS["a"] == 1] //= 4  # the worst class
    np.savez("a.npz", arr_0=images, arr_1=LABELS["a"])
    found, _ = card(hdit, "a.npz", "b.npz", "--html", "card.html")
    near = found["nearest"]
    assert near["copies"] == 1
    assert near["pairs"][0]["a"].endswith("a.npz[5]")
    assert near["pairs"][0]["b"].endswith("b.npz[40]")
    assert near["pairs"][0]["ratio"] < 1e-6
    classes = found["by_class"]["rows"]
    assert [row["a"] for row in classes] == [20, 20, 20]
    assert classes[0]["name"] == "1"
    assert classes[0]["kid"] > 2 * abs(classes[1]["kid"])
    assert found["a"]["balance"] == {"classes": 3, "fewest": 20, "most": 20}
    text = (here / "card.html").read_text()
    for words in ("FID", "precision", "Nearest reference images", "the worst first", "protocol"):
        assert words in text
    assert text.count("data:image/png;base64,") == 2 + 1 + 3
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", text)


def test_a_page_of_samples_shows_what_their_seeds_give(here, hdit, trained):
    options = ("-n", 6, "--steps", 2, "--features", "net.pt", "--workers", 0)
    status, _, err = hdit(
        "evaluate", trained, trained / "config.toml", *options, "--html", "x.html"
    )
    assert status == 0, err
    assert "seed 0" in (here / "x.html").read_text()


def test_half_of_new_images_are_authentic_and_no_copy_is():
    from hdit.evaluation.details import neighbours

    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(600, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    assert neighbours(x, y).authentic == pytest.approx(0.5, abs=0.08)
    copied = neighbours(y[:50] + 1e-6, y)
    assert copied.authentic == 0
    distances = [math.sqrt(3) * 1e-6] * len(copied.pairs)
    assert [pair[2] for pair in copied.pairs] == pytest.approx(distances, rel=0.01)
