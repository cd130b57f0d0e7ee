"""Checkpoints of other projects, read and written: k-diffusion, facebook's DiT, diffusers."""

from hdit.interop.conversion import KINDS, Converted, convert, load
from hdit.interop.model import InteropError, Model

__all__ = ["KINDS", "Converted", "InteropError", "Model", "convert", "load"]
