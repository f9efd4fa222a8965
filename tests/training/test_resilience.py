"""Being asked to stop: which signals ask, what a later one does, and what is done where Python's handlers wait."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vidgen.training import resilience
from vidgen.training.resilience import SIGNALS, Breaks, Interrupted, StopSignal

SCRIPT = """
import ctypes, sys, time
from vidgen.training.resilience import StopSignal

def far_away():
    \"\"\"In C for good, and nothing wakes it: as in a compilation, or a collective whose peer is gone.\"\"\"
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def near():
    while not stop.requested:
        time.sleep(0.01)

with StopSignal(grace=GRACE) as stop:
    stop.nothing_to_lose = SAFE
    print("ready", flush=True)
    WORK
print("saved", flush=True)
sys.exit(128 + stop.number)
"""


def program(work, grace=0.0, safe=False):
    """A program that is ready to be asked."""
    script = SCRIPT.replace("GRACE", str(grace)).replace("SAFE", str(safe)).replace("WORK", work)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    """(exit status, stdout, stderr, seconds)."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out, err, time.monotonic() - began


def soon(true):
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_asks_and_a_later_one_ends(number, capfd, monkeypatch):
    monkeypatch.setattr(resilience, "APART", 0.05)
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested and stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.requested and stop.number == number and stop.name == number.name
        time.sleep(0.06)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    said = capfd.readouterr().err
    assert said == f"\n{number.name}: stopping after a step and saving; once more to stop at once\n"
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_which_one_came_first_is_kept():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGUSR1


def test_copies_of_the_first_end_nothing_wherever_the_main_thread_is():
    # In C for longer than two signals have to lie apart: those that the main thread handles late came early.
    process = program(
        "import vidgen.training.resilience as r, threading; r.APART = 0.7; r.AT_ONCE = 0.1\n    near()\n"
        "    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64); c.pthread_mutex_lock(mutex)\n"
        "    threading.Timer(1.2, c.pthread_mutex_unlock, [mutex]).start(); c.pthread_mutex_lock(mutex)"
    )
    process.terminate()
    time.sleep(0.1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(number)
    status, out, err, _ = ended(process)
    assert (status, out) == (143, "saved\n") and err.count("once more") == 1


def test_who_was_woken_before_is_again_afterwards():
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told)
    try:
        with StopSignal():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.set_wakeup_fd(told) == told
    finally:
        signal.set_wakeup_fd(before)
        os.close(heard)
        os.close(told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_what_has_nothing_to_lose_ends_at_once_wherever_it_is(number):
    process = program("far_away()", grace=60, safe=True)
    process.send_signal(number)
    status, out, err, seconds = ended(process)
    assert (status, out) == (128 + number, "") and seconds < 5
    assert err == f"\n{number.name}: stopping at once: nothing has been done that is not saved\n"


def test_what_cannot_save_ends_when_the_grace_is_over():
    process = program("far_away()", grace=0.5)
    process.terminate()
    status, out, err, seconds = ended(process)
    assert (status, out) == (143, "") and 0.3 < seconds < 10
    assert err.splitlines()[-1] == "SIGTERM: not saved within 0.5 s, and stopped; what was saved before stands"
    assert "SIGTERM: stopping after a step and saving" in err


def test_what_saves_in_time_is_not_ended_later():
    process = program("near()\n    saved = True\ntime.sleep(0.8)", grace=0.5)
    process.terminate()
    status, out, err, _ = ended(process)
    assert (status, out) == (143, "saved\n") and "not saved" not in err


def test_a_later_signal_ends_what_is_far_away():
    process = program("import vidgen.training.resilience as r; r.APART = r.AT_ONCE = 0.3\n    far_away()")
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    status, out, err, _ = ended(process)
    assert (status, out) == (143, "") and err.endswith("\nSIGTERM: stopped\n")


def test_a_notebook_is_left_alone_but_for_what_it_runs():
    catch = (
        "import os, signal\n    sys.ps1 = '> '\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(10)\n    except KeyboardInterrupt:\n        print('asked', file=sys.stderr)\n"
        "    time.sleep(0.5)"
    )
    status, out, err, _ = ended(program(catch, grace=0.1, safe=True))
    assert (status, out, err) == (130, "saved\n", "asked\n")
    quiet = "import os, signal\n    sys.ps1 = '> '\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.5)"
    status, out, err, _ = ended(program(quiet, grace=0.1))
    assert (status, out) == (130, "saved\n") and "not saved" not in err


def test_outside_the_main_thread_nothing_is_touched():
    seen = []

    def within():
        with StopSignal() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGTERM), False)]


def test_something_long_is_left_between_two_batches():
    stop = StopSignal()
    breaks = Breaks(stop)
    breaks()
    stop.name = "SIGUSR1"
    with pytest.raises(Interrupted, match="SIGUSR1") as caught:
        breaks()
    assert caught.value.number == signal.SIGUSR1
