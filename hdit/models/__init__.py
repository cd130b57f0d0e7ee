"""The backbones, by the `kind` of their spec."""

from hdit.models.backbone import AnyBackbone, BackboneModule, BackboneSpec, build, register
from hdit.models.dit import DiT, DiTSpec
from hdit.models.hdit import HDiT, HDiTSpec

register(HDiTSpec, HDiT)
register(DiTSpec, DiT)

__all__ = [
    "AnyBackbone",
    "BackboneModule",
    "BackboneSpec",
    "DiT",
    "DiTSpec",
    "HDiT",
    "HDiTSpec",
    "build",
    "register",
]
