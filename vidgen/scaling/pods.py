"""What to train on a pod: the law's frontier for a family of configs, with chips, days and cost as a plan estimates."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.planning import arithmetic, layout
from vidgen.planning.hardware import Topology, parse_topology
from vidgen.planning.memory import HEADROOM
from vidgen.scaling import frontier
from vidgen.scaling.budgets import Size, size_of
from vidgen.scaling.frontier import Cost, Optimal
from vidgen.scaling.laws import Law

FAMILY = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "configs", "dit_video.py")
ALIKE = 2.0  # factor in parameters within which a size of the family stands for another


@dataclasses.dataclass(frozen=True)
class Planned:
    """A row of the frontier on a topology.

    Attributes:
      optimal: at the price of a token that the family's nearest size has, attention over its own clips counted: what
        the sweep's runs paid says little, since their clips are shorter.
      preset: that size.
      mfu: estimated, useful FLOPs over the peak; None where its step doesn't divide over the devices, as are `days` and
        `cost`.
      note: what is to be said about it.
    """

    optimal: Optimal
    preset: str
    chips: int
    mfu: float | None
    days: float | None
    cost: float | None
    note: str

    def facts(self) -> dict[str, Any]:
        """What --json has beside `optimal`."""
        found = dataclasses.asdict(self)
        del found["optimal"]
        return found


def table(law: Law, topology: str, family: str = "", price: float | None = None) -> list[Planned]:
    """`frontier.table` for the sizes of a family on a topology, by arithmetic alone: nothing is compiled.

    Args:
      family: a config file with a dict SIZES of the args that it takes; configs/dit_video.py unless given.
      price: of a chip-hour, or None.

    Raises ConfigError for a topology or family that can't be read, and where no size runs there.
    """
    where, family = parse_topology(topology), family or FAMILY
    loaded = {name: configs.load(f"{family}:{name}") for name in sizes(family)}
    counted = {name: size_of(c) for name, c in loaded.items()}
    chosen = [nearest(law, flops, counted) for flops in frontier.decades(law)]
    speeds = {name: _speed(name, loaded[name], where) for name in {name for name, _ in chosen}}
    if chosen and not any(speed.mfu for speed in speeds.values()):
        name, speed = next(iter(speeds.items()))
        raise ConfigError(f"--topology={topology}: no size of {family} runs there; {name}: {speed.note}")
    return [_planned(row, name, counted[name], speeds[name], where, price) for name, row in chosen]


def nearest(law: Law, flops: float, family: dict[str, Size]) -> tuple[str, Optimal]:
    """(size of the family, what the law says at its price of a token): the size nearest to its own optimum."""

    def optimal(size: Size) -> Optimal:
        each = size.flops / size.tokens / size.parameters
        return frontier.optimal(law, Cost(each, 1.0, each), flops)

    rows = {name: optimal(size) for name, size in family.items()}
    name = min(rows, key=lambda name: abs(math.log(rows[name].parameters / family[name].parameters)))
    return name, rows[name]


@dataclasses.dataclass(frozen=True)
class _Speed:
    """Of a size's step on the topology: useful FLOPs a second of all chips; None where it doesn't divide over them."""

    mfu: float | None
    flops_per_second: float | None
    note: str


def _speed(name: str, config: Any, where: Topology) -> _Speed:
    try:
        config, _ = layout.placed(config, where)
        found = arithmetic.estimate(config, where)
        held = sum(arithmetic.memory_parts(config, where).values())
    except ConfigError as e:
        return _Speed(None, None, str(e))
    short = held > HEADROOM * where.chip.hbm_bytes
    note = f"{name} takes {held / where.chip.hbm_bytes:.1f} times a device's memory there" if short else ""
    return _Speed(found.roofline.mfu, found.flops.useful / found.roofline.step_s, note)


def _planned(row: Optimal, name: str, size: Size, speed: _Speed, where: Topology, price: float | None) -> Planned:
    notes = [speed.note] if speed.note else []
    if (far := max(size.parameters / row.parameters, row.parameters / size.parameters)) > ALIKE:
        side = "smaller" if size.parameters < row.parameters else "larger"
        notes.append(f"nearest size is {far:,.3g} times {side}")
    days = speed.flops_per_second and row.flops / speed.flops_per_second / 86400
    cost = None if days is None or price is None else price * where.chips * 24 * days
    return Planned(row, name, where.chips, speed.mfu, days, cost, "; ".join(notes))


def sizes(family: str) -> list[str]:
    """The args that a family's config takes; raises ConfigError where it doesn't say."""
    found = getattr(configs.executed(family.partition(":")[0], "family"), "SIZES", None)
    if not isinstance(found, dict) or not found or ":" in family:
        raise ConfigError(
            f"--family={family}: expected a config file with a dict SIZES, as configs/dit_video.py has it"
        )
    return list(found)
