"""Writes the tables of docs/scaling.md that `hdit plan` computes: the papers' models, and 24 GB.

    python scripts/table_plans.py

They stand between the two lines "<!-- plans: ... -->" and are about four minutes' work on one core.
Nothing is trained, and no GPU is needed.
"""

from __future__ import annotations

from pathlib import Path

from hdit.config import RunConfig, load
from hdit.config.presets import find_config
from hdit.models.cost import cost
from hdit.models.peaks import peak_flops
from hdit.planning.model import Mode, step_memory
from hdit.planning.plan import USABLE, Asked, Fit, Hours, largest, stated_hours

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN = "<!-- plans: written by scripts/table_plans.py, do not edit up to the next such line -->\n"
END = "<!-- plans: end -->\n"
MFU = 0.4
PAPERS = (
    "dit-xl-2-256",
    "dit-xl-2-512",
    "hdit-imagenet128",
    "hdit-imagenet256",
    "hdit-ffhq1024",
)
GPUS = (1, 8, 64)
SMALL = ("dit-xl-2-256", "hdit-ffhq1024")  # on cards of 24 GB


def settings(name: str) -> tuple[RunConfig, int]:
    """A preset and its number of classes, as its data is named."""
    config = load(find_config(Path(name)))
    classes = getattr(config.data, "classes", None)
    return config, classes if isinstance(classes, int) else 0


def hours(name: str, gpu: str, gpus: int, checkpointing: bool = False) -> Hours:
    """Of a preset to its end, at MFU of the GPU's peak in bf16."""
    config, classes = settings(name)
    t = config.training.model_copy(update={"gradient_checkpointing": checkpointing})
    config = config.model_copy(update={"training": t})
    asked = Asked(gpus=gpus, mfu=MFU, peak=peak_flops(gpu, "bf16"))
    return stated_hours(config, classes, asked)


def fit(name: str, mode: Mode, gpus: int, card: float) -> Fit:
    """How a preset's batch is cut on so many cards of `card` GiB."""
    config, classes = settings(name)
    t = config.training.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"training": t})
    shape = config.data_shape(classes)

    def peak(images: int, parts: int) -> int:
        return step_memory(config, shape, images, "cuda", mode, parts=parts, processes=gpus).peak

    return largest(mode, peak, USABLE * card * 2**30, config.training.batch_size // gpus)


def cell(found: Fit) -> str:
    """Parts x images at once, and GiB."""
    if not found.accumulate:
        return "does not fit"
    return f"{found.accumulate} x {found.images}: {found.peak / 2**30:.1f} GiB"


def papers() -> list[str]:
    """A line for each model of the papers."""
    heads = [f"{n} GPU{'s' if n > 1 else ''}" for n in GPUS]
    names = ["preset", "parameters", "GMAC", *(f"hours, {head}" for head in heads), *heads]
    lines = [f"| {' | '.join(names)} |", f"|---|{'--:|' * (len(names) - 1)}"]
    for name in PAPERS:
        config, classes = settings(name)
        shape = config.data_shape(classes)
        parts = cost(config.model, shape, config.output_channels(shape))
        cells = [f"`{name}`", f"{sum(p.params for p in parts) / 1e6:.1f} M"]
        cells.append(f"{sum(p.macs for p in parts) / 1e9:.1f}")
        cells += [f"{hours(name, 'H100', n).total:,.1f}" for n in GPUS]
        cells += [cell(fit(name, Mode("ddp" if n > 1 else "", False), n, 80)) for n in GPUS]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def small() -> list[str]:
    """A line for each way to train a model on cards of 24 GB."""
    lines = [
        "| preset | GPUs | setting | parts x images at once: GiB | hours |",
        "|---|--:|---|--:|--:|",
    ]
    for name in SMALL:
        for gpus, ways in ((1, ("",)), (8, ("ddp", "fsdp"))):
            for mode in (Mode(way, again) for way in ways for again in (False, True)):
                found = fit(name, mode, gpus, 24)
                took = hours(name, "RTX 4090", gpus, mode.checkpointing).total
                setting = " ".join(
                    [way for way in (f"`{mode.parallel}`",) if mode.parallel]
                    + ["`gradient_checkpointing`" if mode.checkpointing else "plain"]
                )
                shown = f"{took:,.0f}" if found.accumulate else ""
                lines.append(f"| `{name}` | {gpus} | {setting} | {cell(found)} | {shown} |")
    return lines


def tables() -> str:
    """What stands between the lines."""
    return "\n".join(
        [
            "",
            "The papers' models to the end of their presets (batch 256, bf16) on H100s at "
            f"{MFU:.0%} of their peak. The last columns",
            "cut a GPU's part of the batch into as few parts as 80 GiB hold, without "
            "gradient checkpointing:",
            "",
            *papers(),
            "",
            f"The same batch on cards of 24 GB, hours on RTX 4090s at {MFU:.0%} of their peak:",
            "",
            *small(),
            "",
            "",
        ]
    )


def page(text: str, within: str) -> str:
    """The page with other tables. Raises ValueError if `text` lacks the marking lines."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} must have the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return f"{before}{begin}{within}{end}{after}"


def main() -> None:
    """Writes the page."""
    within = tables()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), within), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
