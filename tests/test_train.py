"""The loop: exact resume, stopping, and words for what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import config_file, make_tiny

from vidgen import config as configs
from vidgen import train
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip
from vidgen.data.moving_shapes import MovingShapes
from vidgen.parallel.processes import Restartable
from vidgen.training import metrics, restored
from vidgen.training.checkpoint import Checkpoints, read_config
from vidgen.training.resilience import only_one


def config(**changes):
    c = make_tiny()
    c.train.update(changes)
    return c


def saved(workdir, step):
    """Every array of a checkpoint, by name."""
    checkpoints = Checkpoints(str(workdir))
    try:
        restore = ocp.args.StandardRestore()
        items = checkpoints._manager.restore(step, args=ocp.args.Composite(state=restore, ema=restore))
        leaves = jax.tree_util.tree_leaves_with_path({"state": items["state"], "ema": items["ema"]})
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps in one go, with everything on."""
    workdir = tmp_path_factory.mktemp("straight")
    c = config(eval_every=3, eval_rows=4, sample_every=6)
    result = train.run(c, str(workdir))
    assert (
        configs.difference(c, config(eval_every=3, eval_rows=4, sample_every=6)) == []
    )  # a run changes no one's config
    return workdir, result


def test_a_run_leaves_what_it_says(straight):
    workdir, result = straight
    assert result.step == 6 and not result.stopped_by
    rows = metrics.read(str(workdir))
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    for name in ("loss", "grad_norm", "lr", "tokens_seen", "tokens_per_second", "mfu", "data_wait_fraction"):
        assert np.isfinite(rows[-1][name]), name
    assert all(0 <= row["data_wait_fraction"] <= 1 for row in rows[1:])
    assert rows[-1]["tokens_seen"] == pytest.approx(6 * 4 * 24, rel=0.1)  # rows are full, nearly
    assert [("heldout_loss" in row) for row in rows] == [False, True, False, True]
    left = read_config(str(workdir))
    assert configs.difference(left, config(eval_every=3, eval_rows=4, sample_every=6)) == ["sample.prompts"]
    for file in ("grid.mp4", "grid.gif", "prompts.json"):
        assert os.path.getsize(workdir / "samples" / "00000006" / file) > 0
    asked = json.loads((workdir / "samples/00000006/prompts.json").read_text())["prompts"]
    assert len(asked) == 6 and asked == list(left.sample.prompts)


def test_stopping_and_going_on_equals_never_having_stopped(straight, tmp_path, stopped_at_three):
    """2N steps = N steps, SIGTERM, N steps: every array bit for bit, though samples and held-out loss come between."""
    workdir, _ = straight
    with stopped_at_three():
        first = train.run(config(checkpoint_every=100), str(tmp_path))
    assert first.step == 3 and first.stopped_by == "SIGTERM"
    second = train.run(config(checkpoint_every=100), str(tmp_path))
    assert second.step == 6 and not second.stopped_by
    a, b = saved(workdir, 6), saved(tmp_path, 6)
    assert a.keys() == b.keys() and any("ema" in k for k in a) and any("opt_state" in k for k in a)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert metrics.read(str(tmp_path))[-1]["tokens_seen"] == metrics.read(str(workdir))[-1]["tokens_seen"]


def test_resuming_on_another_mesh_gives_the_same_losses_and_what_it_trained_can_be_sampled(straight, tmp_path):
    workdir, _ = straight
    c = config()
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "checkpoints" / "3")
    c.mesh.update(data=1, fsdp=2, context=2, attention="ulysses+gather", ulysses=2)
    c.model.attention = "blockwise"
    train.run(c, str(tmp_path))
    last = metrics.read(str(tmp_path))[-1]
    assert last["step"] == 6
    np.testing.assert_allclose(last["loss"], metrics.read(str(workdir))[-1]["loss"], rtol=1e-4)
    # On the mesh of this machine, whatever it was trained on.
    _, generator, params, step = restored.load(str(tmp_path))
    assert step == 6 and generator.mesh.shape["fsdp"] == 4
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_a_finished_run_has_nothing_to_do(straight, capsys):
    workdir, _ = straight
    before = metrics.read(str(workdir))
    assert train.run(config(eval_every=3, eval_rows=4, sample_every=6), str(workdir)).step == 6
    assert metrics.read(str(workdir)) == before
    assert "Already at step 6 of 6" in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused(straight):
    workdir, _ = straight
    c = config()
    c.model.width = 64
    with pytest.raises(ConfigError, match="another config: it differs in model.width"):
        train.run(c, str(workdir))


def test_a_workdir_has_one_run_at_a_time(straight):
    workdir, _ = straight
    with only_one(str(workdir)), pytest.raises(ConfigError, match="another vidgen is at work there"):
        train.run(config(eval_every=3, eval_rows=4, sample_every=6), str(workdir))


