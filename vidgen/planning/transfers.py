"""Every collective of a scheduled program: from which line to which it is under way, and between which devices.

Compilers write one that runs beside other work in several ways, all of which are followed here:

  * `X-start` … `X-done` (GPU; collective-permute on TPU), and any collective wrapped in `async-start` … `async-done`;
  * `call-start` … `call-update` … `call-done` of a computation on a TPU's SparseCore: the transfer begins where its
    operands are handed over, which is `call-update` where `call-start` has none;
  * a chain of fusions (TPU v5e): one that holds a custom call `AsyncCollectiveStart`, others that carry the collective
    along inside a matrix product, one that holds `AsyncCollectiveDone`. Each repeats the collective's line;
  * a matrix product cut into a loop of `collective-permute` and partial products ("windowed einsum").

A collective alone on its line is synchronous, and so is a fusion that holds one (`all-reduce-scatter`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from vidgen.planning.schedule import COLLECTIVES, Instruction, Module, arrays

_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_DEVICES = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass
class Transfer:
    """One collective under way.

    Attributes:
      opcode: of COLLECTIVES.
      line: the collective itself, inside whatever wraps it.
      outer: the instruction of the schedule that starts it, or that is it.
      shape: of the result.
      computation: whose schedule it is in.
      begin, end: positions in the schedule; equal if nothing can run beside it.
      operands: what is sent, names in `computation`.
    """

    opcode: str
    line: Instruction
    outer: Instruction
    shape: str
    computation: str
    begin: int | None
    end: int | None
    operands: tuple[str, ...]

    @property
    def asynchronous(self) -> bool:
        """Whether it has a start and a done."""
        return self.begin != self.end

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others in a chain of fusions."""
        return _key(self.line)


def _key(i: Instruction) -> tuple[str, ...]:
    chain = re.search(r'chain_id="(\d+)"', i.rest)
    sizes = (a.text for a in arrays(i.shape))  # layouts differ from link to link
    return i.opcode, i.attribute("channel_id"), chain[1] if chain else "", *sizes


def transfers(module: Module) -> Iterator[Transfer]:
    """Each collective once, however many lines it takes, computation by computation in the order of the schedule."""
    held = _Held(module)
    for name in module.scheduled:
        yield from _transfers(module, name, held)


class _Held:
    """Which collectives a fusion or an asynchronous computation holds, and whether it starts or ends them."""

    def __init__(self, module: Module):
        self.module = module
        self.of = functools.cache(self._of)

    def _of(self, computation: str) -> tuple[tuple[str, Instruction, str], ...]:
        """(opcode, its line, "start" | "done" | "") of each."""
        body = self.module.computations.get(computation, ())
        stages = {}
        for i in body:
            if i.opcode == "custom-call" and i.target.startswith("AsyncCollective"):
                stages |= dict.fromkeys(i.operands, i.target.removeprefix("AsyncCollective").lower())
        found = []
        for i in body:
            if i.opcode in COLLECTIVES:
                scattered = i.opcode == "all-reduce" and computation.startswith("all-reduce-scatter")
                found.append(("reduce-scatter" if scattered else i.opcode, i, stages.get(i.name, "")))
            elif i.opcode in ("fusion", "call"):
                found += [held for _, name in i.callees for held in self.of(name)]
        return tuple(found)


