"""A plan in words and tables, compiled facts and estimates told apart."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vidgen.parallel.mesh import AXES
from vidgen.parallel.rules import Placed
from vidgen.planning import hlo
from vidgen.planning.arithmetic import Estimate
from vidgen.planning.compiled import Compilation, overlap
from vidgen.planning.hardware import Topology
from vidgen.planning.roofline import assumptions
from vidgen.planning.search import Candidate, pareto
from vidgen.training.metrics import si

GIB = 2**30


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a head, numbers to the right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(row[i][:1].isdigit() or row[i][:1] in "-<" for row in cells[1:]) for i in range(len(head))]
    lines = [
        "  " + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  " + "  ".join("-" * w for w in widths), *lines[1:]])


def size(count: float) -> str:
    """Bytes for people: 10.4 GiB."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def mesh_words(mesh: dict[str, int]) -> str:
    """The axes of more than one device: fsdp=32 x context=8."""
    return " x ".join(f"{axis}={mesh[axis]}" for axis in AXES if mesh[axis] > 1) or "one device"


def _machine(topology: Topology) -> str:
    return (
        f"{topology.text}: {topology.chips} chips, {topology.devices} devices, {topology.hosts} hosts; "
        f"{size(topology.chip.hbm_bytes)} a device"
    )


def introduction(config: ConfigDict, topology: Topology, e: Estimate, note: str) -> str:
    """What is planned, and the arithmetic of it."""
    f, m = e.flops, config.model
    share = f"{e.trained / e.tokens:.1%} of them clips" if e.trained else ""
    return "\n".join(
        [
            _machine(topology),
            f"mesh {mesh_words(e.mesh)} ({note}); attention {e.strategy} over context, kernel {e.kernel}; "
            f"remat {m.remat}; {config.optimizer.accumulate} microbatch(es)",
            "",
            "ARITHMETIC",
            f"  parameters                {e.parameters:,}",
            f"  tokens                    {e.tokens:,} ({config.rows.count} rows of {config.rows.tokens:,}; {share})",
            f"  mix of clips              {e.mix}",
            f"  useful FLOPs              {si(f.useful)}FLOP: matrix products {si(f.matmul)}, attention "
            f"{si(f.attention_useful)} ({f.attention_useful / f.useful:.0%})",
            f"  attention executed        {si(f.attention_executed)}FLOP "
            f"({f.attention_executed / f.attention_useful:.2f}x useful: whole blocks, and scores again backward)",
            f"  recomputed                {si(f.recomputed)}FLOP ({f.recomputed_fraction:.1%} of all that is executed)",
        ]
    )


def vae_introduction(config: ConfigDict, topology: Topology, facts: dict[str, Any], chunks: Sequence[str]) -> str:
    """What is planned of a VAE's training, and the arithmetic of it."""
    c = config.reconstruction
    losses = ", ".join(f"{name} {c[name]:g}" for name in ("l1", "l2", "lpips", "kl", "gan") if c[name])
    remat = "blocks are computed again in the backward pass" if config.vae.remat else "nothing is computed again"
    return "\n".join(
        [
            _machine(topology),
            f"mesh {mesh_words(facts['mesh'])}: chunks over data and fsdp, their height over context; {remat}",
            "",
            "ARITHMETIC",
            f"  parameters                {facts['parameters']:,}",
            f"  chunks a step             {facts['chunks']} of {facts['chunk']}, the most of: {', '.join(chunks)}",
            f"  losses                    {losses}; {config.optimizer.accumulate} microbatch(es)",
            f"  useful FLOPs              {si(facts['useful_flops'])}FLOP: three times the VAE forward, by XLA's count",
            f"  at the chips' peak        {duration(facts['seconds_at_the_peak'])} a step: a bound, and no estimate",
        ]
    )


def compiled(found: Compilation) -> str:
    """The compiler's facts."""
    lines = ["", f"COMPILED in {found.seconds:.0f} s: facts of the program that would run"]
    if not found.fits:
        lines += [
            f"  OUT OF MEMORY: wants {size(found.peak_bytes)} of {size(found.hbm_bytes)} a device"
            f" ({found.peak_bytes / found.hbm_bytes:.2f}x)",
        ]
        if found.buffers:  # which not every compiler tells
            lines += ["  largest buffers", buffers(found)]
        return "\n".join(lines)
    o = overlap(found.collectives)
    kernels = ", ".join(f"{n} x {name}" for name, n in sorted(found.kernels.items())) or "none"
    lines += [
        f"  fits: {size(found.peak_bytes)} of {size(found.hbm_bytes)} a device at the peak, {found.headroom:.0%} free",
        f"  fused kernels: {kernels}",
        f"  of the bytes of weights, gradients and keys {o['asynchronous']:.1%} travel beside work, "
        f"{o['beside_matmul_or_attention']:.1%} beside a matrix product or attention",
    ]
    if o["weights_by_all_reduce"]:
        lines.append(f"  {o['weights_by_all_reduce']:.1%} of those bytes are weights gathered by an all-reduce")
    lines += ["", "  collectives of a device in a step", collectives(found), "", "  largest buffers", buffers(found)]
    return "\n".join(lines)


