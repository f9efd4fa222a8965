"""A file of low-rank updates, in diffusers and here, on the same random weights."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers as hf
import jax
import torch
import transformers_torch as peers

from vidgen import config as configs
from vidgen.interop import diffusers, lora
from vidgen.models import lora as updates
from vidgen.weights import flatten, nest

pytestmark = pytest.mark.usefixtures("quick_compiles")
LIMIT = 2e-4  # max abs difference, of outputs of a standard deviation around 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(diffusers' transformer, ours of its files, updates, config.lora, inputs)."""
    directory = tmp_path_factory.mktemp("wan")
    theirs = peers.make_wan()
    theirs.save_pretrained(directory)
    ours = diffusers.load_component(directory)
    c = configs.base().lora
    c.update(rank=3, alpha=5.0, targets=r"blocks/.*(attention|cross)/(query|key|value|out)$|mlp/(up|down)$|text_in$")
    flat = flatten(updates.add(jax.random.key(0), ours.params, c))
    rng = np.random.default_rng(1)
    low = {p: rng.normal(size=x.shape).astype(np.float32) / 4 for p, x in flat.items() if updates.is_low_rank(p)}
    x, text = peers.normal(2, 4, 3, 4, 6, seed=1), peers.normal(2, 7, 24, seed=2)
    return theirs, ours, nest(low), c, (x, np.asarray([900.0, 31.0], np.float32), text)


def run(model, inputs):
    with torch.no_grad():
        x, t, text = map(torch.from_numpy, inputs)
        return model(x, t, text, return_dict=False)[0].numpy()


def test_a_pipeline_loads_our_file_and_gives_the_same(world, tmp_path):
    theirs, ours, low, c, inputs = world
    lora.write(str(tmp_path), low, ours.architecture, c)
    before = run(theirs, inputs)
    pipeline = hf.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=hf.UniPCMultistepScheduler(), transformer=theirs
    )
    pipeline.load_lora_weights(str(tmp_path))
    with_updates = run(pipeline.transformer, inputs)
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(run(theirs, inputs), before, atol=1e-6)
    assert np.abs(with_updates - before).max() > 0.1

    whole = nest(flatten(ours.params) | flatten(low))
    beside = dataclasses.replace(ours, params=updates.scaled(whole, updates.scale(c)))
    assert np.abs(beside(*inputs) - with_updates).max() < LIMIT
    merged = dataclasses.replace(ours, params=updates.merged(whole, updates.scale(c)))
    assert np.abs(merged(*inputs) - with_updates).max() < LIMIT
