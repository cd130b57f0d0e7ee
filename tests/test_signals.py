"""Signals end the command line with one line, at any moment."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hdit import signals
from hdit.signals import ENDING, Signalled


@pytest.mark.parametrize("number", ENDING)
def test_signal_is_raised_and_the_handlers_before_come_back(number):
    before = [signal.getsignal(n) for n in ENDING]
    with pytest.raises(Signalled) as error, signals.raised():
        os.kill(os.getpid(), number)
    assert error.value.number == number
    assert [signal.getsignal(n) for n in ENDING] == before


def test_signalled_is_taken_for_no_error():
    assert not issubclass(Signalled, Exception)


def test_another_thread_than_the_main_one_leaves_signals_to_that():
    """Python lets no other thread handle them; a worker of Ray trains in one."""
    before = [signal.getsignal(n) for n in ENDING]
    seen = []

    def train():
        with signals.handled(lambda number, frame: None) as handlers:
            seen.append((handlers, [signal.getsignal(n) for n in ENDING]))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [({}, before)]


def test_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals.raised():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ENDING)
def test_command_line_ends_with_one_line_and_the_status_of_the_signal(number, hdit, monkeypatch):
    """Whatever the verb, for one place runs them all."""

    def verb():
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("it must pass what catches errors")

    monkeypatch.setattr("hdit.cli.app.app", verb)
    assert hdit() == (128 + number, "", "interrupted\n")


def test_signal_that_came_out_as_another_error_ends_the_command_line_alike(hdit, monkeypatch):
    class Field:
        def __set_name__(self, owner, name):
            os.kill(os.getpid(), signal.SIGTERM)

    def verb():
        with signals.noting("go on"):
            type("Made", (), {"field": Field()})  # which makes a RuntimeError of it

    monkeypatch.setattr("hdit.cli.app.app", verb)
    assert hdit() == (128 + signal.SIGTERM, "", "interrupted; go on\n")


class Deleted:
    """Calls something where Python passes on no exception."""

    def __init__(self, call):
        self.call = call

    def __del__(self):
        self.call()


def test_signal_that_python_cannot_pass_on_is_raised_after_it(capfd):
    with pytest.raises(Signalled) as error, signals.raised():  # noqa: PT012
        Deleted(lambda: os.kill(os.getpid(), signal.SIGTERM))
        time.sleep(5)
    assert error.value.number == signal.SIGTERM
    assert capfd.readouterr() == ("", "")


def test_objects_that_a_signal_leaves_half_made_say_nothing(capfd):
    def work():
        held = Deleted(lambda: 1 / 0)
        os.kill(os.getpid(), signal.SIGINT)
        return held

    with pytest.raises(Signalled), signals.raised():
        work()
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_python_cannot_pass_on_without_a_signal_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda problem: told.append(problem.exc_type))
    with signals.raised():
        Deleted(lambda: 1 / 0)
    assert told == [ZeroDivisionError]


@pytest.mark.parametrize("wrapped", [RuntimeError("by an import"), OSError("of cleaning up")])
def test_error_that_a_signal_became_ends_as_the_signal(wrapped, hdit, monkeypatch):
    def verb():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise wrapped

    monkeypatch.setattr("hdit.cli.app.app", verb)
    assert hdit() == (143, "", "interrupted\n")


def test_signal_seen_twice_leaves_the_cleaning_up_alone():
    cleaned = False
    with pytest.raises(Signalled) as error, signals.raised():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned = True
    assert cleaned
    assert error.value.number == signal.SIGINT


def test_forked_child_without_handlers_of_its_own_ends_without_a_word(capfd):
    with signals.raised():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert capfd.readouterr() == ("", "")


LEFT = """
import multiprocessing, signal, sys, time
from hdit import cli, signals
from hdit.cli import app
def work(ready):
    signals.ignore()
    ready.set()
    time.sleep(60)
def verb():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    context.Process(target=work, args=(ready,), daemon=True).start()
    ready.wait()
    signal.raise_signal(signal.SIGTERM)
app.app = verb
sys.argv = ["hdit"]
cli.main()
"""


STUCK = """
import ctypes, sys, threading
from hdit import cli, signals
from hdit.cli import app
from hdit.errors import UserError
def verb():
    wait = lambda: ctypes.CDLL(None).usleep(300_000)  # without Python's lock, as torch does
    threading.Thread(target=wait, name=signals.DEAF, daemon=True).start()
    raise UserError("nobody answers")
app.app = verb
sys.argv = ["hdit"]
cli.main()
"""


def test_thread_that_waits_in_torch_does_not_change_the_end():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "error: nobody answers\n")


def test_worker_that_a_signal_left_without_its_loader_does_not_hold_up_the_end():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (143, "interrupted\n")


@pytest.mark.parametrize("seconds", [0.15, 0.3, 0.6])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(seconds):
    """The command says that Python is up; from there on no moment gives a traceback."""
    code = (
        "import sys; from hdit.cli import main; sys.argv = ['hdit', 'configs']; "
        "print('up', flush=True); main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0, -signal.SIGINT), err
    assert err in ("interrupted\n", "")
