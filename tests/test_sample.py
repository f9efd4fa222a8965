"""Sampling and judging from a workdir."""

import json

import jax
import numpy as np
import pytest
from conftest import make_tiny

from vidgen import evaluate, sample, train
from vidgen.config import ConfigError
from vidgen.data import decode
from vidgen.diffusion import generator as generators
from vidgen.studio import report


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    c = make_tiny()
    c.train.steps = 2
    train.run(c, str(folder))
    return str(folder)


def test_a_grid_of_prompts_and_seeds(workdir, tmp_path):
    prompts = ["a red circle moving up", "一个蓝色的正方形"]
    result = sample.run(workdir, prompts, str(tmp_path / "g.gif"), seeds=(3, 4), frames=6, height=20, width=16)
    assert result.step == 2 and [len(row) for row in result.videos] == [2, 2]
    for row in result.videos:
        for video in row:
            assert video.shape == (6, 20, 16, 3) and video.dtype == np.uint8
    for file in ("g.mp4", "g.gif", "g/prompt01_seed4.mp4"):
        assert decode.probe(str(tmp_path / file)).frames == 6, file
    asked = json.loads((tmp_path / "g.json").read_text())
    assert asked["prompts"] == prompts and asked["seeds"] == [3, 4] and asked["frames"] == 6


def test_a_clip_is_the_same_alone_and_in_a_grid(workdir, tmp_path):
    grid = sample.run(workdir, ["a red circle", "a blue square"], str(tmp_path / "a.mp4"), seeds=(0, 1))
    alone = sample.run(workdir, ["a blue square"], str(tmp_path / "b.mp4"), seeds=(1,))
    assert np.abs(grid.videos[1][1].astype(int) - alone.videos[0][0]).max() <= 1
    assert not np.array_equal(grid.videos[1][0], grid.videos[1][1])


@pytest.mark.parametrize(
    "settings", [{"solver": "heun"}, {"solver": "ddim", "eta": 0.5}, {"guidance": 1.0}, {"frames": 1}]
)
def test_settings_are_taken(workdir, tmp_path, settings):
    usual = sample.run(workdir, ["a red circle"], str(tmp_path / "a.mp4")).videos[0][0]
    other = sample.run(workdir, ["a red circle"], str(tmp_path / "b.mp4"), **settings).videos[0][0]
    assert usual.shape != other.shape or not np.array_equal(usual, other)


def test_a_seed_decides_the_noise_of_stochastic_solvers_too(workdir, tmp_path):
    settings = {"solver": "ddim", "eta": 1.0}
    grid = sample.run(workdir, ["a red circle", "a blue square"], str(tmp_path / "a.mp4"), seeds=(0, 1), **settings)
    alone = sample.run(workdir, ["a blue square"], str(tmp_path / "b.mp4"), seeds=(1,), **settings)
    assert np.abs(grid.videos[1][1].astype(int) - alone.videos[0][0]).max() <= 1


def test_a_prompt_longer_than_captions_were_is_cut_aloud(workdir, tmp_path, capsys):
    long = "一个" * 5000
    sample.run(workdir, [long], str(tmp_path / "a.mp4"))
    assert "cut to its first 45 bytes" in capsys.readouterr().err  # of 47, whole characters


def test_guidance_one_does_not_look_at_the_negative_prompt(tiny):
    generator = generators.from_config(tiny)
    params = jax.jit(generator.init)(jax.random.key(0), generators.example(tiny))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)

    def draw(guidance, negative):
        tiny.sample.guidance = guidance
        return sample.draw(tiny, generator, params, ["a red circle"], seeds=(0,), negative=negative)[0]

    np.testing.assert_array_equal(draw(1.0, ""), draw(1.0, "a blue square"))
    assert not np.array_equal(draw(3.0, ""), draw(3.0, "a blue square"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"prompts": []}, "--prompt"),
        ({"output": "x.avi"}, "expected FILE.mp4 or FILE.gif"),
        ({"solver": "dpm"}, "known are euler, heun, ddim"),
        ({"frames": 0}, "config.sample.frames=0"),
        ({"step": 7}, "no step 7; there are 2"),
    ],
)
def test_bad_calls(workdir, tmp_path, call, says):
    arguments = {"prompts": ["a"], "output": str(tmp_path / "a.mp4")} | call
    with pytest.raises(ConfigError, match=says):
        sample.run(workdir, **arguments)


def test_a_workdir_without_a_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match="expected a workdir that `vidgen train` made"):
        sample.run(str(tmp_path), ["a"], str(tmp_path / "a.mp4"))


def test_evaluate_writes_its_figures_and_the_report_shows_them(workdir):
    results = evaluate.run(workdir, "moving_shapes", prompts=14)
    assert results["prompts"] == 14 and results["step"] == 2 and len(results["per_prompt"]) == 14
    for name in ("shape", "colour", "motion", "count", "all_right", "permanence"):
        assert 0 <= results[name] <= 1
    with open(f"{workdir}/evaluation/moving_shapes.json", encoding="utf-8") as f:
        assert json.load(f) == json.loads(json.dumps(results))
    table = evaluate.table(results)
    assert "all_right" in table and "step 2" in table
    with open(report.run(workdir), encoding="utf-8") as f:
        assert "moving_shapes" in f.read()


def test_an_unknown_suite_names_the_known(workdir):
    with pytest.raises(ConfigError, match="known are moving_shapes, memorised, .*; did you mean moving_shapes"):
        evaluate.run(workdir, "moving_shape")
