import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import __version__ as version
from hdit.models import memory
from hdit.runs.checkpoint import find
from hdit.runs.trained import Trained
from hdit.sampling import outputs, stores, writer
from hdit.sampling.record import hash_of

CONFIGS = Path(__file__).parents[2] / "configs"
NO_MEMORY = memory.Memory(0, 0, 0, 0, {}, 0, 0)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_train_resumes_and_default_run_is_named_after_the_config(tiny, hdit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = hdit("train", tiny, "--set", "training.images=32")
    assert status == 0, err
    assert find(tmp_path / "runs" / "tiny", print).state.images == 32
    status, _, err = hdit("train", tiny, "--set", "training.images=64")
    assert status == 0
    assert "at 32 images" in err


def test_train_for_some_minutes_ends_well_with_a_checkpoint(tiny, hdit, tmp_path):
    status, _, err = hdit("train", tiny, "--run", tmp_path / "run", "--minutes", 1e-9)
    assert status == 0, err
    assert "time is up at 16 images; the same command resumes" in err
    assert find(tmp_path / "run", print).state.images == 16
    status, _, err = hdit("train", tiny, "--run", tmp_path / "run", "--minutes", 60)
    assert status == 0, err
    assert find(tmp_path / "run", print).state.images == 96


@pytest.mark.parametrize("minutes", [0, -1, "nan", "inf"])
def test_train_for_no_time_is_refused(tiny, hdit, tmp_path, minutes):
    status, _, err = hdit("train", tiny, "--run", tmp_path / "run", "--minutes", minutes)
    assert status != 0
    assert "--minutes" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


BESIDE = ["grid.png", "samples.json", "samples.jsonl"]


def test_sample_writes_pictures_grid_and_record(run, hdit, tmp_path):
    out = tmp_path / "out"
    options = [
        "--steps",
        3,
        "--sampler",
        "euler",
        "--guidance",
        2,
        "--seed",
        7,
        "--labels",
        "3,none",
    ]
    status, said, err = hdit("sample", run, "-n", 5, "--out", out, *options)
    assert status == 0, err
    assert str(out) in said
    names = sorted(p.name for p in out.iterdir())
    assert names == [*[f"{seed:06d}.png" for seed in range(7, 12)], *BESIDE]
    record = json.loads((out / "samples.json").read_text())
    assert record["sampling"]["steps"] == 3
    assert record["sampling"]["sampler"]["kind"] == "euler"
    assert record["sampling"]["guidance"]["scale"] == 2
    assert record["evaluations"] == 6  # 3 steps, and each with and without the class
    assert "5 images of 6 network evaluations each" in said
    assert record["guide"] is None
    assert record["seeds"] == {"first": 7, "number": 5}
    assert record["labels"]["kind"] == "given"
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [3, None, 3, None, 3]
    assert [line["seed"] for line in lines] == [7, 8, 9, 10, 11]
    assert np.asarray(Image.open(out / "000007.png")).shape == (8, 8)


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in folder.glob("0*.png")}


def test_sample_of_a_seed_does_not_depend_on_the_batch(run, hdit, tmp_path):
    """The stochastic sampler too; one grey level is float rounding."""
    options = ["--labels", "4", "--steps", 4]
    hdit("sample", run, "-n", 6, "--batch-size", 6, "--out", tmp_path / "a", *options)
    hdit("sample", run, "-n", 3, "--batch-size", 2, "--seed", 2, "--out", tmp_path / "b", *options)
    whole, part = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert sorted(part) == ["000002.png", "000003.png", "000004.png"]
    for name, picture in part.items():
        assert np.abs(picture - whole[name]).max() <= 1
    assert np.abs(whole["000002.png"] - whole["000003.png"]).max() > 20, "seeds differ"


def test_sample_takes_one_checkpoint_and_raw_weights(run, hdit):
    first = run / "checkpoints" / "000000000032"
    assert hdit("sample", first, "-n", 1, "--raw")[0] == 0
    (folder,) = [p for p in (run / "samples").iterdir() if p.is_dir()]
    assert folder.name == "32-dpmpp_3m_sde-2-cfg1-seed0-raw"
    assert json.loads((folder / "samples.json").read_text())["weights"] == "model"


