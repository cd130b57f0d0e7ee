"""Processes of a run: what the environment says of them, who is missing, and who is gone."""

import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hdit import config, processes
from hdit.processes import ProcessError, World, closing, join, read_address, read_world
from hdit.training import setup
from hdit.training.hosts import Hosts

PATIENCE = timedelta(seconds=60)
SECOND = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def address(monkeypatch):
    """A free port of this machine, as MASTER_ADDR and MASTER_PORT name it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(0, 1, 0)),
        ({"LOCAL_RANK": "0"}, World(0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, World(0, 1, 0)),
        (SECOND, World(3, 4, 1)),
    ],
)
def test_world_is_what_torchrun_says(environment, world):
    assert read_world(environment) == world


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE", "'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE", "from 1"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE", "to 65536"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE", "''"),
        ({"RANK": None}, "RANK", "is not set"),
        ({"RANK": "4"}, "RANK", "from 0 to 3, got '4'"),
        ({"RANK": "²"}, "RANK", "'²'"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK", "is not set"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK", "'-1'"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE", "'5'"),
        ({"WORLD_SIZE": None}, "RANK", "must be 0, got '3'"),
        ({"WORLD_SIZE": None, "RANK": None}, "LOCAL_RANK", "must be 0, got '1'"),
        ({"WORLD_SIZE": None, "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE", "'2'"),
    ],
)
def test_world_that_is_wrong_names_the_variable_and_torchrun(changes, name, value):
    environment = {k: v for k, v in (SECOND | changes).items() if v is not None}
    with pytest.raises(ProcessError) as error:
        read_world(environment)
    assert str(error.value).startswith(f"{name}: ")
    assert value in str(error.value)
    assert "torchrun" in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "MASTER_ADDR: is not set"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT: is not set"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT: must be .*'70000'"),
        ({"MASTER_ADDR": "no..host", "MASTER_PORT": "29500"}, "MASTER_ADDR: 'no..host'"),
    ],
)
def test_address_that_is_wrong_names_the_variable(environment, name):
    with pytest.raises(ProcessError, match=name):
        read_address(environment)


@pytest.mark.parametrize("verb", ["train", "encode"])
def test_verbs_read_the_world_alike(verb, tiny, hdit, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "x")
    out = tmp_path / "out"
    status, _, err = hdit(verb, tiny, "--run" if verb == "train" else "--out", out)
    assert status == 1
    assert err.startswith("error: WORLD_SIZE: must be an integer")
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("rank", "problem"), [(0, "ranks 1, 2 of 3"), (1, r"nobody answers at 127.0.0.1:\d+")]
)
def test_who_is_missing_is_told_before_the_wait_ends(rank, problem, address, monkeypatch):
    monkeypatch.setattr(processes, "QUIET", 0.2)
    said = []
    with pytest.raises(ProcessError, match=f"{problem} .*within 0.5 s .training.start_timeout"):
        join(World(rank, 3, rank), "run", "gloo", 0.5, PATIENCE, said.append)
    [line] = said
    assert line.startswith("waiting: ")
    assert "0.5 s" in line
    assert not dist.is_initialized()


def test_other_programs_at_the_address_are_not_waited_for_without_end(address):
    with socket.create_server(("127.0.0.1", address)):  # answers nothing
        with pytest.raises(ProcessError, match=r"MASTER_PORT.* is no rank 0 within 0.5 s"):
            join(World(1, 2, 1), "run", "gloo", 0.5, PATIENCE, print)
        with pytest.raises(ProcessError, match="another program has that port"):
            join(World(0, 2, 0), "run", "gloo", 5, PATIENCE, print)


def test_processes_of_another_run_at_the_same_port_are_not_taken_for_ours(address):
    """Here rank 1 of another run has come to the port, and of this run rank 0 alone.

    A run's folder may have a name that is not UTF-8.
    """

    def other():
        with pytest.raises(ProcessError):
            join(World(1, 2, 1), "another", "gloo", 2, PATIENCE, print)

    stranger = threading.Thread(target=other)
    stranger.start()
    with pytest.raises(ProcessError, match="rank 1 of 2"):
        join(World(0, 2, 0), "run\udcff", "gloo", 2, PATIENCE, print)
    stranger.join()


JOINING = """
from datetime import timedelta
from hdit.processes import join, read_world
join(read_world(), "run", "gloo", 3, timedelta(seconds=3600), print)
"""


def test_process_that_dies_while_the_groups_are_made_is_not_waited_for_without_end(
    address, monkeypatch
):
    """Here rank 1 has come, and does nothing more. In a process, for torch waits on in a thread."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    command = [sys.executable, "-c", JOINING]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waits:
        waiting = processes._Waiting(60, print)
        waiting.until(lambda: processes._answers("127.0.0.1", address), lambda: "nobody")
        monkeypatch.setenv("RANK", "1")
        store = processes._open_store("127.0.0.1", address, 1, waiting)
        dist.PrefixStore("run", store).set("rank 1", "here")
        _, err = waits.communicate(timeout=60)
    assert "ProcessError: a process that had come to" in err
    assert "does not answer within 3 s (training.start_timeout)" in err


