"""Which latent frames are given in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import config as configs
from vidgen.batch import TokenBatch
from vidgen.conditioning import masks
from vidgen.config import ConfigError
from vidgen.objectives import flow
from vidgen.training.step import row_keys

ALL = (("first", 0.3), ("first_last", 0.2), ("extend", 0.3))
draw = jax.jit(masks.draw, static_argnums=2)
CLIPS = ((5, 2), (1, 3), (2, 2), (3, 1))  # (latent frames, tokens a latent frame)


def rows_of(clips, count=1, tick=1.0, padding=3):
    """`count` equal rows of clips one after the other, and padding."""
    segment, time = [], []
    for k, (frames, tokens) in enumerate(clips):
        segment += [k + 1] * (frames * tokens)
        time += np.repeat(np.arange(frames) * tick, tokens).tolist()
    segment, time = (np.array([*x, *[0] * padding]) for x in (segment, time))
    coords = np.zeros((count, len(segment), 3), np.float32)
    coords[..., 0] = time
    segment = np.tile(segment.astype(np.int32), (count, 1))
    clip = np.tile(np.arange(len(clips), dtype=np.int32), (count, 1))
    return TokenBatch(tokens=None, coords=coords, segment=segment, level=segment, clip=clip)


@pytest.mark.parametrize("tick", [1.0, 4 / 24 * 8, 4 / 29.97 * 8])
def test_latent_frames_are_read_off_the_coordinates(tick):
    rows = rows_of(CLIPS, tick=tick)
    frame, frames = masks.latent_frames(rows, 4)
    np.testing.assert_array_equal(frames, [[5, 1, 2, 3]])
    told = np.concatenate([np.repeat(np.arange(n), tokens) for n, tokens in CLIPS])
    np.testing.assert_array_equal(frame[0, : len(told)], told)


def test_each_clip_is_given_what_its_kind_says():
    count = 1500
    rows = rows_of(CLIPS, count)
    shown = draw(rows, row_keys(0, np.int32(1), count), ALL)
    start, end = np.asarray(shown.start), np.asarray(shown.end)
    assert not start[rows.segment == 0].any() and not end[rows.segment == 0].any()
    seen = {}
    for k, (frames, tokens) in enumerate(CLIPS):
        here = rows.segment[0] == k + 1
        a, b = (x[:, here].reshape(count, frames, tokens) for x in (start, end))
        assert (a == a[:, :, :1]).all() and (b == b[:, :, :1]).all()  # a latent frame is given whole
        a, b = a[..., 0], b[..., 0]
        assert (np.diff(a.astype(int), axis=1) <= 0).all()  # from the start, without a gap
        assert not b[:, :-1].any() and not (a & b).any()
        assert not (a | b).all(axis=1).any()  # something is left to draw
        seen[frames] = (a.sum(1), b.any(1))
    lengths, both = seen[5]
    share = np.bincount(lengths, minlength=5) / count
    np.testing.assert_allclose(share, [0.2, 0.5 + 0.075, 0.075, 0.075, 0.075], atol=0.04)
    np.testing.assert_allclose(both.mean(), 0.2, atol=0.04)
    assert (lengths[both] == 1).all()
    assert not seen[1][0].any() and not seen[1][1].any()  # an image
    assert not seen[2][1].any() and seen[2][0].max() == 1  # two latent frames: never both
    np.testing.assert_allclose(seen[2][0].mean(), 0.6, atol=0.04)
    np.testing.assert_allclose(seen[3][1].mean(), 0.2, atol=0.04)


def test_a_row_is_given_the_same_wherever_it_stands():
    rows, keys = rows_of(CLIPS, 6), row_keys(3, np.int32(7), 6)
    whole = draw(rows, keys, ALL)
    part = draw(jax.tree.map(lambda x: x[4:5], rows), keys[4:5], ALL)
    np.testing.assert_array_equal(whole.known[4:5], part.known)
    other = draw(rows, row_keys(3, np.int32(8), 6), ALL)
    assert np.any(np.asarray(whole.known) != np.asarray(other.known))


def test_what_is_given_is_the_same_on_a_mesh():
    """Rows over two devices, and the tokens of each over two."""
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, keys = rows_of(CLIPS, 4), row_keys(0, np.int32(2), 4)
    rows = jax.tree.map(lambda x: x[:, :-1] if x.shape[1] % 2 else x, rows)  # an even number of tokens
    places = jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P("data", "context" if x.shape[1] > 4 else None)), rows)
    spread = jax.jit(lambda b, k: masks.draw(b, k, ALL).known)(jax.device_put(rows, places), keys)
    np.testing.assert_array_equal(spread, draw(rows, keys, ALL).known)


def test_known_tokens_have_no_weight_and_the_rest_all_of_it(tiny):
    tiny.control.masks = ALL
    rows, keys = rows_of(CLIPS, 64), row_keys(0, np.int32(0), 64)
    weight = flow.weight_of(tiny.control)(rows, keys)
    known = draw(rows, keys, ALL).known
    assert np.asarray(known).any()
    np.testing.assert_array_equal(weight, (rows.segment > 0) & ~np.asarray(known))
    tiny.control.channels = "wan"  # where all tokens are noisy, and trained
    np.testing.assert_array_equal(flow.weight_of(tiny.control)(rows, keys), rows.segment > 0)
    tiny.control.update(masks=(), channels="none")
    np.testing.assert_array_equal(flow.weight_of(tiny.control)(rows, keys), flow.trained(rows))
    assert jnp.sum(weight) < jnp.sum(flow.trained(rows))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"control.masks": (("frist", 0.5),)}, "unknown kind 'frist': known are .*; did you mean first"),
        ({"control.masks": ("first", 0.5)}, "'first': expected .kind, share."),
        ({"control.masks": (("first", 0),)}, "first has share 0; expected more than 0"),
        ({"control.masks": (("first", "all"),)}, "first has share 'all'"),
        ({"control.masks": (("first", 0.7), ("extend", 0.4))}, "shares add up to 1.1"),
        ({"control.masks": (("first", 0.2), ("first", 0.4))}, "first stands there twice"),
        ({"control.channels": "wann"}, "unknown channels 'wann': known are none, wan; did you mean wan"),
        ({"control.channels": "wan"}, "config.model.cond=0: .* puts 772 numbers .* set config.model.cond=772"),
        ({"model.cond": 4}, "config.model.cond=4: .*'none' puts 0 numbers"),
        ({"control.masks": (("first", 0.5),), "tokenizer.patch": (2, 1, 1)}, r"expected \(1, 1, 1\)"),
    ],
)
def test_bad_settings(tiny, changes, says):
    with pytest.raises(ConfigError, match=says):
        masks.check(configs.override(tiny, changes))


def test_mask_channels_of_a_vae_are_not_trained(tiny, monkeypatch):
    tiny.tokenizer.name = "vae"
    tiny.control.channels = "wan"
    monkeypatch.setattr(masks, "features", lambda config: 0)
    masks.check(tiny)
    with pytest.raises(ConfigError, match="'wan' with config.tokenizer.name='vae' can be sampled from but not"):
        masks.check_training(tiny)
    tiny.control.channels, tiny.model.image_width = "none", 8
    with pytest.raises(ConfigError, match="config.model.image_width=8: .* not trained"):
        masks.check_training(tiny)
