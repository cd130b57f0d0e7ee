"""Foreign files of tensors, read without executing them."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hdit.interop.contents import InteropError
from hdit.names import printable
from hdit.tensors import open_tensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> (tensors, metadata). Raises InteropError where the file is damaged."""
    _refuse_stand_in(path)
    try:
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InteropError(f"{path}: no safetensors file, or damaged: {error}") from None


def read_pickle(path: Path) -> Any:
    """Tensors and plain data of a file of torch.save; argparse.Namespace is the one class allowed.

    Raises InteropError where it is damaged, compressed, or a pickle that would call anything else.
    """
    _refuse_stand_in(path)
    try:
        _refuse_compressed(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle protocol that is not its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InteropError(
            f"{path}: refused: damaged, or a pickle of more than tensors and plain data, which "
            f"could execute code: {_reason(error)}"
        ) from None
    except (FileNotFoundError, InteropError):
        raise
    except Exception as error:  # a damaged pickle ends in any of Python's
        raise InteropError(f"{path}: no file of torch.save, or damaged: {error}") from None


def _reason(error: UnpicklingError) -> str:
    """What torch says of the file, without what it advises, which is to execute it."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation", "(")
    lines = [line.strip() for line in str(error).splitlines()]
    told = " ".join(line for line in lines if line and not line.startswith(advice))
    return f"{told.partition(' Please use ')[0] or error!s:.500}"


WEB_PAGE = "is a web page, not a file of tensors: its download failed"
STAND_INS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: `git lfs pull`",
    b"<!doctype": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"<?xml": WEB_PAGE,
}
"""Beginnings, in lower case, of files that lie where weights were meant to."""


def _refuse_stand_in(path: Path) -> None:
    """Raises InteropError for an empty file, and for one that stands in for what was not loaded."""
    with path.open("rb") as file:
        start = file.read(100)
    if not start:
        raise InteropError(f"{path}: damaged: it is empty")
    for beginning, told in STAND_INS.items():
        if start.lstrip().lower().startswith(beginning):
            raise InteropError(f"{path}: {told}")


def _refuse_compressed(path: Path) -> None:
    """Raises InteropError for a zip that unpacks to more than it holds, as no torch.save writes."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise InteropError(
            f"{path}: refused: is compressed, and unpacks to {unpacked:,} bytes; save it anew with "
            "torch.save, which does not compress"
        )


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that wrap another one, and put their name before its parameters'."""


def unwrapped(path: Path, tensors: dict[str, Tensor], marks: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors by their names without what wrappers of the model put into them.

    These are the names of torch.compile, FSDP and checkpointing anywhere, and one prefix of all
    names, such as "module." of DDP, which is what comes before one of `marks`. Raises InteropError
    where two names become one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise InteropError(f"{path}: has two tensors {short}, one with a wrapper in its name")
        plain[short] = tensor
    plain.pop("n_averaged", None)  # of torch's AveragedModel
    for name in plain:
        if (mark := next((m for m in marks if name.endswith(f".{m}")), None)) is not None:
            prefix = name.removesuffix(mark)
            if all(other.startswith(prefix) for other in plain):
                return {other.removeprefix(prefix): t for other, t in plain.items()}
            if mark not in plain:
                raise InteropError(
                    f"{path}: has a model under {printable(prefix)!r} and more beside it, such as "
                    f"{_beside(plain, prefix)}; save the tensors under {printable(prefix)!r} alone"
                )
    return plain


def _beside(tensors: dict[str, Tensor], prefix: str) -> str:
    """The first name without a prefix."""
    return printable(repr(next(name for name in tensors if not name.startswith(prefix))))


def check_plain(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises InteropError for a tensor that is no plain array of floats, all of it in the file."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InteropError(f"{path}: {name}: is sparse, quantized or without values")
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # float8 needs its scales
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InteropError(f"{path}: {name}: must hold floats of 16 bits or more, got {kind}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InteropError(f"{path}: {name}: is larger than what the file holds of it")
