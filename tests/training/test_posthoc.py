"""Runs with several averages, and others made of their snapshots."""

import json
import math
import shutil

import pytest
import torch

from hdit import config
from hdit.config import ConfigError
from hdit.errors import UserError
from hdit.runs import checkpoint
from hdit.runs.saver import need
from hdit.runs.snapshots import combine, open_snapshots
from hdit.runs.trained import Trained
from hdit.training.ema import DecayProfile, PowerProfile, gamma_of, reconstruct
from hdit.training.posthoc import Wanted, _parts, make
from hdit.training.trainer import Trainer

STEP = 16  # images
STEPS = 32
OVERRIDES = [
    f"training.images={STEPS * STEP}",
    f"training.checkpoint_every={STEPS * STEP // 2}",
    "training.ema={ decays = [0.8, 0.9], widths = [0.05, 0.1, 0.15], snapshot_every = 16 }",
    "training.optimizer.lr=0.003",
    "sampling.grid=0",
]
SETS = ["ema", "model", "ema-0.8", "ema-0.9", "ema-width-0.05", "ema-width-0.1", "ema-width-0.15"]


@pytest.fixture(scope="module")
def tiny(trained):
    return trained.parent / "tiny.toml"


@pytest.fixture(scope="module")
def averaged(tiny, tmp_path_factory):
    """The folder of a run with a snapshot at each step, to read alone."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    assert Trainer(config.load(tiny, OVERRIDES), folder).fit()
    return folder


@pytest.fixture
def copied(averaged, tmp_path):
    shutil.copytree(averaged, tmp_path / "run")
    return tmp_path / "run"


def weights(run):
    found = checkpoint.find(run, print)
    return {name: found.tensors(name) for name in (*found.sets(), "optimizer")}


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def distance(found, expected):
    """Relative, over all tensors together."""
    one, other = (torch.cat([t.flatten().double() for t in s.values()]) for s in (found, expected))
    return float((one - other).norm() / other.norm())


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(found[name][key], t) for key, t in tensors.items()), name


# ---- while it goes on ----------------------------------------------------------------------------


def test_checkpoint_and_snapshots_have_the_averages_by_their_names(averaged):
    found = checkpoint.find(averaged, print)
    assert found.sets() == SETS
    assert (found.state.taken, set(found.state.begun.values())) == (STEPS, {0})
    snapshots = open_snapshots(averaged, None, print)
    assert [s.state.images for s in snapshots] == [STEP * n for n in range(1, STEPS + 1)]
    assert snapshots[-1].sets() == SETS[-3:]
    assert not list((averaged / "snapshots").glob(".*"))
    assert not (averaged / "snapshots" / "latest").exists()
    for name in SETS[-3:]:
        assert_equal({name: snapshots[-1].tensors(name)}, {name: found.tensors(name)})


def test_run_that_is_resumed_has_the_same_averages_and_snapshots_bit_for_bit(
    averaged, copied, tiny
):
    """Those that are later than the checkpoint are deleted, told of, and made anew."""
    shutil.rmtree(copied / "checkpoints" / checkpoint.folder_name(STEPS * STEP))
    (copied / "snapshots" / ".000000000999.part").mkdir()
    before = files(copied / "snapshots")
    half = STEPS * STEP // 2
    trainer, told = Trainer(config.load(tiny, OVERRIDES), copied), []
    trainer._warn = told.append
    assert trainer.fit()
    assert told == [
        f"{copied}/snapshots: deleted {STEPS // 2} later than {half} images, which are made anew"
    ]
    assert_equal(weights(copied), weights(averaged))
    assert files(copied / "snapshots") == before


def test_settings_without_further_averages_keep_none(trained):
    found = checkpoint.find(trained, print)
    assert (found.sets(), found.state.taken) == (["ema", "model"], None)
    assert not (trained / "snapshots").exists()


def told_of_change(tiny, run, old, new, capfd):
    """What is printed when a run goes on with other averages, in one line."""
    few = ["training.images=32", "sampling.grid=0", f"training.ema={old}"]
    assert Trainer(config.load(tiny, few), run).fit()
    capfd.readouterr()
    again = ["training.images=64", "sampling.grid=0", f"training.ema={new}"]
    assert Trainer(config.load(tiny, again), run).fit()
    return " ".join(capfd.readouterr().err.split())


def test_new_averages_begin_where_they_are_added_and_those_left_out_are_told(tiny, tmp_path, capfd):
    old, new = "{ decays = [0.9] }", "{ decays = [0.5], widths = [0.1] }"
    text = told_of_change(tiny, tmp_path / "run", old, new, capfd)
    assert "ema-0.5: a new average, which begins as the main one stands" in text
    assert "ema-width-0.1: a new average, of the steps from here on" in text
    assert "ema-0.9: an average of the run that is not in training.ema now; it ends here" in text
    state = checkpoint.find(tmp_path / "run", print).state
    assert (state.taken, state.begun) == (4, {"ema-width-0.1": 2})
    [profile] = [p for _, _, p in _parts(open_snapshots(tmp_path / "run", 48, print))]
    assert profile == PowerProfile(gamma_of(0.1), 3, 2)


def poison(trainer, at):
    objective = trainer.objective
    trainer.objective = lambda batch: (
        objective(batch) * (math.nan if int(batch.counters[0]) // STEP in at else 1)
    )


@pytest.mark.parametrize("device_side", [False, True])
@pytest.mark.parametrize("bad", [(), (0, 1, 4)])
def test_steps_that_are_not_taken_do_not_count(tiny, tmp_path, bad, device_side, monkeypatch):
    """As the host of a CPU moves the averages, and as a GPU does without asking it."""
    if device_side:
        from hdit.training import ema

        def on_device(average, model, decay, bad):
            mine, others = (list(m.parameters()) for m in (average, model))
            with torch.no_grad():
                ema.lerp_unless(mine, others, 1 - decay, bad)

        monkeypatch.setattr(ema, "update_ema", on_device)
    settings = ["training.images=160", "training.checkpoint_every=160", "sampling.grid=0"]
    settings.append("training.ema={ widths = [0.1, 0.25], snapshot_every = 160 }")
    trainer = Trainer(config.load(tiny, settings), tmp_path)
    poison(trainer, bad)
    step, after = trainer._step, []

    def watched(stream):
        images, norm = trainer.images, step(stream)
        if images // STEP not in bad:
            after.append({k: p.detach().clone() for k, p in trainer.backbone.named_parameters()})
        return norm

    trainer._step = watched
    assert trainer.fit()
    assert checkpoint.find(tmp_path, print).state.taken == len(after) == 10 - len(bad)
    for width in (0.1, 0.25):
        shares = PowerProfile(gamma_of(width), len(after)).weights(0, len(after))
        found = dict(trainer.averages.modules[f"ema-width-{width}"].named_parameters())
        for key, parameter in found.items():
            expected = sum(share * w[key].double() for share, w in zip(shares, after, strict=True))
            torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-7)


def test_bad_step_leaves_every_average_as_it_is(tiny, tmp_path):
    settings = ["sampling.grid=0", "training.ema={ decays = [0.5], widths = [0.1] }"]
    trainer = Trainer(config.load(tiny, settings), tmp_path)
    poison(trainer, {3})
    step, changed = trainer._step, []

    def watched(stream):
        modules = trainer.averages.modules.values()
        before = [torch.cat([p.flatten() for p in m.parameters()]) for m in modules]
        norm = step(stream)
        after = [torch.cat([p.flatten() for p in m.parameters()]) for m in modules]
        changed.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
        return norm

    trainer._step = watched
    assert trainer.fit()
    assert changed == [[n != 3] * 3 for n in range(6)]


def test_rollback_takes_the_snapshots_after_it_away(tiny, tmp_path):
    """The averages and their count go back to the checkpoint at 32 images."""
    settings = [
        "training.images=128",
        "training.guard.patience=2",
        "sampling.grid=0",
        "training.ema={ widths = [0.1], snapshot_every = 16 }",
    ]
    trainer = Trainer(config.load(tiny, settings), tmp_path)
    poison(trainer, {2, 3})
    assert trainer.fit()
    snapshots = open_snapshots(tmp_path, None, print)
    counts = [(s.state.images // STEP, s.state.taken) for s in snapshots]
    assert counts == [(n, n) for n in range(1, 9)]
    assert snapshots[2].state.passed_over == 2 * STEP


# ---- afterwards ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(averaged):
    return _parts(open_snapshots(averaged, None, print))


def made(parts, wanted, widths, every=1):
    """The average with a profile, of some snapshots of the tracked widths -> tensors, error."""
    names = [f"ema-width-{width}" for width in widths]
    some = [part for part in parts if part[1] in names and part[2].end % every == 0]
    found, error = reconstruct([profile for *_, profile in some], wanted)
    sets = [(s, name, float(w)) for (s, name, _), w in zip(some, found, strict=True)]
    return combine(sets), error


def test_width_that_was_averaged_too_is_met_and_exactly_as_snapshots_get_dense(averaged, parts):
    """Of the other two widths, from each of which it is much farther."""
    found = checkpoint.find(averaged, print)
    expected = found.tensors("ema-width-0.15")
    assert distance(found.tensors("ema-width-0.1"), expected) > 5e-3
    wanted = PowerProfile(gamma_of(0.15), STEPS)
    errors = [distance(made(parts, wanted, [0.05, 0.1], n)[0], expected) for n in (8, 4, 2, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1e-3
    assert errors[-1] < 3e-7  # float32's rounding of the averages that it is made of


def test_decay_that_was_averaged_too_is_met(averaged, parts):
    found = checkpoint.find(averaged, print)
    for decay in (0.8, 0.9):
        spec = found.config.training.ema.model_copy(update={"max_decay": decay})
        profile = DecayProfile(spec, STEPS)
        result, _ = made(parts, profile, [0.05, 0.1], 2)
        assert distance(result, found.tensors(f"ema-{decay}")) < 1e-3
        result, error = made(parts, profile, [0.05, 0.1])
        assert error < 1e-12
        assert distance(result, found.tensors(f"ema-{decay}")) < 3e-7
    assert distance(found.tensors("ema-0.8"), found.tensors("ema-0.9")) > 5e-3


def test_command_makes_models_of_widths(averaged, copied, parts, hdit, tmp_path):
    status, out, err = hdit("ema", copied, "--width=0.05", "0.07", 0.2, "--decay", 0.95)
    assert (status, err) == (0, "")
    assert all(text in out for text in ("width 0.05", "16.9722", "width 0.07", "decay 0.95"))
    folder = copied / "ema" / checkpoint.folder_name(STEPS * STEP)
    assert "…" not in out
    assert str(folder / "width-0.07") in out.splitlines()
    names = ["decay-0.95", "width-0.05", "width-0.07", "width-0.2"]
    assert sorted(path.name for path in folder.iterdir()) == names
    tracked = checkpoint.find(averaged, print).tensors("ema-width-0.05")
    exported = Trained.open(folder / "width-0.05")
    assert_equal({"ema": exported.tensors()}, {"ema": tracked})
    assert (exported.images, exported.weights()) == (STEPS * STEP, "ema")
    assert "power-function EMA of width 0.05" in exported.origin
    direct = made(parts, PowerProfile(gamma_of(0.07), STEPS), [0.05, 0.1, 0.15])[0]
    assert distance(Trained.open(folder / "width-0.07").tensors(), direct) == 0
    status, _, err = hdit("sample", folder / "width-0.07", "-n", 2, "--out", tmp_path / "out")
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["weights"] == "ema"


def test_command_makes_them_at_an_earlier_time_and_over_old_ones(copied, hdit):
    command = ("ema", "--width", 0.05, "0.2", copied, "--at", 8 * STEP)
    assert hdit(*command)[0] == 0
    folder = copied / "ema" / checkpoint.folder_name(8 * STEP)
    snapshot = open_snapshots(copied, 8 * STEP, print)[-1]
    expected = {"ema": snapshot.tensors("ema-width-0.05")}
    assert_equal({"ema": Trained.open(folder / "width-0.05").tensors()}, expected)
    before = files(folder)
    status, _, err = hdit(*command)
    assert status == 1
    assert "width-0.05: is there already; add --overwrite to replace it" in err
    assert hdit(*command, "--overwrite")[0] == 0
    assert files(folder) == before
    (folder / "width-0.2" / "config.json").unlink()
    status, _, err = hdit(*command, "--overwrite")
    assert status == 1
    assert "width-0.2: is no model that could be replaced" in err
    assert (folder / "width-0.2" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--width: name one or more, as in --width 0.05 0.1 0.15"),
        (("--width", 0.1, "0.10"), "--width 0.1: is asked for twice"),
        (("--width", 0.1, "--at", 40), "has none at 40 images; the nearest of its 32 is at 32"),
        (("--width", 0.3), "'--width': Input should be less than or equal to 0.288"),
        (("--width", "nan"), "'--width': Input should be less than or equal to 0.288"),
        (("--width", 0.1, "x"), "unexpected extra argument"),
        (("--width", "--overwrite"), "'--width': Input should be a valid number"),
    ],
)
def test_command_says_what_is_wrong(averaged, hdit, arguments, words):
    status, _, err = hdit("ema", averaged, *arguments)
    assert status
    assert words in " ".join(err.split())
    assert not (averaged / "ema").exists()


def test_run_without_snapshots_and_no_run_are_told(trained, tmp_path, hdit):
    status, _, err = hdit("ema", trained, "--width", 0.1)
    assert (status, "has no snapshots of averages; a run writes them with" in err) == (1, True)
    status, _, err = hdit("ema", tmp_path / "none", "--width", 0.1)
    assert (status, "no such run" in err) == (1, True)


def test_damaged_snapshot_is_told_and_left_out(copied, hdit):
    path = copied / "snapshots" / checkpoint.folder_name(STEP) / "ema-width-0.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    status, out, err = hdit("ema", copied, "--width", 0.07)
    assert (status, "left out" in err) == (0, True)
    assert f" {STEPS - 1} " in out


def test_profile_that_is_hardly_met_is_warned_of(copied, hdit):
    for n in range(1, STEPS):
        shutil.rmtree(copied / "snapshots" / checkpoint.folder_name(n * STEP))
    status, _, err = hdit("ema", copied, "--width", 0.02)
    assert status == 0
    assert "width 0.02: its profile is met to" in err
    assert "training.ema.snapshot_every" in err


def test_command_measures_averages_on_the_held_out_images_as_training_did(tiny, tmp_path, hdit):
    """To the last digit: the average of a width that the run kept is the same average."""
    run = tmp_path / "run"
    held = ["data.held_out=0.2", "training.validate_images=16", f"training.images={4 * STEP}"]
    settings = config.load(tiny, [*OVERRIDES, *held, f"training.checkpoint_every={4 * STEP}"])
    assert Trainer(settings, run).fit()
    line = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    expected = line["weights"]["ema-width-0.05"]
    wanted = [Wanted("width", 0.05), Wanted("width", 0.2)]
    kept, other = make(run, wanted, None, False, print, validate=True)
    assert kept.losses == expected
    assert other.losses["loss"] != expected["loss"]
    status, out, err = hdit("ema", run, "--width", 0.1, "--validate")
    assert status == 0, err
    loss = line["weights"]["ema-width-0.1"]["loss"]
    assert f"{loss:.6g}" in " ".join(out.split())


def test_command_without_held_out_images_measures_and_makes_nothing(averaged, hdit):
    status, _, err = hdit("ema", averaged, "--width", 0.1, "--validate")
    assert (status, err.count("error: ")) == (1, 1)
    assert "--validate: the run has no held-out images; data.held_out names them" in err
    assert not (averaged / "ema").exists()


# ---- which weights are used ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_weights_are_chosen_by_name(averaged, tmp_path, hdit, name):
    found = checkpoint.find(averaged, print)
    assert hdit("convert", averaged, tmp_path / "out", "--weights", name)[0] == 0
    model = Trained.open(tmp_path / "out")
    key = "model" if name == "model" else "ema"
    assert model.weights() == key
    assert_equal({name: model.tensors()}, {name: found.tensors(name)})
    assert model.origin.endswith(f"average {name}") == name.startswith("ema-")


def test_samples_tell_their_weights(averaged, copied, hdit):
    for name, ending in (("ema-0.9", "-ema-0.9"), ("model", "-raw"), ("ema", "seed0")):
        status, _, err = hdit("sample", copied, "-n", 1, "--weights", name)
        assert status == 0, err
        [folder] = (copied / "samples").glob(f"*{ending}")
        assert json.loads((folder / "samples.json").read_text())["weights"] == name


def test_weights_that_there_are_not_are_told_with_those_that_there_are(averaged, trained, hdit):
    status, _, err = hdit("sample", averaged, "--weights", "ema-0.95")
    assert (status, f"has no 'ema-0.95'; it has {', '.join(SETS)}" in err) == (1, True)
    status, _, err = hdit("sample", averaged, "--weights", "ema", "--raw")
    assert (status, "--raw: is --weights model, and 'ema' was asked for" in err) == (1, True)


def test_snapshot_is_a_model_by_itself(averaged):
    folder = averaged / "snapshots" / checkpoint.folder_name(STEP)
    assert Trained.open(folder).weights() == "ema-width-0.05"
    assert Trained.open(folder, weights="ema-width-0.15").weights() == "ema-width-0.15"


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decays=[0.9, 0.90]", "decays must not have one twice, got 0.9 again"),
        ("decays=[0.9999]", r"decays must not have max_decay \(0.9999\)"),
        ("widths=[0.1, 0.1]", "widths must not have one twice"),
        ("widths=[0.3]", "training.ema.widths"),
        ("snapshot_every=10", "snapshot_every has no effect without widths"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny, override, words):
    with pytest.raises(ConfigError, match=words):
        config.load(tiny, [f"training.ema.{override}"])


def test_snapshots_are_a_64th_of_a_run_apart_if_nothing_else_is_said(tiny):
    long = config.load(tiny, ["training.ema.widths=[0.1]", "training.images=64000"])
    assert long.training.ema.snapshot_every == 1000
    assert config.load(tiny, ["training.ema.widths=[0.1]"]).training.ema.snapshot_every == 16


def test_disk_that_they_take_is_counted(tiny):
    """Of weights, two moments, the average, and three more; and 10 snapshots of two of those."""
    settings = ["training.images=1000", "training.checkpoint_every=1000"]
    ema = "training.ema={ decays = [0.9], widths = [0.05, 0.1], snapshot_every = 100 }"
    training = config.load(tiny, [*settings, ema]).training
    assert need(1000, training, 0) == (7 * 4000, 7 * 4000 + 10 * 2 * 4000)


def test_memory_that_they_take_is_counted(tiny, tmp_path, monkeypatch):
    from hdit.models import fitting

    settings = config.load(tiny, ["training.ema.decays=[0.9, 0.99]"])
    parameters = sum(p.numel() for p in Trainer(settings, tmp_path / "a").backbone.parameters())
    monkeypatch.setattr(fitting, "total_memory", lambda device: 24 * parameters)
    with pytest.raises(UserError, match="the weights, EMA, gradients and moments"):
        Trainer(settings, tmp_path / "b")
