"""The causal VAE: shapes, causality, chunks, both of its configs. Parity with its peer is in tests/peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.tokenizers import chunked, vae
from vidgen.tokenizers.vae import CausalVAE, VAEConfig

PLAIN = VAEConfig(4, 0, 3, (1, 2, 2), 1, (True, True))
RESIDUAL = VAEConfig(4, 6, 5, (1, 2, 2), 1, (False, True), residual=True, patch=2)
SHAPES = {"plain": PLAIN, "residual": RESIDUAL}
pytestmark = pytest.mark.usefixtures("quick_compiles")
of_plain = pytest.mark.parametrize("made", ["plain"], indirect=True)  # where the shape makes no difference


@pytest.fixture(scope="module", params=SHAPES)
def made(request, quick_compiles):
    """(module, parameters, a clip, its moments, a decoded clip)."""
    module = CausalVAE(SHAPES[request.param])
    video = jax.random.uniform(jax.random.key(1), (2, 13, 16, 24, 3), minval=-1)
    like = jax.eval_shape(module.init, jax.random.key(0), video[:1, :1])["params"]
    rng = np.random.default_rng(0)  # no two alike, as after some training
    params = jax.tree.map(lambda x: (0.1 + rng.standard_normal(x.shape) / x.shape[-1] ** 0.5).astype(x.dtype), like)
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))
    decode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="decode"))
    moments = encode(params, video)
    return module, params, np.asarray(video), jax.device_get(moments), np.asarray(decode(params, moments[0]))


def test_shapes_follow_the_stride(made):
    module, _, video, (mean, logvar), decoded = made
    t, y, x = module.config.stride
    assert mean.shape == logvar.shape == (2, 1 + 12 // t, 16 // y, 24 // x, module.config.z_dim)
    assert decoded.shape == video.shape
    assert decoded.dtype == mean.dtype == np.float32


def test_released_shapes_have_the_published_number_of_parameters():
    wan22 = VAEConfig(160, 256, 48, residual=True, patch=2)
    for config, stride, count in ((VAEConfig(), (4, 8, 8), 126_892_531), (wan22, (4, 16, 16), 704_688_668)):
        clip = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), jnp.float32)
        params = jax.eval_shape(CausalVAE(config).init, jax.random.key(0), clip)["params"]
        assert config.stride == stride
        assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_chunks_equal_the_whole(made):
    module, params, video, (mean, logvar), decoded = made
    got = chunked.encode(module, params, video, 4)
    np.testing.assert_allclose(got[0], mean, atol=1e-5)
    np.testing.assert_allclose(got[1], logvar, atol=1e-5)
    np.testing.assert_allclose(chunked.decode(module, params, mean, 4), decoded, atol=1e-5)


def test_a_prefix_gives_a_prefix(made):
    module, params, video, (mean, _), _ = made
    changed = video.copy()
    changed[:, 9:] = 0.0
    got, _ = chunked.encode(module, params, changed, 4)
    whole = 1 + 8 // module.config.stride[0]
    np.testing.assert_allclose(got[:, :whole], mean[:, :whole], atol=1e-5)
    assert np.abs(got[:, whole:] - mean[:, whole:]).max() > 1e-2


@of_plain
def test_chunks_of_bytes_equal_chunks_of_floats(made):
    module, params, *_ = made
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 24, 3), np.uint8)
    a, _ = chunked.encode(module, params, video, 4)
    b, _ = chunked.encode(module, params, video / np.float32(127.5) - 1, 4)
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("frames", "expected"), [(1, [1]), (5, [5]), (17, [17]), (21, [17, 4]), (53, [17, 16, 4])])
def test_chunk_shapes(frames, expected):
    assert chunked.shapes(frames, 4, 16) == expected


def test_height_shared_by_devices_equals_one_device(made):
    module, params, _, _, _ = made
    video = jax.random.uniform(jax.random.key(2), (2, 5, 32, 8, 3), minval=-1)

    def loss(params, video):
        mean, logvar = module.apply({"params": params}, video, method="encode")
        return jnp.mean(jnp.square(module.apply({"params": params}, mean, method="decode"))) + jnp.mean(logvar**2)

    step = jax.jit(jax.value_and_grad(loss))
    value, grads = step(params, video)
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(video, NamedSharding(mesh, P("data", None, "context")))
    lowered = step.lower(jax.device_put(params, NamedSharding(mesh, P())), placed)
    compiled = lowered.compile()
    got, got_grads = compiled(jax.device_put(params, NamedSharding(mesh, P())), placed)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()) + 1e-7)
    # Rows at the seams travel; nothing is gathered but what the middle attends to.
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert all("mid_block" in line for line in gathers), gathers
    assert "collective-permute" in compiled.as_text()


def test_remat_and_features_change_nothing(made):
    module, params, _, (mean, _), decoded = made
    again = module.clone(remat=True)
    decode = jax.jit(lambda p, x: again.apply({"params": p}, x, method="decode", features=True))
    again, features = decode(params, mean[:, :1])
    np.testing.assert_allclose(again, decoded[:, :1], atol=1e-5)
    assert features.shape[-1] == params["decoder"]["conv_out"]["kernel"].shape[-2]


@of_plain
def test_bfloat16_stays_near(made):
    module, params, video, (mean, _), _ = made
    half = module.clone(dtype=jnp.bfloat16)
    got, _ = jax.jit(lambda p, x: half.apply({"params": p}, x, method="encode"))(params, video[:, :1])
    assert got.dtype == jnp.float32
    assert np.abs(got - mean[:, : got.shape[1]]).max() < 0.1 * np.abs(mean).max()


def test_norms_that_see_nothing_but_zeros_have_finite_gradients():
    module = CausalVAE(VAEConfig(2, 0, 2, (1,), 1, ()))
    black = -jnp.ones((1, 1, 4, 4, 3))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(module.init, jax.random.key(0), black)["params"])
    grads = jax.jit(jax.grad(lambda p: jnp.sum((module.apply({"params": p}, black) - 1.0) ** 2)))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_config_round_trip():
    c = configs.base()
    assert vae.from_config(c.vae) == VAEConfig()
    assert VAEConfig.from_dict(RESIDUAL.to_dict()) == RESIDUAL


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dim_mult": (1, 2, 4), "temporal_downsample": (True, True), "residual": True}, "no shortcut leads from"),
        ({"dim_mult": (1, 2)}, "expected 1 values"),
        ({"latents_mean": (0.0,)}, "expected z_dim=16"),
        ({"dim_mult": ()}, "a width"),
        ({"dim_mult": (1, 0, 2)}, "a width"),
        ({"dim_mult": (1, 2.0)}, "whole numbers"),
        ({"dim_mult": ((1, 2), (2, 4))}, "whole numbers"),
        ({"dim_mult": 4}, "whole numbers"),
        ({"temporal_downsample": (1, 0, 1)}, "expected True and False"),
        ({"base_dim": "x"}, "base_dim='x': expected a whole number ≥ 1"),
        ({"patch": 0}, "patch=0"),
        ({"z_dim": True}, "z_dim=True"),
        ({"residual": 1}, "residual=1: expected True or False"),
        ({"latents_mean": ("a",) * 16}, "latents_mean=.*finite numbers"),
        ({"latents_std": (float("nan"),) * 16}, "latents_std=.*finite numbers"),
        ({"latents_std": (0.0,) * 16}, "latents_std=.*above 0"),
    ],
)
def test_bad_shapes_are_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        VAEConfig(**values)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match="no setting 'attn'"):
        VAEConfig.from_dict({"attn": 1})


def test_bad_clips_are_refused(made):
    module, params, video, *_ = made
    with pytest.raises(ValueError, match=r"12 frames; expected 1 \+ k·\d, such as \d+ or 13"):
        chunked.encode(module, params, video[:, :12])
    with pytest.raises(ValueError, match="encode: int32; expected floats or uint8"):
        chunked.encode(module, params, video.astype(np.int32))
    with pytest.raises(ValueError, match="decode: uint8; expected floats"):
        chunked.decode(module, params, np.zeros((1, 1, 2, 2, module.config.z_dim), np.uint8))
    with pytest.raises(ValueError, match="multiples of"):
        chunked.encode(module, params, video[:, :5, :15])
    with pytest.raises(ValueError, match="NaN"):
        chunked.encode(module, params, video * np.nan)
    with pytest.raises(ValueError, match="NaN"):
        chunked.decode(module, params, np.full((1, 1, 2, 2, module.config.z_dim), np.inf, np.float32))
