"""One owner at a time, whose end is the lock's, and who leaves nothing."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hdit.errors import UserError
from hdit.locks import LOCK, locked

REPOSITORY = Path(__file__).parents[1]
DOES = "is painting here", "wait for it to dry"

OWNER = """
import os, sys, time
from pathlib import Path
from hdit.locks import locked
with locked(Path(sys.argv[1]), "paints"):
    child = os.fork() if sys.argv[2] == "fork" else None
    if not child:  # a child prints once it has begun
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def owner(path, *, fork=False):
    """A process that has the lock, and its child."""
    command = [sys.executable, "-c", OWNER, str(path), "fork" if fork else ""]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    return process, process.stdout.readline().strip()


def test_lock_of_another_process_is_refused_with_its_owner_and_the_fix(tmp_path):
    process, _ = owner(tmp_path / LOCK)
    with process:
        message = rf"{tmp_path}: another process is painting here \(process {process.pid} on .*\)"
        with pytest.raises(UserError, match=message + "; wait for it to dry"):
            locked(tmp_path / LOCK, *DOES).__enter__()
        process.kill()


def test_lock_of_a_killed_process_is_free_though_its_child_lives(tmp_path):
    process, child = owner(tmp_path / LOCK, fork=True)
    with process:
        try:
            process.kill()
            process.wait()
            with locked(tmp_path / LOCK, *DOES):
                os.kill(int(child), 0)  # it lives
        finally:
            os.kill(int(child), signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_lock_is_held_once_in_a_process_too(tmp_path):
    with locked(tmp_path / LOCK, *DOES), pytest.raises(UserError, match="another process is"):
        locked(tmp_path / LOCK, *DOES).__enter__()
    with locked(tmp_path / LOCK, *DOES):
        pass


def test_lock_is_waited_for_where_that_is_asked_and_named_once(tmp_path):
    """The owner removes the file of the lock that the other waits for, who takes a new one."""
    told, entered = [], threading.Event()

    def wait():
        with locked(tmp_path / LOCK, *DOES, wait=told.append):
            assert (tmp_path / LOCK).exists()
            entered.set()

    with locked(tmp_path / LOCK, *DOES):
        thread = threading.Thread(target=wait)
        thread.start()
        while not told:
            thread.join(0.01)
        assert not entered.wait(0.1)
    thread.join(10)
    assert entered.is_set()
    [text] = told
    assert f"another process is painting here (process {os.getpid()} on" in text


@pytest.mark.parametrize("content", [(), ("a",)])
def test_lock_leaves_neither_its_file_nor_an_empty_folder(tmp_path, content):
    folder = tmp_path / "new" / "deep"
    with pytest.raises(KeyboardInterrupt), locked(folder / LOCK, *DOES):  # noqa: PT012
        for name in content:
            (folder / name).touch()
        raise KeyboardInterrupt
    names = sorted(p.name for p in tmp_path.rglob("*"))
    assert names == (["a", "deep", "new"] if content else [])


def test_lock_of_a_killed_process_that_left_its_file_is_taken(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on moon")
    with locked(tmp_path / LOCK, *DOES):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_lock_is_never_taken_of_what_is_no_regular_file(tmp_path, kind):
    path, target = tmp_path / LOCK, tmp_path / "precious"
    target.write_text("gold")
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(target),
    }[kind]()
    with pytest.raises(UserError, match=r"\.lock: is no regular file, as a lock needs"):
        locked(path, *DOES).__enter__()
    assert target.read_text() == "gold"


def test_lock_within_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    file = tmp_path / "file"
    messages = {
        file: "file: .* it is a file, where a fol",
        file / "deep": "deep: .*file is no folder",
    }
    for folder, message in messages.items():
        with pytest.raises(UserError, match=message):
            locked(folder / LOCK, *DOES).__enter__()


def test_lock_in_a_folder_that_can_have_no_such_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="its name has a zero byte"):
        locked(tmp_path / "a\0b" / LOCK, *DOES).__enter__()


def test_lock_in_a_working_folder_that_is_gone_ends_with_an_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="run: cannot be written: No such file"):
        locked(Path("run") / LOCK, *DOES).__enter__()


def test_lock_on_a_full_disk_is_held(tmp_path, monkeypatch):
    def pwrite(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hdit.locks.os.pwrite", pwrite)
    message = "another process is painting here; wait"
    with locked(tmp_path / LOCK, *DOES), pytest.raises(UserError, match=message):
        locked(tmp_path / LOCK, *DOES).__enter__()


def test_lock_of_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("hdit.locks.fcntl.flock", flock)
    with pytest.raises(UserError, match="cannot be locked: No locks available; its file system"):
        locked(tmp_path / LOCK, *DOES).__enter__()
