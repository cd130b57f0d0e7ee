"""The files below a folder, by name: one listing for training and evaluation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Tree(NamedTuple):
    """What lies below a folder, by name relative to it, with "/" between the parts."""

    files: list[str]
    folders: list[str]  # all that were listed
    repeats: list[tuple[str, str]]  # a link to a folder, and by which name that was listed


def walk(root: Path) -> Tree:
    """Lists all below a folder but for hidden folders. Raises OSError for one that cannot be read.

    Links are followed, and each folder is listed once: a link to one that it lies in itself ends
    there without a word, another is among the `repeats`.
    """
    tree = Tree([], [], [])
    names: dict[tuple[int, int], str] = {}  # of folders, by what they really are
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        name, above = waiting.pop()
        path = os.path.join(root, name)
        real = os.stat(path)
        key = (real.st_dev, real.st_ino)
        if key in names:
            if key not in above:
                tree.repeats.append((name, names[key]))
            continue
        names[key] = name
        if name:
            tree.folders.append(name)
        folders = []
        with os.scandir(path) as entries:
            for entry in entries:
                below = f"{name}/{entry.name}" if name else entry.name
                # of a link that leads nowhere, or to itself, entry.is_dir() may raise
                if not (os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()):
                    tree.files.append(below)
                elif not entry.name.startswith("."):
                    folders.append((entry.is_symlink(), below))
        # Of those in a folder, links come last, so that what is no link keeps its name.
        for _, below in sorted(folders, reverse=True):
            waiting.append((below, above | {key}))
    return tree
