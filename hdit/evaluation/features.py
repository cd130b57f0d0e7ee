"""Features by name: FID's Inception, DINOv2, CLIP, a TorchScript file, or a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hdit.errors import UserError
from hdit.evaluation.extractor import AS_IT_IS, Extractor, sha256
from hdit.evaluation.inception import inception
from hdit.evaluation.vits import clip, dinov2, is_torchscript
from hdit.names import expanded
from hdit.plugins import import_function

NAMED = ("inception", "dinov2", "clip")


def open_features(
    name: str | None,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    protocol: str | None = None,
    option: str = "--features",
) -> Extractor:
    """Opens features by a name of NAMED, by file or by module:function; None is the Inception.

    `protocol` is the Inception's, "clean" if it is None. `say` hears of a download. Raises
    UserError.
    """
    if name in (None, "inception") and not (name and expanded(name).exists()):
        return inception(device, say, protocol or "clean")
    assert name is not None, "the Inception went above"
    if protocol is not None:
        raise UserError(
            f"--protocol: {protocol} has no effect on {option} {name}, which gets images in its "
            "own way; it is of the Inception"
        )
    path = expanded(name)
    if path.exists():
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{option}: {name!r} is no regular file, as one of TorchScript is")
        return torchscript(path, device, option)
    if name in NAMED:
        return (dinov2 if name == "dinov2" else clip)(None, device, option)
    if ":" in name:
        return hook(name, device, option)
    raise UserError(
        f"{option}: {name!r} is not there (seen from {Path.cwd()}); name a TorchScript file, or "
        f"a function as module:function, or one of {', '.join(NAMED)}"
    )


def open_dinov2(name: str | None, device: torch.device) -> Extractor:
    """DINOv2 of FDD and KDD: its file of weights, or a stand-in as of `open_features`."""
    return _open_vit(name, device, dinov2, "--dinov2")


def open_clip(name: str | None, device: torch.device) -> Extractor:
    """CLIP of CMMD: its file of weights, a folder of transformers, or a stand-in."""
    return _open_vit(name, device, clip, "--clip")


def _open_vit(
    name: str | None,
    device: torch.device,
    opener: Callable[[Path | None, torch.device, str], Extractor],
    option: str,
) -> Extractor:
    if name is None:
        return opener(None, device, option)
    path = expanded(name)
    is_weights = path.is_file() and (not is_torchscript(path) or _is_openai(path))
    if is_weights or path.is_dir():
        return opener(path, device, option)
    return open_features(name, device, option=option)


def _is_openai(path: Path) -> bool:
    """Whether a TorchScript file is one of CLIP's, whose weights go into another network."""
    try:
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's
            return hasattr(torch.jit.load(path, map_location="cpu"), "visual")
    except (RuntimeError, ValueError):
        return False


# ---- features of the user's ----------------------------------------------------------------------


def torchscript(path: Path, device: torch.device, option: str = "--features") -> Extractor:
    """A TorchScript file: uint8 (b 3 h w) -> (b d). What is in it runs, so it must be trusted.

    If it exports `probabilities`, uint8 (b 3 h w) -> (b c), it has an Inception Score.
    """
    try:
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's
            module = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition(". ")[0].partition("\n")[0]
        raise UserError(f"{option}: {path} is no TorchScript file: {reason}") from None

    def probabilities(batch: Tensor, features: Tensor) -> Tensor:
        return module.probabilities(batch)

    return Extractor(
        str(path),
        sha256(path),
        AS_IT_IS,
        None,
        module,
        device,
        probabilities if hasattr(module, "probabilities") else None,
        option,
        is_whole=True,
    )


def hook(name: str, device: torch.device, option: str = "--features") -> Extractor:
    """A function of a module that is here or installed: uint8 (b 3 h w) -> (b d)."""
    function, file = import_function(name, f"{option}: {name!r}")
    return Extractor(
        name,
        sha256(file) if file else "",
        f"{AS_IT_IS}, to {name.partition(':')[2]}",
        None,
        function,
        device,
        option=option,
    )
