"""GaLore, Adafactor and Muon on stacked layers: what they keep, and what they do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.training import galore, optimizers, program
from vidgen.training.stacks import is_stacked
from vidgen.weights import flatten, nest


def rotations(key, *shape):
    return jnp.linalg.qr(jax.random.normal(key, shape))[0]


def gradient(seed, layers, m, n, strong, floor=0.05):
    """[layers,m,n] with `strong` directions of singular values from 5 to 3, the rest below `floor`."""
    keys = jax.random.split(jax.random.key(seed), 2)
    d = min(m, n)
    values = jnp.concatenate([jnp.linspace(5, 3, strong), jnp.linspace(floor, floor / 2, d - strong)])
    return rotations(keys[0], layers, m, d) * values @ jnp.swapaxes(rotations(keys[1], layers, n, d), 1, 2)


@pytest.mark.parametrize(("m", "n"), [(16, 40), (40, 16), (16, 16)])
def test_the_leading_directions_of_each_layer_are_found(m, n):
    """Against NumPy's SVD, on the smaller side."""
    grads = {"blocks": {"kernel": gradient(0, 3, m, n, strong=4)}}
    optimizer = galore.scale_by_galore(0.9, 0.99, 0.25, 10)
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(grads))
    for layer, g in enumerate(np.asarray(grads["blocks"]["kernel"])):
        u, _, vt = np.linalg.svd(g, full_matrices=False)
        want = u[:, :4] if m <= n else vt[:4].T
        p = np.asarray(state.projection["blocks"]["kernel"][layer])
        np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(p @ p.T, want @ want.T, atol=1e-3)


def test_at_full_rank_and_in_the_axes_of_the_gradient_it_is_adam():
    """A diagonal gradient's directions are the axes, where Adam of the projection is Adam."""
    params = {"head": {"kernel": jnp.zeros((6, 6))}}
    optimizer, adam = galore.scale_by_galore(0.9, 0.99, 1.0, 1000), optax.scale_by_adam(0.9, 0.99)
    state, other = optimizer.init(params), adam.init(params)
    for step in range(3):
        g = jnp.diag(jnp.asarray([9.0, 7.0, 5.0, 3.0, 2.0, 1.0])) * (1 + 0.3 * step)
        updates, state = optimizer.update({"head": {"kernel": g}}, state)
        want, other = adam.update({"head": {"kernel": g}}, other)
        np.testing.assert_allclose(np.diag(updates["head"]["kernel"]), np.diag(want["head"]["kernel"]), rtol=2e-2)


def test_directions_stay_between_their_steps_and_the_moments_follow_them():
    params = {"blocks": {"kernel": jnp.zeros((2, 8, 12))}}
    optimizer = galore.scale_by_galore(0.9, 0.99, 0.5, 6)
    update, state, seen, before = jax.jit(optimizer.update), optimizer.init(params), [], None
    for step in range(13):
        old, g = state, {"blocks": {"kernel": gradient(step, 2, 8, 12, strong=4)}}
        _, state = update(g, state)
        moved = not np.array_equal(old.projection["blocks"]["kernel"], state.projection["blocks"]["kernel"])
        seen += [step] if moved else []
        if moved and step:
            new, mu = state.projection["blocks"]["kernel"], old.mu["blocks"]["kernel"]
            low = jnp.swapaxes(new, 1, 2) @ g["blocks"]["kernel"]
            carried = jnp.swapaxes(new, 1, 2) @ (old.projection["blocks"]["kernel"] @ mu)
            np.testing.assert_allclose(state.mu["blocks"]["kernel"], 0.9 * carried + 0.1 * low, atol=1e-4)
        before = state
    assert seen == [0, 1, 2, 4, 6, 8, 12] and int(before.count) == 13


def test_without_a_gradient_directions_are_kept_orthonormal_and_nothing_moves():
    params = {"blocks": {"kernel": jnp.zeros((2, 8, 12))}}
    optimizer = galore.scale_by_galore(0.9, 0.99, 0.5, 5)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params))
    p = np.asarray(state.projection["blocks"]["kernel"])
    np.testing.assert_allclose(np.swapaxes(p, 1, 2) @ p, np.broadcast_to(np.eye(4), (2, 4, 4)), atol=1e-5)
    assert not np.any(updates["blocks"]["kernel"])


def abstract(config):
    generator = generators.from_config(config)
    return jax.eval_shape(lambda: generator.init(jax.random.key(0), generators.example(config)))


def wan_1_3b():
    """The published widths, with text from a frozen encoder."""
    c = configs.base()
    c.text.update(name="umt5", width=4096, pad=512)
    c.tokenizer.update(stride=(8, 8, 1), patch=(1, 2, 2))
    c.model.update(width=1536, layers=30, heads=12, mlp_dim=8960, bias=True, qk_norm="joint", absolute="none")
    c.model.update(cross_norm=True, final="table", shared_modulation=True, text_mlp=True)
    return c


