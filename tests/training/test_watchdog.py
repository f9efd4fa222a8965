"""Signs of life: what is written, when a process that waits ends, and whom it says to be missing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vidgen.training import watchdog
from vidgen.training.watchdog import Peers, Watchdog, missing, read

HANGS = """
import ctypes, sys
from vidgen.training.watchdog import Watchdog

def the_main_thread_is_here():
    ctypes.CDLL(None).sleep(60)  # in C, where no handler of Python's runs

with Watchdog(sys.argv[1], float(sys.argv[2])) as watch:
    for n in range(1, 4):
        watch.beat(n, "step")
    print("ready", flush=True)
    the_main_thread_is_here()
"""


def until(true, seconds=20.0):
    """Waits for it; whether it came."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def test_a_heartbeat_says_where_the_process_is(tmp_path):
    folder = tmp_path / "heartbeats"
    with Watchdog(str(tmp_path), hang=600) as watch:
        assert until(lambda: read(str(folder)).get(0, {}).get("phase") == "start")
        assert read(str(folder))[0]["slow"]
        watch.beat(7, "step")
        assert until(lambda: read(str(folder))[0]["step"] == 7)
        state = read(str(folder))[0]
        assert (state["process"], state["of"], state["phase"], state["pid"]) == (0, 1, "step", os.getpid())
        assert abs(time.time() - state["moved"]) < 10 and state["alive"] >= state["moved"] - 0.1
        assert state["host"] and set(os.listdir(folder)) == {"rank-0.json"}
    assert read(str(folder))[0]["phase"] == "ended" and read(str(folder))[0]["step"] == 7
    assert read(str(folder))[0]["failed"] is False
    with contextlib.suppress(KeyError), Watchdog(str(tmp_path), hang=600):
        raise KeyError
    assert read(str(folder))[0]["failed"] is True


def test_a_compilation_and_the_first_of_anything_may_take_longer(tmp_path):
    ended = []
    with Watchdog(str(tmp_path), hang=0.4, end=ended.append) as watch:
        allowed = {}
        for phase in ("compile", "step", "eval", "step", "eval", "save", "step"):
            watch.beat(1, phase)
            assert until(lambda: watch._last is watch._beat)
            allowed.setdefault(phase, []).append(watch._slow())
    assert allowed == {"compile": [True], "step": [False] * 3, "eval": [True, False], "save": [True]} and not ended


def test_who_moves_is_left_alone_and_who_stands_is_ended_once(tmp_path, capfd):
    ended = []
    with Watchdog(str(tmp_path), hang=0.5, end=ended.append) as watch:
        for n in range(20):
            watch.beat(n, "step")
            time.sleep(0.05)
        assert not ended
        assert until(lambda: ended)
        time.sleep(0.7)
    assert ended == [75]
    said = capfd.readouterr().err
    assert "process 0 of 1: nothing has moved for " in said and " s in step 19 (step)" in said
    assert "test_watchdog.py" in said  # the stacks of the threads


def test_without_a_limit_nothing_ends(tmp_path):
    ended = []
    with Watchdog(str(tmp_path), hang=0, end=ended.append) as watch:
        watch.beat(1, "step")
        time.sleep(1.2)
    assert not ended and read(str(tmp_path / "heartbeats"))[0]["step"] == 1


def hangs(tmp_path, hang):
    command = [sys.executable, "-c", HANGS, str(tmp_path), str(hang)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_main_thread_that_is_not_in_python_is_ended(tmp_path):
    process = hangs(tmp_path, 0.5)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "process 0 of 1: nothing has moved for " in err and "in the_main_thread_is_here" in err


def test_time_that_a_process_was_stopped_does_not_count(tmp_path):
    process = hangs(tmp_path, 3)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.8)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_disk_that_refuses_ends_nothing(tmp_path):
    (tmp_path / "heartbeats").write_text("a file where the folder should be")
    ended = []
    with Watchdog(str(tmp_path), hang=60, end=ended.append) as watch:
        watch.beat(1, "step")
        time.sleep(0.1)
    assert not ended and (tmp_path / "heartbeats").is_file()


