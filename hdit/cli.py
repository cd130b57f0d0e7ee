"""The command line: parses, then calls. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from hdit.config.schema import RunConfig
    from hdit.evaluation.image_sets import ImageSet, Sampled
    from hdit.protocols import DataShape

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train and sample image diffusion transformers: pixel-space HDiT, and DiT.",
    epilog="Start with:  hdit train configs/digits-hdit.toml",
)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, as in training.batch_size=64."
    ),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, as in configs/.")]


@app.command()
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
    import gc
    import logging
    import math

    import torch.distributed as dist

    from hdit.config import load
    from hdit.device import keep_freed_memory
    from hdit.errors import UserError
    from hdit.training.trainer import Trainer

    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes: must be a finite number above 0, got {minutes:g}")
    settings = load(config, overrides or [])
    folder = run or Path("runs", config.stem)
    written = folder / "config.toml"
    if written.exists() and written.samefile(config) and config.read_text() != load(config).dump():
        raise UserError(
            f"--run: {folder} would get its settings written over {config}; name another folder"
        )
    logging.getLogger("hdit_kernels").setLevel(logging.INFO)  # which backend attention takes
    keep_freed_memory()
    trainer = Trainer(settings, folder)
    finished = trainer.fit(None if minutes is None else 60 * minutes)
    if dist.is_initialized():
        gc.collect()  # what still holds the group, or its threads outlive it and abort the process
        dist.destroy_process_group()
    if not finished and trainer.signalled:
        raise typer.Exit(130)


@app.command()
def sample(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A run (its newest checkpoint), a checkpoint, a converted model, k-diffusion's "
            ".safetensors, DiT's .pt, or a folder of diffusers.",
        ),
    ],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many images.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new folder.  [default: <run>/samples/<settings>]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="euler, heun, dpmpp_2m, dpmpp_3m_sde, ddim, ddpm, ..."),
    ] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="karras, exponential, vp, linear_t, flow, ..."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Scale of classifier-free guidance; 1 is none.")
    ] = None,
    guide: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Guide away from this weaker model (autoguidance)."),
    ] = None,
    guide_scale: Annotated[
        float | None,
        typer.Option(min=0, help="Scale of the guidance away from that model.  [default: 2]"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Classes by name or index, repeated in turn; 'none' for no class.  [default: all]",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed of the first image; then one more each.")
    ] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The weights as trained, not their EMA.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace images that lie in DIR already.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, as in sampling.sampler.eta=0."
        ),
    ] = None,
) -> None:
    """Sample images: PNG files named by seed, grid.png and samples.json.

    What is not given comes from the run's own [sampling] settings, which --set can change.
    """

    from hdit.errors import UserError
    from hdit.runs.trained import Trained
    from hdit.sampling.options import choose_labels, open_guide, with_options
    from hdit.sampling.writer import write_samples

    trained = Trained.open(source, _warn)
    options = {
        "--steps": ("steps", steps),
        "--batch-size": ("batch_size", batch_size),
        "--guidance": ("guidance.scale", guidance),
        "--sampler": ("sampler.kind", sampler),
        "--sigmas": ("sigmas.kind", sigmas),
    }
    trained = with_options(trained, source, options, overrides or [], guide is not None)
    chosen = choose_labels(labels, number, trained)
    if guide_scale is not None and guide is None:
        raise UserError(
            "--guide-scale: has no effect without --guide, the model to guide away from"
        )
    if guide_scale == 1:
        raise UserError("--guide-scale: 1 is no guidance; leave out --guide, or set another scale")
    done = write_samples(
        trained,
        chosen,
        list(range(seed, seed + number)),
        out,
        _console(),
        raw=raw,
        overwrite=overwrite,
        guide=open_guide(guide, trained, _warn) if guide else None,
        guide_scale=2.0 if guide_scale is None else guide_scale,
    )
    typer.echo(done)


@app.command()
def evaluate(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Images: a folder (any layout), .zip, .npz (arr_0), or a config's .toml, for "
            "its data as training crops them; or a model to sample, as of `hdit sample`.",
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The reference: pictures, in any of these ways.")
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
        int | None, typer.Option("-n", "--number", min=2, help="Of samples.  [default: 10000]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**62, help="Seed of the first sample; then one more each."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Scale of classifier-free guidance; 1 is none.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images at once.  [default: 64; of samples, the model's]"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The weights as trained, not their EMA.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, as in sampling.sampler.eta=0."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that read; 0 for this one.  [default: one for a CPU]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the card as JSON, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Tell how far images are from a reference: FID and KID.

    Figures are comparable where the protocol is the same, a hash of the reference, the features,
    and the number and size of the images; the card has all of it, and the sampler's settings.
    """
    import json

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from hdit.data.check import processes
    from hdit.device import default_device, keep_freed_memory
    from hdit.errors import UserError
    from hdit.evaluation import card as comparison
    from hdit.evaluation import image_sets as images
    from hdit.evaluation.features import open_features
    from hdit.files import write_text
    from hdit.runs.trained import is_trained

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out: {out} must name a file, in a folder that is there")
    if is_trained(Path(b)):
        raise UserError(f"B: {b} is a model; the reference must be pictures, and A may be a model")
    keep_freed_memory()
    device = default_device()
    candidate: ImageSet
    reference = images.open_set(b)
    if is_trained(Path(a)):
        candidate = _sampled(
            Path(a), number or 10_000, seed or 0, steps, guidance, batch_size, raw, overrides or []
        )
    else:
        given: dict[str, Any] = {"-n": number, "--seed": seed, "--steps": steps}
        given |= {"--guidance": guidance, "--raw": raw or None, "--set": overrides or None}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name}: has no effect, as A ({a}) is no model to sample")
        candidate = images.open_set(a)
    extractor = open_features(features, device, lambda text: typer.echo(text, err=True))
    workers = processes() if workers is None else workers
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=_console(), transient=True
    ) as bar:
        tasks = {
            which: bar.add_task(f"features of {which}", total=total)
            for which, total in (("A", len(candidate)), ("B", len(reference)))
        }
        kid = bar.add_task("KID's subsets", total=None)
        found = comparison.compare(
            candidate,
            reference,
            extractor,
            batch_size=batch_size or 64,
            workers=workers,
            on_images=lambda which, n: bar.advance(tasks[which], n),
            on_subset=lambda: bar.advance(kid),
        )
    for text in found.warnings:
        _warn(text)
    card = json.dumps(found.card, indent=1)
    if out is not None:
        write_text(out, card + "\n")
    if as_json:
        typer.echo(card)
    else:
        Console(markup=False, highlight=False).print(comparison.table(found))


