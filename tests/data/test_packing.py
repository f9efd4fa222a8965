from collections import Counter

import numpy as np
import pytest

from vidgen.config import ConfigError, base
from vidgen.data.clip import ClipSizes
from vidgen.data.packing import NO_SIZE, TOO_LARGE, TOO_SMALL, Packing, best_fit, worst_fit
from vidgen.geometry import Geometry

GEOMETRY = Geometry(stride=(4, 16, 16), patch=(1, 1, 1), channels=16)


def sizes(frames, height, width, text=20):
    columns = np.broadcast_arrays(frames, height, width, text)
    frames, height, width, text = (np.atleast_1d(column).astype(np.int32) for column in columns)
    return ClipSizes(frames, height, width, np.full(len(frames), 16, np.float32), text)


def mixed(n, seed=0):
    """Images of 256 x 256 to videos of 5 s in 480p, landscape and portrait."""
    draw = np.random.default_rng(seed)
    shapes = np.array([(256, 256), (192, 320), (320, 192), (384, 384), (512, 512), (480, 832), (832, 480)])
    height, width = shapes[draw.integers(0, len(shapes), n)].T
    return sizes(draw.choice([1, 1, 1, 17, 33, 49, 81], n), height, width, draw.integers(20, 400, n))


def native(n, seed=0):
    """Nearly every clip of a size of its own."""
    draw = np.random.default_rng(seed)
    frames = np.where(draw.random(n) < 0.4, 1, draw.integers(9, 82, n))
    return sizes(frames, draw.integers(160, 520, n), draw.integers(160, 860, n), draw.integers(20, 400, n))


def rows(**changes):
    c = base().rows
    c.update(count=8, tokens=32_768, segments=32, text=4096, caption=256)
    c.update(changes)
    return c


def check_rows(packing, clips, r, steps):
    """Capacities, and what each clip was given."""
    for step in steps:
        plan = packing.step(step)
        assert len(plan) == r.count
        for row in plan:
            assert [p.segment for p in row] == list(range(1, len(row) + 1)) and len(row) <= r.segments
            tokens = text = 0
            for p in row:
                assert (p.token_start, p.text_start) == (tokens, text)
                assert p.tokens == GEOMETRY.tokens(p.frames, p.height, p.width) > 0
                assert (p.frames, p.height, p.width) == GEOMETRY.fit(p.frames, p.height, p.width)
                assert p.frames <= clips.frames[p.clip]
                assert p.height <= clips.height[p.clip] and p.width <= clips.width[p.clip]
                assert p.text == min(clips.text[p.clip] + 1, r.caption)
                tokens, text = tokens + p.tokens, text + p.text
            assert tokens <= r.tokens and text <= r.text


@pytest.mark.parametrize("data", [mixed, native])
@pytest.mark.parametrize(
    "changes", [{}, {"count": 2, "segments": 16}, {"count": 16, "tokens": 16_384}, {"count": 64, "text": 8192}]
)
def test_rows_are_full_and_balanced(data, changes):
    clips, r = data(6000), rows(**changes)
    packing = Packing(clips, GEOMETRY, r, seed=0)
    stats = packing.stats(range(0, packing.steps_per_epoch, 3))
    assert stats.fill >= 0.98
    assert stats.flops_spread_mean <= 0.02
    assert stats.balanced >= 0.99
    assert stats.empty_rows == 0
    check_rows(packing, clips, r, range(0, packing.steps_per_epoch, 29))


def test_every_clip_once_a_pass():
    packing = Packing(mixed(5000), GEOMETRY, rows(count=4), seed=1)
    for epoch in (0, 1):
        first = epoch * packing.steps_per_epoch
        placed = [p for s in range(first, first + packing.steps_per_epoch) for row in packing.step(s) for p in row]
        passes = range(epoch * packing.passes, (epoch + 1) * packing.passes)
        assert Counter((p.clip, p.epoch) for p in placed) == Counter((c, e) for c in range(5000) for e in passes)


@pytest.mark.parametrize("n, count", [(1, 1), (1, 4), (3, 2), (5, 3), (40, 16)])
def test_few_clips_fill_rows_by_several_passes(n, count):
    frames = np.resize([13, 29, 5, 1, 25], n)
    r = rows(count=count, tokens=1024, text=512, segments=16)
    packing = Packing(sizes(frames, 128, 128), GEOMETRY, r, seed=0)
    placed = [p for s in range(packing.steps_per_epoch) for row in packing.step(s) for p in row]
    assert Counter((p.clip, p.epoch) for p in placed) == Counter(
        (c, e) for c in range(n) for e in range(packing.passes)
    )
    tokens = np.array([GEOMETRY.tokens(int(f), 128, 128) for f in frames])
    stats = packing.stats(range(packing.steps_per_epoch))
    assert stats.balanced == 1
    if n >= 3:  # one clip alone fills as much of a row as its size allows
        assert stats.fill >= 0.98
    assert sum(p.tokens for p in placed) == tokens.sum() * packing.passes


def test_a_step_is_found_without_the_steps_before_it():
    a, b = (Packing(mixed(3000), GEOMETRY, rows(), seed=5) for _ in range(2))
    far = 3 * a.steps_per_epoch + 17
    forward = [a.step(s) for s in range(far - 3, far + 3)]
    backward = [b.step(s) for s in reversed(range(far - 3, far + 3))]
    assert forward == backward[::-1]


