"""What all backbones share: a spec that knows its rules, a module that knows its blocks and cost.

A backbone is one file beside this, with a subclass of each, and a line in `hdit.models`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Self

from pydantic import SerializeAsAny
from torch import nn

from hdit.nn.checkpointing import checkpoint_in_place
from hdit.nn.compiling import compile_in_place
from hdit.protocols import DataShape, Group, PartCost, Spec, one_of


class BackboneSpec(Spec):
    """Base of the backbones' specs. It knows the data shape, and nothing of diffusion."""

    members: ClassVar[dict[str, type[Spec]]] = {}
    c_noise: ClassVar[str]  # what its embedding of the noise level expects, if no setting tells
    sees_augmentation: ClassVar[bool] = False  # whether it takes Cond.aug into account

    kind: str

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of."""
        raise NotImplementedError

    def resolved(self) -> Self:
        """With the settings written out that follow from others."""
        return self

    def check(self, shape: DataShape) -> None:
        """Raises SpecError with all that does not fit the data shape or itself."""

    def unmet(self) -> Iterator[tuple[str, str]]:
        """(key, what is wrong): settings that ask for conditions that no data source has."""
        return iter(())

    def remarks(self, shape: DataShape, params: int) -> Iterator[str]:
        """What to know of its number of parameters, a line each."""
        return iter(())


class BackboneModule(nn.Module):
    """Base of the backbones: subclasses have forward, blocks, parameter_group and parts.

    They are made from (spec, shape, out_channels), where out_channels is that of the data if None.
    """

    blocks: Iterable[nn.Module]
    """The modules that are compiled each as one, in order of the pass."""

    def parameter_group(self, name: str) -> Group:
        """How the optimizer treats the parameter of this name."""
        raise NotImplementedError

    def parts(self, shape: DataShape) -> list[PartCost]:
        """Its parts in the order of the pass, at a data shape; their sums are the model's."""
        raise NotImplementedError

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of what runs in turn, by which a step's activations are told apart."""
        return (("blocks", block) for block in self.blocks)

    def checkpoint_blocks(self) -> None:
        """From now on keeps no activations within a block, but computes them again for backward."""
        checkpoint_in_place(self)

    def compile_blocks(self) -> None:
        """From now on runs each block as one compiled graph, in place; see compile_in_place."""
        compile_in_place(self.blocks)

    def count(self, *prefixes: str) -> int:
        """Parameters whose name begins so; buffers do not count."""
        return sum(p.numel() for name, p in self.named_parameters() if name.startswith(prefixes))


MODULES: dict[str, type[BackboneModule]] = {}
"""The backbones' modules by the kind of their spec."""


def register(spec: type[BackboneSpec], module: type[BackboneModule]) -> None:
    """Lets a config name the backbone by the default of its spec's `kind`.

    Raises ValueError if the name is taken.
    """
    kind = spec.model_fields["kind"].default
    if kind in MODULES:
        raise ValueError(f"there is a backbone of kind {kind!r} already: {MODULES[kind]}")
    BackboneSpec.members[kind], MODULES[kind] = spec, module


def build(spec: BackboneSpec, shape: DataShape, out_channels: int | None = None) -> BackboneModule:
    """The network that a spec describes, freshly initialised. Raises SpecError where they clash.

    `out_channels` is the channels of the data, or more where a variance is predicted beside x.
    """
    make: Any = MODULES[spec.kind]
    return make(spec, shape, out_channels)


AnyBackbone = Annotated[SerializeAsAny[BackboneSpec], one_of(BackboneSpec.members)]
"""A backbone's spec in a config, told apart by `kind`."""