def _sampled(
    source: Path,
    number: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    batch_size: int | None,
    raw: bool,
    overrides: list[str],
) -> Sampled:
    """Samples of a model by its own settings, but for what is given."""
    from hdit.device import default_device
    from hdit.evaluation.image_sets import Sampled
    from hdit.runs.trained import Trained
    from hdit.sampling.options import with_options

    options = {
        "--steps": ("steps", steps),
        "--batch-size": ("batch_size", batch_size),
        "--guidance": ("guidance.scale", guidance),
    }
    trained = with_options(Trained.open(source, _warn), source, options, overrides)
    return Sampled(trained, number, seed, raw, default_device(), _warn)


@app.command()
def encode(
    config: ConfigFile,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder.  [default: space.stored of CONFIG]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, or float16 for half the bytes.")
    ] = "float32",
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a file.")] = 1024,
    overrides: Overrides = None,
) -> None:
    """Take a config's pictures through its VAE once, for training to read them as latents.

    The folder gets shards of posteriors (mean and standard deviation, of the mirror images too),
    labels and a manifest. The same command goes on after an interrupt; torchrun shares it among
    processes. Train with --set space.stored=DIR.
    """
    import os

    from rich.progress import MofNCompleteColumn, Progress

    from hdit.config import load
    from hdit.data.source import Skipped
    from hdit.device import keep_freed_memory
    from hdit.errors import UserError
    from hdit.latents.encode import DTYPES
    from hdit.latents.encode import encode as encode_images

    settings = load(config, overrides or [])
    stored = getattr(settings.space, "stored", None)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: must be {' or '.join(DTYPES)}, got {dtype!r}")
    folder = out or (Path(stored).expanduser() if stored else None)
    if folder is None:
        raise UserError("--out: name the folder to write, or set space.stored")
    keep_freed_memory()
    console = _console()
    named: set[str] = set()

    def name(file: Skipped) -> None:
        if file.path not in named:
            named.add(file.path)
            text = f"warning: skipped {file.path}: {file.reason}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("encoding", total=None)
        done = encode_images(
            settings,
            folder,
            batch_size=batch_size,
            workers=settings.training.workers,
            dtype=dtype,
            shard_size=shard_size,
            rank=int(os.environ.get("RANK", 0)),
            processes=int(os.environ.get("WORLD_SIZE", 1)),
            on_start=lambda images: bar.update(task, total=images),
            on_images=lambda n: bar.advance(task, n),
            on_skipped=name,
        )
    if done.sigma_data is None:
        typer.echo(f"{folder}: {done.shards} shards written; {done.absent} are still missing")
        return
    typer.echo(
        f"{folder}: latents of {done.images:,} images, {done.bytes / 2**20:.1f} MiB; standard "
        f"deviation {done.sigma_data:.4f} (space.sigma_data is {settings.space.sigma_data:g})\n"
        f"train with --set space.stored={folder}"
    )


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run or checkpoint; a converted folder; k-diffusion's .safetensors, or .json "
            "alone; DiT's .pt; a folder of diffusers.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="A new folder; a file for k-diffusion, facebook-dit or a config."),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="hdit, k-diffusion, facebook-dit or diffusers.  [default: hdit, a folder that "
            "`hdit sample` reads; a config for a config]",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The weights as trained, not their EMA.")
    ] = False,
    num_heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a DiT whose .pt does not tell and that is none of S, B, L, XL."
        ),
    ] = None,
) -> None:
    """Read a checkpoint of this or another project, and write it as another's.

    No pickle is executed. OUT is written whole or not at all.
    """
    from hdit.runs.conversion import convert as convert_model

    done = convert_model(source, out, to, raw=raw, num_heads=num_heads)
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{done.origin} -> {done.kind}: {done.path}")


