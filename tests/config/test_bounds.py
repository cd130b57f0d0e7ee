"""Every number that a user can give has a bound below and above, and every name a rule."""

import importlib
import pkgutil
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

import hdit
from hdit.bounds import Name
from hdit.cli.app import app, data
from hdit.cli.options import finite
from hdit.protocols import Spec

for module in pkgutil.walk_packages(hdit.__path__, "hdit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def specs(spec: type[Spec] = Spec) -> Iterator[type[Spec]]:
    for inner in spec.__subclasses__():
        if inner.__module__.startswith("hdit."):
            yield inner
            yield from specs(inner)


def leaves(annotation: Any, rules: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(type, its constraints) of all that an annotation allows, but for other specs."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        for rule in metadata:
            rules += tuple(rule.metadata) if isinstance(rule, FieldInfo) else (rule,)
        yield from leaves(inner, rules)
    elif get_origin(annotation) in (Union, types.UnionType, tuple, list, dict):
        keys = get_origin(annotation) is dict
        for part in get_args(annotation)[keys:]:
            yield from leaves(part, rules)
    else:
        yield annotation, rules


FIELDS = [(spec, name) for spec in dict.fromkeys(specs()) for name in spec.model_fields]


def rules_of(kinds: tuple[type, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(its place, its constraints) of each part of these types of each field of each spec."""
    for spec, name in FIELDS:
        field = spec.model_fields[name]
        for kind, rules in leaves(field.annotation, tuple(field.metadata)):
            if kind in kinds:
                yield f"{spec.__module__}.{spec.__name__}.{name}", rules


def test_number_of_a_spec_has_a_bound_below_and_above():
    found = list(rules_of((int, float)))
    assert len(found) > 80
    for place, rules in found:
        for bound in ("gt", "ge"), ("lt", "le"):
            assert any(hasattr(rule, b) for rule in rules for b in bound), (place, bound)


PLACES = ("path", "name", "hook", "cache", "stored", "vae", "features", "split", "config")


def test_name_of_a_spec_is_neither_empty_nor_has_a_zero_byte():
    found = [(p, rules) for p, rules in rules_of((str,)) if p.rpartition(".")[2] in PLACES]
    assert len(found) > 10
    for place, rules in found:
        assert set(get_args(Name)[2:]) <= set(rules), place


def options() -> Iterator[tuple[str, Any, Any]]:
    """(verb and parameter, type, what typer is told of it) of the command line."""
    commands = app.registered_commands + data.registered_commands
    for callback in (command.callback for command in commands):
        for name, hint in get_type_hints(callback, include_extras=True).items():
            if name != "return":
                kind, info = get_args(hint)[:2]
                yield f"{callback.__name__} {name}", kind, info


def test_number_of_the_command_line_has_a_bound_below_and_above():
    found = [(n, i) for n, kind, i in options() if {int, float} & {kind, *get_args(kind)}]
    assert len(found) > 15
    for name, info in found:
        assert None not in (info.min, info.max), name


def test_float_of_the_command_line_is_a_number():
    found = [(n, i) for n, kind, i in options() if float in {kind, *get_args(kind)}]
    assert found
    for name, info in found:
        assert info.callback is finite, name
