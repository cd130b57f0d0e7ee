"""Pydantic's errors in words: the key's path, what arrived, and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from hdit.errors import UserError
from hdit.names import printable
from hdit.protocols import Spec


class ConfigError(UserError):
    """A config that cannot be used; one line of the message for each thing that is wrong."""


def _specs(annotation: Any) -> list[type[Spec]]:
    """The Spec classes that an annotation allows, through unions, Annotated and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return list(getattr(annotation, "members", {}).values()) or [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, tuple):
        return [spec for part in get_args(annotation) for spec in _specs(part)]
    return []


def _kind(spec: type[Spec]) -> str | None:
    field = spec.model_fields.get("kind")
    return None if field is None else field.default


class _Place(NamedTuple):
    path: str
    holder: type[Spec] | None  # the Spec that holds the last key
    others: list[type[Spec]]  # the members of its union, if it is of one
    description: str | None


def _locate(root: type[Spec], loc: tuple[int | str, ...]) -> _Place:
    """Finds the key of an error of pydantic, whose path also names the `kind` of union members."""
    path: list[str] = []
    options: list[type[Spec]] = [root]
    holder: type[Spec] | None = None
    union: list[type[Spec]] = []
    others: list[type[Spec]] = []
    description = None
    for part in loc:
        tagged = [spec for spec in options if _kind(spec) == part]
        if len(options) > 1 and tagged:
            union, options = options, tagged
            continue
        path.append(str(part))
        if isinstance(part, int):
            continue
        others, union = union, []
        holder = options[0] if options else None
        field = holder.model_fields.get(part) if holder else None
        description = field.description if field else None
        options = _specs(field.annotation) if field else []
    return _Place(_short(printable(".".join(path)), 200), holder, others, description)


def _all_keys(spec: type[Spec], prefix: str = "") -> Iterator[str]:
    for name, field in spec.model_fields.items():
        yield prefix + name
        for inner in _specs(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


RENAMED = {
    "sampling.ladder": "sampling.sigmas",
    "diffusion.schedule": "diffusion.beta_schedule",
    "diffusion.noise_label": "diffusion.c_noise",
}
"""Keys of earlier versions, and what they are called now, where the nearest key is another."""


def _nearest(root: type[Spec], place: _Place) -> str:
    if place.path in RENAMED:
        return f"; did you mean {RENAMED[place.path]}?"
    *parents, last = place.path.split(".")
    siblings = list(place.holder.model_fields) if place.holder else []
    if kinds := [_kind(other) for other in place.others if last in other.model_fields]:
        return f"; it belongs to kind {' or '.join(map(repr, kinds))}"
    if close := difflib.get_close_matches(last, siblings, n=1):
        return f"; did you mean {'.'.join([*parents, close[0]])}?"
    here = ".".join(part for part in parents if not part.isdecimal())
    elsewhere = [key for key in _all_keys(root) if key.rpartition(".")[0] != here]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(elsewhere)}
    if close := difflib.get_close_matches(last, by_leaf, n=1, cutoff=0.8):
        return f"; did you mean {by_leaf[close[0]]}?"
    return f"; valid keys here: {', '.join(siblings)}" if siblings else ""


def explain(root: type[Spec], error: Any) -> str:
    """One line for one of the errors that validating a `root` gave."""
    place = _locate(root, error["loc"])
    path, holder, description = place.path, place.holder, place.description
    last, got = path.rpartition(".")[2], _show(error["input"])
    about = f" ({description})" if description else ""
    match error["type"]:
        case "string_too_short":
            return f"{path}: must not be empty; leave it out for its default{about}"
        case "extra_forbidden":
            return f"{path}: unknown key (set to {got}){_nearest(root, place)}"
        case "missing":
            return f"{path}: required, but not set{about}"
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
            close = difflib.get_close_matches(str(error["ctx"]["tag"]), tags, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            return f"{path}.kind: must be one of {tags}, got {_show(error['ctx']['tag'])}{hint}"
        case "union_tag_not_found":
            members = _specs(holder.model_fields[last].annotation) if holder else []
            kinds = [_kind(member) for member in members]
            return f"{path}.kind: required, but not set; one of {kinds}"
        case "model_type" | "model_attributes_type":
            field = holder.model_fields.get(last) if holder else None
            members = _specs(field.annotation) if field else []
            if isinstance(error["input"], str) and error["input"] in map(_kind, members):
                about = f"; write {path} = {{ kind = {got} }}, or set {path}.kind"
            return f"{path}: must be a table, got {got}{about}"
        case _:
            message = error["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "must be", 1)
            message = message.replace("Tuple should", "must").replace("tuple", "array")
            if error["type"] == "string_type":
                about += f"; to set it on the command line, quote it: {path}='\"{got}\"'"
            return f"{path}: {message[0].lower()}{message[1:]}, got {got}{about}"


def _show(value: Any) -> str:
    return _short(repr(value), 60)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
