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
from vidgen import sweep, sweep_run, train
from vidgen.config import ConfigError
from vidgen.scaling import budgets, jobset, manifest

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
from vidgen import sweep
from vidgen.scaling.local import Local
sweep.JOB, Local.pause = ({job!r},), 0.05
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
    """Two real runs, one of which fails: its clips are not there."""
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
            bad = {{"data.source": {str(tmp_path / "nowhere")!r}}}
            good = {{"optimizer.lr": 1e-3, "label.name": "good"}}
            return Sweep({str(config)!r}, chain(good, bad | {{"label.name": "bad"}}),
                         base={{"train.steps": 6}}, suites=("moving_shapes",), prompts=2)
        """)
    )
    output = str(tmp_path / "out")
    found = sweep.run(str(file), output, width=2, retries=0)
    rows = table(output)
    good = rows["good"]
    levels = [float(good[f"loss/level_{i}"]) for i in range(8)]
    assert abs(float(good["loss"]) - sum(levels) / 8) < 1e-6
    assert good["status"] == "done" and float(good["loss"]) > 0 and 0 <= float(good["moving_shapes.all_right"]) <= 1
    assert (
        float(good["tokens"]) > 0 and float(good["flops"]) > 6 * float(good["parameters"]) * float(good["tokens"]) / 2
    )
    assert float(good["optimizer.lr"]) == 1e-3 and int(good["steps"]) == 6 and float(good["seconds"]) > 0
    assert rows["bad"]["status"] == "failed" and "ConfigError: config.data.source=" in rows["bad"]["error"], rows["bad"]
    assert (found.done, found.failed, found.pending) == (1, 1, 0)


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_run_without_a_finite_loss_has_failed(tmp_path, tiny, monkeypatch, loss):
    row = {"step": 6, "tokens_seen": 100.0, "seconds_per_step": 0.1, "heldout_loss": loss}
    monkeypatch.setattr(sweep_run.train, "run", lambda *_: train.Result(6, "", {}))
    monkeypatch.setattr(sweep_run.metrics, "read", lambda _: [row])
    one = manifest.Run("a", {"train.steps": 6}, {}, ())
    plan = manifest.Manifest("c.py", json.loads(configs.to_json(tiny)), ("moving_shapes",), 2, (one,))
    found = sweep_run.measured(plan, one, str(tmp_path / "run"))
    assert found["status"] == "failed" and found["error"] == f"held-out loss is {loss} after step 6"
    assert found["steps"] == 6 and found["parameters"] > 0


def test_a_run_that_cannot_be_judged_keeps_its_loss(tmp_path, tiny, monkeypatch):
    def refused(*_, **__):
        raise ConfigError("no such extra")

    row = {"step": 6, "tokens_seen": 100.0, "seconds_per_step": 0.1, "heldout_loss": 0.5, "skipped_steps": 2}
    monkeypatch.setattr(sweep_run.train, "run", lambda *_: train.Result(6, "", {}))
    monkeypatch.setattr(sweep_run.metrics, "read", lambda _: [row])
    monkeypatch.setattr(sweep_run.evaluate, "run", refused)
    one = manifest.Run("a", {"train.steps": 6}, {}, ())
    plan = manifest.Manifest("c.py", json.loads(configs.to_json(tiny)), ("moving_shapes",), 2, (one,))
    found = sweep_run.measured(plan, one, str(tmp_path / "run"))
    assert found["status"] == "failed" and found["error"] == "--suite moving_shapes: ConfigError: no such extra"
    assert found["loss"] == 0.5 and found["skipped_steps"] == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"runs": "seed"}, "str 's': expected a point, settings by their keys, or a space of points"),
        ({"runs": 3}, "int 3: expected a point"),
        ({"runs": (), "base": [1]}, "int 1: expected a point"),
        ({"runs": (), "suites": "moving_shapes"}, r"suites='moving_shapes'\): expected several names"),
        ({"runs": (), "prompts": "144"}, r"prompts='144'\): expected a whole number"),
        ({"runs": (), "options": 60}, r"options=60\): expected options by their names"),
    ],
)
def test_slips_in_a_sweeps_file_are_told(given, says):
    with pytest.raises(ConfigError, match=says):
        sweep.Sweep("c.py", **given)


def test_sizes_at_budgets_are_handed_on_by_their_runs():
    found = budgets.at_budgets(os.path.join(ROOT, "configs/quickstart.py"), {"model.layers": 1}, [1e14])
    with pytest.raises(ConfigError, match="Budgeted.*expected a point.*its runs are one: .runs"):
        sweep.Sweep("c.py", found)
    assert sweep.Sweep("c.py", found.runs, notes=found.left_out).runs
    with pytest.raises(ConfigError, match="at_budgets: no sizes"):
        budgets.at_budgets("configs/quickstart.py", (), [1e14])


def test_runs_to_be_made_stand_in_the_table_with_what_they_will_cost(made):
    command, output = made([0, 1])
    plan = sweep.planned(sweep.load(os.path.join(os.path.dirname(output), "swept.py")))
    manifest.write(output, plan)
    sweep.write_results(output)
    rows = table(output)
    assert rows.keys() == {"seed0", "seed1"} and all(row["status"] == "pending" for row in rows.values())
    config = configs.load(os.path.join(ROOT, "configs/quickstart.py"))
    size = budgets.size_of(config)
    assert float(rows["seed0"]["parameters"]) == size.parameters
    assert float(rows["seed0"]["tokens"]) == pytest.approx(size.tokens * config.train.steps)
    assert float(rows["seed0"]["flops"]) == pytest.approx(size.flops * config.train.steps)


def test_a_sweep_that_changed_keeps_what_is_there_and_counts_what_it_has(made, capsys):
    command, output = made([0, 3])
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)  # seed 3 fails
    file = os.path.join(os.path.dirname(output), "swept.py")
    with open(file) as f:
        text = f.read()
    with open(file, "w") as f:
        f.write(text.replace("[0, 3]", "[0, 1]"))
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert "also in the table: 1 runs that the sweep had before" in done.stdout and "2 done, 0 failed" in done.stdout
    assert ledger(output) == {"seed0": 1, "seed1": 1, "seed3": 2} and table(output).keys() == {
        "seed0",
        "seed1",
        "seed3",
    }
    # The same settings under another name: made once all the same.
    with open(file, "w") as f:
        f.write(text.replace('param("seed", [0, 3])', '{"seed": 0, "label.name": "first"}'))
    with pytest.raises(ConfigError, match="run first is there as seed0, and no run is made twice"):
        sweep.run(file, output)


def test_jobs_of_another_launcher_are_not_taken_for_ended(made):
    _, output = made([0])
    os.mkdir(output)
    jobs = os.path.join(output, sweep.JOBS)
    file = os.path.join(os.path.dirname(output), "swept.py")
    for text, says in (
        ('{"launcher": "slurm", "jobs": {"seed0": "4711"}}', "jobs of --launcher=slurm may be at work: seed0; go on"),
        ("[3]", "expected the jobs of a sweep; delete it if none is at work"),
    ):
        with open(jobs, "w") as f:
            f.write(text)
        with pytest.raises(ConfigError, match=says):
            sweep.run(file, output)
    assert not os.path.exists(os.path.join(output, "ledger"))


def test_tables_have_columns_of_one_type_and_no_gaps(tmp_path):
    def get(value):
        return {"optimizer.lr": value, "label.note": value}

    points = (get(1), get(0.5), {"label.note": "plain", "label.big": 2**70}, {"rows.count": 64, "label.big": 1.5})
    asked = sweep.Sweep(os.path.join(ROOT, "configs", "quickstart.py"), points)
    manifest.write(str(tmp_path), sweep.planned(asked))
    sweep.write_results(str(tmp_path))
    found = pyarrow.parquet.read_table(str(tmp_path / "results.parquet")).to_pydict()
    rate, rows = (configs.load(asked.config)[a][b] for a, b in (("optimizer", "lr"), ("rows", "count")))
    assert found["optimizer.lr"] == [1.0, 0.5, rate, rate] and found["rows.count"] == [rows, rows, rows, 64]
    assert found["note"] == ["1", "0.5", "plain", None] and found["big"] == [None, None, 2.0**70, 1.5]
    assert sweep._column([(1, 2), None, 3]) == ["(1, 2)", None, "3"] and sweep._column([True, None]) == [True, None]


def test_a_run_that_was_asked_to_stop_has_no_result_and_the_status_that_a_cluster_waits_for(made, monkeypatch):
    _, output = made([0, 1])
    manifest.write(output, sweep.planned(sweep.load(os.path.join(os.path.dirname(output), "swept.py"))))
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        monkeypatch.setattr(sweep_run, "measured", lambda *_, by=name: {"status": "stopped", "by": by})
        assert sweep_run.main([output, "seed0"]) == 128 + signal.Signals[name]
        assert 128 + signal.Signals[name] in jobset.ASKED and manifest.result(output, "seed0") is None
    for argv, says in (([output], "expected DIR NAME"), ([output, "seed7"], "no run 'seed7' in the sweep")):
        with pytest.raises(ConfigError, match=says):
            sweep_run.main(argv)


def test_seconds_are_of_all_steps_also_of_those_that_were_not_timed():
    rows = [{"step": 1}, {"step": 5, "seconds_per_step": 2.0}, {"step": 9, "seconds_per_step": 4.0}]
    assert sweep_run.seconds(rows) == 9 * 3.0
    assert sweep_run.seconds(rows[:1]) is None


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
        ("return Sweep(CONFIG, {'label.loss': 1.0})", "label.loss: the results have a column loss already"),
        ("return Sweep(CONFIG, ({'seed': 1, 'label.seed': 2},))", "label.seed: the results have a column seed already"),
        ("return Sweep(CONFIG, ({}, {'seed': 0}))", "runs run and seed0 are the same run"),
        ("return Sweep(CONFIG, {'task': 'vae'})", "run run: "),
        ("return Sweep(CONFIG, {'seed': object()})", "seed=<object.*: expected numbers, text"),
        ("return Sweep(CONFIG, {'seed': 1}, suites=('moving_shape',))", "suites: unknown 'moving_shape'; did you mean"),
        ("return Sweep(CONFIG, {'seed': 1}, prompts=0)", "prompts=0: expected at least 1"),
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
