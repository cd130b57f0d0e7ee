"""The backbones, by the `kind` of their spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hdit.models.dit import DiT, DiTSpec
from hdit.models.hdit import HDiT, HDiTSpec
from hdit.protocols import Signal

BackboneSpec = Annotated[HDiTSpec | DiTSpec, Field(discriminator="kind")]


def build(spec: HDiTSpec | DiTSpec, signal: Signal) -> HDiT | DiT:
    """The network that a spec describes, freshly initialised. Raises SpecError where they clash."""
    return HDiT(spec, signal) if isinstance(spec, HDiTSpec) else DiT(spec, signal)


__all__ = ["BackboneSpec", "DiT", "DiTSpec", "HDiT", "HDiTSpec", "build"]
