"""What holds for every verb: empty arguments, messages, code of the user's that exits."""

import os
import sys

import pytest

from hdit import cli
from hdit.cli import app as ENTRY
from hdit.errors import UserError
from hdit.plugins import no_exit

EMPTY = [
    (["train", "digits-hdit", "--run", ""], "--run"),
    (["train", "digits-hdit", "--run="], "--run"),
    (["data", "check", "x", "--size", ""], "--size"),
    (["data", "check", "x", "--crop="], "--crop"),
    (["data", "check", "x", "--kind", ""], "--kind"),
    (["sample", "x", "--labels", ""], "--labels"),
    (["convert", "x", "y", "--to", ""], "--to"),
    (["evaluate", "x", "y", "--features", ""], "--features"),
    (["encode", "x", "--out", ""], "--out"),
    (["convert", "", "y"], "'convert'"),
    (["info", ""], "'info'"),
    ([""], "argument 1"),
    (["info", "digits-hdit", "--set", ""], "--set"),
    (["info", "a\0b"], "zero byte"),
]


@pytest.mark.parametrize(("arguments", "named"), EMPTY)
def test_empty_argument_is_refused_and_named(hdit, arguments, named):
    status, out, err = hdit(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            UserError("first: a\n  second: \x1b[2J\udce9"),
            "error: first: a\n  second: \\x1b[2J\\xe9",
        ),
        (OSError(28, "No space left on device", "a\nb"), "error: a\\nb: No space left on device\n"),
        (MemoryError("so much"), "error: out of memory: so much"),
        (RuntimeError("can't allocate memory: you tried"), "error: out of memory: can't allocate"),
    ],
)
def test_error_that_the_user_can_mend_is_one_printable_message(monkeypatch, hdit, error, text):
    def fail():
        raise error

    monkeypatch.setattr(ENTRY, "app", fail)
    status, _, err = hdit("train")
    assert status == 1
    assert err.startswith(text)
    assert "\x1b" not in err


def test_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail():
        raise RuntimeError("a bug")

    monkeypatch.setattr(ENTRY, "app", fail)
    monkeypatch.setattr(sys, "argv", ["hdit", "train"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_name_that_is_not_utf8_can_be_printed(hdit, tmp_path):
    """As a part of a message, and of what a verb prints of a config."""
    path = tmp_path / os.fsdecode(b"caf\xe9.toml")
    status, _, err = hdit("info", path)
    assert status == 1
    assert r"caf\xe9.toml: no such config file" in err
    tiny = "model={kind='dit', depth=1, width=32, num_heads=2, patch_size=8}"  # costs no time
    status, out, err = hdit("info", "folder64-hdit", "--set", f"data.path={path}", "--set", tiny)
    assert status == 0, err
    assert "does not exist" in out
    assert r"\x5c" not in out + err


HOOKS = {
    "at import": "import sys\nsys.exit(0)",
    "when called": "import sys\ndef make():\n    sys.exit(0)",
    "of its own kind": "class Stop(BaseException): pass\ndef make():\n    raise Stop('now')",
    "at its length": "class Data:\n    def __len__(self): raise SystemExit(0)\n"
    "    def __getitem__(self, i): pass\nmake = Data",
    "at an item": (
        "class Data:\n    classes = ['a']\n    def __len__(self): return 8\n"
        "    def __getitem__(self, i): raise SystemExit(0)\n"
        "make = Data"
    ),
}


@pytest.mark.parametrize("when", HOOKS)
def test_train_with_a_hook_that_exits_is_an_error_that_names_it(
    when, hdit, tiny, tmp_path, monkeypatch
):
    name = "hook_" + when.replace(" ", "_")
    (tmp_path / f"{name}.py").write_text(HOOKS[when])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = f'data={{kind="python", hook="{name}:make", size=8, channels=1}}'
    status, _, err = hdit("train", tiny, "--run", "run", "--set", data)
    assert status == 1
    assert f"data.hook: '{name}:make'" in err
    assert "ended the program" in err
    assert not (tmp_path / "run").exists()


def test_evaluate_with_features_that_exit_is_an_error_that_names_them(hdit, tmp_path, monkeypatch):
    (tmp_path / "hook_features.py").write_text("def f(x):\n    raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    status, _, err = hdit(
        "evaluate", "digits-hdit", "digits-hdit", "--features", "hook_features:f", "--workers", 0
    )
    assert status == 1
    assert "--features: 'hook_features:f' ended the program" in err


def test_what_code_ended_the_program_with_is_told_on_a_short_line():
    """sys.exit as the function of features would be given a batch of images."""
    with pytest.raises(UserError, match="ended the program") as told, no_exit("here"):
        sys.exit("a\n" * 5000)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("folder", ["n" * 300, "a/" + "n" * 300])
@pytest.mark.parametrize("verb", ["train", "convert"])
def test_name_too_long_for_a_file_is_one_message_that_begins_with_it(
    hdit, tiny, tmp_path, monkeypatch, trained, verb, folder
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    arguments = {"train": [tiny, "--run"], "convert": [trained]}[verb]
    status, _, err = hdit(verb, *arguments, folder)
    assert status == 1
    assert err.startswith(f"error: {folder}")
    assert err.endswith("File name too long\n")
    assert sorted(tmp_path.iterdir()) == before


TOO_LARGE = [
    ("training.batch_size=1000000", "training.batch_size: a step with 1,000,000 images at once"),
    ("sampling={grid=4000, batch_size=4000}", "sampling.batch_size: 4,000 images at once take"),
    (
        "model={kind='dit', depth=100, width=65536, num_heads=64, patch_size=1}",
        "model: the weights, EMA, gradients and moments of its 7,743",
    ),
]


@pytest.mark.parametrize(("override", "wanted"), TOO_LARGE)
def test_train_of_what_exceeds_the_memory_is_told_its_cost(
    override, wanted, hdit, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr("hdit.models.fitting.total_memory", lambda device: 2**34)
    size = "data={kind='shapes', size=512}" if "grid" in override else "training.seed=1"
    run = tmp_path / "run"
    status, _, err = hdit("train", tiny, "--run", run, "--set", size, "--set", override)
    assert status == 1
    assert f"error: {wanted}" in err
    assert "this machine's cpu has 16 GiB" in err
    assert not run.exists()


def test_info_of_a_model_beyond_all_machines_says_so(hdit, tiny):
    model = "model={kind='dit', depth=100, width=65536, num_heads=64, patch_size=1}"
    status, out, err = hdit("info", tiny, "--set", model)
    assert status == 0, err
    assert "TiB" in out
