"""From one kind of checkpoint to another: what a path holds, `load` and `convert`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hdit.interop import diffusers_dit, facebook_dit, hub, k_diffusion
from hdit.interop.files import read_json, read_pickle, read_safetensors, whole
from hdit.interop.model import InteropError, Model
from hdit.runs.checkpoint import find, is_export

log = logging.getLogger(__name__)

CONFIG = "config"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


class Target(NamedTuple):
    """A kind that can be written: its suffix, or none for a folder."""

    suffix: str | None


KINDS = {
    hub.KIND: Target(None),
    k_diffusion.KIND: Target(".safetensors"),
    facebook_dit.KIND: Target(".pt"),
    diffusers_dit.KIND: Target(None),
}


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    path: Path
    kind: str
    origin: str
    notes: tuple[str, ...]


def load(source: str | Path, *, raw: bool = False, num_heads: int | None = None) -> Model:
    """The model of a run or checkpoint, a converted folder, or another project's checkpoint.

    `raw` takes the weights as trained where there is an EMA too. `num_heads` is that of a DiT whose
    file does not tell. Raises UserError where it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        _no_heads(num_heads, path)
        if is_export(path):
            return hub.read(path, raw)
        if _of_diffusers(path):
            _no_raw(raw, path)
            return diffusers_dit.read(path)
        return hub.of_checkpoint(find(path, log.warning), raw)
    if not path.exists():
        raise InteropError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _load_safetensors(path, raw, num_heads)
    if path.suffix in PICKLES:
        return facebook_dit.read_pickled(path, read_pickle(path), raw, num_heads)
    if path.suffix == ".json":
        raise InteropError(
            f"{path}: is a config without weights; convert makes a .toml config of it"
        )
    raise InteropError(
        f"{path}: is no checkpoint that is known: a folder, .safetensors, .json or "
        f"{', '.join(PICKLES)}"
    )


def _of_diffusers(path: Path) -> bool:
    folder = diffusers_dit.find_folder(path)
    return folder is not None and "_class_name" in read_json(folder / "config.json")


def _load_safetensors(path: Path, raw: bool, num_heads: int | None) -> Model:
    _no_raw(raw, path)
    tensors, metadata = read_safetensors(path)
    if facebook_dit.MARK in tensors:
        return facebook_dit.read_safetensors(path, tensors, metadata, num_heads)
    _no_heads(num_heads, path)
    if k_diffusion.MARK in tensors or "config" in metadata:
        return k_diffusion.read(path, tensors, metadata)
    some = ", ".join(list(tensors)[:4])
    raise InteropError(
        f"{path}: holds no model that is known: neither {k_diffusion.MARK} (k-diffusion) nor "
        f"{facebook_dit.MARK} (DiT) is among its tensors ({some}, ...)"
    )


def _no_raw(raw: bool, path: Path) -> None:
    if raw:
        raise InteropError(f"{path}: has one set of weights; leave --raw out")


def _no_heads(num_heads: int | None, path: Path) -> None:
    if num_heads is not None:
        raise InteropError(f"{path}: tells the number of heads; leave --num-heads out")


def convert(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    raw: bool = False,
    num_heads: int | None = None,
) -> Converted:
    """Writes a model as another kind, or a k-diffusion config as ours; whole, or not at all.

    Raises UserError where the source cannot be read, the kind cannot hold the model, or `out` is
    not free.
    """
    source, out = Path(source), Path(out)
    if source.suffix == ".json" and source.is_file():
        return _convert_config(source, out, to)
    kind = to or hub.KIND
    if kind not in KINDS:
        raise InteropError(f"--to: must be one of {', '.join(KINDS)}, got {kind!r}")
    _check_out(out, KINDS[kind].suffix, kind)
    model = load(source, raw=raw, num_heads=num_heads)
    with whole(out) as part:
        if kind == hub.KIND:
            notes = hub.write(model, part, out.resolve().name)
        elif kind == k_diffusion.KIND:
            notes = k_diffusion.write(model, part)
        elif kind == facebook_dit.KIND:
            notes = facebook_dit.write(model, part)
        else:
            notes = diffusers_dit.write(model, part)
    notes = tuple(dict.fromkeys((*model.notes, *notes)))
    return Converted(out, kind, model.origin, notes)


def _convert_config(source: Path, out: Path, to: str | None) -> Converted:
    if to not in (None, CONFIG):
        raise InteropError(f"{source}: is a config without weights, which --to {to} would need")
    _check_out(out, ".toml", "a config")
    text, notes = k_diffusion.config_to_toml(source, k_diffusion.read_config(source))
    with whole(out) as part:
        part.write_text(text, encoding="utf-8")
    return Converted(out, CONFIG, f"{k_diffusion.KIND} config {source.name}", notes)


def _check_out(out: Path, suffix: str | None, kind: str) -> None:
    """Raises InteropError where something is in the way, or the name is of another kind."""
    if suffix is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InteropError(f"{out}: is there already; {kind} needs a new or an empty folder")
        return
    if out.exists():
        raise InteropError(f"{out}: is there already; name a new file")
    if out.suffix != suffix:
        raise InteropError(f"{out}: {kind} is one file whose name ends in {suffix}")