def test_seed_and_epoch_draw_anew():
    clips = mixed(3000)
    a, b = Packing(clips, GEOMETRY, rows(), seed=0), Packing(clips, GEOMETRY, rows(), seed=1)
    assert a.step(0) != b.step(0)
    # Row-mates: pairs of clips in one row hardly ever meet again in the next epoch.
    pairs = []
    for epoch in (0, 1):
        met = set()
        for s in range(epoch * a.steps_per_epoch, (epoch + 1) * a.steps_per_epoch):
            for row in a.step(s):
                here = sorted(p.clip for p in row)
                met |= {(x, y) for i, x in enumerate(here) for y in here[i + 1 :]}
        pairs.append(met)
    assert len(pairs[0] & pairs[1]) < 0.1 * len(pairs[0])


def test_a_clip_longer_than_a_row_is_cropped_in_time():
    r = rows(tokens=1000)
    packing = Packing(sizes([81, 1], 256, 256), GEOMETRY, r, seed=0)
    assert packing.cropped == 1 and packing.refused == {}
    placed = {p.clip: p for row in packing.step(0) + packing.step(1) for p in row}
    assert (placed[0].frames, placed[0].tokens) == (9, 768)  # three of the 21 latent frames of 256 tokens


def test_what_cannot_be_placed_is_counted_with_its_reason():
    clips = sizes([17, 17, 1, 0, 1, -1], [256, 15, 640, 256, 64, 256], [256, 256, 640, 256, 64, 256])
    packing = Packing(clips, GEOMETRY, rows(tokens=1024), seed=0)
    assert packing.refused == {NO_SIZE: 2, TOO_SMALL: 1, TOO_LARGE: 1}
    assert {p.clip for row in packing.step(0) for p in row} <= {0, 4}
    text = str(packing.stats(range(3)))
    assert "1 too large: one frame exceeds the row" in text and "1 clips cropped" in text


def test_long_captions_are_cut_and_counted():
    packing = Packing(sizes(1, 64, 64, [255, 256, 10_000]), GEOMETRY, rows(), seed=0)
    assert packing.captions_cut == 2
    assert {p.clip: p.text for row in packing.step(0) for p in row} == {0: 256, 1: 256, 2: 256}


def test_text_and_segments_bind_too():
    clips = sizes(1, 64, 64, 99)  # 16 tokens and 100 text tokens: S would hold 64 of them
    clips = ClipSizes(*(np.resize(c, 500) for c in (clips.frames, clips.height, clips.width, clips.fps, clips.text)))
    for changes, most in (({"text": 1000}, 10), ({"text": 6400, "segments": 7}, 7)):
        r = rows(tokens=1024, **changes)
        packing = Packing(clips, GEOMETRY, r, seed=0)
        assert max(len(row) for s in range(packing.steps_per_epoch) for row in packing.step(s)) == most
        check_rows(packing, clips, r, range(10))


@pytest.mark.parametrize("lengths", [(10, 290), (10, 20, 300), (1, 299)])
def test_a_caption_may_fill_its_row(lengths):
    clips = sizes(1, 256, 256, np.resize(lengths, 60))
    r = rows(count=2, tokens=2048, text=300, caption=300)
    packing = Packing(clips, GEOMETRY, r, 0)
    check_rows(packing, clips, r, range(8))


def test_bins_respect_capacities_and_worst_fit_spreads():
    draw = np.random.default_rng(0)
    tokens = np.sort(draw.integers(1, 60, 400))[::-1]
    text = draw.integers(1, 30, 400)
    text = np.concatenate([np.sort(text[tokens == t])[::-1] for t in np.unique(tokens)[::-1]])
    capacity = (100, 80, 9)
    bins = best_fit(tokens, text, capacity)
    spread = worst_fit(tokens, text, capacity, int(bins.max()) + 40)
    for found in (bins, spread):
        assert sorted(set(found)) == list(range(found.max() + 1))
        for load, most in zip((tokens, text, np.ones(400)), capacity, strict=True):
            assert np.bincount(found, load).max() <= most
    assert worst_fit(tokens, text, capacity, 3) is None


def test_a_million_clips_are_planned_in_seconds():
    import time

    start = time.process_time()
    packing = Packing(mixed(1_000_000), GEOMETRY, rows(count=16), seed=0)
    assert time.process_time() - start < 20
    start = time.process_time()
    for step in range(0, 100_000, 1000):
        packing.step(step)
    assert (time.process_time() - start) / 100 < 0.01


@pytest.mark.parametrize(
    "clips, changes, says",
    [
        (sizes(1, 64, 64), {"caption": 300, "text": 256}, "config.rows.text=300 or more"),
        (sizes(1, 64, 64), {"count": 0}, "config.rows.count=0"),
        (sizes([1, 0], 640, 64), {"tokens": 128}, f"1 {NO_SIZE}, 1 {TOO_LARGE}"),
        (sizes(np.zeros(0), 64, 64), {}, "the index is empty"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(clips, changes, says):
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        Packing(clips, GEOMETRY, rows(**changes), seed=0)
