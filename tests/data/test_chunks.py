"""Chunks are dealt by arithmetic: each clip once a pass, shapes by their weights, the same from any start."""

import collections

import jax
import numpy as np
import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.data import chunks
from vidgen.data.chunks import Chunks, Shape
from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.geometry import Geometry
from vidgen.parallel.mesh import make_mesh

STRIDE = (4, 8, 8)


class Clips:
    """Clips of three sizes whose pixels say where they are from: (clip, frame + 10 pass, row ^ column)."""

    def __init__(self, sizes, bad=()):
        sizes = np.asarray(sizes, np.int32)
        n = len(sizes)
        self.sizes = ClipSizes(*sizes.T, np.full(n, 8.0, np.float32), np.full(n, 9, np.int32))
        self.bad, self.fingerprint = bad, "x"

    def name(self, index):
        return f"clip-{index}"

    def read(self, index, epoch):
        if index in self.bad:
            raise BadClip("broken")
        t, h, w = (int(c[index]) for c in (self.sizes.frames, self.sizes.height, self.sizes.width))
        video = np.zeros((t, h, w, 3), np.uint8)
        video[..., 0] = index
        video[..., 1] = np.arange(t)[:, None, None] + 10 * epoch
        video[..., 2] = np.arange(h)[:, None] ^ np.arange(w)
        return Clip(video, "a caption", 8.0)


SIZES = [(9, 16, 24)] * 5 + [(5, 16, 16)] * 4 + [(1, 32, 16)] * 3 + [(3, 8, 8)]


def plan(shapes, weights=(), image_steps=0, sizes=SIZES, seed=3, **changes):
    c = configs.base().clips
    c.update(shapes=shapes, weights=weights, image_steps=image_steps)
    source = Clips(sizes, **changes)
    return source, Chunks(source.sizes, c, chunks.shapes_of(c, STRIDE), STRIDE, seed)


MIXED = ((1, 16, 16, 4), (5, 16, 16, 2), (9, 16, 16, 1))


def test_each_pass_of_a_shape_sees_each_clip_that_is_large_enough_once():
    _, p = plan(MIXED, weights=(0.5, 0.3, 0.2), image_steps=7)
    assert [len(e) for e in p.eligible] == [12, 9, 5] and p.too_small == 1
    seen = collections.defaultdict(list)
    for n in range(400):
        assert len(p.step(n)) == p.shape(n).count
        seen[p.index(n)] += [(cut.clip, cut.epoch) for cut in p.step(n)]
    for index, eligible in enumerate(p.eligible):
        whole = len(seen[index]) // len(eligible)
        assert whole >= 3
        for epoch in range(whole):
            clips = [clip for clip, e in seen[index] if e == epoch]
            assert sorted(clips) == eligible.tolist(), (index, epoch)
        orders = [[clip for clip, e in seen[index] if e == epoch] for epoch in (0, 1)]
        assert orders[0] != orders[1]


def test_shapes_come_by_weight_after_the_images():
    _, p = plan(MIXED, weights=(0.0, 3.0, 1.0), image_steps=10)
    assert {p.index(n) for n in range(10)} == {0}
    later = collections.Counter(p.index(n) for n in range(10, 10 + chunks.CYCLE))
    assert later == {1: 192, 2: 64}
    order = [p.index(n) for n in range(10, 10 + chunks.CYCLE)]
    assert order != [p.index(n) for n in range(10 + chunks.CYCLE, 10 + 2 * chunks.CYCLE)]  # dealt anew
    _, even = plan(MIXED)
    assert sorted(collections.Counter(even.index(n) for n in range(chunks.CYCLE)).values()) == [85, 85, 86]


def test_a_rare_shape_still_comes():
    _, p = plan(MIXED, weights=(1.0, 1000.0, 1.0))
    assert collections.Counter(p.index(n) for n in range(chunks.CYCLE)) == {0: 1, 1: 254, 2: 1}


def test_cuts_lie_inside_the_clip_s_whole_latents_and_differ():
    source, p = plan(((1, 8, 8, 8),))
    starts = set()
    for n in range(40):
        for cut in p.step(n):
            size = tuple(int(c[cut.clip]) for c in (source.sizes.frames, source.sizes.height, source.sizes.width))
            size = Geometry(STRIDE, (1, 1, 1), 1).cover(*size)
            assert all(0 <= s <= whole - part for s, whole, part in zip(cut.start, size, (1, 8, 8), strict=True))
            starts.add(cut.start)
    assert {t for t, _, _ in starts} == set(range(9)) and max(y for _, y, _ in starts) > 20  # of up to 32 - 8


def test_a_chunk_holds_the_pixels_of_its_cut():
    source, p = plan(((5, 8, 16, 3),))
    alone, _ = chunks.read_chunk(source, p.step(11)[0], p.shape(11))
    assert alone.base is None  # and does not keep the whole clip in memory
    batch, bad = chunks.host_chunks(source, p, 11)
    assert not bad and batch.video.shape == (3, 5, 8, 16, 3) and batch.video.dtype == np.uint8
    for video, clip, cut in zip(batch.video, batch.clip, p.step(11), strict=True):
        t, y, x = cut.start
        assert clip == cut.clip and (video[..., 0] == clip).all()
        np.testing.assert_array_equal(video[:, 0, 0, 1], np.arange(t, t + 5) + 10 * cut.epoch)
        np.testing.assert_array_equal(video[0, :, :, 2], np.arange(y, y + 8)[:, None] ^ np.arange(x, x + 16))