def _transfers(module: Module, computation: str, held: _Held) -> Iterator[Transfer]:
    under_way: dict[str, list[Transfer]] = {}  # value → the transfers it stands for
    found = []
    for at, i in enumerate(module.computations[computation]):
        carried = [t for name in i.operands for t in under_way.get(name, ())] if under_way else []
        base, _, stage = i.opcode.rpartition("-")

        def begins(opcode: str, line: Instruction, begin: int | None, end: int | None) -> Transfer:
            t = Transfer(opcode, line, i, line.shape, computation, begin, end, i.operands)  # noqa: B023
            found.append(t)
            return t

        if i.opcode in COLLECTIVES:
            begins(i.opcode, i, at, at)
        elif stage == "start" and base in COLLECTIVES:
            under_way[i.name] = [begins(base, i, at, None)]
        elif i.opcode in ("async-start", "call-start"):
            begin = at if i.operands else None
            under_way[i.name] = [begins(o, line, begin, None) for _, c in i.callees for o, line, _ in held.of(c)]
        elif i.opcode in ("async-update", "call-update"):
            for t in carried:
                if t.begin is None:
                    t.begin, t.operands = at, i.operands[1:]
            under_way[i.name] = carried
        elif stage == "done":
            for t in carried:
                t.end, t.shape = at, i.shape if t.opcode == base else t.shape
        elif i.opcode == "get-tuple-element" and carried:
            under_way[i.name] = carried
        elif i.opcode == "fusion":
            chain = []
            for opcode, line, step in (h for _, c in i.callees for h in held.of(c)):
                t = next((t for t in carried if t.end is None and t.key == _key(line)), None)
                if t is None:
                    t = begins(opcode, line, at, None if step == "start" else at)
                if step == "done":
                    t.end = at
                else:
                    chain.append(t)
            if chain:
                under_way[i.name] = chain
    for t in found:
        if t.begin is None or t.end is None:  # a start whose done is not in the text: nothing is known to run beside it
            t.begin = t.end = t.begin if t.begin is not None else t.end or 0
    yield from found


def groups(i: Instruction, devices: int) -> np.ndarray | None:
    """Positions of the devices that exchange with each other, [groups, members] i32; None where the text has none.

    Positions are those of the program's device assignment, which JAX makes of `mesh.devices` in row-major order.
    A collective-permute's groups are its pairs of source and target, those that stay in place left out.
    """
    if found := _PAIRS.search(i.rest):
        pairs = np.array([p.split(",") for p in re.findall(r"\{([\d,]+)\}", found[1])], np.int32).reshape(-1, 2)
        return pairs[pairs[:, 0] != pairs[:, 1]]
    if found := _IOTA.search(i.rest):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))
    if found := _NAMED.search(i.rest):
        return _named(*found.groups())
    if found := _LISTED.search(i.rest):
        listed = [_numbers(g) for g in re.findall(r"\{([\d,]+)\}", found[1])]
        if not listed:
            return np.arange(devices, dtype=np.int32)[None]
        return np.array(listed, np.int32) if len({len(g) for g in listed}) == 1 else None
    return None


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    shape = _numbers(sizes)
    ids = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _named(axes: str, devices: str | None, over: str) -> np.ndarray | None:
    """Groups over named axes of a mesh; an axis may be cut, `'x':(2)4` is the 4 of x = 2 x 4 x rest."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()), dtype=np.int32)
    if devices:
        found = _DEVICES.match(devices)
        ids = _iota(found[1], found[2]) if found else np.array(_numbers(devices), np.int32)
    cut = {name: (int(lead), int(n)) if n else (1, sizes[name]) for name, lead, n in _AXIS.findall(over)}
    shape, moved = [], []
    for name, size in sizes.items():
        lead, n = cut.get(name, (1, 1))
        if name in cut:
            moved.append(len(shape) + 1)
        shape += [lead, n, size // (lead * n)]
    stay = [d for d in range(len(shape)) if d not in moved]
    return ids.reshape(shape).transpose(*stay, *moved).reshape(-1, math.prod(shape[d] for d in moved))


def axes_of(found: np.ndarray | None, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ, in the mesh's order.

    () for groups of one, ("?",) where the groups can't be read or are of more devices than the mesh has.
    """
    if found is None or found.size and found.max() >= math.prod(mesh.values()):
        return ("?",)
    if not found.size:
        return ()
    places = np.stack(np.unravel_index(found, tuple(mesh.values())))  # [axes, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, d in zip(mesh, differ, strict=True) if d)
