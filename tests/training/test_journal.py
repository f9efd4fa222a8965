"""Journals on disks that are full, read-only, removed, slow or forgetful; with real ones where tmpfs can be mounted."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import threading
import time

import pytest

from vidgen.training.journal import Journal


@pytest.fixture
def small(tmp_path):
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs a tmpfs, which only root can mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def journal(path, **options):
    said = []
    made = Journal(str(path), say=said.append, **({"retry": 0.05} | options))
    made.said = said
    yield made
    made.close(2.0)


def records(count, start=0, size=100):
    return [f"{n:08d}".encode().ljust(size - 1, b".") + b"\n" for n in range(start, start + count)]


def soon(condition):
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_records_come_in_order_and_flush_waits_for_them(tmp_path):
    with journal(tmp_path / "a") as j:
        for record in records(500):
            j.append(record)
        assert j.flush() == 0
        assert (tmp_path / "a").read_bytes() == b"".join(records(500))
        assert j.close() == 0 and not j.said


def test_a_full_disk_loses_nothing_and_is_said_once(small):
    (small / "other").write_bytes(bytes(48 * 1024))
    with journal(small / "a") as j:
        for record in records(400):
            j.append(record)
        kept = j.flush()
        text = (small / "a").read_bytes()
        assert 0 < kept < 400 and text == b"".join(records(400))[: len(text)]
        time.sleep(0.2)  # several attempts
        assert len(j.said) == 1 and "No space left on device; its rows are kept in memory" in j.said[0]
        (small / "other").unlink()
        soon(lambda: (small / "a").read_bytes() == b"".join(records(400)))
        soon(lambda: len(j.said) == 2)
        assert "can be written again" in j.said[1] and j.close() == 0 and len(j.said) == 2


def test_what_stays_lost_is_counted(small):
    with journal(small / "a") as j:
        for record in records(800):
            j.append(record)
        lost = j.close()
    whole = len((small / "a").read_bytes()) // 100
    assert lost == 800 - whole > 100 and f"{lost} rows are lost: No space left on device" in j.said[-1]


def test_a_disk_may_be_read_only_for_a_while(small):
    with journal(small / "a") as j:
        j.append(records(1)[0])
        assert j.flush() == 0
        # Nothing may be open for writing then; a disk that fails is made read-only all the same.
        os.close(j._fd)
        j._fd = -1
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        j.append(records(2)[1])
        assert j.flush() == 1 and "Read-only file system" in j.said[0]
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        soon(lambda: (small / "a").read_bytes() == b"".join(records(2)))


def test_a_folder_may_go_and_come_back(tmp_path):
    (tmp_path / "w").mkdir()
    with journal(tmp_path / "w" / "a") as j:
        j.append(records(1)[0])
        assert j.flush() == 0
        os.rename(tmp_path / "w", tmp_path / "moved")
        j.append(records(2)[1])
        assert j.flush() == 1 and "No such file or directory" in j.said[0]
        os.rename(tmp_path / "moved", tmp_path / "w")
        soon(lambda: (tmp_path / "w" / "a").read_bytes() == b"".join(records(2)))
        shutil.rmtree(tmp_path / "w")
        (tmp_path / "w").mkdir()
        j.append(records(3)[2])
        assert j.flush() == 0  # removed for good: what comes is kept again
        assert (tmp_path / "w" / "a").read_bytes().endswith(records(3)[2])


def test_what_the_disk_never_confirmed_is_written_again(tmp_path, monkeypatch):
    sync = os.fsync

    def forget(fd):
        """As a file server that was full when it came to it: what was written is gone."""
        os.ftruncate(fd, 0)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with journal(tmp_path / "a") as j:
        monkeypatch.setattr(os, "fsync", forget)
        for record in records(3):
            j.append(record)
        assert j.flush() == 3 and "Disk quota exceeded" in j.said[0]
        monkeypatch.setattr(os, "fsync", sync)
        assert j.flush() == 0
        assert (tmp_path / "a").read_bytes() == b"".join(records(3))


def test_half_a_record_goes_before_the_next_comes(tmp_path):
    (tmp_path / "a").write_bytes(b"one\ntw")  # as a killed run leaves it
    with journal(tmp_path / "a") as j:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))
        try:
            j.append(b"three\n")
            assert j.flush() == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert j.flush() == 0
    assert (tmp_path / "a").read_bytes() == b"one\nthree\n"


def test_a_disk_that_does_not_answer_holds_nobody(tmp_path, monkeypatch):
    free = threading.Event()
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: (free.wait(20), write(*a))[1])
    with journal(tmp_path / "a") as j:
        before = time.monotonic()
        for record in records(1000):
            j.append(record)
        assert j.flush(0.1) == 1000 and time.monotonic() - before < 2
        assert "has not answered for 0.1 s" in j.said[0]
        assert not j.cut(0, lambda record: False, 0.1)
        free.set()
        assert j.flush() == 0
    assert (tmp_path / "a").read_bytes() == b"".join(records(1000))


def test_memory_is_bounded_and_what_it_costs_is_counted(tmp_path):
    with journal(tmp_path / "nowhere" / "a", keep=1000) as j:
        for record in records(25):
            j.append(record)
        assert j.flush() == 25 and len(j._records) == 10
        (tmp_path / "nowhere").mkdir()
        assert j.flush() == 15
        assert (tmp_path / "nowhere" / "a").read_bytes() == b"".join(records(10))


def test_what_is_cut_is_cut_in_the_file_and_in_memory(tmp_path):
    (tmp_path / "w").mkdir()
    with journal(tmp_path / "w" / "a") as j:
        for record in records(4):
            j.append(record)
        j.flush()
        assert j.cut(300, lambda record: record < records(4)[3])
        assert (tmp_path / "w" / "a").read_bytes() == b"".join(records(3))
        os.rename(tmp_path / "w", tmp_path / "moved")
        for record in records(2, start=3):
            j.append(record)
        j.flush()
        assert j.cut(200, lambda record: record < records(3)[2])
        j.append(b"new\n")
        os.rename(tmp_path / "moved", tmp_path / "w")
        assert j.flush() == 0
        assert (tmp_path / "w" / "a").read_bytes() == b"".join(records(2)) + b"new\n"
