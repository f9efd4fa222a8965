"""What to train with so many FLOPs, and what that takes on a pod."""

import dataclasses

import numpy as np
import planted
import pytest

from vidgen import plan
from vidgen.config import ConfigError
from vidgen.scaling import budgets, frontier, laws, pods
from vidgen.scaling.frontier import Cost

COST = Cost(14.0, 0.95, 6.0)


@pytest.mark.parametrize("flops", [1e12, 1e16, 3e18, 1e19, 1e25])
def test_the_optimum_is_the_least_of_all_sizes(flops):
    sizes = np.geomspace(1e2, 1e13, 400_001)
    losses = planted.loss(planted.LAW, sizes, flops / COST.token(sizes))
    best = sizes[losses.argmin()]
    assert float(frontier.size(planted.LAW, flops, COST)) == pytest.approx(best, rel=2e-3)


def test_a_token_costs_what_it_cost_the_runs_and_never_less_than_its_products():
    runs = planted.sweep()
    cost = frontier.cost(runs)
    assert (cost.factor, cost.exponent) == (pytest.approx(14), pytest.approx(0.95)) and cost.least == 6
    np.testing.assert_allclose([cost.token(r.parameters) * r.tokens for r in runs], [r.flops for r in runs], rtol=1e-6)
    assert cost.over_6nd(1e11) == 1 and cost.over_6nd(1e4) > 1.4
    # Parameters that aren't all multiplied with may well be below 6.
    half = frontier.cost([dataclasses.replace(r, flops=r.flops / 2) for r in runs])
    assert half.least < 6 and half.over_6nd(1e11) == pytest.approx(half.least / 6)
    narrow = frontier.cost([dataclasses.replace(r, parameters=1e5 * (1 + i / 30)) for i, r in enumerate(runs)])
    assert narrow.exponent == 1


def test_the_table_goes_by_decades_and_marks_what_is_far():
    law = laws.fit(planted.sweep())
    rows = frontier.table(law, frontier.cost(law.runs))
    assert [row.flops for row in rows] == [float(f"1e{p}") for p in range(13, 26)]
    assert [row.far for row in rows] == [row.flops > 3e16 for row in rows]
    for row in rows:
        truth = frontier.size(planted.LAW, row.flops, COST)
        low, high = row.intervals["parameters"]
        assert low < truth < high and low < row.parameters < high
        assert frontier.cost(law.runs).token(row.parameters) * row.tokens == pytest.approx(row.flops)
        assert row.loss == pytest.approx(float(law.loss(row.parameters, row.tokens)))
        low, high = row.intervals["loss"]
        assert low < planted.loss(planted.LAW, truth, row.flops / COST.token(truth)) < high
    widths = [np.log(row.intervals["parameters"][1] / row.intervals["parameters"][0]) for row in rows]
    assert widths[-1] > 3 * widths[1]  # farther off, less sure


@pytest.mark.parametrize("gone", [(1,), (2,), (1, 2)])
def test_a_law_without_a_term_has_no_table_and_its_sizes_stay_finite(gone):
    law = np.array(planted.LAW)
    law[list(gone)] = 0
    for cost in (COST, Cost(6.0, 1.0, 6.0)):
        sizes = frontier.size(np.stack([law, planted.LAW]), 1e18, cost)
        assert np.isfinite(sizes).all() and (sizes >= 1).all() and (cost.token(sizes) <= 1.001e18).all()
    fitted = laws.fit(planted.sweep(), draws=2)
    fitted = dataclasses.replace(fitted, powers=dataclasses.replace(fitted.powers, values=law))
    assert fitted.absent == ["AB"[i - 1] for i in gone] and frontier.table(fitted, COST) == []


@pytest.fixture(scope="module")
def law():
    return laws.fit(planted.sweep(), draws=20)


@pytest.fixture(scope="module")
def planned(law):
    return pods.table(law, "v5p:8x8x8", price=2.0)


def test_on_a_pod_a_token_costs_what_it_costs_the_family(law, planned):
    assert [row.optimal.flops for row in planned] == frontier.decades(law)
    for row in planned:
        size = budgets.size_of(pods.configs.load(f"{pods.FAMILY}:{row.preset}"))
        each = size.flops / size.tokens / size.parameters
        # The FLOPs of a row are those of its parameters and tokens, attention over the size's own clips counted.
        assert row.optimal.flops == pytest.approx(each * row.optimal.parameters * row.optimal.tokens)
        assert row.optimal == frontier.optimal(law, Cost(each, 1.0, each), row.optimal.flops)
        assert row.optimal.over_6nd == pytest.approx(each / 6)
    assert planned[-1].optimal.over_6nd > 1.4  # a minute of video is not a row of sixteen tokens


def test_days_and_cost_are_those_of_the_plan(planned):
    last = planned[-1]
    facts = plan.run(pods.configs.load(f"{pods.FAMILY}:{last.preset}"), "v5p:8x8x8", price=2.0, abstract=True)
    assert last.mfu == pytest.approx(facts["predicted_mfu"])
    seconds = 1e25 / (facts["flops_per_step"] / facts["predicted_step_seconds"])
    assert last.chips == 512 and last.days == pytest.approx(seconds / 86400)
    assert last.cost == pytest.approx(2 * 512 * seconds / 3600)


def test_what_the_family_does_not_have_is_said(planned, law):
    assert "larger" in planned[0].note and planned[0].preset == "5m"
    small = pods.table(law, "v5e:2x2")
    assert "times a device's memory there" in small[-1].note
    assert small[-1].cost is None and planned[-1].facts()["preset"] == planned[-1].preset


def test_a_family_says_which_sizes_it_has(law):
    with pytest.raises(ConfigError, match="expected a config file with a dict SIZES"):
        pods.table(law, "v5p:8x8x8", family="configs/quickstart.py")
    with pytest.raises(ConfigError, match="no such file; did you mean configs/dit_video.py"):
        pods.table(law, "v5p:8x8x8", family="configs/dit_vidio.py")
    with pytest.raises(ConfigError, match="v5p"):
        pods.table(law, "v5p:3x3")


def test_flops_that_are_proportional_to_the_parameters_have_a_frontier():
    # Least squares of such runs gives an exponent that is 1 but for rounding, on either side of it.
    for factor in (5.0, 9.0, 12.0):
        runs = [dataclasses.replace(r, flops=factor * r.parameters * r.tokens) for r in planted.sweep()]
        cost = frontier.cost(runs)
        assert cost.exponent == 1
        sizes = np.geomspace(1e2, 1e13, 400_001)
        best = sizes[planted.loss(planted.LAW, sizes, 1e18 / cost.token(sizes)).argmin()]
        assert float(frontier.size(planted.LAW, 1e18, cost)) == pytest.approx(best, rel=2e-3)
