"""Do all processes run the same: what differs is found, by majority, and told to all."""

import pathlib
import re
import subprocess
import sys

from vidgen.parallel import fingerprints
from vidgen.parallel.fingerprints import verdict

ROOT = pathlib.Path(__file__).parents[2]
NAMES = {0: "pid 1 on a", 1: "pid 2 on b", 2: "pid 3 on c"}
USUAL = {"code": "5" * 64, "jax": "0.10.2", "config": "c" * 64}


def test_what_all_have_is_no_matter():
    assert verdict([USUAL] * 4, NAMES) == "" and verdict([USUAL], NAMES) == ""


def test_the_odd_one_out_is_named_with_what_differs():
    odd = USUAL | {"jax": "0.9.0", "code": "e" * 64}
    assert verdict([USUAL, USUAL, odd], NAMES) == (
        "the 3 processes don't run the same: process 2 (pid 3 on c) in code (eeeeeeeeeeee there, 555555555555 "
        "elsewhere), jax (0.9.0 there, 0.10.2 elsewhere); expected the same command, with the same clone, environment "
        "and clips, on every host"
    )
    assert verdict([odd, USUAL, USUAL], NAMES).startswith("the 3 processes don't run the same: process 0 (pid 1 on a)")


def test_of_two_halves_that_of_process_0_is_right():
    odd = USUAL | {"config": "d" * 64}
    assert "process 1 (pid 2 on b) in config (dddd" in verdict([USUAL, odd], NAMES)
    assert "process 0" not in verdict([USUAL, odd], NAMES)


def test_what_one_does_not_know_differs():
    told = verdict([USUAL, USUAL, {name: USUAL[name] for name in ("jax", "config")}], {})
    assert "process 2 in code (nothing there, 5555" in told


def test_of_many_the_first_few_are_named():
    each = [USUAL] * 20 + [USUAL | {"jax": "0.9.0"}] * 10
    assert verdict(each, {}).count("process 2") == 8 and "; and 2 more;" in verdict(each, {})


def test_code_is_what_the_files_say_and_where_they_lie(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("x = 1\n")
    first = fingerprints.code(tmp_path)
    (tmp_path / "a/x.pyc").write_bytes(b"of no matter")
    assert fingerprints.code(tmp_path) == first
    (tmp_path / "a/x.py").rename(tmp_path / "x.py")
    moved = fingerprints.code(tmp_path)
    (tmp_path / "x.py").write_text("x = 2\n")
    assert len({first, moved, fingerprints.code(tmp_path)}) == 3


def test_this_process_says_what_it_runs():
    found = fingerprints.here()
    assert re.fullmatch("[0-9a-f]{64}", found["code"]) and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "jaxlib"} <= set(found) and fingerprints.of("a") != fingerprints.of("b")
    fingerprints.compare(found)  # with itself


COMPARES = """
import os, sys
from vidgen.config import ConfigError
from vidgen.parallel import fingerprints, processes
processes.start()
odd = os.environ["VIDGEN_PROCESS"] == "1"
own = fingerprints.here() | {"step": fingerprints.of("one program")}
fingerprints.compare(own)
try:
    fingerprints.compare(own | ({"step": fingerprints.of("another")} if odd else {}))
except ConfigError as e:
    print("told:", e, flush=True)
"""


def test_all_processes_hear_of_it(tmp_path):
    count = 3
    (tmp_path / "compares.py").write_text(COMPARES)
    command = [sys.executable, str(ROOT / "launch/local.py"), f"--processes={count}", f"--logs={tmp_path}", "--"]
    done = subprocess.run([*command, str(tmp_path / "compares.py")], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [re.findall("told: .*", (tmp_path / f"rank-{rank}.log").read_text()) for rank in range(count)]
    assert told[0] == told[1] == told[2] and len(told[0]) == 1
    assert re.search(r"the 3 processes don't run the same: process 1 \(pid \d+ on \S+\) in step \(", told[0][0])
