"""hdit evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdit.cli.options import (
    BATCH_SIZE,
    SEED,
    AsJson,
    Guidance,
    Raw,
    SamplingOverrides,
    Steps,
    Weights,
    Workers,
    is_raw,
)
from hdit.cli.output import plain_console, progress, warn
from hdit.limits import MAX_SAMPLES

if TYPE_CHECKING:
    from hdit.evaluation.card import Comparison
    from hdit.evaluation.features import Extractor
    from hdit.evaluation.image_sets import ImageSet


def evaluate(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Images: a folder (any layout), .zip, .npz (arr_0), .tar, or a config or preset, "
            "for its data as training crops them; or a model to sample, as of `hdit sample`.",
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The reference: images, in any of these forms.")
    ],
    features: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_FUNCTION",
            help="A TorchScript file, or module:function, from uint8 RGB (b 3 h w) to (b d). Both "
            "run the code in them: trust them first.  [default: clean-fid's Inception]",
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "-n", "--number", min=2, max=MAX_SAMPLES, help="Images to sample.  [default: 10000]"
        ),
    ] = None,
    seed: Annotated[int | None, SEED] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: Annotated[int | None, BATCH_SIZE] = None,
    raw: Raw = False,
    weights: Weights = None,
    overrides: SamplingOverrides = None,
    workers: Workers = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the card as JSON, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far images are from a reference: FID and KID.

    Two figures are comparable if their protocol is the same: a hash of the reference, the features,
    and the number and size of the images. The card holds all of it, and the sampler's settings.
    Without --batch-size, images are read 64 at a time, and sampled as the model's settings say.
    """

    from hdit.config.presets import or_preset
    from hdit.data.check import processes
    from hdit.device import default_device, keep_freed_memory
    from hdit.errors import UserError
    from hdit.evaluation import card, image_sets
    from hdit.evaluation.features import open_features
    from hdit.files import check_writable, to_json, write_text
    from hdit.messages import echo
    from hdit.names import escape, path_of
    from hdit.runs.trained import Trained, is_trained
    from hdit.sampling.options import with_options

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out: {out} must name a file, in a folder that is there")
    if out is not None:
        check_writable(out)
    a, b = escape(a), escape(b)
    if is_trained(path_of(b)):
        raise UserError(f"B: {b} is a model; the reference must be images; only A may be a model")
    keep_freed_memory()
    reference = image_sets.open_set(or_preset(b))
    told = reference.warnings
    candidate: ImageSet
    if is_trained(path_of(a)):
        options = {
            "--steps": ("steps", steps),
            "--batch-size": ("batch_size", batch_size),
            "--guidance": ("guidance.scale", guidance),
        }
        raw = is_raw(raw, weights)
        trained = with_options(
            Trained.open(path_of(a), warn, weights=weights), path_of(a), options, overrides or []
        )
        device = default_device()
        candidate = image_sets.Sampled(trained, number or 10_000, seed or 0, raw, device, warn)
    else:
        given: dict[str, Any] = {"-n": number, "--seed": seed, "--steps": steps}
        given |= {"--guidance": guidance, "--raw": raw or None, "--weights": weights}
        given |= {"--set": overrides or None}
        if idle := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{idle[0]}: has no effect, as A ({a}) is no model to sample")
        candidate = images = image_sets.open_set(or_preset(a))
        told = [*images.warnings, *told]
    for text in dict.fromkeys(told):
        warn(text)
    extractor = open_features(features, default_device(), echo)
    workers = processes() if workers is None else workers
    found = _compare(candidate, reference, extractor, batch_size or 64, workers)
    for text in found.warnings:
        warn(text)
    written = to_json(found.card, "the measures")
    if out is not None:
        write_text(out, written + "\n")
    if as_json:
        typer.echo(written)
    else:
        plain_console().print(card.table(found))


def _compare(
    a: ImageSet, b: ImageSet, extractor: Extractor, batch_size: int, workers: int
) -> Comparison:
    """The distances, with bars that tell how far they are."""
    from hdit.evaluation.card import compare

    with progress() as bar:
        tasks = {
            which: bar.add_task(f"features of {which}", total=len(images))
            for which, images in (("A", a), ("B", b))
        }
        kid = bar.add_task("KID's subsets", total=None)
        return compare(
            a,
            b,
            extractor,
            batch_size=batch_size,
            workers=workers,
            on_images=lambda which, n: bar.advance(tasks[which], n),
            on_subset=lambda: bar.advance(kid),
        )
