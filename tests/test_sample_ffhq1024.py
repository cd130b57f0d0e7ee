"""Megapixel sampling by script; the pictures here are small."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from hdit.errors import UserError
from hdit.runs.conversion import convert
from scripts import sample_ffhq1024


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Runs the script -> (folder with the pictures, stdout, stderr)."""

    def call(*arguments, out=tmp_path / "pictures"):
        argv = ["sample_ffhq1024.py", *arguments, "--out", out]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        sample_ffhq1024.main()
        return out, *capfd.readouterr()

    return call


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def test_random_weights_are_the_whole_model_and_none_is_zero(monkeypatch, call):
    """Of the config's 85 million parameters, on pictures that are small enough for a test."""
    models = []
    random = sample_ffhq1024.random_model
    monkeypatch.setattr(
        sample_ffhq1024, "random_model", lambda: models.append(random()) or models[0]
    )
    out, said, err = call("--random-weights", "--size", "128x256", "--steps", 2, "-n", 2)
    assert "85,079,300 parameters" in said
    assert all(weight.any() for weight in models[0].tensors().values())
    found = re.findall(r"(\d) of 2: (\d+) evaluations and \S+ s an image; peak memory", said)
    assert found == [("1", "2"), ("2", "2")]
    assert "trained at 1024x1024. At 128x256 the global levels see 0.0312 times the tokens" in err
    made = pictures(out)
    assert [image.shape for image in made.values()] == [(128, 256, 3)] * 2
    assert (made["000000.png"] != made["000001.png"]).any()


def test_pictures_are_those_of_hdit_sample_in_any_batch(trained, call, hdit, tmp_path):
    options = ("--seed", 5, "-n", 3, "--steps", 3)
    out, _, err = call(trained, *options, "--batch", 2)
    assert "warning" not in err
    theirs = tmp_path / "theirs"
    status, _, err = hdit(
        "sample",
        trained,
        *options,
        "--sampler",
        "dpmpp_3m_sde",
        "--labels",
        "5,6,7",
        "--out",
        theirs,
    )
    assert status == 0, err
    ours, theirs = pictures(out), pictures(theirs)
    assert list(ours) == ["000005.png", "000006.png", "000007.png"]
    for name, image in ours.items():
        assert abs(image.astype(int) - theirs[name]).max() <= 1


def test_k_diffusions_weights_give_the_same_pictures(trained, call, tmp_path):
    convert(trained, tmp_path / "theirs.safetensors", "k-diffusion")
    options = ("-n", 2, "--steps", 2)
    ours, _, _ = call(trained, *options)
    theirs, _, _ = call(tmp_path / "theirs.safetensors", *options, out=tmp_path / "other")
    ours, theirs = pictures(ours), pictures(theirs)
    assert len(ours) == 2
    for name, image in ours.items():
        assert (image == theirs[name]).all()


def test_each_batch_is_timed_in_turn_and_recorded(trained, call, tmp_path):
    json_file = tmp_path / "rows.json"
    options = ("--steps", 3, "--batch", 3, "--batch", 1, "--json", json_file)
    out, said, _ = call(trained, *options)
    assert list(pictures(out)) == ["000000.png", "000001.png", "000002.png"]
    rows = json.loads(json_file.read_text())["rows"]
    assert [(row["batch"], row["evaluations"]) for row in rows] == [(3, 3), (1, 3)]
    for row in rows:
        assert row["seconds a batch"] == pytest.approx(row["batch"] * row["seconds an image"])
    assert "3 of 3: 3 evaluations" in said
    assert "1 of 1: 3 evaluations" in said


def test_clock_leaves_out_the_first_call_and_the_files(trained, call, tmp_path, monkeypatch):
    """With a clock that each evaluation moves by 1, the first call by 100 more, a file by 1000."""
    now, calls = [0.0], []
    sample, save = sample_ffhq1024.sample, sample_ffhq1024.save_png

    def slow_sample(backbone, config, signal, seeds, labels, device):
        calls.append(len(seeds))
        for part in sample(backbone, config, signal, seeds, labels, device):
            now[0] += part.evaluations + 100 * (len(calls) == 1)
            yield part

    def slow_save(image, path):
        now[0] += 1000
        save(image, path)

    monkeypatch.setattr(sample_ffhq1024, "sample", slow_sample)
    monkeypatch.setattr(sample_ffhq1024, "save_png", slow_save)
    monkeypatch.setattr(sample_ffhq1024.time, "perf_counter", lambda: now[0])
    json_file = tmp_path / "rows.json"
    call(trained, "--steps", 5, "-n", 4, "--batch", 2, "--json", json_file)
    (row,) = json.loads(json_file.read_text())["rows"]
    assert calls == [2, 4], "a batch to warm up, then all"
    assert row["seconds an image"] == 5 * 2 / 4


@pytest.mark.slow
def test_compiled_model_gives_the_same_pictures(trained, call, tmp_path):
    """Slow, as inductor generates code for two levels. One grey level is float rounding."""
    options = ("--steps", 3, "-n", 2, "--batch", 2)
    plain, _, _ = call(trained, *options)
    compiled, said, _ = call(trained, *options, "--compile", out=tmp_path / "compiled")
    assert "compiled" in said
    plain, compiled = pictures(plain), pictures(compiled)
    for name, image in plain.items():
        assert abs(image.astype(int) - compiled[name]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a MODEL, or give --random-weights"),
        (("RUN", "--random-weights"), "one of the two"),
        (("RUN", "-n", 0), "must be at least 1"),
        (("RUN", "--batch", 2, "--batch", 0), "must be at least 1"),
        (("RUN", "-n", 3, "--batch", 2, "--compile"), "-n: must be a multiple of --batch"),
        (("RUN", "--size", "8x"), r"--size: must read HEIGHTxWIDTH.*'8x'"),
        (("RUN", "--size", "8x9"), r"(?s)--size.*data\.size.*9"),
        (("no-such-run",), "no-such-run"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(trained, call, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        call(*[trained if argument == "RUN" else argument for argument in arguments])
    assert not (tmp_path / "pictures").exists()


def test_folder_with_something_in_it_is_left_alone(trained, call, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "000000.png").write_text("mine")
    with pytest.raises(UserError, match=r"pictures is there already"):
        call(trained)
    assert (tmp_path / "pictures" / "000000.png").read_text() == "mine"
