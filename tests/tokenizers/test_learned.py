"""A VAE as a tokenizer: the feed's moments, the step's draws, decoding, and what is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen import config as configs
from vidgen import sample, train, weights
from vidgen.config import ConfigError
from vidgen.data import feed, latents
from vidgen.data.clip import BadClip
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.diffusion import generator as generators
from vidgen.evaluation.heldout import heldout_loss
from vidgen.geometry import patchify
from vidgen.objectives import flow
from vidgen.parallel.mesh import AXES
from vidgen.tokenizers import base
from vidgen.tokenizers.vae import CausalVAE, VAEConfig
from vidgen.training import restored
from vidgen.training.checkpoint import write_config
from vidgen.training.step import row_keys

MEAN, STD = (0.1, -0.2, 0.3, 0.0), (0.5, 0.25, 1.0, 2.0)
SHAPE = VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 1, 1),
    num_res_blocks=1,
    temporal_downsample=(True, False),
    latents_mean=MEAN,
    latents_std=STD,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Weights of a VAE of stride (2, 4, 4) whose posteriors are wide enough to see what is drawn from them."""
    path = str(tmp_path_factory.mktemp("vae") / "weights")
    like = jax.eval_shape(CausalVAE(SHAPE).init, jax.random.key(0), jnp.zeros((1, 3, 8, 8, 3)))["params"]
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: draw.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32), like)
    weights.save(path, "vae", SHAPE.to_dict(), params)
    return path


@pytest.fixture
def config(tiny, directory):
    tiny.tokenizer.update(name="vae", weights=directory, stride=(2, 4, 4), patch=(1, 2, 2))
    return tiny


def setup(config):
    tokenizer = base.from_config(config.tokenizer)
    source = open_source(config.data, "train")
    return tokenizer, source, Packing(source.sizes, tokenizer.geometry, config.rows, config.seed)


def clip(frames=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), np.uint8)


def test_tokens_are_the_posteriors_normalised_a_channel_each(config):
    tokenizer, *_ = setup(config)
    assert tokenizer.geometry.stride == (2, 4, 4) and tokenizer.geometry.features == 16 and tokenizer.learned
    vae = CausalVAE(SHAPE)
    params = tokenizer.weights.params
    mean, logvar = vae.apply({"params": params}, clip()[None] / np.float32(127.5) - 1, method="encode")
    moments = tokenizer.encode_clip(clip())
    np.testing.assert_allclose(moments, np.concatenate([mean, logvar], axis=-1)[0], atol=1e-5)

    fed = tokenizer.fill(clip())
    assert (fed.shape[-1], fed.dtype) == tokenizer.fed and len(fed) == tokenizer.geometry.tokens(5, 16, 16)
    tokens = tokenizer.latents(jnp.asarray(fed[None]), None)
    want = patchify((mean - np.array(MEAN)) / np.array(STD), (1, 2, 2))
    np.testing.assert_allclose(tokens, want, atol=1e-5)
    back = tokenizer.decode_tokens(tokens, (3, 2, 2))
    np.testing.assert_allclose(back, vae.apply({"params": params}, mean, method="decode"), atol=1e-5)


def test_draws_follow_the_posterior_and_the_row_alone(config):
    tokenizer, *_ = setup(config)
    fed = np.zeros((4, 6, 32), np.float32)
    fed[..., :16], fed[..., 16:] = 3.0, 2 * np.log(0.5)
    keys = row_keys(0, jnp.int32(7), 4)
    drawn = np.asarray(jax.jit(tokenizer.latents)(fed, keys))
    raw = drawn * np.tile(STD, 4) + np.tile(MEAN, 4)
    many = tokenizer.latents(np.repeat(fed, 500, axis=0), row_keys(1, jnp.int32(0), 2000))
    values = np.asarray(many) * np.tile(STD, 4) + np.tile(MEAN, 4)
    np.testing.assert_allclose([values.mean(), values.std()], [3.0, 0.5], atol=0.01)
    assert len(np.unique(raw)) > 0.99 * raw.size  # each value has noise of its own
    np.testing.assert_allclose(tokenizer.latents(fed[2:], keys[2:]), drawn[2:], atol=1e-6)  # whatever stands beside it
    assert np.abs(np.asarray(tokenizer.latents(fed, row_keys(0, jnp.int32(8), 4))) - drawn).max() > 0.1
    mesh = Mesh(np.array(jax.devices()).reshape(2, 1, 2, 1), AXES)  # nor where its rows and tokens lie
    spread = jax.device_put(fed, NamedSharding(mesh, P("data", "context")))
    np.testing.assert_allclose(jax.jit(tokenizer.latents)(spread, keys), drawn, atol=1e-6)
    # Not the noise that the objective adds to the same row: the two would cancel.
    *_, noise = flow.row_randomness(keys, 4, (6, 16))
    assert np.abs(np.corrcoef(np.asarray(noise).ravel(), ((raw - 3) * 2).ravel())[0, 1]) < 0.2


