"""Counted FLOPs against XLA's own count."""

import jax
import pytest
from conftest import make_tiny

from vidgen.diffusion import generator as generators
from vidgen.planning.flops import step_flops
from vidgen.planning.peaks import peak_flops


def test_the_forward_pass_is_what_xla_counts():
    c = make_tiny()
    c.rows.update(count=2, tokens=256, segments=4, text=64)
    c.model.update(width=192, layers=2, heads=4, unroll=2)
    c.text.update(width=64)
    generator = generators.from_config(c)
    batch = generators.example(c)
    params = jax.eval_shape(lambda: generator.init(jax.random.key(0), batch))
    two = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), batch)
    noisy = jax.ShapeDtypeStruct((2, 256, 768), "float32")
    levels = jax.ShapeDtypeStruct((2, 5), "float32")
    compiled = jax.jit(generator.predict).lower(params, noisy, levels, two).compile()
    analysis = compiled.cost_analysis()
    counted = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    ours = step_flops(c, 768, squares=0, text_squares=0, crossed=0)
    forward = (ours.matmul + ours.attention_executed) / 3
    assert forward == pytest.approx(counted, rel=0.05)  # XLA counts norms, softmax and GELU too


def test_useful_attention_is_within_clips_and_executed_is_within_rows():
    c = make_tiny()
    full = step_flops(c, 768, squares=4 * 24**2, text_squares=4 * 192**2, crossed=4 * 24 * 192)
    assert full.attention_useful == full.attention_executed
    packed = step_flops(c, 768, squares=4 * 3 * 8**2, text_squares=4 * 3 * 30**2, crossed=4 * 3 * 8 * 30)
    assert packed.attention_executed == full.attention_executed > 3 * packed.attention_useful
    assert packed.useful == packed.matmul + packed.attention_useful


def test_an_unknown_device_is_measured():
    peak, origin = peak_flops(jax.devices()[0])
    assert 1e8 < peak < 1e14 and "measured" in origin


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_known_devices_have_the_figures_of_their_data_sheets(kind, peak):
    device = type("Device", (), {"device_kind": kind, "platform": "tpu"})
    assert peak_flops(device)[0] == peak