def state(process, step, phase, moved, alive):
    return {"process": process, "of": 4, "host": "b", "pid": 70 + process, "step": step, "phase": phase} | {
        "moved": moved,
        "alive": alive,
    }


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (None, "process 1 has not begun"),
        (
            state(1, 11, "save", 970, 975),
            "process 1 (pid 71 on b) has shown no sign of life for 25 s, last in step 11 (save)",
        ),
        (state(1, 11, "eval", 960, 999), "process 1 (pid 71 on b) is in step 11 (eval) since 40 s"),
        (state(1, 12, "ended", 960, 961), "process 1 (pid 71 on b) has ended, after step 12"),
        (state(1, 12, "step", 970, 999), "all others are there and wait as well"),
    ],
)
def test_who_is_missing(other, says):
    own = state(0, 12, "step", 970, 1000)
    others = {n: state(n, 12, "step", 971, 999) for n in (0, 2, 3)} | ({1: other} if other else {})
    assert missing(own, others, 1000.0) == f"nothing has moved for 30 s in step 12 (step); {says}"


def test_one_that_compiles_is_waited_for_and_one_that_is_stopped_is_not():
    peers, earlier = Peers(0, began=1000.0), state(3, 9, "compile", 900, 990) | {"slow": True}
    seen = []
    for now in range(0, 30, 3):  # seconds; process 1 compiles up to 18, and is stopped from 6 on
        states = {n: state(n, 12, "step", 1001, 1001 + now) | {"slow": False} for n in (0, 2)}
        phase = {"phase": "compile", "slow": True} if now < 18 else {"phase": "step", "slow": False}
        states |= {1: state(1, 1, "compile", 1001, 1001 + min(now, 6)) | phase, 3: earlier}
        peers.look(states, 50.0 + now)
        seen.append((now, peers.slow, peers.stopped))
    assert [(now, slow) for now, slow, _ in seen] == [(now, now < 18) for now in range(0, 30, 3)]
    assert [(now, stopped) for now, _, stopped in seen] == [(now, now > 6 + watchdog.LOST) for now in range(0, 30, 3)]
    states[1]["phase"] = "ended"
    peers.look(states, 90.0)
    assert not peers.stopped  # nor does it say so where its own file is not written either, as on a full disk
    states[1]["phase"] = "step"
    peers.look(states, 100.0)
    assert not peers.stopped


def alone_of_two(tmp_path, seconds=1.5, **peer):
    """What a process that may hang for 0.3 s does within some beside a peer that says this, and that lives on."""
    (tmp_path / "heartbeats").mkdir()
    ended, began = [], time.monotonic()
    watch = Watchdog(str(tmp_path), hang=0.3, end=ended.append)
    watch._who["of"] = 2
    with watch:
        watch.beat(2, "step")
        while time.monotonic() < began + seconds:
            told = state(1, 0, "start", time.time(), time.time()) | peer
            (tmp_path / "told").write_text(json.dumps(told))
            os.replace(tmp_path / "told", tmp_path / "heartbeats/rank-1.json")
            time.sleep(0.05)
    return ended


def test_a_process_that_has_begun_its_steps_waits_for_one_that_still_compiles(tmp_path):
    assert not alone_of_two(tmp_path, slow=True)


def test_and_not_for_one_that_does_not(tmp_path):
    assert alone_of_two(tmp_path, slow=False, phase="step") == [75]


def test_what_cannot_be_read_is_passed_over(tmp_path):
    assert read(str(tmp_path / "none")) == {}
    for name, text in (("rank-1.json", '{"process": 1}'), ("rank-2.json", '{"pro'), ("rank-3.json.tmp", "{}")):
        (tmp_path / name).write_text(text)
    assert read(str(tmp_path)) == {1: {"process": 1}}
    assert json.loads((tmp_path / "rank-1.json").read_text()) and watchdog.LOST > 2 * watchdog.ALIVE
