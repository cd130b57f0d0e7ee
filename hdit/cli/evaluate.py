"""hdit evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
    from hdit.evaluation.extractor import Extractor
    from hdit.evaluation.image_sets import ImageSet
    from hdit.evaluation.references import Statistics


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
        str | None,
        typer.Argument(
            metavar="[B]",
            help="The reference: images, in any of these forms, or an .npz with mu and sigma, as "
            "ADM's. Not with --write-reference.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Of fid, kid, is, precision, recall, swd, fdd, kdd, cmmd, with commas; or all. "
            "[default: the first five, where they are possible]",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="clean|adm|edm",
            help="Whose resize the Inception gets images by.  [default: clean]",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="inception, dinov2 or clip; a TorchScript file, or module:function, from uint8 "
            "RGB (b 3 h w) to (b d). Both run the code in them: trust them first.  [default: "
            "inception]",
        ),
    ] = None,
    dinov2: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The file of DINOv2's weights for fdd and kdd, or a stand-in."
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="CLIP's file or folder for cmmd, or a stand-in."),
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
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the features of B, and take kept ones.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the card as JSON, too.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the card as a page, with the nearest reference images of samples, figures "
            "by class and a contact sheet.",
        ),
    ] = None,
    write_reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="Write A's mu, sigma and images in ADM's form, without a B."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far images are from a reference: FID, KID and more, each with its interval.

    Two figures are comparable if their protocol is the same: a hash of the reference, the features,
    and the number and size of the images. The card holds all of it, and the sampler's settings;
    `hdit compare` puts cards side by side. Without --batch-size, images are read 64 at a time, and
    sampled as the model's settings say.
    """

    from hdit.config.presets import or_preset
    from hdit.data.check import processes
    from hdit.device import default_device, keep_freed_memory
    from hdit.errors import UserError
    from hdit.evaluation.image_sets import Sampled
    from hdit.evaluation.metrics import chosen
    from hdit.evaluation.pipelines import PROTOCOLS
    from hdit.names import escape, path_of
    from hdit.runs.trained import Trained, is_trained
    from hdit.sampling.options import with_options

    check_file("--out", out)
    check_file("--html", html)
    check_file("--write-reference", write_reference)
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"--protocol: {protocol!r} is none; known: {', '.join(PROTOCOLS)}")
    if (b is None) == (write_reference is None):
        raise UserError("B: name the reference, or instead of it --write-reference FILE.npz")
    wanted = chosen(metrics)
    a, b = escape(a), None if b is None else escape(b)
    if b is not None and is_trained(path_of(b)):
        raise UserError(f"B: {b} is a model; the reference must be images; only A may be a model")
    keep_freed_memory()
    options = Options(
        *wanted, protocol, features, dinov2, clip, cache, batch_size or 64,
        processes() if workers is None else workers, html is not None,
    )  # fmt: skip
    reference = None if b is None else _reference(or_preset(b))
    if is_trained(path_of(a)):
        settings = {
            "--steps": ("steps", steps),
            "--batch-size": ("batch_size", batch_size),
            "--guidance": ("guidance.scale", guidance),
        }
        raw = is_raw(raw, weights)
        trained = with_options(
            Trained.open(path_of(a), warn, weights=weights), path_of(a), settings, overrides or []
        )
        candidate: ImageSet = Sampled(
            trained, number or 10_000, seed or 0, raw, default_device(), warn
        )
    else:
        given: dict[str, Any] = {"-n": number, "--seed": seed, "--steps": steps}
        given |= {"--guidance": guidance, "--raw": raw or None, "--weights": weights}
        given |= {"--set": overrides or None}
        candidate = _images(a, given)
    told = [getattr(one, "warnings", []) for one in (candidate, reference and reference[0])]
    for text in dict.fromkeys(text for texts in told for text in texts):
        warn(text)
    if write_reference is not None:
        idle = [metrics, dinov2, clip, out, html, as_json or None, None if cache else True]
        _write_reference(candidate, write_reference, options, idle)
    else:
        assert reference is not None, "one of both"
        _compare(candidate, reference, options, out, html, as_json)


class Options(NamedTuple):
    """The metrics to measure and the settings for it, read from the command line."""

    metrics: list[str]
    named: list[str]
    protocol: str | None
    features: str | None
    dinov2: str | None
    clip: str | None
    cache: bool
    batch_size: int
    workers: int
    details: bool


def check_file(option: str, path: Path | None) -> None:
    """Raises UserError, before the work, where a file cannot be written."""
    from hdit.errors import UserError
    from hdit.files import check_writable

    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option}: {path} must name a file, in a folder that is there")
    check_writable(path)


def _reference(place: str) -> tuple[ImageSet | None, Statistics | None]:
    """The images and the statistics that B has."""
    from hdit.data.kinds import what_is
    from hdit.evaluation.image_sets import open_set
    from hdit.evaluation.references import read_statistics
    from hdit.names import path_of

    statistics = read_statistics(path_of(place)) if what_is(place) == "npz" else None
    images = open_set(place) if statistics is None or statistics.has_images else None
    return images, statistics


