"""Messages: what a terminal obeys is escaped, and of several processes each is named."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from hdit.messages import CLEAR, echo, message, say

NAME = "a\x1b[31m[red]\rb"
SHOWN = r"a\x1b[31m[red]\rb"


def test_message_escapes_what_a_terminal_obeys_and_keeps_lines():
    assert message(f"{NAME}\n  second \udcff line") == f"{SHOWN}\n  second \\xff line"


@pytest.mark.parametrize(("rank", "start"), [(None, ""), ("0", ""), ("3", "rank 3: "), ("x", "")])
def test_message_names_the_rank_of_all_but_the_first_process(rank, start, monkeypatch, capsys):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    echo("text")
    assert capsys.readouterr() == ("", f"{start}text\n")


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=40)


def test_process_clears_the_bar_of_the_first_one_before_it_speaks(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    first = terminal()
    say(first, NAME)
    assert first.file.getvalue() == f"{SHOWN}\n"
    monkeypatch.setenv("RANK", "1")
    second, log = terminal(), Console(file=io.StringIO())
    say(second, "text")
    say(log, "text")
    assert second.file.getvalue() == f"{CLEAR}rank 1: text\n"
    assert log.file.getvalue() == "rank 1: text\n"


def test_echo_goes_above_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = terminal()
    with Progress(console=console, transient=True, auto_refresh=False) as bar:
        bar.add_task("working", total=3)
        bar.refresh()
        echo("first line")
    shown = console.file.getvalue()
    assert "first line\n" in shown, "as a line of its own, after codes that clear the bar"
    assert shown.index("working") < shown.index("first line\n") < shown.rindex("working")


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "{}.toml"),
        ("convert", "run", "{}"),
        ("sample", "run", "-n", "1", "--out", "{}"),
        ("evaluate", "{}", "{}", "--features", "looks:mean", "--workers", "0"),
        ("data", "check", "{}", "--sheet", "{}.png", "--workers", "0"),
        ("train", "{}.toml", "--run", "{}"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_verbs_show_names_that_a_terminal_would_obey(
    arguments, hdit, tiny, trained, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tiny.rename(f"{NAME}.toml")
    shutil.copytree(trained, "run")
    (tmp_path / "looks.py").write_text("def mean(x):\n    return x.float().mean((2, 3))\n")
    if arguments[0] in ("evaluate", "data"):
        (tmp_path / NAME).mkdir()
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(f"{NAME}/{i}.png")
    status, out, err = hdit(*(text.format(NAME) for text in arguments))
    assert status == 0, err
    assert SHOWN in out + err
    assert not {"\x1b", "\r"} & {*out, *err}
