"""Wan 2.1 T2V-1.3B (arXiv:2503.20314): 1,418,996,800 parameters, on clips of 81 x 480 x 832, 32,760 tokens.

    vidgen plan --config configs/wan_1_3b.py --topology v5p:2x2x1

With the published weights, `vidgen import` makes a run's config of its own: configs/finetune.py. From nothing:

    vidgen train --config configs/wan_1_3b.py --input SHARDS --workdir … \\
      --config.tokenizer.weights=VAE --config.text.weights=TEXT_ENCODER

where VAE and TEXT_ENCODER are directories of `vidgen import`. A plan needs neither. The other Wans start from here.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/wan_1_3b.py takes no argument, got {arg!r}")
    c = configs.base()
    # What a plan counts with; real clips come with --input.
    c.data.moving_shapes.sizes = ((81, 480, 832),)
    c.data.moving_shapes.fps = 16.0

    # config.vae is Wan 2.1's: a latent of 16 channels covers 4 x 8 x 8 pixels, a token 2 x 2 latents.
    c.tokenizer.name = "vae"
    c.tokenizer.stride = ()
    c.tokenizer.patch = (1, 2, 2)

    c.rows.count = 4
    c.rows.tokens = 32_768  # a multiple of 512 on each of four devices and more
    c.rows.segments = 1
    c.rows.text = 512
    c.rows.caption = 512
    c.rows.window = 16

    c.text.name = "umt5"
    c.text.pad = 512
    c.text.width = 4096
    c.text.layers = 0
    c.text.heads = 64

    c.model.width = 1536
    c.model.layers = 30
    c.model.heads = 12
    c.model.mlp_dim = 8960
    c.model.bias = True
    c.model.qk_norm = "joint"
    c.model.rope_pairs = (22, 21, 21)
    c.model.rope_theta = 10_000.0
    c.model.absolute = "none"
    c.model.cross_norm = True
    c.model.final = "table"
    c.model.shared_modulation = True
    c.model.text_mlp = True
    c.model.residual = "bfloat16"
    c.model.remat = "attention"

    c.objective.prediction = "velocity"
    c.objective.shift = 3.0

    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-5
    c.optimizer.beta2 = 0.95
    c.optimizer.ema = 0.9999
    c.optimizer.warmup = 1000

    c.mesh.fsdp = 4

    c.sample.frames = 81
    c.sample.height = 480
    c.sample.width = 832
    c.sample.fps = 16.0
    c.sample.solver = "unipc"
    c.sample.steps = 50
    c.sample.guidance = 5.0
    return c
