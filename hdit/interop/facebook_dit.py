"""Facebook's DiT and SiT: the .pt of a release or a training, or its tensors in safetensors.

`facebook_form` says what their shapes and arguments tell. No pickle is executed: the one class that
is allowed is argparse.Namespace, which their training saves.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit.config import RunConfig
from hdit.interop import sit
from hdit.interop.contents import Contents, InteropError, Told
from hdit.interop.dit import check_dit, dit_spec, notes_of_null
from hdit.interop.facebook_form import HEADS, THEIRS, Form, form_of
from hdit.interop.files import check_plain, unwrapped
from hdit.interop.layout import Layout, Place, gather, make_layout, scatter
from hdit.interop.settings import Settings, read_table, shown
from hdit.protocols import DataShape
from hdit.tensors import save_pickled

KIND = "facebook-dit"
MARK = "x_embedder.proj.weight"
"""A tensor that tells its checkpoints from others."""

SETS = {
    "ema": ("ema", "ema_state_dict", "model_ema", "params_ema"),
    "model": ("model", "model_state_dict", "state_dict", "module", "net", "params"),
}
"""Our names of sets of weights, and those of trainers' checkpoints."""

ARGUMENTS = ("args", "config", "hyper_parameters")
"""Where trainers' checkpoints keep their settings."""

NO_NULL = (
    "it was trained without a null class, whose row is the mean of all classes here: guidance and "
    "samples without a class are not the model's"
)


def their_name(name: str) -> str:
    """Our name of a parameter or buffer -> theirs."""
    for ours, theirs in (
        ("y_embedder.", "y_embedder.embedding_table."),
        (".qkv_proj.", ".qkv."),
        (".attn.out_proj.", ".attn.proj."),
    ):
        name = name.replace(ours, theirs)
    return name


def layout(config: RunConfig, data_shape: DataShape) -> Layout:
    """Where each of our tensors lies in their file."""
    c, p = data_shape.channels, dit_spec(config).patch_size

    def place(name: str, shape: tuple[int, ...]) -> Place:
        if name == "pos_embed":
            h, w, d = shape
            shape = (1, h * w, d)
        elif name == "x_embedder.proj.weight":  # their convolution
            shape = (shape[0], c, p, p)
        return Place((their_name(name),), shape)

    return make_layout(config, data_shape, place)


def read_sets(
    path: Path, sets: dict[str, dict[str, Tensor]], facts: dict[str, Any], told: Told
) -> Contents:
    """The model of one or more of their state dicts, by name."""
    sets = {name: unwrapped(path, theirs, (MARK,)) for name, theirs in sets.items()}
    first = next(iter(sets.values()))
    form = form_of(first, Settings(facts, str(path)), told)
    for theirs in sets.values():
        check_plain(path, {name: t for name, t in theirs.items() if THEIRS.fullmatch(name)})
    config, shape = form.settings(str(path))
    if config.diffusion.learned_variance and form.prediction is None:
        _refuse_untrained(path, first, form)
    place, notes = layout(config, shape), []
    if form.prediction == "velocity":
        notes.append(sit.NOTE)
    if not form.has_null:
        notes.append(NO_NULL)
    assumed = form.assumed
    if form.prediction is None and not config.diffusion.learned_variance:
        assumed += (
            f"{path}: does not tell what it predicts, which was taken for DiT's noise; if it is a "
            "SiT, convert it with --prediction velocity",
        )
    ours = {
        name: _our_set(path, theirs, form, place, config, shape) for name, theirs in sets.items()
    }
    classes = tuple(str(i) for i in range(shape.num_classes))
    origin = f"{KIND} checkpoint {path.name}"
    return Contents(config, shape, classes, ours, origin, notes=tuple(notes), assumed=assumed)


def _our_set(
    path: Path,
    theirs: dict[str, Tensor],
    form: Form,
    place: Layout,
    config: RunConfig,
    shape: DataShape,
) -> dict[str, Tensor]:
    """The tensors by our names, with a null class and of our prediction."""
    theirs, flow = dict(theirs), form.prediction == "velocity"
    table = "y_embedder.embedding_table.weight"
    if not form.has_null and table in theirs:
        theirs[table] = torch.cat([theirs[table], theirs[table].mean(0, keepdim=True)])
    if flow and form.out_channels == 2 * form.channels:
        theirs |= {
            name: sit.first_channels(theirs[name], form.channels, form.model["patch_size"])
            for name in _last_layer(theirs, form)
        }
    ours = gather(path, place, theirs, config, shape)
    return sit.as_flow(ours) if flow else ours


