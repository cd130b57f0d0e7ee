"""What turns images into features: clean-fid's Inception, a TorchScript file, or a function."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdit.device import float32_products
from hdit.errors import UserError
from hdit.files import make_folder, whole
from hdit.names import expanded
from hdit.plugins import import_function
from hdit_kernels.native import cache_folder

AS_IT_IS = "uint8 RGB at its own size"


@dataclass(frozen=True)
class Extractor:
    """Features of images, and what tells them from others.

    `prepare` makes of a image, (3 h w) uint8, what a batch is stacked of, in the processes that
    read; None leaves it as it is, and then all images of a set must be of one size. `input` says
    in words what `function` gets.
    """

    name: str
    sha256: str  # of the file that they come from; empty where there is none
    input: str
    prepare: Callable[[Tensor], Tensor] | None
    function: Callable[[Tensor], Any]
    device: torch.device

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """What `prepare` made of b images -> (b d) on the CPU. Raises UserError if it is not."""
        try:
            with float32_products("fp32"):  # or CUDA would round what it convolves
                found = self.function(batch.to(self.device))
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(
                f"--features: {self.name} raised {type(error).__name__} for a batch of "
                f"{_shape(batch)} {batch.dtype}: {error}"
            ) from error
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            raise UserError(f"--features: {self.name} must return a tensor (b d), got {kind}")
        if found.ndim != 2 or len(found) != len(batch) or not found.shape[1] or found.is_complex():
            raise UserError(
                f"--features: {self.name} must return real (b d), one row for each of "
                f"{len(batch)} images, got {_shape(found)} {found.dtype}"
            )
        if not found.isfinite().all():
            raise UserError(f"--features: {self.name} returns features that are not finite")
        return found.cpu()


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "no shape"


def open_features(
    name: str | None, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> Extractor:
    """Opens features by file, by module:function, or clean-fid's Inception. Raises UserError.

    `say` hears of a download.
    """
    if name is None:
        return inception(device, say)
    path = expanded(name)
    if path.exists():
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"--features: {name!r} is no regular file, as one of TorchScript is")
        return torchscript(path, device)
    if ":" in name:
        return hook(name, device)
    raise UserError(
        f"--features: {name!r} is not there (seen from {Path.cwd()}); name a TorchScript file, or "
        "a function as module:function"
    )


# ---- clean-fid's Inception -----------------------------------------------------------------------

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLEAN_FID = Path("." if platform.system() == "Windows" else "/tmp")  # where it keeps the file


class CleanResize:
    """(3 h w) uint8 -> (3 299 299) float32 of 0..255: clean-fid's, bicubic with antialiasing."""

    @cached_property
    def resize(self) -> Callable[[np.ndarray], np.ndarray]:
        """clean-fid's resizer of an image (h w c), made at first use."""
        from cleanfid.resize import build_resizer

        return build_resizer("clean")

    def __call__(self, image: Tensor) -> Tensor:
        resized = self.resize(image.permute(1, 2, 0).numpy())  # (h w c)
        return torch.from_numpy(resized).permute(2, 0, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return CleanResize, ()  # what clean-fid returns cannot go to another process


def inception(device: torch.device, say: Callable[[str], None]) -> Extractor:
    """The network of FID, as clean-fid loads it: (b 2048) before the last layer."""
    try:
        from cleanfid.downloads_helper import check_download_inception
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--features: FID's Inception comes with clean-fid: pip install 'hdit[fid]', or, to "
            "keep the torchvision that is there, pip install --no-deps clean-fid requests; or name "
            f"a file or a function of yours ({error})"
        ) from None
    path = inception_file(check_download_inception, say)
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        network = InceptionV3W(str(path.parent), download=False).eval().to(device)
    return Extractor(
        f"clean-fid {INCEPTION}",
        INCEPTION_SHA256,
        "float32 RGB, 299 x 299 by clean-fid's resize from its own size",
        CleanResize(),
        network,
        device,
    )


def inception_file(download: Callable[[str], Any], say: Callable[[str], None]) -> Path:
    """Finds the file: in hdit's cache, where clean-fid keeps it, or downloaded into the former."""
    cache = cache_folder()
    for path in (cache / INCEPTION, CLEAN_FID / INCEPTION):
        if path.is_file():
            if sha256(path) == INCEPTION_SHA256:
                return path
            say(f"{path} is damaged or another file: its SHA-256 is not {INCEPTION_SHA256:.12}...")
    say(f"downloading {INCEPTION} into {cache}")
    make_folder(cache)
    kept = cache / INCEPTION
    with whole(kept, shared=True) as part, TemporaryDirectory(dir=cache) as folder:
        path = Path(folder, INCEPTION)
        try:
            download(folder)
        except OSError as error:
            raise UserError(
                f"--features: {INCEPTION} cannot be downloaded ({error}); put it into {cache} by "
                "hand (clean-fid's cleanfid/downloads_helper.py has the address), or name a file "
                "or a function of yours"
            ) from None
        if (found := sha256(path)) != INCEPTION_SHA256:
            raise UserError(
                f"--features: what was downloaded as {INCEPTION} is not that file: its SHA-256 is "
                f"{found:.12}..., and not {INCEPTION_SHA256:.12}..."
            )
        os.replace(path, part)
    return kept


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- features of the user's ----------------------------------------------------------------------


def torchscript(path: Path, device: torch.device) -> Extractor:
    """A TorchScript file: uint8 (b 3 h w) -> (b d). What is in it runs, so it must be trusted."""
    try:
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's
            module = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition(". ")[0].partition("\n")[0]
        raise UserError(f"--features: {path} is no TorchScript file: {reason}") from None
    return Extractor(str(path), sha256(path), AS_IT_IS, None, module, device)


def hook(name: str, device: torch.device) -> Extractor:
    """A function of a module that is here or installed: uint8 (b 3 h w) -> (b d)."""
    function, file = import_function(name, f"--features: {name!r}")
    return Extractor(
        name,
        sha256(file) if file else "",
        f"{AS_IT_IS}, to {name.partition(':')[2]}",
        None,
        function,
        device,
    )
