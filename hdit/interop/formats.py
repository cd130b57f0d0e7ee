"""Which format a file or folder of another project has, and the formats that can be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hdit.interop import diffusers_dit, facebook_dit, k_diffusion
from hdit.interop.contents import Contents, InteropError
from hdit.interop.files import read_json, read_pickle, read_safetensors

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
"""Files that may hold a model."""


class Format(NamedTuple):
    """A format that can be written: its files' suffix, or None for a folder, and the writer."""

    suffix: str | None
    write: Callable[[Contents, Path], tuple[str, ...]]


FORMATS = {
    k_diffusion.KIND: Format(".safetensors", k_diffusion.write),
    facebook_dit.KIND: Format(".pt", facebook_dit.write),
    diffusers_dit.KIND: Format(None, diffusers_dit.write),
}


def is_foreign(path: Path) -> bool:
    """Whether a file's suffix, or a folder's config.json, is that of another project's model."""
    if not path.is_dir():
        return path.is_file() and path.suffix in SUFFIXES
    folder = diffusers_dit.find_folder(path)
    return folder is not None and "_class_name" in read_json(folder / "config.json")


def read(path: Path, num_heads: int | None = None) -> Contents:
    """The model of another project's file, or folder of diffusers, that is there.

    `num_heads` is that of a DiT whose file does not tell. Raises InteropError if it cannot be read.
    """
    if path.suffix in PICKLES and path.is_file():
        return facebook_dit.read_pickled(path, read_pickle(path), num_heads)
    if path.suffix == ".safetensors" and path.is_file():
        return _read_safetensors(path, num_heads)
    refuse_heads(num_heads, path)
    if path.is_dir():
        return diffusers_dit.read(path)
    if path.suffix == ".json":
        raise InteropError(
            f"{path}: is a config without weights; `hdit convert` makes a .toml config of it"
        )
    raise InteropError(
        f"{path}: is no checkpoint that is known: a folder, .safetensors, .json or "
        f"{', '.join(PICKLES)}"
    )


def _read_safetensors(path: Path, num_heads: int | None) -> Contents:
    tensors, metadata = read_safetensors(path)
    if facebook_dit.MARK in tensors:
        return facebook_dit.read_safetensors(path, tensors, metadata, num_heads)
    refuse_heads(num_heads, path)
    if k_diffusion.MARK in tensors or "config" in metadata:
        return k_diffusion.read(path, tensors, metadata)
    some = ", ".join(list(tensors)[:4])
    raise InteropError(
        f"{path}: holds no model that is known: neither {k_diffusion.MARK} (k-diffusion) nor "
        f"{facebook_dit.MARK} (DiT) is among its tensors ({some}, ...)"
    )


def refuse_heads(num_heads: int | None, path: Path) -> None:
    """Raises InteropError if `num_heads` is given for a model that tells it."""
    if num_heads is not None:
        raise InteropError(f"{path}: tells the number of heads; leave --num-heads out")
