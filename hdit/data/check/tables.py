"""The report of a data set in print."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from hdit.data.check.report import DataReport
from hdit.names import printable, unescape

DEFAULT_SIGMA_DATA = 0.5  # of hdit.spaces, which this package does not import
MANY_CLASSES = 30  # beyond it only the smallest and largest are printed
FEW = 10  # of many, how many are printed at each end
SHOWN_GROUPS = 20  # of duplicates, in print; a report has them all
SHOWN_FILES = 6  # of one group, in print


def lines(report: DataReport) -> Iterator[str]:
    """Lines for what no table has: warnings, files that cannot be read, duplicates."""
    for warning in report.warnings:
        yield f"warning: {warning}"
    empty = [name for name, number in report.classes.items() if not number]
    if report.unreadable and empty:
        some = ", ".join(map(_shown, empty[:FEW])) + (", ..." if empty[FEW:] else "")
        yield f"warning: classes without an image that can be read: {some}"
    for bad in report.unreadable:
        yield _shown(f"unreadable: {bad.file}: {bad.reason}")
    conflicts_first = sorted(report.duplicates, key=lambda group: not group.conflict)
    for group in conflicts_first[:SHOWN_GROUPS]:
        labels = group.classes if group.conflict else [""] * len(group.files)
        named = [f"{f} ({c})" if c else f for f, c in zip(group.files, labels, strict=True)]
        rest = len(named) - SHOWN_FILES
        named = [*named[:SHOWN_FILES], f"and {rest} more"] if rest > 0 else named
        head = "label conflict" if group.conflict else "duplicates"
        yield _shown(f"{head}: {' = '.join(named)}")
    if (rest := len(report.duplicates) - SHOWN_GROUPS) > 0:
        yield f"duplicates: {rest} groups more; --json names them all"


def tables(report: DataReport) -> Iterator[Table]:
    """The report for a terminal of 80 columns or more."""
    yield _table(report)
    if report.readable:
        there = {name: number for name, number in report.aspects.items() if number}
        yield _histogram("width to height", there, report.readable)
    if report.classes and report.readable:
        yield _class_table(report.classes, report.readable)


def _table(report: DataReport) -> Table:
    table = Table(title=_shown(report.place), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, text: str) -> None:
        table.add_row(Text(name), Text(_shown(text)))

    n = report.readable
    row("images", f"{report.images:,} ({report.kind})")
    if report.held_out:
        row("held out", f"{report.held_out:,} images, which are not among these")
    if report.left_out:
        others = ", ".join(f"{kind} {number:,}" for kind, number in report.left_out.items())
        row("left out", others)
    bad = len(report.unreadable)
    row("unreadable", f"{_of(bad, report.images)}; training takes up to {_share(report)}")
    if not n:
        return table
    row("file sizes", f"{report.stored_bytes:,} bytes in all, {report.stored_bytes // n:,} each")
    row("formats", ", ".join(f"{name} {number:,}" for name, number in report.formats.items()))
    row("modes", ", ".join(f"{name} {number:,}" for name, number in report.modes.items()))
    table.add_section()
    for name, size in (
        ("smallest", report.smallest),
        ("median", report.median),
        ("largest", report.largest),
    ):
        assert size is not None, "there are images"
        row(name, f"{size.width} x {size.height}  {size.file}")
    height, width = report.size
    row("enlarged", f"{_of(report.enlarged, n)}, smaller than {width} x {height} on a side")
    table.add_section()
    row("classes", _class_line(report.classes))
    files = sum(len(group.files) for group in report.duplicates)
    conflicts = sum(group.conflict for group in report.duplicates)
    copies = f"{len(report.duplicates):,} groups, {files:,} files" if files else "none"
    row("duplicates", copies + (f"; {conflicts:,} with labels that differ" if conflicts else ""))
    table.add_section()
    assert report.mean is not None, "there are images"
    assert report.sigma_data is not None, "there are images"
    row("sigma_data", f"{report.sigma_data:.4g} at {width} x {height}; mean {report.mean:.4f}")
    if report.sigma_data:
        line = f"space.sigma_data = {report.sigma_data:.4g}"
        row("to set it", f"{line}  ({DEFAULT_SIGMA_DATA:g} without it; not for latents)")
    return table


def _class_line(classes: dict[str, int]) -> str:
    if not classes:
        return "none: training without labels"
    low, high = min(classes, key=lambda c: classes[c]), max(classes, key=lambda c: classes[c])
    line = f"{len(classes):,}; smallest {low}: {classes[low]:,}; largest {high}: {classes[high]:,}"
    empty = sum(not number for number in classes.values())
    return line + (f"; {empty:,} without images" if empty else "")


def _class_table(classes: dict[str, int], total: int) -> Table:
    if len(classes) <= MANY_CLASSES:
        return _histogram("classes", classes, total)
    ranked = sorted(classes.items(), key=lambda item: item[1])  # stable
    ends = dict([*ranked[:FEW], *ranked[-FEW:]])
    title = f"the {FEW} smallest and the {FEW} largest of {len(classes):,} classes"
    return _histogram(title, ends, total)


def _histogram(title: str, numbers: dict[str, int], total: int) -> Table:
    table = Table(title=title, show_header=False, min_width=len(title))
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(numbers.values()) or 1
    for name, number in numbers.items():
        bar = "#" * -(-24 * number // most)
        table.add_row(Text(_shown(name)), f"{number:,}", f"{number / total:.1%}", bar)
    return table


def _shown(text: str) -> str:
    """Text of the report as a terminal can show it, with each escape once."""
    return printable(unescape(text))


def _share(report: DataReport) -> str:
    return f"{100 * report.max_bad_share:.3g}%"


def _of(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})" if number else "none"
