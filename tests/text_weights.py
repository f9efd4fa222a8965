"""A directory as `vidgen import` makes it of a pipeline: text_encoder/, of random weights, and tokenizer/."""

import json

import numpy as np

from vidgen import weights
from vidgen.text import frozen
from vidgen.text.t5 import T5Config

WORDS = ["red", "blue", "ball", "circle", "square", "moves", "falls", "left", "right", "the", "a", "红色", "球"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!&;的落下"


def make_tokenizer(directory, end=True, more=()):
    """`tokenizer.json` of a unigram model as T5's are: pad 0, end 1, unknown 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -4.0) for letter in (*LETTERS, *more)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    space = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    tokenizer.decoder = decoders.Metaspace(**space)
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return len(vocab)


def make_encoder(directory, seed=0, dtype=np.float32, **changes):
    """The path of text_encoder/ in `directory`, of kind umt5 unless bias_per_layer=False; its width is 16."""
    size = make_tokenizer(directory / "tokenizer")
    sizes = {"vocab": size + 3, "width": 16, "head_dim": 6, "mlp_dim": 24, "layers": 2, "heads": 2}
    config = T5Config(**(sizes | {"bias_per_layer": True} | changes))
    draw = np.random.default_rng(seed)
    flat = {
        name: (draw.normal(0, 0.4, like.shape) + name.endswith("scale")).astype(dtype)
        for name, like in frozen.shapes(config).items()
    }
    weights.save(str(directory / "text_encoder"), config.kind, config.to_dict(), weights.nest(flat))
    return str(directory / "text_encoder")


def rewrite(directory, change):
    """Changes the arrays of a weights directory, {name: array}, in place."""
    file = f"{directory}/{weights.TENSORS}"
    flat = weights.read_safetensors(file)
    change(flat)
    weights.write_safetensors(file, flat)


def set_config(directory, **changes):
    """Changes the config in a weights directory's JSON."""
    with open(f"{directory}/{weights.JSON}", encoding="utf-8") as f:
        about = json.load(f)
    about["config"] |= changes
    with open(f"{directory}/{weights.JSON}", "w", encoding="utf-8") as f:
        json.dump(about, f)
