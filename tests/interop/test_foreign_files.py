"""What lies in the files of other projects: wrappers, containers, shards, flows, wrong types."""

import copy
import json
import math
import re
import shutil
import zipfile
from argparse import Namespace
from itertools import pairwise

import pytest
import torch
from known_answers import FOLDER, load
from safetensors.torch import load_file, save_file

from hdit.diffusion.samplers import euler
from hdit.errors import UserError
from hdit.interop import InteropError, diffusers_dit, k_diffusion
from hdit.interop.contents import Told
from hdit.interop.facebook_form import form_of
from hdit.interop.settings import Settings
from hdit.interop.sit import as_flow
from hdit.protocols import Cond
from hdit.runs.conversion import convert
from hdit.runs.trained import Trained
from hdit.tensors import NotFiniteError

HEADS = 5  # of dit_tiny, which has 7 classes and a null class, and latents of 4 x 8 x 8
ROWS = 8
LAST = "final_layer.linear.weight"


def ignore(text):
    """What was assumed is not the matter here."""


def opened(saved, tmp_path, **told):
    torch.save(saved, tmp_path / "dit.pt")
    return Trained.open(tmp_path / "dit.pt", ignore, num_heads=HEADS, **told)


def refused(saved, tmp_path, **told):
    with pytest.raises(UserError) as caught:
        opened(saved, tmp_path, **told)
    assert "dit.pt: " in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tiny():
    return dict(load("dit_tiny.safetensors"))


# ---- wrappers and containers ---------------------------------------------------------------------

NAMES = {
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled blocks": lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
    "lightning": lambda name: f"net.model.{name}",
    "checkpointed": lambda name: name.replace(".attn.", "._checkpoint_wrapped_module.attn."),
}


@pytest.mark.parametrize("names", NAMES)
def test_wrappers_of_a_dit_are_seen_through(names, tiny, tmp_path):
    model = opened({NAMES[names](name): t for name, t in tiny.items()}, tmp_path)
    assert torch.equal(model.tensors()[LAST], tiny[LAST])


def test_wrappers_of_an_hdit_are_seen_through(tmp_path):
    path = FOLDER / "hdit_tiny_fp32.safetensors"
    config = json.dumps(load("hdit_tiny_config_input.json"))
    wrapped = {f"module._orig_mod.{name}": t for name, t in load_file(path).items()}
    save_file(wrapped, tmp_path / "theirs.safetensors", {"config": config})
    ours, plain = Trained.open(tmp_path / "theirs.safetensors"), Trained.open(path)
    assert all(torch.equal(t, plain.tensors()[name]) for name, t in ours.tensors().items())


def test_count_of_an_averaged_model_is_no_weight(tiny, tmp_path):
    saved = {f"module.{name}": t for name, t in tiny.items()} | {"n_averaged": torch.tensor(3)}
    assert torch.equal(opened(saved, tmp_path).tensors()[LAST], tiny[LAST])


@pytest.mark.parametrize("beside", ["ema_model", "vae"])
def test_model_with_others_beside_it_is_named_by_its_prefix(beside, tiny, tmp_path):
    saved = {f"net.{name}": t for name, t in tiny.items()}
    saved |= {f"{beside}.{name}": t for name, t in tiny.items() if beside == "ema_model"}
    message = refused(saved | {f"{beside}.conv.bias": torch.ones(1)}, tmp_path)
    assert "has a model under 'net.' and more beside it" in message
    assert f"'{beside}." in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged: it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "is a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
def test_file_that_stands_in_for_weights_is_named(content, reason, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InteropError, match=rf"{name}: {reason}"):
        Trained.open(tmp_path / name)


def test_pickle_of_another_class_is_refused_without_advice_to_execute_it(tmp_path):
    message = refused({"model": torch.nn.Linear(1, 1)}, tmp_path)
    assert "GLOBAL torch.nn.modules.linear.Linear" in message
    assert "weights_only" not in message
    assert "add_safe_globals" not in message