def test_the_feed_gives_what_the_plan_says_from_any_start_and_counts_what_is_bad():
    source, p = plan(MIXED, image_steps=2, bad=(0,))
    c = configs.base()
    c.mesh.update(data=1, context=1)
    mesh = make_mesh(c.mesh, 0, 0, devices=jax.devices()[:1])
    unreadable = 0
    with chunks.batches(source, p, c.data, 3, mesh) as made:
        for n in range(3, 9):
            batch, info = next(made)
            expected, bad = chunks.host_chunks(source, p, n)
            jax.tree.map(np.testing.assert_array_equal, batch, expected)
            assert sum(info.bad.values()) == len(bad) and info.wait >= 0
            assert all(clip == ("clip-0", "broken") for clip in info.bad_clips)
            unreadable += len(bad)
            if bad:
                row = list(expected.clip).index(-1)
                assert not expected.video[row].any()
    assert unreadable
    with pytest.raises(StopIteration):
        next(made)


def test_a_feed_over_four_devices_lays_rows_and_height():
    source, p = plan(((5, 16, 16, 4),))
    c = configs.base()
    c.mesh.update(data=2, context=2)
    mesh = make_mesh(c.mesh, 0, 0)
    batch = chunks.load(source, p, 0, mesh)
    jax.tree.map(np.testing.assert_array_equal, batch, chunks.host_chunks(source, p, 0)[0])
    assert {s.data.shape for s in batch.video.addressable_shards} == {(2, 5, 8, 16, 3)}
    assert batch.video.sharding == chunks.batch_shardings(mesh).video


def test_what_a_source_raises_reaches_who_asks(monkeypatch):
    source, p = plan(((5, 16, 16, 2),))
    monkeypatch.setattr(Clips, "read", lambda self, index, epoch: 1 // 0)
    c = configs.base()
    mesh = make_mesh(c.mesh, 0, 0, devices=jax.devices()[:1])
    with chunks.batches(source, p, c.data, 0, mesh) as made:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"reading clip clip-\d+ .* failed: ZeroDivisionError"):
                next(made)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shapes": ()}, "config.clips.shapes is empty"),
        ({"shapes": ((5, 16, 16),)}, r"\(5, 16, 16\): expected \(frames, height, width, chunks a step\)"),
        ({"shapes": ((6, 16, 16, 2),)}, "6x16x16: the VAE wants 1 \\+ 4k frames.*nearest: 5x16x16"),
        ({"shapes": ((8, 16, 30, 2),)}, "8x16x30: .*multiples of 8 and 8; nearest: 9x16x32"),
        ({"shapes": ((1, 4, 4, 2),)}, "nearest: 1x8x8"),
        ({"shapes": MIXED, "weights": (1.0,)}, "config.clips.weights=\\(1.0,\\): expected 3 numbers"),
        ({"shapes": MIXED, "weights": (0.0, 0.0, 0.0)}, "not all 0"),
        ({"shapes": MIXED[1:], "image_steps": 5}, "config.clips.image_steps=5: none of clips.shapes has one frame"),
    ],
)
def test_shapes_that_make_no_sense(changes, says):
    c = configs.base().clips
    c.update(changes)
    with pytest.raises(ConfigError, match=says):
        chunks.shapes_of(c, STRIDE)


def test_a_shape_that_no_clip_is_as_large_as():
    with pytest.raises(ConfigError, match="none of the 13 clips is as large as 9x32x32; they are 9x32x24 at most"):
        plan(((9, 32, 32, 1),))


def test_chunks_divide_over_the_mesh():
    sizes = {"data": 2, "fsdp": 2, "context": 4, "tensor": 1}
    chunks.check_fit([Shape(5, 16, 16, 8)], sizes, 2)
    with pytest.raises(ConfigError, match="6 chunks of 5x16x16 don't divide over 4 devices .* nearest: 8"):
        chunks.check_fit([Shape(5, 16, 16, 6)], sizes, 2)
    with pytest.raises(ConfigError, match="height of 5x18x16 doesn't divide over context=4 devices; nearest: 16"):
        chunks.check_fit([Shape(5, 18, 16, 8)], sizes)


def test_a_clip_reaches_to_whole_latents_and_its_edges_stand_several_times():
    source, p = plan(((5, 16, 16, 1),), sizes=[(4, 13, 15), (3, 13, 15)])
    (shape,) = p.shapes
    assert p.eligible[0].tolist() == [0, 1] if STRIDE[0] > 2 else [0]
    for n in range(3):
        (cut,) = p.step(n)
        video, reason = chunks.read_chunk(source, cut, shape)
        clip = source.read(cut.clip, cut.epoch).video
        wanted = np.pad(clip, [(0, b - a) for a, b in zip(clip.shape, (*shape.size, 3), strict=True)], mode="edge")
        assert reason == "" and cut.start == (0, 0, 0) and np.array_equal(video, wanted)
