"""Samplers by name: a function's signature is its spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import SerializeAsAny, create_model
from torch import Tensor

from hdit.diffusion.context import DependentSpec
from hdit.protocols import Denoise, NoiseSource, OnStep, Spec, one_of

BOUND_LATER = ("noise", "on_step")
"""Keyword arguments of every sampler that are no options of it."""


class SamplerSpec(DependentSpec):
    """A sampler's function with its options bound."""

    members: ClassVar[dict[str, type[Spec]]] = {}
    function: ClassVar[Callable[..., Tensor]]
    nominal_order: ClassVar[int]  # of convergence, without noise

    kind: str

    @property
    def draws_at_each_step(self) -> bool:
        """Whether it draws noise from each level of a sigma schedule to the next."""
        eta: float = getattr(self, "eta", float(self.kind == "ddpm"))
        return eta > 0

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: NoiseSource | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """x (b c h w) at sigmas[0] -> x at sigmas[-1]."""
        options = self.model_dump(exclude={"kind"}, exclude_none=True)
        return type(self).function(denoise, x, sigmas, noise=noise, on_step=on_step, **options)


Function = TypeVar("Function", bound=Callable[..., Tensor])


def sampler(order: int, base: type[SamplerSpec] = SamplerSpec) -> Callable[[Function], Function]:
    """Registers a sampler's function, as it is, under its name.

    Its keyword arguments with their annotations and defaults become the fields of a spec, whose
    rules are those of `base`. `order` is that of convergence without noise. Raises ValueError if
    the name is taken.
    """

    def register(function: Function) -> Function:
        hints = get_type_hints(function, include_extras=True)
        options: dict[str, Any] = {
            name: (hints[name], parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in BOUND_LATER
        }
        name = function.__name__
        if name in SamplerSpec.members:
            raise ValueError(f"there is a sampler of kind {name!r} already")
        kind: Any = Literal[name]
        spec = create_model(
            name, __base__=base, __module__=function.__module__, kind=(kind, name), **options
        )
        spec.function, spec.nominal_order = staticmethod(function), order
        SamplerSpec.members[name] = spec
        return function

    return register


def spec_of(kind: str, **options: Any) -> SamplerSpec:
    """The spec of the sampler called `kind` with these options, checked."""
    spec = SamplerSpec.members[kind](**options)
    assert isinstance(spec, SamplerSpec), kind
    return spec


Sampler = Annotated[SerializeAsAny[SamplerSpec], one_of(SamplerSpec.members)]
"""A sampler's spec in a config, told apart by `kind`."""