def test_two_tensors_of_one_name_are_refused(tiny, tmp_path):
    message = refused(tiny | {f"_orig_mod.{LAST}": tiny[LAST]}, tmp_path)
    assert f"has two tensors {LAST}" in message


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("ema", "ema"),
        ("model", "model"),
        ("state_dict", "model"),
        ("ema_state_dict", "ema"),
        ("module", "model"),
        ("params_ema", "ema"),
    ],
)
def test_set_of_weights_is_found_by_its_key(key, name, tiny, tmp_path):
    model = opened({key: tiny, "opt": {"state": {}}, "step": 7}, tmp_path)
    assert model.weights() == name


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1, 2], "is no state dict of tensors, but list"),
        ({}, "is no state dict of tensors: it is empty"),
        ({"ema": {}}, "ema: is no state dict of tensors: it is empty"),
        ({"weights": {}, "step": 3}, "it has 'weights', a dict"),
        ({"ema": {"a": torch.ones(1), "b": [1]}}, "ema: is no state dict of tensors: it has 'b'"),
        ({"model": {"a": torch.ones(1)}, "args": [1]}, "args: must be a table of settings"),
    ],
)
def test_what_is_no_state_dict_is_named(saved, message, tmp_path):
    assert message in refused(saved, tmp_path)


def test_other_transformer_is_refused_by_the_tensors_that_a_dit_has_not(tiny, tmp_path):
    other = {name.replace("pos_embed", "rope.freqs"): t for name, t in tiny.items()}
    message = refused(other, tmp_path)
    assert "is no DiT of facebook's: pos_embed missing; it has rope.freqs" in message
    message = refused(tiny | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, tmp_path)
    assert "blocks.0.attn.q_norm.weight: unknown, [16]" in message


# ---- tensors -------------------------------------------------------------------------------------

