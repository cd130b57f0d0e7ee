"""The backbones, by the `kind` of their spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hdit.models.dit import DiT, DiTSpec
from hdit.models.hdit import HDiT, HDiTSpec
from hdit.protocols import DataShape

BackboneSpec = Annotated[HDiTSpec | DiTSpec, Field(discriminator="kind")]


def build(
    spec: HDiTSpec | DiTSpec, shape: DataShape, out_channels: int | None = None
) -> HDiT | DiT:
    """The network that a spec describes, freshly initialised. Raises SpecError where they clash.

    `out_channels` is the channels of the data, or more where a variance is predicted beside x.
    """
    model = HDiT if isinstance(spec, HDiTSpec) else DiT
    return model(spec, shape, out_channels)  # type: ignore[arg-type]


__all__ = ["BackboneSpec", "DiT", "DiTSpec", "HDiT", "HDiTSpec", "build"]