def collectives(found: Compilation) -> str:
    """One line a kind, axis and role."""
    rows = [
        (
            r.opcode,
            " x ".join(r.axes),
            r.role,
            r.ops,
            r.executions,
            size(r.bytes),
            f"{r.asynchronous:.0%}",
            f"{r.beside_matmul:.0%}",
        )
        for r in hlo.summary(found.collectives)
    ]
    return table(("kind", "axes", "what", "ops", "runs", "bytes", "beside work", "matmul or attention"), rows)


def buffers(found: Compilation) -> str:
    """The largest buffers."""
    return table(("size", "shape", "made by"), [(size(b), shape, made[-80:]) for b, shape, made in found.buffers])


def audit(placed: list[Placed], most: int | None = None) -> str:
    """Every weight, or the `most` largest, and where it lies; the average and the moments like them, summed."""
    weights = sorted((p for p in placed if p.path.startswith("params/")), key=lambda p: p.path) or placed
    shown = sorted(sorted(weights, key=lambda p: -p.bytes)[:most], key=lambda p: p.path)
    rest = [p for p in placed if p not in weights]
    rows = [(p.path.removeprefix("params/"), shape_words(p.shape), spec_words(p.spec), size(p.bytes_per_device))
            for p in shown]  # fmt: skip
    if len(shown) < len(weights):
        rows.append((f"and {len(weights) - len(shown)} smaller ones", "", "", ""))
    rows.append(("all weights", "", "", size(sum(p.bytes_per_device for p in weights))))
    if rest:
        rows.append(("their average and the optimizer", "", "as theirs", size(sum(p.bytes_per_device for p in rest))))
    return table(("weight", "shape", "in pieces over", "a device"), rows)


def state(placed: list[Placed], mesh: dict[str, int], most: int | None = None) -> str:
    """The audit, and what a device holds of it all."""
    here, all_of_it = sum(p.bytes_per_device for p in placed), sum(p.bytes for p in placed)
    devices = math.prod(mesh.values())
    whole = f"; each of {devices} devices holds all of it" if here == all_of_it and devices > 1 else ""
    return f"\nSTATE: {size(here)} a device of {size(all_of_it)}{whole}\n{audit(placed, most)}"


def shape_words(shape: tuple[int, ...]) -> str:
    """36x4096x4096."""
    return "x".join(map(str, shape))


def spec_words(spec: Any) -> str:
    """A PartitionSpec: (-, context, fsdp)."""
    names = ("-" if a is None else a if isinstance(a, str) else "+".join(a) for a in spec)
    return "(" + ", ".join(names) + ")"


def roofline(e: Estimate, topology: Topology, tokens: float, price: float | None) -> str:
    """The estimate of the time, its constants and what the run costs."""
    r = e.roofline
    source = "read from the compiled program" if e.from_compiled else "expected from the shapes"
    what = ("a clip" if e.clips == 1 else f"{e.clips} clips") if e.clips else "a step"
    host = f", {duration(r.host_s)} to the host and back" * (r.host_s > 0)
    lines = [
        "",
        f"ESTIMATE by a roofline, transfers {source}",
        f"  {what}                    {duration(r.step_s)}: matrix products {duration(r.compute_s)}, attention "
        f"{duration(r.attention_s)}, memory {duration(r.hbm_s)}, transfers not hidden {duration(r.exposed_s)} (of "
        f"{duration(r.ici_s)} on links, {duration(r.dcn_s)} between slices{host})",
        f"  MFU                       {r.mfu:.1%}; bound by {r.slowest}",
    ]
    cost = e.cost(topology, tokens, price)
    money = "" if price is None else f", cost {cost['cost']:,.2f}"
    if e.clips:
        lines.append(f"  {topology.chips} chips at once           {cost['chip_hours']:.3f} chip-hours a clip{money}")
    else:
        lines += [
            f"  tokens a second           {r.tokens_per_second:,.0f}",
            f"  {si(tokens) + 'tokens':<25} {cost['steps']:,.0f} steps, {cost['days']:,.1f} days, "
            f"{cost['chip_hours']:,.0f} chip-hours{money}",
        ]
    said = [*assumptions(topology, e.kernel, e.head), *e.notes]
    return "\n".join([*lines, "  constants", *(f"    {line}" for line in said)])


