"""What a compiled program says of itself: its collectives, its fused kernels, its largest buffers, why it does not fit.

Facts read from the text of the scheduled program, nothing measured: that compute is scheduled between the start and the
done of a transfer means that the transfer can run beside it, not that it is hidden.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from vidgen.planning.schedule import RANK, Array, Instruction, Module, arrays, parse
from vidgen.planning.transfers import Transfer, axes_of, groups, transfers


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it.

    Attributes:
      opcode: all-gather | reduce-scatter | all-reduce | all-to-all | collective-permute | …
      axes: mesh axes that its groups run over, in the mesh's order; ("?",) where the text doesn't tell.
      bytes: of the whole array that a device has a part in, one execution: gathered, or not yet scattered or reduced;
        of a collective-permute or an all-to-all, what a device hands in. Several arrays in one go are added up.
      sent: bytes that a device sends in one execution if n members pass pieces round a ring: bytes · (n-1)/n, twice
        that for an all-reduce, all bytes for a collective-permute.
      count: executions a step: the product of the lengths of the loops around it.
      asynchronous: whether the schedule has a start and a done.
      window: the most telling work between start and done: "attention" (a fused kernel), "matmul", "compute" or "".
      window_cycles: the compiler's estimate for what lies between, one execution; None without estimates. Fused
        kernels have none, so that it is a lower bound.
      role: "weights" | "gradients" | "keys" | "other"; see `role_of`.
      name: the scopes it comes from, shortened.
      members: devices of a group of an all-to-all; 1 for all else.
    """

    opcode: str
    axes: tuple[str, ...]
    bytes: int
    sent: int
    count: int
    asynchronous: bool
    window: str
    window_cycles: int | None
    role: str
    name: str
    members: int = 1

    @property
    def hidden(self) -> bool:
        """Whether it runs beside some work: a start and a done with nothing between them hide nothing."""
        return self.asynchronous and bool(self.window)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one opcode, axes and role.

    Attributes:
      ops: collectives in the program.
      executions: of them in a step.
      bytes, sent: in a step, as in Collective.
      asynchronous: share of the bytes that are under way beside some work.
      beside_matmul: share of the bytes that are under way beside a matrix product or attention.
    """

    opcode: str
    axes: tuple[str, ...]
    role: str
    ops: int
    executions: int
    bytes: int
    sent: int
    asynchronous: float
    beside_matmul: float


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A compiler's or a device's refusal.

    Attributes:
      needed_bytes: what the program, or the allocation that failed, wants.
      available_bytes: what there is; None where the message doesn't say.
      buffers: the largest: (bytes, shape, op_name), as far as the message lists them.
    """

    needed_bytes: int
    available_bytes: int | None
    buffers: tuple[tuple[int, str, str], ...] = ()


def collectives(text: str, axes: Mapping[str, int]) -> list[Collective]:
    """Each collective once, however many lines it takes.

    Args:
      text: of the compiled program, scheduled.
      axes: mesh axis → devices along it, in the mesh's order (`mesh.shape`).

    One whose groups have a single member moves nothing and is left out. One in a loop whose length the text doesn't
    tell counts once, and its name says so.

    Raises:
      ValueError: the text is no scheduled HLO module.
    """
    module = parse(text)
    backward = "transpose(" in text
    found = []
    for t in transfers(module):
        count, certain = module.scheduled[t.computation]
        members = groups(t.line, math.prod(axes.values()))
        over = axes_of(members, axes)
        if not over:
            continue
        n = 1 if members is None else members.shape[1]
        size = _bytes(t, n)
        asynchronous = t.asynchronous and '"is_sync":true' not in t.outer.rest
        window, cycles = _window(module, t) if asynchronous else ("", None)
        name = t.line.op_name or t.outer.op_name
        found.append(
            Collective(
                opcode=t.opcode,
                axes=over,
                bytes=size,
                sent=size
                if t.opcode == "collective-permute"
                else size * (n - 1) // n * (1 + (t.opcode == "all-reduce")),
                count=count,
                asynchronous=asynchronous,
                window=window,
                window_cycles=cycles,
                role=role_of(t, over, name, gathers=_gathers(module, t), backward=backward),
                name=_shortened(name) + ("" if certain else " (in a loop of unknown length, counted once)"),
                members=n if t.opcode == "all-to-all" else 1,
            )
        )
    return found


