"""Parameters of the denoiser, counted from its config: equal to the module's own, as tests check on abstract shapes."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from vidgen.data.text import VOCAB
from vidgen.models import uvit
from vidgen.models.architecture import mlp_dim
from vidgen.models.conditions import SINUSOIDS
from vidgen.text import frozen

PLACES = 3 * 64  # numbers that tell a place
NGRAMS, BUCKETS = 4, 4096  # of the text encoder's hashed embeddings
IMAGE_TOKENS = 257  # features that CLIP has of a picture: 16 x 16 patches and one for all of it


def row_tokens(config: ConfigDict) -> int:
    """Tokens of a row that blocks see: in a U-ViT, text, noise levels and labels beside the video's."""
    return config.rows.tokens + (uvit.prefix(config) if config.model.backbone == "uvit" else 0)


def outputs(m: ConfigDict, features: int) -> int:
    """Numbers that the head puts out a token."""
    return features * (2 if m.learned_sigma else 1)


def placed(m: ConfigDict) -> int:
    """Numbers that a token's place is projected from."""
    return PLACES if m.absolute == "projected" else 0


def image_tokens(m: ConfigDict) -> int:
    """Image features of a clip: as many as have learned positions, else those of one picture (Wan I2V)."""
    return m.image_tokens or IMAGE_TOKENS


def images(config: ConfigDict) -> int:
    """Image features that a row has places for."""
    return config.rows.segments * image_tokens(config.model) if config.model.image_width else 0


def trains(config: ConfigDict) -> bool:
    """Whether a text encoder trains with the denoiser; else text comes from a frozen one, or there is none."""
    return config.text.name == "bytes" and config.model.cross


def encoded_width(config: ConfigDict) -> int:
    """Width of the text as its encoder gives it; raises ConfigError for weights that can't be read."""
    found = frozen.from_config(config) if config.text.weights else None
    return found.width if found else config.text.width


def text_width(config: ConfigDict) -> int:
    """Width of the text that blocks attend to."""
    return config.model.width if config.model.text_mlp else encoded_width(config)


def block_parameters(config: ConfigDict) -> int:
    """Of one block of the denoiser; of a U-ViT one of those that end a long skip."""
    m = config.model
    bias = m.bias * m.width
    attention = 4 * (m.width**2 + bias) + norms(m, 2)
    mlp = 2 * m.width * mlp_dim(m) + mlp_dim(m) + m.width
    if m.backbone == "uvit":
        output = 0 if m.bias else m.width  # of attention, whose output has a bias always
        return attention + output + mlp + 4 * m.width + skip_parameters(m)
    count = attention + mlp + 6 * m.width * (1 if m.shared_modulation else m.width + 1)
    if m.cross:
        count += 2 * m.width**2 + 2 * text_width(config) * m.width + 4 * bias + norms(m, 2)
        count += 2 * m.width if m.cross_norm else 0
    if m.image_width:
        count += 2 * (m.width**2 + bias) + norms(m, 1)
    return count + (level_parameters(m) if m.level_per_block else 0)


def skip_parameters(m: ConfigDict) -> int:
    """Of the end of one of a U-ViT's long skips."""
    return (2 * m.width + 1) * m.width


def norms(m: ConfigDict, count: int) -> int:
    """Of `count` norms of queries and keys."""
    return count * {"head": m.width // m.heads, "joint": m.width, "none": 0}[m.qk_norm]


def level_parameters(m: ConfigDict) -> int:
    """Of what embeds noise levels and labels."""
    labels = (m.classes + 1) * m.width if m.classes else 0
    return (SINUSOIDS + 1) * m.width + (m.width + 1) * m.width + labels


def text_tables(config: ConfigDict) -> int:
    """Of `text_parameters`, those of tables that are looked up in: they cost no FLOPs."""
    return (VOCAB + NGRAMS * BUCKETS) * config.text.width if trains(config) else 0


def text_parameters(config: ConfigDict) -> int:
    """Of the text encoder over bytes, which trains with the denoiser; 0 for a frozen one."""
    t = config.text
    if not trains(config):
        return 0
    inner = int(t.width * 4.0)
    layer = 2 * t.width + 4 * t.width**2 + 2 * (t.width // t.heads) + 2 * t.width * inner + inner + t.width
    return text_tables(config) + t.layers * layer + t.width


def parameters(config: ConfigDict, features: int) -> int:
    """Of the denoiser, and of the text encoder that trains with it.

    Args:
      features: P, width of a token.
    """
    m = config.model
    count = text_parameters(config) + m.layers * block_parameters(config)
    count += (features + m.cond + 1) * m.width + (m.width + 1) * outputs(m, features)  # embed, head
    count += (PLACES + 1) * m.width if m.absolute == "projected" else 0
    count += math.prod(m.table) * m.width if m.absolute == "table" else 0
    if m.backbone == "uvit":
        return count + _uvit(config)
    count += 0 if m.level_per_block else level_parameters(m)
    count += 2 * m.width * (1 if m.final == "table" else m.width + 1)
    count += 6 * m.width * (m.width + 1) if m.shared_modulation else 0
    count += (encoded_width(config) + 1) * m.width + (m.width + 1) * m.width if m.text_mlp and m.cross else 0
    if m.image_width:  # norm, two matrices, norm, places
        count += 2 * m.image_width + (m.image_width + 1) * (m.image_width + m.width) + 2 * m.width
        count += m.image_tokens * m.image_width
    return count


def _uvit(config: ConfigDict) -> int:
    """What a U-ViT has beside blocks that all end a skip, and the two ends: its last norm and the other tokens."""
    m = config.model
    count = 2 * m.width - (m.layers // 2 + 1) * skip_parameters(m)
    count += 2 * m.width  # place of a noise level's token, and what marks given tokens
    count += (m.classes + 1) * m.width if m.classes else 0
    count += (encoded_width(config) + 1) * m.width if m.cross else 0
    return count + (uvit.places(config) * m.width if m.cross and m.absolute == "table" else 0)
