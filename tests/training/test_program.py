"""What a config and a mesh decide without data, and that a mesh changes nothing of what is computed."""

import jax
import numpy as np
import pytest

from vidgen import sample
from vidgen.data import feed
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.diffusion import generator as generators
from vidgen.evaluation.heldout import heldout_loss
from vidgen.parallel.mesh import make_mesh
from vidgen.training.program import build


def program(config, devices=4, **axes):
    config.model.update(layers=1, unroll=1)
    config.text.layers = 0
    config.optimizer.name = "adamw"
    config.mesh.update(axes)
    return build(config, make_mesh(config.mesh, config.rows.count, config.rows.tokens, 1, jax.devices()[:devices]))


def facts(x):
    return x.shape, x.dtype, x.sharding


def test_all_lies_where_the_program_says_before_and_after_a_step(tiny):
    p = program(tiny, fsdp=2, context=2)
    state = p.init()
    assert jax.tree.map(facts, state) == jax.tree.map(facts, p.state_like)
    assert p.state_like.params["blocks"] and any(not s.is_fully_replicated for s in jax.tree.leaves(p.state_shardings))

    source, tokenizer = open_source(tiny.data, "train"), p.generator.tokenizer
    packing = Packing(source.sizes, tokenizer.geometry, tiny.rows, tiny.seed)
    with feed.batches(source, packing, tokenizer, tiny, 0, p.mesh) as batches:
        batch = next(batches)[0]
    assert jax.tree.map(facts, batch) == jax.tree.map(facts, p.batch_like)
    assert jax.tree.map(lambda x: x.sharding, batch) == p.batch_shardings

    state, metrics = p.step(state, batch)
    assert jax.tree.map(facts, state) == jax.tree.map(facts, p.state_like)
    assert all(x.is_fully_replicated for x in metrics.values()) and int(state.step) == 1


@pytest.mark.parametrize(
    ("axes", "height"),
    [({"fsdp": 2, "context": 2}, 16), ({"data": 1, "context": 4}, 24)],  # of 24 pixels: 6 tokens, for 4 devices
)
def test_samples_and_heldout_loss_do_not_depend_on_the_mesh(tiny, axes, height):
    tiny.sample.update(frames=1, height=height)
    tiny.train.eval_rows = 4
    p = program(tiny, **axes)
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), p.init().ema)
    params = jax.device_put(params, p.state_shardings.ema)
    one = jax.device_put(jax.device_get(params), jax.devices()[0])
    alone = generators.from_config(tiny)

    asked = {"prompts": ["a red circle", "a blue square", "nothing"], "seeds": (3,), "negative": "a green circle"}
    videos = sample.draw(tiny, p.generator, params, **asked)
    expected = sample.draw(tiny, alone, one, **asked)
    assert len(videos) == len(expected) == 3 and not np.array_equal(expected[0], expected[1])
    for video, like in zip(videos, expected, strict=True):
        assert video.shape == like.shape == (1, height, 16, 3)
        assert np.abs(video.astype(int) - like).max() <= 1

    config = program(tiny, devices=1, data=1, fsdp=1, context=1)
    loss, like = heldout_loss(tiny, p.generator, p.mesh)(params), heldout_loss(tiny, alone, config.mesh)(one)
    assert loss.keys() == like.keys()
    for name in like:
        np.testing.assert_allclose(loss[name], like[name], rtol=1e-4, err_msg=name)
