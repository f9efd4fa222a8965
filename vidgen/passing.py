"""Errors that may be over by themselves: a disk, a server of files or a network that is away for a moment."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

NAMES = (
    "EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNRESET",
    "ECONNREFUSED", "ECONNABORTED", "EPIPE", "EREMOTEIO", "EMFILE", "ENFILE", "ENOMEM",
)  # fmt: skip
NUMBERS = frozenset(getattr(errno, name) for name in NAMES if hasattr(errno, name))
# Libraries in C++ have the number in the text alone, or a status of their own (abseil's, as tensorstore and gRPC do).
STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
# ArrayRecord names the call that the system refused, as in "open() failed: No such file or directory; opening …"; of a
# record that is broken, or a file that is cut short, it speaks in words of its own.
CALLS = r"\b(?:open|read|pread|l?seek|fstat)\(\) failed: "
TEXT = re.compile(
    "|".join([CALLS, rf"\b(?:{'|'.join(NAMES + STATUSES)})\b", *(re.escape(os.strerror(n)) for n in NUMBERS)])
)
SECTOR = re.compile(rf"\bEIO\b|{re.escape(os.strerror(errno.EIO))}")
TRIES, PAUSE = 3, 1.0  # of `again`; seconds between them


def passes(error: BaseException | None) -> bool:
    """Whether an error may be over by itself. One that somebody has put into words for the user is none."""
    from vidgen.config import ConfigError

    if isinstance(error, ConnectionError | TimeoutError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NUMBERS
    told = isinstance(error, OSError | RuntimeError | ValueError) and not isinstance(error, ConfigError)
    return told and bool(TEXT.search(str(error)))


def sector(error: BaseException) -> bool:
    """Whether a disk says that it can't read this place, which passes where a server of files says so, and stays where
    the disk is at fault.
    """
    known = isinstance(error, OSError) and error.errno is not None
    return error.errno == errno.EIO if known else passes(error) and bool(SECTOR.search(str(error)))


def again(act: Callable[[], Found]) -> Found:
    """What `act()` gives, tried TRIES times where its error is one that passes; raises the last one."""
    for _ in range(TRIES - 1):
        try:
            return act()
        except Exception as e:
            if not passes(e):
                raise
        time.sleep(PAUSE)
    return act()
