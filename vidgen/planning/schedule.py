"""The text of a compiled program as computations and instructions, and how often each computation runs.

The text is what `jax.stages.Compiled.as_text()` gives: an HLO module after scheduling, so that the order of lines in a
computation is the order of execution (OpenXLA, "Operation semantics" and "HLO IR specification"). Nothing of JAX
or XLA is needed to read it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) ")
# The shape is whatever stands before the first word that is followed by a bracket: layouts have upper-case T( and S(.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLEE = re.compile(
    r" (calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:%([\w.\-]+)|\{([^}]*)\})"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TILE = re.compile(r"^([\d,]*)(?::T\((\d+)(?:,(\d+))?\))?")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"^(?:bf|[a-z])(\d+)")

# What a schedule holds that computes nothing, or moves data alone.
_PASSIVE = frozenset(
    "parameter constant tuple get-tuple-element bitcast copy copy-start copy-done broadcast iota reshape after-all "
    "partition-id replica-id opt-barrier optimization-barrier add-dependency domain slice-start slice-done "
    "dynamic-slice-start dynamic-slice-done custom-call send send-done recv recv-done infeed outfeed".split()
)
_ATTENTION_CALLS = ("tpu_custom_call", "mosaic", "fmha", "flash", "splash", "attention")
_MATMUL_CALLS = ("gemm", "matmul", "$conv", "$dot")
_LEAST = 1024  # elements; smaller results are bookkeeping (indices, counters), no compute that could hide a transfer

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
RANK = {"": 0, "compute": 1, "matmul": 2, "attention": 3}  # of what work is, the most telling last


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`.

    Attributes:
      shape: of the result, as text; a tuple's in brackets.
      rest: operands and attributes, as text.
      root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        end = self.rest.find("), ")
        return tuple(_NAME.findall(self.rest if end < 0 else self.rest[:end]))

    @functools.cached_property
    def callees(self) -> tuple[tuple[str, str], ...]:
        """(attribute, computation) of each computation that it calls."""
        found = []
        for attribute, one, several in _CALLEE.findall(self.rest):
            found += [(attribute, name) for name in ([one] if one else _NAME.findall(several))]
        return tuple(found)

    @property
    def op_name(self) -> str:
        """The path of scopes it comes from, or ""."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution; TPU only, and not of custom calls and collectives."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """What a custom call calls, or ""."""
        return self.attribute("custom_call_target").strip('"')

    def attribute(self, key: str) -> str:
        """The text of `key=…` up to the next comma, or ""."""
        found = re.search(rf"[ ,]{key}=([^,\s]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result's shape.

    Attributes:
      text: as written, without the layout.
      elements: in all.
      bytes: without padding.
      padded_bytes: as it lies in memory, its two minor dimensions filled up to the first tile of its layout.
      rank: number of dimensions.
      space: memory space; 0 = the device's main memory.
    """

    text: str
    elements: int
    bytes: int
    padded_bytes: int
    rank: int
    space: int


@functools.lru_cache(maxsize=65536)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, a tuple's all the way down, in order; tokens and opaque values have no bytes."""
    found = []
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        sizes = [int(n.lstrip("<=")) for n in dimensions.split(",") if n]
        bits = _bits(dtype)
        minor, first, second = _TILE.match(layout).groups()
        padded = list(sizes)
        tile = [int(n) for n in (second, first) if n]  # of the most minor dimension first
        for dimension, n in zip((int(d) for d in minor.split(",") if d), tile, strict=False):
            padded[dimension] = -(-padded[dimension] // n) * n
        space = _SPACE.search(layout)
        found.append(
            Array(
                f"{dtype}[{dimensions}]",
                math.prod(sizes),
                -(-math.prod(sizes) * bits // 8),
                -(-math.prod(padded) * bits // 8),
                len(sizes),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _bits(dtype: str) -> int:
    """Bits an element takes in memory: pred 8, f8e4m3fn 8, bf16 16, c64 64, token 0."""
    if dtype == "pred":
        return 8
    found = _BITS.match(dtype)
    return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: name → instructions, in order of execution.
      entry: name of the computation that runs first.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """Computation → name → instruction."""
        return {name: {i.name: i for i in body} for name, body in self.computations.items()}

    @functools.cached_property
    def scheduled(self) -> dict[str, tuple[int, bool]]:
        """Each computation with a schedule of its own → (executions a run of the program, whether that is certain).

        These are the entry, the bodies of loops, the branches of conditionals (each counted as if taken) and what
        `call` calls; a fusion is one instruction. A loop whose length the text doesn't tell counts once, uncertain.
        """
        calls = {self.entry: [("", 1, True)]}  # computation → (caller, times a run of the caller, certain)
        for caller, body in self.computations.items():
            for i in body:
                if i.opcode == "while":
                    trips = self.trips(caller, i)
                    for _, name in i.callees:
                        calls.setdefault(name, []).append((caller, trips or 1, trips is not None))
                elif i.opcode in ("call", "conditional"):
                    for _, name in i.callees:
                        calls.setdefault(name, []).append((caller, 1, True))

        @functools.cache
        def executions(name: str) -> tuple[int, bool]:
            times, certain = 0, True
            for caller, n, known in calls.get(name, ()):
                outer, sure = executions(caller) if caller else (1, True)
                times, certain = times + outer * n, certain and known and sure
            return times, certain

        return {name: executions(name) for name in self.computations if executions(name)[0]}

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """Iterations of a `while`: what the compiler notes, or the bound that its condition compares with."""
        if found := _TRIPS.search(loop.rest):
            return int(found[1])
        called = dict(loop.callees)
        if not called.keys() >= {"condition", "body"}:
            return None
        test = next((i for i in self.computations.get(called["condition"], ()) if i.root), None)
        if test is None:
            return None
        compare, sides = test, test.operands
        if test.opcode == "fusion":  # a comparison wrapped in a fusion: its sides are the fusion's operands
            inner = self.computations[test.callees[0][1]]
            compare = next((i for i in inner if i.opcode == "compare"), test)
            number = {i.name: int(i.rest.split(")")[0]) for i in inner if i.opcode == "parameter"}
            if any(side not in number for side in compare.operands):
                return None
            sides = tuple(test.operands[number[side]] for side in compare.operands)
        direction = compare.attribute("direction")
        if compare.opcode != "compare" or len(sides) != 2:
            return None
        if direction in ("GT", "GE"):
            sides, direction = sides[::-1], {"GT": "LT", "GE": "LE"}[direction]
        counter = self.by_name[called["condition"]].get(sides[0])
        if direction not in ("LT", "LE", "NE") or counter is None or counter.opcode != "get-tuple-element":
            return None
        start = self._carried(computation, loop, counter)
        bound = self._constant(called["condition"], sides[1])
        if bound is None:
            bound = self._carried(computation, loop, self.by_name[called["condition"]].get(sides[1]))
        if bound is None:
            return None
        step = self._step(called["body"], counter)
        return max(0, -(-(bound + (direction == "LE") - (start or 0)) // step))

    def _carried(self, computation: str, loop: Instruction, element: Instruction | None) -> int | None:
        """The constant that a loop's carried element has before the first iteration."""
        made = self.by_name[computation].get(loop.operands[0])
        if element is None or element.opcode != "get-tuple-element" or made is None or made.opcode != "tuple":
            return None
        return self._constant(computation, made.operands[int(element.attribute("index"))])

    def _constant(self, computation: str, name: str) -> int | None:
        i = self.by_name[computation].get(name)
        while i is not None and i.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            i = self.by_name[computation].get(i.operands[0])
        if i is None or i.opcode != "constant":
            return None
        found = re.match(r"(-?\d+)\)", i.rest)
        return int(found[1]) if found else None

    def _step(self, body: str, counter: Instruction) -> int:
        """What an iteration adds to the counter; 1 where the text doesn't say."""
        root = next((i for i in self.computations[body] if i.root), None)
        if root is None or root.opcode != "tuple":
            return 1
        made = self.by_name[body].get(root.operands[int(counter.attribute("index"))])
        while made is not None and made.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            made = self.by_name[body].get(made.operands[0])
        if made is None or made.opcode != "add":
            return 1
        return max(1, max((self._constant(body, name) or 1 for name in made.operands), default=1))

    def work(self, i: Instruction) -> str:
        """What an instruction does: "attention" (a fused kernel), "matmul", "compute", or "" for nothing to speak of.

        A loop, call or fusion does the most telling of what is inside. Transfers and copies are no work.
        """
        if i.opcode in ("dot", "convolution", "ragged-dot"):
            return "matmul"
        if i.opcode == "custom-call":
            target = i.target.lower()
            if any(word in target for word in _ATTENTION_CALLS):
                return "attention"
            return "matmul" if any(word in target for word in _MATMUL_CALLS) else ""
        if i.opcode in ("fusion", "while", "call", "conditional"):
            return max((self._inside(name) for _, name in i.callees), key=RANK.__getitem__, default="")
        base = re.sub(r"-(start|update|done)$", "", i.opcode)
        if i.opcode in _PASSIVE or base in COLLECTIVES or base in ("call", "async"):
            return ""
        return "compute" if sum(a.elements for a in arrays(i.shape)) >= _LEAST else ""

    @functools.cached_property
    def _inside(self):
        @functools.cache
        def inside(name: str) -> str:
            return max(map(self.work, self.computations.get(name, ())), key=RANK.__getitem__, default="")

        return inside

    def cycles(self, computation: str, i: Instruction) -> int | None:
        """Estimated cycles of one execution, a loop's over all of its iterations; None where the text has none."""
        if i.opcode not in ("while", "call", "conditional"):
            return i.cycles
        times = (self.trips(computation, i) or 1) if i.opcode == "while" else 1
        inner = [self.cycles(name, j) for _, name in i.callees for j in self.computations.get(name, ())]
        known = [n for n in inner if n is not None]
        return times * sum(known) if known else None


def parse(text: str) -> Module:
    """The module of a text; raises ValueError if it is none, or not scheduled."""
    if not text.startswith("HloModule "):
        start = text[:40].split("\n")[0]
        raise ValueError(f"not a compiled program: expected a text that starts with 'HloModule', found {start!r}")
    if "is_scheduled=true" not in text[: text.find("\n")]:
        raise ValueError("the program has no schedule: expected is_scheduled=true; take the text of a compiled program")
    computations, entry = {}, ""
    for name, is_entry, body in _bodies(text):
        computations[name] = body
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("the program has no ENTRY computation; is the text cut off?")
    return Module(computations, entry)


def _bodies(text: str) -> Iterator[tuple[str, bool, tuple[Instruction, ...]]]:
    """(name, whether it is the entry, instructions) of each computation."""
    head, body = None, []
    for line in text.split("\n"):
        if head and (line == "}" or line.startswith("}, execution_thread=")):
            yield head[2], bool(head[1]), tuple(body)
            head, body = None, []
        elif head:
            if found := _INSTRUCTION.match(line):
                root, name, shape, opcode, rest = found.groups()
                body.append(Instruction(name, shape, opcode, rest, bool(root)))
            elif body:  # attributes of kernels may hold line breaks
                body[-1] = dataclasses.replace(body[-1], rest=f"{body[-1].rest}\n{line}")
        elif line.endswith("{") and not line.startswith("HloModule"):
            head = _HEADER.match(line)
    if head:
        raise ValueError(f"the text ends within the computation {head[2]}")
