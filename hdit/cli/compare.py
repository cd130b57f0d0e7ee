"""hdit compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdit.cli.options import AsJson


def compare(
    cards: Annotated[
        list[Path],
        typer.Argument(metavar="CARD.json...", help="Cards that `hdit evaluate --out` wrote."),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What to rank by, as fid or cmmd.  [default: the first in all]"
        ),
    ] = None,
    unranked: Annotated[
        bool, typer.Option("--unranked", help="List cards of different protocols, without a rank.")
    ] = False,
    published: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="List figures of papers below, never ranked: imagenet256, imagenet512, "
            "imagenet256-400k, imagenet128-400k, ffhq1024.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the table as Markdown.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a page, with a plot against the MACs of sampling."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rank the cards of `hdit evaluate` in a table. Refuses cards whose protocols differ.

    What differs is named: the features, how images came to them, the reference, the number of
    images, or the metric's own settings.
    """
    from hdit.cli.evaluate import check_file
    from hdit.errors import UserError
    from hdit.evaluation import comparing
    from hdit.evaluation.published import PUBLISHED
    from hdit.files import to_json, write_text

    check_file("--out", out)
    check_file("--html", html)
    if published is not None and published not in PUBLISHED:
        raise UserError(f"--published: {published!r} is none; known: {', '.join(PUBLISHED)}")
    named = {str(path): comparing.read_card(path) for path in cards}
    if len(named) < len(cards):
        raise UserError("CARD.json: a card is named twice")
    chosen = comparing.choose_metric(named, metric)
    told = comparing.differences(named, chosen)
    if not unranked:
        comparing.refuse_differences(named, chosen)
    order = list(named) if unranked else comparing.ranked(named, chosen)
    notes = [f"differs: {text}" for text in told]
    notes += [] if unranked else comparing.ties(named, order, chosen)
    notes += comparing.others(named, chosen)
    lines = comparing.rows(named, order, chosen, not unranked, published)
    text = comparing.markdown(lines, notes)
    if out is not None:
        write_text(out, text)
    if html is not None:
        write_text(html, comparing.page(lines, notes, named, chosen))
    if as_json:
        values = [
            {"card": name, "value": comparing.value_of(named[name], chosen)} for name in order
        ]
        found = {"metric": chosen, "ranked": not unranked, "cards": values, "differences": told}
        typer.echo(to_json(found, "the table"))
    else:
        typer.echo(text, nl=False)
