"""A table of runs, as `vidgen sweep` writes it or as anyone may: CSV or Parquet, a run a row."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vidgen import config as configs
from vidgen.config import ConfigError

REQUIRED = ("parameters", "tokens", "flops", "loss")
RATES = ("learning_rate", "optimizer.lr", "optimizer.muon_lr")  # the first that varies is the learning rate
BATCHES = ("batch", "rows.count")
WIDTHS = ("width", "model.width")
FOLLOWING = ("train.steps", "optimizer.warmup", "seed")  # settings that follow from others, or are drawn
ALIKE = 1.05  # factor within which runs of a budget have seen the same tokens: steps are whole numbers
NEAR = 1.2  # factor within which runs without a column `budget` have the same: 10 % to either side


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that ended.

    Attributes:
      parameters, tokens, flops, loss: all finite and > 0; FLOPs as they were counted, attention too.
      budget: nominal FLOPs of the runs it belongs with, or None.
      learning_rate, batch, width: or None; batch in tokens (or rows) a step.
      figures: other columns that hold numbers.
      settings: what else its config was given, (key, value as text): runs that differ there are not the same run.
    """

    name: str
    parameters: float
    tokens: float
    flops: float
    loss: float
    budget: float | None = None
    learning_rate: float | None = None
    batch: float | None = None
    width: float | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    settings: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A run that has not been made yet, which a law predicts: `parameters` and `tokens` are known."""

    name: str
    parameters: float
    tokens: float


@dataclasses.dataclass(frozen=True)
class Excluded:
    """A run that is not fitted, and why. `lost`: something went wrong with it; else another run is better."""

    name: str
    reason: str
    lost: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
    """The runs of a file, in its order, those that can't be used, and those that are still to be made."""

    runs: tuple[Run, ...]
    excluded: tuple[Excluded, ...]
    wanted: tuple[Wanted, ...] = ()


def read(path: str, loss: Sequence[str] = ("loss",)) -> Table:
    """Reads a table of runs.

    Args:
      path: CSV or Parquet.
      loss: columns whose mean is what is fitted, as ("loss/level_0", "loss/level_1"): the loss at some noise levels.

    Columns `parameters`, `tokens`, `flops`, `loss` are required; `name`, `status`, `error`, `budget`, `learning_rate`
    (or `optimizer.lr`, `optimizer.muon_lr`), `batch` (or `rows.count`), `width` (or `model.width`) are understood, and
    keys of a config as settings. Runs whose status is pending are `wanted`; those that failed, or whose loss is missing
    or not finite, are `excluded`.

    Raises ConfigError for a file that can't be read, a missing column, text or a number that is not above 0 where a
    count belongs, and two runs of one name.
    """
    rows = _rows(path)
    columns = list(rows[0]) if rows else []
    for column in dict.fromkeys((*REQUIRED, *loss)):
        if column == "loss" and "loss" not in loss:
            continue  # another one takes its place
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
            hint = f"; is it {near[0]!r}?" if near else f"; there are {', '.join(columns) or 'none'}"
            raise ConfigError(f"{path}: no column {column!r}{hint}")
    rows = [row | {"loss": _mean(path, i, row, loss)} for i, row in enumerate(rows, 1)]
    names = [str(row.get("name") or f"row {i}") for i, row in enumerate(rows, 1)]
    first: dict[str, int] = {}
    for i, name in enumerate(names, 1):
        if first.setdefault(name, i) != i:
            raise ConfigError(f"{path}: rows {first[name]} and {i} are both named {name!r}")
    rate = _varying(rows, RATES)
    figures = [c for c in columns if c not in (*REQUIRED, "name", "status", "error") and _numeric(rows, c)]
    keys = configs.base().keys()  # model.layers is a setting, moving_shapes.all_right is not
    apart = [c for c in columns if c.partition(".")[0] in keys and c not in (*RATES, *BATCHES, *WIDTHS, *FOLLOWING)]
    runs, excluded, wanted = [], [], []
    for i, (name, row) in enumerate(zip(names, rows, strict=True), 1):
        if _to_be_made(row):
            wanted.append(Wanted(name, *(_count(path, i, name, row, c) for c in ("parameters", "tokens"))))
        elif reason := _unusable(path, i, row):
            excluded.append(Excluded(name, reason))
        else:
            settings = tuple((c, str(row[c])) for c in apart if not _empty(row[c]))
            runs.append(_run(path, i, name, row, rate, figures, settings))
    return Table(tuple(runs), tuple(excluded), tuple(wanted))


