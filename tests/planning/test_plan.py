"""What is planned, against figures counted by hand."""

import json
import os

import pytest
import torch

from hdit import config
from hdit.errors import UserError
from hdit.models import build, memory
from hdit.models.cost import cost
from hdit.models.memory import Memory, training_memory
from hdit.models.peaks import PEAKS, peak_flops
from hdit.planning import measure, tables
from hdit.planning.model import Mode
from hdit.planning.plan import Asked, cut, largest, make_plan, to_dict
from hdit.protocols import Cond
from hdit.sampling.sample import evaluations

PLANNED = Asked(device="cpu", mfu=0.5, peak=1e12)


@pytest.fixture
def load(tiny):
    return lambda *overrides: config.load(tiny, list(overrides))


@pytest.fixture
def no_passes(monkeypatch):
    """Predictions of memory without the seconds that they take."""

    def of(*arguments, parts=1, processes=1, shards=1, **options):
        several = processes > 1
        gathered = int(shards > 1)
        return Memory(1, 1, 2, 1, {"level 0": 3}, 0, 8 * parts, several - gathered, gathered, 0)

    monkeypatch.setattr(memory, "training_memory", of)


def macs_of(settings) -> int:
    return sum(part.macs for part in cost(settings.model, settings.data_shape(10)))


# ---- peaks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
        ("Tesla V100", None),
    ],
)
def test_peak_is_known_of_a_device_as_torch_names_it(name, known):
    for precision in ("fp32", "tf32", "bf16"):
        assert peak_flops(name, precision) == (PEAKS[known][precision] if known else None)


def test_disk_of_many_gib_is_told_without_an_exponent(load, no_passes):
    plan = make_plan(
        load("training.images=1600000000", "training.checkpoint_every=16"), 10, PLANNED
    )
    checkpoints, each = 10**8, 16 * plan.parameters
    told = f"{checkpoints * each / 2**30:,.0f} GiB in all on the disk"
    assert len(told.split(",")) > 1
    assert next(tables.remarks(plan)).endswith(told)


# ---- time ----------------------------------------------------------------------------------------


def test_hours_by_a_peak_are_those_of_the_counted_work(load, no_passes):
    """Of 3 forward passes of 2 FLOPs a MAC; grids take a pass for each evaluation."""
    settings = load("sampling.grid=8", "sampling.steps=5", "sampling.sampler.kind=euler")
    plan = make_plan(settings, 10, PLANNED)
    t, macs = settings.training, macs_of(settings)
    rate = 0.5 * 1e12
    checkpoints = -(-t.images // t.checkpoint_every)
    assert plan.macs == macs
    assert plan.hours.training == pytest.approx(t.images * 3 * 2 * macs / rate / 3600, rel=1e-12)
    grids = checkpoints * 8 * 5 * 2 * macs / rate / 3600
    assert plan.hours.grids == pytest.approx(grids, rel=1e-12)
    each = 4 * 4 * plan.parameters  # model, EMA and two moments, in float32
    assert plan.disk == (each, checkpoints * each)
    assert plan.hours.checkpoints == pytest.approx(checkpoints * each / 2e9 / 3600, rel=1e-12)
    assert plan.hours.total == pytest.approx(
        plan.hours.training + plan.hours.grids + plan.hours.checkpoints, rel=1e-12
    )


def test_hours_with_checkpointing_are_a_third_longer_and_shared_by_gpus(load, no_passes):
    one = make_plan(load("sampling.grid=0"), 10, PLANNED)
    again = make_plan(load("sampling.grid=0", "training.gradient_checkpointing=true"), 10, PLANNED)
    assert again.hours.training == pytest.approx(one.hours.training * 4 / 3, rel=1e-12)
    four = make_plan(
        load("sampling.grid=0"), 10, Asked(device="cpu", gpus=4, mfu=0.5, peak=1e12, price=3.0)
    )
    assert four.hours.training == pytest.approx(one.hours.training / 4, rel=1e-12)
    assert four.money == pytest.approx(4 * 3.0 * four.hours.total, rel=1e-12)


def test_grids_are_shared_by_the_image(load, no_passes):
    """Eight images take three processes as long as three images take one."""
    three, one = (
        make_plan(
            load(f"sampling.grid={grid}", "training.batch_size=48", "training.images=960"),
            10,
            Asked(device="cpu", gpus=gpus, mfu=0.5, peak=1e12),
        ).hours.grids
        for gpus, grid in ((3, 8), (1, 3))
    )
    assert three == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize(
    ("gpus", "keep", "rounds", "images"),
    [
        (1, "{}", 7, 100),  # after 160, 320, ..., 960 images, and at the end
        (1, "{last = 2, best = 1}", 11, 100),  # and at 200, 400, 600, 800 and 1000: at 800 once
        (2, "{}", 7, 64),  # batches of 32, 32, 32 and 4, two for each
        (4, "{}", 7, 32),
        (8, "{}", 7, 32),
    ],
)
def test_hours_of_validation_are_those_of_the_process_with_most_batches(
    load, no_passes, gpus, keep, rounds, images
):
    settings = load(
        "data.held_out=0.1", "training.validate_every=160", "training.validate_images=100",
        "training.images=1040", "training.batch_size=80", "training.checkpoint_every=200",
        f"training.keep={keep}", "sampling.batch_size=32", "sampling.grid=0",
        "training.ema={decays = [0.9], widths = [0.05, 0.1]}",
    )  # fmt: skip
    plan = make_plan(settings, 10, Asked(device="cpu", gpus=gpus, mfu=0.5, peak=1e12))
    networks = 5  # the model, its EMA and three more averages
    expected = rounds * images * networks * 2 * macs_of(settings) / 0.5e12 / 3600
    assert plan.hours.validation == pytest.approx(expected, rel=1e-12)


def test_hours_of_an_evaluation_are_those_of_its_samples(load, no_passes):
    settings = load("sampling.grid=0", "sampling.steps=7", "sampling.sampler.kind=euler")
    plan = make_plan(settings, 10, Asked(device="cpu", mfu=0.5, peak=1e12, evaluated=100))
    expected = 100 * 7 * 2 * macs_of(settings) / 0.5e12 / 3600
    assert plan.hours.evaluation == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["sampling.sampler.kind=euler"], 6),
        (["sampling.sampler.kind=heun"], 2 * 6 - 1),  # the last step has no second evaluation
        (["sampling.sampler.kind=dpmpp_3m_sde"], 6),
        (["sampling.sampler.kind=euler", "sampling.guidance.scale=2.0"], 12),
        (
            ["sampling.sampler.kind=euler", "sampling.guidance.scale=2.0",
             "sampling.guidance.batched=false"], 12
        ),
    ],
)  # fmt: skip
def test_evaluations_are_those_that_the_sampler_makes(load, overrides, count):
    settings = load("sampling.steps=6", *overrides)
    assert evaluations(settings, settings.data_shape(10)) == count


