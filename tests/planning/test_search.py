"""Every way to lay a step on a topology, and which is best."""

import math

import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.models import attend
from vidgen.parallel.mesh import axis_sizes, check_fit
from vidgen.planning import arithmetic
from vidgen.planning.hardware import parse_topology
from vidgen.planning.search import meshes, pareto, rank, strategies


@pytest.fixture
def large():
    c = configs.base()
    c.model.update(width=4096, layers=32, heads=32, residual="bfloat16")
    c.text.update(width=1024)
    c.rows.update(count=32, tokens=61_440, text=4096, segments=16)
    return c


def ranked(c, topology, presets=("none", "products", "attention", "full"), **more):
    return rank(c, parse_topology(topology), presets, **more)


def test_meshes_are_those_that_divide_rows_tokens_and_heads():
    topology = parse_topology("2*v6e:4x4")
    found = meshes(topology, rows=8, tokens=96, heads=6, inner=64)
    assert found and len({tuple(m.values()) for m in found}) == len(found)
    for sizes in found:
        assert math.prod(sizes.values()) == 32 and sizes["data"] % 2 == 0 and 6 % sizes["tensor"] == 0
        c = configs.base()
        c.mesh.update(sizes | {"slices": 2})
        check_fit(axis_sizes(c.mesh, 32), rows=8, tokens=96)


def test_strategies_are_those_that_the_heads_allow():
    def over(context, tensor=1):
        return strategies(40, {"data": 1, "fsdp": 1, "context": context, "tensor": tensor})

    assert over(1) == ["local"]
    assert over(8) == ["gather", "ulysses", "ring"]
    assert over(16) == ["gather", "ring", "ulysses+gather", "ulysses+ring"]
    assert over(3) == ["gather", "ring"]
    assert "ulysses" not in over(8, tensor=10)


def test_the_best_come_first_and_their_changes_make_a_config(large):
    found = ranked(large, "v5p:4x8x8")
    fitting = [c for c in found if c.fits]
    assert fitting == found[: len(fitting)]
    assert [c.step_s for c in fitting] == sorted(c.step_s for c in fitting)
    best = configs.override(large, found[0].changes)
    assert math.prod(best.mesh[axis] for axis in ("data", "fsdp", "context", "tensor")) == 256
    check_fit(found[0].mesh, 32, 61_440, found[0].accumulate)


def test_keeping_less_needs_less_memory_and_more_work(large):
    presets = ("none", "products", "attention", "full")
    found = ranked(large, "v5p:4x8x8", presets=presets, accumulates=(1,))

    def of(remat, **sizes):
        return next(c for c in found if (c.remat, c.attention) == (remat, "gather") and sizes.items() <= c.mesh.items())

    some = [of(remat, context=8, tensor=1) for remat in presets]
    assert [c.bytes_per_device for c in some] == sorted((c.bytes_per_device for c in some), reverse=True)
    assert [c.recomputed_fraction for c in some] == sorted(c.recomputed_fraction for c in some)


def test_exchanging_heads_spares_the_memory_of_gathered_keys(large):
    found = ranked(large, "v5p:4x8x8", presets=("full",), accumulates=(1,))
    sizes = {c.attention: c.bytes_per_device for c in found if c.mesh["context"] == 32 and c.mesh["tensor"] == 1}
    assert sizes["ulysses"] < sizes["gather"]


def test_offloaded_tensors_take_no_memory_of_the_device(large):
    presets = ("attention", "offload")
    found = ranked(large, "v5p:4x8x8", presets=presets, accumulates=(1,))
    by_mesh = {}
    for c in found:
        by_mesh.setdefault((tuple(c.mesh.values()), c.attention), {})[c.remat] = c
    both = [pair for pair in by_mesh.values() if len(pair) == 2]
    assert both
    for pair in both:
        assert pair["offload"].bytes_per_device < pair["attention"].bytes_per_device
        assert pair["offload"].recomputed_fraction == pair["attention"].recomputed_fraction


