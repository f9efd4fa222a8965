"""What a row of metrics.jsonl says."""

import numpy as np
import pytest

from vidgen.config import ConfigError
from vidgen.data.stream import FeedInfo
from vidgen.parallel.processes import Restartable
from vidgen.training.meter import Meter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def meter(clock, **changes):
    arguments = {
        "lr": lambda n: 0.1 * n,
        "useful_flops": lambda n: 50.0,
        "peak_flops": 1000.0,
        "clips_a_step": 4.0,
        "max_bad": 0.1,
    }
    return Meter(**(arguments | changes), clock=clock)


def done(n, loss=1.0, tokens=10.0):
    return n, {"loss": loss, "grad_norm": 2.0, "tokens": tokens, "skipped": 0}


def test_speed_counts_steps_after_the_first_and_no_time_aside():
    clock = Clock()
    m = meter(clock, tokens_seen=1000.0)
    m.fed(FeedInfo(5.0, {}))
    clock.now += 60  # compiling
    m.done(*done(1, loss=4.0))
    for n in (2, 3):
        m.fed(FeedInfo(0.1, {}))
        clock.now += 1
        m.done(*done(n, loss=n))
    clock.now += 30
    m.aside(30)
    row = m.row()
    assert row["loss"] == 3.0 and row["lr"] == pytest.approx(0.2) and row["tokens_seen"] == 1030
    assert row["tokens_per_second"] == pytest.approx(10) and row["seconds_per_step"] == pytest.approx(1)
    assert row["mfu"] == pytest.approx(0.05) and row["data_wait_fraction"] == pytest.approx(0.1)


def test_where_all_steps_were_skipped_the_rate_is_the_first():
    m = meter(Clock(), lr=[0.5, 0.4, 0.3].__getitem__)
    m.done(1, done(1)[1] | {"skipped": 1})
    assert m.row()["lr"] == 0.5


def test_time_that_a_row_takes_is_time_of_the_next():
    clock = Clock()

    def slow(n):
        clock.now += 3
        return 0.1

    m = meter(clock, lr=slow)
    for n in (1, 2, 3):
        m.done(*done(n))
        clock.now += 1
        row = m.row()
    assert row["seconds_per_step"] == pytest.approx(4)


def test_a_row_of_the_first_step_alone_says_nothing_of_speed():
    clock = Clock()
    m = meter(clock)
    m.done(*done(1))
    row = m.row()
    assert row["loss"] == 1.0 and "mfu" not in row
    clock.now += 2
    m.done(*done(2))
    assert m.row()["seconds_per_step"] == pytest.approx(2)


def test_a_run_that_updates_nothing_any_more_ends():
    m = meter(Clock())
    for n in range(1, 51):
        m.done(n, done(n)[1] | {"skipped": n})
    with pytest.raises(ConfigError, match="last 50 updates were skipped, at step 51"):
        m.done(51, done(51)[1] | {"skipped": 51})
    m = meter(Clock())
    for n in range(1, 200):
        m.done(n, done(n)[1] | {"skipped": n // 2})


def test_the_learning_rate_is_that_of_the_updates_taken():
    m = meter(Clock())
    m.done(1, done(1)[1])
    m.done(10, done(10)[1] | {"skipped": 4})
    assert m.row()["lr"] == pytest.approx(0.5)


def test_few_bad_clips_are_counted_and_many_end_the_run():
    m = meter(Clock())
    for _ in range(10):
        m.fed(FeedInfo(0.0, {"truncated": 1}))
    m.done(*done(1))
    assert m.row()["unreadable_clips"] == 10
    with pytest.raises(ConfigError, match="11 of about 44 clips could not be read .truncated: 11."):
        m.fed(FeedInfo(0.0, {"truncated": 1}))


def test_a_disk_that_is_gone_is_noticed_in_a_long_run_as_soon_as_in_a_short_one():
    m = meter(Clock())
    for _ in range(100_000):  # whose share of unreadable clips would stay small for thousands of steps
        m.fed(FeedInfo(0.0, {}))
    with pytest.raises(Restartable, match="of about the last 1000 clips could not be read .*: is their disk there"):
        for _ in range(126):  # steps of four clips each
            m.fed(FeedInfo(0.0, {"the disk can't read it": 4}))
    m = meter(Clock())
    with pytest.raises(ConfigError, match="no known codec: 12.*, more than config.train.max_bad") as told:
        for _ in range(9):  # what never could be read is no disk that has gone
            m.fed(FeedInfo(0.0, {"no known codec": 4}))
    assert not isinstance(told.value, Restartable)


def test_a_disk_that_goes_bit_by_bit_is_noticed_and_a_share_that_is_allowed_is_not():
    for share in (0.01, 0.3, 0.9):
        m, draw = meter(Clock(), max_bad=share), np.random.default_rng(0)
        for bad in [0] * 250 + draw.binomial(4, 0.95 * share, 3000).tolist():
            m.fed(FeedInfo(0.0, {"truncated": bad}))
    m = meter(Clock(), max_bad=0.01)
    for _ in range(10_000):
        m.fed(FeedInfo(0.0, {}))
    with pytest.raises(Restartable, match="^39 of about the last 1000 clips"):
        for _ in range(200):  # a quarter of them
            m.fed(FeedInfo(0.0, {"the disk can't read it": 1}))
