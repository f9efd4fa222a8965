"""Spaces of settings: what the five verbs give, and what they refuse."""

import pytest

from vidgen.config import ConfigError
from vidgen.scaling.algebra import chain, labels_of, param, product, sample, settings_of, zipped

WIDTHS, RATES = param("model.width", (64, 128)), param("optimizer.lr", (1e-3, 3e-3, 1e-2))


def test_product_takes_each_with_each_and_the_last_varies_fastest():
    space = product({"seed": 1}, WIDTHS, RATES)
    assert len(space) == 6
    assert space[0] == {"seed": 1, "model.width": 64, "optimizer.lr": 1e-3}
    assert [p["optimizer.lr"] for p in space[:3]] == [1e-3, 3e-3, 1e-2]


def test_zipped_goes_in_step_and_chain_one_after_the_other():
    heads = param("model.heads", (2, 4))
    assert zipped(WIDTHS, heads) == ({"model.width": 64, "model.heads": 2}, {"model.width": 128, "model.heads": 4})
    assert chain(WIDTHS, {"seed": 3}, RATES) == (*WIDTHS, {"seed": 3}, *RATES)


def test_sample_draws_without_replacement_and_the_same_each_time():
    space = product(WIDTHS, RATES, param("seed", range(5)))
    drawn = sample(space, 10, seed=3)
    assert drawn == sample(space, 10, seed=3) != sample(space, 10, seed=4)
    assert len({tuple(p.items()) for p in drawn}) == 10
    assert [space.index(p) for p in drawn] == sorted(space.index(p) for p in drawn)


def test_labels_are_no_settings():
    point = {"model.width": 64, "label.budget": 1e12}
    assert settings_of(point) == {"model.width": 64} and labels_of(point) == {"budget": 1e12}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: param("seed", ()), "'seed'.*no values"),
        (lambda: param("seed", (1, 2, 1)), "1 stands there twice"),
        (lambda: param("seed", (0, 0, 1, 0)), "0 stands there 3 times"),
        (lambda: param("data.moving_shapes.sizes", ([1, 2], [1, 2])), "twice"),
        (lambda: param("seed", range(10**12)), "more than 100,000 values"),
        (lambda: sample({"seed": 1}, 2), "2 points of a space of 1"),
        (lambda: product(WIDTHS, WIDTHS), "model.width is set by two"),
        (lambda: zipped(WIDTHS, param("model.width", (1, 2))), "model.width is set by two"),
        (lambda: zipped(WIDTHS, RATES), "2, 3 points; expected equal lengths"),
        (lambda: sample(WIDTHS, 3), "3 points of a space of 2"),
        (lambda: product(*(param(f"k{i}", range(10)) for i in range(6))), "1,000,000 runs: at most"),
    ],
)
def test_what_makes_no_space_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
