"""The objective against a plain re-statement of it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.diffusion import path, timesteps
from vidgen.objectives import flow
from vidgen.training.step import row_keys


@pytest.fixture(scope="module")
def batch():
    """Two rows: clips of 8 and 4 tokens and padding; a clip of 8."""
    rng = np.random.default_rng(0)
    segment = np.array([[1] * 8 + [2] * 4 + [0] * 4, [1] * 8 + [0] * 8], np.int32)
    ids = np.array([[1, 50, 51, 1, 60, 0], [1, 70, 0, 0, 0, 0]], np.int32)
    text_segment = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]], np.int32)
    return TokenBatch(
        tokens=rng.integers(0, 256, (2, 16, 768), np.uint8),
        coords=rng.uniform(0, 4, (2, 16, 3)).astype(np.float32),
        segment=segment,
        level=segment,
        context={"text": (ids, text_segment)},
        clip=np.array([[5, 6, -1], [7, -1, -1]], np.int32),
    )


class Oracle:
    """Puts out what it is told to, through the interface of a generator."""

    text = None

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer = tokenizer, answer

    def predict(self, params, noisy, levels, batch):
        return self.answer(noisy, levels, batch)


@pytest.mark.parametrize("space", path.SPACES)
def test_a_perfect_network_has_no_loss_in_any_space(tiny, batch, space):
    tokenizer = generators.from_config(tiny).tokenizer
    clean = tokenizer.encode_blocks(jnp.asarray(batch.tokens))
    tiny.objective.prediction = space

    def perfect(noisy, levels, rows):
        t = jnp.take_along_axis(levels, rows.level, axis=1)[..., None]
        noise = (noisy - (1 - t) * clean) / jnp.maximum(t, 1e-6)
        return path.target(space, clean, noise, t)

    loss_of = flow.loss_of(Oracle(tokenizer, perfect), tiny.objective)
    keys = row_keys(0, np.int32(0), 2)
    assert loss_of(None, batch, keys) < 1e-3
    wrong = flow.loss_of(Oracle(tokenizer, lambda *inputs: perfect(*inputs) + 1), tiny.objective)
    assert wrong(None, batch, keys) > 1


def test_the_loss_re_stated_in_numpy(tiny, batch):
    tiny.objective.update(shift=3.0, shift_tokens=6, time_mean=0.2, time_std=0.7, time_min=0.1)
    tokenizer = generators.from_config(tiny).tokenizer
    seen = {}

    def guess(noisy, levels, rows):
        seen.update(noisy=noisy, levels=levels)
        return 0.5 * noisy

    keys = row_keys(3, np.int32(11), 2)
    loss = flow.loss_of(Oracle(tokenizer, guess), tiny.objective)(None, batch, keys)

    clean = (np.asarray(batch.tokens, np.float32) / 127.5 - 1 + 0.8) / 0.5
    normal, _, noise = map(np.asarray, flow.row_randomness(keys, 3, (16, 768)))
    total = 0.0
    for b, counts in enumerate([[8, 4, 0], [8, 0, 0]]):
        for k, count in enumerate(counts):
            t = 1 / (1 + np.exp(-(0.2 + 0.7 * normal[b, k])))
            shift = 3.0 * np.sqrt(max(count, 1) / 6)
            t = shift * t / (1 + (shift - 1) * t)
            np.testing.assert_allclose(seen["levels"][b, k + 1], t, rtol=1e-5)
            for s in np.flatnonzero(batch.segment[b] == k + 1):
                noisy = (1 - t) * clean[b, s] + t * noise[b, s]
                total += np.mean((0.5 * noisy - clean[b, s]) ** 2) / max(t, 0.1) ** 2
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    assert not np.any(seen["levels"][:, 0])


def test_the_weight_of_a_token_does_not_depend_on_the_batch(tiny, batch):
    tokenizer = generators.from_config(tiny).tokenizer
    loss_of = flow.loss_of(Oracle(tokenizer, lambda noisy, *_: 0.5 * noisy), tiny.objective)
    keys = row_keys(0, np.int32(0), 2)
    one = jax.tree.map(lambda x: x[:1], batch), keys[:1]
    two = jax.tree.map(lambda x: x[1:], batch), keys[1:]
    np.testing.assert_allclose(loss_of(None, batch, keys), loss_of(None, *one) + loss_of(None, *two), rtol=1e-6)


def test_known_tokens_are_given_and_not_trained(tiny, batch):
    tokenizer = generators.from_config(tiny).tokenizer
    clean = np.asarray(tokenizer.encode_blocks(jnp.asarray(batch.tokens)))
    known = np.zeros((2, 16, 768), bool)
    known[0, :4] = True
    rows = batch.replace(known=known, level=np.where(known[..., 0], 0, batch.level))
    assert float(flow.trained(rows).sum()) == float(flow.trained(batch).sum()) - 4
    seen = []
    flow.loss_of(Oracle(tokenizer, lambda noisy, *_: seen.append(noisy) or noisy), tiny.objective)(
        None, rows, row_keys(0, np.int32(0), 2)
    )
    np.testing.assert_allclose(seen[0][0, :4], clean[0, :4], atol=1e-5)
    assert np.abs(seen[0][0, 4:8] - clean[0, 4:8]).max() > 0.1


MASKS = (("first", 0.4), ("extend", 0.4))


def framed(batch, row=slice(None)):
    """The rows with their clips laid out as 4, 2 and 4 latent frames of two tokens."""
    coords = np.zeros((2, 16, 3), np.float32)
    coords[0, :12, 0] = [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    coords[1, :8, 0] = [0, 0, 1, 1, 2, 2, 3, 3]
    return jax.tree.map(lambda x: x[row], batch.replace(coords=coords))


def test_masks_drawn_in_training_are_given_and_not_trained(tiny, batch):
    """Re-stated from the mask of each step: what is known is clean, at level 0, and has no part in loss and weight."""
    tiny.control.masks = MASKS
    tokenizer, rows, seen = generators.from_config(tiny).tokenizer, framed(batch), {}

    def guess(noisy, levels, rows):
        seen.update(noisy=noisy, levels=levels, level=rows.level, known=rows.known)
        return 0.5 * noisy

    loss_of = flow.loss_of(Oracle(tokenizer, guess), tiny.objective, tiny.control)
    weight_of, given = flow.weight_of(tiny.control), 0
    clean = np.asarray(tokenizer.encode_blocks(jnp.asarray(rows.tokens)))
    for step in range(6):
        keys = row_keys(1, np.int32(step), 2)
        loss, weight = loss_of(None, rows, keys), np.asarray(weight_of(rows, keys))
        known, noisy, level = np.asarray(seen["known"])[..., 0], np.asarray(seen["noisy"]), np.asarray(seen["level"])
        given += known.sum()
        np.testing.assert_array_equal(known, (weight == 0) & (rows.segment > 0))
        np.testing.assert_array_equal(level, np.where(known, 0, rows.segment))
        np.testing.assert_allclose(noisy[known], clean[known], atol=1e-5)
        t = np.take_along_axis(np.asarray(seen["levels"]), level, axis=1)
        error = np.mean((0.5 * noisy - clean) ** 2, axis=-1) / np.maximum(t, tiny.objective.time_min) ** 2
        np.testing.assert_allclose(loss, np.sum(weight * error), rtol=1e-4)
    assert given > 10


def test_the_loss_with_masks_is_the_same_in_parts(tiny, batch):
    tiny.control.masks = MASKS
    tokenizer = generators.from_config(tiny).tokenizer
    loss_of = flow.loss_of(Oracle(tokenizer, lambda noisy, *_: 0.5 * noisy), tiny.objective, tiny.control)
    keys = row_keys(1, np.int32(3), 2)
    parts = [loss_of(None, framed(batch, slice(i, i + 1)), keys[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(loss_of(None, framed(batch), keys), sum(parts), rtol=1e-6)


def test_mask_channels_leave_all_tokens_noisy_and_trained(tiny, batch):
    tiny.control.update(masks=(("first", 1.0),), channels="wan")
    tokenizer, seen = generators.from_config(tiny.copy_and_resolve_references()).tokenizer, []
    oracle = Oracle(tokenizer, lambda noisy, levels, rows: seen.append(rows) or noisy)
    oracle.encode_context = lambda params, rows: rows
    flow.loss_of(oracle, tiny.objective, tiny.control)(None, framed(batch), row_keys(0, np.int32(0), 2))
    levels_of = functools.partial(timesteps.evaluation_levels, tiny.objective, count=2)
    keys = row_keys(0, np.int32(0), 2)
    flow.heldout_sums(oracle, None, framed(batch), keys, tiny.objective, levels_of, tiny.control)
    for rows, given in zip(seen, (True, False), strict=False):
        assert rows.known is None and rows.cond.shape == (2, 16, 4 + 768)
        np.testing.assert_array_equal(rows.level, batch.segment)
        mask = np.asarray(rows.cond)[..., :4]
        first = (framed(batch).coords[..., 0] == 0) & (batch.segment > 0)
        np.testing.assert_array_equal(mask, np.repeat((first & given)[..., None], 4, axis=-1))


@pytest.mark.parametrize("span", [(0.0, 0.4), (0.875, 1.0), (0.3, 0.6), (0.999, 1.0)])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_within_a_range_are_the_truncated_distribution(tiny, span, shift):
    """Against the distribution's own definition: the share below t is (F(t) - F(a)) / (F(b) - F(a))."""
    tiny.objective.update(shift=shift, time_mean=0.3, time_std=0.8)
    normal, tokens = np.linspace(-3, 3, 61).astype(np.float32), jnp.full(61, 7.0)
    tiny.objective.time_range = span
    t = np.asarray(timesteps.logit_normal(normal, tiny.objective, tokens), np.float64)
    assert (t >= span[0]).all() and (t <= span[1]).all() and (np.diff(t) >= 0).all() and t[-1] > t[0]

    def above(z):
        return math.erfc(z / math.sqrt(2)) / 2

    def share_above(t):  # of the distribution without the range; of the upper tail, for its digits
        if t in (0, 1):
            return 1.0 - t
        plain = t / (shift - (shift - 1) * t)
        return above((math.log(plain / (1 - plain)) - 0.3) / 0.8)

    a, b = map(share_above, span)
    shares = np.array([(share_above(x) - b) / (a - b) for x in t])
    np.testing.assert_allclose(shares, [above(float(z)) for z in normal], atol=3e-3)


