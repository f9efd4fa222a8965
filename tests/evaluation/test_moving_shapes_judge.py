"""The judge: right on ground truth, at chance on shuffled prompts, and strict with what is wrong."""

import numpy as np
import pytest

from vidgen.config import ConfigError, base
from vidgen.data.scene_sampling import LEVELS, heldout
from vidgen.data.scenes import PALETTE, render
from vidgen.evaluation.moving_shapes import compare, expected, judge, parse, prompts, summary
from vidgen.evaluation.segment import components

ATTRIBUTES = ("shape", "colour", "motion", "count")


def make(level, size, count, seed=0):
    c = base().data.moving_shapes
    c.level, c.sizes = level, (size,)
    return prompts(c, count, seed)


def draw(prompt):
    return render(prompt.scene, prompt.frames, prompt.height, prompt.width)


@pytest.mark.parametrize("size", [(9, 32, 32), (9, 24, 24), (17, 64, 48), (1, 32, 32)])
def test_easy_ground_truth_is_right(size):
    made = make("easy", size, 210)
    scores = summary([judge(draw(p), p.scene) for p in made])
    assert all(scores[name] >= 0.99 for name in (*ATTRIBUTES, "all_right", "permanence")), scores
    assert scores["prompts"] == 210 and scores["flicker"] < 1e-3


@pytest.mark.parametrize("size", [(17, 32, 32), (9, 40, 48)])
def test_full_ground_truth_is_right(size):
    """With moving cameras, occlusion, collisions and two shots."""
    scores = summary([judge(draw(p), p.scene) for p in make("full", size, 200)])
    assert all(scores[name] >= 0.99 for name in (*ATTRIBUTES, "all_right", "permanence")), scores


@pytest.mark.parametrize("level", LEVELS)
def test_shuffled_prompts_score_no_better_than_chance(level):
    """Every video is compared with every prompt; chance is how often two prompts share an attribute."""
    made = make(level, (12, 32, 32), 70)
    parsed = [parse(draw(p)) for p in made]
    wanted = [expected(p.scene, p.frames) for p in made]
    parts = {
        "shape": [sorted(s.shape for s in seen) for seen in wanted],
        "colour": [sorted(s.colour for s in seen) for seen in wanted],
        "motion": [sorted(s.motions for s in seen) for seen in wanted],
        "count": [len(seen) for seen in wanted],
        "all_right": [sorted((s.shape, s.colour, s.motions) for s in seen) for seen in wanted],
    }
    scores = summary([compare(seen, p.scene) for seen in parsed for p in made])
    for name, values in parts.items():
        chance = np.mean([a == b for a in values for b in values])
        assert abs(scores[name] - chance) <= 0.05, (name, scores[name], chance)


def test_prompts_cover_the_held_out_combinations_evenly():
    held = heldout(LEVELS["easy"], 0.2)
    made = make("easy", (9, 32, 32), 3 * len(held))
    firsts = [(p.scene.objects[0].shape, p.scene.objects[0].colour, p.scene.shots[0].paths[0].motion) for p in made]
    assert sorted(firsts) == sorted(held * 3)
    assert made == make("easy", (9, 32, 32), 3 * len(held))
    assert made != make("easy", (9, 32, 32), 3 * len(held), seed=1)
    for p in made:
        assert f"{p.scene.objects[0].colour} {p.scene.objects[0].shape}" in p.text
    c = base().data.moving_shapes
    c.heldout = 0.0
    with pytest.raises(ConfigError, match="heldout"):
        prompts(c, 4)


def score(change, count=42, size=(9, 32, 32)):
    """The easy level's summary with `change` done to each video."""
    return summary([judge(change(draw(p)), p.scene) for p in make("easy", size, count)])


def test_black_and_garbage_fail():
    rng = np.random.default_rng(0)
    for scores in (score(np.zeros_like), score(lambda v: rng.integers(0, 256, v.shape, dtype=np.uint8), 20)):
        assert scores["all_right"] == 0 and scores["permanence"] <= 0.05
        assert scores["shape"] <= 0.05 and scores["colour"] <= 0.05 and scores["count"] <= 0.05


