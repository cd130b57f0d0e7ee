"""Listing of files: which are images, in which order, and with which labels."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from hdit.data.images import SIGNATURE_BYTES, extensions, has_signature, numbered
from hdit.data.source import DataError
from hdit.data.sources.sheets import LIKE_LABELS, SHEETS, Rows, read_sheet
from hdit.names import escape, printable, unescape

NO_EXTENSION, HIDDEN = "no extension", "hidden"
SHOWN_FOLDERS = 10  # of those that are no class

EXPECTED = frozenset(
    f".{kind}"
    for kind in (
        *("txt", "md", "rst", "html", "url", "log", "db", "ini", "md5", "sha256"),
        *("json", "jsonl", "csv", "tsv", "xml", "yaml", "yml", "toml"),
    )
)
"""Extensions of files that often lie beside images; nobody takes them for images."""

EXPECTED_NAMES = frozenset(
    ("readme", "license", "licence", "copying", "notice", "makefile", "md5sums", "sha256sums")
)

FOREIGN = re.compile(r"(?:^|/)(?:\.|__MACOSX/|@eaDir/)")
"""Hidden names, and folders of thumbnails or attributes that macOS and Synology's NAS write."""


class Content(NamedTuple):
    """How files are read by name. Both may raise what the file or archive does."""

    text: Callable[[str], bytes]  # of a sheet; raises ReadingError where it is none
    start: Callable[[str], bytes]  # the first bytes, at least SIGNATURE_BYTES where there are


class Listing(NamedTuple):
    """The images under a folder, by name relative to it, with "/" between the parts."""

    names: list[str]
    labels: list[int]  # 0 where there are no classes
    classes: list[str]
    left_out: dict[str, int]  # how many other files there are, by extension
    warnings: list[str]  # whole sentences


def is_hidden(name: str) -> bool:
    """Whether a file or a folder that it is in begins with a dot, or is no user's own."""
    return FOREIGN.search(name) is not None


def is_image(name: str) -> bool:
    """Whether a name has the extension of a format that Pillow reads."""
    return extension(name) in extensions()


def extension(name: str) -> str:
    """The extension of a name in lower case, as in ".png"; empty if there is none."""
    return posixpath.splitext(name)[1].lower().rstrip(".")


def find_images(names: Iterable[str], start: Callable[[str], bytes]) -> list[str]:
    """The images among files, sorted: by extension, or by content where there is no extension.

    `start` gives the first bytes of a file.
    """
    found = [n for n in names if is_image(n) or (not extension(n) and _begins_as_image(n, start))]
    return sorted(found, key=order)


def _begins_as_image(name: str, start: Callable[[str], bytes]) -> bool:
    try:
        return has_signature(start(name)[:SIGNATURE_BYTES])
    except Exception:  # damaged, or not to be read: no image, and counted as left out
        return False


def count_left_out(names: Iterable[str]) -> dict[str, int]:
    """Counts files that are not used by their extension; most frequent first."""
    counts = Counter(HIDDEN if is_hidden(n) else extension(n) or NO_EXTENSION for n in names)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def is_expected(name: str) -> bool:
    """Whether a file that is no image need not be told of, as a README."""
    stem = posixpath.splitext(posixpath.basename(name))[0].lower()
    return is_hidden(name) or extension(name) in EXPECTED or stem in EXPECTED_NAMES


def tell(left_out: dict[str, int]) -> str:
    """What is left out in words, as in ".heic 40, .pdf 1"."""
    return ", ".join(printable(f"{kind} {number:,}") for kind, number in left_out.items())


