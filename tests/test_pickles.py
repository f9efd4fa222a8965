"""Pickles are read without being run."""

import io
import os
import pickle
import struct

import numpy as np
import pytest

from vidgen import pickles
from vidgen.config import ConfigError


@pytest.mark.parametrize("protocol", [3, 4])  # those in which NumPy writes an array as a state of plain bytes
def test_arrays_and_containers_come_back(tmp_path, protocol):
    shared = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {
        "a": {"kernel": shared, "again": shared, "column": np.asfortranarray(np.arange(12.0).reshape(3, 4))},
        "big endian": np.arange(4, dtype=">i2"),
        "list": [1, 2.5, "text", None, True, (1,), (1, 2, 3, 4), b"bytes", 2**40],
        "empty": {},
        "scalar": np.zeros((), np.int64),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    found = pickles.load(str(path))
    assert found.keys() == tree.keys() and found["list"] == tree["list"] and found["empty"] == {}
    for name in ("kernel", "again", "column"):
        np.testing.assert_array_equal(found["a"][name], tree["a"][name])
    assert found["big endian"].tolist() == [0, 1, 2, 3] and found["scalar"].shape == ()


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_is_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": Evil()}, protocol=protocol))
    with pytest.raises(ConfigError, match="byte|opcode"):
        pickles.load("x.pkl")
    assert not (tmp_path / "pwned").exists()


def refused(tmp_path, data: bytes) -> str:
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as e:
        pickles.load(str(path))
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    return str(e.value)


def test_refusals_name_what_they_refuse(tmp_path):
    assert "posix.system" in refused(tmp_path, pickle.dumps(Evil(), protocol=4))
    assert "builtins.getattr" in refused(tmp_path, b"\x80\x03cbuiltins\ngetattr\n.")
    assert "dtype 'O'" in refused(tmp_path, pickle.dumps(np.array([{}, 1], object), protocol=4)).replace("O8", "O")
    structured = np.zeros(2, [("a", "f4"), ("b", "i4")])
    assert "dtype" in refused(tmp_path, pickle.dumps(structured, protocol=4))
    assert "_frombuffer" in refused(tmp_path, pickle.dumps(np.zeros(3), protocol=5))
    assert "_codecs.encode" in refused(tmp_path, pickle.dumps(np.zeros(3), protocol=2))
    loop = []
    loop.append(loop)
    assert "two places" in refused(tmp_path, pickle.dumps(loop, protocol=4))
    whole = pickle.dumps({"a": np.zeros(100)}, protocol=4)
    assert "whole" in refused(tmp_path, whole[:-40])
    assert "whole" in refused(tmp_path, b"")
    assert "no single result" in refused(tmp_path, b"\x80\x03cnumpy\nndarray\n.")


def test_an_array_with_too_few_bytes_is_refused(tmp_path):
    data = pickle.dumps(np.arange(4, dtype="<f4"), protocol=3)
    short = data.replace(b"C" + struct.pack("B", 16), b"C" + struct.pack("B", 12)).replace(bytes(4), b"", 1)
    assert "12 bytes for an array (4,)" in refused(tmp_path, short)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no.pkl"):
        pickles.load(str(tmp_path / "no.pkl"))


def test_what_the_standard_reader_would_have_run_is_harmless_here(tmp_path):
    # A REDUCE of dtype with a callable-looking name, and a BUILD of a dict: state for something that is no array.
    stream = io.BytesIO()
    stream.write(b"\x80\x03}(X\x01\x00\x00\x00aK\x01u}b.")
    assert "state of something else" in refused(tmp_path, stream.getvalue())
