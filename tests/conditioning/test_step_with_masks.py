"""A step that gives frames: the same in microbatches, and divided by the tokens that are left to draw."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidgen.batch import TokenBatch
from vidgen.diffusion import generator as generators
from vidgen.objectives import flow
from vidgen.training import state as states
from vidgen.training.step import make_step, row_keys

MASKS = (("first", 0.5), ("extend", 0.4))


class Scaling:
    """A generator whose denoiser puts out its input times one number."""

    text = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def predict(self, params, noisy, levels, batch):
        return params["scale"] * noisy


@pytest.fixture
def batch():
    """Four rows of a clip of four latent frames of two tokens, and padding."""
    draw = np.random.default_rng(0)
    segment = np.tile(np.array([1] * 8 + [0] * 2, np.int32), (4, 1))
    coords = np.zeros((4, 10, 3), np.float32)
    coords[:, :8, 0] = np.repeat(np.arange(4), 2)
    ids = np.array([[1, 60, 61]] * 4, np.int32)
    return TokenBatch(
        tokens=draw.integers(0, 256, (4, 10, 768), np.uint8),
        coords=coords,
        segment=segment,
        level=segment,
        context={"text": (ids, np.ones_like(ids))},
        clip=np.arange(4, dtype=np.int32)[:, None],
    )


def test_microbatches_give_the_step_that_the_whole_batch_gives(tiny, batch):
    tiny.control.masks = MASKS
    errors = flow.loss_of(Scaling(generators.from_config(tiny).tokenizer), tiny.objective, tiny.control)
    weight, optimizer = flow.weight_of(tiny.control), optax.sgd(0.1)

    def loss(params, inputs):
        return errors(params, inputs.batch, inputs.keys), (inputs.aux, {})

    given, found = 0, []
    for parts in (1, 2):
        tiny.optimizer.accumulate = parts
        step = jax.jit(make_step(loss, weight, optimizer, tiny))
        state = states.create({"scale": jnp.ones(())}, optimizer)
        for n in range(3):
            state, metrics = step(state, batch)
            left = np.asarray(weight(batch, row_keys(tiny.seed, np.int32(n), 4))).sum()
            assert float(metrics["tokens"]) == left
            given += 32 - left
            found.append([float(metrics[name]) for name in ("loss", "grad_norm", "tokens")])
    assert given > 0
    np.testing.assert_allclose(found[:3], found[3:], rtol=1e-5)
