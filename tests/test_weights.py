"""Directories of weights: what comes back, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from vidgen import weights
from vidgen.config import ConfigError

PARAMS = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(3, ml_dtypes.bfloat16)}


def test_round_trip(tmp_path):
    weights.save(str(tmp_path / "w"), "vae", {"x": [1, 2]}, PARAMS)
    got = weights.load(str(tmp_path / "w"), "vae")
    assert (got.kind, got.config) == ("vae", {"x": [1, 2]})
    assert got.params["b"].dtype == np.float32 and (got.params["b"] == 1).all()
    np.testing.assert_array_equal(got.params["a"]["kernel"], PARAMS["a"]["kernel"])
    assert got.digest == weights.digest("vae", {"x": [1, 2]}, weights.flatten(PARAMS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"]
    # Others may read them.
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in (tmp_path / "w").iterdir())


def test_flatten_takes_shapes_too():
    like = {"a": {"b": np.dtype(np.float32)}, "c": None}
    assert weights.flatten(like) == {"a/b": np.dtype(np.float32), "c": None} and weights.nest({"a/b": 1}) == {
        "a": {"b": 1}
    }


def test_the_digest_sees_every_bit(tmp_path):
    flat = weights.flatten(PARAMS)
    other = flat | {"a/kernel": np.nextafter(flat["a/kernel"], np.float32(9))}
    digests = {
        weights.digest("vae", {}, flat),
        weights.digest("vae", {}, other),
        weights.digest("vae", {"x": 1}, flat),
        weights.digest("dit", {}, flat),
        weights.digest("vae", {}, flat | {"a/kernel": flat["a/kernel"].reshape(3, 2)}),
    }
    assert len(digests) == 5


def test_saving_again_replaces(tmp_path):
    weights.save(str(tmp_path / "w"), "vae", {}, PARAMS)
    weights.save(str(tmp_path / "w"), "vae", {"new": 1}, PARAMS)
    assert weights.load(str(tmp_path / "w")).config == {"new": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"]


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="thesis.tex"):
        weights.save(str(tmp_path), "vae", {}, PARAMS)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_find(tmp_path):
    weights.save(str(tmp_path / "run" / "weights"), "vae", {}, PARAMS)
    inside = str(tmp_path / "run" / "weights")
    assert weights.find(str(tmp_path / "run")) == weights.find(inside) == inside
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "younger").mkdir()  # no checkpoint yet
    (tmp_path / "younger" / "config.json").write_text('{"task": "vae"}')
    for name in ("young", "younger"):
        with pytest.raises(ConfigError, match=f"{name}/weights.json: .*a workdir without weights/"):
            weights.find(str(tmp_path / name))
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match="model.pth: a file; expected a directory.*pickle.*never read"):
        weights.find(str(tmp_path / "model.pth"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="vidgen import"):
        weights.find(str(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match="weights.json"):
        weights.find(str(tmp_path / "nowhere"))


def test_damage_is_named(tmp_path):
    weights.save(str(tmp_path / "w"), "vae", {}, PARAMS)
    with pytest.raises(ConfigError, match="expected 'dit'"):
        weights.load(str(tmp_path / "w"), "dit")
    file = tmp_path / "w" / weights.TENSORS
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="weights.safetensors: not a whole safetensors file"):
        weights.load(str(tmp_path / "w"))
    file.unlink()
    with pytest.raises(ConfigError, match="weights.safetensors: no such file"):
        weights.load(str(tmp_path / "w"))
    (tmp_path / "w" / weights.JSON).write_text("[]")
    with pytest.raises(ConfigError, match="not what vidgen writes"):
        weights.load(str(tmp_path / "w"))