def _last_layer(tensors: dict[str, Tensor], form: Form) -> list[str]:
    """Names of the last layer's tensors, those that have the rows that they should."""
    rows = form.out_channels * form.model["patch_size"] ** 2
    names = (f"final_layer.linear.{part}" for part in ("weight", "bias"))
    return [n for n in names if n in tensors and tensors[n].ndim and len(tensors[n]) == rows]


def _refuse_untrained(path: Path, tensors: dict[str, Tensor], form: Form) -> None:
    """Raises InteropError where what would be a variance was never trained: as in a SiT."""
    p, names = form.model["patch_size"], _last_layer(tensors, form)
    if names and all(sit.is_untrained(tensors[n], form.channels, p) for n in names):
        raise InteropError(
            f"{path}: the half of its last layer that predicts DiT's variance was never trained, "
            "as in a SiT: if it is one of path_type 'Linear' and prediction 'velocity', convert it "
            "with --prediction velocity; if it predicts the noise, with --prediction noise"
        )


def read_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], told: Told
) -> Contents:
    """The model of a file's tensors, and of the arguments in its metadata if there are any."""
    text = metadata.get("config")
    facts = read_table(text, f"{path}: config in the metadata") if text else {}
    return read_sets(path, {"given": tensors}, facts, told)


def read_pickled(path: Path, saved: Any, told: Told) -> Contents:
    """The model of what torch.load gave: a state dict, or a trainer's dict of several."""
    if not isinstance(saved, dict):
        raise InteropError(f"{path}: is no state dict of tensors, but {type(saved).__name__}")
    if isinstance(saved.get("config"), dict) and "model_ema" in saved:
        raise InteropError(
            f"{path}: is a training checkpoint of k-diffusion; its convert_for_inference.py makes "
            "the .safetensors file that is read here"
        )
    found = {
        name: (key, saved[key])
        for name, keys in SETS.items()
        if (key := next((k for k in keys if isinstance(saved.get(k), dict)), None))
    }
    if not found:
        return read_sets(path, {"given": _state(path, "", saved)}, {}, told)
    sets = {name: _state(path, f"{key}: ", held) for name, (key, held) in found.items()}
    return read_sets(path, sets, _arguments(path, saved), told)


def _arguments(path: Path, saved: dict[Any, Any]) -> dict[str, Any]:
    """Those of the trainer, a namespace or a dict."""
    key = next((key for key in ARGUMENTS if saved.get(key) is not None), None)
    args = saved[key] if key else {}
    facts = vars(args) if isinstance(args, Namespace) else args
    if not isinstance(facts, dict) or not all(isinstance(name, str) for name in facts):
        raise InteropError(f"{path}: {key}: must be a table of settings, got {shown(args)}")
    for nested in ("model", "params"):  # of trainers that keep the model's settings in a table
        if isinstance(facts.get(nested), dict):
            facts = {k: v for k, v in facts.items() if k != nested} | facts[nested]
    return facts


def _state(path: Path, where: str, saved: dict[Any, Any]) -> dict[str, Tensor]:
    """A dict of tensors by name, not empty; else InteropError with what is there."""
    for name, value in saved.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            kind = type(value).__name__
            raise InteropError(
                f"{path}: {where}is no state dict of tensors: it has {shown(name)}, a {kind}"
            )
    if not saved:
        raise InteropError(f"{path}: {where}is no state dict of tensors: it is empty")
    return saved


def write(model: Contents, path: Path) -> tuple[str, ...]:
    """Writes a bare state dict with torch.save -> notes."""
    spec = check_dit(KIND, model)
    save_pickled(scatter(layout(model.config, model.shape), model.state_dict), path)
    notes = notes_of_null(model.config)
    if HEADS.get((spec.width, spec.depth)) != spec.num_heads:
        given = f"--num-heads {spec.num_heads}"
        notes += (f"a state dict does not tell its heads: to read it, give {given}",)
    return notes
