"""Formats of other projects, read and written: k-diffusion, facebook's DiT, diffusers."""

from hdit.interop.contents import Contents, InteropError

__all__ = ["Contents", "InteropError"]
