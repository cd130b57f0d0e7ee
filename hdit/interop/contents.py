"""A model between formats: our settings, our tensor names, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hdit.config import RunConfig, differences
from hdit.errors import UserError
from hdit.names import printable
from hdit.protocols import DataShape, Spec


class InteropError(UserError):
    """A checkpoint that cannot be read, or a model that a format cannot hold, and why."""


PREDICTIONS = ("noise", "velocity")
"""What a DiT's network may predict: the first of DiT, the second of SiT."""


@dataclass(frozen=True)
class Told:
    """What the user tells of a DiT whose file does not."""

    num_heads: int | None = None
    num_classes: int | None = None
    prediction: str | None = None  # one of PREDICTIONS

    def __post_init__(self) -> None:
        if self.prediction not in (None, *PREDICTIONS):
            wanted = " or ".join(PREDICTIONS)
            raise InteropError(f"--prediction: must be {wanted}, got {self.prediction!r}")

    def refuse(self, path: Path) -> None:
        """Raises InteropError if anything is told of a model that tells it itself."""
        for value, what, option in (
            (self.num_heads, "number of heads", "--num-heads"),
            (self.num_classes, "number of classes", "--classes"),
            (self.prediction, "prediction", "--prediction"),
        ):
            if value is not None:
                raise InteropError(f"{path}: tells the {what}; leave {option} out")


@dataclass(frozen=True)
class Contents:
    """What a file or folder holds of a model: our settings, and tensors by our names.

    `sets` has one or more sets of weights, values and dtypes as they came, the one to use first:
    "ema", "model" as trained, or "given" where nobody knows which of the two.
    """

    config: RunConfig  # resolved
    shape: DataShape
    classes: tuple[str, ...]
    sets: dict[str, dict[str, Tensor]]
    origin: str  # in words
    images: int = 0  # that it was trained on; 0 if unknown
    notes: tuple[str, ...] = ()  # what was left behind, and what to know
    assumed: tuple[str, ...] = ()  # what its file does not tell, and nobody told

    def __post_init__(self) -> None:
        # It names files, and goes into files: those of an export, cards and pages.
        object.__setattr__(self, "origin", printable(self.origin))

    @property
    def weights(self) -> str:
        """The name of the set to use."""
        return next(iter(self.sets))

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the set to use."""
        return self.sets[self.weights]


def _dumped(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Spec) else value


def check_held(kind: str, model: Contents, back: RunConfig, shape: DataShape) -> None:
    """Raises InteropError with every setting that reads back from a format as another one.

    `back` and `shape` are what the reader makes of the settings written for `model`.
    """
    problems = []
    for name, ours, theirs in (
        ("model", model.config.model, back.model),
        *(
            (f"diffusion.{key}", getattr(model.config.diffusion, key), getattr(back.diffusion, key))
            for key in ("parametrization", "c_noise", "beta_schedule", "learned_variance")
        ),
    ):
        problems += differences(_dumped(ours), _dumped(theirs), name)
    for key in ("channels", "height", "width", "num_classes"):
        problems += differences(getattr(model.shape, key), getattr(shape, key), key)
    if problems:
        lines = [f"{path} = {ours!r}: it has {theirs!r} only" for path, ours, theirs in problems]
        raise InteropError(
            f"{kind} cannot hold this model ({model.origin}):\n  " + "\n  ".join(lines)
        )
