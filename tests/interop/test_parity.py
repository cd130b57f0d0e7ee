"""Checkpoints of the reference implementations give the reference's outputs here."""

from copy import deepcopy

import pytest
import torch
from known_answers import FOLDER, load

from hdit.diffusion.guidance import cfg
from hdit.diffusion.samplers import ddim
from hdit.diffusion.sigmas import LinearT
from hdit.interop import facebook_dit, k_diffusion
from hdit.interop.contents import Told
from hdit.interop.facebook_form import form_of
from hdit.interop.layout import foreign_shapes
from hdit.interop.settings import Settings
from hdit.nn.attention import Global, SelfAttention
from hdit.nn.rope import AxialRoPE
from hdit.protocols import NULL_LABEL, Cond
from hdit.runs.building import make_denoiser
from hdit.runs.conversion import convert
from hdit.runs.trained import Trained


def close(actual, expected, atol, rtol=0.0):
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=rtol)


def labels(y, model):
    """Theirs, whose null class is the last row."""
    return torch.where(y == model.shape.num_classes, NULL_LABEL, y)


# ---- HDiT ----------------------------------------------------------------------------------------


def in_float32(rope):
    return lambda pos: AxialRoPE.angles(deepcopy(rope).float(), pos).double()


def hdit_tiny(name, dtype=torch.float32):
    """-> (model, network, denoiser) of a checkpoint, as the reference computes in this dtype."""
    model = Trained.open(FOLDER / f"hdit_tiny_{name}.safetensors")
    network = model.network().to(dtype)
    if dtype == torch.float64:  # the reference has float32 angles there too, but for global ones
        for module in network.modules():
            if isinstance(module, SelfAttention) and not isinstance(module.spec, Global):
                module.rope.angles = in_float32(module.rope)
    return model, network, make_denoiser(network, model.config, model.shape)


@pytest.mark.parametrize(
    ("checkpoint", "case", "dtype", "atol"),
    [
        ("fp32", "fp32", torch.float32, 5e-5),  # float32 sums in another order
        ("fp32", "fp64", torch.float64, 1e-9),
        ("fp16", "fp16ckpt_fp32compute", torch.float32, 5e-5),
    ],
)
def test_k_diffusion_checkpoint_gives_the_reference_outputs(checkpoint, case, dtype, atol):
    """Neighborhood, shifted-window and global levels; the fp16 file has rounded buffers."""
    io = load("hdit_tiny_io.safetensors")
    model, network, denoiser = hdit_tiny(checkpoint, dtype)
    x, sigma, aug = (io[key].to(dtype) for key in ("x", "sigma", "aug_cond"))
    cond = Cond(labels(io["class_cond"], model), aug)
    with torch.no_grad():
        close(network(x, sigma.log() / 4, cond), io[f"{case}.model_out"], atol)
        close(denoiser(x, sigma, cond), io[f"{case}.denoised"], atol)


def test_k_diffusion_buffers_are_those_of_the_file_and_matter():
    model, network, _ = hdit_tiny("fp16")
    _, exact, _ = hdit_tiny("fp32")
    name = "down_levels.0.0.self_attn.core.rope.freqs"
    assert model.tensors()[name].dtype == torch.float16
    freqs, computed = network.state_dict()[name], exact.state_dict()[name]
    assert torch.equal(freqs, computed.half().float())
    assert not torch.equal(freqs, computed)


