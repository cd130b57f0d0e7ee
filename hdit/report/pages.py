"""The records of an ablation as a Markdown table and as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from statistics import mean
from typing import Any, NamedTuple

from hdit.report.plots import plot_lines

Record = dict[str, Any]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
figure { margin: 1.5em 0 } img { image-rendering: pixelated; max-width: 100% }
.note { color: #555 } code { font-size: 90% }
"""


class Column(NamedTuple):
    """A figure of the table: how a record gives it, and how it is written."""

    title: str
    value: Callable[[Record], float | None]
    format: Callable[[float], str]


COLUMNS = (
    Column("seeds", lambda r: 1, lambda v: f"{v:.0f}"),
    Column("parameters", lambda r: r["parameters"], lambda v: f"{v / 1e6:.2f} M"),
    Column("GMAC", lambda r: r["gmacs"], lambda v: f"{v:.3g}"),
    Column("images", lambda r: r["images"], lambda v: f"{v:,.0f}"),
    Column("seconds", lambda r: r["seconds"], lambda v: f"{v:.0f}"),
    Column("images/s", lambda r: r["images_per_second"], lambda v: f"{v:.3g}"),
    Column("peak memory", lambda r: r["peak_memory"], lambda v: f"{v / 2**30:.2f} GiB"),
    Column("x0 loss", lambda r: mean(r["x0_loss"]), lambda v: f"{v:.5f}"),
    Column("Frechet distance", lambda r: r.get("frechet_distance"), lambda v: f"{v:.4g}"),
)


def rows_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each row, which differ by seed, in the order of the matrix."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["name"], []).append(record)
    return rows


def table(records: Sequence[Record]) -> list[list[str]]:
    """The head and a line for each row: means over seeds, and the spread where there are several.

    The x0 loss is unweighted, |D - x0|^2 of held-out images, the mean over the bins of noise.
    """
    columns = [c for c in COLUMNS if any(c.value(r) is not None for r in records)]
    lines = [["", *(c.title for c in columns)]]
    for name, group in rows_of(records).items():
        cells = []
        for column in columns:
            values = [v for r in group if (v := column.value(r)) is not None]
            if column.title == "seeds":
                values = [len(values)]
            text = column.format(mean(values)) if values else ""
            if len(values) > 1 and max(values) > min(values):
                text += f" ({column.format(min(values))} to {column.format(max(values))})"
            cells.append(text)
        lines.append([name, *cells])
    return lines


def bins(records: Sequence[Record]) -> list[list[str]]:
    """The head and a line for each row: the x0 loss in each bin of noise levels."""
    edges = records[0]["sigma_edges"]
    head = [f"{low:.2g} to {high:.2g}" for low, high in pairwise(edges)]
    lines = [["sigma", *head]]
    for name, group in rows_of(records).items():
        losses = zip(*(r["x0_loss"] for r in group), strict=True)
        lines.append([name, *(f"{mean(values):.3g}" for values in losses)])
    return lines


def markdown(records: Sequence[Record], missing: dict[str, str]) -> str:
    """Both tables, and the cells that are missing, with the reason."""
    parts = [f"# {title(records)}"]
    if records:
        parts += [markdown_table(table(records)), *map(_inline, notes(records))]
        parts += ["Mean of (D - x0)^2 on held-out images, by noise level:"]
        parts.append(markdown_table(bins(records)))
    parts += [f"- missing: {_inline(name)}: {_inline(why)}" for name, why in missing.items()]
    return "\n\n".join(parts) + "\n"


def title(records: Sequence[Record]) -> str:
    """The number of rows and the budget, as a heading."""
    if not records:
        return "No cell is done"
    [(key, value)] = records[0]["budget"].items()
    return f"{len(rows_of(records))} rows at {value:,} {key} of training each"


