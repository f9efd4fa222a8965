"""diffusers' AutoencoderKLWan with random weights, and clips for it: what parity and speed are measured against."""

import diffusers
import numpy as np
import torch

# A 2.1 shape and a 2.2 shape of widths that were never released.
WAN21 = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 3, 3], "num_res_blocks": 2}
WAN22 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}


def make_vae(seed=0, **settings):
    """An `AutoencoderKLWan` in float32 whose every parameter is random, gammas and biases among them."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLWan(**settings).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return vae


def make_clip(batch, frames, height, width, seed=0):
    """A random clip [B,3,T,H,W] f32 in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 3, frames, height, width)).astype(np.float32)


def encode(vae, video):
    """(mean, logvar) as NumPy."""
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(video)).latent_dist
    return posterior.mean.numpy(), posterior.logvar.numpy()


def decode(vae, latents):
    """The video as NumPy."""
    with torch.no_grad():
        return vae.decode(torch.from_numpy(latents)).sample.numpy()
