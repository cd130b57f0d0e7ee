"""How samples were made, as the record beside them tells: for a card, and for their classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hdit.names import path_of
from hdit.reading import ReadingError, parse_json, read_json, read_text
from hdit.sampling.record import LINES, MAX_RECORD, SAMPLES

FACTS = ("checkpoint", "weights", "sampling", "sigma_range", "evaluations", "guide", "macs")


class Recipe(NamedTuple):
    """Facts of the sampling, and the classes of the samples: both lists are empty where unknown."""

    facts: dict[str, Any]
    classes: list[str]
    labels: list[int]  # of each sample, an index of classes


NONE = Recipe({}, [], [])


def recipe_of(content: Any, entries: Sequence[Any] = ()) -> Recipe:
    """What the content of a samples.json tells.

    `entries` are the samples one by one, where that does not list them itself. What is missing or
    of another kind is left out: the images are there all the same.
    """
    if not isinstance(content, dict):
        return NONE
    entries = content.get("samples") or entries
    found = {key: content[key] for key in FACTS if content.get(key) is not None}
    if content.get("images") is not None:
        found["trained_images"] = content["images"]
    if isinstance(kind := content.get("labels"), dict) and "kind" in kind:
        found["labels"] = kind["kind"]
    if seeds := _seeds(content.get("seeds"), entries):
        found["seeds"] = seeds
    return Recipe(found, *_classes(entries))


def _seeds(told: Any, entries: Sequence[Any]) -> list[int] | None:
    """The first and the last seed."""
    if isinstance(told, dict):
        first, number = told.get("first"), told.get("number")
        if isinstance(first, int) and isinstance(number, int):
            return [first, first + number - 1]
    listed = [one.get("seed") if isinstance(one, dict) else None for one in entries]
    seeds = [seed for seed in listed if isinstance(seed, int)]
    return [min(seeds), max(seeds)] if seeds and len(seeds) == len(listed) else None


def _classes(entries: Sequence[Any]) -> tuple[list[str], list[int]]:
    told = [one.get("class") if isinstance(one, dict) else None for one in entries]
    names = [name for name in told if isinstance(name, str)]
    if len(names) < len(told):
        return [], []
    indices = {name: i for i, name in enumerate(sorted(set(names)))}
    return list(indices), [indices[name] for name in names]


def of_folder(folder: Path, number: int) -> Recipe:
    """What samples.json and samples.jsonl tell of so many samples in a folder."""
    try:
        content = read_json(folder / SAMPLES, MAX_RECORD)
    except (FileNotFoundError, ReadingError):
        return NONE
    try:
        lines = read_text(folder / LINES, MAX_RECORD).splitlines()
        entries = [parse_json(line, LINES) for line in lines]
    except (FileNotFoundError, ReadingError):
        entries = []
    found = recipe_of(content, entries)
    return found if len(found.labels) in (0, number) else found._replace(classes=[], labels=[])


def beside(place: str, kind: str) -> dict[str, Any]:
    """Facts of a file of samples, an npz or shards, by the record that lies beside it."""
    path = path_of(place)
    base = path.name.removesuffix(f".{kind}")
    if kind == "tar":
        base = re.sub(r"[-_.]*\{.*\}[-_.]*", "", base) or "samples"
    try:
        content = read_json(path.with_name(f"{base}.{SAMPLES}"), MAX_RECORD)
    except (OSError, ReadingError):
        return {}
    return recipe_of(content).facts
