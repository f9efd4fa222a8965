"""A sweep to its end: each run once, whatever happens to the one that drives it."""

import collections
import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pyarrow.parquet
import pytest

from vidgen import config as configs
from vidgen import sweep
from vidgen.config import ConfigError
from vidgen.scaling import manifest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"}

# Stands in for vidgen.sweep_run: notes that it ran, takes a moment, and ends as its run's seed says.
JOB = """
import json, os, sys, time
from vidgen.scaling import manifest
from vidgen.studio import media
from vidgen.training.resilience import only_one

folder, name = sys.argv[1:]
own = manifest.workdir(folder, name)
with only_one(os.path.join(own, "job")):
    with open(os.path.join(folder, "ledger"), "a") as f:
        f.write(name + "\\n")
    time.sleep(1.0)
    (run,) = [run for run in manifest.read(folder).runs if run.name == name]
    tried = len([d for d in os.listdir(own) if ".failed-" in d])
    fails = run.settings["seed"] == 2 and tried < 1 or run.settings["seed"] == 3
    if run.settings["seed"] == 4:
        os._exit(9)
    told = {"status": "failed", "error": "seed of bad luck"} if fails else {"status": "done", "error": "", "loss": 0.5}
    media.write(os.path.join(own, "result.json"), json.dumps(told).encode())
"""

SWEEP = """
from vidgen.scaling.algebra import param
from vidgen.sweep import Sweep

def get_sweep(arg=""):
    return Sweep({config!r}, param("seed", {seeds}))
"""

DRIVER = """
import sys
from vidgen import config as configs
from vidgen import sweep
sweep.JOB, sweep.POLL = ({job!r},), 0.05
if __name__ == "__main__":
    sweep.run({file!r}, {output!r}, width=2, retries=1)
"""


@pytest.fixture
def made(tmp_path):
    """make(seeds) → (command of a driver, its output folder): a sweep over seeds, of jobs that take a second."""

    def make(seeds):
        job, file, driver = (str(tmp_path / name) for name in ("job.py", "swept.py", "driver.py"))
        output = str(tmp_path / "out")
        config = os.path.join(ROOT, "configs", "quickstart.py")
        texts = (JOB, SWEEP.format(config=config, seeds=seeds), DRIVER.format(job=job, file=file, output=output))
        for path, text in zip((job, file, driver), texts, strict=True):
            with open(path, "w") as f:
                f.write(text)
        return [sys.executable, driver], output

    return make


def ledger(output):
    with open(os.path.join(output, "ledger")) as f:
        return collections.Counter(f.read().split())


def table(output):
    with open(os.path.join(output, "results.csv"), newline="") as f:
        return {row["name"]: row for row in csv.DictReader(f)}


def test_a_killed_driver_loses_no_run_and_duplicates_none(made):
    command, output = made([0, 1, 5, 6, 7, 8])
    for _ in range(2):
        driver = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        jobs, until = os.path.join(output, "ledger"), time.monotonic() + 60
        before = sum(ledger(output).values()) if os.path.exists(jobs) else 0
        while not os.path.exists(jobs) or sum(ledger(output).values()) < before + 2:
            assert time.monotonic() < until and driver.poll() is None
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)  # while two jobs are at work, which go on
        driver.wait()
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    names = {f"seed{n}" for n in (0, 1, 5, 6, 7, 8)}
    assert ledger(output) == collections.Counter(names)  # each ran once
    found = table(output)
    assert found.keys() == names and all(row["status"] == "done" and row["loss"] == "0.5" for row in found.values())
    assert pyarrow.parquet.read_table(os.path.join(output, "results.parquet")).num_rows == 6
    # Once more: nothing is left to do.
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert "6 done, 0 failed, 0 to do" in done.stdout and ledger(output) == collections.Counter(names)


def test_failures_are_tried_again_kept_and_told(made):
    command, output = made([1, 2, 3, 4])
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert "2 done, 2 failed, 0 to do" in done.stdout
    assert "failed: seed3: seed of bad luck" in done.stdout and "seed4: its process ended without" in done.stdout
    assert ledger(output) == {"seed1": 1, "seed2": 2, "seed3": 2, "seed4": 2}
    found = table(output)
    assert [found[f"seed{n}"]["status"] for n in (1, 2, 3, 4)] == ["done", "done", "failed", "failed"]
    kept = os.path.join(manifest.workdir(output, "seed2"), "result.json.failed-1")
    with open(kept) as f:
        assert json.load(f)["error"] == "seed of bad luck"
    # The same command tries the failed ones again, and those alone.
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    assert ledger(output)["seed1"] == 1 and ledger(output)["seed3"] == 4


