"""The models of the papers, by name.

DiT: Peebles & Xie, ICCV 2023, table 1. HDiT: Crowson et al., ICML 2024, table 7 and the sweep of
sizes on ImageNet-256; flowers, CIFAR-10 and MNIST are configs of k-diffusion.
"""

from __future__ import annotations

import difflib
from typing import TypeVar

from hdit.errors import UserError
from hdit.models.dit import DiTSpec
from hdit.models.hdit import HDiTSpec, Level, Mapping
from hdit.nn.attention import Attention, Global, Neighborhood, ShiftedWindow

DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""(depth, width, heads)"""

DIT = {
    f"DiT-{size}/{p}": DiTSpec(patch_size=p, depth=depth, width=width, num_heads=heads)
    for size, (depth, width, heads) in DIT_SIZES.items()
    for p in (2, 4, 8)
}


def _hourglass(
    depths: list[int],
    widths: list[int],
    attentions: list[Attention],
    mapping: tuple[int, int] = (2, 256),
    *,
    p: int = 4,
    dropouts: list[float] | None = None,
) -> HDiTSpec:
    """One entry a level, the finest first; `mapping` is (depth, width). d_ff is 3 x width."""
    columns = zip(depths, widths, attentions, dropouts or [0.0] * len(depths), strict=True)
    levels = tuple(
        Level(depth=depth, width=width, attention=attention, d_ff=3 * width, dropout=dropout)
        for depth, width, attention, dropout in columns
    )
    depth, width = mapping
    return HDiTSpec(
        patch_size=p, levels=levels, mapping=Mapping(depth=depth, width=width, d_ff=3 * width)
    )


LOCAL, WINDOW, FULL = Neighborhood(kernel_size=7), ShiftedWindow(window_size=8), Global()

HDIT = {
    "hdit-imagenet128": _hourglass([2, 11], [384, 768], [LOCAL, FULL], mapping=(1, 768)),
    # Table 7 prints a mapping width of 768 for all; only 256 gives the parameters of the others.
    "hdit-ffhq1024": _hourglass(
        [2, 2, 2, 2, 2],
        [128, 256, 384, 768, 1024],
        [LOCAL, LOCAL, LOCAL, FULL, FULL],
        dropouts=[0, 0, 0, 0, 0.1],
    ),
    "hdit-imagenet256": _hourglass([2, 2, 16], [384, 768, 1536], [LOCAL, LOCAL, FULL]),
    "hdit-imagenet256-m": _hourglass([2, 2, 12], [320, 640, 1280], [LOCAL, LOCAL, FULL]),
    "hdit-imagenet256-s": _hourglass([2, 2, 8], [256, 512, 1024], [LOCAL, LOCAL, FULL]),
    "hdit-oxford-flowers": _hourglass(
        [2, 2, 4], [128, 256, 512], [LOCAL, LOCAL, FULL], dropouts=[0, 0, 0.1]
    ),
    "hdit-oxford-flowers-shifted-window": _hourglass(
        [2, 2, 4], [128, 256, 512], [WINDOW, WINDOW, FULL], dropouts=[0, 0, 0.1]
    ),
    # Inferred from its counts of parameters, buffers and MACs; only the dropout does not show in
    # them, and is that of the config's first version.
    "hdit-cifar10": _hourglass([2, 4], [256, 512], [FULL, FULL], p=2, dropouts=[0.05, 0.05]),
    "hdit-mnist": _hourglass([8], [256], [FULL], dropouts=[0.05]),
}

Model = TypeVar("Model", DiTSpec, HDiTSpec)


def dit(name: str) -> DiTSpec:
    """The DiT of a name such as "DiT-XL/2". Raises UserError where there is none of that name."""
    return _find(DIT, name)


def hdit(name: str) -> HDiTSpec:
    """The HDiT of a name such as "hdit-ffhq1024". Raises UserError where there is none of it."""
    return _find(HDIT, name)


def _find(models: dict[str, Model], name: str) -> Model:
    if name in models:
        return models[name]
    by_lower = {valid.lower(): valid for valid in models}
    near = difflib.get_close_matches(name.lower(), by_lower, n=len(models), cutoff=0)
    names = ", ".join(by_lower[lower] for lower in near)
    raise UserError(f"no model is called {name!r}; the nearest first, there are {names}")
