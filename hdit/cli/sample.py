"""hdit sample"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdit.cli.options import BATCH_SIZE, SEED, Guidance, Raw, SamplingOverrides, Steps
from hdit.cli.output import error_console, warn


def sample(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run (its newest checkpoint), a checkpoint, or a converted model.",
        ),
    ],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many images.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new folder.  [default: <run>/samples/<settings>]"),
    ] = None,
    steps: Steps = None,
    sampler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="euler, heun, dpmpp_2m, dpmpp_3m_sde, ddim, ddpm, ..."),
    ] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="karras, exponential, vp, linear_t, flow, ..."),
    ] = None,
    guidance: Guidance = None,
    weak: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_OR_CHECKPOINT", help="Guide away from this weaker model (autoguidance)."
        ),
    ] = None,
    weak_scale: Annotated[
        float | None,
        typer.Option(min=0, help="Scale of the guidance away from it.  [default: 2]"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Classes by name or index, repeated in turn; 'none' for no class.  [default: all]",
        ),
    ] = None,
    seed: Annotated[int, SEED] = 0,
    batch_size: Annotated[int | None, BATCH_SIZE] = None,
    raw: Raw = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace images that lie in DIR already.")
    ] = False,
    overrides: SamplingOverrides = None,
) -> None:
    """Sample images: PNG files named by seed, grid.png and samples.json.

    What is not given comes from the run's own [sampling] settings, which --set can change.
    """

    from hdit.errors import UserError
    from hdit.runs.checkpoint import find
    from hdit.sampling.writer import choose_labels, find_weak, sampling_config, write_samples

    found = find(source, warn)
    options = {
        "--steps": ("steps", steps),
        "--batch-size": ("batch_size", batch_size),
        "--guidance": ("guidance.scale", guidance),
        "--sampler": ("sampler.kind", sampler),
        "--sigmas": ("sigmas.kind", sigmas),
    }
    config = sampling_config(found, source, options, overrides or [], weak is not None)
    chosen = choose_labels(labels, number, found)
    if weak_scale is not None and weak is None:
        raise UserError("--weak-scale: has no effect without --weak, the model to guide away from")
    if weak_scale == 1:
        raise UserError("--weak-scale: 1 is no guidance; leave out --weak, or set another scale")
    done = write_samples(
        found,
        config,
        chosen,
        list(range(seed, seed + number)),
        out,
        error_console(),
        raw=raw,
        overwrite=overwrite,
        weak=find_weak(weak, found, config, warn) if weak else None,
        weak_scale=2.0 if weak_scale is None else weak_scale,
    )
    typer.echo(done)
