"""diffusers' transformers with random weights, and inputs for them: what parity is measured against."""

import diffusers
import numpy as np
import torch

WAN = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "ffn_dim": 56,
    "num_layers": 2,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def livelier(module, seed=0):
    """Every parameter random: norms, biases and tables as well, so that none is trivially zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim >= 2 and "table" not in name and "pos_embed.weight" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * noise)
    return module.eval()


def make_wan(seed=0, **settings):
    """A `WanTransformer3DModel` in float32."""
    return livelier(diffusers.WanTransformer3DModel(**WAN | settings), seed)


def make_dit(seed=0, tied=True, **settings):
    """A `DiTTransformer2DModel` in float32; `tied`: all blocks embed timesteps and labels alike."""
    module = livelier(diffusers.DiTTransformer2DModel(**DIT | settings), seed)
    if tied:
        first = module.transformer_blocks[0].norm1.emb.state_dict()
        for block in module.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    return module


def normal(*shape, seed=0):
    """Standard normal float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def call(module, *arguments, **more):
    """`module`, on NumPy arrays or None."""
    turn = lambda x: x if x is None else torch.from_numpy(np.ascontiguousarray(x))  # noqa: E731
    with torch.no_grad():
        found = module(*map(turn, arguments), **{name: turn(x) for name, x in more.items()})
    return found.sample.numpy()
