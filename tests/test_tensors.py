"""Safetensors files: what the format's own library writes and reads, and headers that lie."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vidgen import tensors
from vidgen.config import ConfigError

ARRAYS = {
    "b/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a": np.array([1.5, -2.0, 0.25], ml_dtypes.bfloat16),
    "é": np.float16([[1], [2]]),
    "scalar": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False, True]),
}


def test_files_are_the_very_bytes_of_the_formats_own_library(tmp_path):
    save_file(ARRAYS, tmp_path / "theirs", metadata={"format": "pt"})
    tensors.write_all(str(tmp_path / "ours"), ARRAYS, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for found in (load_file(tmp_path / "ours"), tensors.read_all(str(tmp_path / "theirs"))):
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_rows_are_read_alone(tmp_path):
    tensors.write_all(str(tmp_path / "f"), ARRAYS)
    stored = tensors.header(str(tmp_path / "f"))[0]["b/kernel"]
    np.testing.assert_array_equal(stored.read(1, 2), ARRAYS["b/kernel"][1:2])
    np.testing.assert_array_equal(stored.read(1), ARRAYS["b/kernel"][1:])
    os.truncate(tmp_path / "f", stored.offset + 20)
    with pytest.raises(ConfigError, match="ended while it was read; expected 28 bytes more"):
        stored.read()


def test_the_writer_takes_what_the_header_says_and_all_of_it(tmp_path):
    text = tensors.header_of({"a": ((2,), "float32"), "b": ((1,), "float32")})
    path = str(tmp_path / "f")
    with pytest.raises(ValueError, match=r"a is float64 \(2,\); the header says"), tensors.Writer(path, text) as file:
        file.write("a", np.zeros(2))
    with pytest.raises(ValueError, match="b was not written"), tensors.Writer(path, text) as file:
        file.write("a", np.zeros(2, np.float32))


def file_of(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, data, length, says",
    [
        ({"a": entry()}, bytes(8), 2**40, "its header says that it is 1099511627776 bytes long, of 69"),
        ({"a": entry()}, bytes(8), 10**6, "its header says that it is 1000000 bytes long"),
        ({"a": entry()}, bytes(8), 20, "its header is not JSON"),
        (b"\xff\xfe{}", b"", None, "its header is not text"),
        (b"[]", b"", None, "not an object"),
        (b"[" * 100_000, b"", None, "its header is not JSON"),
        (b'{"a": 1, "a": 2}', b"", None, "a stands there twice"),
        ({"a": entry(offsets=(0, 12))}, bytes(12), None, r"a of shape \[2\] takes 8 bytes, not 12"),
        ({"a": entry(shape=(-2,))}, bytes(8), None, r"a has shape \[-2\]"),
        ({"a": entry(shape=(2.0,))}, bytes(8), None, r"a has shape \[2.0\]"),
        ({"a": entry(shape=(2**62, 2**62))}, bytes(8), None, "a has shape"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), None, "takes 8 bytes, not -8"),
        ({"a": entry(offsets=(0,))}, bytes(8), None, r"offsets \[0\]"),
        ({"a": entry(), "b": entry()}, bytes(8), None, "begins at byte"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None, "begins at byte"),
        ({"a": entry()}, bytes(7), None, "its arrays end at byte"),
        ({"a": entry()}, bytes(9), None, "its arrays end at byte"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, data, length, says):
    file_of(tmp_path / "f", header, data, length)
    with pytest.raises(ConfigError, match=f"f: not a whole safetensors file .*{says}"):
        tensors.header(str(tmp_path / "f"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="f: no such file; expected a safetensors file"):
        tensors.header(str(tmp_path / "f"))
    (tmp_path / "f").write_bytes(b"abc")
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        tensors.header(str(tmp_path / "f"))
    file_of(tmp_path / "f", {"a": entry(dtype="F4")}, bytes(8))
    with pytest.raises(ConfigError, match="a is of dtype 'F4'; known are BOOL"):
        tensors.header(str(tmp_path / "f"))
