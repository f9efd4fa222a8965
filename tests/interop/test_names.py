"""Both names of every tensor of the transformers, and how the one lies where the other does."""

import numpy as np
import pytest

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.interop import arrays, checkpoint, diffusers, dit_transformer, names, packed, wan_transformer
from vidgen.interop.names import Entry

WAN = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 6, "ffn_dim": 10, "num_layers": 2}
IMAGE = {"in_channels": 36, "image_dim": 4, "added_kv_proj_dim": 32, "pos_embed_seq_len": 6}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4, "num_embeds_ada_norm": 3}
CONFIGS = {
    "wan": wan_transformer.read_config(WAN | {"patch_size": [2, 1, 3], "in_channels": 3, "out_channels": 3}, "f"),
    "wan_image": wan_transformer.read_config(WAN | IMAGE, "f"),
    "dit": dit_transformer.read_config(DIT, "f"),
    "dit_sigma": dit_transformer.read_config(DIT | {"out_channels": 8, "patch_size": 1}, "f"),
}


def entries_of(name):
    module = wan_transformer if name.startswith("wan") else dit_transformer
    return module.entries(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_comes_back_as_it_was(name):
    for entry in entries_of(name):
        array = np.arange(np.prod(entry.stored), dtype=np.float32).reshape(entry.stored)
        flax = entry.to_flax(array)
        assert flax.shape == entry.shape
        np.testing.assert_array_equal(entry.to_torch(flax), array, err_msg=entry.key)
        assert np.array_equal(np.sort(flax, axis=None), array.ravel()), entry.key  # each number, once


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_name_and_every_layer_is_there(name):
    rows = names.stacks(entries_of(name))
    assert {path: names.whole_shape(found) for path, found in rows.items()} == packed.shapes(CONFIGS[name])
    for path, found in rows.items():
        assert [entry.layer for entry in found] == ([0, 1] if path.startswith(("blocks", "levels")) else [None])


def test_some_by_hand():
    found = {entry.key: entry for entry in entries_of("wan_image")}
    for key, stored, path, layer in (
        ("patch_embedding.weight", (32, 36, 1, 2, 2), "embed/kernel", None),
        ("scale_shift_table", (1, 2, 32), "final_table", None),
        ("blocks.1.scale_shift_table", (1, 6, 32), "blocks/modulation_table", 1),
        ("blocks.0.norm2.weight", (32,), "blocks/cross_norm/scale", 0),
        ("blocks.1.attn1.to_out.0.bias", (32,), "blocks/attention/out/bias", 1),
        ("blocks.0.attn2.add_k_proj.weight", (32, 32), "blocks/cross/image_key/kernel", 0),
        ("blocks.0.attn2.norm_added_k.weight", (32,), "blocks/cross/image_key_norm/scale", 0),
        ("blocks.1.ffn.net.2.weight", (32, 10), "blocks/mlp/down/kernel", 1),
        ("condition_embedder.time_proj.weight", (192, 32), "modulation/kernel", None),
        ("condition_embedder.image_embedder.pos_embed", (1, 6, 4), "image/place_table", None),
    ):
        assert (found[key].stored, found[key].path, found[key].layer) == (stored, path, layer)

    # A patch's numbers: channel, t, y, x there; here t, y, x, channel, the 16 noisy ones of all latents first.
    entry = found["patch_embedding.weight"]
    kernel = np.random.default_rng(0).normal(size=entry.stored)
    ours = entry.to_flax(kernel)
    assert ours[2 * 16 + 5, 7] == kernel[7, 5, 0, 1, 0]
    assert ours[64 + 1 * 20 + 3, 7] == kernel[7, 16 + 3, 0, 0, 1]

    # Numbers that turn together: neighbours there; here one in each half of a head. Of values nothing turns.
    for key in ("blocks.0.attn1.to_q.weight", "blocks.0.attn1.norm_k.weight"):
        array = np.random.default_rng(0).normal(size=found[key].stored)
        ours = found[key].to_flax(array)
        assert np.array_equal(ours[..., 16 + 3], array[16 + 6].T) and np.array_equal(ours[..., 24 + 3], array[16 + 7].T)
    assert found["blocks.0.attn1.to_v.weight"].outputs is None and found["blocks.0.attn2.to_q.weight"].outputs is None

    # Prediction and variance of a latent side by side there; here all predictions first.
    head = {entry.key: entry for entry in entries_of("dit_sigma")}["proj_out_2.bias"]
    assert np.array_equal(head.to_flax(np.arange(8)), np.arange(8))
    four = dit_transformer.entries(dit_transformer.read_config(DIT | {"out_channels": 8}, "f"))
    head = {entry.key: entry for entry in four}["proj_out_2.bias"]
    assert head.to_flax(np.arange(32)).tolist()[:9] == [0, 1, 2, 3, 8, 9, 10, 11, 16]


def saved(directory, entries, change=None):
    """A directory of random tensors under the names of there, as a checkpoint."""
    rng = np.random.default_rng(0)
    tensors = {entry.key: rng.normal(size=entry.stored).astype(np.float32) for entry in entries}
    tensors |= change(tensors) if change else {}
    weights.write_safetensors(str(directory / checkpoint.TENSORS), tensors, {"format": "pt"})
    (directory / checkpoint.CONFIG).write_text("{}")
    return checkpoint.open_directory(str(directory)), tensors


def read(entries, found):
    there = arrays.of_checkpoint(entries, found)
    return {path: there.read(path) for path in there.specs}


def written(directory, config, flat):
    """The tensors of the files that diffusers is to read."""
    directory.mkdir()
    diffusers.write(str(directory), packed.KIND, config.to_dict(), arrays.of_flat(flat, "here"))
    there = checkpoint.open_directory(str(directory))
    return {key: there.read(key) for key in there.tensors}


@pytest.mark.parametrize("name", CONFIGS)
def test_files_to_arrays_and_back(name, tmp_path):
    found, tensors = saved(tmp_path, entries_of(name))
    flat = read(entries_of(name), found)
    assert {path: x.shape for path, x in flat.items()} == packed.shapes(CONFIGS[name])
    back = written(tmp_path / "out", CONFIGS[name], flat)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[key], tensors[key]) for key in back)


