"""Text-to-video DiTs from 5M to 30B parameters, one family: adaLN-single, text through two matrices, RoPE.

    vidgen train --config configs/dit_video.py:70m --input SHARDS --workdir runs/70m
    vidgen plan  --config configs/dit_video.py:7b  --topology v5p:4x4x4 --abstract

5m, 20m, 70m, 160m, 400m, 1b, 3b, 7b, 13b, 30b; parameters include the text encoder, which trains with them. Up to
400m, rows hold clips of 17 x 256 x 256, 1,280 tokens; beyond, 81 x 480 x 832, 32,760 tokens. A token covers 4 x 16 x 16
pixels of wavelets; for a VAE's latents set config.tokenizer.name=vae and config.tokenizer.weights=DIR.
"""

from ml_collections import ConfigDict

from vidgen import config as configs

# width, layers, heads, width of the text encoder, fsdp, context
SIZES = {
    "5m": (128, 11, 2, 64, 1, 1),
    "20m": (256, 14, 4, 128, 1, 1),
    "70m": (512, 13, 8, 256, 1, 1),
    "160m": (768, 15, 12, 256, 1, 1),
    "400m": (1024, 22, 16, 512, 4, 1),
    "1b": (1536, 25, 12, 512, 8, 1),
    "3b": (2560, 27, 20, 1024, 16, 1),
    "7b": (3584, 33, 28, 2048, 32, 1),
    "13b": (4608, 37, 36, 2048, 16, 4),
    "30b": (6144, 48, 48, 4096, 32, 4),
}


def get_config(arg: str = "160m") -> ConfigDict:
    """`arg`: the size."""
    size = arg or "160m"
    if size not in SIZES:
        raise configs.ConfigError(f"configs/dit_video.py:{arg}: expected {', '.join(SIZES)}")
    width, layers, heads, text, fsdp, context = SIZES[size]
    large = width > 1024
    c = configs.base()
    c.data.moving_shapes.fps = 16.0
    c.tokenizer.name = "wavelet"
    c.tokenizer.patch = (1, 2, 2)

    if large:
        c.data.moving_shapes.sizes = ((81, 480, 832), (1, 480, 832))
        c.rows.update(count=32, tokens=65_536, segments=20, text=5120, window=256)
        c.sample.update(frames=81, height=480, width=832, fps=16.0)
    else:
        c.data.moving_shapes.sizes = ((17, 256, 256), (1, 256, 256))
        c.rows.update(count=64, tokens=5120, segments=20, text=5120, window=1024)
        c.sample.update(frames=17, height=256, width=256, fps=16.0)

    c.text.width = text
    c.text.heads = text // 64
    c.text.layers = 2

    c.model.width = width
    c.model.layers = layers
    c.model.heads = heads
    c.model.rope_theta = 10_000.0 if large else 100.0
    c.model.shared_modulation = True
    c.model.final = "table"
    c.model.text_mlp = True
    c.model.residual = "bfloat16" if large else "float32"
    c.model.remat = "attention" if large else "products"

    c.objective.prediction = "velocity" if large else "clean"  # narrow models keep clean patches, and lose their noise
    c.objective.shift = 5.0 if large else 3.0
    c.objective.shift_tokens = 32_760 if large else 1280

    c.optimizer.name = "adamw"
    c.optimizer.lr = {128: 1e-3, 256: 1e-3, 512: 6e-4, 768: 5e-4, 1024: 3e-4}.get(width, 1e-4)
    c.optimizer.beta2 = 0.95
    c.optimizer.ema = 0.9999
    c.optimizer.warmup = 2000

    c.mesh.fsdp = fsdp
    c.mesh.context = context

    c.train.steps = 200_000
    c.sample.steps = 50
    c.sample.guidance = 5.0
    return c