def emptied(checkpoint):
    """Damages a checkpoint."""
    for file in (checkpoint / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(straight, tmp_path, capsys):
    workdir, _ = straight
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    emptied(tmp_path / "checkpoints" / "6")
    assert train.run(config(), str(tmp_path)).step == 6
    told = capsys.readouterr().err
    assert "Skipping the checkpoint of step 6" in told and "Going on after step 3" in told
    a, b = saved(workdir, 6), saved(tmp_path, 6)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert (tmp_path / "checkpoints" / "6.damaged-1").is_dir()  # kept for who wants to look at it
    for step in "3", "6":
        emptied(tmp_path / "checkpoints" / step)
    with pytest.raises(ConfigError, match="none of the checkpoints is good"):
        train.run(config(), str(tmp_path))


def test_where_checkpoints_are_out_of_sight_nothing_is_started_from_nothing(straight, tmp_path):
    """As where the disk that they lie on is mounted later than the run is started."""
    workdir, _ = straight
    for name in ("goodput.jsonl", "metrics.jsonl"):
        shutil.copy(workdir / name, tmp_path / name)
    before = metrics.read(str(tmp_path))
    with pytest.raises(Restartable, match=r"holds no checkpoint, though one of step \d was saved: is the disk there"):
        train.run(config(), str(tmp_path))
    assert metrics.read(str(tmp_path)) == before


def test_a_workdir_that_is_removed_under_the_run_is_saved_again_and_said(straight, tmp_path, monkeypatch):
    """Nobody could tell any more that it is at work there: its lock went as well."""
    first, workdir = straight[0], tmp_path / "run"

    def then(act):
        """`act`, once, after the checkpoint of step 3."""

        def save(self, *args, _save=Checkpoints.save, **kwargs):
            _save(self, *args, **kwargs)
            if self.latest == 3 or not self.steps:
                self.wait()
                act()
                monkeypatch.setattr(Checkpoints, "save", _save)

        monkeypatch.setattr(Checkpoints, "save", save)

    then(lambda: shutil.rmtree(workdir))
    with pytest.raises(Restartable, match="was removed while the run was at work: step 6 is saved there again"):
        train.run(config(), str(workdir))
    assert train.run(config(), str(workdir)).step == 6
    a, b = saved(first, 6), saved(workdir, 6)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)

    def replaced():
        shutil.rmtree(workdir)
        workdir.mkdir()
        (workdir / "lock").touch()

    shutil.rmtree(workdir)
    then(replaced)
    with pytest.raises(Restartable, match="was replaced while the run was at work: step 6 is not saved there"):
        train.run(config(), str(workdir))
    assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize("steps", [6, 7])