def test_sample_keeps_what_is_there(run, hdit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    status, _, err = hdit("sample", run, "-n", 1, "--out", out)
    assert status == 1
    assert "--overwrite" in err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert hdit("sample", run, "-n", 1, "--out", out, "--overwrite")[0] == 0
    assert (out / "mine.txt").read_text() == "mine"


def test_two_samples_into_one_folder_at_once_do_not_mix(run, hdit, tmp_path, monkeypatch):
    """The other begins while the first has made its images, and again once it is done."""
    out, count, others = tmp_path / "out", outputs.Folder.count, []
    command = "sample", run, "--out", out, "--overwrite"

    def begin_another(*arguments):
        if not others:
            others.append(None)
            others[:] = [hdit(*command, "-n", 1, "--seed", 5)]
        count(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(outputs.Folder, "count", begin_another)
        assert hdit(*command, "-n", 2)[0] == 0
    [(status, _, err)] = others
    assert status == 1
    assert f"{out}: another process is writing samples here (process {os.getpid()} on" in err
    assert "or name another --out" in err
    names = sorted(p.name for p in out.iterdir())
    assert names == ["000000.png", "000001.png", *BESIDE]
    assert hdit(*command, "-n", 1, "--seed", 5)[0] == 0
    assert sorted(p.name for p in out.glob("0*")) == ["000005.png"]


def test_sample_into_a_file_names_the_option(run, hdit, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = hdit("sample", run, "-n", 1, "--out", tmp_path / "file")
    assert status == 1
    assert "--out: " in err
    assert (tmp_path / "file").read_text() == "mine"


def test_info_prints_parameters_macs_and_tokens_by_level(tiny, hdit):
    status, out, _ = hdit("info", tiny)
    assert status == 0
    assert "level 0, neighborhood" in out
    assert "8 x 8" in out
    assert "MACs" in out
    assert "FLOPs" in out
    assert "total" in out


def test_info_of_a_missing_folder_says_what_it_could_not_count(tiny, hdit):
    status, out, _ = hdit("info", tiny, "--set", 'data={kind="folder", path="nowhere", size=16}')
    assert status == 0
    assert "counted without classes" in out
    assert "nowhere" in out


LEVEL = "model.levels.0.attention"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("training.batchsize=8", ["training.batchsize", "did you mean training.batch_size?"]),
        ("training.images=many", ["training.images", "'many'", "integer"]),
        (f"{LEVEL}.kernel_size=9", [f"{LEVEL}.kernel_size", "grid of 8x8"]),
        ("model.patch_size=3", ["model.patch_size", "multiples of 6", "8x8"]),
        (
            'data={kind="folder", path="nowhere", size=16}',
            ["data.path", "'nowhere'", "does not exist"],
        ),
        ("training.batch_size", ["--set", "KEY=VALUE"]),
    ],
)
def test_train_with_bad_input_is_one_message_and_leaves_nothing(
    tiny, hdit, tmp_path, override, wanted
):
    status, out, err = hdit("train", tiny, "--run", tmp_path / "run", "--set", override)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for text in wanted:
        assert text in err
    assert not (tmp_path / "run").exists()


def test_train_with_a_missing_config_names_it(hdit, tiny):
    status, _, err = hdit("train", tiny.with_name("tinny.toml"))
    assert status == 1
    assert "tinny.toml: no such config file; did you mean" in err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--labels", "eleven"], "'eleven' is no class of this model: 0, 1, 2"),
        (["--labels", "10"], "'10' is no class"),
        (["--sampler", "dpmpp_2n"], "did you mean 'dpmpp_2m'?"),
        (["--set", "training.seed=3"], "sampling can change [sampling] settings, space.vae"),
        (["--set", "sampling.step=3"], "did you mean sampling.steps?"),
        (
            ["--set", "sampling.guidance.scale=-1"],
            "sampling.guidance.scale: must be greater than or",
        ),
        (["--set", "sampling.guidance=2"], "sampling.guidance: must be a table, got 2"),
        (["--set", "sampling.guidance.interval=[3, 1]"], "the lower first, got [3, 1]"),
        (["--set", "sampling.sampler={kind='ddpm', variance='learned'}"], "the model learns none"),
        (["--set", "sampling.sigmas={kind='linear_t', sections=[3]}"], "add up to 3 timesteps"),
        (["--guide", "nowhere"], "nowhere: no such run or checkpoint"),
        (["--set", "sampling.sigma_min=200.0"], "sigma_min must be below sigma_max"),
        (["--steps", "3", "--set", "sampling.steps=4"], "--steps: is set by --set"),
        (["--steps", "3", "--set", " sampling . steps = 3"], "--steps: is set by --set"),
        (
            ["--guidance", "2", "--set", "sampling.guidance={scale=3}"],
            "--guidance: is set by --set",
        ),
        (["--sampler", "lms", "--set", "sampling.sampler={kind='heun'}"], "--sampler: is set by"),
        (["--set", "sampling.guidance = {rescale=0.5}"], "has no effect without --guidance"),
        (["--set", " sampling.guidance.rescale=0.5"], "has no effect without --guidance"),
        (["--set", "sampling.grid=9"], "sampling.grid=9': has no effect"),
        (
            ["--sampler", "dpm_adaptive", "--set", "sampling.steps=3"],
            "sampling.steps=3': dpm_adaptive chooses its steps",
        ),
    ],
)
def test_sample_with_bad_input_is_one_message(run, hdit, tmp_path, arguments, wanted):
    status, _, err = hdit("sample", run, "-n", 1, "--out", tmp_path / "out", *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert wanted in err
    assert not (tmp_path / "out").exists()


def test_sample_of_more_steps_than_the_path_of_noise_can_tell_apart_is_one_message(run, hdit):
    narrow = ["--set", "sampling.sigma_min=150.0"]
    status, _, err = hdit("sample", run, "-n", 1, "--steps", 100_000, *narrow)
    assert status == 1
    assert "sampling.steps: 100,000 are too many for the noise that " in err
    assert "the noise levels 160 and 1" in err
    assert "take fewer steps" in err


def test_sample_takes_a_table_of_guidance_beside_the_option_of_its_scale(run, hdit, tmp_path):
    options = ["--guidance", 2, "--set", "sampling.guidance={rescale=0.5}"]
    assert hdit("sample", run, "-n", 1, "--out", tmp_path / "out", *options)[0] == 0
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["sampling"]["guidance"]["scale"] == 2
    assert record["sampling"]["guidance"]["rescale"] == 0.5


def test_sample_refuses_a_guide_scale_without_a_guide_model(run, hdit):
    """A setting that takes no effect is an error."""
    status, _, err = hdit("sample", run, "-n", 1, "--guide-scale", 3)
    assert status == 1
    assert err.startswith("error: --guide-scale: ")


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "heun"])
def test_sample_with_guidance_keeps_to_the_settings_of_the_run(run, hdit, tmp_path, sampler):
    """--guidance sets the scale alone. From 160 to 0.01, dpmpp_sde looks at 1.26 on its way."""
    options = ["--guidance", 2, "--sampler", sampler, "--set", "sampling.guidance.interval=[1, 9]"]
    assert hdit("sample", run, "-n", 1, "--out", tmp_path / "out", *options)[0] == 0
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["sampling"]["guidance"]["interval"] == [1, 9]
    assert record["sampling"]["guidance"]["scale"] == 2
    assert record["evaluations"] == (4 if sampler == "dpmpp_sde" else 3)