def order(name: str) -> list[tuple[bool, str]]:
    """Sorting key: the files of a folder, by name, before those of its sub-folders."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def arrange(names: Iterable[str], content: Content, where: str) -> Listing:
    """Lists the images among `names`: flat, in a sub-folder for each class, or labelled by a sheet.

    A sheet is a file at the top that has the labels: `metadata.jsonl` or `metadata.csv` as for
    datasets' imagefolder, with `file_name` and, where there are labels, `label`; or the
    `dataset.json` of StyleGAN and EDM. It must name each image that is there, and no other.
    A name that ends in "/" is a sub-folder, and `where` is what errors begin with.
    """
    all_names = set(names)
    known = {name for name in all_names if not is_hidden(name) and not name.endswith("/")}
    images = find_images(known, content.start)
    tops = {name.partition("/")[0] for name in all_names if "/" in name and not is_hidden(name)}
    warnings: list[str] = []
    rows = _the_sheet(known, content, where, warnings)
    if rows is not None:
        used, labels, classes = _by_sheet(known, images, rows, f"{where} has a {rows.sheet} that")
        empty: list[str] = []
    else:
        used, labels, classes = _by_folder(known, images, where)
        warnings += _about_nested(images, classes, where)
        empty = sorted(tops - set(classes)) if classes else []
    sheets = {rows.sheet} if rows is not None else set()
    others = {name for name in all_names if not name.endswith("/")} - set(used) - sheets
    warnings += _about_others(others, where) + _about_sheets(others, where)
    if not classes:
        warnings += _about_unread(others, where)
    warnings += _about_empty(empty, others, where)
    return Listing(used, labels, classes, count_left_out(others), warnings)


def list_images(names: Iterable[str], start: Callable[[str], bytes], where: str) -> Listing:
    """Lists all images among `names`, whatever their folders and sheets mean: without classes.

    Arguments are as of `arrange` and `find_images`. Raises DataError where there are no images.
    """
    all_files = {name for name in names if not name.endswith("/")}
    known = {name for name in all_files if not is_hidden(name)}
    images = find_images(known, start)
    _check_some(images, known, where)
    others = all_files - set(images)
    told = _about_others(others, where)
    return Listing(images, [0] * len(images), [], count_left_out(others), told)


def _check_some(images: list[str], known: set[str], where: str) -> None:
    """Raises DataError where there are no images, with what there is."""
    if not images:
        others = f"; it has {tell(count_left_out(known))}" if known else ""
        raise DataError(f"{where} has no image files that Pillow can read{others}")


def _by_folder(
    known: set[str], images: list[str], where: str
) -> tuple[list[str], list[int], list[str]]:
    """(images, labels, classes) by sub-folders. Raises DataError for a mixed or empty layout."""
    _check_some(images, known, where)
    folders = [name.partition("/")[0] if "/" in name else "" for name in images]
    classes = sorted(set(folders))
    if classes == [""]:
        return images, [0] * len(images), []
    if "" in classes:
        raise DataError(
            f"{where} has images beside sub-folders with images ({escape(classes[1])}/...); give "
            "it either images or a sub-folder for each class"
        )
    index = {name: i for i, name in enumerate(classes)}
    return images, [index[folder] for folder in folders], classes


# ---- what is not used ----------------------------------------------------------------------------


def _about_nested(images: list[str], classes: list[str], where: str) -> list[str]:
    """A warning of folders in class folders, as of train/ and val/ that hold the classes."""
    nested = next((name for name in images if classes and name.count("/") > 1), None)
    if nested is None:
        return []
    inner = posixpath.dirname(nested)
    held = [printable(escape(name)) for name in classes[:SHOWN_FOLDERS]]
    more = f" and {len(classes) - len(held):,} more" if classes[len(held) :] else ""
    return [
        f"{where}: classes are the folders at the top ({', '.join(held)}{more}); folders in them, "
        f"as {printable(inner)}/, are none; if they should be, take the folder that they lie in "
        "as the data"
    ]


def _about_unread(others: Collection[str], where: str) -> list[str]:
    """A warning of files at the top that may have labels, where there are no classes."""
    likely = sorted(name for name in others if _may_have_labels(name))
    return [
        f"{where}: there are no classes, for {printable(name)} is not read; labels are taken from "
        f"{', '.join(SHEETS[:-1])} or {SHEETS[-1]} alone"
        for name in likely[:1]
    ]


def _may_have_labels(name: str) -> bool:
    stem, kind = posixpath.splitext(name.lower())
    if "/" in name or is_hidden(name) or name.lower() in SHEETS:
        return False
    is_named_so = LIKE_LABELS.search(stem) or stem == "metadata"
    return kind in (".csv", ".tsv", ".jsonl") or (kind in (".json", ".txt") and bool(is_named_so))


def _about_others(others: Collection[str], where: str) -> list[str]:
    """A warning of files that a user may take for images."""
    unexpected = [name for name in others if not is_expected(name)]
    if not unexpected:
        return []
    number = len(unexpected)
    return [
        f"{where}: {number:,} {'files are' if number > 1 else 'file is'} left out, in no "
        f"format that Pillow reads: {tell(count_left_out(unexpected))}; convert or remove "
        f"{'them' if number > 1 else 'it'}"
    ]


def _about_sheets(others: Collection[str], where: str) -> list[str]:
    """A warning of a sheet that lies in a sub-folder."""
    nested = sorted(n for n in others if "/" in n and posixpath.basename(n).lower() in SHEETS)
    return [
        f"{where}: {printable(name)} is not read, for labels are taken from a file at the "
        "top alone; move it there, or name its folder as data.path"
        for name in nested[:1]
    ]


def _about_empty(empty: list[str], others: Collection[str], where: str) -> list[str]:
    """A warning of sub-folders that are no class, beside others that are.

    Raises DataError where they look like classes whose images cannot be read: indices would move.
    """
    held: dict[str, list[str]] = {folder: [] for folder in empty}
    for name in others:
        if not is_hidden(name) and (files := held.get(name.partition("/")[0])) is not None:
            files.append(name)
    told = []
    for folder, files in held.items():
        words = f"{printable(folder)}/ (it has {tell(count_left_out(files)) or 'nothing'})"
        if not all(map(is_expected, files)):
            raise DataError(
                f"{where} has a class folder without an image that Pillow can read: {words}; "
                "convert its files, or remove the folder, and it is no class"
            )
        told.append(words)
    if len(told) > SHOWN_FOLDERS:
        told[SHOWN_FOLDERS:] = [f"and {len(told) - SHOWN_FOLDERS:,} more"]
    return [f"{where}: no class is made of folders without images: {', '.join(told)}"][: len(told)]


# ---- labels of a sheet ---------------------------------------------------------------------------


def _the_sheet(known: set[str], content: Content, where: str, warnings: list[str]) -> Rows | None:
    """Reads the sheet that has the labels, if there is one; adds to `warnings` what it lacks."""
    sheets = []
    present = {name for name in known if name.lower() in SHEETS}
    for name in sorted(present, key=lambda name: (SHEETS.index(name.lower()), name)):
        rows = read_sheet(name, content.text, f"{where} has a {name} that")
        if rows is None:
            warnings.append(f"{where} has a {name} that says nothing of labels; it is not used")
            continue
        sheets.append(rows)
        if rows.unused:
            warnings.append(
                f"{where} has a {name} without a column label, so there are no classes; its "
                f"columns: {printable(', '.join(rows.unused))}"
            )
    if len(sheets) > 1:
        both = " and ".join(rows.sheet for rows in sheets)
        raise DataError(f"{where} has {both}; keep the one that has the labels")
    return sheets[0] if sheets else None


def _by_sheet(
    known: set[str], images: list[str], rows: Rows, where: str
) -> tuple[list[str], list[int], list[str]]:
    """(images, labels, classes) by a sheet. Raises DataError where it does not fit the images."""
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
        return files, list(labels), []
    if rows.are_indices:
        return files, list(labels), numbered(labels, where.removesuffix(" that"))
    indices, classes = by_name(labels, where, by_value=rows.are_numbers)
    return files, indices, classes


def _resolved(files: list[str], known: set[str], where: str) -> dict[str, int]:
    """The row of each file that is named."""
    rows: dict[str, int] = {}
    absent = []
    for row, file in enumerate(files):
        ways = file, unescape(file), posixpath.normpath(file.replace("\\", "/"))
        name = next((way for way in ways if way in known), "")
        if not name:
            absent.append(file)
        elif name in rows:
            raise DataError(f"{where} names {file!r} twice")
        else:
            rows[name] = row
    if absent:
        more = f" (the first of {len(absent):,})" if absent[1:] else ""
        raise DataError(
            f"{where} names {absent[0]!r}, which is not there{more}; files are named as seen from "
            "the folder of the sheet, with their extension"
        )
    return rows


def by_name(
    labels: Sequence[int | str], where: str, *, by_value: bool = False
) -> tuple[list[int], list[str]]:
    """Turns labels into class indices -> (indices, classes: the names as written, sorted).

    Numbers, and texts of whole numbers with `by_value`, are sorted by value. Raises DataError for
    names and numbers together, and for names that differ in blanks at their ends alone.
    """
    values = set(labels)
    if len({type(value) for value in values}) > 1:
        raise DataError(f"{where} has labels that are names and labels that are numbers")
    key: Callable[[int | str], Any] = (lambda v: (int(v), str(v))) if by_value else (lambda v: v)
    ranks = {value: i for i, value in enumerate(sorted(values, key=key))}
    classes = [str(value) for value in ranks]
    stripped: dict[str, str] = {}
    for name in classes:
        if (other := stripped.setdefault(name.strip(), name)) != name:
            raise DataError(
                f"{where} has the labels {other!r} and {name!r}, which differ in blanks alone; "
                "write them alike"
            )
    return [ranks[label] for label in labels], classes
