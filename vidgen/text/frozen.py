"""A text encoder that stays as it is while a denoiser trains: captions in, what is attended to out.

A caption is cleaned, cut to `config.rows.caption` tokens and encoded on its own, on the host's first device, in few
lengths, so that few programs are compiled; what it gave is remembered. The arithmetic is float32 whatever
`config.dtype`; arrays that bfloat16 holds exactly, as those of released encoders often are, lie on the device as that.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.text import tokenize
from vidgen.text.t5 import T5Config, T5Encoder
from vidgen.text.tokenize import TextTokenizer, clean_prompt

KINDS = ("t5", "umt5")
NAMES = ("bytes", *KINDS)
SHORTEST = 16  # tokens that a caption is filled up to for encoding, or twice that, or four times, …
TOKENS = 512  # that are encoded at once, of captions of one such length
REMEMBERED = 2**28  # bytes of values
SHOWN = 10  # captions that are cut and said so on the terminal


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A frozen encoder. Two are equal where they are of one directory and do the same with a caption.

    Attributes:
      directory: of the weights; empty where only shapes are wanted.
      width: E.
      limit: tokens a caption at most.
      pad: places that a caption fills in a row, zeros behind its end; 0: as many as it has tokens.
    """

    directory: str
    width: int
    limit: int
    pad: int = 0
    shapes: set[tuple[int, int]] = dataclasses.field(default_factory=set, compare=False, repr=False)
    _lock: Any = dataclasses.field(default_factory=threading.RLock, compare=False, repr=False)
    _values: dict[str, np.ndarray] = dataclasses.field(
        default_factory=collections.OrderedDict, compare=False, repr=False
    )
    _cut: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)

    @functools.cached_property
    def config(self) -> T5Config:
        """Sizes of the encoder; raises ConfigError, also where there is no directory."""
        return _config(self.directory)

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """Of the files beside the weights; raises ConfigError."""
        vocab = self.config.vocab
        tokenizer = tokenize.load(_tokenizer(self.directory))
        if tokenizer.size > vocab:
            raise ConfigError(
                f"{tokenizer.file}: {tokenizer.size} tokens, but the encoder in {self.directory} knows "
                f"{vocab}; expected the tokenizer that belongs to it"
            )
        return tokenizer

    @functools.cached_property
    def digest(self) -> str:
        """Of the weights, and of the tokenizer behind a dash."""
        self._check()
        return f"{weights.digest_of(self.directory)}-{self.tokenizer.digest}"

    @property
    def cut(self) -> int:
        """How many captions have been longer than `limit` so far."""
        return len(self._cut)

    @functools.cached_property
    def empty(self) -> np.ndarray:
        """[1,E] f32: the values of the empty prompt, which a dropped caption becomes."""
        return self.encode([""])[0]

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """[n] i64: tokens of each caption before any is cut."""
        return self.tokenizer.lengths([clean_prompt(c) for c in captions])

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Values [1 ≤ n ≤ limit, E] f32 of each caption; not to be written to.

        Safe to call from several threads: one encodes at a time. Raises ConfigError: no weights, no tokenizer, weights
        that don't fit their own sizes, values that are no numbers.
        """
        with self._lock:
            new = {caption for caption in captions if caption not in self._values}
            found = self._encode(sorted(new)) if new else {}
            for caption in captions:
                if caption in self._values:
                    self._values.move_to_end(caption)
                    found[caption] = self._values[caption]
            self._values.update({caption: found[caption] for caption in new})
            total = sum(values.nbytes for values in self._values.values())
            while total > REMEMBERED and len(self._values) > 1:
                total -= self._values.popitem(last=False)[1].nbytes
        return [found[caption] for caption in captions]

    def place(self, values_NxE: np.ndarray) -> np.ndarray:
        """Values as they stand in a row: with zeros behind them, up to `pad`."""
        return np.pad(values_NxE, ((0, max(self.pad - len(values_NxE), 0)), (0, 0)))

    def _encode(self, captions: list[str]) -> dict[str, np.ndarray]:
        ids = self.tokenizer.encode([clean_prompt(c) for c in captions], self.limit)
        self._say_cut(captions, ids)
        by_length: dict[int, list[int]] = {}
        for i, own in enumerate(ids):
            by_length.setdefault(filled(len(own), self.limit), []).append(i)
        found = {}
        for length, chosen in sorted(by_length.items()):
            # One shape for each length, whatever is asked for together: a caption's values are always the same.
            at_once = max(1, TOKENS // length)
            self.shapes.add((at_once, length))
            for first in range(0, len(chosen), at_once):
                some = chosen[first : first + at_once]
                rows = np.zeros((2, at_once, length), np.int32)
                for row, i in enumerate(some):
                    rows[0, row, : len(ids[i])], rows[1, row, : len(ids[i])] = ids[i], 1
                rows = jax.device_put(rows, jax.local_devices()[0])
                values = np.asarray(_applied(self.config)(self._params, rows[0], rows[1]))
                for row, i in enumerate(some):
                    own = values[row, : len(ids[i])].copy()  # not a view, which would keep the whole batch
                    if not np.isfinite(own).all():
                        raise ConfigError(
                            f"config.text.weights={self.directory}: it gives values that are no finite numbers for "
                            f"{captions[i]!r}; import it anew"
                        )
                    own.flags.writeable = False
                    found[captions[i]] = own
        return found

    def _say_cut(self, captions: list[str], ids: list[np.ndarray]) -> None:
        full = [i for i, own in enumerate(ids) if len(own) == self.limit and captions[i] not in self._cut]
        for i, length in zip(full, self.lengths([captions[i] for i in full]), strict=True):
            if length > self.limit:
                self._cut.add(captions[i])
                if len(self._cut) <= SHOWN:
                    logging.warning("caption of %d tokens cut to %d: %.60r…", length, self.limit, captions[i])

    @functools.cached_property
    def _params(self) -> Any:
        """On the host's first device."""
        self._check()
        stored, one = weights.headers(self.directory), jax.local_devices()[0]
        return weights.nest({name: jax.device_put(_small(at.read()), one) for name, at in stored.items()})

    def _check(self) -> None:
        """Raises ConfigError naming the first array that is missing, too many, or of another shape than the sizes'."""
        wanted = {name: tuple(x.shape) for name, x in shapes(self.config).items()}
        have = {name: stored.shape for name, stored in weights.headers(self.directory).items()}
        for name in sorted(wanted.keys() | have.keys()):
            if wanted.get(name) != have.get(name):
                raise ConfigError(
                    f"config.text.weights={self.directory}: {name} has shape "
                    f"{have.get(name, 'none: it is missing')}; expected "
                    f"{wanted.get(name, 'no such array in an encoder of this config')}"
                )