def test_sample_with_a_guide_model_guides_away_from_it(run, hdit, tmp_path):
    """The guide here is an earlier checkpoint."""
    guide = run / "checkpoints" / "000000000032"

    def sampled(name, *options):
        status, _, err = hdit("sample", run, "-n", 3, "--out", tmp_path / name, *options)
        assert status == 0, err
        record = json.loads((tmp_path / name / "samples.json").read_text())
        return pictures(tmp_path / name), record

    plain, alone = sampled("plain")
    guided, record = sampled("guided", "--guide", guide, "--guide-scale", 40)
    _, by_default = sampled("default", "--guide", guide)
    assert any((guided[name] != plain[name]).any() for name in plain)
    assert alone["evaluations"] == 2
    assert record["evaluations"] == 4
    assert record["guide"] == {
        "checkpoint": str(guide),
        "sha256": hash_of(Trained.open(guide).tensors()),
        "scale": 40,
    }
    assert by_default["guide"]["scale"] == 2


def test_sample_with_a_guide_model_is_named_by_its_scale(run, hdit):
    assert hdit("sample", run, "-n", 1, "--guide", run, "--guide-scale", 1.5)[0] == 0
    (folder,) = [p for p in (run / "samples").iterdir() if p.is_dir()]
    assert folder.name == "96-dpmpp_3m_sde-2-cfg1-guide1.5-seed0"