def best_settings(table: Table) -> Table:
    """Of runs that differ only in learning rate and batch, those with the best; the others are excluded.

    A law is about runs trained as well as they can be. Runs of the same settings, repeated, all stay.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run, budget in zip(table.runs, budget_of(table.runs), strict=True):
        own = run.parameters, budget, run.settings
        like = [key for key in groups if key[:3] == own]
        key = next((k for k in like if max(k[3] / run.tokens, run.tokens / k[3]) <= ALIKE), None)
        groups.setdefault(key or (*own, run.tokens), []).append(run)
    excluded = list(table.excluded)
    for runs in groups.values():
        settings: dict[tuple[Any, ...], list[Run]] = {}
        for run in runs:
            settings.setdefault((run.learning_rate, run.batch), []).append(run)
        best = min(settings.values(), key=lambda some: sum(r.loss for r in some) / len(some))
        reason = f"{best[0].name} is the same run with a better learning rate or batch"
        excluded += [Excluded(r.name, reason, lost=False) for r in runs if r not in best]
    gone = {e.name for e in excluded}
    return Table(tuple(r for r in table.runs if r.name not in gone), tuple(excluded), table.wanted)


def budget_of(runs: Sequence[Run]) -> list[float]:
    """FLOPs of the budget that each run belongs to: its own column, else the mean of those within `NEAR` of it."""
    order = sorted((r for r in runs if r.budget is None), key=lambda r: r.flops)
    groups: list[list[Run]] = []
    for run in order:
        if groups and run.flops <= NEAR * groups[-1][0].flops:
            groups[-1].append(run)
        else:
            groups.append([run])
    means = {id(r): math.exp(sum(math.log(s.flops) for s in group) / len(group)) for group in groups for r in group}
    return [r.budget if r.budget is not None else means[id(r)] for r in runs]


def by_budget(runs: Sequence[Run], least: int = 3) -> dict[float, list[Run]]:
    """Budget → its runs, the smallest first; only budgets with runs of `least` sizes."""
    found: dict[float, list[Run]] = {}
    for budget, run in sorted(zip(budget_of(runs), runs, strict=True), key=lambda pair: pair[0]):
        found.setdefault(budget, []).append(run)
    return {b: some for b, some in found.items() if len({r.parameters for r in some}) >= least}


def _rows(path: str) -> list[dict[str, Any]]:
    """The cells by column; raises ConfigError."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = [f for f in os.listdir(folder) if f.endswith((".csv", ".parquet"))] if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), there, n=1)
        inside = [f for f in ("results.csv", "results.parquet") if os.path.isfile(os.path.join(path, f))]
        found = (
            os.path.join(path, inside[0]) if inside else os.path.join(os.path.dirname(path), near[0]) if near else ""
        )
        what = "a directory, expected a table" if os.path.isdir(path) else "no such file"
        raise ConfigError(f"--runs={path}: {what}{f'; did you mean {found}?' if found else ''}")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".csv", ".parquet"):
        raise ConfigError(f"--runs={path}: expected a table, *.csv or *.parquet")
    rows = _csv(path) if suffix == ".csv" else _parquet(path)
    if not rows:
        raise ConfigError(f"{path}: no runs in it; expected a row each, with columns {', '.join(REQUIRED)}")
    return rows


