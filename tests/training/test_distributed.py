"""One run, whole or sharded, by one process or two: the same losses, and the same weights again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hdit import config
from hdit.config import ConfigError
from hdit.errors import UserError
from hdit.manifest import describe
from hdit.models import build
from hdit.protocols import Cond
from hdit.runs import checkpoint
from hdit.runs.conversion import convert
from hdit.runs.snapshots import open_snapshots
from hdit.runs.trained import Trained
from hdit.training.distributed import Replicated, outline
from hdit.training.posthoc import Wanted, make
from hdit.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}",
    "OMP_NUM_THREADS": "1",
}

WORKER = """
import json, math, sys
from pathlib import Path
import torch, torch.distributed as dist
from hdit import config
from hdit.errors import UserError
from hdit.processes import closing
from hdit.training.trainer import Trainer

def poison(trainer):
    objective = trainer.objective
    def changed(batch):
        loss = objective(batch)
        return loss * math.nan if 32 <= batch.counters[0] < 48 else loss
    trainer.objective = changed

def ruin(trainer):
    step = trainer._step
    def changed(stream):
        norm = step(stream)
        if trainer.images == 48 and not trainer.passed_over:
            moment = trainer.optimizer.state[trainer.backbone.out_norm.scale]["exp_avg"]
            moment.to_local().fill_(math.nan)
        return norm
    trainer._step = changed

def no_memory(trainer):  # for the first block of what is sampled
    network = trainer.sampler.network
    def fail(module, inputs):
        if network.failed:  # within a call by the sampler
            raise torch.OutOfMemoryError("no memory")
    next(iter(trainer.ema.blocks)).register_forward_pre_hook(fail)

def no_share(trainer):
    def fail():
        raise UserError("no samples")
    trainer.sampler._share = fail

FAULTS = {"loss": poison, "shard": ruin, "memory": no_memory, "share": no_share}

torch.set_num_threads(1)
with closing():
    for folder, toml, overrides, fault in json.loads(Path(sys.argv[1]).read_text()):
        trainer = Trainer(config.load(toml, overrides), Path(folder))
        if fault and (trainer.accelerator.process_index == 1 or fault.endswith("everywhere")):
            FAULTS[fault.split()[0]](trainer)
        assert trainer.fit()
        dist.barrier()
