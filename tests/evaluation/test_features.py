import os
import sys
import warnings

import pytest
import torch

from hdit.errors import UserError
from hdit.evaluation.features import open_features

CPU = torch.device("cpu")


class Pooled(torch.nn.Module):
    """Mean of each channel, and the mean of all twice."""

    def forward(self, images: torch.Tensor):
        mean = images.double().mean((2, 3))
        return torch.cat([mean, mean.mean(1, keepdim=True).expand(-1, 2)], 1)


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
