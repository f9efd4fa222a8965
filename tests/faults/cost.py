"""What saving every 50 steps costs the quickstart."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import ROOT, environment

BENCHMARK = ROOT / "tests/benchmarks/checkpoints.py"
MOST = 0.03  # share of the step time


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    """The benchmark's figure."""
    command = [sys.executable, str(BENCHMARK), "--overhead", f"--turns={trial['turns']}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3600)
    found = re.search(r"^time: .* ([+-][\d.]+) %", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        return {"wrong": [f"the benchmark failed: {(done.stderr or done.stdout)[-500:]}"], "overhead": 1.0}
    overhead = float(found[1]) / 100
    wrong = [f"costs {100 * overhead:.1f} %"] if overhead >= MOST else []
    return {"wrong": wrong, "overhead": overhead}


def judge(results: list[Result]) -> Verdict:
    return Verdict(1, f"costs {100 * results[0]['overhead']:.1f} % of the step time", all_wrong(results))


ROW = Row(
    "cost",
    "No fault: a checkpoint every 50 steps of the quickstart",
    lambda: "",
    lambda short, seed: [{"turns": 1 if short else 5}],
    attempt,
    judge,
)