"""

STEPS, BATCH = 30, 16
FSDP = "training.parallel=fsdp"
HELD = "data.held_out=0.2"
SHORT = ["training.images=96", "training.checkpoint_every=32"]


def together(tmp_path, *runs):
    """Trains runs (folder, config, overrides, fault), one after the other, by two processes.

    The fault is one of the second process alone, unless it is "everywhere".
    """
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "runs.json").write_text(json.dumps(runs, default=str))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(tmp_path / "worker.py"), str(tmp_path / "runs.json")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """The folder of runs by their names, and the config that all are of."""
    folder = tmp_path_factory.mktemp("distributed")
    text = (trained.parent / "tiny.toml").read_text().replace("dropout = 0.1", "")
    text = text.replace("images = 96", f"images = {STEPS * BATCH}")
    text = text.replace("checkpoint_every = 32", f"checkpoint_every = {STEPS * BATCH // 2}")
    toml = folder / "tiny.toml"
    averages = f"decays = [0.9]\nwidths = [0.1]\nsnapshot_every = {STEPS * BATCH // 4}\n"
    toml.write_text(f"{text}\n[training.ema]\n{averages}")
    assert Trainer(config.load(toml), folder / "one").fit()
    few = ["training.images=48", "sampling.grid=0"]
    grids = ["training.images=32", "sampling.grid=5"]
    adaptive = "sampling.sampler={ kind = 'dpm_adaptive' }"
    bad_files = pictures(folder / "pictures")
    told = together(
        folder,
        (folder / "ddp", toml, [], ""),
        (folder / "fsdp", toml, [FSDP], ""),
        (folder / "ddp-bf16", toml, [*few, "training.precision=bf16"], ""),
        (folder / "fsdp-bf16", toml, [*few, FSDP, "training.precision=bf16"], ""),
        (folder / "hsdp", toml, [*few, FSDP, "training.replicate=2"], ""),
        (folder / "bad", toml, [*few, FSDP, "training.images=80"], "loss"),
        (folder / "ruined", toml, [*few, FSDP, *SHORT], "shard"),
        (folder / "accumulated", toml, [*few, FSDP, "training.accumulate=4"], ""),
        (folder / "held", toml, [*few, HELD], ""),
        (folder / "skips", toml, [*few, FSDP, bad_files], ""),
        (folder / "grid-adaptive", toml, [*grids, FSDP, adaptive], ""),
        (folder / "grid-share", toml, [*grids, FSDP], "share"),
        (folder / "grid-memory", toml, grids, "memory"),
        (folder / "grid-memory-everywhere", toml, [*grids, FSDP], "memory everywhere"),
    )
    (folder / "told").write_text(told)
    half = checkpoint.folder_name(STEPS * BATCH // 2)
    for name, source in (("again", "fsdp"), ("from-one", "one"), ("to-one", "fsdp")):
        shutil.copytree(folder / source, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / checkpoint.folder_name(STEPS * BATCH))
        (folder / name / "checkpoints" / "latest").write_text(f"{half}\n")
    for name in ("held-one", "held-fsdp"):  # at their end, and validated anew
        shutil.copytree(folder / "held", folder / name)
        (folder / name / "validation.jsonl").unlink()
    (folder / "again" / "samples" / f"{half}.png").unlink()  # is made before any step
    together(
        folder,
        (folder / "again", toml, [FSDP], ""),
        (folder / "from-one", toml, [FSDP], ""),
        (folder / "held-fsdp", toml, [*few, HELD, FSDP], ""),
    )
    assert Trainer(config.load(toml, [*few, HELD]), folder / "held-one").fit()
    assert Trainer(config.load(toml), folder / "to-one").fit()
    return folder


def pictures(folder):
    """The setting of a folder of images of which two cannot be read."""
    folder.mkdir()
    for i in range(10):
        Image.effect_noise((8, 8), 60).save(folder / f"{i}.png")
    for name in ("bad", "worse"):
        (folder / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return f"data={{kind='folder', path='{folder}', size=8, max_bad_share=0.5}}"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["held-one", "held-fsdp"])
def test_validation_is_the_same_to_the_last_digit_by_one_process_and_two(runs, name):
    """Of the same weights, in five batches: the second process of a sharded run fills up."""
    [expected] = (runs / "held" / "validation.jsonl").read_text().splitlines()
    assert (runs / name / "validation.jsonl").read_text().splitlines() == [expected]
    assert json.loads(expected)["count"] > 4 * 64


def test_two_processes_add_up_their_losses_by_noise_level(runs):
    for line in lines(runs / "held"):
        assert sum(line["loss_by_sigma"]) / 8 == pytest.approx(line["loss"], rel=1e-6)


def tensors(run):
    found = checkpoint.find(run, print)
    return {name: found.tensors(name) for name in (*found.sets(), "optimizer")}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "again", "from-one", "to-one"])
def test_loss_is_that_of_one_process_whole_or_sharded_resumed_or_not(runs, name):
    """1e-6 is what float32 sums in another order leave after 30 steps."""
    expected, found = lines(runs / "one"), lines(runs / name)
    assert len(expected) == STEPS
    for a, b in zip(expected, found, strict=True):
        assert b["images"] == a["images"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


def test_run_resumed_by_as_many_processes_is_bitwise_the_uninterrupted_one(runs):
    for name, expected in tensors(runs / "fsdp").items():
        found = tensors(runs / "again")[name]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("name", ["ddp", "again", "from-one", "to-one"])
def test_averages_and_snapshots_are_the_same_whole_or_sharded(runs, name):
    """1e-5 is what sums in another order leave in weights after 30 steps."""
    expected = [tensors(runs / "fsdp"), *snapshots(runs / "fsdp")]
    found = [tensors(runs / name), *snapshots(runs / name)]
    assert len(found) == len(expected) == 1 + 4
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for average in ("ema-width-0.1", *({"ema-0.9"} & b.keys())):
            for key, tensor in b[average].items():
                torch.testing.assert_close(a[average][key], tensor, rtol=1e-4, atol=1e-5)


def test_width_is_made_of_shards_as_of_whole_snapshots(runs):
    made = [
        make(runs / name, [Wanted("width", 0.15)], None, True, print) for name in ("ddp", "fsdp")
    ]
    (whole,), (sharded,) = made
    assert (whole.snapshots, whole.error) == (sharded.snapshots, sharded.error)
    expected = Trained.open(whole.path).tensors()
    for key, tensor in Trained.open(sharded.path).tensors().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)


def snapshots(run):
    return [
        {average: found.tensors(average) for average in found.sets()}
        for found in open_snapshots(run, None, print)
    ]


@pytest.mark.parametrize(
    ("name", "like", "rel"),
    [("hsdp", "one", 1e-6), ("accumulated", "one", 1e-6), ("fsdp-bf16", "ddp-bf16", 1e-2)],
)
def test_other_ways_to_share_have_the_same_loss(runs, name, like, rel):
    found = lines(runs / name)
    for a, b in zip(lines(runs / like)[: len(found)], found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=rel)


def test_loss_that_is_not_finite_in_one_process_is_passed_over_by_both(runs):
    assert [line["skipped_steps"] for line in lines(runs / "bad")] == [0, 0, 1, 1, 1]
    assert [event["images"] for event in happened(runs / "bad", "step skipped")] == [32]
    assert happened(runs / "bad", "rollback") == []


def happened(run, kind):
    """The events of a kind. Of others there may be some: a busy machine is slow."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == kind]


def test_shard_that_is_ruined_in_one_process_sends_both_back(runs):
    """Before the checkpoint at 64 images, to the one at 32."""
    state = checkpoint.find(runs / "ruined", print).state
    assert (state.images, state.passed_over) == (96, 32)
    assert [event["images"] for event in happened(runs / "ruined", "rollback")] == [32]


