import errno
import gc
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_weights
from jax.sharding import Mesh

from vidgen import passing
from vidgen.config import ConfigError, base
from vidgen.data import feed
from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.data.feed import batch_like, batches, host_rows, plan
from vidgen.data.hosts import counted_rows, local_rows
from vidgen.data.packing import Packing
from vidgen.data.text import BEGIN, VOCAB, encode_text
from vidgen.geometry import Geometry, from_blocks
from vidgen.objectives.flow import drop_captions
from vidgen.parallel.mesh import AXES
from vidgen.parallel.processes import exit_status
from vidgen.text import frozen
from vidgen.tokenizers.base import BlockTokenizer

GEOMETRY = Geometry(stride=(4, 8, 8), patch=(1, 1, 1), channels=4 * 8 * 8 * 3)
CAPTIONS = ("a red ball falls", "一个红色的球落下", "é" * 30)


class Random:
    """Random clips of a few sizes; `faults` says what goes wrong with which."""

    fingerprint = "random"

    def __init__(self, n=40, faults=None):
        draw = np.random.default_rng(0)
        self.said = [f"{CAPTIONS[i % 3]} {i}" for i in range(n)]
        self.sizes = ClipSizes(
            frames=draw.choice([1, 5, 9, 19], n).astype(np.int32),
            height=draw.choice([16, 24, 37], n).astype(np.int32),
            width=draw.choice([16, 32], n).astype(np.int32),
            fps=np.full(n, 12, np.float32),
            text=np.array([len(c.encode()) for c in self.said], np.int32),
        )
        self.faults = faults or {}

    def read(self, index, epoch):
        if (fault := self.faults.get(index)) and not isinstance(fault, str):
            raise fault
        shape = [int(column[index]) for column in (self.sizes.frames, self.sizes.height, self.sizes.width)]
        if fault == "smaller":
            shape[1] -= 1
        video = np.random.default_rng([index, epoch]).integers(0, 256, (*shape, 3), dtype=np.uint8)
        caption = self.said[index] + ("!" if fault == "longer caption" else "")
        return Clip(video, caption, 12.0)

    def name(self, index):
        return f"clip-{index}"

    def captions(self):
        return None


def setup(source=None, **changes):
    c = base()
    c.rows.update(count=4, tokens=64, segments=8, text=256, caption=48, window=64)
    c.update_from_flattened_dict(changes)
    source = source or Random()
    return source, Packing(source.sizes, GEOMETRY, c.rows, c.seed), BlockTokenizer(GEOMETRY), c


def mesh(*shape):
    """Devices along data, fsdp, context and tensor; one along those that are left out."""
    shape += (1,) * (4 - len(shape))
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("vidgen-feed", "grain-prefetch"))]


def wait_for_no_threads():
    end = time.time() + 10
    while threads() and time.time() < end:
        time.sleep(0.02)
    assert not threads()


def test_rows_hold_what_the_plan_says():
    source, packing, tokenizer, config = setup()
    batch = host_rows(source, packing, tokenizer, config, step=3)
    assert batch.tokens.shape == (4, 64, 4 * 8 * 8 * 3) and batch.tokens.dtype == np.uint8
    assert batch.coords.shape == (4, 64, 3) and batch.coords.dtype == np.float32
    ids, text_segment = batch.context["text"]
    assert ids.shape == text_segment.shape == (4, 256)
    assert batch.known is None and batch.clip.shape == (4, 8)
    np.testing.assert_array_equal(batch.level, batch.segment)
    for b, row in enumerate(packing.step(3)):
        assert (batch.segment[b] > 0).sum() == sum(p.tokens for p in row)
        assert (batch.clip[b] >= 0).sum() == len(row)
        assert batch.tokens[b][batch.segment[b] == 0].sum() == 0
        for p in row:
            mine = batch.segment[b] == p.segment
            assert mine.sum() == p.tokens and batch.clip[b, p.segment - 1] == p.clip
            grid = GEOMETRY.grid(p.frames, p.height, p.width)
            np.testing.assert_array_equal(batch.coords[b][mine], np.stack(np.indices(grid), -1).reshape(-1, 3))
            video = from_blocks(batch.tokens[b][mine].astype(np.float64), grid, GEOMETRY)
            stored = source.read(p.clip, p.epoch).video
            top, side = (stored.shape[1] - p.height) // 2, (stored.shape[2] - p.width) // 2
            stored = stored[:, top : top + p.height, side : side + p.width]
            starts = range(len(stored) - p.frames + 1)
            assert any(np.array_equal(video, stored[t : t + p.frames]) for t in starts)
            mine = text_segment[b] == p.segment
            np.testing.assert_array_equal(ids[b][mine], encode_text(source.said[p.clip], 48))


