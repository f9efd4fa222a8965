"""The VAE against diffusers' own, on the same weights; needs the extra [peers]."""

import functools
import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers as hf
import torch
import wan_torch

from vidgen import export_weights, import_weights, weights
from vidgen.interop import diffusers, wan_vae
from vidgen.tokenizers.vae import VAEConfig

# Tested is arithmetic; tests/peers/vae_speed.py compares what the compiler makes of it at its best.
pytestmark = pytest.mark.usefixtures("quick_compiles")

# Settings, and how many pixels a latent covers in height and width.
SHAPES = {
    "wan21": (wan_torch.WAN21, 8),
    "wan22": (wan_torch.WAN22, 16),
    "three_levels": (
        {"base_dim": 12, "z_dim": 5, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]},
        4,
    ),
    "half_the_frames": (
        {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, False]},
        4,
    ),
    "all_frames": (
        {"base_dim": 4, "z_dim": 3, "dim_mult": [2, 3], "num_res_blocks": 2, "temperal_downsample": [False]},
        2,
    ),
}
CASES = [  # a clip of 17 frames is a chunk of 5 as the others', and three of 4 that go on
    *((name, batch, frames) for name in ("wan21", "wan22") for batch, frames in ((1, 1), (2, 5), (2, 17))),
    *((name, 2, 5) for name in ("three_levels", "all_frames")),
    ("half_the_frames", 1, 21),  # two time chunks
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name → (diffusers' model, ours of its files, pixels that a latent covers)."""

    @functools.cache
    def make(name):
        settings, stride = SHAPES[name]
        directory = tmp_path_factory.mktemp(name)
        theirs = wan_torch.make_vae(**settings)
        theirs.save_pretrained(directory)
        return theirs, diffusers.load_component(directory), stride

    return make


@pytest.mark.parametrize("name, batch, frames", CASES)
def test_moments_and_video_are_those_of_diffusers(pairs, name, batch, frames):
    theirs, ours, stride = pairs(name)
    video = wan_torch.make_clip(batch, frames, 2 * stride, stride)
    expected, found = wan_torch.encode(theirs, video), ours.encode(video)
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * min(1, a.std()))
    latents = np.random.default_rng(1).normal(size=expected[0].shape).astype(np.float32)
    a, b = wan_torch.decode(theirs, latents), ours.decode(latents)
    assert a.shape == b.shape == video.shape
    assert (np.abs(a) < 1).mean() > 0.5  # what is clamped compares nothing
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * min(1, a.std()))


def test_counts_of_the_released_shapes():
    wan21 = wan_vae.read_config({}, "config.json")
    wan22 = wan_vae.read_config(
        wan_torch.WAN22 | {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "num_res_blocks": 2}, "config.json"
    )
    for config, count in ((wan21, 126_892_531), (wan22, 704_688_668)):
        assert sum(math.prod(e.shape) for e in wan_vae.entries(config)) == count
        with torch.device("meta"):
            theirs = hf.AutoencoderKLWan(**wan_vae.write_config(config))
        expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
        assert {entry.key: entry.stored for entry in wan_vae.entries(config)} == expected


@pytest.mark.parametrize("name", ["wan21", "wan22"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_import_and_export_give_back_the_very_bytes(name, dtype, tmp_path):
    theirs = wan_torch.make_vae(**SHAPES[name][0]).to(dtype)
    theirs.save_pretrained(tmp_path / "there")
    import_weights.run(str(tmp_path / "there"), str(tmp_path / "here"))
    export_weights.run(str(tmp_path / "here"), str(tmp_path / "back"))
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


def test_diffusers_loads_what_a_run_exports(tmp_path):
    """Weights that were never diffusers': its `from_pretrained` takes them and computes the same."""
    config = VAEConfig(6, 0, 3, (1, 2), 1, (True,), latents_mean=(0.5, 0.0, -0.5), latents_std=(1.0, 2.0, 3.0))
    rng = np.random.default_rng(3)
    flat = {entry.path: 0.3 * rng.normal(size=entry.shape).astype(np.float32) for entry in wan_vae.entries(config)}
    weights.save(str(tmp_path / "run" / "weights"), "vae", config.to_dict(), weights.nest(flat))
    export_weights.run(str(tmp_path / "run"), str(tmp_path / "out"))
    theirs, ours = hf.AutoencoderKLWan.from_pretrained(tmp_path / "out"), diffusers.load_component(tmp_path / "out")
    assert theirs.config.latents_std == [1.0, 2.0, 3.0] and theirs.config.scale_factor_temporal == 2
    assert theirs.spatial_compression_ratio == 2
    clip = wan_torch.make_clip(1, 5, 8, 6)
    mean, logvar = ours.encode(clip)
    np.testing.assert_allclose(mean, wan_torch.encode(theirs, clip)[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logvar, wan_torch.encode(theirs, clip)[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.decode(mean), wan_torch.decode(theirs, mean), rtol=0, atol=1e-5)


def test_shards_are_one_model(tmp_path):
    theirs = wan_torch.make_vae(**wan_torch.WAN21)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = diffusers.read(tmp_path / "whole"), diffusers.read(tmp_path / "shards")
    assert whole.flat.keys() == shards.flat.keys()
    assert all(np.array_equal(whole.flat[path], shards.flat[path]) for path in whole.flat)
