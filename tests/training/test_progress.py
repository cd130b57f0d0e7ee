"""The bar of training, as a terminal shows it."""

import io
import logging
import re

import pytest
from rich.console import Console

from hdit import config
from hdit.cli.output import listen_to_loggers
from hdit.runs import checkpoint
from hdit.training import grid
from hdit.training.progress import Progress, speed_text
from hdit.training.trainer import Trainer


def screen(written: str) -> list[str]:
    """The lines that a terminal shows: the few control sequences that rich writes, carried out."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.startswith("\x1b"):
            assert part[-1] in "Amhl", part
            row -= int(part[2:-1] or 1) if part.endswith("A") else 0
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)


@pytest.fixture
def loggers(monkeypatch):
    """Loggers as the command line has them."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    listen_to_loggers()


@pytest.mark.parametrize("width", [80, 120])
def test_messages_do_not_break_the_bar(width, tiny, tmp_path, loggers):
    console = terminal(width)
    trainer = Trainer(config.load(tiny), tmp_path / "run", console)
    log = trainer._log

    def speaking(norm):
        logging.getLogger("somebody").warning("a logger says at %d", trainer.images)
        return log(norm)

    trainer._log = speaking
    assert trainer.fit()
    lines = screen(console.file.getvalue())
    bars = [line for line in lines if "images/s" in line]
    said = [line for line in lines if line.startswith("a logger says at ")]
    assert said == [f"a logger says at {images}" for images in (16, 32, 48, 64, 80, 96)]
    [bar] = bars
    assert re.fullmatch(r"training ━+ 96/96 100% loss \d\.\d{4} +[\d,.]+ images/s 0:00:00", bar)
    assert len(bar) <= width


def test_bar_says_what_is_done_in_place_of_training(tiny, tmp_path, monkeypatch):
    settings = config.load(tiny, ["training.background_saves=false"])
    trainer = Trainer(settings, tmp_path / "run", terminal(80))
    seen = []

    for owner, name in ((checkpoint, "save"), (grid, "sample")):
        original = getattr(owner, name)

        def wrapped(*arguments, original=original, name=name, **options):
            seen.append((name, trainer.bar.bar.tasks[0].description))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapped)
    assert trainer.fit()
    assert set(seen) == {("save", "saving"), ("sample", "sampling")}
    assert trainer.bar.bar.tasks[0].description == "training"


@pytest.mark.parametrize("width", [80, 120])
def test_bar_of_a_long_run_fits_into_one_line(width):
    console = terminal(width)
    bar = Progress(console, 1_000_000_000, 0, shown=True)
    with bar:
        bar.advance(123_456_789, seconds=100_000)
        bar.describe(0.1234)
    [line] = [line for line in screen(console.file.getvalue()) if line]
    assert re.fullmatch(
        r"training ━+[╸╺]━* +123456789/1000000000 +12% loss 0.1234 1,235 images/s 8 d 5 h", line
    )


@pytest.mark.parametrize("kind", ["file", "dumb terminal"])
def test_progress_without_a_bar_is_lines_of_text(kind, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("hdit.training.progress.QUIET", 0)
    console = terminal(80) if kind == "dumb terminal" else Console(file=io.StringIO())
    with Progress(console, 1000, 0, shown=True) as bar:
        bar.advance(100, seconds=10)
        bar.describe(0.1234)
    assert console.file.getvalue() == "100 of 1,000 images, loss 0.1234, 10 images/s\n"


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (None, "-"),
        (0.0123, "0.012"),
        (0.956, "0.96"),
        (1.26, "1.3"),
        (9.96, "10"),
        (123.4, "123"),
        (12345.6, "12,346"),
    ],
)
def test_speed_has_two_significant_digits(speed, text):
    assert speed_text(speed) == f"{text} images/s"


def test_speed_of_steps_that_take_minutes_is_known_after_two():
    bar = Progress(terminal(80), 100, 0, shown=True)
    for images, seconds in ((2, 100.0), (4, 200.0), (6, 240.0)):
        bar.advance(images, seconds)
    assert bar.bar.tasks[0].fields["speed"] == pytest.approx(2 / 40)
