"""Listing of files: which are images, in which order, and with which labels."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hdit.data.images import extensions, numbered
from hdit.data.source import DataError

SHEETS = ("metadata.jsonl", "metadata.csv", "dataset.json")


class Listing(NamedTuple):
    """The images under a folder, by name relative to it, with "/" between the parts."""

    names: list[str]
    labels: list[int]  # 0 where there are no classes
    classes: list[str]


def is_hidden(name: str) -> bool:
    """Whether a file or a folder that it is in begins with a dot; or is macOS's, in an archive."""
    return name.startswith((".", "__MACOSX/")) or "/." in name


def is_image(name: str) -> bool:
    """Whether a name has the extension of a format that Pillow reads."""
    return posixpath.splitext(name)[1].lower() in extensions()


def order(name: str) -> list[tuple[bool, str]]:
    """Sorting key: the files of a folder, by name, before those of its sub-folders."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def arrange(names: Iterable[str], read: Callable[[str], bytes], where: str) -> Listing:
    """Lists the images among `names`: flat, in a sub-folder for each class, or labelled by a sheet.

    A sheet is a file at the top that has the labels: `metadata.jsonl` or `metadata.csv` as for
    datasets' imagefolder, with `file_name` and, where there are labels, `label`; or the
    `dataset.json` of StyleGAN and EDM. It must name each image that is there, and no other.
    `read` gives the content of a file, and `where` is what errors begin with.
    """
    known = {name for name in names if not is_hidden(name)}
    images = sorted(filter(is_image, known), key=order)
    sheets = {
        name: text for name in SHEETS if name in known and (text := _sheet(name, read, where))
    }
    if len(sheets) > 1:
        raise DataError(f"{where} has {' and '.join(sheets)}; keep the one that has the labels")
    for name, rows in sheets.items():
        return _by_sheet(known, images, rows, f"{where} has a {name} that")
    if not images:
        raise DataError(f"{where} has no image files that Pillow can read")
    folders = [name.partition("/")[0] if "/" in name else "" for name in images]
    classes = sorted(set(folders))
    if classes == [""]:
        return Listing(images, [0] * len(images), [])
    if "" in classes:
        raise DataError(
            f"{where} has images beside sub-folders with images ({classes[1]}/...); give it either "
            "images or a sub-folder for each class"
        )
    index = {name: i for i, name in enumerate(classes)}
    return Listing(images, [index[folder] for folder in folders], classes)


# ---- sheets --------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    files: list[str]
    labels: list[Any] | None  # None: without labels
    are_indices: bool  # of classes that are numbered from 0, some of which may be absent


def _sheet(name: str, read: Callable[[str], bytes], where: str) -> _Rows | None:
    """Reads a sheet; None where it says nothing of labels, as another program's."""
    where = f"{where} has a {name} that"
    try:
        text = read(name).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read: {error}") from None
    if name == "dataset.json":
        return _dataset_json(text, where)
    rows = _jsonl(text, where) if name.endswith(".jsonl") else _csv(text, where)
    if not rows:
        raise DataError(f"{where} has no rows")
    for line, row in rows:
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise DataError(f"{where} gives no file_name in line {line}")
    files = [row["file_name"] for _, row in rows]
    labels = [row.get("label") for _, row in rows]
    if all(label is None for label in labels):
        return _Rows(files, None, False)
    for (line, row), label in zip(rows, labels, strict=True):
        if type(label) not in (int, str) or label == "":
            raise DataError(
                f"{where} gives {row['file_name']!r} the label {label!r} in line {line}; it must "
                "be a number or a name, in all lines or in none"
            )
    return _Rows(files, labels, False)


def _jsonl(text: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise DataError(f"{where} is no JSON in line {line}: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} has no object {{...}} in line {line}")
        rows.append((line, row))
    return rows


def _csv(text: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    """Rows by column. Labels that are all whole numbers are numbers."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows: list[tuple[int, dict[str, Any]]] = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{where} is no CSV in line {reader.line_num}: {error}") from None
    if "file_name" not in (reader.fieldnames or ()):
        columns = ", ".join(reader.fieldnames or ()) or "none"
        raise DataError(f"{where} has no column file_name; its columns: {columns}")
    if all(re.fullmatch(r"-?\d+", row.get("label") or "") for _, row in rows):
        rows = [(line, row | {"label": int(row["label"])}) for line, row in rows]
    return rows


def _dataset_json(text: str, where: str) -> _Rows | None:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    rows = content["labels"]
    if rows is None:
        return _Rows([], None, True)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where} has neither a list of [file, label] as labels nor null")
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
            raise DataError(f"{where} must list [file, label] in labels, but has {row!r:.60}")
        if type(row[1]) is not int:
            raise DataError(
                f"{where} gives {row[0]!r} the label {row[1]!r:.60}; it must be a class index"
            )
    return _Rows([row[0] for row in rows], [row[1] for row in rows], True)


def _by_sheet(known: set[str], images: list[str], rows: _Rows, where: str) -> Listing:
    if rows.labels is None and not rows.files:
        files = images
        labels: Sequence[Any] = [0] * len(images)
    else:
        named = _resolved(rows.files, known, where)
        if rest := [name for name in images if name not in named]:
            raise DataError(
                f"{where} does not name {len(rest)} of the {len(images)} images, as "
                f"{rest[0]!r}; add or remove them"
            )
        files = sorted(named, key=order)
        labels = [0] * len(files) if rows.labels is None else [rows.labels[named[f]] for f in files]
    if not files:
        raise DataError(f"{where} stands alone: there are no image files that Pillow can read")
    if rows.labels is None:
        return Listing(files, list(labels), [])
    if rows.are_indices:
        return Listing(files, list(labels), numbered(labels, where))
    labels, classes = by_name(labels, where)
    return Listing(files, labels, classes)


def _resolved(files: list[str], known: set[str], where: str) -> dict[str, int]:
    """The row of each file that is named."""
    rows: dict[str, int] = {}
    for row, file in enumerate(files):
        name = file if file in known else posixpath.normpath(file.replace("\\", "/"))
        if name not in known:
            raise DataError(f"{where} names {file!r}, which is not there")
        if name in rows:
            raise DataError(f"{where} names {file!r} twice")
        rows[name] = row
    return rows


def by_name(labels: Sequence[Any], where: str) -> tuple[list[int], list[str]]:
    """Turns labels into class indices -> (indices, classes: the sorted names, or numbers by value).

    Raises DataError for names and numbers together.
    """
    values = set(labels)
    if len({type(value) for value in values}) > 1:
        raise DataError(f"{where} has labels that are names and labels that are numbers")
    ranks = {value: i for i, value in enumerate(sorted(values))}
    return [ranks[label] for label in labels], [str(value) for value in ranks]