UNUSABLE = {
    "is larger than what the file holds of it": lambda t: t[:1, :1].clone().expand(t.shape),
    "must hold floats of 16 bits or more, got int32": lambda t: t.to(torch.int32),
    "must hold floats of 16 bits or more, got float8_e5m2": lambda t: t.to(torch.float8_e5m2),
    "is sparse, quantized or without values": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_tensor_that_is_no_array_of_floats_is_named(message, tiny, tmp_path):
    said = refused(tiny | {LAST: UNUSABLE[message](tiny[LAST])}, tmp_path)
    assert f"{LAST}: {message}" in said


NOT_FINITE = {
    "1 of 2,560": lambda t: t.clone().index_put_((torch.tensor(3), torch.tensor(4)), NAN),
    "2,560 of 2,560": lambda t: (t.double() + 2) * 1e300,  # infinite in float32
}
NAN = torch.tensor(math.nan)


@pytest.mark.parametrize("share", NOT_FINITE)
def test_tensor_that_is_not_finite_is_named(share, tiny, tmp_path):
    torch.save(tiny | {LAST: NOT_FINITE[share](tiny[LAST])}, tmp_path / "dit.pt")
    message = rf"dit\.pt: the tensor '{re.escape(LAST)}' has {share} values that are not finite"
    with pytest.raises(NotFiniteError, match=message):
        Trained.open(tmp_path / "dit.pt", ignore, num_heads=HEADS)


@pytest.mark.parametrize("name", ["dit.PT", "dit.Safetensors"])
def test_suffix_of_upper_case_is_that_of_lower_case(name, tiny, tmp_path):
    save = torch.save if name == "dit.PT" else save_file
    save(tiny, tmp_path / name)
    model = Trained.open(tmp_path / name, ignore, num_heads=HEADS)
    assert torch.equal(model.tensors()[LAST], tiny[LAST])


def test_compressed_file_is_refused_unread(tiny, tmp_path):
    torch.save(tiny, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "dit.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
        packed.writestr("more", bytes(2**20))
    with pytest.raises(InteropError, match=r"dit\.pt: refused: is compressed, and unpacks to"):
        Trained.open(tmp_path / "dit.pt")


# ---- flows ---------------------------------------------------------------------------------------

SIT = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "num_classes": 7}


@pytest.fixture
def velocity(tiny, tmp_path):
    """SiT's v(x, s), of the first half of dit_tiny's output; s goes from noise (0) to data (1)."""
    network = Trained.open(FOLDER / "dit_tiny.safetensors", ignore).network()

    def call(x, s, labels):
        with torch.no_grad():
            return network(x, s, Cond(labels))[:, :4]

    return call


@pytest.mark.parametrize("kind", [Namespace, dict])
@pytest.mark.parametrize("learned", [True, False])
def test_sit_denoises_along_its_velocity(kind, learned, velocity, tiny, tmp_path):
    """x = s x0 + (1 - s) noise and v = x0 - noise, so x0 = x + (1 - s) v."""
    if not learned:
        for name in (LAST, "final_layer.linear.bias"):
            tiny[name] = tiny[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)  # patches of 2x2
    saved = {"ema": tiny, "model": tiny, "args": kind(**SIT)}
    denoiser = opened(saved, tmp_path).denoiser()
    s, labels = torch.tensor([0.01, 0.4, 0.93]), torch.tensor([0, 5, -1])
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = s[:, None, None, None]
    expected = x + (1 - time) * velocity(x, s, labels)
    with torch.no_grad():
        # at sigma, the input that is scaled to unit signal
        denoised = denoiser(x / time, (1 - s) / s, Cond(labels))
    torch.testing.assert_close(denoised, expected, atol=2e-5, rtol=0)  # float32 of values near 4


def test_sit_samples_as_its_own_euler_steps(velocity, tiny, tmp_path):
    model = opened({"ema": tiny, "args": SIT}, tmp_path)
    times = torch.tensor([0.001, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, x = torch.tensor([1, 6]), 0.999 * noise
    for s, after in pairwise(times):
        x = x + (after - s).float() * velocity(x, s.float().expand(2), labels)
    sigmas = (1 - times) / times
    with torch.no_grad():
        ours = euler(model.denoiser().bind(Cond(labels)), sigmas[0].float() * noise, sigmas)
    torch.testing.assert_close(ours, x, atol=2e-3, rtol=0)  # from float32 noise of 999


def test_first_layer_of_a_sit_sees_its_time_backwards(tiny):
    """cos and sin of t 10000^(-i/128): a test of whole networks allows errors as large as these."""

    def seen(weight, time):
        angles = time * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        return weight.double() @ torch.cat([angles.cos(), angles.sin()])

    name = "t_embedder.mlp.0.weight"
    turned = as_flow(tiny)[name]
    for time in (0.0, 0.3, 1.0):
        expected = seen(tiny[name], 1 - time)
        torch.testing.assert_close(seen(turned, time), expected, atol=2e-6, rtol=0)


def test_sit_is_sampled_and_trained_as_rectified_flow(tiny, tmp_path):
    model = opened({"ema": tiny, "args": SIT | {"image_size": 64}}, tmp_path)
    diffusion, sampling = model.config.diffusion, model.config.sampling
    assert (diffusion.parametrization.kind, diffusion.density.kind) == ("flow", "uniform_flow")
    assert (diffusion.weighting.kind, diffusion.learned_variance) == ("flow", False)
    sigmas = sampling.sigmas(sampling.steps, *model.config.sigma_range(), None)
    times = sigmas / (1 + sigmas)
    torch.testing.assert_close(times.diff(), torch.full((50,), -0.02, dtype=torch.float64), **CLOSE)


CLOSE = {"atol": 3e-5, "rtol": 0}  # the first time is 0.999, not 1


def test_half_that_was_never_trained_makes_no_dit_of_a_sit(tiny, tmp_path):
    """The published SiT is a bare state dict with the names and shapes of DiT-XL/2."""
    for name in (LAST, "final_layer.linear.bias"):
        tiny[name] = tiny[name].clone()
        tiny[name].unflatten(0, (4, 8))[:, 4:] = 0
    assert "was never trained, as in a SiT" in refused(tiny, tmp_path)
    told = opened(tiny, tmp_path, prediction="velocity")
    assert told.config.diffusion.parametrization.kind == "flow"
    assert "is a SiT" in refused(
        {"ema": tiny, "args": {"model": "SiT-tiny"}}, tmp_path, prediction="noise"
    )
    told = opened(tiny, tmp_path, prediction="noise")
    assert told.config.diffusion.parametrization.kind == "eps_vp"


def test_flow_that_a_dit_cannot_hold_is_refused_with_it(tiny, tmp_path):
    opened({"ema": tiny, "args": SIT}, tmp_path)
    with pytest.raises(InteropError, match=r"parametrization\.kind = 'flow': it has 'eps_vp'"):
        convert(tmp_path / "dit.pt", tmp_path / "out.pt", "facebook-dit", num_heads=HEADS)


@pytest.mark.parametrize(("args", "told"), [(SIT, "noise"), ({"model": "DiT-tiny"}, "velocity")])
def test_prediction_that_the_file_contradicts_is_refused(args, told, tiny, tmp_path):
    message = refused({"ema": tiny, "args": args}, tmp_path, prediction=told)
    assert f"got --prediction {told}" in message


def test_prediction_of_another_name_is_refused(tiny, tmp_path):
    with pytest.raises(InteropError, match="--prediction: must be noise or velocity, got 'x0'"):
        opened(tiny, tmp_path, prediction="x0")


# ---- what a file does not tell -------------------------------------------------------------------


def assumed(saved, tmp_path, **told):
    torch.save(saved, tmp_path / "dit.pt")
    said = []
    model = Trained.open(tmp_path / "dit.pt", said.append, num_heads=HEADS, **told)
    return model, said


def test_classes_of_a_bare_dit_are_assumed_aloud(tiny, tmp_path):
    model, said = assumed(tiny, tmp_path)
    assert model.shape.num_classes == ROWS - 1
    [text] = said
    assert "table of 8 rows was taken for 7 classes and a null class" in text
    assert "--classes 8" in text
    assert not assumed(tiny, tmp_path, num_classes=7)[1]
    assert not assumed({"ema": tiny, "args": {"num_classes": 7}}, tmp_path)[1]


@pytest.mark.parametrize("args", [{}, {"num_classes": 8}, {"class_dropout_prob": 0}])
def test_dit_without_a_null_class_has_all_of_its_classes(args, tiny, tmp_path):
    told = {} if args else {"num_classes": ROWS}
    model, said = assumed({"ema": tiny, "args": args}, tmp_path, **told)
    assert not said
    assert model.shape.num_classes == len(model.classes) == ROWS
    table, theirs = model.tensors()["y_embedder.weight"], tiny["y_embedder.embedding_table.weight"]
    assert torch.equal(table[:ROWS], theirs)
    torch.testing.assert_close(table[ROWS], theirs.mean(0))
    assert model.config.training.label_dropout == 0
    assert "guidance and samples without a class are not the model's" in model.held.notes[0]


@pytest.mark.parametrize(
    "args", [{"model": {"params": {"num_classes": 8}}}, {"params": {"num_classes": 8}}]
)
def test_settings_in_a_table_of_the_model_are_read(args, tiny, tmp_path):
    assert assumed({"ema": tiny, "args": args}, tmp_path)[0].shape.num_classes == ROWS


@pytest.mark.parametrize("args", [{}, {"num_classes": 0}, {"num_classes": 1}])
def test_dit_of_one_row_has_one_class_and_no_null_class(args, tiny, tmp_path):
    table = "y_embedder.embedding_table.weight"
    model, _ = assumed({"ema": tiny | {table: tiny[table][:1]}, "args": args}, tmp_path)
    assert model.shape.num_classes == 1
    assert model.config.training.label_dropout == 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (
            {"mlp_ratio": 2.0},
            "mlp_ratio: is said to be 2, but its tensors give a hidden width of 320",
        ),
        ({"class_dropout_prob": 2}, "class_dropout_prob: must be from 0 to 1, got 2"),
        ({"image_size": [64, 32], "num_heads": HEADS}, r"image_size: must be square, got [64, 32]"),
        ({"num_heads": 3}, "num_heads: 3 does not divide the width 80"),
    ],
)
def test_arguments_that_tensors_contradict_are_named(args, reason, tiny, tmp_path):
    torch.save({"ema": tiny, "args": args}, tmp_path / "dit.pt")
    with pytest.raises(InteropError, match=re.escape(reason)):
        Trained.open(tmp_path / "dit.pt", ignore)


@pytest.mark.parametrize(
    ("args", "vae"), [({}, "ema"), ({"vae": "mse"}, "mse"), ({"vae": []}, "ema")]
)
def test_vae_is_the_one_that_the_arguments_name(args, vae, tiny, tmp_path):
    model = opened({"ema": tiny, "args": args | {"image_size": [64, 64]}}, tmp_path)
    assert model.config.space.vae == f"stabilityai/sd-vae-ft-{vae}"


@pytest.mark.parametrize("number", [6, 9])
def test_classes_that_do_not_fit_the_table_are_refused(number, tiny, tmp_path):
    message = refused(tiny, tmp_path, num_classes=number)
    assert f"for 7 classes and a null class, or 8 classes; got --classes {number}" in message


def test_assumption_is_a_warning_of_sample_and_a_note_of_convert(hdit, tiny, tmp_path):
    torch.save(tiny, tmp_path / "dit.pt")
    status, _, err = hdit("convert", tmp_path / "dit.pt", tmp_path / "a", "--num-heads", HEADS)
    assert status == 0, err
    assert f"note: {tmp_path}/dit.pt: its class table of 8 rows" in err
    options = ["--num-heads", HEADS, "--classes", ROWS]
    status, _, err = hdit("convert", tmp_path / "dit.pt", tmp_path / "b", *options)
    assert status == 0, err
    assert "class table" not in err


# ---- sizes ---------------------------------------------------------------------------------------


def shapes(channels, size, p=2, width=384, depth=12, learned=True):
    """DiT-S of other data, without values."""
    out = channels * (2 if learned else 1)
    found = {name: torch.empty(s, device="meta") for name, s in load("dit_s2_state_dict_keys.json")}
    return found | {
        "x_embedder.proj.weight": torch.empty(width, channels, p, p, device="meta"),
        "pos_embed": torch.empty(1, (size // p) ** 2, width, device="meta"),
        LAST: torch.empty(p * p * out, width, device="meta"),
    }


@pytest.mark.parametrize(
    ("channels", "size", "facts", "expected"),
    [
        # (kind of space, side of the image, guided channels, whether the VAE of DiT is named)
        (4, 32, {}, ("latent", 256, 3, True)),
        (2, 16, {}, ("latent", 128, None, False)),
        (16, 16, {"image_size": 256}, ("latent", 256, 3, False)),
        (3, 64, {"image_size": 256}, ("latent", 256, None, False)),
        (3, 32, {}, ("pixel", 32, None, False)),
        (3, 32, {"image_size": 32}, ("pixel", 32, None, False)),
        (1, 32, {}, ("pixel", 32, None, False)),
    ],
)
def test_channels_and_sizes_of_any_dit_are_taken(channels, size, facts, expected):
    form = form_of(shapes(channels, size), Settings(facts, "dit.pt"), Told())
    config, shape = form.settings("dit.pt")
    assert shape.chw == (channels, size, size)
    guided = config.sampling.guidance.channels
    named = getattr(config.space, "vae", None) is not None
    assert (config.space.kind, config.data.shape[1], guided, named) == expected


# ---- wrong types ---------------------------------------------------------------------------------

WRONG = ["x", True, [1], {"a": 1}, -1, 1e40, 10**400, math.nan, [], {}, "\ud800", [None] * 3]


def places(table, path=()):
    """The path of every setting, tables too."""
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[0]
            yield from places(value, (*path, key, 0))
        elif isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(raw, path, value):
    raw = copy.deepcopy(raw)
    table = raw
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return raw


FULL = copy.deepcopy(load("hdit_tiny_config_expanded.json"))
FULL["lr_sched"] = {"type": "inverse", "warmup": 0.9, "inv_gamma": 1.0, "power": 0.5, "min_lr": 0}
DIFFUSERS = {
    "_class_name": "DiTTransformer2DModel",
    "norm_type": "ada_norm_zero",
    "norm_eps": 1e-6,
    "dropout": 0.0,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 3,
}
ARGS = dict.fromkeys(
    [
        *("model", "image_size", "num_classes", "path_type", "prediction", "learn_sigma"),
        *("class_dropout_prob", "num_heads", "depth", "objective", "mlp_ratio", "vae"),
    ]
)
READERS = {
    "k-diffusion": (FULL, lambda raw: k_diffusion.from_config(raw, "file")),
    "diffusers": (DIFFUSERS, lambda raw: diffusers_dit.from_config(raw, None, "file")),
    "facebook": (
        ARGS,
        lambda raw: form_of(shapes(4, 32), Settings(raw, "file"), Told()).settings("file"),
    ),
}


def outcome(read, raw):
    """The message that reading gives, or one that says nothing."""
    try:
        read(raw, "file")
    except UserError as error:
        return str(error)
    return "file:\n, density, and all of it, can be read"


@pytest.mark.parametrize(
    ("reader", "path"),
    [(name, path) for name, (raw, _) in READERS.items() for path in places(raw)],
    ids=str,
)
def test_setting_of_any_type_is_read_or_refused_by_its_name(reader, path):
    raw, read = READERS[reader]
    for value in WRONG:
        text = outcome(lambda raw, name: read(raw), changed(raw, path, value))
        assert text.startswith(("file: ", "file:\n")), text
        assert len(text) < 2000
        if text.startswith("file: "):
            assert str(path[-1]) in text or str(path[0]) in text


@pytest.mark.parametrize("density", sorted(k_diffusion.DENSITIES))
def test_density_of_any_type_is_read_or_refused_by_its_name(density):
    keys = ("mean", "loc", "std", "scale", "scale_1", "min_value", "max_value", "image_d")
    for key in (*keys, "noise_d_low", "noise_d_high"):
        for value in (*WRONG, 0):
            table = {"type": density, key: value}
            raw = changed(FULL, ("model", "sigma_sample_density"), table)
            assert "density" in outcome(k_diffusion.from_config, raw)


def test_simple_loss_of_k_diffusion_ignores_scales():
    raw = changed(FULL, ("model", "loss_config"), "simple")
    plain, _, _ = k_diffusion.from_config(raw, "file")
    scaled, _, notes = k_diffusion.from_config(changed(raw, ("model", "loss_scales"), 3), "file")
    assert scaled.diffusion == plain.diffusion
    assert scaled.diffusion.loss_scales == 1
    assert any("model.loss_scales = 3 was left out" in note for note in notes)


def test_key_cannot_add_lines_to_the_config_that_is_made_of_it(tmp_path):
    raw = FULL | {"x\n[training]\nimages = 5 #": 1, "dataset": {"location": "b\u00e4r\n"}}
    text, _ = k_diffusion.config_to_toml(tmp_path / "a.json", raw)
    assert text.count("[training]\n") == 1
    assert "images = 5" not in text.splitlines()


# ---- what diffusers' settings imply --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        *(("DDIMScheduler", True), ("DPMSolverMultistepScheduler", True)),
        *(("FlowMatchEulerDiscreteScheduler", False), ("EDMEulerScheduler", False)),
        ("CMStochasticIterativeScheduler", False),
    ],
)
def test_scheduler_of_other_noise_levels_is_refused(name, fits, folder):
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    (folder / "transformer").mkdir()
    for path in [p for p in folder.iterdir() if p.is_file()]:
        path.rename(folder / "transformer" / path.name)
    if fits:
        assert same(folder)
        return
    with pytest.raises(UserError, match=f"_class_name: '{name}' is no scheduler of DDPM's"):
        Trained.open(folder)


@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [
        ("DiTTransformer2DModel", {"sample_size": 128}, None),
        ("Transformer2DModel", {"sample_size": 64}, None),
        ("Transformer2DModel", {"sample_size": 128}, 2),
        ("Transformer2DModel", {"sample_size": 128, "interpolation_scale": 1.0}, None),
        ("Transformer2DModel", {"interpolation_scale": 0.5}, 0.5),
    ],
)
def test_positions_that_diffusers_scales_are_refused(name, changes, scale):
    """Its older class divides them by sample_size // 64, unless the config says otherwise."""
    raw = DIFFUSERS | {"_class_name": name} | changes
    if scale is None:
        diffusers_dit.from_config(raw, None, "file")
        return
    with pytest.raises(InteropError, match=f"file: interpolation_scale: is {scale}, and"):
        diffusers_dit.from_config(raw, None, "file")


