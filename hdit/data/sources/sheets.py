"""Sheets of labels beside images: metadata.jsonl, metadata.csv and dataset.json."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from hdit.data.source import DataError
from hdit.names import printable
from hdit.reading import ReadingError, parse_json

SHEETS = ("metadata.jsonl", "metadata.csv", "dataset.json")
MAX_SHEET = 256 * 2**20
"""Bytes of a sheet: 1.28 million images take about 80 MB."""

FILE = "file_name"
LABELS = ("label", "class")
"""Columns that hold the label: the first that is there."""

LIKE_LABELS = re.compile("label|class|categor|target")
"""Names of columns that are not read, and yet may be meant as labels."""


class Rows(NamedTuple):
    """The rows of a sheet: files as it names them, and their labels as written."""

    sheet: str
    files: list[str]
    labels: list[Any] | None  # numbers or texts; None: without labels
    are_indices: bool = False  # of classes that are numbered from 0, some of which may be absent
    are_numbers: bool = False  # texts of whole numbers, by whose values classes are sorted
    unused: tuple[str, ...] = ()  # columns of a sheet that has no labels


def read_sheet(name: str, read: Callable[[str], bytes], where: str) -> Rows | None:
    """Reads a sheet by its name; None where it says nothing of labels, as another program's.

    Raises DataError for one that cannot be read, or whose columns or rows make no sense.
    """
    try:
        text = read(name).decode("utf-8-sig")
        if name.lower().endswith(".json"):
            return _dataset_json(name, text, where)
        rows = _jsonl(text) if name.lower().endswith(".jsonl") else _csv(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read: {error}; save it as UTF-8") from None
    except (OSError, ReadingError) as error:
        raise DataError(f"{where} cannot be read: {error}") from None
    except _SheetError as error:
        raise DataError(f"{where} {error}") from None
    return _metadata(name, rows, where)


class _SheetError(Exception):
    """What is wrong with a sheet, as the rest of a sentence."""


Row = dict[str, Any]


def _metadata(name: str, rows: list[tuple[int, Row]], where: str) -> Rows:
    """The files and labels of numbered rows."""
    if not rows:
        raise DataError(f"{where} has no rows")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    files = []
    for line, row in rows:
        if not isinstance(row.get(FILE), str) or not row[FILE]:
            held = printable(", ".join(row)) or "none"
            raise DataError(f"{where} gives no {FILE} in line {line}; its columns: {held}")
        files.append(row[FILE])
    column = next((c for c in LABELS if any(row.get(c) is not None for _, row in rows)), None)
    if column is None:
        if alike := [c for c in columns if LIKE_LABELS.search(c) and c not in LABELS]:
            raise DataError(
                f"{where} has no column label; its columns: {printable(', '.join(columns))}; "
                f"rename {printable(alike[0])!r} to label, or remove it for no classes"
            )
        return Rows(name, files, None, unused=tuple(columns) if columns != [FILE] else ())
    labels: list[Any] = [row.get(column) for _, row in rows]
    for (line, row), label in zip(rows, labels, strict=True):
        if type(label) not in (int, str) or label == "":
            raise DataError(
                f"{where} gives {row[FILE]!r} the label {label!r:.60} in line {line}; it must "
                "be a number or a name, in all lines or in none"
            )
    is_csv = name.lower().endswith(".csv")
    are_numbers = is_csv and all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return Rows(name, files, labels, are_numbers=are_numbers)


@lru_cache(maxsize=256)  # the same few columns, in a million rows
def _plain(column: str) -> str:
    """The name of a column by which it is compared: without case, blanks and hyphens."""
    return re.sub(r"[\s_-]+", "_", column.strip().casefold())


def _by_column(pairs: Iterable[tuple[str, Any]], line: int) -> Row:
    """A row by the plain names of its columns."""
    row: Row = {}
    for column, value in pairs:
        key = _plain(column)
        if not key:  # as by the commas at the end of each line that spreadsheets write
            continue
        if key in row:
            raise _SheetError(f"has the column {column.strip()!r} twice in line {line}")
        row[key] = value
    return row


def _jsonl(text: str) -> list[tuple[int, Row]]:
    rows = []
    for line, content in enumerate(io.StringIO(text, newline="\n"), 1):
        if not content.strip():
            continue
        row = parse_json(content, f"line {line}")
        if not isinstance(row, dict):
            raise _SheetError(f"has no object {{...}} in line {line}")
        rows.append((line, _by_column(row.items(), line)))
    return rows


def _csv(text: str) -> list[tuple[int, Row]]:
    """Rows by column. Blanks after a comma are no part of a value; all values are text.

    Rows of blanks alone are none: spreadsheets write them below the others.
    """
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        header = next(reader, [])
        if FILE not in _by_column(zip(header, header, strict=True), 1):
            columns = printable(", ".join(header)) or "none"
            raise _SheetError(f"has no column {FILE}; its columns: {columns}; {_fix(header)}")
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if any(cells[len(header) :]):
                raise _SheetError(
                    f"has {len(cells)} values in line {reader.line_num}, and {len(header)} "
                    'columns; put a value that has commas into quotes, as in "a, b"'
                )
            pairs = zip(header, cells, strict=False)
            rows.append((reader.line_num, _by_column(pairs, reader.line_num)))
    except csv.Error as error:
        raise _SheetError(f"is no CSV in line {reader.line_num}: {error}") from None
    return rows


def _fix(header: list[str]) -> str:
    """What to do about a first line that does not name the column of files."""
    other = next((sign for sign in ";\t|" if sign in "".join(header)), None)
    if len(header) == 1 and other:
        return f"separate columns by commas, not by {other!r}"
    return f"its first line must name the columns, as in {FILE},{LABELS[0]}"


def _dataset_json(name: str, text: str, where: str) -> Rows | None:
    content = parse_json(text, name)
    if not isinstance(content, dict):
        return None
    keys = [key for key in content if key.strip().casefold() == "labels"]
    if len(keys) != 1:
        return None
    rows = content[keys[0]]
    if rows is None:
        return Rows(name, [], None, are_indices=True)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where} has neither a list of [file, label] as labels nor null")
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
            raise DataError(f"{where} must list [file, label] in labels, but has {row!r:.60}")
        if type(row[1]) is not int:
            raise DataError(
                f"{where} gives {row[0]!r} the label {row[1]!r:.60}; it must be a class index"
            )
    return Rows(name, [row[0] for row in rows], [row[1] for row in rows], are_indices=True)
