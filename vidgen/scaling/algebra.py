"""Spaces of settings, and what can be done with them: a sweep is written down as one expression.

A space is a tuple of points, a point the settings of one run by their dotted keys. A plain dict stands for a space of
one point wherever a space is wanted:

    product({"model.layers": 4}, param("model.width", (64, 128)), param("optimizer.lr", (1e-3, 3e-3)))     4 points
    zipped(param("model.width", (64, 128)), param("model.heads", (2, 4)))                                   2 points
    chain(one, another)                                              the points of both, one after the other
    sample(space, 10, seed=0)                                        ten of its points, drawn without replacement

A key may also begin with "label.": no setting, but a column of the results.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vidgen.config import ConfigError

Point = Mapping[str, Any]
Space = tuple[Point, ...]
LABEL = "label."
MOST = 100_000  # points; a sweep of more is a slip, and would fill the memory before anybody saw it


def param(key: str, values: Iterable[Any]) -> Space:
    """A point for each value of a setting; raises ConfigError where there is none, or one stands there twice."""
    values = tuple(itertools.islice(values, MOST + 1))
    if not values:
        raise ConfigError(f"param({key!r}): no values; expected at least one")
    if len(values) > MOST:
        raise ConfigError(f"param({key!r}): more than {MOST:,} values; expected at most {MOST:,}")
    value, count = Counter(map(repr, values)).most_common(1)[0]  # by their text, since a list has no hash
    if count > 1:
        raise ConfigError(f"param({key!r}): {value} stands there {'twice' if count == 2 else f'{count} times'}")
    return tuple({key: value} for value in values)


def product(*spaces: Space | Point) -> Space:
    """Each point of one with each of the others, the last varying fastest; raises ConfigError for colliding keys."""
    spaces = tuple(map(_space, spaces))
    count = math.prod(map(len, spaces))
    if count > MOST:
        raise ConfigError(f"product of {' x '.join(str(len(s)) for s in spaces)} = {count:,} runs: at most {MOST:,}")
    return tuple(_merged("product", points) for points in itertools.product(*spaces))


def zipped(*spaces: Space | Point) -> Space:
    """The first points of all as one, the second ones, and so on; raises ConfigError for lengths that differ."""
    spaces = tuple(map(_space, spaces))
    if len(lengths := {len(s) for s in spaces}) > 1:
        raise ConfigError(f"zipped: spaces of {', '.join(str(len(s)) for s in spaces)} points; expected equal lengths")
    return tuple(_merged("zipped", points) for points in zip(*spaces, strict=True)) if lengths else ()


def chain(*spaces: Space | Point) -> Space:
    """The points of all, one space after the other."""
    return tuple(itertools.chain.from_iterable(map(_space, spaces)))


def sample(space: Space | Point, count: int, seed: int = 0) -> Space:
    """`count` points drawn without replacement, in the space's order; raises ConfigError where there are fewer."""
    space = _space(space)
    if not 1 <= count <= len(space):
        raise ConfigError(f"sample: {count} points of a space of {len(space)}; expected 1 to {len(space)}")
    return tuple(space[i] for i in sorted(random.Random(seed).sample(range(len(space)), count)))


def settings_of(point: Point) -> dict[str, Any]:
    """What of a point is settings of the config."""
    return {key: value for key, value in point.items() if not key.startswith(LABEL)}


def labels_of(point: Point) -> dict[str, Any]:
    """What of a point is labels, by their names."""
    return {key.removeprefix(LABEL): value for key, value in point.items() if key.startswith(LABEL)}


def _space(space: Space | Point) -> Space:
    points = (space,) if isinstance(space, Mapping) else tuple(space) if isinstance(space, Iterable) else (space,)
    if wrong := [point for point in points if not isinstance(point, Mapping)]:
        hint = "; its runs are one: .runs" if hasattr(space, "runs") else ""
        raise ConfigError(
            f"{type(wrong[0]).__name__} {repr(wrong[0])[:60]}: expected a point, settings by their keys, or a space of "
            f"points, as param('seed', (0, 1)) makes one{hint}"
        )
    return points


def _merged(what: str, points: Iterable[Point]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for point in points:
        if both := sorted(merged.keys() & point.keys()):
            raise ConfigError(f"{what}: {both[0]} is set by two of the spaces; expected each key in one")
        merged |= point
    return merged
