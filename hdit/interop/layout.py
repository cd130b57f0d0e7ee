"""How the tensors of a format lie to ours, which ours are, and what is wrong with those found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hdit import models
from hdit.config import RunConfig
from hdit.interop.contents import InteropError
from hdit.interop.files import check_plain
from hdit.protocols import DataShape
from hdit.tensors import check_finite

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: RunConfig, shape: DataShape) -> Shapes:
    """Names and shapes of the model's parameters and buffers, in its own order."""
    with torch.device("meta"):
        model = models.build(config.model, shape, config.output_channels(shape))
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def expected_buffers(config: RunConfig, shape: DataShape) -> set[str]:
    """Names of the model's buffers."""
    with torch.device("meta"):
        model = models.build(config.model, shape, config.output_channels(shape))
    return {name for name, _ in model.named_buffers()}


def check_shapes(path: Path, found: Shapes, expected: Shapes, limit: int = 12) -> None:
    """Raises InteropError with each tensor that is missing, unknown or of another shape."""
    lines = [f"{k}: missing, {list(s)} expected" for k, s in expected.items() if k not in found]
    lines += [f"{k}: unknown, {list(s)}" for k, s in found.items() if k not in expected]
    lines += [
        f"{key}: is {list(found[key])}, {list(shape)} expected"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if lines:
        more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
        listing = "\n  ".join(lines[:limit] + more)
        raise InteropError(f"{path}: its tensors are not those of the model:\n  {listing}")


@dataclass(frozen=True)
class Place:
    """Where one of our tensors lies in the other format.

    Under one name, reshaped; `split` into equal parts of its first axis, one under each name; or
    as a copy under each name. With no name at all the other format computes it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of what lies under each name
    split: bool = False


Layout = dict[str, Place]
"""By our names, in our order."""


def make_layout(
    config: RunConfig, data_shape: DataShape, place: Callable[[str, tuple[int, ...]], Place]
) -> Layout:
    """Layout of every tensor of a model, by `place(our name, our shape)`."""
    shapes = expected_shapes(config, data_shape)
    layout = {name: place(name, shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        there = layout[name]
        copies = len(there.names) if there.split else 1
        assert not there.names or copies * prod(there.shape) == prod(shape), name
    return layout


def foreign_shapes(layout: Layout) -> Shapes:
    """Names and shapes in the other format."""
    return {name: place.shape for place in layout.values() for name in place.names}


def gather(
    path: Path,
    layout: Layout,
    tensors: dict[str, Tensor],
    config: RunConfig,
    shape: DataShape,
    computed: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Our tensors from theirs, in their dtypes; `computed` are those that the format leaves out.

    Raises UserError with each tensor that is missing, unknown or misshapen, with one that is no
    array of floats, or with a copy that differs; NotFiniteError for one that is not finite.
    """
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    check_shapes(path, found, foreign_shapes(layout))
    check_plain(path, tensors)
    check_finite(tensors, str(path), "its training diverged or the file is damaged; take another")
    shapes = expected_shapes(config, shape)
    ours = {}
    for name, place in layout.items():
        parts = [tensors[key] for key in place.names]
        if not parts:
            assert computed is not None, f"{name} is nowhere"
            ours[name] = computed[name]
        elif place.split:
            ours[name] = torch.cat(parts).reshape(shapes[name])
        else:
            for key, part in zip(place.names, parts, strict=True):
                if part.dtype != parts[0].dtype or not torch.equal(part, parts[0]):
                    raise InteropError(
                        f"{path}: {key} differs from {place.names[0]}; here all blocks share one"
                    )
            ours[name] = parts[0].reshape(shapes[name])
    return ours


def scatter(layout: Layout, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours, in our dtypes and order; each has memory of its own."""
    theirs = {}
    for name, place in layout.items():
        ours = state_dict[name]
        parts = ours.chunk(len(place.names)) if place.split else [ours] * len(place.names)
        for key, part in zip(place.names, parts, strict=True):
            theirs[key] = part.reshape(place.shape).clone(memory_format=torch.contiguous_format)
    return theirs
