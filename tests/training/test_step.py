"""The step: one loss over devices and microbatches, and guards that hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tiny

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data import feed
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.diffusion import generator as generators
from vidgen.objectives import flow
from vidgen.parallel.mesh import batch_shardings, make_mesh
from vidgen.parallel.rules import rules_of, tree_shardings
from vidgen.training import optimizers
from vidgen.training import state as states
from vidgen.training.step import make_step, row_keys


@pytest.fixture(scope="module")
def world():
    """(generator, first parameters, a batch) of the tiny config."""
    config = make_tiny()
    generator = generators.from_config(config)
    source = open_source(config.data, "train")
    packing = Packing(source.sizes, generator.tokenizer.geometry, config.rows, config.seed)
    batch = feed.host_rows(source, packing, generator.tokenizer, config, 0)
    params = jax.jit(generator.init)(jax.random.key(0), generators.example(config))
    # adaLN-Zero starts with gradients that are zero but for the last layer's, which would prove little.
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return generator, params, batch


def plain(errors):
    """A loss of the denoiser's kind, (params, rows, keys) → error, as the step wants it."""
    return lambda params, inputs: (errors(params, inputs.batch, inputs.keys), (inputs.aux, {}))


def stepped(world, config, mesh=None, steps=1):
    """(state, metrics) after `steps` steps on the same batch."""
    generator, params, batch = world
    optimizer = optimizers.from_config(config)
    if mesh is not None:
        generator = generators.from_config(config, mesh)
    state = states.create(params, optimizer)
    loss = plain(flow.loss_of(generator, config.objective))
    if mesh is not None:
        shardings, rows = tree_shardings(state, mesh, rules_of(config.mesh)), batch_shardings(mesh, batch)
        state, batch = jax.device_put(state, shardings), jax.device_put(batch, rows)
        step = make_step(loss, flow.weight_of(config.control), optimizer, config, shardings.params)
        step = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, None))
    else:
        step = jax.jit(make_step(loss, flow.weight_of(config.control), optimizer, config))
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def apart(a, b):
    """Largest difference of two trees, relative to the largest value."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max() / (np.abs(y).max() + 1e-8)) for x, y in leaves)


@pytest.fixture(scope="module")
def reference(world):
    return stepped(world, make_tiny())


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2},
        {"fsdp": 4, "rules": "fsdp"},
        {"fsdp": 2, "context": 2},
        {"context": 4, "attention": "ring"},
        {"fsdp": 2, "context": 2, "accumulate": 2},
        {"context": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 2},
    ],
    ids=str,
)
def test_any_mesh_equals_one_device(world, reference, sizes):
    config = make_tiny()
    config.mesh.update({"data": 1} | {k: v for k, v in sizes.items() if k != "accumulate"})
    config.optimizer.accumulate = sizes.get("accumulate", 1)
    mesh = make_mesh(config.mesh, config.rows.count, config.rows.tokens, config.optimizer.accumulate)
    state, metrics = stepped(world, config, mesh)
    np.testing.assert_allclose(metrics["loss"], reference[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], reference[1]["grad_norm"], rtol=1e-4)
    # Muon makes every direction of an update as long as the others, so rounding shows more than in the loss.
    assert apart(state.params, reference[0].params) < 2e-3
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (4 // sizes.get("data", 1))


def test_optimizer_and_average_are_sharded_like_the_parameters(world):
    config = make_tiny()
    config.mesh.update(fsdp=4)
    mesh = make_mesh(config.mesh, config.rows.count, config.rows.tokens)
    state = jax.eval_shape(lambda: states.create(world[1], optimizers.from_config(config)))
    shardings = tree_shardings(state, mesh, rules_of(config.mesh))

    def share(tree, specs):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True)
        return sum(np.prod(s.shard_shape(x.shape)) for x, s in pairs) / sum(x.size for x in jax.tree.leaves(tree))

    own = share(state.params, shardings.params)
    assert own < 0.4  # 0.25, but for norms, biases and what does not divide
    np.testing.assert_allclose(share(state.ema, shardings.ema), own)
    assert share(state.opt_state, shardings.opt_state) < 0.4


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(world, reference, parts):
    config = make_tiny()
    config.optimizer.accumulate = parts
    state, metrics = stepped(world, config)
    np.testing.assert_allclose(metrics["loss"], reference[1]["loss"], rtol=1e-5)
    assert apart(state.params, reference[0].params) < 2e-3


def test_bfloat16_products_keep_float32_weights_and_nearly_the_loss(world):
    generator, params, batch = world
    keys = row_keys(0, np.int32(0), 4)
    config = make_tiny()
    config.dtype = "bfloat16"
    half = generators.from_config(config)
    assert {x.dtype.name for x in jax.tree.leaves(jax.eval_shape(half.init, keys[0], generators.example(config)))} == {
        "float32"
    }
    losses = [float(jax.jit(flow.loss_of(g, config.objective))(params, batch, keys)) for g in (generator, half)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)


def test_the_gradient_equals_finite_differences(world):
    generator, params, batch = world
    config = make_tiny()
    loss = flow.loss_of(generator, config.objective)
    keys = row_keys(0, np.int32(0), 4)
    tangent = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size + 1), x.shape), params)
    run = jax.jit(lambda p: loss(p, batch, keys) / 100)
    analytic = sum(
        jnp.vdot(g, t)
        for g, t in zip(jax.tree.leaves(jax.jit(jax.grad(run))(params)), jax.tree.leaves(tangent), strict=True)
    )
    h = 1e-3
    shifted = [run(jax.tree.map(lambda p, t, s=s: p + s * h * t, params, tangent)) for s in (1, -1)]
    np.testing.assert_allclose(analytic, (shifted[0] - shifted[1]) / (2 * h), rtol=2e-2)


def test_the_average_ramps_up_from_the_first_weights(world, reference):
    _, params, _ = world
    state = reference[0]
    want = jax.tree.map(lambda old, new: old + (1 - 0.1) * (new - old), params, state.params)  # (1 + 0) / (10 + 0)
    assert apart(state.ema, want) < 1e-4


def quadratic(config, gradients):
    """States of a run whose gradients are given."""
    optimizer = optax.sgd(1.0)
    errors = plain(lambda p, b, k: jnp.vdot(p["w"], b.tokens[0, 0]))
    step = make_step(errors, lambda b, keys: jnp.ones((1, 1)), optimizer, config)
    state = states.create({"w": jnp.zeros(2)}, optimizer)
    states_ = [state]
    for g in gradients:
        one = jnp.ones((1, 1), jnp.int32)
        batch = TokenBatch(tokens=jnp.asarray(g)[None, None], coords=None, segment=one, level=one)
        states_.append(step(states_[-1], batch)[0])
    return states_


def test_gradients_are_clipped_by_their_global_norm():
    config = make_tiny()
    config.optimizer.update(clip=1.0, outlier=0.0)
    after = quadratic(config, [(3.0, 4.0), (0.3, 0.4)])
    np.testing.assert_allclose(after[1].params["w"], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(after[2].params["w"], [-0.9, -1.2], rtol=1e-6)


def test_outliers_and_nans_are_skipped_and_counted():
    config = make_tiny()
    config.optimizer.update(clip=0.0, outlier=10.0)
    usual = [(1.0, 0.0)] * 21
    after = quadratic(config, [*usual, (20.0, 0.0), (np.nan, 0.0), (1.0, 0.0)])
    assert [int(s.skipped) for s in after[-4:]] == [0, 1, 2, 2]
    np.testing.assert_array_equal(after[-2].params["w"], after[-4].params["w"])
    np.testing.assert_array_equal(after[-2].ema["w"], after[-4].ema["w"])
    assert float(after[-1].params["w"][0]) == -22.0 and int(after[-1].step) == 24


def test_of_a_batch_without_a_clip_nothing_is_learned():
    """Moments and decay would move the weights though no gradient does, and the usual norm would sink."""
    config, optimizer = make_tiny(), optax.adamw(0.1, weight_decay=0.5)
    errors = plain(lambda p, b, k: jnp.vdot(p["w"], b.tokens[0, 0]))
    step = make_step(errors, lambda b, keys: b.segment.astype(jnp.float32), optimizer, config)
    state = states.create({"w": jnp.ones(2)}, optimizer)
    for segment, skipped in ((1, 0), (0, 1), (0, 2), (1, 2)):
        here = jnp.full((1, 1), segment, jnp.int32)
        before = state
        state, metrics = step(state, TokenBatch(jnp.ones((1, 1, 2)) * segment, coords=None, segment=here, level=here))
        assert (int(metrics["skipped"]), int(state.step)) == (skipped, int(before.step) + 1)
        same = np.array_equal(state.params["w"], before.params["w"])
        assert same == (not segment) and (segment or float(state.grad_norm) == float(before.grad_norm))


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is():
    config = make_tiny()
    config.optimizer.update(clip=0.0, outlier=0.0)
    optimizer = optax.sgd(1.0)
    errors = plain(lambda p, b, k: jnp.sum(p["w"]) + jax.lax.stop_gradient(b.tokens[0, 0, 0]))
    step = make_step(errors, lambda b, keys: jnp.ones((1, 1)), optimizer, config)
    state, one = states.create({"w": jnp.zeros(2)}, optimizer), jnp.ones((1, 1), jnp.int32)
    for number, skipped, weight in ((1.0, 0, -1.0), (np.inf, 1, -1.0), (np.nan, 2, -1.0), (1.0, 2, -2.0)):
        batch = TokenBatch(tokens=jnp.full((1, 1, 1), number), coords=None, segment=one, level=one)
        state, metrics = step(state, batch)
        assert (int(metrics["skipped"]), float(state.params["w"][0])) == (skipped, weight)
        assert np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["usual_norm"])


def test_a_norm_that_stays_high_is_no_outlier():
    config = make_tiny()
    config.optimizer.update(clip=0.0, outlier=10.0)
    after = quadratic(config, [(1.0, 0.0)] * 21 + [(11.0, 0.0)] * 12)
    assert 0 < int(after[-1].skipped) < 6 and float(after[-1].params["w"][0]) < -21 - 11 * 5


def test_critics_are_clipped_by_a_norm_of_their_own():
    grads = {"vae": {"w": jnp.asarray([3.0, 4.0])}, "critics": {"w": jnp.asarray([0.0, 20.0])}}
    norm, scaled = optimizers.clipped(grads, 1.0)
    assert norm == 5.0
    np.testing.assert_allclose(scaled["vae"]["w"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(scaled["critics"]["w"], [0.0, 1.0], rtol=1e-6)
    for grads_, most in ((grads, 0.0), ({"vae": grads["vae"], "critics": {"w": jnp.zeros(2)}}, 100.0)):
        for name in grads_:
            np.testing.assert_array_equal(optimizers.clipped(grads_, most)[1][name]["w"], grads_[name]["w"])
    broken = grads | {"critics": {"w": jnp.asarray([np.nan, 0.0])}}
    assert not np.isfinite(optimizers.clipped(broken, 1.0)[0])  # so that the step is skipped


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cosine", [0.5, 1, 0.5]), ("linear", [0.5, 1, 0.5]), ("constant", [0.5, 1, 1]), ("wsd", [0.5, 1, 1])],
)
def test_schedules(name, shape):
    config = make_tiny()
    config.optimizer.update(schedule=name, warmup=10, final=0.0)
    lr = optimizers.schedule(config.optimizer, 2.0, 110)
    np.testing.assert_allclose([lr(4) / 2, lr(10) / 2, lr(60) / 2], shape, atol=0.06)
    if name != "constant":
        assert lr(110) < 1e-6
    if name == "wsd":
        assert lr(89) == 2.0 and abs(lr(100) - 1.0) < 0.02
    assert lr(0) > 0
    rates = optimizers.rates(config.optimizer, 2.0, 110)
    np.testing.assert_allclose(rates, [lr(n) for n in range(110)], atol=1e-6)


def test_bad_settings(tiny):
    tiny.optimizer.name = "sgd"
    with pytest.raises(ConfigError, match="known are muon, adamw"):
        optimizers.from_config(tiny)
    tiny.optimizer.update(name="adamw", schedule="step")
    with pytest.raises(ConfigError, match="known are cosine"):
        optimizers.from_config(tiny)
