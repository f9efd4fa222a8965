"""`vidgen replay`: a step of a run once more, and what was wrong with it."""

import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
from conftest import make_tiny

from vidgen import cli, replay, train
from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.data import feed
from vidgen.data.moving_shapes import MovingShapes
from vidgen.data.sources import open_source
from vidgen.diffusion import generator as generators
from vidgen.training import guards, metrics

pytestmark = pytest.mark.usefixtures("quick_compiles")


def config():
    c = make_tiny()
    c.model.update(layers=1, unroll=1, time_in_seconds=True)
    c.text.layers = 0
    c.optimizer.name = "adamw"
    c.train.update(steps=5, log_every=1, checkpoint_every=2, keep=9)
    return c


def plan_of(c):
    return feed.plan(open_source(c.data, "train"), generators.from_config(c).tokenizer, c)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """(workdir, the clip and the row) of a run in which one clip of step 4 has a frame rate that is not a number."""
    workdir, c = tmp_path_factory.mktemp("poisoned"), config()
    packing = plan_of(c)
    rows = packing.step(3)
    row = max(range(len(rows)), key=lambda i: len(rows[i]))
    victim, read = rows[row][-1], MovingShapes.read

    def broken(self, index, epoch):
        clip = read(self, index, epoch)
        bad = (index, epoch) == (victim.clip, victim.epoch)
        return dataclasses.replace(clip, fps=math.nan) if bad else clip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MovingShapes, "read", broken)
        train.run(c, str(workdir))
        yield workdir, victim, row


def test_a_clip_that_breaks_its_step_is_found(poisoned, capsys):
    workdir, victim, row = poisoned
    assert [r["skipped_steps"] for r in metrics.read(str(workdir))] == [0, 0, 0, 1, 1]
    noted = guards.read(str(workdir), 4)
    assert noted["why"] == "the loss is not finite" and noted["checkpoint"] == 2
    assert victim.clip in [clip["index"] for clip in noted["rows"][row]]
    assert os.listdir(workdir / "bad_steps") == ["4.json"]
    with pytest.raises(SystemExit) as e:
        cli.main(["replay", "--workdir", str(workdir), "--step", "4", "--json"])
    assert e.value.code == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert found["skipped"] and found["loss"] == "nan" and found["same"] and found["from"] == 2
    assert found["not_finite"]
    assert found["suspects"][0]["index"] == victim.clip and found["suspects"][0]["row"] == row
    assert found["suspects"][0]["loss"] == "nan"
    assert all(math.isfinite(float(clip["loss"])) for clip in found["suspects"][1:]) and len(found["suspects"]) > 1
    name = open_source(config().data, "train").name(victim.clip)
    assert name in "\n".join(out[:-1]) and name in found["shown"][0]
    written = json.loads((workdir / "replay" / "4" / "replay.json").read_text())
    finite = [math.isfinite(float(r["loss"])) for r in written["rows"] if r["clips"]]
    assert finite.count(False) == 1 and not math.isfinite(float(written["rows"][row]["loss"]))
    for file in ("clips.gif", "clips.mp4"):
        assert os.path.getsize(workdir / "replay" / "4" / file) > 0


def test_a_step_is_the_same_from_any_checkpoint_or_none(poisoned, tmp_path, capsys):
    workdir, _, _ = poisoned
    found = replay.run(str(workdir), 5)
    assert found["from"] == 4 and found["same"] and not found["skipped"] and not found["not_finite"]
    # Rows weigh by their tokens, which is how the step adds them.
    losses = [row["loss"] for row in found["rows"] if row["clips"]]
    assert min(losses) <= found["loss"] <= max(losses)
    shutil.copy(workdir / "config.json", tmp_path)
    shutil.copy(workdir / "metrics.jsonl", tmp_path)
    again = replay.run(str(tmp_path), 5)
    assert again["from"] == 0 and again["same"] and again["loss"] == found["loss"]
    assert "No checkpoint from before step 5 is left" in capsys.readouterr().err


def test_batches_that_were_left_out_are_left_out_again():
    class Fed:
        def __init__(self, start):
            self.n = start - 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __next__(self):
            self.n += 1
            return self.n, None

    course = type("Course", (), {"batches": staticmethod(Fed)})
    assert list(replay._batches(course, (), 2, 5)) == [(2, 2), (3, 3), (4, 4)]
    assert list(replay._batches(course, ((3, 10), (5, 20)), 2, 7)) == [(2, 2), (3, 13), (4, 14), (5, 25), (6, 26)]


def test_the_checkpoint_is_a_good_one_of_the_way_that_the_step_was_taken_on(capsys):
    class Saved:
        def __init__(self, jumps, damaged=None):
            self.jumps, self.steps, self.damaged = jumps, sorted(jumps), damaged

        def damage(self, step, items=()):
            return "state/d/1: other bits" if step == self.damaged else ""

        def facts(self, step):
            return {"guards": {"jumps": self.jumps[step]}} if self.jumps[step] is not None else {}

    saved = Saved({10: None, 20: [], 30: [[20, 7]], 40: [[20, 7]]})
    assert replay._way(saved, 35, None) == (((20, 7),), 30)
    assert replay._way(saved, 25, None) == (((20, 7),), 20)
    assert replay._way(saved, 35, {"jumps": []}) == ((), 20)  # before the run was rolled back to 20
    assert replay._way(saved, 10, None) == (((20, 7),), 0)
    assert replay._way(Saved({}), 3, None) == ((), 0)
    assert replay._way(Saved(saved.jumps, damaged=30), 35, None) == (((20, 7),), 20)
    assert "Passing over the checkpoint of step 30: state/d/1" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "says"), [(["--step", "6"], "--step=6: expected 1 to 5"), ([], "--step is missing")])
def test_steps_that_are_none(poisoned, capsys, flags, says):
    with pytest.raises(SystemExit) as e:
        cli.main(["replay", "--workdir", str(poisoned[0]), *flags])
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_other_clips_are_refused(poisoned, tmp_path):
    shutil.copytree(poisoned[0] / "checkpoints", tmp_path / "checkpoints")
    c = config()
    c.data.moving_shapes.clips = 256
    (tmp_path / "config.json").write_text(configs.to_json(c))
    with pytest.raises(ConfigError, match="not the clips that the run was trained on"):
        replay.run(str(tmp_path), 4)


def test_a_vaes_step(tmp_path):
    c = configs.base()
    c.task, c.dtype = "vae", "float32"
    c.data.moving_shapes.update(level="easy", sizes=((5, 16, 16), (1, 16, 16)), clips=64)
    c.vae.update(base_dim=8, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1, z_dim=4, remat=False)
    c.clips.update(shapes=((1, 16, 16, 8), (5, 16, 16, 4)), image_steps=1)
    c.optimizer.update(name="adamw", warmup=2)
    c.train.update(steps=3, log_every=1, checkpoint_every=2)
    train.run(c, str(tmp_path))
    found = replay.run(str(tmp_path), 3)
    assert found["same"] and found["from"] == 2 and len(found["rows"]) in (4, 8)
    names = [row["clips"][0]["name"] for row in found["rows"]]
    assert all(name.startswith("moving_shapes/easy/train/") for name in names)
    np.testing.assert_allclose(np.mean([row["loss"] for row in found["rows"]]), found["loss"], rtol=1e-4)
    assert found["suspects"][0]["grad_norm"] == max(row["grad_norm"] for row in found["rows"])