def test_what_does_not_fit_comes_last_and_is_told_so(large):
    large.model.update(width=8192, heads=64, layers=64)
    found = ranked(large, "v5e:4x4", accumulates=(1, 2))
    assert found and not any(c.fits for c in found)
    assert [c.bytes_per_device for c in found] == sorted(c.bytes_per_device for c in found)


def test_what_is_offloaded_takes_time_where_work_does_not_hide_it(large):
    large.rows.update(tokens=1024, segments=1)  # little work a token
    large.mesh.update(data=1, fsdp=32)
    kept, away = (
        arithmetic.estimate(configs.override(large, {"model.remat": r}), parse_topology("v6e:4x8")).roofline
        for r in ("full", "residual=offload")
    )
    assert kept.host_s == 0 and away.host_s == pytest.approx(2 * 32 * 1024 * 4096 * 2 / 32e9)
    assert away.exposed_s >= kept.exposed_s


@pytest.mark.parametrize(
    ("topology", "changes"),
    [
        ("v5p:4x4x4", {}),
        ("v5p:4x4x4", {"model.window": (3, 8, 8), "model.full_every": 2, "rows.segments": 1}),
        ("h100:8x8", {}),  # several clips a row: cudnn or blockwise, as a mask of the row fits
        ("2*v5e:8x8", {"mesh.rules": "fsdp", "model.remat": "attention, query=save"}),
    ],
)
def test_a_candidates_time_is_the_estimate_of_the_config_with_its_changes(large, topology, changes):
    large.data.moving_shapes.sizes = ((25, 256, 256), (1, 512, 512))
    large.rows.update(tokens=12_288)
    c, where = configs.override(large, changes), parse_topology(topology)
    found = rank(c, where, (c.model.remat,), accumulates=(1, 2))
    assert len({x.attention for x in found}) == 6
    kernels = set()
    for candidate in found[:: max(1, len(found) // 30)]:
        changed = configs.override(c, candidate.changes | {"mesh.slices": where.slices})
        e = arithmetic.estimate(changed, where)
        assert (e.strategy, e.roofline.step_s) == (candidate.attention, candidate.step_s)
        kernels.add(e.kernel)
    assert kernels == ({"cudnn", "blockwise"} if topology.startswith("h100") else {"splash", "blockwise"})


def test_pairs_counted_in_one_go_are_those_of_each_device(large):
    large.model.window = (3, 8, 8)
    large.data.moving_shapes.sizes = ((25, 256, 256), (1, 512, 512))
    large.rows.update(tokens=6144)
    shown = arithmetic.supposed(large)
    for strategy in ("gather", "ring", "ulysses+gather", "ulysses+ring"):
        large.mesh.update(data=1, context=4, attention=strategy, ulysses=2 if "+" in strategy else 0)
        how = arithmetic.attending(large, parse_topology("v5e:2x2"))
        for windowed in (False, True):
            ids = arithmetic._window_ids(shown, 0, (3, 8, 8), True) if windowed else shown.ids()[None]
            each = attend.executed_pairs(ids, ids, how, windows=windowed)
            assert arithmetic._own_pairs(ids, how, windowed) == each


def test_the_configs_own_rematerialisation_is_tried_too(large):
    large.model.remat = "attention, mlp_up=save"
    found = rank(large, parse_topology("v5p:4x8x8"), accumulates=(1,))
    assert {"attention, mlp_up=save", "full", "none"} <= {c.remat for c in found}


def test_the_pareto_front_is_beaten_by_none(large):
    found = ranked(large, "v5p:4x8x8")
    front = pareto(found, lambda c: (c.step_s, c.bytes_per_device))
    assert front and front[0].step_s == min(c.step_s for c in found)
    for c in front:
        assert not any(o.step_s < c.step_s and o.bytes_per_device < c.bytes_per_device for o in found)
    assert min(c.bytes_per_device for c in found) == front[-1].bytes_per_device


def test_a_step_that_no_mesh_divides_is_told_in_a_line(large):
    large.rows.update(count=3, tokens=1001)
    with pytest.raises(ConfigError, match="no mesh of 256 devices divides config.rows.count=3"):
        ranked(large, "v5p:4x8x8")
