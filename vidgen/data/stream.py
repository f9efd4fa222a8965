"""Batches made ahead of the steps that take them, in a thread."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from vidgen.data.feed import FeedInfo, _close, _put

AHEAD = 2  # batches on their way to the devices while a step runs

Item = tuple[Any, FeedInfo]  # a batch, and what it says of its making


class Stream(Iterator[Item]):
    """What a generator yields, made ahead of its use; what it raises is raised to who asks for the next.

    Close it, use it in a `with`, or drop it: its thread ends, and the generator is closed in it.
    """

    def __init__(self, made: Iterator[Item]):
        self._queue: queue.Queue = queue.Queue(AHEAD)
        stop = threading.Event()
        # The thread knows nothing of this object, so that dropping the object ends the thread.
        thread = threading.Thread(target=_work, args=(made, self._queue, stop), name="vidgen-stream", daemon=True)
        self._error: BaseException | None = None
        self.close = weakref.finalize(self, _close, self._queue, stop, thread)  # also when the interpreter exits
        thread.start()

    def __next__(self) -> Item:
        if self._error is not None:
            raise self._error
        if not self.close.alive:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        batch, info = item
        return batch, dataclasses.replace(info, wait=time.perf_counter() - start)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(made: Iterator[Item], out: queue.Queue, stop: threading.Event) -> None:
    """Thread: what is made → `out`, until told to stop or something is raised."""
    try:
        for item in made:
            _put(out, item, stop)
            if stop.is_set():
                return
    except BaseException as error:
        _put(out, error, stop)
    finally:
        made.close()