def summary(found: Iterable[Collective]) -> list[Exchange]:
    """One row for each opcode, axes and role, most bytes a step first."""
    rows = defaultdict(list)
    for c in found:
        rows[c.opcode, c.axes, c.role].append(c)

    def row(key, members):
        total = sum(c.bytes * c.count for c in members)

        def share(windows):
            return sum(c.bytes * c.count for c in members if c.window in windows) / total if total else 0.0

        return Exchange(
            *key,
            ops=len(members),
            executions=sum(c.count for c in members),
            bytes=total,
            sent=sum(c.sent * c.count for c in members),
            asynchronous=share(("compute", "matmul", "attention")),
            beside_matmul=share(("matmul", "attention")),
        )

    return sorted((row(key, members) for key, members in rows.items()), key=lambda r: (-r.bytes, r.opcode, r.axes))


def opcode_counts(text: str) -> dict[str, int]:
    """Opcode → collectives in the program, the links of one asynchronous chain counted once.

    Channel ids can't tell them apart: all of a `shard_map` share one.
    """
    return dict(sorted(Counter(t.opcode for t in transfers(parse(text))).items()))


def custom_kernels(text: str) -> Counter:
    """Fused kernels → calls in the program: "tpu_custom_call splash_mha_fwd…", "__cudnn$fmhaSoftmax", …

    What the compiler calls for its own ends (buffers, bitcasts, asynchronous starts) is left out.
    """
    found = Counter()
    for body in parse(text).computations.values():
        for i in body:
            if i.opcode == "custom-call" and (i.target == "tpu_custom_call" or "triton" in i.target):
                found[f"{i.target} {_NUMBERED.sub('', i.name)}"] += 1  # Pallas: the line has the kernel's name
            elif i.opcode == "custom-call" and "$" in i.target:
                found[i.target] += 1
    return found


_NUMBERED = re.compile(r"\.\d+$")

# What holds no memory of its own: views, other instructions' results, and what is reported where it is done.
_NO_BUFFER = frozenset(
    "parameter tuple get-tuple-element bitcast while conditional call opt-barrier after-all copy-start async-start "
    "async-update call-start call-update dynamic-update-slice add-dependency".split()
)


def largest_buffers(text: str, top: int = 8, arguments: bool = False) -> list[tuple[int, str, str]]:
    """(bytes, shape, op_name) of the largest results that lie in a device's main memory, equal ones once.

    Bytes count the padding of the layout's tiles. Results inside fusions take no memory; results of different lines may
    share it in turn, so that they don't add up to the peak.

    Args:
      arguments: list the program's arguments (state and batch) instead of what it computes.
    """
    module = parse(text)
    if arguments:
        chosen = ((i, a) for i in module.computations[module.entry] if i.opcode == "parameter" for a in arrays(i.shape))
    else:
        chosen = (p for name in module.scheduled for i in module.computations[name] for p in _results(module, name, i))
    seen = {(a.padded_bytes, a.text, _shortened(i.op_name)) for i, a in chosen if a.space == 0}
    return sorted(seen, key=lambda b: (-b[0], b[1], b[2]))[:top]


def _results(module: Module, computation: str, i: Instruction) -> Iterable[tuple[Instruction, Array]]:
    """The arrays that an instruction makes, those that it writes over an operand left out."""
    if i.opcode in _NO_BUFFER or i.opcode.endswith("-start"):
        return
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", i.rest)
    over = set(re.findall(r"\{(\d*)\}: \(", aliased[1])) if aliased else set()
    for k, a in enumerate(arrays(i.shape)):
        updates = i.opcode == "fusion" and _made_by(module, computation, i.name, k) == "dynamic-update-slice"
        if str(k) not in over and "" not in over and not updates:
            yield i, a