def test_one_array_under_several_keys(tmp_path):
    """The published DiTs: every block holds the same embedding of noise levels."""
    separate = entries_of("dit")

    def tie(tensors):
        return {key: tensors[key.replace(".1.norm1.emb.", ".0.norm1.emb.")] for key in tensors}

    found, tensors = saved(tmp_path, separate, tie)
    config = dit_transformer.settle(CONFIGS["dit"], found)
    assert CONFIGS["dit"]["level_per_block"] and not config["level_per_block"]
    tied = dit_transformer.entries(config)
    assert {entry.key for entry in tied} == {entry.key for entry in separate}
    flat = read(tied, found)
    assert flat["class_embedding"].shape == (4, 16) and flat["level_in/kernel"].shape == (256, 16)
    back = written(tmp_path / "out", config, flat)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)

    def spoil(tensors):
        key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
        return tie(tensors) | {key: tensors[key] + 1}

    spoilt, _ = saved(tmp_path, separate, spoil)
    assert dit_transformer.settle(CONFIGS["dit"], spoilt)["level_per_block"]
    with pytest.raises(ConfigError, match="transformer_blocks.1.*differs from transformer_blocks.0.*the same values"):
        read(tied, spoilt)


def test_arrays_that_do_not_fit_are_named(tmp_path):
    flat = {path: np.zeros(shape, np.float32) for path, shape in packed.shapes(CONFIGS["wan"]).items()}
    up, gate = "blocks/mlp/up/kernel", "blocks/mlp/gate/kernel"
    for n, (wrong, says) in enumerate(
        (
            (flat | {up: np.zeros((1, 32, 10))}, rf"{up} has shape \[1, 32, 10\]; expected \[2,"),
            (flat | {gate: np.zeros((2, 32, 10))}, f"not of this model: array {gate}"),
            ({path: x for path, x in flat.items() if path != "head/bias"}, "no array head/bias"),
        )
    ):
        with pytest.raises(ConfigError, match=f"here: {says}"):
            written(tmp_path / str(n), CONFIGS["wan"], wrong)


def test_a_bias_keeps_its_order_unless_told():
    entry = Entry("x/bias", (4,), "x.bias", (4,))
    assert np.array_equal(entry.to_flax(np.arange(4)), np.arange(4))
    turned = Entry("x/kernel", (2, 3), "x.weight", (3, 2), None, (1, 0), (2, 0, 1))
    theirs = np.arange(6).reshape(3, 2)
    ours = turned.to_flax(theirs)
    assert all(ours[i, j] == theirs.T[(1, 0)[i], (2, 0, 1)[j]] for i in range(2) for j in range(3))
