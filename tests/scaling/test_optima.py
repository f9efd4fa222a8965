"""The best learning rate and batch: their power laws, and whether they transfer over widths."""

import math

import numpy as np
import pytest

from vidgen.scaling import optima
from vidgen.scaling.table import Run

RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)


def tried(exponent, rates=RATES, noise=0.002, batches=(None,), seed=0, best=3e-3):
    """Learning rates at three widths and two budgets, the best of which goes as N^exponent and as √batch."""
    rng = np.random.default_rng(seed)
    runs = []
    for c in (1e13, 1e14):
        for width, n in ((64, 5e4), (128, 2e5), (256, 8e5)):
            for batch in batches:
                own = best * (n / 2e5) ** exponent * math.sqrt((batch or 64) / 64)
                for rate in rates:
                    far = math.log(rate / own) ** 2 + (math.log((batch or 100) / 100) ** 2)
                    y = 0.5 * n**-0.05 * math.exp(0.03 * far + noise * rng.standard_normal())
                    name = f"{c}-{n}-{batch}-{rate}"
                    runs.append(Run(name, n, c / n / 6, c, y, c, learning_rate=rate, width=width, batch=batch))
    return runs


def test_the_best_learning_rate_as_a_power_of_size():
    found = optima.fit(tried(-0.25), "learning_rate")
    law = found.over_parameters
    assert law.exponent == pytest.approx(-0.25, abs=0.02) and law.interval[0] < -0.25 < law.interval[1]
    assert float(law.predict(2e5)) == pytest.approx(3e-3, rel=0.05)
    for o in found.optima:
        assert o.interval[0] < 3e-3 * (o.parameters / 2e5) ** -0.25 < o.interval[1] and o.edge == ""
    assert found.over_flops.exponent == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("exponent", "transfers"), [(0.0, True), (-0.05, True), (-0.5, False), (0.4, False)])
def test_whether_it_transfers_is_said_in_words(exponent, transfers):
    found = optima.fit(tried(exponent, rates=np.geomspace(3e-4, 3e-2, 9)), "learning_rate").transfer
    assert found.transfers == transfers
    assert ("it transfers" in found.verdict) == transfers == ("doesn't transfer" not in found.verdict)
    assert found.moved == pytest.approx(16**exponent, rel=0.15)
    assert found.step == pytest.approx(100 ** (1 / 8))


def test_a_verdict_that_noise_could_turn_says_so():
    found = optima.fit(tried(0.0, noise=0.04), "learning_rate").transfer
    assert found.transfers and "to be sure" in found.verdict


def test_a_minimum_outside_the_grid_is_flagged():
    found = optima.fit(tried(0.0, rates=RATES[:2] + (2e-3,)), "learning_rate")
    assert {o.edge for o in found.optima} == {"the largest tried is the best"}
    assert found.over_parameters is None and found.transfer is None


def test_of_each_batch_its_best_learning_rate_counts():
    runs = tried(0.0, batches=(25, 50, 100, 200, 400), rates=np.geomspace(7.5e-4, 1.2e-2, 9))
    batch = optima.fit(runs, "batch")
    assert all(o.value == pytest.approx(100, rel=0.15) for o in batch.optima)
    rate = optima.fit(runs, "learning_rate")
    # At the best batch, 100, alone: others want other rates.
    assert all(o.value == pytest.approx(3e-3 * math.sqrt(100 / 64), rel=0.15) for o in rate.optima)
    assert all(len(o.runs) == 9 for o in rate.optima)


def test_nothing_is_said_of_what_was_not_varied():
    runs = tried(0.0, rates=(3e-3, 6e-3))
    assert optima.fit(runs, "learning_rate") is None and optima.fit(runs, "batch") is None