@pytest.mark.parametrize(("key", "scale"), [("", 1.0), ("_cfg1.3", 1.3)])
def test_k_diffusion_checkpoint_gives_the_reference_samples(key, scale):
    """Their 8 steps of DPM++ 2M SDE (Heun) at eta 0."""
    io = load("hdit_tiny_io.safetensors")
    model, _, denoiser = hdit_tiny("fp32")
    sampling = model.config.sampling
    sigmas = sampling.sigmas(8, *model.config.sigma_range(), model.config.beta_schedule)
    close(sigmas, io["sample.sigmas"], 0, rtol=2e-6)  # theirs are float32
    cond = Cond(labels(io["class_cond"], model))
    denoise = cfg(denoiser.bind(cond), denoiser.bind(cond.null()), scale)
    assert sampling.sampler.kind == "dpmpp_2m_sde"
    with torch.no_grad():
        x = sampling.sampler(denoise, io["sample.x_init"], io["sample.sigmas"].double())
    # float32, from noise of standard deviation 160
    close(x, io[f"sample.dpmpp_2m_sde_heun_eta0{key}"], 2e-4)


def test_k_diffusion_settings_map_to_ours():
    model = Trained.open(FOLDER / "hdit_tiny_fp32.safetensors")
    config, shape = model.config, model.shape
    assert shape.chw == (3, 32, 32)
    assert (shape.num_classes, shape.sigma_data) == (7, 0.5)
    assert config.sigma_range() == (0.01, 160.0)
    assert [level.attention.kind for level in config.model.levels] == [
        "neighborhood",
        "shifted_window",
        "global",
    ]
    assert [level.dropout for level in config.model.levels] == [0, 0, 0.1]
    assert config.diffusion.weighting.gamma == 4
    density = config.diffusion.density
    assert (density.sigma_min, density.sigma_max) == (1e-3, 1e3)
    assert (density.noise_d_low, density.noise_d_high) == (32, 32)
    training = config.training
    assert (training.optimizer.lr, training.optimizer.betas) == (5e-4, (0.9, 0.95))
    assert (training.ema.power, training.label_dropout) == (0.75, 0.1)


@pytest.mark.parametrize("augment", [0, 0.12])
def test_k_diffusion_data_are_cropped_and_mirrored_as_there(augment):
    """Resized once; mirrored where they are augmented, as the first of its changes."""
    raw = load("hdit_tiny_config_input.json")
    raw = raw | {"model": raw["model"] | {"augment_prob": augment}}
    data = k_diffusion.from_config(raw, "a.json")[0].data
    assert data.crop == "shorter_side"
    assert data.flip == (augment > 0)
    assert data.augment.probability == augment


def test_k_diffusion_config_reads_alike_as_written_and_as_filled_in():
    both = [
        k_diffusion.from_config(load(f"hdit_tiny_config_{name}.json"), "a.json")
        for name in ("input", "expanded")
    ]
    assert both[0] == both[1]


# ---- DiT -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit():
    """-> (model, network, denoiser, the known answers)."""
    model = Trained.open(FOLDER / "dit_tiny.safetensors")
    network = model.network()
    denoiser = make_denoiser(network, model.config, model.shape)
    return model, network, denoiser, load("dit_tiny_io.safetensors")


def test_dit_checkpoint_gives_the_reference_outputs(dit):
    model, network, _, io = dit
    with torch.no_grad():
        out = network(io["x"], io["t"].float(), Cond(labels(io["y"], model)))
    close(out, io["out"], 5e-6)


def guided(dit, key, scale):
    """Their guidance of the first three channels; they stack the halves with and without class."""
    model, _, denoiser, io = dit
    n = len(io[f"{key}.y"]) // 2
    cond = Cond(labels(io[f"{key}.y"][:n], model))
    return cfg(denoiser.bind(cond), denoiser.bind(cond.null()), float(scale), channels=3), n


def test_dit_guidance_of_three_channels_is_the_reference(dit):
    model, _, _, io = dit
    denoise, n = guided(dit, "cfg", io["cfg.scale"])
    sigma = model.config.beta_schedule.sigmas()[io["cfg.t"][:n]]
    x = io["cfg.x"][:n].double() * (1 + sigma.square()).sqrt()[:, None, None, None]
    with torch.no_grad():
        x0, v = denoise.moments(x.float(), sigma.float())
    eps = (x - x0) / sigma[:, None, None, None]
    # the error of x0 in float32 is over sigma, which is 0.06 at timestep 10
    close(eps, io["cfg.out"][:n, :4], 1e-4)
    close(v, io["cfg.out"][:n, 4:], 5e-6)


