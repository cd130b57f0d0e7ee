"""Mutated configs and wrong command lines: status not 0, one message that names what is wrong, no
traceback and no file left. What they are follows from a seed; `make test-slow` tries more of them.
"""

import copy
import json
import math
import os
import random
import signal
import string
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tomli_w
import torch
import typer

from hdit.cli.app import app
from hdit.cli.data_check import data_check
from hdit.config import ConfigError, RunConfig, load, parse, read_toml
from hdit.config.presets import find_config, presets
from hdit.models.cost import cost
from hdit.names import escape, printable
from scripts.document_config import specs_of
from tests.config.test_bounds import leaves
from tests.config.test_config import changed
from tests.conftest import TINY

SECONDS = 20  # for what takes milliseconds; a machine that tests in parallel is slow


@contextmanager
def at_most(seconds, what):
    """Ends what hangs."""

    def end(*_):
        raise TimeoutError(f"more than {seconds} s for {what}")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- configs -------------------------------------------------------------------------------------

VALUES = [
    0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**31, 2**63, 10**24, 10**400, 0.0, -0.5, 0.5, 1e-300, 1e300,
    1e38, float("nan"), float("inf"), float("-inf"), True, False, "", " ", "x", "\0", "\x1b[2J",
    "日本", "\u202e", "a\nb", "a" * 5000, "~nobody/x", "/dev/zero", "..", [], [[]], [1], [1, 2, 3],
    [0.5, "a"], ["a"] * 2000, {}, {"kind": "x"}, {"kind": 3}, {"a": {"b": {}}},
]  # fmt: skip
KINDS = [
    "hdit", "dit", "digits", "shapes", "folder", "tar", "hub", "python", "global", "neighborhood",
    "none", "edm", "flow", "karras", "linear_t", "vp", "ddpm", "lms", "heun", "latent", "cosine",
    "uniform_vp", "lognormal", "inverse", "exponential", "in_context",
]  # fmt: skip
PIECES = [
    "", "\0", '"', "[", "{", "=", "\n", "é", "\x1b", "\ufeff", "[" * 3000, "9" * 5000, "a." * 9**5,
]  # fmt: skip


def places(table, above=()):
    """(holder, key, path) of every value in a table, at any depth."""
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        path = (*above, key)
        yield table, key, path
        if isinstance(value, dict | list):
            yield from places(value, path)


def mutated(table, rng):
    """A table with one to three of its settings wrong, or at least unusual."""
    table = copy.deepcopy(table)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, key, _ = rng.choice(list(places(table)))
        change = rng.choice(["value"] * 5 + ["delete", "rename", "kind", "add", "deep"])
        if change == "value":
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif change == "delete":
            del holder[key]
        elif change == "rename" and isinstance(holder, dict):
            holder["".join(rng.choices(string.printable, k=rng.randint(1, 9)))] = holder.pop(key)
        elif change == "kind" and isinstance(holder[key], dict):
            holder[key]["kind"] = rng.choice(KINDS)
        elif change == "add" and isinstance(holder[key], dict):
            holder[key]["more"] = rng.choice(VALUES)
        elif change == "deep":
            for _ in range(rng.choice([3, 70])):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        if not table:
            return table
    return table


def mangled(text, rng):
    """A text with a few of its characters changed, lost or doubled."""
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(text) + 1)
        text = text[:i] + rng.choice(PIECES) + text[i + rng.randint(0, 3) :]
    return text


def bases():
    named = [read_toml(find_config(Path(name))) for name in presets()]
    return [tomllib.loads(TINY)] * 10 + named


def written(table, rng):
    """The bytes of a config file."""
    if rng.random() < 0.15:
        return mangled(tomli_w.dumps(table), rng).encode()
    try:
        text = tomli_w.dumps(mutated(table, rng))
    except RecursionError:
        text = "[" * 10_000
    return bytes(rng.randbytes(300)) if rng.random() < 0.02 else text.encode()


def try_configs(number, seed, hdit, tmp_path):
    rng, tables, refused = random.Random(seed), bases(), 0
    for i in range(number):
        path = tmp_path / f"fuzz{i}.toml"
        path.write_bytes(written(rng.choice(tables), rng))
        with at_most(SECONDS, path):
            try:
                config = load(path)
            except ConfigError:
                refused += 1
                check_refused(hdit, ["train", path, "--run", tmp_path / "run"], path.name)
            else:
                assert parse(tomllib.loads(config.dump()), "dump") == config
                shape = config.data_shape(10)
                if sum(getattr(level, "depth", 0) for level in [config.model]) < 100:
                    cost(config.model, shape, config.output_channels(shape))
        assert not (tmp_path / "run").exists()
    assert refused > number // 2