@pytest.mark.parametrize("make", [lambda: configs.load("configs/quickstart.py"), wan_1_3b], ids=["quickstart", "wan"])
def test_memory_of_the_state_against_adamw(make, monkeypatch):
    """Projections counted; embeddings, modulation and the first and last layers too."""
    monkeypatch.chdir(configs.__file__.rsplit("/", 2)[0])
    config = make()
    params, held = abstract(config), {}
    for name in ("adamw", "galore", "adafactor"):
        config.optimizer.update(name=name, galore_rank=0.25)
        held[name] = optimizers.state_bytes(optimizers.from_config(config), params)
    assert held["adamw"] == pytest.approx(8 * sum(x.size for x in jax.tree.leaves(params)), rel=1e-4)
    assert held["galore"] <= 0.4 * held["adamw"]
    assert held["adafactor"] <= 0.51 * held["adamw"]
    config.optimizer.beta1 = 0.0
    config.optimizer.name = "adafactor"
    assert optimizers.state_bytes(optimizers.from_config(config), params) < 0.01 * held["adamw"]


def test_adafactor_takes_each_layer_of_a_stack_on_its_own():
    config = configs.base()
    config.optimizer.update(name="adafactor", warmup=0, schedule="constant", weight_decay=0.01)
    optimizer = optimizers.from_config(config)
    key = jax.random.key(0)
    scales = jnp.asarray([1.0, 100.0, 0.01])[:, None, None]  # layers that differ, and more of them than columns
    stack = jax.random.normal(key, (3, 40, 64))
    grads = jax.random.normal(jax.random.fold_in(key, 1), (3, 40, 64)) * scales

    def updates(params, grads):
        state = optimizer.init(params)
        for _ in range(2):
            found, state = jax.jit(optimizer.update)(grads, state, params)
        return found, state

    together, state = updates({"blocks": {"kernel": stack}}, {"blocks": {"kernel": grads}})
    for layer in range(3):
        alone, _ = updates({"head": {"kernel": stack[layer]}}, {"head": {"kernel": grads[layer]}})
        np.testing.assert_allclose(together["blocks"]["kernel"][layer], alone["head"]["kernel"], rtol=1e-4)
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert {(3, 40), (3, 64)} <= shapes


@pytest.mark.parametrize("backbone", ["dit", "uvit"])
def test_muon_takes_the_matrices_of_every_layer_on_its_own(tiny, backbone):
    """Of the model as it is: all kernels of blocks with their layers in front, and of the text encoder."""
    tiny.model.update(backbone=backbone, layers=3)
    params = flatten(abstract(tiny))
    found = {path: d for path, d in flatten(optimizers.muon_dimensions(nest(params))).items() if d is not None}
    inside = [
        p for p in params if p.endswith("kernel") and p.startswith(("blocks/", "text/")) and "modulation" not in p
    ]
    assert sorted(found) == sorted(inside) and len(inside) > 8
    for path, dimensions in found.items():
        assert is_stacked(path) == path.startswith("blocks/")
        assert tuple(dimensions) == ((1, 2) if is_stacked(path) else (0, 1)), path
        assert params[path].ndim == 2 + is_stacked(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("galore_rank", 0.0, "galore_rank=0.0: expected 0.001 to 1; nearest: 0.001"),
        ("galore_rank", 1.5, "galore_rank=1.5: .* nearest: 1"),
        ("galore_every", 0, "galore_every=0: expected 1 or more; nearest: 1"),
        ("galore_scale", -1.0, "galore_scale=-1.0: .* nearest: 1e-06"),
        ("name", "galor", "known are muon, adamw, adafactor, galore"),
    ],
)
def test_bad_settings_of_galore(tiny, key, value, message):
    tiny.optimizer[key] = value
    with pytest.raises(ConfigError, match=message):
        program.check(tiny)


@pytest.mark.parametrize(("m", "n"), [(8, 12), (12, 8)])
def test_what_the_projection_leaves_out_is_scaled_by_column_and_grows_slowly(m, n):
    optimizer = galore.scale_by_galore(0.9, 0.99, 0.5, 1000)
    params = {"head": {"kernel": jnp.zeros((m, n))}}
    update, state, before = jax.jit(optimizer.update), optimizer.init(params), None
    for step, floor in enumerate((0.05, 3.0)):  # the second gradient has far more of what is left out
        g = gradient(0, 1, m, n, strong=4, floor=floor)[0]
        updates, state = update({"head": {"kernel": g}}, state)
        # Columns whose smaller side comes first, whichever that is.
        u, g = (np.asarray(x, np.float64) for x in (updates["head"]["kernel"], g))
        u, g = (u, g) if m <= n else (u.T, g.T)
        p = np.asarray(state.projection["head"]["kernel"][0], np.float64)
        inside, rest = p @ (p.T @ u), u - p @ (p.T @ u)
        want = (g - p @ (p.T @ g)) * np.linalg.norm(inside, axis=0) / np.linalg.norm(p.T @ g, axis=0)
        if step == 0:
            np.testing.assert_allclose(rest, want, rtol=1e-2, atol=1e-4)
        else:
            assert np.linalg.norm(want) > 5 * before
            assert np.linalg.norm(rest) == pytest.approx(1.01 * before, rel=1e-3)
            np.testing.assert_allclose(rest / np.linalg.norm(rest), want / np.linalg.norm(want), atol=1e-3)
        before = np.linalg.norm(rest)
        assert float(state.rest["head"]["kernel"][0]) == pytest.approx(before, rel=1e-3)
