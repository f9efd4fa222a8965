"""Counted FLOPs and parameters against the model's own shapes, its program and XLA's count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny

from vidgen.diffusion import generator as generators
from vidgen.models import remat
from vidgen.models.dit import layer_pattern
from vidgen.models.windows import window_ids
from vidgen.planning.flops import Pairs, full_layers, sample_flops, step_flops, whole_rows
from vidgen.planning.mix import Mix, typical, window_pairs
from vidgen.planning.parameters import parameters
from vidgen.tokenizers.base import geometry_from_config

NONE = {"squares": 0, "text_squares": 0, "crossed": 0}


def wide(**more):
    """One wide layer with few, wide heads, so that elementwise work is small beside products."""
    c = make_tiny()
    c.rows.update(count=2, tokens=256, segments=4, text=64)
    c.model.update({"width": 768, "layers": 1, "heads": 3, "unroll": 1, "attention": "dense"} | more)
    c.text.update(width=128, layers=1, heads=1)
    return c


def given(m, r):
    """Inputs of one row that the model has beside text."""
    found = {}
    if m.classes:
        found["vectors"] = np.zeros((1, r.segments + 1, 1), np.float32)
    if m.cond:
        found["cond"] = np.zeros((1, r.tokens, m.cond), np.float32)
    if m.image_width:
        ids, places = np.zeros((1, r.text), np.int32), r.segments * m.image_tokens
        image = (np.zeros((1, places, m.image_width), np.float32), np.zeros((1, places), np.int32))
        found["context"] = {"text": (ids, ids), "image": image}
    return found


def program(c, backward):
    """(function, shapes of its arguments): the forward pass, or the gradient by the parameters and the input."""
    generator = generators.from_config(c)
    example = generators.example(c)
    params = jax.eval_shape(lambda: generator.init(jax.random.key(0), example))
    example = example.replace(**given(c.model, c.rows))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((c.rows.count, *x.shape[1:]), x.dtype), example)
    noisy = jax.ShapeDtypeStruct((c.rows.count, c.rows.tokens, 768), jnp.float32)
    levels = jax.ShapeDtypeStruct((c.rows.count, c.rows.segments + 1), jnp.float32)

    def loss(params, noisy, levels, rows):
        return (generator.predict(params, noisy, levels, rows) ** 2).sum()

    return (jax.grad(loss, argnums=(0, 1, 2)) if backward else generator.predict), (params, noisy, levels, rows)


def products_in(jaxpr):
    """FLOPs of the matrix products of a jaxpr, loops by their length; the pick of modulation apart: (all, picked)."""
    total, picked = 0, 0
    for eqn in jaxpr.eqns:
        values = jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"))
        bodies = [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for body in bodies:
            found = products_in(body)
            total, picked = total + times * found[0], picked + times * found[1]
        if eqn.primitive.name == "dot_general":
            (contract, _), (batch, _) = eqn.params["dimension_numbers"]
            shapes = [v.aval.shape for v in eqn.invars]
            flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][i] for i in contract)
            pick = bool(batch) and any(5 in shape[1:] for shape in shapes)  # levels of wide(): 4 segments and clean
            total, picked = total + flops, picked + flops * pick
    return total, picked


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_modulation": True, "text_mlp": True, "final": "table", "absolute": "none", "mlp_dim": 500},
        {"cross": False, "classes": 9, "learned_sigma": True, "level_per_block": True},
        {"cond": 40, "image_width": 96, "image_tokens": 64},
        {"backbone": "uvit", "layers": 3},
        {"backbone": "uvit", "layers": 3, "cross": False, "classes": 9, "absolute": "table", "table": (4, 8, 8)},
    ],
)
def test_the_forward_pass_has_the_products_that_are_counted(changes):
    c = wide(**changes)
    function, args = program(c, backward=False)
    total, picked = products_in(jax.make_jaxpr(function)(*args).jaxpr)
    ours = step_flops(c, 768, **NONE)
    forward = ours.matmul / 3 + ours.attention_forward
    assert picked < 0.02 * total
    assert forward == pytest.approx(total - picked, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("none", {}),
        ("full", {}),
        ("attention", {}),
        ("products", {}),
        ("attention, mlp_up=save, query=save", {}),
        ("full", {"backbone": "uvit", "layers": 3}),
        ("products", {"backbone": "uvit", "layers": 3}),
    ],
)
def test_forward_and_backward_execute_what_is_counted_with_each_rematerialisation(preset, changes):
    c = wide(remat=preset, **changes)
    function, args = program(c, backward=True)
    total, picked = products_in(jax.make_jaxpr(function)(*args).jaxpr)
    saved = None if preset == "none" else remat.saved(preset)
    ours = step_flops(c, 768, **NONE, saved=saved)
    assert ours.executed == pytest.approx(total - picked, rel=0.005)
    assert (ours.recomputed == 0) == (preset == "none")


@pytest.mark.parametrize("backward", [False, True])
def test_an_unrolled_layer_is_what_xla_counts(backward):
    c = wide(remat="none")
    function, args = program(c, backward)
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    counted = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    ours = step_flops(c, 768, **NONE)
    expected = ours.executed if backward else ours.matmul / 3 + ours.attention_forward
    assert expected == pytest.approx(counted, rel=0.02)  # XLA counts norms, softmax and GELU too


def test_useful_attention_is_within_clips_and_executed_is_within_rows():
    c = make_tiny()
    full = step_flops(c, 768, squares=4 * 24**2, text_squares=4 * 192**2, crossed=4 * 24 * 192)
    assert full.attention_useful == full.attention_executed
    packed = step_flops(c, 768, squares=4 * 3 * 8**2, text_squares=4 * 3 * 30**2, crossed=4 * 3 * 8 * 30)
    assert packed.attention_executed == full.attention_executed > 3 * packed.attention_useful
    assert packed.useful == packed.matmul + packed.attention_useful


def test_skipped_blocks_and_flash_kernels_change_what_is_executed_alone():
    c = make_tiny()
    whole = whole_rows(c)
    half = Pairs(whole.full / 2, whole.windowed, whole.crossed / 2, whole.text / 2)
    dense, flash = (step_flops(c, 768, **NONE, kernel=k) for k in ("dense", "splash"))
    skipping = step_flops(c, 768, **NONE, kernel="splash", executed=half)
    assert dense.attention_executed / 6 == pytest.approx(flash.attention_executed / 7)
    assert skipping.attention_executed == pytest.approx(flash.attention_executed / 2)
    assert dense.useful == flash.useful == skipping.useful


def test_recomputation_is_a_fraction_of_what_is_executed():
    c = make_tiny()
    full = step_flops(c, 768, **NONE, saved=frozenset({"residual"}))
    kept = step_flops(c, 768, **NONE, saved=frozenset({"residual", "attention_out", "attention_lse"}))
    none = step_flops(c, 768, **NONE)
    assert full.recomputed_fraction > kept.recomputed_fraction > none.recomputed_fraction == 0
    assert full.executed - full.recomputed == pytest.approx(none.executed)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"absolute": "none", "mlp_ratio": 2.7},
        {"shared_modulation": True, "text_mlp": True},
        {"bias": True, "qk_norm": "joint", "cross_norm": True, "final": "table", "mlp_dim": 100},
        {"absolute": "table", "table": (2, 3, 4), "qk_norm": "none", "rope": False},
        {"absolute": "sincos", "cross": False, "classes": 9, "learned_sigma": True},
        {"level_per_block": True, "classes": 9, "cond": 5},
        {"image_width": 20, "bias": True, "text_mlp": True, "qk_norm": "joint"},
        {"image_width": 20, "image_tokens": 7},
        {"backbone": "uvit"},
        {"backbone": "uvit", "layers": 5, "bias": True, "qk_norm": "joint", "mlp_dim": 100, "cond": 5},
        {"backbone": "uvit", "absolute": "table", "table": (2, 3, 4), "classes": 9},
        {"backbone": "uvit", "absolute": "sincos", "cross": False, "classes": 9},
    ],
)
def test_parameters_are_those_of_the_model(changes):
    c = make_tiny()
    c.model.update({"width": 48, "heads": 4, "layers": 3} | changes)
    generator = generators.from_config(c)
    params = jax.eval_shape(lambda: generator.init(jax.random.key(0), generators.example(c)))
    assert parameters(c, 768) == sum(x.size for x in jax.tree.leaves(params))


def test_a_frozen_text_encoder_has_no_parameters_and_no_flops():
    c = make_tiny()
    c.text.update(name="umt5", pad=48, width=80)
    c.rows.update(text=192, caption=48)
    generator = generators.from_config(c)
    params = jax.eval_shape(lambda: generator.init(jax.random.key(0), generators.example(c)))
    assert parameters(c, 768) == sum(x.size for x in jax.tree.leaves(params))
    assert "text" not in params and params["blocks"]["cross"]["key"]["kernel"].shape == (2, 80, 32)
    pairs = {"squares": 0, "text_squares": 10**6, "crossed": 0}
    assert step_flops(c, 768, **pairs).attention_useful == 0


@pytest.mark.parametrize(("window", "full_every"), [((), 4), ((2, 2, 2), 4), ((2, 2, 2), 1), ((2, 2, 2), 0)])
def test_layers_of_each_kind_are_those_of_the_model(window, full_every):
    c = make_tiny()
    c.model.update(layers=8, window=window, full_every=full_every)
    pattern = layer_pattern(window, full_every)
    assert full_layers(c.model) == 8 * pattern.count("segment") // len(pattern)


@pytest.mark.parametrize("tick", [1.0, 1.5])
def test_windows_hold_the_pairs_that_their_ids_say(tick):
    mix = Mix("", ((((5, 6, 7), 3), ((1, 4, 4), 2)),), tokens=240, steps=1, tick=tick)
    window, pairs = (2, 4, 3), 0
    for moved in (False, True):
        ids = np.asarray(window_ids(mix.ids()[None], mix.coords()[None], window, moved))[0]
        pairs += sum(count**2 for count in np.unique(ids[ids > 0], return_counts=True)[1])
    assert mix.pairs(window).windowed == pairs / 2


@pytest.mark.parametrize(("full_every", "moved"), [(0, 1 / 2), (2, 0), (3, 1 / 2), (4, 1 / 3), (6, 2 / 5)])
def test_windows_count_as_often_as_layers_have_them(full_every, moved):
    mix = Mix("", ((((5, 6, 7), 3),),), tokens=210, steps=1)
    still, shifted = (window_pairs((5, 6, 7), (2, 4, 3), m) for m in (False, True))
    assert still != shifted
    assert mix.pairs((2, 4, 3), full_every).windowed == pytest.approx((1 - moved) * still + moved * shifted)


def test_windowed_layers_attend_to_less():
    c = make_tiny()
    c.model.update(layers=4, window=(1, 1, 1), full_every=4)
    geometry = geometry_from_config(c.tokenizer)
    pairs = typical(c, geometry).pairs(tuple(c.model.window))
    assert pairs.windowed == typical(c, geometry).trained  # one token a window
    some = step_flops(c, 768, pairs.full, 0, 0, pairs.windowed).attention_useful
    assert some == 6 * 2 * 32 * (pairs.full + 3 * pairs.windowed)


def test_a_typical_step_is_packed_as_in_training():
    c = make_tiny()
    mix = typical(c, geometry_from_config(c.tokenizer))
    ids = mix.ids()
    assert ids.shape == (24,) and ids.max() <= c.rows.segments and mix.coords().shape == (24, 3)
    text = mix.text_ids(0, c.rows.text)
    assert text.shape == (192,) and text.max() == ids.max()
    assert "5x16x16" in mix.words and "1x16x16" in mix.words
    c.data.source = "somewhere/else"
    c.rows.update(tokens=16)
    alone = typical(c, geometry_from_config(c.tokenizer))
    assert alone.words == "1 clip of 5x16x16 a row" and alone.pairs().full == 4 * 8**2
    assert (alone.ids() == np.repeat([1, 0], 8)).all()


def test_a_clip_costs_a_forward_pass_an_evaluation():
    c = make_tiny()
    geometry = geometry_from_config(c.tokenizer)
    one = sample_flops(c, geometry, 5, 16, 16, steps=1, guidance=1.0)
    guided = sample_flops(c, geometry, 5, 16, 16, steps=10, guidance=3.0)
    assert one.recomputed == one.attention_backward == 0
    # The text is encoded once.
    text = 48 * 2 * 12 * 32**2 + 4 * 32 * 48**2
    assert guided.useful - text == pytest.approx(20 * (one.useful - text))
    # Padding and whole blocks are run, and of no use.
    padded = sample_flops(c, geometry, 5, 16, 16, 10, 3.0, row=16, executed=Pairs(16**2, 0, 16 * 48, 0))
    assert padded.useful == pytest.approx(guided.useful)
    assert padded.matmul > 1.7 * guided.matmul and padded.attention_executed > 2 * guided.attention_executed
    c.sample.solver = "heun"
    assert sample_flops(c, geometry, 5, 16, 16, 10, 3.0).useful - text == pytest.approx(38 * (one.useful - text))
