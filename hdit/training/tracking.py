"""Trackers: TensorBoard, Weights & Biases and trackio, through accelerate.

The files of the run are the truth, and are written first. A tracker is told of the same lines, with
the images drawn as its axis. What it lacks, it is told from the files: of a run that it did not
track from the start, or that was killed before a tracker had written all.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from accelerate import tracking
from PIL import Image

from hdit.config import RunConfig
from hdit.errors import UserError
from hdit.files import to_json, whole
from hdit.names import escape, path_of, printable
from hdit.reading import ReadingError, read_object
from hdit.runs.folder import RunFolder
from hdit.runs.history import History, is_event, is_validation, read_metrics

PROJECT = "hdit"
"""What runs are kept under by the trackers that group them."""

NOTHING = -1
"""Images up to which a tracker that was told nothing has points: also 0 may have some."""

FINISH = 120
"""Seconds that wandb may take at the end to send what is left: it stays in the run's folder."""

Say = Callable[[str], None]


class TrackingError(UserError):
    """A tracker that cannot be had, and how to get it or do without."""


# ---- what is told --------------------------------------------------------------------------------


class Point(NamedTuple):
    """What a tracker is told after so many images: numbers and texts by name, or a grid."""

    images: int
    values: Mapping[str, float | str] = {}
    grid: Path | None = None


NAMES = {
    "images_per_second": "speed/images_per_second",
    "mfu": "speed/mfu",
    "seconds": "speed/seconds",
    "macs": "speed/macs",
    "peak_memory": "speed/peak_memory",
    "data_wait_share": "data/wait_share",
    "skipped_files": "data/skipped_files",
}
"""Where in the trackers a value of metrics.jsonl goes; all others go to train/."""

BESIDES = ("images", "sigma_edges")
"""Of a line: the axis itself, and what stays the same for a whole run."""


def of_metrics(line: Mapping[str, Any]) -> Point:
    """The point of a line of metrics.jsonl, as train/loss or train/loss_by_sigma/0."""
    kept = {key: value for key, value in line.items() if key not in BESIDES}
    values = (
        pair for key, value in kept.items() for pair in _flat(value, NAMES.get(key, f"train/{key}"))
    )
    return Point(line["images"], dict(values))


def of_validation(line: Mapping[str, Any]) -> Point:
    """The point of a line of validation.jsonl, as validation/ema/loss."""
    return Point(line["images"], dict(_flat(line.get("weights"), "validation")))


def of_event(event: Mapping[str, Any]) -> Point:
    """The point of a line of events.jsonl: its facts as a text."""
    facts = {k: v for k, v in event.items() if k not in ("kind", "images", "time")}
    text = ", ".join(f"{key} {value}" for key, value in facts.items())
    kind = str(event.get("kind")).replace(" ", "_")
    return Point(event["images"], {f"events/{kind}": printable(text)})


