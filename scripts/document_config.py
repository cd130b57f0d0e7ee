"""Writes the tables of docs/configuration.md: each key of a config, its default and its meaning.

    python scripts/document_config.py

The tables come from the typed settings in `hdit.config.schema`. The prose above the line
"<!-- tables: ... -->" is written by hand and stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdit.config.schema import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
MARK = "<!-- tables: written by scripts/document_config.py, do not edit below -->\n"
BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
}
Node = dict[str, Any]


class Document:
    """Walks a JSON schema and collects one section for each table of settings.

    schema: as pydantic's `model_json_schema` gives it, with "$defs".
    """

    def __init__(self, schema: Node):
        self.definitions: dict[str, Node] = schema.get("$defs", {})
        self.root = schema
        self.seen: dict[tuple[str, ...], str] = {}  # definitions of a section -> its path
        self.sections: list[str] = []

    def markdown(self) -> str:
        """One section for each table, parents before children."""
        for key, node in self.root["properties"].items():
            self._section(key, node, 3)
        return "\n".join(self.sections)

    def _section(self, path: str, node: Node, depth: int) -> None:
        specs, many = self._specs(node)
        names = tuple(specs)
        if not specs or names in self.seen:
            return
        self.seen[names] = path
        title = f"[[{path}]]" if many else f"[{path}]"
        lines = [f"{'#' * min(depth, 5)} `{title}`", ""]
        kinds = {name: _kind(self.definitions[name]) for name in names}
        union = len(names) > 1
        if union:
            lines += ["| kind | meaning |", "|---|---|"]
            default = _default_kind(node, kinds, self.definitions)
            for name in names:
                mark = " (default)" if kinds[name] == default else ""
                lines.append(f"| `{kinds[name]}`{mark} | {_about(self.definitions[name])} |")
            lines.append("")
        elif about := _about(self.definitions[names[0]]):
            lines += [about, ""]
        keys = self._keys(names, kinds)
        if keys:
            head = ["key", "kinds", "type", "default", "meaning"]
            head = head if union else [head[0], *head[2:]]
            lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
            index = len(self.sections)
            self.sections.append("")  # its place is before those of the tables in it
            rows = [
                self._row(path, key, spec, required, of, union, depth)
                for key, spec, required, of in keys
            ]
            self.sections[index] = "\n".join([*lines, *rows, ""])
        else:
            self.sections.append("\n".join(lines))

    def _specs(self, node: Node) -> tuple[list[str], bool]:
        """-> (names of the definitions that a value may have, whether it is an array of them)."""
        if "$ref" in node:
            name = node["$ref"].rsplit("/", 1)[-1]
            inner = self.definitions[name]
            return ([name], False) if "properties" in inner else self._specs(inner)
        if node.get("type") == "array" and "items" in node:
            return self._specs(node["items"])[0], True
        options = node.get("oneOf", node.get("anyOf", []))
        return [name for option in options for name in self._specs(option)[0]], False

    def _keys(
        self, names: tuple[str, ...], kinds: dict[str, str]
    ) -> Iterator[tuple[str, Node, bool, str]] | list[tuple[str, Node, bool, str]]:
        """-> (key, its schema, whether it is required, its kinds), equal ones joined."""
        found: dict[str, tuple[str, Node, bool, list[str]]] = {}
        for name in names:
            spec = self.definitions[name]
            for key, node in spec["properties"].items():
                if key == "kind":
                    continue
                required = key in spec.get("required", [])
                same = json.dumps([key, node, required], sort_keys=True)
                found.setdefault(same, (key, node, required, []))[3].append(kinds[name])
        rows = found.values()
        return [
            (key, node, required, "all" if len(of) == len(names) else ", ".join(_code(of)))
            for key, node, required, of in rows
        ]

    def _row(
        self, path: str, key: str, node: Node, required: bool, of: str, union: bool, depth: int
    ) -> str:
        below = f"{path}.{key}"
        specs, many = self._specs(node)
        if specs:
            self._section(below, node, depth + 1)
            where = self.seen[tuple(specs)]
            kind = f"{'array of tables' if many else 'table'}: [`{where}`](#{_anchor(where)})"
        else:
            kind = self._type(node)
        meaning = node.get("description", "")
        default = "required" if required else self._default(node, specs)
        cells = [f"`{key}`", *([of] if union else []), kind, default, meaning]
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    def _type(self, node: Node) -> str:
        if "$ref" in node:
            return self._type(self.definitions[node["$ref"].rsplit("/", 1)[-1]])
        if "const" in node or "enum" in node:
            return ", ".join(f"`{_toml(v)}`" for v in node.get("enum", [node.get("const")]))
        if options := node.get("anyOf"):
            return " or ".join(self._type(o) for o in options if o.get("type") != "null")
        if node.get("type") == "array":
            if items := node.get("prefixItems"):
                return f"[{', '.join(self._type(item) for item in items)}]"
            return f"array of {self._type(node.get('items', {}))}"
        bounds = [text.format(_toml(node[key])) for key, text in BOUNDS.items() if key in node]
        return " ".join([node.get("type", "any"), ", ".join(bounds)]).strip()

    def _default(self, node: Node, specs: list[str]) -> str:
        value = node.get("default")
        if value is None:
            return ""
        if isinstance(value, dict):
            kind = value.get("kind") if len(specs) > 1 else None
            return f'`"{kind}"`' if kind else "as below"
        return f"`{_toml(value)}`"


def _kind(spec: Node) -> str:
    return str(spec["properties"].get("kind", {}).get("const", ""))


def _default_kind(node: Node, kinds: dict[str, str], definitions: dict[str, Node]) -> str | None:
    value = node.get("default")
    return value.get("kind") if isinstance(value, dict) else None


def _about(spec: Node) -> str:
    return _cell(spec.get("description", ""))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _code(names: list[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _toml(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _anchor(path: str) -> str:
    """GitHub's anchor for the heading of a section."""
    return path.replace(".", "").lower()


def page(text: str) -> str:
    """The page with its tables written anew. Raises ValueError if `text` lacks the marking line."""
    prose, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE} must have the line {MARK.strip()!r}")
    return f"{prose}{mark}\n{Document(RunConfig.model_json_schema()).markdown()}"


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
