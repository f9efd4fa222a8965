"""The ledger: every second is somewhere, through kills, rollbacks and full disks."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from vidgen.training import goodput
from vidgen.training.goodput import KINDS, Account, Ledger


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def begin(workdir, clock, step=0, start=None):
    ledger = Ledger(str(workdir), clock, clock.now if start is None else start)
    clock.tick(3)
    ledger.resumed(step)
    return ledger


def steps(ledger, clock, first, last, seconds=1.0, save_every=5):
    """One second of waiting to nine of the step; a checkpoint takes 2 seconds."""
    for n in range(first, last + 1):
        with ledger.spent("data wait"):
            clock.tick(0.1 * seconds)
        clock.tick(0.9 * seconds)
        ledger.step(n)
        if n % save_every == 0:
            with ledger.spent("save"):
                clock.tick(2)


def known(found, **expected):
    """Seconds by kind, all others 0."""
    assert {kind: round(found[kind], 2) for kind in KINDS} == dict.fromkeys(KINDS, 0.0) | expected


def test_what_has_certainly_been_saved_is_known_to_the_next_attempt(tmp_path, clock):
    first = begin(tmp_path, clock)
    assert first.on_disk == 0
    steps(first, clock, 1, 6)  # the checkpoint of step 5 is under way, and was perhaps cut off
    first.close()
    second = begin(tmp_path, clock)
    assert second.on_disk == 0
    steps(second, clock, 1, 12)  # that of step 10 began when the one of step 5 had ended
    second.close()
    third = begin(tmp_path, clock, step=5)
    assert third.on_disk == 5
    third.resumed(10)
    with pytest.raises(OSError), third.spent("save"):
        raise OSError("the disk is full")  # what failed is no checkpoint
    third.resumed(0)  # a rollback, which sets aside all that is after it
    third.close()
    assert begin(tmp_path, clock).on_disk == 0


def test_time_is_of_the_innermost_kind(tmp_path, clock):
    ledger = Ledger(str(tmp_path), clock, start=clock.now - 5)
    ledger.resumed(0)
    with ledger.spent("compile"):
        clock.tick(10)
        with ledger.spent("data wait"):
            clock.tick(1)
        clock.tick(20)
    ledger.step(1)
    clock.tick(4)
    with ledger.spent("eval"), ledger.spent("sample"):
        clock.tick(2)
    found = ledger.summary()
    known(found, init=5, compile=30, step=4, sample=2, **{"data wait": 1})
    assert found["total"] == 42 and found["goodput"] == pytest.approx(4 / 42) and found["attempts"] == 1
    with pytest.raises(ValueError, match="no kind 'lunch'; expected one of init, compile, step"):
        ledger.spent("lunch").__enter__()
    ledger.close()


def test_a_killed_attempt_costs_its_last_steps_and_the_time_until_the_next(tmp_path, clock):
    first = begin(tmp_path, clock)
    steps(first, clock, 1, 8)
    clock.tick(2)
    first.step(9)
    clock.tick(5)
    first.step(10)  # a row: ten seconds have passed
    first._journal.flush()  # and no close
    clock.tick(60)
    second = begin(tmp_path, clock, step=5)
    steps(second, clock, 6, 10)
    found = second.summary()
    # 10 steps count, of which 5 by each attempt; of the first the others, 2.7 + 7 seconds, are lost.
    known(found, init=6, step=9, save=4, lost=9.7, down=60, **{"data wait": 1.3})
    assert found["total"] == pytest.approx(clock.now - 1000) and found["attempts"] == 2
    second.close()
    one, two = Account(goodput.read(str(tmp_path))).attempts
    assert (one.first, one.last, two.first, two.last) == (0, 10, 5, 10)
    assert sum(one.seconds.values()) == pytest.approx(one.end - one.start)
    assert two.seconds["down"] == 60 and one.seconds["lost"] == pytest.approx(9.7)


def test_a_rollback_is_lost_time_of_the_same_attempt(tmp_path, clock):
    ledger = begin(tmp_path, clock)
    steps(ledger, clock, 1, 8)
    clock.tick(4)  # restoring
    ledger.resumed(5)
    steps(ledger, clock, 6, 10)
    known(ledger.summary(), init=3, step=9, save=4, lost=2.7 + 4, **{"data wait": 1.3})
    ledger.close()


def test_steps_beyond_several_deaths_are_lost_once(tmp_path, clock):
    for start in (0, 5, 5, 0):
        ledger = begin(tmp_path, clock, start)
        steps(ledger, clock, start + 1, start + 7, seconds=10)
        ledger._journal.flush()
    assert ledger.summary()["step"] == pytest.approx(63)
    assert ledger.summary()["lost"] == pytest.approx(3 * 63)
    assert ledger.summary()["total"] == pytest.approx(clock.now - 1000)
    ledger.close()


def test_what_was_done_when_the_checkpoint_was_written_is_not_lost(tmp_path, clock):
    ledger = begin(tmp_path, clock)
    clock.tick(30)
    ledger.step(1)  # a row, and the device still at it
    clock.tick(30)
    with ledger.spent("save"):
        clock.tick(1)
    clock.tick(7)
    ledger.resumed(1)
    known(ledger.summary(), init=33, step=30, save=1, lost=7)
    ledger.close()


def test_time_after_a_finished_run_is_nobodys(tmp_path, clock):
    ledger = begin(tmp_path, clock)
    steps(ledger, clock, 1, 5)
    ledger.finished()
    ledger.close()
    clock.tick(1e6)
    again = begin(tmp_path, clock, 5)
    assert again.summary()["down"] == 0 and again.summary()["total"] == pytest.approx(13)
    again.close()


def test_any_end_of_the_file_can_be_read_and_gone_on_from(tmp_path, clock):
    ledger = begin(tmp_path, clock)
    steps(ledger, clock, 1, 30)
    ledger.close()
    path = tmp_path / goodput.FILE
    text = path.read_bytes()
    for size in [*random.Random(0).sample(range(len(text)), 12), len(text) - 1]:
        path.write_bytes(text[:size])
        again = begin(tmp_path, clock)
        steps(again, clock, 1, 3)
        found = again.summary()
        again.close()
        rows = goodput.read(str(tmp_path))
        read = goodput.totals(Account(rows).seconds())
        assert all(read[kind] == pytest.approx(found[kind], abs=0.01) for kind in KINDS)
        assert found["total"] == pytest.approx(clock.now - rows[0]["start"], rel=0.01)


def test_rows_are_few_and_nonsense_is_passed_over(tmp_path, clock):
    ledger = begin(tmp_path, clock)
    steps(ledger, clock, 1, 2000, seconds=0.1, save_every=10_000)
    ledger.close()
    assert 50 < len(goodput.read(str(tmp_path))) < 120  # of 200 seconds: one in 1 to 3
    with open(tmp_path / goodput.FILE, "ab") as f:
        f.write(b'nonsense\n[1]\n3\nnull\n{"seconds": 3}\n{"seconds": {"step": "x"}}\n{"time": {}}\n\xff\n{"step":')
    before = goodput.totals(Account(goodput.read(str(tmp_path))).seconds())
    assert before["step"] == pytest.approx(180, abs=0.1)


def test_clocks_that_go_back_take_nothing(tmp_path, clock):
    ledger = begin(tmp_path, clock)
    steps(ledger, clock, 1, 5)
    ledger.close()
    clock.tick(-500)  # another machine
    again = begin(tmp_path, clock, 5)
    clock.tick(-1)
    steps(again, clock, 6, 10)
    found = again.summary()
    assert min(found.values()) >= 0 and found["total"] == pytest.approx(10 + 9, abs=0.01)  # a second was nobody's
    again.close()


def test_who_does_not_write_measures_all_the_same(tmp_path, clock, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = begin("", clock)
    steps(ledger, clock, 1, 5)
    known(ledger.summary(), init=3, step=4.5, save=2, **{"data wait": 0.5})
    ledger.close()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_refuses_is_said_and_costs_no_second(tmp_path, clock):
    said = []
    ledger = Ledger(str(tmp_path / "nowhere"), clock, clock.now, say=said.append)
    ledger.resumed(0)
    steps(ledger, clock, 1, 50)
    ledger._journal.flush()
    assert len(said) == 1 and "goodput.jsonl: No such file or directory" in said[0]
    (tmp_path / "nowhere").mkdir()
    ledger.close()
    assert Account(goodput.read(str(tmp_path / "nowhere"))).seconds()["step"] == pytest.approx(45)


RUN = """
import sys, time
from vidgen.training import goodput
workdir, step = sys.argv[1], int(sys.argv[2])
goodput.EVERY = 0.2, 0.2
ledger = goodput.Ledger(workdir)
ledger.resumed(step)
print("go", flush=True)
while True:
    step += 1
    with ledger.spent("data wait"):
        time.sleep(0.01)
    time.sleep(0.04)
    ledger.step(step)
    if step % 10 == 0:
        with ledger.spent("save"):
            time.sleep(0.02)
        print(step, flush=True)
"""


def test_a_process_that_is_killed_leaves_every_second_accounted_for(tmp_path):
    saved, begun = 0, None
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), str(saved)], stdout=subprocess.PIPE)
        begun = begun or goodput.now()
        assert process.stdout.readline() == b"go\n"
        saved = int(process.stdout.readline())
        time.sleep(0.35)
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = int((process.stdout.read().split() or [saved])[-1])
        process.stdout.close()
    ledger = Ledger(str(tmp_path), start=goodput.now())
    ledger.resumed(saved)
    found = ledger.summary()
    wall = goodput.now() - begun
    ledger.close()
    assert found["total"] == pytest.approx(wall, rel=0.01, abs=0.05)
    assert sum(found[kind] for kind in KINDS) == pytest.approx(found["total"])
    assert found["lost"] > 3 * 0.04 and found["step"] >= saved * 0.04 and found["init"] > 0.03 and found["save"] > 0.03
    assert found["goodput"] == pytest.approx(found["step"] / wall, rel=0.02)
    assert all(json.loads(line) for line in (tmp_path / goodput.FILE).read_text().splitlines())


def test_a_process_that_began_long_ago_has_not_loaded_a_run_since():
    began = goodput.began()
    assert 0 <= goodput.now() - began < goodput.LOADING
