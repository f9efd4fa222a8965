"""A random pipeline as diffusers saves it, written without it: a directory to import."""

import json
import os

import numpy as np

from vidgen import tensors
from vidgen.interop import diffusers

TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
TEXT = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def model(directory, settings, seed=0, dtype="float32", shards=1):
    """Saves random tensors of a model, and its config.json; returns the tensors."""
    os.makedirs(directory)
    name = diffusers.class_of(settings, "config.json")
    row = diffusers.CLASSES[name]
    rng = np.random.default_rng(seed)
    found = {
        entry.key: (rng.normal(size=entry.stored) / 4).astype(dtype)
        for entry in row.entries(row.read_config(settings, "config.json"), ())
    }
    stem = "model" if "architectures" in settings else "diffusion_pytorch_model"
    with open(os.path.join(directory, "config.json"), "w") as f:
        f.write(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if shards == 1:
        tensors.write_all(os.path.join(directory, f"{stem}.safetensors"), found, {"format": "pt"})
        return found
    files = {key: f"{stem}-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(found)}
    for file in set(files.values()):
        own = {key: found[key] for key in found if files[key] == file}
        tensors.write_all(os.path.join(directory, file), own, {"format": "pt"})
    index = {"metadata": {"total_size": sum(a.nbytes for a in found.values())}, "weight_map": files}
    with open(os.path.join(directory, f"{stem}.safetensors.index.json"), "w") as f:
        f.write(json.dumps(index, indent=2) + "\n")
    return found


def make(directory, experts=False, dtype="float32", **changes):
    """Saves a whole pipeline; `changes`: part → settings instead."""
    parts = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT} | changes
    model(os.path.join(directory, "transformer"), parts["transformer"], 1, dtype, shards=3)
    model(os.path.join(directory, "vae"), parts["vae"], 2)
    model(os.path.join(directory, "text_encoder"), parts["text_encoder"], 3, dtype, shards=2)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "boundary_ratio": 0.8 if experts else None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", parts.get("scheduler", SCHEDULER)["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if experts:
        model(os.path.join(directory, "transformer_2"), parts["transformer"], 4, dtype)
        index["transformer_2"] = index["transformer"]
    for part in ("scheduler", "tokenizer"):
        os.makedirs(os.path.join(directory, part))
    with open(os.path.join(directory, "scheduler", "scheduler_config.json"), "w") as f:
        json.dump(parts.get("scheduler", SCHEDULER), f)
    with open(os.path.join(directory, "tokenizer", "tokenizer.json"), "w") as f:
        f.write(words(parts["text_encoder"]["vocab_size"]))
    with open(os.path.join(directory, "model_index.json"), "w") as f:
        f.write(json.dumps(index, indent=2) + "\n")


def words(size):
    """A tokenizer.json of so few words, each a letter, in the unigram model that T5's has."""
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -1.0]]
    pieces += [[chr(ord("a") + i % 26) * (1 + i // 26), -2.0 - i / 100] for i in range(size - len(pieces))]
    special = [
        {"id": i, "content": pieces[i][0], "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i in range(3)
    ]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
            },
            "decoder": None,
            "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
        }
    )
