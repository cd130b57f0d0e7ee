"""Features of images, with all that tells them from other features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdit.device import float32_products
from hdit.errors import UserError

AS_IT_IS = "uint8 RGB at its own size"


@dataclass(frozen=True)
class Extractor:
    """Features of images, and what tells them from others.

    `prepare` makes of an image, (3 h w) uint8, what a batch is stacked of, in the processes that
    read; None leaves it as it is, and then all images of a set must be of one size. `input` says
    in words what `function` gets. `predict` makes class probabilities (b c) of the batch and of
    what `function` returned, where the network has classes. `option` names it in errors. Features
    may be kept in a cache if `is_whole`: all that they depend on is in the file of `sha256`.
    """

    name: str
    sha256: str  # of the file that they come from; empty where there is none
    input: str
    prepare: Callable[[Tensor], Tensor] | None
    function: Callable[[Tensor], Any]
    device: torch.device
    predict: Callable[[Tensor, Tensor], Any] | None = None
    option: str = "--features"
    is_whole: bool = False
    resize: str = "none"  # in one word, for the card
    protocol: str = "own"

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """What `prepare` made of b images -> (b d) on the CPU. Raises UserError if it is not."""
        return self._rows(self._run(self.function, batch.to(self.device)), len(batch)).cpu()

    @torch.inference_mode()
    def with_probabilities(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """(features (b d), class probabilities (b c)) on the CPU. Raises UserError likewise."""
        assert self.predict is not None, "a network with classes"
        batch = batch.to(self.device)
        rows = self._rows(self._run(self.function, batch), len(batch))
        found = self._rows(self._run(self.predict, batch, rows), len(batch))
        sums = found.double().sum(1)
        if found.min() < 0 or (sums - 1).abs().max() > 1e-3:
            raise UserError(
                f"{self.option}: {self.name}: class probabilities must be from 0 and add to 1, "
                f"got {found.min().item():.4g} and a sum of {sums[0].item():.4g}"
            )
        return rows.cpu(), found.cpu()

    def _run(self, function: Callable[..., Any], batch: Tensor, *more: Tensor) -> Any:
        try:
            with float32_products("fp32"):  # or CUDA would round what it convolves
                return function(batch, *more)
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.option}: {self.name} raised {type(error).__name__} for a batch of "
                f"{_shape(batch)} {batch.dtype}: {error}"
            ) from error

    def _rows(self, found: Any, n: int) -> Tensor:
        """Checks that something is n finite rows."""
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            raise UserError(f"{self.option}: {self.name} must return a tensor (b d), got {kind}")
        if found.ndim != 2 or len(found) != n or not found.shape[1] or found.is_complex():
            raise UserError(
                f"{self.option}: {self.name} must return real (b d), one row for each of {n} "
                f"images, got {_shape(found)} {found.dtype}"
            )
        if not found.isfinite().all():
            raise UserError(f"{self.option}: {self.name} returns features that are not finite")
        return found


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "no shape"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
