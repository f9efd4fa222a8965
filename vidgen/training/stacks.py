"""Which arrays hold the layers of a `scan`, one behind the other, along their first axis."""

from __future__ import annotations


def is_stacked(path: str) -> bool:
    """Whether the first axis of the parameter at `path` is a layer: those of a denoiser's blocks, of a U-ViT's middle
    one too.
    """
    return path.startswith("blocks/")
