"""Cards side by side: a table and a plot, ranked where their protocols are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from hdit.errors import UserError
from hdit.evaluation.card import facts, in_words
from hdit.evaluation.metrics import BETTER, SLOTS, TITLES
from hdit.evaluation.published import PUBLISHED
from hdit.names import printable
from hdit.reading import ReadingError, read_object
from hdit.report.pages import document, html_table, markdown_table
from hdit.report.plots import plot_lines

Card = dict[str, Any]


def read_card(path: Path) -> Card:
    """A card that `hdit evaluate` wrote, of this version or an older one. Raises UserError."""
    try:
        card = read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist (seen from {Path.cwd()})") from None
    except ReadingError as error:
        raise UserError(str(error)) from None
    names = measured(card)
    if not names or not isinstance(card.get("protocol"), str):
        raise UserError(f"{path}: is no card of hdit evaluate: write one with its --out")
    try:
        for name in names:
            facts(card, name)
            in_words(card, name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: is a damaged card ({reason}); write it anew") from None
    return card


def measured(card: Card) -> list[str]:
    """The metrics that a card has."""
    return [name for name in SLOTS if isinstance(card.get(name), int | float | dict)]


def value_of(card: Card, metric: str) -> float:
    """A figure, of KID and KDD the mean."""
    found = card[metric]
    return float(found["mean"] if isinstance(found, dict) else found)


# ---- whether they compare ------------------------------------------------------------------------


def choose_metric(cards: Mapping[str, Card], metric: str | None) -> str:
    """The metric to rank by: the one that is given, or the first that all cards have."""
    if metric is not None and metric not in SLOTS:
        raise UserError(f"--metric: {metric!r} is none; known: {', '.join(SLOTS)}")
    common = [name for name in SLOTS if all(name in measured(card) for card in cards.values())]
    if metric in common:
        return metric
    if metric is None and common:
        return common[0]
    told = "; ".join(f"{name} has {', '.join(measured(card))}" for name, card in cards.items())
    wanted = f"{metric} is not in all cards" if metric else "the cards have no metric in common"
    raise UserError(f"--metric: {wanted}: {told}")


def differences(cards: Mapping[str, Card], metric: str) -> list[str]:
    """What differs in the protocols of cards, a sentence for each fact; none where they compare."""
    known = {name: facts(card, metric) for name, card in cards.items()}
    keys = dict.fromkeys(key for found in known.values() for key in found)
    told = []
    for key in keys:
        values = {name: json.dumps(found.get(key)) for name, found in known.items()}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name} has {_short(known[name].get(key))}" for name in values)
            told.append(f"{key}: {each}")
    return told


def _short(value: Any) -> str:
    text = str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text:.12}..." if is_digest else text


def refuse_differences(cards: Mapping[str, Card], metric: str) -> None:
    """Raises UserError, which names each difference, where cards must not be ranked."""
    if told := differences(cards, metric):
        listing = "\n  ".join(map(printable, told))
        raise UserError(
            f"{TITLES[metric]} of these cards must not be ranked, as their protocols differ:\n  "
            f"{listing}\nmeasure them alike, or list them without a rank: --unranked"
        )


def others(cards: Mapping[str, Card], metric: str) -> list[str]:
    """A sentence for each other metric that the table shows and that does not compare."""
    told = []
    for name in SLOTS:
        having = {one: card for one, card in cards.items() if name in measured(card)}
        if name != metric and having and (found := differences(having, name)):
            told.append(f"{TITLES[name]} does not compare: {'; '.join(found)}")
    return told


def ranked(cards: Mapping[str, Card], metric: str) -> list[str]:
    """Names of the cards, the best first."""
    sign = -1 if BETTER[metric] == "higher" else 1
    return sorted(cards, key=lambda name: sign * value_of(cards[name], metric))


def ties(cards: Mapping[str, Card], order: Sequence[str], metric: str) -> list[str]:
    """A sentence for each pair of neighbours in rank whose intervals overlap."""
    told = []
    for better, worse in pairwise(order):
        made = [cards[name].get("intervals", {}).get(metric) for name in (better, worse)]
        if all(made) and made[0]["low"] <= made[1]["high"] and made[1]["low"] <= made[0]["high"]:
            told.append(
                f"{better} and {worse}: intervals overlap, so that their order may be chance"
            )
    return told


# ---- the table -----------------------------------------------------------------------------------


def rows(
    cards: Mapping[str, Card], order: Sequence[str], metric: str, rank: bool, published: str | None
) -> list[list[str]]:
    """The head and a line for each card; then those of papers, marked as such, without a rank."""
    names = [n for n in SLOTS if any(n in measured(card) for card in cards.values())]
    names.sort(key=lambda name: name != metric)
    head = ["card", *(["rank"] if rank else [])]
    head += [TITLES[name] for name in names]
    lines = [[*head, "images", "sampler", "guidance", "weights", "GMAC an image", "protocol"]]
    for place, name in enumerate(order, 1):
        card = cards[name]
        line = [name, *([str(place)] if rank else [])]
        line += [in_words(card, one) if one in measured(card) else "" for one in names]
        lines.append([*line, *_sampling(card), card["protocol"]])
    for row in PUBLISHED[published] if published else ():
        line = [f"{row.name} (published: {row.source})", *(["-"] if rank else [])]
        line += [f"{row.figures[one]:g}" if one in row.figures else "" for one in names]
        gmac = f"{row.gmac:g} a forward pass"
        lines.append([*line, "50,000", row.sampling, "", "", gmac, f"{published}: {row.protocol}"])
    return lines


def _sampling(card: Card) -> list[str]:
    record = card["a"]
    sampling = record.get("sampling")
    line = [f"{record['images']:,}"]
    if not isinstance(sampling, dict):
        return [*line, record["kind"], "", "", _gmacs(record)]
    evaluations = record.get("evaluations")
    sampler = f"{sampling.get('sampler', {}).get('kind')}, {evaluations} evaluations"
    guidance = sampling.get("guidance", {})
    scale = f"{guidance.get('scale', 1):g}"
    if guidance.get("interval"):
        scale += f" in {guidance['interval']}"
    return [*line, sampler, scale, str(record.get("weights", "")), _gmacs(record)]


def _gmacs(record: dict[str, Any]) -> str:
    macs = record.get("macs")
    return f"{macs / 1e9:.4g}" if isinstance(macs, int | float) else ""


def markdown(lines: list[list[str]], notes: Sequence[str]) -> str:
    """The table and its notes."""
    return "\n\n".join([markdown_table(lines), *map(printable, notes)]) + "\n"


def page(
    lines: list[list[str]], notes: Sequence[str], cards: Mapping[str, Card], metric: str
) -> str:
    """One HTML file: the table, its notes, and the metric against the MACs of sampling.

    The plot is left out where no card tells its MACs. Raises UserError where one does, and
    matplotlib is missing.
    """
    parts = [f"<h1>{escape(TITLES[metric])} of {len(cards)} cards</h1>", html_table(lines)]
    parts += [f'<p class="note">{escape(printable(note))}</p>' for note in notes]
    points = {
        name: [(card["a"]["macs"] / 1e9, value_of(card, metric))]
        for name, card in cards.items()
        if isinstance(card["a"].get("macs"), int | float)
    }
    if points:
        parts.append(plot_lines(points, "GMAC of sampling an image", TITLES[metric], log_x=True))
    return document("hdit compare", parts)
