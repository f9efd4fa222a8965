"""The configs of `configs/` that are named by a size or a published model: what they say is what they make."""

import math
import os
import pathlib

import jax
import pytest

from vidgen import config as configs
from vidgen import plan, train
from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.planning.parameters import parameters, text_parameters
from vidgen.tokenizers.base import geometry_from_config
from vidgen.training import program

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
M, B = 1e6, 1e9
EXACT = {  # published: parameters of the denoiser alone
    "wan_1_3b.py": 1_418_996_800,
    "wan_14b_720p.py": 14_288_491_584,
    "wan_ti2v_5b.py": 4_999_787_712,
    "wan_a14b.py:high": 14_288_491_584,
    "wan_a14b.py:low": 14_288_491_584,
    "dit_xl.py:xl": 675_129_632 - 256 * 1152,  # the published count has the fixed table of places in it
}
SIZES = {
    "wan_i2v_14b.py": 16.4 * B,
    "wan_i2v_14b.py:first_last": 16.4 * B,
    "wan_a14b.py:low,i2v": 14.3 * B,
    "dit_xl.py:s": 33 * M,
    "dit_xl.py:b/4": 130 * M,
    "dit_xl.py:l/8": 458 * M,
    "uvit.py:small": 44 * M,
    "uvit.py:mid": 131 * M,
    "uvit.py:large": 287 * M,
    "uvit.py:huge": 501 * M,
    "dit_10b_60k.py": 10 * B,
    "dit_30b.py": 30 * B,
    **{
        f"dit_video.py:{name}": float(name[:-1]) * (M if name.endswith("m") else B)
        for name in ("5m", "20m", "70m", "160m", "400m", "1b", "3b", "7b", "13b", "30b")
    },
}


def load(name):
    return configs.load(str(CONFIGS / name))


def count(config):
    """Parameters of the module, on abstract shapes: nothing is computed, and no weights are read."""
    generator = generators.from_config(config, platform="cpu")
    params = jax.eval_shape(lambda: generator.init(jax.random.key(0), generators.example(config)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", EXACT)
def test_published_architectures_have_exactly_the_published_parameters(name):
    config = load(name)
    program.check(config)
    assert count(config) == EXACT[name]
    assert parameters(config, geometry_from_config(config.tokenizer, config.vae).features) == EXACT[name]


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_is_as_large_as_its_name_says(name):
    config = load(name)
    program.check(config)
    made = count(config)
    assert made == parameters(config, geometry_from_config(config.tokenizer, config.vae).features)
    assert made == pytest.approx(SIZES[name], rel=0.1)


def test_every_denoiser_of_the_folder_is_counted_here():
    """So that a new preset can't be forgotten; the others train on tasks of their own, or have tests of their own."""
    own = {"quickstart.py", "moving_shapes.py", "real_clips.py", "minute_720p.py", "first_frame.py", "backbones.py"}
    there = {f for f in os.listdir(CONFIGS) if f.endswith(".py")} - own
    there -= {f for f in there if f.startswith(("vae_", "finetune"))}
    assert there == {name.partition(":")[0] for name in EXACT | SIZES}


def test_three_backbones_differ_in_the_model_and_have_equal_parameters():
    found = {kind: load(f"backbones.py:{kind}") for kind in ("dit", "uvit", "wan")}
    assert not configs.difference(found["dit"], load("quickstart.py"))
    features = geometry_from_config(found["dit"].tokenizer).features
    for kind, config in found.items():
        changed = configs.difference(config, found["dit"])
        more = {"train.steps"} if kind == "uvit" else set()  # twice the steps
        assert {key for key in changed if not key.startswith("model.")} == more and bool(changed) == (kind != "dit")
        program.check(config)
        assert count(config) == parameters(config, features)
        # Of the denoisers, as they have the same text encoder.
        ours, theirs = (parameters(c, features) - text_parameters(c) for c in (config, found["dit"]))
        assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dit_xl.py:xxl", "expected s, b, l, xl"),
        ("dit_xl.py:xl/3", "maybe a patch"),
        ("dit_video.py:2b", "expected 5m, 20m"),
        ("uvit.py:tiny", "expected small, mid, large, huge"),
        ("uvit.py:small,", "expected small"),
        ("wan_a14b.py", "expected high or low"),
        ("wan_a14b.py:high,t2v", "expected high or low"),
        ("wan_i2v_14b.py:last", "expected nothing or first_last"),
        ("wan_1_3b.py:x", "takes no argument"),
        ("backbones.py:unet", "expected dit, uvit, wan"),
    ],
)
def test_arguments_that_are_none_are_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        load(name)


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("wan_14b_720p.py", "v5p:2x2x1"),
        ("wan_ti2v_5b.py", "v5p:2x2x1"),
        ("wan_i2v_14b.py", "v5p:2x2x2"),
        ("wan_a14b.py:high", "v5p:2x2x1"),
        ("uvit.py:huge", "v5e:4x4"),
        ("uvit.py:small,clips", "v5e:2x2"),
        ("dit_video.py:7b", "v5p:4x4x4"),
    ],
)
def test_a_plan_needs_no_weights(name, topology, capsys):
    facts = plan.run(load(name), topology, abstract=True)
    assert facts["parameters"] == EXACT.get(name, facts["parameters"]) and 0.1 < facts["predicted_mfu"] < 0.8
    assert f"{facts['parameters']:,}" in capsys.readouterr().out


def test_the_experts_share_the_noise_levels_out():
    high, low = (load(f"wan_a14b.py:{expert}").objective.time_range for expert in ("high", "low"))
    assert (low, high) == ((0.0, 0.875), (0.875, 1.0))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wan_1_3b.py", "config.tokenizer.weights is empty"),
        ("wan_i2v_14b.py", "can be sampled from but not trained"),
        ("dit_xl.py", "config.model.classes=1000: clips have captions and no labels"),
        ("uvit.py:small", "config.model.classes=1000: clips have captions and no labels"),
    ],
)
def test_training_says_what_it_lacks_where_a_plan_does_without(name, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train.run(load(name), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
