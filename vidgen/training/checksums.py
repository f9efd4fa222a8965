"""Checksums of a checkpoint's files, which are part of its commit, and what they tell of it later."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import errno
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from orbax.checkpoint._src.metadata import checkpoint as step_metadata  # what commits a step has no public door
from orbax.checkpoint._src.path import atomicity, gcs_utils

from vidgen.passing import again, sector

SEAL = "vidgen.sha256"  # file of a checkpoint; `sha256sum -c` reads it too
COMMIT = atomicity.COMMIT_SUCCESS_FILE  # what Orbax writes last where a folder can't be renamed in one move
BLOCK = 2**20  # bytes read at once
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT)  # of fsync: it is not on the disk
OTHER = (errno.EISDIR, errno.ENOTDIR, errno.EBADMSG, errno.EUCLEAN)  # something else is there, or a broken file system
THREADS = 2  # the step needs the host's cores more


@dataclasses.dataclass(frozen=True)
class Damage:
    """The first file of a checkpoint that isn't as it was saved.

    Attributes:
      path: inside the checkpoint.
      why: in words.
    """

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path} {self.why}"


def write(folder: epath.Path) -> None:
    """Writes the checksums of every file under `folder`, and one of themselves; raises OSError."""
    paths = sorted(_files(folder))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda path: _digest(folder / path), paths)
        body = "".join(f"{digest}  {path}\n" for digest, path in zip(digests, paths, strict=True))
    (folder / SEAL).write_text(body + _last(body))


def find(folder: epath.Path, items: Sequence[str] = (), part: int = 0, parts: int = 1) -> Damage | None:
    """The first damage found; None where every file is there as it was saved, and no other.

    Args:
      folder: of the checkpoint.
      items: the subfolders that matter; empty: all of it.
      part: of `parts` processes, each of which reads its share of the files.
      parts: processes that share the work.

    Raises OSError where a server of files does not answer, or it may not be read.
    """
    listed, wrong = _listed(folder)
    if wrong:
        return wrong
    try:
        # In a bucket the last file is written after the checksums, and that it is there at all is what it says.
        there = {name for name in again(lambda: list(_files(folder))) if name != COMMIT or name in listed}
    except FileNotFoundError:
        return Damage(SEAL, "is there, but not the files that it lists")  # as while the run deletes the checkpoint
    names = sorted(name for name in there | listed.keys() if not items or name.partition("/")[0] in items)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda path: _damage(folder, path, listed), names[part::parts])
        return next((damage for damage in found if damage), None)


def committed(root: epath.Path) -> type[atomicity.TemporaryPathBase]:
    """How Orbax is to commit the checkpoints of `root`: with their checksums as the last file of the commit.

    On a disk a checkpoint is written beside its place and renamed; in a bucket, where there is nothing to rename, a
    last small file says that all is there.
    """
    bucket = gcs_utils.is_gcs_path(root)
    base = atomicity.CommitFileTemporaryPath if bucket else atomicity.AtomicRenameTemporaryPath

    class Committed(base):  # type: ignore[misc, valid-type]
        async def finalize(self, **kwargs: Any) -> None:
            if self.get_final().parent != root:  # an item of a checkpoint, which has this class too
                return await super().finalize(**kwargs)
            await asyncio.to_thread(self._finish)

        def _finish(self) -> None:
            folder, store = self.get(), self._checkpoint_metadata_store
            if store:
                store.wait_until_finished()
                about = step_metadata.step_metadata_file_path(folder)
                store.update(file_path=about, commit_timestamp_nsecs=time.time_ns())
                store.wait_until_finished()
            text = f"Checkpoint commit was successful to {self.get_final()}"
            if bucket:
                write(folder)
                (folder / COMMIT).write_text(text)
            else:
                (folder / COMMIT).write_text(text)
                write(folder)
                for path in (*_files(folder), SEAL):
                    _settle(folder / path)
                for path in _folders(folder):
                    _settle(path)
                folder.rename(self.get_final())
                _settle(root)  # before an older checkpoint is deleted for this one

    return Committed


def _files(folder: epath.Path, inside: str = "") -> Iterator[str]:
    for path in (folder / inside if inside else folder).iterdir():
        name = f"{inside}/{path.name}" if inside else path.name
        if path.is_dir():
            yield from _files(folder, name)
        elif name != SEAL:
            yield name


def _folders(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _folders(path)
    yield folder


def _settle(path: epath.Path) -> None:
    """Until a file, or a folder's list of them, is on the disk itself: what the system only remembers, a power cut
    takes. Of the arrays' files tensorstore has seen to it, so that this is done at once.
    """
    there = os.open(path, os.O_RDONLY)
    try:
        os.fsync(there)
    except OSError as e:
        if e.errno in LOST:  # anything else is the word of a file system that knows no such thing
            raise
    finally:
        os.close(there)


def _damage(folder: epath.Path, path: str, listed: dict[str, str]) -> Damage | None:
    try:
        digest = again(lambda: _digest(folder / path))
    except FileNotFoundError:
        return Damage(path, "is missing")
    except OSError as e:
        if isinstance(e, IsADirectoryError) and path not in listed:  # it could not even be told from a file
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder / path)) from e
        # A server that doesn't answer, or a right that lacks, says nothing of what the file holds.
        if not (sector(e) or e.errno in OTHER):
            raise
        return Damage(path, f"cannot be read ({e.strerror or e})")
    if path not in listed:
        return Damage(path, "was not there when it was saved")
    return None if digest == listed[path] else Damage(path, "is not as it was saved")


def _listed(folder: epath.Path) -> tuple[dict[str, str], Damage | None]:
    """({path: digest} of the checksums, what is wrong with them)."""
    try:
        text = again((folder / SEAL).read_bytes).decode("ascii")
    except FileNotFoundError:
        return {}, Damage(SEAL, "is missing: it was not finished, or an older vidgen wrote it")
    except (OSError, UnicodeError) as e:
        if isinstance(e, OSError) and not sector(e):
            raise
        return {}, Damage(SEAL, f"cannot be read ({' '.join(str(e).split())[:100]})")
    lines = text.splitlines(keepends=True)
    body = "".join(lines[:-1])
    if not lines or lines[-1] != _last(body):
        return {}, Damage(SEAL, "is not as it was saved")
    pairs = (line.rstrip("\n").split("  ", 1) for line in lines[:-1])
    return {path: digest for digest, path in pairs}, None


def _last(body: str) -> str:
    return f"# {hashlib.sha256(body.encode()).hexdigest()} all of the above\n"


def _digest(path: epath.Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(BLOCK):
            total.update(block)
    return total.hexdigest()
