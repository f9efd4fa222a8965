"""U-ViT (Bao et al., arXiv:2209.12152): images of 256 x 256 by class, on a VAE's latents, or captioned clips.

    vidgen plan  --config configs/uvit.py:huge --topology v5e:4x4 --abstract
    vidgen train --config configs/uvit.py:small,clips --workdir runs/uvit

small, mid, large or huge: 44M, 131M, 287M and 501M parameters in 13, 17, 21 and 29 blocks, of which all but the middle
one begin or end a long skip. By class, labels are `batch.vectors[..., 0]`, 1,000 for none, which a feed of your own
brings. With `,clips`, captions are part of the sequence, and a clip of 17 x 64 x 64 pixels is 80 tokens of raw pixels.
"""

from ml_collections import ConfigDict

from vidgen import config as configs

SIZES = {"small": (512, 13, 8), "mid": (768, 17, 12), "large": (1024, 21, 16), "huge": (1152, 29, 16)}


def get_config(arg: str = "large") -> ConfigDict:
    """`arg` SIZE, or SIZE,clips."""
    size, comma, what = (arg or "large").partition(",")
    if size not in SIZES or what not in ("", "clips") or (comma and not what):
        raise configs.ConfigError(f"configs/uvit.py:{arg}: expected {', '.join(SIZES)}, and maybe clips: small,clips")
    c = configs.base()
    c.model.backbone = "uvit"
    c.model.width, c.model.layers, c.model.heads = SIZES[size]
    c.model.qk_norm = "none"
    c.model.rope = False
    c.model.absolute = "table"

    c.objective.prediction = "velocity"

    c.optimizer.name = "adamw"
    c.optimizer.lr = 2e-4
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 5000
    c.optimizer.beta1 = 0.99
    c.optimizer.beta2 = 0.99
    c.optimizer.weight_decay = 0.03
    c.optimizer.ema = 0.9999

    c.train.steps = 500_000
    c.train.checkpoint_every = 10_000
    c.sample.steps = 50
    (clips if what else images)(c)
    return c


def images(c: ConfigDict) -> None:
    """Four images a row by class, 256 tokens each: 2 x 2 latents of 4 channels, 8 x 8 pixels each."""
    c.data.moving_shapes.sizes = ((1, 256, 256),)
    c.tokenizer.name = "vae"
    c.tokenizer.stride = ()
    c.tokenizer.patch = (1, 2, 2)
    c.vae.temporal_downsample = (False, False, False)
    c.vae.z_dim = 4
    c.rows.update(count=64, tokens=1024, segments=4, text=1024)
    c.model.table = (1, 16, 16)
    c.model.cross = False
    c.model.classes = 1000
    c.sample.update(frames=1, height=256, width=256)


def clips(c: ConfigDict) -> None:
    """Eight clips a row of 5 x 4 x 4 tokens, each 4 x 16 x 16 pixels; clean pixels are predicted, text is bytes."""
    c.data.moving_shapes.sizes = ((17, 64, 64), (1, 64, 64))
    c.tokenizer.stride = (4, 16, 16)
    c.tokenizer.mean = -0.8
    c.rows.update(count=32, tokens=640, segments=16, text=2048)
    c.model.table = (5, 4, 4)
    c.objective.prediction = "clean"
    c.sample.update(frames=17, height=64, width=64)
