"""Files of JSON lines."""

import os

import pytest

from vidgen import lines


def test_what_is_left_of_a_line_costs_no_other(tmp_path):
    path = str(tmp_path / "a.jsonl")
    lines.append(path, b'{"a": 1}\n[2]\n')
    with open(path, "ab") as f:
        f.write(b'{"a": \xff')
    assert lines.read(path) == [{"a": 1}, [2]]
    lines.append(path, b"3\n", sync=True)
    assert lines.read(path) == [{"a": 1}, [2], 3]
    assert lines.read(str(tmp_path / "b.jsonl")) == [] == lines.read(str(tmp_path))


@pytest.mark.parametrize("written", [0, 3])
def test_a_disk_with_too_little_room_takes_nothing(tmp_path, monkeypatch, written):
    path, write = str(tmp_path / "a.jsonl"), os.write
    lines.append(path, b"1\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:written]))
        with pytest.raises(OSError, match="No space left"):
            lines.append(path, b"22222\n")
    assert (tmp_path / "a.jsonl").read_bytes() == b"1\n"