# ---- shards --------------------------------------------------------------------------------------

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    """dit_tiny as diffusers has it, in one file."""
    convert(FOLDER / "dit_tiny.safetensors", tmp_path / "theirs", "diffusers")
    return tmp_path / "theirs"


def same(folder, dtype=torch.float32):
    theirs = load("dit_tiny.safetensors")[LAST]
    return torch.equal(Trained.open(folder).tensors()[LAST], theirs.to(dtype))


def shard(folder, variant="", suffix="safetensors", index="{s}.index{v}.json", name="{v}-{i}"):
    """Splits the one file in two, named as `name` and `index` say."""
    v = f".{variant}" if variant else ""
    path = folder / f"{STEM}.safetensors"
    tensors, placed = load_file(path), {}
    dtype = torch.float16 if variant else torch.float32
    tensors = {key: t.to(dtype) for key, t in tensors.items()}
    path.unlink()
    for i in (0, 1):
        part = dict(list(tensors.items())[i::2])
        file = f"{STEM}{name.format(v=v, i=f'0000{i + 1}-of-00002')}.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(
            part, folder / file
        )
        placed |= dict.fromkeys(part, file)
    raw = {"metadata": {"total_size": 1}, "weight_map": placed}
    index = folder / f"{STEM}.{index.format(s=suffix, v=v)}"
    index.write_text(json.dumps(raw))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_by_their_index(suffix, folder):
    shard(folder, suffix=suffix)
    assert same(folder)