def test_ctrl_c_stops_the_jobs_and_says_how_to_go_on(made):
    command, output = made([0, 1, 5])
    driver = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 60
    while not os.path.exists(os.path.join(output, "ledger")):
        assert time.monotonic() < until and driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=60)
    assert "3 to do" in out and "The same command goes on." in out


def test_real_runs_are_trained_judged_and_tabled(tmp_path, tiny):
    """Two real runs, one of which fails: its learning rate makes the loss infinite."""
    config, file = tmp_path / "tiny.py", tmp_path / "swept.py"
    config.write_text(
        "from vidgen import config\n\n\ndef get_config(arg=''):\n"
        f"    return config.from_json({configs.to_json(tiny)!r})\n"
    )
    file.write_text(
        textwrap.dedent(f"""
        from vidgen.scaling.algebra import chain
        from vidgen.sweep import Sweep

        def get_sweep(arg=""):
            off = {{"optimizer.outlier": 0.0, "optimizer.clip": 0.0, "tokenizer.std": 1e-6}}
            bad = off | {{"optimizer.lr": 900.0, "optimizer.muon_lr": 900.0}}
            good = {{"optimizer.lr": 1e-3, "label.name": "good"}}
            return Sweep({str(config)!r}, chain(good, bad | {{"label.name": "bad"}}),
                         base={{"train.steps": 6}}, suites=("moving_shapes",), prompts=2)
        """)
    )
    output = str(tmp_path / "out")
    found = sweep.run(str(file), output, width=2, retries=0)
    rows = table(output)
    good = rows["good"]
    assert good["status"] == "done" and float(good["loss"]) > 0 and 0 <= float(good["moving_shapes.all_right"]) <= 1
    assert (
        float(good["tokens"]) > 0 and float(good["flops"]) > 6 * float(good["parameters"]) * float(good["tokens"]) / 2
    )
    assert float(good["optimizer.lr"]) == 1e-3 and int(good["steps"]) == 6 and float(good["seconds"]) > 0
    assert rows["bad"]["status"] == "failed" and "held-out loss is" in rows["bad"]["error"], rows["bad"]
    assert (found.done, found.failed, found.pending) == (1, 1, 0)


def test_a_dry_run_counts_and_starts_nothing(made, capsys):
    _, output = made([0, 1])
    file = os.path.join(os.path.dirname(output), "swept.py")
    found = sweep.run(file, output, dry_run=True)
    out = capsys.readouterr().out
    assert "seed0" in out and "2 runs" in out and found.pending == 2 and not os.path.exists(output)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return Sweep(CONFIG, ())", "expands to no runs"),
        (
            "return Sweep(CONFIG, param('model.widht', (1, 2)))",
            "run widht1: unknown setting.*did you mean config.model.w",
        ),
        ("return Sweep(CONFIG, param('model.width', (0,)))", "run .*config.model.width=0: expected"),
        ("return Sweep('nowhere.py', param('seed', (1,)))", "nowhere.py: no such file"),
        ("return Sweep(CONFIG, param('seed', range(20_000)))", "expands to 20,000 runs; expected at most 10,000"),
        ("return 3", "get_sweep returned int"),
        ("return 1 / 0", "ZeroDivisionError"),
    ],
)
def test_bad_sweeps_are_refused_in_a_line(tmp_path, body, says):
    file = tmp_path / "s.py"
    quickstart = os.path.join(ROOT, "configs", "quickstart.py")
    file.write_text(
        "from vidgen.scaling.algebra import param\nfrom vidgen.sweep import Sweep\n"
        f"CONFIG = {quickstart!r}\n\ndef get_sweep(arg=''):\n    {body}\n"
    )
    with pytest.raises(ConfigError, match=says):
        sweep.run(str(file), str(tmp_path / "out"))


def test_bad_flags_are_refused(made, tmp_path):
    made([0])
    file = str(tmp_path / "swept.py")
    for more, says in (
        ({"launcher": "cloud"}, "known are local, slurm, jobset"),
        ({"width": 0}, "--width=0: expected at least 1"),
        ({"retries": -1}, "--retries=-1: expected 0 or more"),
    ):
        with pytest.raises(ConfigError, match=says):
            sweep.run(file, str(tmp_path / "out"), **more)
    with pytest.raises(ConfigError, match="nowhere.py: no such file"):
        sweep.run("nowhere.py", str(tmp_path / "out"))
