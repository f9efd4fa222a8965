"""A thread that makes batches ahead: its end, its errors."""

import itertools
import threading
import time

import pytest

from vidgen.data.stream import AHEAD, FeedInfo, Stream

INFO = FeedInfo(0.0, {})


def test_batches_come_in_order_and_few_are_made_ahead():
    made = []

    def numbers():
        for n in itertools.count():
            made.append(n)
            yield n, INFO

    with Stream(numbers()) as stream:
        assert [next(stream)[0] for _ in range(3)] == [0, 1, 2]
        time.sleep(0.3)
        assert len(made) <= 3 + AHEAD + 1  # the one that waits for a place


def test_long_work_ends_at_the_next_moment_to_stop_at():
    ended = threading.Event()

    def slow():
        try:
            while True:
                time.sleep(0.01)
                yield None
        finally:
            ended.set()

    stream = Stream(slow())
    start = time.perf_counter()
    stream.close()
    assert ended.is_set() and time.perf_counter() - start < 2
    with pytest.raises(StopIteration):
        next(stream)


def test_an_error_follows_what_was_made_before_it_and_stays():
    def failing():
        yield "a", INFO
        raise OSError("the disk is gone")

    with Stream(failing()) as stream:
        assert next(stream)[0] == "a"
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(stream)