def test_the_whole_range_changes_nothing(tiny):
    tokens, normal = jnp.full(5, 7.0), jnp.linspace(-2, 2, 5)
    plain = timesteps.shifted(jax.nn.sigmoid(normal), 1.0)
    np.testing.assert_array_equal(timesteps.logit_normal(normal, tiny.objective, tokens), plain)


def test_heldout_levels_are_of_the_range(tiny):
    tiny.objective.update(shift=3.0, time_range=(0.5, 0.9))
    levels = np.asarray(timesteps.evaluation_levels(tiny.objective, jnp.full((2, 3), 9.0), 8))
    assert levels.shape == (8, 2, 3) and levels.min() > 0.5 and levels.max() < 0.9
    assert (np.diff(levels[:, 0, 0]) > 0).all()


def test_a_dropped_caption_is_an_empty_prompt(batch):
    dropped = flow.drop_captions(batch, jnp.array([[True, False, False], [False, True, True]]))
    ids, segment = dropped.context["text"]
    np.testing.assert_array_equal(segment, [[1, 0, 0, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(ids, batch.context["text"][0])


def test_noise_belongs_to_the_row_and_the_step():
    keys = row_keys(0, np.int32(4), 3)
    _, _, noise = flow.row_randomness(keys, 2, (4, 8))
    _, _, alone = flow.row_randomness(keys[1:2], 2, (4, 8))
    np.testing.assert_array_equal(noise[1], alone[0])
    _, _, later = flow.row_randomness(row_keys(0, np.int32(5), 3), 2, (4, 8))
    assert not np.any(noise == later)


def test_heldout_is_the_same_every_time_and_grows_easier_with_noise_level(tiny, batch):
    tokenizer = generators.from_config(tiny).tokenizer
    tiny.objective.update(loss="clean")
    oracle = Oracle(tokenizer, lambda noisy, *_: noisy)
    oracle.encode_context = lambda params, rows: rows
    levels_of = functools.partial(timesteps.evaluation_levels, tiny.objective, count=4)
    sums, tokens = flow.heldout_sums(oracle, None, batch, row_keys(1, np.int32(0), 2), tiny.objective, levels_of)
    assert float(tokens) == 20 and sums.shape == (4,)
    assert (np.diff(sums) > 0).all()  # what passes the noise on errs more, the more there is


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction", "x0"),
        ("loss", "huber"),
        ("caption_dropout", 1.5),
        ("time_range", (0.5, 0.2)),
        ("time_range", (0.5,)),
        ("time_range", (0.0, 1.5)),
        ("time_range", ("0", "1")),
    ],
)
def test_bad_settings(tiny, key, value):
    tiny.objective[key] = value
    with pytest.raises(ConfigError, match=f"config.objective.{key}="):
        flow.check(tiny.objective)