@pytest.mark.parametrize(
    ("index", "name"),
    [("{s}.index{v}.json", "-{i}{v}"), ("{s}.index{v}.json", "{v}-{i}")],
)
def test_shards_of_a_variant_are_read_by_their_index(index, name, folder):
    shard(folder, "fp16", index=index, name=name)
    assert same(folder, torch.float16)
    assert any("variant fp16" in note for note in Trained.open(folder).held.notes)


def test_full_precision_is_taken_where_it_is_there(folder):
    path = folder / f"{STEM}.safetensors"
    half = {name: t.half() for name, t in load_file(path).items()}
    save_file(half, folder / f"{STEM}.fp16.safetensors")
    assert same(folder)
    path.unlink()
    assert same(folder, torch.float16)


def test_variants_that_may_differ_in_more_than_precision_are_asked_for(folder):
    shutil.copy(folder / f"{STEM}.safetensors", folder / f"{STEM}.ema.safetensors")
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.non_ema.safetensors")
    with pytest.raises(InteropError, match=r"several variants .*\.ema\..*\.non_ema\."):
        Trained.open(folder)
    (folder / f"{STEM}.non_ema.safetensors").unlink()
    assert same(folder)


def test_shard_that_is_missing_or_elsewhere_is_named(folder):
    index = shard(folder)
    raw = json.loads(index.read_text())
    name, file = next(iter(raw["weight_map"].items()))
    for other, message in (
        ("none.safetensors", r"none\.safetensors: missing"),
        ("../theirs/" + file, "names '../theirs/.*', which is no file beside it"),
        ("config.json", r"names 'config\.json', which is no file beside it"),
        (5, r"weight_map\..*: must be a text, got 5"),
    ):
        index.write_text(json.dumps({"weight_map": raw["weight_map"] | {name: other}}))
        with pytest.raises(UserError, match=message):
            Trained.open(folder)
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {"x.weight": file}}))
    with pytest.raises(UserError, match=r"has no x\.weight, but"):
        Trained.open(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_as_diffusers_saves_them_are_read(variant, folder, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the extra [dev] brings diffusers")
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB", variant=variant)
    assert len(list((tmp_path / "saved").glob(f"{STEM}*-of-*.safetensors"))) > 1
    assert same(tmp_path / "saved")


def test_pipeline_tells_where_its_vae_lies_and_its_factor(folder, tmp_path):
    vae = tmp_path / "pipeline" / "vae"
    vae.mkdir(parents=True)
    (vae / "config.json").write_text('{"block_out_channels": [8, 8, 8]}')
    folder.rename(vae.with_name("transformer"))
    model = Trained.open(vae.parent)
    assert model.config.space.factor == 4
    assert f"--set space.vae={vae}" in model.held.notes[-1]