def _images(place: str, given: dict[str, Any]) -> ImageSet:
    """The images A. Raises UserError for options that were given for sampling them."""
    from hdit.config.presets import or_preset
    from hdit.errors import UserError
    from hdit.evaluation.image_sets import open_set

    if idle := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{idle[0]}: has no effect, as A ({place}) is no model to sample")
    return open_set(or_preset(place))


def _extractors(options: Options) -> tuple[dict[str, Extractor], list[str], dict[str, str]]:
    """(networks by slot, the metrics that these allow, why each other is left out).

    A network that is missing raises UserError where a metric of it was named.
    """
    from hdit.device import default_device
    from hdit.errors import UserError
    from hdit.evaluation.features import open_clip, open_dinov2, open_features
    from hdit.evaluation.metrics import SLOTS
    from hdit.messages import echo

    device = default_device()
    openers = {
        "features": lambda: open_features(options.features, device, echo, options.protocol),
        "dinov2": lambda: open_dinov2(options.dinov2, device),
        "clip": lambda: open_clip(options.clip, device),
    }
    given = {"dinov2": options.dinov2, "clip": options.clip, "features": options.features}
    slots = dict.fromkeys(SLOTS[name] for name in options.metrics)
    for slot, value in given.items():
        if value is not None and slot not in slots:
            of = ", ".join(name for name, theirs in SLOTS.items() if theirs == slot)
            raise UserError(f"--{slot}: has no effect without one of its metrics: {of}")
    if options.protocol is not None and "features" not in slots:
        raise UserError("--protocol: has no effect on these metrics, which take no Inception")
    found: dict[str, Extractor] = {}
    why: dict[str, str] = {}
    for slot in slots:
        try:
            found[slot] = openers[slot]()
        except UserError as error:
            if slot == "features" or given[slot] or any(SLOTS[n] == slot for n in options.named):
                raise
            why |= {name: str(error) for name in options.metrics if SLOTS[name] == slot}
    return found, [name for name in options.metrics if SLOTS[name] in found], why


def _compare(
    a: ImageSet,
    reference: tuple[ImageSet | None, Statistics | None],
    options: Options,
    out: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """The figures, printed and written, with bars that tell how far they are."""
    from hdit.evaluation import card
    from hdit.evaluation.cache import FeatureCache, default_folder
    from hdit.evaluation.page import page
    from hdit.evaluation.references import why_not
    from hdit.files import to_json, write_text
    from hdit.messages import echo

    images, statistics = reference
    extractors, metrics, missing = _extractors(options)
    for name, reason in missing.items():
        warn(f"{name} is left out: {reason}")
    if statistics and images is not None and (why := why_not(statistics, extractors["features"])):
        warn(f"B: its images are measured: {why}")
        statistics = None
    with progress() as bar:
        tasks = {
            which: bar.add_task(f"features of {which}", total=None if one is None else len(one))
            for which, one in (("A", a), ("B", images))
        }
        steps = bar.add_task("distances", total=None)
        found = card.compare(
            a,
            images,
            extractors,
            statistics=statistics,
            metrics=metrics,
            named=options.named,
            details=options.details,
            cache=FeatureCache(default_folder(), echo) if options.cache else None,
            batch_size=options.batch_size,
            workers=options.workers,
            on_images=lambda which, n: bar.advance(tasks[which], n),
            on_step=lambda metric: bar.update(steps, advance=1, description=metric),
        )
    for text in found.warnings:
        warn(text)
    written = to_json(found.card, "the measures")
    if out is not None:
        write_text(out, written + "\n")
    if html is not None:
        write_text(html, page(found, a, images))
    if as_json:
        typer.echo(written)
    else:
        plain_console().print(card.table(found))


def _write_reference(images: ImageSet, path: Path, options: Options, idle: list[Any]) -> None:
    """Writes the statistics of A and its images. `idle` are options that have no effect on it."""
    from hdit.device import default_device
    from hdit.errors import UserError
    from hdit.evaluation.features import open_features
    from hdit.evaluation.measuring import measure
    from hdit.evaluation.references import write_reference
    from hdit.messages import echo

    if any(value is not None for value in idle):
        raise UserError(
            "--write-reference: goes without --metrics, --dinov2, --clip, --out, --html, --json "
            "and --no-cache: it measures nothing"
        )
    extractor = open_features(options.features, default_device(), echo, options.protocol)
    with progress() as bar:
        task = bar.add_task("features", total=len(images))
        measured = measure(
            images,
            {"features": extractor},
            batch_size=options.batch_size,
            workers=options.workers,
            on_images=lambda n: bar.advance(task, n),
        )
    held = write_reference(path, images, measured, "features", extractor)
    typer.echo(f"{path}: mu and sigma of {len(images):,} images, and {held:,} of the images")