def test_sharded_checkpoint_is_opened_and_converted_by_one_process(runs, tmp_path):
    sharded, whole = Trained.open(runs / "fsdp"), Trained.open(runs / "ddp")
    convert(runs / "fsdp", tmp_path / "out")
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    cond = Cond(torch.tensor([3]))
    outputs = [
        model.network()(x, torch.zeros(1), cond)
        for model in (sharded, whole, Trained.open(tmp_path / "out"))
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-4)
    assert (runs / "fsdp" / "samples" / f"{checkpoint.folder_name(480)}.png").exists()


def test_damaged_shard_is_found(runs, tmp_path):
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    shard = next((tmp_path / "run" / "checkpoints" / "000000000480").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    told = []
    assert checkpoint.find(tmp_path / "run", told.append).state.images == 240
    assert shard.name in told[0]


def test_checkpoint_of_other_tensors_is_refused(runs):
    found = checkpoint.find(runs / "fsdp", print)
    settings = config.load(runs / "tiny.toml", ["model.levels.0.width=48"])
    other = build(settings.model, found.state.shape)
    with pytest.raises(UserError, match=r"model: .* has shape .*, and .* is needed"):
        found.fill("model", other.state_dict())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.replicate=2"], "training.replicate: has no effect with training.parallel"),
        (
            [FSDP, "training.gradient_noise_scale=true", "training.accumulate=2"],
            "training.gradient_noise_scale: needs training.parallel = 'ddp'",
        ),
        (["training.parallel=zero"], "training.parallel: must be 'ddp' or 'fsdp', got 'zero'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(runs, overrides, words):
    with pytest.raises(ConfigError, match=words):
        config.load(runs / "tiny.toml", overrides)


def test_single_process_has_nothing_to_shard_and_says_so(runs, tmp_path, capfd):
    few = [FSDP, "training.images=16", "sampling.grid=0"]
    assert Trainer(config.load(runs / "tiny.toml", few), tmp_path).fit()
    assert "training.parallel: 'fsdp' has nothing to share in a single process" in (
        capfd.readouterr().err
    )


# ---- what processes share besides the model ------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_grid_that_processes_share_is_that_of_one(runs, name):
    """But for the last bit: the weights differ by what sums in another order leave."""
    file = f"samples/{checkpoint.folder_name(STEPS * BATCH)}.png"
    one, two = (np.asarray(Image.open(runs / run / file), int) for run in ("one", name))
    assert one.shape == two.shape
    assert one.std() > 10
    assert abs(one - two).max() <= 1


def test_grid_is_made_where_each_process_takes_other_steps(runs):
    assert (runs / "grid-adaptive" / "samples" / "000000000032.png").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("grid-share", "rank 1: no samples"),
        ("grid-memory", "rank 1: no memory"),
        ("grid-memory-everywhere", "no memory"),
    ],
)
def test_grid_that_a_process_cannot_make_is_named_and_all_go_on(runs, name, reason):
    grid = runs / name / "samples" / "000000000032.png"
    told = (runs / "told").read_text()
    assert f"warning: {grid}: the grid cannot be made: {reason}\n" in told
    assert not grid.exists()
    assert checkpoint.find(runs / name, print).state.images == 32


def test_files_that_any_process_skipped_are_events_once(runs):
    skipped = [Path(event["path"]).name for event in happened(runs / "skips", "file skipped")]
    assert sorted(skipped) == ["bad.png", "worse.png"]
    assert lines(runs / "skips")[-1]["skipped_files"] == 2


def test_skipped_step_is_told_of_with_the_images_of_all_processes(runs):
    [event] = happened(runs / "bad", "step skipped")
    assert event["counters"] == list(range(32, 48))


def test_missing_shard_is_found_though_the_manifest_does_not_know_it(runs, tmp_path):
    """As of a folder that not all processes shared."""
    shutil.copytree(runs / "fsdp" / "checkpoints" / "000000000480", tmp_path / "480")
    min((tmp_path / "480").glob("shard-*")).unlink()  # without the last, tensors are too short
    (tmp_path / "480" / "manifest.json").unlink()
    manifest = {"format": checkpoint.FORMAT, "files": describe(tmp_path / "480")}
    (tmp_path / "480" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="480: a shard is missing, with a part of model/"):
        checkpoint.find(tmp_path / "480", print).tensors("model")


def test_average_takes_no_memory_until_it_is_placed_and_then_is_the_model(runs):
    settings = config.load(runs / "tiny.toml")
    model = build(settings.model, checkpoint.find(runs / "one", print).state.shape)
    average = outline(model)
    assert all(p.is_meta and not p.requires_grad for p in average.parameters())
    assert not average.training
    assert model.training
    Replicated(Accelerator(cpu=True)).place(average, average_of=model)
    assert average.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        found = average.state_dict()[name]
        assert torch.equal(found, tensor)
        assert found.data_ptr() != tensor.data_ptr()