def test_what_a_stop_left_undone_is_made_up_for(straight, tmp_path, steps):
    """A checkpoint of step 6 without its held-out loss and its samples, as a stop in between leaves it."""
    workdir, _ = straight
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    rows = metrics.read(str(workdir))
    bare = [{k: v for k, v in row.items() if not k.startswith("heldout")} for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    c = config(eval_every=3, eval_rows=4, sample_every=6, steps=steps)
    c.optimizer.schedule = read_config(str(workdir)).optimizer.schedule
    assert train.run(c, str(tmp_path)).step == steps
    found = {row["step"]: row for row in metrics.read(str(tmp_path))}
    assert found[6]["heldout_loss"] == rows[-1]["heldout_loss"] and found[6]["loss"] == rows[-1]["loss"]
    assert (tmp_path / "samples" / "00000006" / "grid.gif").stat().st_size > 0
    assert steps in found and [row["step"] for row in metrics.read(str(tmp_path))] == sorted(found)


def test_an_evaluation_is_left_when_a_stop_is_asked_for_and_made_up_for(straight, tmp_path, monkeypatch):
    workdir, _ = straight
    signals = []

    class Asked(train.StopSignal):
        def __init__(self, grace):
            super().__init__(grace)
            signals.append(self)

    def heldout(self, n, state, judged=train.Loop._judged):
        if n == 3 and len(signals) == 1:
            signals[0].name = "SIGTERM"  # it comes when the evaluation has begun
        return judged(self, n, state)

    monkeypatch.setattr(train, "StopSignal", Asked)
    monkeypatch.setattr(train.Loop, "_judged", heldout)
    c = config(eval_every=3, eval_rows=4, checkpoint_every=100)
    first = train.run(c, str(tmp_path))
    assert (first.step, first.stopped_by) == (3, "SIGTERM")
    assert not any("heldout_loss" in row for row in metrics.read(str(tmp_path)))
    assert train.run(c, str(tmp_path)).step == 6
    a, b = ({row["step"]: row.get("heldout_loss") for row in metrics.read(str(w))} for w in (workdir, tmp_path))
    assert a[3] is not None and (a[3], a[6]) == (b[3], b[6])


def test_checkpoints_by_time_are_kept_until_the_next(tmp_path):
    train.run(config(checkpoint_every=100, checkpoint_minutes=1e-6), str(tmp_path))
    left = Checkpoints(str(tmp_path))
    try:
        assert left.steps == [6]  # each went when there was a newer one
    finally:
        left.close()
    with open(tmp_path / "goodput.jsonl", encoding="utf-8") as f:
        assert sum("saved" in json.loads(line) for line in f) >= 6


def test_a_spike_rolls_the_run_back_and_goes_on_with_other_clips(tmp_path, monkeypatch, capsys):
    """Losses that stand out from step 40 on: the run goes back to step 30, once, and ends as a run that was killed
    after that and went on."""
    taken = []

    def seen(self, n, numbers, real=train.Guards.seen):
        high = 40 <= n and not self.rollbacks
        taken.append(n)
        return real(self, n, {k: v * 100 if high and k == "loss" else v for k, v in numbers.items()})

    monkeypatch.setattr(train.Guards, "seen", seen)
    c = config(steps=50, checkpoint_every=10, keep=3, spike=3.0, log_every=10)
    assert train.run(c, str(tmp_path / "a")).step == 50
    told = capsys.readouterr().err
    assert "rolled back from step 42 to 30" in told
    assert taken == [*range(1, 43), *range(31, 51)]
    assert [row["step"] for row in metrics.read(str(tmp_path / "a"))] == [10, 20, 30, 40, 50]
    assert (tmp_path / "a" / "checkpoints" / "40.spike-1").is_dir()
    assert json.loads((tmp_path / "a" / "bad_steps" / "42.json").read_text())["kind"] == "spike"

    # Its checkpoint of step 40 alone knows the way that it took.
    shutil.copytree(tmp_path / "a" / "checkpoints" / "40", tmp_path / "b" / "checkpoints" / "40")
    train.run(c, str(tmp_path / "b"))
    a, b = saved(tmp_path / "a", 50), saved(tmp_path / "b", 50)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_other_clips_are_refused(straight, tmp_path):
    workdir, _ = straight
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    c = config()
    c.data.moving_shapes.clips = 256
    with pytest.raises(ConfigError, match="not the clips that the checkpoint at step 6"):
        train.run(c, str(tmp_path))


def test_too_many_unreadable_clips_stop_the_run_and_few_do_not(tmp_path, monkeypatch):
    read = MovingShapes.read

    def broken(self, index, epoch):
        if index % 2:
            raise BadClip("not a video")
        return read(self, index, epoch)

    monkeypatch.setattr(MovingShapes, "read", broken)
    with pytest.raises(
        ConfigError, match="could not be read \\(not a video: \\d+\\), more than config.train.max_bad=0.01"
    ):
        train.run(config(), str(tmp_path / "strict"))
    train.run(config(max_bad=0.9), str(tmp_path / "patient"))
    assert metrics.read(str(tmp_path / "patient"))[-1]["unreadable_clips"] > 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "config.train.steps=0"),
        ({"eval_every": -1}, "config.train.eval_every=-1"),
        ({"profile_steps": (5,)}, "expected \\(first, last\\)"),
    ],
)
def test_bad_settings(changes, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        train.run(config(**changes), str(tmp_path))
    assert not os.listdir(tmp_path)


def test_rows_that_do_not_divide_into_microbatches_name_the_nearest(tiny, tmp_path):
    tiny.optimizer.accumulate = 3
    with pytest.raises(
        ConfigError, match="config.rows.count=4 does not divide over 4 devices .* in 3 parts .*; nearest: 12"
    ):
        train.run(tiny, str(tmp_path))


def test_an_unwritable_workdir_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a workdir that can be written"):
        train.run(config(), str(tmp_path / "file" / "run"))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    """The real signal to the real command."""
    c = config(steps=100_000, log_every=1, checkpoint_every=100_000)
    c.optimizer.schedule = "constant"  # the same program for any number of steps: compiled once
    command = [
        sys.executable,
        "-m",
        "vidgen.cli",
        "train",
        "--config",
        str(config_file(tmp_path, c)),
        "--workdir",
        str(tmp_path / "w"),
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.time() + 120
    while time.time() < deadline and len(metrics.read(str(tmp_path / "w"))) < 3:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopping after a step and saving" in err
    assert "Stopped by SIGTERM after step" in err and "The same command goes on from there" in err
    stopped = metrics.read(str(tmp_path / "w"))[-1]["step"]
    more = subprocess.run(
        [*command, f"--config.train.steps={stopped + 1}", "--json"], capture_output=True, text=True, env=env
    )
    assert more.returncode == 0, more.stderr
    assert f"Going on after step {stopped}" in more.stderr
    assert json.loads(more.stdout.splitlines()[-1])["step"] == stopped + 1