def _flat(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """(name, number) of each number within; a bin that has none is left out."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from _flat(part, f"{name}/{key}")
    elif isinstance(value, int | float):
        yield name, value


# ---- the trackers --------------------------------------------------------------------------------


class Tracker:
    """A tracker of accelerate's, and what it takes to have each point in it once.

    `takes_back` says that points can be removed from it, and `told` up to which images it has some.
    """

    name: str
    needs: str  # the class of accelerate
    advice = "leave it out to train without it"
    takes_back = True
    told = NOTHING
    begun = NOTHING  # what was told when the session began, or training went back
    package: ModuleType
    tracker: Any

    def check(self) -> None:
        """Raises TrackingError where it is not installed, or where it is known that it won't do."""
        self.package = _installed(self.name)
        if not hasattr(tracking.GeneralTracker, "start") or not hasattr(tracking, self.needs):
            raise TrackingError(
                f"training.track: {self.name!r} needs a newer accelerate; "
                "pip install --upgrade accelerate"
            )

    def open(self, run: RunFolder, name: str, config: RunConfig, told: int, images: int) -> int:
        """Starts it at so many images, when it was told of those up to `told`.

        Returns up to where it has points now; where it takes points back, there are none later than
        `images`.
        """
        raise NotImplementedError

    def log(self, point: Point) -> None:
        """Tells it of a point."""
        if point.values:
            self.tracker.log(dict(point.values), step=point.images)
        if point.grid:
            self.log_grid(point.grid, point.images)

    def log_grid(self, path: Path, images: int) -> None:
        """Tells it of the grid in a PNG file."""
        raise NotImplementedError

    def close(self) -> None:
        """Waits until all is written or sent, and ends it."""
        self.tracker.finish()

    @property
    def place(self) -> str:
        """Where its user looks, in words."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in the run's folder. Readers purge what a later file begins before."""

    name, needs = "tensorboard", "TensorBoardTracker"

    def open(self, run: RunFolder, name: str, config: RunConfig, told: int, images: int) -> int:
        """As `Tracker.open`."""
        self.folder = run.path / self.name
        kept = min(told, images) if self.folder.exists() else NOTHING
        self.tracker = tracking.TensorBoardTracker(self.name, run.path, purge_step=kept + 1)
        self.tracker.start()
        # Not accelerate's hyperparameters, which would be another run in TensorBoard each session.
        self.tracker.log({"config": f"```toml\n{config.dump()}```"}, step=max(images, 0))
        return kept

    def log_grid(self, path: Path, images: int) -> None:
        """As `Tracker.log_grid`."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[None]  # (1 h w 3)
        self.tracker.log_images({"samples": pixels}, step=images, dataformats="NHWC")
        self.tracker.tracker.flush()

    @property
    def place(self) -> str:
        """As `Tracker.place`."""
        return f"tensorboard --logdir {self.folder}"


class WandB(Tracker):
    """Weights & Biases. What it was sent stays: nothing that it has is sent a second time.

    It writes each 15 seconds, so that a killed process may leave a gap.
    """

    name, needs = "wandb", "WandBTracker"
    advice = "set WANDB_MODE=offline to track without the network, or leave it out"
    takes_back = False

    def check(self) -> None:
        """As `Tracker.check`; also where there is no login, and it is not offline."""
        super().check()
        try:
            online = self.package.setup().settings.mode not in ("offline", "disabled")
            known = not online or self.package.login(prompt=False)
        except Exception as error:
            raise TrackingError(
                f"training.track: the login of 'wandb' failed: {_reason(error)}; run `wandb login` "
                f"again, {self.advice}"
            ) from error
        if not known:
            raise TrackingError(
                f"training.track: 'wandb' has no login; run `wandb login`, {self.advice}"
            )

    def open(self, run: RunFolder, name: str, config: RunConfig, told: int, images: int) -> int:
        """As `Tracker.open`."""
        self.tracker = tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT") or PROJECT,
            id=name,
            name=name,
            dir=str(run.path),
            resume="allow",
            settings=self.package.Settings(
                console="off",  # its hold on the output would cut the progress bar
                silent=True,
                finish_timeout=FINISH,  # or a run would not end while the network is gone
                finish_timeout_raises=True,
            ),
        )
        self.tracker.start()
        self.tracker.store_init_configuration(config.model_dump(mode="json", exclude_none=True))
        # Its own step may not go back, and counts calls.
        self.tracker.run.define_metric("images")
        self.tracker.run.define_metric("*", step_metric="images")
        return told

    def log(self, point: Point) -> None:
        """As `Tracker.log`."""
        values: dict[str, Any] = dict(point.values)
        if point.grid:
            values["samples"] = self.package.Image(str(point.grid))
        self.tracker.log(values | {"images": point.images})

    @property
    def place(self) -> str:
        """As `Tracker.place`."""
        run = self.tracker.run
        return f"wandb sync {Path(run.dir).parent}" if run.offline else f"wandb, {run.url}"


class Trackio(Tracker):
    """trackio, in its database on this machine, or on the server or Space that it is told of."""

    name, needs = "trackio", "TrackioTracker"

    def open(self, run: RunFolder, name: str, config: RunConfig, told: int, images: int) -> int:
        """As `Tracker.open`. What it cannot take back in part, it takes back as a whole."""
        self.run_name = name
        remote = any(os.environ.get(key) for key in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        with redirect_stdout(io.StringIO()):
            in_parts = import_module("trackio.utils").get_storage_mode() == "jsonl"
            self.takes_back = not remote and not in_parts
            if self.takes_back:
                told = self._take_back(told, images)
            self.tracker = tracking.TrackioTracker(
                PROJECT,
                name=name,
                resume="allow",
                config=config.model_dump(mode="json", exclude_none=True),
                embed=False,
            )
            self.tracker.start()
        return told

    def _take_back(self, told: int, images: int) -> int:
        """Deletes the run if it has later points, or may lack some. Returns what it has then."""
        try:
            runs = [run for run in self.package.Api().runs(PROJECT) if run.name == self.run_name]
        except ValueError:  # there is no such project yet
            runs = []
        if runs and NOTHING < told <= images:
            return told
        for run in runs:
            run.delete()
        # Its images, which trackio would leave there.
        media = import_module("trackio.media").get_project_media_path(PROJECT, self.run_name)
        shutil.rmtree(media, ignore_errors=True)
        return NOTHING

    def log_grid(self, path: Path, images: int) -> None:
        """As `Tracker.log_grid`."""
        self.tracker.log({"samples": self.package.Image(path)}, step=images)

    def close(self) -> None:
        """As `Tracker.close`."""
        with redirect_stdout(io.StringIO()):
            self.package.finish()  # the tracker's own would leave it to be finished again at exit

    @property
    def place(self) -> str:
        """As `Tracker.place`."""
        return f"trackio show --project {PROJECT} (run {self.run_name})"


KINDS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, WandB, Trackio)}


def _installed(name: str) -> ModuleType:
    """The package of a tracker. Raises TrackingError if it is not installed, or broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own making
            module = import_module(name)
            if module.__file__ is None:  # a folder of that name where the program was started
                raise ModuleNotFoundError(name=name)
            if name == "tensorboard":
                import_module("torch.utils.tensorboard")
    except ModuleNotFoundError as error:
        if error.name == name:
            raise TrackingError(
                f"training.track: {name!r} is not installed; pip install {name}, or leave it out"
            ) from None
        raise _broken(name, error) from error
    except Exception as error:
        raise _broken(name, error) from error
    return module


def _broken(name: str, error: Exception) -> TrackingError:
    return TrackingError(
        f"training.track: {name!r} cannot be imported: {_reason(error)}; "
        f"pip install --upgrade {name}, or leave it out"
    )


def _reason(error: Exception) -> str:
    """What an exception says, on one line that is not too long."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:300]}..."


# ---- a run in its trackers -----------------------------------------------------------------------

FILE = "tracking.json"


class Curves:
    """What tracking.json keeps: the run's name in the trackers, and what each was told for sure."""

    def __init__(self, folder: Path):
        """Those of the run in a folder, or new ones if it has none, or is a copy of another.

        Raises TrackingError if tracking.json is damaged.
        """
        self.path, self.folder = folder / FILE, folder.resolve()
        own = re.sub(r"[^\w.-]+", "-", self.folder.name, flags=re.ASCII)[:64]
        self.name, self.told = f"{own}-{secrets.token_hex(4)}", dict[str, int]()
        try:
            kept = read_object(self.path)
        except FileNotFoundError:
            return
        except ReadingError as error:
            raise TrackingError(f"{error}; {_ANEW}") from None
        name, other, told = (kept.get(key) for key in ("name", "folder", "told"))
        if not (isinstance(name, str) and isinstance(other, str) and isinstance(told, dict)):
            raise TrackingError(f"{self.path}: lacks a name, a folder or what was told; {_ANEW}")
        if not all(type(images) is int for images in told.values()):
            raise TrackingError(f"{self.path}: what was told is no number of images; {_ANEW}")
        if not self._is_copy_of(path_of(other)):
            self.name, self.told = name, told

    def _is_copy_of(self, other: Path) -> bool:
        there = other / FILE
        return other != self.folder and there.exists() and not there.samefile(self.path)

    def write(self, durable: bool = True) -> None:
        """Writes tracking.json anew."""
        told = {name: images for name, images in self.told.items() if images != NOTHING}
        kept = {"name": self.name, "folder": escape(str(self.folder)), "told": told}
        with whole(self.path, durable=durable) as part:
            part.write_text(to_json(kept, str(self.path)) + "\n", encoding="utf-8")


_ANEW = "move it away, and new curves begin in the trackers"


class Tracking:
    """The trackers of one run, in the process that writes its files; of none, it does nothing.

    A tracker that fails is named, and left out for the rest of the session.
    """

    def __init__(self, names: Sequence[str], run: RunFolder, warn: Say):
        """Raises TrackingError if one of `names` is not installed, or has no login."""
        self.run, self.warn = run, warn
        self.asked = [KINDS[name]() for name in names]
        self.going: list[Tracker] = []
        for tracker in self.asked:
            tracker.check()

    def start(self, config: RunConfig, images: int, say: Say) -> None:
        """Begins a session at so many images, up to which the run's files tell what was before.

        Raises TrackingError if a tracker does not start, or tracking.json is damaged.
        """
        if not self.asked:
            return
        self.config, self.images, self.curves = config, images, Curves(self.run.path)
        for tracker in self.asked:
            try:
                self._open(tracker)
            except Exception as error:
                self._give_up(tracker)
                self.close()
                raise TrackingError(
                    f"training.track: {tracker.name!r} does not start: {_reason(error)}; "
                    f"{tracker.advice}"
                ) from error
        for tracker in self.going:
            say(f"tracking: {tracker.place}")

    def _open(self, tracker: Tracker) -> None:
        """Starts a tracker where training stands, and tells it what it lacks up to there."""
        told = self.curves.told.get(tracker.name, NOTHING)
        told = tracker.open(self.run, self.curves.name, self.config, told, self.images)
        self.going.append(tracker)
        tracker.told = tracker.begun = told
        self._keep(tracker)
        for point in self._past(told):
            tracker.told = max(told, point.images)
            tracker.log(point)
        tracker.told = max(told, self.images)
        self._keep(tracker)

    def _keep(self, tracker: Tracker, closed: bool = False, durable: bool = True) -> None:
        """Writes down what a tracker was told.

        Of one that takes points back, that is nothing until it is closed: if this process is killed
        before, all of it is told again.
        """
        sure = closed or not tracker.takes_back
        self.curves.told[tracker.name] = tracker.told if sure else NOTHING
        self.curves.write(durable)

    def _past(self, told: int) -> list[Point]:
        """What the run's files tell of after `told` images and up to the present, in that order."""
        run = self.run
        points = [of_metrics(line) for line in read_metrics(run.metrics, self.images)]
        lines = read_metrics(run.validation, self.images, is_validation)
        points += [of_validation(line) for line in lines]
        points += [of_event(line) for line in read_metrics(run.events, self.images, is_event)]
        grids = History(run.path).grids()
        points += [Point(images, grid=path) for images, path in grids.items()]
        chosen = [point for point in points if told < point.images <= self.images]
        return sorted(chosen, key=lambda point: point.images)

    def line(self, line: Mapping[str, Any]) -> None:
        """Tells of a line of metrics.jsonl."""
        self._tell(of_metrics(line))

    def validation(self, line: Mapping[str, Any]) -> None:
        """Tells of a line of validation.jsonl."""
        self._tell(of_validation(line))

    def event(self, event: Mapping[str, Any]) -> None:
        """Tells of a line of events.jsonl."""
        self._tell(of_event(event))

    def grid(self, images: int, path: Path) -> None:
        """Tells of the grid in a PNG file, of the model after so many images."""
        self._tell(Point(images, grid=path))

    def _tell(self, point: Point) -> None:
        for tracker in list(self.going):
            # It has those of a session that got further, and was killed or went back.
            if not tracker.takes_back and self.images < point.images <= tracker.begun:
                continue
            with self._left_out_if_it_fails(tracker):
                tracker.told = max(tracker.told, point.images)
                if not tracker.takes_back:
                    self._keep(tracker, durable=False)
                tracker.log(point)

    @contextmanager
    def _left_out_if_it_fails(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(tracker, error)
            self._give_up(tracker)

    def _warn(self, tracker: Tracker, error: Exception) -> None:
        self.warn(
            f"training.track: {tracker.name} failed, and is left out from here on: "
            f"{_reason(error)}; the run's files have all that it lacks"
        )

    def _give_up(self, tracker: Tracker) -> None:
        """Leaves a tracker out that failed, whose reason is told already."""
        self.going = [other for other in self.going if other is not tracker]
        with suppress(Exception):
            self._keep(tracker)
        with suppress(Exception):
            tracker.close()

    def go_back(self, images: int) -> None:
        """Takes back what is later than the checkpoint that training goes back to."""
        self.images = images
        for tracker in list(self.going):
            with self._left_out_if_it_fails(tracker):
                tracker.begun = tracker.told
                if tracker.takes_back:
                    tracker.close()
                    self._keep(tracker, closed=True)
                    self.going.remove(tracker)
                    self._open(tracker)

    def close(self) -> None:
        """Ends the session: all is written or sent. A tracker that fails to is named."""
        for tracker in self.going:
            try:
                tracker.close()
                self._keep(tracker, closed=True)
            except Exception as error:
                self._warn(tracker, error)
        self.going = []