def test_each_pass_crops_another_stretch_of_a_clip():
    source, packing, tokenizer, config = setup()  # clips of 19 frames are cut to 17: three places to start
    firsts = set()
    for step in range(40):
        for b, row in enumerate(packing.step(step)):
            for p in row:
                if source.sizes.frames[p.clip] == 19 and p.frames == 17:
                    batch = host_rows(source, packing, tokenizer, config, step, [b])
                    tokens = batch.tokens[0][batch.segment[0] == p.segment]
                    video = from_blocks(tokens.astype(float), GEOMETRY.grid(p.frames, p.height, p.width), GEOMETRY)
                    stored = source.read(p.clip, p.epoch).video
                    top, side = (stored.shape[1] - p.height) // 2, (stored.shape[2] - p.width) // 2
                    stored = stored[:, top : top + p.height, side : side + p.width]
                    firsts.add(next(t for t in range(3) if np.array_equal(video[0], stored[t])))
    assert firsts == {0, 1, 2}


def test_time_in_seconds():
    source, packing, tokenizer, config = setup()
    patches = host_rows(source, packing, tokenizer, config, 0).coords
    config.model.time_in_seconds = True
    seconds = host_rows(source, packing, tokenizer, config, 0).coords
    np.testing.assert_allclose(seconds[..., 0], patches[..., 0] * 4 / 12 * 8, rtol=1e-6)
    np.testing.assert_array_equal(seconds[..., 1:], patches[..., 1:])


def test_two_hosts_make_what_one_makes():
    source, packing, tokenizer, config = setup()
    whole = host_rows(source, packing, tokenizer, config, 2)
    halves = [host_rows(source, packing, tokenizer, config, 2, rows) for rows in (slice(0, 2), [2, 3])]
    assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *halves), whole)


@pytest.mark.parametrize("n_threads", [0, 1, 3])
def test_feed_is_host_rows_from_any_step(n_threads):
    source, packing, tokenizer, config = setup(**{"data.threads": n_threads})
    for start, steps in ((0, 6), (4, 2), (packing.steps_per_epoch - 1, 3)):
        with batches(source, packing, tokenizer, config, start, mesh()) as feed:
            for step in range(start, start + steps):
                batch, info = next(feed)
                assert isinstance(batch.tokens, jax.Array) and info.wait >= 0 and info.bad == {}
                assert_equal(batch, host_rows(source, packing, tokenizer, config, step))


@pytest.mark.parametrize(
    "fault, reason",
    [
        (BadClip("cannot be decoded"), "cannot be decoded"),
        ("smaller", "size differs from the index"),
        ("longer caption", "caption is longer than the index says"),
    ],
)
def test_a_bad_clip_is_padding_and_moves_nothing(fault, reason, caplog):
    good, packing, tokenizer, config = setup()
    step, b, bad = next(
        (step, b, row[0]) for step in range(99) for b, row in enumerate(packing.step(step)) if len(row) > 2
    )
    source = Random(faults={bad.clip: fault})
    where = [(b, p) for b, row in enumerate(packing.step(step)) for p in row if p.clip == bad.clip]
    with batches(source, packing, tokenizer, config, step, mesh()) as feed:
        got, info = next(feed)
    assert info.bad == {reason: len(where)}
    assert set(info.bad_clips) == {(f"clip-{bad.clip}", reason)}
    said = [r.getMessage() for r in caplog.records if f"clip-{bad.clip} " in r.getMessage()]
    assert len(said) == 1 and reason in said[0]

    want = jax.tree.map(np.copy, host_rows(good, packing, tokenizer, config, step))
    for b, p in where:
        mine = want.segment[b] == p.segment
        for leaf in (want.tokens, want.coords, want.segment):
            leaf[b][mine] = 0
        want.clip[b, p.segment - 1] = -1
        ids, segment = want.context["text"]
        ids[b][segment[b] == p.segment] = 0
        segment[b][segment[b] == p.segment] = 0
    assert_equal(got, want.replace(level=want.segment))