def test_the_latents_of_a_prefix_are_a_prefix(config):
    tokenizer, *_ = setup(config)
    whole = tokenizer.encode_clip(clip(11))
    for frames in (1, 5):
        np.testing.assert_allclose(tokenizer.encode_clip(clip(11)[:frames]), whole[: 1 + frames // 2], atol=1e-5)


def test_a_batch_over_devices_is_each_clip_alone(config):
    tokenizer, *_ = setup(config)
    videos = np.stack([clip(5, seed) for seed in range(4)])
    alone = np.stack([tokenizer.encode_clip(video) for video in videos])
    np.testing.assert_allclose(tokenizer.encode_clips(videos, devices=4), alone, atol=1e-5)
    np.testing.assert_allclose(tokenizer.encode_clips(videos), alone, atol=1e-5)


def test_equal_by_the_weights_digest(config, tmp_path):
    a, b = base.from_config(config.tokenizer), base.from_config(config.tokenizer)
    assert a == b and hash(a) == hash(b) and a.weights is not b.weights
    params = jax.tree.map(np.copy, a.weights.params)
    params["decoder"]["conv_out"]["bias"][0] += 1
    weights.save(str(tmp_path / "other"), "vae", SHAPE.to_dict(), params)
    config.tokenizer.weights = str(tmp_path / "other")
    assert base.from_config(config.tokenizer) != a


def test_rows_hold_the_moments_of_each_clip_from_its_start(config):
    config.data.moving_shapes.sizes = ((7, 16, 20),)
    config.rows.tokens = 12  # room for three latent frames of 2 x 2 tokens: clips of 7 frames are cut to 5
    tokenizer, source, packing = setup(config)
    batch = feed.host_rows(source, packing, tokenizer, config, 0)
    like = feed.batch_like(config, tokenizer)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    for b, row in enumerate(packing.step(0)):
        for p in row:
            video = source.read(p.clip, p.epoch).video
            assert (len(video), p.frames) == (7, 5)
            left = (video.shape[2] - p.width) // 2
            want = tokenizer.fill(video[: p.frames, :, left : left + p.width])
            np.testing.assert_allclose(batch.tokens[b][batch.segment[b] == p.segment], want, atol=1e-5)
        assert not batch.tokens[b][batch.segment[b] == 0].any()


def test_the_feed_encodes_in_its_threads(config):
    config.data.threads = 3
    tokenizer, source, packing = setup(config)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 1, 1), AXES)
    with feed.batches(source, packing, tokenizer, config, 2, mesh) as batches:
        for step in (2, 3):
            batch, info = next(batches)
            assert info.bad == {}
            want = feed.host_rows(source, packing, tokenizer, config, step)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), batch, want)


def test_a_bad_clip_is_padding(config):
    tokenizer, source, packing = setup(config)
    bad = packing.step(0)[0][0]

    class Faulty:
        sizes, name, fingerprint = source.sizes, source.name, "faulty"

        def read(self, index, epoch):
            if index == bad.clip:
                raise BadClip("cannot be decoded")
            return source.read(index, epoch)

    row, told = feed.build_row(Faulty(), packing.step(0)[0], tokenizer, config)
    assert told == [(bad.clip, "cannot be decoded")]
    assert not row.tokens[bad.token_start : bad.token_start + bad.tokens].any()


def test_chunk_shapes_are_few_and_told(config):
    tokenizer, source, packing = setup(config)
    (said,) = latents.notes(source, packing, tokenizer, config)
    assert tokenizer.digest in said and "2 chunk shapes: 1x16x16, 5x16x16" in said
    for side, most in ((16, 16), (256, 4)):  # small pictures go through in longer chunks
        sizes = [(1 + 2 * k, side, side) for k in range(100)]
        assert len(tokenizer.chunk_shapes(np.array(sizes))) <= 1 + most
        chunks = [tokenizer.chunk(*size) for size in sizes]
        assert max(chunks) == most and all((t - 1) % n == 0 for (t, _, _), n in zip(sizes, chunks, strict=True))
    config.data.moving_shapes.sizes = tuple((1, 16, 16 + 8 * k) for k in range(17))
    config.rows.tokens = 256
    tokenizer, source, packing = setup(config)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    with pytest.raises(ConfigError, match="17 sizes .* at most 16 .*vidgen encode"):
        feed.batches(source, packing, tokenizer, config, 0, mesh)
    exact = base.from_config(configs.base().tokenizer)
    assert latents.notes(source, packing, exact, config) == []


