"""What a sample is given beside its prompt: frames to start from, to end at, or to go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.conditioning import masks
from vidgen.conditioning.rows import GREY, beside
from vidgen.config import ConfigError
from vidgen.geometry import Grid
from vidgen.tokenizers.base import Tokenizer, geometry_from_config

FLAGS = {"first": "first_frame", "first_last": "last_frame", "extend": "extend"}  # that ask for a kind of mask


@dataclasses.dataclass(frozen=True)
class Given:
    """What one sample is given. Frames have the height and width of the sample (`config.sample`).

    Attributes:
      first: [H,W,3] u8, its first frame.
      last: [H,W,3] u8, its last frame, beside `first`. A model with control.channels="none" is given the whole last
        latent frame, as it was trained: `last` stands still over the frames of pixels that it covers.
      extend: [T,H,W,3] u8, frames that it starts with; how many of them `frames_of` says. Alone.
      features: [L,E] f32, of an image encoder, for a model that attends to them (Wan 2.1 I2V: CLIP ViT-H's last layer
        but one, 257 of width 1,280 an image, which are made elsewhere). None: nothing.
    """

    first: np.ndarray | None = None
    last: np.ndarray | None = None
    extend: np.ndarray | None = None
    features: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """Of `masks.KINDS`; empty: nothing is given."""
        if self.extend is not None:
            return "extend"
        return "" if self.first is None else "first_last" if self.last is not None else "first"


def check(config: ConfigDict, given: Sequence[Given | None]) -> None:
    """Raises ConfigError where the samples of `config.sample` can't be given that, or the model wasn't trained to."""
    masks.check(config)
    s, geometry = config.sample, geometry_from_config(config.tokenizer)
    for one in given:
        kind = "" if one is None else one.kind
        if one is not None:
            _check_frames(one, s.height, s.width)
        if config.model.image_width and (one is None or one.features is None):
            raise ConfigError(
                f"config.model.image_width={config.model.image_width}: this model attends to the features of an image "
                "encoder, which vidgen doesn't have; expected them in sample.draw(…, given=Given(…, features=[L,E]))"
            )
        if not kind:
            continue
        check_kind(config, kind)
        frames = geometry.latent_grid(*geometry.cover(s.frames, s.height, s.width))[0]
        if frames < masks.LEAST[kind]:
            least = (masks.LEAST[kind] - 1) * geometry.stride[0] + 1
            raise ConfigError(
                f"config.sample.frames={s.frames}: with --{FLAGS[kind]} nothing is left to draw; expected {least} or "
                "more"
            )


def check_kind(config: ConfigDict, kind: str) -> None:
    """Raises ConfigError unless the model was trained to be given that, or is an imported one that reads mask channels.

    What an imported one was trained with is not in its files: first frames at least, and mask channels say the rest.
    """
    kinds = [name for name, _ in config.control.masks]
    if kind in kinds or (config.control.channels == "wan" and not kinds):
        return
    has = f"{', '.join(kinds)} only" if kinds else "nothing given"
    raise ConfigError(
        f"--{FLAGS[kind]}: this model was trained with {has} (config.control.masks={config.control.masks}); train one "
        f"with config.control.masks=(({kind!r}, 0.4),)"
    )


def _check_frames(given: Given, height: int, width: int) -> None:
    if given.extend is not None and (given.first is not None or given.last is not None):
        raise ConfigError("--extend gives the first frames of the sample; leave out --first_frame and --last_frame")
    if given.last is not None and given.first is None:
        raise ConfigError("--last_frame goes with --first_frame, and there is none; give both, or the first alone")
    for name, rank in (("first", 3), ("last", 3), ("extend", 4)):
        frames = getattr(given, name)
        if frames is None:
            continue
        wanted = (height, width, 3)
        if frames.ndim != rank or frames.shape[-3:] != wanted or not len(frames) or frames.dtype != np.uint8:
            shape = ("T", *wanted) if rank == 4 else wanted
            raise ConfigError(
                f"given.{name} is {frames.dtype} {list(frames.shape)}; expected uint8 [{', '.join(map(str, shape))}], "
                "the size of the sample"
            )


def frames_of(frames: int, config: ConfigDict) -> int:
    """How many of the last frames of a clip of `frames` ≥ 1 a sample of `config.sample` starts with.

    Always whole latent frames: all that the clip has, if they leave one to draw; of a clip that is as long as the
    sample or longer, as many as half of the sample's, rounded up, so that it is gone on from and not just copied.
    """
    stride = geometry_from_config(config.tokenizer).stride[0]
    total = -(-(config.sample.frames - 1) // stride) + 1
    own = (frames - 1) // stride + 1
    return 1 + ((own if own < total else (total + 1) // 2) - 1) * stride


def place(
    rows: TokenBatch,
    given: Sequence[Given | None],
    tokenizer: Tokenizer,
    config: ConfigDict,
    size: Grid,
) -> TokenBatch:
    """Rows of `sample.clip_rows` with what their clips are given: NumPy arrays, as in_training makes them.

    Args:
      rows: one clip of `size` a row and padding; their `tokens` are None.
      given: a row each, checked.
      tokenizer: that makes the latents.
      config: of the run.
      size: (frames, height, width) that is drawn, out of whose middle the sample is cut.
    """
    geometry = tokenizer.geometry
    clip_tokens = geometry.tokens(*size)
    wan = config.control.channels == "wan"
    if config.model.image_width:
        features = np.stack([np.asarray(one.features, np.float32) for one in given])
        segment = np.ones(features.shape[:2], np.int32)
        rows = rows.replace(context=rows.context | {"image": (features, segment)})
    if not wan and all(one is None or not one.kind for one in given):
        return rows
    make = _beside if wan else _known
    made: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the same is often given to many
    for one in given:
        if id(one) not in made:
            made[id(one)] = make(_padded(one or Given(), config, size), tokenizer, size)
    tokens = rows.segment.shape[1]

    def stacked(part: int) -> np.ndarray:
        values = np.stack([made[id(one)][part] for one in given])
        return np.pad(values, ((0, 0), (0, tokens - clip_tokens), (0, 0)))

    if wan:
        return rows.replace(cond=stacked(0))
    known = stacked(1)
    return rows.replace(tokens=stacked(0), known=known, level=np.where(known[..., 0], 0, rows.level))


def _padded(given: Given, config: ConfigDict, size: Grid) -> Given:
    """As large as what is drawn, the edges repeated, which are cut off again; of a clip to extend, what counts."""
    s, (_, height, width) = config.sample, size
    y, x = (height - s.height) // 2, (width - s.width) // 2
    around = ((y, height - s.height - y), (x, width - s.width - x), (0, 0))

    def pad(frames):
        return None if frames is None else np.pad(frames, ((0, 0),) * (frames.ndim - 3) + around, mode="edge")

    extend = given.extend
    if extend is not None:
        extend = extend[-frames_of(len(extend), config) :]
    return Given(pad(given.first), pad(given.last), pad(extend))


def _start(given: Given) -> np.ndarray:
    """[T,H,W,3] u8: the frames that the clip starts with; T may be 0 only where nothing is given."""
    return given.first[None] if given.extend is None else given.extend


def _latents(tokenizer: Tokenizer, video_TxHxWx3: np.ndarray) -> np.ndarray:
    """[tokens, P] f32 of a clip of bytes, or of floats on their scale."""
    if tokenizer.learned and video_TxHxWx3.dtype != np.uint8:
        video_TxHxWx3 = video_TxHxWx3 / np.float32(127.5) - 1
    return np.asarray(tokenizer.latents(tokenizer.fill(video_TxHxWx3)[None], None)[0])


def _known(given: Given, tokenizer: Tokenizer, size: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(known latents [tokens,P] f32, 0 where nothing is known; [tokens,1] bool)."""
    geometry = tokenizer.geometry
    values = np.zeros((geometry.tokens(*size), geometry.features), np.float32)
    known = np.zeros((len(values), 1), bool)
    if not given.kind:
        return values, known
    # Causal: the latents of what a clip starts with don't depend on how it goes on.
    start = _latents(tokenizer, _start(given))
    values[: len(start)], known[: len(start)] = start, True
    if given.last is not None:
        still = _latents(tokenizer, np.repeat(given.last[None], 1 + geometry.stride[0], axis=0))
        half = len(still) // 2  # tokens of a latent frame
        values[-half:], known[-half:] = still[half:], True
    return values, known


def _beside(given: Given, tokenizer: Tokenizer, size: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(mask channels and latents of the grey clip with the given frames in it [tokens,C] f32, nothing)."""
    geometry = tokenizer.geometry
    stride, frames = geometry.stride[0], size[0]
    video = np.full((*size, 3), GREY, np.float32)
    shown = np.zeros(frames, bool)
    if given.kind:
        start = _start(given)
        video[: len(start)], shown[: len(start)] = start, True
    if given.last is not None:
        video[-1], shown[-1] = given.last, True
    latents = _latents(tokenizer, video)
    shown = np.concatenate([np.repeat(shown[:1], stride - 1), shown]).reshape(-1, stride)  # [latent frames, stride]
    t, y, x = geometry.grid(*size)
    mask = np.repeat(shown.astype(np.float32), y * x, axis=0)
    return beside(mask, latents, geometry.patch[1] * geometry.patch[2]), np.zeros((t * y * x, 0), np.float32)
