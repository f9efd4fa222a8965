"""Reading what diffusers writes, without diffusers: names, layouts, dtypes, and one line for every bad input."""

import json
import math
import os
import pickle
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from vidgen import export_weights, import_weights, weights
from vidgen.config import ConfigError
from vidgen.interop import diffusers, wan_vae
from vidgen.tokenizers.vae import VAEConfig

CONFIG = VAEConfig(base_dim=4, z_dim=2, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
FILE = "diffusion_pytorch_model.safetensors"
KEY = "decoder.up_blocks.0.upsamplers.0.resample.1.weight"  # [4, 8, 3, 3]


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return weights.nest(
        {entry.path: rng.normal(size=entry.shape).astype(np.float32) for entry in wan_vae.entries(config)}
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory as diffusers would save it, of random weights."""
    base = tmp_path_factory.mktemp("exported")
    weights.save(str(base / "here"), "vae", CONFIG.to_dict(), random_params(CONFIG))
    export_weights.run(str(base / "here"), str(base / "there"))
    return base / "there"


@pytest.fixture
def model(exported, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(exported, tmp_path / "vae")
    return tmp_path / "vae"


def settings(directory, **changes):
    """Changes config.json; a value of ... takes the key away."""
    path = directory / "config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def tensors(directory, **changes):
    """Changes tensors of the file, keys with _ for a dot; a value of ... takes the key away."""
    found = weights.read_safetensors(str(directory / FILE)) | changes
    weights.write_safetensors(
        str(directory / FILE), {key: value for key, value in found.items() if value is not ...}, {"format": "pt"}
    )


def refused(directory, *parts):
    """Asserts one line that has all of `parts`."""
    with pytest.raises(ConfigError) as e:
        diffusers.load_component(directory)
    message = str(e.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_names_and_layouts():
    found = {entry.key: entry for entry in wan_vae.entries(CONFIG)}
    paths = [entry.path for entry in found.values()]
    assert len(set(paths)) == len(found) == len(paths)
    for key, stored, path in (
        ("encoder.conv_in.weight", (4, 3, 3, 3, 3), "encoder/conv_in/kernel"),
        ("encoder.down_blocks.1.resample.1.weight", (4, 4, 3, 3), "encoder/down_blocks_1/resample_kernel"),
        ("encoder.down_blocks.1.time_conv.bias", (4,), "encoder/down_blocks_1/time_conv_bias"),
        ("encoder.down_blocks.2.conv_shortcut.weight", (8, 4, 1, 1, 1), "encoder/down_blocks_2/conv_shortcut/kernel"),
        ("encoder.mid_block.attentions.0.to_qkv.weight", (24, 8, 1, 1), "encoder/mid_block/attentions_0/to_qkv/kernel"),
        ("encoder.mid_block.attentions.0.norm.gamma", (8, 1, 1), "encoder/mid_block/attentions_0/norm/gamma"),
        ("encoder.mid_block.resnets.1.norm2.gamma", (8, 1, 1, 1), "encoder/mid_block/resnets_1/norm2/gamma"),
        ("quant_conv.weight", (4, 4, 1, 1, 1), "quant_conv/kernel"),
        (KEY, (4, 8, 3, 3), "decoder/up_blocks_0/upsamplers_0/resample_kernel"),
        ("decoder.norm_out.gamma", (4, 1, 1, 1), "decoder/norm_out/gamma"),
    ):
        assert (found[key].stored, found[key].path) == (stored, path)
    entry = found["encoder.conv_in.weight"]
    array = np.arange(4 * 3 * 27, dtype=np.float32).reshape(4, 3, 3, 3, 3)
    flax = entry.to_flax(array)
    assert flax.shape == (3, 3, 3, 3, 4) and flax[0, 1, 2, 1, 3] == array[3, 1, 0, 1, 2]
    assert np.array_equal(entry.to_torch(flax), array)


def test_counts_of_the_released_shapes():
    wan21 = wan_vae.read_config({}, "config.json")
    assert wan21.stride == (4, 8, 8) and wan21.latents_mean[0] == -0.7571
    wan22 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
    wan22 = wan_vae.read_config(wan22 | {"in_channels": 12, "out_channels": 12, "clip_output": False}, "config.json")
    assert wan22.stride == (4, 16, 16) and wan22.latents_mean == ()  # 2.1's sixteen are nobody's choice here
    assert sum(math.prod(e.shape) for e in wan_vae.entries(wan21)) == 126_892_531
    assert sum(math.prod(e.shape) for e in wan_vae.entries(wan22)) == 704_688_668


def test_component_has_the_layouts_of_diffusers(exported):
    component = diffusers.load_component(exported)
    video = np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 4, 6))
    mean, logvar = component.encode(video)
    assert mean.shape == logvar.shape == (2, 2, 2, 2, 3) and mean.dtype == np.float32
    decoded = component.decode(100 * mean)
    assert decoded.shape == video.shape and decoded.dtype == np.float32
    assert np.abs(decoded).max() == 1  # clamped
    assert component.config["z_dim"] == 2 and component.config["dropout"] == 0.0
    for bad, message in (
        (np.zeros((1, 3, 4, 4, 4)), r"4 frames: expected 1 \+ a multiple of 2; nearest: 3 or 5"),
        (np.zeros((1, 3, 1, 5, 4)), "5 rows: expected a multiple of 2; nearest: 4 or 6"),
        (np.zeros((1, 3, 1, 4, 1)), "1 columns: expected a multiple of 2; nearest: 2"),
        (np.zeros((1, 1, 4, 4, 3)), r"expected \[B,3,T,H,W\].*transpose"),
        (np.zeros((3, 1, 4, 4)), r"\[3, 1, 4, 4\]: expected \[B,3,T,H,W\]"),
        (np.zeros((1, 3, 1, 4, 4), np.uint8), "uint8: expected floats"),
        (np.full((1, 3, 1, 4, 4), np.nan), r"video\[0, 0, 0, 0, 0\] is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            component.encode(bad)
    with pytest.raises(ValueError, match=r"expected \[B,z,t,y,x\] with 2 channels"):
        component.decode(np.zeros((1, 3, 1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="is inf"):
        component.decode(np.full((1, 2, 1, 2, 2), np.inf))


def test_a_pipeline_is_answered_with_its_vae(model, tmp_path):
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "X"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert diffusers.read(tmp_path).config == CONFIG
    shutil.rmtree(model)
    refused(tmp_path, "a pipeline without vae/config.json", "scheduler/ (X)", "vae/ (AutoencoderKLWan)")


def test_shards_are_read_by_their_index(model):
    whole = diffusers.read(model).flat
    found = weights.read_safetensors(str(model / FILE))
    os.remove(model / FILE)
    shards = {"a.safetensors": sorted(found)[::2], "b.safetensors": sorted(found)[1::2]}
    for file, keys in shards.items():
        weights.write_safetensors(str(model / file), {key: found[key] for key in keys})
    index = {key: file for file, keys in shards.items() for key in keys}
    path = model / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    read = diffusers.read(model)
    assert all(np.array_equal(read.flat[p], whole[p]) for p in whole) and len(read.flat) == len(found)

    path.write_text(
        json.dumps({"weight_map": index | {KEY: "a.safetensors" if index[KEY][0] == "b" else "b.safetensors"}})
    )
    refused(model, ".safetensors: ", KEY)
    path.write_text(json.dumps({"weight_map": index | {KEY: "../b.safetensors"}}))
    refused(model, KEY, "same directory")
    path.write_text(json.dumps({"weight_map": index | {KEY: "b.bin"}}))
    refused(model, KEY, "expected a safetensors file")
    path.write_text(json.dumps({"weight_map": index}))
    os.remove(model / "a.safetensors")
    refused(model, model / "a.safetensors", "no such file")


def test_tensors_that_do_not_fit_are_named(model):
    array = weights.read_safetensors(str(model / FILE))[KEY]
    tensors(model, **{KEY: array[:, :7]})
    refused(model, model / FILE, KEY, "[4, 7, 3, 3]", "expected [4, 8, 3, 3]")
    tensors(model, **{KEY: np.full_like(array, np.nan)})
    refused(model, model / FILE, KEY, "NaN")
    tensors(model, **{KEY: array.astype(np.int8)})
    refused(model, model / FILE, KEY, "I8", "expected F32, F16, BF16")
    tensors(model, **{KEY: array, KEY + "s": array})
    refused(model, model / FILE, KEY + "s", "[4, 8, 3, 3]", f"nearest that is: {KEY}")
    tensors(model, **{KEY: ..., KEY + "s": array})
    refused(model, model / FILE, f"no tensor {KEY} of shape [4, 8, 3, 3]", f"nearest there: {KEY}s")
    tensors(model, **{KEY: array, KEY + "s": ...})
    diffusers.load_component(model)
    whole = (model / FILE).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 4, 0):
        (model / FILE).write_bytes(whole[:size])
        refused(model, model / FILE, "not a whole safetensors file")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"attn_scales": [1.0]}, ["attn_scales=[1.0] is not implemented"]),
        ({"dropout": 0.1}, ["dropout=0.1 is not implemented"]),
        ({"in_channels": 12}, ["in_channels=12: expected 3"]),
        ({"patch_size": 2}, ["in_channels=3: expected 12"]),
        ({"patch_size": 1.5}, ["patch_size=1.5: expected a whole number"]),
        ({"z_dim": True}, ["z_dim=True"]),
        ({"dim_mult": [1, 2.5]}, ["dim_mult=[1, 2.5]"]),
        ({"dim_mult": [1, 2, 4]}, ["temporal_downsample", "expected 2 values"]),
        ({"temperal_downsample": [1]}, ["temperal_downsample=[1]"]),
        ({"temporal_downsample": [True]}, ["temporal_downsample is no setting", "nearest: temperal_downsample"]),
        ({"is_residual": "yes"}, ["is_residual='yes'"]),
        ({"latents_mean": [0.0] * 3}, ["latents_mean has 3 values; expected z_dim=2"]),
        ({"latents_std": "1"}, ["latents_std='1'"]),
        ({"latents_std": [1.0, 0.0]}, ["latents_std holds 0.0", "above 0"]),
        ({"latents_mean": [0.0, float("nan")]}, ["latents_mean holds nan"]),
        ({"base_dim": 8}, [FILE, "expected [16"]),
        ({"_class_name": "AutoencoderKLMagvit"}, ["'AutoencoderKLMagvit'", "known are AutoencoderKLWan"]),
        ({"_class_name": ...}, ["_class_name is None"]),
    ],
)
def test_settings_that_are_not_implemented_are_named(model, changes, parts):
    settings(model, **changes)
    refused(model, model, *parts)


def test_older_config_files_mean_what_they_meant(model):
    """Those of Wan 2.1 know nothing of the keys that came with 2.2."""
    newer = (
        "decoder_base_dim is_residual in_channels out_channels patch_size scale_factor_temporal scale_factor_spatial"
    )
    settings(model, _diffusers_version="0.33.0", **dict.fromkeys(newer.split(), ...))
    assert diffusers.read(model).config == CONFIG


def test_pickles_are_never_opened(model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    os.remove(model / FILE)
    refused(model, f"expected {FILE}")
    for name in ("diffusion_pytorch_model.bin", "Wan2.1_VAE.pth"):
        (model / name).write_bytes(pickle.dumps(Bomb()))
        refused(model, name, "a pickle", "save_pretrained")
        refused(model / name, name, "a pickle", "save_pretrained")
        os.remove(model / name)
    assert not (tmp_path / "ran").exists()


def test_places_that_are_none(model, tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such directory")
    refused(model / FILE, "expected the directory")
    refused(tmp_path, "config.json", "No such file")
    (model / "config.json").write_text("{")
    refused(model, "config.json: not JSON")
    (model / "config.json").write_text("[]")
    refused(model, "config.json: expected a JSON object")


def test_several_files_without_an_index_are_refused_but_a_variant_is_read(model):
    os.rename(model / FILE, model / "diffusion_pytorch_model.fp16.safetensors")
    assert diffusers.read(model).config == CONFIG
    shutil.copy(model / "diffusion_pytorch_model.fp16.safetensors", model / "other.safetensors")
    refused(model, "expected one", "other.safetensors")


def test_mixed_dtypes_come_back_bit_for_bit(model, tmp_path, capsys):
    found = weights.read_safetensors(str(model / FILE))
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    tensors(model, **{key: value.astype(kinds[i % 3]) for i, (key, value) in enumerate(found.items())})
    result = import_weights.run(str(model), str(tmp_path / "here"))
    assert re.fullmatch(r"float\w+ \(\d+ tensors\), \w+ \(\d+\), \w+ \(\d+\)", result.dtype)
    assert result.digest in capsys.readouterr().out
    export_weights.run(str(tmp_path / "here"), str(tmp_path / "back"))
    assert (tmp_path / "back" / FILE).read_bytes() == (model / FILE).read_bytes()
    # Weights that changed since are no longer what was imported.
    here = weights.load(str(tmp_path / "here"))
    here.params["quant_conv"]["bias"] += 1e-3
    weights.write_safetensors(str(tmp_path / "here" / weights.TENSORS), weights.flatten(here.params))
    assert export_weights.run(str(tmp_path / "here"), str(tmp_path / "again")).dtype == "float32"