def filled(tokens: int, limit: int) -> int:
    """The length that a caption of so many tokens is encoded in: 16, 32, 64, …, up to `limit`."""
    length = SHORTEST
    while length < tokens:
        length *= 2
    return min(length, limit)


@functools.lru_cache(maxsize=8)
def shapes(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    """{"a/b/c": shape and dtype} of an encoder's parameters."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return weights.flatten(jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids)["params"])


@functools.lru_cache(maxsize=8)
def _applied(config: T5Config):
    return jax.jit(lambda params, ids, mask: T5Encoder(config).apply({"params": params}, ids, mask))


def _small(array: np.ndarray) -> np.ndarray:
    """`array` as bfloat16 where that holds all of it exactly."""
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype == np.float32 and not (array.view(np.uint32) & 0xFFFF).any():
        return array.astype(ml_dtypes.bfloat16)
    return array


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the text that can't be used; reads no files."""
    t, rows = config.text, config.rows
    if t.name not in NAMES:
        near = difflib.get_close_matches(t.name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config.text.name={t.name!r}: known are {', '.join(NAMES)}{hint}")
    if t.name == "bytes":
        for key in ("weights", "pad"):
            if t[key]:
                raise ConfigError(
                    f"config.text.{key}={t[key]}: the encoder over bytes has none, it trains with the denoiser; set "
                    "config.text.name to t5 or umt5, or leave it out"
                )
    elif t.pad and not rows.caption <= t.pad <= rows.text:
        raise ConfigError(
            f"config.text.pad={t.pad}: expected config.rows.caption={rows.caption}, which has to fit into it, to "
            f"config.rows.text={rows.text}, into which it has to fit; or 0"
        )


def from_config(config: ConfigDict) -> FrozenEncoder | None:
    """The frozen encoder of a config; None where the text is bytes. Reads sizes, and no arrays yet.

    Without `config.text.weights` its width is `config.text.width`: enough to plan with, not to encode.

    Raises ConfigError: an unknown name, no weights there, of another kind, a padding that rows have no room for.
    """
    check(config)
    t = config.text
    if t.name == "bytes":
        return None
    if not t.weights:
        return FrozenEncoder("", t.width, config.rows.caption, t.pad)
    if not os.path.exists(t.weights):
        raise ConfigError(f"config.text.weights={t.weights}: no such directory; expected one of vidgen import")
    directory = find(t.weights)
    sizes = _config(directory)
    if sizes.kind != t.name:
        raise ConfigError(f"config.text.name={t.name}: the weights in {t.weights} are of kind {sizes.kind}; set that")
    return FrozenEncoder(directory, sizes.width, config.rows.caption, t.pad)


def find(path: str) -> str:
    """The directory of an encoder's weights that `path` means: itself, or `text_encoder/` of an imported pipeline."""
    for directory in (path, os.path.join(path, "text_encoder")):
        if os.path.exists(os.path.join(directory, weights.JSON)):
            return os.path.abspath(directory)
    return os.path.abspath(weights.find(path))  # says what is missing


def _config(directory: str) -> T5Config:
    if not directory:
        raise ConfigError(
            "config.text.weights is empty: t5 and umt5 want a directory of vidgen import, with the tokenizer's files "
            "beside it"
        )
    about = weights.describe(directory)
    if about["kind"] not in KINDS:
        raise ConfigError(
            f"config.text.weights={directory}: weights of kind {about['kind']!r}; expected {' or '.join(KINDS)}"
        )
    try:
        return T5Config.from_dict(about["config"])
    except ConfigError as e:
        raise ConfigError(f"config.text.weights={directory}: {e}") from None


def _tokenizer(directory: str) -> str:
    """Where the tokenizer of the encoder in `directory` lies: inside or beside it."""
    places = [os.path.join(directory, "tokenizer"), os.path.join(os.path.dirname(directory), "tokenizer")]
    for place in places:
        if any(os.path.isfile(os.path.join(place, name)) for name in (tokenize.JSON, tokenize.SENTENCEPIECE)):
            return place
    raise ConfigError(
        f"config.text.weights={directory}: no tokenizer; expected {tokenize.JSON} or {tokenize.SENTENCEPIECE} in "
        f"{places[0]} or {places[1]}"
    )
