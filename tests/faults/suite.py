"""The fault table: what is done to runs of vidgen, and whether they end as if nothing had been.

    python tests/faults/suite.py --workdir runs/faults             all rows; hours on two cores
    python tests/faults/suite.py --only kills                      one of them, or several with commas between
    python tests/faults/suite.py --short                           a few trials of each, as the tests have them

Prints the table in Markdown and writes it to WORKDIR/faults.md, with all figures in WORKDIR/faults.json. What has been
tried is kept in the workdir, so that the same command goes on where it was ended. The exit status is 1 where a bar is
missed or a row can't be run here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import signal
import sys

import bit_flips
import corrupt_records
import cost
import full_disk
import guarded
import jax
import kills
import resumes
import same_mesh
import table

ROWS = tuple(module.ROW for module in (kills, resumes, same_mesh, bit_flips, corrupt_records, full_disk, guarded, cost))


def main(argv: list[str]) -> int:
    """Runs what the command line asks for; the exit status."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="suite.py", description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", default="", help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the random places and moments, 0 unless given")
    parser.add_argument("--workdir", metavar="DIR", default="runs/faults", help="runs/faults unless given")
    parser.add_argument("--short", action="store_true", help="a few trials of each row")
    options = parser.parse_args(argv)
    chosen = options.only.split(",") if options.only else [row.name for row in ROWS]
    known = ", ".join(row.name for row in ROWS)
    if unknown := set(chosen) - {row.name for row in ROWS}:
        parser.error(f"--only={options.only}: no row {sorted(unknown)[0]!r}; known are {known}")
    workdir = pathlib.Path(options.workdir).resolve()
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    kind, lines = "short" if options.short else "long", []
    for row in ROWS:
        if row.name in chosen:
            say(f"{row.name}: {row.fault}")
            folder = workdir / f"{kind}-{options.seed}" / row.name
            lines.append((row, row.missing() or table.run(row, folder, options.short, options.seed, say)))
    text = table.markdown(lines)
    figures = {row.name: {"missing": v} if isinstance(v, str) else dataclasses.asdict(v) for row, v in lines}
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "faults.md").write_text(text + "\n")
    (workdir / "faults.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(text)
    return 1 if any(isinstance(v, str) or v.wrong for _, v in lines) else 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what it started ends too
    sys.exit(main(sys.argv[1:]))