def test_sample_records_the_checkpoint_of_the_guide_model(run, hdit, tmp_path):
    """And not its run, which may be trained on."""
    out = tmp_path / "out"
    assert hdit("sample", run, "-n", 1, "--out", out, "--guide", run)[0] == 0
    record = json.loads((out / "samples.json").read_text())
    assert record["checkpoint"].endswith("000000000096")
    assert record["guide"]["checkpoint"] == record["checkpoint"]


@pytest.mark.parametrize("what", ["images", "classes"])
def test_sample_refuses_a_guide_model_of_other_images_or_classes(run, tiny, hdit, tmp_path, what):
    data = "data={kind='shapes', size=8}"
    if what == "classes":
        folder = tmp_path / "pictures" / "cat"
        folder.mkdir(parents=True)
        Image.effect_noise((8, 8), 60).save(folder / "0.png")
        data = f"data={{kind='folder', path='{folder.parent}', size=8, channels=1}}"
    options = ["--set", data, "--set", "training.images=16", "--set", "sampling.grid=0"]
    assert hdit("train", tiny, "--run", tmp_path / "other", *options)[0] == 0
    out = tmp_path / "out"
    status, _, err = hdit("sample", run, "-n", 1, "--out", out, "--guide", tmp_path / "other")
    assert status == 1
    assert err.startswith(f"error: --guide: {tmp_path / 'other'} has other {what}: ")
    assert ("(3, 8, 8), and the model (1, 8, 8)" if what == "images" else "('cat',)") in err
    assert not out.exists()


LEARNED = [
    "--set",
    "diffusion={learned_variance=true, density={kind='uniform_vp'}}",
    "--set",
    "training.images=32",
    "--set",
    "sampling.grid=0",
]


def test_sample_draws_ddpm_noise_of_the_variance_that_the_model_learnt(tiny, hdit, tmp_path):
    assert hdit("train", tiny, "--run", tmp_path / "run", *LEARNED)[0] == 0

    def sampled(name, *options):
        some = ["--sampler", "ddpm", "--steps", 5, *options]
        status, _, err = hdit("sample", tmp_path / "run", "-n", 2, "--out", tmp_path / name, *some)
        assert status == 0, err
        record = json.loads((tmp_path / name / "samples.json").read_text())
        return pictures(tmp_path / name), record["sampling"]["sampler"]["variance"]

    learned, variance = sampled("learned")
    assert variance == "learned"
    for other in ("lower", "upper"):
        fixed, variance = sampled(other, "--set", f"sampling.sampler.variance={other}")
        assert variance == other
        assert any((fixed[name] != learned[name]).any() for name in learned)
    assert sampled("guided", "--guidance", 2)[1] == "learned"


def test_info_counts_the_channels_of_a_learned_variance(tiny, hdit):
    def patch_out(*options):
        status, out, _ = hdit("info", tiny, *options)
        assert status == 0
        (line,) = [line for line in out.splitlines() if line.startswith("│ patch out")]
        return [cell.strip() for cell in line.split("│")][-4:-1]

    # parameters, MACs, FLOPs of 8 x 8 tokens of width 32 to 1 channel, or 2; a norm has 32 more
    assert patch_out() == ["64", "2.048 k", "4.096 k"]
    assert patch_out(*LEARNED) == ["96", "4.096 k", "8.192 k"]


def test_sample_of_something_else_says_what_it_needs(hdit, tmp_path):
    status, _, err = hdit("sample", tmp_path / "absent")
    assert status == 1
    assert "no such run or checkpoint" in err


def test_sample_with_a_damaged_checkpoint_warns_and_uses_the_one_before(run, hdit, tmp_path):
    damaged = run / "checkpoints" / "000000000096" / "ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    status, _, err = hdit("sample", run, "-n", 1, "--out", tmp_path / "out")
    assert status == 0
    assert "ema.safetensors: damaged" in err.replace("\n", "")
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["images"] == 64
    status, _, err = hdit("sample", damaged.parent, "-n", 1)
    assert status == 1
    assert "ema.safetensors: damaged" in err


