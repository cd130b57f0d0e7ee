"""Processes that share a set of samples, as forks of this one that talk by gloo."""

import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from hdit.errors import UserError
from hdit.processes import World
from hdit.sampling import team as teams
from hdit.sampling.team import Team

SIZE = 3


def _process(rank, folder, work, results):
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    team = Team(World(rank, SIZE, rank), dist.group.WORLD)
    try:
        results.put((rank, work(team)))
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {str(error)[:200]}"))
    os._exit(0)


@pytest.fixture
def together(tmp_path, monkeypatch):
    """What `work(team)` returns in each of three processes, or the error that ends it."""
    monkeypatch.setattr(teams, "LEAVE", 0.01)

    def run(work):
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_process, args=(rank, tmp_path, work, results))
            for rank in range(SIZE)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert not process.is_alive()
        found = {}
        while not results.empty():
            rank, result = results.get()
            found[rank] = result
        return [found.get(rank, "gone") for rank in range(SIZE)]

    return run


def test_team_of_one_does_as_it_is_told():
    team = Team()
    assert team.is_first
    assert team.all_do(lambda: 3) == team.first_does(lambda: 3) == 3
    assert [team.round(lambda: 2) for _ in range(3)] == [2, 4, 6]
    team.end(lambda: None)
    with pytest.raises(UserError, match="why"):
        team.round(lambda: raise_("why"))


def raise_(text):
    raise UserError(text)


def test_what_the_first_makes_all_have(together):
    assert together(lambda team: team.first_does(lambda: team.world.rank + 7)) == [7, 7, 7]


def test_images_are_counted_over_all_processes(together):
    """Each makes its rank and one more a round; a round is known one later, and at the end."""

    def work(team):
        told = [team.round(lambda: team.world.rank + 1) for _ in range(4)]
        team.end(lambda: None)
        return [*told, team.made]

    assert together(work) == [[0, 6, 12, 18, 24]] * 3


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_failure_of_one_process_ends_all_and_it_alone_says_why(together, turn):
    def work(team):
        for i in range(4):
            fails = team.world.rank == 1 and i == turn
            team.round(lambda: raise_("the disk is full") if fails else 1)  # noqa: B023
        team.end(lambda: None)

    assert together(work) == ["SystemExit: 1", "UserError: the disk is full", "SystemExit: 1"]


def test_failure_of_all_processes_is_said_once(together):
    quiet = "SystemExit: 1"
    assert together(lambda team: team.all_do(lambda: raise_("no"))) == [
        "UserError: no",
        quiet,
        quiet,
    ]


def test_failure_at_the_end_ends_all(together):
    def work(team):
        team.round(lambda: 1)
        team.end(lambda: raise_("the disk is full") if team.world.rank == 2 else None)

    assert together(work) == ["SystemExit: 1", "SystemExit: 1", "UserError: the disk is full"]


def test_process_that_is_gone_ends_the_others(together):
    def work(team):
        for i in range(100):
            if team.world.rank == 1 and i == 3:
                os._exit(9)
            team.round(lambda: 1)
            time.sleep(0.01)

    first, gone, last = together(work)
    assert gone == "gone"
    assert "gloo" in first or "closed" in first or "reset" in first
    assert "Error" in last
