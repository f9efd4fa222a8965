"""What the backward pass computes again changes its cost and never its result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny

from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.models import remat
from vidgen.parallel.mesh import make_mesh
from vidgen.training import program


def test_presets_and_single_tensors_combine():
    actions = remat.parse("attention, mlp_up=offload, attention_lse=recompute")
    assert actions["attention_out"] == "save" and actions["mlp_up"] == "offload"
    assert actions["attention_lse"] == actions["query"] == "recompute"
    assert remat.saved("full") == {"residual"} and remat.saved("none") == set(remat.NAMES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("atention", "did you mean attention"),
        ("mlp_up=keep", "an action of save, recompute, offload"),
        ("mlp_upp=save", "did you mean mlp_up"),
        ("mlp_up", "neither a preset"),
        ("none, mlp_up=offload", "none keeps all there is and stands alone"),
    ],
)
def test_what_is_not_known_is_told(text, says):
    with pytest.raises(ConfigError, match=says):
        remat.parse(text)


def gradient(setting, kernel="blockwise"):
    """(a function that gives the gradient of a sum over the model's output, its arguments)."""
    config = make_tiny()
    config.model.update(remat=setting, unroll=1, attention=kernel)
    generator = generators.from_config(config)
    batch = jax.tree.map(jnp.asarray, generators.example(config))
    ids = jnp.arange(24)[None] // 8
    batch = batch.replace(segment=ids, level=jnp.minimum(ids, 1))
    params = jax.jit(generator.init)(jax.random.key(0), batch)
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    noisy = jax.random.normal(jax.random.key(1), (1, 24, 768))
    levels = jnp.asarray([[0.0, 0.5]])
    return jax.grad(lambda p: jnp.sum(generator.predict(p, noisy, levels, batch) ** 2)), params


@pytest.fixture(scope="module")
def reference():
    run, params = gradient("none")
    return jax.jit(run)(params)


def test_what_is_offloaded_is_sent_to_the_host():
    for setting, names in (("offload", 2), ("attention, mlp_up=offload", 1), ("attention", 0)):
        run, params = gradient(setting)
        jaxpr = str(jax.make_jaxpr(run)(params))
        assert jaxpr.count("MemorySpace.Host") == names, setting


@pytest.mark.parametrize("setting", ["full", "attention", "products", "offload", "attention, mlp_up=offload"])
def test_the_gradient_is_the_same(reference, setting):
    run, params = gradient(setting)
    for a, b in zip(jax.tree.leaves(jax.jit(run)(params)), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_what_is_kept_is_not_computed_again():
    found = {}
    for setting in ("none", "full", "attention", "products"):
        run, params = gradient(setting)
        found[setting] = str(jax.make_jaxpr(run)(params)).count("dot_general[")
    # What is kept shortens the way back: nothing, then attention's loop, then all of a block's products but modulation.
    assert found["none"] < found["products"] < found["attention"] < found["full"]
    assert found["products"] - found["none"] <= 8  # the picks of modulation


@pytest.mark.parametrize("setting", ["none", "full", "attention", "products"])
def test_gathered_weights_are_never_kept(setting):
    """Each is gathered once forward and once backward, whatever else is kept."""
    config = make_tiny()
    config.mesh.update(data=1, fsdp=4)
    config.model.update(remat=setting, unroll=1)
    mesh = make_mesh(config.mesh, config.rows.count, config.rows.tokens)
    built = program.build(config, mesh)
    gathers = str(jax.make_jaxpr(built.step)(built.state_like, built.batch_like)).count(" all_gather[")
    forward = str(
        jax.make_jaxpr(lambda p, b: built.generator.predict(p, b.tokens, b.level[:, :5].astype(jnp.float32), b))(
            built.state_like.params, built.batch_like.replace(tokens=jnp.zeros((4, 24, 768)))
        )
    ).count(" all_gather[")
    assert forward > 10 and gathers == 2 * forward
