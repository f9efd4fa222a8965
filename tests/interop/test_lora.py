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
from vidgen.weights import flatten, nest, write_safetensors

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


def test_what_is_written_is_read_back(world, tmp_path):
    architecture, _, _, _, low, c = world
    lora.write(str(tmp_path), low, architecture, c)
    for path in (tmp_path, tmp_path / lora.FILE):
        back, rank, alpha = lora.read(str(path), architecture)
        assert (rank, alpha) == (4, 6.0) and flatten(back).keys() == flatten(low).keys()
        for name, array in flatten(back).items():
            np.testing.assert_array_equal(array, flatten(low)[name])


def test_a_file_of_some_layers_without_metadata(world, tmp_path):
    """As trainers write it that update the last blocks alone: alpha is the rank."""
    architecture, _, _, _, low, c = world
    stored, _ = lora.encode(low, architecture, c)
    some = {key: array.astype(np.float16) for key, array in stored.items() if ".blocks.2." in key}
    write_safetensors(str(tmp_path / "some.safetensors"), some)
    back, rank, alpha = lora.read(str(tmp_path / "some.safetensors"), architecture)
    query = back["blocks"]["attention"]["query"]
    assert (rank, alpha) == (4, 4.0) and not query["lora_a"][:2].any() and not query["lora_b"][:2].any()
    np.testing.assert_allclose(query["lora_b"][2], low["blocks"]["attention"]["query"]["lora_b"][2], atol=2e-3)


A = "transformer.blocks.0.attn1.to_q.lora_A.weight"
B = "transformer.blocks.0.attn1.to_q.lora_B.weight"
X, Y = np.ones((4, 24), np.float32), np.ones((24, 4), np.float32)


@pytest.mark.parametrize(
    ("stored", "metadata", "message"),
    [
        ({A: X}, None, r"no blocks.0.attn1.to_q.lora_B.weight; expected shape \[24, 4\]"),
        ({A: X, B: Y[:20]}, None, r"\[20, 4\] as blocks.0.attn1.to_q.lora_B.weight; expected shape \[24, 4\]"),
        ({A: X, B: Y * np.nan}, None, "NaN or infinity"),
        ({A.replace("to_q", "to_qq"): X}, None, "is of no matrix of this model; nearest: blocks.0.attn1.to_q"),
        ({"transformer.blocks.0.attn1.to_q.weight": X}, None, "is no low-rank update; expected"),
        ({A: X, B: Y, A.replace(".0.", ".1."): X[:2], B.replace(".0.", ".1."): Y[:, :2]}, None, r"ranks \[2, 4\]"),
        ({A: X, B: Y}, {lora.METADATA: "{"}, "not what PEFT writes"),
        ({A: X, B: Y}, {lora.METADATA: '{"transformer.r": 8, "transformer.lora_alpha": 8}'}, "expected rank 4 alone"),
    ],
)
def test_bad_files(world, tmp_path, stored, metadata, message):
    path = str(tmp_path / "bad.safetensors")
    write_safetensors(path, stored, metadata)
    with pytest.raises(ConfigError, match=message):
        lora.read(path, world[0])


def test_pickles_and_missing_files_are_refused(world, tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="never read"):
        lora.read(str(tmp_path / "lora.bin"), world[0])
    with pytest.raises(ConfigError, match="no such file"):
        lora.read(str(tmp_path), world[0])


def test_what_a_file_cannot_have_is_refused(world):
    architecture, _, _, _, low, c = world
    with pytest.raises(ConfigError, match="text/bytes/embedding trained beside"):
        lora.encode(low | {"text": {"bytes": {"embedding": X}}}, architecture, c)
    embed = {"embed": {"lora_a": np.ones((16, 4), np.float32), "lora_b": np.ones((4, 24), np.float32)}}
    with pytest.raises(ConfigError, match="embed: a low-rank update of what is no matrix in diffusers"):
        lora.encode(low | embed, architecture, c)
