"""Batches made ahead of the steps that take them, in a thread."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from typing import Any

AHEAD = 2  # batches on their way to the devices while a step runs


@dataclasses.dataclass(frozen=True)
class FeedInfo:
    """What a batch says of its making, on this host.

    Where the devices of several hosts share a row, each of them reads it, and one of them counts its bad clips.

    Attributes:
      wait: seconds that the step waited for it.
      bad: reason → how many of its clips are padding because of it.
      bad_clips: (name, reason) of each of them.
      bad_indices: and its number in the source.
    """

    wait: float
    bad: dict[str, int]
    bad_clips: tuple[tuple[str, str], ...] = ()
    bad_indices: tuple[int, ...] = ()


Item = tuple[Any, FeedInfo]  # a batch, and what it says of its making


class Stream(Iterator[Item]):
    """What an endless generator yields, made ahead of its use; what it raises is raised to whoever asks for the next.

    Where it yields None, there is nothing yet: it is a moment to stop at, amid long work.

    Close the stream, use it in a `with`, or drop it: its thread ends, and the generator is closed in it.
    """

    def __init__(self, made: Generator[Item | None, None, None]):
        self._queue: queue.Queue = queue.Queue(AHEAD)
        stop = threading.Event()
        # The thread knows nothing of this object, so that dropping the object ends the thread.
        thread = threading.Thread(target=_work, args=(made, self._queue, stop), name="vidgen-feed", daemon=True)
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


def _work(made: Generator[Item | None, None, None], out: queue.Queue, stop: threading.Event) -> None:
    """Thread: what is made → `out`, until told to stop or something is raised."""
    try:
        for item in made:
            if item is not None:
                _put(out, item, stop)
            if stop.is_set():
                return
    except BaseException as error:
        _put(out, error, stop)
    finally:
        made.close()


def _put(out: queue.Queue, item: Any, stop: threading.Event) -> None:
    """`out.put`, given up when told to stop."""
    while not stop.is_set():
        try:
            return out.put(item, timeout=0.2)
        except queue.Full:
            pass


def _close(out: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while True:  # lets go of the batches that wait
        try:
            out.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        thread.join(timeout=10)
