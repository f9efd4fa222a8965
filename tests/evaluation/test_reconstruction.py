"""The suite `reconstruction`: codecs, what is measured of them, and what is refused."""

import json
import os
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import evaluate, perceptual, weights
from vidgen.config import ConfigError, override
from vidgen.data.moving_shapes import MovingShapes
from vidgen.evaluation import codecs, quality, reconstruction
from vidgen.geometry import Geometry
from vidgen.tokenizers.vae import CausalVAE, VAEConfig
from vidgen.training.checkpoint import write_config

SHAPE = VAEConfig(base_dim=4, z_dim=3, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))


@pytest.fixture(scope="module")
def vae_params():
    shapes = jax.eval_shape(CausalVAE(SHAPE).init, jax.random.key(0), jnp.zeros((1, 3, 4, 4, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(scale=a.size**-0.25, size=a.shape).astype(np.float32), shapes)


@pytest.fixture
def config(tiny):
    return override(tiny, {"data.moving_shapes.sizes": ((5, 18, 16), (1, 16, 16)), "tokenizer.stride": (2, 4, 4)})


@pytest.fixture
def without_extras(monkeypatch):
    monkeypatch.setattr(perceptual, "missing", lambda name: f"{name} needs a package that is not installed")


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, (*size, 3)).astype(np.uint8)


def test_padding_repeats_the_last_frame_and_the_edges_and_is_cropped_back(config):
    geometry = Geometry((4, 8, 8), (1, 1, 2), 3)
    video = noise(3, 17, 10)
    wide = codecs.padded(video, geometry)
    assert wide.shape == (5, 24, 16, 3)
    np.testing.assert_array_equal(wide[:3, :17, :10], video)
    np.testing.assert_array_equal(wide[3:], wide[2:3].repeat(2, 0))
    np.testing.assert_array_equal(wide[:, 17:], wide[:, 16:17].repeat(7, 1))
    np.testing.assert_array_equal(wide[:, :, 10:], wide[:, :, 9:10].repeat(6, 2))
    for name in codecs.EXACT:
        codec = codecs.named(name, config.tokenizer)
        for size in ((3, 17, 10), (1, 4, 4), (4, 5, 7)):
            np.testing.assert_array_equal(codec.reconstruct(noise(*size)), noise(*size))
    assert codec.latent_values(4, 5, 7) == 3 * 2 * 2 * (3 * 2 * 4 * 4) and codec.tokens(4, 5, 7) == 12


def test_the_linear_baseline_keeps_what_varies_most():
    source = MovingShapes("easy", 16, ((5, 16, 16),), 8.0, ("en",), 0.2)
    clips = [source.read(i, 0).video for i in range(6)]
    found = codecs.linear((2, 4, 4), (1, 1, 1), (1, 8, 96, 500), clips)
    assert [c.channels for c in found] == [1, 8, 96]
    errors = [np.mean([quality.psnr(clip, c.reconstruct(clip)) for clip in clips]) for c in found]
    assert errors[0] < errors[1] - 3 and errors[2] == quality.CEILING
    # The same by hand: the largest variances of all coefficients, the rest at their means.
    tokenizer = codecs.base.BlockTokenizer(Geometry((2, 4, 4), (1, 1, 1), 96), "haar")
    latents = tokenizer.encode(jnp.asarray(np.stack(clips) / 127.5 - 1, jnp.float32)).reshape(-1, 96)
    cut = np.array(latents)
    drop = np.argsort(-cut.var(0))[8:]
    cut[:, drop] = cut[:, drop].mean(0)
    video = np.asarray(tokenizer.decode(cut.reshape(6, 3, 4, 4, 96)))
    video = np.round(np.clip((video + 1) * 127.5, 0, 255)).astype(np.uint8)
    np.testing.assert_allclose(video[2].astype(int), found[1].reconstruct(clips[2]), atol=1)
    with pytest.raises(ConfigError, match="none could be read"):
        codecs.linear((2, 4, 4), (1, 1, 1), (1,), [])


def test_a_suite_of_exact_linear_and_learned(config, vae_params, without_extras, tmp_path):
    run, vae = str(tmp_path / "run"), str(tmp_path / "a vae")
    write_config(run, config)
    weights.save(f"{vae}/weights", "vae", SHAPE.to_dict(), vae_params)
    results = evaluate.run(run, "reconstruction", tokenizers=("wavelet", vae, f"{vae}/weights"), clips=6)
    folder = os.path.join(run, "evaluation")
    with open(os.path.join(folder, "reconstruction.json"), encoding="utf-8") as f:
        assert json.load(f) == json.loads(json.dumps(results))

    assert results["tokenizer"] == "patch" and results["psnr"] == quality.CEILING and results["ssim"] > 0.9999
    assert results["lpips"] is None and results["fvd"] is None
    assert results["all_right"] == results["all_right_original"] > 0
    assert results["flicker_excess"] == results["unsteadiness"] == 0
    assert any("lpips needs a package" in note for note in results["notes"])
    groups = results["datasets"]["moving_shapes"]
    assert set(groups) == {"all", "5x18x16", "1x16x16"}
    names = [name for name, about in results["tokenizers"].items() if about["kind"] != "linear"]
    assert names == ["patch", "wavelet", "a vae"]  # the workdir and its weights/ are one
    clip = groups["5x18x16"]["a vae"]
    assert clip["psnr"] < 30 and clip["psnr_min"] <= clip["psnr"] and clip["unsteadiness"] > 0
    assert clip["latent_values_per_pixel_value"] == pytest.approx(3 * 3 * 9 * 8 / (5 * 18 * 16 * 3))
    assert clip["tokens_per_clip"] == 3 * 9 * 8
    assert groups["all"]["a vae"]["clips"] == 6 == len(results["per_clip"]["moving_shapes"]["a vae"])

    with open(os.path.join(folder, "compression.json"), encoding="utf-8") as f:
        rows = json.load(f)["rows"]
    lines = [row for row in rows if row["kind"] == "linear"]
    assert {tuple(row["stride"]) for row in lines} == {(2, 4, 4), (2, 2, 2)}
    assert any(row["stride"] == [2, 2, 2] and row["tokenizer"].endswith(", 3") for row in lines)
    ET.parse(os.path.join(folder, "compression.svg"))
    for name in ("reconstruction", "reconstruction_worst", "reconstruction_a_vae", "reconstruction_worst_a_vae"):
        assert os.path.getsize(os.path.join(folder, f"{name}.gif")) and os.path.exists(f"{folder}/{name}.mp4")
    told = evaluate.table(results)
    assert "a vae" in told and "linear 2x4x4" in told and "note: not measured" in told and "%" in told


def test_a_vae_run_is_its_own_and_frames_are_cropped(config, vae_params, without_extras, tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    write_config(run, override(config, {"task": "vae"}))
    weights.save(f"{run}/weights", "vae", SHAPE.to_dict(), vae_params)
    # FVD of stand-in features: the clips' mean colours.
    monkeypatch.setattr(perceptual, "missing", lambda name: "no LPIPS" if name == "lpips" else "")
    monkeypatch.setattr(reconstruction.i3d, "load", dict)
    monkeypatch.setattr(reconstruction.i3d, "LEAST", 3)
    monkeypatch.setattr(reconstruction.fvd, "features", lambda _, clips: np.stack([c.mean((0, 1, 2)) for c in clips]))
    results = evaluate.run(run, clips=8, frames=4)
    assert results["suite"] == "reconstruction" and results["tokenizer"] == "run"
    groups = results["datasets"]["moving_shapes"]
    assert set(groups) == {"all", "4x18x16", "1x16x16"}
    long = groups["4x18x16"]["run"]
    assert long["fvd"] > 0 and long["fvd_clips"] == long["clips"] == groups["all"]["run"]["fvd_clips"]
    assert groups["1x16x16"]["run"]["fvd"] is None
    # The judge's truth is of whole clips, the boxes' is of every frame.
    assert long["all_right"] is None and long["box_psnr"] > 0 and groups["1x16x16"]["run"]["all_right"] is not None
    assert any("only relative" in note for note in results["notes"])


def test_weights_that_are_no_numbers_are_refused(config, vae_params, without_extras, tmp_path):
    for broken, what in (("encoder", "no finite|finite numbers|NaN"), ("decoder", "NaN")):
        bad = jax.tree.map(np.array, vae_params)
        kernel = bad[broken]["conv_in"]["kernel"]
        kernel[:] = np.nan
        weights.save(str(tmp_path / "vae"), "vae", SHAPE.to_dict(), bad)
        codec = codecs.named(str(tmp_path / "vae"), config.tokenizer)
        with pytest.raises(ConfigError, match=what):
            codec.reconstruct(noise(3, 4, 4))


def test_what_it_cannot_do_is_said_in_a_line(config, without_extras, tmp_path):
    run = str(tmp_path / "run")
    write_config(run, config)
    for arguments, words in (
        ({"tokenizers": ("wavelett",)}, "did you mean wavelet"),
        ({"tokenizers": (str(tmp_path),)}, "weights"),
        ({"inputs": ("moving_shape",)}, "did you mean moving_shapes"),
        ({"clips": 0}, "--clips=0"),
        ({"frames": -1}, "--frames=-1|sample.frames"),
        ({"prompts": 3}, "--prompts has no meaning with --suite reconstruction"),
        ({"solver": "heun"}, "--solver has no meaning"),
        ({"step": 5}, "--step has no meaning"),
    ):
        with pytest.raises(ConfigError, match=words) as e:
            evaluate.run(run, "reconstruction", **arguments)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="--tokenizer has no meaning with --suite moving_shapes"):
        evaluate.run(run, "moving_shapes", tokenizers=("patch",))
    write_config(str(tmp_path / "v"), override(config, {"task": "vae"}))
    with pytest.raises(ConfigError, match="vidgen evaluate --suite reconstruction"):
        evaluate.run(str(tmp_path / "v"), "moving_shapes")
    with pytest.raises(ConfigError, match="weights"):
        evaluate.run(str(tmp_path / "v"), "reconstruction")


def test_clips_that_cannot_be_read_are_counted(config):
    class Broken:
        sizes = range(3)

        def read(self, index, epoch):
            raise reconstruction.BadClip("it is torn")

    with pytest.raises(ConfigError, match="no clip could be used.*it is torn.*3"):
        reconstruction._measure(Broken(), [], 3, 0, reconstruction.Judges(None, None, ()))
