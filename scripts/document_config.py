"""Writes the tables of docs/configuration.md: each key of a config, its default and its meaning.

    python scripts/document_config.py

The tables come from the typed settings in `hdit.config.schema`. The prose above the line
"<!-- tables: ... -->" is written by hand and stays as it is.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from hdit.config.schema import RunConfig
from hdit.protocols import Spec

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
MARK = "<!-- tables: written by scripts/document_config.py, do not edit below -->\n"
BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
}
Node = dict[str, Any]  # of a JSON schema


class Key(NamedTuple):
    """A key of one kind or several, with the same type, default and meaning in each."""

    name: str
    field: FieldInfo
    schema: Node
    kinds: list[str]


# ---- sections ------------------------------------------------------------------------------------


class Document:
    """Walks typed settings and collects one section for each table of a config."""

    def __init__(self) -> None:
        self.seen: dict[tuple[type[Spec], ...], str] = {}  # specs of a section -> its path
        self.sections: list[str] = []

    def markdown(self, root: type[Spec]) -> str:
        """One section for each table in `root`, parents before children."""
        for name, field in root.model_fields.items():
            self._add(name, field, 3)
        return "\n".join(self.sections)

    def _add(self, path: str, field: FieldInfo, depth: int) -> None:
        specs = specs_of(field.annotation)
        if specs in self.seen:
            return
        self.seen[specs] = path
        union = len(specs) > 1
        title = f"[[{path}]]" if _is_array(field.annotation) else f"[{path}]"
        lines = [f"{'#' * min(depth, 5)} `{title}`", ""]
        lines += _kinds(specs, field) if union else _paragraph(specs[0])
        place = len(self.sections)  # before the tables in it
        self.sections.append("")
        if keys := _keys(specs):
            columns = ["key", *(["kinds"] if union else []), "type", "default", "meaning"]
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [self._row(path, key, len(specs), depth) for key in keys]
        self.sections[place] = "\n".join([*lines, ""]).rstrip("\n") + "\n"

    def _row(self, path: str, key: Key, kinds: int, depth: int) -> str:
        specs = specs_of(key.field.annotation)
        if specs:
            self._add(f"{path}.{key.name}", key.field, depth + 1)
            where = self.seen[specs]
            noun = "array of tables" if _is_array(key.field.annotation) else "table"
            kind = f"{noun}: [`{where}`](#{where.replace('.', '').lower()})"
        else:
            kind = _type(key.schema)
        of = "all" if len(key.kinds) == kinds else ", ".join(f"`{name}`" for name in key.kinds)
        cells = [f"`{key.name}`", *([of] if kinds > 1 else []), kind, _default(key.field, specs)]
        return f"| {' | '.join(map(_cell, [*cells, key.field.description or '']))} |"


def _kinds(specs: tuple[type[Spec], ...], field: FieldInfo) -> list[str]:
    lines = ["| kind | meaning |", "|---|---|"]
    for spec in specs:
        default = " (default)" if type(field.default) is spec else ""
        lines.append(f"| `{_kind(spec)}`{default} | {_about(spec)} |")
    return [*lines, ""]


def _paragraph(spec: type[Spec]) -> list[str]:
    return [about, ""] if (about := _about(spec)) else []


def _keys(specs: tuple[type[Spec], ...]) -> list[Key]:
    found: dict[str, Key] = {}
    for spec in specs:
        schema = spec.model_json_schema()
        for name, field in spec.model_fields.items():
            if name == "kind":
                continue
            node = _resolved(schema["properties"][name], schema.get("$defs", {}))
            same = json.dumps([name, node, repr(field.annotation)], sort_keys=True)
            found.setdefault(same, Key(name, field, node, [])).kinds.append(_kind(spec))
    return list(found.values())


# ---- what a field says ---------------------------------------------------------------------------


def specs_of(annotation: Any) -> tuple[type[Spec], ...]:
    """The Spec classes that an annotation allows, through unions, arrays and registries.

    What a user registered from outside the package is left out.
    """
    if inspect.isclass(annotation) and issubclass(annotation, Spec):
        members = getattr(annotation, "members", {}).values()
        ours = tuple(spec for spec in members if spec.__module__.startswith("hdit."))
        return ours or (annotation,)
    return tuple(spec for part in get_args(annotation) for spec in specs_of(part))


def _is_array(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list)


def _kind(spec: type[Spec]) -> str:
    return str(spec.model_fields["kind"].default) if "kind" in spec.model_fields else ""


def _about(spec: type[Spec]) -> str:
    text = spec.__dict__.get("__doc__") or getattr(spec.__dict__.get("function"), "__doc__", "")
    return _cell(inspect.cleandoc(text or ""))


def _default(field: FieldInfo, specs: tuple[type[Spec], ...]) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, Spec):
        return f'`"{_kind(type(value))}"`' if len(specs) > 1 else "as below"
    return f"`{_toml(value)}`"


def _type(node: Node) -> str:
    if "const" in node or "enum" in node:
        return ", ".join(f"`{_toml(v)}`" for v in node.get("enum", [node.get("const")]))
    if options := node.get("anyOf"):
        return " or ".join(_type(option) for option in options if option.get("type") != "null")
    if node.get("type") == "array":
        if items := node.get("prefixItems"):
            return f"[{', '.join(_type(item) for item in items)}]"
        return f"array of {_type(node.get('items', {}))}"
    bounds = [text.format(_bound(node[key])) for key, text in BOUNDS.items() if key in node]
    return " ".join([node.get("type", "any"), " and ".join(bounds)]).strip()


def _bound(value: float) -> str:
    """As a person writes it: 16,384, but 1e+12."""
    return f"{value:,}" if isinstance(value, int) and value < 10**9 else f"{value:g}"


def _resolved(node: Any, definitions: Node) -> Any:
    """A JSON schema with its references to types other than tables replaced by what they mean."""
    if isinstance(node, list):
        return [_resolved(part, definitions) for part in node]
    if not isinstance(node, dict):
        return node
    if name := node.get("$ref", "").rsplit("/", 1)[-1]:
        meant = definitions[name]
        return {"table": name} if "properties" in meant else _resolved(meant, definitions)
    return {key: _resolved(part, definitions) for key, part in node.items()}


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value if not isinstance(value, tuple) else list(value))


# ---- the page ------------------------------------------------------------------------------------


def page(text: str) -> str:
    """The page with its tables written anew. Raises ValueError if `text` lacks the marking line."""
    prose, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE} must have the line {MARK.strip()!r}")
    return f"{prose}{mark}\n{Document().markdown(RunConfig)}"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