@app.command()
def info(
    config: ConfigFile,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images at once, for the memory.  [default: a part of the batch]"),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=0, help="Of the data.  [default: what the data has]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda",
            help="Of the memory; it need not be here.  [default: what a run here takes]",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print a model's parameters, MACs and FLOPs by level, and the memory that training takes."""
    from rich.console import Console
    from rich.table import Table

    from hdit.config import load
    from hdit.data.source import DataError
    from hdit.errors import UserError
    from hdit.latents.store import read_manifest
    from hdit.models.cost import cost

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: must be cpu or cuda, got {device!r}")
    settings = load(config, overrides or [])
    note = ""
    if classes is None:
        try:
            stored = getattr(settings.space, "stored", None)
            held = read_manifest(Path(stored).expanduser()) if stored else settings.data.open()
            classes = len(held.classes)
        except DataError as error:
            classes = 0
            note = (
                f"counted without classes (or give --classes), as the data cannot be read: {error}"
            )
    shape = settings.data_shape(classes)
    rows = cost(settings.model, shape, settings.output_channels(shape))
    table = Table(
        title=f"{config.stem}: {settings.model.kind} at {shape.channels} x {shape.height} x "
        f"{shape.width}, {classes} classes",
        caption="MACs (multiply-accumulates, what the papers print as FLOPs) and FLOPs = 2 MACs:\n"
        "one forward pass of one image",
    )
    table.add_column("part")
    for name in ("grid", "tokens", "parameters", "MACs", "FLOPs"):
        table.add_column(name, justify="right")
    for row in rows:
        h, w = row.grid or (0, 0)
        grid = [f"{h} x {w}", f"{h * w:,}"] if row.grid else ["", ""]
        table.add_row(row.name, *grid, f"{row.params:,}", _si(row.macs), _si(2 * row.macs))
    params, macs = sum(row.params for row in rows), sum(row.macs for row in rows)
    table.add_section()
    table.add_row("total", "", "", f"{params:,}", _si(macs), _si(2 * macs))
    console = Console()
    console.print(table)
    for remark in settings.model.remarks(shape, params):
        console.print(remark)
    images = batch or settings.training.batch_size // settings.training.accumulate
    console.print(_memory_table(settings, shape, images, device))
    if note:
        console.print(note, highlight=False, markup=False)


def _memory_table(settings: RunConfig, shape: DataShape, images: int, device: str | None) -> Table:
    """Of an eager step on the device, or if None on the one that a run here takes."""
    import torch
    from rich.table import Table

    from hdit.device import autocast_dtype, precision_on
    from hdit.models.memory import training_memory
    from hdit_kernels import native

    cuda_here = torch.cuda.is_available()
    device = device or ("cuda" if cuda_here else "cpu")
    asked = settings.training.precision
    if asked == "auto" and device == "cuda" and not cuda_here:
        asked = "bf16"  # as devices from compute capability 8.0 on take it
    precision = precision_on(torch.device(device), asked) if asked == "auto" else asked
    plain, checkpointed = (
        training_memory(
            settings.model,
            shape,
            images,
            out_channels=settings.output_channels(shape),
            checkpointing=checkpointing,
            autocast=autocast_dtype(precision),
            device=device,
        )
        for checkpointing in (False, True)
    )
    operators = "the C++ library's and torch's operators"
    if device == "cuda" or native.unavailable():
        operators = "torch's operators"
    table = Table(
        title=f"memory of a step with {images} images on {device} in {precision}",
        caption=f"GiB of tensors in an eager step, by {operators};\ntorch.compile keeps less. "
        "The kernels' own buffers, the allocator's\nreserve"
        f"{', CUDA itself' if device == 'cuda' else ''} and images in the loader come on top",
    )
    table.add_column("")
    table.add_column("plain", justify="right")
    table.add_column("gradient_checkpointing", justify="right")

    def row(name: str, *sizes: int) -> None:
        table.add_row(name, *(f"{size / 2**30:.3g}" for size in sizes))

    row("weights and EMA", *(m.weights + m.ema for m in (plain, checkpointed)))
    row("optimizer", plain.optimizer, checkpointed.optimizer)
    row("gradients", plain.gradients, checkpointed.gradients)
    for part in plain.activations:
        sizes = (m.activations.get(part, 0) for m in (plain, checkpointed))
        row(f"activations of {part}", *sizes)
    row("temporaries of AdamW", plain.update, checkpointed.update)
    table.add_section()
    # A later part of a batch runs while the gradients of the earlier ones are there.
    kept = plain.gradients if settings.training.accumulate > 1 else 0
    row("at the peak", plain.peak + kept, checkpointed.peak + kept)
    return table


@app.command()
def doctor(
    fast: Annotated[
        bool, typer.Option("--fast", help="Neither try torch.compile nor time anything.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, for a report of a bug.")
    ] = False,
) -> None:
    """Tell whether this machine can run hdit well: devices, compilers, attention, packages.

    Ends with status 1 where training cannot work, and says why.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console

    try:
        from hdit.doctor import examine, tables
    except ImportError as error:
        typer.echo(f"broken: hdit cannot be imported: {error}", err=True)
        raise typer.Exit(1) from None
    console = Console()
    with _console().status("") as line:
        report = examine(fast, lambda step: line.update(step))
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        for table in tables(report):
            console.print(table)
        if not report.broken:
            typer.echo("hdit can train here.")
    for problem in report.broken:
        typer.echo(f"broken: {problem}", err=True)
    if report.broken:
        raise typer.Exit(1)


data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at a data set before a run."
)
app.add_typer(data, name="data")


@data.command("check")
def check_data(
    place: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A folder, .zip, .npz or .tar, as data.path; for --kind hub or python its name or "
            "hook; or a config's .toml, for its [data].",
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the crop: a side, or HEIGHTxWIDTH.  [default: 256]"),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="3 for RGB, 1 for grey.  [default: 3]")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="NAME", help="As data.crop.  [default: center]")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where PATH does not tell: hub, python, ...")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A PNG.  [default: <name>-contact-sheet.png, here]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that read; 0 for this one.  [default: one for a CPU]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    overrides: Overrides = None,
) -> None:
    """Read every picture of a data set, as training would, and tell what is there.

    Sizes, classes, unreadable files, exact duplicates, sigma_data, and a contact sheet of up to 100
    pictures after the crop. Ends with status 1 where training would end, and says why.
    """
    import json

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from hdit.config import load
    from hdit.data import check
    from hdit.errors import UserError
    from hdit.report.grids import save_grid

    path = check.sheet_path(place, sheet)
    options = {"--size": size, "--channels": channels, "--crop": crop, "--kind": kind}
    given = [name for name, value in options.items() if value is not None]
    if Path(place).suffix == ".toml":
        if given:
            raise UserError(f"{given[0]}: has no effect with a config; use --set data.KEY=VALUE")
        source = check.by_index(load(place, overrides or []).data.open())
    elif overrides:
        raise UserError("--set: has no effect without a config; name a .toml in place of PATH")
    else:
        source = check.open_source(
            place, kind, size or "256", channels=channels or 3, crop=crop or "center"
        )
    workers = check.processes() if workers is None else workers
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task("reading", total=len(source))
        report, shown = check.check(source, workers, lambda count: bar.advance(task, count))
    if as_json:
        written = str(path) if shown else None
        typer.echo(json.dumps(report.to_json() | {"contact_sheet": written}, indent=1))
    else:
        console = Console()
        for line in check.lines(report):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        for table in check.tables(report):
            console.print(table)
    if shown:
        tiles = check.contact_sheet(source, shown)
        save_grid(tiles, path)
        typer.echo(f"{len(tiles)} images as training sees them: {path}", err=as_json)
    if report.unusable:
        typer.echo(f"unusable: {report.unusable}", err=True)
        raise typer.Exit(1)


def _si(number: int) -> str:
    """Four digits and a prefix: 206.1 G."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {prefix}"
    return str(number)


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _console():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console(stderr=True)


def main() -> None:
    """Runs the command line. What the user can mend is one message, without a traceback."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        # The class is known only if its module was loaded, which a verb that raises it has done.
        errors = sys.modules.get("hdit.errors")
        if errors is None or not isinstance(error, errors.UserError):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