def test_evaluations_without_guidance_outside_its_interval(load):
    settings = load(
        "sampling.steps=6", "sampling.sampler.kind=euler",
        "sampling.guidance={scale=2.0, interval=[0.5, 5.0]}",
    )  # fmt: skip
    shape = settings.data_shape(10)
    low, high = settings.sigma_range()
    sigmas = settings.sampling.sigmas(6, low, high, settings.beta_schedule)[:-1]
    guided = int(((sigmas > 0.5) & (sigmas <= 5.0)).sum())
    assert 0 < guided < 6
    assert evaluations(settings, shape) == 6 + guided


# ---- memory --------------------------------------------------------------------------------------


def test_shard_is_its_part_of_the_state_and_of_nothing_else(load):
    settings = load()
    shape = settings.data_shape(10)
    model = build(settings.model, shape)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    buffers = 4 * sum(b.numel() for b in model.buffers())
    blocks = [4 * sum(p.numel() for p in block.parameters()) for block in model.blocks]
    whole = training_memory(settings.model, shape, 8)
    shard = training_memory(settings.model, shape, 8, processes=4, shards=4)
    assert shard.weights == parameters // 4 + buffers
    assert shard.optimizer == 2 * (parameters // 4)
    assert shard.gradients == parameters // 4
    assert shard.activations == whole.activations
    root, block = parameters - sum(blocks), max(blocks)
    assert shard.gathered == 2 * root + 3 * block + 2 * block
    in_bf16 = training_memory(
        settings.model, shape, 8, processes=4, shards=4, autocast=torch.bfloat16
    )
    assert in_bf16.gathered == 2 * root + 3 * block // 2 + block // 2 + block
    parts = training_memory(settings.model, shape, 8, processes=4, shards=4, parts=2)
    assert parts.peak == shard.peak + parameters
    assert parts.unreduced == parameters


def test_whole_model_on_several_has_buckets_and_each_average_its_weights(load):
    settings = load()
    shape = settings.data_shape(10)
    one = training_memory(settings.model, shape, 8)
    ddp = training_memory(settings.model, shape, 8, processes=4)
    assert (ddp.buckets, one.buckets) == (one.gradients, 0)
    assert ddp.peak == one.peak + one.gradients
    three = training_memory(settings.model, shape, 8, averages=3)
    assert three.ema == 3 * one.ema
    assert three.peak == one.peak + 2 * one.weights


def test_later_part_of_a_batch_runs_beside_the_gradients(load):
    """A second pass with gradients there makes at most what they are more than the first."""
    settings = load()
    shape = settings.data_shape(10)
    one, parts = (training_memory(settings.model, shape, 8, parts=n) for n in (1, 2))
    assert one.peak < parts.peak <= one.peak + one.gradients


def test_passes_of_a_bf16_shard_cast_no_weights(load):
    """Autocast makes a copy of each weight; FSDP gathers them in bf16 as they are."""
    settings = load()
    shape = settings.data_shape(10)
    options = {"processes": 4, "autocast": torch.bfloat16}
    ddp = training_memory(settings.model, shape, 1, **options)
    fsdp = training_memory(settings.model, shape, 1, shards=4, **options)
    assert sum(fsdp.activations.values()) < sum(ddp.activations.values())


def test_forward_pass_with_blocks_in_bf16_is_valid(load):
    """What the prediction of a shard runs without data, on data."""
    settings = load()
    shape = settings.data_shape(10)
    model = build(settings.model, shape)
    for block in model.blocks:
        block.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.zeros(2, *shape.chw), torch.zeros(2), Cond(torch.zeros(2).long()))
    assert out.shape == (2, *shape.chw)