def test_loss_heldout_loss_and_samples(config):
    config.objective.prediction = "velocity"
    config.model.update(layers=1, unroll=1)
    generator = generators.from_config(config)
    tokenizer, source, packing = setup(config)
    batch = feed.host_rows(source, packing, tokenizer, config, 0)
    params = jax.jit(lambda key: generator.init(key, generators.example(config)))(jax.random.key(0))
    loss = jax.jit(flow.loss_of(generator, config.objective))
    keys = row_keys(0, jnp.int32(0), 4)
    # The output layer starts at zero, so the error of a velocity is E (noise - latents)².
    value = float(loss(params, batch, keys)) / float(flow.trained(batch).sum())
    clean = np.asarray(tokenizer.latents(batch.tokens, keys))[batch.segment > 0]
    assert abs(value - (1 + (clean**2).mean())) < 0.35 * value

    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    config.train.eval_rows = 4
    judge = heldout_loss(config, generator, mesh)
    first = judge(params)
    assert np.isfinite(list(first.values())).all() and first["heldout_unreadable"] == 0
    assert first == judge(params)

    config.sample.update(frames=4, height=15, width=16)  # drawn at 5 x 16 x 16, then cut
    a, b = sample.draw(config, generator, params, ["one", "one"], seeds=(3, 4), zipped=True)
    assert a.shape == (4, 15, 16, 3) and a.dtype == np.uint8 and (a != b).any()
    again = sample.draw(config, generator, params, ["one"], seeds=(3,))[0]
    assert np.abs(a.astype(int) - again).max() <= 1


def test_a_checkpoint_knows_its_vae(config):
    tokenizer, *_ = setup(config)
    restored.check_tokenizer(tokenizer.digest, {"tokenizer": tokenizer.digest}, "runs/vae")
    restored.check_tokenizer(tokenizer.digest, {}, "runs/vae")  # of before there were any
    with pytest.raises(ConfigError, match=f"runs/vae: VAE {tokenizer.digest}, but .* of 0123"):
        restored.check_tokenizer(tokenizer.digest, {"tokenizer": "0123"}, "runs/vae")


def test_a_run_goes_on_with_its_vae_alone(config, directory, tmp_path, monkeypatch):
    tokenizer, source, _ = setup(config)
    course = SimpleNamespace(source=source, tokenizer=tokenizer.digest, text="")
    state = SimpleNamespace(replace=lambda frozen: "restored")
    task = SimpleNamespace(start=None)
    program = SimpleNamespace(config=config, task=task, init=lambda: "new", state_like=None, frozen=lambda: None)

    def begin(latest, facts):
        kept = SimpleNamespace(
            newest_good=lambda say: latest,
            facts=lambda step: facts,
            restore=lambda step, like: state,
            where="checkpoints",
        )
        return train.begin(program, course, kept, print)

    made, facts = begin(None, {})
    assert made == "new" and facts["tokenizer"] == tokenizer.digest
    assert begin(3, facts) == ("restored", facts)
    with pytest.raises(ConfigError, match=f"VAE {tokenizer.digest}, but the checkpoint was trained on latents of 0123"):
        begin(3, facts | {"tokenizer": "0123"})
    # Where its weights and a cache of its latents lie may change; a workdir keeps whole paths.
    monkeypatch.chdir(tmp_path)
    write_config(str(tmp_path / "run"), config)
    config = configs.override(config, {"tokenizer.weights": "moved", "data.latents": "cache"})
    settled = train._settled(config)
    assert settled.tokenizer.weights == str(tmp_path / "moved") and settled.data.latents == str(tmp_path / "cache")
    assert write_config(str(tmp_path / "run"), settled) == ["data.latents", "tokenizer.weights"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"stride": (4, 8, 8)}, r"stride=\(4, 8, 8\), but the VAE in .* has \(2, 4, 4\)"),
        ({"weights": ""}, "weights is empty"),
        ({"weights": "nowhere"}, "nowhere"),
        ({"patch": (1, 0, 1)}, "three numbers"),
        ({"name": "vea"}, "did you mean vae"),
        ({"name": "patch"}, "patch has no weights"),
    ],
)
def test_bad_settings(config, change, says):
    config.tokenizer.update(change)
    with pytest.raises(ConfigError, match=says):
        base.from_config(config.tokenizer)


def test_bad_weights(config, directory, tmp_path):
    def refused(says, kind="vae", std=None, change=lambda params: None):
        params = jax.tree.map(np.copy, weights.load(directory).params)
        change(params)
        path = str(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        weights.save(path, kind, SHAPE.to_dict() | ({"latents_std": std} if std else {}), params)
        config.tokenizer.weights = path
        with pytest.raises(ConfigError, match=says):
            base.from_config(config.tokenizer)

    refused("kind 'critic'", kind="critic")
    refused(
        r"quant_conv/bias has shape none: it is missing; expected \(8,\)", change=lambda p: p["quant_conv"].pop("bias")
    )
    refused(
        r"quant_conv/more has shape \(3,\); expected no such", change=lambda p: p["quant_conv"].update(more=np.zeros(3))
    )
    refused(r"quant_conv/bias has shape \(7,\)", change=lambda p: p["quant_conv"].update(bias=np.zeros(7)))
    refused("latents_std=.*numbers above 0", std=[0.0, 1.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match="no finite numbers"):
        params = jax.tree.map(np.copy, weights.load(directory).params)
        params["quant_conv"]["bias"][:] = np.nan
        weights.save(str(tmp_path / "nan"), "vae", SHAPE.to_dict(), params)
        config.tokenizer.weights = str(tmp_path / "nan")
        base.from_config(config.tokenizer).encode_clip(clip())


def test_stride_may_be_left_to_the_vae(config):
    config.tokenizer.stride = ()
    assert base.geometry_from_config(config.tokenizer).stride == (2, 4, 4)
