"""Steps that a budget pays for."""

import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.planning.parameters import BUCKETS, NGRAMS, VOCAB, parameters
from vidgen.scaling.algebra import param, product
from vidgen.scaling.budgets import at_budgets, size_of
from vidgen.scaling.manifest import expand
from vidgen.tokenizers import base as tokenizers

QUICKSTART = "configs/quickstart.py"
WIDTHS = param("model.width", (32, 64, 128))


def test_parameters_are_those_that_cost_flops():
    config = configs.load(QUICKSTART)
    whole = parameters(config, tokenizers.geometry_from_config(config.tokenizer).features)
    size = size_of(config)
    assert size.parameters == whole - (VOCAB + NGRAMS * BUCKETS) * config.text.width
    assert size.tokens == config.rows.count * 4 * 48  # four clips of 48 tokens a row
    # Modulation is computed a clip and not a token, so a step costs less than 6 N D here; clips are short.
    assert 0.6 < size.flops / (6 * size.parameters * size.tokens) < 1


def test_runs_cost_their_budget_and_are_named_by_it():
    found = at_budgets(QUICKSTART, WIDTHS, (1e12, 4e12), steps=(50, 100_000))
    assert len(found.runs) == 6 and not found.left_out
    for run in found.runs:
        size = size_of(configs.load(QUICKSTART, {"model.width": run["model.width"]}))
        assert run["train.steps"] * size.flops == pytest.approx(run["label.budget"], rel=0.5 / run["train.steps"])
        assert run["optimizer.warmup"] == max(1, round(run["train.steps"] / 10))
        assert run["label.name"] == f"N{size.parameters}-C{run['label.budget']:.3g}"


def test_sizes_that_a_budget_leaves_out_are_told():
    found = at_budgets(QUICKSTART, WIDTHS, (1e12,), steps=(200, 600))
    assert len(found.runs) + len(found.left_out) == 3 and found.left_out
    assert all("steps, not 200 to 600" in line for line in found.left_out)


def test_a_budget_that_no_size_meets_is_refused():
    with pytest.raises(ConfigError, match="budget 1e[+]06 FLOPs: no size meets it in 100 to 1,000,000 steps; the near"):
        at_budgets(QUICKSTART, WIDTHS, (1e12, 1e6))
    for budget in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="expected FLOPs"):
            at_budgets(QUICKSTART, WIDTHS, (budget,))


def test_sizes_may_have_several_learning_rates_at_a_budget():
    sizes = product(WIDTHS[:1], param("optimizer.lr", (1e-3, 2e-3)))
    found = at_budgets(QUICKSTART, (*sizes, WIDTHS[1]), (1e12, 4e12))
    names = [run.name for run in expand(found.runs)]
    small, large = (size_of(configs.load(QUICKSTART, width)).parameters for width in WIDTHS[:2])
    each = (f"N{small}-lr0.001", f"N{small}-lr0.002", f"N{large}")
    assert names == [f"{name}-C{budget}" for budget in ("1e+12", "4e+12") for name in each]
