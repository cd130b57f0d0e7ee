"""A model between formats: our settings, our tensor names, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hdit import models
from hdit.config import RunConfig, differences
from hdit.errors import UserError
from hdit.models import BackboneModule
from hdit.protocols import DataShape, Spec


class InteropError(UserError):
    """A checkpoint that cannot be read, or a model that a format cannot hold, and why."""


@dataclass(frozen=True)
class Model:
    """A trained model: `state_dict` has our names, and values and dtypes as they came."""

    config: RunConfig  # resolved
    shape: DataShape
    classes: tuple[str, ...]
    state_dict: dict[str, Tensor]
    origin: str  # in words
    weights: str = "ema"  # or "model", as trained, or "given", if nobody knows
    images: int = 0  # that it was trained on; 0 if unknown
    notes: tuple[str, ...] = ()  # what was left behind, and what to know

    def network(self) -> BackboneModule:
        """The backbone with its weights, in float32 and eval mode."""
        out_channels = self.config.output_channels(self.shape)
        network = models.build(self.config.model, self.shape, out_channels)
        network.load_state_dict(self.state_dict)
        return network.eval()


def _dumped(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Spec) else value


def check_held(kind: str, model: Model, back: RunConfig, shape: DataShape) -> None:
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
