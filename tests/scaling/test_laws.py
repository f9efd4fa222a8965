"""The fit of L(N, D): as good as can be on planted laws, honest of its uncertainty, warning where data are poor."""

import dataclasses

import numpy as np
import planted
import pytest
from scipy.optimize import least_squares

from vidgen.config import ConfigError
from vidgen.scaling import laws, powers
from vidgen.scaling.table import Run

WHICH = [0, 3, 4]  # E, alpha, beta


def as_runs(n, d, y):
    return [Run(f"r{i}", a, b, 6 * a * b, c) for i, (a, b, c) in enumerate(zip(n, d, y, strict=True))]


def test_planted_laws_are_found_within_the_bound_and_covered():
    """Ten laws, five draws of 0.5 % noise each, 30 runs over three decades of FLOPs."""
    n, d = planted.design(decades=3.0)
    errors, covered = [], []
    for i in range(10):
        law = planted.draw_law(np.random.default_rng([7, i]), n, d)
        bound = planted.bound(law, n, d, 0.005)
        for k in range(5):
            noise = np.random.default_rng([8, i, k]).standard_normal(30)
            found = powers.fit(np.stack([n, d]), planted.loss(law, n, d) * np.exp(0.005 * noise), draws=200, seed=k)
            low, high = found.interval(found.draws)
            errors.append(((found.values - law) / bound)[WHICH])
            covered.append(((low <= law) & (law <= high))[WHICH])
    rms, coverage = np.sqrt(np.square(errors).mean(axis=0)), np.mean(covered, axis=0)
    assert (rms <= 1.3).all(), rms
    assert (coverage >= 0.9).all(), coverage
    # Nor are intervals so wide that they always cover, which would say nothing.
    assert np.mean(covered) < 0.995


def test_exact_data_give_the_law_itself():
    n, d = planted.design()
    found = powers.fit(np.stack([n, d]), planted.loss(planted.LAW, n, d))
    np.testing.assert_allclose(found.values, planted.LAW, rtol=1e-4)
    np.testing.assert_allclose(found.predict(n, d), planted.loss(planted.LAW, n, d), rtol=1e-7)


def test_units_of_parameters_tokens_and_loss_do_not_matter():
    n, d = planted.design()
    y = planted.loss(planted.LAW, n, d) * np.exp(0.005 * np.random.default_rng(1).standard_normal(30))
    one = powers.fit(np.stack([n, d]), y)
    other = powers.fit(np.stack([n * 1e6, d * 1e-3]), y * 40)
    np.testing.assert_allclose(other.values[3:], one.values[3:], rtol=1e-3)
    np.testing.assert_allclose(other.values[0], one.values[0] * 40, rtol=1e-3)
    np.testing.assert_allclose(other.predict(n * 1e6, d * 1e-3), one.predict(n, d) * 40, rtol=1e-4)


def test_outliers_are_named_and_bend_the_law_less_than_they_do_least_squares():
    n, d = planted.design()
    ours, plain = [], []
    start = np.array([*np.log(planted.LAW[:3]), *planted.LAW[3:]])
    for place in (0, 3, 7, 14, 20, 29):
        y = planted.loss(planted.LAW, n, d) * np.exp(0.005 * np.random.default_rng(place).standard_normal(30))
        y[place] *= 1.3  # it diverged, and came back
        law = laws.fit(as_runs(n, d, y), draws=2)

        def residuals(v, y=y):
            return np.log(planted.loss([*np.exp(v[:3]), *v[3:]], n, d) / y)

        ours.append(np.abs(law.powers.values[3:] - planted.LAW[3:]))
        plain.append(np.abs(least_squares(residuals, start).x[3:] - planted.LAW[3:]))
        assert [w for w in laws.warnings(law) if "far off the law" in w and f"r{place} (+" in w]
    assert np.max(ours) < 0.06 and (np.mean(ours, axis=0) < 0.5 * np.mean(plain, axis=0)).all()


def test_a_good_design_gives_no_warning():
    assert laws.warnings(laws.fit(planted.sweep(noise=0.002))) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda runs: runs[::5][:7], "only 6 runs"),
        (lambda runs: [r for r in runs if r.flops < 1e13], "span a factor of 4 in FLOPs"),
        (lambda runs: [r for r in runs if r.name.endswith("-2")] * 2,
         "can't be told apart: add larger and shorter ones"),
        (lambda runs: [r for r in runs if r.budget == 1e14] + [r for r in runs if r.budget == 1e14][:2],
         "can't be told apart: add other budgets"),
        (lambda runs: [dataclasses.replace(r, parameters=1e5 * (1 + i / 20)) for i, r in enumerate(runs)],
         "parameters span a factor of 2.4"),
        (lambda runs: [r for r in runs if r.name.endswith(("-2", "-3"))], "fewer than two budgets"),
        (lambda runs: [dataclasses.replace(r, loss=r.loss * (1 + 0.2 * (-1) ** i)) for i, r in enumerate(runs)],
         "runs scatter about the law by"),
        (lambda runs: [dataclasses.replace(r, parameters=r.parameters / 1e6) for r in runs], "are the columns counts"),
        (lambda runs: runs + runs[:3], "3 runs repeat another to the last digit"),
    ],
)  # fmt: skip
def test_a_poor_design_is_said_to_be_poor(change, says):
    found = laws.warnings(laws.fit(change(planted.sweep(noise=0.002)), draws=60))
    assert [w for w in found if says in w], found


def test_a_law_without_a_floor_is_not_given_one():
    law = np.array([0.0, *planted.LAW[1:]])
    fitted = laws.fit(planted.sweep(law=law, noise=0.003))
    low, high = fitted.intervals["E"]
    assert low == 0 and [w for w in laws.warnings(fitted) if w.startswith(("E went to 0", "E = "))]


def test_exponents_that_nothing_determines_are_warned_of():
    n, d = planted.design(decades=1.2)
    y = (1.0 + 0.002 * (n / n.mean()) ** -0.5 + 0.3 * (d / d.mean()) ** -0.4) * np.exp(
        0.005 * np.random.default_rng(3).standard_normal(30)
    )
    assert [w for w in laws.warnings(laws.fit(as_runs(n, d, y))) if w.startswith("alpha = ")]


def test_a_term_that_the_runs_do_not_show_is_said_to_be_absent():
    n, d = planted.design(decades=2.0)
    law = laws.fit(as_runs(n, d, 0.5 + 0.3 * (n / n.mean()) ** -0.4), draws=60)
    assert law.absent == ["B"] and [w for w in laws.warnings(law) if w.startswith("B went to 0: ")]
    assert not [w for w in laws.warnings(law) if w.startswith("beta = ")]


def test_too_little_to_fit_is_refused_in_words():
    runs = planted.sweep()
    with pytest.raises(ConfigError, match="5 runs can be fitted: .*takes 6 at least"):
        laws.fit(runs[::6])
    with pytest.raises(ConfigError, match="all runs have 1000 parameters"):
        laws.fit([dataclasses.replace(r, parameters=1000.0) for r in runs])


def test_intervals_come_from_the_seed_and_predictions_lie_inside_theirs():
    runs = planted.sweep()
    one, same, other = (laws.fit(runs, seed=s) for s in (0, 0, 1))
    assert one.intervals == same.intervals != other.intervals
    low, high = one.between(1e6, 1e9)
    assert low < one.loss(1e6, 1e9) < high
    assert low < planted.loss(planted.LAW, 1e6, 1e9) < high
