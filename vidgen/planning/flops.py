"""Floating-point operations of the denoiser, counted from its shapes: a multiply and an add are two."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step: forward and twice that backward, recomputation apart.

    Attributes:
      matmul: of all matrix products with weights, of whole rows, padding included.
      attention_useful: of scores and values between tokens of one clip, and between a clip and its caption.
      attention_executed: of those that are computed: whole rows, since masked scores are computed too.
    """

    matmul: float
    attention_useful: float
    attention_executed: float

    @property
    def useful(self) -> float:
        """What MFU counts."""
        return self.matmul + self.attention_useful


def step_flops(config: ConfigDict, features: int, squares: float, text_squares: float, crossed: float) -> StepFlops:
    """FLOPs of a step of `config`.

    Args:
      features: P, width of a token.
      squares: Σ over the step's clips of tokens².
      text_squares: Σ over the step's clips of (text tokens)².
      crossed: Σ over the step's clips of tokens · text tokens.
    """
    m, t, r = config.model, config.text, config.rows
    width, ratio = m.width, m.mlp_ratio
    tokens, texts, levels = r.count * r.tokens, r.count * r.text, r.count * (r.segments + 1)

    block = tokens * (2 * 4 * width**2 + 2 * 2 * width**2 + 2 * 2 * ratio * width**2)  # self, cross (q, out), MLP
    block += texts * 2 * 2 * t.width * width + levels * 2 * 6 * width**2  # cross (k, v), modulation
    ends = tokens * 2 * 2 * features * width + levels * 2 * (256 + 3 * width) * width
    ends += tokens * 2 * 3 * 64 * width if m.absolute else 0
    text = texts * t.layers * (2 * 4 + 2 * 2 * 4) * t.width**2
    forward = m.layers * block + ends + text

    useful = 4 * (m.layers * width * (squares + crossed) + t.layers * t.width * text_squares)
    executed = 4 * r.count * (m.layers * width * r.tokens * (r.tokens + r.text) + t.layers * t.width * r.text**2)
    return StepFlops(3.0 * forward, 3.0 * useful, 3.0 * executed)
