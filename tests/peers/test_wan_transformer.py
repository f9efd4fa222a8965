"""Wan's transformers as configs of the packed DiT, against diffusers with the same random weights."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers as hf
import torch
import transformers_torch as peers

from vidgen import export_weights, import_weights
from vidgen.batch import TokenBatch
from vidgen.geometry import patchify
from vidgen.interop import diffusers, packed, wan_transformer

pytestmark = pytest.mark.usefixtures("quick_compiles")
LIMIT = 2e-4  # max abs difference, of outputs of a standard deviation around 1

# Settings of no released model.
SHAPES = {
    "t2v": {},
    "three_heads_of_24": {"num_attention_heads": 3, "attention_head_dim": 24, "ffn_dim": 100, "num_layers": 1},
    "one_head_of_40": {"num_attention_heads": 1, "attention_head_dim": 40, "patch_size": [2, 1, 3]},
    "patch_of_one": {"patch_size": [1, 1, 1], "in_channels": 5, "out_channels": 3},
    "i2v_22": {"in_channels": 36, "out_channels": 16},
    "i2v_21": {"in_channels": 36, "out_channels": 16, "image_dim": 20, "added_kv_proj_dim": 32},
    "flf2v_21": {
        "in_channels": 36,
        "out_channels": 16,
        "image_dim": 20,
        "added_kv_proj_dim": 32,
        "pos_embed_seq_len": 514,
    },
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name → (diffusers' model, ours of its files)."""

    @functools.cache
    def make(name):
        directory = tmp_path_factory.mktemp(name)
        theirs = peers.make_wan(**SHAPES[name])
        theirs.save_pretrained(directory)
        return theirs, diffusers.load_component(directory)

    return make


def inputs(name, batch, grid):
    """Noisy latents of `grid` tokens, text, and image features or None."""
    settings = peers.WAN | SHAPES[name]
    size = [n * p for n, p in zip(grid, settings["patch_size"], strict=True)]
    x = peers.normal(batch, settings["in_channels"], *size, seed=batch)
    image = None
    if "pos_embed_seq_len" in settings:
        image = peers.normal(2 * batch, 257, 20, seed=5)
    elif "image_dim" in settings:
        image = peers.normal(batch, 257, 20, seed=5)
    # diffusers takes what stands before the last 512 places for the image's.
    return x, peers.normal(batch, 512 if image is not None else 19, 24, seed=7), image


def same(theirs, ours):
    assert theirs.shape == ours.shape
    assert theirs.std() > 0.3  # of zeros anything would be right
    assert np.abs(theirs - ours).max() < LIMIT


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch, grid", [(1, (3, 3, 5)), (3, (1, 2, 3))])
def test_the_prediction_is_that_of_diffusers(pairs, name, batch, grid):
    theirs, ours = pairs(name)
    x, text, image = inputs(name, batch, grid)
    timestep = np.array([999.0, 0.0, 417.25][:batch], np.float32)
    same(peers.call(theirs, x, timestep, text, image), ours(x, timestep, text, image))


def test_a_timestep_for_each_token(pairs):
    theirs, ours = pairs("t2v")
    x, text, _ = inputs("t2v", 2, (3, 3, 5))
    timestep = np.full((2, 45), 731.0, np.float32)
    timestep[:, :15] = 0  # as where the first frame is given
    timestep[1, 20:30] = np.arange(10) * 100.0
    expected = peers.call(theirs, x, timestep, text)
    same(expected, ours(x, timestep, text))
    assert np.abs(expected - peers.call(theirs, x, timestep[:, -1], text)).max() > 0.05


def test_images_and_text_matter(pairs):
    """What parity would not show if both looked away."""
    _, ours = pairs("flf2v_21")
    x, text, image = inputs("flf2v_21", 1, (3, 3, 5))
    before = ours(x, np.array([500.0]), text, image)
    assert np.abs(before - ours(x, np.array([500.0]), text, image[::-1])).max() > 1e-3  # last image first
    assert np.abs(before - ours(x, np.array([500.0]), text[:, ::-1] * 2, image)).max() > 1e-2


def test_a_packed_row_of_three_clips_is_the_three_alone(pairs):
    _, ours = pairs("i2v_21")
    c, sizes = ours.architecture, ((2, 3, 3), (1, 2, 5), (3, 1, 2))
    clips = [inputs("i2v_21", 1, grid) for grid in sizes]
    times = np.array([900.0, 350.0, 20.0], np.float32)
    alone = [ours(x, times[k : k + 1], text, image) for k, (x, text, image) in enumerate(clips)]

    def joined(arrays, spare=0):
        return np.concatenate([*arrays, np.full((1, spare, arrays[0].shape[-1]), 3.0, np.float32)], axis=1)

    def segments(lengths, spare=0):
        return (
            np.repeat(np.arange(1, 4), lengths).astype(np.int32)[None]
            if not spare
            else np.concatenate([segments(lengths), np.zeros((1, spare), np.int32)], axis=1)
        )

    lengths = [int(np.prod(grid)) for grid in sizes]
    latents = [np.moveaxis(x, 1, -1) for x, _, _ in clips]
    noisy = joined([patchify(x[..., : c.channels], c.patch) for x in latents], 3)
    cond = joined([patchify(x[..., c.channels :], c.patch) for x in latents], 3)
    segment = segments(lengths, 3)
    context = {
        "text": (joined([text for _, text, _ in clips], 5), segments([512] * 3, 5)),
        "image": (joined([image for _, _, image in clips], 2), segments([257] * 3, 2)),
    }
    coords = joined([packed.grid_coords(grid)[None] for grid in sizes], 3)
    batch = TokenBatch(None, coords, segment, level=segment, cond=cond, context=context)
    levels = np.concatenate([[0.0], times / 1000]).astype(np.float32)[None]
    out = np.asarray(packed.predict(ours.module, ours.params, noisy, levels, batch))
    at = 0
    for k, n in enumerate(lengths):
        expected = patchify(np.moveaxis(alone[k], 1, -1), c.patch)
        assert np.abs(out[:, at : at + n] - expected).max() < 1e-5, f"clip {k}"
        at += n


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_all_of_them(name):
    theirs = peers.make_wan(**SHAPES[name])
    config = wan_transformer.read_config(peers.WAN | SHAPES[name], "config.json")
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {entry.key: entry.stored for entry in wan_transformer.entries(config)} == expected
    written = wan_transformer.write_config(config)
    assert written == {
        key: list(v) if isinstance(v, tuple) else v for key, v in theirs.config.items() if key in written
    }


RELEASED = {
    "1.3B": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1_418_996_800),
    "14B": ({}, 14_288_491_584),
    "TI2V-5B": (
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        4_999_787_712,
    ),
    "I2V-14B": ({"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, None),
    "FLF2V-14B": (
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
        None,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_sizes_on_abstract_shapes(name):
    settings, count = RELEASED[name]
    with torch.device("meta"):
        theirs = hf.WanTransformer3DModel(**settings)
    config = wan_transformer.read_config(settings, "config.json")
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    entries = wan_transformer.entries(config)
    assert {entry.key: entry.stored for entry in entries} == expected
    total = sum(int(np.prod(entry.shape)) for entry in entries)
    assert total == sum(p.numel() for p in theirs.parameters()) and count in (None, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_give_back_the_very_bytes(dtype, tmp_path):
    peers.make_wan(**SHAPES["flf2v_21"]).to(dtype).save_pretrained(tmp_path / "there")
    import_weights.run(str(tmp_path / "there"), str(tmp_path / "here"))
    export_weights.run(str(tmp_path / "here"), str(tmp_path / "back"))
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
