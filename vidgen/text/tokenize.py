"""Text → ids, by the tokenizer's files that come with an encoder's weights: `tokenizer.json`, or else `spiece.model`.

The first is read by the package `tokenizers`, the second by `sentencepiece`: the extra [text] has both. `spiece.model`
alone knows no special tokens written out in a text, such as "</s>" or "<extra_id_0>": they are text to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vidgen.config import ConfigError

JSON, SENTENCEPIECE = "tokenizer.json", "spiece.model"


def clean_prompt(text: str) -> str:
    """A prompt as Wan's pipelines clean it: HTML entities undone twice, runs of blanks one space, none at the ends.

    They also run `ftfy` where it is installed, which mends text that was decoded wrongly ("âœ”" for "✔"). It isn't run
    here: the same caption is to be the same tokens on every machine.
    """
    return " ".join(html.unescape(html.unescape(text)).split())


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that ends each text with one special token, as T5's and UMT5's do.

    Attributes:
      file: that it was read from.
      size: ids are below this.
      digest: 16 hex digits of a hash of the file.
      whole: texts → the ids of each, uncut, the end among them.
    """

    file: str
    size: int
    digest: str
    whole: Callable[[list[str]], list[list[int]]] = dataclasses.field(compare=False, repr=False)

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """[n] i64: tokens of each text, uncut and with its end."""
        return np.array([len(ids) for ids in self.whole([_utf8(t) for t in texts])], np.int64)

    def encode(self, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """Ids [1 ≤ n ≤ limit] i32 of each text; of a longer one its first tokens and its end."""
        found = [np.asarray(ids, np.int32) for ids in self.whole([_utf8(t) for t in texts])]
        return [ids if len(ids) <= limit else np.append(ids[: limit - 1], ids[-1]) for ids in found]


def load(directory: str | os.PathLike[str]) -> TextTokenizer:
    """The tokenizer in a directory; raises ConfigError for a file or a package that is missing, or a file of another
    kind."""
    directory = os.fspath(directory)
    for name, read in ((JSON, _json), (SENTENCEPIECE, _sentencepiece)):
        file = os.path.join(directory, name)
        if os.path.isfile(file):
            whole, size = read(file)
            with open(file, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
            (end,) = whole([""])
            if len(end) != 1:
                raise ConfigError(
                    f"{file}: an empty text has {len(end)} tokens; expected a tokenizer that ends each text with one "
                    "special token, as those of T5 and UMT5 do"
                )
            return TextTokenizer(file, size, digest, whole)
    raise ConfigError(f"{directory}: no tokenizer; expected {JSON} or {SENTENCEPIECE}, as they come with the weights")


def _json(file: str) -> tuple[Callable[[list[str]], list[list[int]]], int]:
    tokenizers = _package("tokenizers", file)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(file)
    except Exception as e:  # the package has no error of its own
        raise ConfigError(f"{file}: not a tokenizer ({' '.join(str(e).split())})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda texts: [found.ids for found in tokenizer.encode_batch(texts)], tokenizer.get_vocab_size()


def _sentencepiece(file: str) -> tuple[Callable[[list[str]], list[list[int]]], int]:
    sentencepiece = _package("sentencepiece", file)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=file)
    except (RuntimeError, OSError) as e:
        raise ConfigError(f"{file}: not a SentencePiece model ({' '.join(str(e).split())})") from None
    end = model.eos_id()
    if end < 0:
        raise ConfigError(f"{file}: it has no token that ends a text; expected </s>, as T5's and UMT5's have")
    return lambda texts: [[*ids, end] for ids in model.encode(texts)], model.get_piece_size()


def _package(name: str, file: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"{file} is read by the package {name}; install it: pip install 'vidgen[text]'") from None


def _utf8(text: str) -> str:
    """`text` with "?" for lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", errors="replace").decode()