def test_sample_overwrites_its_own_pictures_only(run, hdit, tmp_path):
    out = tmp_path / "out"
    assert hdit("sample", run, "-n", 4, "--out", out)[0] == 0
    (out / "mine.png").write_bytes(b"mine")
    assert hdit("sample", run, "-n", 2, "--out", out, "--overwrite")[0] == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == ["000000.png", "000001.png", "grid.png", "mine.png", *BESIDE[1:]]
    (out / "samples.json").write_text("{")
    status, _, err = hdit("sample", run, "-n", 1, "--out", out, "--overwrite")
    assert status == 1
    assert "samples.json: not valid JSON" in err
    assert "mend or remove it" in err


def test_sample_overwrites_what_an_interrupt_left(run, hdit, tmp_path, monkeypatch):
    out, save = tmp_path / "out", stores.whole

    def stop_at_the_third(path, **options):
        if path.name == "000002.png":
            raise KeyboardInterrupt
        return save(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stores, "whole", stop_at_the_third)
        patch.setattr(writer, "MOST_THREADS", 1)
        assert hdit("sample", run, "-n", 4, "--out", out)[0] != 0
    assert json.loads((out / "samples.json").read_text())["evaluations"] is None
    assert sorted(p.name for p in out.glob("*.png")) == ["000000.png", "000001.png"]
    assert hdit("sample", run, "-n", 1, "--out", out, "--overwrite")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", *BESIDE]
    assert json.loads((out / "samples.json").read_text())["evaluations"] == 2


def test_sample_of_a_checkpoint_elsewhere_stays_beside_it(run, hdit, tmp_path, monkeypatch):
    copy = tmp_path / "copies" / "best"
    shutil.copytree(run / "checkpoints" / "000000000032", copy)
    assert hdit("sample", copy, "-n", 1)[0] == 0
    assert (copy.parent / "samples").is_dir()
    monkeypatch.chdir(run / "checkpoints")
    assert hdit("sample", "000000000032", "-n", 1)[0] == 0
    assert [p for p in (run / "samples").iterdir() if p.is_dir()]


def test_sample_with_guidance_needs_classes(tiny, hdit, tmp_path):
    (tmp_path / "images").mkdir()
    Image.effect_noise((8, 8), 60).save(tmp_path / "images" / "0.png")
    data = f'data={{kind="folder", path="{tmp_path / "images"}", size=8}}'
    assert hdit("train", tiny, "--run", tmp_path / "run", "--set", data)[0] == 0
    status, _, err = hdit("sample", tmp_path / "run", "-n", 1, "--guidance", 2)
    assert status == 1
    assert "the model has no classes" in err
    assert hdit("sample", tmp_path / "run", "-n", 1)[0] == 0


def test_train_does_not_write_over_the_config_that_it_reads(tiny, hdit, tmp_path):
    mine = tmp_path / "config.toml"
    mine.write_text("# mine\n" + tiny.read_text())
    status, _, err = hdit("train", mine, "--run", tmp_path)
    assert status == 1
    assert "written over" in err
    assert mine.read_text().startswith("# mine")


def test_train_into_a_file_is_one_message(tiny, hdit, tmp_path):
    (tmp_path / "run").write_text("a file")
    status, _, err = hdit("train", tiny, "--run", tmp_path / "run")
    assert status == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_info_predicts_the_memory_of_a_step(tiny, hdit):
    status, out, _ = hdit("info", tiny, "--batch", 4, "--set", "training.precision=fp32")
    assert status == 0
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"memory of a step with 4 images on {here} in fp32" in out
    for row in (
        "weights and EMA",
        "activations of level 0",
        "activations of level 1",
        "temporaries of AdamW",
        "at the peak",
    ):
        assert row in out


def test_info_predicts_the_memory_of_a_device_that_is_not_here(tiny, hdit):
    peaks = {}
    for device in ("cpu", "cuda"):
        asked = ("--device", device, "--set", "training.precision=bf16")
        status, out, _ = hdit("info", tiny, "--batch", 4, *asked)
        assert status == 0
        assert f"memory of a step with 4 images on {device} in bf16" in out
        assert "in an eager step" in out
        assert ("CUDA itself" in out) == (device == "cuda")
        peaks[device] = next(line for line in out.splitlines() if "at the peak" in line)
    assert peaks["cpu"] != peaks["cuda"]