def test_a_surprise_surfaces_with_the_name_of_the_clip():
    source, packing, tokenizer, config = setup(Random(faults={7: OSError("the disk is gone")}))
    with batches(source, packing, tokenizer, config, 0, mesh()) as feed:
        for _ in range(2):  # and again, where someone goes on after it
            with pytest.raises(ConfigError, match="clip-7 .*OSError: the disk is gone"):
                for _ in range(packing.steps_per_epoch):
                    next(feed)


def test_threads_end_when_the_feed_is_closed_or_dropped():
    feed = batches(*setup(), 0, mesh())
    next(feed)
    assert threads()
    feed.close()
    wait_for_no_threads()
    with pytest.raises(StopIteration):
        next(feed)
    feed = batches(*setup(), 0, mesh())
    next(feed)
    del feed
    gc.collect()
    wait_for_no_threads()


def test_batches_are_ready_before_they_are_asked_for():
    with batches(*setup(), 0, mesh()) as feed:
        next(feed)
        time.sleep(0.5)  # a step
        for _ in range(2):
            assert next(feed)[1].wait < 0.2


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (1, 1, 4), (1, 2, 2), (2, 1, 1, 2)])
def test_devices_share_rows_and_tokens(shape):
    source, packing, tokenizer, config = setup()
    on = mesh(*shape)
    rows, context = shape[0] * shape[1], on.shape["context"]
    with batches(source, packing, tokenizer, config, 5, on) as feed:
        for step in (5, 6):
            batch = next(feed)[0]
            assert_equal(batch, host_rows(source, packing, tokenizer, config, step))
            parts = (4 // rows, 64 // context)
            for leaf in (batch.tokens, batch.coords, batch.segment, batch.level):
                assert {shard.data.shape[:2] for shard in leaf.addressable_shards} == {parts}
            for leaf in (*batch.context["text"], batch.clip):  # whole on each device of the context axis
                assert {shard.data.shape for shard in leaf.addressable_shards} == {(parts[0], leaf.shape[1])}
    np.testing.assert_array_equal(local_rows(on, 4), range(4))
    np.testing.assert_array_equal(counted_rows(on, 4), range(4))


def test_the_shapes_of_a_batch_are_known_before_it_is_read():
    source, packing, tokenizer, config = setup()
    batch = host_rows(source, packing, tokenizer, config, 0)
    like = batch_like(config, tokenizer)
    assert jax.tree.structure(like) == jax.tree.structure(batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), like) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)


def test_rows_and_tokens_that_devices_cannot_share_are_a_clear_error():
    with pytest.raises(ConfigError, match="config.rows.count=6 does not divide over 4 devices .*; nearest: 8"):
        batches(*setup(**{"rows.count": 6}), 0, mesh(2, 2))
    with pytest.raises(ConfigError, match="config.rows.tokens=66 does not divide over context=4 devices; nearest: 64"):
        batches(*setup(**{"rows.tokens": 66}), 0, mesh(1, 1, 4))
    with pytest.raises(ConfigError, match="config.data.threads=-1"):
        batches(*setup(**{"data.threads": -1}), 0, mesh())


def test_text_is_bytes():
    assert encode_text("ab", 9).tolist() == [BEGIN, 99, 100]
    assert encode_text("", 9).tolist() == [BEGIN]
    ids = encode_text("球" * 5, 9)  # three bytes a character: only two fit behind the begin token
    assert len(ids) == 7 and bytes((ids[1:] - 2).tolist()).decode() == "球球"
    assert encode_text("\U0010ffff\x00\ud800", 99).max() < VOCAB and encode_text("\x00", 2).min() > 0


class Indexed(Random):
    """Whose captions stand in the index."""

    def captions(self):
        return self.said


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return text_weights.make_encoder(tmp_path_factory.mktemp("text"))


def with_values(directory, source, **changes):
    changes = {"text.name": "umt5", "text.weights": directory, "rows.caption": 20, "rows.text": 90} | changes
    source, _, tokenizer, config = setup(source, **changes)
    text = frozen.from_config(config)
    return source, plan(source, tokenizer, config, text), tokenizer, config, text


