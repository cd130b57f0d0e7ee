"""hdit sample"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdit.cli.options import (
    BATCH_SIZE,
    SEED,
    Guidance,
    Raw,
    SamplingOverrides,
    Steps,
    Weights,
    finite,
    is_raw,
)
from hdit.cli.output import error_console, warn
from hdit.limits import MAX_GUIDANCE, MAX_SAMPLES
from hdit.messages import message, say


def sample(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A run (its newest checkpoint), a checkpoint, a converted model, k-diffusion's "
            ".safetensors, DiT's .pt, or a folder of diffusers.",
        ),
    ],
    number: Annotated[
        int, typer.Option("-n", "--number", min=1, max=MAX_SAMPLES, help="How many images.")
    ] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="A folder, FILE.npz (arr_0, as ADM's), or tar shards, as 'x-{00..07}.tar'.  "
            "[default: <run>/samples/<settings>]",
        ),
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
    guide: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Guide away from this weaker model (autoguidance)."),
    ] = None,
    guide_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_GUIDANCE,
            callback=finite,
            help="Scale of the guidance away from that model.  [default: 2]",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Classes by name, or by index as #0, repeated in turn; 'none' for no class; "
            "'random' alone draws them. A name with a comma goes in double quotes.  "
            "[default: all]",
        ),
    ] = None,
    seed: Annotated[int, SEED] = 0,
    batch_size: Annotated[int | None, BATCH_SIZE] = None,
    raw: Raw = False,
    weights: Weights = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in the place of an older set.")
    ] = False,
    check: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=MAX_SAMPLES,
            help="At the end, sample N images again in batches of another size, and compare.",
        ),
    ] = 0,
    overrides: SamplingOverrides = None,
) -> None:
    """Sample images: PNG files named by seed, grid.png and samples.json; or one file for all.

    What is not given comes from the run's own [sampling] settings, which --set can change. The same
    command goes on after an interrupt; torchrun shares it among processes.
    """
    import os

    # Before torch is imported: it would log a trace of its stack where another process is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from hdit.errors import UserError
    from hdit.processes import closing, read_world
    from hdit.runs.trained import Trained
    from hdit.sampling.options import choose_labels, open_guide, with_options
    from hdit.sampling.team import Team
    from hdit.sampling.writer import Request, write_samples
    from hdit.signals import noting

    raw = is_raw(raw, weights)
    if guide_scale is not None and guide is None:
        raise UserError(
            "--guide-scale: has no effect without --guide, the model to guide away from"
        )
    if guide_scale == 1:
        raise UserError("--guide-scale: 1 is no guidance; leave out --guide, or set another scale")
    if check > number:
        raise UserError(f"--check: must be at most -n, {number}, got {check}")
    options = {
        "--steps": ("steps", steps),
        "--batch-size": ("batch_size", batch_size),
        "--guidance": ("guidance.scale", guidance),
        "--sampler": ("sampler.kind", sampler),
        "--sigmas": ("sigmas.kind", sigmas),
    }
    console = error_console()

    def request() -> Request:
        told = warn if team.is_first else lambda text: None
        trained = Trained.open(source, told, weights=weights)
        trained = with_options(trained, source, options, overrides or [], guide is not None)
        return Request(
            trained,
            seed,
            number,
            choose_labels(labels, trained),
            out,
            raw=raw,
            overwrite=overwrite,
            guide=open_guide(guide, trained, told) if guide else None,
            guide_scale=2.0 if guide_scale is None else guide_scale,
            check=check,
        )

    with closing(), noting(AGAIN[overwrite]):
        world = read_world()
        team = Team.join(world, f"samples of {source}", START, lambda text: say(console, text))
        done = write_samples(team.all_do(request), console, team)
    if team.is_first:
        typer.echo(message(done))


START = 600.0  # seconds that processes wait for one another to begin
AGAIN = ("the same command goes on", "the same command without --overwrite goes on")
