"""diffusers' DiTTransformer2DModel: a folder with config.json and its weights.

Each of its blocks holds a copy of the timestep and class embedders, and q, k and v apart. Its
frequencies of the timestep embedding are 10000^(-i/127), where DiT's, and ours, are 10000^(-i/128):
the same weights give slightly other outputs there (up to diffusers 0.42 at least).
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit.config import RunConfig
from hdit.files import write_json
from hdit.interop.contents import Contents, InteropError
from hdit.interop.dit import check_dit, dit_spec, learns_variance, notes_of_null, settings
from hdit.interop.layout import Layout, Place, gather, make_layout, scatter
from hdit.interop.settings import Settings, shown
from hdit.interop.shards import find_weights, read_weights
from hdit.models import DiTSpec
from hdit.names import escape
from hdit.nn.embed import sincos_positions
from hdit.protocols import DataShape
from hdit.reading import read_object
from hdit.tensors import save_tensors

KIND = "diffusers"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
WEIGHTS = "diffusion_pytorch_model"
EPS = 1e-6
MLP_RATIO = 4.0
SCHEDULERS = r"(DDIM|DDPM|DEIS|DPMSolver|Euler|Heun|KDPM2|LMS|PNDM|UniPC)\w*Scheduler"
"""Those whose noise levels and predictions follow from betas; not those of flows, nor of EDM."""
FREQUENCIES = (
    "diffusers embeds timesteps with frequencies 10000^(-i/127), DiT and hdit with 10000^(-i/128); "
    "set norm1.emb.time_proj.downscale_freq_shift = 0 in each of its blocks for the same outputs"
)

NAMES = {
    "attn.qkv_proj": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.out_proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
"""Of the parts of a block."""
SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder": "class_embedder.embedding_table",
}
"""Of what each block has a copy of, under norm1.emb."""
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def layout(config: RunConfig, data_shape: DataShape) -> Layout:
    """Where each of our tensors lies in their file."""
    spec = dit_spec(config)
    c, p, depth = data_shape.channels, spec.patch_size, spec.depth

    def place(name: str, shape: tuple[int, ...]) -> Place:
        if name == "pos_embed":
            return Place((), ())
        module, _, part = name.rpartition(".")
        if module.startswith("blocks."):
            _, i, inner = module.split(".", 2)
            names = tuple(f"transformer_blocks.{i}.{n}.{part}" for n in NAMES[inner])
            return Place(names, (shape[0] // len(names), *shape[1:]), split=len(names) > 1)
        if module in SHARED:
            blocks = [f"transformer_blocks.{i}.norm1.emb" for i in range(depth)]
            return Place(tuple(f"{b}.{SHARED[module]}.{part}" for b in blocks), shape)
        if name == "x_embedder.proj.weight":  # their convolution
            shape = (shape[0], c, p, p)
        return Place((f"{ENDS[module]}.{part}",), shape)

    return make_layout(config, data_shape, place)


def positions(spec: DiTSpec, shape: DataShape) -> Tensor:
    """The table that diffusers computes: (h w d)."""
    h, w = spec.grid(shape)
    return sincos_positions(h, w, spec.width)


def from_config(
    raw: dict[str, Any],
    schedule: dict[str, Any] | None,
    origin: str,
    factor: int | None = None,
) -> tuple[RunConfig, DataShape, tuple[str, ...]]:
    """-> (our config, the data shape, notes); absent settings are diffusers' defaults.

    `factor` is how many times larger than its latents images are, if known.
    """
    s = Settings(raw, origin)
    s.fixed("_class_name", *CLASSES)
    s.fixed("norm_type", "ada_norm_zero")
    s.fixed("activation_fn", "gelu-approximate")
    s.fixed("attention_bias", True)
    s.fixed("norm_elementwise_affine", False)
    notes = [FREQUENCIES]
    eps = s.number("norm_eps", 1e-5)
    s.fixed("norm_eps", 1e-5, EPS)
    if eps != EPS:
        notes.append(f"norm_eps = {eps:g} of the second norms was left out: it is {EPS:g} here")
    if dropout := s.number("dropout", 0.0):
        notes.append(f"dropout = {dropout:g} was left out: DiT has none here")
    heads = s.integer("num_attention_heads", 16, low=1)
    channels = s.integer("in_channels", 4, low=1)
    model = {
        "patch_size": s.integer("patch_size", 2, low=1),
        "depth": s.integer("num_layers", 28, low=1),
        "width": heads * s.integer("attention_head_dim", 72, low=1),
        "num_heads": heads,
        "mlp_ratio": MLP_RATIO,
    }
    learned = learns_variance(channels, s.integer("out_channels", channels), origin)
    size = s.integer("sample_size", 32, low=1)
    if s.text("_class_name", CLASSES[0]) != CLASSES[0]:  # an older class, whose default grows
        scale = s.number("interpolation_scale", max(size // 64, 1))
        if scale != 1:
            raise s.error("interpolation_scale", f"is {scale:g}, and positions are 1 apart here")
    classes = s.integer("num_embeds_ada_norm", 1000, low=1)
    config, shape = settings(
        model, channels, size, classes, learned, origin, schedule=schedule, factor=factor
    )
    return config, shape, tuple(notes)


def _schedule(folder: Path) -> dict[str, Any] | None:
    """Beta schedule of a pipeline, if there is one. Raises InteropError where it is not DDPM's."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    s = Settings(read_object(path), str(path))
    name = s.text("_class_name", "DDPMScheduler")
    if not re.fullmatch(SCHEDULERS, name):
        raise s.error("_class_name", f"{shown(name)} is no scheduler of DDPM's noise levels")
    s.fixed("prediction_type", "epsilon")
    s.fixed("beta_schedule", "linear")
    if s.has("trained_betas"):
        raise s.error("trained_betas", "a table of betas has no counterpart here")
    s.fixed("rescale_betas_zero_snr", False)
    steps = s.integer("num_train_timesteps", 1000, low=1)
    scale = steps / 1000  # ours are scaled by its inverse
    start, end = s.number("beta_start", 1e-4), s.number("beta_end", 2e-2)
    return {
        "kind": "linear",
        "steps": steps,
        "beta_start": start * scale,
        "beta_end": end * scale,
    }


