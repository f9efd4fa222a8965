"""DiT (Peebles & Xie, arXiv:2212.09748): images of 256 x 256 by one of ImageNet's 1,000 classes, on a VAE's latents.

    vidgen plan --config configs/dit_xl.py:xl   --topology v5e:4x4 --abstract
    vidgen plan --config configs/dit_xl.py:b/4  --topology v5e:4x4 --abstract

s, b, l or xl, and after a slash the patch: 2, 4 or 8. XL/2 has 674,834,720 parameters; the published 675M counts its
fixed table of places, 256 x 1,152 numbers, as well. Noise is rectified flow's, as in SiT (Ma et al., arXiv:2401.08740).

Labels are `batch.vectors[..., 0]`, 1,000 for none, which a feed of your own brings: captioned clips have none.
"""

from ml_collections import ConfigDict

from vidgen import config as configs

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, layers, heads


def get_config(arg: str = "xl") -> ConfigDict:
    """`arg` SIZE or SIZE/PATCH."""
    size, _, patch = (arg or "xl").partition("/")
    if size not in SIZES or patch not in ("", "2", "4", "8"):
        raise configs.ConfigError(f"configs/dit_xl.py:{arg}: expected {', '.join(SIZES)}, and maybe a patch: xl/2")
    side = int(patch or 2)
    c = configs.base()
    c.data.moving_shapes.sizes = ((1, 256, 256),)
    images(c)

    c.tokenizer.patch = (1, side, side)
    tokens = (32 // side) ** 2
    c.rows.count = 64
    c.rows.tokens = 4 * tokens
    c.rows.segments = 4
    c.rows.text = 1024

    c.model.width, c.model.layers, c.model.heads = SIZES[size]
    c.model.bias = True
    c.model.qk_norm = "none"
    c.model.rope = False
    c.model.absolute = "sincos"
    c.model.table = (1, 32 // side, 32 // side)
    c.model.cross = False
    c.model.classes = 1000
    c.model.learned_sigma = True

    c.objective.prediction = "velocity"

    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-4
    c.optimizer.schedule = "constant"
    c.optimizer.beta2 = 0.999
    c.optimizer.ema = 0.9999

    c.train.steps = 400_000
    c.train.checkpoint_every = 10_000

    c.sample.steps = 250
    c.sample.guidance = 4.0
    return c


def images(c: ConfigDict) -> None:
    """A VAE of images: 8 x 8 pixels a latent of 4 channels."""
    c.tokenizer.name = "vae"
    c.tokenizer.stride = ()
    c.vae.temporal_downsample = (False, False, False)
    c.vae.z_dim = 4
    c.sample.frames = 1
    c.sample.height = 256
    c.sample.width = 256