def _csv(path: str) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            lines = [line for line in csv.reader(f) if any(cell.strip() for cell in line)]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{path}: {e}; expected a CSV in UTF-8") from None
    head, *body = lines or [[]]
    head = [cell.strip() for cell in head]
    for column in head:
        if head.count(column) > 1:
            raise ConfigError(f"{path}: two columns are named {column!r}")
    for i, line in enumerate(body, 1):
        if len(line) != len(head):
            raise ConfigError(f"{path}, row {i}: {len(line)} cells under {len(head)} columns")
    return [dict(zip(head, map(str.strip, line), strict=True)) for line in body]


def _parquet(path: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as e:
        raise ConfigError(f"{path}: {e}; expected a Parquet file") from None


def _empty(cell: Any) -> bool:
    return cell is None or cell == ""


def _float(cell: Any) -> float | None:
    try:
        return None if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        return None


def _mean(path: str, row: int, cells: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """What the run's loss is; nothing where one of the columns holds nothing."""
    if len(columns) == 1 or any(_empty(cells[c]) for c in columns):
        return next((cells[c] for c in columns if _empty(cells[c])), cells[columns[0]])
    values = [_float(cells[c]) for c in columns]
    if None in values:
        column = columns[values.index(None)]
        raise ConfigError(f"{path}, row {row}, column {column}: {cells[column]!r}: expected a number")
    return sum(values) / len(values)


def _to_be_made(cells: Mapping[str, Any]) -> bool:
    """Whether nothing is wrong with a run but that it has not been made."""
    known = not any(_empty(cells[c]) for c in ("parameters", "tokens"))
    return known and str(cells.get("status") or "").lower() == "pending"


def _unusable(path: str, row: int, cells: Mapping[str, Any]) -> str:
    """Why a run can't be fitted, or ""."""
    status, error = str(cells.get("status") or "done").lower(), str(cells.get("error") or "")
    if status != "done":
        return status + (f": {' '.join(error.split())}" if error else "")
    if _empty(cells["loss"]):
        return "no loss"
    loss = _float(cells["loss"])
    if loss is None:
        raise ConfigError(f"{path}, row {row}, column loss: {cells['loss']!r}: expected a number")
    return "" if math.isfinite(loss) else f"loss is {loss}"


def _count(path: str, row: int, name: str, cells: Mapping[str, Any], column: str) -> float:
    """Above 0; raises ConfigError."""
    value = _float(cells[column])
    if value is None or not 0 < value < math.inf:
        shown = "nothing" if _empty(cells[column]) else repr(cells[column])
        plain = ", without commas and units" if value is None and any(c.isdigit() for c in shown) else ""
        raise ConfigError(f"{path}, row {row} ({name}), column {column}: {shown}: expected a number above 0{plain}")
    return value


def _run(
    path: str,
    row: int,
    name: str,
    cells: Mapping[str, Any],
    rate: str | None,
    figures: Sequence[str],
    settings: tuple[tuple[str, str], ...],
) -> Run:
    def number(column: str | None) -> float | None:
        """Above 0, or None where a column that isn't required has nothing."""
        if column is None or (column not in REQUIRED and _empty(cells.get(column))):
            return None
        return _count(path, row, name, cells, column)

    batch, width = (next((number(c) for c in some if not _empty(cells.get(c))), None) for some in (BATCHES, WIDTHS))
    others = {c: _float(cells[c]) for c in figures if not _empty(cells[c])}
    required = {c: number(c) for c in REQUIRED}
    return Run(name, **required, budget=number("budget"), learning_rate=number(rate), batch=batch, width=width,
               figures=others, settings=settings)  # fmt: skip


def _numeric(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether a column has numbers and nothing else."""
    cells = [row[column] for row in rows if not _empty(row[column])]
    return bool(cells) and all(_float(c) is not None for c in cells)


def _varying(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str | None:
    """The first of the columns whose cells differ, else the first that is there at all."""
    there = [c for c in columns if c in rows[0] and any(not _empty(row[c]) for row in rows)]
    varied = [c for c in there if len({str(row[c]) for row in rows if not _empty(row[c])}) > 1]
    return (varied or there or [None])[0]
