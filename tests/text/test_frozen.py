"""Frozen text encoders: a caption's values are its own, whoever is encoded beside it; bad weights are named."""

import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import text_weights

from vidgen import weights
from vidgen.config import ConfigError, base
from vidgen.text import encoder, frozen
from vidgen.text.t5 import T5Config, T5Encoder, relative_buckets

pytest.importorskip("tokenizers")

CAPTIONS = ["a red ball falls", "", "the blue square moves left, then right. " * 4, "红色的球落下", "a &amp;amp; b"]


def setup(directory, **changes):
    c = base()
    c.text.update(name="umt5", weights=directory)
    c.rows.update(caption=48, text=96)
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return text_weights.make_encoder(tmp_path_factory.mktemp("text"))


def alone(text, caption):
    """The values of a caption by the module itself, of its own length and with nothing behind it."""
    found = weights.load(text.directory)
    (ids,) = text.tokenizer.encode([frozen.clean_prompt(caption)], text.limit)
    module = T5Encoder(T5Config.from_dict(found.config))
    return np.asarray(module.apply({"params": found.params}, jnp.asarray(ids[None]), jnp.ones((1, len(ids)))))[0]


def test_values_are_those_of_each_caption_alone(made):
    text = frozen.from_config(setup(made))
    values = text.encode(CAPTIONS)
    assert [len(v) for v in values] == np.minimum(text.lengths(CAPTIONS), 48).tolist()
    assert text.width == 16 and text.empty.shape == (1, 16)
    for caption, own in zip(CAPTIONS, values, strict=True):
        assert own.dtype == np.float32 and own.std() > 0.1
        np.testing.assert_allclose(own, alone(text, caption), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(values[1], text.empty)
    # Whatever it is asked with, to the bit; and one program for each length.
    other = frozen.from_config(setup(made))
    for caption, own in zip(reversed(CAPTIONS), reversed(values), strict=True):
        np.testing.assert_array_equal(other.encode([caption, "a square"])[0], own)
    assert text.shapes <= other.shapes and {length for _, length in other.shapes} <= {16, 32, 48}
    assert len(other.shapes) <= 3


def test_captions_are_remembered_up_to_a_limit(made, monkeypatch):
    text = frozen.from_config(setup(made))
    first = text.encode(["a red ball"])[0]
    assert text.encode(["a blue ball", "a red ball"])[1] is first and not first.flags.writeable
    monkeypatch.setattr(frozen, "REMEMBERED", 3 * first.nbytes)
    for word in text_weights.WORDS[:6]:
        text.encode([f"a red {word}"])
    again = text.encode(["a red ball"])[0]
    assert sum(v.nbytes for v in text._values.values()) <= 3 * first.nbytes
    assert again is not first
    np.testing.assert_array_equal(again, first)


def test_long_captions_are_cut_and_counted(made, caplog):
    text = frozen.from_config(setup(made, **{"rows.caption": 5}))
    for _ in range(2):
        values = text.encode(["a red ball falls left", "red ball", "a red ball falls"])
    assert [len(v) for v in values] == [5, 3, 5] and text.cut == 1
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "caption of 6 tokens cut to 5: 'a red ball falls left'" in said[0]


def test_values_stand_in_rows_with_zeros_behind(made):
    text = frozen.from_config(setup(made, **{"text.pad": 64}))
    own = text.encode(["a red ball"])[0]
    placed = text.place(own)
    assert placed.shape == (64, 16) and not placed[len(own) :].any()
    np.testing.assert_array_equal(placed[: len(own)], own)
    plain = frozen.from_config(setup(made))
    assert plain.place(own).shape == own.shape and plain != text and hash(plain) != hash(text)
    assert plain == frozen.from_config(setup(made))


def test_threads_get_the_same(made):
    text, found = frozen.from_config(setup(made)), []
    jobs = [threading.Thread(target=lambda: found.append(text.encode(CAPTIONS))) for _ in range(4)]
    [job.start() for job in jobs]
    [job.join() for job in jobs]
    assert len(found) == 4
    for values in found[1:]:
        assert all(a is b for a, b in zip(values, found[0], strict=True))


def test_bfloat16_weights_lie_as_such_and_give_what_float32_gives(tmp_path):
    small = text_weights.make_encoder(tmp_path / "small", dtype=ml_dtypes.bfloat16)
    large = text_weights.make_encoder(tmp_path / "large", dtype=ml_dtypes.bfloat16)
    text_weights.rewrite(large, lambda flat: flat.update({k: v.astype(np.float32) for k, v in flat.items()}))
    half, full, real = (
        frozen.from_config(setup(d)) for d in (small, large, text_weights.make_encoder(tmp_path / "real"))
    )
    for text, kind in ((half, "bfloat16"), (full, "bfloat16"), (real, "float32")):
        assert {str(x.dtype) for x in weights.flatten(text._params).values()} == {kind}
    for a, b in zip(half.encode(CAPTIONS), full.encode(CAPTIONS), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(half.encode(CAPTIONS)[0], alone(half, CAPTIONS[0]), rtol=0, atol=2e-5)
    assert half.digest != full.digest != real.digest


def test_padding_changes_nothing_and_t5_has_one_table_of_biases():
    config = T5Config(30, 8, 4, 16, 3, 2)
    for per_layer in (False, True):
        shape = T5Config(**(config.to_dict() | {"bias_per_layer": per_layer}))
        assert frozen.shapes(shape)["layers/bias/table" if per_layer else "bias/table"].shape[-2:] == (32, 2)
        draw = np.random.default_rng(0)
        flat = {k: draw.normal(0, 0.5, v.shape).astype(np.float32) for k, v in frozen.shapes(shape).items()}
        params, ids = {"params": weights.nest(flat)}, jnp.asarray(draw.integers(0, 30, (1, 20)))
        whole = T5Encoder(shape).apply(params, ids[:, :9], jnp.ones((1, 9)))
        padded = T5Encoder(shape).apply(params, ids, jnp.arange(20)[None] < 9)
        np.testing.assert_allclose(padded[:, :9], whole, rtol=0, atol=1e-5)
        other = T5Encoder(shape).apply(params, ids, jnp.ones((1, 20)))
        assert np.abs(other[:, :9] - whole).max() > 0.01


def test_distances_have_buckets_of_their_own_up_to_a_few_and_grow_from_there():
    found = relative_buckets(300, 32, 128)
    assert found[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24] and found[8, 0] == 8
    assert found[0, 299] == 31 and found[299, 0] == 15
    assert (np.diff(found[0, 1:]) >= 0).all() and (np.diff(found[:, 0]) >= 0).all()


def test_bad_weights_are_named(tmp_path):
    made = text_weights.make_encoder(tmp_path / "a")

    def refused(says, make=lambda directory: None, **changes):
        directory = text_weights.make_encoder(tmp_path / str(len(list(tmp_path.iterdir()))))
        make(directory)
        with pytest.raises(ConfigError, match=says):
            frozen.from_config(setup(directory, **changes)).encode(["a red ball"])

    refused("config.text.name=t5: the weights in .* are of kind umt5; set that", **{"text.name": "t5"})
    refused("config.text.weights is empty: t5 and umt5 want", **{"text.weights": ""})
    refused("config.text.weights=.*nowhere: no such directory", **{"text.weights": str(tmp_path / "nowhere")})
    refused(
        r"layers/query/kernel has shape none: it is missing; expected \(2, 16, 12\)",
        lambda d: text_weights.rewrite(d, lambda flat: flat.pop("layers/query/kernel")),
    )
    refused(
        r"norm/scale has shape \(15,\); expected \(16,\)",
        lambda d: text_weights.rewrite(d, lambda flat: flat.update({"norm/scale": flat["norm/scale"][:15]})),
    )
    refused(
        "more has shape .*; expected no such array",
        lambda d: text_weights.rewrite(d, lambda flat: flat.update(more=np.zeros(3, np.float32))),
    )
    refused("values that are no finite numbers for 'a red ball'", lambda d: text_weights.rewrite(d, spoil))
    refused("unknown setting depth of a T5 encoder", lambda d: text_weights.set_config(d, depth=3))
    refused("heads=0: expected a whole number", lambda d: text_weights.set_config(d, heads=0))
    refused("tokens, but the encoder in .* knows 20", lambda d: text_weights.set_config(d, vocab=20))
    tokenizer = tmp_path / "a" / "tokenizer" / "tokenizer.json"
    moved = tmp_path / "a" / "text_encoder" / "tokenizer"
    moved.mkdir()
    tokenizer.rename(moved / "tokenizer.json")
    assert frozen.from_config(setup(str(tmp_path / "a"))).directory == made  # the pipeline's own directory will do
    assert len(frozen.from_config(setup(made)).encode(["red ball"])[0]) == 3
    (moved / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match="no tokenizer; expected tokenizer.json or spiece.model in .*/text_encoder/tok"
    ):
        frozen.from_config(setup(made)).encode(["a red ball"])
    weights.save(str(tmp_path / "vae"), "vae", {}, {"a": np.zeros(2, np.float32)})
    with pytest.raises(ConfigError, match="weights of kind 'vae'; expected t5 or umt5"):
        frozen.from_config(setup(str(tmp_path / "vae")))


def spoil(flat):
    flat["norm/scale"] = flat["norm/scale"] * np.float32(np.nan)


def test_settings(made):
    plan = frozen.from_config(setup("", **{"text.width": 4096}))
    assert plan.width == 4096 and encoder.from_config(setup("")) is None
    assert frozen.from_config(base()) is None
    for says, changes in (
        (r"config.text.name='ump5': known are bytes, t5, umt5; did you mean umt5\?", {"text.name": "ump5"}),
        ("config.text.pad=40: expected config.rows.caption=48", {"text.pad": 40}),
        ("config.text.pad=97: expected .* config.rows.text=96", {"text.pad": 97}),
        ("config.text.weights=.*: the encoder over bytes has none", {"text.name": "bytes"}),
        ("config.text.pad=9: the encoder over bytes", {"text.name": "bytes", "text.weights": "", "text.pad": 9}),
    ):
        with pytest.raises(ConfigError, match=says):
            encoder.from_config(setup(made, **changes))
