"""IsoFLOP profiles: where minima are, how surely, and what they say together."""

import math

import numpy as np
import planted
import pytest

from vidgen.scaling import frontier, isoflop, parabola
from vidgen.scaling.table import Run


def test_a_parabola_is_found_exactly():
    x = np.linspace(0, 3, 7)
    found = parabola.fit(x, 2 + 0.3 * (x - 1.3) ** 2)
    assert found.x == pytest.approx(1.3) and found.y == pytest.approx(2) and found.edge == ""
    assert found.freedom == 4 and found.span == (0, 3)
    wide = np.linspace(0, 12, 13)
    near = parabola.fit(wide, 2 + 0.3 * (wide - 6.2) ** 2)
    assert near.span == (4, 8) and near.x == pytest.approx(6.2)  # within a factor of 8 of the best
    assert found.squares == pytest.approx(0, abs=1e-20)


def test_minima_of_planted_runs_are_those_of_the_law():
    runs = planted.sweep(noise=0.0, sizes=12)
    found = isoflop.fit(runs)
    cost = frontier.cost(runs)
    for p in found.profiles:
        best = float(frontier.size(planted.LAW, p.budget, cost))
        assert p.minimum.edge == "" and p.parameters == pytest.approx(best, rel=0.15)  # a parabola is an approximation
        assert p.tokens == pytest.approx(p.budget / planted.per_token(p.parameters), rel=1e-3)
        assert p.loss == pytest.approx(planted.loss(planted.LAW, best, p.budget / planted.per_token(best)), rel=5e-3)
    alpha, beta = planted.LAW[3:]
    a = beta / (alpha + 0.95 * beta)
    assert found.parameters.exponent == pytest.approx(a, abs=0.01)
    assert found.tokens.exponent == pytest.approx(1 - 0.95 * a, abs=0.01)
    e, k, gamma = found.loss.values
    assert e == pytest.approx(planted.LAW[0], rel=0.05) and gamma == pytest.approx(alpha * a, rel=0.1)


def test_intervals_cover_the_minimum():
    """Of parabolas: what they approximate is another question."""
    covered, slopes = [], []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        runs = []
        for c in (1e12, 1e13, 1e14):
            best = 1e4 * (c / 1e12) ** 0.5
            for f in np.geomspace(0.35, 2.8, 6):
                y = 0.5 * (c / 1e12) ** -0.1 * math.exp(0.03 * math.log(f) ** 2 + 0.003 * rng.standard_normal())
                runs.append(Run(f"{c}{f}", best * f, c / (6 * best * f), c, y, budget=c))
        found = isoflop.fit(runs, seed)
        for p in found.profiles:
            best = 1e4 * (p.budget / 1e12) ** 0.5
            low, high = p.intervals["parameters"]
            covered.append(low <= best <= high)
        low, high = found.parameters.interval
        slopes.append(low <= 0.5 <= high)
    assert 0.9 <= np.mean(covered) < 1 and np.mean(slopes) >= 0.9


def test_a_minimum_at_the_edge_is_flagged_and_left_out_of_the_trend():
    runs = planted.sweep(noise=0.001)
    largest = max(r.flops for r in runs)
    cut = [r for r in runs if r.flops < largest or r.parameters > 2e5]
    assert len(cut) < len(runs)
    found = isoflop.fit(cut)
    assert [p.edge for p in found.profiles][-1] == "the smallest tried is the best"
    assert [p.edge for p in found.profiles][:-1] == [""] * 4
    whole = isoflop.fit([r for r in runs if r.flops < largest])
    assert found.parameters.exponent == pytest.approx(whole.parameters.exponent)


def test_a_minimum_that_noise_may_have_put_inside_is_at_the_edge():
    """Sizes of the last budget begin 1.3 times above the best one: noise bends some of the parabolas up at its end."""
    called_inside, covered, clear = 0, 0, 0
    for seed in range(60):
        runs = planted.sweep(noise=0.008, seed=seed, budgets=planted.BUDGETS[-3:])
        rng = np.random.default_rng(seed)
        last = planted.BUDGETS[-1]
        best = float(frontier.size(planted.LAW, last, frontier.Cost(14.0, 0.95, 6.0)))
        above = []
        for i, n in enumerate(best * np.geomspace(1.3, 16, 6)):
            d = float(last / planted.per_token(n))
            y = float(planted.loss(planted.LAW, n, d) * np.exp(0.008 * rng.standard_normal()))
            above.append(Run(f"last-{i}", float(n), d, last, y, budget=last))
        profile = isoflop.fit(runs[:-6] + above, seed).profiles[-1]
        low, high = profile.intervals["parameters"]
        covered += low <= best <= high
        called_inside += not profile.edge
        clear += isoflop.fit(runs, seed).profiles[-1].edge == ""  # where the best is in the middle
    assert called_inside <= 6 and covered >= 54 and clear >= 45, (called_inside, covered, clear)


def test_profiles_want_three_sizes_of_a_budget():
    runs = [r for r in planted.sweep() if r.name.endswith(("-1", "-4"))]
    found = isoflop.fit(runs)
    assert found.profiles == () and found.parameters is None and found.loss is None


def test_without_runs_to_spare_no_interval_is_made_up():
    runs = [r for r in planted.sweep(noise=0.001) if r.name.endswith(("-0", "-2", "-5"))]
    found = isoflop.fit(runs)
    assert len(found.profiles) == 5 and all(p.intervals is None for p in found.profiles)
    assert found.parameters.interval is None


def test_budgets_are_found_without_their_column():
    named, unnamed = (isoflop.fit(planted.sweep(named=n)) for n in (True, False))
    assert [p.budget for p in unnamed.profiles] == pytest.approx([p.budget for p in named.profiles])
    assert unnamed.parameters.exponent == pytest.approx(named.parameters.exponent)