@pytest.mark.parametrize("pad", [0, 30])
@pytest.mark.parametrize("kind", [Random, Indexed])
def test_rows_hold_the_values_of_a_frozen_encoder(encoder, kind, pad):
    source, packing, tokenizer, config, text = with_values(encoder, kind(), **{"text.pad": pad})
    lengths = text.lengths(source.said)
    assert packing.captions_cut == ((lengths > 20).sum() if kind is Indexed else 0)
    batch = host_rows(source, packing, tokenizer, config, 3, text=text)
    values, segment = batch.context["text"]
    assert values.shape == (4, 90, 16) and values.dtype == np.float32 and batch.context["empty"][0].shape == (4, 1, 16)
    shorter = 0
    for b, row in enumerate(packing.step(3)):
        for p in row:
            own = text.encode([source.read(p.clip, p.epoch).caption])[0]
            assert p.text == (pad or (len(own) if kind is Indexed else 20))
            found = values[b][segment[b] == p.segment]
            assert len(found) == (pad or len(own)) and p.text_start == np.argmax(segment[b] == p.segment)
            np.testing.assert_array_equal(found[: len(own)], own)
            assert not found[len(own) :].any()
            shorter += len(own) < 20
        assert not values[b][segment[b] == 0].any()
    assert shorter and not batch.context["empty"][1].any()
    like = batch_like(config, tokenizer, text)
    assert jax.tree.structure(like) == jax.tree.structure(batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), like) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    with batches(source, packing, tokenizer, config, 3, mesh(2, 2), text) as feed:
        assert_equal(next(feed)[0], batch)


@pytest.mark.parametrize("pad", [0, 30])
def test_a_dropped_caption_is_an_empty_prompt(encoder, pad):
    source, packing, tokenizer, config, text = with_values(encoder, Indexed(), **{"text.pad": pad})
    batch = jax.tree.map(jnp.asarray, host_rows(source, packing, tokenizer, config, 0, text=text))
    dropped = np.zeros((4, 8), bool)
    dropped[:, 0] = True
    values, segment = drop_captions(batch, jnp.asarray(dropped), pad > 0).context["text"]
    before, segment_before = batch.context["text"]
    for b in range(4):
        first = np.asarray(segment_before[b] == 1)
        want = np.zeros((first.sum(), 16), np.float32)
        want[0] = text.encode([""])[0][0]
        np.testing.assert_array_equal(values[b][first], want)
        np.testing.assert_array_equal(segment[b][first], [1] + [int(pad > 0)] * (first.sum() - 1))
        np.testing.assert_array_equal(values[b][~first], before[b][~first])
        np.testing.assert_array_equal(segment[b][~first], segment_before[b][~first])


def test_a_frozen_encoder_that_cannot_be_used_shows_before_the_first_row(encoder):
    source, packing, tokenizer, config, _ = with_values(encoder, Indexed())
    planned = frozen.FrozenEncoder("", 16, 20)
    with pytest.raises(ConfigError, match="config.text.weights is empty"):
        batches(source, packing, tokenizer, config, 0, mesh(), planned)
    assert packing.steps_per_epoch and plan(source, tokenizer, config, planned).captions_cut == 0


class Away:
    """A source whose disk is away for so many reads."""

    sizes = ClipSizes(*(np.array([n]) for n in (5, 16, 16)), np.array([8.0]), np.array([9]))

    def __init__(self, error, times):
        self.error, self.times, self.reads = error, times, 0

    def name(self, index):
        return "clip 0"

    def read(self, index, epoch):
        self.reads += 1
        if self.reads <= self.times:
            raise self.error
        return Clip(np.zeros((5, 16, 16, 3), np.uint8), "a circle", 8.0)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("UNAVAILABLE: the server is away"),
        MemoryError(),
    ],
)
def test_a_disk_that_is_away_is_no_fault_of_a_clips(monkeypatch, error):
    monkeypatch.setattr(passing, "PAUSE", 0.0)
    assert feed.read_clip(Away(error, 2), 0, 0).caption == "a circle"
    with pytest.raises(ConfigError, match="reading clip clip 0 .* failed") as told:
        feed.read_clip(Away(error, 3), 0, 0)
    assert exit_status(told.value) == 75  # started again, it may be there


def test_what_a_disk_can_not_read_costs_that_clip_and_what_is_broken_is_asked_once(monkeypatch):
    monkeypatch.setattr(passing, "PAUSE", 0.0)
    for error in (OSError(errno.EIO, "Input/output error"), RuntimeError("INTERNAL: pread: Input/output error")):
        with pytest.raises(BadClip, match="the disk can't read it"):
            feed.read_clip(Away(error, 3), 0, 0)
    for error, kind in ((BadClip("truncated"), BadClip), (KeyError("video"), ConfigError)):
        source = Away(error, 9)
        with pytest.raises(kind):
            feed.read_clip(source, 0, 0)
        assert source.reads == 1
