"""Chips, days and cost of a training run of so many FLOPs, by a plan's estimate of the nearest size of a family."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.planning import arithmetic, layout
from vidgen.planning.hardware import Topology, parse_topology
from vidgen.planning.memory import HEADROOM
from vidgen.scaling.budgets import size_of
from vidgen.scaling.frontier import Optimal

FAMILY = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "configs", "dit_video.py")
ALIKE = 2.0  # factor in parameters within which a size of the family stands for another


@dataclasses.dataclass(frozen=True)
class Member:
    """A size of the family on the topology; `mfu` is None where its step doesn't divide over the devices: see `note`.

    Attributes:
      parameters: counted as the sweep counts them.
      mfu: estimated, useful FLOPs over the peak.
      flops_per_second: useful ones, of all chips.
    """

    name: str
    parameters: float
    mfu: float | None
    flops_per_second: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Pod:
    """The sizes of a family on a topology. `price`: of a chip-hour, or None."""

    topology: Topology
    family: str
    members: tuple[Member, ...]
    price: float | None

    def of(self, row: Optimal) -> dict[str, Any]:
        """Chips, days, cost of a row of the frontier, of the nearest size and what is to be said about it."""
        member = min(self.members, key=lambda m: abs(math.log(m.parameters / row.parameters)))
        found = {"preset": member.name, "mfu": member.mfu, "chips": self.topology.chips, "days": None, "cost": None}
        notes = [member.note] if member.note else []
        if (far := max(member.parameters / row.parameters, row.parameters / member.parameters)) > ALIKE:
            side = "smaller" if member.parameters < row.parameters else "larger"
            notes.append(f"nearest size is {far:,.3g} times {side}")
        if member.flops_per_second:
            found["days"] = row.flops / member.flops_per_second / 86400
            if self.price is not None:
                found["cost"] = self.price * self.topology.chips * 24 * found["days"]
        return found | {"note": "; ".join(notes)}


def plan(topology: str, family: str = "", price: float | None = None, near: Sequence[Optimal] = ()) -> Pod:
    """Estimates the sizes of a family that are nearest to some row, by arithmetic alone: nothing is compiled.

    Args:
      family: a config file with a dict SIZES of the args that it takes; configs/dit_video.py unless given.

    Raises ConfigError for a topology or family that can't be read, and where no size runs there.
    """
    where, family = parse_topology(topology), family or FAMILY
    loaded = {name: configs.load(f"{family}:{name}") for name in sizes(family)}
    counts = {name: size_of(c).parameters for name, c in loaded.items()}
    wanted = {min(counts, key=lambda m: abs(math.log(counts[m] / row.parameters))) for row in near} or set(counts)
    members = tuple(_member(name, counts[name], loaded[name], where) for name in counts if name in wanted)
    if not any(m.mfu for m in members):
        raise ConfigError(
            f"--topology={topology}: no size of {family} runs there; {members[0].name}: {members[0].note}"
        )
    return Pod(where, family, members, price)


def _member(name: str, parameters: float, config: Any, where: Topology) -> Member:
    try:
        config, _ = layout.placed(config, where)
        found = arithmetic.estimate(config, where)
        held = sum(arithmetic.memory_parts(config, where).values())
    except ConfigError as e:
        return Member(name, parameters, None, None, str(e))
    short = held > HEADROOM * where.chip.hbm_bytes
    note = f"{name} takes {held / where.chip.hbm_bytes:.1f} times a device's memory there" if short else ""
    return Member(name, parameters, found.roofline.mfu, found.flops.useful / found.roofline.step_s, note)


def sizes(family: str) -> list[str]:
    """The args that a family's config takes; raises ConfigError where it doesn't say."""
    found = getattr(configs.executed(family.partition(":")[0], "family"), "SIZES", None)
    if not isinstance(found, dict) or not found or ":" in family:
        raise ConfigError(
            f"--family={family}: expected a config file with a dict SIZES, as configs/dit_video.py has it"
        )
    return list(found)
