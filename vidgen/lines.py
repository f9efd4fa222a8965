"""Files of JSON lines: only whole lines are appended, and what a kill left of one costs no other."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from typing import Any


def append(path: str, data: bytes, sync: bool = False) -> None:
    """Puts lines at the end of a file, on a line of their own: all of them or none.

    Args:
      path: of the file, made where it is missing.
      data: whole lines.
      sync: have them on the disk itself when it returns.

    Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if sync:
                os.fsync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def read(path: str) -> list[Any]:
    """What each whole line holds, in order; lines that are no JSON are passed over, and a file that can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
            lines = f.read().split("\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found