MODE = Mode("ddp", False)


@pytest.mark.parametrize(
    ("room", "batch", "found"),
    [
        (1000, 32, (32, 1, 330)),
        (100, 32, (8, 4, 100)),  # 10 + 8 x 10, and 10 for the gradients of the parts before
        (99, 32, (4, 8, 60)),
        (30, 7, (1, 7, 30)),
        (29, 7, (0, 0, 30)),
        (60, 5, (5, 1, 60)),
        (49, 1, (1, 1, 20)),
        (19, 1, (0, 0, 20)),
    ],
)
def test_batch_is_cut_into_the_fewest_parts_that_fit(room, batch, found):
    def peak(images, parts):
        return max(20, 10 + 10 * images) + (10 if parts > 1 else 0)

    fit = largest(MODE, peak, room, batch)
    assert (fit.images, fit.accumulate, fit.peak) == found


def test_batch_is_cut_right_where_few_images_take_no_memory_of_their_own():
    """As where the gradients of a large model are more than the activations of a few images."""
    fit = largest(MODE, lambda images, parts: max(100, 10 * images), 160, 64)
    assert (fit.images, fit.accumulate, fit.peak) == (16, 4, 160)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(gpus=3), r"--gpus: training.batch_size \(16\) cannot be shared by 3 GPUs"),
        (Asked(gpus=2, at_once=5), r"--batch: 5 images at once on 2 GPUs must divide"),
    ],
)
def test_batch_that_gpus_cannot_share_is_an_error(load, asked, message):
    with pytest.raises(UserError, match=message):
        cut(load(), asked)


# ---- measuring -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Three steps and no more, in an empty folder."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_measuring_leaves_nothing_behind(load, quick):
    found = measure.measure(load(), 2, 10, print)
    assert len(found.steps) == 3
    assert found.images == 8, "half of the batch"
    assert found.evaluation > 0
    assert found.loading > 0
    assert found.peak > 0
    assert not found.notes
    assert os.listdir(quick) == []


def test_measuring_without_data_draws_images_and_says_so(load, quick, capsys):
    absent = load("data={kind='folder', path='nowhere', size=16}", "sampling.grid=0")
    told = []
    found = measure.measure(absent, 1, 0, told.append)
    assert told == found.notes
    assert "drawn" in told[0]
    assert "nowhere" in told[0]
    assert found.loading is None
    assert found.evaluation is None
    assert os.listdir(quick) == []


