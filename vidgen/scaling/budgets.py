"""How long a run may be for its FLOPs, and how large a model is."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.planning import mix
from vidgen.planning.flops import step_flops
from vidgen.planning.parameters import parameters, text_tables
from vidgen.scaling import manifest
from vidgen.scaling.algebra import LABEL, Point, Space, chain, product, settings_of
from vidgen.tokenizers import base as tokenizers


@dataclasses.dataclass(frozen=True)
class Size:
    """What a config costs.

    Attributes:
      parameters: that are multiplied with: all but the tables that text is looked up in, which cost no FLOPs.
      flops: of a step: useful ones, forward and backward, attention counted.
      tokens: of video that a step trains on.
    """

    parameters: int
    flops: float
    tokens: float


def check(config: ConfigDict) -> None:
    """Raises ConfigError for a config that has no size."""
    if config.task != "denoiser":
        raise ConfigError(f"config.task={config.task!r}: expected denoiser, whose parameters and FLOPs are counted")


def size_of(config: ConfigDict) -> Size:
    """Of a denoiser's config, with the clips of a typical step; raises ConfigError."""
    check(config)
    geometry = tokenizers.geometry_from_config(config.tokenizer)
    typical = mix.typical(config, geometry)
    pairs = typical.pairs(tuple(config.model.window), config.model.full_every)
    flops = step_flops(config, geometry.features, pairs.full, pairs.text, pairs.crossed, pairs.windowed)
    return Size(parameters(config, geometry.features) - text_tables(config), flops.useful, typical.trained)


@dataclasses.dataclass(frozen=True)
class Budgeted:
    """`runs`: the points, with their steps. `left_out`: a line for each size that a budget has no run of, and why."""

    runs: Space
    left_out: tuple[str, ...]


def at_budgets(
    config: str,
    sizes: Space,
    budgets: Sequence[float],
    *,
    steps: tuple[int, int] = (100, 1_000_000),
    warmup: float = 0.1,
    base: Point | None = None,
) -> Budgeted:
    """Each size trained for each budget of FLOPs, as IsoFLOP profiles want it (Hoffmann et al., arXiv:2203.15556).

    A run's `train.steps` are what the budget pays for, rounded; its learning rate warms up over a share of them. Runs
    are named by their parameters and their budget, which is a column of the results as well; those of as many
    parameters, by what else they differ in: `product(sizes, param("optimizer.lr", …))` has each size at several rates.
    A size that would need fewer or more steps than `steps` is left out of that budget, and said to be.

    Args:
      config: FILE or FILE:arg of the runs.
      sizes: settings of each size.
      budgets: FLOPs of a run, useful ones, forward and backward.
      steps: the fewest and the most of a run.
      warmup: `optimizer.warmup` as a share of the steps.
      base: settings of all.

    Raises ConfigError for a budget that no size meets.
    """
    if not budgets or any(not 0 < b < math.inf for b in budgets):
        raise ConfigError(f"budgets {tuple(budgets)}: expected FLOPs, one or more numbers above 0")
    if not chain(sizes):
        raise ConfigError("at_budgets: no sizes; expected at least one point")
    points = [dict(product(base or {}, size)[0]) for size in chain(sizes)]
    costs = [size_of(configs.load(config, settings_of(point))) for point in points]
    names = _names(points, costs)
    runs: list[dict[str, Any]] = []
    left_out = []
    for budget in budgets:
        before, wanted = len(runs), []
        for point, cost, name in zip(points, costs, names, strict=True):
            count = round(budget / cost.flops)
            wanted.append(count)
            if steps[0] <= count <= steps[1]:
                own = {"train.steps": count, "optimizer.warmup": max(1, round(warmup * count))}
                labels = {f"{LABEL}budget": float(budget), f"{LABEL}name": f"{name}-C{budget:.3g}"}
                runs.append(product(point, own, labels)[0])
            else:
                left_out.append(
                    f"budget {budget:.3g}: {cost.parameters:,} parameters would train for {count:,} steps, "
                    f"not {steps[0]:,} to {steps[1]:,}"
                )
        if len(runs) == before:
            nearest = min(wanted, key=lambda n: max(steps[0] - n, n - steps[1]))
            raise ConfigError(
                f"budget {budget:.3g} FLOPs: no size meets it in {steps[0]:,} to {steps[1]:,} steps; the nearest "
                f"would take {nearest:,}"
            )
    return Budgeted(tuple(runs), tuple(left_out))


def _names(points: Sequence[Point], costs: Sequence[Size]) -> list[str]:
    """What each point is called, the same at all budgets: N1024, or N1024-lr0.001 where others are as large."""
    alike = Counter(cost.parameters for cost in costs)
    names = []
    for point, cost in zip(points, costs, strict=True):
        own = {}
        if alike[cost.parameters] > 1:
            others = [p for p, c in zip(points, costs, strict=True) if c.parameters == cost.parameters]
            own = {k: v for k, v in settings_of(point).items() if any(p.get(k) != v for p in others)}
        names.append(f"N{cost.parameters}" + (f"-{manifest.short(own)}" if own else ""))
    return names
