"""A model that can be used, wherever it lies: in a run, a converted folder, or another's file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hdit.config import RunConfig
from hdit.data.kinds import MODELS, kind_of_model, names_checkpoint, what_is
from hdit.device import Precision
from hdit.diffusion.denoiser import Denoiser
from hdit.errors import UserError
from hdit.interop import Contents, formats
from hdit.interop.contents import Told
from hdit.models import BackboneModule
from hdit.protocols import DataShape, Space
from hdit.runs import export
from hdit.runs.building import make_denoiser, make_network
from hdit.runs.checkpoint import Checkpoint, find
from hdit.tensors import check_finite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trained model: its settings, weights and facts. `Trained.open` makes one."""

    path: Path  # of its checkpoint, converted folder or file
    held: Contents
    samples: Path  # the folder for its samples if no other is named
    vae: str = ""  # the identity of the VAE whose latents it was trained on, if known

    @classmethod
    def open(
        cls,
        path: str | Path,
        warn: Callable[[str], None] = log.warning,
        *,
        weights: str | None = None,
        num_heads: int | None = None,
        num_classes: int | None = None,
        prediction: str | None = None,
    ) -> Trained:
        """The model of a run (its newest checkpoint), a checkpoint or the file `best` beside it, a
        converted folder, or another project's: a .safetensors file of k-diffusion, a .pt of DiT, a
        folder of diffusers.

        `weights` names the set to use, as "model" or "ema-0.999"; if absent, EMA or what there is.
        `warn` hears of damaged checkpoints that were passed over, and of what was assumed of a DiT
        whose file does not tell; `num_heads`, `num_classes` and `prediction` tell it. Raises
        UserError where it cannot be read, has no such weights, or they are not finite.
        """
        path, told = Path(path), Told(num_heads, num_classes, prediction)
        kind = kind_of_model(path)[0] if path.is_dir() else None
        if kind == "converted":
            told.refuse(path)
            return cls.of(_chosen(export.read(path, warn), path, weights), path)
        if (path.is_file() and not names_checkpoint(path)) or kind == "diffusers":
            held = formats.read(path, told)
            for text in held.assumed:
                warn(text)
            return cls.of(_chosen(held, path, weights), path)
        told.refuse(path)
        return cls._of_checkpoint(find(path, warn), weights)

    @classmethod
    def of(cls, held: Contents, path: Path) -> Trained:
        """The model that was read from `path`; its samples go beside that.

        Raises NotFiniteError for weights that are not finite.
        """
        for tensors in held.sets.values():
            check_finite(tensors, str(path), "the model is of no use")
        place = path.resolve()
        name = place.stem if place.is_file() else place.name
        return cls(path, held, place.with_name(f"{name}-samples"))

    @classmethod
    def _of_checkpoint(cls, found: Checkpoint, weights: str | None) -> Trained:
        folder, state = found.folder.resolve(), found.state
        run = folder.parent.parent if folder.parent.name == "checkpoints" else None
        name = f"{run.name}, checkpoint {folder.name}" if run else folder.name
        names = found.sets()
        if weights is not None:
            _check_there(weights, names, found.folder)
        # Of several averages only the one that is asked for is read.
        asked = [weights] if weights else [n for n in names if n in ("ema", "model")] or names[:1]
        sets = {name: found.tensors(name) for name in asked}
        held = Contents(
            found.config,
            state.shape,
            state.classes,
            sets,
            f"{export.KIND} run {name}",
            state.images,
        )
        samples = run / "samples" if run else folder.with_name("samples")
        return cls(found.folder, held, samples, state.space)

    @property
    def config(self) -> RunConfig:
        """Its settings, resolved."""
        return self.held.config

    @property
    def shape(self) -> DataShape:
        """What its backbone sees and predicts."""
        return self.held.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes; empty without labels."""
        return self.held.classes

    @property
    def images(self) -> int:
        """How many images it was trained on; 0 if unknown."""
        return self.held.images

    @property
    def origin(self) -> str:
        """Where it came from, in words."""
        return self.held.origin

    def configured(self, config: RunConfig, shape: DataShape | None = None) -> Trained:
        """The same model with other settings of sampling, or for images of another size."""
        return replace(self, held=replace(self.held, config=config, shape=shape or self.shape))

    def weights(self, raw: bool = False) -> str:
        """The name of the weights to use: "model", as trained, if `raw`; else EMA if there is one.

        Raises UserError where `raw` ones are asked for that were not kept.
        """
        if not raw:
            return self.held.weights
        if "model" not in self.held.sets:
            raise UserError(
                f"{self.path}: has one set of weights, {self.held.weights!r}; leave --raw out"
            )
        return "model"

    def tensors(self, raw: bool = False) -> dict[str, Tensor]:
        """Those weights by our names, in the dtypes that they are stored in."""
        return self.held.sets[self.weights(raw)]

    def contents(self, raw: bool = False) -> Contents:
        """What another format can be written from: the model with those weights alone.

        Further averages are "ema" there, as formats have one, and the origin tells which.
        """
        name, held = self.weights(raw), self.held
        if not name.startswith("ema-"):
            return replace(held, sets={name: self.tensors(raw)})
        origin = f"{held.origin}, average {name}"
        return replace(held, sets={"ema": self.tensors(raw)}, origin=origin)

    def network(self, raw: bool = False) -> BackboneModule:
        """The backbone with those weights, in float32 on the CPU, in eval mode."""
        network = make_network(self.config, self.shape)
        network.load_state_dict(self.tensors(raw))
        return network.eval()

    def denoiser(
        self,
        raw: bool = False,
        device: torch.device | None = None,
        precision: Precision = "fp32",
    ) -> Denoiser:
        """D(x; sigma) of the network, on this device or the CPU."""
        network = self.network(raw).to(device or torch.device("cpu"))
        return make_denoiser(network, self.config, self.shape, precision)

    def space(self, device: torch.device) -> Space:
        """Its space, opened. Raises UserError for another VAE than that of its training."""
        space: Space = self.config.space.open(device)
        if self.vae and space.identity != self.vae:
            raise UserError(
                f"space.vae: the model was trained on latents of another VAE: its hash is "
                f"{self.vae:.12}, this one's {space.identity:.12}"
            )
        return space


def _chosen(held: Contents, path: Path, weights: str | None) -> Contents:
    """With the set of that name alone, if one is given. Raises UserError as `_check_there`."""
    if weights is None:
        return held
    _check_there(weights, list(held.sets), path)
    return replace(held, sets={weights: held.sets[weights]})


def _check_there(weights: str, names: list[str], path: Path) -> None:
    """Raises UserError for weights that there are not, with the names of those that are."""
    if weights not in names:
        raise UserError(f"--weights: {path} has no {weights!r}; it has {', '.join(names)}")


def is_trained(path: Path) -> bool:
    """Whether a path looks like a model that `Trained.open` reads, damaged or not.

    Raises DataError for a folder that is both a model and images.
    """
    return what_is(path) in MODELS
