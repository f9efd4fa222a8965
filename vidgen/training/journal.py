"""Files of a workdir that only grow: no step waits for them, and a disk that is full for a while costs them nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable

KEEP = 64 * 2**20  # bytes of records in memory: more than 100,000 rows of metrics
SYNC = 10.0  # seconds after which what was written is made to reach the disk itself
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)  # a file system's word for having no fsync


def complain(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


class Journal:
    """Records on their way to the end of a file; a thread writes them, and only whole ones stay there.

    What the disk refuses (full, over a quota, read-only, removed, broken) stays in memory, in order, and is tried again
    until there is room: said once when it begins and once when it is over. What was written but never confirmed by the
    disk, as a server of files may lose it, is written again.
    """

    def __init__(
        self,
        path: str,
        what: str = "rows",
        *,
        say: Callable[[str], None] = complain,
        keep: int = KEEP,
        retry: float = 3.0,
    ):
        """Opens the file at the first record, not yet; it has this one writer.

        Args:
          path: made where it is missing, in a folder that must be there. Lines are expected: what stands behind the
            last line's end is what a killed run left of one, and is cut off.
          what: a record's name in messages, in the plural.
          say: is given messages, from a thread.
          keep: bytes of records in memory; what comes when they are full is lost, and counted.
          retry: seconds between attempts.
        """
        self.path = path
        self.trouble = ""  # why the disk refuses, now
        self._what, self._say, self._keep, self._retry = what, say, keep, retry
        self._records: list[bytes] = []  # not yet safe: the first `_written` stand behind `_end`, unconfirmed
        self._written, self._bytes, self._lost = 0, 0, 0
        self._end: int | None = None  # of what is safe in the file; None: not opened yet
        self._place = 0  # where the next record belongs
        self._fd, self._inode = -1, 0
        self._asked = self._answered = 0  # calls of flush
        self._busy = self._closed = False
        self._next, self._synced = 0.0, time.monotonic()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"journal {os.path.basename(path)}", daemon=True)
        self._thread.start()

    def append(self, record: bytes) -> None:
        """Takes a record; returns at once."""
        with self._change:
            if self._bytes + len(record) > self._keep:
                self._lost += 1
                return
            self._records.append(record)
            self._bytes += len(record)
            self._change.notify_all()

    def flush(self, seconds: float = 30.0) -> int:
        """Has all of it on the disk when it returns, or says how many records are not.

        Waits for one attempt, and no longer than `seconds`, since a disk may never answer.
        """
        with self._change:
            self._asked += 1
            mine = self._asked
            self._change.notify_all()
            answered = self._closed or self._change.wait_for(lambda: self._answered >= mine, seconds)
            missing = len(self._records) + self._lost
        if not answered:
            self._say(f"{self.path}: the disk has not answered for {seconds:g} s; its {self._what} are kept in memory")
        return missing

    def cut(self, end: int | None, keep: Callable[[bytes], bool], seconds: float = 30.0) -> bool:
        """Drops what stands behind byte `end` of the file, and of the records in memory those that aren't to `keep`.

        An `end` of None leaves the file as it is. False, and nothing dropped, where the disk does not answer; one that
        answers but refuses is asked again with the next record.
        """
        with self._change:
            if not self._change.wait_for(lambda: not self._busy, seconds):
                return False
            if end is not None and self._end is not None and end < self._end:
                # All that is unconfirmed stands behind what goes.
                self._end, self._written = end, 0
            self._records = [record for record in self._records if keep(record)]
            self._written = min(self._written, len(self._records))
            self._bytes = sum(map(len, self._records))
            self._place = (self._end or 0) + sum(map(len, self._records[: self._written]))
        self.flush(seconds)
        return True

    def close(self, seconds: float = 10.0) -> int:
        """Tries once more and ends; how many records are lost, which is said too. Closing again does nothing."""
        lost = self.flush(seconds)
        if self._closed:
            return lost
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(1.0)  # a thread that the disk holds ends with the process
        if lost:
            why = self.trouble or ("the disk does not answer" if self._records else "memory was full of them")
            self._say(f"{self.path}: {lost} {self._what} are lost: {why}")
        return lost

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._due():
                    if self._closed:
                        if self._fd >= 0:
                            os.close(self._fd)
                        return
                    self._change.wait(self._patience())
                asked, self._busy = self._asked, True
                sync = asked > self._answered or time.monotonic() - self._synced >= SYNC
            try:
                said = self._attempt(sync)
            except OSError as e:
                said = self._refused(e)
            if said:
                with contextlib.suppress(OSError, ValueError):  # a terminal that is gone costs no rows
                    self._say(said)
            with self._change:
                self._busy, self._answered = False, asked
                self._change.notify_all()

    def _due(self) -> bool:
        """Whether there is something to do now."""
        if self._asked > self._answered:
            return True
        now = time.monotonic()
        fresh = len(self._records) > self._written
        return now >= self._next and (fresh or (self._written > 0 and now - self._synced >= SYNC))

    def _patience(self) -> float | None:
        """Seconds until there may be something to do without anybody's call; None: for ever."""
        if not self._records:
            return None
        now = time.monotonic()
        fresh = len(self._records) > self._written
        return max(self._next - now, 0.0 if fresh else self._synced + SYNC - now, 0.01)

    def _attempt(self, sync: bool) -> str:
        """Writes, and confirms where wanted; what there is to say. Raises OSError."""
        self._open()
        with self._change:
            batch = self._records[self._written :]
        try:
            for record in batch:
                self._trim()
                if os.pwrite(self._fd, record, self._place) < len(record):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with self._change:
                    self._written += 1
                    self._place += len(record)
        except OSError:
            if sync:
                self._confirm()  # those before it
            raise
        if sync:
            self._trim()
            self._confirm()
        before, self.trouble = self.trouble, ""
        return f"{self.path} can be written again; what was kept in memory is in it" if before else ""

    def _open(self) -> None:
        """Sees to it that `_fd` is what stands at the path, and that all that is known of the file is true of it."""
        try:
            there = os.stat(self.path).st_ino
        except FileNotFoundError:
            there = 0
        if self._fd >= 0 and there == self._inode:
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        found = os.fstat(self._fd)
        with self._change:
            if self._end is None or found.st_ino != self._inode or found.st_size < self._end:
                self._end, self._written = _lines_end(self._fd, found.st_size), 0
                self._place = self._end
            elif found.st_size < self._place:
                self._written, self._place = 0, self._end
            self._inode = found.st_ino

    def _trim(self) -> None:
        """Cuts off what a failed attempt left, or what is to go."""
        size = os.fstat(self._fd).st_size
        if size > self._place:
            os.ftruncate(self._fd, self._place)
        elif size < self._place:  # someone has emptied it: look at it anew
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _confirm(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as e:
            if e.errno not in NO_SYNC:
                with self._change:
                    self._written, self._place = 0, self._end  # the system may have forgotten them
                raise
        with self._change:
            self._end = self._place
            done, self._records = self._records[: self._written], self._records[self._written :]
            self._bytes -= sum(map(len, done))
            self._written, self._synced = 0, time.monotonic()

    def _refused(self, e: OSError) -> str:
        """Takes note of a failure; what there is to say."""
        if self._fd >= 0:
            # A file that was moved, unmounted or removed is looked for by its name.
            os.close(self._fd)
            self._fd = -1
        self._next = time.monotonic() + self._retry
        before, self.trouble = self.trouble, e.strerror or str(e)
        if before:
            return ""
        kept = f"its {self._what} are kept in memory and tried again every {self._retry:g} s"
        return f"cannot write {self.path}: {self.trouble}; {kept}"


def _lines_end(fd: int, size: int) -> int:
    """The byte behind the last line's end."""
    while size:
        start = max(0, size - 65536)
        place = os.pread(fd, size - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        size = start
    return 0
