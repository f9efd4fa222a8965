"""Tokenizers as they come with weights; tests/peers/test_t5.py compares them with transformers'."""

import numpy as np
import pytest
import text_weights

from vidgen.config import ConfigError
from vidgen.text import tokenize

pytest.importorskip("tokenizers")


def test_a_text_is_its_tokens_and_an_end(tmp_path):
    size = text_weights.make_tokenizer(tmp_path)
    found = tokenize.load(tmp_path)
    assert found.size == size and found.file == str(tmp_path / "tokenizer.json")
    red, ball = (4 + text_weights.WORDS.index(word) for word in ("red", "ball"))
    whole, cut, empty, unknown = found.encode(["red ball red", "red ball red ball", "", "Ω"], 4)
    assert whole.tolist() == [red, ball, red, 1] and whole.dtype == np.int32
    assert cut.tolist() == [red, ball, red, 1] and empty.tolist() == [1] and unknown.tolist()[-2:] == [2, 1]
    assert found.encode(["red ball"], 1)[0].tolist() == [1]
    assert found.lengths(["red ball red ball", ""]).tolist() == [5, 1]
    assert found.encode(["\ud800"], 9)[0][-1] == 1  # half a character, which no tokenizer takes


def test_prompts_are_cleaned():
    assert tokenize.clean_prompt("  a&amp;lt;b\t&quot;c&quot;\n ") == 'a<b "c"'


def test_the_digest_is_of_the_file(tmp_path):
    text_weights.make_tokenizer(tmp_path / "a")
    text_weights.make_tokenizer(tmp_path / "b")
    text_weights.make_tokenizer(tmp_path / "c", more="é")
    a, b, c = (tokenize.load(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no tokenizer; expected tokenizer.json or spiece.model"):
        tokenize.load(tmp_path)
    text_weights.make_tokenizer(tmp_path / "endless", end=False)
    with pytest.raises(ConfigError, match="endless/tokenizer.json: an empty text has 0 tokens; expected a tokenizer"):
        tokenize.load(tmp_path / "endless")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="broken/tokenizer.json: not a tokenizer"):
        tokenize.load(tmp_path / "broken")
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "spiece.model").write_bytes(b"\x00no model")
    pytest.importorskip("sentencepiece")
    with pytest.raises(ConfigError, match="pieces/spiece.model: not a SentencePiece model"):
        tokenize.load(tmp_path / "pieces")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    for folder, package in (("endless", "tokenizers"), ("pieces", "sentencepiece")):
        with pytest.raises(ConfigError, match=rf"read by the package {package}; install it: pip install 'vidgen\[text"):
            tokenize.load(tmp_path / folder)
