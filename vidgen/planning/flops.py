"""Floating-point operations and parameters of the denoiser, counted from its shapes: a multiply and an add are two.

Useful is what the mathematics asks for: products forward, twice that backward, attention between tokens that see each
other. A training step's products are those of whole rows, padding included, which packing keeps small. Executed is what
a device runs: attention by whole blocks, a backward kernel that computes scores again, and
whatever rematerialisation computes twice. Norms, activations and the pick of modulation are not counted.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from vidgen.geometry import Geometry
from vidgen.models.architecture import mlp_dim
from vidgen.models.conditions import SINUSOIDS
from vidgen.planning.parameters import (
    encoded_width,
    image_tokens,
    images,
    outputs,
    placed,
    row_tokens,
    text_width,
    trains,
)

# Products that attention runs backward for each forward's two. With the scores in memory four; a flash kernel computes
# the scores again; one that makes the gradients of queries and of keys in two passes does so twice, and dP with them.
BACKWARD = {"dense": 4, "blockwise": 5, "cudnn": 5, "splash": 5, "splash_unfused": 7}


# Products that attention runs again before its backward pass even where its results were kept: scores are not kept, and
# cuDNN's kernel has no name for what it keeps.
AGAIN = {"dense": 1, "cudnn": 2}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """(query, key) pairs of one step, over all its rows, in one layer of each kind.

    Attributes:
      full: of self-attention over the whole clip; useful: Σ over clips of tokens².
      windowed: of self-attention within windows; useful: Σ over windows of tokens²; the mean over the layers that have
        windows, moved and not as `vidgen.models.dit.layer_pattern` has them.
      crossed: of tokens and their captions; useful: Σ over clips of tokens · text tokens.
      text: of the text encoder; useful: Σ over clips of text tokens².
    """

    full: float
    windowed: float
    crossed: float
    text: float


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step, or of drawing clips, over all devices.

    Attributes:
      matmul: of all matrix products with weights, of whole rows, padding included, forward and twice that backward.
      attention_useful: of scores and values between tokens that see each other, forward and twice that backward.
      attention_forward, attention_backward: of the attention that is run, once forward and once backward.
      matmul_recomputed, attention_recomputed: of what the backward pass runs again because it was not kept.
      padding: of `matmul`, what is not useful: of the padding behind a clip that is drawn; of a training step 0.
    """

    matmul: float
    attention_useful: float
    attention_forward: float
    attention_backward: float
    matmul_recomputed: float = 0.0
    attention_recomputed: float = 0.0
    padding: float = 0.0

    @property
    def useful(self) -> float:
        """What MFU counts."""
        return self.matmul - self.padding + self.attention_useful

    def times(self, n: int) -> StepFlops:
        """Of n that are alike."""
        return StepFlops(*(n * flops for flops in dataclasses.astuple(self)))

    @property
    def attention_executed(self) -> float:
        """Of attention, recomputation apart."""
        return self.attention_forward + self.attention_backward

    @property
    def recomputed(self) -> float:
        """Run a second time."""
        return self.matmul_recomputed + self.attention_recomputed

    @property
    def executed(self) -> float:
        """All that runs."""
        return self.matmul + self.attention_executed + self.recomputed

    @property
    def recomputed_fraction(self) -> float:
        """Recomputed / executed."""
        return self.recomputed / self.executed


def full_layers(m: ConfigDict) -> int:
    """How many of the layers of `config.model` attend to the whole clip and not to windows."""
    if not m.window or m.full_every == 1:
        return m.layers
    return m.layers // m.full_every if m.full_every else 0


