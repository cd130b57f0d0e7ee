"""What is there before the first step: processes, data, the model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import patch_environment
from torch import nn

from hdit.config import RunConfig, differences
from hdit.data.batches import Layout
from hdit.data.source import Skipped, Source, Stream, first, size_of, warnings_of
from hdit.device import default_device, precision_on
from hdit.latents.encode import open_training_source, origin_of
from hdit.latents.store import Latents
from hdit.models import BackboneModule
from hdit.nn.compiling import compiles
from hdit.processes import ProcessError, host_group, join, read_world
from hdit.protocols import DataShape, Space
from hdit.runs.building import check_step, make_network
from hdit.runs.checkpoint import Checkpoint
from hdit.runs.folder import RunFolder
from hdit.runs.saver import disk_need
from hdit.sampling.sample import check_null_class, settle_sampling
from hdit.training.distributed import Parallel, Replicated, Sharded
from hdit.training.ema import Averages
from hdit.training.held_out import Divided, hold_out, warn_of_shared
from hdit.training.hosts import Hosts
from hdit.training.metrics import TrainingError
from hdit.training.objective import Objective, settle_training
from hdit.training.optim import adamw, load_optimizer
from hdit.training.resume import check_resume, keep_precision
from hdit.training.validation import Validation

PATIENCE = timedelta(hours=2)  # how long processes wait for the one that saves
STEP_PATIENCE = timedelta(minutes=20)
"""How long they wait within a step, with compilation and the first images of a stream. NCCL does
not tell of another process on the same machine that is gone, so that this long may be lost."""

Say = Callable[[str], None]


def open_processes(run: str, limit: float, say: Say) -> tuple[Accelerator, Hosts]:
    """This process among those of `run`, and how their CPUs talk.

    Raises ProcessError if others are not there in `limit` seconds; `say` is told of it before.
    """
    world, device = read_world(), default_device()
    if world.size == 1:
        # accelerate reads the environment too, and would wait for others by a part of what it names
        with patch_environment(LOCAL_RANK="-1", WORLD_SIZE="1", PMI_SIZE="1"):
            return Accelerator(cpu=device.type == "cpu", mixed_precision="no"), Hosts()
    if dist.is_initialized():
        hosts = host_group(PATIENCE)
    else:
        backend = "nccl" if device.type == "cuda" else "gloo"
        hosts = join(world, run, backend, limit, PATIENCE, say, STEP_PATIENCE)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no"), Hosts(hosts)


@dataclass(frozen=True)
class Setup:
    """A run that is ready to train, from `found` if there is a checkpoint."""

    config: RunConfig  # with what "auto" came to
    layout: Layout
    space: Space
    source: Source | Stream
    shape: DataShape
    found: Checkpoint | None
    parallel: Parallel
    backbone: BackboneModule
    averages: Averages
    optimizer: torch.optim.Optimizer
    compiled: bool
    images: Divided

    def load(self, found: Checkpoint, say: Say) -> None:
        """Takes model, averages and optimizer from a checkpoint; `say` hears of new averages."""
        found.fill("model", self.backbone.state_dict())
        self.averages.load(found, say)
        load_optimizer(
            self.backbone,
            self.optimizer,
            found.names("optimizer"),
            lambda tensors: found.fill("optimizer", tensors),
        )

    def objective(self, network: nn.Module, device: torch.device) -> Objective:
        """The loss of batches by this network, which is the backbone or has it within."""
        stored = isinstance(self.source, Latents)
        return Objective(
            network,
            self.config,
            self.shape,
            self.space,
            device,
            stored=stored,
            compiled=self.compiled,
        )

    def validation(
        self,
        device: torch.device,
        hosts: Hosts,
        name_file: Callable[[Skipped], None],
    ) -> Validation | None:
        """What validates the run on its held-out images, which are read here; None without any.

        Raises DataError where too many cannot be read.
        """
        if self.images.held_out is None:
            return None
        number = self.config.training.validate_images
        assert number is not None, "the config must be resolved"
        return Validation(
            self.images.held_out.fixed(number),
            self.images.classes,
            self.config,
            self.shape,
            self.space,
            device,
            hosts=hosts,
            sharded=self.parallel.sharded,
            name_file=name_file,
        )


def prepare(
    config: RunConfig,
    run: RunFolder,
    accelerator: Accelerator,
    hosts: Hosts,
    say: Say,
    warn: Say,
    opened: tuple[Space, Source | Stream] | None = None,
) -> Setup:
    """Opens the data and builds the model, or loads it from the newest checkpoint of `run`.

    `opened` is space and data in place of the config's own.

    Raises UserError if data, VAE or settings do not fit, CheckpointError if the folder holds a run
    of another model, and ProcessError if another process of `hosts` has other data or settings.
    """
    device, layout = accelerator.device, _layout(config, accelerator)
    if opened is None:
        own = config.space.open(device)
        opened = own, open_training_source(config, own)
    space, source = opened
    for text in warnings_of(source):
        warn(text)
    shape = config.data_shape(len(source.classes))
    if config.sampling.grid:
        check_null_class(config, shape)
    found = run.newest(warn)
    config = settle_training(keep_precision(config, found), device, warn)
    if config.sampling.grid:  # or its precision would be found missing after a checkpoint
        settle_sampling(config, device, config.sampling.grid, warn)
    _check_alike(hosts, config, source, space, found)
    images = hold_out(config, space, source, hosts, say)
    source = images.training
    if found:
        check_resume(found, config, shape, source, space, run.path, say)
    if found is None or found.config.data != config.data:
        warn_of_shared(config, images, hosts, say, warn)

    t = config.training
    torch.manual_seed(t.seed)
    compiled = compiles(t.compile, device, calls=t.images // t.batch_size)
    check_step(config, shape, device, accelerator.num_processes, compiled, warn)
    # Raises DataError here, not in a worker, where nothing can be read; an image of a size that the
    # model could not take may be large by itself.
    first(source)
    parallel, backbone, averages = _build(config, shape, accelerator, compiled, warn)
    optimizer = adamw(backbone, t.optimizer)
    if isinstance(source, Latents):
        told, used = origin_of(config.data), source.manifest.origin
        if told != used:
            warn(f"space.stored was encoded from {used}; [data] now is {told}")
    say(_introduction(config, layout, images, shape, backbone, device, compiled))
    setup = Setup(
        config,
        layout,
        space,
        source,
        shape,
        found,
        parallel,
        backbone,
        averages,
        optimizer,
        compiled,
        images,
    )
    parameters = sum(p.numel() for p in backbone.parameters())
    say(disk_need(run.path, parameters, t, found.state.images if found else 0))
    if found:
        setup.load(found, say)
        say(f"resuming from {found.folder} at {found.state.images:,} images")
    return setup


def _build(
    config: RunConfig, shape: DataShape, accelerator: Accelerator, compiled: bool, warn: Say
) -> tuple[Parallel, BackboneModule, Averages]:
    """-> (how the processes share a model, the backbone and its averages, all in place)."""
    t, device = config.training, accelerator.device
    backbone = make_network(config, shape)
    averages = Averages(backbone, t.ema)
    if t.gradient_checkpointing:
        backbone.checkpoint_blocks()
    if compiled:
        backbone.compile_blocks()
    parallel: Parallel = Replicated(accelerator)
    if t.parallel == "fsdp" and accelerator.num_processes == 1:
        warn("training.parallel: 'fsdp' has nothing to share in a single process")
    elif t.parallel == "fsdp":
        parallel = Sharded(device, precision_on(device, t.precision), t.replicate)
    parallel.place(backbone)
    for average in averages.modules.values():
        parallel.place(average, average_of=backbone)
    return parallel, backbone, averages


def _check_alike(
    hosts: Hosts,
    config: RunConfig,
    source: Source | Stream,
    space: Space,
    found: Checkpoint | None,
) -> None:
    """Raises ProcessError in the first process, and ends the others, if one has something else."""
    ours = config.model_dump(mode="json", exclude_none=True) | {
        "images of the data": size_of(source),
        "classes of the data": source.classes,
        "hash of the VAE": space.identity,
        "images of the newest checkpoint": found.state.images if found else 0,
    }
    everyone = hosts.gathered(ours)
    for rank, theirs in enumerate(everyone):
        if different := differences(everyone[0], theirs):
            if hosts.rank != 0:
                raise SystemExit(1)  # one message is enough
            key, first_has, it_has = different[0]
            raise ProcessError(
                f"rank {rank}: has another {key}: {it_has!r:.200}, where rank 0 has "
                f"{first_has!r:.200}; start all processes with the same settings and files"
            )


def _layout(config: RunConfig, accelerator: Accelerator) -> Layout:
    t, processes = config.training, accelerator.num_processes
    if t.batch_size % (t.accumulate * processes):
        raise TrainingError(
            f"training.batch_size: {t.batch_size} images cannot be shared by "
            f"{processes} processes in {t.accumulate} accumulation steps"
        )
    return Layout(t.batch_size, t.accumulate, processes, accelerator.process_index)


def _introduction(
    config: RunConfig,
    layout: Layout,
    data: Divided,
    shape: DataShape,
    backbone: nn.Module,
    device: torch.device,
    compiled: bool,
) -> str:
    """The first line that a session prints."""
    source, held_out = data.training, data.held_out
    number = size_of(source)
    images = "a stream of images" if number is None else f"{number:,} images"
    if isinstance(source, Latents):
        images = f"stored latents of {images}"
    classes = f" of {len(source.classes)} classes" if source.classes else ""
    held = ""
    if held_out is not None:
        used = min(len(held_out.hashes), config.training.validate_images or 0)
        held = f", {len(held_out.hashes):,} held out ({used:,} to validate on)"
    processes = f" x {layout.processes}" if layout.processes > 1 else ""
    parameters = sum(p.numel() for p in backbone.parameters())
    return (
        f"{images}{classes}{held}, {' x '.join(map(str, shape.chw))}; "
        f"{config.model.kind} of {parameters:,} parameters; "
        f"{device.type}{processes}, {config.training.precision}{', compiled' if compiled else ''}"
    )
