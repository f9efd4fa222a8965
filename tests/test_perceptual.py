"""Pretrained weights are found, compared with their hashes, converted once, and made again where they are damaged."""

import dataclasses
import os

import numpy as np
import pytest

from vidgen import perceptual
from vidgen.config import ConfigError


@pytest.mark.parametrize("name", list(perceptual.ASSETS))
def test_weights_are_converted_once_and_kept(name, tmp_path, monkeypatch):
    if reason := perceptual.missing(name):
        pytest.skip(reason)
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "cache"))
    made = perceptual.load(name)
    (file,) = os.listdir(tmp_path / "cache")
    path = tmp_path / "cache" / file
    whole = path.read_bytes()
    converted = []
    asset = perceptual.ASSETS[name]
    watched = dataclasses.replace(asset, convert=lambda tree: converted.append(1) or asset.convert(tree))
    monkeypatch.setitem(perceptual.ASSETS, name, watched)
    again = perceptual.load(name)
    assert not converted
    flat, flat_again = (perceptual.weights.flatten(tree) for tree in (made, again))
    assert all(np.array_equal(flat[key], flat_again[key]) for key in flat) and flat.keys() == flat_again.keys()

    damaged = bytearray(whole)
    damaged[-1000] ^= 1
    for bad in (bytes(damaged), whole[:1000]):
        path.write_bytes(bad)
        perceptual.load(name)
        assert path.read_bytes() == whole
    assert len(converted) == 2

    other = dataclasses.replace(watched, sha256="0" * 64)
    monkeypatch.setitem(perceptual.ASSETS, name, other)
    path.unlink()
    with pytest.raises(ConfigError, match=f"expected {'0' * 64}: install {asset.package} again"):
        perceptual.load(name)


def test_what_is_not_installed_is_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    for name, package in (("lpips", "no-such-package"), ("i3d", "numpy")):
        monkeypatch.setitem(
            perceptual.ASSETS, name, dataclasses.replace(perceptual.ASSETS[name], package=package, version="0.0.1")
        )
        with pytest.raises(ConfigError, match=rf"{package}.*pip install 'vidgen\[perceptual\]'"):
            perceptual.load(name)
    assert not os.listdir(tmp_path)


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    if reason := perceptual.missing("lpips"):
        pytest.skip(reason)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "file" / "cache"))
    assert perceptual.load("lpips")["head_0"].shape == (64,)