def _vae(folder: Path) -> tuple[int | None, tuple[str, ...]]:
    """-> (factor of a pipeline's VAE, a note on where it lies), or nothing where there is none."""
    path = folder / "vae" / "config.json"
    if not path.is_file():
        return None, ()
    levels = Settings(read_object(path), str(path)).entries("block_out_channels").raw
    note = f"to sample with the VAE of its pipeline: --set space.vae={path.parent}"
    return 2 ** max(0, len(levels) - 1), (note,)


def find_folder(path: Path) -> Path | None:
    """The folder of the model: this one, or transformer/ of a pipeline; None if it is neither."""
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    return None


def read(path: Path) -> Contents:
    """The model of a folder, or of a pipeline's transformer/."""
    folder = find_folder(path)
    assert folder is not None, "detected before"
    config_file = folder / "config.json"
    pipeline = path if folder != path else path.parent
    factor, of_vae = _vae(pipeline)
    config, shape, notes = from_config(
        read_object(config_file), _schedule(pipeline), str(config_file), factor
    )
    notes += of_vae
    found = find_weights(folder, WEIGHTS)
    weights, tensors = found.path, read_weights(found)
    table = {"pos_embed": positions(dit_spec(config), shape)}
    ours = gather(weights, layout(config, shape), tensors, config, shape, computed=table)
    classes = _classes(pipeline, shape.num_classes)
    origin = f"{KIND} folder {path.name}"
    return Contents(config, shape, classes, {"given": ours}, origin, notes=notes + found.notes)


def _classes(pipeline: Path, number: int) -> tuple[str, ...]:
    """The first names in a pipeline's id2label, or numbers; one that comes twice has both."""
    plain = tuple(str(i) for i in range(number))
    index = pipeline / "model_index.json"
    raw = read_object(index) if index.is_file() else {}
    labels = Settings(raw, str(index)).table("id2label")
    if set(labels.raw) != set(plain):
        return plain
    names = [escape(labels.text(i, i).split(",")[0].strip()) or i for i in plain]
    count = Counter(names)
    return tuple(n if count[n] == 1 else f"{n} ({i})" for i, n in zip(plain, names, strict=True))


def write(model: Contents, folder: Path) -> tuple[str, ...]:
    """Writes config.json and the weights -> notes."""
    spec = check_dit(KIND, model, {"mlp_ratio": MLP_RATIO})
    shape = model.shape
    table = positions(spec, shape)
    if not torch.allclose(model.state_dict["pos_embed"].float(), table, atol=1e-3):
        raise InteropError(
            f"{KIND} cannot hold this model ({model.origin}): its pos_embed is not the table of "
            "sines that is computed there"
        )
    tensors = scatter(layout(model.config, shape), model.state_dict)
    raw = {
        "_class_name": CLASSES[0],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": spec.width // spec.num_heads,
        "dropout": 0.0,
        "in_channels": shape.channels,
        "norm_elementwise_affine": False,
        "norm_eps": EPS,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": spec.num_heads,
        "num_embeds_ada_norm": shape.num_classes,
        "num_layers": spec.depth,
        "out_channels": model.config.output_channels(shape),
        "patch_size": spec.patch_size,
        "sample_size": shape.height,
        "upcast_attention": False,
    }
    folder.mkdir()
    write_json(folder / "config.json", raw)
    save_tensors(tensors, folder / f"{WEIGHTS}.safetensors", {"format": "pt"})
    return (FREQUENCIES, *notes_of_null(model.config))
