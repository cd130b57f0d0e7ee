"""Threads that store images beside the sampling, and the bar that tells how far it is."""

import threading
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from hdit.errors import WritingError
from hdit.sampling import progress
from hdit.sampling.threads import BATCHES, Writer

IMAGES = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)


def test_writer_stores_every_image_of_every_batch():
    stored, lock = [], threading.Lock()

    def put(indices, images):
        assert len(indices) == len(images)
        with lock:
            stored.extend(indices.tolist())

    with Writer(put, threads=3) as writer:
        for first in range(0, 40, 4):
            writer.put(np.arange(first, first + 4), IMAGES)
        writer.flush()
    assert sorted(stored) == list(range(40))


def test_writer_holds_few_batches_while_the_disk_is_slow():
    """The next put waits until a part is stored."""
    go, stored = threading.Event(), []

    def put(indices, images):
        go.wait(10)
        stored.append(indices)

    with Writer(put, threads=1) as writer:
        for first in range(BATCHES):
            writer.put(np.array([first]), IMAGES[:1])
        assert not stored
        threading.Timer(0.05, go.set).start()
        writer.put(np.array([BATCHES]), IMAGES[:1])
        assert len(writer.waiting) <= BATCHES
        assert stored
        writer.flush()
    assert len(stored) == BATCHES + 1


@pytest.mark.parametrize("ends", ["put", "flush"])
def test_writer_raises_what_a_thread_raised(ends):
    def put(indices, images):
        raise WritingError(28, "No space left on device", "out/000003.png")

    def store():
        with Writer(put, threads=2) as writer:
            writer.put(np.arange(4), IMAGES)
            if ends == "flush":
                writer.flush()
            for _ in range(10):
                writer.put(np.arange(4), IMAGES)

    with pytest.raises(WritingError, match=r"out/000003.png: cannot be written: No space left"):
        store()


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = StringIO()
    with progress.Progress(Console(file=out), 50_000, 1_000) as bar:
        for made in range(100, 1_600, 100):
            now[0] += 5
            bar.made(made)
    lines = out.getvalue().splitlines()
    assert lines == [
        "1,600 of 50,000 images, 20 images/s, 0:40:20 left",
        "2,200 of 50,000 images, 20 images/s, 0:39:50 left",
    ]


def test_progress_that_is_not_shown_says_nothing(monkeypatch):
    monkeypatch.setattr(progress, "QUIET", 0)
    out = StringIO()
    with progress.Progress(Console(file=out), 10, 0, shown=False) as bar:
        bar.made(5)
    assert out.getvalue() == ""
