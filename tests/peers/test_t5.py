"""Text encoders and tokenizers against transformers' own, on the same files; needs the extras [peers] and [text]."""

import functools
import json
import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.numpy import load_file, save_file

from vidgen.config import ConfigError
from vidgen.interop import diffusers, t5
from vidgen.text import tokenize
from vidgen.text.t5 import T5Config, relative_buckets

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = {"vocab_size": 61, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 3, "num_heads": 4}
CASES = {
    "t5": ("t5", {"feed_forward_proj": "relu"}),
    "t5_gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("umt5", {"feed_forward_proj": "gated-gelu", "d_kv": 6}),
    "umt5_relu": ("umt5", {"feed_forward_proj": "relu", "tie_word_embeddings": False}),
    "buckets": ("umt5", {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}),
    "one_layer": ("t5", {"num_layers": 1, "num_heads": 1, "layer_norm_epsilon": 1e-5}),
}


def make_theirs(name):
    kind, more = CASES[name]
    config = {"t5": transformers.T5Config, "umt5": transformers.UMT5Config}[kind](**(SIZES | more))
    model = {"t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel}[kind](config).eval()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = 0.5 if value.ndim == 2 else 0.3
            value.copy_(torch.randn(value.shape, generator=draw) * scale + (value.ndim == 1))
            if ".q." in key:  # larger scores are further from what any softmax makes of noise
                value.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name → (transformers' model, ours of its files)."""

    @functools.cache
    def make(name):
        theirs, directory = make_theirs(name), tmp_path_factory.mktemp(name)
        theirs.save_pretrained(directory)
        return theirs, diffusers.load_component(directory)

    return make


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch, length", [(1, 7), (3, 33)])
def test_last_hidden_state_is_that_of_transformers(pairs, name, batch, length):
    theirs, ours = pairs(name)
    draw = np.random.default_rng(length)
    ids = draw.integers(0, SIZES["vocab_size"], (batch, length))
    mask = (np.arange(length) < draw.integers(1, length + 1, (batch, 1))).astype(np.int64)
    mask[0] = 1
    for own in (mask, None):
        with torch.no_grad():
            told = None if own is None else torch.from_numpy(own)
            expected = theirs(torch.from_numpy(ids), attention_mask=told).last_hidden_state.numpy()
        found = ours(ids, own)
        assert found.shape == expected.shape and expected.std() > 0.5
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_buckets_of_distances_are_those_of_transformers():
    attention = transformers.models.t5.modeling_t5.T5Attention
    for buckets, distance in ((32, 128), (8, 20), (16, 100), (64, 256)):
        places = torch.arange(700)
        theirs = attention._relative_position_bucket(places[None] - places[:, None], True, buckets, distance)
        np.testing.assert_array_equal(relative_buckets(700, buckets, distance), theirs.numpy())


def test_config_and_names_are_those_of_transformers():
    released = T5Config(256384, 4096, 64, 10240, 24, 64, gated=True, bias_per_layer=True)  # of Wan
    v11 = T5Config(32128, 4096, 64, 10240, 24, 64, gated=True, bias_per_layer=False)  # T5 v1.1 XXL
    for shape, model, count in (
        (released, transformers.UMT5EncoderModel, 5_680_910_336),
        (v11, transformers.T5EncoderModel, 4_762_310_656),
    ):
        settings = t5.write_config(shape)
        assert t5.read_config(settings, "config.json") == shape == T5Config.from_dict(shape.to_dict())
        with torch.device("meta"):
            theirs = model(model.config_class(**settings))
        state = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
        both = t5.entries(shape, state)
        assert {entry.key: entry.stored for entry in both} == state
        (alone,) = set(both) - set(t5.entries(shape))
        assert alone.key == "encoder.embed_tokens.weight" and alone.path == "embedding"
        assert sum(math.prod(entry.shape) for entry in t5.entries(shape)) == count
        assert sum(p.numel() for p in theirs.parameters()) == count


def test_the_table_goes_by_either_name_or_both(tmp_path):
    theirs = make_theirs("umt5")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    flat = load_file(file)
    (there,) = flat.keys() & set(t5.EMBEDDINGS)
    expected = diffusers.read(tmp_path).flat
    other = next(key for key in t5.EMBEDDINGS if key != there)
    for names in ([other], [there, other]):
        table = {key: flat[there].copy() for key in names}
        save_file({key: value for key, value in flat.items() if key != there} | table, file)
        found = diffusers.read(tmp_path).flat
        assert found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in found)
    table[other][3, 5] += 1
    save_file({key: value for key, value in flat.items() if key != there} | table, file)
    with pytest.raises(
        ConfigError, match=f"{t5.EMBEDDINGS[0]}.*{t5.EMBEDDINGS[1]}|{t5.EMBEDDINGS[1]}.*{t5.EMBEDDINGS[0]}"
    ):
        _ = diffusers.read(tmp_path).flat
    save_file({key: value for key, value in flat.items() if key != there}, file)
    with pytest.raises(ConfigError, match="no tensor shared.weight"):
        diffusers.read(tmp_path)


def test_the_component_refuses_what_it_cannot_take(pairs):
    _, ours = pairs("t5")
    with pytest.raises(ValueError, match="input_ids has 61: expected 0 to 60"):
        ours(np.array([[1, 61]]))
    with pytest.raises(ValueError, match=r"attention_mask of \[1, 3\]: expected \[1, 2\]"):
        ours(np.array([[1, 2]]), np.ones((1, 3)))
    with pytest.raises(ValueError, match="expected integers"):
        ours(np.ones((1, 2), np.float32))


SENTENCES = [
    "A red ball falls onto the green table & rolls away.",
    "Two white cats are jumping over a wooden fence, 4K, slow motion!",
    "The camera pans left: mountains, rivers and fog (at dawn).",
    "一个红色的球从桌子上落下，慢慢地滚走。",
    "两只白色的猫跳过木栅栏，镜头向左移动。",
    "清晨的群山、河流和雾，电影般的光线。",
]
TEXTS = [
    *SENTENCES,
    "",
    "  two   blanks\tand a\nline ",
    "a&amp;lt;b &quot;quoted&quot; &amp;amp;",
    "ｆｕｌｌ width ① ㌖ ﬁ, e\u0301 and é",
    "words unknown: Ψ ☃ 🦖 кот",
    "the red cat " * 30,
    "红色的猫，" * 20,
]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Directories with a unigram tokenizer as T5's come: of both files, and of each alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("tokenizer")
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20),
            model_writer=file,
            vocab_size=100,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder / "json")
    assert (folder / "json" / "tokenizer.json").exists()
    return theirs, {"spiece.model": folder, "tokenizer.json": folder / "json"}


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("limit", [5, 32, 512])
def test_tokens_are_those_of_transformers(shipped, file, limit):
    theirs, folders = shipped
    ours = tokenize.load(folders[file])
    assert ours.file.endswith(file)
    texts = [tokenize.clean_prompt(text) for text in TEXTS]
    expected = theirs(texts, truncation=True, max_length=limit)["input_ids"]
    found = ours.encode(texts, limit)
    assert [ids.tolist() for ids in found] == expected
    assert found[6].tolist() == [1] and max(map(len, found)) == min(limit, max(ours.lengths(texts)))
    np.testing.assert_array_equal(ours.lengths(texts), [len(ids) for ids in theirs(texts)["input_ids"]])
    assert all(ids[-1] == 1 for ids in found) and max(map(max, found)) < ours.size


def test_prompts_are_cleaned_as_wan_does(monkeypatch):
    pipeline = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    monkeypatch.setattr(pipeline, "is_ftfy_available", lambda: False)
    for text in TEXTS:
        assert tokenize.clean_prompt(text) == pipeline.prompt_clean(text)


def test_settings_that_are_not_there_are_named():
    good = t5.write_config(T5Config(61, 8, 4, 16, 1, 2))
    for change, says in (
        ({"model_type": "bert"}, "model_type='bert': expected t5 or umt5"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu' is not implemented"),
        ({"num_heads": 0}, "num_heads=0: expected a whole number"),
        ({"is_decoder": True}, "is_decoder=true"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small'"),
        ({"relative_attention_num_buckets": 9}, "buckets=9: expected an even number"),
    ):
        with pytest.raises(ConfigError, match=f"^x/config.json: {says}"):
            t5.read_config(good | change, "x/config.json")
