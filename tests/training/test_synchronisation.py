"""In a step of training the host never waits for a GPU.

Without one, "meta" stands in for it: a tensor there has no data, so that whatever would wait for
some raises an error, and what is copied there can be seen.
"""

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdit import config
from hdit.data.batches import Batches
from hdit.training import trainer as trainer_module
from hdit.training.trainer import Trainer

SHAPES = ["data={kind='shapes', size=32}", "training.accumulate=2", "sampling.grid=0"]
DIT = "model={kind='dit', patch_size=4, depth=1, width=32, num_heads=2}"
SETTINGS = {
    "hdit": [*SHAPES, "training.gradient_noise_scale=true"],
    "hdit with averages": [*SHAPES, "training.ema={ decays = [0.9], widths = [0.1] }"],
    "hdit augmented": [*SHAPES, "data.augment=0.5"],
    "hdit by frequency": [*SHAPES, "diffusion.loss_scales=3", "training.precision=bf16"],
    "dit": [*SHAPES, DIT, "diffusion.density={kind='lognormal'}"],
    "dit with timesteps and a variance": [
        *SHAPES,
        DIT,
        "diffusion={parametrization={kind='eps_vp'}, weighting={kind='eps'}, "
        "density={kind='uniform_vp'}, learned_variance=true}",
    ],
}


def device_types(values) -> set[str]:
    """Of tensors; a number that lies on the CPU goes to a kernel as an argument."""
    return {t.device.type for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.ndim}


class Transfers(TorchDispatchMode):
    """Counts what is copied to "meta", and fails where the host would wait for a copy."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if len(device_types((args, kwargs, result))) > 1:
            assert (kwargs or {}).get("non_blocking"), f"the host waits for {function}"
            self.count += 1
        return result


class Constants(TorchFunctionMode):
    """Fails where a tensor is made on "meta" of Python's numbers, which the host copies there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            device = (kwargs or {}).get("device")
            of = args[0].device if isinstance(args[0], torch.Tensor) else torch.device("cpu")
            assert torch.device(device or of).type != "meta", "the host waits for a constant"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_gpu_but_meta(monkeypatch):
    autocast = torch.autocast  # which knows no "meta"

    def on(device, *arguments, **options):
        return autocast("cpu" if device == "meta" else device, *arguments, **options)

    monkeypatch.setattr(torch, "autocast", on)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    # "meta" has no fused optimizer, which on a GPU is told there whether to take the step.
    monkeypatch.setattr(trainer_module, "take_step", lambda optimizer, bad: optimizer.step())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_waits_for_nothing(tiny, tmp_path, no_gpu_but_meta, name):
    trainer = Trainer(config.load(tiny, SETTINGS[name]), tmp_path)
    layout = trainer.layout
    stream = Batches(trainer.source, seed=0, start=0, layout=layout)
    trainer._step(stream)  # tables are made once
    with Transfers() as transfers, Constants():
        for _ in range(2):
            trainer.images += 16
            trainer.step += 1
            norm = trainer._step(stream)
    assert norm.device.type == "meta"
    # In each of two parts of a batch: images, sigmas, labels, the keys of the noise, the bins that
    # losses are told by, and the warp.
    copies = 6 if trainer.config.data.augment.probability else 5
    assert transfers.count == 2 * 2 * copies


def test_what_waits_is_seen(tiny, tmp_path, no_gpu_but_meta):
    gpu = torch.ones(3, device="meta")
    with Transfers(), pytest.raises(AssertionError, match="the host waits for aten"):
        torch.ones(3).to("meta")
    with Constants(), pytest.raises(AssertionError, match="waits for a constant"):
        gpu.new_tensor([1.0])
    with pytest.raises(RuntimeError):
        gpu.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        gpu[gpu > 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_on_a_gpu_wait_for_nothing(tiny, tmp_path, name):
    trainer = Trainer(config.load(tiny, [*SETTINGS[name], "training.compile=false"]), tmp_path)
    stream = Batches(trainer.source, seed=0, start=0, layout=trainer.layout)
    for _ in range(3):
        trainer._step(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            trainer.images += 16
            trainer.step += 1
            trainer._step(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