def all_plans(found: Sequence[dict[str, Any]]) -> str:
    """Several plans, a line each: compiled facts, then estimates."""
    rows = []
    for f in found:
        if f.get("fits") is None:
            rows.append((f["config"], f["topology"], f.get("error", "")[:60], *[""] * 9))
            continue
        fits = f["fits"]
        rows.append(
            (
                f["config"],
                f["topology"],
                mesh_words(f["mesh"]),
                f"{f['attention_strategy']}, {f['attention_kernel']}",
                f"{f['compile_seconds']:.0f} s",
                size(f["peak_bytes_per_device"]),
                f"{f['headroom']:.0%}" if fits else "DOES NOT FIT",
                f"{f['overlap']['asynchronous']:.1%}" if fits else "",
                f"{f['overlap']['beside_matmul_or_attention']:.0%}" if fits else "",
                f"{f['recomputed_flops_fraction']:.1%}",
                duration(f["predicted_step_seconds"]),
                f"{f['predicted_mfu']:.0%}",
            )
        )
    head = ("config", "topology", "mesh", "attention", "compiled in", "a device", "free", "beside work")
    head += ("matmul or attention", "recomputed", "step (est.)", "MFU (est.)")
    return table(head, rows)


def way(c: Candidate) -> str:
    """A candidate as the flags that ask for it, ready for a shell."""
    mesh = ",".join(f"{axis}={c.mesh[axis]}" for axis in AXES if c.mesh[axis] > 1)
    flags = [f"--mesh {mesh}"] * bool(mesh)
    others = {key: value for key, value in c.changes.items() if not key.startswith("mesh.") or "att" in key}
    flags += [f"--config.{key}={shlex.quote(str(value))}" for key, value in others.items()]
    return " ".join(flags)


def out_of_memory(parts: dict[str, float], ways: Sequence[dict[str, Any]]) -> str:
    """What fills the memory, by the estimate, and what to try instead."""
    lines = ["  what fills it, by the estimate", table(("size", "what"), [(size(b), w) for w, b in parts.items() if b])]
    return "\n".join([*lines, would_fit(ways)])


def would_fit(ways: Sequence[dict[str, Any]]) -> str:
    """What to try where a program did not fit."""
    if not ways:
        return "  No topology of this chip has room by the estimate: fewer tokens a row, or a smaller model"
    rows = [
        (
            w["topology"],
            mesh_words(w["mesh"]),
            w["accumulate"],
            w["remat"],
            w["attention"],
            size(w["estimated_bytes_per_device"]),
            duration(w["estimated_step_seconds"]),
        )
        for w in ways
    ]
    return "\n  would fit, by the estimate\n" + table(
        ("topology", "mesh", "microbatches", "remat", "attention", "memory", "step"), rows
    )


def verdict(row: dict[str, Any]) -> str:
    """Of a compiled candidate: whether it fits, its memory and its time."""
    fits = "fits" if row["fits"] else "OUT OF MEMORY"
    return f"{fits}: {size(row['peak_bytes_per_device'])}, {duration(row['predicted_step_seconds'])} a step"


def compiled_candidates(rows: Sequence[dict[str, Any]]) -> str:
    """Compiled candidates, a line each; those that no other beats in both time and memory are marked."""

    def cost(r):
        return r["predicted_step_seconds"], r["peak_bytes_per_device"]

    best = {cost(r) for r in pareto([r for r in rows if r["fits"]], cost)}
    shown = [
        (
            "*" if r["fits"] and cost(r) in best else "",
            mesh_words(r["mesh"]),
            r["accumulate"],
            r["remat"],
            r["attention"],
            f"{duration(r['predicted_step_seconds'])}" if r["fits"] else "-",
            f"{r['predicted_mfu']:.1%}" if r["fits"] else "-",
            size(r["peak_bytes_per_device"]),
            f"{r['headroom']:.0%}",
            f"{r['overlap']['asynchronous']:.0%}" if r["fits"] else "-",
        )
        for r in sorted(rows, key=lambda r: (not r["fits"], r["predicted_step_seconds"]))
    ]
    head = ("", "mesh", "microbatches", "remat", "attention", "step", "MFU", "compiled memory", "free", "beside work")
    return "* = no other is both faster and smaller; steps are estimates, memory is compiled\n" + table(head, shown)


def candidates(found: Sequence[Candidate], hbm: int) -> str:
    """Ways to lay a step on a topology, a line each, by the estimate."""
    rows = [
        (
            mesh_words(c.mesh),
            c.accumulate,
            c.remat,
            c.attention,
            duration(c.step_s),
            f"{c.roofline.mfu:.1%}",
            size(c.bytes_per_device),
            f"{1 - c.bytes_per_device / hbm:.0%}",
        )
        for c in found
    ]
    return table(("mesh", "microbatches", "remat", "attention", "step", "MFU", "memory", "free"), rows)
