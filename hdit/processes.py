"""The processes of a run: which of them this one is, how they find each other, and their end."""

from __future__ import annotations

import gc
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from hdit.errors import UserError
from hdit.names import escape
from hdit.signals import DEAF

Made = TypeVar("Made")

MOST = 65_536  # processes
QUIET = 30.0  # seconds of waiting before it is told who is missing
POLL = 0.1  # seconds between two looks
GRACE = 3.0  # seconds in which processes that end hear of each other why
FIX = "start the processes with torchrun, which sets it, or unset {} for a single one"
MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class ProcessError(UserError):
    """Processes that do not find each other, or of which one is gone."""


@dataclass(frozen=True)
class World:
    """Which process this is (`rank`, and on its machine `local_rank`) of `size`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; a single process without them.

    Raises ProcessError that names the variable which is wrong or missing.
    """
    env = os.environ if environment is None else environment
    for name in MPI if "WORLD_SIZE" not in env else ():
        if env.get(name, "1") != "1":
            raise ProcessError(
                f"{name}: is {env[name]!r}, so MPI started this process, which hdit does not "
                "follow; start the processes with torchrun"
            )
    size = _number(env, "WORLD_SIZE", 1, MOST)
    _number(env, "LOCAL_WORLD_SIZE", 1, size)  # which accelerate reads
    return World(
        rank=_number(env, "RANK", 0, size - 1, needed=size > 1),
        size=size,
        local_rank=_number(env, "LOCAL_RANK", 0, size - 1, needed=size > 1),
    )


def read_address(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Host and port at which rank 0, or torchrun for it, listens. Raises ProcessError."""
    env = os.environ if environment is None else environment
    host = env.get("MASTER_ADDR", "")
    if not host:
        raise ProcessError(
            f"MASTER_ADDR: is not set, but WORLD_SIZE is; {FIX.format('WORLD_SIZE')}"
        )
    port = _number(env, "MASTER_PORT", 1, 65_535, needed=True)
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise ProcessError(f"MASTER_ADDR: {host!r} cannot be resolved: {error}") from None
    return host, port


def _number(env: Mapping[str, str], name: str, low: int, high: int, *, needed: bool = False) -> int:
    """A variable that holds an integer from `low` to `high`; `low` if it is not set nor needed."""
    text = env.get(name)
    if text is None and not needed:
        return low
    fix = FIX.format("WORLD_SIZE" if needed else name)
    if text is None:
        raise ProcessError(f"{name}: is not set, but WORLD_SIZE is; {fix}")
    # int() takes more than these, and fails at thousands of digits.
    if re.fullmatch("[0-9]{1,9}", text) and low <= int(text) <= high:
        return int(text)
    wanted = f"an integer from {low} to {high}" if low < high else str(low)
    raise ProcessError(f"{name}: must be {wanted}, got {text[:80]!r}; {fix}")


# ---- the beginning -------------------------------------------------------------------------------


def join(
    world: World,
    run: str,
    backend: str,
    limit: float,
    patience: timedelta,
    say: Callable[[str], None],
    device_patience: timedelta | None = None,
    setting: str = "training.start_timeout",
) -> dist.ProcessGroup:
    """Makes torch's default group of all processes of `run`, once all of them are there.

    Returns the group in which their CPUs talk. After half a minute `say` is told who is missing. In
    a group, a process waits for another for `patience` at most, and in that of the devices for
    `device_patience`. Raises ProcessError if somebody is missing after `limit` seconds; `setting`
    is what sets them, if anything does.
    """
    host, port = read_address()
    waiting = _Waiting(limit, say, f" ({setting})" if setting else "")
    key = "rank {}".format
    everyone = [key(rank) for rank in range(world.size)]

    def missing() -> str:
        absent = [str(rank) for rank in range(world.size) if not store.check([key(rank)])]
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        ranks = f"rank{'s' if len(absent) > 1 else ''} {', '.join(absent[:8])}{more}"
        return f"{ranks} of {world.size} (WORLD_SIZE) did not come to {host}:{port}"

    try:
        store = dist.PrefixStore(escape(run), _open_store(host, port, world.rank, waiting))
        store.set(key(world.rank), "here")
        waiting.until(lambda: store.check(everyone), missing, quiet=world.rank != 0)

        def connect() -> dist.ProcessGroup:
            dist.init_process_group(
                backend,
                store=store,
                rank=world.rank,
                world_size=world.size,
                timeout=device_patience or patience,
            )
            return host_group(patience)

        return _in_time(
            connect, waiting, lambda: f"a process that had come to {host}:{port} does not answer"
        )
    except RuntimeError as error:  # of gloo, or a DistError
        raise ProcessError(
            f"MASTER_ADDR, MASTER_PORT: the {world.size} processes cannot meet at {host}:{port} "
            f"({_first_line(error)}): one is gone, and its message says why, or another program "
            "has that port; give each run one of its own, or start with torchrun"
        ) from None


def host_group(patience: timedelta) -> dist.ProcessGroup:
    """A group of all processes in which their CPUs talk."""
    return dist.new_group(backend="gloo", timeout=patience)


def answered_in(patience: timedelta, ask: Callable[[], None]) -> None:
    """Asks the others in a group, in a thread. Raises ProcessError without an answer in time."""
    waiting = _Waiting(patience.total_seconds(), lambda text: None)
    try:
        _in_time(ask, waiting, str)
    except ProcessError:
        raise ProcessError(
            f"another process of this run does not answer within {waiting.limit:g} s; "
            "start all of them again to resume"
        ) from None


class _Waiting:
    """Waits for the others, `limit` seconds in all; tells of it once."""

    def __init__(self, limit: float, say: Callable[[str], None], setting: str = ""):
        self.limit, self.say, self.setting = limit, say, setting
        self.began, self.told = time.monotonic(), False

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.began)

    def until(
        self, ready: Callable[[], bool], problem: Callable[[], str], quiet: bool = False
    ) -> None:
        """Returns once ready() holds. Raises ProcessError with problem() if time is up."""
        while not ready():
            if self.left <= 0:
                raise ProcessError(
                    f"{problem()} within {self.limit:g} s{self.setting}; "
                    "start all of them, or unset WORLD_SIZE for a single process"
                )
            if self.limit - self.left >= QUIET and not self.told:
                self.told = True
                if not quiet:
                    self.say(f"waiting: {problem()}; up to {self.limit:g} s")
            time.sleep(POLL)


def _in_time(work: Callable[[], Made], waiting: _Waiting, problem: Callable[[], str]) -> Made:
    """What `work` makes, in a thread: in torch it may wait without end, and deaf to signals.

    Raises what `work` does, and ProcessError with problem() if time is up.
    """
    found: list[Made] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            failed.append(error)

    threading.Thread(target=run, name=DEAF, daemon=True).start()
    waiting.until(lambda: bool(found or failed), problem)
    if failed:
        raise failed[0]
    return found[0]


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _open_store(host: str, port: int, rank: int, waiting: _Waiting) -> dist.Store:
    """What the processes share to find each other; rank 0, or torchrun for it, holds it."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        # Before torch connects: it would log a trace of its stack for each attempt that fails.
        waiting.until(
            lambda: _answers(host, port), lambda: f"nobody answers at {host}:{port} (MASTER_ADDR)"
        )

    def connect() -> dist.Store:
        return dist.TCPStore(
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=max(waiting.left, 1)),
            wait_for_workers=False,
            multi_tenant=True,
        )

    store = _in_time(
        connect, waiting, lambda: f"what answers at {host}:{port} (MASTER_PORT) is no rank 0"
    )
    # A restart by torchrun may find the store of the attempt before it.
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


