"""`hdit sample`: a set of samples of a model, by one process or several, in any form of output."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from rich.console import Console

from hdit.config import differences
from hdit.device import default_device, keep_freed_memory
from hdit.errors import SolverError, UserError
from hdit.files import SMALLEST_SHARE, check_free_space
from hdit.locks import LOCK, locked
from hdit.messages import say
from hdit.processes import ProcessError
from hdit.protocols import Space
from hdit.report.grids import save_grid
from hdit.runs.trained import Trained
from hdit.sampling.check import check_again
from hdit.sampling.outputs import Npz, Output, open_output
from hdit.sampling.progress import Progress, packing
from hdit.sampling.record import Labels, Plan, make_record, recipe
from hdit.sampling.sample import GuideModel, Samples, check_null_class, sample, settle_sampling
from hdit.sampling.team import Team
from hdit.sampling.threads import MOST_THREADS, Writer
from hdit.tensors import NotFiniteError

GRID_LIMIT = 100  # images in the grid


@dataclass(frozen=True)
class Request:
    """What is asked for: `number` images of the seeds from `first` on.

    `trained` has the settings of sampling that are wanted. `out` is a folder, an .npz, or tar
    shards as in x-{00..07}.tar; by default a folder in the run's samples.
    """

    trained: Trained
    first: int
    number: int
    labels: Labels | None = None
    out: Path | None = None
    raw: bool = False
    overwrite: bool = False
    guide: Trained | None = None
    guide_scale: float = 2.0
    check: int = 0  # images to sample once more, at the end

    @property
    def place(self) -> Path:
        """Where the samples go."""
        scale = self.guide_scale if self.guide else None
        name = _folder_name(self.trained, self.first, self.raw, scale)
        return self.out or self.trained.samples / name

    def plan(self) -> Plan:
        """The images by index."""
        trained = self.trained
        shape = trained.config.data.shape
        return Plan(self.first, self.number, shape, self.labels, trained.classes)


def write_samples(request: Request, console: Console, team: Team | None = None) -> str:
    """Writes the images that are not there yet, a grid and a record -> a line that tells of them.

    All processes of `team` call it together; but for images, the first writes all files. Raises
    UserError where the place is not free, or holds another set.
    """
    team = team or Team()
    keep_freed_memory()
    device = _device(team)

    def warn(text: str) -> None:
        if team.is_first:
            say(console, f"warning: {text}")

    request, output = team.all_do(lambda: _settled(request, device, warn))
    _check_alike(team, output)
    with ExitStack() as stack:
        complete = team.first_does(lambda: _open_place(output, request.overwrite, stack))
        if complete and not request.check:
            return f"all {request.number:,} images are there already: {output.out}"
        make = team.all_do(lambda: Maker(request, device))
        there = team.first_does(lambda: _begin(output, request.overwrite, complete))
        started, todo = monotonic(), np.flatnonzero(~there)
        if not complete:
            _make_all(output, make, todo, console, team)
        if not team.is_first:
            return ""
        if not complete:
            _finish(output, console)
        told = _summary(output, len(todo), monotonic() - started)
        checked = check_again(output, make, request.check) if request.check else ""
    return "\n".join(filter(None, [told, checked]))


def _settled(
    request: Request, device: torch.device, warn: Callable[[str], None]
) -> tuple[Request, Output]:
    """The request with what "auto" comes to on this device, and the form of its output."""
    trained, guide = request.trained, request.guide
    distinct = list(request.labels.chosen) if request.labels else None
    check_null_class(trained.config, trained.shape, distinct, guide.config if guide else None)
    config = settle_sampling(trained.config, device, request.number, warn)
    request = replace(request, trained=trained.configured(config))
    plan = request.plan()
    record = make_record(request.trained, plan, request.raw, guide, request.guide_scale)
    return request, open_output(request.place, plan, record)


def _device(team: Team) -> torch.device:
    """The device of this process: of several GPUs of a machine, each has its own."""
    device = default_device()
    if device.type == "cuda" and team.world.size > 1:
        device = torch.device("cuda", team.world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _check_alike(team: Team, output: Output) -> None:
    """Raises ProcessError in a process that has other weights or settings than the first."""
    first = team.first_does(lambda: recipe(output.asked))

    def compare() -> None:
        if different := differences(first, recipe(output.asked)):
            key, theirs, ours = different[0]
            raise ProcessError(
                f"rank {team.world.rank}: has another {key}: {ours!r:.200}, where rank 0 has "
                f"{theirs!r:.200}; start all processes with the same settings and files"
            )

    team.all_do(compare)


# ---- the place -----------------------------------------------------------------------------------


def _open_place(output: Output, overwrite: bool, stack: ExitStack) -> bool:
    """Locks the place of a set until `stack` closes -> whether the set is complete already."""
    output.check_targets()
    stack.callback(output.tidy)
    stack.enter_context(
        locked(
            output.work / LOCK,
            "is writing samples here",
            "wait for its end, or name another --out",
        )
    )
    return output.is_complete(overwrite)


def _begin(output: Output, overwrite: bool, complete: bool) -> np.ndarray:
    """Removes an old set, if that is asked for, and writes the record -> the images there."""
    if complete:
        return np.ones(output.plan.number, bool)
    if overwrite:
        output.remove()
    there = output.there()
    pixels, left = math.prod(output.plan.shape), int((~there).sum())
    if isinstance(output, Npz):  # which are written twice, as they are
        check_free_space(output.work, left, 2 * pixels * SMALLEST_SHARE)
    else:
        check_free_space(output.work, left, pixels)
    output.begin()
    return there


def _folder_name(trained: Trained, seed: int, raw: bool, guide_scale: float | None) -> str:
    """A name that tells one set of samples of a model from another."""
    spec = trained.config.sampling
    name = f"{trained.images}-{spec.sampler.kind}-{spec.steps}-cfg{spec.guidance.scale:g}"
    name += "" if guide_scale is None else f"-guide{guide_scale:g}"
    weights = trained.weights(raw)
    # By its name only where it is none that a model is sampled with by itself.
    of = "-raw" if raw else f"-{weights}" if weights.startswith("ema-") else ""
    return f"{name}-seed{seed}{of}"


# ---- the images ----------------------------------------------------------------------------------


class Maker:
    """The networks and the VAE of a request, loaded once."""

    def __init__(self, request: Request, device: torch.device):
        """Raises UserError where the space is not the one of training."""
        self.trained, self.device = request.trained, device
        self.space: Space = self.trained.space(device)
        self.backbone = self.trained.network(request.raw).to(device)
        if self.trained.config.sampling.compile:
            self.backbone.compile_blocks()
        self.guide = None
        if request.guide:
            worse = request.guide.network(request.raw).to(device)
            self.guide = GuideModel(worse, request.guide.config, request.guide_scale)

    def __call__(
        self,
        plan: Plan,
        indices: np.ndarray,
        batch_size: int,
        on_step: Callable[[], None] | None = None,
    ) -> Iterator[Samples]:
        """These images of a plan, in batches. Raises as `sample`."""
        config, labels = self.trained.config, plan.labels_of(indices)
        spec = config.sampling.model_copy(update={"batch_size": batch_size})
        return sample(
            self.backbone,
            config.model_copy(update={"sampling": spec}),
            self.trained.shape,
            (plan.first + indices).tolist(),
            None if labels is None else labels.tolist(),
            self.device,
            on_step,
            self.guide,
            self.space,
        )


def _make_all(output: Output, make: Maker, todo: np.ndarray, console: Console, team: Team) -> None:
    """Makes the images that are to do, of which this process takes its part, and stores them."""
    plan, spec = output.plan, make.trained.config.sampling
    rank, size = team.world.rank, team.world.size
    most = max(1, min(spec.batch_size, -(-len(todo) // size)))
    batches = [todo[i : i + most] for i in range(0, len(todo), most)]
    ours = batches[rank::size]
    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1
        bar.within(steps / spec.steps, most * size)

    def one(indices: np.ndarray) -> int:
        nonlocal steps
        steps, part = 0, next(parts)
        output.count(rank, len(indices), part.evaluations)
        writer.put(indices, part.images)
        return len(indices)

    done = plan.number - len(todo)
    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // size))
    # Without an image to make it would tell of what is wrong with all images.
    parts = make(plan, np.concatenate(ours), most, on_step) if ours else iter(())
    with (
        _nothing_of_a_ruined_model(output, team),
        Writer(output.store.put, threads) as writer,
        Progress(console, plan.number, done, shown=team.is_first) as bar,
    ):
        for turn in range(-(-len(batches) // size)):
            indices = ours[turn] if turn < len(ours) else todo[:0]
            bar.made(team.round(lambda: one(indices) if len(indices) else 0))  # noqa: B023
        for _ in parts:  # its end, where it tells what is wrong with all images
            raise AssertionError("all batches were taken")
        bar.doing("storing")
        team.end(writer.flush)


@contextmanager
def _nothing_of_a_ruined_model(output: Output, team: Team) -> Iterator[None]:
    """Removes the set, if no image is there, where the first ones cannot be made."""
    try:
        yield
    except (NotFiniteError, SolverError):
        if team.world.size == 1 and not output.there().any():
            output.remove()
        raise


def _finish(output: Output, console: Console) -> None:
    """Writes the grid, the files and the record of a set whose images are all there."""
    plan = output.plan
    missing = np.flatnonzero(~output.there())
    if len(missing):
        raise UserError(
            f"--out: {output.out} lacks {len(missing):,} images that other processes made, as of "
            f"seed {plan.first + missing[0]}; name a folder that all machines share"
        )
    if not output.grid.exists():
        shown = [output.get(index) for index in range(min(GRID_LIMIT, plan.number))]
        save_grid(torch.stack(shown), output.grid)
    with packing(console, plan.number) as on_images:
        output.pack(on_images)
    output.finish(output.evaluations())


def _summary(output: Output, made: int, seconds: float) -> str:
    """A line of what is there, and what was made of it now."""
    plan, each = output.plan, output.asked["evaluations"]
    now = f" ({made:,} of them now)" if made < plan.number else ""
    return (
        f"{plan.number:,} images{now} of {each} network evaluations each "
        f"in {seconds:.1f} s: {output.out} (grid: {output.grid})"
    )