def _bytes(t: Transfer, n: int) -> int:
    """Of the whole array; a reduce-scatter's line has a piece, unless it is an all-reduce that is cut afterwards."""
    size = sum(a.bytes for a in arrays(t.shape))
    if t.opcode == "collective-permute" and t.begin == t.end and t.outer.opcode.endswith("-start"):
        size //= 2  # a start without its done: operand and result
    return size * n if t.line.opcode.startswith("reduce-scatter") else size


def _window(module: Module, t: Transfer) -> tuple[str, int | None]:
    between = module.computations[t.computation][t.begin + 1 : t.end]
    window = max(map(module.work, between), key=RANK.__getitem__, default="")
    cycles = [n for n in (module.cycles(t.computation, i) for i in between) if n is not None]
    return window, sum(cycles) if cycles else None


_THROUGH = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "transpose")


def _gathers(module: Module, t: Transfer) -> bool:
    """Whether it puts pieces together: an all-gather, or an all-reduce of pieces written into zeros."""
    if t.opcode != "all-reduce":
        return t.opcode == "all-gather"
    return any(_made_by(module, t.computation, name) in ("dynamic-update-slice", "pad") for name in t.operands)


def _made_by(module: Module, computation: str, name: str, index: int = 0) -> str:
    """The opcode that makes a value, seen through copies and into fusions; `index` is of a tuple's element."""
    lines = module.by_name[computation]
    i = lines.get(name)
    while i is not None and i.operands and i.opcode in (*_THROUGH, "get-tuple-element"):
        if i.opcode == "get-tuple-element":
            index = int(i.attribute("index"))
        i = lines.get(i.operands[0])
    if i is not None and i.opcode == "fusion":
        inside = i.callees[0][1]
        root = next((j for j in module.computations.get(inside, ()) if j.root), None)
        if root is not None and root.opcode == "tuple":
            return _made_by(module, inside, root.operands[index])
        return _made_by(module, inside, root.name) if root is not None else ""
    return i.opcode if i is not None else ""


FEW = 64  # numbers; a sum of so many is a loss, a norm or a count

_KEYS = re.compile(r"(?:^|[/(:])(?:attend|ring|ulysses|context_parallel)(?=$|[/):])")
_WEIGHTS = re.compile(r"(?:^|[/(:])(?:\w*weights?|params?|kernel)(?=$|[/):])")


def role_of(t: Transfer, axes: tuple[str, ...], name: str, *, gathers: bool, backward: bool) -> str:
    """What a collective is for: "weights", "gradients", "keys" (and values, of attention) or "other".

    Scopes decide where they are named: `attend`, `ring` or `ulysses` for keys, `weights` for weights. Else the kind
    of collective does, in this order:

      1. An all-to-all or a collective-permute over context is of keys, unless it belongs to a matrix product that the
         compiler cut into pieces: that goes on as the gather or the scatter that it stands for. Others are other.
      2. Sums of a few numbers (a loss, a norm) are other.
      3. Over context alone, arrays of four dimensions [B,H,S,D] and ids (integers) are keys.
      4. Over tensor alone it is other: activations.
      5. What puts pieces together (an all-gather, or an all-reduce of zero-padded pieces) is weights if it is
         differentiated, or if the program has no backward pass; else other, such as an optimizer's.
      6. What reduces is gradients if it is in the backward pass; else other.

    In 5 and 6 a collective that has lost its name counts if it has up to three dimensions, as stacked weights have.

    Args:
      axes: that it runs over.
      name: its scopes, in full.
      gathers: whether it puts pieces together.
      backward: whether the program has a backward pass.
    """
    parts = arrays(t.shape)
    name = _of_largest(name, parts)
    largest = max(parts, key=lambda a: a.bytes, default=None)
    transposed = "transpose(" in name and "rematted_computation" not in name
    cut = t.opcode == "collective-permute" and ("windowed_dot_general" in t.computation or "dot_general" in name)
    if "windowed_dot_general_body_" in t.computation:
        scatters = "windowed_dot_general_body_rs" in t.computation
    else:
        scatters = transposed if cut else t.opcode in ("reduce-scatter", "all-reduce") and not gathers
    scope = _scope(name)
    if scope == "keys":
        return "keys"
    if scope == "weights":
        return "gradients" if scatters and transposed else "weights"
    if not cut and t.opcode in ("all-to-all", "collective-permute"):
        return "keys" if axes == ("context",) else "other"
    if largest is None or largest.elements <= FEW:
        return "other"
    if axes == ("context",) and (largest.rank >= 4 or largest.text[0] in "su"):
        return "keys"
    if axes == ("tensor",) or (not name and largest.rank > 3):
        return "other"
    if scatters:
        return "gradients" if not name or transposed else "other"
    return "weights" if not name or not backward or "jvp(" in name or "transpose(" in name else "other"