def test_measured_hours_follow_from_the_steps(load, no_passes):
    settings = load("sampling.sampler.kind=euler", "sampling.steps=5", "sampling.grid=8")
    found = measure.Measured([1.0, 2.0, 9.0], 16, 0.01, 0.5, None, 10**9, ["drawn"])
    plan = make_plan(settings, 10, Asked(device="cpu"), found)
    t = settings.training
    checkpoints = -(-t.images // t.checkpoint_every)
    assert plan.hours.training == pytest.approx(t.images / 8 / 3600, rel=1e-12)
    assert plan.hours.grids == pytest.approx(checkpoints * 8 * 5 * 0.01 / 3600, rel=1e-12)
    assert plan.hours.checkpoints == pytest.approx(checkpoints * 0.5 / 3600, rel=1e-12)
    assert plan.notes[0] == "drawn"


def test_measured_hours_are_those_of_workers_that_load_less(load, no_passes):
    settings = load("training.workers=2", "sampling.grid=0")
    found = measure.Measured([1.0] * 3, 16, None, 0.0, 4.0, 10**9, [])
    plan = make_plan(settings, 10, Asked(device="cpu"), found)
    assert plan.speed.images_per_second == 8.0
    assert plan.notes == [
        "2 workers load 8 images/s, and the network takes 16: raise training.workers"
    ]


# ---- the command ---------------------------------------------------------------------------------

KEYS = {
    "model", "shape", "parameters", "macs", "device", "gpus", "precision", "images", "batch_size",
    "images_at_once", "accumulate", "memory", "process_memory", "fits", "speed", "evaluations",
    "hours", "price", "checkpoint_bytes", "disk_bytes", "measured", "notes",
}  # fmt: skip


def test_plan_prints_tables_and_json(tiny, hdit, no_passes):
    asked = ("--gpu", "H100", "--gpus", 4, "--price", 2.5, "--memory", 24, "--evaluate", 100)
    status, out, err = hdit("plan", tiny, *asked)
    assert status == 0, err
    for text in ("DDP's buckets", "gathered blocks", "fsdp checkpointed",
                 "at 2.5 an hour", "40% of 66.9 TFLOP/s", "checkpoints of", "what 24 GiB hold",
                 "100 samples for an evaluation"):  # fmt: skip
        assert text in " ".join(out.split()), out
    status, out, err = hdit("plan", tiny, *asked, "--json")
    told = json.loads(out)
    assert told.keys() == KEYS
    modes = [(m["parallel"], m["gradient_checkpointing"]) for m in told["memory"]]
    assert modes == [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]
    assert told["process_memory"] is None
    assert [fit["accumulate"] for fit in told["fits"]] == [1] * 4
    assert told["price"] == pytest.approx(2.5 * 4 * told["hours"]["total"])


def test_plan_without_a_speed_tells_memory_and_disk(tiny, hdit):
    status, out, _ = hdit("plan", tiny, "--device", "cpu", "--batch", 4)
    assert status == 0
    told = " ".join(out.split())
    assert "4 images at once on cpu in fp32, 4 parts of a batch" in told
    assert "no hours: give --gpu" in out
    assert "and with the process" in out


def test_plan_is_measured_here(tiny, hdit, quick, no_passes):
    status, out, err = hdit("plan", tiny, "--measure", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert len(told["measured"]["steps"]) == 3
    assert told["hours"]["total"] > 0
    assert told["speed"]["source"] == "the median of 3 steps here"
    assert os.listdir(quick) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "V100"], "--gpu: the peak of 'V100' in fp32 is not known; there are A100, H100"),
        (["--gpu", "A100", "--peak-tflops", 3], "--gpu: --peak-tflops says the peak too"),
        (["--gpu", "A100", "--device", "cpu"], "--gpu: has no effect with --device cpu"),
        (["--gpu", "A100", "--mfu", 0], "--mfu: must be above 0"),
        (["--gpu", "A100", "--mfu", 1.5], "--mfu"),
        (["--gpu", "A100", "--mfu", "nan"], "--mfu"),
        (["--mfu", 0.3], "--mfu: needs the peak that it is a share of"),
        (["--price", 2], "--price: needs hours, and so a speed"),
        (["--measure", "--mfu", 0.3], "--mfu: has no effect with --measure"),
        (["--measure", "--device", "cuda"], "--measure: steps are timed on this machine's cpu"),
        (["--device", "mps"], "--device: must be cpu or cuda, got 'mps'"),
        (["--gpus", 3], "--gpus: training.batch_size (16) cannot be shared"),
        (["--batch", 3], "--batch: 3 images at once"),
    ],
)
def test_plan_refuses_what_has_no_meaning(tiny, hdit, no_passes, options, message):
    if torch.cuda.is_available() and "cuda" in options:
        pytest.skip("the machine has one")
    status, out, err = hdit("plan", tiny, *options)
    assert status in (1, 2)
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not out


def test_plan_as_json_has_bytes_of_every_part(load):
    told = to_dict(make_plan(load(), 10, PLANNED))
    [plain, _] = told["memory"]
    assert plain["parallel"] is None
    parts = ("weights", "ema", "optimizer")
    assert sum(plain[name] for name in parts) < plain["peak"]
