"""The words that packages share: DataShape, Cond, Denoise, Backbone, Space, Spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, Protocol, Self, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter
from torch import Tensor, nn

NULL_LABEL = -1
"""The label that says "no class"; every backbone maps it to the last row of its class table."""


# ---- settings ------------------------------------------------------------------------------------


class Spec(BaseModel):
    """Base of every typed setting: frozen, and a key that it does not know is an error.

    A number of its fields must have a bound below and above, as the types of hdit.bounds
    have: what a config may ask for is known before anything is made of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def filled(self, **values: Any) -> Self:
        """The spec with these values for those of its settings that are None."""
        absent = {key: value for key, value in values.items() if getattr(self, key) is None}
        return self.model_copy(update=absent)


def one_of(members: Mapping[str, type[Spec]]) -> PlainValidator:
    """Validates a table as the spec of its `kind`, which may be registered later than this.

    A class that is the annotation's type holds the same `members`, so that errors can list them.
    """

    def read(value: Any) -> Any:
        return _adapter(tuple(members.values())).validate_python(value)

    return PlainValidator(read)


@lru_cache(maxsize=16)
def _adapter(specs: tuple[type[Spec], ...]) -> TypeAdapter[Any]:
    union: Any = Annotated[reduce(or_, specs), Field(discriminator="kind")]
    return TypeAdapter(union)


# ---- data and conditions -------------------------------------------------------------------------


@dataclass(frozen=True)
class DataShape:
    """What a backbone sees and predicts: the facts that follow from data and space.

    `sigma_data` is the standard deviation of x0 over all elements; `num_classes` is 0 for
    unlabelled data.
    """

    channels: int
    height: int
    width: int
    num_classes: int
    sigma_data: float

    @property
    def chw(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Cond:
    """Conditioning of a batch of b images; absent parts are None.

    labels: (b,) int64, class index or NULL_LABEL.
    aug: (b, 9) float, parameters of the non-leaking augmentation; all zero means none applied.
    vector: (b, e) float, any other embedding; all zero means none.
    """

    labels: Tensor | None = None
    aug: Tensor | None = None
    vector: Tensor | None = None

    def drop(self, mask: Tensor) -> Cond:
        """Without class and vector where `mask` (b,) bool is true. `aug` describes x and stays."""
        labels, vector = self.labels, self.vector
        if labels is not None:
            labels = labels.masked_fill(mask, NULL_LABEL)
        if vector is not None:
            vector = vector.masked_fill(mask[:, None], 0)
        return replace(self, labels=labels, vector=vector)

    def cat(self, other: Cond) -> Cond:
        """Both batches, one after the other; they must have the same parts."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        assert all((a is None) == (b is None) for a, b in pairs), "the parts of both must match"
        return Cond(*(None if a is None else torch.cat([a, b]) for a, b in pairs))

    def null(self) -> Cond:
        """The unconditional counterpart: class and vector dropped for every image."""
        labels = None if self.labels is None else torch.full_like(self.labels, NULL_LABEL)
        vector = None if self.vector is None else torch.zeros_like(self.vector)
        return replace(self, labels=labels, vector=vector)


class Denoise(Protocol):
    """x (b c h w), sigma (b,) in x's dtype -> estimate of x0 (b c h w). All else is bound."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor: ...


@runtime_checkable
class DenoiseWithVariance(Denoise, Protocol):
    """A denoiser whose network learns the variance of the reverse process too."""

    def moments(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """-> (x0, v), both (b c h w); v is -1 to 1 from the lower to the upper variance."""


class Network(Protocol):
    """x (b c h w), c_noise (b,), cond -> (b c h w). It never sees sigma.

    Where it learns a variance, the output has 2c channels: what it predicts, then v.
    """

    def __call__(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor: ...


@dataclass(frozen=True)
class Group:
    """How the optimizer treats a parameter: weight decay or not, and a factor on the lr."""

    decay: bool
    lr_scale: float = 1.0


@dataclass(frozen=True)
class PartCost:
    """A part of a backbone and its cost: its token grid (h, w), or None for the whole image.

    `macs` are those of a forward pass of one image, `params` of what is only here.
    """

    name: str
    grid: tuple[int, int] | None
    params: int
    macs: int


class Backbone(Network, Protocol):
    """A network with all that training, compiling and counting ask of it.

    `hdit.models.BackboneModule` is a base that has the general ones of these.
    """

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of every nn.Module: canonical names, in order."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The modules that are compiled, and later sharded, each as one; in order of the pass."""

    def compile_blocks(self) -> None:
        """From now on runs each of `blocks` as one compiled graph, in place."""

    def checkpoint_blocks(self) -> None:
        """From now on keeps no activations within a block, but computes them again for backward."""

    def parameter_group(self, name: str) -> Group:
        """How the optimizer treats the parameter of this name."""

    def parts(self, shape: DataShape) -> list[PartCost]:
        """Its parts in the order of the pass, at a data shape; their sums are the model's."""

    def stages(self) -> Iterable[tuple[str, nn.Module]]:
        """Name and module of what runs in turn, by which a step's activations are told apart."""


NormalNoise = Callable[[Sequence[int]], Tensor]
"""(c, h, w) -> standard normal noise (b c h w), float32, of the images at hand."""


class Space(Protocol):
    """Between images (b c h w) of 0 to 255 and the x0 that the diffusion sees."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of x0 over all its elements."""

    @property
    def identity(self) -> str:
        """Tells one VAE's latents from another's; empty where there is no VAE."""

    def encode(self, images: Tensor) -> Tensor:
        """Images -> what can be stored of them."""

    def normalize(self, stored: Tensor, noise: NormalNoise) -> Tensor:
        """What is stored -> x0, float32; a space whose x0 is drawn calls `noise` once."""

    def decode(self, x0: Tensor) -> Tensor:
        """x0 -> uint8 images. Raises NotFiniteError where there is a value that is not finite."""


NoiseSource = Callable[[float, float], Tensor]
"""(sigma_from, sigma_to) -> standard normal noise for that stretch, with x's shape and dtype."""

OnStep = Callable[[int, Tensor, Tensor], None]
"""(step, x, denoised), called at the first evaluation of each step of a sampler."""