def _scope(name: str) -> str:
    """What the innermost telling scope of a name says: "keys", "weights" or ""."""
    found = [(m.start(), role) for p, role in ((_KEYS, "keys"), (_WEIGHTS, "weights")) for m in p.finditer(name)]
    return max(found, default=(0, ""))[1]


def _of_largest(name: str, parts: tuple[Array, ...]) -> str:
    """Of a name like `a/b/(c/d:e/f)`, which collectives have that were put together, the part of the largest array."""
    together = re.search(r"\(([^()]*:[^()]*)\)$", name)
    if not together:
        return name
    names = together[1].split(":")
    at = max(range(len(parts)), key=lambda k: parts[k].bytes, default=0)
    return name[: together.start()] + names[at if at < len(names) else 0]


_PLUMBING = re.compile(r"(?:jit\(\w+\)|while|body|eval_jaxpr|closed_call|shard_map|checkpoint|rematted_computation)$")


def _shortened(name: str) -> str:
    """The scopes of a name without what JAX wraps them in."""
    kept = [part for part in name.split("/") if not _PLUMBING.match(part)]
    kept = [part for k, part in enumerate(kept) if not k or part != kept[k - 1]]
    return "/".join(kept).replace("\\'", "'")


_SIZE = r"([\d.,]*\d)\s*([KMGTP]?)(?:i?B\b|bytes?\b|\b)"
_OOM = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.I),
    re.compile(rf"required for .{{0,80}}?\({_SIZE}\) exceeds available \w+ \({_SIZE}\)", re.I),
    re.compile(rf"\({_SIZE}\) exceeds the base limit \({_SIZE}\)", re.I),
    re.compile(rf"(?:trying|attempting|failed) to (?:allocate|reserve) {_SIZE}", re.I),
)
_FREE = re.compile(rf"There (?:are|is) {_SIZE} free", re.I)
_LISTED = re.compile(rf"^\s*\d+\. Size: {_SIZE}\s*$(?P<rest>(?:\n(?!\s*(?:\d+\. Size|=====)).*)*)", re.M)


def oom(message: str) -> OutOfMemory:
    """What a RESOURCE_EXHAUSTED message says, of XLA for TPUs (at compile time) or of an allocator (when running).

    Raises:
      ValueError: the message names no size.
    """
    found = next((m for pattern in _OOM if (m := pattern.search(message))), None)
    if found is None:
        raise ValueError(f"no size in the message: {message.strip()[:200]!r}; expected XLA's RESOURCE_EXHAUSTED text")
    sizes = found.groups()
    available = sizes[2:4] if len(sizes) == 4 else (m.groups() if (m := _FREE.search(message)) else None)
    buffers = []
    for entry in _LISTED.finditer(message):
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry["rest"])
        operator = re.search(r'op_name="((?:[^"\\]|\\.)*)"', entry["rest"])
        buffers.append(
            (
                _size(*entry.groups()[:2]),
                shape[1] if shape else "",
                _shortened(operator[1]) if operator else "",
            )
        )
    return OutOfMemory(_size(*sizes[:2]), _size(*available) if available else None, tuple(buffers))


def _size(number: str, unit: str) -> int:
    """Bytes; units are powers of 1024, as XLA prints them."""
    return round(float(number.replace(",", "")) * 1024 ** " KMGTP".index(unit.upper() or " "))
