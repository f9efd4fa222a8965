"""Which parameters train, and how: groups by regular expressions of their paths, every parameter in exactly one."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import re
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.models import lora
from vidgen.weights import flatten, nest

KEYS = ("lr", "weight_decay", "frozen")


@dataclasses.dataclass(frozen=True)
class Group:
    """What `config.optimizer.groups` says of some parameters.

    Attributes:
      name: the regex that is searched for in their paths, or what they are.
      lr: factor of the learning rate.
      weight_decay: instead of the config's; None: the config's.
      frozen: whether they stay as `config.model.weights` has them.
    """

    name: str
    lr: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False


FROZEN_BY_LORA = Group("frozen by config.lora", frozen=True)
REST = Group("the rest")


@dataclasses.dataclass(frozen=True)
class Partition:
    """Parameters in groups.

    Attributes:
      groups: all there are; the last is the rest.
      of: path → the place of its group in `groups`.
      sizes: path → numbers in it.
      set: whether the config asks for groups or freezes anything.
    """

    groups: tuple[Group, ...]
    of: Mapping[str, int]
    sizes: Mapping[str, int]
    set: bool

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(what trains, what is frozen or None) of a tree of parameters."""
        flat = flatten(params)
        frozen = {path: x for path, x in flat.items() if self.groups[self.of[path]].frozen}
        return nest({path: x for path, x in flat.items() if path not in frozen}), nest(frozen) if frozen else None

    @property
    def freezes(self) -> bool:
        """Whether some of them don't train."""
        return any(self.groups[i].frozen for i in self.of.values())

    def table(self) -> list[dict[str, Any]]:
        """What is in which group, for people and for environment.json; arrays and parameters add up to all."""
        rows = []
        for i, group in enumerate(self.groups):
            paths = [path for path, g in self.of.items() if g == i]
            count = sum(self.sizes[path] for path in paths)
            rows.append(dataclasses.asdict(group) | {"arrays": len(paths), "parameters": count, "paths": paths})
        return [row for row in rows if row["arrays"]]

    def lines(self) -> list[str]:
        """The table without its paths, a line a group."""
        told = []
        for row in self.table():
            decay = "" if row["weight_decay"] is None else f", weight decay {row['weight_decay']:g}"
            how = "frozen" if row["frozen"] else f"learning rate x {row['lr']:g}{decay}"
            told.append(f"{row['name']}: {row['parameters']:,} parameters in {row['arrays']} arrays, {how}")
        return told


def join(params: Mapping[str, Any], frozen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Inverse of `Partition.split`."""
    return nest(flatten(params) | flatten(frozen)) if frozen else dict(params)


def check(config: ConfigDict) -> None:
    """Raises ConfigError on groups that can't be read, and on freezing weights that come from nowhere."""
    groups = read(config.optimizer.groups)
    lora.check(config.lora)
    if config.model.weights:
        return
    if config.lora.rank:
        raise ConfigError("config.lora.rank: low-rank updates are of given weights; set config.model.weights")
    if frozen := [group.name for group in groups if group.frozen]:
        raise ConfigError(
            f"config.optimizer.groups: {frozen[0]!r} is frozen, but starts from nothing; set config.model.weights"
        )


def freezes(config: ConfigDict) -> bool:
    """Whether a config leaves weights as they were given."""
    return bool(config.lora.rank) or any(group.frozen for group in read(config.optimizer.groups))


def read(groups: Any) -> tuple[Group, ...]:
    """The groups of `config.optimizer.groups`; raises ConfigError."""
    return tuple(map(_group, groups))


def _group(item: Any) -> Group:
    told = f"config.optimizer.groups: {item!r}"
    try:
        pattern, about = item
        re.compile(pattern)
        about = dict(about.items())
    except (TypeError, ValueError, AttributeError, re.error) as e:
        raise ConfigError(f'{told}: expected (path regex, {{"lr": …, "weight_decay": …, "frozen": …}}); {e}') from None
    for key, value in about.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{told}: unknown {key!r}, known are {', '.join(KEYS)}{hint}")
        if isinstance(value, bool) != (key == "frozen") or not isinstance(value, numbers.Real) or value < 0:
            expected = "True or False" if key == "frozen" else "a number, 0 or more"
            raise ConfigError(f"{told}: {key}={value!r}; expected {expected}")
    return Group(pattern, **about)


def partition(config: ConfigDict, params: Mapping[str, Any], given: Collection[str] = ()) -> Partition:
    """Every parameter in the first group whose regex is found in its path, or in the rest.

    With `config.lora`, what was given beside the low-rank updates is frozen first, and groups see what is left.

    Args:
      params: all parameters; may hold shapes only.
      given: paths of those that start from `config.model.weights`.

    Raises ConfigError for a group that has no parameter, naming paths near it, and for a frozen one of parameters that
    weren't given.
    """
    asked = read(config.optimizer.groups)
    sizes = {path: x.size for path, x in flatten(params).items()}
    given, low_rank = set(given), bool(config.lora.rank)
    groups = (*((FROZEN_BY_LORA,) if low_rank else ()), *asked, REST)
    of: dict[str, int] = {}
    for path in sizes:
        if low_rank and path in given and not lora.is_low_rank(path):
            of[path] = 0
        else:
            found = (i for i, group in enumerate(asked, start=low_rank) if re.search(group.name, path))
            of[path] = next(found, len(groups) - 1)
    for i, group in enumerate(asked, start=low_rank):
        mine = [path for path, g in of.items() if g == i]
        if not mine:
            _refuse_empty(group, groups, of, low_rank)
        if group.frozen and (fresh := [path for path in mine if path not in given]):
            raise ConfigError(
                f"config.optimizer.groups: {group.name!r} is frozen, but {fresh[0]} is not in config.model.weights and "
                "starts from nothing"
            )
    if all(groups[i].frozen for i in of.values()):
        raise ConfigError("config.optimizer.groups: every parameter is frozen; leave one to train")
    return Partition(groups, of, sizes, bool(asked) or low_rank)


def _refuse_empty(group: Group, groups: tuple[Group, ...], of: Mapping[str, int], low_rank: bool) -> None:
    """Says why a group has no parameter."""
    told = f"config.optimizer.groups: {group.name!r}"
    if taken := [path for path in of if re.search(group.name, path)]:
        raise ConfigError(f"{told}: all it matches is in groups before it, {taken[0]} in {groups[of[taken[0]]].name!r}")
    left = [path for path, i in of.items() if not (low_rank and i == 0)]
    raise ConfigError(f"{told}: matches no parameter; there are, for example, {', '.join(lora.near(group.name, left))}")