def check_refused(hdit, arguments, *named):
    """The rule: status not 0, one message that names one of `named`, and nothing else."""
    status, out, err = hdit(*arguments)
    assert status != 0, arguments
    assert out == "", arguments
    assert "Traceback" not in err
    assert "pydantic" not in err.lower(), err
    assert err.lower().count("error: ") == 1 or err.startswith("error: "), err
    assert any(str(name) in err for name in named), (arguments, err)
    assert all(c.isprintable() or c == "\n" for c in err), (arguments, err)
    assert len(err) < 10_000, err


def test_mutated_config_is_refused_in_one_message_or_reads_back(hdit, tmp_path):
    try_configs(60, seed=1, hdit=hdit, tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_mutated_configs_are_refused_or_read_back(hdit, tmp_path, seed):
    try_configs(100, seed=seed, hdit=hdit, tmp_path=tmp_path)


# ---- each number at its bounds -------------------------------------------------------------------


def numbers(spec, path=""):
    """(key, the kinds to set before it, its lowest and its highest value) of each number."""
    for name, field in spec.model_fields.items():
        for inner in specs_of(field.annotation):
            tag = inner.model_fields.get("kind")
            first = [f"{path}{name}.kind={tag.default}"] if tag else []
            for key, kinds, values in numbers(inner, f"{path}{name}{'.0' * (name == 'levels')}."):
                yield key, first + kinds, values
        for kind, rules in leaves(field.annotation, tuple(field.metadata)):
            if kind in (int, float):
                yield f"{path}{name}", [], [end(kind, rules, "g"), end(kind, rules, "l")]


def end(kind, rules, side):
    """The lowest value that the rules allow, for side "g", or the highest, for "l"."""
    inner = [getattr(rule, side + "e") for rule in rules if hasattr(rule, side + "e")]
    outer = [getattr(rule, side + "t") for rule in rules if hasattr(rule, side + "t")]
    towards = 1 if side == "g" else -1
    if kind is int:
        return int(towards * max(towards * n for n in [*inner, *(n + towards for n in outer)]))
    nearest = [math.nextafter(x, towards * math.inf) for x in outer]
    return float(towards * max(towards * x for x in [*inner, *nearest]))


def test_config_with_a_number_at_its_bound_is_refused_or_can_be_used():
    """Finite coefficients and weights, and noise levels that decrease."""
    tried = used = 0
    for key, kinds, values in numbers(RunConfig):
        for value in values:
            tried += 1
            try:
                config = changed(*kinds, f"{key}={value!r}")
            except ConfigError:
                continue
            used += 1
            shape, schedule = config.data_shape(10), config.beta_schedule
            levels = config.sampling.sigmas(config.sampling.steps, *config.sigma_range(), schedule)
            assert (levels.diff() < 0).all(), (kinds, key, value)
            sigma = config.diffusion.density(torch.linspace(0.1, 0.9, 5), shape, schedule)
            scales = config.diffusion.parametrization(sigma, shape.sigma_data)
            weight = config.diffusion.weighting(sigma, shape.sigma_data)
            for tensor in (*scales, weight, sigma.log()):
                assert tensor.isfinite().all(), (kinds, key, value)
            optimizer = config.training.optimizer
            for step in (0, 1, 10**6):
                rate = optimizer.schedule(config.training.moment(step, 7 * step), optimizer.lr)
                assert math.isfinite(rate), (key, value)
    assert tried > 200
    assert used > tried // 3


# ---- command lines -------------------------------------------------------------------------------

VERBS = {command.callback.__name__: command.callback for command in app.registered_commands}
VERBS["data check"] = data_check


def options(verb):
    """(its longest name, its type) of each option of a verb that takes a value."""
    for name, hint in get_type_hints(VERBS[verb], include_extras=True).items():
        if name == "return":
            continue
        kind, info = get_args(hint)[:2]
        kinds = {kind, *get_args(kind)}
        if isinstance(info, typer.models.OptionInfo) and bool not in kinds:
            names = [n for n in info.param_decls or () if n.startswith("--")]
            yield (names or ["--" + name.replace("_", "-")])[0], kinds


NO_NUMBER = ["", "x", "nan", "inf", "-1", "1e400", "-0.5", "9" * 5000, "10" * 20, "٣x", "1,5", "\0"]
BAD_SETS = [
    "", "=", "x", "training", "a=1\nb=2", "training.optimizer.lr=1e38", "training.nothing=1", ".=1",
    "training.batch_size=", "training.batch_size=" + "9" * 5000, ".".join("a" * 3000) + "=1",
    "sampling.steps=" + "[" * 5000, "sampling.steps=-1", "sampling.sampler.kind=\x1b[2J", "\0=1",
    "data.kind=\udce9", "sampling.steps=nan", "model.levels.99999999999=1", "sampling=1",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
    """A folder, to work in, with files that are not what a verb takes."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "tiny.toml").write_text(TINY)
    (folder / "empty").mkdir()
    (folder / "nothing.toml").write_bytes(b"")
    (folder / "noise.toml").write_bytes(bytes(range(256)))
    (folder / "noise.pt").write_bytes(bytes(range(256)) * 9)
    (folder / "noise.safetensors").write_bytes(b"\xff" * 99)
    (folder / "deep.json").write_text("[" * 5000)
    (folder / "number.json").write_text(json.dumps({"a": 1})[:-1] + "9" * 5000 + "}")
    (folder / "text.zip").write_text("no archive")
    (folder / "text.npz").write_text("no archive")
    (folder / "text.tar").write_text("no archive")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.toml")
    (folder / "zero.toml").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    (folder / os.fsdecode(b"caf\xe9.toml")).write_bytes(b"a")
    return folder


HOSTILE = [
    "missing", "missing.toml", "empty", "nothing.toml", "noise.toml", "noise.pt", "pipe", "loop",
    "noise.safetensors", "deep.json", "number.json", "text.zip", "text.npz", "text.tar",
    "pipe.toml", "zero.toml", os.fsdecode(b"caf\xe9.toml"), "a" * 300, "~nobody/x", "\x1b[2J",
    "a\nb", "/dev/zero", "/dev/null", "digits-hditt", "x:y", "empty/",
]  # fmt: skip


def wrong_command(rng, run):
    """(arguments, what the message must name one of)."""
    verb = rng.choice(list(VERBS))
    model = rng.choice([run, run / "checkpoints"])
    good = {
        "train": ["tiny.toml"], "info": ["tiny.toml"], "encode": ["tiny.toml"],
        "plan": ["tiny.toml"], "doctor": ["--fast"], "watch": [run],
        "sample": [model, "-n", 1], "convert": [run, "out"], "evaluate": ["digits-hdit", "empty"],
        "configs": ["digits-hdit"], "data check": ["empty"], "ema": [run, "--width", "0.1"],
        "compare": ["empty", "empty"],
    }[verb]  # fmt: skip
    known = list(options(verb))
    numbers = [name for name, kinds in known if {int, float} & kinds]
    ways = ["option", *(["extra"] if verb != "compare" else [])]  # which takes any number
    ways += ["number"] * 4 if numbers else []
    ways += ["empty"] if known else []
    ways += ["set"] * 3 if "--set" in dict(known) else []
    ways += ["path"] * 4 if verb != "doctor" else []
    ways += ["none"] if verb not in ("doctor", "configs") else []
    way = rng.choice(ways)
    start = verb.split()
    if way == "option":
        name = "--" + "".join(rng.choices(string.ascii_lowercase, k=7))
        return [*start, *good, name, "1"], (name,)
    if way == "extra":
        return [*start, *good, "more", "than", "enough"], ("more", "than", "enough")
    if way == "number":
        name = rng.choice(numbers)
        return [*start, *good, name, rng.choice(NO_NUMBER)], (name, "zero byte")
    if way == "empty":
        name = rng.choice(known)[0]
        return [*start, *good, *rng.choice([[name, ""], [f"{name}="]])], (name,)
    if way == "set":
        text = rng.choice(BAD_SETS)
        key = text.partition("=")[0].strip()
        names = ("--set", "data.kind", "zero byte", *([key] if key else []))
        return [*start, *good, "--set", text], names
    if way == "none":
        return start, ("Missing argument",)
    bad = rng.choice(HOSTILE)
    names = (printable(bad), repr(escape(bad))[1:-1], bad.rstrip("/"), "PATH")
    if verb == "convert":
        return [*start, bad, "out"], (*names, "out")
    if verb == "evaluate":
        return [*start, *rng.choice([(bad, "digits-hdit"), ("digits-hdit", bad)])], names
    return [*start, bad, *good[1:]], names


def try_commands(number, seed, hdit, place, trained):
    rng = random.Random(seed)
    before = sorted(p.name for p in place.iterdir())
    inside = sorted(p.name for p in trained.rglob("*"))
    for _ in range(number):
        arguments, named = wrong_command(rng, trained)
        with at_most(SECONDS, arguments):
            check_refused(hdit, arguments, *named)
        assert sorted(p.name for p in place.iterdir()) == before, arguments
        assert sorted(p.name for p in trained.rglob("*")) == inside, arguments


def test_wrong_command_line_is_one_message_and_leaves_nothing(hdit, place, trained):
    try_commands(60, seed=1, hdit=hdit, place=place, trained=trained)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_many_wrong_command_lines_are_one_message_each(hdit, place, trained, seed):
    try_commands(100, seed=seed, hdit=hdit, place=place, trained=trained)
