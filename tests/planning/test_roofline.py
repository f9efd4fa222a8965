"""The estimate of a step's time, held against steps that others have published."""

import dataclasses

import pytest

from vidgen.planning.flops import Pairs, sample_flops, step_flops
from vidgen.planning.hardware import parse_topology
from vidgen.planning.hlo import Collective
from vidgen.planning.published import LATENTS, MAXDIFFUSION_STEP_SECONDS, TOKENS, maxdiffusion_step, wan, wan_step
from vidgen.planning.roofline import (
    KERNELS,
    assumptions,
    attention_efficiency,
    budget,
    clip_cost,
    predict,
)
from vidgen.planning.traffic import Traffic, communication, state_bytes

ATTENTION = frozenset({"residual", "attention_out", "attention_lse"})


def mesh(data=1, fsdp=1, context=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def test_it_predicts_maxdiffusions_training_step_of_wan_14b():
    flops, roofline = maxdiffusion_step()
    assert flops.useful / 4 == pytest.approx(4893.27e12, rel=1e-3)  # "Calculated TFLOPs per pass", of a device
    assert roofline.step_s == pytest.approx(MAXDIFFUSION_STEP_SECONDS, rel=0.2)


def test_keeping_attentions_results_and_a_fused_backward_pass_are_worth_half_the_peak():
    flops, roofline = wan_step("splash", ATTENTION, Pairs(TOKENS**2, 0, TOKENS * 512, 0))
    assert flops.recomputed_fraction < 0.12
    assert roofline.mfu > 0.5


@pytest.mark.parametrize(
    ("topology", "evaluations", "published"),
    [
        ("tpu7x:2x2x1", 100, 249.3),  # README: Wan 2.1 T2V 14B, 720p, 50 guided steps on v7x-8
        ("v6e:2x4", 80, 285.6),  # pull request 376: Wan 2.2 I2V A14B, 720p, 40 guided steps on v6e-8, flash
    ],
)
def test_it_predicts_maxdiffusions_generation_of_a_720p_clip(topology, evaluations, published):
    c, topology, sizes = wan(), parse_topology(topology), mesh(data=2, context=4)
    flops = sample_flops(c, LATENTS, 81, 720, 1280, steps=evaluations // 2, guidance=5.0)
    roofline = predict(
        topology, sizes, flops, kernel="splash", head=128, hbm_bytes=0, traffic=[], tokens=TOKENS * evaluations
    )
    assert roofline.step_s == pytest.approx(published, rel=0.2)


def test_narrow_heads_leave_wide_arrays_idle():
    v5p, v6e = parse_topology("v5p:2x2x1").chip, parse_topology("v6e:2x2").chip
    for kernel in KERNELS.keys() - {"cudnn"}:
        assert attention_efficiency(v5p, kernel, 64)[0] < 0.6 * attention_efficiency(v5p, kernel, 128)[0]
    assert attention_efficiency(v6e, "splash", 256)[0] == pytest.approx(2 * attention_efficiency(v6e, "splash", 128)[0])
    assert attention_efficiency(v5p, "blockwise", 128) < attention_efficiency(v5p, "splash", 128)


@pytest.fixture
def flops():
    return dataclasses.replace(step_flops(wan(), LATENTS.features, TOKENS**2, 0, TOKENS * 512))


def step(flops, *traffic, topology="v5p:4x8x8", sizes=None, hbm_bytes=0.0):
    return predict(
        parse_topology(topology),
        sizes or mesh(fsdp=32, context=8),
        flops,
        kernel="splash",
        head=128,
        hbm_bytes=hbm_bytes,
        traffic=traffic,
        tokens=TOKENS,
    )


def test_an_exchange_of_all_with_all_passes_on_what_others_send(flops):
    """Read from a program or expected, on a torus; GPUs of a host all reach each other."""
    read = Collective("all-to-all", ("context",), 10**9, 10**9, 10, False, "", None, "keys", "", members=8)
    expected = Traffic("ulysses", ("context",), 1e9, 10, False, members=8)
    assert step(flops, read) == step(flops, expected)
    assert step(flops, read).ici_s == pytest.approx(2 * 10e9 / 200e9)
    assert step(flops, read, topology="h100:32x8").ici_s == pytest.approx(10e9 / 450e9)


def test_a_window_with_no_work_in_it_hides_nothing(flops):
    empty, full = (
        Collective("all-gather", ("fsdp",), 10**9, 10**9, 10, True, window, None, "weights", "")
        for window in ("", "compute")
    )
    assert step(flops, full).exposed_s == 0
    assert step(flops, empty).exposed_s == pytest.approx(10e9 / 400e9)


def test_transfers_hide_behind_work_only_if_asynchronous_and_only_as_far_as_it_goes(flops):
    alone = step(flops)
    beside = step(flops, Traffic("weights", ("fsdp",), 1e9, 10, True))
    between = step(flops, Traffic("weights", ("fsdp",), 1e9, 10, False))
    assert beside.step_s == alone.step_s and beside.ici_s == pytest.approx(10e9 / 400e9)
    assert between.step_s == pytest.approx(alone.step_s + 10e9 / 400e9)
    slow = step(flops, Traffic("weights", ("fsdp", "context"), 1e12, 10, True))
    assert slow.step_s == pytest.approx(10e12 / 200e9) and slow.slowest == "transfers"


def test_memory_adds_and_slices_are_joined_by_the_network(flops):
    assert step(flops, hbm_bytes=2765e9).hbm_s == pytest.approx(1.0)
    far = step(flops, Traffic("copies", ("data",), 1e9, 1, True), topology="2*v5p:4x8x8", sizes=mesh(2, 32, 8))
    assert far.dcn_s == pytest.approx(1e9 / 6.25e9) and far.ici_s == 0


def test_utilisation_is_useful_work_over_the_peak(flops):
    roofline = step(flops)
    assert roofline.mfu == pytest.approx(flops.useful / (256 * 459e12) / roofline.step_s)
    assert roofline.tokens_per_second == pytest.approx(TOKENS / roofline.step_s)


@pytest.mark.parametrize(
    ("sizes", "strategy", "roles"),
    [
        (mesh(), "gather", set()),
        (mesh(data=4), "gather", {"gradients of copies"}),
        (mesh(fsdp=4), "gather", {"weights", "gradients"}),
        (mesh(context=4), "gather", {"weights", "gradients", "gather: keys and values", "gather: their gradients"}),
        (mesh(context=4), "ulysses", {"weights", "gradients", "ulysses"}),
        (mesh(context=4), "auto", {"weights", "gradients", "ulysses"}),
        (
            mesh(context=16),
            "auto",
            {"weights", "gradients", "ulysses", "gather: keys and values", "gather: their gradients"},
        ),
        (mesh(tensor=4), "gather", {"tensor"}),
    ],
)
def test_each_axis_brings_its_own_exchanges(sizes, strategy, roles):
    c = wan()
    c.rows.count = 4
    assert {t.role for t in communication(c, sizes, accumulate=1, strategy=strategy)} == roles


def test_exchanges_have_the_bytes_of_what_is_exchanged():
    c = wan()
    c.model.update(shared_modulation=False)
    found = {t.role: t for t in communication(c, mesh(context=4), accumulate=1, strategy="gather")}
    keys = found["gather: keys and values"]
    assert keys.sent * keys.count == pytest.approx(40 * 2 * 2 * TOKENS * 5120 * 2 * 3 / 4)
    weights = found["weights"]
    assert weights.sent * weights.count == pytest.approx(2 * 2 * 3 / 4 * 40 * 5120**2 * (6 + 2 + 6 + 5.4), rel=1e-3)
    assert found["gradients"].sent == 2 * weights.sent  # float32
    halves = communication(c, mesh(context=4), accumulate=2, strategy="gather")
    again = next(t for t in halves if t.role == "weights")
    assert again.count == 2 * weights.count  # gathered for each microbatch


def test_the_state_is_cut_by_the_axes_that_hold_pieces():
    c = wan()
    whole = state_bytes(c, LATENTS.features, mesh())
    assert whole / 14.4e9 == pytest.approx(16, rel=0.01)  # weights, average and two moments
    assert state_bytes(c, LATENTS.features, mesh(data=8, fsdp=4, context=2)) == whole / 8
    c.mesh.rules = "fsdp"
    assert state_bytes(c, LATENTS.features, mesh(data=8, fsdp=4, context=2)) == whole / 4


def test_money_and_time():
    topology = parse_topology("v5p:4x8x8")
    b = budget(topology, step_s=3.6, tokens_per_step=1e6, tokens=1e9, price=2.0)
    assert (b.steps, b.days, b.chip_hours, b.cost) == pytest.approx((1000, 1 / 24, 256, 512))
    assert budget(topology, 3.6, 1e6, 1e9).cost is None
    clip = clip_cost(parse_topology("tpu7x:2x2x1"), seconds=900, clips=2, price=10.0)
    assert (clip.chips, clip.chip_hours, clip.cost) == (2, 0.5, 5.0)


def test_the_constants_are_told_with_their_sources():
    said = "\n".join(assumptions(parse_topology("v5p:2x2x1"), "splash", 128))
    assert "459 TFLOP/s" in said and "57% forward, 68% backward" in said and "80% of the peak" in said
    assert "arXiv:2407.08608" in "\n".join(assumptions(parse_topology("h100:1x8"), "cudnn", 128))