# ---- the end -------------------------------------------------------------------------------------


@contextmanager
def closing() -> Iterator[None]:
    """Ends the group of processes with the block.

    Of a UserError that several processes have, the first of them tells, and the others end by
    SystemExit. Where one is gone, and told nothing, the first that is left raises ProcessError
    with its rank, in place of what torch raises.
    """
    words: _LastWords | None = None
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        words = _LastWords(error)
        if (told := words.told_for_all()) is error:
            raise
        raise told from None
    finally:
        if dist.is_initialized():
            gc.collect()  # what still holds the group, or its threads abort the process
            dist.destroy_process_group()
        if words is not None:
            words.wait_for_readers()


class _LastWords:
    """The error that this process ends with, told to the others; and what they end with."""

    def __init__(self, error: BaseException):
        self.error, self.rank, self.size = error, dist.get_rank(), dist.get_world_size()
        self.is_of_another = isinstance(error, RuntimeError) and _is_of_a_lost_process(error)
        self.store = dist.PrefixStore("last words", dist.distributed_c10d._get_default_store())
        self.end = time.monotonic() + GRACE
        self.said = {self.rank: "" if self.is_of_another else str(error) or type(error).__name__}
        with suppress(RuntimeError):  # of a store that is gone with rank 0
            self._take_in()  # before it speaks, as rank 0 may end when all have
            self.store.set(str(self.rank), self.said[self.rank])

    def told_for_all(self) -> BaseException:
        """What to raise: the error, one of who is gone, or SystemExit where another says it."""
        if self.is_of_another:
            self._listen(lambda: any(self.said.values()))
            if any(self.said.values()) or min(self.said) < self.rank:
                return SystemExit(1)
            return self._of_the_lost()
        if self.rank and isinstance(self.error, UserError):
            mine = self.said[self.rank]

            def is_told() -> bool:
                return any(r < self.rank and text == mine for r, text in self.said.items())

            self._listen(is_told)
            if is_told():
                return SystemExit(1)
        return self.error

    def wait_for_readers(self) -> None:
        """Keeps the store, which rank 0 may hold, until the others have read in it."""
        if self.rank == 0:
            self._listen(lambda: False)

    def _listen(self, enough: Callable[[], bool]) -> None:
        """Takes in what others say, until it is enough, all have spoken, or time is up."""
        while not enough() and len(self.said) < self.size and time.monotonic() < self.end:
            try:
                self._take_in()
            except RuntimeError:
                return
            time.sleep(POLL)

    def _take_in(self) -> None:
        """Reads what others have said by now. Raises RuntimeError where the store is gone."""
        for rank in range(self.size):
            if rank not in self.said and self.store.check([str(rank)]):
                self.said[rank] = self.store.get(str(rank)).decode()

    def _of_the_lost(self) -> ProcessError:
        silent = [str(rank) for rank in range(self.size) if rank not in self.said]
        who = "another process"
        if silent:
            who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(silent[:8])} of {self.size}"
        return ProcessError(
            f"{who} of this run: gone without a word, as after kill -9 or where memory ran out "
            f"({_first_line(self.error)}); start all of them again to resume"
        )


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo raises a plain RuntimeError that names its source file."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or any(n in str(error) for n in ("gloo", "NCCL"))


def _first_line(error: BaseException) -> str:
    """What torch says, without the place in its source and advice to its developers."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split("] ", 1)[-1].split(". This is", 1)[0]
