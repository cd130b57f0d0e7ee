"""Whole models with each backend of neighborhood attention."""

from pathlib import Path

import pytest
import torch

from hdit.config import load
from hdit.models import build
from hdit.nn.attention import Neighborhood
from hdit.protocols import Cond, DataShape
from hdit.runs.building import make_denoiser
from hdit_kernels import BACKENDS, neighborhood, reference, select_backend
from hdit_kernels.neighborhood import AUTO, Choice, Problem

CONFIGS = Path(__file__).parents[2] / "configs"
ON_CPU = [
    name
    for name, backend in BACKENDS.items()
    if backend.unsupported(Problem("cpu", torch.float32, 16, 16, 7, 64, True)) is None
]


def random_network(config, shape):
    """Weights of which none is zero."""
    torch.manual_seed(0)
    network = build(config.model, shape)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.03)
    return network.eval()


def loss_and_gradients(network, config, shape):
    rng = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 2, *shape.chw, generator=rng).unbind(0)
    precision = config.training.precision
    denoiser = make_denoiser(network, config, shape, precision)
    sigma = torch.tensor([0.1, 3.0])
    labels = Cond(torch.tensor([0, 1])) if shape.num_classes else Cond()
    loss = denoiser.loss(x0, noise, sigma, labels, config.diffusion.weighting, 1).mean()
    network.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


def losses_and_gradients(precision, monkeypatch):
    """Of one small model with each backend, by name."""
    settings = [f"training.precision={precision}", "data.size=64", "data.path=none"]
    config = load(CONFIGS / "hdit-oxford-flowers.toml", settings)
    shape = DataShape(3, 64, 64, 0, 0.5)
    network = random_network(config, shape)
    results = {}
    for name in ON_CPU:
        monkeypatch.setattr(neighborhood, "AUTO", (Choice("cpu", (name,)), *AUTO))
        results[name] = loss_and_gradients(network, config, shape)
    return results


def apart(a, b):
    return float((a - b).norm() / b.norm())


def test_a_model_has_the_same_loss_and_gradients_with_each_backend(monkeypatch):
    assert {"cpu", "tile", "reference"} <= set(ON_CPU)
    results = losses_and_gradients("fp32", monkeypatch)
    exact, gradient = results.pop("reference")
    for name, (loss, found) in results.items():  # some roundings of sums
        torch.testing.assert_close(loss, exact, atol=0, rtol=1e-5, msg=name)
        assert apart(found, gradient) < 1e-5, name


def test_in_bfloat16_no_backend_is_further_from_float32_than_the_definition(monkeypatch):
    exact, gradient = losses_and_gradients("fp32", monkeypatch)["reference"]
    results = losses_and_gradients("bf16", monkeypatch)
    _, by_definition = results.pop("reference")
    bound = 1.1 * apart(by_definition, gradient)  # a tenth for other roundings
    for name, (loss, found) in results.items():
        torch.testing.assert_close(loss, exact, atol=0, rtol=2e-3, msg=name)
        assert apart(found, gradient) < bound, name


@pytest.mark.parametrize("name", [n for n in ON_CPU if n not in ("flex", "natten")])
def test_a_sample_step_is_the_same_with_each_backend(name, monkeypatch):
    config = load(
        CONFIGS / "hdit-oxford-flowers.toml",
        ["training.precision=fp32", "data.size=96", "data.path=none"],
    )
    shape = DataShape(3, 96, 96, 0, 0.5)
    network = random_network(config, shape)
    denoise = make_denoiser(network, config, shape).bind(Cond())
    x, sigma = torch.randn(1, *shape.chw), torch.ones(1)
    with torch.inference_mode():
        monkeypatch.setattr(neighborhood, "AUTO", (Choice("cpu", ("reference",)), *AUTO))
        expected = denoise(x, sigma)
        monkeypatch.setattr(neighborhood, "AUTO", (Choice("cpu", (name,)), *AUTO))
        torch.testing.assert_close(denoise(x, sigma), expected, atol=1e-5, rtol=1e-4)


def test_a_megapixel_forward_has_the_references_attention_on_every_local_level(monkeypatch):
    """With `auto`, on FFHQ-1024: in the corner, and inside, where a crop has the same windows."""
    config = load(CONFIGS / "hdit-ffhq1024.toml", ["data.path=none"])
    shape = DataShape(3, 1024, 1024, 0, 0.5)
    network = random_network(config, shape)
    seen = {}
    attend = Neighborhood.attend

    def keep_the_first(self, q, k, v, scale):
        out = attend(self, q, k, v, scale)
        seen.setdefault(q.shape[1:3], (q, k, v, scale, self.kernel_size, out))
        return out

    monkeypatch.setattr(Neighborhood, "attend", keep_the_first)
    for module in network.modules():
        if hasattr(module, "attend") and isinstance(getattr(module, "spec", None), Neighborhood):
            module.attend = module.spec.of_layer(0)
    with torch.inference_mode():
        out = network(torch.randn(1, *shape.chw), torch.zeros(1), Cond())
    assert out.isfinite().all()
    assert out.std() > 0
    assert list(seen) == [(256, 256), (128, 128), (64, 64)]
    for (side, _), (q, k, v, scale, kernel_size, actual) in seen.items():
        problem = Problem("cpu", q.dtype, side, side, kernel_size, q.shape[-1], False)
        assert select_backend(problem) != "reference"
        halo = kernel_size // 2
        for first, inner in ((0, slice(0, 16)), (side // 2 - 10, slice(halo, 20 - halo))):
            crop = slice(first, first + 20)
            parts = (t[:, crop, crop].double() for t in (q, k, v))
            expected = reference.attention(*parts, kernel_size, scale)[:, inner, inner]
            # sums of 64 and of 49 terms in float32
            torch.testing.assert_close(
                actual[:, crop, crop][:, inner, inner].double(), expected, atol=2e-5, rtol=1e-5
            )
