"""What a sample is given, as rows of tokens; and that training and sampling tell a model the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import config as configs
from vidgen import sample, weights
from vidgen.batch import TokenBatch
from vidgen.conditioning import given as conditioning
from vidgen.conditioning import masks, rows
from vidgen.conditioning.given import Given
from vidgen.config import ConfigError
from vidgen.geometry import patchify
from vidgen.tokenizers import base as tokenizers
from vidgen.tokenizers.vae import CausalVAE, VAEConfig
from vidgen.training.step import row_keys

SIZE = (13, 16, 16)


@pytest.fixture
def config(tiny):
    tiny.sample.update(frames=13, height=16, width=16)
    tiny.tokenizer.update(stride=(4, 4, 4), patch=(1, 2, 2))
    tiny.control.masks = (("first", 0.3), ("first_last", 0.3), ("extend", 0.3))
    return tiny


def as_wan(config):
    config.control.channels = "wan"
    config.model.cond = masks.features(config)


@pytest.fixture
def video():
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)


def sample_rows(config, tokenizer, count=1, padding=5):
    clip = tokenizer.geometry.tokens(*SIZE)
    return sample.clip_rows(config, tokenizer.geometry, [np.ones(4, np.int32)] * count, SIZE, 32, clip + padding)


def placed(config, tokenizer, *given):
    conditioning.check(config, given)
    return conditioning.place(sample_rows(config, tokenizer, len(given)), given, tokenizer, config, SIZE)


def latents_of(tokenizer, video):
    return np.asarray(tokenizer.latents(tokenizer.fill(video)[None], None)[0])


@pytest.mark.parametrize("name", ["patch", "wavelet"])
def test_known_latents_are_those_of_the_frames(config, video, name):
    config.tokenizer.name = name
    tokenizer = tokenizers.from_config(config.tokenizer)
    own, per_frame = latents_of(tokenizer, video), 4
    found = placed(
        config,
        tokenizer,
        Given(video[0]),
        Given(video[0], video[-1]),
        Given(extend=video[:9]),
        None,
    )
    assert found.known.shape == (4, 21, 1) and found.tokens.shape == (4, 21, 768)
    given = found.known[..., 0]
    np.testing.assert_array_equal(given.sum(1), [4, 8, 12, 0])
    assert (found.level[given] == 0).all() and (found.level[~given & (found.segment > 0)] == 1).all()
    np.testing.assert_allclose(found.tokens[0, :4], own[:4], atol=1e-6)
    np.testing.assert_allclose(found.tokens[2, :12], own[:12], atol=1e-6)
    still = tokenizer.decode_tokens(jnp.asarray(found.tokens[1, :16]), (4, 2, 2))
    still = np.asarray((still + 1) * 127.5)
    np.testing.assert_allclose(still[0], video[0], atol=0.01)
    np.testing.assert_allclose(still[-4:], np.repeat(video[-1:], 4, axis=0), atol=0.01)  # stands still
    assert not found.tokens[0, per_frame:].any()


def wans_mask(given, frames, height, width, stride=4):
    """The mask of Wan's image-to-video pipelines, re-stated: [t, y, x, stride] of a clip whose frames are given or not.

    One a frame of pixels, the first repeated, and then frames in groups of `stride` become channels.
    """
    mask = np.zeros((1, 1, frames, height, width))
    mask[:, :, given] = 1
    first = np.repeat(mask[:, :, :1], stride, axis=2)
    mask = np.concatenate([first, mask[:, :, 1:]], axis=2).reshape(1, -1, stride, height, width)
    return mask.transpose(0, 2, 1, 3, 4)[0].transpose(1, 2, 3, 0)


@pytest.mark.parametrize(
    ("make", "frames"),
    [
        (lambda v: Given(v[0]), [0]),
        (lambda v: Given(v[0], v[-1]), [0, 12]),
        (lambda v: Given(extend=v[:5]), [0, 1, 2, 3, 4]),
        (lambda v: None, []),
    ],
    ids=["first", "first_last", "extend", "nothing"],
)
@pytest.mark.parametrize("name", ["patch", "wavelet"])
def test_wans_channels_are_its_mask_and_the_latents_of_a_grey_clip(config, video, name, make, frames):
    config.tokenizer.name = name
    as_wan(config)
    tokenizer = tokenizers.from_config(config.tokenizer)
    found = placed(config, tokenizer, make(video))
    assert found.known is None and found.tokens is None and found.cond.shape == (1, 21, config.model.cond)

    grey = np.zeros((1, *SIZE, 3), np.float32)
    grey[0, frames] = video[frames] / 127.5 - 1
    latents = np.asarray(tokenizer.encode(jnp.asarray(grey)))[0]
    mask = wans_mask(frames, 13, *latents.shape[1:3])
    np.testing.assert_allclose(found.cond[0, :16], patchify(np.concatenate([mask, latents], -1), (1, 2, 2)), atol=1e-5)
    assert not found.cond[0, 16:].any()


@pytest.mark.parametrize("name", ["patch", "wavelet"])
@pytest.mark.parametrize("channels", ["none", "wan"])
def test_training_tells_what_sampling_tells(config, video, name, channels):
    """Of clips in rows as the feed packs them, whatever is drawn to be given of them."""
    config.tokenizer.name = name
    if channels == "wan":
        as_wan(config)
    tokenizer = tokenizers.from_config(config.tokenizer)
    count = 24
    base = sample_rows(config, tokenizer, count, padding=0)
    fed = TokenBatch(
        tokens=np.tile(tokenizer.fill(video), (count, 1, 1)),
        coords=base.coords,
        segment=base.segment,
        level=base.level,
        clip=np.zeros((count, 1), np.int32),
    )
    keys = row_keys(0, np.int32(5), count)
    trained = rows.in_training(fed, keys, tokenizer, config.control)
    shown = masks.draw(fed, keys, config.control.masks)
    start, end = (np.asarray(x).reshape(count, 4, 4)[..., 0] for x in shown)
    asked = []
    for a, b in zip(start.sum(1), end.any(1), strict=True):
        if channels == "none" and b:  # whose last latent frame a picture that stands still can't be
            asked.append(None)
        elif b:
            asked.append(Given(video[0], video[-1]))
        else:
            asked.append(Given(extend=video[: 1 + (a - 1) * 4]) if a else None)
    assert len({one and one.kind for one in asked}) > 1
    told = conditioning.place(base, asked, tokenizer, config, SIZE)
    if channels == "wan":
        np.testing.assert_allclose(trained.cond, told.cond, atol=1e-5)
        np.testing.assert_array_equal(trained.level, fed.level)
        return
    same = ~end.any(1)
    np.testing.assert_array_equal(np.asarray(trained.known)[same], told.known[same])
    np.testing.assert_array_equal(np.asarray(trained.level)[same], told.level[same])
    latents = np.asarray(tokenizer.latents(fed.tokens, None))
    np.testing.assert_allclose(np.where(told.known, latents, 0), told.tokens, atol=1e-5)


def test_nothing_given_is_rows_as_they_were(config):
    tokenizer = tokenizers.from_config(config.tokenizer)
    assert placed(config, tokenizer, None).known is None


def test_a_vae_gives_the_latents_that_the_whole_clip_has(config, quick_compiles, tmp_path):
    """Causal in time: what is given at the start doesn't depend on what follows."""
    shape = VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
    draw = np.random.default_rng(1)
    like = jax.eval_shape(CausalVAE(shape).init, jax.random.key(0), jnp.zeros((1, 3, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda x: draw.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32), like)
    weights.save(str(tmp_path / "vae"), "vae", shape.to_dict(), params)
    config.tokenizer.update(name="vae", weights=str(tmp_path / "vae"), stride=(), patch=(1, 2, 2))
    config.sample.update(frames=7, height=8, width=8)
    tokenizer, size = tokenizers.from_config(config.tokenizer), (7, 8, 8)  # four latent frames of 2 x 2 tokens
    video = draw.integers(0, 256, (*size, 3), np.uint8)
    rows_of_clip = sample.clip_rows(config, tokenizer.geometry, [np.ones(4, np.int32)], size, 32, 16)
    whole = latents_of(tokenizer, video)

    found = conditioning.place(rows_of_clip, [Given(video[0], video[-1])], tokenizer, config, size)
    np.testing.assert_allclose(found.tokens[0, :4], whole[:4], atol=1e-4)
    np.testing.assert_array_equal(found.known[0, :, 0], [True] * 4 + [False] * 8 + [True] * 4)
    np.testing.assert_allclose(found.tokens[0, 12:], latents_of(tokenizer, video[[-1] * 3])[4:], atol=1e-4)

    as_wan(config)  # grey frames are zeros for the VAE
    beside = conditioning.place(rows_of_clip, [Given(video[0])], tokenizer, config, size).cond
    latents = beside[0].reshape(16, 4, 2 + 4)[..., 2:].reshape(16, 16)
    grey = np.zeros((1, *size, 3), np.float32)
    grey[0, 0] = video[0] / 127.5 - 1
    mean = jax.jit(lambda x: CausalVAE(shape).apply({"params": params}, x, method="encode")[0])(grey)
    np.testing.assert_allclose(latents, patchify(np.asarray(mean[0]), (1, 2, 2)), atol=1e-4)
    np.testing.assert_allclose(latents[:4], whole[:4], atol=1e-4)


def test_what_is_drawn_larger_is_given_larger(config):
    """A sample of 14 x 10 pixels is cut out of one of 16 x 16; what is given lies in its middle."""
    config.sample.update(height=14, width=10)
    frame = np.random.default_rng(1).integers(0, 256, (14, 10, 3), np.uint8)
    tokenizer = tokenizers.from_config(config.tokenizer)
    found = placed(config, tokenizer, Given(frame))
    drawn = np.asarray((tokenizer.decode_tokens(jnp.asarray(found.tokens[0, :4]), (1, 2, 2)) + 1) * 127.5)
    np.testing.assert_allclose(drawn[0, 1:15, 3:13], frame, atol=0.01)


@pytest.mark.parametrize(
    ("frames", "of_sample", "given"),
    [(1, 13, 1), (4, 13, 1), (5, 13, 5), (12, 13, 9), (13, 13, 5), (400, 13, 5), (17, 17, 9), (9, 5, 1)],
)
def test_how_much_of_a_clip_a_sample_starts_with(config, frames, of_sample, given):
    config.sample.frames = of_sample
    assert conditioning.frames_of(frames, config) == given


@pytest.mark.parametrize(
    ("given", "changes", "says"),
    [
        (lambda f: Given(last=f), {}, "--last_frame goes with --first_frame"),
        (lambda f: Given(f, extend=f[None]), {}, "--extend gives the first frames of the sample"),
        (lambda f: Given(f[:8]), {}, r"given.first is uint8 \[8, 16, 3\]; expected uint8 \[16, 16, 3\]"),
        (lambda f: Given(f.astype(float)), {}, "given.first is float64"),
        (lambda f: Given(extend=f), {}, r"given.extend .*expected uint8 \[T, 16, 16, 3\]"),
        (lambda f: Given(extend=f[None][:0]), {}, r"given.extend is uint8 \[0, 16, 16, 3\]"),
        (lambda f: Given(f), {"sample.frames": 1}, "config.sample.frames=1: .*expected 5 or more"),
        (lambda f: Given(f, f), {"sample.frames": 5}, "with --last_frame nothing is left to draw; expected 9"),
        (
            lambda f: Given(f),
            {"control.masks": ()},
            "--first_frame: .*trained with nothing given .config.control.masks",
        ),
        (lambda f: Given(f, f), {"control.masks": (("first", 0.5),)}, "--last_frame: .*trained with first only"),
        (lambda f: Given(f), {"model.image_width": 8}, "config.model.image_width=8: .*features of an image encoder"),
    ],
)
def test_what_cannot_be_given(config, given, changes, says):
    frame = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ConfigError, match=says):
        conditioning.check(configs.override(config, changes), [given(frame)])


def test_an_imported_model_with_mask_channels_wants_frames_and_takes_each_kind(config):
    as_wan(config)
    config.control.masks = ()
    frame = np.zeros((16, 16, 3), np.uint8)
    conditioning.check(config, [Given(frame), Given(frame, frame), Given(extend=frame[None])])
