"""The procedural set: deterministic, truthful, and with combinations that are never trained on."""

import pickle
from collections import Counter

import numpy as np
import pytest

from vidgen.config import ConfigError, base
from vidgen.data.moving_shapes import MovingShapes
from vidgen.data.scene_captions import describe
from vidgen.data.scene_sampling import LEVELS, combinations, heldout
from vidgen.data.scenes import DIRECTIONS, PALETTE, SHAPES, Object, Path, Scene, Shot, coverage, render, times


def config(**changes):
    c = base().data.moving_shapes
    for key, value in changes.items():
        c[key] = value
    return c


def held_out(scene: Scene, held: set) -> list[bool]:
    """For each object and shot, whether its combination is held out."""
    return [
        (thing.shape, thing.colour, shot.paths[i].motion) in held
        for shot in scene.shots
        for i, thing in enumerate(scene.objects)
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_a_clip_is_a_function_of_index_and_pass(level):
    sizes = ((1, 16, 16), (5, 24, 32), (17, 32, 24))
    make = lambda: MovingShapes.from_config(config(level=level, sizes=sizes, clips=300), "train")  # noqa: E731
    first, again = make(), pickle.loads(pickle.dumps(make()))
    assert first.fingerprint == again.fingerprint
    for index in range(30):
        one, same, later = first.read(index, 0), again.read(index, 0), first.read(index, 1)
        assert one.video.shape == later.video.shape == (*first.size(index), 3)
        assert one.video.dtype == np.uint8
        assert one.caption == same.caption
        np.testing.assert_array_equal(one.video, same.video)
        assert (one.video != later.video).any()
    assert set(Counter(first.size(i) for i in range(300))) == set(sizes)
    assert len({first.name(i) for i in range(300)}) == 300


def test_fingerprint_tells_settings_apart():
    prints = {
        MovingShapes.from_config(config(**change), split).fingerprint
        for split in ("train", "heldout")
        for change in ({}, {"level": "easy"}, {"heldout": 0.3}, {"fps": 12.0}, {"languages": ("zh",)}, {"clips": 5})
    }
    assert len(prints) == 12


@pytest.mark.parametrize("level", LEVELS)
def test_held_out_combinations_are_spread(level):
    difficulty = LEVELS[level]
    held = heldout(difficulty, 0.2)
    assert len(set(held)) == round(0.2 * len(combinations(difficulty)))
    assert len(held) >= 12
    for part in ((0,), (1,), (2,)):
        counts = Counter(tuple(c[i] for i in part) for c in held)
        total = Counter(tuple(c[i] for i in part) for c in combinations(difficulty))
        shares = [counts[value] / total[value] for value in total]
        assert 0.1 <= min(shares) and max(shares) <= 0.3
    for pair in ((0, 1), (0, 2), (1, 2)):  # each pair of values is trained on
        counts = Counter(tuple(c[i] for i in pair) for c in held)
        total = Counter(tuple(c[i] for i in pair) for c in combinations(difficulty))
        assert all(counts[value] < total[value] for value in total)


@pytest.mark.parametrize("level", LEVELS)
def test_splits_share_no_combination(level):
    c = config(level=level, sizes=((17, 32, 48),))
    held = set(heldout(LEVELS[level], c.heldout))
    train, test = (MovingShapes.from_config(c, split) for split in ("train", "heldout"))
    for index in range(150):
        assert not any(held_out(train.scene(index, 0)[0], held))
        assert held_out(test.scene(index, 0)[0], held)[0]


def test_full_level_shows_all_it_promises():
    source = MovingShapes.from_config(config(sizes=((17, 48, 64),)), "train")
    scenes = [source.scene(i, 0)[0] for i in range(400)]
    shots = [shot for scene in scenes for shot in scene.shots]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    assert {len(scene.shots) for scene in scenes} == {1, 2}
    assert {scene.event for scene in scenes} == {"", "occlusion", "collision"}
    assert {shot.camera.kind for shot in shots} == {"still", "pan", "zoom", "rotate"}
    assert {shot.background.kind for shot in shots} == {"plain", "gradient", "noise", "checker", "grid"}
    assert {p.motion for shot in shots for p in shot.paths} == {*DIRECTIONS, "still", "circle", "bounce", "collide"}
    assert {(o.shape, o.size) for scene in scenes for o in scene.objects} >= {(s, "small") for s in SHAPES}
    assert {o.colour for scene in scenes for o in scene.objects} == set(PALETTE)


@pytest.mark.parametrize("size", [(9, 16, 16), (17, 32, 32), (12, 24, 60)])
def test_objects_stay_in_the_frame_and_in_sight(size):
    source = MovingShapes.from_config(config(sizes=(size,)), "train")
    room = np.asarray([size[2], size[1]]) / (2 * min(size[1:]))
    for index in range(120):
        scene, _ = source.scene(index, 0)
        cuts = scene.cuts(size[0])
        for shot, first, end in zip(scene.shots, cuts[:-1], cuts[1:], strict=True):
            time = times(end - first)
            places = [shot.camera.screen(path.at(time), time) for path in shot.paths]
            grow = np.exp(shot.camera.zoom * time)[:, None]
            for thing, place in zip(scene.objects, places, strict=True):
                assert np.all(place - thing.reach[0] * grow >= -room - 1e-6)
                assert np.all(place + thing.reach[1] * grow <= room + 1e-6)
            if len(places) == 2 and scene.event == "occlusion":
                gap = np.linalg.norm(places[0] - places[1], axis=-1)
                assert gap.min() < 0.12 < gap[[0, -1]].min()


@pytest.mark.parametrize("shape", SHAPES)
def test_drawing_is_antialiased_and_centred(shape):
    """The area and the centroid of a rendering hold at any place, to a fraction of a pixel."""
    axis = np.arange(40) + 0.5
    areas = []
    for x, y in ((20, 20), (20.5, 20), (20.25, 19.6)):
        cover = coverage(shape, axis[None] - x, axis[:, None] - y, 11.0, 1.0)
        areas.append(cover.sum())
        assert abs((cover * axis[None]).sum() / cover.sum() - x) < 0.1
        assert abs((cover * axis[:, None]).sum() / cover.sum() - y) < 0.3
    assert np.ptp(areas) < 0.02 * np.mean(areas)


def test_render_puts_objects_where_the_scene_says():
    thing = Object("square", "red", "large")
    scene = Scene((thing,), (Shot((Path("right", "slow", (-0.2, 0.0), (0.4, 0.0)),)),))
    video = render(scene, 5, 40, 40)
    assert tuple(video[0, 20, 12]) == PALETTE["red"] == tuple(video[-1, 20, 28])
    assert not video[0, :, 24:].any() and not video[-1, :, :16].any()
    np.testing.assert_array_equal(video[2], video[2, :, ::-1])  # in the middle at half time


def test_captions_name_what_is_there_and_images_claim_no_motion():
    words = ("mov", "go", "travel", "still", "bounce", "circle", "collide", "pan", "zoom", "turn", "behind", "cut")
    for level in LEVELS:
        for frames in (1, 9, 24):
            source = MovingShapes.from_config(config(level=level, sizes=((frames, 32, 32),)), "train")
            for index in range(100):
                scene, caption = source.scene(index, 0)
                assert len(caption.encode()) <= source.sizes.text[index]
                for thing in scene.objects:
                    assert f"{thing.colour} {thing.shape}" in caption
                if frames == 1:
                    without = caption.replace(" circle", "")  # the shape, not the motion
                    assert not any(f" {word}" in without for word in words), caption
                    assert len(scene.shots) == 1 and not scene.event
                elif scene.shots[0].camera.kind != "still":
                    assert "; the camera " in caption or "; the picture turns" in caption
                if scene.event == "occlusion":
                    assert caption.index("behind") < caption.rindex(scene.objects[1].shape)
                assert ("cut" in caption) == (len(scene.shots) == 2)


def test_the_same_direction_in_english_and_chinese():
    for way, english, chinese in (("left", "to the left", "左"), ("down-right", "down and to the right", "右下方")):
        scene = Scene((Object("ring", "cyan", "small"),), (Shot((Path(way, "fast", (0.0, 0.0), DIRECTIONS[way]),)),))
        texts = [describe(scene, np.random.default_rng(i), "en") for i in range(20)]
        assert all(english in text and "cyan ring" in text and "slow" not in text for text in texts)
        assert len(set(texts)) > 5
        texts = [describe(scene, np.random.default_rng(i), "zh") for i in range(20)]
        assert all(f"向{chinese}" in text and "青色圆环" in text and "缓慢" not in text for text in texts)
        assert len(set(texts)) > 3


def test_both_languages_are_drawn_and_fit_their_bound():
    for level in LEVELS:
        source = MovingShapes.from_config(config(level=level, languages=("en", "zh"), sizes=((16, 32, 32),)), "train")
        captions = [source.scene(i, 0)[1] for i in range(200)]
        assert 60 < sum(caption.isascii() for caption in captions) < 140
        assert max(len(caption.encode()) for caption in captions) <= LEVELS[level].caption


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "esay"}, "level: 'esay' is unknown.*'easy'"),
        ({"languages": ("en", "fr")}, "languages: 'fr'"),
        ({"languages": ()}, "languages"),
        ({"sizes": ()}, "sizes is empty"),
        ({"sizes": ((9, 8, 32),)}, r"sizes: \(9, 8, 32\)"),
        ({"sizes": ((9, 32),)}, "sizes"),
        ({"clips": 0}, "clips=0"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"heldout": 1.5}, "heldout=1.5"),
    ],
)
def test_bad_settings_are_one_clear_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        MovingShapes.from_config(config(**change), "train")
    assert "\n" not in str(error.value)


def test_nothing_held_out_leaves_nothing_to_judge():
    with pytest.raises(ConfigError, match="heldout=0.0"):
        MovingShapes.from_config(config(heldout=0.0), "heldout")
    assert len(MovingShapes.from_config(config(heldout=0.0), "train").first(9)) == len(combinations(LEVELS["full"]))
    with pytest.raises(ConfigError, match="did you mean 'heldout'"):
        MovingShapes.from_config(config(), "held_out")