def test_dit_checkpoint_gives_the_reference_ddim_samples(dit):
    model, _, _, io = dit
    denoise, n = guided(dit, "ddim8", io["ddim8.cfg_scale"])
    table, sigma_schedule = model.config.beta_schedule, LinearT()
    sigmas = sigma_schedule(8, *sigma_schedule.sigma_range(table), table)
    x = io["ddim8.x_init"][:n] * model.config.diffusion.parametrization.start(sigmas[0].item())
    with torch.no_grad():
        x = ddim(denoise, x, sigmas)
    expected = io["ddim8.sample"][:n]
    # not clipped, so the images reach hundreds: relative to the largest
    close(x, expected, 5e-6 * expected.abs().max().item())


def test_dit_checkpoint_gives_the_reference_loss(dit):
    model, _, denoiser, io = dit
    sigma = model.config.beta_schedule.sigmas()[io["t"]]
    cond = Cond(labels(io["y"], model))
    with torch.no_grad():
        loss = denoiser.loss(
            io["x"], io["loss.noise"], sigma, cond, model.config.diffusion.weighting
        )
    close(loss, io["loss.loss"], 0, rtol=1e-4)  # they gather their tables as float32


# ---- names and shapes of published models --------------------------------------------------------


def test_flowers_names_and_shapes_are_those_of_k_diffusion():
    """oxford_flowers has 22,361,274 parameters."""
    raw = {
        "model": {
            "type": "image_transformer_v2",
            "input_channels": 3,
            "input_size": [256, 256],
            "patch_size": [4, 4],
            "depths": [2, 2, 4],
            "widths": [128, 256, 512],
            "sigma_data": 0.5,
            "sigma_min": 0.01,
            "sigma_max": 160,
            "sigma_sample_density": {"type": "cosine-interpolated"},
        }
    }
    config, shape, _ = k_diffusion.from_config(raw, "flowers.json")
    shapes = foreign_shapes(k_diffusion.layout(config, shape))
    expected = {name: tuple(s) for name, s in load("hdit_oxford_flowers_state_dict_keys.json")}
    assert shapes == expected


def test_dit_s_2_names_shapes_and_order_are_those_of_facebook():
    expected = {name: tuple(s) for name, s in load("dit_s2_state_dict_keys.json")}
    theirs = {name: torch.empty(s, device="meta") for name, s in expected.items()}
    config, shape = form_of(theirs, Settings({}, "dit.pt"), Told()).settings("dit.pt")
    assert config.model.num_heads == 6
    assert shape.chw == (4, 32, 32)
    shapes = foreign_shapes(facebook_dit.layout(config, shape))
    assert list(shapes.items()) == list(expected.items())


# ---- diffusers -----------------------------------------------------------------------------------


def dit_of_diffusers(folder):
    reason = "compares with diffusers, which the extra [dev] brings"
    diffusers = pytest.importorskip("diffusers", reason=reason)
    return diffusers.DiTTransformer2DModel.from_pretrained(folder).eval()


def test_diffusers_with_our_weights_gives_our_outputs_at_dits_frequencies(dit, tmp_path):
    """As it comes, diffusers takes other frequencies of the timestep than DiT was trained with."""
    io = dit[3]
    convert(FOLDER / "dit_tiny.safetensors", tmp_path / "theirs", "diffusers")
    theirs = dit_of_diffusers(tmp_path / "theirs")
    with torch.no_grad():
        stock = theirs(io["x"], io["t"], io["y"]).sample
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        out = theirs(io["x"], io["t"], io["y"]).sample
    close(out, io["out"], 5e-6)
    assert 1e-3 < (stock - out).abs().max() < 0.1, "if they agree, drop diffusers_dit.FREQUENCIES"
