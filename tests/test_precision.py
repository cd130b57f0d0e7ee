"""Which precision a device computes in, and what a run and its samples make of "auto"."""

import pytest
import torch

from hdit import config, device
from hdit.device import float32_products, precision_on, to_device
from hdit.errors import UserError
from hdit.nn.compiling import ENOUGH_CALLS, compiles
from hdit.runs import checkpoint
from hdit.sampling import sample as sampling
from hdit.sampling.sample import settle_sampling
from hdit.training.objective import settle_training
from hdit.training.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hardware(monkeypatch):
    """Sets what devices multiply, whatever this machine does."""

    def multiplies(bf16: bool, tf32: bool = False) -> None:
        for module in (device, sampling):
            monkeypatch.setattr(module, "multiplies_bf16", lambda device: bf16)
            monkeypatch.setattr(module, "multiplies_tf32", lambda device: tf32)

    return multiplies


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_hardware_multiplies_it(hardware, bf16, expected):
    hardware(bf16)
    assert precision_on(CPU, "auto") == expected


def test_bf16_by_name_is_kept_and_warned_of_where_it_is_emulated(hardware):
    said = []
    hardware(bf16=True)
    assert precision_on(CPU, "bf16", "training.precision", said.append) == "bf16"
    assert not said
    hardware(bf16=False)
    assert precision_on(CPU, "bf16", "training.precision", said.append) == "bf16"
    [text] = said
    assert "training.precision: 'bf16' is emulated on this cpu device" in text
    assert "set it to 'fp32'" in text


def test_tf32_is_refused_where_there_is_none(hardware):
    hardware(bf16=True, tf32=False)
    with pytest.raises(UserError, match=r"sampling\.precision: 'tf32' needs a CUDA device"):
        precision_on(CPU, "tf32", "sampling.precision")
    hardware(bf16=True, tf32=True)
    assert precision_on(CUDA, "tf32") == "tf32"


def test_products_are_tf32_within_tf32_alone():
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = settings()
    with float32_products("tf32"):
        assert settings() == ("high", True)
        with float32_products("fp32"):  # as a grid of samples within training
            assert settings() == ("highest", False)
        assert settings() == ("high", True)
    assert settings() == before


@pytest.mark.parametrize(
    ("training", "sampling", "bf16", "tf32", "expected"),
    [
        ("bf16", "auto", True, False, "bf16"),
        ("bf16", "auto", False, False, "fp32"),  # trained on a GPU, sampled on an old CPU
        ("fp32", "auto", True, True, "fp32"),  # whoever trained in float32 samples in it
        ("tf32", "auto", True, True, "tf32"),
        ("tf32", "auto", True, False, "fp32"),
        ("auto", "auto", True, False, "bf16"),  # a converted model, which no run has settled
        ("fp32", "bf16", True, False, "bf16"),
        ("bf16", "fp32", True, False, "fp32"),
    ],
)
def test_samples_are_made_in_the_precision_of_training_where_it_is(
    hardware, tiny, training, sampling, bf16, tf32, expected
):
    hardware(bf16, tf32)
    overrides = [f"training.precision={training}", f"sampling.precision={sampling}"]
    found = settle_sampling(config.load(tiny, overrides), CPU, 4, warn=pytest.fail)
    assert found.sampling.precision == expected
    again = settle_sampling(found, CPU, 4, warn=pytest.fail)
    assert again == found


def test_a_run_writes_what_auto_became_and_stays_with_it(tiny, tmp_path, hardware):
    hardware(bf16=False)
    auto = config.load(tiny, ["training.precision=auto", "sampling.grid=0"])
    first = Trainer(auto.model_copy(update={"training": auto.training.model_copy(
        update={"images": 16})}), tmp_path)  # fmt: skip
    assert first.fit()
    assert config.load(tmp_path / "config.toml").training.precision == "fp32"
    assert checkpoint.find(tmp_path, print).config.training.precision == "fp32"
    hardware(bf16=True)  # resumed on a newer machine
    assert settle_training(auto, CPU).training.precision == "bf16"
    resumed = Trainer(auto, tmp_path)
    assert resumed.config.training.precision == "fp32"
    assert resumed.fit()
    assert checkpoint.find(tmp_path, print).config.training.precision == "fp32"


def test_a_run_takes_another_precision_that_is_named_and_says_so(tiny, tmp_path, capfd, hardware):
    hardware(bf16=True)
    few = ["training.images=16", "sampling.grid=0"]
    assert Trainer(config.load(tiny, few), tmp_path).fit()
    Trainer(config.load(tiny, ["training.precision=bf16"]), tmp_path)
    said = capfd.readouterr().err
    assert "another setting: training.precision: 'fp32' in the run, 'bf16' now" in said


@pytest.mark.parametrize(
    ("setting", "place", "calls", "expected"),
    [
        ("auto", CPU, 10**9, False),
        ("auto", CUDA, ENOUGH_CALLS, True),
        ("auto", CUDA, ENOUGH_CALLS - 1, False),
        (True, CPU, 1, True),
        (False, CUDA, 10**9, False),
    ],
)
def test_auto_compiles_on_cuda_for_calls_enough(setting, place, calls, expected):
    assert compiles(setting, place, calls) is expected


@pytest.mark.parametrize(("images", "expected"), [(64, False), (64 * 20, True)])
def test_samples_compile_for_images_enough(tiny, images, expected):
    """50 steps for each batch of 64."""
    overrides = ["sampling.batch_size=64", "sampling.steps=50", "sampling.precision=fp32"]
    found = settle_sampling(config.load(tiny, overrides), CUDA, images, warn=pytest.fail)
    assert found.sampling.compile is expected


def test_to_device_leaves_a_tensor_of_the_cpu_where_it_is():
    x = torch.arange(3)
    assert to_device(x, CPU) is x
