"""hdit train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdit.cli.options import ConfigFile, Overrides, finite
from hdit.limits import MAX_MINUTES


def train(
    config: ConfigFile,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's folder.  [default: runs/<name of CONFIG>]"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            min=0,
            max=MAX_MINUTES,
            callback=finite,
            help="Save a checkpoint and end after so long; time for checkpoints and samples "
            "is not counted.",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train a model, or resume its run: the same command does both.

    The folder gets config.toml, metrics.jsonl, checkpoints/ and a grid of samples/ at each
    checkpoint. Ctrl-C saves a checkpoint and ends.
    """
    import logging
    import os

    # Before torch is imported: it would log a trace of its stack where another process is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from hdit.config import load
    from hdit.config.presets import find_config
    from hdit.device import keep_freed_memory
    from hdit.errors import UserError
    from hdit.processes import closing
    from hdit.reading import read_text
    from hdit.signals import status_of
    from hdit.training.trainer import Trainer

    if minutes == 0:
        raise UserError("--minutes: must be above 0, got 0")
    config = find_config(config)
    settings = load(config, overrides or [])
    folder = run or Path("runs", config.stem)
    written = folder / "config.toml"
    if written.exists() and written.samefile(config) and read_text(config) != load(config).dump():
        raise UserError(
            f"--run: {folder} would get its settings written over {config}; name another folder"
        )
    logging.getLogger("hdit_kernels").setLevel(logging.INFO)  # which backend attention takes
    keep_freed_memory()
    with closing():
        trainer = Trainer(settings, folder)
        finished = trainer.fit(None if minutes is None else 60 * minutes)
        signalled = trainer.signalled
    if not finished and signalled:
        raise typer.Exit(status_of(signalled))
