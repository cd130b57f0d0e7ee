"""A model's weights in a folder of diffusers: one file or several, in full or less precision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hdit.interop.contents import InteropError
from hdit.interop.files import read_pickle, read_safetensors
from hdit.interop.settings import Settings, shown
from hdit.names import printable
from hdit.reading import read_object

SUFFIXES = ("safetensors", "bin")
"""Of weights, the one to take first."""

PRECISIONS = ("", "fp32", "bf16", "fp16")
"""Variants that differ in their rounding alone, the one to take first; the first is no variant."""


class Weights(NamedTuple):
    """A file of weights, or the index of several, and what to know of it."""

    path: Path
    notes: tuple[str, ...] = ()


def find_weights(folder: Path, stem: str) -> Weights:
    """The weights `stem` in a folder: in the highest precision that is there.

    Raises InteropError where there are none, or several variants that may differ in more than
    their rounding.
    """
    found = _variants(folder, stem)
    for variant in PRECISIONS:
        if variant in found:
            note = f"its weights are those of the variant {variant}, as no others are there"
            return Weights(found[variant], (note,) if variant else ())
    if len(found) == 1:
        [(variant, path)] = found.items()
        note = f"its weights are those of the variant {printable(variant)}, the only one there"
        return Weights(path, (note,))
    if found:
        names = ", ".join(sorted(printable(path.name) for path in found.values()))
        raise InteropError(
            f"{folder}: has several variants of its weights, {names}; move all but one elsewhere"
        )
    there = ", ".join(sorted(printable(p.name) for p in folder.iterdir())[:12])
    raise InteropError(f"{folder}: has no {stem}.safetensors and no {stem}.bin, but {there}")


def _variants(folder: Path, stem: str) -> dict[str, Path]:
    """The file or index of each variant, by its name."""
    shapes = [  # {0} is the suffix; a shard has none of these names
        r"(?:\.(?P<variant>[^.]+))?\.{0}",
        r"\.{0}\.index(?:\.(?P<variant>[^.]+))?\.json",
        r"\.(?P<variant>[^.]+)\.{0}\.index\.json",
    ]
    found: dict[str, Path] = {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for suffix in SUFFIXES:
        for shape in shapes:
            pattern = re.compile(re.escape(stem) + shape.format(suffix))
            for match in filter(None, map(pattern.fullmatch, names)):
                variant = match["variant"] or ""
                if not re.search(r"-\d+-of-\d+$", variant):  # a shard of one
                    found.setdefault(variant, folder / match[0])
    return found


def read_weights(weights: Weights) -> dict[str, Tensor]:
    """The tensors of a file, or of all files of an index.

    Raises UserError where a file is missing or damaged, or lies elsewhere, or the index and the
    files do not agree.
    """
    if weights.path.suffix != ".json":
        return _read_file(weights.path)
    index = Settings(read_object(weights.path), str(weights.path))
    placed = index.table("weight_map")
    files = {name: placed.text(name) for name in placed.raw}
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        path = weights.path.parent / file
        if Path(file).name != file or path.suffix[1:] not in SUFFIXES:
            raise InteropError(f"{weights.path}: names {shown(file)}, which is no file beside it")
        if not path.is_file():
            raise InteropError(f"{path}: missing, and {weights.path.name} says that it has weights")
        held = _read_file(path)
        lacking = [name for name, place in files.items() if place == file and name not in held]
        if lacking:
            raise InteropError(
                f"{path}: has no {printable(lacking[0])}, but {weights.path.name} says that it has"
            )
        tensors |= {name: t for name, t in held.items() if files.get(name, file) == file}
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    tensors = read_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InteropError(f"{path}: is no state dict of tensors, but {shown(type(tensors))}")
    return tensors