def test_swapped_channels_are_another_colour():
    scores = score(lambda v: v[..., [1, 2, 0]])
    assert scores["colour"] == scores["all_right"] == 0
    assert scores["shape"] == scores["motion"] == scores["count"] == 1


def test_reversed_time_is_another_motion():
    scores = score(lambda v: v[::-1])
    assert scores["motion"] == scores["all_right"] == 0
    assert scores["shape"] == scores["colour"] == scores["permanence"] == 1


def test_turned_picture_is_another_motion():
    assert score(lambda v: np.rot90(v, axes=(1, 2)))["motion"] == 0


def test_frozen_video_does_not_move():
    scores = score(lambda v: np.repeat(v[4:5], 9, axis=0))
    assert scores["motion"] == 0 and scores["shape"] == 1


def test_appearing_and_vanishing_break_permanence():
    def vanish(video):
        return np.concatenate([video[:5], np.zeros_like(video[5:])])

    def blink(video):
        return np.concatenate([video[:4], np.zeros_like(video[4:5]), video[5:]])

    for change in (vanish, blink, lambda v: vanish(v[::-1])):
        # An object that was at the frame's edge when it went may have left.
        assert score(change)["permanence"] <= 0.1


def test_a_second_object_is_counted_and_breaks_permanence_when_it_comes_late():
    def add(video, first):
        video = video.copy()
        video[first:, 2:8, 2:8] = PALETTE["orange"]
        return video

    always, late = score(lambda v: add(v, 0), 20), score(lambda v: add(v, 5), 20)
    assert always["count"] <= 0.2 and always["all_right"] == 0
    assert late["permanence"] <= 0.3  # coming out from behind another object is no fault


def test_splitting_breaks_permanence():
    def split(video):
        video = video.copy()
        for frame in video[5:]:
            columns = np.flatnonzero(frame.any(axis=(0, 2)))
            middle = int(columns.mean())
            frame[:, middle - 1 : middle + 2] = 0
        return video

    assert score(split)["permanence"] <= 0.05


def test_blur_and_noise_of_samples_are_forgiven():
    rng = np.random.default_rng(0)

    def spoil(video):
        x = video.astype(np.float32)
        for axis in (1, 2):
            x = 0.5 * x + 0.25 * (np.roll(x, 1, axis) + np.roll(x, -1, axis))
        return np.clip(0.85 * x + rng.normal(6, 12, x.shape), 0, 255).astype(np.uint8)

    scores = score(spoil)
    assert scores["all_right"] >= 0.95 and scores["permanence"] >= 0.95


def test_flicker_rises_with_noise():
    rng = np.random.default_rng(0)
    levels = [
        score(lambda v, s=s: np.clip(v + rng.normal(0, s, v.shape), 0, 255).astype(np.uint8), 10)["flicker"]
        for s in (0, 4, 12, 24)
    ]
    assert levels[0] < 1e-3 and all(a + 0.005 < b for a, b in zip(levels[:-1], levels[1:], strict=True))


def test_components_are_eight_connected_and_frames_apart():
    mask = np.zeros((2, 6, 7), bool)
    mask[0, [0, 1, 2], [0, 1, 2]] = True  # a diagonal is one part
    mask[0, 5, :] = mask[0, 3:, 6] = True  # an L, round a corner
    mask[1, 0, 0] = True
    labels = components(mask)
    assert sorted(np.unique(labels)) == [0, 1, 2, 3]
    assert (labels > 0).tolist() == mask.tolist()
    assert labels[0, 0, 0] == labels[0, 2, 2] != labels[0, 5, 0] == labels[0, 3, 6]
    assert labels[1, 0, 0] not in labels[0]
    spiral = np.zeros((1, 9, 9), bool)  # a long way round
    spiral[0, ::2] = spiral[0, 1::4, -1] = spiral[0, 3::4, 0] = True
    assert len(np.unique(components(spiral))) == 2