class Three(Hosts):
    """Three processes, of which this is one and the last has other settings."""

    def __init__(self, rank, changes):
        self.rank, self.size, self.changes = rank, 3, changes

    def gathered(self, mine):
        return [mine, mine, config.merge(mine, self.changes)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"training": {"optimizer": {"lr": 0.5}}}, "another training.optimizer.lr: 0.5"),
        ({"images of the data": 7}, "another images of the data: 7"),
        ({"classes of the data": ["a"]}, r"another classes of the data: \['a'\]"),
        ({"images of the newest checkpoint": 32}, "another images of the newest checkpoint: 32"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_process_with_other_settings_or_data_is_named_once(changes, named, rank, tiny):
    settings = config.load(tiny)
    source, space = settings.data.open(), settings.space.open(torch.device("cpu"))
    if named is None:
        ends = nullcontext()
    elif rank == 0:
        ends = pytest.raises(ProcessError, match=f"rank 2: has {named}, where rank 0 has")
    else:
        ends = pytest.raises(SystemExit)
    with ends:
        setup._check_alike(Three(rank, changes), settings, source, space, None)


GOING = """
import os, signal
from datetime import timedelta
from hdit.processes import join, read_world
join(read_world(), "run", "gloo", 60, timedelta(seconds=60), print)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_process_that_outlives_a_killed_one_says_so_in_one_line(address, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    killed = subprocess.Popen([sys.executable, "-c", GOING])
    gone = pytest.raises(ProcessError, match="rank 1 of 2 of this run: gone without a word")
    with gone as error, closing():
        join(World(0, 2, 0), "run", "gloo", 60, PATIENCE, print)
        assert killed.wait() == -9
        for _ in range(3):
            dist.all_reduce(torch.ones(1))
    assert "\n" not in str(error.value)
    assert "gloo" not in str(error.value), "the place in its source"
    assert not dist.is_initialized()


class Leaving(dist.HashStore):
    """A store that is gone once this process has spoken, as rank 0 then ends."""

    def set(self, key, value):
        super().set(key, value)
        self.check = self.get = self.fail

    def fail(self, *arguments):
        raise RuntimeError("connection closed")


def test_words_of_rank_0_are_read_before_its_store_may_go(monkeypatch):
    """Rank 0 told its error, and rank 1 must not add that it had gone without a word."""
    store = Leaving()
    dist.HashStore.set(store, "0", "the disk is full")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    words = processes._LastWords(RuntimeError("[gloo/transport/tcp/pair.cc:538] closed by peer"))
    assert isinstance(words.told_for_all(), SystemExit)


def test_errors_that_are_not_of_a_lost_process_pass(address):
    with pytest.raises(RuntimeError, match="of gloo, but no group"), closing():
        raise RuntimeError("of gloo, but no group")