def test_info_refuses_a_device_of_which_it_knows_nothing(tiny, hdit):
    status, _, err = hdit("info", tiny, "--device", "mps")
    assert status == 1
    assert err == "error: --device: must be cpu or cuda, got 'mps'\n"


def test_info_of_a_dit_counts_its_position_table_apart(hdit):
    status, out, _ = hdit("info", CONFIGS / "digits-dit.toml")
    assert status == 0
    assert "1,865,217" in out
    assert f"with DiT's fixed position table: {1_865_217 + 64 * 128:,} parameters" in out


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("hdit-imagenet256", ["557,416,522", "197.6 G", "1000 classes"]),
        ("dit-xl-2-256", ["118.6 G", "with DiT's fixed position table: 675,129,632 parameters"]),
    ],
)
def test_info_of_a_paper_prints_its_figures_as_it_stands(hdit, name, figures, monkeypatch):
    """Crowson et al. (2024), table 7; Peebles & Xie (2023), table 4. No data are there."""
    monkeypatch.setattr(memory, "training_memory", lambda *a, **k: NO_MEMORY)
    status, out, err = hdit("info", name)
    assert status == 0, err
    assert all(figure in out for figure in figures), out
    assert "counted without classes" not in out


def test_number_of_classes_is_checked_against_the_data(tiny, hdit, tmp_path):
    for kind in "ab":
        (tmp_path / "pets" / kind).mkdir(parents=True)
        Image.effect_noise((8, 8), 60).save(tmp_path / "pets" / kind / "0.png")
    data = f"data={{kind='folder', path='{tmp_path / 'pets'}', size=8, classes=3}}"
    status, _, err = hdit("train", tiny, "--run", tmp_path / "run", "--set", data)
    assert status == 1
    assert err.startswith("error: data.classes: 3 are asked for, and '")
    assert err.endswith("has 2; set data.classes=2, or leave it out\n")
    assert hdit("info", tiny, "--set", data)[0] == 0, "which counts for the data to come"
    few = ["--set", "data.classes=2", "--set", "training.images=16", "--set", "sampling.grid=0"]
    assert hdit("train", tiny, "--run", tmp_path / "run", "--set", data, *few)[0] == 0


def test_configs_lists_presets_with_a_line_each(hdit):
    status, out, _ = hdit("configs")
    assert status == 0
    lines = out.splitlines()
    assert lines == sorted(lines, key=lambda line: ("/" in line.split()[0], line))
    [digits] = [line for line in lines if line.startswith("digits-hdit ")]
    assert "HDiT on 8x8 handwritten digits" in digits


def test_configs_prints_a_preset_to_start_from(hdit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = hdit("configs", "digits-hdit")
    assert status == 0
    assert out == (CONFIGS / "digits-hdit.toml").read_text(), "with its comments"
    status, out, _ = hdit("configs", "digits-dit-variance")
    assert status == 0
    Path("mine.toml").write_text(out)
    few = ["training.images=8", "training.batch_size=4", "sampling.grid=0"]
    options = [text for pair in few for text in ("--set", pair)]
    status, _, err = hdit("train", "mine.toml", *options)
    assert status == 0, err
    status, _, err = hdit("configs", "digits-hdti")
    assert status == 1
    assert err == "error: NAME: there is no preset 'digits-hdti'; did you mean digits-hdit?\n"


def test_data_check_and_evaluate_take_a_preset(hdit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = hdit("data", "check", "digits-hdit")
    assert status == 1
    assert err.startswith("error: data.kind: 'digits' has no ")
    status, _, err = hdit("evaluate", "digits-hdit", "digits-hdti")
    assert status == 1
    assert err.startswith("error: digits-hdti: does not exist")


def test_version_is_that_of_the_package(hdit):
    assert hdit("--version") == (0, f"hdit {version}\n", "")


def test_shell_completes_verbs_and_options(tmp_path):
    def completed(text, word):
        environment = os.environ | {"_HDIT_COMPLETE": "complete_bash"}
        environment |= {"COMP_WORDS": text, "COMP_CWORD": str(word)}
        code = "import sys; sys.argv = ['hdit']; from hdit.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        return done.stdout.split()

    assert completed("hdit e", 1) == ["evaluate", "ema", "encode"]
    assert "--sampler" in completed("hdit sample --s", 2)
