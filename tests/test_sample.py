"""Sampling and judging from a workdir."""

import json

import jax
import numpy as np
import pytest
from conftest import make_tiny

from vidgen import evaluate, sample, train
from vidgen.conditioning.given import Given
from vidgen.config import ConfigError
from vidgen.data import decode
from vidgen.diffusion import generator as generators
from vidgen.studio import media, report


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


@pytest.fixture(scope="module")
def controlled(quick_compiles):
    """(config, generator, parameters that put out something) of a model that is given frames; clips of 9 x 16 x 16."""
    c = make_tiny()
    c.control.masks = (("first", 0.4), ("first_last", 0.2), ("extend", 0.2))
    c.sample.update(frames=9, guidance=2.0)
    return c, *with_weights(c)


def with_weights(c):
    generator = generators.from_config(c)
    params = jax.jit(generator.init)(jax.random.key(0), generators.example(c))
    return generator, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@pytest.fixture
def true():
    """A clip of 9 x 16 x 16."""
    return np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("solver", ["heun", "ddim"])
def test_given_frames_come_back_as_they_were(controlled, true, solver):
    c, generator, params = controlled
    c = c.copy_and_resolve_references()
    c.sample.update(solver=solver, eta=0.5)
    asked = [
        Given(true[0]),
        Given(true[0], true[-1]),
        Given(extend=true[:5]),
        None,
    ]
    drawn = sample.draw(c, generator, params, ["a red circle"] * 4, seeds=(3,), given=asked)
    first, both, extended, alone = (video.astype(int) for video in drawn)
    for video in (first, both, extended):
        assert np.abs(video[0] - true[0]).max() <= 1
    assert np.abs(both[-1] - true[-1]).max() <= 1
    assert np.abs(extended[:5] - true[:5]).max() <= 1
    for video, from_ in ((first, 1), (extended, 5)):
        assert not np.array_equal(video[from_:], alone[from_:])  # what is drawn sees what is given
    assert np.abs(alone[0] - true[0]).max() > 10


def test_what_is_given_to_one_clip_is_nothing_to_another(controlled, true):
    c, generator, params = controlled
    together = sample.draw(c, generator, params, ["a", "b"], seeds=(0, 1), given=[Given(true[0]), None])
    alone = sample.draw(c, generator, params, ["b"], seeds=(1,))[0]
    assert np.abs(together[3].astype(int) - alone).max() <= 1


def test_a_picture_without_a_caption_is_drawn_on_from(controlled, true):
    c, generator, params = controlled
    (video,) = sample.draw(c, generator, params, [""], seeds=(0,), given=Given(true[0]))
    assert np.abs(video[0].astype(int) - true[0]).max() <= 1


def test_mask_channels_reach_the_model(true):
    c = make_tiny()
    c.control.update(masks=(("first", 0.5),), channels="wan")
    c.model.cond = 4 + 768
    c.sample.frames = 9
    generator, params = with_weights(c)
    given, other, nothing = (
        sample.draw(c, generator, params, ["a"], seeds=(0,), given=one)[0]
        for one in (Given(true[0]), Given(true[1]), None)
    )
    assert not np.array_equal(given, other) and not np.array_equal(given, nothing)


def test_noise_can_be_given(controlled):
    c, generator, params = controlled
    noise = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 768)).astype(np.float32)
    a, b = sample.draw(c, generator, params, ["a", "a"], seeds=(0,), noise=noise)
    again = sample.draw(c, generator, params, ["a"], seeds=(9,), noise=noise[1:])[0]
    assert np.abs(again.astype(int) - b).max() <= 1 and not np.array_equal(a, b)
    with pytest.raises(AssertionError):
        sample.draw(c, generator, params, ["a"], seeds=(0,), noise=noise)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained with masks, for two steps."""
    folder = tmp_path_factory.mktemp("masks")
    c = make_tiny()
    c.control.masks = (("first", 0.5), ("extend", 0.3))
    c.train.steps = 2
    train.run(c, str(folder))
    return str(folder)


def test_a_first_frame_from_a_file(trained, true, tmp_path):
    picture, output = str(tmp_path / "a.png"), str(tmp_path / "a.mp4")
    media.save_video(picture, true[:1], 1)
    result = sample.run(trained, [], output, first_frame=picture)
    assert result.prompts == ("",) and np.abs(result.videos[0][0][0].astype(int) - true[0]).max() <= 1
    assert json.loads((tmp_path / "a.json").read_text())["first_frame"] == picture
    with pytest.raises(ConfigError, match="--last_frame: this model was trained with first, extend only"):
        sample.run(trained, ["a"], output, first_frame=picture, last_frame=picture)


def test_a_clip_from_a_file_is_gone_on_from(trained, true, tmp_path):
    clip = str(tmp_path / "c.mp4")
    media.save_video(clip, true, 8.0)
    result = sample.run(trained, ["a"], str(tmp_path / "a.mp4"), extend=clip, frames=13)
    video = result.videos[0][0]
    assert len(video) == 13
    np.testing.assert_allclose(video[:9].astype(int), decode.decode(clip)[0], atol=1)


def test_a_model_without_masks_says_so(workdir, true, tmp_path):
    picture = str(tmp_path / "a.png")
    media.save_video(picture, true[:1], 1)
    with pytest.raises(ConfigError, match="trained with nothing given .config.control.masks=.*; train one with"):
        sample.run(workdir, ["a"], str(tmp_path / "a.mp4"), first_frame=picture)


def test_the_suite_of_first_frames(trained, workdir):
    results = evaluate.run(trained, "first_frame", prompts=6)
    assert results["psnr_first"] >= 30 and results["psnr_first_least"] >= 30 and len(results["per_prompt"]) == 6
    assert 0 <= results["motion"] <= 1 and 0 <= results["kept"] <= 1
    assert "psnr_first" in evaluate.table(results)
    with pytest.raises(ConfigError, match="--first_frame: this model was trained with nothing given"):
        evaluate.run(workdir, "first_frame", prompts=6)


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
    with pytest.raises(
        ConfigError, match="known are moving_shapes, first_frame, memorised, .*; did you mean moving_shapes"
    ):
        evaluate.run(workdir, "moving_shape")
