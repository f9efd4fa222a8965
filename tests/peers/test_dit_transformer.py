"""diffusers' DiT as a config of the packed DiT, with the same random weights."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import transformers_torch as peers

from vidgen import export_weights, import_weights
from vidgen.interop import diffusers, dit_transformer

pytestmark = pytest.mark.usefixtures("quick_compiles")
LIMIT = 2e-4  # max abs difference, of outputs of a standard deviation around 1

SHAPES = {
    "sigma": {},
    "untied": {"tied": False},
    "no_sigma": {"out_channels": None, "num_attention_heads": 3, "attention_head_dim": 40, "num_layers": 1},
    "patch_of_three": {"patch_size": 3, "sample_size": 9, "attention_head_dim": 24, "norm_eps": 1e-2},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name → (diffusers' model, ours of its files)."""

    @functools.cache
    def make(name):
        directory = tmp_path_factory.mktemp(name)
        theirs = peers.make_dit(**SHAPES[name])
        theirs.save_pretrained(directory)
        return theirs, diffusers.load_component(directory)

    return make


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch, side", [(1, 4), (3, 3), (2, 7)])  # in patches; 4 or 3 is the size of the positions
def test_the_prediction_is_that_of_diffusers(pairs, name, batch, side):
    theirs, ours = pairs(name)
    assert ours.architecture["level_per_block"] == (name == "untied")
    size = side * ours.architecture.patch[1]
    x = peers.normal(batch, 3, size, size)
    timestep, labels = np.array([999, 0, 417][:batch]), np.array([3, 10, 0][:batch])
    expected = peers.call(theirs, x, timestep, labels)
    found = ours(x, timestep, labels)
    assert expected.shape == found.shape and expected.std() > 0.3
    assert np.abs(expected - found).max() < LIMIT
    if batch == 3:  # what is told matters
        assert np.abs(found - ours(x, timestep, labels[::-1])).max() > 1e-2


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_all_of_them(pairs, name):
    theirs, ours = pairs(name)
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {e.key: e.stored for e in dit_transformer.entries(ours.architecture)} == expected
    written = dit_transformer.write_config(ours.architecture)
    out = theirs.config.out_channels or theirs.config.in_channels
    assert written == {key: value for key, value in theirs.config.items() if key in written} | {"out_channels": out}


def test_embedders_of_blocks_that_differ_in_one_number_are_kept_apart(tmp_path):
    theirs = peers.make_dit()
    theirs.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias.data[3] += 1e-3
    theirs.save_pretrained(tmp_path)
    ours = diffusers.load_component(tmp_path)
    assert ours.architecture["level_per_block"]
    bias = ours.params["levels"]["level_in"]["bias"]
    assert bias.shape == (3, 32) and np.array_equal(bias[0], bias[1]) and np.sum(bias[1] != bias[2]) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_import_and_export_give_back_the_very_bytes(tied, tmp_path):
    peers.make_dit(tied=tied).save_pretrained(tmp_path / "there")
    import_weights.run(str(tmp_path / "there"), str(tmp_path / "here"))
    export_weights.run(str(tmp_path / "here"), str(tmp_path / "back"))
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
