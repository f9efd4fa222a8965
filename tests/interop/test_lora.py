"""Low-rank updates as files of diffusers' names: what stands where, and what is refused."""

import json

import jax
import numpy as np
import pytest

from vidgen import config as configs
from vidgen import tensors
from vidgen.config import ConfigError
from vidgen.interop import lora, wan_transformer
from vidgen.models import lora as updates
from vidgen.weights import flatten, nest

SETTINGS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 40,
    "num_layers": 3,
}


@pytest.fixture(scope="module")
def world():
    """(architecture, entries, the weights by their names, an update of all kinds of layers, config.lora)."""
    architecture = wan_transformer.read_config(SETTINGS, "config.json")
    entries = lora.entries_of(architecture)
    rng = np.random.default_rng(0)
    theirs = {entry.key: rng.normal(size=entry.stored).astype(np.float32) for entry in entries}
    c = configs.base().lora
    c.update(rank=4, alpha=6.0, targets=r"blocks/.*/(query|key|up|down)$|text_in$|head$")
    ours = {}
    for entry in entries:
        if entry.layer is None:
            ours[entry.path] = entry.to_flax(theirs[entry.key])
        else:
            ours.setdefault(entry.path, [None] * 3)[entry.layer] = entry.to_flax(theirs[entry.key])
    ours = nest({path: np.stack(x) if isinstance(x, list) else x for path, x in ours.items()})
    with_updates = flatten(updates.add(jax.random.key(0), ours, c))
    low = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in with_updates.items() if updates.is_low_rank(p)}
    return architecture, entries, theirs, ours, nest(low), c


def test_merging_there_is_merging_here(world, tmp_path):
    """W + alpha / rank · B A with the file's own arrays is the weight that our merged kernel is written as."""
    architecture, entries, theirs, ours, low, c = world
    lora.write(str(tmp_path), low, architecture, c)
    headers, text = tensors.header(str(tmp_path / lora.FILE))
    file = {key: stored.read() for key, stored in headers.items()}
    merged = flatten(updates.merged(nest(flatten(ours) | flatten(low)), 6.0 / 4))
    changed = 0
    for entry in entries:
        want = theirs[entry.key]
        a = file.get(f"transformer.{entry.key.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            changed += 1
            b = file[f"transformer.{entry.key.removesuffix('.weight')}.lora_B.weight"]
            assert a.shape == (4, entry.stored[1]) and b.shape == (entry.stored[0], 4)
            want = want + 1.5 * b @ a
        array = merged[entry.path] if entry.layer is None else merged[entry.path][entry.layer]
        np.testing.assert_allclose(entry.to_torch(np.asarray(array)), want, atol=1e-4, err_msg=entry.key)
    assert changed == 2 + 3 * 6 and len(file) == 2 * changed
    about = json.loads(json.loads(text)["__metadata__"][lora.METADATA])
    assert about["transformer.r"] == 4 and about["transformer.lora_alpha"] == 6.0
    assert "blocks.2.attn2.to_k" in about["transformer.target_modules"]


def test_what_a_file_cannot_have_is_refused(world):
    architecture, _, _, _, low, c = world
    with pytest.raises(ConfigError, match="text/bytes/embedding trained beside"):
        lora.encode(low | {"text": {"bytes": {"embedding": np.ones(4)}}}, architecture, c)
    embed = {"embed": {"lora_a": np.ones((16, 4), np.float32), "lora_b": np.ones((4, 24), np.float32)}}
    with pytest.raises(ConfigError, match="embed: a low-rank update of what is no matrix in diffusers"):
        lora.encode(low | embed, architecture, c)