def products(config: ConfigDict, tokens: float, texts: float, levels: float) -> dict[str, float]:
    """FLOPs of the forward products with weights in all blocks, by the name of the tensor they make.

    The names are those of rematerialisation (`vidgen/models/remat.py`), and others that have none there and are
    always computed again where anything is: modulation, level, skip.

    Args:
      tokens, texts, levels: video tokens, text tokens and noise levels in all rows.
    """
    m = config.model
    if m.backbone == "uvit":
        tokens *= row_tokens(config) / config.rows.tokens
    one = m.layers * 2 * m.width**2  # a square product, a token
    mlp = m.layers * 2 * m.width * mlp_dim(m)
    found = dict.fromkeys(("query", "key", "value", "attention_project"), one * tokens)
    found |= dict.fromkeys(("mlp_up", "mlp_down"), mlp * tokens)
    if m.backbone == "uvit":
        return found | {"skip": m.layers // 2 * 2 * 2 * m.width**2 * tokens}
    found["modulation"] = 0.0 if m.shared_modulation else 6 * one * levels
    if m.level_per_block:
        found["level"] = m.layers * 2 * m.width * (SINUSOIDS + m.width) * levels
    if m.cross:
        found |= dict.fromkeys(("cross_query", "cross_project"), one * tokens)
        found |= dict.fromkeys(("cross_key", "cross_value"), m.layers * 2 * text_width(config) * m.width * texts)
    if m.image_width:
        for name in ("cross_key", "cross_value"):
            found[name] += one * tokens / config.rows.tokens * images(config)
    return found


def ends(config: ConfigDict, features: int, tokens: float, texts: float, levels: float) -> float:
    """FLOPs of the forward products outside blocks: first and last layer, noise levels, the text encoder."""
    m, t = config.model, config.text
    flops = tokens * 2 * m.width * (features + m.cond + outputs(m, features) + placed(m))
    if not m.cross:
        texts = 0.0
    if trains(config):
        flops += texts * t.layers * 2 * (4 + 2 * 4) * t.width**2
    if m.backbone == "uvit":
        return flops + texts * 2 * encoded_width(config) * m.width
    a_level = 0 if m.level_per_block else SINUSOIDS + m.width
    a_level += 6 * m.width if m.shared_modulation else 0
    a_level += 2 * m.width if m.final == "modulation" else 0
    flops += levels * 2 * m.width * a_level
    if m.text_mlp:
        flops += texts * 2 * m.width * (encoded_width(config) + m.width)
    if m.image_width:
        flops += tokens / config.rows.tokens * images(config) * 2 * m.image_width * (m.image_width + m.width)
    return flops


def attention(config: ConfigDict, pairs: Pairs) -> tuple[float, float, float]:
    """FLOPs of one attention product, scores say, in all layers: of self-attention, of cross, of the text encoder."""
    m, t = config.model, config.text
    full = full_layers(m)
    own = 2 * m.width * (full * pairs.full + (m.layers - full) * pairs.windowed)
    crossed = pairs.crossed if m.cross and m.backbone != "uvit" else 0.0
    text = 2 * t.width * t.layers * pairs.text if trains(config) else 0.0
    return own, 2 * m.width * m.layers * crossed, text


def useful_pairs(config: ConfigDict, pairs: Pairs, tokens: float) -> Pairs:
    """`pairs` of a packing as the model has them.

    In a U-ViT, text and video attend to themselves and each other; the tokens of noise levels and labels, one or two a
    clip, are left out. Where there are image features, each of `tokens` attends to those of one clip.
    """
    m = config.model
    if m.backbone == "uvit" and m.cross:
        return dataclasses.replace(pairs, full=pairs.full + 2 * pairs.crossed + pairs.text)
    return dataclasses.replace(pairs, crossed=pairs.crossed + (tokens * image_tokens(m) if m.image_width else 0))


def whole_rows(config: ConfigDict) -> Pairs:
    """The pairs of attention that skips nothing: masked scores are computed too."""
    r = config.rows
    return Pairs(
        full=r.count * row_tokens(config) ** 2,
        windowed=r.count * r.tokens**2,
        crossed=r.count * r.tokens * (r.text + images(config)),
        text=r.count * r.text**2,
    )


def step_flops(
    config: ConfigDict,
    features: int,
    squares: float,
    text_squares: float,
    crossed: float,
    windowed: float = 0.0,
    *,
    executed: Pairs | None = None,
    saved: frozenset[str] | None = None,
    kernel: str = "dense",
) -> StepFlops:
    """FLOPs of a step of `config`.

    Args:
      features: P, width of a token.
      squares, text_squares, crossed, windowed: the useful pairs of the step, as `Pairs` has them.
      executed: the pairs that are computed; None: all of whole rows.
      saved: names of the tensors that the backward pass does not compute again (`vidgen.models.remat.saved`); None,
        for the preset "none": no block is computed again.
      kernel: of attention, a key of `BACKWARD`.
    """
    r = config.rows
    tokens, texts, levels = r.count * r.tokens, r.count * r.text, r.count * (r.segments + 1)
    by_name = products(config, tokens, texts, levels)
    forward = sum(by_name.values()) + ends(config, features, tokens, texts, levels)
    useful = sum(attention(config, useful_pairs(config, Pairs(squares, windowed, crossed, text_squares), tokens)))
    own, cross, text = attention(config, executed or whole_rows(config))

    again, attention_again = 0.0, 0.0
    if saved is not None:
        # What a U-ViT's MLP gives is but added, so that its gradient needs no second run.
        spared = saved | {"mlp_down"} if config.model.backbone == "uvit" else saved
        again = sum(flops for name, flops in by_name.items() if name not in spared)
        attention_again = own * _again(kernel, saved, "attention") + cross * _again(kernel, saved, "cross")
    return StepFlops(
        matmul=3.0 * forward,
        attention_useful=6.0 * useful,
        attention_forward=2.0 * (own + cross + text),
        attention_backward=float(BACKWARD[kernel]) * (own + cross + text),
        matmul_recomputed=again,
        attention_recomputed=attention_again,
    )


def _again(kernel: str, saved: frozenset[str], which: str) -> int:
    """Of the two products of an attention, those that the backward pass runs again. Splash names both results "out"."""
    needs = {f"{which}_out"} if kernel.startswith("splash") else {f"{which}_out", f"{which}_lse"}
    return AGAIN.get(kernel, 0) if saved >= needs else 2


def sample_flops(
    config: ConfigDict,
    geometry: Geometry,
    frames: int,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    windowed: float = 0.0,
    *,
    row: int = 0,
    executed: Pairs | None = None,
) -> StepFlops:
    """FLOPs of one generated clip: forward only, at each evaluation twice where guidance is not 1.

    The clip is alone in a row, its caption as long as captions may be (`config.rows.caption`), and is encoded once. The
    tokenizer's decoder isn't counted.

    Args:
      frames, height, width: of the clip; sizes that do not cut into tokens grow to the next that do.
      steps: of `config.sample.solver`; heun evaluates the model twice in all but the last.
      windowed: Σ over the clip's windows of tokens², where the model has windows, as in `Pairs`.
      row: tokens of the row, padding included; 0: the clip's.
      executed: the pairs that an evaluation computes in a layer of each kind; None: the useful ones.
    """
    tokens, texts, levels = geometry.tokens(*geometry.cover(frames, height, width)), config.rows.caption, 2
    evaluations = forward_passes(config.sample.solver, steps, guidance)
    encoded = texts * config.text.layers * 2 * (4 + 2 * 4) * config.text.width**2 if trains(config) else 0.0
    text_squares = 2 * attention(config, Pairs(0, 0, 0, texts**2))[2]

    def matmul(tokens: float) -> float:
        made = sum(products(config, tokens, texts, levels).values())
        return made + ends(config, geometry.features, tokens, texts, levels) - encoded

    useful = useful_pairs(config, Pairs(tokens**2, windowed, tokens * texts, texts**2), tokens)
    asked, run = (sum(attention(config, p)[:2]) for p in (useful, executed or useful))
    padded = max(row, tokens)
    return StepFlops(
        matmul=evaluations * matmul(padded) + encoded,
        attention_useful=2 * evaluations * asked + text_squares,
        attention_forward=2 * evaluations * run + text_squares,
        attention_backward=0.0,
        padding=evaluations * (matmul(padded) - matmul(tokens)),
    )


def forward_passes(solver: str, steps: int, guidance: float) -> int:
    """Evaluations of the model that draw a clip."""
    return (2 * steps - 1 if solver == "heun" else steps) * (1 if guidance == 1 else 2)
