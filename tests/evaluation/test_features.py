import importlib.util
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.errors import UserError
from hdit.evaluation import features
from hdit.evaluation.features import INCEPTION, CleanResize, inception_file, open_features

CPU = torch.device("cpu")
needs_clean_fid = pytest.mark.skipif(
    importlib.util.find_spec("cleanfid") is None,
    reason="clean-fid is not installed (pip install --no-deps clean-fid requests)",
)


class Pooled(torch.nn.Module):
    """Mean of each channel, and the mean of all twice."""

    def forward(self, images: torch.Tensor):
        mean = images.double().mean((2, 3))
        return torch.cat([mean, mean.mean(1, keepdim=True).expand(-1, 2)], 1)


class Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x.mean((2, 3)).repeat(1, 683)[:, :2048]


class Base(torch.nn.Module):
    """What clean-fid takes of the file: `layers`, from -1..1 to 2048 numbers an image."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor):
        return x


def save(module, path):
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `mine` in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "mine.py").write_text(
        "def mean(x): return x.double().mean((2, 3))\n"
        "def flat(x): return mean(x)[:, 0]\n"
        "def short(x): return mean(x)[1:]\n"
        "def nan(x): return mean(x) / 0 * 0\n"
        "def text(x): return 'x'\n"
        "def fails(x): return x[5:5].max()\n"
        "number = 3\n"
    )
    yield
    sys.modules.pop("mine", None)


BATCH = torch.arange(4 * 3 * 5 * 6).view(4, 3, 5, 6).remainder(256).byte()


def test_a_function_is_handed_what_it_is_promised(module):
    found = open_features("mine:mean", CPU)
    torch.testing.assert_close(found(BATCH), BATCH.double().mean((2, 3)))
    assert len(found.sha256) == 64


def test_a_torchscript_file_is_handed_what_it_is_promised(tmp_path):
    path = save(Pooled(), tmp_path / "pooled.pt")
    found = open_features(str(path), CPU)(BATCH)
    assert found.shape == (4, 5)
    torch.testing.assert_close(found[:, :3], BATCH.double().mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flat", r"\(b d\).* got 4 torch.float64"),
        ("short", "one row for each of 4 images, got 3 x 3"),
        ("nan", "not finite"),
        ("text", "must return a tensor .* got str"),
        ("fails", "raised RuntimeError for a batch of 4 x 3 x 5 x 6 torch.uint8"),
    ],
)
def test_features_that_cannot_be_are_refused(module, name, words):
    with pytest.raises(UserError, match=words):
        open_features(f"mine:{name}", CPU)(BATCH)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine:absent", "has no 'absent'"),
        ("mine:number", "is a int, not a function"),
        ("yours:mean", "importing 'yours' .* raised ModuleNotFoundError"),
        ("yours.pt", "is not there"),
        ("mine.py", "is no TorchScript file"),
    ],
)
def test_features_that_are_not_there_are_named(module, name, words):
    with pytest.raises(UserError, match=words):
        open_features(name, CPU)


def test_a_pickle_is_not_taken_for_torchscript(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="is no TorchScript file"):
        open_features(str(tmp_path / "weights.pt"), CPU)


def test_without_clean_fid_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanfid.downloads_helper", None)
    with pytest.raises(UserError, match=r"pip install 'hdit\[fid\]'.*--no-deps"):
        open_features(None, CPU)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_features_of_no_regular_file_are_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="it' is no regular file"):
        open_features(str(path), CPU)


# ---- the file of the Inception -------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """hdit's cache, empty; the Inception is a file of two bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "CLEAN_FID", tmp_path / "theirs")
    (tmp_path / "right").write_bytes(b"OK")
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.sha256(tmp_path / "right"))
    return tmp_path / "hdit"


def never(folder):
    raise AssertionError("nothing was to be downloaded")


def writer(content):
    def download(folder):
        with open(f"{folder}/{INCEPTION}", "wb") as file:
            file.write(content)

    return download


def test_inception_is_downloaded_once(cache):
    path = inception_file(writer(b"OK"), print)
    assert path == cache / INCEPTION
    assert path.read_bytes() == b"OK"
    assert inception_file(never, print) == path
    assert list(cache.iterdir()) == [path]


def test_inception_is_taken_where_clean_fid_keeps_it(cache, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / INCEPTION).write_bytes(b"OK")
    assert inception_file(never, print) == tmp_path / "theirs" / INCEPTION


def test_a_damaged_inception_is_named_and_replaced(cache):
    cache.mkdir()
    (cache / INCEPTION).write_bytes(b"O")  # a download that was cut off
    said = []
    assert inception_file(writer(b"OK"), said.append).read_bytes() == b"OK"
    assert "is damaged or another file" in said[0]


def test_another_file_in_place_of_inception_is_refused_and_not_kept(cache):
    with pytest.raises(UserError, match="is not that file"):
        inception_file(writer(b"KO"), print)
    assert list(cache.iterdir()) == []


def test_without_a_network_the_error_says_where_to_put_inception(cache):
    def download(folder):
        raise OSError("Name or service not known")

    with pytest.raises(UserError, match=f"put it into {cache} by hand"):
        inception_file(download, print)


# ---- clean-fid itself ----------------------------------------------------------------------------


@needs_clean_fid
@pytest.mark.parametrize("size", [(8, 12), (500, 330)])
def test_pictures_are_resized_as_pillow_does_in_floating_point(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    found = CleanResize()(image)
    for channel, pixels in zip(found, image, strict=True):
        wanted = Image.fromarray(pixels.numpy().astype(np.float32)).resize(
            (299, 299), Image.Resampling.BICUBIC
        )
        np.testing.assert_array_equal(channel, np.asarray(wanted).clip(0, 255))
    assert (found != found.round()).any()


@needs_clean_fid
def test_inception_gets_pictures_of_299_from_minus_one_to_one(tmp_path, monkeypatch, cache):
    """A file with another network in it, as the real one is not at hand."""
    cache.mkdir()
    save(Base(), cache / INCEPTION)
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.sha256(cache / INCEPTION))
    extractor = open_features(None, CPU)
    image = torch.tensor([0, 128, 255]).view(3, 1, 1).expand(3, 20, 30).byte()
    found = extractor(torch.stack([extractor.prepare(image)] * 2))
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[1, :3], torch.tensor([-1.0, 0, 127 / 128]))
