"""Which format a file or folder of another project has, and the formats that can be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hdit.data.kinds import PICKLES
from hdit.interop import diffusers_dit, facebook_dit, k_diffusion
from hdit.interop.contents import Contents, InteropError, Told
from hdit.interop.files import read_pickle, read_safetensors, unwrapped
from hdit.names import printable


class Format(NamedTuple):
    """A format that can be written: its files' suffix, or None for a folder, and the writer."""

    suffix: str | None
    write: Callable[[Contents, Path], tuple[str, ...]]


FORMATS = {
    k_diffusion.KIND: Format(".safetensors", k_diffusion.write),
    facebook_dit.KIND: Format(".pt", facebook_dit.write),
    diffusers_dit.KIND: Format(None, diffusers_dit.write),
}


def read(path: Path, told: Told) -> Contents:
    """The model of another project's file, or folder of diffusers, that is there.

    `told` is what a DiT's file does not tell. Raises UserError if it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLES and path.is_file():
        return facebook_dit.read_pickled(path, read_pickle(path), told)
    if suffix == ".safetensors" and path.is_file():
        return _read_safetensors(path, told)
    told.refuse(path)
    if path.is_dir():
        return diffusers_dit.read(path)
    if suffix == ".json":
        raise InteropError(
            f"{path}: is a config without weights; `hdit convert` makes a .toml config of it"
        )
    raise InteropError(
        f"{path}: is no checkpoint that is known: a folder, .safetensors, .json or "
        f"{', '.join(PICKLES)}"
    )


def _read_safetensors(path: Path, told: Told) -> Contents:
    tensors, metadata = read_safetensors(path)
    tensors = unwrapped(path, tensors, (facebook_dit.MARK, k_diffusion.MARK))
    if facebook_dit.MARK in tensors:
        return facebook_dit.read_safetensors(path, tensors, metadata, told)
    told.refuse(path)
    if k_diffusion.MARK in tensors or "config" in metadata:
        return k_diffusion.read(path, tensors, metadata)
    some = ", ".join(printable(name) for name in list(tensors)[:4])
    raise InteropError(
        f"{path}: holds no model that is known: neither {k_diffusion.MARK} (k-diffusion) nor "
        f"{facebook_dit.MARK} (DiT) is among its tensors ({some}, ...)"
    )
