"""The tables of docs/scaling.md that `hdit plan` computes are those of today's presets."""

import pytest

import table_plans


def rows() -> dict[str, list[str]]:
    """The cells of each model of the papers."""
    between = table_plans.PAGE.read_text().split(table_plans.BEGIN)[1].split(table_plans.END)[0]
    first = between.split("\n\n")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.split("\n")]
    return {cells[0].strip("`"): cells for cells in lines[2:]}


@pytest.mark.parametrize("name", table_plans.PAPERS)
def test_hours_of_the_page_are_those_of_the_preset(name):
    total = table_plans.hours(name, "H100", 8).total
    assert rows()[name][4] == f"{total:,.1f}", "run python scripts/table_plans.py"


def test_page_keeps_what_is_around_the_tables():
    text = table_plans.PAGE.read_text()
    changed = table_plans.page(text, "other\n")
    assert table_plans.BEGIN + "other\n" + table_plans.END in changed
    before, after = text.split(table_plans.BEGIN)[0], text.split(table_plans.END)[1]
    assert changed.startswith(before)
    assert changed.endswith(after)
    with pytest.raises(ValueError, match="must have the lines"):
        table_plans.page("no marks", "")