def notes(records: Sequence[Record]) -> list[str]:
    """Sentences that say which machine ran it, and what the figures measure."""
    machines = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in r["machine"].items()) for r in records
    )
    lines = [f"Ran on {'; '.join(machines)}."]
    if len(machines) > 1:
        lines.append("Seconds and speeds of different machines do not compare.")
    lines.append(
        f"The x0 loss is the mean of (D - x0)^2, unweighted, of the EMA on "
        f"{records[0]['held_out']:,} held-out images, with the same noise for all, averaged over "
        "the bins. Figures are means over a row's seeds."
    )
    if "frechet_distance" in records[0]:
        samples, real = records[0]["frechet_images"]
        lines.append(
            f"The Frechet distance is of {samples:,} samples to {real:,} held-out images, by "
            f"{records[0]['features']['name']}: with so many it is biased, alike for all rows."
        )
    return lines


def _inline(text: str) -> str:
    """As text within a line or a cell of Markdown."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def markdown_table(lines: list[list[str]]) -> str:
    """A table whose first line is its head, as Markdown; columns but the first are numbers."""
    head, *rest = [[_inline(cell) for cell in line] for line in lines]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rest))


def page(records: Sequence[Record], missing: dict[str, str]) -> str:
    """One HTML file: tables, curves, grids of the same seeds, settings."""
    parts = [f"<h1>{escape(title(records))}</h1>"]
    for name, reason in missing.items():
        parts.append(f"<p><b>missing</b>: {escape(name)}: {escape(reason)}</p>")
    if records:
        parts += _measures(records) + _pictures(records)
    return document(title(records), parts)


def document(title: str, parts: Sequence[str]) -> str:
    """An HTML file of such parts that needs nothing else."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def _measures(records: Sequence[Record]) -> list[str]:
    """Tables and curves; those of the first seed of each row."""
    first = records[0]
    rows = rows_of(records)
    curves = {name: group[0]["curve"] for name, group in rows.items()}
    speeds = {name: group[0]["seconds"] / group[0]["images"] for name, group in rows.items()}
    timed = {
        name: [(images * speeds[name], loss) for images, loss in curve]
        for name, curve in curves.items()
    }
    edges = first["sigma_edges"]
    middles = [math.sqrt(a * b) for a, b in pairwise(edges)]
    by_sigma = {
        name: list(zip(middles, group[0]["x0_loss"], strict=True)) for name, group in rows.items()
    }
    return [
        html_table(table(records)),
        *(f'<p class="note">{escape(note)}</p>' for note in notes(records)),
        "<h2>x0 loss by noise level</h2>",
        html_table(bins(records)),
        plot_lines(by_sigma, "sigma", "x0 loss", log_x=True, log_y=True),
        "<h2>Training</h2>",
        '<p class="note">Of the first seed of each row. Losses of rows with other weights or noise '
        "densities do not compare.</p>",
        plot_lines(curves, "images", "training loss", log_y=True),
        plot_lines(timed, "seconds", "training loss", log_y=True),
    ]


def _pictures(records: Sequence[Record]) -> list[str]:
    """Grids of samples, and the settings of each cell."""
    parts = ["<h2>Samples of the same seeds</h2>"]
    for name, group in rows_of(records).items():
        parts.append(
            f"<figure><figcaption>{escape(name)}, seed {group[0]['seed']}</figcaption>"
            f'<img alt="samples of {escape(name)}" width="100%" '
            f'src="data:image/png;base64,{group[0]["grid"]}"></figure>'
        )
    parts.append("<h2>Settings</h2>")
    for record in records:
        lines = "\n".join(_flat(record["config"]))
        parts.append(
            f"<details><summary>{escape(record['name'])}, seed {record['seed']}, "
            f"<code>{record['hash']}</code></summary><pre>{escape(lines)}</pre></details>"
        )
    return parts


def html_table(lines: list[list[str]]) -> str:
    """A table whose first line is its head, as HTML."""
    head, *rest = lines
    rows = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    rows += [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in rest
    ]
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _flat(value: Any, path: str = "") -> list[str]:
    """A line "a.b = value" for each setting."""
    if isinstance(value, dict):
        return [line for key, v in value.items() for line in _flat(v, f"{path}.{key}".lstrip("."))]
    return [f"{path} = {value!r}"]
